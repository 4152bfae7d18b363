"""Renewing a grant: a new token of the same grant, decided again by what stands now, never past its maximum.

No refresh tokens: whoever renews proves what it is once more. A refusal is recorded and changes nothing; the grant
stays as it is until it expires or somebody ends it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta

from broker.domain.catalogue import Limits
from broker.domain.clock import Clock
from broker.domain.errors import BrokerError, Forbidden, Invalid, NotFound, PolicyDenied
from broker.domain.grant import Grant, GrantRequest, Issued, joined
from broker.domain.identity import Caller, Principal, is_id
from broker.domain.task import Task
from broker.services import live_limits
from broker.services.asked import kept_of
from broker.services.break_glass import require_no_break_glass
from broker.services.breakers import Breakers, is_denial
from broker.services.credentials import signed
from broker.services.endings import OWES_NOTHING
from broker.services.grant_events import grant_event, refused_again
from broker.services.issuance import denial, require_live
from broker.services.limits import Limiter
from broker.services.standing import Standing, StandingReader, principal_of, require_no_refusal
from broker.services.terms import require_known_user, require_may_ask, terms
from broker.store import gate, locks
from broker.store.database import Database
from broker.store.grants import count_live, find_grant, hand_down, hold_parents, renew_grant
from broker.store.tasks import Tasks
from broker.store.transitions import record


class Renewal:
    def __init__(
        self,
        *,
        database: Database,
        standing: StandingReader,
        limiter: Limiter,
        breakers: Breakers,
        limits: Limits,
        issuer: str,
        clock: Clock,
    ) -> None:
        self._database = database
        self._standing = standing
        self._limiter = limiter
        self._breakers = breakers
        self._limits = limits
        self._issuer = issuer
        self._clock = clock
        self._tasks = Tasks()

    def renew(self, caller: Caller, grant_id: str, *, ttl: timedelta | None, jkt: str | None = None) -> Issued:
        """A new token for the same grant, decided again, never past the grant's maximum."""
        self._breakers.require_rested(caller.name)
        with self._limiter.admitted_again(caller, grant_id) as minting:
            outcome = self._renew(caller, grant_id, ttl, jkt)
            if is_denial(outcome):
                self._breakers.after_denials([caller.name])
            if isinstance(outcome, PolicyDenied):
                raise outcome.explained()
            if isinstance(outcome, BrokerError):
                raise outcome
            minting.made = True
            return outcome

    def _renew(self, caller: Caller, grant_id: str, ttl: timedelta | None, jkt: str | None) -> Issued | BrokerError:
        with self._database.begin_issuing() as db:
            unlocked = find_grant(db, grant_id) if is_id(grant_id, "grt") else None
            tasks_of_it = [] if unlocked is None else [unlocked.task_id]
            # Task before grant, as everywhere, so that a closing task and a renewal cannot wait for each other. And the
            # agent: what it was denied is counted (INV-34).
            locks.hold_for_issuing(db, agents=[caller.name], tasks=tasks_of_it)
            now = self._clock()
            standing = self._standing.at(db, gate.era_of(db))
            tasks = self._tasks.hold_shared(db, tasks_of_it)
            above = None if unlocked is None else unlocked.parent_grant_id
            parent = None if above is None else hold_parents(db, [above])[above]
            grant = None if unlocked is None else find_grant(db, grant_id, lock=True)
            try:
                principal = principal_of(caller, standing)
                if grant is None or not grant.is_held_by(principal):
                    raise NotFound(f"there is no grant {grant_id[:64]!r} of yours")
                agent = caller.name
                most = 1 + live_limits.agent_bound(self._limits, standing.catalogue, agent)
                held = count_live(db, [agent], now=now, at_most=most)
                denied = self._breakers.denials(db, [agent], standing, now)[agent]
                self._breakers.require_rest(agent, denied, now)
                facts = {"live_grants": max(0, held[agent] - 1), "recent_denials": denied.count}
                issued = self._renewed(
                    grant, parent, tasks[grant.task_id], standing, principal, caller, ttl, jkt, now, facts
                )
            except BrokerError as refusal:
                # The refusal is recorded; the grant stays as it is until it expires or somebody revokes it.
                if self._limiter.is_told(caller.name, refusal):
                    record(db, [refused_again(grant, caller, now, refusal, "grant.renewal_refused")])
                return refusal
            renew_grant(db, issued.grant)
            if (issued.grant.kids, issued.grant.policies) != (grant.kids, grant.policies):
                hand_down(db, issued.grant)
            record(db, [grant_event(issued.grant, caller, now, "grant.renewed")])
        return issued

    def _renewed(
        self,
        grant: Grant,
        parent: Grant | None,
        task: Task,
        standing: Standing,
        principal: Principal,
        caller: Caller,
        ttl: timedelta | None,
        jkt: str | None,
        now: datetime,
        facts: Mapping[str, int],
    ) -> Issued:
        require_live(grant, task, standing, now)
        if parent is not None:
            require_live(parent, task, standing, now)
        require_no_break_glass(grant, "renewed")
        require_known_user(grant.on_behalf_of, standing.catalogue)
        if grant.provider != OWES_NOTHING:
            raise Invalid(f"a secret of {grant.resource} is not renewed: ask for a new one, and hand this one back")
        if grant.jkt is not None and jkt != grant.jkt:
            # INV-21: without the key it was bound to, a stolen workload token would renew it into a bearer's hand.
            raise Forbidden("this grant is bound to a key: send a DPoP proof made with that key")
        if grant.jkt is None and jkt is not None:
            # Its earlier token is a bearer's and stays one, so a binding from here on would be none.
            raise Invalid("this grant is not bound to a key: ask for a new one with the proof", member="DPoP")
        resource = standing.catalogue.resource(grant.resource)
        scopes = frozenset(grant.scopes)
        require_may_ask(principal, resource, scopes, grant.jkt)
        kept = kept_of(grant)
        found = terms(
            GrantRequest(
                caller=caller,
                resource=grant.resource,
                scopes=scopes,
                task_id=grant.task_id,
                ttl=ttl,
                intent=grant.intent,
                claimed=grant.claimed,
                jkt=grant.jkt,
            ),
            principal=principal,
            resource=resource,
            task=task,
            user=grant.on_behalf_of,
            user_attributes=kept.user_attributes,
            parent=parent,
            approved=kept.approved,
            policies=standing.policies,
            limits=self._limits,
            now=now,
            renewable_until=grant.renewable_until,
            risk=standing.risks.level(principal.name, grant.on_behalf_of, now),
            **facts,
        )
        if not found.allowed:
            raise denial(grant, found, standing.policies, kept=False)
        renewed = replace(
            grant,
            jti=secrets.token_urlsafe(16),
            # An earlier token of this grant may still be out: it dies with the key and the policies it was made by,
            # and a shorter renewal must not end the grant before it.
            kids=joined(grant.kids, standing.keys.current(resource.signing_algorithm).kid),
            policies=joined(grant.policies, *found.decision.policies),
            expires_at=max(grant.expires_at, now + found.ttl),
            ttl_s=int(found.ttl.total_seconds()),
            ttl_decided_by=found.decided_by,
            request_sha256=found.asked.sha256(),
            decision=found.decision.as_json(),
            policy_version=found.decision.policy_version,
            terms=found.as_json(),
        )
        # By what allows it now, and not only by what allowed it until now.
        require_no_refusal(renewed, standing)
        return signed(renewed, standing, issuer=self._issuer, issued_at=now, expires_at=now + found.ttl)
