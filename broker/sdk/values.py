"""What the broker answers to agents and orchestrators, as frozen values. The others are in `broker.sdk.oversight`.

An unknown member is kept in `raw`; one we need and miss is an error. `raw` is the object as it came, except of a
credential: that one never keeps a second copy of the secret.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

from broker.sdk.errors import not_the_broker
from broker.sdk.secret import Secret

T = TypeVar("T")


def as_it_came() -> Any:
    return field(repr=False, compare=False, default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    id: str
    state: str
    purpose: str
    agents: tuple[str, ...]
    orchestrator: str
    created_at: datetime
    deadline_at: datetime
    heartbeat_s: int | None = None
    ended_at: datetime | None = None
    reason: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    parent_task_id: str | None = None
    on_behalf_of: str | None = None
    raw: Mapping[str, Any] = as_it_came()

    @classmethod
    def of(cls, value: object) -> Task:
        read = Members("task", value)
        return cls(
            id=read.text("id"),
            state=read.text("state"),
            purpose=read.text("purpose"),
            agents=read.texts("agents"),
            orchestrator=read.text("orchestrator"),
            created_at=read.time("created_at"),
            deadline_at=read.time("deadline_at"),
            heartbeat_s=read.maybe_integer("heartbeat_s"),
            ended_at=read.maybe_time("ended_at"),
            reason=read.maybe_text("reason"),
            labels=read.mapping("labels"),
            parent_task_id=read.maybe_text("parent_task_id"),
            on_behalf_of=read.maybe_text("on_behalf_of"),
            raw=read.raw,
        )


@dataclass(frozen=True, kw_only=True)
class Decision:
    outcome: str
    policies: tuple[str, ...]
    policy_version: int | None
    reasons: tuple[str, ...]
    raw: Mapping[str, Any] = as_it_came()

    @classmethod
    def of(cls, value: object) -> Decision:
        read = Members("decision", value)
        return cls(
            outcome=read.text("outcome"),
            policies=read.texts("policies"),
            policy_version=read.maybe_integer("policy_version"),
            reasons=read.texts("reasons"),
            raw=read.raw,
        )


@dataclass(frozen=True, kw_only=True)
class Lease:
    """What the broker owes the system that made a grant's secret. Dead is what has a `confirmed_dead_at`.

    As a member of a grant it has the first six members only.
    """

    id: str
    state: str
    attempts: int
    confirmed_dead_at: datetime | None
    last_error: str | None
    abandoned_at: datetime | None
    grant_id: str | None = None
    provider: str | None = None
    revocation_class: str | None = None
    owed_since: datetime | None = None
    next_attempt_at: datetime | None = None
    created_at: datetime | None = None
    expires_at: datetime | None = None
    abandoned_by: str | None = None
    abandoned_reason: str | None = None
    raw: Mapping[str, Any] = as_it_came()

    @classmethod
    def of(cls, value: object) -> Lease:
        read = Members("lease", value)
        return cls(
            id=read.text("id"),
            state=read.text("state"),
            attempts=read.integer("attempts"),
            confirmed_dead_at=read.maybe_time("confirmed_dead_at"),
            last_error=read.maybe_text("last_error"),
            abandoned_at=read.maybe_time("abandoned_at"),
            grant_id=read.maybe_text("grant_id"),
            provider=read.maybe_text("provider"),
            revocation_class=read.maybe_text("revocation_class"),
            owed_since=read.maybe_time("owed_since"),
            next_attempt_at=read.maybe_time("next_attempt_at"),
            created_at=read.maybe_time("created_at"),
            expires_at=read.maybe_time("expires_at"),
            abandoned_by=read.maybe_text("abandoned_by"),
            abandoned_reason=read.maybe_text("abandoned_reason"),
            raw=read.raw,
        )


@dataclass(frozen=True, kw_only=True)
class Grant:
    id: str
    task_id: str
    agent: str
    resource: str
    scopes: tuple[str, ...]
    state: str
    live: bool
    expires_at: datetime | None
    issued_at: datetime | None = None
    renewable_until: datetime | None = None
    ttl_s: int | None = None
    ttl_decided_by: str | None = None
    jti: str | None = None
    provider: str | None = None
    revocation_class: str | None = None
    parent_grant_id: str | None = None
    chain: tuple[str, ...] = ()
    on_behalf_of: str | None = None
    break_glass: Mapping[str, Any] | None = None
    decision: Decision | None = None
    revoked_at: datetime | None = None
    revoked_by: str | None = None
    reason: str | None = None
    lease: Lease | None = None
    raw: Mapping[str, Any] = as_it_came()

    @classmethod
    def of(cls, value: object) -> Grant:
        read = Members("grant", value)
        decision, lease = read.raw.get("decision"), read.raw.get("lease")
        return cls(
            id=read.text("id"),
            task_id=read.text("task_id"),
            agent=read.text("agent"),
            resource=read.text("resource"),
            scopes=read.texts("scopes"),
            state=read.text("state"),
            # Anything but an explicit true is "not live" (INV-24).
            live=read.raw.get("live") is True,
            expires_at=read.maybe_time("expires_at"),
            issued_at=read.maybe_time("issued_at"),
            renewable_until=read.maybe_time("renewable_until"),
            ttl_s=read.maybe_integer("ttl_s"),
            ttl_decided_by=read.maybe_text("ttl_decided_by"),
            jti=read.maybe_text("jti"),
            provider=read.maybe_text("provider"),
            revocation_class=read.maybe_text("revocation_class"),
            parent_grant_id=read.maybe_text("parent_grant_id"),
            chain=read.texts("chain") if "chain" in read.raw else (),
            on_behalf_of=read.maybe_text("on_behalf_of"),
            break_glass=read.mapping("break_glass") or None,
            decision=Decision.of(decision) if decision else None,
            revoked_at=read.maybe_time("revoked_at"),
            revoked_by=read.maybe_text("revoked_by"),
            reason=read.maybe_text("reason"),
            lease=Lease.of(lease) if lease else None,
            raw=read.raw,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Credential:
    """The secret itself: a `token`, or for a provider's secret `data`. Shown by `reveal` and `reveal_data` only.

    `life_s` is what was left of it, by the broker's own clock, when the broker answered.
    """

    type: str
    token: Secret | None = None
    data: Secret | None = None
    token_type: str | None = None
    expires_at: datetime
    life_s: float

    @classmethod
    def of(cls, value: object, *, answered_at: datetime) -> Credential:
        read = Members("credential", value)
        token, data = read.raw.get("token"), read.raw.get("data")
        if token is None and not isinstance(data, Mapping):
            raise not_the_broker("a credential came without token and without data")
        expires_at = read.time("expires_at")
        return cls(
            type=read.text("type"),
            token=None if token is None else Secret(read.text("token")),
            data=Secret(json.dumps(data)) if isinstance(data, Mapping) else None,
            token_type=read.maybe_text("token_type"),
            expires_at=expires_at,
            life_s=(expires_at - answered_at).total_seconds(),
        )

    def reveal(self) -> str:
        """The token."""
        if self.token is None:
            raise TypeError(f"a credential of type {self.type} has no token: use reveal_data()")
        return self.token.reveal()

    def reveal_data(self) -> dict[str, Any]:
        """What a provider's secret consists of, e.g. user name and password."""
        if self.data is None:
            raise TypeError(f"a credential of type {self.type} has no data: use reveal()")
        found: dict[str, Any] = json.loads(self.data.reveal())
        return found

    def __reduce__(self) -> Any:
        raise TypeError("a Credential is not pickled or copied")


