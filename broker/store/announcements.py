"""Which audit events were told by which channel to everybody it reaches, and which are yet to be. Claimed row by row.

The event itself is the obligation: whoever has a channel finds the events it was not told of yet. Rows are never read
by "id > last": ids commit out of order, and a reader of that kind would skip some.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, exists, select, text, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite

from broker.domain.audit import ANNOUNCED, Event
from broker.domain.identity import first_id
from broker.store import models

# What is older is no news, to a channel that was added today.
_TOLD_FOR = timedelta(days=1)
_told = models.table_of(models.Announcement)
_events = models.table_of(models.AuditEvent)
_NAMES = tuple(Event.__dataclass_fields__)
_WAITING = text("announcements.taken_at IS NULL")


def owe(db: Connection, channels: Collection[str], *, now: datetime) -> None:
    """Note each event that these channels have yet to tell; as often as one likes."""
    dialect: Any = sqlite if db.dialect.name == "sqlite" else postgresql
    rows = [
        {"event_id": event_id, "channel": channel, "attempts": 0, "next_attempt_at": now, "taken_at": None}
        for channel in channels
        for event_id in db.execute(_untold(channel, now)).scalars()
    ]
    if rows:
        # Another broker may be doing the same.
        db.execute(dialect.insert(_told).values(rows).on_conflict_do_nothing())


def any_due(db: Connection, channels: Collection[str], *, now: datetime) -> bool:
    """Whether there is one that is not noted yet, or one that is to be told now."""
    if db.execute(_due(channels, now).limit(1)).first() is not None:
        return True
    return any(db.execute(_untold(channel, now).limit(1)).first() is not None for channel in channels)


def _untold(channel: str, now: datetime) -> Select[Any]:
    known = exists().where(_told.c.event_id == _events.c.id, _told.c.channel == channel)
    recent = _events.c.id >= first_id("evt", now - _TOLD_FOR)
    return select(_events.c.id).where(_events.c.type.in_(sorted(ANNOUNCED)), recent, ~known)


def claim_due(
    db: Connection, channels: Collection[str], *, now: datetime, again_at: datetime, limit: int
) -> list[tuple[Event, str, int]]:
    """(event, channel, how often it was tried), the oldest first; nobody else tells them before `again_at`."""
    key = tuple_(_told.c.event_id, _told.c.channel)
    due = _due(channels, now).order_by(_told.c.event_id).limit(limit).with_for_update(skip_locked=True)
    claim = (
        update(_told)
        .where(key.in_(due), _WAITING, _told.c.next_attempt_at <= now)
        .values(next_attempt_at=again_at, attempts=_told.c.attempts + 1)
        .returning(_told.c.event_id, _told.c.channel, _told.c.attempts)
    )
    claimed = sorted((row.event_id, row.channel, row.attempts) for row in db.execute(claim))
    statement = select(*(_events.c[name] for name in _NAMES)).where(_events.c.id.in_([found[0] for found in claimed]))
    events = {row.id: Event(**row._mapping) for row in db.execute(statement)}
    return [(events[event_id], channel, attempts) for event_id, channel, attempts in claimed]


def _due(channels: Collection[str], now: datetime) -> Select[Any]:
    statement = select(_told.c.event_id, _told.c.channel)
    return statement.where(_WAITING, _told.c.channel.in_(list(channels)), _told.c.next_attempt_at <= now)


def failed(db: Connection, event_id: str, channel: str, *, again_at: datetime) -> None:
    db.execute(update(_told).where(*_one(event_id, channel), _WAITING).values(next_attempt_at=again_at))


def taken(db: Connection, event_id: str, channel: str, *, now: datetime) -> None:
    db.execute(update(_told).where(*_one(event_id, channel)).values(taken_at=now))


def _one(event_id: str, channel: str) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return _told.c.event_id == event_id, _told.c.channel == channel
