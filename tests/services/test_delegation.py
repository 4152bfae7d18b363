"""A sub-agent's grant is inside its parent's in every dimension, and ends with it."""

from dataclasses import replace
from datetime import timedelta

import jwt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.domain.errors import (
    BrokerError,
    Forbidden,
    Invalid,
    InvalidScope,
    InvalidTarget,
    LockedDown,
    NotFound,
    PolicyDenied,
    RoleMissing,
)
from broker.domain.identity import User
from broker.domain.lifecycle import GrantState, TaskState
from broker.store.grants import insert_grants
from tests.house import CRM, LEDGER, catalogue_for

AGENTS = ("summarizer", "scribe", "clerk", "intern", "trainee")
OPEN = {
    "open.cedar": """
@id("read-crm")
permit (principal, action == Action::"contacts:read", resource == Resource::"https://crm.example/api");
@id("write-crm")
permit (principal, action == Action::"contacts:write", resource == Resource::"https://crm.example/api")
unless { context.delegation_depth > 1 };
@id("read-ledger")
permit (principal, action == Action::"entries:read", resource == Resource::"https://ledger.example/api");
"""
}


def with_everybody(house, **more):
    catalogue = catalogue_for(house.issuer)
    known = {principal.name for principal in catalogue.principals}
    agent = next(principal for principal in catalogue.principals if principal.name == "scribe")
    more_agents = tuple(
        replace(agent, name=name, subject=f"dev:{name}", implicit_tasks=False) for name in AGENTS if name not in known
    )
    changed = {"principals": catalogue.principals + more_agents, "policies": OPEN} | more
    house.broker.administration.apply(replace(catalogue, **changed), by="tests")
    return house


@pytest.fixture
def open_house(house):
    return with_everybody(house)


@pytest.fixture
def task(open_house):
    return open_house.open_task(*AGENTS)


def hand_down(house, parent, *, to, scope="contacts:read", **more):
    named = {"parent_grant_id": parent.grant.id, "parent_by_token": True}
    return house.issue(None, by=to, scope=scope, **named | more)


def claims_of(issued):
    return jwt.decode(issued.token.token.reveal(), options={"verify_signature": False})


def state_of(house, issued):
    return house.broker.verification.find_grant(house.caller("ada"), issued.grant.id)[0].state


def chain_of(house, task, *names, **more):
    chain = [house.issue(task, by=names[0], **more)]
    for name in names[1:]:
        chain.append(hand_down(house, chain[-1], to=name))
    return chain


# --- What it is -------------------------------------------------------------------------------------------------------


def test_a_token_tells_who_acts_and_for_whom_down_the_chain(open_house, task):
    """RFC 8693 section 4.1: who acts now is outermost."""
    root, child, grandchild, deepest = chain_of(open_house, task, *AGENTS[:4])
    assert "act" not in claims_of(root)
    assert claims_of(child)["sub"] == "summarizer"
    assert claims_of(child)["act"] == {"sub": "scribe"}
    assert claims_of(grandchild)["act"] == {"sub": "clerk", "act": {"sub": "scribe"}}
    told = claims_of(deepest)
    assert told["act"] == {"sub": "intern", "act": {"sub": "clerk", "act": {"sub": "scribe"}}}
    assert (told["sub"], told["client_id"], told["task_id"]) == ("summarizer", "intern", task.id)
    assert deepest.grant.parent_grant_id == grandchild.grant.id
    assert open_house.is_active(deepest)


def test_it_is_written_down_who_handed_it_to_whom(open_house, task):
    root, child = chain_of(open_house, task, "summarizer", "scribe")
    [issued] = open_house.broker.audit_trail.page(
        open_house.caller("audrey"), {"grant_id": child.grant.id}, before=None, limit=10
    )
    assert issued.data["parent_grant_id"] == root.grant.id
    assert issued.data["chain"] == ["summarizer"]


def test_policy_knows_how_deep_it_is(open_house, task):
    root = open_house.issue(task, scope="contacts:read contacts:write")
    child = hand_down(open_house, root, to="scribe", scope="contacts:read contacts:write")
    with pytest.raises(PolicyDenied):
        hand_down(open_house, child, to="clerk", scope="contacts:write")
    assert hand_down(open_house, child, to="clerk").grant.state is GrantState.ACTIVE


# --- Never more than the parent (INV-10) ------------------------------------------------------------------------------


@pytest.fixture
def root(open_house, task):
    return open_house.issue(task)


