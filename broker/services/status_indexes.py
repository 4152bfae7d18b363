"""Places in status lists (IETF Token Status List), handed out once and never again.

A task's grants sit side by side, because a run of revoked tokens compresses to almost nothing. What a stopped
process had reserved is lost, not reused: an index may still be pointed to.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from datetime import datetime, timedelta

from broker.store.database import Database
from broker.store.standing import reserve_indexes

_CHUNK = 16384  # reserved of the database at a time
_SCARCE = 8192  # below this, nobody gets a long run
_FIRST_RUN, _LONGEST_RUN = 8, 512  # reserved of a chunk for one task; doubled each time it is used up
_TASKS_REMEMBERED = 4096
_GOOD_FOR = timedelta(hours=1)


@dataclass
class _Run:
    list_id: int
    next: int
    end: int
    good_until: datetime


class StatusIndexes:
    """One process's reserve. `longest_life` is how long after its issue a token can be presented."""

    def __init__(self, *, database: Database, longest_life: timedelta) -> None:
        self._database = database
        self._longest_life = longest_life
        self._guard = threading.Lock()
        self._reserving = threading.Lock()
        self._chunk: _Run | None = None
        self._runs: dict[str, _Run] = {}
        self._lengths: dict[str, int] = {}

    def reserve(self, count: int, now: datetime) -> None:
        """Make sure that `count` grants find a place without a database call; outside of any transaction."""
        if self._has_room_for(count, now):
            return
        with self._reserving:
            if self._has_room_for(count, now):
                return
            good_until = now + _GOOD_FOR
            # Not behind the guard: on SQLite whoever takes a place is the one writer, for whom this one waits.
            with self._database.begin() as db:
                list_id, start = reserve_indexes(db, _CHUNK, last_expiry_at=good_until + self._longest_life)
            with self._guard:
                self._chunk = _Run(list_id, start, start + _CHUNK, good_until)

    def _has_room_for(self, count: int, now: datetime) -> bool:
        with self._guard:
            chunk = self._chunk
            return chunk is not None and chunk.end - chunk.next >= count * _FIRST_RUN and now < chunk.good_until

    def take(self, task_id: str, now: datetime) -> tuple[int, int]:
        """(list, index) for one grant of this task; `reserve` was called for it."""
        with self._guard:
            run = self._runs.get(task_id)
            if run is None or run.next == run.end or now >= run.good_until:
                run = self._new_run(task_id)
            run.next += 1
            return run.list_id, run.next - 1

    def _new_run(self, task_id: str) -> _Run:
        chunk = self._chunk
        if chunk is None or chunk.end - chunk.next < _FIRST_RUN:
            raise RuntimeError("a grant asked for a status index that was not reserved")
        wanted = min(_LONGEST_RUN, 2 * self._lengths.get(task_id, _FIRST_RUN // 2))
        length = wanted if chunk.end - chunk.next >= _SCARCE else _FIRST_RUN
        if len(self._runs) >= _TASKS_REMEMBERED:
            self._runs.clear()
            self._lengths.clear()
        run = _Run(chunk.list_id, chunk.next, chunk.next + length, chunk.good_until)
        chunk.next += length
        self._runs[task_id], self._lengths[task_id] = run, length
        return run
