"""A grant, what was asked for it, and what is handed out for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from broker.domain.identity import Caller, Principal, User
from broker.domain.lease import Lease
from broker.domain.lifecycle import GrantState
from broker.domain.secret import Secret, SecretData

# No break-glass lives longer, whatever anybody configures.
BREAK_GLASS_LIFE = timedelta(minutes=15)
# And no agent has more of them open, since each is told to everybody.
OPEN_BREAK_GLASSES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Authority:
    """What of a grant says whose it is, what it opens, and what may stand over it: all that verifying asks."""

    id: str
    task_id: str
    era: int
    state: GrantState
    agent: str
    issuer: str  # with `subject`, who exactly holds it: a name may stand for many workloads (INV-17)
    subject: str
    orchestrator: str
    on_behalf_of: str | None
    resource: str
    scopes: tuple[str, ...]
    provider: str
    kids: tuple[str, ...]  # every key that signed a token of it
    policies: tuple[str, ...]  # every policy by which a token of it was allowed
    chain: tuple[str, ...] = ()  # the agents that handed it down, the root first
    tasks_above: tuple[str, ...] = ()  # of which its task is a part
    orchestrators_above: tuple[str, ...] = ()  # who opened those
    expires_at: datetime

    @property
    def subject_name(self) -> str:
        """Whose authority it is: the user's on whose behalf, or that of the agent it was first issued to."""
        return self.on_behalf_of or (self.chain[0] if self.chain else self.agent)

    @property
    def actors(self) -> tuple[str, ...]:
        """Who acts for that subject: the agent that holds it first, then each that handed it down, the root last."""
        acting = (self.agent, *reversed(self.chain))
        return acting if self.on_behalf_of is not None else acting[:-1]

    def is_held_by(self, principal: Principal) -> bool:
        """Whether this very workload holds it, and not only one of the same name (INV-17)."""
        held_by = (principal.name, principal.issuer, principal.subject)
        return (self.agent, self.issuer, self.subject) == held_by

    def on_axis(self, axis: str) -> tuple[str, ...]:
        """What this grant is along an axis of revocation; `broker.domain.refusal` compares it."""
        match axis:
            case "task":
                return (self.task_id, *self.tasks_above)
            case "agent":
                # What is refused to an agent is refused to whoever has it from that agent.
                return (self.agent, *self.chain)
            case "user":
                return () if self.on_behalf_of is None else (self.on_behalf_of,)
            case "orchestrator":
                return (self.orchestrator, *self.orchestrators_above)
            case "resource":
                return (self.resource,)
            case "provider":
                return (self.provider,)
            case "policy":
                return self.policies
            case "key":
                return self.kids
            case _:
                raise ValueError(f"{axis!r} is not an axis of revocation")


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant(Authority):
    """As it was when it was read. Whether it is live is another question: `broker.domain.lifecycle.is_live`."""

    parent_grant_id: str | None
    jti: str | None
    jkt: str | None
    credential_sha256: str | None
    status_list: int | None
    status_index: int | None
    created_at: datetime
    issued_at: datetime | None
    renewable_until: datetime | None
    ttl_s: int
    ttl_decided_by: str
    intent: str | None
    claimed: Mapping[str, Any]
    request_sha256: str
    decision: Mapping[str, Any]
    policy_version: int | None
    terms: Mapping[str, Any] | None  # what else the decision looked at; None where none was kept yet
    trace_id: str | None
    hand_to: tuple[str, ...] = ()  # the agents that its holder lets have a part of it
    break_glass: str | None = None  # why it was asked for as a break-glass, in the agent's words; None where it was not
    revoked_at: datetime | None = None
    revoked_by: str | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class GrantRequest:
    """What one caller asks for. `task_id` absent asks for an implicit task.

    `parameters` are for the provider of the resource, which has a closed set of them. `takes_secrets` says that the
    answer can carry something else than a token, `may_wait` that it can say that people are asked first.
    `parent_grant_id` is the grant that is handed down, which somebody may have named by presenting its token.
    `break_glass` asks for what only an emergency opens, and says why.
    """

    caller: Caller
    resource: str
    scopes: frozenset[str]
    task_id: str | None = None
    ttl: timedelta | None = None
    intent: str | None = None
    claimed: Mapping[str, Any] = field(default_factory=dict)
    jkt: str | None = None
    parameters: Mapping[str, str] = field(default_factory=dict, repr=False)
    takes_secrets: bool = False
    hand_to: tuple[str, ...] = ()
    parent_grant_id: str | None = None
    parent_by_token: bool = False
    user: User | None = None
    may_wait: bool = False
    break_glass: str | None = None
    idempotency: IdempotencyClaim | None = None


@dataclass(frozen=True, kw_only=True)
class IdempotencyClaim:
    """A caller's idempotency key and the body it came with, both as lower-case hex SHA-256 (INV-06)."""

    key_sha256: str
    request_sha256: str


@dataclass(frozen=True, kw_only=True)
class Credential:
    """A token of ours: it exists in memory, once, and is handed out only after its grant is durable (INV-01)."""

    type: str
    token: Secret
    token_type: str
    expires_at: datetime


@dataclass(frozen=True, kw_only=True)
class DynamicSecret:
    """A secret from outside, under the same rule. `type` is the engine that made it."""

    type: str
    data: SecretData
    expires_at: datetime


@dataclass(frozen=True, kw_only=True)
class Issued:
    grant: Grant
    credential: Credential | DynamicSecret
    lease: Lease | None = None

    @property
    def token(self) -> Credential:
        """The credential where it must be a token: whoever asks for one refuses other resources before."""
        if not isinstance(self.credential, Credential):
            raise TypeError(f"the credential of {self.grant.id} is no token")
        return self.credential


def joined(names: Iterable[str], *more: str) -> tuple[str, ...]:
    """Names of keys or policies with more of them, each once: what a grant dies with only grows."""
    return tuple(dict.fromkeys([*names, *more]))
