"""Collecting what people have approved: decided again, issued like anything else, and once (INV-15, INV-16, INV-20).

The approval says what people allowed; whether it is still allowed is asked here, of the configuration, the lockdowns
and the task as they stand now. Life counts from here.
"""

from __future__ import annotations

import secrets as random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from sqlalchemy import Connection

from broker.domain.approval import (
    Approval,
    Verdict,
    Vote,
    approved_by,
    are_met,
    met,
    narrowed,
    needs_of,
    parameters_hash,
)
from broker.domain.audit import Event
from broker.domain.catalogue import Limits, Resource
from broker.domain.clock import Clock, rfc3339
from broker.domain.errors import (
    BrokerError,
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    PolicyDenied,
    TaskNotActive,
)
from broker.domain.grant import Grant, GrantRequest, Issued, joined
from broker.domain.identity import Caller, Principal, is_id, new_id
from broker.domain.lifecycle import GrantState, ReviewState
from broker.domain.policy import DENY, NEEDS_APPROVAL, Decision
from broker.domain.review import Review
from broker.domain.task import Task
from broker.services import live_limits
from broker.services.approval import requesters_of
from broker.services.asked import kept_of
from broker.services.break_glass import step
from broker.services.breakers import Breakers, is_denial
from broker.services.credentials import signed
from broker.services.endings import OWES_NOTHING
from broker.services.grant_events import grant_event, refused_again, sentence
from broker.services.limits import Limiter
from broker.services.reconciliation import Reconciliation
from broker.services.secrets import Intent, Secrets, intended_lease
from broker.services.standing import Standing, StandingReader, current_caller, require_no_refusal
from broker.services.status_indexes import StatusIndexes
from broker.services.terms import Terms, require_known_user, require_may_ask, terms
from broker.store import approvals, gate, grants, locks, models
from broker.store.database import Database
from broker.store.events import Denials
from broker.store.leases import insert_leases
from broker.store.reviews import insert_review
from broker.store.tasks import Tasks
from broker.store.transitions import move, record


@dataclass(frozen=True, kw_only=True)
class _Held:
    """An approved grant in the transaction that collects it, and everything that stands over it."""

    db: Connection
    now: datetime
    standing: Standing
    caller: Caller
    grant: Grant
    parent: Grant | None
    approval: Approval
    votes: Sequence[Vote]
    task: Task
    live_of: Mapping[live_limits.Thing, int]
    denials: Denials


