"""Tasks: reading, locking, inserting, ending."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, bindparam, exists, or_, select, update
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from broker.domain.lifecycle import TaskState
from broker.domain.task import Task
from broker.store import models
from broker.store.grants import padded
from broker.store.rows import among, insert_rows

_COLUMNS = tuple(entry.name for entry in fields(Task) if entry.name != "agents")
_LISTS_OF_NAMES = ("tasks_above", "orchestrators_above")
_tasks = models.table_of(models.Task)
_agents = models.table_of(models.TaskAgent)
_grants = models.table_of(models.Grant)
_SELECT = select(*(_tasks.c[name] for name in _COLUMNS))
_MAY_CHANGE = ("id", "state", "heartbeat_due_at", "upheld_until", "ended_at", "reason")
_HELD_SHARED = (
    select(*(_tasks.c[name] for name in _MAY_CHANGE))
    .where(_tasks.c.id.in_(bindparam("ids", expanding=True)))
    # In one order everywhere, so that two transactions cannot wait for each other.
    .order_by(_tasks.c.id)
    .with_for_update(read=True)
)


def insert_tasks(db: Connection, tasks: Iterable[Task]) -> None:
    made = list(tasks)
    insert_rows(db, models.Task, [_row_of(task) for task in made])
    pairs = [{"task_id": task.id, "agent": agent} for task in made for agent in task.agents]
    insert_rows(db, models.TaskAgent, pairs)


def _row_of(task: Task) -> dict[str, Any]:
    row = {name: getattr(task, name) for name in _COLUMNS}
    # As in `broker.store.grants`, where they are looked for.
    return row | {name: padded(row[name]) for name in _LISTS_OF_NAMES}


def find_task(db: Connection, task_id: str) -> Task | None:
    return _with_agents(db, db.execute(_SELECT.where(_tasks.c.id == task_id)).fetchall()).get(task_id)


class Tasks:
    """Locks tasks for issuing. What of a task never changes is remembered, so that the lock reads only what can."""

    _REMEMBERED = 4096

    def __init__(self) -> None:
        self._known: dict[str, Task] = {}

    def hold_shared(self, db: Connection, ids: Collection[str]) -> Mapping[str, Task]:
        """The tasks as they are, kept from ending until this transaction does (INV-12)."""
        if not ids:
            return {}
        rows = db.execute(_HELD_SHARED, {"ids": sorted(ids)}).fetchall()
        # One look at what is remembered: another thread may forget it all meanwhile.
        known = self._known
        unknown = [row.id for row in rows if row.id not in known]
        if unknown:
            found = _with_agents(db, db.execute(_SELECT.where(_tasks.c.id.in_(unknown))).fetchall())
            known = known | found
            self._known = known if len(known) <= self._REMEMBERED else found
        return {
            row.id: replace(
                known[row.id],
                state=TaskState(row.state),
                heartbeat_due_at=row.heartbeat_due_at,
                upheld_until=row.upheld_until,
                ended_at=row.ended_at,
                reason=row.reason,
            )
            for row in rows
        }


def agents_among(db: Connection, pairs: Collection[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those of these (task, agent) where the agent may ask under the task."""
    if not pairs:
        return set()
    statement = select(_agents.c.task_id, _agents.c.agent).where(
        among(db, _agents.c.task_id, {task_id for task_id, _ in pairs}),
        among(db, _agents.c.agent, {agent for _, agent in pairs}),
    )
    return {(row.task_id, row.agent) for row in db.execute(statement)} & set(pairs)


def hold(db: Connection, ids: Collection[str]) -> None:
    """Lock these tasks in the order in which issuing does, so that the two cannot wait for each other."""
    db.execute(select(_tasks.c.id).where(with_ids(db, ids)).order_by(_tasks.c.id).with_for_update()).fetchall()


def active_below(db: Connection, ids: Collection[str]) -> list[str]:
    """The active tasks one level below these."""
    where = (among(db, _tasks.c.parent_task_id, ids), _tasks.c.state == str(TaskState.ACTIVE))
    return list(db.execute(select(_tasks.c.id).where(*where).order_by(_tasks.c.id)).scalars())


def tree_of(db: Connection, task_id: str, *, active: bool = False) -> list[str]:
    """A task and every task below it, those nearer to it first; `active` leaves out branches that have ended."""
    found, level = [task_id], [task_id]
    state = (_tasks.c.state == str(TaskState.ACTIVE),) if active else ()
    while level:
        statement = select(_tasks.c.id).where(among(db, _tasks.c.parent_task_id, level), *state).order_by(_tasks.c.id)
        level = list(db.execute(statement).scalars())
        found += level
    return found


def uphold(db: Connection, task: Task) -> None:
    """Let what is below a task live as long as it does: whoever beats for the whole beats for its parts."""
    level = {task.id: _upholds(task.heartbeat_due_at, task.upheld_until)}
    while level:
        below = select(_tasks.c.id, _tasks.c.parent_task_id, _tasks.c.heartbeat_due_at).where(
            among(db, _tasks.c.parent_task_id, list(level)), _tasks.c.state == str(TaskState.ACTIVE)
        )
        next_level: dict[str, datetime | None] = {}
        for row in db.execute(below.order_by(_tasks.c.id)).fetchall():
            until = level[row.parent_task_id]
            db.execute(update(_tasks).where(_tasks.c.id == row.id).values(upheld_until=until))
            next_level[row.id] = _upholds(row.heartbeat_due_at, until)
        level = next_level


