"""The shapes of `/v1`: what a request may say, and what an answer holds. OpenAPI is generated from them.

Requests are strict: no coercion, no unknown members; text that people and logs will see holds no control characters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from broker.domain.approval import Case, in_quotes, narrowed
from broker.domain.audit import Event
from broker.domain.clock import rfc3339
from broker.domain.feed import POSITION_PATTERN
from broker.domain.grant import Credential, Grant, Issued
from broker.domain.lease import Lease
from broker.domain.lifecycle import ApprovalState, GrantState, LeaseState, ReviewState, StreamState, TaskState
from broker.domain.policy import claimed_text
from broker.domain.review import ReviewCase
from broker.domain.risk import Signal
from broker.domain.task import Task
from broker.services.administration import AppliedVersion
from broker.services.explaining import Explanation
from broker.services.receipts import SignedReceipt
from broker.services.revocation import BulkOutcome, Lockdown
from broker.services.streams import Overseen
from broker.web.plain import PLAIN_PATTERN

Sentence = Annotated[str, Field(min_length=1, max_length=1000, pattern=PLAIN_PATTERN)]
Name = Annotated[str, Field(min_length=1, max_length=255, pattern=PLAIN_PATTERN)]
Identifier = Annotated[str, Field(min_length=1, max_length=1000, pattern=PLAIN_PATTERN)]
Scope = Annotated[str, Field(pattern=r"^[\u0021\u0023-\u005b\u005d-\u007e]{1,200}$")]
Seconds = Annotated[int, Field(ge=1, le=31_536_000, description="Whole seconds.")]
Label = Annotated[str, Field(max_length=255, pattern=PLAIN_PATTERN)]
Parameter = Annotated[str, Field(min_length=1, max_length=16_384)]
_DIGITS = re.compile("0|[1-9][0-9]{0,8}", re.ASCII)
When = Annotated[str, Field(description="RFC 3339, UTC, whole seconds.", examples=["2026-03-01T12:00:00Z"])]


UserToken = Annotated[
    str,
    Field(
        min_length=1,
        max_length=8192,
        description="A token of the person on whose behalf it is, from an issuer with `users = true`.",
    ),
]


class Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Answer(BaseModel):
    """Described for OpenAPI; answers are built by hand, because validating our own output is time the caller waits."""

    model_config = ConfigDict(extra="allow")


class CeilingBody(Request):
    resource: Identifier
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=64)]


class OpenTask(Request):
    purpose: Sentence
    agents: Annotated[list[Name], Field(min_length=1, max_length=100)]
    deadline_s: Seconds
    heartbeat_s: Annotated[int, Field(ge=5, le=86_400)] | None = None
    resources: Annotated[list[CeilingBody], Field(max_length=100)] | None = None
    parent_task_id: Annotated[Name | None, Field(description="A task of which this one is a part.")] = None
    on_behalf_of: Annotated[UserToken | None, Field(repr=False)] = None
    labels: Annotated[dict[Name, Label], Field(max_length=32)] = Field(default_factory=dict)


class WithReason(Request):
    reason: Sentence | None = None


class Abandon(Request):
    reason: Sentence


class BreakGlass(Request):
    """An emergency, and which. Policy has declared beforehand what it opens; two people at least have to agree."""

    reason: Sentence


class RequestGrant(Request):
    task_id: Name | None = None
    resource: Identifier
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=64)]
    ttl_s: Annotated[int, Field(ge=1, le=86_400)] | None = None
    intent: Sentence | None = None
    on_behalf_of: Annotated[UserToken | None, Field(repr=False)] = None
    hand_to: (
        Annotated[
            list[Name],
            Field(min_length=1, max_length=100, description="Agents that may name this grant as their parent."),
        ]
        | None
    ) = None
    parent_grant_id: Annotated[
        Name | None,
        Field(description="A grant in the same task of which the caller wants a part; its holder said so by hand_to."),
    ] = None
    break_glass: Annotated[
        BreakGlass | None, Field(description="For an emergency that a policy with @break_glass has declared.")
    ] = None
    context: Annotated[dict[Name, Any], Field(max_length=32)] = Field(default_factory=dict)
    parameters: Annotated[dict[Name, Parameter], Field(max_length=8)] = Field(
        default_factory=dict, description="For the provider of the resource: `csr`, `public_key`. Each takes its own."
    )


class CollectGrant(Request):
    parameters: Annotated[dict[Name, Parameter], Field(max_length=8)] = Field(
        default_factory=dict, description="Those of the request once more, where it had some."
    )


class CompleteReview(Request):
    note: Annotated[Sentence, Field(description="What was found; it goes into the audit trail.")]


class Approve(Request):
    """A yes to all of it, or to less."""

    scopes: Annotated[
        list[Scope] | None, Field(min_length=1, max_length=64, description="Those that are left of the request's.")
    ] = None
    ttl_s: Annotated[int | None, Field(ge=1, le=86_400, description="At most what was asked for.")] = None
    reason: Sentence | None = None


class RenewGrant(Request):
    ttl_s: Annotated[int, Field(ge=1, le=86_400)] | None = None


def _everything(value: object) -> object:
    # 1 equals True, and 1.0 does: a slip of the pen must not stop the world.
    if value is True or value == "all":
        return value
    raise PydanticCustomError("everything", 'to revoke everything say {"all": "all"}, and to revoke less leave it out')


class Selector(Request):
    """Exactly one of the axes."""

    task: Name | None = None
    agent: Name | None = None
    user: Name | None = None
    orchestrator: Name | None = None
    resource: Identifier | None = None
    provider: Name | None = None
    policy: Name | None = None
    key: Name | None = None
    all: Annotated[Literal["all", True], BeforeValidator(_everything)] | None = None

    def members(self) -> dict[str, str | None]:
        named = {name: getattr(self, name) for name in Selector.model_fields}
        return named | {"all": "all" if self.all else None}


class Revoke(Selector):
    reason: Sentence
    dry_run: bool = False
    lockdown: bool = False


class SetLockdown(Selector):
    reason: Sentence


class Evaluate(Request):
    """A request as it might come, and the task it would come under."""

    agent: Name
    resource: Identifier
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=64)]
    ttl_s: Annotated[int, Field(ge=1, le=86_400)] = 300
    purpose: Sentence = "evaluation"
    labels: Annotated[dict[Name, Label], Field(max_length=32)] = Field(default_factory=dict)
    intent: Sentence | None = None
    sender_bound: bool = False
    break_glass: bool = False
    context: Annotated[dict[Name, Any], Field(max_length=32)] = Field(default_factory=dict)


FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,93}\.cedar$")]


class PutPolicies(Request):
    """All policies there shall be, by file. Without a schema the one in force stays."""

    policies: Annotated[dict[FileName, str], Field(min_length=1, max_length=100)]
    schema_: Annotated[str | None, Field(alias="schema", min_length=1)] = None


class Replay(PutPolicies):
    period_s: Annotated[int, Field(ge=1, le=2_592_000, description="Back from now.")] = 86_400
    limit: Annotated[int, Field(ge=1, le=100_000, description="Requests, the newest; and live grants.")] = 10_000


def _written_plainly(text: object) -> object:
    # Pydantic reads " 1", "+1", "1_0" and "1.0" as integers too; the schema we publish does not.
    if isinstance(text, str) and not (text.isascii() and text.isdigit() and not text.startswith("0")):
        raise PydanticCustomError("limit", "is not a whole number of 1 to 1000: write it in digits alone")
    return text


def _seconds_in_digits(text: object) -> object:
    if isinstance(text, str) and not _DIGITS.fullmatch(text):
        raise PydanticCustomError("wait", "is not a whole number of 0 to 30: write it in digits alone")
    return text


class Page(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    limit: Annotated[int, BeforeValidator(_written_plainly), Field(ge=1, le=1000)] = 100
    cursor: Annotated[str, Field(max_length=100)] | None = None


class SendSignal(Request):
    """About exactly one of agent and user."""

    agent: Name | None = None
    user: Name | None = None
    level: Literal["low", "medium", "high", "critical"]
    reason: Sentence
    source: Name
    expires_s: Annotated[int, Field(ge=1, le=2_592_000)] = 3600


class SignalQuery(Page):
    over: Annotated[Literal["true", "false"], Field(description="Those that are over as well.")] = "false"


class TaskQuery(Page):
    state: TaskState | None = None
    agent: Name | None = None
    user: Name | None = None
    resource: Annotated[
        Identifier | None, Field(description="Tasks whose ceiling names it, or with a grant on it that you may see.")
    ] = None


class GrantQuery(Page):
    state: GrantState | None = None
    task: Name | None = None
    agent: Name | None = None
    user: Name | None = None
    resource: Identifier | None = None
    break_glass: Annotated[
        Literal["true", "false"] | None, Field(description="Only those that were asked for as one, or none of them.")
    ] = None


class ReviewQuery(Page):
    state: Annotated[
        Literal["open", "owed", "overdue", "completed"] | None, Field(description="`open` is both owed and overdue.")
    ] = None
    agent: Name | None = None


class ApprovalQuery(Page):
    state: ApprovalState | None = None
    task: Name | None = None
    agent: Name | None = None
    resource: Identifier | None = None


class LeaseQuery(Page):
    state: LeaseState | None = None
    provider: Name | None = None
    grant: Name | None = None


class AuditQuery(Page):
    type: Name | None = None
    actor: Name | None = None
    task: Name | None = None
    grant: Name | None = None
    agent: Name | None = None
    user: Name | None = None
    resource: Identifier | None = None
    outcome: Name | None = None
    trace_id: Name | None = None


class LockdownQuery(Page):
    lifted: Literal["true", "false"] = "false"


class DryRun(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    dry_run: Literal["true", "false"] = "false"


class FeedQuery(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    after: (
        Annotated[
            str, Field(pattern=POSITION_PATTERN, description="`next_after` of an earlier answer; without it, a reset.")
        ]
        | None
    ) = None
    wait: Annotated[
        int,
        BeforeValidator(_seconds_in_digits),
        Field(ge=0, le=30, description="Answer when there is something, so many seconds later at most."),
    ] = 0


class NoQuery(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskAnswer(Answer):
    id: str
    state: TaskState
    purpose: str
    agents: list[str]
    orchestrator: str
    created_at: When
    deadline_at: When
    heartbeat_s: int | None
    heartbeat_due_at: When | None
    ended_at: When | None
    reason: str | None
    labels: dict[str, str]
    resources: list[CeilingBody] | None
    parent_task_id: str | None
    on_behalf_of: str | None


class DecisionAnswer(Answer):
    outcome: Literal["allow", "deny", "needs_approval"]
    policies: list[str]
    policy_version: int
    reasons: list[str]


class LeaseOfGrantAnswer(Answer):
    id: str
    state: LeaseState
    attempts: int
    confirmed_dead_at: When | None
    last_error: str | None
    abandoned_at: When | None


class LeaseAnswer(LeaseOfGrantAnswer):
    grant_id: str | None
    provider: str
    revocation_class: str | None
    owed_since: Annotated[When | None, Field(description="When the authority of its grant ended; null while it lives.")]
    next_attempt_at: When | None
    created_at: When
    expires_at: When
    abandoned_by: str | None
    abandoned_reason: str | None


class BreakGlassAnswer(Answer):
    reason: Annotated[str, Field(description="The agent's words, which nobody has checked: cut, and escaped.")]


class GrantAnswer(Answer):
    id: str
    task_id: str
    agent: str
    resource: str
    scopes: list[str]
    state: GrantState
    live: bool
    issued_at: When | None
    expires_at: When
    renewable_until: When | None
    ttl_s: int
    ttl_decided_by: str
    jti: str | None
    provider: str
    revocation_class: str | None
    parent_grant_id: str | None
    chain: Annotated[list[str], Field(description="The agents that handed it down, the root first.")]
    on_behalf_of: str | None
    break_glass: Annotated[BreakGlassAnswer | None, Field(description="Null where it was not asked for as one.")]
    decision: DecisionAnswer
    revoked_at: When | None
    revoked_by: str | None
    reason: str | None
    lease: LeaseOfGrantAnswer | None


class DecidingPolicyAnswer(Answer):
    id: str
    file: str | None
    effect: Literal["permit", "forbid"] | None
    condition: str | None
    max_ttl_s: int | None


class ExplanationAnswer(Answer):
    grant_id: str
    outcome: Literal["allow", "deny", "needs_approval"]
    policy_version: int | None
    decided_at: When
    in_words: Annotated[list[str], Field(description="The whole of it for a person, a sentence each.")]
    policies: Annotated[list[DecidingPolicyAnswer], Field(description="Those that decided.")]
    reasons: list[str]
    would_be_allowed: Annotated[list[str], Field(description="With a no: which smaller request would be a yes.")]
    ttl_s: int
    ttl_decided_by: str
    requested_s: int | None
    ceilings_s: Annotated[dict[str, int] | None, Field(description="Every ceiling there was; null where not kept.")]
    facts: Annotated[dict[str, Any], Field(description="As they were; `agents_words` are vouched for by nobody.")]
    looked_at: Annotated[
        list[str] | None, Field(description="What of the context the policies that could decide it read.")
    ]
    missing: Annotated[list[str], Field(description="What cannot be told, and why.")]


class JwtAnswer(Answer):
    type: Literal["jwt"]
    token: str
    token_type: str
    expires_at: When


class SecretAnswer(Answer):
    type: Annotated[str, Field(description="The engine that made it.", examples=["database"])]
    data: Annotated[dict[str, Any], Field(description="The secret itself, handed out once and never stored.")]
    expires_at: When


class IssuedAnswer(Answer):
    grant: GrantAnswer
    credential: JwtAnswer | SecretAnswer


class OpensAnswer(Answer):
    """What it would open, in the broker's own words: this is what is dangerous about it."""

    resource: str
    sensitivity: Annotated[str | None, Field(description="Null where the resource is registered no longer.")]
    environment: str | None
    scopes: list[str]
    ttl_s: int
    user: Annotated[str | None, Field(description="On whose behalf, if on anybody's.")]
    sender_bound: bool
    provider: str


