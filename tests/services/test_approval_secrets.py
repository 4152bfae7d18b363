"""A secret from outside that people have to allow: nothing is made before it is collected, then by the one protocol."""

from dataclasses import replace
from datetime import timedelta

import pytest

from broker.domain.errors import Conflict, Invalid, LockedDown, ProviderRefused, ProviderUnavailable, Unavailable
from broker.domain.lifecycle import TaskState
from broker.store import leases as stored_leases
from tests.approvals import PEOPLE, again, approve, ask, collect, states
from tests.fakes.outside import AGENTS, LONGEST, ORDERS, PASSWORD, house_on_outside
from tests.leases import require_consistent
from tests.leases import states as lease_states
from tests.web.conftest import Web
from tests.web.test_leases import certificate_request

ASKING = """
@id("outside-asks")
@approval("security")
permit (principal == Agent::"summarizer", action, resource) when { resource.provider == "vault" };
"""
CSR = certificate_request()


@pytest.fixture
def house(store_url, tmp_path):
    with house_on_outside(store_url, tmp_path) as made:
        found = made.broker.standing.now().catalogue
        policies = {**found.policies, "outside.cedar": ASKING}
        changed = replace(found, policies=policies, principals=(*found.principals, *PEOPLE))
        made.broker.administration.apply(changed, by="tests")
        yield made
        require_consistent(made.broker.database)


def asked(house, task=None, resource=ORDERS, scope="select", **more):
    wanted = {"scopes": frozenset({scope}), "takes_secrets": True} | more
    return ask(house, task or house.open_task(), resource=resource, **wanted)


def test_nothing_is_made_outside_before_it_is_collected(house):
    case = asked(house)
    approve(house, case)
    assert house.outside.alive == {} and lease_states(house.broker.database) == []
    issued = collect(house, case)
    assert issued.credential.data.reveal()["password"] == PASSWORD
    assert lease_states(house.broker.database) == [("active", "held")]
    assert issued.grant.expires_at == house.clock() + timedelta(seconds=300)
    with pytest.raises(Conflict, match="collected already"):
        collect(house, case)
    assert len(house.outside.alive) == 1


def test_what_people_left_is_what_is_made(house):
    case = asked(house)
    approve(house, case, ttl_s=60)
    issued = collect(house, case)
    assert issued.grant.expires_at == house.clock() + timedelta(seconds=60)
    assert (issued.grant.ttl_s, issued.grant.ttl_decided_by) == (60, "approval")


def test_the_parameters_that_were_approved_are_those_that_are_used(house):
    """INV-14: another certificate request would be for another key."""
    with pytest.raises(Invalid):
        asked(house, resource=AGENTS, scope="connect")  # nobody is asked for what could not be made
    case = asked(house, resource=AGENTS, scope="connect", parameters={"csr": CSR})
    approve(house, case)
    for other in ({}, {"csr": CSR + "x"}, {"csr": CSR, "public_key": "k"}):
        with pytest.raises(Invalid, match="other parameters"):
            collect(house, case, parameters=other)
    assert house.outside.alive == {}
    collect(house, case, parameters={"csr": CSR})
    assert len(house.outside.alive) == 1


def test_one_task_with_two_requests_to_sign_asks_for_each(house):
    task = house.open_task()
    first = asked(house, task, resource=AGENTS, scope="connect", parameters={"csr": CSR})
    with pytest.raises(Conflict, match=first.approval.id):
        asked(house, task, resource=AGENTS, scope="connect", parameters={"csr": certificate_request()})


@pytest.mark.parametrize("end", ["task", "grant", "time"])
def test_what_was_never_made_is_in_no_receipt_and_owed_by_nobody(house, end):
    task = house.open_task()
    case = asked(house, task)
    approve(house, case)
    if end == "task":
        receipt = house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED)
        assert receipt.receipt.lines == []
    elif end == "grant":
        house.broker.revocation.revoke_grant(house.caller("summarizer"), case.grant.id)
    else:
        house.clock.forward(seconds=900)
        house.broker.sweeper.sweep()
    assert states(house, case) == ("approved", "expired" if end == "time" else "revoked")
    assert lease_states(house.broker.database) == []
    assert house.broker.tasks.receipt_for(task.id).receipt.lines == []


