"""Many callers, one transaction: who answers whom, and that nobody is left waiting."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from broker.domain.errors import Conflict, Unavailable
from broker.services.batching import Batching


class Work:
    """Answers what `answer` says; the first batch waits until it is let go."""

    def __init__(self, answer=lambda items: [item * 2 for item in items]):
        self.answer = answer
        self.batches = []
        self.started, self.go_on = threading.Event(), threading.Event()

    def __call__(self, items):
        self.batches.append(list(items))
        if len(self.batches) == 1:
            self.started.set()
            assert self.go_on.wait(10)
        return self.answer(items)


def many(batching, pool, work, items):
    """One call that is under way, and the others that came meanwhile."""
    first = pool.submit(batching.submit, 0)
    assert work.started.wait(10)
    others = [pool.submit(batching.submit, item) for item in items]
    while len(batching._queue) < len(others):
        pass
    work.go_on.set()
    return [first, *others]


def outcomes(futures):
    return [type(future.exception(10)).__name__ if future.exception(10) else future.result(10) for future in futures]


@pytest.fixture
def pool():
    with ThreadPoolExecutor(64) as pool:
        yield pool


def test_what_comes_while_a_batch_is_under_way_goes_together_into_the_next(pool):
    work = Work()
    batching = Batching(work)
    assert outcomes(many(batching, pool, work, range(1, 20))) == [item * 2 for item in range(20)]
    assert [len(batch) for batch in work.batches] == [1, 19]


def test_a_batch_is_never_larger_than_it_may_be(pool):
    work = Work()
    batching = Batching(work, at_most=5)
    assert outcomes(many(batching, pool, work, range(1, 13))) == [item * 2 for item in range(13)]
    assert [len(batch) for batch in work.batches] == [1, 5, 5, 2]


def test_each_caller_gets_its_own_refusal(pool):
    work = Work(lambda items: [Conflict("odd") if item % 2 else item for item in items])
    batching = Batching(work)
    assert outcomes(many(batching, pool, work, [1, 2, 3])) == [0, "Conflict", 2, "Conflict"]


def test_a_store_that_does_not_answer_is_asked_once_for_all(pool):
    """INV-05: the commit may have happened. To ask again for each would do again what was done."""

    def answer(items):
        if len(items) > 1:
            raise Unavailable("the store did not answer")
        return items

    work = Work(answer)
    batching = Batching(work)
    assert outcomes(many(batching, pool, work, range(1, 10))) == [0] + ["Unavailable"] * 9
    assert len(work.batches) == 2


def test_one_poisonous_item_is_refused_alone(pool):
    def answer(items):
        if 7 in items:
            raise ValueError("poison")
        return items

    work = Work(answer)
    batching = Batching(work)
    done = outcomes(many(batching, pool, work, range(1, 20)))
    assert done == [item if item != 7 else "Unavailable" for item in range(20)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whatever_ends_the_one_who_works_nobody_is_left_waiting(pool):
    def answer(items):
        if len(items) > 1:
            raise SystemExit
        return items

    work = Work(answer)
    batching = Batching(work)
    done = outcomes(many(batching, pool, work, range(1, 5)))
    assert sorted(map(str, done)) == ["0", "SystemExit", "Unavailable", "Unavailable", "Unavailable"]
    assert batching.submit(9) == 9


def test_too_many_who_wait_are_told_to_come_again(pool):
    """INV-27: a store that hangs must not take every thread of the process with it."""
    work = Work()
    batching = Batching(work, waiting=3)
    first = pool.submit(batching.submit, 0)
    assert work.started.wait(10)
    others = [pool.submit(batching.submit, item) for item in (1, 2, 3)]
    while len(batching._queue) < 3:
        pass
    with pytest.raises(Unavailable, match="3 others are waiting"):
        batching.submit(4)
    work.go_on.set()
    assert outcomes([first, *others]) == [0, 2, 4, 6]


class TestGathering:
    """Those who were answered together are waited for; `gathering_s` is far longer than a test where they come."""

    def lately(self, batching, pool, work, count):
        """So many came together the last time."""
        assert outcomes(many(batching, pool, work, range(1, count))) == [item * 2 for item in range(count)]
        work.batches.clear()
        work.batches.append([])  # the first batch waits to be let go, and was

    def test_the_first_waits_for_as_many_as_came_the_last_time(self, pool):
        work = Work()
        batching = Batching(work, gathering_s=60)
        self.lately(batching, pool, work, 20)
        assert batching._lately == 19
        calls = [pool.submit(batching.submit, item) for item in range(16)]
        while len(batching._queue) < 15:
            pass
        assert len(work.batches) == 1
        calls.append(pool.submit(batching.submit, 16))
        assert outcomes(calls) == [item * 2 for item in range(17)]
        assert sorted(work.batches[1]) == list(range(17))

    def test_a_lone_caller_waits_for_nobody(self, pool):
        work = Work()
        work.go_on.set()
        batching = Batching(work, gathering_s=60)
        for item in range(5):
            assert pool.submit(batching.submit, item).result(10) == item * 2
        assert [len(batch) for batch in work.batches] == [1] * 5

    def test_who_does_not_come_is_waited_for_once_and_not_for_long(self, pool):
        work = Work()
        batching = Batching(work, gathering_s=0.05)
        self.lately(batching, pool, work, 20)
        assert pool.submit(batching.submit, 1).result(10) == 2
        batching._gathering_s = 60
        assert pool.submit(batching.submit, 2).result(10) == 4
        assert [len(batch) for batch in work.batches] == [0, 1, 1]

    def test_more_than_a_batch_holds_are_not_waited_for(self, pool):
        work = Work()
        batching = Batching(work, at_most=5, gathering_s=60)
        assert outcomes(many(batching, pool, work, range(1, 11))) == [item * 2 for item in range(11)]
        assert [len(batch) for batch in work.batches] == [1, 5, 5]

    def test_more_than_may_wait_are_not_waited_for(self, pool):
        """They would be told to come again, for as long as nothing is under way."""
        go_on, batches = threading.Semaphore(0), []

        def work(items):
            batches.append(list(items))
            assert go_on.acquire(timeout=10)
            return [item * 2 for item in items]

        batching = Batching(work, waiting=10, gathering_s=60)
        calls = [pool.submit(batching.submit, 0)]
        for number in (1, 2):
            while len(batches) < number:
                pass
            calls += [pool.submit(batching.submit, item) for item in range(10)]
            while len(batching._queue) < 10:
                pass
            go_on.release()
        go_on.release(2)
        assert [call.result(10) for call in calls] == [0, *(item * 2 for item in range(10))] + [
            item * 2 for item in range(10)
        ]
        assert [len(batch) for batch in batches] == [1, 10, 10]