def test_not_another_scope(open_house, root):
    with pytest.raises(InvalidScope, match="does not hold contacts:write; it holds contacts:read"):
        hand_down(open_house, root, to="scribe", scope="contacts:read contacts:write")


def test_not_another_resource(open_house, root):
    with pytest.raises(InvalidTarget, match="only that is handed down"):
        hand_down(open_house, root, to="scribe", scope="entries:read", resource=LEDGER)


def test_not_longer(open_house, task):
    root = open_house.issue(task, ttl=timedelta(seconds=120))
    open_house.clock.forward(seconds=30)
    child = hand_down(open_house, root, to="scribe", ttl=timedelta(seconds=600))
    assert child.grant.expires_at == root.grant.expires_at == child.token.expires_at
    assert child.grant.ttl_decided_by == "parent"
    open_house.clock.forward(seconds=30)
    renewed = open_house.broker.renewal.renew(open_house.caller("scribe"), child.grant.id, ttl=timedelta(seconds=600))
    assert renewed.grant.expires_at == root.grant.expires_at


def test_longer_when_the_parent_lives_longer(open_house, task):
    root = open_house.issue(task, ttl=timedelta(seconds=120))
    child = hand_down(open_house, root, to="scribe")
    open_house.clock.forward(seconds=60)
    renewed = open_house.broker.renewal.renew(open_house.caller("summarizer"), root.grant.id, ttl=None)
    again = open_house.broker.renewal.renew(open_house.caller("scribe"), child.grant.id, ttl=timedelta(seconds=600))
    assert again.grant.expires_at == renewed.grant.expires_at > child.grant.expires_at


def test_not_deeper_than_the_broker_allows(open_house, task):
    deepest = chain_of(open_house, task, *AGENTS[:4])[-1]
    with pytest.raises(Forbidden, match="handed down 3 times"):
        hand_down(open_house, deepest, to="trainee")


def test_not_to_an_agent_that_the_task_does_not_name(open_house):
    task = open_house.open_task("summarizer", "scribe")
    root = open_house.issue(task)
    with pytest.raises(NotFound, match="could be handed down to clerk"):
        hand_down(open_house, root, to="clerk")


def test_not_into_another_task(open_house, root):
    with pytest.raises(Invalid, match="of another task"):
        hand_down(open_house, root, to="scribe", task_id=open_house.open_task(*AGENTS).id)


@pytest.mark.parametrize("named", ["grt_0000000000000000000000000a", "nonsense", "task_x'; --"])
def test_not_what_is_not_there(open_house, task, named):
    with pytest.raises(NotFound, match="could be handed down"):
        open_house.issue(task, by="scribe", parent_grant_id=named)


def test_not_what_policy_does_not_allow_the_sub_agent(open_house, root):
    open_house.broker.administration.apply(
        replace(
            open_house.broker.standing.now().catalogue,
            policies=OPEN | {"no.cedar": '@id("no") forbid (principal == Agent::"scribe", action, resource);'},
        ),
        by="tests",
    )
    with pytest.raises(PolicyDenied):
        hand_down(open_house, root, to="scribe")


def test_what_is_bound_to_a_key_is_handed_down_bound(open_house, task):
    """INV-21."""
    root = open_house.issue(task, jkt="k" * 43, hand_to=("scribe",))
    with pytest.raises(Invalid, match="bind yours too"):
        hand_down(open_house, root, to="scribe", parent_by_token=False)
    with pytest.raises(Invalid, match="only with that key of any use"):
        hand_down(open_house, root, to="scribe")
    bound = hand_down(open_house, root, to="scribe", parent_by_token=False, jkt="l" * 43)
    assert claims_of(bound)["cnf"] == {"jkt": "l" * 43}


def test_not_to_whom_its_holder_did_not_name(open_house, task):
    """Its id stands in receipts, and must not be what opens it; least of all what is for a user."""
    alice = User(name="people:alice", expires_at=open_house.clock() + timedelta(hours=1))
    root = open_house.issue(task, user=alice, hand_to=("clerk",))
    with pytest.raises(NotFound, match="could be handed down to scribe"):
        hand_down(open_house, root, to="scribe", parent_by_token=False)
    assert hand_down(open_house, root, to="clerk", parent_by_token=False).grant.on_behalf_of == "people:alice"
    # Its holder needs nobody's leave.
    assert hand_down(open_house, root, to="summarizer", parent_by_token=False).grant.chain == ("summarizer",)