@pytest.mark.parametrize(("trouble", "error"), [("down", ProviderUnavailable), ("refuses", ProviderRefused)])
def test_a_secret_that_cannot_be_had_costs_the_approval_and_leaves_nothing(house, trouble, error):
    case = asked(house)
    approve(house, case)
    setattr(house.outside, trouble, True)
    with pytest.raises(error):
        collect(house, case)
    setattr(house.outside, trouble, False)
    assert states(house, case) == ("approved", "failed")
    with pytest.raises(Conflict, match="collected already"):
        collect(house, case)
    house.clock.forward(seconds=int(LONGEST.total_seconds()) + 300)
    house.broker.debts.pay()
    assert house.outside.alive == {}
    assert asked(house).approval.id != case.approval.id


def test_a_task_that_ends_while_the_secret_is_made_hands_nothing_out(house):
    """INV-12."""
    task = house.open_task()
    case = asked(house, task)
    approve(house, case)
    original = house.outside.issue

    def interrupted(*arguments):
        house.outside.issue = original
        house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED)
        return original(*arguments)

    house.outside.issue = interrupted
    with pytest.raises(Conflict, match="ended while"):
        collect(house, case)
    assert states(house, case)[1] == "revoked"
    house.pay(times=3)
    assert house.outside.alive == {}


def test_a_lockdown_between_the_yes_and_the_collection_wins(house):
    case = asked(house)
    approve(house, case)
    house.broker.revocation.set_lockdown(house.caller("ada"), "provider", "vault", reason="it is being restored")
    with pytest.raises((LockedDown, Conflict)):
        collect(house, case)
    assert house.outside.alive == {}


def test_a_provider_that_went_back_in_time_gives_nothing_to_who_was_approved(store_url, tmp_path):
    """INV-37, and the approval is not used up by it."""
    with house_on_outside(store_url, tmp_path, looked=False) as house:
        found = house.broker.standing.now().catalogue
        changed = replace(found, policies={"outside.cedar": ASKING}, principals=(*found.principals, *PEOPLE))
        house.broker.administration.apply(changed, by="tests")
        with pytest.raises(Unavailable):
            asked(house)
        house.broker.reconciliation.run()
        case = asked(house)
        approve(house, case)
        house.broker.reconciliation.distrust("vault")
        with pytest.raises(Unavailable):
            collect(house, case)
        assert again(house, case).approval.collected_at is None
        house.clock.forward(seconds=5)
        house.broker.reconciliation.run()
        collect(house, case)


def test_what_is_no_token_is_not_collected_as_one(house):
    """A deferral code of a database login would use the approval up for an answer that has no word for it."""
    case = asked(house)
    approve(house, case)
    web = Web(house)
    grant_type = "urn:ietf:params:oauth:grant-type:deferred"
    polled = web.form(
        "/oauth2/token", **web.assertion("summarizer", grant_type=grant_type, deferral_code=case.grant.id)
    )
    assert (polled.status_code, polled.json["error"]) == (400, "invalid_grant")
    collect(house, case)
    with house.broker.database.read() as db:
        assert stored_leases.leases_of(db, [case.grant.id])[case.grant.id].state == "held"


# --- In an emergency ---

EMERGENCY = f"""
@id("orders-emergency")
@break_glass("true") @approval("security") @quorum("2")
permit (principal == Agent::"summarizer", action == Action::"select", resource == Resource::"{ORDERS}");
"""


def broken_glass(house):
    found = house.broker.standing.now().catalogue
    policies = {**found.policies, "emergency.cedar": EMERGENCY}
    house.broker.administration.apply(replace(found, policies=policies), by="tests")
    case = asked(house, break_glass="the orders are stuck")
    approve(house, case)
    approve(house, case, by="sue")
    return case


def test_a_break_glass_to_a_secret_from_outside_owes_its_review_before_there_is_one(house):
    case = broken_glass(house)
    issued = collect(house, case)
    assert issued.credential.data.reveal()["password"] == PASSWORD
    assert issued.grant.break_glass == "the orders are stuck"
    [owed] = house.broker.reviews.page(house.caller("ada"))
    assert (owed.grant.id, str(owed.state)) == (case.grant.id, "owed")


def test_a_break_glass_whose_secret_could_not_be_had_owes_its_review_all_the_same(house):
    """It may exist: nobody heard of it (INV-05)."""
    case = broken_glass(house)
    house.outside.down = True
    with pytest.raises(ProviderUnavailable):
        collect(house, case)
    assert len(house.broker.reviews.page(house.caller("ada"))) == 1
    trail = house.broker.audit_trail.page(house.caller("ada"), {"grant_id": case.grant.id}, before=None, limit=100)
    types = [event.type for event in trail]
    assert types.count("break_glass.ended") == types.count("break_glass.collected") == 1
