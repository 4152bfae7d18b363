"""People asked: who counts, what they may leave of a request, and how it ends."""

from dataclasses import replace
from datetime import timedelta

import pytest
import sqlalchemy as sa

from broker.domain.approval import Case
from broker.domain.errors import (
    Conflict,
    Forbidden,
    Invalid,
    InvalidScope,
    LimitExceeded,
    LockedDown,
    NotFound,
    PolicyDenied,
    RoleMissing,
    TaskNotActive,
    Unauthenticated,
)
from broker.domain.grant import GrantRequest, IdempotencyClaim
from broker.domain.lifecycle import TaskState
from broker.domain.policy import PolicySet
from broker.store import models
from tests.approvals import (
    ASKING,
    BOTH,
    PEOPLE,
    again,
    apply,
    approve,
    ask,
    asking,
    collect,
    deny,
    person,
    states,
    withdraw,
)
from tests.house import CRM, LEDGER


@pytest.fixture
def house(house):
    apply(house, asking(house))
    return house


def events_of(house, case):
    table = models.table_of(models.AuditEvent)
    with house.broker.database.read() as db:
        rows = db.execute(sa.select(table).where(table.c.grant_id == case.grant.id).order_by(table.c.id)).fetchall()
    return [(row.type, row.actor, row.outcome) for row in rows]


def change_the_row(house, model, where, **values):
    table = models.table_of(model)
    with house.broker.database.begin() as db:
        db.execute(sa.update(table).where(where(table)).values(**values))


def key(number):
    return IdempotencyClaim(key_sha256=f"{number:064x}", request_sha256="a" * 64)


# --- Asking ---


def test_what_people_have_to_allow_is_pending_and_not_denied(house):
    case = ask(house, house.open_task())
    assert states(house, case) == ("open", "pending")
    assert case.grant.issued_at is None and case.grant.jti is None
    assert [(need.group, need.quorum) for need in case.approval.needs] == [("security", 1)]
    assert case.approval.request_sha256 == case.grant.request_sha256
    assert case.approval.policy_version == case.grant.policy_version
    assert case.approval.expires_at == house.clock() + timedelta(hours=1)
    assert events_of(house, case) == [
        ("grant.pending", "summarizer", "ok"),
        ("approval.opened", "summarizer", "ok"),
    ]


def test_who_cannot_wait_is_told_so_and_nobody_is_asked(house):
    with pytest.raises(InvalidScope, match="approval is required"):
        house.issue(house.open_task(), scope="contacts:write")
    assert house.broker.approvals.page(house.caller("ada")) == []


def test_it_waits_no_longer_than_its_task_lasts(house):
    case = ask(house, house.open_task(deadline_s=300), ttl=timedelta(seconds=60))
    assert case.approval.expires_at == house.clock() + timedelta(seconds=300)


def test_a_policy_may_shorten_the_wait(house):
    shorter = ASKING.replace('@approval("security")\npermit', '@approval("security") @approve_within("120")\npermit', 1)
    apply(house, asking(house, policies=shorter))
    assert ask(house, house.open_task()).approval.expires_at == house.clock() + timedelta(seconds=120)


def test_the_same_request_again_joins_the_one_that_waits(house):
    task = house.open_task()
    first = ask(house, task)
    assert ask(house, task).approval.id == first.approval.id
    assert len(house.broker.approvals.page(house.caller("ada"))) == 1


def test_one_that_differs_in_its_words_alone_is_refused_with_the_id_of_the_other(house):
    task = house.open_task()
    first = ask(house, task, intent="tidy up")
    for other in ({"intent": "tidy up, now"}, {"intent": "tidy up", "jkt": "k" * 43}, {"ttl": timedelta(seconds=9)}):
        with pytest.raises(Conflict, match=first.approval.id):
            ask(house, task, **{"intent": "tidy up"} | other)
    # Another task is another piece of work.
    assert ask(house, house.open_task()).approval.id != first.approval.id


def test_a_request_to_another_key_or_of_a_namesake_does_not_join(house):
    """INV-21, INV-17: what one of them would collect, the other asked for."""
    task = house.open_task()
    first = ask(house, task, jkt="k" * 43)
    assert ask(house, task, jkt="k" * 43).approval.id == first.approval.id
    with pytest.raises(Conflict, match=first.approval.id):
        ask(house, task, jkt="j" * 43)
    namesake = house.caller("summarizer")
    namesake = replace(namesake, principal=replace(namesake.principal, subject="dev:another"), identity=None)
    with pytest.raises(Conflict, match=first.approval.id):
        ask(house, task, jkt="k" * 43, caller=namesake)


