"""Grants: reading, counting, inserting, renewing, and finding those a refusal covers."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from operator import attrgetter
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    Row,
    Select,
    String,
    bindparam,
    case,
    exists,
    func,
    literal,
    literal_column,
    or_,
    select,
    text,
    true,
    union_all,
    update,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from broker.domain.clock import epoch
from broker.domain.grant import Grant, joined
from broker.domain.lifecycle import GrantState, TaskState, sources
from broker.domain.receipt import RECEIPT_FACTS
from broker.domain.refusal import Refusal
from broker.store import models
from broker.store.rows import among, insert_rows

_grants = models.table_of(models.Grant)
_tasks = models.table_of(models.Task)
_leases = models.table_of(models.Lease)
_NAMES = tuple(entry.name for entry in fields(Grant))
_values_of = attrgetter(*_NAMES)
_SELECT = select(*(_grants.c[name] for name in _NAMES))
_OWES = _grants.c.provider != "jwt"
LISTS_OF_NAMES = (
    "kids",
    "policies",
    "chain",
    "tasks_above",
    "orchestrators_above",
    "hand_to",
)  # each in one column of text
_RECEIPT_FACTS = select(*(_grants.c[name] for name in RECEIPT_FACTS))

UNENDED = [str(state) for state in (GrantState.PENDING, GrantState.APPROVED, GrantState.ACTIVE)]
assert set(UNENDED) == set(map(str, sources(GrantState.REVOKED)))  # noqa: S101 - and in the order of `grants_due_idx`


def insert_grants(db: Connection, grants: Sequence[Grant]) -> None:
    insert_rows(db, models.Grant, [_row_of(grant) for grant in grants])


def _row_of(grant: Grant) -> dict[str, Any]:
    row = dict(zip(_NAMES, _values_of(grant), strict=True))
    row["state"] = str(grant.state)
    row["scopes"] = list(grant.scopes)
    row |= {name: padded(getattr(grant, name)) for name in LISTS_OF_NAMES}
    return row


def padded(names: Sequence[str]) -> str:
    # Blanks on both sides, so that looking for " crm-read " cannot find "crm-read-all".
    return f" {' '.join(names)} " if names else ""


class _PlaceOf(FunctionElement[int]):
    """Where one text first occurs in another, from 1; 0 where it does not. `LIKE` has no case on SQLite, names do."""

    name = "place_of"
    type = Integer()
    inherit_cache = True


@compiles(_PlaceOf)
def _instr(element: _PlaceOf, compiler: Any, **options: Any) -> str:
    function = "strpos" if compiler.dialect.name == "postgresql" else "instr"
    return f"{function}({compiler.process(element.clauses, **options)})"


def _names(column: ColumnElement[Any], value: str) -> ColumnElement[bool]:
    return _PlaceOf(column, literal(f" {value} ", String())) > 0


def grant_of(row: Any) -> Grant:
    """A row that has every column of the table, or more."""
    values = dict(zip(_NAMES, _values_of(row), strict=True))
    values["state"] = GrantState(row.state)
    values["scopes"] = tuple(row.scopes)
    values |= {name: tuple(values[name].split()) for name in LISTS_OF_NAMES}
    return Grant(**values)


def find_grant(db: Connection, grant_id: str, *, lock: bool = False) -> Grant | None:
    statement = _SELECT.where(_grants.c.id == grant_id)
    if lock:
        statement = statement.with_for_update()
    row = db.execute(statement).one_or_none()
    return None if row is None else grant_of(row)


def hold_parents(db: Connection, ids: Collection[str]) -> dict[str, Grant]:
    """Grants that are handed down, kept from ending until this transaction does (INV-11)."""
    if not ids:
        return {}
    # Older ones first, as whoever ends a grant and then what is below it takes them.
    statement = _SELECT.where(_grants.c.id.in_(sorted(ids))).order_by(_grants.c.id).with_for_update(read=True)
    return {row.id: grant_of(row) for row in db.execute(statement)}


def children_of(db: Connection, grant_ids: Collection[str]) -> ColumnElement[bool]:
    return among(db, _grants.c.parent_grant_id, grant_ids)


def descendants(db: Connection, grant_id: str) -> list[Grant]:
    """Everything that was ever handed down from a grant, those nearer to it first; not what was denied."""
    given = _grants.c.state != str(GrantState.DENIED)
    found: list[Grant] = []
    level = [grant_id]
    while level:
        rows = db.execute(_SELECT.where(children_of(db, level), given).order_by(_grants.c.id)).fetchall()
        found += map(grant_of, rows)
        level = [row.id for row in rows]
    return found


def hand_down(db: Connection, grant: Grant) -> None:
    """Have what is below a renewed grant die with every key and policy that the grant now dies with (INV-11)."""
    below = [grant.id]
    while below:
        rows = db.execute(_SELECT.where(children_of(db, below), unended()).order_by(_grants.c.id).with_for_update())
        children = [grant_of(row) for row in rows]
        for child in children:
            more = {
                "kids": padded(joined(child.kids, *grant.kids)),
                "policies": padded(joined(child.policies, *grant.policies)),
            }
            db.execute(update(_grants).where(with_id(child.id)).values(**more))
        below = [child.id for child in children]


def grants_with_ids(db: Connection, ids: Collection[str]) -> list[Grant]:
    return [grant_of(row) for row in db.execute(_SELECT.where(_grants.c.id.in_(list(ids))))]


def break_glasses_among(db: Connection, ids: Collection[str]) -> set[str]:
    """Those of these grants that were asked for as a break-glass."""
    if not ids:
        return set()
    return set(
        db.execute(
            select(_grants.c.id).where(_grants.c.id.in_(list(ids)), _grants.c.break_glass.is_not(None))
        ).scalars()
    )


def _with_task(columns: Iterable[ColumnElement[Any]]) -> Select[Any]:
    ends_at = (_tasks.c.deadline_at, _tasks.c.heartbeat_due_at, _tasks.c.upheld_until)
    return select(*columns, _tasks.c.state.label("task_state"), *ends_at).join(_tasks, _tasks.c.id == _grants.c.task_id)


def _ends_at(row: Any) -> datetime:
    moments: tuple[datetime | None, ...] = (row.deadline_at, row.heartbeat_due_at, row.upheld_until)
    return min(at for at in moments if at is not None)


def find_with_tasks(db: Connection, ids: Collection[str]) -> Mapping[str, tuple[Grant, TaskState, datetime]]:
    """Each grant with its task's state and when time ends that task: all that `is_live` asks of the store."""
    statement = _with_task(_grants.c[name] for name in _NAMES).where(_grants.c.id.in_(list(ids)))
    return {row.id: (grant_of(row), TaskState(row.task_state), _ends_at(row)) for row in db.execute(statement)}


