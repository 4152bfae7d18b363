"""The shape of an audit event and its canonical bytes (RFC 8785), ready to be sealed into a chain.

An event says who did what, for which task and person, why, under which policy, and how it ended. It never
holds a credential or a token (INV-30).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from broker.domain.clock import rfc3339

# Every step of a break-glass is told to everybody there is a channel to, besides being an alert. That one is asked for
# is not among them: the notice of its approval goes to the same channels.
ANNOUNCED = frozenset(
    {
        "break_glass.voted",
        "break_glass.approved",
        "break_glass.collected",
        "break_glass.ended",
        "review.overdue",
        "review.completed",
    }
)
# What somebody has to hear of at once, and not when they next look. A break-glass that was refused is not among them:
# whoever is refused decides how often, and a flood is how an alert that counts is hidden.
ALERTING = frozenset(
    {
        "lease.stuck",
        "lease.found",
        "lease.gone",
        "login.found",
        "redecision.undecided",
        "agent.locked_down",
        "break_glass.requested",
    }
    | ANNOUNCED
)

# What an agent was refused that it may not have, or that is not there for it. Not what it may ask again (a limit, a
# task that ended meanwhile, a store that did not answer), nor a lockdown, which may be no fault of its own.
DENIAL_TYPES = ("grant.denied", "grant.refused", "grant.renewal_refused", "approval.refused", "break_glass.refused")
DENIAL_OUTCOMES = ("denied", "forbidden", "role_missing", "not_found", "invalid_target", "invalid_scope")


@dataclass(frozen=True, kw_only=True)
class Event:
    """One change or one refusal; `type` is `noun.verb`, the same word in metric and log."""

    id: str
    at: datetime
    type: str
    actor: str
    outcome: str = "ok"
    task_id: str | None = None
    grant_id: str | None = None
    agent: str | None = None
    user: str | None = None
    resource: str | None = None
    reason: str | None = None
    policy_version: int | None = None
    trace_id: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Every member, absent ones as null, so that two versions of us hash the same event alike."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {
            "at": rfc3339(self.at),
            "data": dict(self.data),
        }

    def canonical(self) -> bytes:
        """UTF-8 JSON, members sorted, no white space: equal events give equal bytes."""
        return canonical_json(self.as_json())


def canonical_json(value: Any) -> bytes:
    """RFC 8785 for the JSON we make: strings, integers, booleans, null, lists, objects.

    A float is a TypeError: its textual form is where canonicalisations disagree.

    >>> canonical_json({"b": [1, None], "a": "é"})
    b'{"a":"\\xc3\\xa9","b":[1,null]}'
    """
    _refuse_floats(value)
    # RFC 8785 sorts by UTF-16 code units and Python by code point; they agree below U+10000, and the
    # names of members are ours and ASCII.
    return _encode(value).encode()


_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode
_PLAIN = frozenset({str, int, bool, type(None)})


def _refuse_floats(value: Any) -> None:
    if type(value) in _PLAIN:
        return  # most of what there is, and what kind it is in general takes longest to say
    if isinstance(value, float):
        raise TypeError(f"{value!r} has no canonical form: use an integer or a string")
    if isinstance(value, Mapping):
        for item in value.values():
            _refuse_floats(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_floats(item)
