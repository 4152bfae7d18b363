"""What ending authority answers: each credential, when its authority ended, and until when it is exposed.

Authority ends at one commit, and introspection refuses from there. A verifier that works offline learns of it
within `OFFLINE_BOUND`; until then the credential counts as exposed, and nobody is told otherwise. A secret from outside
is dead when its lease says so; where neither a time of death nor an end of exposure is told, nobody knows one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol

from broker.domain.clock import rfc3339
from broker.domain.lease import Lease, RevocationClass

# The published bound: how old a status list may be, its time in our own memory included.
OFFLINE_BOUND = timedelta(seconds=15)
# How long a commit may take after its time was read. Nobody else can know what ended within that, so whatever is said
# offline is believed for this much less than the bound (INV-25).
COMMITTED_WITHIN = timedelta(seconds=3)


@dataclass(frozen=True, kw_only=True)
class ReceiptLine:
    grant_id: str
    agent: str
    resource: str
    provider: str
    revocation_class: str
    authority_ended_at: datetime | None
    confirmed_dead_at: datetime | None
    exposed_until: datetime | None

    def as_json(self) -> dict[str, Any]:
        return {
            "grant_id": self.grant_id,
            "agent": self.agent,
            "resource": self.resource,
            "provider": self.provider,
            "revocation_class": self.revocation_class,
            "authority_ended_at": _time(self.authority_ended_at),
            "confirmed_dead_at": _time(self.confirmed_dead_at),
            "exposed_until": _time(self.exposed_until),
        }


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """`outcome` is the task's state, or "revoked" where grants were ended without it.

    With `ended`, so many were ended just now and `lines` are only samples of them.
    """

    task_id: str | None
    ended_at: datetime | None
    outcome: str
    lines: Sequence[ReceiptLine]
    ended: int | None = None

    def as_json(self) -> dict[str, Any]:
        dead = sum(line.confirmed_dead_at is not None for line in self.lines) if self.ended is None else 0
        ended = sum(line.authority_ended_at is not None for line in self.lines) if self.ended is None else self.ended
        issued = len(self.lines) if self.ended is None else self.ended
        return {
            "task_id": self.task_id,
            "ended_at": _time(self.ended_at),
            "outcome": self.outcome,
            "grants": [line.as_json() for line in self.lines],
            "totals": {"ended": ended, "confirmed_dead": dead, "outstanding": issued - dead},
        }


class ReceiptFacts(Protocol):
    """What a receipt says of a grant: the whole of one, or a row with these columns alone."""

    @property
    def id(self) -> str: ...
    @property
    def agent(self) -> str: ...
    @property
    def resource(self) -> str: ...
    @property
    def provider(self) -> str: ...
    @property
    def expires_at(self) -> datetime: ...
    @property
    def revoked_at(self) -> datetime | None: ...


RECEIPT_FACTS = ("id", "agent", "resource", "provider", "expires_at", "revoked_at")


def receipt_line(
    grant: ReceiptFacts, *, ended_at: datetime | None, now: datetime, lease: Lease | None = None
) -> ReceiptLine:
    """One issued grant as it stands at `now`. `ended_at` is when its task or a revocation over it ended it, if one did.

    A token dies by its own expiry at the latest, and without a revocation exactly then; a secret with its `lease`.
    """
    ends = [at for at in (ended_at, grant.revoked_at, grant.expires_at if grant.expires_at <= now else None) if at]
    authority_ended_at = min(ends) if ends else None
    if lease is not None:
        return ReceiptLine(
            grant_id=grant.id,
            agent=grant.agent,
            resource=grant.resource,
            provider=grant.provider,
            revocation_class=lease.revocation_class or str(RevocationClass.TTL_ONLY),
            authority_ended_at=authority_ended_at,
            confirmed_dead_at=lease.confirmed_dead_at,
            exposed_until=lease.exposed_until(now),
        )
    exposed_until = grant.expires_at
    if authority_ended_at is not None:
        exposed_until = min(grant.expires_at, authority_ended_at + OFFLINE_BOUND)
    dead = authority_ended_at is not None and exposed_until <= now
    return ReceiptLine(
        grant_id=grant.id,
        agent=grant.agent,
        resource=grant.resource,
        provider=grant.provider,
        revocation_class="bounded",
        authority_ended_at=authority_ended_at,
        confirmed_dead_at=exposed_until if dead else None,
        exposed_until=None if dead else exposed_until,
    )


def _time(at: datetime | None) -> str | None:
    return None if at is None else rfc3339(at)
