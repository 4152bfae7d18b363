"""Issuing grants: one verb behind `/v1/grants` and `/oauth2/token`.

The intent, the decision, the grant and its audit event are one commit; the credential leaves only after it (INV-01).
A JWT owes nothing outside, so it needs no lease. For a secret from outside the same commit is the intent, and what
follows is `broker.services.secrets`.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from sqlalchemy import Connection

from broker.domain.approval import Case, Route
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
    InvalidTarget,
    LockedDown,
    NotFound,
    PolicyDenied,
    TaskNotActive,
    Unavailable,
)
from broker.domain.grant import Authority, Grant, GrantRequest, Issued, joined
from broker.domain.identity import Caller, Principal, is_id, new_id
from broker.domain.lease import Lease, Urgency
from broker.domain.lifecycle import GrantState, TaskState
from broker.domain.policy import NEEDS_APPROVAL, PolicySet
from broker.domain.task import Task
from broker.services import live_limits
from broker.services.approval import Opening, cases, opened_event
from broker.services.batching import Batching
from broker.services.break_glass import require_narrow, require_no_break_glass, step
from broker.services.breakers import Breakers, is_denial, throttled
from broker.services.credentials import signed
from broker.services.endings import OWES_NOTHING, end_with_descendants
from broker.services.grant_events import grant_event, sentence
from broker.services.idempotency import claimed
from broker.services.limits import Limiter
from broker.services.reconciliation import Reconciliation
from broker.services.secrets import Intent, Secrets, intended_lease
from broker.services.standing import Standing, StandingReader, principal_of, require_no_refusal
from broker.services.status_indexes import StatusIndexes
from broker.services.terms import Terms, attributes_of_user, require_known_user, require_may_ask, terms, user_of
from broker.store import gate, locks
from broker.store.approvals import approval_of_grant, insert_approvals
from broker.store.database import Database
from broker.store.events import Denials
from broker.store.grants import (
    count_live,
    find_grant,
    hand_down,
    hold_parents,
    insert_grants,
    renew_grant,
    tasks_of_grants,
    with_id,
)
from broker.store.leases import insert_leases
from broker.store.notices import owe_notices
from broker.store.standing import made_under, release_key, repoint_key
from broker.store.tasks import Tasks, find_task, insert_tasks
from broker.store.transitions import change_of, record

_WAITING = 50  # callers; of the server's threads, some are always left for what ends authority
_GATHERING_S = 0.004  # half of what a commit with its look-ups takes


@dataclass(frozen=True, kw_only=True)
class _Moment:
    """What one transaction reads once, for every request in it."""

    now: datetime
    db: Connection
    standing: Standing
    tasks: Mapping[str, Task]
    parents: Mapping[str, Grant]
    live: dict[str, int]
    live_of: dict[live_limits.Thing, int]
    denials: dict[str, Denials]
    opening: Opening


@dataclass(frozen=True)
class _Batch:
    """What one transaction will write, and what it answers for each grant it makes."""

    tasks: list[Task] = field(default_factory=list)
    grants: list[Grant] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)
    answers: dict[str, Issued | Intent | Case | PolicyDenied] = field(default_factory=dict)


class Issuance:
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
        routes: Sequence[Route] = (),
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
        self._routes = routes
        self._tasks = Tasks()
        self._batches: Batching[GrantRequest, Issued | Intent | Case] = Batching(
            self._issue_all, waiting=_WAITING, gathering_s=_GATHERING_S
        )

    def require_open(self, caller: Caller) -> None:
        """Refuse whoever is at a limit, from memory alone: before a proof of theirs is used up, which costs a row."""
        self._breakers.require_rested(caller.name)
        self._limiter.require_open(caller)

    def issue(self, request: GrantRequest) -> Issued:
        """Decide, record and sign, for who does not wait for people. Raises PolicyDenied with the decision."""
        made = self.request(replace(request, may_wait=False))
        if isinstance(made, Case):
            raise TypeError(f"{made.grant.id} waits for people, and whoever asked for it does not")
        return made

    def request(self, request: GrantRequest) -> Issued | Case:
        """The credential, or the approval that it waits for. Raises PolicyDenied with the decision, recorded too."""
        self._breakers.require_rested(request.caller.name)
        task_id = request.task_id
        if task_id is None and request.parent_grant_id is not None:
            task_id = self._task_handed_down(request.parent_grant_id)
        with self._limiter.admitted(request.caller, resource=request.resource, task_id=task_id) as minting:
            try:
                made = self._batches.submit(request)
            except BrokerError as refusal:
                # After the commit, and for itself alone: while a breaker trips, or while it is searched for what would
                # be allowed, nobody waits (INV-27).
                if is_denial(refusal):
                    self._breakers.after_denials([request.caller.name])
                if isinstance(refusal, PolicyDenied):
                    raise refusal.explained() from None
                raise
            minting.made = not isinstance(made, Case)
            return self._secrets.obtain(made) if isinstance(made, Intent) else made

    def may_take(self, caller: Caller, grant: Authority) -> bool:
        """Whether somebody's grant may be handed down to this agent at all: whoever opened the task named them both."""
        with self._database.read() as db:
            task = find_task(db, grant.task_id)
        return task is not None and caller.name in task.agents

    def _task_handed_down(self, grant_id: str) -> str | None:
        """The task of a grant that is handed down; whether it may be is asked later."""
        if not is_id(grant_id, "grt"):
            return None
        with self._database.read() as db:
            return next(iter(tasks_of_grants(db, [grant_id])), None)

    # --- Issuing ------------------------------------------------------------------------------------------------------

    def _issue_all(self, requests: Sequence[GrantRequest]) -> Sequence[Issued | Intent | Case | BrokerError]:
        self._indexes.reserve(len(requests), self._clock())
        with self._database.begin_issuing() as db:
            moment = self._moment(db, requests)
            # Whoever was to lock them down died before it did, or could not.
            overdue = [agent for agent, found in moment.denials.items() if found.count >= self._limits.denials_lockdown]
            batch = _Batch()
            outcomes = [self._outcome(request, moment, batch) for request in requests]
            insert_tasks(db, batch.tasks)
            insert_grants(db, batch.grants)
            insert_leases(db, batch.leases)
            insert_approvals(db, [case.approval for case in batch.cases])
            owe_notices(db, batch.cases, self._routes)
            record(db, batch.events)
        if overdue:
            self._breakers.after_denials(overdue)
        return outcomes

    def _moment(self, db: Connection, requests: Sequence[GrantRequest]) -> _Moment:
        keys = {
            (request.caller.name, request.idempotency.key_sha256)
            for request in requests
            if request.idempotency is not None
        }
        above = {request.parent_grant_id for request in requests if request.parent_grant_id is not None}
        parents = {grant_id for grant_id in above if is_id(grant_id, "grt")}
        again = tasks_of_grants(db, {*made_under(db, keys).values(), *parents})
        wanted = {request.task_id for request in requests if request.task_id is not None}
        task_ids = {task_id for task_id in wanted if is_id(task_id, "task")} | again
        agents = {request.caller.name for request in requests}
        counting = [_counts_for(request, request.task_id) for request in requests]
        counting += [replace(counting[0], task_id=task_id) for task_id in again]
        counted = live_limits.bounds(self._limits, self._standing.last_known().catalogue, counting)
        locks.hold_for_issuing(db, agents=agents, tasks=task_ids, counted=live_limits.locks_of(counted))
        # Behind the locks, however long they were waited for.
        now = self._clock()
        standing = self._standing.at(db, gate.era_of(db))
        tasks = self._tasks.hold_shared(db, task_ids)
        most = max(live_limits.agent_bound(self._limits, standing.catalogue, agent) for agent in agents)
        return _Moment(
            now=now,
            db=db,
            standing=standing,
            tasks=tasks,
            parents=hold_parents(db, parents),
            live=count_live(db, agents, now=now, at_most=most),
            live_of=live_limits.count(db, counted, now),
            denials=self._breakers.denials(db, agents, standing, now),
            opening=Opening(db, standing, self._limits, now),
        )

    def _outcome(self, request: GrantRequest, moment: _Moment, batch: _Batch) -> Issued | Intent | Case | BrokerError:
        """What one request comes to; a refusal is an answer, and recorded like one."""
        grant_id = new_id("grt", moment.now)
        try:
            if request.idempotency is not None:
                made_id = claimed(moment.db, request.caller, request.idempotency, grant_id, moment.now)
                if made_id != grant_id:
                    return self._again(request, grant_id, made_id, moment, batch)
            return self._issued(request, grant_id, moment, batch)
        except BrokerError as refusal:
            kept = isinstance(refusal, PolicyDenied) and refusal.grant_id is not None
            if request.idempotency is not None and not kept:
                # Nothing was made under the key by this request, so the corrected one may use it.
                release_key(
                    moment.db,
                    principal=request.caller.name,
                    key_sha256=request.idempotency.key_sha256,
                    made_id=grant_id,
                )
            # A denial is recorded with its grant; one of a break-glass also as what it is.
            also = request.break_glass is not None or not isinstance(refusal, PolicyDenied)
            if also and self._limiter.is_told(request.caller.name, refusal):
                batch.events.append(_refused(request, moment, refusal))
            if is_denial(refusal):
                self._count_denial(request.caller.name, moment, batch)
            return refusal

    def _count_denial(self, agent: str, moment: _Moment, batch: _Batch) -> None:
        before = moment.denials[agent]
        moment.denials[agent] = after = Denials(before.count + 1, moment.now)
        batch.events.extend(throttled(agent, before, after, self._limits, moment.now))

    def _issued(self, request: GrantRequest, grant_id: str, moment: _Moment, batch: _Batch) -> Issued | Intent | Case:
        now, standing = moment.now, moment.standing
        principal = _known(request.caller, moment)
        self._breakers.require_rest(principal.name, moment.denials[principal.name], now)
        require_narrow(request)
        parent = self._parent_for(request, principal, moment)
        if parent is not None:
            request = replace(request, task_id=parent.task_id)
        resource = standing.catalogue.resource(request.resource)
        require_may_ask(principal, resource, request.scopes, request.jkt)
        _require_consent(request)
        outside = resource.provider != OWES_NOTHING
        if outside:
            _require_fits(request, resource)
            self._reconciliation.require_reconciled(moment.db, resource.provider, now)
        elif request.parameters:
            raise Invalid(f"{resource.identifier} takes no parameters: leave them out", member="parameters")
        task = self._task_for(request, principal, moment)
        held = moment.live[principal.name]
        live_limits.require_room_of_agent(
            principal.name, held, live_limits.agent_bound(self._limits, standing.catalogue, principal.name)
        )
        live_limits.require_room(
            _counts_for(request, request.task_id), moment.live_of, self._limits, standing.catalogue
        )
        user = user_of(request, task, parent)
        require_known_user(user, standing.catalogue)
        found = terms(
            request,
            principal=principal,
            resource=resource,
            task=task,
            user=user,
            user_attributes=attributes_of_user(request, task, parent),
            parent=parent,
            policies=standing.policies,
            limits=self._limits,
            now=now,
            risk=standing.risks.level(principal.name, user, now),
            live_grants=held,
            recent_denials=moment.denials[principal.name].count,
        )
        # Taken before it is sure to be used: a place in a status list may be lost, never shared.
        place = self._indexes.take(task.id, now) if found.allowed and not outside else (None, None)
        grant = self._granted(request, grant_id, principal, task, parent, found, standing, place, now)
        require_no_refusal(grant, standing)
        asks_people = found.decision.outcome == NEEDS_APPROVAL
        if not found.allowed and not asks_people:
            raise self._denied(request, grant, found, standing.policies, now, batch)
        if outside:
            self._secrets.require_foreseeable(grant, resource.settings, request.parameters)
        if asks_people:
            return self._waiting(request, grant, task, found, moment, batch)
        if request.task_id is None:
            task = replace(task, deadline_at=grant.expires_at)
            batch.tasks.append(task)
            batch.events.append(_task_opened(task, request.caller, now))
        if outside:
            return self._intended(request, grant, resource, moment, batch)
        issued = signed(grant, standing, issuer=self._issuer, issued_at=now, expires_at=grant.expires_at)
        batch.grants.append(issued.grant)
        batch.events.append(grant_event(issued.grant, request.caller, now, "grant.issued"))
        batch.answers[grant_id] = issued
        _count_live(issued.grant, moment)
        return issued

    def _waiting(
        self, request: GrantRequest, grant: Grant, task: Task, found: Terms, moment: _Moment, batch: _Batch
    ) -> Case:
        """People are asked. What they say yes to is decided again when it is collected."""
        if not request.may_wait:
            raise InvalidScope(
                f"approval is required: {sentence(found.decision.as_json())}. Ask with completion_mode=deferred, or at "
                "POST /v1/grants, and come back when people have said yes",
                member="scope",
            )
        if request.task_id is None:
            # As long as the wait and the token together: what it is for ends with it.
            lasts = self._limits.approve_within + self._limits.collect_within + found.ttl
            task = replace(task, deadline_at=min(task.deadline_at, moment.now + lasts))
        case, new = moment.opening.open(request, grant, task, found)
        if not new:
            if request.idempotency is not None:
                repoint_key(
                    moment.db,
                    principal=request.caller.name,
                    key_sha256=request.idempotency.key_sha256,
                    made_id=grant.id,
                    instead=case.grant.id,
                )
            return case
        if request.task_id is None:
            batch.tasks.append(task)
            batch.events.append(_task_opened(task, request.caller, moment.now))
        batch.grants.append(case.grant)
        batch.cases.append(case)
        approval_id = case.approval.id
        batch.events.append(
            grant_event(case.grant, request.caller, moment.now, "grant.pending", approval_id=approval_id)
        )
        batch.events.append(opened_event(case, request.caller, moment.now))
        if case.grant.break_glass is not None:
            batch.events.append(step(case.grant, request.caller, moment.now, "requested", approval_id=approval_id))
        batch.answers[grant.id] = case
        return case

    def _intended(
        self, request: GrantRequest, grant: Grant, resource: Resource, moment: _Moment, batch: _Batch
    ) -> Intent:
        """Nothing is asked of the outside before this is durable (INV-02)."""
        now, caller = moment.now, request.caller
        lease = intended_lease(grant, resource.settings, now)
        batch.grants.append(grant)
        batch.leases.append(lease)
        batch.events.append(grant_event(grant, caller, now, "grant.approved", lease_id=lease.id))
        intent = Intent(
            grant=grant,
            lease=lease,
            caller=caller,
            catalogue_version=moment.standing.catalogue.version,
            longest=timedelta(seconds=resource.max_ttl_s),
            parameters=request.parameters,
        )
        batch.answers[grant.id] = intent
        _count_live(grant, moment)
        return intent

    def _granted(
        self,
        request: GrantRequest,
        grant_id: str,
        principal: Principal,
        task: Task,
        parent: Grant | None,
        found: Terms,
        standing: Standing,
        place: tuple[int | None, int | None],
        now: datetime,
    ) -> Grant:
        """The row these terms make, before it has a token; `place` is (status list, index)."""
        allowed = found.allowed
        resource = found.asked.resource
        signed_here = allowed and resource.provider == OWES_NOTHING
        allowed_as = GrantState.ACTIVE if signed_here else GrantState.APPROVED
        kids: tuple[str, ...] = (standing.keys.current(resource.signing_algorithm).kid,) if signed_here else ()
        policies = found.decision.policies
        waits, bound = found.decision.outcome == NEEDS_APPROVAL, parent is not None or request.user is not None
        # What waits for people is given its life when it is collected; what binds it to others is known now.
        renewable_until = task.deadline_at if waits else min(now + self._limits.max_ttl, task.deadline_at)
        if parent is not None and allowed:
            # What ends the parent along any axis covers this one too, without a look at the parent (INV-11).
            kids, policies = joined(parent.kids, *kids), joined(parent.policies, *policies)
        if parent is not None:
            renewable_until = min(renewable_until, parent.renewable_until or parent.expires_at)
        if request.user is not None:
            renewable_until = min(renewable_until, request.user.expires_at)
        return Grant(
            id=grant_id,
            task_id=task.id,
            era=standing.era,
            state=allowed_as if allowed else GrantState.DENIED,
            agent=principal.name,
            issuer=principal.issuer,
            subject=principal.subject,
            orchestrator=task.orchestrator,
            on_behalf_of=found.asked.user,
            parent_grant_id=None if parent is None else parent.id,
            resource=request.resource,
            scopes=tuple(sorted(request.scopes)),
            provider=resource.provider,
            jti=secrets.token_urlsafe(16) if signed_here else None,
            kids=kids,
            jkt=request.jkt,
            credential_sha256=None,
            status_list=place[0],
            status_index=place[1],
            created_at=now,
            issued_at=now if signed_here else None,
            expires_at=now + found.ttl,
            renewable_until=renewable_until if signed_here or (waits and bound) else None,
            ttl_s=int(found.ttl.total_seconds()),
            ttl_decided_by=found.decided_by,
            intent=request.intent,
            claimed=request.claimed,
            request_sha256=found.asked.sha256(),
            decision=found.decision.as_json(),
            policies=policies,
            chain=() if parent is None else (*parent.chain, parent.agent),
            tasks_above=task.tasks_above,
            orchestrators_above=task.orchestrators_above,
            hand_to=tuple(sorted(set(request.hand_to))),
            break_glass=request.break_glass,
            policy_version=found.decision.policy_version,
            terms=found.as_json(),
            trace_id=request.caller.trace_id,
        )

    def _denied(
        self,
        request: GrantRequest,
        grant: Grant,
        found: Terms,
        policies: PolicySet,
        now: datetime,
        batch: _Batch,
    ) -> PolicyDenied:
        event = grant_event(grant, request.caller, now, "grant.denied")
        if request.task_id is None:
            # No task is opened for what came to nothing; the event still says who asked for what, and why not.
            batch.events.append(replace(event, grant_id=None, task_id=None))
            return denial(grant, found, policies, kept=False)
        batch.grants.append(grant)
        batch.events.append(event)
        refusal = denial(grant, found, policies, kept=True)
        batch.answers[grant.id] = refusal
        return refusal

    def _parent_for(self, request: GrantRequest, principal: Principal, moment: _Moment) -> Grant | None:
        """The grant that is handed down, or None; what is asked for is inside it in every dimension (INV-10)."""
        if request.parent_grant_id is None:
            return None
        parent = moment.parents.get(request.parent_grant_id)
        task = None if parent is None else moment.tasks.get(parent.task_id)
        # Its id is no secret, so it is its holder who says who may have a part: by the token, or by name.
        meant = parent is not None and (
            request.parent_by_token or principal.name in parent.hand_to or parent.is_held_by(principal)
        )
        if parent is None or task is None or principal.name not in task.agents or not meant:
            # One answer for a grant that is not there and one of a task that is not theirs (INV-28).
            raise NotFound(
                f"there is no grant {request.parent_grant_id[:64]!r} that could be handed down to {principal.name}",
                member="parent_grant_id",
            )
        if request.task_id not in (None, parent.task_id):
            raise Invalid(
                f"grant {parent.id} is of another task: what is handed down stays in its task", member="task_id"
            )
        require_live(parent, task, moment.standing, moment.now)
        require_no_break_glass(parent, "handed down")
        if request.resource != parent.resource:
            raise InvalidTarget(
                f"grant {parent.id} is for {parent.resource}, and only that is handed down", member="resource"
            )
        beyond = sorted(request.scopes - set(parent.scopes))
        if beyond:
            raise InvalidScope(
                f"grant {parent.id} does not hold {', '.join(beyond)}; it holds {', '.join(parent.scopes)}",
                member="scope",
            )
        depth = len(parent.chain) + 1
        if depth > self._limits.max_delegation_depth:
            raise Forbidden(
                f"grant {parent.id} was handed down {depth - 1} times, which is as deep as this broker allows "
                "(max_delegation_depth): ask for a grant of your own"
            )
        if parent.jkt is not None and request.parent_by_token:
            # INV-21: whoever presents its token has not shown its key.
            raise Invalid(
                "subject_token is bound to a key, and only with that key of any use: name its grant as "
                "parent_grant_id at POST /v1/grants",
                member="subject_token",
            )
        if parent.jkt is not None and request.jkt is None:
            # INV-21: what is bound to a key would become a bearer's by being handed down.
            raise Invalid(f"grant {parent.id} is bound to a key: bind yours too, with a DPoP proof", member="DPoP")
        return parent

    def _task_for(self, request: GrantRequest, principal: Principal, moment: _Moment) -> Task:
        now = moment.now
        if request.task_id is None:
            if not principal.implicit_tasks:
                raise Invalid("name the task you work on: task_id is missing", member="task_id")
            return Task(
                id=new_id("task", now),
                state=TaskState.ACTIVE,
                purpose="implicit",
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
        require_open_task(task, now)
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

    # --- The same request again ---------------------------------------------------------------------------------------

    def _again(
        self, request: GrantRequest, grant_id: str, made_id: str, moment: _Moment, batch: _Batch
    ) -> Issued | Intent | Case:
        """What a request comes to whose idempotency key already stands for a grant: that grant, or why not (INV-06)."""
        principal = _known(request.caller, moment)
        answer = batch.answers.get(made_id)
        if isinstance(answer, PolicyDenied):
            raise answer
        if isinstance(answer, Intent):
            raise _just_being_answered()
        grant = answer.grant if answer is not None else find_grant(moment.db, made_id, lock=True)
        if grant is None or not grant.is_held_by(principal):
            raise Conflict("what this Idempotency-Key was first used for left no grant of yours: use a new key")
        if request.jkt != grant.jkt:
            raise IdempotencyConflict(
                "this Idempotency-Key was used with another DPoP key, or without one: use a new key for a new request"
            )
        if answer is not None:
            return answer
        approval = approval_of_grant(moment.db, grant.id)
        if approval is not None:
            case = cases(moment.db, [approval], moment.standing.catalogue)[0]
            if request.may_wait and grant.expires_at > moment.now and case.is_to_be_waited_for:
                return case
            raise Conflict(
                f"grant {grant.id}, about which people were asked, is {grant.state}; it was made with this "
                "Idempotency-Key: collect it if it is approved, or use a new key for a new request"
            )
        if grant.state is GrantState.DENIED:
            raise PolicyDenied(sentence(grant.decision), decision=grant.decision, grant_id=grant.id)
        task = moment.tasks.get(grant.task_id)
        if task is None:
            # It was opened between our look and our lock: the next try finds it.
            raise _just_being_answered()
        if grant.provider != OWES_NOTHING and grant.state in (GrantState.APPROVED, GrantState.FAILED):
            if grant.state is GrantState.APPROVED and grant.expires_at > moment.now:
                raise _just_being_answered()
            return self._anew(request, grant_id, grant, moment, batch)
        try:
            require_live(grant, task, moment.standing, moment.now)
        except (Conflict, Forbidden) as ended:
            raise Conflict(f"{ended.detail}; it was made with this Idempotency-Key: use a new one") from None
        if grant.provider != OWES_NOTHING:
            return self._anew(request, grant_id, grant, moment, batch)
        resource = moment.standing.catalogue.resource(grant.resource)
        require_may_ask(principal, resource, frozenset(grant.scopes), grant.jkt)
        expires_at = min(grant.expires_at, request.caller.proof_expires_at)
        if expires_at <= moment.now:
            raise Conflict("the workload token ends now: come back with a fresh one")
        # The first token may have been lost or not; so this is one more, with a name of its own.
        another = replace(
            grant,
            jti=secrets.token_urlsafe(16),
            kids=joined(grant.kids, moment.standing.keys.current(resource.signing_algorithm).kid),
        )
        require_no_refusal(another, moment.standing)
        issued = signed(another, moment.standing, issuer=self._issuer, issued_at=moment.now, expires_at=expires_at)
        renew_grant(moment.db, issued.grant)
        if another.kids != grant.kids:
            hand_down(moment.db, issued.grant)
        batch.events.append(grant_event(issued.grant, request.caller, moment.now, "grant.reissued"))
        return issued

    def _anew(
        self, request: GrantRequest, grant_id: str, earlier: Grant, moment: _Moment, batch: _Batch
    ) -> Issued | Intent | Case:
        """Another secret instead of one that nobody may have received: the first dies, so that one is live (INV-06)."""
        now, claim = moment.now, request.idempotency
        if claim is None or not repoint_key(
            moment.db,
            principal=request.caller.name,
            key_sha256=claim.key_sha256,
            made_id=earlier.id,
            instead=grant_id,
        ):
            raise _just_being_answered()
        why = "asked for again with its Idempotency-Key"
        event = change_of(now, request.caller.name, "grant.revoked", reason=why, trace_id=request.caller.trace_id)
        values = {"revoked_at": now, "revoked_by": request.caller.name, "reason": why}
        ended = end_with_descendants(
            moment.db,
            with_id(earlier.id),
            now=now,
            urgency=Urgency.ENDED,
            event=event,
            **values,
        )
        for row in ended:
            if row.agent in moment.live:
                moment.live[row.agent] -= 1
            issuer = earlier.issuer if row.id == earlier.id else ""
            for thing in live_limits.things_of(
                live_limits.For(task_id=row.task_id, resource=row.resource, issuer=issuer)
            ):
                if thing in moment.live_of:
                    moment.live_of[thing] -= 1
        return self._issued(request, grant_id, moment, batch)


def _counts_for(request: GrantRequest, task_id: str | None) -> live_limits.For:
    return live_limits.For(task_id=task_id, resource=request.resource, issuer=request.caller.principal.issuer)


def _count_live(grant: Grant, moment: _Moment) -> None:
    """What comes after it in the same transaction finds it counted."""
    moment.live[grant.agent] += 1
    for thing in live_limits.things_of(
        live_limits.For(task_id=grant.task_id, resource=grant.resource, issuer=grant.issuer)
    ):
        if thing in moment.live_of:
            moment.live_of[thing] += 1


def _require_fits(request: GrantRequest, resource: Resource) -> None:
    """What makes no sense for a secret from outside is refused and not ignored."""
    if not request.takes_secrets:
        raise InvalidTarget(
            f"a credential of {resource.identifier} is no token: ask for it at POST /v1/grants", member="resource"
        )
    if request.jkt is not None:
        raise Invalid(f"a secret of {resource.identifier} cannot be bound to a key: leave the proof out", member="DPoP")


def _require_consent(request: GrantRequest) -> None:
    """What a user's assertion was made for is all that it is good for."""
    user = request.user
    if user is None:
        return
    if user.resources is not None and request.resource not in user.resources:
        raise InvalidTarget(f"the user's assertion is not for {request.resource}", member="resource")
    beyond = sorted(request.scopes - user.scopes) if user.scopes is not None else []
    if beyond:
        raise InvalidScope(f"the user's assertion does not hold {', '.join(beyond)}", member="scope")


def _just_being_answered() -> Unavailable:
    return Unavailable("the first request with this Idempotency-Key is just being answered: try again")


def _known(caller: Caller, moment: _Moment) -> Principal:
    principal = principal_of(caller, moment.standing)
    if principal.name not in moment.live:
        # Renamed between the door and the lock, which was taken by the old name.
        raise Unavailable("the configuration changed while this was asked: try again")
    return principal


def require_open_task(task: Task, now: datetime) -> None:
    if not task.is_open(now):
        state = task.state if task.state is not TaskState.ACTIVE else TaskState.EXPIRED
        raise TaskNotActive(f"task {task.id} is {state}: nothing can be issued for it", member="task_id")


def require_live(grant: Grant, task: Task, standing: Standing, now: datetime) -> None:
    require_open_task(task, now)
    refusal = standing.refusals.over(grant)
    if refusal is not None:
        raise LockedDown(f"grant {grant.id} was revoked along {refusal.axis} {refusal.value!r}: {refusal.reason}")
    if grant.state is not GrantState.ACTIVE or grant.expires_at <= now:
        state = grant.state if grant.state is not GrantState.ACTIVE else GrantState.EXPIRED
        raise Conflict(f"grant {grant.id} is {state}: ask for a new one")


def denial(grant: Grant, found: Terms, policies: PolicySet, *, kept: bool) -> PolicyDenied:
    decision = found.decision.as_json()
    return PolicyDenied(
        sentence(decision),
        decision=decision,
        grant_id=grant.id if kept else None,
        hint=lambda: policies.explain(found.asked, found.decision),
    )


def _refused(request: GrantRequest, moment: _Moment, refusal: BrokerError) -> Event:
    return Event(
        id=new_id("evt", moment.now),
        at=moment.now,
        # Of its own kind, beside the denial that a policy's no is: who tries to break a glass is to be found at once.
        type="grant.refused" if request.break_glass is None else "break_glass.refused",
        actor=request.caller.name,
        outcome=refusal.code,
        # Only what exists may be named, so that the trail holds no text of an attacker's in the place of an id.
        task_id=request.task_id if request.task_id in moment.tasks else None,
        agent=request.caller.name,
        resource=request.resource[:1000],
        reason=refusal.detail[:1000],
        policy_version=moment.standing.catalogue.version,
        trace_id=request.caller.trace_id,
        data={
            "subject": request.caller.principal.subject,
            "scopes": sorted(request.scopes),
            **({} if request.break_glass is None else {"break_glass": request.break_glass}),
        },
    )


def _task_opened(task: Task, caller: Caller, now: datetime) -> Event:
    return Event(
        id=new_id("evt", now),
        at=now,
        type="task.opened",
        actor=caller.name,
        task_id=task.id,
        agent=caller.name,
        trace_id=caller.trace_id,
        data={"implicit": True},
    )