_LIVE_OF = """
    SELECT asked.value, (
        SELECT count(*) FROM (
            SELECT 1 FROM grants
            WHERE grants.{column} = asked.value AND grants.state IN ('approved', 'active') AND grants.expires_at > {now}
            LIMIT {at_most}
        ) AS live
    ) AS held
    FROM {asked}
"""
_COUNTED_BY = ("agent", "task_id", "resource", "issuer")
_LIVE_ON_SQLITE = {
    column: text(
        _LIVE_OF.format(
            column=column,
            now=":now",
            at_most=":at_most",
            asked="(SELECT value FROM json_each(:values)) AS asked",
        )
    )
    for column in _COUNTED_BY
}
_LIVE_ON_POSTGRESQL = {
    column: _LIVE_OF.format(
        column=column,
        now="%(now)s",
        at_most="%(at_most)s",
        asked="unnest(CAST(%(values)s AS text[])) AS asked (value)",
    )
    for column in _COUNTED_BY
}


def count_live(
    db: Connection, values: Collection[str], *, now: datetime, at_most: int, by: str = "agent"
) -> dict[str, int]:
    """How many grants each agent, or whatever the column `by` names, holds or is just getting, up to `at_most`.

    Whoever would add to the same holds their locks first (`broker.store.locks`), so the count holds (INV-34).
    """
    asked = sorted(values)
    if db.dialect.name == "sqlite":
        bound = {"values": json.dumps(asked), "now": epoch(now), "at_most": at_most}
        return {row.value: row.held for row in db.execute(_LIVE_ON_SQLITE[by], bound)}
    driver: Any = db.connection.driver_connection
    # Planned each time: a plan that is kept from when the table was empty reads every live grant for each agent, until
    # its statistics change, and is most of what issuing waits for.
    rows = driver.execute(
        _LIVE_ON_POSTGRESQL[by], {"values": asked, "now": now, "at_most": at_most}, prepare=False
    ).fetchall()
    return dict(rows)


def tasks_of_grants(db: Connection, grant_ids: Collection[str]) -> set[str]:
    if not grant_ids:
        return set()
    return set(db.execute(select(_grants.c.task_id).where(_grants.c.id.in_(list(grant_ids)))).scalars())


