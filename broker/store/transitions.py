"""The one door through which a state changes.

`move` is a compare-and-set with an audit event per row in the same transaction (INV-32). It answers the rows
that moved: losing a race gives a shorter list, never a corrupt row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from enum import StrEnum
from operator import attrgetter
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, update

from broker.domain.audit import Event
from broker.domain.identity import new_id
from broker.domain.lifecycle import sources
from broker.store.database import recorded
from broker.store.models import AuditEvent, Base, table_of
from broker.store.rows import insert_rows

_EVENT = tuple(Event.__dataclass_fields__)
_values_of = attrgetter(*_EVENT)
# What is told of a grant that moved; the rest of a row is most of what moving ten thousand costs.
GRANT_FACTS = ("id", "task_id", "agent", "on_behalf_of", "resource", "policy_version", "provider")


def move(
    db: Connection,
    model: type[Base],
    to: StrEnum,
    *where: ColumnElement[bool],
    event: Callable[[Row[Any]], Event],
    returning: Sequence[str] | None = None,
    **values: Any,
) -> Sequence[Row[Any]]:
    """Set `state` to `to`, and the other `values`, on every matching row that may legally go there.

    `event` makes the audit event of one moved row, which has the columns `returning`, or every one of `model`.
    """
    table = table_of(model)
    statement = (
        update(table)
        .where(*where, table.c.state.in_([str(source) for source in sources(to)]))
        .values(state=str(to), **values)
        .returning(*(table.c if returning is None else (table.c[name] for name in returning)))
    )
    moved = db.execute(statement).fetchall()
    record(db, map(event, moved))
    return moved


def record(db: Connection, events: Iterable[Event]) -> None:
    """Write audit events; the caller's transaction is that of the change they speak of."""
    made = list(events)
    insert_rows(db, AuditEvent, [dict(zip(_EVENT, _values_of(event), strict=True)) for event in made])
    recorded((event.type, event.outcome) for event in made)


def change_of(at: datetime, actor: str, type_: str, **more: Any) -> Callable[[Row[Any]], Event]:
    """The event maker for grants that moved: their task, agent, user, resource and policy stand in the event."""

    def make(row: Row[Any]) -> Event:
        return Event(
            id=new_id("evt", at),
            at=at,
            type=type_,
            actor=actor,
            task_id=row.task_id,
            grant_id=row.id,
            agent=row.agent,
            user=row.on_behalf_of,
            resource=row.resource,
            policy_version=row.policy_version,
            **more,
        )

    return make