class Collection:
    def __init__(
        self,
        *,
        database: Database,
        standing: StandingReader,
        indexes: StatusIndexes,
        reconciliation: Reconciliation,
        secrets: Secrets,
        limiter: Limiter,
        breakers: Breakers,
        limits: Limits,
        issuer: str,
        clock: Clock,
    ) -> None:
        self._database = database
        self._standing = standing
        self._indexes = indexes
        self._reconciliation = reconciliation
        self._secrets = secrets
        self._limiter = limiter
        self._breakers = breakers
        self._limits = limits
        self._issuer = issuer
        self._clock = clock
        self._tasks = Tasks()

    def collect(
        self, caller: Caller, grant_id: str, *, jkt: str | None = None, parameters: Mapping[str, str] | None = None
    ) -> Issued:
        """The credential of a grant that people have approved; for its agent, once.

        `parameters` are those of the request again: the broker kept their hash alone.
        """
        self._breakers.require_rested(caller.name)
        with self._limiter.admitted_again(caller, grant_id) as minting:
            outcome = self._collect(caller, grant_id, jkt, parameters or {})
            if is_denial(outcome):
                self._breakers.after_denials([caller.name])
            if isinstance(outcome, PolicyDenied):
                raise outcome.explained()
            if isinstance(outcome, BrokerError):
                raise outcome
            minting.made = True
            return self._secrets.obtain(outcome) if isinstance(outcome, Intent) else outcome

    def _collect(
        self, caller: Caller, grant_id: str, jkt: str | None, parameters: Mapping[str, str]
    ) -> Issued | Intent | BrokerError:
        self._indexes.reserve(1, self._clock())
        with self._database.begin_issuing() as db:
            unlocked = grants.find_grant(db, grant_id) if is_id(grant_id, "grt") else None
            tasks_of_it = [] if unlocked is None else [unlocked.task_id]
            wanted = [] if unlocked is None else [_counts_for(unlocked)]
            counted = live_limits.bounds(self._limits, self._standing.last_known().catalogue, wanted)
            # As issuing takes them: two that collect at once go one after the other, and so does an end of the task.
            locks.hold_for_issuing(db, agents=[caller.name], tasks=tasks_of_it, counted=live_limits.locks_of(counted))
            now = self._clock()
            standing = self._standing.at(db, gate.era_of(db))
            tasks = self._tasks.hold_shared(db, tasks_of_it)
            above = None if unlocked is None else unlocked.parent_grant_id
            parent = None if above is None else grants.hold_parents(db, [above])[above]
            grant = None if unlocked is None else grants.find_grant(db, grant_id, lock=True)
            try:
                caller = current_caller(caller, standing)
                if grant is None or not grant.is_held_by(caller.principal):
                    raise NotFound(f"there is no grant {grant_id[:64]!r} of yours")
                approval = approvals.approval_of_grant(db, grant.id)
                if approval is None:
                    raise Conflict(f"grant {grant.id} waited for nobody: its credential came with the answer to it")
                denials = self._breakers.denials(db, [caller.name], standing, now)[caller.name]
                self._breakers.require_rest(caller.name, denials, now)
                held = _Held(
                    db=db,
                    now=now,
                    standing=standing,
                    caller=caller,
                    grant=grant,
                    parent=parent,
                    approval=approval,
                    votes=approvals.votes_of(db, [approval.id])[approval.id],
                    task=tasks[grant.task_id],
                    live_of=live_limits.count(db, counted, now),
                    denials=denials,
                )
                _require_collectable(held, jkt)
                return self._collected(held, parameters)
            except BrokerError as refusal:
                # The refusal is recorded; the grant stays as it is until it expires or somebody ends it.
                if self._limiter.is_told(caller.name, refusal):
                    record(db, [refused_again(grant, caller, now, refusal, "approval.refused", verb="collect")])
                return refusal

    def _collected(self, held: _Held, parameters: Mapping[str, str]) -> Issued | Intent:
        grant, now, standing = held.grant, held.now, held.standing
        resource = standing.catalogue.resource(grant.resource)
        if resource.provider != grant.provider:
            raise Conflict(f"{resource.identifier} gives another kind of credential now: ask for a new one")
        if parameters_hash(parameters) != held.approval.parameters_sha256:
            raise Invalid(
                "people approved the request with other parameters: send those it was made with", member="parameters"
            )
        outside = resource.provider != OWES_NOTHING
        if outside:
            self._reconciliation.require_reconciled(held.db, resource.provider, now)
        found = self._terms(held, resource)
        self._require_room(held)
        collected = self._granted(held, found, resource)
        require_no_refusal(collected, standing)
        if outside:
            self._secrets.require_foreseeable(collected, resource.settings, parameters)
        issued = None
        if not outside:
            issued = signed(collected, standing, issuer=self._issuer, issued_at=now, expires_at=collected.expires_at)
            collected = issued.grant
        # Nothing is written before this line: what is refused above leaves the approval as it was.
        if not approvals.collect(held.db, held.approval.id, now=now):
            raise _collected_before(grant)
        if grant.break_glass is not None:
            self._open_review(held, collected)
        if issued is not None:
            return self._active(held, issued)
        return self._intended(held, collected, resource, parameters)

    def _terms(self, held: _Held, resource: Resource) -> Terms:
        """What may be issued of what was approved, decided again: INV-14 and INV-16 are kept here."""
        grant, approval, standing = held.grant, held.approval, held.standing
        principal: Principal = held.caller.principal
        require_known_user(grant.on_behalf_of, standing.catalogue)
        left = narrowed(approval, held.votes)
        requesters = requesters_of(held.db, grant, standing.catalogue)
        require_may_ask(principal, resource, left.scopes, grant.jkt)
        most = live_limits.agent_bound(self._limits, standing.catalogue, grant.agent)
        found = terms(
            GrantRequest(
                caller=held.caller,
                resource=grant.resource,
                scopes=left.scopes,
                task_id=grant.task_id,
                ttl=timedelta(seconds=left.ttl_s),
                intent=grant.intent,
                claimed=grant.claimed,
                jkt=grant.jkt,
                break_glass=grant.break_glass,
            ),
            principal=principal,
            resource=resource,
            task=held.task,
            user=grant.on_behalf_of,
            user_attributes=kept_of(grant).user_attributes,
            parent=held.parent,
            approved=approved_by(approval.needs, held.votes, requesters, standing.catalogue),
            policies=standing.policies,
            limits=self._limits,
            now=held.now,
            renewable_until=grant.renewable_until,
            risk=standing.risks.level(grant.agent, grant.on_behalf_of, held.now),
            live_grants=self._beside(held, at_most=most + 1),
            recent_denials=held.denials.count,
        )
        approved = replace(found.asked, scopes=frozenset(approval.scopes), ttl_s=approval.ttl_s)
        if not approved.sha256() == approval.request_sha256 == grant.request_sha256:
            raise Conflict(f"what people approved is not what grant {grant.id} would open now: ask for a new one")
        # Both what was asked and what is left of it: a policy that was changed may refuse the one or the other.
        for decision in dict.fromkeys((standing.policies.decide(approved), found.decision)):
            self._require_allowed(held, found, decision)
        if found.decided_by == "request" and left.ttl_s < approval.ttl_s:
            return replace(found, decided_by="approval")
        return found

    def _require_allowed(self, held: _Held, found: Terms, decision: Decision) -> None:
        grant, standing = held.grant, held.standing
        if decision.outcome == NEEDS_APPROVAL:
            needs = needs_of(decision)
            said = met(needs, held.votes, requesters_of(held.db, grant, standing.catalogue), standing.catalogue)
            if not are_met(needs, said):
                raise Forbidden(
                    f"by now other people would have to approve grant {grant.id}: {sentence(decision.as_json())}. "
                    "Ask for a new one"
                )
        elif decision.outcome == DENY:
            shown = decision.as_json()
            raise PolicyDenied(
                sentence(shown),
                decision=shown,
                grant_id=grant.id,
                hint=lambda: standing.policies.explain(found.asked, decision),
            )

    def _require_room(self, held: _Held) -> None:
        """INV-34: it is counted among the live ones since it was approved, and more may have come meanwhile."""
        agent, catalogue = held.grant.agent, held.standing.catalogue
        most = live_limits.agent_bound(self._limits, catalogue, agent)
        live_limits.require_room_of_agent(agent, self._beside(held, at_most=most + 1), most)
        live_limits.require_room(_counts_for(held.grant), held.live_of, self._limits, catalogue, counted_already=True)

    def _beside(self, held: _Held, *, at_most: int) -> int:
        """How many live grants its agent has beside this one, which is counted since it was approved."""
        agent = held.grant.agent
        return max(0, grants.count_live(held.db, [agent], now=held.now, at_most=at_most)[agent] - 1)

    def _granted(self, held: _Held, found: Terms, resource: Resource) -> Grant:
        """The row as it is from here on; of a token with everything it is named by."""
        grant, parent, now = held.grant, held.parent, held.now
        decision = found.decision
        collected = replace(
            grant,
            scopes=tuple(sorted(found.asked.scopes)),
            expires_at=now + found.ttl,
            ttl_s=int(found.ttl.total_seconds()),
            ttl_decided_by=found.decided_by,
            decision=decision.as_json(),
            policies=joined(() if parent is None else parent.policies, *grant.policies, *decision.policies),
            policy_version=decision.policy_version,
            terms=found.as_json(),
        )
        if resource.provider != OWES_NOTHING:
            return collected
        status_list, status_index = self._indexes.take(grant.task_id, now)
        return replace(
            collected,
            state=GrantState.ACTIVE,
            jti=random.token_urlsafe(16),
            kids=joined(
                () if parent is None else parent.kids, held.standing.keys.current(resource.signing_algorithm).kid
            ),
            status_list=status_list,
            status_index=status_index,
            issued_at=now,
            # People allowed this much and no more, so no renewal leads further (INV-16).
            renewable_until=now + found.ttl,
        )

    def _open_review(self, held: _Held, grant: Grant) -> None:
        """Owed from here on, since here a credential is made, or is about to be."""
        now = held.now
        review = Review(
            id=new_id("rev", now),
            state=ReviewState.OWED,
            grant_id=grant.id,
            opened_at=now,
            due_at=now + self._limits.review_within,
        )
        insert_review(held.db, review)
        approved_by = [vote.voter for vote in held.votes if vote.verdict is Verdict.APPROVE]
        facts: dict[str, str | int] = {
            "approval_id": held.approval.id,
            "approved_by": " ".join(approved_by),
            "ttl_s": grant.ttl_s,
            "review_id": review.id,
            "review_due_at": rfc3339(review.due_at),
        }
        record(held.db, [step(grant, held.caller, now, "collected", **facts)])

    def _active(self, held: _Held, issued: Issued) -> Issued:
        db, now, grant = held.db, held.now, issued.grant
        told = grant_event(grant, held.caller, now, "grant.issued", approval_id=held.approval.id)
        where = (grants.with_id(grant.id), grants.unexpired(now))
        moved = move(db, models.Grant, GrantState.ACTIVE, *where, event=lambda _row: told, **grants.collected(grant))
        if not moved:
            raise RuntimeError(f"{grant.id} is held here, and did not move")
        record(db, [_collected_event(held, grant)])
        return issued

    def _intended(self, held: _Held, grant: Grant, resource: Resource, parameters: Mapping[str, str]) -> Intent:
        """Nothing is asked of the outside before this is durable (INV-02)."""
        lease = intended_lease(grant, resource.settings, held.now)
        grants.write_collected(held.db, grant)
        insert_leases(held.db, [lease])
        record(held.db, [_collected_event(held, grant, lease_id=lease.id)])
        return Intent(
            grant=grant,
            lease=lease,
            caller=held.caller,
            catalogue_version=held.standing.catalogue.version,
            longest=timedelta(seconds=resource.max_ttl_s),
            parameters=parameters,
        )