class RequesterAnswer(Answer):
    agent: str
    issuer: str
    subject: str
    owner: str | None
    orchestrator: str
    task_id: str


class NeedAnswer(Answer):
    group: str
    quorum: int
    approved: int
    owner_may_approve: bool


class VoteAnswer(Answer):
    voter: str
    verdict: Literal["approve", "deny"]
    scopes: list[str] | None
    ttl_s: int | None
    reason: str | None
    voted_at: When


class LeftAnswer(Answer):
    scopes: list[str]
    ttl_s: int


class UnverifiedAnswer(Answer):
    """What the requester says, which nobody has checked: cut, and escaped so that nothing in it acts."""

    break_glass: Annotated[str | None, Field(description="What the emergency is, in the agent's words.")]
    intent: Annotated[str | None, Field(description="The agent's words.")]
    claims: Annotated[dict[str, str], Field(description="The agent's words.")]
    purpose: Annotated[str | None, Field(description="The orchestrator's words.")]


class ApprovalAnswer(Answer):
    id: str
    state: ApprovalState
    break_glass: Annotated[
        bool, Field(description="Asked for as a break-glass: everybody is told, and a review is owed.")
    ]
    opens: OpensAnswer
    requester: RequesterAnswer
    requested_by: str
    grant_id: str
    needs: list[NeedAnswer]
    quorum: Annotated[int, Field(description="How many yes it takes, where nobody counts twice.")]
    votes: list[VoteAnswer]
    left: Annotated[LeftAnswer, Field(description="What the votes so far leave of the request.")]
    policies: list[str]
    policy_version: int
    request_hash: str
    created_at: When
    expires_at: Annotated[When, Field(description="Until when it can be decided.")]
    collect_by: Annotated[When | None, Field(description="While approved and not collected: until when it can be.")]
    decided_at: When | None
    decided_by: str | None
    reason: str | None
    collected_at: When | None
    unverified: UnverifiedAnswer


