"""A task that ends while something is issued, renewed, kept alive or ended under it."""

from datetime import timedelta

import pytest

from broker.domain.errors import Conflict, TaskNotActive
from broker.domain.lifecycle import TaskState
from broker.services import issuance, renewal, revocation, sweeper, tasks
from tests.house import TestClock, build_house

ISSUE_BEFORE_ITS_INSERT = (issuance, "insert_grants")


def complete(house, task):
    return house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED)


def test_a_task_completed_while_a_grant_is_issued_ends_that_grant_too(race):
    """INV-12, INV-23: the grant was seen by the end of its task, or the task's end by the grant."""
    task = race.one.open_task()
    pause = race.stop(*ISSUE_BEFORE_ITS_INSERT)
    issued, ended = race.run_into(lambda: race.one.issue(task), pause, lambda: complete(race.other, task))
    assert ended.waited
    assert [line.grant_id for line in ended.answer.receipt.lines] == [issued.answer.grant.id]
    assert race.state_of(issued.answer) == "revoked"
    assert race.live_under_ended_tasks() == []
    assert not race.one.is_active(issued.answer)


def test_a_grant_asked_for_while_its_task_is_being_completed_is_refused(race):
    """INV-12."""
    task = race.one.open_task()
    race.other.issue(task)  # a broker that remembers the task must look again
    pause = race.stop(tasks, "move", after=True)
    ended, asked = race.run_into(lambda: complete(race.one, task), pause, lambda: race.other.issue(task))
    assert asked.waited
    assert isinstance(asked.refusal, TaskNotActive)
    assert len(ended.answer.receipt.lines) == 1
    assert race.live_under_ended_tasks() == []


def test_a_renewal_on_its_way_is_ended_by_the_task_that_completes(race):
    """INV-12."""
    task = race.one.open_task()
    issued = race.one.issue(task)
    pause = race.stop(renewal, "renew_grant")
    renewed, ended = race.run_into(
        lambda: race.one.broker.renewal.renew(race.one.caller("summarizer"), issued.grant.id, ttl=None),
        pause,
        lambda: complete(race.other, task),
    )
    assert ended.waited
    assert ended.refusal is None
    assert race.state_of(issued) == "revoked"
    assert not race.one.is_active(renewed.answer)


def test_a_renewal_asked_for_while_its_task_is_being_completed_is_refused(race):
    """INV-12."""
    task = race.one.open_task()
    issued = race.one.issue(task)
    pause = race.stop(tasks, "move", after=True)
    _, renewed = race.run_into(
        lambda: complete(race.one, task),
        pause,
        lambda: race.other.broker.renewal.renew(race.other.caller("summarizer"), issued.grant.id, ttl=None),
    )
    assert renewed.waited
    assert isinstance(renewed.refusal, TaskNotActive)
    assert race.state_of(issued) == "revoked"


def test_of_two_that_end_a_task_at_once_the_first_decides_and_both_get_its_receipt(race):
    """INV-23: ended once, with one event for the task and one for each grant."""
    task = race.one.open_task()
    race.one.issue(task)
    pause = race.stop(tasks, "move", after=True)
    first, second = race.run_into(
        lambda: complete(race.one, task),
        pause,
        lambda: race.other.broker.tasks.end(race.other.caller("ada"), task.id, TaskState.CANCELLED, reason="late"),
    )
    assert second.waited
    assert first.answer.receipt.as_json() == second.answer.receipt.as_json()
    assert second.answer.receipt.outcome == "completed"
    ends = race.rows("SELECT type FROM events WHERE type IN ('task.completed', 'task.cancelled', 'grant.revoked')")
    assert sorted(row.type for row in ends) == ["grant.revoked", "task.completed"]