def test_the_same_request_again_finds_what_is_approved_and_not_collected(house):
    task = house.open_task()
    first = ask(house, task)
    approve(house, first)
    found = ask(house, task)
    assert found.approval.id == first.approval.id and found.may_be_collected
    with pytest.raises(Conflict, match=first.grant.id):
        ask(house, task, intent="something else")
    collect(house, first)
    # What was collected is another matter: people are asked again.
    assert ask(house, task).approval.id != first.approval.id


def test_requests_without_a_task_are_grouped_too(house):
    everybody = ASKING.replace('principal == Agent::"summarizer"', "principal")
    apply(house, asking(house, policies=everybody))
    first = ask(house, None, by="scribe")
    with pytest.raises(Conflict, match=first.approval.id):
        ask(house, None, by="scribe")
    approve(house, first)
    house.clock.forward(seconds=60)
    issued = collect(house, first, by="scribe")
    assert house.is_active(issued)


def test_the_same_idempotency_key_answers_what_waits(house):
    task = house.open_task()
    first = ask(house, task, idempotency=key(1))
    assert ask(house, task, idempotency=key(1)).approval.id == first.approval.id
    joined = ask(house, task, idempotency=key(2))
    assert ask(house, task, idempotency=key(2)).grant.id == joined.grant.id == first.grant.id
    approve(house, first)
    assert ask(house, task, idempotency=key(1)).may_be_collected
    collect(house, first)
    # It stands for a grant that was collected: a second credential does not come of it.
    with pytest.raises(Conflict, match="collect"):
        ask(house, task, idempotency=key(1))


def test_an_agent_may_have_only_so_many_waiting(house):
    limits = replace(house.broker.settings.limits, max_open_approvals_per_agent=2)
    house.broker.issuance._limits = limits
    cases = [ask(house, house.open_task()) for _ in range(2)]
    with pytest.raises(LimitExceeded, match="wait for people"):
        ask(house, house.open_task())
    withdraw(house, cases[0])
    ask(house, house.open_task())


def test_a_group_is_asked_only_so_much_at_once(house):
    limits = replace(house.broker.settings.limits, max_open_approvals_per_group=2)
    house.broker.issuance._limits = limits
    ask(house, house.open_task())
    task = house.open_task("scribe", "summarizer")
    ask(house, task, by="scribe", resource=LEDGER)
    with pytest.raises(LimitExceeded, match="'security'"):
        ask(house, task, resource=LEDGER)


# --- Who says yes ---


def test_one_yes_where_one_is_asked(house):
    case = ask(house, house.open_task())
    decided = approve(house, case, reason="looks right")
    assert states(house, case) == ("approved", "approved")
    assert (decided.approval.ended_by, decided.approval.reason) == ("sam", "looks right")
    assert decided.grant.expires_at == house.clock() + timedelta(minutes=15)
    assert [event for event in events_of(house, case) if event[1] == "sam"] == [
        ("approval.voted", "sam", "ok"),
        ("approval.approved", "sam", "ok"),
        ("grant.approved", "sam", "ok"),
    ]


def test_two_where_two_are_asked_and_nobody_counts_twice(house):
    case = ask(house, house.open_task(), resource=LEDGER)
    assert approve(house, case).met == {"security": 1}
    # Said again, it is the same answer and no second vote.
    assert approve(house, case).met == {"security": 1}
    with pytest.raises(Conflict, match="one vote each"):
        approve(house, case, ttl_s=10)
    with pytest.raises(Conflict, match="one vote each"):
        deny(house, case)
    assert states(house, case) == ("open", "pending")
    approve(house, case, by="sue")
    assert states(house, case) == ("approved", "approved")


SAMS_BOT = person("sams-bot", "security", owner="sam")


@pytest.mark.parametrize(("first", "second"), [("sam", "sams-bot"), ("sams-bot", "sam")])
def test_a_person_and_what_they_own_are_not_two(house, first, second):
    """INV-15."""
    apply(house, asking(house, people=(*PEOPLE, SAMS_BOT)))
    case = ask(house, house.open_task(), resource=LEDGER)
    approve(house, case, by=first)
    with pytest.raises(Forbidden, match=f"{first} has approved it, and may be the same person as {second}"):
        approve(house, case, by=second)
    assert states(house, case) == ("open", "pending")
    assert len(again(house, case).votes) == 1
    # One team owns both, and they are two.
    approve(house, case, by="sue")
    assert states(house, case) == ("approved", "approved")


