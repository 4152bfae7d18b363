"""Ending authority before its time: one grant, or everything along an axis, and lockdowns that refuse what comes next.

A bulk revocation is effective when its one row commits: whoever asks "live?" consults it. The rows follow, some here
and the rest by the sweeper. Dry run first: counts and samples, and nothing changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row

from broker.domain.audit import Event
from broker.domain.clock import Clock
from broker.domain.errors import NotFound, RoleMissing
from broker.domain.grant import Grant
from broker.domain.identity import Caller, Role, is_id, new_id
from broker.domain.lifecycle import GrantState
from broker.domain.receipt import Receipt, receipt_line
from broker.domain.refusal import Refusal, require_axis
from broker.services.keys import Keys
from broker.services.standing import StandingReader
from broker.services.tasks import SignedReceipt, sign_receipt
from broker.store import gate, grants, models, standing
from broker.store.database import Database
from broker.store.transitions import change_of, move, record

_SAMPLES = 20
_ROWS_AT_ONCE = 1000
_ROWS_INLINE = 5000  # followed before the answer; the sweeper has time for the rest


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


@dataclass(frozen=True, kw_only=True)
class BulkOutcome:
    """What a bulk revocation ended, or in a dry run would end. `by_agent` counts grants."""

    axis: str
    value: str
    dry_run: bool
    revocation_id: str | None
    lockdown: Lockdown | None
    total: int
    by_agent: Mapping[str, int]
    samples: list[Grant]
    receipt: SignedReceipt | None


class Revocation:
    def __init__(self, *, database: Database, standing: StandingReader, keys: Keys, issuer: str, clock: Clock) -> None:
        self._database = database
        self._standing = standing
        self._keys = keys
        self._issuer = issuer
        self._clock = clock

    def revoke_grant(self, caller: Caller, grant_id: str, *, reason: str | None = None) -> SignedReceipt:
        """End one grant; the same answer again for one that has ended. For its holder, its orchestrator, an admin."""
        now = self._clock()
        with self._database.begin() as db:
            grant = grants.find_grant(db, grant_id) if is_id(grant_id, "grt") else None
            if grant is None or not may_see(caller, grant):
                raise NotFound(f"there is no grant {grant_id[:64]!r} that you may see")
            if caller.name not in (grant.agent, grant.orchestrator) and not caller.has(Role.ADMIN):
                raise RoleMissing(f"grant {grant.id} may be revoked by {grant.agent}, {grant.orchestrator} or an admin")
            why = reason or "handed back"
            event = change_of(now, caller.name, "grant.revoked", reason=why, trace_id=caller.trace_id)
            values = {"revoked_at": now, "revoked_by": caller.name, "reason": why}
            move(
                db,
                models.Grant,
                GrantState.REVOKED,
                grants.with_id(grant.id),
                grants.unexpired(now),
                event=event,
                **values,
            )
            grant = grants.find_grant(db, grant_id) or grant
        receipt = Receipt(
            task_id=grant.task_id,
            ended_at=grant.revoked_at or grant.expires_at,
            outcome=str(grant.state),
            lines=[receipt_line(grant, ended_at=None, now=now)],
        )
        return sign_receipt(receipt, self._standing.now(), self._issuer, now)

    def revoke_along(
        self, caller: Caller, axis: str, value: str, *, reason: str, dry_run: bool = False, lockdown: bool = False
    ) -> BulkOutcome:
        """End everything along an axis, at once for every verifier; with `lockdown` nothing new comes after it."""
        require_admin(caller)
        require_axis(axis, value)
        now = self._clock()
        if dry_run:
            with self._database.read() as db:
                where = (
                    grants.covered_by(Refusal(id="", axis=axis, value=value, reason=reason)),
                    grants.unexpired(now),
                )
                return self._outcome(db, axis, value, where, now=now, dry_run=True)
        with self._database.begin() as db:
            era = gate.turn(db)
            revocation_id = new_id("lck", now)
            refusal = Refusal(id=revocation_id, axis=axis, value=value, reason=reason, era=era)
            where = (grants.covered_by(refusal), grants.unexpired(now))
            outcome = self._outcome(db, axis, value, where, now=now, dry_run=False)
            set_ = _set_lockdown(db, caller, axis, value, reason, now) if lockdown else None
            standing.insert_bulk_revocation(
                db,
                {
                    "id": revocation_id,
                    "axis": axis,
                    "value": value,
                    "era": era,
                    "reason": reason,
                    "revoked_at": now,
                    "revoked_by": caller.name,
                    "rows_followed_at": None,
                },
            )
            record(
                db, [_bulk_event(caller, axis, value, reason, now, "revocation.ordered", outcome.total, revocation_id)]
            )
        self.follow(refusal, at_most=_ROWS_INLINE)
        lines = [receipt_line(grant, ended_at=now, now=now) for grant in outcome.samples if grant.issued_at]
        receipt = Receipt(task_id=value if axis == "task" else None, ended_at=now, outcome="revoked", lines=lines)
        signed = sign_receipt(receipt, self._standing.now(), self._issuer, now)
        return BulkOutcome(
            axis=axis,
            value=value,
            dry_run=False,
            revocation_id=revocation_id,
            lockdown=set_,
            total=outcome.total,
            by_agent=outcome.by_agent,
            samples=outcome.samples,
            receipt=signed,
        )

    def follow(self, refusal: Refusal, *, at_most: int) -> int:
        """Let rows follow a bulk revocation, in batches; several may do so at once. Answers how many moved."""
        moved = 0
        while moved < at_most:
            now = self._clock()
            with self._database.begin() as db:
                covered = grants.covered_by(refusal)
                ids = grants.claim_unended(db, covered, limit=_ROWS_AT_ONCE)
                if not ids:
                    # What others hold, they are ending or about to be refused; the refusal stands until none is left.
                    if not grants.unended_ids(db, covered, limit=1):
                        standing.followed(db, refusal.id, now=now)
                    break
                by = standing.who_revoked(db, refusal.id)
                expired = change_of(now, by, "grant.expired")
                move(db, models.Grant, GrantState.EXPIRED, grants.with_ids(ids), grants.expired(now), event=expired)
                revoked = change_of(now, by, "grant.revoked", reason=refusal.reason, data={"revocation": refusal.id})
                values = {"revoked_at": now, "revoked_by": by, "reason": refusal.reason}
                move(db, models.Grant, GrantState.REVOKED, grants.with_ids(ids), event=revoked, **values)
            moved += len(ids)
        return moved

    def follow_all(self, *, at_most: int) -> int:
        """Whatever any broker ordered and did not finish."""
        with self._database.read() as db:
            waiting = standing.unfollowed(db)
        moved = 0
        for refusal in waiting:
            moved += self.follow(refusal, at_most=at_most - moved)
            if moved >= at_most:
                break
        return moved

    def compromise_key(self, caller: Caller, kid: str, *, reason: str) -> BulkOutcome:
        """Stop trusting a signing key everywhere, and revoke everything it signed."""
        require_admin(caller)
        self._keys.compromise(kid, actor=caller.name, reason=reason, now=self._clock())
        return self.revoke_along(caller, "key", kid, reason=reason)

    def set_lockdown(self, caller: Caller, axis: str, value: str, *, reason: str) -> Lockdown:
        """Refuse what comes next, and revoke what is out: lifting it must not bring anything back (INV-23)."""
        outcome = self.revoke_along(caller, axis, value, reason=reason, lockdown=True)
        if outcome.lockdown is None:
            raise RuntimeError("a lockdown was ordered and none was set")
        return outcome.lockdown

    def lift_lockdown(self, caller: Caller, lockdown_id: str) -> Lockdown:
        require_admin(caller)
        now = self._clock()
        with self._database.begin() as db:
            gate.turn(db)
            row = standing.lift(db, lockdown_id, now=now, by=caller.name) if is_id(lockdown_id, "lck") else None
            if row is None:
                raise NotFound(f"no lockdown {lockdown_id[:64]!r} is standing")
            record(db, [_bulk_event(caller, row.axis, row.value, row.reason, now, "lockdown.lifted", 0, row.id)])
            return _lockdown_of(row)

    def lockdowns(self, caller: Caller, *, standing_only: bool = True) -> list[Lockdown]:
        require_admin(caller)
        with self._database.read() as db:
            return [_lockdown_of(row) for row in standing.lockdowns(db, standing=standing_only)]

    def _outcome(
        self, db: Connection, axis: str, value: str, where: tuple[Any, ...], *, now: datetime, dry_run: bool
    ) -> BulkOutcome:
        by_agent = grants.count_by_agent(db, *where)
        samples = grants.page_of_grants(db, where=(grants.unended(), *where), before=None, limit=_SAMPLES)
        return BulkOutcome(
            axis=axis,
            value=value,
            dry_run=dry_run,
            revocation_id=None,
            lockdown=None,
            total=sum(by_agent.values()),
            by_agent=by_agent,
            samples=samples,
            receipt=None,
        )


def require_admin(caller: Caller) -> None:
    if not caller.has(Role.ADMIN):
        raise RoleMissing(f"{caller.name} is not an admin: only an admin may do this")


def may_see(caller: Caller, grant: Grant) -> bool:
    """INV-28: everybody else is told that it does not exist."""
    return caller.name in (grant.agent, grant.orchestrator) or caller.has(Role.ADMIN) or caller.has(Role.AUDITOR)


def _set_lockdown(db: Connection, caller: Caller, axis: str, value: str, reason: str, now: datetime) -> Lockdown:
    lockdown = Lockdown(id=new_id("lck", now), axis=axis, value=value, reason=reason, set_at=now, set_by=caller.name)
    standing.insert_lockdown(db, vars(lockdown))
    record(db, [_bulk_event(caller, axis, value, reason, now, "lockdown.set", 0, lockdown.id)])
    return lockdown


def _lockdown_of(row: Row[Any]) -> Lockdown:
    return Lockdown(**{name: getattr(row, name) for name in Lockdown.__dataclass_fields__})


def _bulk_event(
    caller: Caller, axis: str, value: str, reason: str, now: datetime, type_: str, total: int, made_id: str
) -> Event:
    return Event(
        id=new_id("evt", now),
        at=now,
        type=type_,
        actor=caller.name,
        reason=reason,
        trace_id=caller.trace_id,
        task_id=value if axis == "task" and is_id(value, "task") else None,
        agent=value if axis == "agent" else None,
        user=value if axis == "user" else None,
        resource=value if axis == "resource" else None,
        data={"id": made_id, "axis": axis, "value": value, "grants": total},
    )
