"""Issuing and renewing grants: one verb behind `/v1/grants` and `/oauth2/token`.

The intent, the decision, the grant and its audit event are one commit; the credential leaves only after it (INV-01).
A JWT owes nothing outside, so it needs no lease; providers that do owe something get theirs between two transactions.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from sqlalchemy import Connection

from broker.domain.audit import Event
from broker.domain.catalogue import Limits, Resource
from broker.domain.clock import Clock
from broker.domain.errors import (
    BrokerError,
    Conflict,
    Forbidden,
    IdempotencyConflict,
    Invalid,
    InvalidScope,
    LimitExceeded,
    LockedDown,
    NotFound,
    PolicyDenied,
    RoleMissing,
    TaskNotActive,
    Unauthenticated,
    Unavailable,
)
from broker.domain.grant import Credential, Grant, GrantRequest, Issued
from broker.domain.identity import Caller, Principal, Role, is_id, new_id
from broker.domain.lifecycle import GrantState, TaskState, is_live
from broker.domain.policy import AccessRequest, Decision, TaskFacts
from broker.domain.scope import effective_ttl, require_offered
from broker.domain.secret import Secret
from broker.domain.task import Task
from broker.providers.jwt import AccessToken, access_token_claims
from broker.services.group_commit import GroupCommit
from broker.services.standing import Standing, StandingReader
from broker.services.status_indexes import StatusIndexes
from broker.store import gate
from broker.store.database import Database
from broker.store.grants import count_live, find_grant, find_with_tasks, insert_grants, renew_grant
from broker.store.standing import claim_key, release_key
from broker.store.tasks import Tasks, insert_tasks
from broker.store.transitions import record

_KEYS_REMEMBERED_FOR = timedelta(days=1)


@dataclass(frozen=True, kw_only=True)
class _Moment:
    """What one transaction reads once, for every request in it."""

    now: datetime
    db: Connection
    standing: Standing
    tasks: Mapping[str, Task]
    live: dict[str, int]


class _Batch:
    """What one transaction will write."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.grants: list[Grant] = []
        self.events: list[Event] = []


