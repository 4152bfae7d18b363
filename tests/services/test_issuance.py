"""Issuing and renewing: what is decided, what is recorded, and what never leaves."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import jwt
import pytest

from broker.domain.errors import (
    Conflict,
    Forbidden,
    IdempotencyConflict,
    Invalid,
    InvalidScope,
    InvalidTarget,
    LimitExceeded,
    LockedDown,
    NotFound,
    PolicyDenied,
    RoleMissing,
    TaskNotActive,
)
from broker.domain.grant import IdempotencyClaim
from broker.domain.lifecycle import GrantState, TaskState
from tests.house import CRM, ISSUER, build_house

KEY = IdempotencyClaim(key_sha256="a" * 64, request_sha256="b" * 64)


def events(house, **filters):
    return house.broker.audit_trail.page(house.caller("audrey"), filters, before=None, limit=1000)


def claims_of(issued):
    return jwt.decode(issued.credential.token.reveal(), options={"verify_signature": False})


def test_a_token_says_what_was_granted_and_nothing_else(house):
    task = house.open_task()
    issued = house.issue(task)
    grant = issued.grant
    assert claims_of(issued) == {
        "iss": ISSUER,
        "sub": "summarizer",
        "aud": CRM,
        "client_id": "summarizer",
        "iat": int(house.clock().timestamp()),
        "nbf": int(house.clock().timestamp()),
        "exp": int(house.clock().timestamp()) + 300,
        "jti": grant.jti,
        "scope": "contacts:read",
        "authorization_details": [{"type": "urn:broker:task", "task_id": task.id}],
        "status": {"status_list": {"idx": grant.status_index, "uri": f"{ISSUER}/status-lists/{grant.status_list}"}},
        "grant_id": grant.id,
        "task_id": task.id,
    }
    assert house.is_active(issued)


def test_a_grant_is_durable_before_its_credential_is_handed_out(house):
    issued = house.issue(house.open_task())
    found, live, _ = house.broker.verification.find_grant(house.caller("summarizer"), issued.grant.id)
    assert found == issued.grant
    assert live
    assert issued.credential.token.reveal() not in repr(found)


@pytest.mark.parametrize(
    ("wanted", "deadline_s", "ttl_s", "decided_by"),
    [
        (None, 3600, 300, "default"),
        (timedelta(seconds=120), 3600, 120, "request"),
        (timedelta(seconds=120), 60, 60, "task"),
        (None, 200, 200, "task"),
    ],
)
def test_the_shortest_ceiling_decides_the_lifetime_and_is_named(house, wanted, deadline_s, ttl_s, decided_by):
    grant = house.issue(house.open_task(deadline_s=deadline_s), ttl=wanted).grant
    assert (grant.ttl_s, grant.ttl_decided_by) == (ttl_s, decided_by)
    assert grant.expires_at - grant.issued_at == timedelta(seconds=ttl_s)


def test_a_policy_may_shorten_the_lifetime(house):
    grant = house.issue(house.open_task(), scope="contacts:write", jkt="k" * 43).grant
    assert (grant.ttl_s, grant.ttl_decided_by) == (60, "policy")


def test_nothing_outlives_the_workload_token_that_asked(house):
    caller = replace(house.caller("summarizer"), proof_expires_at=house.clock() + timedelta(seconds=45))
    grant = house.issue(house.open_task(), caller=caller).grant
    assert (grant.ttl_s, grant.ttl_decided_by) == (45, "proof")


def test_a_request_beyond_policy_is_refused_recorded_and_explained(house):
    task = house.open_task()
    with pytest.raises(PolicyDenied) as refused:
        house.issue(task, scope="contacts:write")
    assert refused.value.decision["outcome"] == "deny"
    assert refused.value.decision["reasons"]
    denied, live, _ = house.broker.verification.find_grant(house.caller("summarizer"), refused.value.grant_id)
    assert denied.state is GrantState.DENIED
    assert not live
    # What was decided is kept; what would have been allowed is searched for after the commit, for the answer alone.
    *kept, hint = refused.value.decision["reasons"]
    assert denied.decision == {**refused.value.decision, "reasons": kept}
    assert "DPoP" in hint
    assert [event.outcome for event in events(house, type="grant.denied")] == ["denied"]


def test_the_decision_on_a_grant_names_its_policies_and_version(house):
    grant = house.issue(house.open_task()).grant
    assert grant.policies == ("crm-read",)
    assert grant.decision["policies"] == ["crm-read"]
    assert grant.policy_version == house.broker.standing.now().catalogue.version == 1
    assert len(grant.request_sha256) == 64


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"by": "pipeline"}, RoleMissing),
        ({"by": "scribe"}, NotFound),
        ({"resource": "https://crm.example/api/"}, InvalidTarget),
        ({"resource": "https://CRM.example/api"}, InvalidTarget),
        ({"scope": "contacts:delete"}, InvalidScope),
        ({"scope": "contacts:read contacts:delete"}, InvalidScope),
        ({"task_id": "task_0000000000000000000000000z"}, NotFound),
        ({"task_id": "nonsense'; DROP TABLE tasks"}, NotFound),
        ({"task_id": None}, Invalid),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_granted_is_refused_and_leaves_no_grant(house, wrong, error):
    task = house.open_task()
    with pytest.raises(error):
        house.issue(task, **wrong)
    assert house.broker.verification.page_of_grants(house.caller("ada"), {}, before=None, limit=10) == []


def test_a_task_is_a_ceiling(house):
    task = house.open_task(ceiling={CRM: ["contacts:write"]})
    with pytest.raises(InvalidScope, match="does not include contacts:read"):
        house.issue(task)


def test_a_task_that_ended_gets_nothing_more(house):
    task = house.open_task()
    house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED)
    with pytest.raises(TaskNotActive):
        house.issue(task)
    assert [event.outcome for event in events(house, type="grant.refused")] == ["task_not_active"]


def test_a_task_past_its_deadline_gets_nothing_more_though_nobody_swept(house):
    task = house.open_task(deadline_s=60)
    house.clock.forward(seconds=60)
    with pytest.raises(TaskNotActive):
        house.issue(task)


def test_a_task_whose_heartbeat_was_lost_gets_nothing_more_though_nobody_swept(house):
    task = house.open_task(heartbeat=timedelta(seconds=30))
    issued = house.issue(task)
    house.clock.forward(seconds=29)
    assert house.is_active(issued)
    house.clock.forward(seconds=1)
    assert not house.is_active(issued)
    with pytest.raises(TaskNotActive):
        house.issue(task)
    with pytest.raises(TaskNotActive):
        house.broker.tasks.heartbeat(house.caller("pipeline"), task.id)


def test_an_implicit_task_lives_as_long_as_its_token(house):
    issued = house.issue(None, by="scribe")
    task = house.broker.tasks.find(house.caller("scribe"), issued.grant.task_id)
    assert task.implicit
    assert task.deadline_at == issued.grant.expires_at == issued.credential.expires_at
    assert [event.type for event in events(house, task_id=task.id)] == ["grant.issued", "task.opened"]


def test_a_bound_grant_says_so_and_cannot_be_renewed_without_its_key(house):
    issued = house.issue(house.open_task(), jkt="k" * 43)
    assert claims_of(issued)["cnf"] == {"jkt": "k" * 43}
    assert issued.credential.token_type == "DPoP"
    with pytest.raises(Forbidden):
        house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=None)
    with pytest.raises(Forbidden):
        house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=None, jkt="j" * 43)
    renewed = house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=None, jkt="k" * 43)
    assert claims_of(renewed)["cnf"] == {"jkt": "k" * 43}


class TestRenewal:
    def test_keeps_the_grant_and_changes_the_token(self, house):
        issued = house.issue(house.open_task())
        house.clock.forward(seconds=200)
        renewed = house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=None)
        assert renewed.grant.id == issued.grant.id
        assert renewed.grant.jti != issued.grant.jti
        assert renewed.grant.status_index == issued.grant.status_index
        assert claims_of(renewed)["exp"] == int(house.clock().timestamp()) + 300
        assert house.is_active(renewed)
        assert house.is_active(issued)
        house.clock.forward(seconds=100)
        assert not house.is_active(issued)
        assert house.is_active(renewed)

    def test_ends_at_the_grants_maximum(self, house):
        issued = house.issue(house.open_task(deadline_s=7200))
        for _ in range(13):
            house.clock.forward(seconds=270)
            issued = house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=None)
        assert issued.grant.ttl_decided_by == "grant"
        assert issued.grant.expires_at == issued.grant.renewable_until
        house.clock.at = issued.grant.expires_at
        with pytest.raises(Conflict):
            house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=None)

    def test_is_refused_to_others_as_if_it_were_not_there(self, house):
        issued = house.issue(house.open_task("summarizer", "scribe"))
        with pytest.raises(NotFound) as refused:
            house.broker.renewal.renew(house.caller("scribe"), issued.grant.id, ttl=None)
        with pytest.raises(NotFound) as absent:
            house.broker.renewal.renew(house.caller("scribe"), issued.grant.id[:-1] + "0", ttl=None)
        assert str(refused.value)[:20] == str(absent.value)[:20]

    def test_of_an_ended_grant_is_refused(self, house):
        issued = house.issue(house.open_task())
        house.broker.revocation.revoke_grant(house.caller("summarizer"), issued.grant.id)
        with pytest.raises(Conflict):
            house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=None)

    def test_a_shorter_renewal_does_not_end_the_token_before_it(self, house):
        issued = house.issue(house.open_task())
        house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=timedelta(seconds=10))
        house.clock.forward(seconds=60)
        assert house.is_active(issued)


class TestIdempotency:
    def test_the_same_key_gives_the_same_grant(self, house):
        task = house.open_task()
        first, again = (house.issue(task, idempotency=KEY) for _ in range(2))
        assert first.grant.id == again.grant.id
        # The first token may have been lost or not: this is one more of the same grant, under a name of its own.
        assert claims_of(first) | {"jti": ""} == claims_of(again) | {"jti": ""}
        assert again.grant.credential_sha256 != first.grant.credential_sha256
        assert [event.type for event in events(house, grant_id=first.grant.id)] == ["grant.reissued", "grant.issued"]
        assert house.is_active(again)

    def test_the_same_key_with_another_body_is_refused(self, house):
        task = house.open_task()
        house.issue(task, idempotency=KEY)
        with pytest.raises(IdempotencyConflict):
            house.issue(task, idempotency=replace(KEY, request_sha256="c" * 64))

    def test_the_same_key_of_another_caller_is_another_key(self, house):
        task = house.open_task("summarizer", "scribe")
        mine = house.issue(task, idempotency=KEY)
        theirs = house.issue(task, by="scribe", idempotency=KEY)
        assert mine.grant.id != theirs.grant.id

    def test_a_key_whose_grant_ended_gives_no_second_one(self, house):
        task = house.open_task()
        issued = house.issue(task, idempotency=KEY)
        house.broker.revocation.revoke_grant(house.caller("summarizer"), issued.grant.id)
        with pytest.raises(Conflict):
            house.issue(task, idempotency=KEY)

    def test_a_refused_request_does_not_use_up_its_key(self, house):
        task = house.open_task()
        with pytest.raises(InvalidScope):
            house.issue(task, scope="contacts:delete", idempotency=KEY)
        assert house.issue(task, idempotency=replace(KEY, request_sha256="c" * 64))

    def test_fifty_at_once_make_one_grant(self, house, second_house):
        task = house.open_task()

        def ask(number):
            return (house if number % 2 else second_house).issue(task, idempotency=KEY).grant.id

        with ThreadPoolExecutor(50) as pool:
            made = set(pool.map(ask, range(50)))
        assert len(made) == 1
        assert len(house.broker.verification.page_of_grants(house.caller("ada"), {}, before=None, limit=100)) == 1


def test_the_limit_of_live_grants_holds_for_fifty_at_once_over_two_brokers(house, store_url, tmp_path):
    brokers = [build_house(store_url, tmp_path, clock=house.clock, max_live_per_agent=7) for _ in range(2)]
    task = house.open_task()

    def ask(number):
        try:
            return brokers[number % 2].issue(task).grant.id
        except LimitExceeded:
            return None

    with ThreadPoolExecutor(50) as pool:
        made = [grant_id for grant_id in pool.map(ask, range(50)) if grant_id]
    assert len(made) == len(set(made)) == 7
    house.clock.forward(seconds=300)
    assert brokers[0].issue(task)
    for broker in brokers:
        broker.broker.close()


def test_a_lockdown_refuses_what_comes_next(house):
    task = house.open_task()
    house.broker.revocation.set_lockdown(house.caller("ada"), "agent", "summarizer", reason="under investigation")
    with pytest.raises(LockedDown, match="under investigation"):
        house.issue(task)
    assert [event.outcome for event in events(house, type="grant.refused")] == ["locked_down"]


def test_one_poisonous_request_does_not_refuse_its_neighbours(house):
    task = house.open_task()
    good = house.issue(task).grant

    def ask(number):
        try:
            # Longer than its column: PostgreSQL refuses the row, and with it the whole transaction.
            return house.issue(task, intent="x" * 5000 if number == 7 else None).grant.id
        except Exception as problem:
            return type(problem).__name__

    with ThreadPoolExecutor(20) as pool:
        outcomes = list(pool.map(ask, range(20)))
    assert sum(outcome.startswith("grt_") for outcome in outcomes) >= 19
    assert good.id not in outcomes


class TestEveryTokenIsAccountedFor:
    """A grant may have several tokens out: each dies with its key, its policies and its holder (INV-03)."""

    def test_revoking_a_key_ends_grants_whose_earlier_token_it_signed(self, house):
        task = house.open_task(deadline_s=7200)
        first = house.issue(task)
        (old,) = first.grant.kids
        house.broker.keys.rotate(actor="tests", now=house.clock())
        renewed = house.broker.renewal.renew(house.caller("summarizer"), first.grant.id, ttl=None)
        assert set(renewed.grant.kids) > {old}
        outcome = house.broker.revocation.revoke_along(house.caller("ada"), "key", old, reason="drill")
        assert outcome.total == 1
        assert not house.is_active(first)
        assert not house.is_active(renewed)

    def test_nothing_is_signed_again_by_a_key_that_is_locked_down(self, house):
        task = house.open_task()
        house.issue(task, idempotency=KEY)
        house.clock.forward(seconds=31)
        house.broker.keys.rotate(actor="tests", now=house.clock())
        kid = house.broker.standing.now().keys.current("ES256").kid
        house.broker.revocation.set_lockdown(house.caller("ada"), "key", kid, reason="drill")
        with pytest.raises(LockedDown):
            house.issue(task, idempotency=KEY)

    def test_revoking_a_key_ends_grants_whose_token_was_signed_again_by_it(self, house):
        task = house.open_task()
        first = house.issue(task, idempotency=KEY)
        house.broker.keys.rotate(actor="tests", now=house.clock())
        again = house.issue(task, idempotency=KEY)
        new = again.grant.kids[-1]
        assert new not in first.grant.kids
        assert house.broker.revocation.revoke_along(house.caller("ada"), "key", new, reason="drill").total == 1
        assert not house.is_active(again)

    def test_revoking_a_policy_ends_grants_it_once_allowed(self, house):
        task = house.open_task()
        first = house.issue(task)
        catalogue = house.broker.settings.catalogue
        renamed = {
            file: text.replace('@id("crm-read")', '@id("crm-look")') for file, text in catalogue.policies.items()
        }
        house.broker.administration.apply(replace(catalogue, policies=renamed), by="tests")
        renewed = house.broker.renewal.renew(house.caller("summarizer"), first.grant.id, ttl=None)
        assert renewed.grant.policies == ("crm-read", "crm-look")
        assert (
            house.broker.revocation.revoke_along(house.caller("ada"), "policy", "crm-read", reason="drill").total == 1
        )
        assert not house.is_active(first)

    def test_a_replay_after_renewals_lives_no_longer_than_was_decided(self, house):
        task = house.open_task(deadline_s=7200)
        first = house.issue(task, idempotency=KEY)
        for _ in range(4):
            house.clock.forward(seconds=200)
            house.broker.renewal.renew(house.caller("summarizer"), first.grant.id, ttl=None)
        claims = claims_of(house.issue(task, idempotency=KEY))
        assert claims["exp"] - claims["iat"] == 300

    def test_a_replay_with_another_key_or_none_is_another_request(self, house):
        task = house.open_task()
        house.issue(task, idempotency=KEY, jkt="k" * 43)
        for jkt in (None, "j" * 43):
            with pytest.raises(IdempotencyConflict):
                house.issue(task, idempotency=KEY, jkt=jkt)

    def test_a_refused_replay_keeps_the_key_for_what_it_stands_for(self, house):
        """INV-06: a resource that comes and goes must not turn one key into two live grants."""
        task = house.open_task()
        first = house.issue(task, idempotency=KEY)
        catalogue = house.broker.settings.catalogue
        without = replace(
            catalogue, resources=tuple(r for r in catalogue.resources if r.identifier != CRM), policies={}
        )
        house.broker.administration.apply(without, by="tests")
        with pytest.raises(InvalidTarget):
            house.issue(task, idempotency=KEY)
        house.broker.administration.apply(catalogue, by="tests", allow_older=True)
        assert house.issue(task, idempotency=KEY).grant.id == first.grant.id

    def test_an_ended_grant_keeps_its_key_ended_however_often_it_is_tried(self, house):
        task = house.open_task()
        issued = house.issue(task, idempotency=KEY)
        house.broker.revocation.revoke_grant(house.caller("ada"), issued.grant.id)
        for _ in range(3):
            with pytest.raises(Conflict):
                house.issue(task, idempotency=KEY)

    def test_a_grant_is_its_holders_and_not_everybodys_of_that_name(self, house):
        """INV-17: two workloads may share a name; neither renews or ends what the other holds."""
        issued = house.issue(house.open_task())
        caller = house.caller("summarizer")
        other = replace(caller, principal=replace(caller.principal, subject="dev:another-pod"))
        with pytest.raises(NotFound):
            house.broker.renewal.renew(other, issued.grant.id, ttl=None)
        with pytest.raises(RoleMissing):
            house.broker.revocation.revoke_grant(other, issued.grant.id)
        assert house.is_active(issued)
        assert events(house, type="grant.issued")[0].data["subject"] == "dev:summarizer"
        assert {event.data["subject"] for event in events(house, actor="summarizer") if "refused" in event.type} == {
            "dev:another-pod"
        }


class TestRenewalIsDecidedAgain:
    def test_who_is_no_agent_any_more_renews_nothing(self, house):
        issued = house.issue(house.open_task())
        catalogue = house.broker.settings.catalogue
        demoted = tuple(
            replace(rule, roles=("auditor",)) if rule.name == "summarizer" else rule for rule in catalogue.principals
        )
        house.broker.administration.apply(replace(catalogue, principals=demoted), by="tests")
        with pytest.raises(RoleMissing):
            house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=None)

    def test_a_resource_that_now_wants_bound_tokens_renews_no_bearer(self, house):
        """INV-21"""
        issued = house.issue(house.open_task())
        catalogue = house.broker.settings.catalogue
        bound = tuple(replace(resource, require_dpop=True) for resource in catalogue.resources)
        house.broker.administration.apply(replace(catalogue, resources=bound), by="tests")
        with pytest.raises(Invalid, match="sender-bound"):
            house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=None)

    def test_a_proof_for_a_grant_that_is_not_bound_is_refused_and_not_ignored(self, house):
        issued = house.issue(house.open_task())
        with pytest.raises(Invalid, match="not bound"):
            house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=None, jkt="k" * 43)

    def test_every_refused_renewal_is_on_record(self, house):
        """Issue and renewal alike: who asked, for what, and why not (INV-32)."""
        issued = house.issue(house.open_task(), jkt="k" * 43)
        with pytest.raises(Forbidden):
            house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=None)
        with pytest.raises(NotFound):
            house.broker.renewal.renew(house.caller("scribe"), issued.grant.id, ttl=None)
        refused = events(house, type="grant.renewal_refused")
        assert [(event.actor, event.outcome) for event in refused] == [
            ("scribe", "not_found"),
            ("summarizer", "forbidden"),
        ]


def test_an_implicit_task_has_no_purpose_that_policy_could_believe(house):
    """What the agent says of itself is its intent, never a fact of the broker's."""
    catalogue = house.broker.settings.catalogue
    policy = '@id("by-purpose")\npermit (principal, action, resource) when { context.task.purpose like "*lead*" };'
    house.broker.administration.apply(replace(catalogue, policies={"p.cedar": policy}), by="tests")
    with pytest.raises(PolicyDenied):
        house.issue(None, by="scribe", intent="lead lead lead")


@pytest.mark.parametrize(
    ("wrong", "outcome"),
    [
        ({"resource": "https://elsewhere.example"}, "invalid_target"),
        ({"scope": "contacts:delete"}, "invalid_scope"),
        ({"task_id": "task_0000000000000000000000000z"}, "not_found"),
    ],
)
def test_what_is_refused_before_policy_is_asked_is_on_record_too(house, wrong, outcome):
    task = house.open_task()
    with pytest.raises(Exception):  # noqa: B017 - which one is another test's question
        house.issue(task, **wrong)
    assert [event.outcome for event in events(house, type="grant.refused")] == [outcome]
