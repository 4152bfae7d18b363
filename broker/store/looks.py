"""The look behind every verification: the era, and of some grants what says whether they are live, in one statement.

It is asked more often than anything else, so it goes to the driver as text that was composed once, and its rows come
back as the driver gives them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import fields
from datetime import datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import String, bindparam, func, literal_column, select
from sqlalchemy.dialects import postgresql, sqlite

from broker.domain.grant import Authority
from broker.domain.lifecycle import GrantState, TaskState
from broker.store import models
from broker.store.database import Database
from broker.store.grants import LISTS_OF_NAMES

_gate = models.table_of(models.Gate)
_grants = models.table_of(models.Grant)
_tasks = models.table_of(models.Task)
_AUTHORITY = tuple(entry.name for entry in fields(Authority))
_AMONG = {
    "postgresql": _grants.c.id == func.any(bindparam("ids", type_=postgresql.ARRAY(String))),
    "sqlite": _grants.c.id.in_(select(literal_column("value")).select_from(func.json_each(bindparam("ids")))),
}

Found = tuple[Authority, TaskState, datetime]


def find_authorities(database: Database, ids: Collection[str]) -> tuple[int | None, Mapping[str, Found]]:
    """The era now, and each grant that there is with its task's state and when time ends that task.

    One statement, so one moment: what stands at this era, or at any later one, covers these rows. Where there are none
    there is nothing to cover, and the era is None.
    """
    wanted: Any = json.dumps(list(ids)) if database.is_sqlite else list(ids)
    rows = database.look(_statement(database.engine.dialect.name), {"ids": wanted})
    era = rows[0][0] if rows else None
    return era, {row[1]: _found(database, row[1:]) for row in rows}


@lru_cache
def _statement(dialect: str) -> str:
    columns = (
        select(_gate.c.era).scalar_subquery(),
        *(_grants.c[name] for name in _AUTHORITY),
        *(_tasks.c[name] for name in ("state", "deadline_at", "heartbeat_due_at", "upheld_until")),
    )
    statement = select(*columns).join_from(_grants, _tasks, _tasks.c.id == _grants.c.task_id).where(_AMONG[dialect])
    if dialect == "sqlite":
        return str(statement.compile(dialect=sqlite.dialect(paramstyle="named")))
    return str(statement.compile(dialect=postgresql.psycopg.dialect()))  # type: ignore[no-untyped-call]


def _found(database: Database, row: tuple[Any, ...]) -> Found:
    values = dict(zip(_AUTHORITY, row, strict=False))
    *_, task_state, deadline_at, heartbeat_due_at, upheld_until = row
    moment = models.instants_of(database.engine.dialect)
    values["state"] = GrantState(values["state"])
    # SQLite has no JSON of its own, and gives the text.
    scopes = values["scopes"]
    values["scopes"] = tuple(json.loads(scopes) if database.is_sqlite else scopes)
    values |= {name: tuple(values[name].split()) for name in LISTS_OF_NAMES if name in values}
    values["expires_at"] = moment(values["expires_at"])
    ends = [moment(at) for at in (deadline_at, heartbeat_due_at, upheld_until) if at is not None]
    return Authority(**values), TaskState(task_state), min(at for at in ends if at is not None)
