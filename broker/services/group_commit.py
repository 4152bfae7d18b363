"""Many callers, one transaction: what arrives while a commit is on its way goes together into the next.

A commit costs the same for one row as for sixty, so throughput grows with load and a lone caller waits for nobody.
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


class GroupCommit(Generic[Item, Result]):
    """`commit(items)` answers one result or one BrokerError per item, in order, after everything is durable.

    It is called by whichever caller finds no commit under way, for itself and for all who came meanwhile: no thread
    of our own, nothing to start or stop.
    """

    def __init__(
        self, commit: Callable[[Sequence[Item]], Sequence[Result | BrokerError]], *, at_most: int = 64
    ) -> None:
        self._commit = commit
        self._at_most = at_most
        self._queue: deque[_Ticket[Item, Result]] = deque()
        self._guard = threading.Lock()
        self._busy = False

    def submit(self, item: Item) -> Result:
        """Wait until the item is durable; raises what its commit answered for it."""
        ticket: _Ticket[Item, Result] = _Ticket(item)
        with self._guard:
            self._queue.append(ticket)
            leads = not self._busy
            self._busy = True
        if not leads:
            # Woken with an answer, or without one: then the leader before us has its own, and we are the next.
            ticket.wake.acquire()
        if not ticket.answered:
            self._lead(ticket)
        if ticket.error is not None:
            raise ticket.error
        assert ticket.result is not None  # noqa: S101 - a commit answers every item
        return ticket.result

    def _lead(self, own: _Ticket[Item, Result]) -> None:
        try:
            while not own.answered:
                with self._guard:
                    batch = [self._queue.popleft() for _ in range(min(self._at_most, len(self._queue)))]
                self._answer(batch)
                for ticket in batch:
                    if ticket is not own:
                        ticket.wake.release()
        finally:
            with self._guard:
                if self._queue:
                    self._queue[0].wake.release()
                else:
                    self._busy = False

    def _answer(self, batch: Sequence[_Ticket[Item, Result]]) -> None:
        try:
            answers = self._commit([ticket.item for ticket in batch])
        except Exception as problem:
            if len(batch) > 1:
                # One poisonous row must not refuse its neighbours. Nothing was handed out, so each may try alone.
                for ticket in batch:
                    self._answer([ticket])
            elif isinstance(problem, BrokerError):
                batch[0].error = problem
            else:
                # An unknown commit outcome is "not committed" for delivery (INV-05).
                _log.exception("commit failed")
                batch[0].error = Unavailable("the broker's store did not answer; nothing was handed out, try again")
            return
        for ticket, answer in zip(batch, answers, strict=True):
            if isinstance(answer, BrokerError):
                ticket.error = answer
            else:
                ticket.result = answer