class PendingAnswer(Answer):
    grant: GrantAnswer
    approval: ApprovalAnswer


class ApprovalPage(Answer):
    items: list[ApprovalAnswer]
    next_cursor: str | None


class ReviewAnswer(Answer):
    id: str
    state: Annotated[ReviewState, Field(description="As it is now: past `due_at` it is overdue.")]
    grant_id: str
    approval_id: str
    agent: str
    user: Annotated[str | None, Field(description="On whose behalf, if on anybody's.")]
    resource: str
    scopes: list[str]
    policies: list[str]
    approved_by: list[str]
    opened_at: When
    grant_state: GrantState
    grant_expires_at: Annotated[When, Field(description="When the grant ends, or would have ended.")]
    due_at: When
    completed_at: When | None
    completed_by: str | None
    note: str | None
    unverified: Annotated[BreakGlassAnswer, Field(description="What the agent said the emergency was.")]


class ReviewPage(Answer):
    items: list[ReviewAnswer]
    next_cursor: str | None


class ReceiptLineAnswer(Answer):
    grant_id: str
    agent: str
    resource: str
    provider: str
    revocation_class: str
    authority_ended_at: When | None
    confirmed_dead_at: When | None
    exposed_until: When | None


class TotalsAnswer(Answer):
    ended: int
    confirmed_dead: int
    outstanding: int


