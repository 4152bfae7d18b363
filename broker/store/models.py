"""The tables, one class each; a constraint carries the name of the rule it keeps.

States are words, times are UTC to the second, ids are ours (`broker.domain.identity`). No column holds a
credential or a token: what may be kept of one is its SHA-256 (INV-30).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, cast

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeEngine

from broker.domain.audit import DENIAL_OUTCOMES, DENIAL_TYPES
from broker.domain.clock import epoch, from_epoch
from broker.domain.grant import BREAK_GLASS_LIFE
from broker.domain.lifecycle import (
    ApprovalState,
    GrantState,
    KeyState,
    LeaseState,
    ReviewState,
    StreamState,
    TaskState,
)
from broker.domain.shared_signals import Delivery


class Instant(TypeDecorator[datetime]):
    """A moment in UTC: `timestamptz` on PostgreSQL, whole seconds since 1970 on SQLite, which has no such type."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "sqlite":
            return dialect.type_descriptor(Integer())
        return dialect.type_descriptor(DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None:
            return None
        if value.tzinfo is None:
            raise TypeError(f"{value!r} has no time zone; the broker speaks UTC")
        return epoch(value) if dialect.name == "sqlite" else value

    def result_processor(self, dialect: Dialect, _coltype: object) -> Callable[[Any], datetime | None]:
        # Not `process_result_value`, around which SQLAlchemy puts two calls more for each value of each row.
        return instants_of(dialect)


def instants_of(dialect: Dialect) -> Callable[[Any], datetime | None]:
    """What makes an `Instant` of what the driver gives."""
    return _from_epoch_or_none if dialect.name == "sqlite" else _in_utc_or_none


def _from_epoch_or_none(value: int | None) -> datetime | None:
    return None if value is None else from_epoch(value)


def _in_utc_or_none(value: datetime | None) -> datetime | None:
    return None if value is None else value.astimezone(UTC)


Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
Id = String(32)
Name = String(255)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "pk": "%(table_name)s_pkey",
            "fk": "%(table_name)s_%(column_0_name)s_fkey",
            "ix": "%(table_name)s_%(column_0_N_name)s_idx",
            "uq": "%(table_name)s_%(column_0_N_name)s_key",
            "ck": "%(table_name)s_%(constraint_name)s",
        }
    )


def table_of(model: type[Base]) -> Table:
    """The Core table of a model; SQLAlchemy types it as something more general than it is."""
    return cast(Table, model.__table__)


_States = (
    type[TaskState]
    | type[GrantState]
    | type[LeaseState]
    | type[ApprovalState]
    | type[ReviewState]
    | type[KeyState]
    | type[StreamState]
    | type[Delivery]
)
_BREAK_GLASS_S = int(BREAK_GLASS_LIFE.total_seconds())


def _one_of(column: str, states: _States) -> str:
    return f"{column} IN ({', '.join(repr(str(state)) for state in states)})"


def _words(words: Iterable[str]) -> str:
    return ", ".join(map(repr, words))


# As an index and the queries that use it spell it.
IS_DENIAL = f"type IN ({_words(DENIAL_TYPES)}) AND outcome IN ({_words(DENIAL_OUTCOMES)})"


