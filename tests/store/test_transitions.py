from datetime import timedelta

import pytest
import sqlalchemy as sa

from broker.domain.audit import Event
from broker.domain.identity import new_id
from broker.domain.lifecycle import TaskState
from broker.store.models import AuditEvent, Task
from broker.store.transitions import move, record, recorded_together
from tests.conftest import NOW


@pytest.fixture
def task_id(database):
    with database.begin() as db:
        made = new_id("task", NOW)
        db.execute(
            sa.insert(Task).values(
                id=made,
                state="active",
                purpose="qualify a lead",
                orchestrator="pipeline",
                labels={},
                created_at=NOW,
                deadline_at=NOW + timedelta(hours=1),
                implicit=False,
            )
        )
    return made


def ended(row):
    return Event(id=new_id("evt", NOW), at=NOW, type="task.end", actor="pipeline", task_id=row.id, outcome=row.state)


def test_the_second_of_two_ends_finds_nothing_to_move_and_leaves_no_event(database, task_id):
    for to, expected in ((TaskState.COMPLETED, 1), (TaskState.CANCELLED, 0)):
        with database.begin() as db:
            moved = move(db, Task, to, Task.id == task_id, event=ended, ended_at=NOW)
        assert len(moved) == expected
    with database.begin() as db:
        assert db.execute(sa.select(Task.state, Task.ended_at)).all() == [("completed", NOW)]
        assert db.execute(sa.select(AuditEvent.type, AuditEvent.outcome)).all() == [("task.end", "completed")]


def test_a_state_and_its_event_are_written_together_or_not_at_all(database, task_id):
    """INV-32."""

    def fails(row):
        raise ConnectionError

    with pytest.raises(ConnectionError), database.begin() as db:
        move(db, Task, TaskState.FAILED, Task.id == task_id, event=fails, ended_at=NOW)
    with database.begin() as db:
        assert db.execute(sa.select(Task.state)).scalar_one() == "active"


def test_the_database_itself_refuses_an_unknown_state(database, task_id):
    with pytest.raises(sa.exc.IntegrityError, match="state_is_known"), database.begin() as db:
        db.execute(sa.update(Task).values(state="paused", ended_at=NOW))


def test_events_that_are_recorded_together_are_written_at_the_end_of_their_block(database, task_id):
    """INV-32: each once, in the transaction of what they speak of."""
    with database.begin() as db:
        with recorded_together(db):
            move(db, Task, TaskState.COMPLETED, Task.id == task_id, event=ended, ended_at=NOW)
            record(db, [told(task_id, "first")])
            assert types(db) == []
        assert sorted(types(db)) == ["first", "task.end"]


def test_a_block_that_fails_takes_its_events_with_it_and_none_of_those_that_follow(database, task_id):
    with database.begin() as db:
        with pytest.raises(ZeroDivisionError), recorded_together(db):
            record(db, [told(task_id, "lost")])
            raise ZeroDivisionError
        record(db, [told(task_id, "kept")])
    with database.read() as db:
        assert types(db) == ["kept"]


def told(task_id, type_):
    return Event(id=new_id("evt", NOW), at=NOW, type=type_, actor="pipeline", task_id=task_id)


def types(db):
    return list(db.execute(sa.select(AuditEvent.type)).scalars())
