"""Who calls, and what things are called: principals, attested identities, and prefixed ids.

An identity is a configured issuer and an immutable subject, compared exactly (INV-17); the name of a
principal is only how our configuration speaks of it.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import lru_cache
from typing import Any, NewType, Protocol

TaskId = NewType("TaskId", str)
GrantId = NewType("GrantId", str)
LeaseId = NewType("LeaseId", str)
EventId = NewType("EventId", str)

_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"
# Two digits at a time: an id is made for every row and every event.
_PAIRS = tuple(high + low for high in _CROCKFORD for low in _CROCKFORD)
_SHIFTS = range(70, -1, -10)  # of what follows the milliseconds
_COUNTER = itertools.count()
_ID = re.compile(r"(task|grt|lea|apr|evt|lck|sig|rev|act|stm|set)_[0-7][0-9a-hjkmnp-tv-z]{25}")


class Role(StrEnum):
    """What a principal may do; one principal may have several."""

    AGENT = "agent"
    ORCHESTRATOR = "orchestrator"
    APPROVER = "approver"
    ADMIN = "admin"
    AUDITOR = "auditor"
    VERIFIER = "verifier"
    SENTINEL = "sentinel"


def new_id(prefix: str, at: datetime) -> str:
    """A UUIDv7 (RFC 9562) in Crockford base32 behind a prefix: it sorts by when it was made.

    Our times are whole seconds, so a counter orders what one process makes within one (RFC 9562, section 6.2).

    >>> from datetime import UTC
    >>> first = new_id("grt", datetime(2026, 1, 1, tzinfo=UTC))
    >>> first[:8], len(first), first < new_id("grt", datetime(2026, 1, 2, tzinfo=UTC))
    ('grt_01kd', 30, True)
    """
    count = next(_COUNTER) & 0x3FF_FFFF
    value = 0x7 << 76 | (count >> 14) << 64 | 0b10 << 62 | (count & 0x3FFF) << 48 | int.from_bytes(os.urandom(6))
    return f"{prefix}_{_milliseconds(at)}" + "".join([_PAIRS[(value >> shift) & 1023] for shift in _SHIFTS])


def first_id(prefix: str, at: datetime) -> str:
    """What sorts before every id that is made from this moment on, and after all from before it."""
    return f"{prefix}_{_milliseconds(at)}"


@lru_cache(maxsize=8)
def _milliseconds(at: datetime) -> str:
    """The first 50 of the 130 bits, the same for all that is made in one second."""
    value = int(at.timestamp() * 1000) & 0xFFFF_FFFF_FFFF
    return "".join([_PAIRS[(value >> shift) & 1023] for shift in range(40, -1, -10)])


def is_id(text: str, prefix: str) -> bool:
    """Whether this could be one of our ids, so that nothing else ever reaches a query.

    >>> is_id("task_../../etc/passwd", "task")
    False
    """
    # fullmatch: with match and "$" a trailing newline walks in (INV-31).
    found = _ID.fullmatch(text)
    return found is not None and found[1] == prefix


@dataclass(frozen=True, kw_only=True)
class WorkloadIdentity:
    """What was attested: only verification makes one, so holding it means the token was checked."""

    issuer: str  # the configured name, not what the token calls itself
    subject: str
    claims: Mapping[str, Any]
    expires_at: datetime


@dataclass(frozen=True, kw_only=True)
class Principal:
    """Whoever calls, as configuration knows it."""

    name: str
    kind: str
    issuer: str
    subject: str
    roles: frozenset[Role]
    owner: str | None = None
    groups: frozenset[str] = frozenset()
    attributes: Mapping[str, str | int | bool] = field(default_factory=dict)
    implicit_tasks: bool = False


@dataclass(frozen=True, kw_only=True)
class User:
    """A person on whose behalf something is asked for: `<issuer's configured name>:<subject>`, until their token ends.

    `resources` and `scopes` are all that they asked it for; None is no such limit. `for_one` says that the token names
    who may use it, so that nobody else may act by it. `attributes` are what it says of them and configuration lets in.
    """

    name: str
    expires_at: datetime
    resources: frozenset[str] | None = None
    scopes: frozenset[str] | None = None
    for_one: bool = False
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class Actor(Protocol):
    """Whoever does something, as an audit event names them: a caller, or the broker itself."""

    @property
    def name(self) -> str: ...

    @property
    def trace_id(self) -> str | None: ...


@dataclass(frozen=True, kw_only=True)
class Caller:
    """An authenticated principal in one request. `proof_expires_at` is when its workload token ends (INV-08)."""

    principal: Principal
    proof_expires_at: datetime
    trace_id: str | None = None
    identity: WorkloadIdentity | None = None
    catalogue_version: int = 0

    @property
    def name(self) -> str:
        return self.principal.name

    def has(self, role: Role) -> bool:
        return role in self.principal.roles
