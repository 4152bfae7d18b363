"""Denied again and again: an agent is throttled, then locked down, somebody is told, and an admin lifts it."""

from datetime import timedelta

import pytest

from broker.domain.errors import BrokerError, LimitExceeded, LockedDown, NotFound, PolicyDenied
from broker.domain.lifecycle import TaskState
from broker.services.alerting import Alerting
from tests import approvals as people
from tests.house import LEDGER, build_house
from tests.services.test_alerting import Told
from tests.services.test_redeciding import apply, events, with_policies

PAUSE_S = 5


@pytest.fixture
def house(store_url, tmp_path):
    built = build_house(
        store_url, tmp_path, denials_throttle=3, denials_lockdown=5, throttle_pause=timedelta(seconds=PAUSE_S)
    )
    yield built
    built.broker.close()


def deny(house, task, times=1, **more):
    for _ in range(times):
        with pytest.raises(PolicyDenied):
            house.issue(task, **{"resource": LEDGER, "scope": "entries:read"} | more)


def standing(house):
    return house.broker.revocation.lockdowns(house.caller("ada"))


def locked_down(house, task):
    deny(house, task, 3)
    for _ in range(2):
        house.clock.forward(seconds=PAUSE_S)
        deny(house, task)


def test_an_agent_that_is_denied_pauses_after_each_further_denial(house):
    task = house.open_task()
    deny(house, task, 3)
    with pytest.raises(LimitExceeded) as refusal:
        house.issue(task)
    assert (refusal.value.limit, refusal.value.value, refusal.value.retry_after_s) == ("denials_throttle", 3, PAUSE_S)
    house.clock.forward(seconds=PAUSE_S - 1)
    with pytest.raises(LimitExceeded):
        house.issue(task)
    house.clock.forward(seconds=1)
    # What it may have it gets, as often as it asks.
    for _ in range(3):
        house.issue(task)
    deny(house, task)
    with pytest.raises(LimitExceeded):
        house.issue(task)
    [event] = events(house, "agent.throttled")
    assert (event.agent, event.data) == ("summarizer", {"denials": 3, "pause_s": PAUSE_S})


def test_nobody_else_pauses(house):
    task = house.open_task("summarizer", "scribe")
    deny(house, task, 3)
    house.issue(task, by="scribe")


def test_a_broker_that_was_not_asked_before_pauses_it_too_and_says_so_once(house, store_url, tmp_path):
    task = house.open_task()
    deny(house, task, 3)
    other = build_house(
        store_url,
        tmp_path,
        clock=house.clock,
        denials_throttle=3,
        denials_lockdown=5,
        throttle_pause=timedelta(seconds=PAUSE_S),
    )
    for _ in range(5):
        with pytest.raises(LimitExceeded):
            other.issue(task)
    assert len(events(house, "grant.refused")) == 1
    other.broker.close()


def test_what_is_no_fault_of_the_agent_is_no_denial(house):
    task = house.open_task()
    house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED)
    for _ in range(6):
        with pytest.raises(BrokerError):
            house.issue(task)
    house.broker.revocation.set_lockdown(house.caller("ada"), "all", "all", reason="drill")
    other = house.open_task()
    for _ in range(6):
        with pytest.raises(LockedDown):
            house.issue(other)
    assert [lockdown.axis for lockdown in standing(house)] == ["all"]


def test_denials_that_are_long_past_do_not_count(house):
    task = house.open_task()
    deny(house, task, 3)
    house.clock.forward(seconds=601)
    deny(house, task, 2)
    house.issue(task)


