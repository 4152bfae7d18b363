"""Callers who wait hold a thread each: few may, and none beyond their time."""

import threading
import time

import pytest

from broker.services.waiting import Waiting

LONG_S = 60


class Watched:
    """Something to look at, and how many look at it."""

    def __init__(self):
        self.decided = threading.Event()
        self.looked = threading.Semaphore(0)

    def look(self):
        self.looked.release()
        return self.decided.is_set()

    def wait(self, waiting, by="summarizer", at_most_s=LONG_S):
        return waiting.until(self.look, bool, by=by, at_most_s=at_most_s)


@pytest.fixture
def watched():
    return Watched()


def waiters(waiting, watched, names):
    """One thread each, all of which have looked and wait."""
    threads = [threading.Thread(target=watched.wait, args=(waiting, name)) for name in names]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + LONG_S
    while waiting._waiting.total() < len(threads):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return threads


def end(threads):
    for thread in threads:
        thread.join(LONG_S)
        assert not thread.is_alive()


def test_who_waits_sees_what_was_decided(watched):
    waiting = Waiting()
    threads = waiters(waiting, watched, ["summarizer"])
    watched.decided.set()
    end(threads)
    assert waiting._waiting.total() == 0


def test_what_is_settled_or_not_to_be_waited_for_is_answered_at_once(watched):
    waiting = Waiting()
    assert watched.wait(waiting, at_most_s=0) is False
    watched.decided.set()
    assert watched.wait(waiting) is True
    assert waiting._waiting.total() == 0


def test_one_more_than_may_wait_is_answered_at_once(watched):
    """INV-35: however many ask, so many threads are held and no more."""
    waiting = Waiting(at_once=3, of_one_caller=3)
    threads = waiters(waiting, watched, ["a", "b", "c"])
    assert watched.wait(waiting, by="d") is False
    watched.decided.set()
    end(threads)


def test_one_caller_does_not_take_every_place(watched):
    waiting = Waiting(at_once=10, of_one_caller=2)
    threads = waiters(waiting, watched, ["a", "a", "b"])
    assert watched.wait(waiting, by="a") is False
    watched.decided.set()
    end(threads)


def test_a_broker_that_stops_keeps_nobody_waiting(watched):
    waiting = Waiting()
    threads = waiters(waiting, watched, ["a", "b"])
    waiting.stop()
    end(threads)
    assert watched.wait(waiting) is False


def test_the_time_is_over_when_it_is_over(watched):
    waiting = Waiting()
    assert watched.wait(waiting, at_most_s=1) is False
    assert waiting._waiting.total() == 0


def test_a_look_that_fails_gives_its_place_back(watched):
    waiting = Waiting()
    looks = iter([False, OSError("the store did not answer")])

    def look():
        seen = next(looks)
        if isinstance(seen, OSError):
            raise seen
        return seen

    with pytest.raises(OSError, match="did not answer"):
        waiting.until(look, bool, by="a", at_most_s=LONG_S)
    assert waiting._waiting.total() == 0