def test_their_no_is_heard_by_whatever_name(house):
    apply(house, asking(house, people=(*PEOPLE, SAMS_BOT)))
    case = ask(house, house.open_task(), resource=LEDGER)
    approve(house, case)
    deny(house, case, by="sams-bot")
    assert states(house, case) == ("denied", "denied")


def test_a_person_may_speak_for_a_group_with_what_they_own_there(house):
    """Each group is asked for so many people, and one of both groups may speak for both."""
    policies = ASKING.replace('@id("read-is-free")\n', '@id("read-is-free")\n@approval("databases")\n')
    bot = person("sams-bot", "databases", owner="sam")
    apply(house, asking(house, policies=policies, people=(*PEOPLE, bot)))
    case = ask(house, house.open_task())
    assert case.approval.groups == {"security", "databases"}
    approve(house, case)
    approve(house, case, by="sams-bot")
    assert states(house, case) == ("approved", "approved")


def test_two_who_became_one_before_it_is_collected_are_one(house):
    case = ask(house, house.open_task(), resource=LEDGER)
    approve(house, case)
    approve(house, case, by="sue")
    people = tuple(replace(rule, owner="sam") if rule.name == "sue" else rule for rule in PEOPLE)
    apply(house, asking(house, people=people))
    with pytest.raises(Forbidden, match="other people"):
        collect(house, case)


def test_what_the_orchestrator_owns_does_not_approve_what_it_asks_for(house):
    """INV-15: an identity they control."""
    apply(house, asking(house, people=(*PEOPLE, person("pipelines-bot", "security", owner="pipeline"))))
    case = ask(house, house.open_task())
    with pytest.raises(Forbidden, match="asked for this itself"):
        approve(house, case, by="pipelines-bot")


@pytest.mark.parametrize("by", ["olga", "dana", "pipeline", "summarizer", "ada", "scribe"])
def test_who_may_not_approve_is_refused_and_nothing_changes(house, by):
    case = ask(house, house.open_task())
    expected = {"olga": (Forbidden, "one owner"), "dana": (NotFound, "that you may see")}
    kind, sentence = expected.get(by, (NotFound, "see") if by == "scribe" else (RoleMissing, "not an approver"))
    with pytest.raises(kind, match=sentence):
        approve(house, case, by=by)
    assert states(house, case) == ("open", "pending")
    assert again(house, case).votes == ()


@pytest.mark.parametrize("name", ["pipeline", "summarizer"])
def test_an_approver_who_asks_does_not_approve_that(house, name):
    """INV-15: directly, or through the task it opened; whatever the policy says of owners."""
    allowing = ASKING.replace('@approval("security")', '@approval("security") @owner_may_approve("true")')
    found = asking(house, policies=allowing)
    both = tuple(
        replace(rule, roles=(*rule.roles, "approver"), groups=("security",)) if rule.name == name else rule
        for rule in found.principals
    )
    apply(house, replace(found, principals=both))
    case = ask(house, house.open_task())
    with pytest.raises(Forbidden, match="asked for this itself"):
        approve(house, case, by=name)
    assert states(house, case) == ("open", "pending")


@pytest.mark.parametrize("owner", ["dev:olga", "olga", "crm-team"])
def test_who_answers_for_the_agent_does_not_approve_what_it_asks(house, owner):
    """INV-15: the owner may be a team they both are of, or the person itself."""
    found = asking(house)
    rules = tuple(replace(rule, owner=owner) if rule.name == "summarizer" else rule for rule in found.principals)
    apply(house, replace(found, principals=rules))
    case = ask(house, house.open_task())
    with pytest.raises(Forbidden, match="one owner"):
        approve(house, case, by="olga")
    approve(house, case)


def test_the_owner_counts_where_the_policy_says_so(house):
    allowing = ASKING.replace('@approval("security")\n', '@approval("security") @owner_may_approve("true")\n', 1)
    apply(house, asking(house, policies=allowing))
    approve(house, ask(house, house.open_task()), by="olga")
    with pytest.raises(Forbidden, match="one owner"):
        approve(house, ask(house, house.open_task(), resource=LEDGER), by="olga")


