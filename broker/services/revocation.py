"""Ending authority before its time: one grant, or everything along an axis, and lockdowns that refuse what comes next.

A bulk revocation is effective when its one row commits: whoever asks "live?" consults it. The rows follow, some here
and the rest by the sweeper. Dry run first: counts and samples, and nothing changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row

from broker.domain.audit import Event
from broker.domain.clock import Clock
from broker.domain.errors import Conflict, NotFound, RoleMissing
from broker.domain.feed import end_along
from broker.domain.grant import Grant, IdempotencyClaim
from broker.domain.identity import Actor, Caller, Role, is_id, new_id
from broker.domain.lease import Urgency
from broker.domain.lifecycle import GrantState
from broker.domain.receipt import Receipt, receipt_line
from broker.domain.refusal import Refusal, require_axis
from broker.providers.wakeups import Wakeups
from broker.services.debts import Debts
from broker.services.endings import ACTOR, OWES_NOTHING, end_grants, end_with_descendants
from broker.services.idempotency import claimed
from broker.services.keys import Keys
from broker.services.receipts import SignedReceipt, signed_receipt
from broker.services.refusals import recorded
from broker.services.standing import StandingReader
from broker.store import gate, grants, leases, locks, standing
from broker.store.database import Database
from broker.store.feed import announce
from broker.store.transitions import change_of, record

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
    ordered_at: datetime | None
    lockdown: Lockdown | None
    total: int
    by_agent: Mapping[str, int]
    samples: list[Grant]
    receipt: SignedReceipt | None


@dataclass(frozen=True, kw_only=True)
class _Ourselves:
    """Who orders it where nobody called."""

    name: str = ACTOR
    trace_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Order:
    """A bulk revocation as it was committed."""

    refusal: Refusal
    ordered_at: datetime
    lockdown: Lockdown | None


class Revocation:
    def __init__(
        self,
        *,
        database: Database,
        standing: StandingReader,
        debts: Debts,
        keys: Keys,
        wakeups: Wakeups,
        issuer: str,
        clock: Clock,
    ) -> None:
        self._database = database
        self._standing = standing
        self._debts = debts
        self._keys = keys
        self._wakeups = wakeups
        self._issuer = issuer
        self._clock = clock
        self._being_counted: set[str] = set()

    def revoke_grant(self, caller: Caller, grant_id: str, *, reason: str | None = None) -> SignedReceipt:
        """End one grant and what was handed down from it; the same answer again for one that has ended.

        For its holder, whoever handed it down to that holder, its orchestrator, an admin.
        """
        with (
            recorded(self._database, self._clock, caller, "grant.refused", "revoke"),
            self._database.begin() as db,
        ):
            # Locked first: the time it ends is read behind whoever held it (INV-04).
            grant = _held(db, grant_id)
            now = self._clock()
            above = None if grant is None else grant.parent_grant_id
            parent = None if above is None else grants.find_grant(db, above)
            handed_down = parent is not None and parent.is_held_by(caller.principal)
            if grant is None or not (handed_down or may_see(caller, grant)):
                raise NotFound(f"there is no grant {grant_id[:64]!r} that you may see")
            holds = grant.is_held_by(caller.principal)
            if not (holds or handed_down or caller.name == grant.orchestrator or caller.has(Role.ADMIN)):
                raise RoleMissing(f"grant {grant.id} may be revoked by {grant.agent}, {grant.orchestrator} or an admin")
            why = reason or ("handed back" if holds else "revoked")
            event = change_of(now, caller.name, "grant.revoked", reason=why, trace_id=caller.trace_id)
            values = {"revoked_at": now, "revoked_by": caller.name, "reason": why}
            where = (grants.with_id(grant.id), grants.unexpired(now))
            urgency = Urgency.ENDED if holds else Urgency.URGENT
            end_with_descendants(db, *where, now=now, urgency=urgency, event=event, **values)
            grant = grants.find_grant(db, grant_id) or grant
        # For the answer alone, and however much it is: what ends authority does not wait for it.
        with self._database.read() as db:
            below = grants.descendants(db, grant.id)
        self._debts.pay_now([one.id for one in (grant, *below) if one.provider != OWES_NOTHING])
        with self._database.read() as db:
            owed = leases.leases_of(db, [one.id for one in (grant, *below) if one.provider != OWES_NOTHING])
        answered_at = self._clock()
        expired = grant.state is GrantState.ACTIVE and grant.expires_at <= answered_at
        receipt = Receipt(
            task_id=grant.task_id,
            ended_at=grant.revoked_at or grant.expires_at,
            outcome=str(GrantState.EXPIRED if expired else grant.state),
            lines=[
                receipt_line(one, ended_at=None, now=answered_at, lease=owed.get(one.id))
                for one in (grant, *below)
                if one is grant or one.issued_at or one.id in owed
            ],
        )
        return signed_receipt(receipt, self._standing, self._issuer, answered_at)

    def revoke_along(
        self,
        caller: Caller,
        axis: str,
        value: str,
        *,
        reason: str,
        dry_run: bool = False,
        lockdown: bool = False,
        idempotency: IdempotencyClaim | None = None,
    ) -> BulkOutcome:
        """End everything along an axis, at once for every verifier; with `lockdown` nothing new comes after it."""
        with recorded(self._database, self._clock, caller, "revocation.refused", axis):
            require_admin(caller)
            require_axis(axis, value)
        if dry_run:
            return self._foreseen(axis, value, reason)
        with (
            recorded(self._database, self._clock, caller, "revocation.refused", axis),
            self._database.begin() as db,
        ):
            order = self._ordered(db, caller, axis, value, reason, lockdown=lockdown, idempotency=idempotency)
        return self._carried_out(order)

    def lock_down_agent(self, agent: str, why: Callable[[Connection], str | None]) -> Lockdown | None:
        """Lock an agent down by our own decision, if there still is a reason once nobody issues any more; one at most.

        `why` is asked behind the gate, where of two brokers that want it the second finds what the first did.
        """
        with self._database.begin() as db:
            locks.hold_gate_alone(db)
            reason = None if standing.has_lockdown(db, "agent", agent) else why(db)
            if reason is None:
                return None
            by = _Ourselves()
            order = self._ordered(db, by, "agent", agent, reason, lockdown=True)
            made_id, now = order.refusal.id, order.ordered_at
            record(db, [_bulk_event(by, "agent", agent, reason, now, "agent.locked_down", made_id)])
        return self._carried_out(order).lockdown

    def compromise_key(self, caller: Caller, kid: str, *, reason: str) -> BulkOutcome:
        """Stop trusting a signing key everywhere, and revoke everything it signed, in one transaction."""
        require_admin(caller)
        with self._database.begin() as db:
            self._keys.mark_compromised(db, kid, caller.name, reason, self._clock())
            order = self._ordered(db, caller, "key", kid, reason)
        # The new next key afterwards: distrust waits for no key to be made.
        self._keys.fill_up(kid, actor=caller.name, now=self._clock())
        return self._carried_out(order)

    def _foreseen(self, axis: str, value: str, reason: str) -> BulkOutcome:
        """The blast radius, and nothing changed."""
        now = self._clock()
        covered = (grants.covered_by(Refusal(id="", axis=axis, value=value, reason=reason)), grants.unexpired(now))
        with self._database.read() as db:
            by_agent = grants.count_by_agent(db, *covered)
            samples = grants.page_of_grants(db, where=(grants.unended(), *covered), before=None, limit=_SAMPLES)
        return BulkOutcome(
            axis=axis,
            value=value,
            dry_run=True,
            revocation_id=None,
            ordered_at=None,
            lockdown=None,
            total=sum(by_agent.values()),
            by_agent=by_agent,
            samples=samples,
            receipt=None,
        )

    def _ordered(
        self,
        db: Connection,
        by: Actor,
        axis: str,
        value: str,
        reason: str,
        *,
        lockdown: bool = False,
        idempotency: IdempotencyClaim | None = None,
    ) -> _Order:
        """The one row that is the revocation. Nothing is counted here: all issuing waits meanwhile (INV-27)."""
        era = gate.turn(db)
        now = self._clock()
        made_id = new_id("lck", now)
        if idempotency is not None:
            earlier_id = claimed(db, by, idempotency, made_id, now)
            if earlier_id != made_id:
                return _order_of(db, earlier_id)
        refusal = Refusal(id=made_id, axis=axis, value=value, reason=reason, era=era)
        row = {
            "id": made_id,
            "axis": axis,
            "value": value,
            "era": era,
            "reason": reason,
            "revoked_at": now,
            "revoked_by": by.name,
            "rows_followed_at": None,
        }
        self._being_counted.add(made_id)
        standing.insert_bulk_revocation(db, row)
        announce(db, now, [end_along(axis, value, now)])
        # One id for both: they were said in one breath, and a repeated request finds both by it.
        set_ = _set_lockdown(db, by, made_id, axis, value, reason, now) if lockdown else None
        record(db, [_bulk_event(by, axis, value, reason, now, "revocation.ordered", made_id)])
        return _Order(refusal=refusal, ordered_at=now, lockdown=set_)

    def _carried_out(self, order: _Order) -> BulkOutcome:
        """Count what it ended, let rows follow, and say so."""
        refusal = order.refusal
        covered = (grants.covered_by(refusal), grants.unexpired(order.ordered_at))
        try:
            with self._database.read() as db:
                by_agent = grants.count_by_agent(db, *covered)
                samples = grants.page_of_grants(db, where=(grants.unended(), *covered), before=None, limit=_SAMPLES)
        finally:
            self._being_counted.discard(refusal.id)
        self._wakeups.wake()
        self.follow(refusal, at_most=_ROWS_INLINE)
        outside = [grant.id for grant in samples if grant.provider != OWES_NOTHING]
        with self._database.read() as db:
            owed = leases.leases_of(db, outside)
        now, total = self._clock(), sum(by_agent.values())
        receipt = Receipt(
            task_id=refusal.value if refusal.axis == "task" else None,
            ended_at=order.ordered_at,
            outcome="revoked",
            lines=[
                receipt_line(grant, ended_at=order.ordered_at, now=now, lease=owed.get(grant.id))
                for grant in samples
                if grant.issued_at or grant.id in owed
            ],
            ended=total,
        )
        return BulkOutcome(
            axis=refusal.axis,
            value=refusal.value,
            dry_run=False,
            revocation_id=refusal.id,
            ordered_at=order.ordered_at,
            lockdown=order.lockdown,
            total=total,
            by_agent=by_agent,
            samples=samples,
            receipt=signed_receipt(receipt, self._standing, self._issuer, now),
        )

    def follow(self, refusal: Refusal, *, at_most: int) -> int:
        """Let rows follow a bulk revocation, in batches; several may do so at once. Answers how many moved here."""
        total = 0
        while total < at_most:
            with self._database.begin() as db:
                now = self._clock()
                covered, by = grants.covered_by(refusal), standing.who_revoked(db, refusal.id)
                gone = grants.claimed(covered, grants.expired(now), limit=_ROWS_AT_ONCE)
                expired = change_of(now, ACTOR, "grant.expired")
                urgent = Urgency.URGENT
                moved = list(end_grants(db, GrantState.EXPIRED, gone, now=now, urgency=urgent, event=expired))
                rest = grants.claimed(covered, limit=_ROWS_AT_ONCE)
                revoked = change_of(now, by, "grant.revoked", reason=refusal.reason, data={"revocation": refusal.id})
                values = {"revoked_at": now, "revoked_by": by, "reason": refusal.reason}
                moved += end_grants(db, GrantState.REVOKED, rest, now=now, urgency=urgent, event=revoked, **values)
                # What others hold, they are ending or about to be refused; the refusal stands until none is left.
                done = not moved and not grants.unended_ids(db, covered, limit=1)
                if done and standing.followed(db, refusal.id, now=now):
                    record(db, [_followed_event(refusal, now)])
            total += len(moved)
            if not moved:
                break
        return total

    def follow_all(self, *, at_most: int) -> int:
        """Whatever any broker ordered and did not finish."""
        with self._database.read() as db:
            # What is just being counted would be counted as ended before.
            waiting = [refusal for refusal in standing.unfollowed(db) if refusal.id not in self._being_counted]
        moved = 0
        for refusal in waiting:
            moved += self.follow(refusal, at_most=at_most - moved)
            if moved >= at_most:
                break
        return moved

    def set_lockdown(
        self, caller: Caller, axis: str, value: str, *, reason: str, idempotency: IdempotencyClaim | None = None
    ) -> Lockdown:
        """Refuse what comes next, and revoke what is out: lifting it must not bring anything back (INV-23)."""
        outcome = self.revoke_along(caller, axis, value, reason=reason, lockdown=True, idempotency=idempotency)
        if outcome.lockdown is None:
            raise RuntimeError("a lockdown was ordered and none was set")
        return outcome.lockdown

    def lift_lockdown(self, caller: Caller, lockdown_id: str) -> Lockdown:
        with (
            recorded(self._database, self._clock, caller, "lockdown.refused", "lift"),
            self._database.begin() as db,
        ):
            require_admin(caller)
            gate.turn(db)
            now = self._clock()
            row = standing.lift(db, lockdown_id, now=now, by=caller.name) if is_id(lockdown_id, "lck") else None
            if row is None:
                raise NotFound(f"no lockdown {lockdown_id[:64]!r} is standing")
            record(db, [_bulk_event(caller, row.axis, row.value, row.reason, now, "lockdown.lifted", row.id)])
        self._wakeups.wake()
        return _lockdown_of(row)

    def lockdowns(
        self, caller: Caller, *, standing_only: bool = True, before: str | None = None, limit: int = 1000
    ) -> list[Lockdown]:
        """Newest first, below the id `before`."""
        with recorded(self._database, self._clock, caller, "lockdown.refused", "list"):
            require_admin(caller)
        with self._database.read() as db:
            found = standing.lockdowns(db, standing=standing_only, before=before, limit=limit)
            return [_lockdown_of(row) for row in found]


def _held(db: Connection, grant_id: str) -> Grant | None:
    if not is_id(grant_id, "grt"):
        return None
    unlocked = grants.find_grant(db, grant_id)
    if unlocked is not None:
        # Its task ends everything in an order of its own, and this ends from above: so not at the same time.
        locks.hold_for_issuing(db, agents=(), tasks=[unlocked.task_id])
    return grants.find_grant(db, grant_id, lock=True)


def require_admin(caller: Caller) -> None:
    if not caller.has(Role.ADMIN):
        raise RoleMissing(f"{caller.name} is not an admin: only an admin may do this")


def may_see(caller: Caller, grant: Grant) -> bool:
    """INV-28: everybody else is told that it does not exist."""
    return caller.name in (grant.agent, grant.orchestrator) or caller.has(Role.ADMIN) or caller.has(Role.AUDITOR)


def _set_lockdown(
    db: Connection, by: Actor, made_id: str, axis: str, value: str, reason: str, now: datetime
) -> Lockdown:
    lockdown = Lockdown(id=made_id, axis=axis, value=value, reason=reason, set_at=now, set_by=by.name)
    standing.insert_lockdown(db, vars(lockdown))
    record(db, [_bulk_event(by, axis, value, reason, now, "lockdown.set", lockdown.id)])
    return lockdown


def _order_of(db: Connection, revocation_id: str) -> _Order:
    """An order that was given before."""
    row = standing.bulk_revocation(db, revocation_id)
    if row is None:
        raise Conflict("this Idempotency-Key was used for something else: use a new key")
    set_ = standing.lockdown(db, revocation_id)
    refusal = Refusal(id=row.id, axis=row.axis, value=row.value, reason=row.reason, era=row.era)
    return _Order(refusal=refusal, ordered_at=row.revoked_at, lockdown=None if set_ is None else _lockdown_of(set_))


def _lockdown_of(row: Row[Any]) -> Lockdown:
    return Lockdown(**{name: getattr(row, name) for name in Lockdown.__dataclass_fields__})


def _bulk_event(by: Actor, axis: str, value: str, reason: str, now: datetime, type_: str, made_id: str) -> Event:
    return Event(
        id=new_id("evt", now),
        at=now,
        type=type_,
        actor=by.name,
        reason=reason,
        trace_id=by.trace_id,
        task_id=value if axis == "task" and is_id(value, "task") else None,
        agent=value if axis == "agent" else None,
        user=value if axis == "user" else None,
        resource=value if axis == "resource" else None,
        data={"id": made_id, "axis": axis, "value": value},
    )


def _followed_event(refusal: Refusal, now: datetime) -> Event:
    data = {"id": refusal.id, "axis": refusal.axis, "value": refusal.value}
    return Event(id=new_id("evt", now), at=now, type="revocation.followed", actor=ACTOR, data=data)
