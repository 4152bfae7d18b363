"""One pass over what time alone decides, and over rows that owe something. Tidiness, never safety.

"Live" asks the clock itself, so a late sweep endangers nothing. Each batch is its own short transaction and moves rows
by compare-and-set: several sweepers at once do the work once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from broker.domain.clock import Clock
from broker.domain.lease import Urgency
from broker.domain.lifecycle import GrantState, TaskState
from broker.services.endings import ACTOR, end_grants
from broker.services.keys import Keys
from broker.services.revocation import Revocation
from broker.services.tasks import end_tasks
from broker.store import feed, grants, standing, tasks
from broker.store.activities import forget_activities
from broker.store.database import Database
from broker.store.transitions import change_of

_TASKS_AT_ONCE = 100
_GRANTS_AT_ONCE = 2000
_ROWS_A_PASS = 100_000  # so that no pass runs for ever beside a flood; the next one comes in a second


@dataclass(frozen=True, kw_only=True)
class Swept:
    """How many rows one pass moved."""

    tasks_expired: int = 0
    grants_expired: int = 0
    grants_revoked: int = 0
    forgotten: int = 0
    activities_forgotten: int = 0
    keys_rotated: int = 0


class Sweeper:
    def __init__(
        self,
        *,
        database: Database,
        revocation: Revocation,
        keys: Keys,
        feed_kept_for: timedelta,
        keep_activities: timedelta,
        clock: Clock,
    ) -> None:
        self._database = database
        self._revocation = revocation
        self._keys = keys
        self._feed_kept_for = feed_kept_for
        self._keep_activities = keep_activities
        self._clock = clock

    def sweep(self) -> Swept:
        """Everything that is due now, in bounded batches. What failed is tried again by the next pass.

        Revocations come first and again between the batches of the rest, so that no flood of expiries is before them
        (INV-27); and no step that fails keeps the others from their turn.
        """
        now = self._clock()
        done: Counter[str] = Counter()

        def urgent() -> int:
            moved = self._revocation.follow_all(at_most=_ROWS_A_PASS)
            done["grants_revoked"] += moved
            return moved

        steps: tuple[tuple[str, Callable[[], int], int], ...] = (
            ("tasks_expired", lambda: self._expire_tasks(now), _TASKS_AT_ONCE),
            ("grants_expired", lambda: self._expire_grants(now), _GRANTS_AT_ONCE),
            ("forgotten", lambda: self._forget(now), _GRANTS_AT_ONCE),
            ("activities_forgotten", lambda: self._forget_activities(now), _GRANTS_AT_ONCE),
            ("keys_rotated", lambda: self._keys.rotate_due(now), _ROWS_A_PASS),
        )
        failures: list[Exception] = []
        _attempt(urgent, failures)
        for name, step, full in steps:
            while done[name] < _ROWS_A_PASS:
                moved = _attempt(step, failures)
                done[name] += moved
                if moved < full:
                    # Not a full batch: then the rest is not due, or somebody else's.
                    break
                _attempt(urgent, failures)
        if failures:
            raise failures[0]
        return Swept(**done)

    def _expire_tasks(self, now: datetime) -> int:
        with self._database.read() as db:
            due = tasks.due_task_ids(db, now=now, limit=_TASKS_AT_ONCE)
            below = grants.unended_of_tasks(db, due) if due else {}
        reason = "its deadline passed or its heartbeat was lost"
        ended = 0
        for together in _shares(due, below):
            with self._database.begin() as db:
                ended += end_tasks(db, together, TaskState.EXPIRED, now=self._clock(), actor=ACTOR, reason=reason)
        return ended

    def _expire_grants(self, now: datetime) -> int:
        with self._database.read() as db:
            if not grants.any_due(db, now=now):
                return 0
        with self._database.begin() as db:
            due = grants.claimed(grants.expired(now), limit=_GRANTS_AT_ONCE)
            event = change_of(now, ACTOR, "grant.expired")
            return len(end_grants(db, GrantState.EXPIRED, due, now=now, urgency=Urgency.EXPIRED, event=event))

    def _forget(self, now: datetime) -> int:
        with self._database.begin() as db:
            gone = standing.forget(db, now=now, limit=_GRANTS_AT_ONCE)
            return gone + feed.forget(db, numbered_before=now - self._feed_kept_for, limit=_GRANTS_AT_ONCE)

    def _forget_activities(self, now: datetime) -> int:
        with self._database.begin() as db:
            return forget_activities(db, now=now, keep=self._keep_activities, limit=_GRANTS_AT_ONCE)


def _shares(due: Sequence[str], below: Mapping[str, int]) -> Iterator[list[str]]:
    """The tasks in their order, each share with few enough grants below it for one transaction, or of one task alone.

    A hundred large ones at once would take longer than a statement may, and then never be ended.
    """
    share: list[str] = []
    grants_below = 0
    for task_id in due:
        if share and grants_below + below.get(task_id, 0) > _GRANTS_AT_ONCE:
            yield share
            share, grants_below = [], 0
        share.append(task_id)
        grants_below += below.get(task_id, 0)
    if share:
        yield share


def _attempt(step: Callable[[], int], failures: list[Exception]) -> int:
    try:
        return step()
    except Exception as problem:
        # Raised when every step had its turn.
        failures.append(problem)
        return 0