class ReceiptAnswer(Answer):
    task_id: str | None
    ended_at: When | None
    outcome: str
    grants: list[ReceiptLineAnswer]
    totals: TotalsAnswer
    jws: str | None


class LockdownAnswer(Answer):
    id: str
    axis: str
    value: str
    reason: str
    set_at: When
    set_by: str
    lifted_at: When | None
    lifted_by: str | None


class RevocationAnswer(Answer):
    id: str | None
    axis: str
    value: str
    dry_run: bool
    grants: int
    by_agent: dict[str, int]
    samples: list[GrantAnswer]
    lockdown: LockdownAnswer | None
    receipt: ReceiptAnswer | None


class EventAnswer(Answer):
    id: str
    at: When
    type: str
    actor: str
    outcome: str
    task_id: str | None
    grant_id: str | None
    agent: str | None
    user: str | None
    resource: str | None
    reason: str | None
    policy_version: int | None
    trace_id: str | None
    data: dict[str, Any]


class VersionAnswer(Answer):
    version: int
    sha256: str
    applied_at: When
    applied_by: str


class ForeseenGrantAnswer(Answer):
    grant_id: str
    agent: str
    resource: str
    scopes: list[str]
    outcome: Literal["ended", "shortened", "undecided"]
    why: str
    expires_at: When