def test_more_denials_lock_it_down_end_what_it_holds_and_tell_somebody(house):
    task = house.open_task()
    held = house.issue(task)
    locked_down(house, task)
    [lockdown] = standing(house)
    assert (lockdown.axis, lockdown.value, lockdown.set_by) == ("agent", "summarizer", "broker")
    assert lockdown.reason == "summarizer was denied 5 times within 600 s (limits.denials_lockdown)"
    assert not house.is_active(held)
    house.clock.forward(seconds=PAUSE_S)
    with pytest.raises(LockedDown, match="denied 5 times"):
        house.issue(task)
    told = Told()
    assert Alerting(database=house.broker.database, alerts=told, clock=house.clock).send_due() == 1
    [alert] = told.alerts
    assert (alert.kind, alert.data["agent"], alert.data["id"]) == ("agent.locked_down", "summarizer", lockdown.id)
    assert len(events(house, "lockdown.set")) == 1


def test_it_is_locked_down_once_however_often_it_is_denied(house):
    task = house.open_task()
    locked_down(house, task)
    for _ in range(4):
        house.clock.forward(seconds=PAUSE_S)
        with pytest.raises(LockedDown):
            house.issue(task)
    house.broker.issuance._breakers.after_denials(["summarizer"])
    assert len(standing(house)) == 1


def test_an_admin_lifts_it_and_it_begins_afresh(house):
    task = house.open_task()
    locked_down(house, task)
    house.broker.revocation.lift_lockdown(house.caller("ada"), standing(house)[0].id)
    # At once, though the pause after its last denial is not over.
    house.issue(task)
    house.clock.forward(seconds=1)
    deny(house, task, 2)
    house.issue(task)
    deny(house, task)
    with pytest.raises(LimitExceeded):
        house.issue(task)
    assert standing(house) == []


def test_a_broker_that_died_before_it_locked_the_agent_down_does_so_at_the_next_request(house, monkeypatch):
    task = house.open_task()
    breakers = house.broker.issuance._breakers
    monkeypatch.setattr(breakers, "after_denials", lambda _agents: None)
    locked_down(house, task)
    assert standing(house) == []
    monkeypatch.undo()
    house.clock.forward(seconds=PAUSE_S)
    house.issue(task)
    assert len(standing(house)) == 1


def test_a_renewal_that_is_denied_counts_and_waits_too(house):
    task = house.open_task()
    issued = house.issue(task)
    with_policies(house, no_cedar='@id("no") forbid (principal, action, resource) when { context.ttl_s < 60 };')
    for _ in range(3):
        with pytest.raises(PolicyDenied):
            house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=timedelta(seconds=30))
    with pytest.raises(LimitExceeded):
        house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=None)


# --- As facts of policies ---------------------------------------------------------------------------------------------

FEW = '@id("few") forbid (principal, action, resource) when { context.agent.live_grants >= 2 };'
CALM = '@id("calm") forbid (principal, action, resource) when { context.agent.recent_denials >= 2 };'


def test_a_policy_sees_what_the_agent_holds_beside_what_it_asks_for(house):
    with_policies(house, few_cedar=FEW)
    task = house.open_task()
    first, _ = house.issue(task), house.issue(task)
    deny(house, task, resource="https://crm.example/api", scope="contacts:read")
    # A renewal is of one that it holds already.
    house.broker.renewal.renew(house.caller("summarizer"), first.grant.id, ttl=None)
    house.broker.revocation.revoke_grant(house.caller("summarizer"), first.grant.id)
    house.issue(task)


def test_a_policy_sees_what_the_agent_was_denied_of_late(house):
    with_policies(house, calm_cedar=CALM)
    task = house.open_task()
    deny(house, task)
    house.issue(task)
    deny(house, task)
    deny(house, task, resource="https://crm.example/api", scope="contacts:read")
    house.clock.forward(seconds=601)
    house.issue(task)


