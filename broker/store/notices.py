"""The outbox of notices: which approvals somebody still has to be told of, by which channel. Claimed row by row."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, select, text, tuple_, update

from broker.domain.approval import Case, Route
from broker.store import models
from broker.store.rows import insert_rows

_notices = models.table_of(models.Notice)
_WAITING = text("notices.taken_at IS NULL")


def owe_notices(db: Connection, cases: Iterable[Case], routes: Collection[Route]) -> None:
    """Whoever opens an approval owes that those who are asked are told; in the same transaction."""
    rows = [
        {
            "approval_id": case.approval.id,
            "channel": route.channel,
            "attempts": 0,
            "next_attempt_at": case.approval.created_at,
            "taken_at": None,
        }
        for case in cases
        for route in routes
        if route.leads_to(case)
    ]
    insert_rows(db, models.Notice, rows)


def any_due(db: Connection, channels: Collection[str], *, now: datetime) -> bool:
    return db.execute(_due(channels, now).limit(1)).first() is not None


def claim_due(
    db: Connection, channels: Collection[str], *, now: datetime, again_at: datetime, limit: int
) -> list[tuple[str, str, int]]:
    """(approval, channel, how often it was tried) of the oldest that are due; nobody else sends them before `again_at`.

    Only of these channels: another broker may know others.
    """
    key = tuple_(_notices.c.approval_id, _notices.c.channel)
    due = _due(channels, now).order_by(_notices.c.approval_id).limit(limit).with_for_update(skip_locked=True)
    claim = (
        update(_notices)
        .where(key.in_(due), _WAITING, _notices.c.next_attempt_at <= now)
        .values(next_attempt_at=again_at, attempts=_notices.c.attempts + 1)
        .returning(_notices.c.approval_id, _notices.c.channel, _notices.c.attempts)
    )
    return sorted((row.approval_id, row.channel, row.attempts) for row in db.execute(claim))


def _due(channels: Collection[str], now: datetime) -> Select[Any]:
    statement = select(_notices.c.approval_id, _notices.c.channel)
    return statement.where(_WAITING, _notices.c.channel.in_(list(channels)), _notices.c.next_attempt_at <= now)


def failed(db: Connection, approval_id: str, channel: str, *, again_at: datetime) -> None:
    db.execute(update(_notices).where(*_one(approval_id, channel), _WAITING).values(next_attempt_at=again_at))


def taken(db: Connection, approval_id: str, channel: str, *, now: datetime) -> None:
    db.execute(update(_notices).where(*_one(approval_id, channel)).values(taken_at=now))


def _one(approval_id: str, channel: str) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return _notices.c.approval_id == approval_id, _notices.c.channel == channel
