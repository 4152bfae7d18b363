"""One pass over what time alone decides, and over rows that owe something. Tidiness, never safety.

"Live" asks the clock itself, so a late sweep endangers nothing. Each batch is its own short transaction and moves rows
by compare-and-set: several sweepers at once do the work once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from broker.domain.clock import Clock
from broker.domain.lifecycle import GrantState, TaskState
from broker.services.keys import Keys
from broker.services.revocation import Revocation
from broker.services.tasks import end_tasks
from broker.store import grants, models, standing, tasks
from broker.store.database import Database
from broker.store.transitions import change_of, move

_TASKS_AT_ONCE = 100
_GRANTS_AT_ONCE = 2000
_ROWS_A_PASS = 100_000  # so that no pass runs for ever beside a flood; the next one comes in a second
_ACTOR = "broker"


@dataclass(frozen=True, kw_only=True)
class Swept:
    """How many rows one pass moved."""

    tasks_expired: int = 0
    grants_expired: int = 0
    grants_revoked: int = 0
    forgotten: int = 0
    keys_rotated: int = 0


class Sweeper:
    def __init__(self, *, database: Database, revocation: Revocation, keys: Keys, clock: Clock) -> None:
        self._database = database
        self._revocation = revocation
        self._keys = keys
        self._clock = clock

    def sweep(self) -> Swept:
        """Everything that is due now, in bounded batches. Urgent revocations come first (INV-27)."""
        now = self._clock()
        return Swept(
            grants_revoked=self._revocation.follow_all(at_most=_ROWS_A_PASS),
            tasks_expired=_until_done(lambda: self._expire_tasks(now), _TASKS_AT_ONCE),
            grants_expired=_until_done(lambda: self._expire_grants(now), _GRANTS_AT_ONCE),
            forgotten=_until_done(lambda: self._forget(now), _GRANTS_AT_ONCE),
            keys_rotated=self._keys.rotate_due(now),
        )

    def _expire_tasks(self, now: datetime) -> int:
        with self._database.read() as db:
            due = tasks.due_task_ids(db, now=now, limit=_TASKS_AT_ONCE)
        if not due:
            return 0
        with self._database.begin() as db:
            reason = "its deadline passed or its heartbeat was lost"
            return end_tasks(db, due, TaskState.EXPIRED, now=now, actor=_ACTOR, reason=reason)

    def _expire_grants(self, now: datetime) -> int:
        with self._database.read() as db:
            due = grants.due_grant_ids(db, now=now, limit=_GRANTS_AT_ONCE)
        if not due:
            return 0
        with self._database.begin() as db:
            # Asked again: a renewal may have come in between.
            due = grants.claim_unended(db, grants.with_ids(due), grants.expired(now), limit=_GRANTS_AT_ONCE)
            event = change_of(now, _ACTOR, "grant.expired")
            return len(move(db, models.Grant, GrantState.EXPIRED, grants.with_ids(due), event=event))

    def _forget(self, now: datetime) -> int:
        with self._database.begin() as db:
            return standing.forget(db, now=now, limit=_GRANTS_AT_ONCE)


def _until_done(step: Callable[[], int], full: int) -> int:
    """Repeat until a batch was not full: then the rest is not due, or somebody else's."""
    total = 0
    while total < _ROWS_A_PASS:
        moved = step()
        total += moved
        if moved < full:
            break
    return total