class Issuance:
    def __init__(
        self,
        *,
        database: Database,
        standing: StandingReader,
        indexes: StatusIndexes,
        limits: Limits,
        issuer: str,
        clock: Clock,
    ) -> None:
        self._database = database
        self._standing = standing
        self._indexes = indexes
        self._limits = limits
        self._issuer = issuer
        self._clock = clock
        self._tasks = Tasks()
        self._commits: GroupCommit[GrantRequest, Issued] = GroupCommit(self._commit)

    def issue(self, request: GrantRequest) -> Issued:
        """Decide, record and sign. Raises PolicyDenied with the decision, which is recorded too."""
        return self._commits.submit(request)

    def renew(self, caller: Caller, grant_id: str, *, ttl: timedelta | None, jkt: str | None = None) -> Issued:
        """A new token for the same grant, decided again, never past the grant's maximum."""
        now = self._clock()
        with self._database.begin() as db:
            standing = self._standing.at(db, gate.hold_shared(db))
            # Task before grant, as everywhere, so that a closing task and a renewal cannot wait for each other.
            unlocked = find_grant(db, grant_id) if is_id(grant_id, "grt") else None
            if unlocked is None or unlocked.agent != caller.name:
                raise _no_such_grant(grant_id)
            task = self._tasks.hold_shared(db, [unlocked.task_id])[unlocked.task_id]
            grant = find_grant(db, grant_id, lock=True)
            if grant is None:
                raise _no_such_grant(grant_id)
            _require_live(grant, task, standing, now)
            outcome = self._renewed(grant, task, standing, caller, ttl, jkt, now)
            if isinstance(outcome, PolicyDenied):
                # The refusal is recorded; the grant stays as it is until it expires or somebody revokes it.
                record(db, [_refused_event(grant, caller, now, "grant.renewal_denied", outcome)])
            else:
                renew_grant(db, outcome.grant)
                record(db, [_event_of(outcome.grant, caller, now, "grant.renewed")])
        if isinstance(outcome, PolicyDenied):
            raise outcome
        return outcome

    def _commit(self, requests: Sequence[GrantRequest]) -> Sequence[Issued | BrokerError]:
        now = self._clock()
        self._indexes.reserve(len(requests), now)
        with self._database.begin() as db:
            standing = self._standing.at(db, gate.hold_shared(db))
            wanted = {request.task_id for request in requests if request.task_id is not None}
            tasks = self._tasks.hold_shared(db, {task_id for task_id in wanted if is_id(task_id, "task")})
            agents = {request.caller.name for request in requests}
            live = count_live(db, agents, now=now, at_most=self._limits.max_live_per_agent)
            moment = _Moment(now=now, db=db, standing=standing, tasks=tasks, live=live)
            batch = _Batch()
            outcomes = [self._outcome(request, moment, batch) for request in requests]
            insert_tasks(db, batch.tasks)
            insert_grants(db, batch.grants)
            record(db, batch.events)
        return outcomes

    def _outcome(self, request: GrantRequest, moment: _Moment, batch: _Batch) -> Issued | BrokerError:
        """What one request comes to; a refusal is an answer, and recorded like one."""
        grant_id = new_id("grt", moment.now)
        try:
            claimed = self._claim(request, grant_id, moment, batch)
            if claimed is not None:
                return claimed
            return self._decide_and_sign(request, grant_id, moment, batch)
        except PolicyDenied as refusal:
            if refusal.grant_id is None and request.idempotency is not None:
                release_key(moment.db, principal=request.caller.name, key_sha256=request.idempotency.key_sha256)
            return refusal
        except BrokerError as refusal:
            if request.idempotency is not None and not isinstance(refusal, IdempotencyConflict):
                # Nothing was made under the key, so the corrected request may use it.
                release_key(moment.db, principal=request.caller.name, key_sha256=request.idempotency.key_sha256)
            if isinstance(refusal, Forbidden | TaskNotActive | LimitExceeded | NotFound):
                batch.events.append(_refusal(request, moment, refusal))
            return refusal

    def _claim(
        self, request: GrantRequest, grant_id: str, moment: _Moment, batch: _Batch
    ) -> Issued | BrokerError | None:
        """None where this request is the first with its idempotency key, else the answer of the first (INV-06)."""
        if request.idempotency is None:
            return None
        made_id, request_sha256 = claim_key(
            moment.db,
            principal=request.caller.name,
            key_sha256=request.idempotency.key_sha256,
            request_sha256=request.idempotency.request_sha256,
            made_id=grant_id,
            forget_at=moment.now + _KEYS_REMEMBERED_FOR,
        )
        if request_sha256 != request.idempotency.request_sha256:
            raise IdempotencyConflict(
                "this Idempotency-Key was used with another body: use a new key for a new request"
            )
        if made_id == grant_id:
            return None
        return self._replay(made_id, moment, batch)

    def _replay(self, grant_id: str, moment: _Moment, batch: _Batch) -> Issued | BrokerError:
        for issued in batch.grants:
            if issued.id == grant_id:
                task = next((task for task in batch.tasks if task.id == issued.task_id), None)
                return self._answer_again(issued, task or moment.tasks[issued.task_id], moment)
        found = find_with_tasks(moment.db, [grant_id]).get(grant_id)
        if found is None:
            raise Unavailable("the first request with this Idempotency-Key left no grant; use a new key")
        grant, task_state, ends_at = found
        if grant.state is GrantState.DENIED:
            return _denied(grant)
        live = is_live(
            grant=grant.state,
            expires_at=grant.expires_at,
            task=task_state,
            deadline_at=ends_at,
            locked_down=moment.standing.refusals.over(grant) is not None,
            now=moment.now,
        )
        if not live:
            raise Conflict(f"the grant {grant_id} made with this Idempotency-Key has ended: use a new key")
        return self._signed(grant, moment.standing)

    def _answer_again(self, grant: Grant, task: Task, moment: _Moment) -> Issued | BrokerError:
        if grant.state is GrantState.DENIED:
            return _denied(grant)
        _require_live(grant, task, moment.standing, moment.now)
        return self._signed(grant, moment.standing)

    def _decide_and_sign(self, request: GrantRequest, grant_id: str, moment: _Moment, batch: _Batch) -> Issued:
        now, standing = moment.now, moment.standing
        principal = principal_of(request.caller, standing)
        if Role.AGENT not in principal.roles:
            raise RoleMissing(f"{principal.name} is not an agent: only a principal with that role gets credentials")
        resource = standing.catalogue.resource(request.resource)
        require_offered(request.scopes, resource.offered, resource.identifier)
        if resource.require_dpop and request.jkt is None:
            raise Invalid(
                f"{resource.identifier} wants sender-bound tokens: send a DPoP proof (RFC 9449)", member="DPoP"
            )
        task = self._task_for(request, principal, moment)
        if moment.live[principal.name] >= self._limits.max_live_per_agent:
            raise LimitExceeded(
                f"{principal.name} holds {self._limits.max_live_per_agent} live grants, its limit: revoke what is no "
                "longer needed, or wait until it expires",
                retry_after_s=5,
            )
        ttl, decided_by, decision, request_sha256 = self._decide(
            principal, resource, task, now, standing, request, proof_expires_at=request.caller.proof_expires_at
        )
        allowed = decision.outcome == "allow"
        key = standing.keys.current(resource.signing_algorithm)
        grant = Grant(
            id=grant_id,
            task_id=task.id,
            era=standing.era,
            state=GrantState.ACTIVE if allowed else GrantState.DENIED,
            agent=principal.name,
            orchestrator=task.orchestrator,
            on_behalf_of=task.on_behalf_of,
            parent_grant_id=None,
            resource=resource.identifier,
            scopes=tuple(sorted(request.scopes)),
            provider=resource.provider,
            jti=secrets.token_urlsafe(16) if allowed else None,
            kid=key.kid if allowed else None,
            jkt=request.jkt,
            credential_sha256=None,
            status_list=None,
            status_index=None,
            created_at=now,
            issued_at=now if allowed else None,
            expires_at=now + ttl,
            renewable_until=min(now + self._limits.max_ttl, task.deadline_at) if allowed else None,
            ttl_s=int(ttl.total_seconds()),
            ttl_decided_by=decided_by,
            intent=request.intent,
            claimed=request.claimed,
            request_sha256=request_sha256,
            decision=decision.as_json(),
            policies=decision.policies,
            policy_version=decision.policy_version,
            trace_id=request.caller.trace_id,
        )
        refusal = standing.refusals.over(replace(grant, era=standing.era + 1))
        if refusal is not None:
            raise LockedDown(
                f"a lockdown stands over {refusal.axis} {refusal.value!r} ({refusal.id}): {refusal.reason}"
            )
        if request.task_id is None and allowed:
            task = replace(task, deadline_at=grant.expires_at)
        if not allowed:
            if request.task_id is None:
                # No task was opened for a request that came to nothing; the event still says who asked for what.
                batch.events.append(
                    replace(_event_of(grant, request.caller, now, "grant.denied"), grant_id=None, task_id=None)
                )
                raise _denied(grant, kept=False)
            batch.grants.append(grant)
            batch.events.append(_event_of(grant, request.caller, now, "grant.denied"))
            raise _denied(grant)
        status_list, status_index = self._indexes.take(task.id, now)
        issued = self._signed(replace(grant, status_list=status_list, status_index=status_index), standing)
        if request.task_id is None:
            batch.tasks.append(task)
            batch.events.append(_task_opened(task, request.caller, now))
        batch.grants.append(issued.grant)
        batch.events.append(_event_of(issued.grant, request.caller, now, "grant.issued"))
        moment.live[principal.name] += 1
        return issued

    def _task_for(self, request: GrantRequest, principal: Principal, moment: _Moment) -> Task:
        now = moment.now
        if request.task_id is None:
            if not principal.implicit_tasks:
                raise Invalid("name the task you work on: task_id is missing", member="task_id")
            return Task(
                id=new_id("task", now),
                state=TaskState.ACTIVE,
                purpose=request.purpose or "implicit",
                orchestrator=principal.name,
                agents=(principal.name,),
                created_at=now,
                deadline_at=now + self._limits.max_deadline,
                implicit=True,
            )
        task = moment.tasks.get(request.task_id)
        if task is None or principal.name not in task.agents:
            # One answer for a task that is not there and one that is not theirs (INV-28).
            raise NotFound(f"there is no task {request.task_id[:64]!r} for {principal.name}", member="task_id")
        if not task.is_open(now):
            state = task.state if task.state is not TaskState.ACTIVE else TaskState.EXPIRED
            raise TaskNotActive(f"task {task.id} is {state}: nothing can be issued for it", member="task_id")
        if task.ceiling is not None:
            within = frozenset(task.ceiling.get(request.resource, ()))
            beyond = sorted(request.scopes - within)
            if beyond:
                raise InvalidScope(
                    f"task {task.id} does not include {', '.join(beyond)} on {request.resource}; "
                    f"it includes {', '.join(sorted(within)) or 'nothing there'}",
                    member="scope",
                )
        return task

    def _decide(
        self,
        principal: Principal,
        resource: Resource,
        task: Task,
        now: datetime,
        standing: Standing,
        request: GrantRequest,
        *,
        proof_expires_at: datetime,
        renewable_until: datetime | None = None,
    ) -> tuple[timedelta, str, Decision, str]:
        """(ttl, which ceiling decided it, decision, canonical request hash): the minimum of all ceilings (INV-08)."""
        ceilings = {
            "resource": timedelta(seconds=resource.max_ttl_s),
            "broker": self._limits.max_ttl,
            "task": task.deadline_at - now,
            "proof": proof_expires_at - now,
        }
        if request.ttl is None:
            ceilings["default"] = self._limits.default_ttl
        if renewable_until is not None:
            ceilings["grant"] = renewable_until - now
        ttl, decided_by = effective_ttl(request.ttl, ceilings)
        if ttl <= timedelta(0):
            # Within the leeway a workload token just expired still names its bearer, and opens nothing.
            raise (
                Unauthenticated("the workload token ends now")
                if decided_by == "proof"
                else Conflict(f"nothing is left to grant: the ceiling {decided_by!r} has been reached")
            )
        asked = AccessRequest(
            agent=principal,
            resource=resource,
            scopes=request.scopes,
            ttl_s=int(ttl.total_seconds()),
            task=TaskFacts(
                id=task.id,
                purpose=task.purpose,
                age_s=max(0, int((now - task.created_at).total_seconds())),
                orchestrator=task.orchestrator,
                labels=task.labels,
            ),
            intent=request.intent,
            sender_bound=request.jkt is not None,
            claimed=request.claimed,
            now=now,
            user=task.on_behalf_of,
        )
        decision = standing.policies.decide(asked)
        if decision.max_ttl_s is not None and timedelta(seconds=decision.max_ttl_s) < ttl:
            ttl, decided_by = timedelta(seconds=decision.max_ttl_s), "policy"
        return ttl, decided_by, decision, asked.sha256()

    def _renewed(
        self,
        grant: Grant,
        task: Task,
        standing: Standing,
        caller: Caller,
        ttl: timedelta | None,
        jkt: str | None,
        now: datetime,
    ) -> Issued | PolicyDenied:
        if grant.jkt is not None and jkt != grant.jkt:
            # INV-21: without the key it was bound to, a stolen workload token would renew it into a bearer's hand.
            raise Forbidden("this grant is bound to a key: send a DPoP proof made with that key")
        principal = principal_of(caller, standing)
        resource = standing.catalogue.resource(grant.resource)
        asked = GrantRequest(
            caller=caller,
            resource=grant.resource,
            scopes=frozenset(grant.scopes),
            task_id=grant.task_id,
            ttl=ttl,
            intent=grant.intent,
            claimed=grant.claimed,
            jkt=grant.jkt,
        )
        require_offered(asked.scopes, resource.offered, resource.identifier)
        life, decided_by, decision, request_sha256 = self._decide(
            principal,
            resource,
            task,
            now,
            standing,
            asked,
            proof_expires_at=caller.proof_expires_at,
            renewable_until=grant.renewable_until,
        )
        if decision.outcome != "allow":
            return _denied(replace(grant, decision=decision.as_json()), kept=False)
        renewed = replace(
            grant,
            jti=secrets.token_urlsafe(16),
            kid=standing.keys.current(resource.signing_algorithm).kid,
            # An earlier token of this grant may still be out: a shorter renewal must not end the grant before it.
            expires_at=max(grant.expires_at, now + life),
            ttl_s=int(life.total_seconds()),
            ttl_decided_by=decided_by,
            request_sha256=request_sha256,
            decision=decision.as_json(),
            policies=decision.policies,
            policy_version=decision.policy_version,
        )
        return self._signed(renewed, standing, issued_at=now, expires_at=now + life)

    def _signed(
        self, grant: Grant, standing: Standing, *, issued_at: datetime | None = None, expires_at: datetime | None = None
    ) -> Issued:
        """The grant's token. Signing twice gives the same claims, so a replay hands out nothing new."""
        issued_at, expires_at = issued_at or grant.issued_at, expires_at or grant.expires_at
        if issued_at is None or grant.jti is None or grant.status_list is None or grant.status_index is None:
            raise RuntimeError(f"{grant.id} was never issued and cannot be signed")
        resource = standing.catalogue.resource(grant.resource)
        claims = access_token_claims(
            AccessToken(
                issuer=self._issuer,
                subject=grant.on_behalf_of or grant.agent,
                audience=grant.resource,
                client_id=grant.agent,
                issued_at=issued_at,
                expires_at=expires_at,
                jti=grant.jti,
                scopes=grant.scopes,
                task_id=grant.task_id,
                grant_id=grant.id,
                jkt=grant.jkt,
                status_uri=f"{self._issuer}/status-lists/{grant.status_list}",
                status_index=grant.status_index,
                trace_id=grant.trace_id,
            )
        )
        key = standing.keys.current(resource.signing_algorithm)
        token = Secret(key.sign(claims, typ=resource.token_typ))
        credential = Credential(
            type="jwt",
            token=token,
            token_type="Bearer" if grant.jkt is None else "DPoP",
            expires_at=expires_at,
        )
        return Issued(grant=replace(grant, credential_sha256=token.sha256()), credential=credential)


