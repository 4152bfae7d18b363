"""People asked about a part that is handed down, and about what is for a user: nothing gets wider by waiting."""

from dataclasses import replace
from datetime import timedelta

import pytest

from broker.domain.errors import Conflict, Forbidden
from broker.domain.identity import User
from broker.services.approval import requesters_of
from broker.store import models
from tests.approvals import ASKING, PEOPLE, apply, approve, ask, asking, collect, person, states

HANDED = (
    ASKING
    + """
@id("handed-asks-one")
@approval("security")
permit (principal == Agent::"scribe", action == Action::"contacts:write", resource == Resource::"https://crm.example/api");
"""
)


@pytest.fixture
def house(house):
    apply(house, asking(house, policies=HANDED, people=(*PEOPLE, person("alice", "security"))))
    return house


@pytest.fixture
def parent(house):
    task = house.open_task("summarizer", "scribe")
    case = ask(house, task)
    approve(house, case)
    return collect(house, case)


def ask_below(house, parent, **more):
    return ask(house, None, by="scribe", parent_grant_id=parent.grant.id, parent_by_token=True, **more)


def test_a_part_is_collected_inside_its_parent(house, parent):
    case = ask_below(house, parent)
    assert case.approval.expires_at <= parent.grant.expires_at
    approve(house, case)
    house.clock.forward(seconds=100)
    child = collect(house, case, by="scribe")
    assert child.grant.expires_at == parent.grant.expires_at
    assert child.grant.chain == ("summarizer",)
    assert set(parent.grant.kids) <= set(child.grant.kids) and set(parent.grant.policies) <= set(child.grant.policies)


@pytest.mark.parametrize("approved", [False, True])
def test_what_waits_ends_with_the_parent(house, parent, approved):
    """INV-11."""
    case = ask_below(house, parent)
    if approved:
        approve(house, case)
    house.broker.revocation.revoke_grant(house.caller("summarizer"), parent.grant.id)
    assert states(house, case)[1] == "revoked"
    with pytest.raises(Conflict):
        collect(house, case, by="scribe")


def test_who_handed_it_down_and_who_owns_them_do_not_approve_it(house, parent):
    case = ask_below(house, parent)
    with pytest.raises(Forbidden, match="one owner"):
        approve(house, case, by="olga")


def test_the_user_it_is_for_does_not_approve_it(house):
    user = User(name="people:dev:alice", expires_at=house.clock() + timedelta(hours=1))
    case = ask(house, house.open_task(), user=user)
    assert case.grant.on_behalf_of == "people:dev:alice"
    with pytest.raises(Forbidden, match="itself"):
        approve(house, case, by="alice")
    approve(house, case)
    assert collect(house, case).grant.on_behalf_of == "people:dev:alice"


def test_what_waited_ends_with_the_users_token(house):
    user = User(name="people:bob", expires_at=house.clock() + timedelta(seconds=200))
    case = ask(house, house.open_task(), user=user)
    assert case.approval.expires_at == user.expires_at
    approve(house, case)
    house.clock.forward(seconds=100)
    assert collect(house, case).grant.expires_at == user.expires_at


def test_what_a_user_was_asked_for_alone_is_what_waits(house):
    user = User(name="people:bob", expires_at=house.clock() + timedelta(hours=1))
    task = house.open_task()
    mine = ask(house, task, user=user)
    with pytest.raises(Conflict, match="already"):
        ask(house, task, user=replace(user, name="people:carol"))
    approve(house, mine)
    assert collect(house, mine).grant.on_behalf_of == "people:bob"


def test_who_opened_the_whole_does_not_approve_a_part_of_it(house):
    """INV-15, through a task that somebody else opened inside it."""
    catalogue = asking(house, people=(*PEOPLE, person("boss", "security", roles=("approver", "orchestrator"))))
    leading = tuple(
        replace(rule, roles=("agent", "orchestrator")) if rule.name == "scribe" else rule
        for rule in catalogue.principals
    )
    apply(house, replace(catalogue, principals=leading))
    whole = house.open_task("summarizer", "scribe", by="boss")
    part = house.open_task("summarizer", by="scribe", parent_task_id=whole.id, deadline_s=600)
    case = ask(house, part)
    with pytest.raises(Forbidden, match="itself"):
        approve(house, case, by="boss")


def test_one_workload_under_two_names_does_not_approve_what_it_asks_for(house):
    """INV-15, INV-17."""
    catalogue = asking(house)
    twice = replace(
        next(rule for rule in catalogue.principals if rule.name == "pipeline"),
        name="pipeline-the-approver",
        roles=("approver",),
        groups=("security",),
        owner=None,
        claims={"email": "pipeline@example.org"},
    )
    apply(house, replace(catalogue, principals=(*catalogue.principals, twice)))
    case = ask(house, house.open_task())
    voter = replace(house.caller("sam").principal, name=twice.name, issuer="dev", subject="dev:pipeline", owner=None)
    with house.broker.database.read() as db:
        assert requesters_of(db, case.grant, catalogue).include(voter)


def test_what_waits_below_an_ended_parent_is_not_collected_whatever_its_own_row_says(house, parent):
    """INV-11."""
    case = ask_below(house, parent)
    approve(house, case)
    grants = models.table_of(models.Grant)
    ended = {"state": "revoked", "revoked_at": house.clock(), "revoked_by": "nobody", "reason": "drill"}
    with house.broker.database.begin() as db:
        db.execute(grants.update().where(grants.c.id == parent.grant.id).values(**ended))
    with pytest.raises(Conflict, match="was to be handed down, has ended"):
        collect(house, case, by="scribe")


def test_what_waits_for_a_user_whose_issuer_was_taken_out_is_not_collected(house):
    user = User(name="people:bob", expires_at=house.clock() + timedelta(hours=1))
    case = ask(house, house.open_task(), user=user)
    approve(house, case)
    catalogue = house.broker.standing.now().catalogue
    apply(house, replace(catalogue, issuers=catalogue.issuers[:1]))
    with pytest.raises(Forbidden, match="is not configured any more"):
        collect(house, case)


def test_why_a_part_and_what_is_for_a_user_were_decided_so_is_told_whole(house, parent):
    """The request that is put together again is the one that was asked: nothing of it is missing."""
    user = User(name="people:bob", expires_at=house.clock() + timedelta(hours=1))
    task = house.open_task("summarizer", "scribe")
    theirs = house.issue(task, user=user)
    part = house.issue(None, by="scribe", parent_grant_id=theirs.grant.id, parent_by_token=True)
    for issued in (parent, theirs, part):
        told = house.broker.explaining.explain(house.caller("ada"), issued.grant.id)
        assert told.missing == (), told.missing