class ForeseenAnswer(Answer):
    """What would change among the live grants; the counts are of grants."""

    grants: Annotated[int, Field(description="Looked at.")]
    complete: Annotated[bool, Field(description="False where there are more.")]
    ended: int
    shortened: int
    undecided: int
    by_agent: dict[str, int]
    by_policy: dict[str, int]
    by_reason: dict[str, int]
    samples: list[ForeseenGrantAnswer]


class DifferenceAnswer(Answer):
    grant_id: str
    decided_at: When
    agent: str
    resource: str
    scopes: list[str]
    recorded: Annotated[str, Field(description="What it came to: an outcome, or how long it lived.")]
    draft: Annotated[str, Field(description="What it would come to.")]
    why: str


class ReplayAnswer(Answer):
    """The counts are of recorded requests."""

    since: When
    requests: int
    complete: Annotated[bool, Field(description="False where there were more in the period.")]
    same: int
    newly_allowed: int
    newly_denied: int
    newly_asking: Annotated[int, Field(description="People would be asked.")]
    shortened: int
    undecided: int
    by_agent: dict[str, int]
    by_policy: dict[str, int]
    samples: list[DifferenceAnswer]
    live: ForeseenAnswer


class PolicyChangeAnswer(Answer):
    version: Annotated[int | None, Field(description="Null in a dry run.")]
    dry_run: bool
    live: Annotated[ForeseenAnswer | None, Field(description="In a dry run: what would change among the live grants.")]


class SignalAnswer(Answer):
    id: str
    axis: Literal["agent", "user"]
    value: str
    level: Literal["low", "medium", "high", "critical"]
    reason: str
    source: str
    sent_at: When
    sent_by: str
    expires_at: When