def principal_of(caller: Caller, standing: Standing) -> Principal:
    """Who the caller is under the configuration of this transaction, which may be newer than that of the door."""
    if caller.identity is None or caller.catalogue_version == standing.catalogue.version:
        return caller.principal
    return standing.catalogue.principal_for(caller.identity)


def current_caller(caller: Caller, standing: Standing) -> Caller:
    """The caller as this configuration knows it; Unauthenticated if it is nobody there."""
    principal = principal_of(caller, standing)
    return replace(caller, principal=principal, catalogue_version=standing.catalogue.version)


def _require_live(grant: Grant, task: Task, standing: Standing, now: datetime) -> None:
    if not task.is_open(now):
        raise TaskNotActive(f"task {task.id} has ended, and everything issued for it", member="task_id")
    refusal = standing.refusals.over(grant)
    if refusal is not None:
        raise LockedDown(f"grant {grant.id} was revoked along {refusal.axis} {refusal.value!r}: {refusal.reason}")
    if grant.state is not GrantState.ACTIVE or grant.expires_at <= now:
        state = grant.state if grant.state is not GrantState.ACTIVE else GrantState.EXPIRED
        raise Conflict(f"grant {grant.id} is {state}: ask for a new one")


def _no_such_grant(grant_id: str) -> NotFound:
    return NotFound(f"there is no grant {grant_id[:64]!r} of yours")


