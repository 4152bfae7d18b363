"""The rows of Shared Signals: streams of receivers, subjects they removed, and SETs they have not taken yet.

Whoever changes a stream, or adds to what waits on it, holds its row. Who pushes holds it longer than a transaction
lasts, by a fence: whoever was superseded changes nothing (INV-07).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, delete, exists, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from broker.domain.lifecycle import StreamState
from broker.domain.refusal import Refusal
from broker.domain.shared_signals import Claims, Delivery, Stream, Subject, key_of
from broker.store import models
from broker.store.grants import covered_by
from broker.store.rows import among

_streams = models.table_of(models.EventStream)
_removed = models.table_of(models.RemovedSubject)
_deliveries = models.table_of(models.EventDelivery)
_grants = models.table_of(models.Grant)
_SELECT = select(*(_streams.c[entry.name] for entry in fields(Stream)))
_ENABLED = _streams.c.state == str(StreamState.ENABLED)


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A SET that was not taken yet."""

    id: int
    jti: str
    claims: Claims


def with_id(stream_id: str) -> ColumnElement[bool]:
    return _streams.c.id == stream_id


def of_receiver(receiver: str) -> ColumnElement[bool]:
    return _streams.c.receiver == receiver


def insert_stream(db: Connection, stream: Stream) -> bool:
    """False if the receiver has one already; somebody else's that is not committed yet is waited for."""
    dialect = sqlite if db.dialect.name == "sqlite" else postgresql
    row = {entry.name: getattr(stream, entry.name) for entry in fields(Stream)}
    row |= {
        "state": str(stream.state),
        "method": str(stream.method),
        "events_requested": None if stream.events_requested is None else list(stream.events_requested),
        "fence": 0,
        "next_attempt_at": stream.created_at,
    }
    made = dialect.insert(_streams).values(row).on_conflict_do_nothing(index_elements=[_streams.c.receiver])
    return db.execute(made.returning(_streams.c.id)).first() is not None


def find_stream(db: Connection, *where: ColumnElement[bool], lock: bool = False) -> Stream | None:
    statement = _SELECT.where(*where)
    row = db.execute(statement.with_for_update() if lock else statement).one_or_none()
    return None if row is None else stream_of(row)


def ids(db: Connection) -> set[str]:
    return set(db.execute(select(_streams.c.id)).scalars())


def page_of_streams(db: Connection, *, before: str | None, limit: int) -> list[Stream]:
    """Newest first, below the id `before`."""
    statement = _SELECT.order_by(_streams.c.id.desc()).limit(limit)
    if before is not None:
        statement = statement.where(_streams.c.id < before)
    return [stream_of(row) for row in db.execute(statement)]


def stream_of(row: Row[Any]) -> Stream:
    found = {entry.name: getattr(row, entry.name) for entry in fields(Stream)}
    requested = found["events_requested"]
    found |= {
        "state": StreamState(found["state"]),
        "method": Delivery(found["method"]),
        "events_requested": None if requested is None else tuple(requested),
    }
    return Stream(**found)


def change(db: Connection, stream_id: str, **values: Any) -> None:
    """Set these columns, of which the state is none."""
    db.execute(update(_streams).where(_streams.c.id == stream_id).values(**values))


def delete_stream(db: Connection, stream_id: str) -> None:
    """With all that waits on it."""
    db.execute(delete(_streams).where(_streams.c.id == stream_id))


# --- subjects --------------------------------------------------------------------------------------------------------


def remove_subject(db: Connection, stream_id: str, subject: Subject) -> bool:
    """False if it was removed before."""
    dialect = sqlite if db.dialect.name == "sqlite" else postgresql
    row = {"stream_id": stream_id, "sha256": key_of(subject), "subject": dict(subject)}
    statement = dialect.insert(_removed).values(row).on_conflict_do_nothing().returning(_removed.c.sha256)
    return db.execute(statement).first() is not None


def add_subject(db: Connection, stream_id: str, subject: Subject) -> bool:
    """False if it was not removed before: a stream has every subject to begin with."""
    where = (_removed.c.stream_id == stream_id, _removed.c.sha256 == key_of(subject))
    return db.execute(delete(_removed).where(*where).returning(_removed.c.sha256)).first() is not None


def count_removed(db: Connection, stream_id: str) -> int:
    statement = select(func.count()).select_from(_removed).where(_removed.c.stream_id == stream_id)
    return int(db.execute(statement).scalar_one())


def are_removed(db: Connection, stream_id: str, subjects: Collection[Subject]) -> set[str]:
    """The keys of those that were removed."""
    keys = {key_of(subject) for subject in subjects}
    where = (_removed.c.stream_id == stream_id, among(db, _removed.c.sha256, keys))
    return set(db.execute(select(_removed.c.sha256).where(*where)).scalars())


# --- what is told ----------------------------------------------------------------------------------------------------


