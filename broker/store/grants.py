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
    Row,
    Select,
    bindparam,
    func,
    or_,
    select,
    text,
    true,
    update,
)

from broker.domain.clock import epoch
from broker.domain.grant import Grant
from broker.domain.lifecycle import GrantState, TaskState, sources
from broker.domain.receipt import RECEIPT_FACTS
from broker.domain.refusal import Refusal
from broker.store import models
from broker.store.rows import insert_rows

_grants = models.table_of(models.Grant)
_tasks = models.table_of(models.Task)
_NAMES = tuple(entry.name for entry in fields(Grant))
_values_of = attrgetter(*_NAMES)
_SELECT = select(*(_grants.c[name] for name in _NAMES))
_OWES = _grants.c.provider != "jwt"
_RECEIPT_FACTS = select(*(_grants.c[name] for name in RECEIPT_FACTS))

UNENDED = [str(state) for state in (GrantState.PENDING, GrantState.APPROVED, GrantState.ACTIVE)]
assert set(UNENDED) == set(map(str, sources(GrantState.REVOKED)))  # noqa: S101 - and in the order of `grants_due_idx`


def insert_grants(db: Connection, grants: Sequence[Grant]) -> None:
    insert_rows(db, models.Grant, [_row_of(grant) for grant in grants])


def _row_of(grant: Grant) -> dict[str, Any]:
    row = dict(zip(_NAMES, _values_of(grant), strict=True))
    row["state"] = str(grant.state)
    row["scopes"] = list(grant.scopes)
    row["kids"], row["policies"] = padded(grant.kids), padded(grant.policies)
    return row


def padded(names: Iterable[str]) -> str:
    # Blanks on both sides, so that looking for " crm-read " cannot find "crm-read-all".
    return f" {' '.join(names)} "


def _names(column: ColumnElement[Any], value: str) -> ColumnElement[bool]:
    return column.contains(f" {value} ", autoescape=True)


def grant_of(row: Any) -> Grant:
    """A row that has every column of the table, or more."""
    values = dict(zip(_NAMES, _values_of(row), strict=True))
    values["state"] = GrantState(row.state)
    values["scopes"] = tuple(row.scopes)
    values["kids"], values["policies"] = tuple(row.kids.split()), tuple(row.policies.split())
    return Grant(**values)


def find_grant(db: Connection, grant_id: str, *, lock: bool = False) -> Grant | None:
    statement = _SELECT.where(_grants.c.id == grant_id)
    if lock:
        statement = statement.with_for_update()
    row = db.execute(statement).one_or_none()
    return None if row is None else grant_of(row)


def _with_task(columns: Iterable[ColumnElement[Any]]) -> Select[Any]:
    ends_at = (_tasks.c.deadline_at, _tasks.c.heartbeat_due_at)
    return select(*columns, _tasks.c.state.label("task_state"), *ends_at).join(_tasks, _tasks.c.id == _grants.c.task_id)


def _ends_at(row: Any) -> datetime:
    ends_at: datetime = row.deadline_at
    return ends_at if row.heartbeat_due_at is None else min(ends_at, row.heartbeat_due_at)


def find_with_tasks(db: Connection, ids: Collection[str]) -> Mapping[str, tuple[Grant, TaskState, datetime]]:
    """Each grant with its task's state and when time ends that task: all that `is_live` asks of the store."""
    statement = _with_task(_grants.c[name] for name in _NAMES).where(_grants.c.id.in_(list(ids)))
    return {row.id: (grant_of(row), TaskState(row.task_state), _ends_at(row)) for row in db.execute(statement)}


_LIVE_OF = """
    SELECT agent, (
        SELECT count(*) FROM (
            SELECT 1 FROM grants
            WHERE grants.agent = asked.agent AND grants.state IN ('approved', 'active') AND grants.expires_at > :now
            LIMIT :at_most
        ) AS live
    ) AS held
    FROM {asked}
"""
_LIVE_ON = {
    "postgresql": text(_LIVE_OF.format(asked="unnest(CAST(:agents AS text[])) AS asked (agent)")),
    "sqlite": text(_LIVE_OF.format(asked="(SELECT value AS agent FROM json_each(:agents)) AS asked")),
}


def count_live(db: Connection, agents: Collection[str], *, now: datetime, at_most: int) -> dict[str, int]:
    """How many grants each agent holds or is just getting, counted up to `at_most`.

    Whoever would add to the same agents holds their locks first (`broker.store.locks`), so the count holds (INV-34).
    """
    sqlite = db.dialect.name == "sqlite"
    values: dict[str, Any] = {
        "agents": json.dumps(sorted(agents)) if sqlite else sorted(agents),
        "now": epoch(now) if sqlite else now,
        "at_most": at_most,
    }
    return {row.agent: row.held for row in db.execute(_LIVE_ON[db.dialect.name], values)}


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


