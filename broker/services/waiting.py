"""Callers who wait for something to be decided, and how many of them may (INV-27, INV-35).

Each holds a thread that could answer somebody else, so there are few, and one more is told at once how it stands now. A
look is a read; what is waited for is in rows, whichever broker decides it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

_AT_ONCE = 16
_OF_ONE_CALLER = 4
_LOOK_EVERY_S = 0.5

Seen = TypeVar("Seen")


class Waiting:
    def __init__(self, *, at_once: int = _AT_ONCE, of_one_caller: int = _OF_ONE_CALLER) -> None:
        self._at_once = at_once
        self._of_one_caller = of_one_caller
        self._guard = threading.Lock()
        self._waiting: Counter[str] = Counter()
        self._stopped = threading.Event()

    def until(self, look: Callable[[], Seen], is_settled: Callable[[Seen], bool], *, by: str, at_most_s: int) -> Seen:
        """What is seen when it is settled, or when the time is over, or at once where too many wait already."""
        seen = look()
        if at_most_s <= 0 or is_settled(seen) or not self._enter(by):
            return seen
        try:
            until = time.monotonic() + at_most_s
            while not is_settled(seen):
                left_s = until - time.monotonic()
                if left_s <= 0 or self._stopped.wait(min(_LOOK_EVERY_S, left_s)):
                    return seen
                seen = look()
            return seen
        finally:
            self._leave(by)

    def stop(self) -> None:
        """Let everybody who waits go with what they see, and nobody wait from here on."""
        self._stopped.set()

    def _enter(self, by: str) -> bool:
        with self._guard:
            full = self._waiting.total() >= self._at_once or self._waiting[by] >= self._of_one_caller
            if full or self._stopped.is_set():
                return False
            self._waiting[by] += 1
            return True

    def _leave(self, by: str) -> None:
        with self._guard:
            self._waiting[by] -= 1
            if not self._waiting[by]:
                del self._waiting[by]