def test_every_group_that_is_asked_has_to_say_yes(house):
    two_groups = ASKING.replace(
        '@id("read-is-free")\npermit (principal',
        '@id("read-asks-databases")\n@approval("databases")\npermit (principal',
    )
    apply(house, asking(house, policies=two_groups))
    case = ask(house, house.open_task())
    approve(house, case)
    assert states(house, case) == ("open", "pending")
    approve(house, case, by="dana")
    assert states(house, case) == ("approved", "approved")


def test_somebody_who_is_no_approver_any_more_is_refused(house):
    case = ask(house, house.open_task())
    sam = house.caller("sam")
    apply(house, asking(house, people=PEOPLE[1:]))
    with pytest.raises(Unauthenticated):
        house.broker.approvals.deny(sam, case.approval.id)


def test_one_no_is_enough(house):
    case = ask(house, house.open_task(), resource=LEDGER)
    approve(house, case)
    deny(house, case, by="sue", reason="not in the quarter's close")
    assert states(house, case) == ("denied", "denied")
    assert ("grant.denied", "sue", "denied") in events_of(house, case)
    assert deny(house, case, by="sue").approval.state == "denied"
    with pytest.raises(Conflict, match="nothing left to decide"):
        approve(house, case, by="sid")
    with pytest.raises(Forbidden, match="not in the quarter's close"):
        collect(house, case)


@pytest.mark.parametrize(
    ("by", "kind"), [("ada", RoleMissing), ("pipeline", RoleMissing), ("summarizer", RoleMissing), ("dana", NotFound)]
)
def test_only_those_who_are_asked_say_no(house, by, kind):
    case = ask(house, house.open_task())
    with pytest.raises(kind):
        deny(house, case, by=by)
    assert states(house, case) == ("open", "pending")
    # Who owns the agent may not say yes to it, and may say no.
    deny(house, case, by="olga")
    assert states(house, case) == ("denied", "denied")


def test_a_request_is_withdrawn_by_who_made_it_and_by_nobody_else(house):
    case = ask(house, house.open_task())
    for name in ("sam", "ada"):
        with pytest.raises(RoleMissing):
            withdraw(house, case, by=name)
    with pytest.raises(NotFound):
        withdraw(house, case, by="scribe")
    withdraw(house, case, reason="found another way")
    assert states(house, case) == ("withdrawn", "revoked")
    assert withdraw(house, case).approval.reason == "found another way"
    with pytest.raises(Conflict, match="nothing left to decide"):
        approve(house, case)


# --- Narrowing ---


def test_a_yes_to_less_leaves_less(house):
    case = ask(house, house.open_task(), resource=CRM, ttl=timedelta(seconds=120))
    approve(house, case, scopes=["contacts:read"], ttl_s=60)
    issued = collect(house, case)
    assert issued.grant.scopes == ("contacts:read",)
    assert (issued.grant.ttl_s, issued.grant.ttl_decided_by) == (60, "approval")
    assert issued.grant.expires_at == house.clock() + timedelta(seconds=60)
    assert issued.grant.request_sha256 == case.approval.request_sha256


def test_several_narrowings_intersect(house):
    two = ASKING.replace('@approval("security")\n', '@approval("security") @quorum("2")\n', 1)
    apply(house, asking(house, policies=two))
    case = ask(house, house.open_task(), ttl=timedelta(seconds=200))
    approve(house, case, ttl_s=90)
    approve(house, case, by="sue", scopes=["contacts:write"], ttl_s=100)
    issued = collect(house, case)
    assert (issued.grant.scopes, issued.grant.ttl_s) == (("contacts:write",), 90)


def test_narrowings_that_leave_nothing_together_are_refused(house):
    two = ASKING.replace('@approval("security")\n', '@approval("security") @quorum("2")\n', 1)
    apply(house, asking(house, policies=two))
    case = ask(house, house.open_task())
    approve(house, case, scopes=["contacts:read"])
    with pytest.raises(Conflict, match="nothing is left"):
        approve(house, case, by="sue", scopes=["contacts:write"])
    assert len(again(house, case).votes) == 1


@pytest.mark.parametrize(
    ("wider", "sentence"),
    [
        ({"scopes": ["contacts:read", "contacts:write", "entries:read"]}, "was not asked for"),
        ({"ttl_s": 301}, "more than the 300"),
        ({"scopes": []}, "no scope"),
    ],
)
def test_a_yes_to_more_is_refused(house, wider, sentence):
    """INV-16."""
    case = ask(house, house.open_task())
    with pytest.raises(Invalid, match=sentence):
        approve(house, case, **wider)
    assert states(house, case) == ("open", "pending")