class EventStreamAnswer(Answer):
    """`pushed_to` is a host; what else there is of the address, and what opens it, is the receiver's."""

    id: str
    receiver: str
    status: StreamState
    reason: str | None
    set_by: Literal["receiver", "admin", "broker"]
    method: Literal["push", "poll"]
    pushed_to: str | None
    events: list[str]
    waiting: int
    failures: int
    trouble: str | None
    description: str | None
    created_at: When
    active_at: When
    progress_at: When


class EventStreamPage(Answer):
    items: list[EventStreamAnswer]
    next_cursor: str | None


class SignalPage(Answer):
    items: list[SignalAnswer]
    next_cursor: str | None


class TaskPage(Answer):
    items: list[TaskAnswer]
    next_cursor: str | None


class GrantPage(Answer):
    items: list[GrantAnswer]
    next_cursor: str | None


class EventPage(Answer):
    items: list[EventAnswer]
    next_cursor: str | None


class LeasePage(Answer):
    items: list[LeaseAnswer]
    next_cursor: str | None


class LockdownPage(Answer):
    items: list[LockdownAnswer]
    next_cursor: str | None


class VersionPage(Answer):
    items: list[VersionAnswer]
    next_cursor: str | None


class LimitAnswer(Answer):
    name: str
    value: int
    window_s: Annotated[int | None, Field(description="None of what is counted at each moment, or of a whole task.")]


class FeedItemAnswer(Answer):
    seq: int
    data: Annotated[str, Field(description="The event, byte for byte as the chain counts it.")]


class FeedResetAnswer(Answer):
    """What was asked for is not kept, or is of another feed: go on from here, and fetch every status list anew."""

    feed: str
    seq: int
    head: str


class FeedAnswer(Answer):
    items: list[FeedItemAnswer]
    next_after: str
    statement: Annotated[str | None, Field(description="A JWS that vouches for the feed; null where none can.")]
    reset: FeedResetAnswer | None


class ProblemAnswer(Answer):
    type: str
    title: str
    status: int
    detail: str
    code: str
    trace_id: str | None
    member: Annotated[str, Field(description="What is wrong: a member, parameter or header. Absent where none is.")] = (
        ""
    )
    decision: Annotated[DecisionAnswer | None, Field(description="With 403: the decision, where policy made one.")] = (
        None
    )
    grant_id: Annotated[str | None, Field(description="With policy_denied: the denied grant.")] = None
    limit: Annotated[LimitAnswer | None, Field(description="With limit_exceeded: which.")] = None


def of_task(task: Task) -> dict[str, Any]:
    ceiling = task.ceiling
    return {
        "id": task.id,
        "state": str(task.state),
        "purpose": task.purpose,
        "agents": list(task.agents),
        "orchestrator": task.orchestrator,
        "created_at": rfc3339(task.created_at),
        "deadline_at": rfc3339(task.deadline_at),
        "heartbeat_s": task.heartbeat_s,
        "heartbeat_due_at": _time(task.heartbeat_due_at),
        "ended_at": _time(task.ended_at),
        "reason": task.reason,
        "labels": dict(task.labels),
        "resources": None
        if ceiling is None
        else [{"resource": name, "scopes": scopes} for name, scopes in ceiling.items()],
        "parent_task_id": task.parent_task_id,
        "on_behalf_of": task.on_behalf_of,
    }


def of_grant(grant: Grant, live: bool, lease: Lease | None = None) -> dict[str, Any]:
    return {
        "id": grant.id,
        "task_id": grant.task_id,
        "agent": grant.agent,
        "resource": grant.resource,
        "scopes": list(grant.scopes),
        "state": str(grant.state),
        "live": live,
        "issued_at": _time(grant.issued_at),
        "expires_at": rfc3339(grant.expires_at),
        "renewable_until": _time(grant.renewable_until),
        "ttl_s": grant.ttl_s,
        "ttl_decided_by": grant.ttl_decided_by,
        "jti": grant.jti,
        "provider": grant.provider,
        "revocation_class": "bounded" if grant.provider == "jwt" else None if lease is None else lease.revocation_class,
        "parent_grant_id": grant.parent_grant_id,
        "chain": list(grant.chain),
        "on_behalf_of": grant.on_behalf_of,
        "break_glass": None if grant.break_glass is None else _emergency(grant),
        "decision": grant.decision,
        "revoked_at": _time(grant.revoked_at),
        "revoked_by": grant.revoked_by,
        "reason": grant.reason,
        "lease": None if lease is None else _lease_of_grant(lease),
    }