def test_the_facts_are_those_of_the_decision_when_it_is_explained_and_asked_again(house):
    """They change with every grant and every denial, and what is out was decided knowing what they were."""
    task = house.open_task()
    first, second = house.issue(task), house.issue(task)
    deny(house, task)
    third = house.issue(task)
    facts = {
        issued.grant.id: house.broker.explaining.explain(house.caller("summarizer"), issued.grant.id).facts
        for issued in (first, second, third)
    }
    assert [facts[issued.grant.id]["context"]["agent"] for issued in (first, second, third)] == [
        {"live_grants": 0, "recent_denials": 0},
        {"live_grants": 1, "recent_denials": 0},
        {"live_grants": 2, "recent_denials": 1},
    ]
    with_policies(house, few_cedar=FEW.replace(">= 2", ">= 1"), calm_cedar=CALM.replace(">= 2", ">= 1"))
    house.broker.redeciding.run()
    assert [house.is_active(issued) for issued in (first, second, third)] == [True, False, False]


def test_what_changes_them_decides_nothing_again(house):
    with_policies(house, few_cedar=FEW, calm_cedar=CALM)
    house.broker.redeciding.run()
    task = house.open_task()
    first = house.issue(task)
    house.issue(task)
    deny(house, task, 2)
    house.broker.redeciding.run()
    assert house.is_active(first)
    apply(house)
    house.broker.redeciding.run()
    assert house.is_active(first)


@pytest.mark.parametrize("verb", ["renew", "collect"])
def test_whoever_tries_another_s_grant_counts_its_own_denials_and_not_the_holder_s(house, verb):
    task = house.open_task("summarizer", "scribe")
    issued = house.issue(task)
    caller = house.caller("scribe")
    for _ in range(5):
        with pytest.raises(NotFound):
            if verb == "renew":
                house.broker.renewal.renew(caller, issued.grant.id, ttl=None)
            else:
                house.broker.collection.collect(caller, issued.grant.id)
        house.clock.forward(seconds=PAUSE_S)
    assert [(lockdown.axis, lockdown.value) for lockdown in standing(house)] == [("agent", "scribe")]
    assert house.is_active(issued)
    house.issue(task)


def test_an_agent_that_is_locked_down_stops_nobody_to_be_found_so_again(house, monkeypatch):
    """INV-27: looking for it behind the gate would stop everybody's issuing, as often as it asks."""
    task = house.open_task()
    locked_down(house, task)
    asked = []
    monkeypatch.setattr(house.broker.revocation, "lock_down_agent", lambda *about: asked.append(about))
    for _ in range(3):
        house.clock.forward(seconds=PAUSE_S)
        with pytest.raises((LockedDown, PolicyDenied)):
            house.issue(task)
        with pytest.raises(NotFound):
            house.broker.renewal.renew(house.caller("summarizer"), "grt_nobodys", ttl=None)
    assert asked == []


@pytest.mark.parametrize("verb", ["renew", "collect"])
def test_a_broker_that_did_not_see_the_denials_makes_it_wait_there_too(house, store_url, tmp_path, verb):
    """INV-34."""
    other = build_house(store_url, tmp_path, clock=house.clock, denials_throttle=3, denials_lockdown=5)
    people.apply(house, people.asking(house, policies=people.ASKING.partition('@id("ledger')[0]))
    task = house.open_task()
    issued, waiting = house.issue(task), people.ask(house, task)
    people.approve(house, waiting)
    deny(house, task, 3)
    caller = other.caller("summarizer")
    with pytest.raises(LimitExceeded) as refusal:
        if verb == "renew":
            other.broker.renewal.renew(caller, issued.grant.id, ttl=None)
        else:
            other.broker.collection.collect(caller, waiting.grant.id)
    assert refusal.value.limit == "denials_throttle"
    other.broker.close()


def test_a_lockdown_that_fails_changes_no_answer_and_repeats_nothing(house, monkeypatch):
    task = house.open_task()

    def fails(*_about):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(house.broker.revocation, "lock_down_agent", fails)
    locked_down(house, task)
    assert len(events(house, "grant.denied")) == 5
    monkeypatch.undo()
    house.clock.forward(seconds=PAUSE_S)
    deny(house, task)
    assert [lockdown.axis for lockdown in standing(house)] == ["agent"]