def renew_grant(db: Connection, grant: Grant) -> None:
    """Write what a renewal changes; the caller holds the row, and it is active."""
    changed = (
        "jti", "credential_sha256", "expires_at", "ttl_s", "ttl_decided_by", "request_sha256", "decision",
        "policy_version", "terms",
    )  # fmt: skip
    values = {name: getattr(grant, name) for name in changed}
    values |= {"kids": padded(grant.kids), "policies": padded(grant.policies)}
    db.execute(update(_grants).where(_grants.c.id == grant.id).values(**values))


def collected(grant: Grant) -> dict[str, Any]:
    """What collecting an approved grant changes of its row; its state moves through its own door."""
    changed = (
        "jti", "credential_sha256", "status_list", "status_index", "issued_at", "expires_at", "renewable_until",
        "ttl_s", "ttl_decided_by", "decision", "policy_version", "terms",
    )  # fmt: skip
    values = {name: getattr(grant, name) for name in changed}
    named = {"kids": padded(grant.kids), "policies": padded(grant.policies)}
    return values | named | {"scopes": list(grant.scopes)}


def write_collected(db: Connection, grant: Grant) -> None:
    """The same where its secret is yet to be made outside; the caller holds the row."""
    db.execute(update(_grants).where(_grants.c.id == grant.id).values(**collected(grant)))


def page_of_grants(
    db: Connection, *, where: Iterable[ColumnElement[bool]], before: str | None, limit: int
) -> list[Grant]:
    """Newest first, below the id `before`."""
    statement: Select[Any] = _SELECT.where(*where).order_by(_grants.c.id.desc()).limit(limit)
    if before is not None:
        statement = statement.where(_grants.c.id < before)
    return [grant_of(row) for row in db.execute(statement)]


def issued_under(db: Connection, task_ids: Collection[str]) -> Sequence[Row[Any]]:
    """What a receipt says of each grant under these tasks that got a credential, or may have got one, oldest first."""
    # A secret of a grant may exist only if it was begun, and that is a lease: what people never allowed has none.
    begun = exists(select(_leases.c.id).where(_leases.c.grant_id == _grants.c.id))
    may_exist = or_(_grants.c.issued_at.is_not(None), _OWES & begun)
    statement = _RECEIPT_FACTS.where(of_tasks(db, task_ids), may_exist)
    return db.execute(statement.order_by(_grants.c.id)).fetchall()


def owing_under(db: Connection, task_ids: Collection[str]) -> list[str]:
    """The grants under these tasks for which something may be owed outside."""
    return list(db.execute(select(_grants.c.id).where(of_tasks(db, task_ids), _OWES)).scalars())


def seen_by(name: str) -> ColumnElement[bool]:
    """Grants this principal holds, or whose task it opened."""
    return or_(_grants.c.agent == name, _grants.c.orchestrator == name)


def matching(
    *,
    state: str | None = None,
    task_id: str | None = None,
    agent: str | None = None,
    user: str | None = None,
    resource: str | None = None,
    break_glass: str | None = None,
) -> list[ColumnElement[bool]]:
    """`break_glass` "true" is those that were asked for as one, "false" all others."""
    wanted = {"state": state, "task_id": task_id, "agent": agent, "on_behalf_of": user, "resource": resource}
    where: list[Any] = [_grants.c[name] == value for name, value in wanted.items() if value is not None]
    if break_glass is not None:
        # As text: SQLite takes a partial index only where the query spells its condition the way the index does.
        where.append(text(f"grants.break_glass IS {'NOT ' if break_glass == 'true' else ''}NULL"))
    return where


def with_id(grant_id: str) -> ColumnElement[bool]:
    return _grants.c.id == grant_id


def with_ids(grant_ids: Collection[str]) -> ColumnElement[bool]:
    return _grants.c.id.in_(grant_ids)


def of_tasks(db: Connection, task_ids: Collection[str]) -> ColumnElement[bool]:
    return among(db, _grants.c.task_id, task_ids)


def expired(now: datetime) -> ColumnElement[bool]:
    return _grants.c.expires_at <= now


def unexpired(now: datetime) -> ColumnElement[bool]:
    return _grants.c.expires_at > now


def at_the_latest(moment: datetime) -> ColumnElement[datetime]:
    """What `expires_at` becomes where it may become earlier and never later."""
    return case((_grants.c.expires_at < moment, _grants.c.expires_at), else_=literal(moment, _grants.c.expires_at.type))


def any_due(db: Connection, *, now: datetime) -> bool:
    """Whether time ended a grant whose row does not say so yet."""
    statement = select(_grants.c.id).where(unended(), _grants.c.expires_at <= now).limit(1)
    return db.execute(statement).first() is not None


