"""The state machines, and what "live" means.

A state changes through one door (`broker.store.transitions`), which reads `sources` here: what is not
drawn cannot happen. "Live" is never stored.

::

    Task      active ──▶ completed | failed | cancelled | expired
    Grant     pending ──▶ approved ──▶ active ──▶ revoked | expired
                 │            └──────▶ failed | revoked | expired
                 └──▶ denied | expired
    Lease     intended ──▶ held ──▶ revoking ──▶ released
                 └──────────────────▶ │    └──▶ stuck ──▶ released | revoking
    Approval  open ──▶ approved | denied | expired | withdrawn
    Review    owed ──▶ overdue ──▶ completed        owed ──▶ completed
    Key       next ──▶ current ──▶ retired          any ──▶ compromised
    Stream    enabled ◀──▶ paused ◀──▶ disabled ◀──▶ enabled
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum


class TaskState(StrEnum):
    ACTIVE = "active"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class GrantState(StrEnum):
    PENDING = "pending"
    APPROVED = "approved"
    ACTIVE = "active"
    DENIED = "denied"
    FAILED = "failed"
    REVOKED = "revoked"
    EXPIRED = "expired"


class LeaseState(StrEnum):
    INTENDED = "intended"
    HELD = "held"
    REVOKING = "revoking"
    RELEASED = "released"
    STUCK = "stuck"


class ApprovalState(StrEnum):
    OPEN = "open"
    APPROVED = "approved"
    DENIED = "denied"
    EXPIRED = "expired"
    WITHDRAWN = "withdrawn"


class ReviewState(StrEnum):
    OWED = "owed"
    OVERDUE = "overdue"
    COMPLETED = "completed"


class KeyState(StrEnum):
    NEXT = "next"
    CURRENT = "current"
    RETIRED = "retired"
    COMPROMISED = "compromised"


class StreamState(StrEnum):
    ENABLED = "enabled"
    PAUSED = "paused"
    DISABLED = "disabled"


# For each state, the states it may be reached from. No entry leads out of an ended state: that
# revocation is monotone (INV-23) is the shape of this table.
_DRAWN: tuple[tuple[StrEnum, frozenset[StrEnum]], ...] = (
    (TaskState.COMPLETED, frozenset({TaskState.ACTIVE})),
    (TaskState.FAILED, frozenset({TaskState.ACTIVE})),
    (TaskState.CANCELLED, frozenset({TaskState.ACTIVE})),
    (TaskState.EXPIRED, frozenset({TaskState.ACTIVE})),
    (GrantState.APPROVED, frozenset({GrantState.PENDING})),
    (GrantState.DENIED, frozenset({GrantState.PENDING})),
    (GrantState.ACTIVE, frozenset({GrantState.APPROVED})),
    (GrantState.FAILED, frozenset({GrantState.APPROVED})),
    (GrantState.REVOKED, frozenset({GrantState.PENDING, GrantState.APPROVED, GrantState.ACTIVE})),
    (GrantState.EXPIRED, frozenset({GrantState.PENDING, GrantState.APPROVED, GrantState.ACTIVE})),
    (LeaseState.HELD, frozenset({LeaseState.INTENDED})),
    (LeaseState.REVOKING, frozenset({LeaseState.INTENDED, LeaseState.HELD, LeaseState.STUCK})),
    (LeaseState.RELEASED, frozenset({LeaseState.REVOKING, LeaseState.STUCK})),
    (LeaseState.STUCK, frozenset({LeaseState.REVOKING})),
    (ApprovalState.APPROVED, frozenset({ApprovalState.OPEN})),
    (ApprovalState.DENIED, frozenset({ApprovalState.OPEN})),
    (ApprovalState.EXPIRED, frozenset({ApprovalState.OPEN})),
    (ApprovalState.WITHDRAWN, frozenset({ApprovalState.OPEN})),
    (ReviewState.OVERDUE, frozenset({ReviewState.OWED})),
    (ReviewState.COMPLETED, frozenset({ReviewState.OWED, ReviewState.OVERDUE})),
    (KeyState.CURRENT, frozenset({KeyState.NEXT})),
    (KeyState.RETIRED, frozenset({KeyState.CURRENT})),
    (KeyState.COMPROMISED, frozenset({KeyState.NEXT, KeyState.CURRENT, KeyState.RETIRED})),
    (StreamState.ENABLED, frozenset({StreamState.PAUSED, StreamState.DISABLED})),
    (StreamState.PAUSED, frozenset({StreamState.ENABLED, StreamState.DISABLED})),
    (StreamState.DISABLED, frozenset({StreamState.ENABLED, StreamState.PAUSED})),
)

# Members of different StrEnums with the same text are equal, so the machine is part of the key.
_SOURCES: Mapping[tuple[type[StrEnum], StrEnum], frozenset[StrEnum]] = {
    (type(state), state): reachable_from for state, reachable_from in _DRAWN
}


def sources(to: StrEnum) -> frozenset[StrEnum]:
    """The states from which `to` may be reached; empty for a state things are only born in."""
    return _SOURCES.get((type(to), to), frozenset())


def is_live(
    *,
    grant: GrantState,
    expires_at: datetime,
    task: TaskState,
    deadline_at: datetime,
    locked_down: bool,
    now: datetime,
) -> bool:
    """Whether a grant opens anything at `now`; every doubt was resolved to False before this is asked.

    An ended ancestor ends its descendants in the same transaction (INV-11), so the grant's own state
    speaks for the tree.
    """
    return (
        grant is GrantState.ACTIVE
        and task is TaskState.ACTIVE
        and now < expires_at
        and now < deadline_at
        and not locked_down
    )
