"""Reading audit events; `broker.store.transitions` writes them."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Connection, select

from broker.domain.audit import Event
from broker.store import models

_events = models.table_of(models.AuditEvent)
_NAMES = tuple(Event.__dataclass_fields__)


def page_of_events(db: Connection, filters: Mapping[str, str], *, before: str | None, limit: int) -> list[Event]:
    """Newest first, below the id `before`; a filter names a column and its exact value."""
    statement = select(*(_events.c[name] for name in _NAMES)).order_by(_events.c.id.desc()).limit(limit)
    statement = statement.where(*(_events.c[name] == value for name, value in filters.items()))
    if before is not None:
        statement = statement.where(_events.c.id < before)
    return [Event(**row._mapping) for row in db.execute(statement)]
