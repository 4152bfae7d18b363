"""Reading audit events; `broker.store.transitions` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Executable, select, text

from broker.domain.audit import Event
from broker.store import models

_events = models.table_of(models.AuditEvent)
_NAMES = tuple(Event.__dataclass_fields__)


_DENIED = f"""
    SELECT asked.agent, count(*) AS denials, max(events.at) AS newest_at
    FROM {{asked}}
    JOIN events ON events.agent = asked.agent AND events.id >= asked.since
    WHERE {models.IS_DENIAL}
    GROUP BY asked.agent
"""  # noqa: S608 - of constants
_DENIED_ON: Mapping[str, Executable] = {
    "postgresql": text(
        _DENIED.format(asked="unnest(CAST(:agents AS text[]), CAST(:since AS text[])) AS asked (agent, since)")
    ),
    "sqlite": text(
        _DENIED.format(asked="(SELECT key AS agent, value AS since FROM json_each(:asked)) AS asked")
    ).columns(newest_at=models.Instant()),
}


@dataclass(frozen=True)
class Denials:
    """What an agent was denied of late, and when last."""

    count: int = 0
    newest_at: datetime | None = None


def count_denials(db: Connection, since: Mapping[str, str]) -> dict[str, Denials]:
    """The denials of each agent from an event's id on. Whoever holds an agent's lock sees all there are (INV-34)."""
    sqlite = db.dialect.name == "sqlite"
    values: dict[str, Any] = (
        {"asked": json.dumps(since)} if sqlite else {"agents": list(since), "since": list(since.values())}
    )
    found = {row.agent: Denials(row.denials, row.newest_at) for row in db.execute(_DENIED_ON[db.dialect.name], values)}
    return {agent: found.get(agent, Denials()) for agent in since}


def page_of_events(db: Connection, filters: Mapping[str, str], *, before: str | None, limit: int) -> list[Event]:
    """Newest first, below the id `before`; a filter names a column and its exact value."""
    statement = select(*(_events.c[name] for name in _NAMES)).order_by(_events.c.id.desc()).limit(limit)
    statement = statement.where(*(_events.c[name] == value for name, value in filters.items()))
    if before is not None:
        statement = statement.where(_events.c.id < before)
    return [Event(**row._mapping) for row in db.execute(statement)]
