"""What the broker answers to approvers, admins and auditors, as frozen values; by the rules of `broker.sdk.values`.

Loaded when the first of them is wanted: making these classes takes as long as a tenth of all that an agent waits for
before its first credential, and an agent meets none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from broker.sdk.receipts import Receipt
from broker.sdk.values import Grant, Members, as_it_came


@dataclass(frozen=True, kw_only=True)
class Approval:
    """What waits for people. `opens` is the broker's word; `unverified` is what the requester says, and nobody checked.

    `scopes` and `ttl_s` are what the votes so far leave of it.
    """

    id: str
    state: str
    grant_id: str
    requested_by: str
    opens: Mapping[str, Any]
    unverified: Mapping[str, Any]
    scopes: tuple[str, ...]
    ttl_s: int
    quorum: int
    expires_at: datetime
    request_hash: str
    break_glass: bool = False
    decided_at: datetime | None = None
    decided_by: str | None = None
    reason: str | None = None
    collect_by: datetime | None = None
    collected_at: datetime | None = None
    raw: Mapping[str, Any] = as_it_came()

    @classmethod
    def of(cls, value: object) -> Approval:
        read = Members("approval", value)
        left = Members("rest of an approval", read.raw.get("left"))
        return cls(
            id=read.text("id"),
            state=read.text("state"),
            grant_id=read.text("grant_id"),
            requested_by=read.text("requested_by"),
            # A person decides by these, so they are not guessed.
            opens=read.needed_mapping("opens"),
            unverified=read.mapping("unverified"),
            scopes=left.texts("scopes"),
            ttl_s=left.integer("ttl_s"),
            quorum=read.integer("quorum"),
            expires_at=read.time("expires_at"),
            request_hash=read.text("request_hash"),
            # Anything but an explicit false is one: a person decides by it.
            break_glass=read.raw.get("break_glass", False) is not False,
            decided_at=read.maybe_time("decided_at"),
            decided_by=read.maybe_text("decided_by"),
            reason=read.maybe_text("reason"),
            collect_by=read.maybe_time("collect_by"),
            collected_at=read.maybe_time("collected_at"),
            raw=read.raw,
        )


@dataclass(frozen=True, kw_only=True)
class Review:
    """What is owed for a break-glass. `state` is `owed`, `overdue` or `completed`, as it was at the broker's answer."""

    id: str
    state: str
    grant_id: str
    approval_id: str
    agent: str
    resource: str
    scopes: tuple[str, ...]
    approved_by: tuple[str, ...]
    unverified: Mapping[str, Any]
    opened_at: datetime
    due_at: datetime
    completed_at: datetime | None = None
    completed_by: str | None = None
    note: str | None = None
    raw: Mapping[str, Any] = as_it_came()

    @classmethod
    def of(cls, value: object) -> Review:
        read = Members("review", value)
        return cls(
            id=read.text("id"),
            state=read.text("state"),
            grant_id=read.text("grant_id"),
            approval_id=read.text("approval_id"),
            agent=read.text("agent"),
            resource=read.text("resource"),
            scopes=read.texts("scopes"),
            approved_by=read.texts("approved_by"),
            unverified=read.mapping("unverified"),
            opened_at=read.time("opened_at"),
            due_at=read.time("due_at"),
            completed_at=read.maybe_time("completed_at"),
            completed_by=read.maybe_text("completed_by"),
            note=read.maybe_text("note"),
            raw=read.raw,
        )


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why a grant was decided so: `in_words` for people, and in `facts` and `ceilings_s` what it was decided on."""

    grant_id: str
    outcome: str
    in_words: tuple[str, ...]
    reasons: tuple[str, ...]
    would_be_allowed: tuple[str, ...]
    ttl_decided_by: str
    ceilings_s: Mapping[str, int]
    facts: Mapping[str, Any]
    missing: tuple[str, ...]
    raw: Mapping[str, Any] = as_it_came()

    @classmethod
    def of(cls, value: object) -> Explanation:
        read = Members("explanation", value)
        return cls(
            grant_id=read.text("grant_id"),
            outcome=read.text("outcome"),
            in_words=read.texts("in_words"),
            reasons=read.texts("reasons"),
            would_be_allowed=read.texts("would_be_allowed"),
            ttl_decided_by=read.text("ttl_decided_by"),
            ceilings_s=read.mapping("ceilings_s"),
            facts=read.mapping("facts"),
            missing=read.texts("missing"),
            raw=read.raw,
        )


@dataclass(frozen=True, kw_only=True)
class Lockdown:
    id: str
    axis: str
    value: str
    reason: str
    set_at: datetime
    set_by: str
    lifted_at: datetime | None = None
    lifted_by: str | None = None
    raw: Mapping[str, Any] = as_it_came()

    @classmethod
    def of(cls, value: object) -> Lockdown:
        read = Members("lockdown", value)
        return cls(
            id=read.text("id"),
            axis=read.text("axis"),
            value=read.text("value"),
            reason=read.text("reason"),
            set_at=read.time("set_at"),
            set_by=read.text("set_by"),
            lifted_at=read.maybe_time("lifted_at"),
            lifted_by=read.maybe_text("lifted_by"),
            raw=read.raw,
        )


@dataclass(frozen=True, kw_only=True)
class Revocation:
    """What a revocation ended, or with `dry_run` what it would end: `grants` counts them, `samples` shows some."""

    id: str | None
    axis: str
    value: str
    dry_run: bool
    grants: int
    by_agent: Mapping[str, int]
    samples: tuple[Grant, ...]
    lockdown: Lockdown | None
    receipt: Receipt | None
    raw: Mapping[str, Any] = as_it_came()

    @classmethod
    def of(cls, value: object) -> Revocation:
        read = Members("revocation", value)
        lockdown, receipt = read.raw.get("lockdown"), read.raw.get("receipt")
        return cls(
            id=read.maybe_text("id"),
            axis=read.text("axis"),
            value=read.text("value"),
            # A person decides by this one, so it is not guessed.
            dry_run=read.boolean("dry_run"),
            grants=read.integer("grants"),
            by_agent=read.mapping("by_agent"),
            samples=tuple(Grant.of(grant) for grant in read.items("samples")),
            lockdown=Lockdown.of(lockdown) if lockdown else None,
            receipt=Receipt.of(receipt) if receipt else None,
            raw=read.raw,
        )


@dataclass(frozen=True, kw_only=True)
class Signal:
    """What somebody who watches said of an agent or a user."""

    id: str
    axis: str
    value: str
    level: str
    reason: str
    source: str
    sent_at: datetime
    sent_by: str
    expires_at: datetime
    raw: Mapping[str, Any] = as_it_came()

    @classmethod
    def of(cls, value: object) -> Signal:
        read = Members("signal", value)
        return cls(
            id=read.text("id"),
            axis=read.text("axis"),
            value=read.text("value"),
            level=read.text("level"),
            reason=read.text("reason"),
            source=read.text("source"),
            sent_at=read.time("sent_at"),
            sent_by=read.text("sent_by"),
            expires_at=read.time("expires_at"),
            raw=read.raw,
        )


@dataclass(frozen=True, kw_only=True)
class Event:
    id: str
    at: datetime
    type: str
    actor: str
    outcome: str | None = None
    task_id: str | None = None
    grant_id: str | None = None
    agent: str | None = None
    user: str | None = None
    resource: str | None = None
    reason: str | None = None
    policy_version: int | None = None
    trace_id: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    raw: Mapping[str, Any] = as_it_came()

    @classmethod
    def of(cls, value: object) -> Event:
        read = Members("event", value)
        return cls(
            id=read.text("id"),
            at=read.time("at"),
            type=read.text("type"),
            actor=read.text("actor"),
            outcome=read.maybe_text("outcome"),
            task_id=read.maybe_text("task_id"),
            grant_id=read.maybe_text("grant_id"),
            agent=read.maybe_text("agent"),
            user=read.maybe_text("user"),
            resource=read.maybe_text("resource"),
            reason=read.maybe_text("reason"),
            policy_version=read.maybe_integer("policy_version"),
            trace_id=read.maybe_text("trace_id"),
            data=read.mapping("data"),
            raw=read.raw,
        )


@dataclass(frozen=True, kw_only=True)
class PolicyVersion:
    version: int
    sha256: str
    applied_at: datetime
    applied_by: str
    raw: Mapping[str, Any] = as_it_came()

    @classmethod
    def of(cls, value: object) -> PolicyVersion:
        read = Members("policy version", value)
        return cls(
            version=read.integer("version"),
            sha256=read.text("sha256"),
            applied_at=read.time("applied_at"),
            applied_by=read.text("applied_by"),
            raw=read.raw,
        )


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """What would change among the live grants; `raw` has whose, by which policies, and some of them."""

    grants: int
    complete: bool
    ended: int
    shortened: int
    undecided: int
    raw: Mapping[str, Any] = as_it_came()

    @classmethod
    def of(cls, value: object) -> Foreseen:
        read = Members("preview", value)
        return cls(
            grants=read.integer("grants"),
            complete=read.boolean("complete"),
            ended=read.integer("ended"),
            shortened=read.integer("shortened"),
            undecided=read.integer("undecided"),
            raw=read.raw,
        )


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a draft would have said to recorded requests: the counts are of requests. `live` is of live grants."""

    requests: int
    complete: bool
    same: int
    newly_allowed: int
    newly_denied: int
    newly_asking: int
    shortened: int
    undecided: int
    live: Foreseen
    raw: Mapping[str, Any] = as_it_came()

    @classmethod
    def of(cls, value: object) -> Replay:
        read = Members("replay", value)
        return cls(
            requests=read.integer("requests"),
            complete=read.boolean("complete"),
            same=read.integer("same"),
            newly_allowed=read.integer("newly_allowed"),
            newly_denied=read.integer("newly_denied"),
            newly_asking=read.integer("newly_asking"),
            shortened=read.integer("shortened"),
            undecided=read.integer("undecided"),
            live=Foreseen.of(read.raw.get("live")),
            raw=read.raw,
        )


