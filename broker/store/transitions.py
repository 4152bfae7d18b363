"""The one door through which a state changes.

`move` is a compare-and-set with an audit event per row in the same transaction (INV-32). It answers the rows
that moved: losing a race gives a shorter list, never a corrupt row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from datetime import datetime
from enum import StrEnum
from operator import attrgetter
from typing import Any, ClassVar

from sqlalchemy import ColumnElement, Connection, Row, select, update

from broker.domain.audit import ALERTING, Event
from broker.domain.identity import new_id
from broker.domain.lifecycle import sources
from broker.store.alerts import owe_alerts
from broker.store.database import recorded
from broker.store.models import AuditEvent, Base, Grant, table_of
from broker.store.rows import among, insert_alike, insert_rows

_grants = table_of(Grant)
_EVENT = tuple(Event.__dataclass_fields__)
_values_of = attrgetter(*_EVENT)
# What is told of a grant that moved; the rest of a row is most of what moving ten thousand costs.
GRANT_FACTS = (
    "id", "task_id", "agent", "on_behalf_of", "resource", "policy_version", "provider", "issued_at", "break_glass",
)  # fmt: skip


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
    if isinstance(event, Change) and event.event.type not in ALERTING:
        record_alike(db, event, moved)
    else:
        record(db, map(event, moved))
    return moved


_told: ContextVar[list[Event] | None] = ContextVar("told", default=None)


@contextmanager
def recorded_together(db: Connection) -> Iterator[None]:
    """Write the events of several changes of one transaction at the end of the block, with one statement.

    Where the block fails nothing is written, and nothing changed: its transaction is rolled back.
    """
    events: list[Event] = []
    token = _told.set(events)
    try:
        yield
    finally:
        _told.reset(token)
    record(db, events)


def record(db: Connection, events: Iterable[Event]) -> None:
    """Write audit events; the caller's transaction is that of the change they speak of."""
    told = _told.get()
    if told is not None:
        told.extend(events)
        return
    made = _with_tasks(db, list(events))
    insert_rows(db, AuditEvent, [dict(zip(_EVENT, _values_of(event), strict=True)) for event in made])
    owe_alerts(db, made)
    recorded((event.type, event.outcome) for event in made)


def _with_tasks(db: Connection, events: list[Event]) -> list[Event]:
    """What happened to a grant happened for its task, whoever told of it: both are asked for in the audit trail."""
    lacking = {event.grant_id for event in events if event.task_id is None and event.grant_id is not None}
    if not lacking:
        return events
    known = select(_grants.c.id, _grants.c.task_id).where(among(db, _grants.c.id, lacking))
    tasks = {row.id: row.task_id for row in db.execute(known)}
    return [event if event.task_id else replace(event, task_id=tasks.get(event.grant_id)) for event in events]


class Change:
    """The event maker for grants that moved: their task, agent, user, resource and policy stand in the event."""

    # Members of the event that are the row's, and what the row calls them.
    _OF_ROW: ClassVar[Mapping[str, str]] = {
        "task_id": "task_id",
        "grant_id": "id",
        "agent": "agent",
        "user": "on_behalf_of",
        "resource": "resource",
        "policy_version": "policy_version",
    }
    names = ("id", *_OF_ROW)
    _facts = staticmethod(attrgetter(*_OF_ROW.values()))

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, row: Row[Any]) -> Event:
        return replace(self.event, **dict(zip(self.names, self.values(row), strict=True)))

    def values(self, row: Row[Any]) -> tuple[Any, ...]:
        """What is this row's own in its event: the members `names`, in their order."""
        return new_id("evt", self.event.at), *self._facts(row)


def change_of(at: datetime, actor: str, type_: str, **more: Any) -> Change:
    return Change(Event(id="", at=at, type=type_, actor=actor, **more))


def record_alike(db: Connection, change: Change, moved: Sequence[Any]) -> None:
    """The same as recording `change` of each row, where nobody is alerted; thousands differ in a few members."""
    if not moved:
        return
    shared = dict(zip(_EVENT, _values_of(change.event), strict=True))
    insert_alike(db, AuditEvent, shared, change.names, map(change.values, moved))
    recorded([(change.event.type, change.event.outcome)] * len(moved))