def page_of_grants(
    db: Connection, *, where: Iterable[ColumnElement[bool]], before: str | None, limit: int
) -> list[Grant]:
    """Newest first, below the id `before`."""
    statement: Select[Any] = _SELECT.where(*where).order_by(_grants.c.id.desc()).limit(limit)
    if before is not None:
        statement = statement.where(_grants.c.id < before)
    return [grant_of(row) for row in db.execute(statement)]


def issued_under(db: Connection, task_id: str) -> Sequence[Row[Any]]:
    """What a receipt says of each grant under a task that got a credential, or may have got one, oldest first."""
    may_exist = or_(_grants.c.issued_at.is_not(None), _OWES & (_grants.c.state != str(GrantState.DENIED)))
    statement = _RECEIPT_FACTS.where(_grants.c.task_id == task_id, may_exist)
    return db.execute(statement.order_by(_grants.c.id)).fetchall()


def owing_under(db: Connection, task_id: str) -> list[str]:
    """The grants under a task for which something may be owed outside."""
    return list(db.execute(select(_grants.c.id).where(_grants.c.task_id == task_id, _OWES)).scalars())


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
) -> list[ColumnElement[bool]]:
    wanted = {"state": state, "task_id": task_id, "agent": agent, "on_behalf_of": user, "resource": resource}
    return [_grants.c[name] == value for name, value in wanted.items() if value is not None]


def with_id(grant_id: str) -> ColumnElement[bool]:
    return _grants.c.id == grant_id


def with_ids(grant_ids: Collection[str]) -> ColumnElement[bool]:
    return _grants.c.id.in_(grant_ids)


def of_tasks(task_ids: Collection[str]) -> ColumnElement[bool]:
    return _grants.c.task_id.in_(task_ids)


def expired(now: datetime) -> ColumnElement[bool]:
    return _grants.c.expires_at <= now


def unexpired(now: datetime) -> ColumnElement[bool]:
    return _grants.c.expires_at > now


def any_due(db: Connection, *, now: datetime) -> bool:
    """Whether time ended a grant whose row does not say so yet."""
    statement = select(_grants.c.id).where(unended(), _grants.c.expires_at <= now).limit(1)
    return db.execute(statement).first() is not None


def covered_by(refusal: Refusal) -> ColumnElement[bool]:
    """The same question as `Refusal.covers`, asked of every row; a test holds the two together."""
    match refusal.axis:
        case "all":
            on_axis: ColumnElement[bool] = true()
        case "task":
            on_axis = _grants.c.task_id == refusal.value
        case "user":
            on_axis = _grants.c.on_behalf_of == refusal.value
        case "policy":
            on_axis = _names(_grants.c.policies, refusal.value)
        case "key":
            on_axis = _names(_grants.c.kids, refusal.value)
        case "agent" | "orchestrator" | "resource" | "provider":
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
    statement = select(_grants.c.task_id, func.count()).where(unended(), of_tasks(task_ids)).group_by(_grants.c.task_id)
    return {task_id: count for task_id, count in db.execute(statement)}  # noqa: C416 - rows are not quite pairs


def count_by_agent(db: Connection, *where: ColumnElement[bool]) -> dict[str, int]:
    """How many unended grants match, by agent: the blast radius of a revocation."""
    statement = select(_grants.c.agent, func.count()).where(unended(), *where).group_by(_grants.c.agent)
    return {agent: count for agent, count in db.execute(statement)}  # noqa: C416 - rows are not quite pairs


def invalid_indexes(db: Connection, status_list: int, standing: Iterable[Refusal], *, now: datetime) -> list[int]:
    """The indexes of one status list whose tokens open nothing any more.

    Ended rows, rows that time has ended or whose tasks ended, and rows a standing refusal covers before they followed
    it.
    """
    dead = [
        _grants.c.state != str(GrantState.ACTIVE),
        # A ceiling that shrank lets a grant end before its token's own `exp`.
        _grants.c.expires_at <= now,
        _tasks.c.state != str(TaskState.ACTIVE),
        _tasks.c.deadline_at <= now,
        _tasks.c.heartbeat_due_at <= now,
        *(covered_by(refusal) for refusal in standing),
    ]
    statement = (
        select(_grants.c.status_index)
        .join(_tasks, _tasks.c.id == _grants.c.task_id)
        .where(_grants.c.status_list == status_list, or_(*dead))
    )
    return list(db.execute(statement).scalars())