def _emergency(grant: Grant) -> dict[str, Any]:
    return {"reason": in_quotes(grant.break_glass or "", _LONGEST_WORDS)}


def _lease_of_grant(lease: Lease) -> dict[str, Any]:
    shown = of_lease(lease)
    return {name: shown[name] for name in LeaseOfGrantAnswer.model_fields}


def of_explanation(found: Explanation) -> dict[str, Any]:
    return vars(found) | {
        "decided_at": rfc3339(found.decided_at),
        "policies": [vars(policy) for policy in found.policies],
    }


def of_issued(issued: Issued) -> dict[str, Any]:
    credential = issued.credential
    if isinstance(credential, Credential):
        revealed: dict[str, Any] = {"token": credential.token.reveal(), "token_type": credential.token_type}
    else:
        revealed = {"data": credential.data.reveal()}
    shown = {"type": credential.type, **revealed, "expires_at": rfc3339(credential.expires_at)}
    return {"grant": of_grant(issued.grant, True, issued.lease), "credential": shown}


_LONGEST_WORDS, _LONGEST_CLAIM = 300, 100


def of_pending(case: Case) -> dict[str, Any]:
    return {"grant": of_grant(case.grant, False), "approval": of_approval(case)}


def of_approval(case: Case) -> dict[str, Any]:
    """What is dangerous comes first and is ours; what the requester wrote comes last, and says that it is theirs."""
    approval, grant, left = case.approval, case.grant, narrowed(case.approval, case.votes)
    return {
        "id": approval.id,
        "state": str(approval.state),
        "break_glass": grant.break_glass is not None,
        "opens": {
            "resource": approval.resource,
            "sensitivity": case.sensitivity,
            "environment": case.environment,
            "scopes": list(approval.scopes),
            "ttl_s": approval.ttl_s if grant.issued_at else min(approval.ttl_s, grant.ttl_s),
            "user": grant.on_behalf_of,
            "sender_bound": grant.jkt is not None,
            "provider": grant.provider,
        },
        "requester": {
            "agent": grant.agent,
            "issuer": grant.issuer,
            "subject": grant.subject,
            "owner": case.owner,
            "orchestrator": grant.orchestrator,
            "task_id": grant.task_id,
        },
        "requested_by": approval.agent,
        "grant_id": approval.grant_id,
        "needs": [
            {
                "group": need.group,
                "quorum": need.quorum,
                "approved": case.met.get(need.group, 0),
                "owner_may_approve": need.owner_may,
            }
            for need in approval.needs
        ],
        "quorum": sum(need.quorum for need in approval.needs),
        "votes": [
            {
                "voter": vote.voter,
                "verdict": str(vote.verdict),
                "scopes": None if vote.scopes is None else list(vote.scopes),
                "ttl_s": vote.ttl_s,
                "reason": vote.reason,
                "voted_at": rfc3339(vote.voted_at),
            }
            for vote in case.votes
        ],
        "left": {"scopes": sorted(left.scopes), "ttl_s": left.ttl_s},
        "policies": list(grant.policies),
        "policy_version": approval.policy_version,
        "request_hash": approval.request_sha256,
        "created_at": rfc3339(approval.created_at),
        "expires_at": rfc3339(approval.expires_at),
        "collect_by": rfc3339(grant.expires_at) if case.may_be_collected else None,
        "decided_at": _time(approval.ended_at),
        "decided_by": approval.ended_by,
        "reason": approval.reason,
        "collected_at": _time(approval.collected_at),
        "unverified": {
            "break_glass": None if grant.break_glass is None else in_quotes(grant.break_glass, _LONGEST_WORDS),
            "intent": None if grant.intent is None else in_quotes(grant.intent, _LONGEST_WORDS),
            "claims": {
                in_quotes(name, _LONGEST_CLAIM): in_quotes(text, _LONGEST_CLAIM)
                for name, text in claimed_text(grant.claimed).items()
            },
            "purpose": in_quotes(case.purpose, _LONGEST_WORDS) or None,
        },
    }


