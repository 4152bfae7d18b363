"""What is owed outside, for people to see; and the one thing they may say about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime

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


@dataclass(frozen=True, kw_only=True)
class Outstanding:
    """Leases that are not released, by (provider, state); and by provider how old the oldest debt is."""

    counts: Mapping[tuple[str, str], int]
    oldest_s: Mapping[str, float]


class Leases:
    def __init__(self, *, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def page(
        self, caller: Caller, filters: Mapping[str, str], *, before: str | None = None, limit: int = 100
    ) -> list[tuple[Lease, datetime | None]]:
        """Each with since when it is owed, if it is; newest first, below the id `before`."""
        with recorded(self._database, self._clock, caller, "lease.refused", "list"):
            _require_overseer(caller)
        with self._database.read() as db:
            found = leases.page_of_leases(db, where=leases.matching(**filters), before=before, limit=limit)
            since = leases.owed_since(db, [lease.id for lease in found])
        return [(lease, since.get(lease.id)) for lease in found]

    def find(self, caller: Caller, lease_id: str) -> tuple[Lease, datetime | None]:
        """The lease, and since when it is owed, if it is."""
        with recorded(self._database, self._clock, caller, "lease.refused", "show"):
            _require_overseer(caller)
            with self._database.read() as db:
                lease = leases.find_lease(db, lease_id) if is_id(lease_id, "lea") else None
                since = {} if lease is None else leases.owed_since(db, [lease.id])
            if lease is None:
                raise NotFound(f"there is no lease {lease_id[:64]!r}")
            return lease, since.get(lease.id)

    def abandon(self, caller: Caller, lease_id: str, *, reason: str) -> tuple[Lease, datetime | None]:
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
            since = leases.owed_since(db, [lease.id]).get(lease.id)
            if lease.abandoned_at is not None:
                return lease, since
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
            return replace(lease, abandoned_at=now, abandoned_by=caller.name, abandoned_reason=reason), since

    def measure(self) -> Outstanding:
        """What is owed outside at this moment, for those who watch."""
        with self._database.read() as db:
            counts, oldest = leases.count_by_state(db), leases.oldest_owed(db)
        now = self._clock()
        ages = {provider: max(0.0, (now - since).total_seconds()) for provider, since in oldest.items()}
        return Outstanding(counts=counts, oldest_s=ages)


def _require_overseer(caller: Caller) -> None:
    if not (caller.has(Role.ADMIN) or caller.has(Role.AUDITOR)):
        raise RoleMissing(f"{caller.name} is neither an admin nor an auditor: only those see what is owed outside")
