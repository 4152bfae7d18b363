"""Several sweepers at once, and a sweeper beside those who end things themselves."""

import sqlalchemy as sa

from broker.domain.lifecycle import TaskState
from broker.services import sweeper


def test_two_sweepers_that_saw_the_same_grants_expire_each_once(race):
    """INV-32: one change, one event, whoever made it."""
    task = race.one.open_task()
    made = [race.one.issue(task) for _ in range(5)]
    race.one.clock.forward(seconds=300)
    seen = race.stop(sweeper.grants, "any_due", after=True)
    first = race.start(race.one.broker.sweeper.sweep)
    seen.until_reached(first)
    # The second one sweeps from beginning to end while the first has only looked.
    second = race.other.broker.sweeper.sweep()
    seen.go_on()
    assert (first.result().grants_expired, second.grants_expired) == (0, len(made))
    assert len(race.rows("SELECT id FROM events WHERE type = 'grant.expired'")) == len(made)


def test_a_sweeper_passes_over_what_another_is_expiring(race):
    """It waits for nobody while there may be other work; and what is moved is moved once."""
    task = race.one.open_task()
    made = [race.one.issue(task) for _ in range(5)]
    race.one.clock.forward(seconds=300)
    pause = race.stop(sweeper, "end_grants", after=True)
    first, second = race.run_into(race.one.broker.sweeper.sweep, pause, race.other.broker.sweeper.sweep)
    assert second.waited is race.on_sqlite  # where the other has the one writer's place
    assert (first.answer.grants_expired, second.answer.grants_expired) == (len(made), 0)
    assert len(race.rows("SELECT id FROM events WHERE type = 'grant.expired'")) == len(made)


def test_two_sweepers_that_saw_the_same_task_end_it_once(race):
    task = race.one.open_task(deadline_s=60)
    race.one.issue(task)
    race.one.clock.forward(seconds=60)
    seen = race.stop(sweeper.tasks, "due_task_ids", after=True)
    first = race.start(race.one.broker.sweeper.sweep)
    seen.until_reached(first)
    second = race.other.broker.sweeper.sweep()
    seen.go_on()
    assert (first.result().tasks_expired, second.tasks_expired) == (0, 1)
    assert len(race.rows("SELECT id FROM events WHERE type = 'task.expired'")) == 1


def test_a_sweeper_and_a_task_that_ends_do_not_wait_for_each_other_for_ever(postgres_race):
    """INV-27: each takes the grants in an order of its own, so one of them must not hold some while it waits for more.

    The rows lie in another order than their ids say, a row in the middle is held by a third transaction, and the two
    come from both sides.
    """
    race = postgres_race
    task = race.one.open_task()
    made = sorted(race.one.issue(task).grant.id for _ in range(5))
    for grant_id in reversed(made):  # a renewal writes its row anew, at the end of the table
        race.one.clock.forward(seconds=1)
        race.one.broker.renewal.renew(race.one.caller("summarizer"), grant_id, ttl=None)
    with race.looking.connect() as db:
        name = db.execute(sa.text("SELECT current_database()")).scalar_one()
        # As PostgreSQL decides by itself where the table is large.
        for plan in ("seqscan", "bitmapscan"):
            db.execute(sa.text(f"ALTER DATABASE {name} SET enable_{plan} = off"))
        db.execute(sa.text("DROP INDEX grants_due_idx"))
    for house in (race.one, race.other):
        house.broker.database.close()  # new connections take the new settings
    race.one.clock.forward(seconds=300)
    with race.holding("SELECT id FROM grants WHERE id = :id FOR UPDATE", id=made[2]):
        swept = race.start(race.one.broker.sweeper.sweep)
        race.until_they_wait(swept)
        ended = race.start(race.other.broker.tasks.end, race.other.caller("pipeline"), task.id, TaskState.COMPLETED)
        race.until_they_wait(swept, ended)
    assert ended.exception() is None
    assert swept.exception() is None
    assert ended.result().receipt.outcome == "completed"
    race.one.broker.sweeper.sweep()
    ends = race.rows("SELECT grant_id FROM events WHERE type = 'grant.expired'")
    assert sorted(row.grant_id for row in ends) == made


def test_a_sweeper_and_an_issuing_broker_that_need_the_same_tasks_do_not_wait_for_each_other_for_ever(postgres_race):
    """Both take the rows of tasks in one order. A task in the middle is held, and the two come from both sides."""
    race = postgres_race
    overdue = sorted((race.one.open_task(deadline_s=60) for _ in range(3)), key=lambda task: task.id)
    with race.looking.connect() as db:
        for task in reversed(overdue):  # the rows lie in another order than their ids say
            earlier = "UPDATE tasks SET deadline_at = deadline_at - interval '1 s' WHERE id = :id"
            db.execute(sa.text(earlier), {"id": task.id})
        name = db.execute(sa.text("SELECT current_database()")).scalar_one()
        for plan in ("indexscan", "bitmapscan", "indexonlyscan"):
            db.execute(sa.text(f"ALTER DATABASE {name} SET enable_{plan} = off"))
    for house in (race.one, race.other):
        house.broker.database.close()
    race.one.clock.forward(seconds=60)
    hold = race.other.broker.issuance._tasks.hold_shared

    def hold_all():
        with race.other.broker.database.begin() as db:
            return len(hold(db, [task.id for task in overdue]))

    with race.holding("SELECT id FROM tasks WHERE id = :id FOR UPDATE", id=overdue[1].id):
        swept = race.start(race.one.broker.sweeper.sweep)
        race.until_they_wait(swept)
        held = race.start(hold_all)
        race.until_they_wait(swept, held)
    assert held.exception() is None
    assert swept.exception() is None
    assert swept.result().tasks_expired == len(overdue)


def test_a_revocation_along_an_axis_and_a_task_that_ends_do_not_wait_for_each_other_for_ever(postgres_race):
    """INV-27: the one that follows a revocation passes over what another is ending, and comes back to it."""
    race = postgres_race
    task = race.one.open_task()
    made = [race.one.issue(task) for _ in range(3)]
    with race.holding("SELECT id FROM grants WHERE id = :id FOR UPDATE", id=made[1].grant.id):
        race.one.broker.revocation.revoke_along(race.one.caller("ada"), "agent", "summarizer", reason="drill")
        assert [race.state_of(issued) for issued in made] == ["revoked", "active", "revoked"]
        assert not any(map(race.other.is_active, made))  # the revocation stands until the last row followed
        race.other.broker.sweeper.sweep()
        assert not any(map(race.other.is_active, made))
    race.other.broker.sweeper.sweep()
    assert {race.state_of(issued) for issued in made} == {"revoked"}
    assert race.rows("SELECT id FROM bulk_revocations WHERE rows_followed_at IS NULL") == []