class Gate(Base):
    """One row. Issuing holds it shared, a bulk revocation or lockdown exclusively, and turns its era.

    So each grant was either committed before the revocation, in an era it covers, or is decided after it.
    """

    __tablename__ = "gate"
    __table_args__ = (CheckConstraint("id = 1", name="is_one_row"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    era: Mapped[int] = mapped_column(BigInteger)


class Task(Base):
    __tablename__ = "tasks"
    __table_args__ = (
        CheckConstraint(_one_of("state", TaskState), name="state_is_known"),
        CheckConstraint("(state = 'active') = (ended_at IS NULL)", name="ended_has_a_time"),
        Index(
            "tasks_due_idx",
            "deadline_at",
            postgresql_where=text("state = 'active'"),
            sqlite_where=text("state = 'active'"),
        ),
        Index(
            "tasks_heartbeat_idx",
            "heartbeat_due_at",
            postgresql_where=text("state = 'active'"),
            sqlite_where=text("state = 'active'"),
        ),
        Index(
            "tasks_upheld_idx",
            "upheld_until",
            postgresql_where=text("state = 'active' AND upheld_until IS NOT NULL"),
            sqlite_where=text("state = 'active' AND upheld_until IS NOT NULL"),
        ),
        Index("tasks_orchestrator_idx", "orchestrator", "id"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    state: Mapped[str] = mapped_column(String(16))
    purpose: Mapped[str] = mapped_column(String(1000))
    orchestrator: Mapped[str] = mapped_column(Name)
    on_behalf_of: Mapped[str | None] = mapped_column(Name)
    user_attributes: Mapped[dict[str, list[str]] | None] = mapped_column(Json)
    parent_task_id: Mapped[str | None] = mapped_column(Id, ForeignKey("tasks.id"), index=True)
    ceiling: Mapped[dict[str, list[str]] | None] = mapped_column(Json)
    labels: Mapped[dict[str, str]] = mapped_column(Json)
    created_at: Mapped[datetime] = mapped_column(Instant)
    deadline_at: Mapped[datetime] = mapped_column(Instant)
    heartbeat_s: Mapped[int | None] = mapped_column(Integer)
    heartbeat_due_at: Mapped[datetime | None] = mapped_column(Instant)
    upheld_until: Mapped[datetime | None] = mapped_column(Instant)
    tasks_above: Mapped[str] = mapped_column(Text, server_default=text("''"))
    orchestrators_above: Mapped[str] = mapped_column(Text, server_default=text("''"))
    implicit: Mapped[bool] = mapped_column(Boolean)
    ended_at: Mapped[datetime | None] = mapped_column(Instant)
    reason: Mapped[str | None] = mapped_column(String(1000))


class TaskAgent(Base):
    """Which agents may ask under a task."""

    __tablename__ = "task_agents"

    task_id: Mapped[str] = mapped_column(Id, ForeignKey("tasks.id"), primary_key=True)
    agent: Mapped[str] = mapped_column(Name, primary_key=True, index=True)


class Grant(Base):
    __tablename__ = "grants"
    __table_args__ = (
        CheckConstraint(_one_of("state", GrantState), name="state_is_known"),
        CheckConstraint("(state = 'revoked') = (revoked_at IS NOT NULL)", name="revoked_has_a_time"),
        CheckConstraint("issued_at IS NULL OR expires_at > issued_at", name="expires_after_issue"),
        CheckConstraint(f"break_glass IS NULL OR ttl_s <= {_BREAK_GLASS_S}", name="break_glass_is_short"),
        Index("grants_task_idx", "task_id", "state"),
        Index("grants_agent_idx", "agent", "id"),
        Index(
            "grants_held_by_agent_idx",
            "agent",
            "expires_at",
            postgresql_where=text("state IN ('approved', 'active')"),
            sqlite_where=text("state IN ('approved', 'active')"),
        ),
        Index(
            "grants_due_idx",
            "expires_at",
            postgresql_where=text("state IN ('pending', 'approved', 'active')"),
            sqlite_where=text("state IN ('pending', 'approved', 'active')"),
        ),
        Index(
            "grants_live_on_resource_idx",
            "resource",
            "expires_at",
            postgresql_where=text("state IN ('approved', 'active')"),
            sqlite_where=text("state IN ('approved', 'active')"),
        ),
        Index(
            "grants_live_of_issuer_idx",
            "issuer",
            "expires_at",
            postgresql_where=text("state IN ('approved', 'active')"),
            sqlite_where=text("state IN ('approved', 'active')"),
        ),
        Index("grants_status_idx", "status_list", "status_index", unique=True),
        Index(
            "grants_out_idx",
            "status_list",
            "status_index",
            postgresql_where=text("state <> 'active' AND status_list IS NOT NULL"),
            sqlite_where=text("state <> 'active' AND status_list IS NOT NULL"),
        ),
        Index("grants_trace_idx", "trace_id"),
        Index(
            "grants_in_parts_idx",
            "tasks_above",
            postgresql_where=text("tasks_above <> ''"),
            sqlite_where=text("tasks_above <> ''"),
        ),
        Index(
            "grants_break_glass_idx",
            "id",
            postgresql_where=text("break_glass IS NOT NULL"),
            sqlite_where=text("break_glass IS NOT NULL"),
        ),
        Index(
            "grants_handed_down_idx", "chain", postgresql_where=text("chain <> ''"), sqlite_where=text("chain <> ''")
        ),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    task_id: Mapped[str] = mapped_column(Id, ForeignKey("tasks.id"))
    era: Mapped[int] = mapped_column(BigInteger)
    state: Mapped[str] = mapped_column(String(16))
    agent: Mapped[str] = mapped_column(Name)
    issuer: Mapped[str] = mapped_column(Name)
    subject: Mapped[str] = mapped_column(String(2048))
    orchestrator: Mapped[str] = mapped_column(Name)
    on_behalf_of: Mapped[str | None] = mapped_column(Name)
    parent_grant_id: Mapped[str | None] = mapped_column(Id, ForeignKey("grants.id"), index=True)
    resource: Mapped[str] = mapped_column(String(1000))
    scopes: Mapped[list[str]] = mapped_column(Json)
    provider: Mapped[str] = mapped_column(String(64))
    jti: Mapped[str | None] = mapped_column(String(64))
    kids: Mapped[str] = mapped_column(Text)
    jkt: Mapped[str | None] = mapped_column(String(64))
    credential_sha256: Mapped[str | None] = mapped_column(String(64))
    status_list: Mapped[int | None] = mapped_column(Integer)
    status_index: Mapped[int | None] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(Instant)
    issued_at: Mapped[datetime | None] = mapped_column(Instant)
    expires_at: Mapped[datetime] = mapped_column(Instant)
    renewable_until: Mapped[datetime | None] = mapped_column(Instant)
    ttl_s: Mapped[int] = mapped_column(Integer)
    ttl_decided_by: Mapped[str] = mapped_column(String(64))
    intent: Mapped[str | None] = mapped_column(String(1000))
    claimed: Mapped[dict[str, Any]] = mapped_column(Json)
    request_sha256: Mapped[str] = mapped_column(String(64))
    decision: Mapped[dict[str, Any]] = mapped_column(Json)
    policies: Mapped[str] = mapped_column(Text)
    chain: Mapped[str] = mapped_column(Text, server_default=text("''"))
    tasks_above: Mapped[str] = mapped_column(Text, server_default=text("''"))
    orchestrators_above: Mapped[str] = mapped_column(Text, server_default=text("''"))
    hand_to: Mapped[str] = mapped_column(Text, server_default=text("''"))
    break_glass: Mapped[str | None] = mapped_column(String(1000))
    policy_version: Mapped[int | None] = mapped_column(Integer)
    terms: Mapped[dict[str, Any] | None] = mapped_column(Json)
    trace_id: Mapped[str | None] = mapped_column(String(32))
    revoked_at: Mapped[datetime | None] = mapped_column(Instant)
    revoked_by: Mapped[str | None] = mapped_column(Name)
    reason: Mapped[str | None] = mapped_column(String(1000))


class Approval(Base):
    """`broker.domain.approval.Approval`, as a row; `polled_at` is when its agent last asked whether it is decided."""

    __tablename__ = "approvals"
    __table_args__ = (
        CheckConstraint(_one_of("state", ApprovalState), name="state_is_known"),
        CheckConstraint("(state = 'open') = (ended_at IS NULL)", name="ended_has_a_time"),
        CheckConstraint("collected_at IS NULL OR state = 'approved'", name="collected_was_approved"),
        Index("approvals_grant_idx", "grant_id", unique=True),
        Index("approvals_agent_idx", "agent", "id"),
        Index(
            "approvals_open_idx",
            "agent",
            postgresql_where=text("state = 'open'"),
            sqlite_where=text("state = 'open'"),
        ),
        Index(
            "approvals_uncollected_idx",
            "agent",
            postgresql_where=text("state = 'approved' AND collected_at IS NULL"),
            sqlite_where=text("state = 'approved' AND collected_at IS NULL"),
        ),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    state: Mapped[str] = mapped_column(String(16))
    grant_id: Mapped[str] = mapped_column(Id, ForeignKey("grants.id"))
    task_id: Mapped[str] = mapped_column(Id, ForeignKey("tasks.id"))
    agent: Mapped[str] = mapped_column(Name)
    orchestrator: Mapped[str] = mapped_column(Name)
    resource: Mapped[str] = mapped_column(String(1000))
    scopes: Mapped[list[str]] = mapped_column(Json)
    ttl_s: Mapped[int] = mapped_column(Integer)
    groups: Mapped[str] = mapped_column(Text)
    needs: Mapped[list[dict[str, Any]]] = mapped_column(Json)
    request_sha256: Mapped[str] = mapped_column(String(64))
    parameters_sha256: Mapped[str] = mapped_column(String(64))
    policy_version: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(Instant)
    expires_at: Mapped[datetime] = mapped_column(Instant)
    ended_at: Mapped[datetime | None] = mapped_column(Instant)
    ended_by: Mapped[str | None] = mapped_column(Name)
    reason: Mapped[str | None] = mapped_column(String(1000))
    collected_at: Mapped[datetime | None] = mapped_column(Instant)
    polled_at: Mapped[datetime | None] = mapped_column(Instant)


class Vote(Base):
    """What one person said to one approval; the primary key is what makes a second vote fail (INV-15)."""

    __tablename__ = "votes"

    approval_id: Mapped[str] = mapped_column(Id, ForeignKey("approvals.id"), primary_key=True)
    voter: Mapped[str] = mapped_column(Name, primary_key=True)
    issuer: Mapped[str] = mapped_column(Name)
    subject: Mapped[str] = mapped_column(String(2048))
    verdict: Mapped[str] = mapped_column(String(16))
    scopes: Mapped[list[str] | None] = mapped_column(Json)
    ttl_s: Mapped[int | None] = mapped_column(Integer)
    reason: Mapped[str | None] = mapped_column(String(1000))
    voted_at: Mapped[datetime] = mapped_column(Instant)


class Review(Base):
    """What is owed for a break-glass whose credential was handed out: that somebody else looks at it afterwards."""

    __tablename__ = "reviews"
    __table_args__ = (
        CheckConstraint(_one_of("state", ReviewState), name="state_is_known"),
        CheckConstraint("(state = 'completed') = (completed_at IS NOT NULL)", name="completed_has_a_time"),
        CheckConstraint("(state = 'completed') = (note IS NOT NULL)", name="completed_has_a_note"),
        Index("reviews_grant_idx", "grant_id", unique=True),
        Index(
            "reviews_open_idx",
            "due_at",
            postgresql_where=text("state <> 'completed'"),
            sqlite_where=text("state <> 'completed'"),
        ),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    state: Mapped[str] = mapped_column(String(16))
    grant_id: Mapped[str] = mapped_column(Id, ForeignKey("grants.id"))
    opened_at: Mapped[datetime] = mapped_column(Instant)
    due_at: Mapped[datetime] = mapped_column(Instant)
    completed_at: Mapped[datetime | None] = mapped_column(Instant)
    completed_by: Mapped[str | None] = mapped_column(Name)
    note: Mapped[str | None] = mapped_column(String(1000))


class Announcement(Base):
    """An audit event that was told, or is yet to be, by one channel to everybody it reaches."""

    __tablename__ = "announcements"
    __table_args__ = (
        Index(
            "announcements_due_idx",
            "next_attempt_at",
            postgresql_where=text("taken_at IS NULL"),
            sqlite_where=text("taken_at IS NULL"),
        ),
    )

    event_id: Mapped[str] = mapped_column(Id, ForeignKey("events.id"), primary_key=True)
    channel: Mapped[str] = mapped_column(Name, primary_key=True)
    attempts: Mapped[int] = mapped_column(Integer)
    next_attempt_at: Mapped[datetime] = mapped_column(Instant)
    taken_at: Mapped[datetime | None] = mapped_column(Instant)


class Notice(Base):
    """An approval that people have to be told of by one channel, until it was taken."""

    __tablename__ = "notices"
    __table_args__ = (
        Index(
            "notices_due_idx",
            "next_attempt_at",
            postgresql_where=text("taken_at IS NULL"),
            sqlite_where=text("taken_at IS NULL"),
        ),
    )

    approval_id: Mapped[str] = mapped_column(Id, ForeignKey("approvals.id"), primary_key=True)
    channel: Mapped[str] = mapped_column(Name, primary_key=True)
    attempts: Mapped[int] = mapped_column(Integer)
    next_attempt_at: Mapped[datetime] = mapped_column(Instant)
    taken_at: Mapped[datetime | None] = mapped_column(Instant)


class Lease(Base):
    """`broker.domain.lease.Lease`, as a row. An orphan found outside has no grant of ours."""

    __tablename__ = "leases"
    __table_args__ = (
        CheckConstraint(_one_of("state", LeaseState), name="state_is_known"),
        CheckConstraint("state <> 'released' OR dead_at IS NOT NULL", name="released_was_confirmed"),
        CheckConstraint("state NOT IN ('revoking', 'stuck') OR next_attempt_at IS NOT NULL", name="owed_is_tried"),
        Index("leases_grant_idx", "grant_id"),
        Index("leases_reference_idx", "reference"),
        Index(
            "leases_owed_idx",
            "provider",
            "urgency",
            "next_attempt_at",
            postgresql_where=text("state IN ('revoking', 'stuck')"),
            sqlite_where=text("state IN ('revoking', 'stuck')"),
        ),
        Index(
            "leases_intended_idx",
            "issue_by",
            postgresql_where=text("state = 'intended'"),
            sqlite_where=text("state = 'intended'"),
        ),
        Index(
            "leases_open_idx",
            "provider",
            postgresql_where=text("state <> 'released'"),
            sqlite_where=text("state <> 'released'"),
        ),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    grant_id: Mapped[str | None] = mapped_column(Id, ForeignKey("grants.id"))
    provider: Mapped[str] = mapped_column(String(64))
    settings: Mapped[dict[str, Any]] = mapped_column(Json)
    state: Mapped[str] = mapped_column(String(16))
    revocation_class: Mapped[str | None] = mapped_column(String(16))
    bound_s: Mapped[int | None] = mapped_column(Integer)
    handle: Mapped[str | None] = mapped_column(String(1000))
    reference: Mapped[str | None] = mapped_column(String(1000))
    unknown: Mapped[bool] = mapped_column(Boolean)
    facts: Mapped[dict[str, str]] = mapped_column(Json)
    created_at: Mapped[datetime] = mapped_column(Instant)
    issue_by: Mapped[datetime] = mapped_column(Instant)
    expires_at: Mapped[datetime] = mapped_column(Instant)
    settles_at: Mapped[datetime | None] = mapped_column(Instant)
    urgency: Mapped[int] = mapped_column(Integer)
    attempts: Mapped[int] = mapped_column(Integer)
    next_attempt_at: Mapped[datetime | None] = mapped_column(Instant)
    fence: Mapped[int] = mapped_column(Integer)
    last_error: Mapped[str | None] = mapped_column(String(1000))
    dead_at: Mapped[datetime | None] = mapped_column(Instant)
    abandoned_at: Mapped[datetime | None] = mapped_column(Instant)
    abandoned_by: Mapped[str | None] = mapped_column(Name)
    abandoned_reason: Mapped[str | None] = mapped_column(String(1000))


class ProviderLook(Base):
    """When all that a provider says is alive was last compared with our rows, and how often that was done.

    A number lower than one that was seen before is a database that went back in time (INV-37). `wanted_at` is when
    somebody last wanted it done anew.
    """

    __tablename__ = "provider_looks"

    provider: Mapped[str] = mapped_column(String(64), primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger)
    began_at: Mapped[datetime | None] = mapped_column(Instant)
    wanted_at: Mapped[datetime | None] = mapped_column(Instant)


class Lockdown(Base):
    """A standing refusal: nothing it covers is live or can be issued until it is lifted."""

    __tablename__ = "lockdowns"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    axis: Mapped[str] = mapped_column(String(16))
    value: Mapped[str] = mapped_column(String(1000))
    reason: Mapped[str] = mapped_column(String(1000))
    set_at: Mapped[datetime] = mapped_column(Instant)
    set_by: Mapped[str] = mapped_column(Name)
    lifted_at: Mapped[datetime | None] = mapped_column(Instant)
    lifted_by: Mapped[str | None] = mapped_column(Name)


class BulkRevocation(Base):
    """One revocation along an axis: it covers every grant up to its era, whether their rows followed yet or not."""

    __tablename__ = "bulk_revocations"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    axis: Mapped[str] = mapped_column(String(16))
    value: Mapped[str] = mapped_column(String(1000))
    era: Mapped[int] = mapped_column(BigInteger)
    reason: Mapped[str] = mapped_column(String(1000))
    revoked_at: Mapped[datetime] = mapped_column(Instant)
    revoked_by: Mapped[str] = mapped_column(Name)
    rows_followed_at: Mapped[datetime | None] = mapped_column(Instant)


class AuditEvent(Base):
    """`broker.domain.audit.Event`, as a row."""

    __tablename__ = "events"
    __table_args__ = (
        Index("events_task_idx", "task_id", "id"),
        Index("events_grant_idx", "grant_id", "id"),
        Index("events_agent_idx", "agent", "id"),
        Index("events_type_idx", "type", "id"),
        Index("events_denials_idx", "agent", "id", postgresql_where=text(IS_DENIAL), sqlite_where=text(IS_DENIAL)),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    at: Mapped[datetime] = mapped_column(Instant)
    type: Mapped[str] = mapped_column(String(64))
    actor: Mapped[str] = mapped_column(Name)
    outcome: Mapped[str] = mapped_column(String(32))
    task_id: Mapped[str | None] = mapped_column(Id)
    grant_id: Mapped[str | None] = mapped_column(Id)
    agent: Mapped[str | None] = mapped_column(Name)
    user: Mapped[str | None] = mapped_column(Name)
    resource: Mapped[str | None] = mapped_column(String(1000))
    reason: Mapped[str | None] = mapped_column(String(1000))
    policy_version: Mapped[int | None] = mapped_column(Integer)
    trace_id: Mapped[str | None] = mapped_column(String(32))
    data: Mapped[dict[str, Any]] = mapped_column(Json)


class Alert(Base):
    """An audit event that somebody has to be told of, until it was taken."""

    __tablename__ = "alerts"
    __table_args__ = (
        Index(
            "alerts_due_idx",
            "next_attempt_at",
            postgresql_where=text("taken_at IS NULL"),
            sqlite_where=text("taken_at IS NULL"),
        ),
    )

    event_id: Mapped[str] = mapped_column(Id, ForeignKey("events.id"), primary_key=True)
    attempts: Mapped[int] = mapped_column(Integer)
    next_attempt_at: Mapped[datetime] = mapped_column(Instant)
    taken_at: Mapped[datetime | None] = mapped_column(Instant)


class ConsumedProof(Base):
    """A one-time thing that was used; the primary key is what makes a second use fail (INV-20)."""

    __tablename__ = "consumed_proofs"

    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    key_sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    forget_at: Mapped[datetime] = mapped_column(Instant, index=True)


class IdempotencyKey(Base):
    """What one caller's key stands for; the same key with another body is refused (INV-06)."""

    __tablename__ = "idempotency_keys"

    principal: Mapped[str] = mapped_column(Name, primary_key=True)
    key_sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    request_sha256: Mapped[str] = mapped_column(String(64))
    made_id: Mapped[str] = mapped_column(Id)
    forget_at: Mapped[datetime] = mapped_column(Instant, index=True)


class Allowance(Base):
    """How much of one limit, for one agent, task, resource or issuer, was handed to brokers in the newest window.

    `asked` and `given` are of the broker that came last; `taken` is of all of them, and never more than `bound`.
    """

    __tablename__ = "allowances"

    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    key_sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    window_start: Mapped[int] = mapped_column(BigInteger)
    bound: Mapped[int] = mapped_column(BigInteger)
    asked: Mapped[int] = mapped_column(BigInteger)
    given: Mapped[int] = mapped_column(BigInteger)
    taken: Mapped[int] = mapped_column(BigInteger)
    forget_at: Mapped[datetime] = mapped_column(Instant, index=True)


class SigningKey(Base):
    """A key pair of the broker; the private half only as AES-GCM ciphertext under the master key."""

    __tablename__ = "signing_keys"
    __table_args__ = (
        CheckConstraint(_one_of("state", KeyState), name="state_is_known"),
        Index(
            "signing_keys_one_current_idx",
            "algorithm",
            unique=True,
            postgresql_where=text("state = 'current'"),
            sqlite_where=text("state = 'current'"),
        ),
    )

    kid: Mapped[str] = mapped_column(String(64), primary_key=True)
    algorithm: Mapped[str] = mapped_column(String(16))
    state: Mapped[str] = mapped_column(String(16))
    public_jwk: Mapped[dict[str, str]] = mapped_column(Json)
    sealed_private_key: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[datetime] = mapped_column(Instant)
    activated_at: Mapped[datetime | None] = mapped_column(Instant)
    retired_at: Mapped[datetime | None] = mapped_column(Instant)


class StatusList(Base):
    """One status list; indexes are handed out once and never again, so none is ever reused."""

    __tablename__ = "status_lists"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    next_index: Mapped[int] = mapped_column(Integer)
    last_expiry_at: Mapped[datetime] = mapped_column(Instant)


class Redecision(Base):
    """A run in which live grants are decided again: all that were issued up to an era, or those of an agent or user."""

    __tablename__ = "redecisions"
    __table_args__ = (
        Index(
            "redecisions_open_idx",
            "id",
            postgresql_where=text("finished_at IS NULL"),
            sqlite_where=text("finished_at IS NULL"),
        ),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    era: Mapped[int] = mapped_column(BigInteger)
    version: Mapped[int] = mapped_column(Integer)
    agent: Mapped[str | None] = mapped_column(Name)
    user: Mapped[str | None] = mapped_column(Name)
    cause: Mapped[str] = mapped_column(String(255))
    ordered_at: Mapped[datetime] = mapped_column(Instant)
    ordered_by: Mapped[str] = mapped_column(Name)
    planned_at: Mapped[datetime | None] = mapped_column(Instant)
    undecided_at: Mapped[datetime | None] = mapped_column(Instant)
    finished_at: Mapped[datetime | None] = mapped_column(Instant)


class RedecisionShare(Base):
    """A part of a run, for one broker at a time: the grants between two ids."""

    __tablename__ = "redecision_shares"

    redecision_id: Mapped[str] = mapped_column(Id, ForeignKey("redecisions.id"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    first_id: Mapped[str] = mapped_column(Id)
    last_id: Mapped[str] = mapped_column(Id)
    fence: Mapped[int] = mapped_column(Integer)
    due_at: Mapped[datetime] = mapped_column(Instant)
    done_at: Mapped[datetime | None] = mapped_column(Instant)
    looked_at: Mapped[int] = mapped_column(Integer)
    ended: Mapped[int] = mapped_column(Integer)
    shortened: Mapped[int] = mapped_column(Integer)


class Signal(Base):
    """What somebody who watches said of an agent or a user, until it is over."""

    __tablename__ = "signals"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    axis: Mapped[str] = mapped_column(String(16))
    value: Mapped[str] = mapped_column(Name)
    level: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str] = mapped_column(String(1000))
    source: Mapped[str] = mapped_column(Name)
    sent_at: Mapped[datetime] = mapped_column(Instant)
    sent_by: Mapped[str] = mapped_column(Name)
    expires_at: Mapped[datetime] = mapped_column(Instant, index=True)


class ConfigurationVersion(Base):
    """Issuers, principals, resources and policies as they were applied: the same for every broker on this database."""

    __tablename__ = "configuration_versions"

    version: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    sha256: Mapped[str] = mapped_column(String(64))
    document: Mapped[dict[str, Any]] = mapped_column(Json)
    applied_at: Mapped[datetime] = mapped_column(Instant)
    applied_by: Mapped[str] = mapped_column(Name)


class Feed(Base):
    """One row: which feed this is, its newest event, the head of the chain over all of them, the newest `lists` event.

    Whoever numbers events holds it. It has no id until somebody first does.
    """

    __tablename__ = "feed"
    __table_args__ = (CheckConstraint("id = 1", name="is_one_row"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    feed_id: Mapped[str] = mapped_column(String(64))
    seq: Mapped[int] = mapped_column(BigInteger)
    head: Mapped[str] = mapped_column(String(64))
    lists_seq: Mapped[int] = mapped_column(BigInteger)


class FeedOutbox(Base):
    """What ended, written in the transaction that ended it, until it is numbered. Its ids commit out of order."""

    __tablename__ = "feed_outbox"

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    at: Mapped[datetime] = mapped_column(Instant)
    kind: Mapped[str] = mapped_column(String(16))
    members: Mapped[dict[str, Any]] = mapped_column(Json)


class FeedEvent(Base):
    """A numbered event: its text as it goes out, and the head of the chain after it."""

    __tablename__ = "feed_events"

    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    text: Mapped[str] = mapped_column(Text)
    head: Mapped[str] = mapped_column(String(64))
    numbered_at: Mapped[datetime] = mapped_column(Instant)


class ShortenedGrant(Base):
    """A grant that ends at `ends_at`, before a token of it says so: that end is an event of its own when it comes."""

    __tablename__ = "shortened_grants"

    grant_id: Mapped[str] = mapped_column(Id, ForeignKey("grants.id"), primary_key=True)
    ends_at: Mapped[datetime] = mapped_column(Instant, index=True)
    token_ends_at: Mapped[datetime] = mapped_column(Instant)


class Activity(Base):
    """`broker.domain.activity.Activity`, as a row; `report_sha256` is the reporter and its own id for it.

    No foreign key: checking one locks the grant's row, and whoever ends the grant would wait for a report (INV-27).
    """

    __tablename__ = "activities"
    __table_args__ = (
        Index("activities_report_idx", "report_sha256", unique=True),
        Index("activities_task_idx", "task_id", "at", "id"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    task_id: Mapped[str] = mapped_column(Id)
    grant_id: Mapped[str] = mapped_column(Id)
    reporter: Mapped[str] = mapped_column(Name)
    role: Mapped[str] = mapped_column(String(16))
    report_sha256: Mapped[str] = mapped_column(String(64))
    kind: Mapped[str] = mapped_column(String(16))
    action: Mapped[str] = mapped_column(Name)
    resource: Mapped[str] = mapped_column(String(1000))
    scope: Mapped[str | None] = mapped_column(String(200))
    outcome: Mapped[str] = mapped_column(String(16))
    trace_id: Mapped[str | None] = mapped_column(String(32))
    attributes: Mapped[dict[str, str]] = mapped_column(Json)
    at: Mapped[datetime] = mapped_column(Instant)
    received_at: Mapped[datetime] = mapped_column(Instant)


class ActivityTally(Base):
    """How many activities of one grant are kept, and how many were told of when there were enough."""

    __tablename__ = "activity_tallies"

    grant_id: Mapped[str] = mapped_column(Id, primary_key=True)
    kept: Mapped[int] = mapped_column(Integer)
    dropped: Mapped[int] = mapped_column(BigInteger)
    last_at: Mapped[datetime] = mapped_column(Instant, index=True)


class ActivityReporter(Base):
    """How much one reporter told of in the minute that began at `minute_at`."""

    __tablename__ = "activity_reporters"

    reporter: Mapped[str] = mapped_column(Name, primary_key=True)
    minute_at: Mapped[datetime] = mapped_column(Instant)
    told: Mapped[int] = mapped_column(Integer)


class EventStream(Base):
    """A receiver's stream of security events: a place in the feed, and what the receiver wants; one a receiver.

    What opens the receiver is sealed like a signing key. Whoever pushes holds `fence` until `next_attempt_at`.
    """

    __tablename__ = "event_streams"
    __table_args__ = (
        CheckConstraint(_one_of("state", StreamState), name="state_is_known"),
        CheckConstraint(_one_of("method", Delivery), name="method_is_known"),
        CheckConstraint("(method = 'push') = (endpoint_url IS NOT NULL)", name="pushed_to_somewhere"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    receiver: Mapped[str] = mapped_column(Name, unique=True)
    state: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str | None] = mapped_column(String(1000))
    set_by: Mapped[str] = mapped_column(String(16))
    method: Mapped[str] = mapped_column(String(8))
    endpoint_url: Mapped[str | None] = mapped_column(String(2048))
    sealed_authorization: Mapped[bytes | None] = mapped_column(LargeBinary)
    events_requested: Mapped[list[str] | None] = mapped_column(Json)
    description: Mapped[str | None] = mapped_column(String(1000))
    feed_id: Mapped[str] = mapped_column(String(64))
    seq: Mapped[int] = mapped_column(BigInteger)
    failures: Mapped[int] = mapped_column(Integer)
    trouble: Mapped[str | None] = mapped_column(String(255))
    fence: Mapped[int] = mapped_column(BigInteger)
    next_attempt_at: Mapped[datetime] = mapped_column(Instant)
    created_at: Mapped[datetime] = mapped_column(Instant)
    active_at: Mapped[datetime] = mapped_column(Instant)
    progress_at: Mapped[datetime] = mapped_column(Instant)
    verified_at: Mapped[datetime | None] = mapped_column(Instant)


class RemovedSubject(Base):
    """A subject of which a receiver does not want to hear."""

    __tablename__ = "removed_subjects"

    stream_id: Mapped[str] = mapped_column(Id, ForeignKey("event_streams.id", ondelete="CASCADE"), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    subject: Mapped[dict[str, Any]] = mapped_column(Json)


class EventDelivery(Base):
    """A SET that a receiver has not taken yet: what it says, to be signed each time it is sent, always as one `jti`.

    Ids are given under the lock of the stream, so that they order what it is told. `always`: also while it is paused.
    """

    __tablename__ = "event_deliveries"
    __table_args__ = (Index("event_deliveries_stream_idx", "stream_id", "id"),)

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    jti: Mapped[str] = mapped_column(Id, unique=True)
    stream_id: Mapped[str] = mapped_column(Id, ForeignKey("event_streams.id", ondelete="CASCADE"))
    claims: Mapped[dict[str, Any]] = mapped_column(Json)
    made_at: Mapped[datetime] = mapped_column(Instant)
    always: Mapped[bool] = mapped_column(Boolean)