def test_however_many_were_denied_it_can_be_revoked(open_house, task, root):
    with open_house.broker.database.begin() as db:
        denied = replace(root.grant, state=GrantState.DENIED, parent_grant_id=root.grant.id, status_list=None)
        many = [replace(denied, id=f"grt_0{number:025d}", status_index=None) for number in range(70_000)]
        insert_grants(db, many)
    receipt = open_house.broker.revocation.revoke_grant(open_house.caller("ada"), root.grant.id).receipt
    assert [line.grant_id for line in receipt.lines] == [root.grant.id]
    assert not open_house.is_active(root)


@pytest.mark.parametrize("end", ["revoked", "expired", "task"])
def test_not_what_has_ended(open_house, task, root, end):
    if end == "revoked":
        open_house.broker.revocation.revoke_grant(open_house.caller("ada"), root.grant.id)
    elif end == "expired":
        open_house.clock.at = root.grant.expires_at
    else:
        open_house.broker.tasks.end(open_house.caller("pipeline"), task.id, TaskState.COMPLETED)
    with pytest.raises(BrokerError, match=r"revoked|expired|completed"):
        hand_down(open_house, root, to="scribe")


# --- Ends with the parent (INV-11) ------------------------------------------------------------------------------------


def test_a_chain_dies_with_its_root_in_one_answer(open_house, task):
    chain = chain_of(open_house, task, *AGENTS[:4])
    beside = open_house.issue(task, by="clerk")
    receipt = open_house.broker.revocation.revoke_grant(open_house.caller("ada"), chain[0].grant.id).receipt
    assert [line.grant_id for line in receipt.lines] == [issued.grant.id for issued in chain]
    assert not any(open_house.is_active(issued) for issued in chain)
    assert {state_of(open_house, issued) for issued in chain} == {GrantState.REVOKED}
    assert open_house.is_active(beside)
    again = open_house.broker.revocation.revoke_grant(open_house.caller("ada"), chain[0].grant.id).receipt
    assert [line.grant_id for line in again.lines] == [line.grant_id for line in receipt.lines]


def test_what_is_above_and_beside_lives_on(open_house, task):
    root, child, grandchild = chain_of(open_house, task, *AGENTS[:3])
    beside = hand_down(open_house, root, to="scribe")
    open_house.broker.revocation.revoke_grant(open_house.caller("scribe"), child.grant.id)
    assert not open_house.is_active(child) and not open_house.is_active(grandchild)
    assert open_house.is_active(root) and open_house.is_active(beside)


def test_who_handed_it_down_may_take_it_back_and_nobody_else(open_house, task):
    root, child = chain_of(open_house, task, "summarizer", "scribe")
    with pytest.raises(NotFound):
        open_house.broker.revocation.revoke_grant(open_house.caller("clerk"), child.grant.id)
    with pytest.raises(NotFound):
        open_house.broker.revocation.revoke_grant(open_house.caller("scribe"), root.grant.id)
    open_house.broker.revocation.revoke_grant(open_house.caller("summarizer"), child.grant.id)
    assert state_of(open_house, child) is GrantState.REVOKED
    assert open_house.is_active(root)


@pytest.mark.parametrize(
    ("axis", "value"), [("agent", "summarizer"), ("agent", "scribe"), ("policy", "read-crm"), ("resource", CRM)]
)
@pytest.mark.parametrize("lockdown", [False, True], ids=["revocation", "lockdown"])
def test_what_is_revoked_along_an_axis_takes_what_was_handed_down(open_house, task, axis, value, lockdown):
    chain = chain_of(open_house, task, *AGENTS[:3])
    revocation, ada = open_house.broker.revocation, open_house.caller("ada")
    foreseen = revocation.revoke_along(ada, axis, value, reason="drill", dry_run=True)
    done = revocation.revoke_along(ada, axis, value, reason="drill", lockdown=lockdown)
    below = chain[1:] if value == "scribe" else chain
    assert foreseen.total == done.total == len(below)
    assert {state_of(open_house, issued) for issued in below} == {GrantState.REVOKED}
    assert not any(open_house.is_active(issued) for issued in below)


def test_what_was_handed_down_dies_before_its_row_says_so(open_house, task, monkeypatch):
    """The one row of the revocation is enough, at depth two as well."""
    chain = chain_of(open_house, task, *AGENTS[:3])
    monkeypatch.setattr(open_house.broker.revocation, "follow", lambda *_arguments, **_more: 0)
    open_house.broker.revocation.revoke_along(open_house.caller("ada"), "agent", "summarizer", reason="drill")
    assert {state_of(open_house, issued) for issued in chain} == {GrantState.ACTIVE}
    assert not any(open_house.is_active(issued) for issued in chain)