def _upholds(*moments: datetime | None) -> datetime | None:
    return min((at for at in moments if at is not None), default=None)


def beat(db: Connection, task_id: str, *, now: datetime, heartbeat_s: int) -> bool:
    """Move the heartbeat on, unless the task ended or already lost it."""
    statement = (
        update(_tasks)
        .where(
            _tasks.c.id == task_id,
            _tasks.c.state == str(TaskState.ACTIVE),
            _tasks.c.deadline_at > now,
            _tasks.c.heartbeat_due_at > now,
            or_(_tasks.c.upheld_until.is_(None), _tasks.c.upheld_until > now),
        )
        .values(heartbeat_due_at=now + timedelta(seconds=heartbeat_s))
    )
    return db.execute(statement).rowcount == 1


def due_task_ids(db: Connection, *, now: datetime, limit: int) -> list[str]:
    """Active tasks that time has ended: two small index ranges rather than one scan over an OR."""
    active = _tasks.c.state == str(TaskState.ACTIVE)
    found: list[str] = []
    for column in (_tasks.c.deadline_at, _tasks.c.heartbeat_due_at):
        statement = select(_tasks.c.id).where(active, column <= now).order_by(column).limit(limit)
        found += db.execute(statement).scalars()
    return sorted(set(found))[:limit]


def page_of_tasks(
    db: Connection, *, where: Iterable[ColumnElement[bool]], before: str | None, limit: int
) -> list[Task]:
    """Newest first, below the id `before`."""
    statement: Select[Any] = _SELECT.where(*where).order_by(_tasks.c.id.desc()).limit(limit)
    if before is not None:
        statement = statement.where(_tasks.c.id < before)
    return list(_with_agents(db, db.execute(statement).fetchall()).values())


def seen_by(name: str) -> ColumnElement[bool]:
    """Tasks this principal opened or may ask under."""
    of_agent = select(_agents.c.task_id).where(_agents.c.agent == name)
    return or_(_tasks.c.orchestrator == name, _tasks.c.id.in_(of_agent))


def matching(
    *,
    state: str | None = None,
    agent: str | None = None,
    user: str | None = None,
    resource: str | None = None,
    grants_seen_by: str | None = None,
) -> list[ColumnElement[bool]]:
    """`resource`: the ceiling names it, or a grant was issued on it; one that `grants_seen_by` may see, where given."""
    conditions: list[ColumnElement[bool]] = []
    if state is not None:
        conditions.append(_tasks.c.state == state)
    if agent is not None:
        conditions.append(_tasks.c.id.in_(select(_agents.c.task_id).where(_agents.c.agent == agent)))
    if user is not None:
        conditions.append(_tasks.c.on_behalf_of == user)
    if resource is not None:
        conditions.append(or_(_ceiling_names(resource), _granted_on(resource, grants_seen_by)))
    return conditions


class _Members(FunctionElement[Any]):
    """The members of a JSON object as rows of `key` and `value`."""

    name = "members"
    inherit_cache = True


@compiles(_Members)
def _json_each(element: _Members, compiler: Any, **options: Any) -> str:
    function = "jsonb_each" if compiler.dialect.name == "postgresql" else "json_each"
    return f"{function}({compiler.process(element.clauses, **options)})"


def _ceiling_names(resource: str) -> ColumnElement[bool]:
    # By comparing each name and not by a path to it: what a path means is up to the characters in it (INV-31).
    members = _Members(_tasks.c.ceiling).table_valued("key", "value", name="members")
    return exists(select(members.c.key).where(members.c.key == resource))


def _granted_on(resource: str, seen_by: str | None) -> ColumnElement[bool]:
    where = [_grants.c.task_id == _tasks.c.id, _grants.c.resource == resource, _grants.c.issued_at.is_not(None)]
    if seen_by is not None:
        where.append(or_(_grants.c.agent == seen_by, _grants.c.orchestrator == seen_by))
    return exists(select(_grants.c.id).where(*where))


def with_id(task_id: str) -> ColumnElement[bool]:
    return _tasks.c.id == task_id


def with_ids(db: Connection, task_ids: Collection[str]) -> ColumnElement[bool]:
    return among(db, _tasks.c.id, task_ids)


def overdue(now: datetime) -> ColumnElement[bool]:
    return or_(_tasks.c.deadline_at <= now, _tasks.c.heartbeat_due_at <= now, _tasks.c.upheld_until <= now)


def task_of(row: Row[Any], agents: tuple[str, ...]) -> Task:
    values = {name: getattr(row, name) for name in _COLUMNS}
    values |= {name: tuple(values[name].split()) for name in _LISTS_OF_NAMES}
    return Task(**values | {"state": TaskState(row.state), "agents": agents})


def _with_agents(db: Connection, rows: Iterable[Row[Any]]) -> dict[str, Task]:
    found = list(rows)
    agents: dict[str, list[str]] = {row.id: [] for row in found}
    statement = select(_agents).where(_agents.c.task_id.in_(list(agents))).order_by(_agents.c.task_id, _agents.c.agent)
    for task_id, agent in db.execute(statement) if found else ():
        agents[task_id].append(agent)
    return {row.id: task_of(row, tuple(agents[row.id])) for row in found}
