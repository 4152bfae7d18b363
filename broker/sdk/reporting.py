"""Telling the broker what was done, in the background: it never makes a program wait, and never makes it fail.

What is told waits in a queue with an end, and is sent in batches. Where the queue is full, or the broker does not take
it, it is dropped, counted, and said once in the log: a program that does its work comes before what is told of it.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from broker.sdk import calls
from broker.sdk.clock import Timing
from broker.sdk.errors import BrokerError, Invalid, Limited, NotAuthenticated, Unreachable
from broker.sdk.exchange import Call

if TYPE_CHECKING:
    from broker.sdk.activities import Activity, OfGrant, Told

MOST_WAITING = 2_000
_MOST_TOGETHER = 100
_MOST_BYTES = 60_000
GATHER_S = 1.0  # how long the first one waits for company
_PAUSE_S = 5.0  # after the broker could not be reached, which was tried for a while already
_PASSING = (Unreachable, Limited, NotAuthenticated)

_log = logging.getLogger("broker.sdk")


class Reports:
    """What waits to be told, and what became of the rest. `last_problem` says why something was not taken."""

    def __init__(self, timing: Timing, most_waiting: int = MOST_WAITING) -> None:
        self._timing = timing
        self._most_waiting = most_waiting
        self._waiting: deque[Activity] = deque()
        self._in_flight = 0
        self._said = False
        self._changed = threading.Condition()
        self.told = 0
        self.refused = 0
        self.dropped = 0
        self.last_problem: BrokerError | None = None

    @property
    def waiting(self) -> int:
        """How many are not told yet."""
        return len(self._waiting) + self._in_flight

    def put(self, grant: OfGrant | None, action: str, *, traceparent: str | None, at: Any = None, **more: Any) -> None:
        """Let one more wait; counted as refused where it is none, and as dropped where there are too many."""
        from broker.sdk.activities import Activity, grant_id_of  # not before there is something to tell

        try:
            grant_id = None if grant is None else grant_id_of(grant)
            activity = Activity(
                action=action,
                at=at or self._timing.now(),
                grant_id=grant_id,
                traceparent=traceparent if grant_id is None else None,
                **more,
            )
            if len(json.dumps(activity.as_body())) > _MOST_BYTES:
                raise Invalid("invalid_request", "The activity is too large", "say less of it")
        except BrokerError as problem:
            self._lose(1, problem, refused=True)
            return
        except Exception as problem:
            # Whatever is wrong with what was given, the program that gave it goes on; its text may hold anything.
            why = Invalid("invalid_request", "The activity cannot be told", type(problem).__name__)
            self._lose(1, why, refused=True)
            return
        with self._changed:
            if len(self._waiting) < self._most_waiting:
                self._waiting.append(activity)
                self._changed.notify_all()
                return
        self._lose(1, None)

    def take(self) -> list[Activity]:
        """The next batch, which is in flight from here."""
        with self._changed:
            batch: list[Activity] = []
            size = 0
            while self._waiting and len(batch) < _MOST_TOGETHER:
                size += len(json.dumps(self._waiting[0].as_body())) + 1
                if batch and size > _MOST_BYTES:
                    break
                batch.append(self._waiting.popleft())
            self._in_flight += len(batch)
            return batch

    def answered(self, answer: Told) -> None:
        """The broker took a batch; what of it was refused is lost."""
        with self._changed:
            self.told += answer.recorded + answer.repeated
        for refused in answer.refused:
            self._lose(1, BrokerError(refused.code, "An activity was refused", refused.detail), refused=True)

    def landed(self, batch: list[Activity]) -> None:
        """A batch is in flight no more."""
        with self._changed:
            self._in_flight -= len(batch)
            self._changed.notify_all()

    def failed(self, batch: list[Activity], problem: BrokerError) -> float:
        """The broker took none of a batch; for how many seconds it waits to be told again, 0 where it is not."""
        if not isinstance(problem, _PASSING):
            self._lose(len(batch), problem, refused=True)
            return 0
        self.last_problem = problem
        with self._changed:
            room = max(0, self._most_waiting - len(self._waiting))
            self._waiting.extendleft(reversed(batch[:room]))
        if len(batch) > room:
            self._lose(len(batch) - room, problem)
        return max(_PAUSE_S, float(getattr(problem, "retry_after_s", None) or 0))

    def drop_all(self) -> None:
        """What still waits is not told any more."""
        with self._changed:
            left = len(self._waiting)
            self._waiting.clear()
        if left:
            self._lose(left, self.last_problem)

    def _lose(self, count: int, problem: BrokerError | None, *, refused: bool = False) -> None:
        with self._changed:
            if refused:
                self.refused += count
            else:
                self.dropped += count
            self.last_problem = problem or self.last_problem
            said, self._said = self._said, True
        if not said:
            # Once: a program that works must not be drowned in what could not be told of it.
            why = "too many wait" if problem is None else str(problem)
            _log.warning("activities are not told to the broker: %s; more of these are counted and not said", why)

    def counts(self) -> Mapping[str, int]:
        return {"told": self.told, "waiting": self.waiting, "refused": self.refused, "dropped": self.dropped}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={count}' for name, count in self.counts().items())})"


def halves_of(batch: list[Activity], problem: BrokerError) -> list[list[Activity]]:
    """What to try instead of a batch that was not understood: one that is wrong must not cost its neighbours."""
    if not isinstance(problem, Invalid) or len(batch) < 2:
        return []
    middle = len(batch) // 2
    return [batch[:middle], batch[middle:]]


def known(problem: Exception) -> BrokerError:
    """What went wrong as one of ours; of anything else only its kind, for its text may hold a token (INV-30)."""
    if isinstance(problem, BrokerError):
        return problem
    return BrokerError("not_told", "The activities were not told", type(problem).__name__)


class Reporter(Reports):
    """`Reports` with a thread of its own, which begins with the first one and does not keep the program alive."""

    def __init__(self, send: Callable[[Call[Told]], Told], timing: Timing, most_waiting: int = MOST_WAITING) -> None:
        super().__init__(timing, most_waiting)
        self._send = send
        self._thread: threading.Thread | None = None
        self._owner = 0
        self._closing = False
        self._hurry = False

    def put(self, grant: OfGrant | None, action: str, *, traceparent: str | None, at: Any = None, **more: Any) -> None:
        super().put(grant, action, traceparent=traceparent, at=at, **more)
        with self._changed:
            # After a fork the thread stayed with the parent.
            running = self._thread is not None and self._owner == os.getpid() and self._thread.is_alive()
            if running or not self._waiting or self._closing:
                return
            self._owner = os.getpid()
            self._thread = threading.Thread(target=self._run, name="broker reports", daemon=True)
            atexit.register(self.close)
            self._thread.start()

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Tell what waits, now; whether all of it was told in time."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: not self.waiting, timeout_s)
            self._hurry = False
        return done

    def close(self, timeout_s: float = 2.0) -> None:
        """Tell what waits, for so long; the rest is dropped, and nothing more is taken."""
        if self._thread is not None and self._owner == os.getpid():
            self.flush(timeout_s)
        with self._changed:
            self._closing = True
            self._most_waiting = 0
            self._changed.notify_all()
        self.drop_all()
        atexit.unregister(self.close)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                self._changed.wait_for(
                    lambda: self._hurry or self._closing or len(self._waiting) >= _MOST_TOGETHER, GATHER_S
                )
                if self._closing:
                    return
            batch = self.take()
            pause_s = self._tell(batch)
            self.landed(batch)
            if pause_s:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, pause_s)

    def _tell(self, batch: list[Activity]) -> float:
        """Tell a batch; how long to wait before it, or a part of it, is told again."""
        if not batch:
            return 0
        try:
            self.answered(self._send(calls.tell(batch)))
        except Exception as problem:
            why = known(problem)
            halves = halves_of(batch, why)
            return max([self._tell(half) for half in halves]) if halves else self.failed(batch, why)
        return 0
