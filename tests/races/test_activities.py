"""Fifty reporters at once, two brokers on one store: everything is told once, and no bound is passed."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import sqlalchemy as sa

from broker.domain.activity import Kind, Report
from broker.domain.errors import BrokerError, LimitExceeded, Unavailable
from broker.domain.lifecycle import TaskState
from broker.services import activities
from broker.store import models
from tests.conftest import NOW
from tests.house import build_house

_activities = models.table_of(models.Activity)


def report(grant, id):
    return Report(id=id, grant_id=grant.id, kind=Kind.TOOL, action="search", at=NOW)


@pytest.fixture
def houses(store_url, tmp_path):
    first = build_house(store_url, tmp_path, max_activities_per_grant=200)
    # SQLite has one process, so there the second is the first once more.
    other = first if first.broker.database.is_sqlite else build_house(store_url, tmp_path, max_activities_per_grant=200)
    yield first, other
    first.broker.close()
    if other is not first:
        other.broker.close()


def at_once(houses, tell, count=50):
    """What each of so many came to: what it was told, or the refusal."""

    def one(number):
        while True:
            try:
                return tell(houses[number % 2], number)
            except Unavailable:
                continue
            except BrokerError as problem:
                return problem

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def count(house, *where):
    with house.broker.database.read() as db:
        return db.execute(sa.select(sa.func.count()).select_from(_activities).where(*where)).scalar_one()


def test_fifty_reporters_of_many_grants_tell_each_thing_once(houses):
    house = houses[0]
    task = house.open_task()
    grants = [house.issue(task).grant for _ in range(5)]
    callers = {by: house.caller(by) for by in ("summarizer", "crm-api")}

    def tell(into, number):
        by = "summarizer" if number % 2 else "crm-api"
        # Each grant in another order, so that whoever locked them as they come would wait for ever.
        told = [report(grants[(number + step) % 5], f"{number // 4}-{step}") for step in range(5)]
        return into.broker.activities.take(callers[by], told)

    answers = at_once(houses, tell)
    assert not [answer for answer in answers if isinstance(answer, BrokerError)]
    assert sum(answer.recorded + answer.repeated + len(answer.refused) for answer in answers) == 250
    with house.broker.database.read() as db:
        rows = db.execute(sa.select(_activities.c.report_sha256)).scalars().all()
    assert len(rows) == len(set(rows)) == sum(answer.recorded for answer in answers)


def test_the_same_batch_from_fifty_is_taken_down_once(houses):
    house = houses[0]
    grant = house.issue(house.open_task()).grant
    caller = house.caller("summarizer")
    batch = [report(grant, f"r{number}") for number in range(20)]
    answers = at_once(houses, lambda into, _: into.broker.activities.take(caller, batch))
    assert sorted(answer.recorded for answer in answers) == [0] * 49 + [20]
    assert count(house) == 20


def test_the_bound_of_a_grant_holds_whoever_tells(houses):
    """INV-34."""
    house = houses[0]
    grant = house.issue(house.open_task()).grant
    callers = [house.caller("summarizer"), house.caller("crm-api")]
    answers = at_once(
        houses,
        lambda into, number: into.broker.activities.take(
            callers[number // 25], [report(grant, f"{number}-{step}") for step in range(10)]
        ),
    )
    assert sum(answer.recorded for answer in answers) == count(house) == 200
    assert sum(len(answer.refused) for answer in answers) == 300


def test_the_bound_of_a_minute_holds_at_both_brokers(houses):
    """INV-34."""
    for house in set(map(id, houses)):
        found = next(each for each in houses if id(each) == house)
        found.broker.activities._limits = replace(found.broker.activities._limits, max_activities_per_minute=100)
    house = houses[0]
    grant = house.issue(house.open_task()).grant
    caller = house.caller("summarizer")
    answers = at_once(
        houses,
        lambda into, number: into.broker.activities.take(
            caller, [report(grant, f"{number}-{step}") for step in range(10)]
        ),
    )
    assert sum(isinstance(answer, LimitExceeded) for answer in answers) == 40
    assert count(house) == 100


def test_of_two_who_tell_of_one_grant_the_second_counts_what_the_first_told(race):
    """INV-34: at the last place that is left."""
    grant = race.one.issue(race.one.open_task()).grant
    for house in (race.one, race.other):
        house.broker.activities._limits = replace(house.broker.activities._limits, max_activities_per_grant=2)
    agent, verifier = race.one.caller("summarizer"), race.other.caller("crm-api")
    race.one.broker.activities.take(agent, [report(grant, "before")])
    pause = race.stop(activities.activities, "insert_activities")
    first, second = race.run_into(
        lambda: race.one.broker.activities.take(agent, [report(grant, "a")]),
        pause,
        lambda: race.other.broker.activities.take(verifier, [report(grant, "b")]),
    )
    assert second.waited
    assert (first.answer.recorded, second.answer.recorded, len(second.answer.refused)) == (1, 0, 1)
    assert count(race.one) == 2


def test_whoever_ends_a_grant_does_not_wait_for_who_tells_of_it(postgres_race):
    """INV-27: a foreign key would have locked the grant's row."""
    race = postgres_race
    task = race.one.open_task()
    grant = race.one.issue(task).grant
    agent = race.one.caller("summarizer")
    pause = race.stop(activities.activities, "insert_activities", after=True)
    told, ended = race.run_into(
        lambda: race.one.broker.activities.take(agent, [report(grant, "a")]),
        pause,
        lambda: race.other.broker.tasks.end(race.other.caller("pipeline"), task.id, TaskState.COMPLETED),
    )
    assert (ended.waited, ended.refusal) == (False, None)
    assert told.answer.recorded == 1
