"""The sweep: tidies what time decided, in batches, by several at once, and nothing depends on it."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from broker.domain.lifecycle import GrantState, TaskState


def events(house, type_):
    return house.broker.audit_trail.page(house.caller("audrey"), {"type": type_}, before=None, limit=1000)


def test_a_task_past_its_deadline_expires_with_everything_below(house):
    task = house.open_task(deadline_s=60)
    issued = house.issue(task)
    assert house.broker.sweeper.sweep().tasks_expired == 0
    house.clock.forward(seconds=60)
    swept = house.broker.sweeper.sweep()
    assert swept.tasks_expired == 1
    found, *_ = house.broker.verification.find_grant(house.caller("ada"), issued.grant.id)
    assert found.state is GrantState.EXPIRED
    assert house.broker.tasks.find(house.caller("pipeline"), task.id).state is TaskState.EXPIRED
    assert house.broker.sweeper.sweep().tasks_expired == 0


def test_a_lost_heartbeat_ends_a_task_and_a_kept_one_does_not(house):
    lost, kept = (house.open_task(heartbeat=timedelta(seconds=30)) for _ in range(2))
    issued = house.issue(lost)
    house.clock.forward(seconds=20)
    house.broker.tasks.heartbeat(house.caller("pipeline"), kept.id)
    house.clock.forward(seconds=15)
    assert house.broker.sweeper.sweep().tasks_expired == 1
    assert not house.is_active(issued)
    assert house.broker.tasks.find(house.caller("pipeline"), kept.id).state is TaskState.ACTIVE
    found, *_ = house.broker.verification.find_grant(house.caller("ada"), issued.grant.id)
    assert (found.state, found.revoked_by) == (GrantState.REVOKED, "broker")


def test_a_grant_past_its_expiry_is_marked_and_was_dead_before(house):
    issued = house.issue(house.open_task())
    house.clock.forward(seconds=300)
    assert not house.is_active(issued)
    assert house.broker.sweeper.sweep().grants_expired == 1
    found, *_ = house.broker.verification.find_grant(house.caller("ada"), issued.grant.id)
    assert found.state is GrantState.EXPIRED
    assert [event.grant_id for event in events(house, "grant.expired")] == [issued.grant.id]


def test_two_sweepers_do_the_work_once(house, second_house):
    task = house.open_task()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: house.issue(task), range(90)))
    house.clock.forward(seconds=300)
    with ThreadPoolExecutor(2) as pool:
        swept = list(pool.map(lambda one: one.broker.sweeper.sweep(), (house, second_house)))
    assert sum(one.grants_expired for one in swept) == 90
    assert len(events(house, "grant.expired")) == 90


def test_old_keys_are_replaced_in_time(house):
    task = house.open_task(deadline_s=86_400)
    before = house.issue(task)
    house.clock.forward(hours=23, minutes=59)
    assert house.broker.sweeper.sweep().keys_rotated == 0
    house.clock.forward(minutes=2)
    assert house.broker.sweeper.sweep().keys_rotated == 1
    after = house.issue(house.open_task())
    assert after.grant.kids != before.grant.kids
    assert house.is_active(after)


def test_large_tasks_are_ended_one_by_one_and_small_ones_together(house, monkeypatch):
    """A transaction that takes longer than a statement may is never done, however often it is tried."""
    from broker.services import sweeper

    monkeypatch.setattr(sweeper, "_GRANTS_AT_ONCE", 3)
    ended = []
    end_tasks = sweeper.end_tasks
    monkeypatch.setattr(
        sweeper, "end_tasks", lambda db, ids, *a, **k: ended.append(list(ids)) or end_tasks(db, ids, *a, **k)
    )
    large = house.open_task(deadline_s=60)
    for _ in range(5):
        house.issue(large)
    small = [house.open_task(deadline_s=60) for _ in range(3)]
    for task in small:
        house.issue(task)
    house.clock.forward(seconds=61)
    assert house.broker.sweeper.sweep().tasks_expired == 4
    assert sorted(map(len, ended)) == [1, 3]
    assert [large.id] in ended
