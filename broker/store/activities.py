"""Activities: written once, counted by grant and by reporter, put beside audit events in one line, dropped when old."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    Interval,
    Select,
    Table,
    and_,
    case,
    delete,
    func,
    literal,
    or_,
    select,
    type_coerce,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from broker.domain.activity import Activity, Outcome, Place
from broker.domain.audit import Event
from broker.domain.clock import LEEWAY
from broker.domain.identity import Principal, first_id
from broker.store import models
from broker.store.rows import among

_activities = models.table_of(models.Activity)
_tallies = models.table_of(models.ActivityTally)
_reporters = models.table_of(models.ActivityReporter)
_grants = models.table_of(models.Grant)
_events = models.table_of(models.AuditEvent)
_NAMES = tuple(entry.name for entry in fields(Activity))
_EVENT = tuple(entry.name for entry in fields(Event))
_OF_GRANT = (
    "id", "task_id", "agent", "issuer", "subject", "resource", "provider", "scopes", "state", "trace_id", "issued_at",
    "expires_at", "revoked_at",
)  # fmt: skip
_SELECT_GRANT = select(*(_grants.c[name] for name in _OF_GRANT)).where(_grants.c.issued_at.is_not(None))
_PREFIX = 4  # of an id; what follows sorts by when it was made, whatever it is the id of


@dataclass(frozen=True, kw_only=True)
class GivenGrant:
    """What of a grant that got a credential is asked about what was done with it."""

    id: str
    task_id: str
    agent: str
    issuer: str
    subject: str
    resource: str
    provider: str
    scopes: Sequence[str]
    state: str
    trace_id: str | None
    issued_at: datetime
    expires_at: datetime
    revoked_at: datetime | None

    @property
    def ended_at(self) -> datetime:
        return self.revoked_at or self.expires_at


def given_grants(db: Connection, ids: Collection[str]) -> dict[str, GivenGrant]:
    """Those of them that got a credential."""
    if not ids:
        return {}
    rows = db.execute(_SELECT_GRANT.where(among(db, _grants.c.id, ids)))
    return {row.id: GivenGrant(**row._mapping) for row in rows}


def given_in_traces(db: Connection, trace_ids: Collection[str], *, holder: Principal, limit: int) -> list[GivenGrant]:
    """Those that somebody got a credential for in one of these traces; the newest of them."""
    if not trace_ids:
        return []
    statement = _SELECT_GRANT.where(among(db, _grants.c.trace_id, trace_ids), _held_by(holder))
    rows = db.execute(statement.order_by(_grants.c.id.desc()).limit(limit))
    return [GivenGrant(**row._mapping) for row in rows]


def given_for_tasks(
    db: Connection, task_ids: Collection[str], *, holder: Principal | None, limit: int
) -> list[GivenGrant]:
    """Those under these tasks that got a credential, oldest first; of one holder alone, where one is named."""
    statement = _SELECT_GRANT.where(among(db, _grants.c.task_id, task_ids))
    if holder is not None:
        statement = statement.where(_held_by(holder))
    rows = db.execute(statement.order_by(_grants.c.id).limit(limit))
    return [GivenGrant(**row._mapping) for row in rows]


def _held_by(holder: Principal) -> ColumnElement[bool]:
    # INV-17: the very workload; another may have its name by now.
    return and_(_grants.c.agent == holder.name, _grants.c.issuer == holder.issuer, _grants.c.subject == holder.subject)


def told_this_minute(db: Connection, reporter: str, *, now: datetime, more: int) -> int:
    """How much a reporter told of in this minute, with so much more; nobody else counts for it until we are done."""
    minute = now.replace(second=0, microsecond=0)
    insert = _insert(db)(_reporters).values(reporter=reporter, minute_at=minute, told=more)
    same = _reporters.c.minute_at == insert.excluded.minute_at
    counted = insert.on_conflict_do_update(
        index_elements=["reporter"],
        set_={"minute_at": insert.excluded.minute_at, "told": case((same, _reporters.c.told), else_=0) + more},
    ).returning(_reporters.c.told)
    return int(db.execute(counted).scalar_one())


def known_reports(db: Connection, report_sha256: Collection[str]) -> dict[str, Activity]:
    """Those that were told before."""
    statement = select(*(_activities.c[name] for name in _NAMES))
    rows = db.execute(statement.where(among(db, _activities.c.report_sha256, report_sha256)))
    return {row.report_sha256: Activity(**row._mapping) for row in rows}


def hold_tallies(db: Connection, grant_ids: Iterable[str], *, now: datetime) -> dict[str, int]:
    """How many activities of each grant are kept; nobody else adds to them until we are done (INV-34)."""
    # In one order everywhere, so that two transactions cannot wait for each other.
    ids = sorted(set(grant_ids))
    rows = [{"grant_id": grant_id, "kept": 0, "dropped": 0, "last_at": now} for grant_id in ids]
    db.execute(_insert(db)(_tallies).values(rows).on_conflict_do_nothing())
    held = select(_tallies.c.grant_id, _tallies.c.kept).where(among(db, _tallies.c.grant_id, ids))
    found = db.execute(held.order_by(_tallies.c.grant_id).with_for_update())
    return {row.grant_id: row.kept for row in found}


def insert_activities(db: Connection, made: Sequence[Activity], dropped: Mapping[str, int], *, now: datetime) -> None:
    """Write them, and what was one too many by grant; the caller holds the tallies."""
    rows = [vars(activity) for activity in made]
    if rows:
        db.execute(_insert(db)(_activities).on_conflict_do_nothing(), rows)
    kept: dict[str, int] = dict.fromkeys(dropped, 0)
    for activity in made:
        kept[activity.grant_id] = kept.get(activity.grant_id, 0) + 1
    for grant_id, count in sorted(kept.items()):
        values = {
            "kept": _tallies.c.kept + count,
            "dropped": _tallies.c.dropped + dropped.get(grant_id, 0),
            "last_at": now,
        }
        db.execute(update(_tallies).where(_tallies.c.grant_id == grant_id).values(**values))


def dropped_of(db: Connection, grant_ids: Collection[str]) -> int:
    """How many activities of these grants were told of and are not kept."""
    if not grant_ids:
        return 0
    statement = select(func.coalesce(func.sum(_tallies.c.dropped), 0)).where(among(db, _tallies.c.grant_id, grant_ids))
    return int(db.execute(statement).scalar_one())


def forget_activities(db: Connection, *, now: datetime, keep: timedelta, limit: int) -> int:
    """Drop, of each kind, at most so many that were told of too long ago; answers how many activities."""
    # An id begins with when the broker was told, so the oldest are the first.
    due = select(_activities.c.id).where(_activities.c.id < first_id("act", now - keep)).order_by(_activities.c.id)
    gone = db.execute(delete(_activities).where(_activities.c.id.in_(_some(due, limit)))).rowcount
    # Nothing is left of what it counts: whatever it counted last is gone too.
    over = select(_tallies.c.grant_id).where(_tallies.c.last_at <= now - keep - timedelta(hours=1))
    db.execute(delete(_tallies).where(_tallies.c.grant_id.in_(_some(over, limit))))
    return gone


def _some(statement: Any, limit: int) -> Any:
    # Two sweepers share the work, and neither waits for the other.
    return statement.limit(limit).with_for_update(skip_locked=True)


def _insert(db: Connection) -> Any:
    return (postgresql if db.dialect.name == "postgresql" else sqlite).insert


# --- one line of time -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class InLine:
    """A part of a line of time, oldest first. With a `holder`, of the tasks themselves and of what it holds alone."""

    task_ids: Collection[str]
    holder: Principal | None = None
    grant_id: str | None = None
    after: Place | None = None
    limit: int


def events_in_line(db: Connection, part: InLine) -> list[Event]:
    """What the broker did."""
    statement = _of_part(db, part, select(*(_events.c[name] for name in _EVENT)), _events, "evt")
    if part.holder is not None:
        # INV-28: what others hold in the same task, and what of it was refused to them, it does not see.
        of_task = and_(_events.c.grant_id.is_(None), _events.c.type.like("task.%"))
        statement = statement.where(or_(_events.c.grant_id.in_(_held(db, part, part.holder)), of_task))
    return [Event(**row._mapping) for row in db.execute(statement)]


def activities_in_line(db: Connection, part: InLine) -> list[Activity]:
    """What was told."""
    statement = _of_part(db, part, select(*(_activities.c[name] for name in _NAMES)), _activities, "act")
    if part.holder is not None:
        statement = statement.where(_activities.c.grant_id.in_(_held(db, part, part.holder)))
    return [Activity(**row._mapping) for row in db.execute(statement)]


def _of_part(db: Connection, part: InLine, statement: Select[Any], table: Table, prefix: str) -> Select[Any]:
    statement = statement.where(among(db, table.c.task_id, part.task_ids))
    if part.grant_id is not None:
        statement = statement.where(table.c.grant_id == part.grant_id)
    if part.after is not None:
        later = and_(table.c.at == part.after.at, table.c.id > f"{prefix}_{part.after.made}")
        statement = statement.where(or_(table.c.at > part.after.at, later))
    return statement.order_by(table.c.at, table.c.id).limit(part.limit)


def _held(db: Connection, part: InLine, holder: Principal) -> Select[Any]:
    return select(_grants.c.id).where(among(db, _grants.c.task_id, part.task_ids), _held_by(holder))


def place_in_line(line: Event | Activity) -> Place:
    return Place(at=line.at, made=line.id[_PREFIX:])


# --- what was used --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Used:
    """How often a grant was used with this scope on this resource, or was not let, as one role tells it."""

    grant_id: str
    scope: str | None
    resource: str
    role: str
    denied: bool
    count: int
    before_issue: int
    after_end: int
    first_at: datetime
    last_at: datetime


def used_of_grants(db: Connection, task_ids: Collection[str], grant_ids: Collection[str], *, limit: int) -> list[Used]:
    """What was told of these grants, counted by what was used; `broker.domain.activity.beyond` is the same rule."""
    if not grant_ids:
        return []
    denied = (_activities.c.outcome == str(Outcome.DENIED)).label("denied")
    by = (_activities.c.grant_id, _activities.c.scope, _activities.c.resource, _activities.c.role, denied)
    statement = (
        select(
            *by,
            func.count().label("count"),
            _sum(_before_issue(db)).label("before_issue"),
            _sum(_activities.c.at > func.coalesce(_grants.c.revoked_at, _grants.c.expires_at)).label("after_end"),
            func.min(_activities.c.at).label("first_at"),
            func.max(_activities.c.at).label("last_at"),
        )
        .join_from(_activities, _grants, _grants.c.id == _activities.c.grant_id)
        .where(among(db, _activities.c.task_id, task_ids), among(db, _activities.c.grant_id, grant_ids))
        .group_by(*by)
        .order_by(*by)
        .limit(limit)
    )
    return [Used(**row._mapping) for row in db.execute(statement)]


def _sum(condition: ColumnElement[bool]) -> ColumnElement[int]:
    return func.sum(case((condition, 1), else_=0))


def _before_issue(db: Connection) -> ColumnElement[bool]:
    at, issued_at = _activities.c.at, _grants.c.issued_at
    if db.dialect.name == "sqlite":
        return type_coerce(at, Integer) < type_coerce(issued_at, Integer) - int(LEEWAY.total_seconds())
    return type_coerce(at, postgresql.TIMESTAMP(timezone=True)) < (
        type_coerce(issued_at, postgresql.TIMESTAMP(timezone=True)) - literal(LEEWAY, Interval())
    )