def test_an_agent_that_is_locked_down_is_handed_nothing_and_hands_nothing(open_house, task):
    root, child = chain_of(open_house, task, "summarizer", "scribe")
    open_house.broker.revocation.set_lockdown(open_house.caller("ada"), "agent", "clerk", reason="drill")
    with pytest.raises(LockedDown):
        hand_down(open_house, child, to="clerk")
    assert open_house.is_active(root)


def test_a_key_or_policy_that_renewed_the_parent_takes_what_was_handed_down_before(open_house, task):
    root, child, grandchild = chain_of(open_house, task, *AGENTS[:3])
    open_house.broker.keys.rotate(actor="tests", now=open_house.clock())
    renewed = open_house.broker.renewal.renew(open_house.caller("summarizer"), root.grant.id, ttl=None)
    [newer] = set(renewed.grant.kids) - set(root.grant.kids)
    assert open_house.is_active(grandchild)
    open_house.broker.revocation.compromise_key(open_house.caller("ada"), newer, reason="drill")
    assert {state_of(open_house, issued) for issued in (root, child, grandchild)} == {GrantState.REVOKED}


def test_a_task_that_ends_takes_the_chain(open_house, task):
    chain = chain_of(open_house, task, *AGENTS[:3])
    receipt = open_house.broker.tasks.end(open_house.caller("pipeline"), task.id, TaskState.COMPLETED).receipt
    assert {line.grant_id for line in receipt.lines} == {issued.grant.id for issued in chain}
    assert not any(open_house.is_active(issued) for issued in chain)


def test_only_the_agent_of_a_grant_renews_it(open_house, task):
    _, child = chain_of(open_house, task, "summarizer", "scribe")
    with pytest.raises(NotFound):
        open_house.broker.renewal.renew(open_house.caller("summarizer"), child.grant.id, ttl=None)


def test_whoever_is_no_agent_is_handed_nothing(open_house, task, root):
    with pytest.raises((RoleMissing, NotFound)):
        hand_down(open_house, root, to="pipeline")


# --- No sequence of steps widens anything -----------------------------------------------------------------------------

SCOPES = ("contacts:read", "contacts:write", "contacts:read contacts:write")
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["hand down", "hand down", "hand down", "renew", "revoke", "wait"]),
        st.integers(0, 9),
        st.sampled_from(AGENTS),
        st.sampled_from(SCOPES),
        st.integers(1, 3600),
    ),
    min_size=3,
    max_size=12,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_no_sequence_of_steps_widens_anything(sqlite_house, steps):
    house = with_everybody(sqlite_house)
    task = house.open_task(*AGENTS, deadline_s=86_400)
    out = [house.issue(task, scope="contacts:read contacts:write")]
    for step, at, agent, scope, seconds in steps:
        chosen = out[at % len(out)]
        try:
            if step == "hand down":
                out.append(hand_down(house, chosen, to=agent, scope=scope, ttl=timedelta(seconds=seconds)))
            elif step == "renew":
                ttl = timedelta(seconds=seconds)
                house.broker.renewal.renew(house.caller(chosen.grant.agent), chosen.grant.id, ttl=ttl)
            elif step == "revoke":
                house.broker.revocation.revoke_grant(house.caller("ada"), chosen.grant.id)
            else:
                house.clock.forward(seconds=seconds % 60)
        except BrokerError:
            continue
    now = {}
    for issued in out:
        grant, live, _ = house.broker.verification.find_grant(house.caller("ada"), issued.grant.id)
        now[grant.id] = grant, live
    for grant, live in now.values():
        if grant.parent_grant_id is None:
            continue
        parent, parent_lives = now[grant.parent_grant_id]
        assert set(grant.scopes) <= set(parent.scopes)
        assert grant.resource == parent.resource
        assert grant.expires_at <= parent.expires_at
        assert grant.chain == (*parent.chain, parent.agent)
        assert len(grant.chain) <= 3
        assert parent_lives or not live
        assert set(parent.kids) <= set(grant.kids) and set(parent.policies) <= set(grant.policies)


def test_what_is_handed_down_needs_an_allow_of_its_own_and_keeps_its_parents(house):
    task = house.open_task("summarizer", "scribe")
    assert hand_down(house, house.issue(task), to="scribe").grant.policies == ("crm-read", "scribe-read")