def of_review(case: ReviewCase) -> dict[str, Any]:
    review, grant = case.review, case.grant
    return {
        "id": review.id,
        "state": str(case.state),
        "grant_id": grant.id,
        "approval_id": case.approval.id,
        "agent": grant.agent,
        "user": grant.on_behalf_of,
        "resource": grant.resource,
        "scopes": list(grant.scopes),
        "policies": list(grant.policies),
        "approved_by": list(case.approved_by),
        "opened_at": rfc3339(review.opened_at),
        "grant_state": str(grant.state),
        "grant_expires_at": rfc3339(grant.expires_at),
        "due_at": rfc3339(review.due_at),
        "completed_at": _time(review.completed_at),
        "completed_by": review.completed_by,
        "note": review.note,
        "unverified": _emergency(grant),
    }


def of_lease(lease: Lease, owed_since: datetime | None = None) -> dict[str, Any]:
    """What of a lease is shown: never the handle, and the reference only as what it is, a name."""
    return {
        "id": lease.id,
        "grant_id": lease.grant_id,
        "provider": lease.provider,
        "state": str(lease.state),
        "revocation_class": lease.revocation_class,
        "owed_since": _time(owed_since),
        "attempts": lease.attempts,
        "next_attempt_at": _time(lease.next_attempt_at),
        "last_error": lease.last_error,
        "created_at": rfc3339(lease.created_at),
        "expires_at": rfc3339(lease.expires_at),
        "confirmed_dead_at": _time(lease.confirmed_dead_at),
        "abandoned_at": _time(lease.abandoned_at),
        "abandoned_by": lease.abandoned_by,
        "abandoned_reason": lease.abandoned_reason,
    }


def of_receipt(signed: SignedReceipt) -> dict[str, Any]:
    return signed.receipt.as_json() | {"jws": signed.jws}


def of_lockdown(lockdown: Lockdown) -> dict[str, Any]:
    return vars(lockdown) | {"set_at": rfc3339(lockdown.set_at), "lifted_at": _time(lockdown.lifted_at)}


def of_revocation(outcome: BulkOutcome, live: Mapping[str, bool]) -> dict[str, Any]:
    return {
        "id": outcome.revocation_id,
        "axis": outcome.axis,
        "value": outcome.value,
        "dry_run": outcome.dry_run,
        "grants": outcome.total,
        "by_agent": dict(outcome.by_agent),
        "samples": [of_grant(grant, live.get(grant.id, False)) for grant in outcome.samples],
        "lockdown": None if outcome.lockdown is None else of_lockdown(outcome.lockdown),
        "receipt": None if outcome.receipt is None else of_receipt(outcome.receipt),
    }


def of_signal(signal: Signal) -> dict[str, Any]:
    return vars(signal) | {"sent_at": rfc3339(signal.sent_at), "expires_at": rfc3339(signal.expires_at)}


def of_event(event: Event) -> dict[str, Any]:
    return event.as_json()


def of_version(version: AppliedVersion) -> dict[str, Any]:
    return vars(version) | {"applied_at": rfc3339(version.applied_at)}


def _time(at: datetime | None) -> str | None:
    return None if at is None else rfc3339(at)


def of_event_stream(overseen: Overseen) -> dict[str, Any]:
    stream = overseen.stream
    return {
        "id": stream.id,
        "receiver": stream.receiver,
        "status": str(stream.state),
        "reason": stream.reason,
        "set_by": stream.set_by,
        "method": str(stream.method),
        "pushed_to": stream.pushed_to,
        "events": [name.rpartition("/")[2] for name in stream.delivered],
        "waiting": overseen.waiting,
        "failures": stream.failures,
        "trouble": stream.trouble,
        "description": stream.description,
        "created_at": rfc3339(stream.created_at),
        "active_at": rfc3339(stream.active_at),
        "progress_at": rfc3339(stream.progress_at),
    }
