"""Signals of risk: written once, and over by themselves."""

from __future__ import annotations

from dataclasses import fields
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, select

from broker.domain.risk import Signal
from broker.store import models
from broker.store.rows import insert_rows

_signals = models.table_of(models.Signal)
_NAMES = tuple(entry.name for entry in fields(Signal))
_SELECT = select(*(_signals.c[name] for name in _NAMES))


def insert_signal(db: Connection, signal: Signal) -> None:
    insert_rows(db, models.Signal, [vars(signal)])


def find_signal(db: Connection, signal_id: str) -> Signal | None:
    row = db.execute(_SELECT.where(_signals.c.id == signal_id)).one_or_none()
    return None if row is None else _signal_of(row)


def standing_signals(db: Connection, *, now: datetime) -> list[Signal]:
    return [_signal_of(row) for row in db.execute(_SELECT.where(_signals.c.expires_at > now))]


def page_of_signals(db: Connection, *, now: datetime | None, before: str | None, limit: int) -> list[Signal]:
    """Newest first, below the id `before`; with `now` only those that are not over."""
    statement = _SELECT.order_by(_signals.c.id.desc()).limit(limit)
    if now is not None:
        statement = statement.where(_signals.c.expires_at > now)
    if before is not None:
        statement = statement.where(_signals.c.id < before)
    return [_signal_of(row) for row in db.execute(statement)]


def _signal_of(row: Any) -> Signal:
    return Signal(**{name: getattr(row, name) for name in _NAMES})
