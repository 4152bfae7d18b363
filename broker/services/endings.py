"""How a grant ends, whoever ends it: its state, what is owed for it and who is asked about it, in one transaction.

No way out of `active` leads past here, so that no secret outside is left without a debt (INV-03), and nobody is asked
about a request that came to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row

from broker.domain.audit import Event
from broker.domain.feed import LISTS, Ended, end_of_grant
from broker.domain.identity import new_id
from broker.domain.lease import Lease, Urgency
from broker.domain.lifecycle import ApprovalState, GrantState, LeaseState
from broker.services import break_glass
from broker.store import approvals, grants, leases, models
from broker.store.feed import announce
from broker.store.transitions import GRANT_FACTS, move, record

ACTOR = "broker"  # of what time alone, or our own work, brought about
OWES_NOTHING = "jwt"  # the provider whose credentials exist nowhere but in their bearer's hand

_TOLD_ONE_BY_ONE = 100  # grants that one transaction ends; of more, verifiers are sent to the status lists

# What an open approval becomes with its grant; whatever else ends the grant takes the question back.
_WITH_ITS_GRANT = {GrantState.DENIED: ApprovalState.DENIED, GrantState.EXPIRED: ApprovalState.EXPIRED}


def end_grants(
    db: Connection,
    to: GrantState,
    *where: ColumnElement[bool],
    now: datetime,
    urgency: Urgency,
    event: Callable[[Row[Any]], Event],
    **values: Any,
) -> Sequence[Row[Any]]:
    """Move grants into a state that ends them; each lease of theirs becomes a debt of this urgency, due now.

    A grant is locked before its approval and its lease, here and wherever both move: in two orders, an end and an issue
    that meet would wait for each other, and the database would fail one of them (INV-27).
    """
    moved = move(db, models.Grant, to, *where, event=event, returning=GRANT_FACTS, **values)
    waited = [row.id for row in moved if row.issued_at is None]
    if waited:
        actor, reason = str(values.get("revoked_by", ACTOR)), values.get("reason")
        ended = _WITH_ITS_GRANT.get(to, ApprovalState.WITHDRAWN)
        end_approvals(db, ended, approvals.of_grants(db, waited), now=now, actor=actor, reason=reason)
    broken = [row for row in moved if row.break_glass is not None]
    if broken:
        record(db, [break_glass.ended(row, event(row), str(to), now) for row in broken])
    owing = [row.id for row in moved if row.provider != OWES_NOTHING]
    if owing:
        move(
            db,
            models.Lease,
            LeaseState.REVOKING,
            leases.of_grants(db, owing),
            leases.not_owed_yet(),
            event=lease_event(now, "lease.owed"),
            returning=leases.LEASE_FACTS,
            urgency=int(urgency),
            next_attempt_at=now,
        )
    return moved


def end_with_descendants(
    db: Connection,
    *where: ColumnElement[bool],
    now: datetime,
    urgency: Urgency,
    event: Callable[[Row[Any]], Event],
    **values: Any,
) -> Sequence[Row[Any]]:
    """Revoke grants and everything that was handed down from them (INV-11); answers all that were.

    For whoever ends grants one by one. A task and an axis of revocation cover what is below by themselves.
    """
    ended: list[Row[Any]] = []
    level = end_grants(db, GrantState.REVOKED, *where, now=now, urgency=urgency, event=event, **values)
    while level:
        ended += level
        # Whoever was just handing one of them down held it, and has committed before it could be ended above; each
        # level is a look of its own, so it is seen.
        below = grants.children_of(db, [row.id for row in level]) & grants.unexpired(now)
        handed = {**values, "reason": f"what it was handed down from ended: {values['reason']}"[:1000]}
        level = end_grants(db, GrantState.REVOKED, below, now=now, urgency=urgency, event=event, **handed)
    announce(db, now, _told_of(ended))
    return ended


def _told_of(ended: Sequence[Row[Any]]) -> list[Ended]:
    """What verifiers hear of grants that ended: only a token that was issued is ever shown to them."""
    shown = [row.id for row in ended if row.provider == OWES_NOTHING and row.issued_at is not None]
    return [end_of_grant(grant_id) for grant_id in shown] if len(shown) <= _TOLD_ONE_BY_ONE else [LISTS]


def end_approvals(
    db: Connection,
    to: ApprovalState,
    *where: ColumnElement[bool],
    now: datetime,
    actor: str,
    reason: str | None,
    trace_id: str | None = None,
) -> Sequence[Row[Any]]:
    """Move open approvals into a state that ends them; the caller holds their grants."""

    def told(row: Row[Any]) -> Event:
        return Event(
            id=new_id("evt", now),
            at=now,
            type=f"approval.{to}",
            actor=actor,
            task_id=row.task_id,
            grant_id=row.grant_id,
            agent=row.agent,
            resource=row.resource,
            reason=reason,
            policy_version=row.policy_version,
            trace_id=trace_id,
            data={"approval_id": row.id},
        )

    facts = approvals.APPROVAL_FACTS
    return move(
        db, models.Approval, to, *where, event=told, returning=facts, ended_at=now, ended_by=actor, reason=reason
    )


def lease_event(at: datetime, type_: str, *, actor: str = ACTOR, **more: Any) -> Callable[[Row[Any] | Lease], Event]:
    """The event maker for leases that moved."""

    def make(row: Row[Any] | Lease) -> Event:
        data = {"lease_id": row.id, "provider": row.provider, "attempts": row.attempts}
        return Event(
            id=new_id("evt", at),
            at=at,
            type=type_,
            actor=actor,
            grant_id=row.grant_id,
            **(more | {"data": data | dict(more.get("data", {}))}),
        )

    return make
