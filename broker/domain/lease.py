"""A lease: what we owe one outside provider for one grant, and when it may be called paid.

It is paid (`released`) when the outside confirmed the credential dead, and not before (INV-04). What nobody heard of
is owed until it can no longer appear; what cannot be revoked is owed until it ends by itself.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import IntEnum, StrEnum
from typing import Any

from broker.domain.lifecycle import LeaseState

STUCK_AFTER = 6  # failures; then somebody is told, and we go on trying
_SHORTEST, _LONGEST = timedelta(seconds=1), timedelta(seconds=60)


class RevocationClass(StrEnum):
    """What a confirmed revocation means for whoever holds the credential."""

    HARD = "hard"  # dead when confirmed
    BOUNDED = "bounded"  # dead within the time `Handle.bound` says after it was confirmed
    TTL_ONLY = "ttl_only"  # lives until its own expiry, whatever is done


class Urgency(IntEnum):
    """Which debt is paid first; a mass expiry never comes before what somebody is afraid of (INV-27)."""

    URGENT = 0  # an admin, a compromise, something nobody owns
    ENDED = 1  # the task ended, or the credential was handed back
    EXPIRED = 2  # time ended it


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """As it was when it was read.

    `unknown` says that a secret may exist whose `reference` nobody heard. `expires_at` is when whatever was made under
    it is over by itself. `dead_at` is set when the outside confirmed its end: from then on only time is waited for.
    `fence` counts how often it was claimed for paying, so that a worker that was superseded changes nothing (INV-07).
    """

    id: str
    grant_id: str | None
    provider: str
    settings: Mapping[str, Any]
    state: LeaseState
    revocation_class: str | None = None
    bound_s: int | None = None
    handle: str | None = None
    reference: str | None = None
    unknown: bool = False
    facts: Mapping[str, str] = field(default_factory=dict)
    created_at: datetime
    issue_by: datetime
    expires_at: datetime
    settles_at: datetime | None = None
    urgency: int
    attempts: int = 0
    next_attempt_at: datetime | None = None
    fence: int = 0
    last_error: str | None = None
    dead_at: datetime | None = None
    abandoned_at: datetime | None = None
    abandoned_by: str | None = None
    abandoned_reason: str | None = None

    @property
    def confirmed_dead_at(self) -> datetime | None:
        return self.dead_at if self.state is LeaseState.RELEASED else None

    def exposed_until(self, now: datetime) -> datetime | None:
        """When it opens nothing any more at the latest; None if that is past, or if nobody can say (INV-04)."""
        if self.state is LeaseState.RELEASED:
            return None
        until = self.dead_at or self.expires_at
        return until if until > now else None


def dead_at(lease: Lease, *, confirmed_at: datetime) -> datetime:
    """When the credential is dead, now that the outside confirmed at this moment that it took it back."""
    match lease.revocation_class:
        case RevocationClass.HARD:
            return confirmed_at
        case RevocationClass.BOUNDED if lease.bound_s is not None:
            return max(confirmed_at, min(confirmed_at + timedelta(seconds=lease.bound_s), lease.expires_at))
    # A class nobody told is the worst there is.
    return max(confirmed_at, lease.expires_at)


def next_attempt(failures: int, *, now: datetime, chance: float | None = None) -> datetime:
    """When to try again after so many failures: full jitter below a ceiling that doubles from 1 s to 60 s, for ever.

    `chance` is from 0 to 1, at random if it is not given.
    """
    ceiling = min(_LONGEST, _SHORTEST * 2 ** min(failures, 16))
    part = random.random() if chance is None else chance  # noqa: S311 - spreads load, guards nothing
    return now + max(_SHORTEST, timedelta(seconds=round(ceiling.total_seconds() * part)))
