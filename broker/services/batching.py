"""Many callers, one transaction: what arrives while one is on its way goes together into the next.

A commit costs the same for one row as for sixty, so throughput grows with load and a lone caller waits for nobody. Who
was answered together comes back together, a moment apart: the first of them may wait that moment for the others. The
same serves reading: one look answers for all who asked before it began, and never for who asked after.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from broker.domain.errors import BrokerError, Unavailable

Item = TypeVar("Item")
Result = TypeVar("Result")

_NEARLY_ALL = 0.9  # of those who came together the last time; the slowest are not worth waiting for

_log = logging.getLogger(__name__)


class _Ticket(Generic[Item, Result]):
    __slots__ = ("error", "item", "result", "wake")

    def __init__(self, item: Item) -> None:
        self.item = item
        self.result: Result | None = None
        self.error: BrokerError | None = None
        self.wake = threading.Lock()  # the cheapest thing that one thread can wait for and another release
        self.wake.acquire()

    @property
    def answered(self) -> bool:
        return self.result is not None or self.error is not None


class Batching(Generic[Item, Result]):
    """`work(items)` answers one result or one BrokerError per item, in order, after everything it did is durable.

    It is called by whichever caller finds no batch under way, for itself and for all who came meanwhile: no thread
    of our own, nothing to start or stop. With `waiting`, callers beyond that many are told to come again, so that a
    store that hangs does not take every thread of the process with it (INV-27). With `gathering_s`, a batch begins when
    about as many have come as were there at the last one, or after so many seconds.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Sequence[Result | BrokerError]],
        *,
        at_most: int = 64,
        waiting: int | None = None,
        gathering_s: float = 0,
    ) -> None:
        self._work = work
        self._at_most = at_most
        self._waiting = waiting
        # More than may wait are not waited for: they would be told to come again meanwhile.
        self._at_most_gathered = at_most if waiting is None else min(at_most, waiting + 1)
        self._gathering_s = gathering_s
        self._queue: deque[_Ticket[Item, Result]] = deque()
        self._guard = threading.Lock()
        self._busy = False
        self._lately = 1  # how many there were at the last batch: in it, and come meanwhile
        self._wanted = 0  # in the queue, for the batch that is being gathered
        self._gathered = threading.Event()

    def submit(self, item: Item) -> Result:
        """Wait until the item's batch is done; raises what it answered for it."""
        ticket: _Ticket[Item, Result] = _Ticket(item)
        with self._guard:
            leads = not self._busy
            if leads:
                self._busy = True
            elif self._waiting is not None and len(self._queue) >= self._waiting:
                raise Unavailable(f"{len(self._queue)} others are waiting already: try again")
            else:
                self._queue.append(ticket)
                if len(self._queue) == self._wanted:
                    self._gathered.set()
        if not leads:
            # Woken with an answer, or without one: then a leader before us is done, and we are the next.
            ticket.wake.acquire()
        if not ticket.answered:
            self._lead(ticket)
        if ticket.error is not None:
            raise ticket.error.with_traceback(None)  # one error may be many callers'
        assert ticket.result is not None  # noqa: S101 - the work answers every item
        return ticket.result

    def _lead(self, own: _Ticket[Item, Result]) -> None:
        """Answer one's own, which nobody else can take any more, and those who wait."""
        batch = [own]
        try:
            if self._gathering_s:
                self._gather()
            with self._guard:
                batch += [self._queue.popleft() for _ in range(min(self._at_most - 1, len(self._queue)))]
            self._answer(batch)
        finally:
            with self._guard:
                # Before anybody of the batch can be back: nobody is counted twice.
                self._lately = min(len(batch) + len(self._queue), self._at_most_gathered)
            # Whatever ends this thread, nobody is left waiting for it.
            for ticket in batch:
                if not ticket.answered:
                    ticket.error = _no_answer()
                if ticket is not own:
                    ticket.wake.release()
            with self._guard:
                if self._queue:
                    self._queue.popleft().wake.release()
                else:
                    self._busy = False

    def _gather(self) -> None:
        with self._guard:
            self._wanted = int(self._lately * _NEARLY_ALL) - 1  # and the one who waits here
            if len(self._queue) >= self._wanted:
                return
            self._gathered.clear()
        self._gathered.wait(self._gathering_s)

    def _answer(self, batch: Sequence[_Ticket[Item, Result]]) -> None:
        try:
            answers = self._work([ticket.item for ticket in batch])
        except BrokerError as problem:
            # Everybody's: the store did not answer. An unknown commit is "not committed" for delivery (INV-05), and
            # asking again for each would repeat what was done, sixty times as slowly.
            for ticket in batch:
                ticket.error = problem
        except Exception:
            # Somebody's, and before anything was committed: one poisonous item must not refuse its neighbours.
            _log.exception("a batch failed", extra={"fields": {"items": len(batch)}})
            if len(batch) == 1:
                batch[0].error = _no_answer()
                return
            middle = len(batch) // 2
            self._answer(batch[:middle])
            self._answer(batch[middle:])
        else:
            for ticket, answer in zip(batch, answers, strict=True):
                if isinstance(answer, BrokerError):
                    ticket.error = answer
                else:
                    ticket.result = answer


def _no_answer() -> Unavailable:
    return Unavailable("the broker's store did not answer; nothing was handed out, try again")