@dataclass(frozen=True, kw_only=True)
class PolicyChange:
    """The version that was made, or with `dry_run` what it would change among the live grants."""

    version: int | None
    dry_run: bool
    live: Foreseen | None
    raw: Mapping[str, Any] = as_it_came()

    @classmethod
    def of(cls, value: object) -> PolicyChange:
        read = Members("policy change", value)
        live = read.raw.get("live")
        return cls(
            version=read.maybe_integer("version"),
            # A person decides by this one, so it is not guessed.
            dry_run=read.boolean("dry_run"),
            live=Foreseen.of(live) if live else None,
            raw=read.raw,
        )


@dataclass(frozen=True, kw_only=True)
class TimelineLine:
    """What happened at one moment. `source` is "broker" for the broker's own word, "report" for that of `who`."""

    id: str
    at: datetime
    source: str
    what: str
    who: str
    task_id: str
    grant_id: str | None
    resource: str | None
    action: str | None
    scopes: tuple[str, ...]
    outcome: str
    reason: str | None
    beyond: tuple[str, ...]
    raw: Mapping[str, Any] = as_it_came()

    @classmethod
    def of(cls, value: object) -> TimelineLine:
        read = Members("line of time", value)
        return cls(
            id=read.text("id"),
            at=read.time("at"),
            source=read.text("source"),
            what=read.text("what"),
            who=read.text("who"),
            task_id=read.text("task_id"),
            grant_id=read.maybe_text("grant_id"),
            resource=read.maybe_text("resource"),
            action=read.maybe_text("action"),
            scopes=read.texts("scopes"),
            outcome=read.text("outcome"),
            reason=read.maybe_text("reason"),
            beyond=read.texts("beyond"),
            raw=read.raw,
        )


@dataclass(frozen=True, kw_only=True)
class Drift:
    """What was granted and never used, and used outside of what was granted; each as the broker's own object."""

    task_id: str
    drifted: bool
    complete: bool
    unused: tuple[Mapping[str, Any], ...]
    outside: tuple[Mapping[str, Any], ...]
    narrower: tuple[Mapping[str, Any], ...]
    raw: Mapping[str, Any] = as_it_came()

    @classmethod
    def of(cls, value: object) -> Drift:
        read = Members("drift", value)
        return cls(
            task_id=read.text("task_id"),
            drifted=read.boolean("drifted"),
            complete=read.boolean("complete"),
            unused=tuple(read.items("unused")),
            outside=tuple(read.items("outside")),
            narrower=tuple(read.items("narrower")),
            raw=read.raw,
        )