# --- Collecting ---


def test_what_people_approved_is_collected_once(house):
    case = ask(house, house.open_task(), intent="tidy up")
    with pytest.raises(Conflict, match="waits for people"):
        collect(house, case)
    approve(house, case)
    house.clock.forward(seconds=600)
    issued = collect(house, case)
    assert house.is_active(issued)
    # Its life counts from here.
    assert issued.grant.expires_at == house.clock() + timedelta(seconds=300)
    assert events_of(house, case)[-2:] == [
        ("grant.issued", "summarizer", "ok"),
        ("approval.collected", "summarizer", "ok"),
    ]
    with pytest.raises(Conflict, match="collected already"):
        collect(house, case)
    assert house.is_active(issued)


def test_only_the_workload_that_asked_collects(house):
    case = ask(house, house.open_task("summarizer", "scribe"))
    approve(house, case)
    for name in ("scribe", "pipeline", "ada", "sam"):
        with pytest.raises(NotFound):
            collect(house, case, by=name)
    namesake = house.caller("summarizer")
    namesake = replace(namesake, principal=replace(namesake.principal, subject="dev:another"), identity=None)
    with pytest.raises(NotFound):
        house.broker.collection.collect(namesake, case.grant.id)
    collect(house, case)


def test_a_request_bound_to_a_key_is_collected_with_that_key(house):
    """INV-21."""
    case = ask(house, house.open_task(), jkt="k" * 43)
    approve(house, case)
    for other in (None, "j" * 43):
        with pytest.raises(Forbidden, match="bound to a key"):
            collect(house, case, jkt=other)
    assert collect(house, case, jkt="k" * 43).token.token_type == "DPoP"
    unbound = ask(house, house.open_task())
    approve(house, unbound)
    with pytest.raises(Invalid, match="not bound"):
        collect(house, unbound, jkt="k" * 43)


def test_what_is_not_collected_in_time_is_gone(house):
    case = ask(house, house.open_task())
    approve(house, case)
    house.clock.forward(seconds=900)
    with pytest.raises(Conflict, match="is expired"):
        collect(house, case)
    house.broker.sweeper.sweep()
    assert states(house, case) == ("approved", "expired")


def test_what_nobody_decides_expires_with_or_without_the_sweeper(house):
    case = ask(house, house.open_task())
    house.clock.forward(seconds=3600)
    for verb in (approve, deny):
        with pytest.raises(Conflict, match="is expired"):
            verb(house, case)
    with pytest.raises(Conflict, match="is expired"):
        withdraw(house, case)
    house.broker.sweeper.sweep()
    assert states(house, case) == ("expired", "expired")
    assert events_of(house, case)[-2:] == [("grant.expired", "broker", "ok"), ("approval.expired", "broker", "ok")]


def test_what_policy_forbids_meanwhile_is_not_collected(house):
    """INV-13: allowed then is not allowed now."""
    case = ask(house, house.open_task())
    approve(house, case)
    forbidding = ASKING + '@id("freeze") forbid (principal, action == Action::"contacts:write", resource);'
    apply(house, asking(house, policies=forbidding))
    with pytest.raises(PolicyDenied, match="freeze"):
        collect(house, case)
    # Nothing was used up: when it is allowed again, it is collected.
    assert states(house, case) == ("approved", "approved")
    house.broker.administration.apply(asking(house), by="tests", allow_older=True)
    assert house.is_active(collect(house, case))


def test_what_is_left_is_refused_where_what_was_asked_would_be(house):
    case = ask(house, house.open_task())
    approve(house, case, scopes=["contacts:read"])
    forbidding = ASKING + '@id("freeze") forbid (principal, action == Action::"contacts:write", resource);'
    apply(house, asking(house, policies=forbidding))
    with pytest.raises(PolicyDenied, match="freeze"):
        collect(house, case)


def test_when_more_people_are_needed_by_now_it_is_not_collected(house):
    case = ask(house, house.open_task())
    approve(house, case)
    apply(
        house,
        asking(house, policies=ASKING.replace('@approval("security")\n', '@approval("security") @quorum("2")\n', 1)),
    )
    with pytest.raises(Forbidden, match="other people"):
        collect(house, case)


