"""What must reach all that was issued, while something is being issued: revocations, lockdowns, keys, configuration."""

from dataclasses import replace

import pytest

from broker.domain.errors import LockedDown, PolicyDenied, TaskNotActive
from broker.domain.lifecycle import TaskState
from broker.services import administration, issuance, keys, renewal, revocation
from tests.house import POLICIES, catalogue_for


def revoke_all(house, **more):
    return house.broker.revocation.revoke_along(house.caller("ada"), "agent", "summarizer", reason="drill", **more)


def lock_down(house):
    return house.broker.revocation.set_lockdown(house.caller("ada"), "agent", "summarizer", reason="drill")


@pytest.mark.parametrize("end", [revoke_all, lock_down], ids=["revocation", "lockdown"])
def test_a_grant_on_its_way_is_covered_by_the_revocation_that_waits_for_it(race, end):
    """INV-23: it is in the era that the revocation covers, and in the count its answer gives."""
    task = race.one.open_task()
    pause = race.stop(issuance, "insert_grants")
    issued, ended = race.run_into(lambda: race.one.issue(task), pause, lambda: end(race.other))
    assert ended.waited
    assert ended.refusal is None
    assert not race.one.is_active(issued.answer)
    assert not race.other.is_active(issued.answer)
    assert race.state_of(issued.answer) == "revoked"


def test_a_grant_asked_for_while_a_lockdown_is_set_is_refused(race):
    """INV-12's sentence for lockdowns: stopping what comes next is the half that must succeed."""
    task = race.one.open_task()
    race.other.issue(task)
    pause = race.stop(revocation.standing, "insert_bulk_revocation", after=True)
    _, asked = race.run_into(lambda: lock_down(race.one), pause, lambda: race.other.issue(task))
    assert asked.waited
    assert isinstance(asked.refusal, LockedDown)
    assert race.rows("SELECT id FROM grants WHERE state = 'active'") == []


def test_a_grant_asked_for_while_everything_is_revoked_comes_after_it_and_lives(race):
    """A revocation ends what was issued; what is issued after it is not its business."""
    task = race.one.open_task()
    before = race.other.issue(task)
    pause = race.stop(revocation.standing, "insert_bulk_revocation", after=True)
    _, after = race.run_into(lambda: revoke_all(race.one), pause, lambda: race.other.issue(task))
    assert after.waited
    assert not race.one.is_active(before)
    assert race.one.is_active(after.answer)
    race.one.broker.sweeper.sweep()
    assert race.state_of(after.answer) == "active"


def test_a_renewal_on_its_way_is_covered_by_the_revocation_that_waits_for_it(race):
    issued = race.one.issue(race.one.open_task())
    pause = race.stop(renewal, "renew_grant")
    renewed, ended = race.run_into(
        lambda: race.one.broker.renewal.renew(race.one.caller("summarizer"), issued.grant.id, ttl=None),
        pause,
        lambda: revoke_all(race.other),
    )
    assert ended.waited
    assert not race.one.is_active(renewed.answer)
    assert race.state_of(issued) == "revoked"


def test_two_that_let_rows_follow_one_revocation_do_the_work_once(race, monkeypatch):
    """INV-32: one event for each grant."""
    task = race.one.open_task()
    made = [race.one.issue(task) for _ in range(5)]
    monkeypatch.setattr(race.one.broker.revocation, "follow", lambda *_, **__: 0)
    revoke_all(race.one)
    monkeypatch.undo()
    pause = race.stop(revocation.grants, "unended_ids", after=True)
    first, second = race.run_into(race.one.broker.sweeper.sweep, pause, race.other.broker.sweeper.sweep)
    assert (first.refusal, second.refusal) == (None, None)
    assert {race.state_of(issued) for issued in made} == {"revoked"}
    events = race.rows("SELECT grant_id FROM events WHERE type = 'grant.revoked'")
    assert sorted(row.grant_id for row in events) == sorted(issued.grant.id for issued in made)