@dataclass(frozen=True, kw_only=True)
class Introspection:
    """RFC 7662; `raw` has the claims. Anything but an explicit true is "not active" (INV-24)."""

    active: bool
    raw: Mapping[str, Any] = as_it_came()

    @classmethod
    def of(cls, value: object) -> Introspection:
        read = Members("introspection", value)
        return cls(active=read.raw.get("active") is True, raw=read.raw)


@dataclass(frozen=True, kw_only=True)
class Page(Generic[T]):
    items: tuple[T, ...]
    next_cursor: str | None


class Members:
    """One JSON object, read by name; what is missing or of another type is named, its value is not."""

    def __init__(self, what: str, value: object) -> None:
        if not isinstance(value, Mapping):
            raise not_the_broker(f"where a {what} should be there is no JSON object")
        self.what = what
        self.raw: Mapping[str, Any] = value

    def text(self, name: str) -> str:
        return self._typed(name, str)

    def integer(self, name: str) -> int:
        return self._typed(name, int)

    def boolean(self, name: str) -> bool:
        return self._typed(name, bool)

    def time(self, name: str) -> datetime:
        text = self.text(name)
        try:
            at = datetime.fromisoformat(text)
        except ValueError:
            raise self._wrong(name) from None
        if at.tzinfo is None:
            raise self._wrong(name)
        return at.astimezone(UTC)

    def maybe_text(self, name: str) -> str | None:
        return None if self.raw.get(name) is None else self.text(name)

    def maybe_integer(self, name: str) -> int | None:
        return None if self.raw.get(name) is None else self.integer(name)

    def maybe_time(self, name: str) -> datetime | None:
        return None if self.raw.get(name) is None else self.time(name)

    def mapping(self, name: str) -> Mapping[str, Any]:
        """Empty where it is absent."""
        return {} if self.raw.get(name) is None else self._typed(name, dict)

    def needed_mapping(self, name: str) -> Mapping[str, Any]:
        return self._typed(name, dict)

    def items(self, name: str) -> list[Any]:
        return self._typed(name, list)

    def texts(self, name: str) -> tuple[str, ...]:
        found = self.items(name)
        if not all(isinstance(item, str) for item in found):
            raise self._wrong(name)
        return tuple(found)

    def _typed(self, name: str, kind: type[T]) -> T:
        value = self.raw.get(name)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self._wrong(name)
        return value

    def _wrong(self, name: str) -> Exception:
        return not_the_broker(f"the {self.what}'s {name} is missing or not what the protocol says")