def test_who_left_the_group_does_not_count_any_more(house):
    case = ask(house, house.open_task())
    approve(house, case)
    moved = (replace(PEOPLE[0], groups=("databases",)), *PEOPLE[1:])
    apply(house, asking(house, people=moved))
    assert again(house, case).met == {"security": 0}
    with pytest.raises(Forbidden, match="other people"):
        collect(house, case)


def test_somebody_else_of_the_voters_name_does_not_count(house):
    """INV-17."""
    case = ask(house, house.open_task())
    approve(house, case)
    apply(house, asking(house, people=(replace(PEOPLE[0], subject="dev:another-sam"), *PEOPLE[1:])))
    with pytest.raises(Forbidden, match="other people"):
        collect(house, case)


def test_when_nobody_has_to_be_asked_any_more_it_is_collected(house):
    case = ask(house, house.open_task())
    approve(house, case)
    apply(house, asking(house, policies=ASKING.replace('@approval("security")\n', "", 1)))
    issued = collect(house, case)
    assert issued.grant.decision["outcome"] == "allow"
    assert issued.grant.policy_version == issued.grant.decision["policy_version"]


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (models.Grant, {"intent": "something else"}),
        (models.Grant, {"request_sha256": "0" * 64}),
        (models.Approval, {"request_sha256": "0" * 64}),
        (models.Approval, {"ttl_s": 3000}),
        (models.Approval, {"scopes": ["contacts:read"]}),
        (models.Grant, {"claimed": {"customer": "7"}}),
    ],
)
def test_an_approval_of_another_request_is_none(house, model, values):
    """INV-14: what is collected has the hash that people said yes to."""
    case = ask(house, house.open_task(), intent="tidy up")
    approve(house, case)
    change_the_row(house, model, lambda table: table.c.id.in_([case.grant.id, case.approval.id]), **values)
    with pytest.raises(Conflict, match="not what grant"):
        collect(house, case)
    assert again(house, case).approval.collected_at is None


def test_a_foreign_approval_is_not_to_be_seen(house):
    case = ask(house, house.open_task())
    for name in ("scribe", "dana", "other-pipeline"):
        with pytest.raises(NotFound):
            house.broker.approvals.find(house.caller(name), case.approval.id)
        assert house.broker.approvals.page(house.caller(name)) == []
    for name in ("summarizer", "pipeline", "sam", "olga", "ada", "audrey"):
        assert house.broker.approvals.find(house.caller(name), case.approval.id)
        assert len(house.broker.approvals.page(house.caller(name))) == 1


def test_the_ceilings_of_the_collection_cut_its_life(house):
    case = ask(house, house.open_task(deadline_s=400))
    approve(house, case)
    house.clock.forward(seconds=350)
    issued = collect(house, case)
    assert (issued.grant.ttl_s, issued.grant.ttl_decided_by) == (50, "task")


def test_a_collected_grant_is_not_renewed_past_what_was_approved(house):
    """INV-16: not even where policy asks nobody any more."""
    case = ask(house, house.open_task(), ttl=timedelta(seconds=120))
    approve(house, case, ttl_s=60)
    issued = collect(house, case)
    with pytest.raises(PolicyDenied, match="waits for people"):
        house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=None)
    apply(house, asking(house, policies=ASKING.replace('@approval("security")\n', "", 1)))
    house.clock.forward(seconds=20)
    renewed = house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=None)
    assert renewed.credential.expires_at == issued.grant.expires_at


def test_an_agent_at_its_limit_collects_when_it_has_room(house):
    case = ask(house, house.open_task())
    approve(house, case)
    house.broker.collection._limits = replace(house.broker.settings.limits, max_live_per_agent=1)
    held = house.issue(house.open_task())
    with pytest.raises(LimitExceeded, match="1 live grants"):
        collect(house, case)
    house.broker.revocation.revoke_grant(house.caller("summarizer"), held.grant.id)
    collect(house, case)


# --- What ends it ---


@pytest.mark.parametrize("approved", [False, True])
def test_the_end_of_the_task_ends_what_waits_under_it(house, approved):
    task = house.open_task()
    case = ask(house, task)
    if approved:
        approve(house, case)
    receipt = house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED)
    assert receipt.receipt.lines == []
    assert states(house, case) == ("approved" if approved else "withdrawn", "revoked")
    with pytest.raises(Conflict):
        approve(house, case, by="sue")
    with pytest.raises(TaskNotActive):
        collect(house, case)


