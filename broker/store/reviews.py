"""Reviews: what is owed for each break-glass that was collected. Reading, inserting, counting, and which are late."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, func, select, text

from broker.domain.lifecycle import GrantState, ReviewState
from broker.domain.review import Review
from broker.store import models
from broker.store.rows import insert_rows

_reviews = models.table_of(models.Review)
_grants = models.table_of(models.Grant)
_approvals = models.table_of(models.Approval)
_NAMES = tuple(entry.name for entry in fields(Review))
_SELECT = select(*(_reviews.c[name] for name in _NAMES))
# As text: SQLite takes a partial index only where the query spells its condition the way the index does.
_OPEN: Any = text("reviews.state <> 'completed'")


def insert_review(db: Connection, review: Review) -> None:
    insert_rows(db, models.Review, [vars(review) | {"state": str(review.state)}])


def find_review(db: Connection, review_id: str, *, lock: bool = False) -> Review | None:
    statement = _SELECT.where(_reviews.c.id == review_id)
    if lock:
        statement = statement.with_for_update()
    row = db.execute(statement).one_or_none()
    return None if row is None else _review_of(row)


def page_of_reviews(
    db: Connection, *, where: Iterable[ColumnElement[bool]], before: str | None, limit: int
) -> Sequence[Review]:
    """Newest first, below the id `before`."""
    statement: Select[Any] = (
        _SELECT.join(_grants, _grants.c.id == _reviews.c.grant_id)
        .join(_approvals, _approvals.c.grant_id == _reviews.c.grant_id)
        .where(*where)
        .order_by(_reviews.c.id.desc())
        .limit(limit)
    )
    if before is not None:
        statement = statement.where(_reviews.c.id < before)
    return [_review_of(row) for row in db.execute(statement)]


def _review_of(row: Row[Any]) -> Review:
    values = {name: getattr(row, name) for name in _NAMES}
    return Review(**values | {"state": ReviewState(row.state)})


def any_late(db: Connection, *, now: datetime) -> bool:
    """Whether one is past its time that does not say so yet."""
    return db.execute(select(_reviews.c.id).where(*late(now)).limit(1)).first() is not None


def late(now: datetime) -> tuple[ColumnElement[bool], ...]:
    return _reviews.c.due_at <= now, _reviews.c.state == str(ReviewState.OWED), _OPEN


def counts(db: Connection, *, now: datetime) -> tuple[int, int]:
    """How many are owed, and how many of those are past their time."""
    owed = select(func.count(), func.count().filter(_reviews.c.due_at <= now)).select_from(_reviews).where(_OPEN)
    row = db.execute(owed).one()
    return int(row[0]), int(row[1])


def live(db: Connection, *, now: datetime) -> int:
    """How many break-glass grants are out."""
    statement = select(func.count()).select_from(_grants)
    broken = text("grants.break_glass IS NOT NULL")
    given = (_grants.c.state == str(GrantState.ACTIVE), _grants.c.expires_at > now)
    return int(db.execute(statement.where(broken, *given)).scalar_one())


def with_id(review_id: str) -> ColumnElement[bool]:
    return _reviews.c.id == review_id


def in_state(state: str, *, now: datetime) -> list[ColumnElement[bool]]:
    """As it is shown: what is past its time is overdue, whether or not somebody came by to say so; `open` is both."""
    if state == ReviewState.COMPLETED:
        return [_reviews.c.state == state]
    if state == "open":
        return [_OPEN]
    past = _reviews.c.due_at <= now if state == ReviewState.OVERDUE else _reviews.c.due_at > now
    return [past, _OPEN]


def of_agent(agent: str) -> ColumnElement[bool]:
    return _grants.c.agent == agent
