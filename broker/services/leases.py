"""What is owed outside, for people to see; and the one thing they may say about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from broker.domain.audit import Event
from broker.domain.clock import Clock
from broker.domain.errors import Conflict, NotFound, RoleMissing
from broker.domain.identity import Caller, Role, is_id, new_id
from broker.domain.lease import Lease
from broker.domain.lifecycle import LeaseState
from broker.services.refusals import recorded
from broker.services.revocation import require_admin
from broker.store import leases
from broker.store.database import Database
from broker.store.transitions import record


class Leases:
    def __init__(self, *, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def page(
        self, caller: Caller, filters: Mapping[str, str], *, before: str | None = None, limit: int = 100
    ) -> list[Lease]:
        """Newest first, below the id `before`."""
        with recorded(self._database, self._clock, caller, "lease.refused", "list"):
            _require_overseer(caller)
        with self._database.read() as db:
            return leases.page_of_leases(db, where=leases.matching(**filters), before=before, limit=limit)

    def find(self, caller: Caller, lease_id: str) -> Lease:
        with recorded(self._database, self._clock, caller, "lease.refused", "show"):
            _require_overseer(caller)
            with self._database.read() as db:
                lease = leases.find_lease(db, lease_id) if is_id(lease_id, "lea") else None
            if lease is None:
                raise NotFound(f"there is no lease {lease_id[:64]!r}")
            return lease

    def abandon(self, caller: Caller, lease_id: str, *, reason: str) -> Lease:
        """Nobody is told of it again. It stays open, is tried now and then, and counts as residual risk (INV-04)."""
        with (
            recorded(self._database, self._clock, caller, "lease.refused", "abandon"),
            self._database.begin() as db,
        ):
            require_admin(caller)
            now = self._clock()
            lease = leases.find_lease(db, lease_id) if is_id(lease_id, "lea") else None
            if lease is None:
                raise NotFound(f"there is no lease {lease_id[:64]!r}")
            if lease.abandoned_at is not None:
                return lease
            said = {"abandoned_at": now, "abandoned_by": caller.name, "abandoned_reason": reason}
            stuck = (leases.in_state(LeaseState.STUCK), leases.not_abandoned())
            if not leases.note(db, lease.id, *stuck, **said):
                raise Conflict(
                    f"lease {lease.id} is {lease.state}: only one that is stuck can be abandoned, the others are paid"
                )
            event = Event(
                id=new_id("evt", now),
                at=now,
                type="lease.abandoned",
                actor=caller.name,
                grant_id=lease.grant_id,
                reason=reason,
                trace_id=caller.trace_id,
                data={"lease_id": lease.id, "provider": lease.provider, "attempts": lease.attempts},
            )
            record(db, [event])
            return replace(lease, abandoned_at=now, abandoned_by=caller.name, abandoned_reason=reason)


def _require_overseer(caller: Caller) -> None:
    if not (caller.has(Role.ADMIN) or caller.has(Role.AUDITOR)):
        raise RoleMissing(f"{caller.name} is neither an admin nor an auditor: only those see what is owed outside")