def test_a_token_signed_while_its_key_is_condemned_is_worth_nothing(race):
    """INV-23: the compromise waits for the signature that is on its way, and covers it."""
    task = race.one.open_task()
    (kid,) = race.one.issue(task).grant.kids
    pause = race.stop(issuance, "insert_grants")
    issued, condemned = race.run_into(
        lambda: race.one.issue(task),
        pause,
        lambda: race.other.broker.revocation.compromise_key(race.other.caller("ada"), kid, reason="found in a log"),
    )
    assert condemned.waited
    assert issued.answer.grant.kids == (kid,)
    assert not race.one.is_active(issued.answer)
    assert not race.other.is_active(issued.answer)
    assert race.state_of(issued.answer) == "revoked"


def test_what_is_asked_for_while_a_key_is_condemned_is_signed_by_the_next(race):
    task = race.one.open_task()
    (kid,) = race.other.issue(task).grant.kids
    pause = race.stop(keys, "_promote", after=True)
    _, asked = race.run_into(
        lambda: race.one.broker.revocation.compromise_key(race.one.caller("ada"), kid, reason="found in a log"),
        pause,
        lambda: race.other.issue(task),
    )
    assert asked.waited
    assert kid not in asked.answer.grant.kids
    assert race.one.is_active(asked.answer)


def stricter(house):
    forbidding = POLICIES | {"stop.cedar": '@id("stop") forbid (principal, action, resource);'}
    return catalogue_for(house.issuer, policies=forbidding)


def apply(house, catalogue):
    return house.broker.administration.apply(catalogue, by="tests")


def test_what_is_asked_for_while_a_configuration_is_applied_is_decided_by_it(race):
    """INV-14: one policy version, the one in force when the grant is committed."""
    task = race.one.open_task()
    race.other.issue(task)
    pause = race.stop(administration.standing, "insert_configuration", after=True)
    applied, asked = race.run_into(lambda: apply(race.one, stricter(race.one)), pause, lambda: race.other.issue(task))
    assert asked.waited
    assert applied.answer == 2
    assert isinstance(asked.refusal, PolicyDenied)
    assert asked.refusal.decision["policy_version"] == 2


def test_a_configuration_waits_for_what_is_being_issued_and_then_holds_for_all(race):
    task = race.one.open_task()
    pause = race.stop(issuance, "insert_grants")
    issued, applied = race.run_into(
        lambda: race.one.issue(task), pause, lambda: apply(race.other, stricter(race.other))
    )
    assert applied.waited
    assert issued.answer.grant.policy_version == 1
    for house in (race.one, race.other):
        with pytest.raises(PolicyDenied):
            house.issue(task)


def test_of_two_that_apply_at_once_each_gets_a_version_of_its_own(race):
    pause = race.stop(administration.standing, "insert_configuration", after=True)
    other = replace(stricter(race.other), policies=POLICIES | {"more.cedar": "// another\n"})
    first, second = race.run_into(lambda: apply(race.one, stricter(race.one)), pause, lambda: apply(race.other, other))
    assert second.waited
    assert (first.answer, second.answer) == (2, 3)
    assert race.one.broker.standing.now().catalogue.version == 3


def test_a_revocation_waits_in_a_queue_that_issuing_cannot_jump(postgres_race):
    """INV-27: who comes after the one that revokes stands behind it, so a stream of requests cannot starve it."""
    race = postgres_race
    task = race.one.open_task()
    pause = race.stop(issuance, "insert_grants")
    first = race.start(race.one.issue, task)
    pause.until_reached(first)
    locking = race.start(lock_down, race.other)
    race.until_they_wait(locking)
    late = race.start(race.other.issue, task)
    race.until_they_wait(locking, late)
    assert not late.done()
    pause.go_on()
    assert isinstance(late.exception(), LockedDown)
    assert locking.result()
    assert not race.one.is_active(first.result())


def test_a_task_and_a_lockdown_that_end_the_same_grants_at_once_end_each_once(race):
    task = race.one.open_task()
    made = [race.one.issue(task) for _ in range(3)]
    pause = race.stop(revocation, "end_grants", after=True, passing=1)  # the first call moves what has expired
    _, ended = race.run_into(
        lambda: lock_down(race.one),
        pause,
        lambda: race.other.broker.tasks.end(race.other.caller("pipeline"), task.id, TaskState.COMPLETED),
    )
    assert ended.waited
    assert ended.refusal is None
    assert len(race.rows("SELECT id FROM events WHERE type = 'grant.revoked'")) == len(made)
    with pytest.raises(TaskNotActive):
        race.one.issue(task)