def covered_by(refusal: Refusal) -> ColumnElement[bool]:
    """The same question as `Refusal.covers`, asked of every row; a test holds the two together."""
    # As their indexes spell it.
    in_part, handed_down = _grants.c.tasks_above != literal_column("''"), _grants.c.chain != literal_column("''")
    match refusal.axis:
        case "all":
            on_axis: ColumnElement[bool] = true()
        case "task":
            on_axis = or_(_grants.c.task_id == refusal.value, in_part & _names(_grants.c.tasks_above, refusal.value))
        case "orchestrator":
            above = in_part & _names(_grants.c.orchestrators_above, refusal.value)
            on_axis = or_(_grants.c.orchestrator == refusal.value, above)
        case "user":
            on_axis = _grants.c.on_behalf_of == refusal.value
        case "policy":
            on_axis = _names(_grants.c.policies, refusal.value)
        case "key":
            on_axis = _names(_grants.c.kids, refusal.value)
        case "agent":
            on_axis = or_(_grants.c.agent == refusal.value, handed_down & _names(_grants.c.chain, refusal.value))
        case "resource" | "provider":
            on_axis = _grants.c[refusal.axis] == refusal.value
        case _:
            raise ValueError(f"{refusal.axis!r} is not an axis of revocation")
    return on_axis if refusal.era is None else on_axis & (_grants.c.era <= refusal.era)


def unended() -> ColumnElement[bool]:
    # As literals: SQLite takes a partial index only where the query spells its condition the way the index does.
    return _grants.c.state.in_(bindparam("unended", UNENDED, expanding=True, literal_execute=True))


def unended_ids(db: Connection, *where: ColumnElement[bool], limit: int) -> list[str]:
    return list(db.execute(select(_grants.c.id).where(unended(), *where).limit(limit)).scalars())


def claimed(*where: ColumnElement[bool], limit: int) -> ColumnElement[bool]:
    """So many unended grants, passing over those that another transaction holds.

    For whoever ends many grants of many tasks: two that take them in different orders would wait for each other for
    ever, and one that never waits cannot. SQLite has one writer, and nothing to pass over.
    """
    chosen = select(_grants.c.id).where(unended(), *where).limit(limit).with_for_update(skip_locked=True)
    return _grants.c.id.in_(chosen)


def unended_of_tasks(db: Connection, task_ids: Collection[str]) -> dict[str, int]:
    """How many unended grants there are below each task that has any."""
    statement = (
        select(_grants.c.task_id, func.count()).where(unended(), of_tasks(db, task_ids)).group_by(_grants.c.task_id)
    )
    return {task_id: count for task_id, count in db.execute(statement)}  # noqa: C416 - rows are not quite pairs


def count_by_agent(db: Connection, *where: ColumnElement[bool]) -> dict[str, int]:
    """How many unended grants match, by agent: the blast radius of a revocation."""
    statement = select(_grants.c.agent, func.count()).where(unended(), *where).group_by(_grants.c.agent)
    return {agent: count for agent, count in db.execute(statement)}  # noqa: C416 - rows are not quite pairs


def invalid_indexes(db: Connection, status_list: int, standing: Iterable[Refusal], *, now: datetime) -> list[int]:
    """The indexes of one status list whose tokens open nothing any more.

    Ended rows, rows that time has ended or whose tasks time has ended, and rows a standing refusal covers before they
    followed it. Each kind has an index of its own: most of a list lives, and is not looked at. What a task's end by
    anybody covers has ended with it, in its transaction (INV-12).
    """
    on_list = _grants.c.status_list == status_list
    # SQLite takes an index for what is equal before one for what is due, though most of a list is equal and little due.
    also_on_list = _grants.c.status_list + 0 == status_list if db.dialect.name == "sqlite" else on_list
    # As their indexes spell it.
    active = _grants.c.state == literal_column("'active'")
    running = _tasks.c.state == literal_column("'active'")
    due = select(_tasks.c.id).where(running)
    tasks = union_all(
        due.where(_tasks.c.deadline_at <= now),
        due.where(_tasks.c.heartbeat_due_at <= now),
        due.where(_tasks.c.upheld_until <= now),
    ).subquery()
    parts = [
        select(_grants.c.status_index).where(on_list, _grants.c.state != literal_column("'active'")),
        # A ceiling that shrank lets a grant end before its token's own `exp`.
        select(_grants.c.status_index).where(also_on_list, unended(), active, _grants.c.expires_at <= now),
        select(_grants.c.status_index).join(tasks, tasks.c.id == _grants.c.task_id).where(also_on_list, active),
    ]
    covered = [covered_by(refusal) for refusal in standing]
    if covered:
        parts.append(select(_grants.c.status_index).where(on_list, active, or_(*covered)))
    return list(db.execute(union_all(*parts)).scalars())