def behind(db: Connection, feed_id: str, seq: int) -> list[str]:
    """The enabled streams to which not all of the feed up to there was told."""
    is_behind = or_(_streams.c.feed_id != feed_id, _streams.c.seq < seq)
    return list(db.execute(select(_streams.c.id).where(_ENABLED, is_behind).order_by(_streams.c.id)).scalars())


def idle_polls(db: Connection, *, active_before: datetime) -> list[str]:
    """The enabled streams that nobody polled for so long."""
    idle = (_ENABLED, _streams.c.method == str(Delivery.POLL), _streams.c.active_at <= active_before)
    return list(db.execute(select(_streams.c.id).where(*idle)).scalars())


def concerns(db: Connection, axis: str, value: str, resources: Collection[str], *, unexpired_at: datetime) -> bool:
    """Whether a token for one of these resources, that lives at this moment, is one of those that ended (INV-26)."""
    if axis == "resource":
        return value in resources
    on_axis = (
        _grants.c.id == value if axis == "grant" else covered_by(Refusal(id="", axis=axis, value=value, reason=""))
    )
    where = (on_axis, among(db, _grants.c.resource, resources), _grants.c.expires_at >= unexpired_at)
    return bool(resources) and bool(db.execute(select(exists().where(*where))).scalar_one())


def insert_deliveries(db: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    if rows:
        db.execute(insert(_deliveries), list(rows))


def count_waiting(db: Connection, stream_id: str) -> int:
    statement = select(func.count()).select_from(_deliveries).where(_deliveries.c.stream_id == stream_id)
    return int(db.execute(statement).scalar_one())


def waiting(db: Connection, stream: Stream, *, limit: int) -> list[Waiting]:
    """The oldest that may be sent now; on a stream that is not enabled, only what says so."""
    statement = select(_deliveries.c.id, _deliveries.c.jti, _deliveries.c.claims)
    statement = statement.where(_deliveries.c.stream_id == stream.id).order_by(_deliveries.c.id).limit(limit)
    if stream.state is not StreamState.ENABLED:
        statement = statement.where(_deliveries.c.always)
    return [Waiting(id=row.id, jti=row.jti, claims=row.claims) for row in db.execute(statement)]


def taken(db: Connection, stream_id: str, jtis: Collection[str]) -> list[str]:
    """Forget these; answers which of them waited on this stream."""
    if not jtis:
        return []
    where = (_deliveries.c.stream_id == stream_id, among(db, _deliveries.c.jti, jtis))
    return list(db.execute(delete(_deliveries).where(*where).returning(_deliveries.c.jti)).scalars())


def drop_waiting(db: Connection, stream_id: str) -> None:
    db.execute(delete(_deliveries).where(_deliveries.c.stream_id == stream_id))


# --- pushing ---------------------------------------------------------------------------------------------------------


def claim_due(db: Connection, *, now: datetime, until: datetime, limit: int) -> list[tuple[str, int]]:
    """Streams on which something is to be pushed, so that nobody else does before `until`; each with its fence."""
    mine = _deliveries.c.stream_id == _streams.c.id
    something = or_(exists().where(mine, _deliveries.c.always), _ENABLED & exists().where(mine))
    due = (_streams.c.method == str(Delivery.PUSH), _streams.c.next_attempt_at <= now)
    chosen = select(_streams.c.id).where(*due, something).order_by(_streams.c.next_attempt_at).limit(limit)
    claim = (
        update(_streams)
        .where(_streams.c.id.in_(chosen.with_for_update(skip_locked=True)), *due)
        .values(next_attempt_at=until, fence=_streams.c.fence + 1)
        .returning(_streams.c.id, _streams.c.fence)
    )
    return [(row.id, row.fence) for row in db.execute(claim)]


def any_due(db: Connection, *, now: datetime) -> bool:
    due = (_streams.c.method == str(Delivery.PUSH), _streams.c.next_attempt_at <= now)
    mine = exists().where(_deliveries.c.stream_id == _streams.c.id)
    return db.execute(select(_streams.c.id).where(*due, mine).limit(1)).first() is not None


def held(db: Connection, stream_id: str, fence: int) -> Stream | None:
    """The stream, if the claim still is this one's."""
    return find_stream(db, _streams.c.id == stream_id, _streams.c.fence == fence)


def pushed(db: Connection, stream_id: str, fence: int, **values: Any) -> bool:
    """Give the claim back with what came of it; False if it is somebody else's by now."""
    where = (_streams.c.id == stream_id, _streams.c.fence == fence)
    done = update(_streams).where(*where).values(**values).returning(_streams.c.id)
    return db.execute(done).first() is not None


def backlog(db: Connection) -> dict[str, int]:
    """How many SETs wait, by receiver; 0 for those on whose stream none does."""
    counted = func.count(_deliveries.c.id)
    statement = select(_streams.c.receiver, counted).outerjoin(_deliveries).group_by(_streams.c.receiver)
    return {receiver: count for receiver, count in db.execute(statement)}  # noqa: C416 - rows are not quite pairs