def _counts_for(grant: Grant) -> live_limits.For:
    return live_limits.For(task_id=grant.task_id, resource=grant.resource, issuer=grant.issuer)


def _require_collectable(held: _Held, jkt: str | None) -> None:
    grant, task, now = held.grant, held.task, held.now
    if jkt != grant.jkt:
        # INV-21: without the key it is bound to, whoever found the workload token would collect it.
        if grant.jkt is None:
            raise Invalid("this grant is not bound to a key: leave the proof out", member="DPoP")
        raise Forbidden("this grant is bound to a key: send a DPoP proof made with that key")
    if held.approval.collected_at is not None:
        raise _collected_before(grant)
    if not task.is_open(now):
        raise TaskNotActive(f"task {task.id} has ended: nothing can be collected for it", member="task_id")
    parent = held.parent
    if parent is not None and (parent.state is not GrantState.ACTIVE or parent.expires_at <= now):
        raise Conflict(f"grant {parent.id}, which was to be handed down, has ended: ask for a new one")
    if grant.state is GrantState.DENIED:
        raise Forbidden(f"people denied grant {grant.id}: {grant.reason or held.approval.reason or 'no reason given'}")
    expired = grant.expires_at <= now
    if grant.state is GrantState.PENDING and not expired:
        raise Conflict(f"grant {grant.id} waits for people still: come back when they have said yes")
    if grant.state is not GrantState.APPROVED or expired:
        state = GrantState.EXPIRED if grant.state in (GrantState.PENDING, GrantState.APPROVED) else grant.state
        raise Conflict(f"grant {grant.id} is {state}: ask for a new one")


def _collected_before(grant: Grant) -> Conflict:
    return Conflict(f"the credential of grant {grant.id} was collected already: an approval is for one")


def _collected_event(held: _Held, grant: Grant, **facts: str) -> Event:
    return Event(
        id=new_id("evt", held.now),
        at=held.now,
        type="approval.collected",
        actor=held.caller.name,
        task_id=grant.task_id,
        grant_id=grant.id,
        agent=grant.agent,
        user=grant.on_behalf_of,
        resource=grant.resource,
        policy_version=grant.policy_version,
        trace_id=held.caller.trace_id,
        data={"approval_id": held.approval.id, "scopes": list(grant.scopes), "ttl_s": grant.ttl_s, **facts},
    )
