"""Reading the audit trail. Events are written where the change is, in the same transaction (INV-32), never here."""

from __future__ import annotations

from collections.abc import Mapping

from broker.domain.audit import Event
from broker.domain.errors import RoleMissing
from broker.domain.identity import Caller, Role
from broker.store.database import Database
from broker.store.events import page_of_events

FILTERS = ("type", "actor", "task_id", "grant_id", "agent", "user", "resource", "outcome", "trace_id")


class AuditTrail:
    def __init__(self, *, database: Database) -> None:
        self._database = database

    def page(self, caller: Caller, filters: Mapping[str, str], *, before: str | None, limit: int) -> list[Event]:
        """Newest first, below the id `before`. For auditors and admins."""
        if not (caller.has(Role.AUDITOR) or caller.has(Role.ADMIN)):
            raise RoleMissing(f"{caller.name} is neither auditor nor admin: the audit trail is not theirs to read")
        with self._database.read() as db:
            return page_of_events(db, filters, before=before, limit=limit)
