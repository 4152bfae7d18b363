import asyncio
import contextlib
import threading

import pytest

from broker import sdk
from broker.sdk import Timing


def verbs(server):
    return [seen.path.rpartition("/")[2] for seen in server.seen]


def run(client, heartbeat_s=None, **more):
    return client.run_task("summarize leads", ["summarizer"], 3600, heartbeat_s, **more)


def test_a_block_that_comes_to_its_end_completes_its_task(client, server, a):
    server.answers((201, a.task()), a.receipt())
    with run(client) as task:
        assert task.id == "task_1"
    assert verbs(server) == ["tasks", "complete"]
    assert task.receipt.outcome == "completed"


@pytest.mark.parametrize(
    ("error", "verb"),
    [(ValueError, "fail"), (SystemExit, "fail"), (KeyboardInterrupt, "cancel"), (asyncio.CancelledError, "cancel")],
)
def test_a_block_that_raises_ends_its_task_with_the_errors_type_and_not_its_text(client, server, a, error, verb):
    server.answers((201, a.task()), a.receipt())
    with pytest.raises(error), run(client):
        raise error("password is hunter2")
    assert verbs(server) == ["tasks", verb]
    assert server.seen[1].json() == {"reason": error.__name__}


def test_a_task_that_cannot_be_ended_does_not_hide_why_the_block_failed(client, server, a):
    server.answers((201, a.task()), (500, {}))
    with pytest.raises(ValueError, match="mine") as error, run(client):
        raise ValueError("mine")
    assert "could not be ended" in error.value.__notes__[0]


def test_a_task_that_cannot_be_completed_is_an_error(client, server, a):
    server.answers((201, a.task()), (500, {}))
    with pytest.raises(sdk.BrokerError), run(client):
        pass


class Beats:
    """Pauses that end when the test says so, and say how long they would have been."""

    def __init__(self):
        self.seconds = []
        self._next = threading.Semaphore(0)
        self._paused = threading.Semaphore(0)

    def __call__(self, over, seconds):
        self.seconds.append(seconds)
        self._paused.release()
        while not self._next.acquire(timeout=0.005):
            if over.is_set():
                return True
        return over.is_set()

    def beat(self):
        """One more beat; back when it is done and the next pause has begun."""
        assert self._paused.acquire(timeout=5)
        self._next.release()

    def pausing(self):
        assert self._paused.acquire(timeout=5)


def test_a_task_with_a_heartbeat_beats_three_times_a_period_while_the_block_runs(client, server, a):
    beats = Beats()
    server.answers((201, a.task(heartbeat_s=30)), a.task(), server.CUT, a.task(), a.receipt())
    with run(client, 30, pause=beats) as task:
        for _ in range(3):
            beats.beat()
        beats.pausing()
        task.check()
    assert verbs(server) == ["tasks", "heartbeat", "heartbeat", "heartbeat", "complete"]
    assert set(beats.seconds) == {10}


def test_a_task_that_ended_elsewhere_stops_beating_and_says_so(client, server, a):
    beats = Beats()
    gone = threading.Event()

    def conflict(_):
        gone.set()
        return 409, a.problem(409, "task_not_active")

    server.answers((201, a.task(heartbeat_s=30)), conflict, a.receipt("expired"))
    with pytest.raises(sdk.Conflict), run(client, 30, pause=beats) as task:
        beats.beat()
        assert gone.wait(5)
        for thread in threading.enumerate():
            if thread.name == "heartbeat task_1":
                thread.join(5)
        task.check()
    assert verbs(server) == ["tasks", "heartbeat", "fail"]
    assert task.receipt.outcome == "expired"


def test_the_async_block_does_the_same(async_client, server, a):
    server.answers((201, a.task()), a.receipt(), (201, a.task()), a.receipt("failed"))

    async def main():
        async with async_client as client:
            async with run(client) as task:
                assert task.id == "task_1"
            with pytest.raises(ValueError, match="secret"):
                async with run(client):
                    raise ValueError("secret")

    asyncio.run(main())
    assert verbs(server) == ["tasks", "complete", "tasks", "fail"]
    assert server.seen[3].json() == {"reason": "ValueError"}


def test_an_asyncio_task_that_is_cancelled_cancels_its_task(async_client, server, a):
    server.answers((201, a.task()), a.receipt("cancelled"))

    async def main():
        started = asyncio.Event()

        async def work(client):
            async with run(client):
                started.set()
                await asyncio.Event().wait()

        async with async_client as client:
            working = asyncio.ensure_future(work(client))
            await started.wait()
            working.cancel()
            with pytest.raises(asyncio.CancelledError):
                await working

    asyncio.run(main())
    assert verbs(server) == ["tasks", "cancel"]
    assert server.seen[1].json() == {"reason": "CancelledError"}


def test_the_async_block_beats_too(server, a, time):
    server.answers((201, a.task(heartbeat_s=30)), a.task(), a.task(), a.receipt())
    pauses = []

    async def main():
        third = asyncio.Event()

        async def pause(seconds):
            pauses.append(seconds)
            if len(pauses) == 3:
                third.set()
                await asyncio.Event().wait()

        timing = Timing(async_sleep=pause)
        async with sdk.AsyncClient(server.url, token="t", timing=timing) as client, run(client, 30):
            await third.wait()

    asyncio.run(main())
    assert verbs(server) == ["tasks", "heartbeat", "heartbeat", "complete"]
    assert pauses == [10, 10, 10]


def test_run_task_is_a_context_manager_of_its_own_and_task_reads_one(client, server, a):
    server.answers(a.task())
    assert isinstance(run(client), contextlib.AbstractContextManager)
    assert client.task("task_1").state == "active"
    assert verbs(server) == ["task_1"]