def test_a_task_that_time_ended_stands_against_it_before_the_sweeper_comes(house):
    case = ask(house, house.open_task(heartbeat=timedelta(seconds=30)))
    also = ask(house, house.open_task(heartbeat=timedelta(seconds=30)))
    approve(house, also)
    house.clock.forward(seconds=30)
    with pytest.raises(TaskNotActive):
        approve(house, case)
    with pytest.raises(TaskNotActive):
        collect(house, also)


@pytest.mark.parametrize(("axis", "value"), [("agent", "summarizer"), ("resource", CRM), ("policy", "write-asks-one")])
def test_a_revocation_ends_what_it_covers(house, axis, value):
    waiting, approved = ask(house, house.open_task()), ask(house, house.open_task())
    approve(house, approved)
    house.broker.revocation.revoke_along(house.caller("ada"), axis, value, reason="incident 42")
    assert states(house, waiting) == ("withdrawn", "revoked")
    assert again(house, waiting).approval.reason == "incident 42"
    assert states(house, approved) == ("approved", "revoked")
    with pytest.raises(Conflict):
        collect(house, approved)


def test_a_lockdown_stands_against_what_waits_before_rows_follow(house, monkeypatch):
    waiting, approved = ask(house, house.open_task()), ask(house, house.open_task())
    approve(house, approved)
    monkeypatch.setattr(type(house.broker.revocation), "follow", lambda *_, **__: 0)
    house.broker.revocation.set_lockdown(house.caller("ada"), "agent", "summarizer", reason="incident 42")
    with pytest.raises(LockedDown):
        approve(house, waiting)
    with pytest.raises(LockedDown):
        collect(house, approved)
    with pytest.raises(LockedDown):
        ask(house, house.open_task())


def test_the_agent_hands_back_what_it_waits_for(house):
    case = ask(house, house.open_task())
    house.broker.revocation.revoke_grant(house.caller("summarizer"), case.grant.id)
    assert states(house, case) == ("withdrawn", "revoked")


# --- Checked on load ---


@pytest.mark.parametrize(
    ("policies", "people", "sentence"),
    [
        (ASKING, (), "no principal with role approver has the group 'security'"),
        (ASKING, PEOPLE[:1], "wants 2 of 'security', which has 1"),
        (ASKING, (PEOPLE[0], SAMS_BOT), "wants 2 of 'security', which has 1"),
        (ASKING, (person("sam", "securty"), *PEOPLE[4:]), "did you mean 'securty'"),
        (ASKING, tuple(replace(rule, roles=("auditor",)) for rule in PEOPLE), "no principal with role approver"),
        (
            ASKING.replace('@approval("security")\n', '@approval("security") @owner_may_approve("no")\n'),
            PEOPLE,
            "leave it out",
        ),
        (ASKING.replace('@approval("security")\n', '@owner_may_approve("true")\n'), PEOPLE, "without @approval"),
        (
            ASKING.replace('@approval("security")\n', '@approval("security") @approve_within("soon")\n'),
            PEOPLE,
            "whole number",
        ),
    ],
)
def test_an_approval_that_nobody_could_give_is_refused_on_load(sqlite_house, policies, people, sentence):
    with pytest.raises(Exception, match=sentence):
        apply(sqlite_house, asking(sqlite_house, policies=policies, people=people))


def test_one_that_is_in_force_stops_nothing_else(sqlite_house):
    found = asking(sqlite_house, people=())
    assert "ledger-asks-two" in PolicySet.compile(found, applied=True).ids


def test_an_unknown_grant_is_none_of_yours(house):
    for grant_id in ("grt_" + "0" * 26, "../etc", ""):
        with pytest.raises(NotFound):
            house.broker.collection.collect(house.caller("summarizer"), grant_id)
    for approval_id in ("apr_" + "0" * 26, "../etc", ""):
        with pytest.raises(NotFound):
            house.broker.approvals.find(house.caller("sam"), approval_id)


def test_a_batch_may_hold_requests_that_wait_and_others(house):
    task = house.open_task()
    waits = GrantRequest(caller=house.caller("summarizer"), task_id=task.id, resource=CRM, scopes=BOTH, may_wait=True)
    made = house.broker.issuance._issue_all([waits, waits, replace(waits, scopes=frozenset({"contacts:read"}))])
    assert isinstance(made[0], Case) and made[1].approval.id == made[0].approval.id
    assert house.is_active(made[2])