def _denied(grant: Grant, *, kept: bool = True) -> PolicyDenied:
    reasons = " ".join(grant.decision.get("reasons", ())) or "no policy allows this"
    return PolicyDenied(reasons, decision=grant.decision, grant_id=grant.id if kept else None)


def _event_of(grant: Grant, caller: Caller, now: datetime, type_: str) -> Event:
    return Event(
        id=new_id("evt", now),
        at=now,
        type=type_,
        actor=caller.name,
        outcome="ok" if grant.state is GrantState.ACTIVE else "denied",
        task_id=grant.task_id,
        grant_id=grant.id,
        agent=grant.agent,
        user=grant.on_behalf_of,
        resource=grant.resource,
        reason=grant.intent,
        policy_version=grant.policy_version,
        trace_id=caller.trace_id,
        data={
            "scopes": list(grant.scopes),
            "ttl_s": grant.ttl_s,
            "policies": list(grant.policies),
            "jti": grant.jti,
            "request_sha256": grant.request_sha256,
        },
    )


def _refused_event(grant: Grant, caller: Caller, now: datetime, type_: str, refusal: PolicyDenied) -> Event:
    event = _event_of(grant, caller, now, type_)
    return replace(event, outcome="denied", data={"decision": refusal.decision})


def _refusal(request: GrantRequest, moment: _Moment, refusal: BrokerError) -> Event:
    task_id = request.task_id if request.task_id in moment.tasks else None
    return Event(
        id=new_id("evt", moment.now),
        at=moment.now,
        type="grant.refused",
        actor=request.caller.name,
        outcome=refusal.code,
        task_id=task_id,
        agent=request.caller.name,
        resource=request.resource,
        reason=refusal.detail[:1000],
        policy_version=moment.standing.catalogue.version,
        trace_id=request.caller.trace_id,
        data={"scopes": sorted(request.scopes)},
    )


def _task_opened(task: Task, caller: Caller, now: datetime) -> Event:
    return Event(
        id=new_id("evt", now),
        at=now,
        type="task.opened",
        actor=caller.name,
        task_id=task.id,
        agent=caller.name,
        reason=task.purpose,
        trace_id=caller.trace_id,
        data={"implicit": True},
    )
