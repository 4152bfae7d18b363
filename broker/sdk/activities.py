"""What was done with a grant, as it is told to the broker, and what the broker makes of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from broker.sdk.errors import invalid, printable
from broker.sdk.values import Grant, Introspection, Members, as_it_came

KINDS = ("tool", "secret_use", "request")
OUTCOMES = ("ok", "error", "denied", "unknown")
_MAX_ATTRIBUTES = 16

# What says which grant it was: its id, what the broker said of it, the claims of the token that was verified.
OfGrant = str | Grant | Introspection | Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Activity:
    """One use of a grant. It is of the grant `grant_id`, or of the one that was asked for in the trace `traceparent`.

    `id` makes it the same activity however often it is told. Never a secret: a value that looks like one is taken out
    by the broker, an attribute that is called like one is refused.
    """

    kind: str
    action: str
    at: datetime
    grant_id: str | None = None
    traceparent: str | None = None
    scope: str | None = None
    resource: str | None = None
    outcome: str = "ok"
    attributes: Mapping[str, str] = field(default_factory=dict)
    id: str = field(default_factory=lambda: os.urandom(16).hex())

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise invalid(f"an activity is one of {', '.join(KINDS)}", member="kind")
        if self.outcome not in OUTCOMES:
            raise invalid(f"an outcome is one of {', '.join(OUTCOMES)}", member="outcome")
        if self.grant_id is None and self.traceparent is None:
            raise invalid("an activity is of a grant: name it, or give the client a traceparent", member="grant_id")
        if not str(self.action):
            raise invalid("an activity has a name: say what was called", member="action")

    def as_body(self) -> dict[str, Any]:
        """As it is sent: text that is too long is cut, because what was done is worth more than its last words."""
        members = {
            "id": self.id,
            "kind": self.kind,
            "action": printable(str(self.action))[:255],
            "at": self.at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "grant_id": self.grant_id,
            "traceparent": self.traceparent,
            "scope": self.scope,
            "resource": None if self.resource is None else printable(str(self.resource))[:1000],
            "outcome": self.outcome,
            "attributes": {
                printable(str(name))[:255]: printable(str(value))[:255]
                for name, value in list(self.attributes.items())[:_MAX_ATTRIBUTES]
                if str(name) and str(value)
            },
        }
        return {name: value for name, value in members.items() if value is not None}


def grant_id_of(grant: OfGrant) -> str:
    """The id of a grant, out of whatever tells it."""
    found: object = grant
    if isinstance(grant, Grant):
        found = grant.id
    elif isinstance(grant, Introspection):
        found = grant.raw.get("grant_id")
    elif isinstance(grant, Mapping):
        found = grant.get("grant_id")
    if not isinstance(found, str) or not found:
        raise invalid("this does not say which grant it was: it has no grant_id", member="grant_id")
    return found


@dataclass(frozen=True, kw_only=True)
class RefusedActivity:
    id: str
    code: str
    detail: str

    @classmethod
    def of(cls, value: object) -> RefusedActivity:
        read = Members("refused activity", value)
        return cls(id=read.text("id"), code=read.text("code"), detail=read.text("detail"))


@dataclass(frozen=True, kw_only=True)
class Told:
    """What came of what was told. `repeated` was told before."""

    recorded: int
    repeated: int
    refused: tuple[RefusedActivity, ...]
    raw: Mapping[str, Any] = as_it_came()

    @classmethod
    def of(cls, value: object) -> Told:
        read = Members("answer about activities", value)
        return cls(
            recorded=read.integer("recorded"),
            repeated=read.integer("repeated"),
            refused=tuple(map(RefusedActivity.of, read.items("refused"))),
            raw=read.raw,
        )
