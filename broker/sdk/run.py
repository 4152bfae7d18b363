"""A task around a block of code: it ends as the block ends, and everything issued for it dies there.

Completed where the block came to its end, failed where it raised, cancelled where it was interrupted. The reason given
is the exception's type, never its text: that may hold anything.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from broker.sdk import calls
from broker.sdk.errors import BrokerError, Conflict, NotFound, Refused
from broker.sdk.exchange import Call
from broker.sdk.values import Task

if TYPE_CHECKING:
    from broker.sdk.client import Client
    from broker.sdk.credential import CredentialSource
    from broker.sdk.dpop import DpopKey
    from broker.sdk.receipts import Receipt

# A beat may get lost or come late, and the task goes on.
BEATS_PER_PERIOD = 3
TASK_IS_GONE = (Conflict, NotFound, Refused)

Pause = Callable[[threading.Event, float], bool]


class Running:
    """What both kinds of running task are. `report` is that of the client."""

    def __init__(self, task: Task, report: Callable[..., None]) -> None:
        self.task = task
        self.report = report
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


class RunningTask(Running):
    """`lost` says why the task no longer beats, where it ended before the block; `receipt` is there after it."""

    def __init__(self, task: Task, client: Client) -> None:
        super().__init__(task, client.report)
        self._client = client
        self._sources: list[CredentialSource] = []

    def credential(
        self,
        resource: str,
        scopes: Iterable[str],
        *,
        agent: Client | None = None,
        ttl_s: int | None = None,
        intent: str | None = None,
        context: Mapping[str, Any] | None = None,
        dpop: DpopKey | None = None,
        parameters: Mapping[str, str] | None = None,
    ) -> CredentialSource:
        """A credential for this task, which ends with the block. `agent` asks for it where it is not us."""
        source = (agent or self._client).credential(
            self.id,
            resource,
            scopes,
            ttl_s=ttl_s,
            intent=intent,
            context=context,
            dpop=dpop,
            parameters=parameters,
        )
        self._sources.append(source)
        return source

    def lapse(self) -> None:
        """What was asked for in the block is over, as its task is."""
        for source in self._sources:
            source.lapse()


@contextlib.contextmanager
def running(client: Client, opening: Call[Task], pause: Pause) -> Iterator[RunningTask]:
    run = RunningTask(client.send(opening), client)
    with _beating(client, run, pause):
        try:
            yield run
        except BaseException as error:
            run.ending = True
            try:
                run.receipt = client.send(ending(run.id, error))
            except BrokerError as problem:
                error.add_note(not_ended(run.id, problem))
            finally:
                run.lapse()
            raise
        run.ending = True
        try:
            run.receipt = client.send(calls.complete_task(run.id))
        finally:
            run.lapse()


def ending(task_id: str, error: BaseException) -> Call[Receipt]:
    """The call that ends a task whose block ended with this exception."""
    end = calls.cancel_task if _is_interruption(error) else calls.fail_task
    return end(task_id, type(error).__name__)


def _is_interruption(error: BaseException) -> bool:
    # That of asyncio by its name: a program without an event loop does not load one for this.
    cancelled = type(error).__name__ == "CancelledError" and not isinstance(error, Exception)
    return cancelled or isinstance(error, KeyboardInterrupt | GeneratorExit)


@contextlib.contextmanager
def _beating(client: Client, run: Running, pause: Pause) -> Iterator[None]:
    if run.task.heartbeat_s is None:
        yield
        return
    every_s = run.task.heartbeat_s / BEATS_PER_PERIOD
    over = threading.Event()

    def go_on() -> None:
        while not pause(over, every_s):
            try:
                client.send(beat(run))
            except TASK_IS_GONE as error:
                note_loss(run, error)
                return
            except BrokerError:
                # It may be better at the next beat; if not, the broker ends the task, as it should.
                continue

    thread = threading.Thread(target=go_on, name=f"heartbeat {run.id}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def beat(run: Running) -> Call[Task]:
    # Once: the next beat is the repetition, and the block must not wait long for this one when it ends.
    return replace(calls.heartbeat(run.id), repeatable=False)


def note_loss(run: Running, error: BrokerError) -> None:
    # A beat that crosses our own ending of the task tells nothing new.
    if not run.ending:
        run.lost = error


def not_ended(task_id: str, problem: BrokerError) -> str:
    return f"task {task_id} could not be ended and lives until its deadline or its heartbeat is missed: {problem}"
