"""A task that ends while a part of it is opened, or something is issued in a part."""

from datetime import timedelta

import pytest

from broker.domain.errors import TaskNotActive
from broker.domain.lifecycle import TaskState
from broker.services import issuance, tasks
from broker.services.tasks import TaskRequest


def open_part(house, task):
    request = TaskRequest(
        caller=house.caller("pipeline"),
        purpose="a part",
        agents=("summarizer",),
        deadline=timedelta(seconds=60),
        parent_task_id=task.id,
    )
    return house.broker.tasks.open(request)


def complete(house, task):
    return house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED)


def test_a_part_on_its_way_ends_with_the_task_that_is_completed(race):
    task = race.one.open_task()
    pause = race.stop(tasks.tasks, "insert_tasks")
    part, ended = race.run_into(lambda: open_part(race.one, task), pause, lambda: complete(race.other, task))
    assert ended.waited and ended.refusal is None
    assert race.rows("SELECT id FROM tasks WHERE state = 'active'") == []
    with pytest.raises(TaskNotActive):
        race.other.issue(part.answer)


def test_a_part_asked_for_while_its_task_is_completed_is_refused(race):
    task = race.one.open_task()
    pause = race.stop(tasks, "move", after=True)
    _, asked = race.run_into(lambda: complete(race.one, task), pause, lambda: open_part(race.other, task))
    assert asked.waited
    assert isinstance(asked.refusal, TaskNotActive)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_grant_on_its_way_in_a_part_ends_with_the_whole(race, depth):
    """INV-11, INV-12."""
    task = race.one.open_task()
    part = task
    for _ in range(depth):
        part = open_part(race.one, part)
    pause = race.stop(issuance, "insert_grants")
    issued, ended = race.run_into(lambda: race.one.issue(part), pause, lambda: complete(race.other, task))
    assert ended.waited
    assert race.state_of(issued.answer) == "revoked"
    assert not race.one.is_active(issued.answer)


def test_a_grant_on_its_way_in_a_part_that_was_opened_after_the_tree_was_read_ends_too(race):
    """Such a part is held by its row alone, and that is enough."""
    task = race.one.open_task()
    part = open_part(race.one, task)
    tree_of = tasks.tasks.tree_of

    def as_it_was_before(db, task_id, *, active=False):
        return [task_id] if active else tree_of(db, task_id)

    race.monkeypatch.setattr(tasks.tasks, "tree_of", as_it_was_before)
    pause = race.stop(issuance, "insert_grants")
    issued, ended = race.run_into(lambda: race.one.issue(part), pause, lambda: complete(race.other, task))
    assert ended.waited
    assert race.state_of(issued.answer) == "revoked"
    assert race.live_under_ended_tasks() == []


def test_a_grant_asked_for_in_a_part_while_the_whole_is_completed_is_refused(race):
    task = race.one.open_task()
    part = open_part(race.one, task)
    race.other.issue(part)
    pause = race.stop(tasks, "move", after=True)
    _, asked = race.run_into(lambda: complete(race.one, task), pause, lambda: race.other.issue(part))
    assert asked.waited
    assert isinstance(asked.refusal, TaskNotActive)
    assert race.live_under_ended_tasks() == []
