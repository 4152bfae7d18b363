"""A task around a block of code: it ends as the block ends, and everything issued for it dies there.

Completed where the block came to its end, failed where it raised, cancelled where it was interrupted. The reason given
is the exception's type, never its text: that may hold anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from broker.sdk import calls
from broker.sdk.errors import BrokerError, Conflict, NotFound, Refused
from broker.sdk.exchange import Call
from broker.sdk.finishing import to_its_end
from broker.sdk.values import Receipt, Task

if TYPE_CHECKING:
    from broker.sdk.aio import AsyncClient
    from broker.sdk.client import Client

# A beat may get lost or come late, and the task goes on.
_BEATS_PER_PERIOD = 3
_TASK_IS_GONE = (Conflict, NotFound, Refused)
_INTERRUPTED = (KeyboardInterrupt, GeneratorExit, asyncio.CancelledError)

Pause = Callable[[threading.Event, float], bool]


class RunningTask:
    """`lost` says why the task no longer beats, where it ended before the block; `receipt` is there after it."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.lost: BrokerError | None = None
        self.receipt: Receipt | None = None
        self.ending = False

    @property
    def id(self) -> str:
        return self.task.id

    def check(self) -> None:
        """Raise where the task has ended under us: a good thing to ask between two steps."""
        if self.lost is not None:
            raise self.lost


@contextlib.contextmanager
def running(client: Client, opening: Call[Task], pause: Pause) -> Iterator[RunningTask]:
    run = RunningTask(client.send(opening))
    with _beating(client, run, pause):
        try:
            yield run
        except BaseException as error:
            run.ending = True
            try:
                run.receipt = client.send(ending(run.id, error))
            except BrokerError as problem:
                error.add_note(_not_ended(run.id, problem))
            raise
        run.ending = True
        run.receipt = client.send(calls.complete_task(run.id))


@contextlib.asynccontextmanager
async def async_running(client: AsyncClient, opening: Call[Task]) -> AsyncIterator[RunningTask]:
    run = RunningTask(await client.send(opening))
    async with _async_beating(client, run):
        try:
            yield run
        except BaseException as error:
            run.ending = True
            try:
                run.receipt = await to_its_end(client.send(ending(run.id, error)))
            except BrokerError as problem:
                error.add_note(_not_ended(run.id, problem))
            raise
        run.ending = True
        run.receipt = await to_its_end(client.send(calls.complete_task(run.id)))


def ending(task_id: str, error: BaseException) -> Call[Receipt]:
    """The call that ends a task whose block ended with this exception."""
    end = calls.cancel_task if isinstance(error, _INTERRUPTED) else calls.fail_task
    return end(task_id, type(error).__name__)


@contextlib.contextmanager
def _beating(client: Client, run: RunningTask, pause: Pause) -> Iterator[None]:
    if run.task.heartbeat_s is None:
        yield
        return
    every_s = run.task.heartbeat_s / _BEATS_PER_PERIOD
    over = threading.Event()

    def beat() -> None:
        while not pause(over, every_s):
            try:
                client.send(_beat(run))
            except _TASK_IS_GONE as error:
                _note_loss(run, error)
                return
            except BrokerError:
                # It may be better at the next beat; if not, the broker ends the task, as it should.
                continue

    thread = threading.Thread(target=beat, name=f"heartbeat {run.id}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.asynccontextmanager
async def _async_beating(client: AsyncClient, run: RunningTask) -> AsyncIterator[None]:
    if run.task.heartbeat_s is None:
        yield
        return
    every_s = run.task.heartbeat_s / _BEATS_PER_PERIOD

    async def beat() -> None:
        while True:
            await client.timing.async_sleep(every_s)
            try:
                await client.send(_beat(run))
            except _TASK_IS_GONE as error:
                _note_loss(run, error)
                return
            except BrokerError:
                continue

    beating = asyncio.ensure_future(beat())
    try:
        yield
    finally:
        beating.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await beating


def _beat(run: RunningTask) -> Call[Task]:
    # Once: the next beat is the repetition, and the block must not wait long for this one when it ends.
    return replace(calls.heartbeat(run.id), repeatable=False)


def _note_loss(run: RunningTask, error: BrokerError) -> None:
    # A beat that crosses our own ending of the task tells nothing new.
    if not run.ending:
        run.lost = error


def _not_ended(task_id: str, problem: BrokerError) -> str:
    return f"task {task_id} could not be ended and lives until its deadline or its heartbeat is missed: {problem}"
