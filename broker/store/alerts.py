"""The outbox of alerts: which audit events somebody still has to be told of.

Claimed row by row and never read by "id > last": ids commit out of order, and a reader of that kind would skip some.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from sqlalchemy import Connection, select, update

from broker.domain.audit import ALERTING, Event
from broker.store import models
from broker.store.rows import insert_rows

_alerts = models.table_of(models.Alert)
_events = models.table_of(models.AuditEvent)
_NAMES = tuple(Event.__dataclass_fields__)
_WAITING = _alerts.c.taken_at.is_(None)


def owe_alerts(db: Connection, events: Iterable[Event]) -> None:
    """Whoever records one of these events owes that somebody is told; in the same transaction."""
    owed = [
        {"event_id": event.id, "attempts": 0, "next_attempt_at": event.at, "taken_at": None}
        for event in events
        if event.type in ALERTING
    ]
    insert_rows(db, models.Alert, owed)


def any_due(db: Connection, *, now: datetime) -> bool:
    return (
        db.execute(select(_alerts.c.event_id).where(_WAITING, _alerts.c.next_attempt_at <= now).limit(1)).first()
        is not None
    )


def claim_due(db: Connection, *, now: datetime, again_at: datetime, limit: int) -> list[tuple[Event, int]]:
    """The oldest that are due, so that nobody else tells them before `again_at`; each with how often it was tried."""
    due = select(_alerts.c.event_id).where(_WAITING, _alerts.c.next_attempt_at <= now)
    due = due.order_by(_alerts.c.event_id).limit(limit).with_for_update(skip_locked=True)
    claim = (
        update(_alerts)
        .where(_alerts.c.event_id.in_(due), _WAITING, _alerts.c.next_attempt_at <= now)
        .values(next_attempt_at=again_at, attempts=_alerts.c.attempts + 1)
        .returning(_alerts.c.event_id, _alerts.c.attempts)
    )
    claimed = {row.event_id: row.attempts for row in db.execute(claim)}
    statement = select(*(_events.c[name] for name in _NAMES)).where(_events.c.id.in_(list(claimed)))
    events = [Event(**row._mapping) for row in db.execute(statement.order_by(_events.c.id))]
    return [(event, claimed[event.id]) for event in events]


def failed(db: Connection, event_id: str, *, again_at: datetime) -> None:
    db.execute(update(_alerts).where(_alerts.c.event_id == event_id, _WAITING).values(next_attempt_at=again_at))


def taken(db: Connection, event_id: str, *, now: datetime) -> None:
    db.execute(update(_alerts).where(_alerts.c.event_id == event_id).values(taken_at=now))