def test_a_task_that_ends_waits_in_a_queue_that_issuing_cannot_jump(postgres_race):
    """INV-27: who asks after the one that ends the task stands behind it, so no stream of requests keeps it open."""
    race = postgres_race
    task = race.one.open_task()
    pause = race.stop(*ISSUE_BEFORE_ITS_INSERT)
    first = race.start(race.one.issue, task)
    pause.until_reached(first)
    ending = race.start(complete, race.other, task)
    race.until_they_wait(ending)
    late = race.start(race.other.issue, task)
    race.until_they_wait(ending, late)
    assert not late.done()
    pause.go_on()
    assert isinstance(late.exception(), TaskNotActive)
    assert [line.grant_id for line in ending.result().receipt.lines] == [first.result().grant.id]


class TestHeartbeat:
    """The sweeper's clock is a second ahead, as clocks are: it holds lost what its orchestrator still keeps."""

    @pytest.fixture
    def sweeping(self, race, store_url, tmp_path):
        ahead = build_house(store_url, tmp_path, clock=TestClock(race.one.clock() + timedelta(seconds=30)))
        yield ahead
        ahead.broker.close()

    def test_that_came_in_after_the_sweeper_looked_keeps_the_task(self, race, sweeping):
        task = race.one.open_task(heartbeat=timedelta(seconds=30))
        issued = race.one.issue(task)
        race.one.clock.forward(seconds=29)
        pause = race.stop(sweeper, "end_tasks")
        sweep = race.start(sweeping.broker.sweeper.sweep)
        pause.until_reached(sweep)
        if race.on_sqlite:
            # The sweeper has the one writer's place already: its end of the task is decided first.
            beat = race.start(race.other.broker.tasks.heartbeat, race.other.caller("pipeline"), task.id)
            race.until_they_wait(beat)
            pause.go_on()
            assert sweep.result().tasks_expired == 1
            assert isinstance(beat.exception(), TaskNotActive)
            assert race.live_under_ended_tasks() == []
            return
        race.other.broker.tasks.heartbeat(race.other.caller("pipeline"), task.id)
        pause.go_on()
        assert sweep.result().tasks_expired == 0
        assert race.one.is_active(issued)

    def test_that_comes_while_the_sweeper_ends_the_task_is_too_late(self, race, sweeping):
        task = race.one.open_task(heartbeat=timedelta(seconds=30))
        issued = race.one.issue(task)
        race.one.clock.forward(seconds=29)
        pause = race.stop(tasks, "move", after=True)
        swept, beat = race.run_into(
            sweeping.broker.sweeper.sweep,
            pause,
            lambda: race.other.broker.tasks.heartbeat(race.other.caller("pipeline"), task.id),
        )
        assert beat.waited
        assert swept.answer.tasks_expired == 1
        assert isinstance(beat.refusal, TaskNotActive)
        assert not race.one.is_active(issued)


def test_an_orchestrator_and_a_sweeper_that_end_a_task_at_once_end_it_once(race):
    """INV-32: one change, one event."""
    task = race.one.open_task(deadline_s=60)
    race.one.issue(task)
    race.one.clock.forward(seconds=60)
    pause = race.stop(tasks, "move", after=True)
    swept, ended = race.run_into(race.one.broker.sweeper.sweep, pause, lambda: complete(race.other, task))
    assert ended.waited
    assert swept.answer.tasks_expired == 1
    assert ended.answer.receipt.outcome == "expired"
    assert len(race.rows("SELECT id FROM events WHERE type = 'task.expired'")) == 1


def test_ending_a_grant_twice_at_once_is_one_change(race):
    issued = race.one.issue(race.one.open_task())
    pause = race.stop(revocation, "end_with_descendants", after=True)
    first, second = race.run_into(
        lambda: race.one.broker.revocation.revoke_grant(race.one.caller("summarizer"), issued.grant.id),
        pause,
        lambda: race.other.broker.revocation.revoke_grant(race.other.caller("ada"), issued.grant.id, reason="late"),
    )
    assert second.waited
    assert first.answer.receipt.as_json() == second.answer.receipt.as_json()
    assert len(race.rows("SELECT id FROM events WHERE type = 'grant.revoked'")) == 1
    with pytest.raises(Conflict):
        race.one.broker.renewal.renew(race.one.caller("summarizer"), issued.grant.id, ttl=None)
