"""People asked: a request that waits for them, what they say, and how it ends. Nobody's thread waits with it.

::

    issuance    decided needs_approval: grant pending, approval open      TX of issuing
    approve     a vote; with the last that is needed both are approved    TX
    collection  decided again, issued (`broker.services.collection`)      TX

Every verb holds the row of the grant first, so votes are counted one after the other, and a decision meets a withdrawal
or the end of the task in one order or the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from broker.domain.approval import (
    Approval,
    Case,
    Narrowing,
    Requesters,
    Verdict,
    Vote,
    are_met,
    counts,
    met,
    needs_of,
    parameters_hash,
    spoken_for,
)
from broker.domain.audit import Event
from broker.domain.catalogue import Catalogue, Limits
from broker.domain.clock import Clock, epoch
from broker.domain.errors import (
    Conflict,
    Forbidden,
    LimitExceeded,
    LockedDown,
    NotFound,
    RoleMissing,
    TaskNotActive,
)
from broker.domain.grant import OPEN_BREAK_GLASSES, Grant, GrantRequest
from broker.domain.identity import Caller, Role, is_id, new_id
from broker.domain.lease import Urgency
from broker.domain.lifecycle import ApprovalState, GrantState
from broker.domain.task import Task
from broker.services.break_glass import step
from broker.services.endings import end_approvals, end_grants
from broker.services.refusals import recorded
from broker.services.standing import Standing, StandingReader, current_caller
from broker.services.terms import Terms
from broker.store import approvals, gate, grants, locks, models
from broker.store.database import Database
from broker.store.tasks import find_task
from broker.store.transitions import change_of, move, record

_COME_AGAIN_S = 60


class Opening:
    """What one transaction of issuing reads once of those who wait, and what it adds to them."""

    def __init__(self, db: Connection, standing: Standing, limits: Limits, now: datetime) -> None:
        self._db = db
        self._standing = standing
        self._limits = limits
        self._now = now
        self._of_agent: dict[str, list[Approval]] = {}
        self._of_group: dict[str, int] = {}
        self._opened: dict[str, Case] = {}
        self._broken: set[str] = set()  # those of the grants that wait which are a break-glass
        self._alone = False

    def open(self, request: GrantRequest, grant: Grant, task: Task, found: Terms) -> tuple[Case, bool]:
        """The approval this request waits for, and whether it is a new one; `grant` is what is pending with it.

        The same request again joins the one that is open, or that is approved and not collected; one that differs only
        in what it says of itself is refused with its id: nobody is asked twice about one thing.
        """
        if not self._alone:
            locks.hold_approvals(self._db)
            self._alone = True
        mine = self._of_agent.get(grant.agent)
        if mine is None:
            mine = self._of_agent[grant.agent] = approvals.awaited_by(self._db, grant.agent, now=self._now)
            self._broken |= grants.break_glasses_among(self._db, [alike.grant_id for alike in mine])
        parameters_sha256 = parameters_hash(request.parameters)
        for alike in mine:
            # Each request of an implicit task has a task of its own, so there the task tells nothing apart.
            same_task = request.task_id is None or alike.task_id == grant.task_id
            if not (same_task and alike.resource == grant.resource and alike.scopes == grant.scopes):
                continue
            case = self._opened.get(alike.id) or cases(self._db, [alike], self._standing.catalogue)[0]
            if _is_same(alike, case.grant, grant, parameters_sha256):
                return case, False
            raise Conflict(
                f"{alike.id} is {alike.state} for {grant.agent} already, for the same scopes on {grant.resource}: wait "
                f"for it, collect {alike.grant_id} when it is approved, or revoke that grant first"
            )
        undecided = [alike for alike in mine if alike.state is ApprovalState.OPEN]
        broken = sum(alike.grant_id in self._broken for alike in undecided)
        if grant.break_glass is not None:
            _require_room_for_emergency(grant, broken)
        else:
            self._require_room(grant, len(undecided) - broken, [need.group for need in needs_of(found.decision)])
        case = self._opened_case(grant, task, found, parameters_sha256)
        mine.append(case.approval)
        self._opened[case.approval.id] = case
        if grant.break_glass is not None:
            self._broken.add(grant.id)
            return case, True
        for group in case.approval.groups:
            self._of_group[group] += 1
        return case, True

    def _require_room(self, grant: Grant, mine: int, groups: Iterable[str]) -> None:
        """INV-34: whoever could flood the people who decide is refused before they are asked.

        A break-glass is in neither count: what waits patiently is never in the way of an emergency.
        """
        if mine >= self._limits.max_open_approvals_per_agent:
            raise LimitExceeded(
                f"{mine} requests of {grant.agent} wait for people, its limit: wait for them, or withdraw some",
                limit="max_open_per_agent",
                value=self._limits.max_open_approvals_per_agent,
                retry_after_s=_COME_AGAIN_S,
            )
        for group in groups:
            waiting = self._of_group.get(group)
            if waiting is None:
                waiting = self._of_group[group] = approvals.count_open(self._db, group, now=self._now)
            if waiting >= self._limits.max_open_approvals_per_group:
                raise LimitExceeded(
                    f"{waiting} requests wait for {group!r}, all that it is asked at once: come again later",
                    limit="max_open_per_group",
                    value=self._limits.max_open_approvals_per_group,
                    retry_after_s=_COME_AGAIN_S,
                )

    def _opened_case(self, grant: Grant, task: Task, found: Terms, parameters_sha256: str) -> Case:
        within, own_s = self._limits.approve_within, found.decision.approve_within_s
        if own_s is not None:
            within = min(within, timedelta(seconds=own_s))
        approval = Approval(
            id=new_id("apr", self._now),
            state=ApprovalState.OPEN,
            grant_id=grant.id,
            task_id=task.id,
            agent=grant.agent,
            orchestrator=grant.orchestrator,
            resource=grant.resource,
            scopes=grant.scopes,
            ttl_s=found.asked.ttl_s,
            needs=needs_of(found.decision),
            # INV-14: one hash and one version for the decision, the question and the answer.
            request_sha256=grant.request_sha256,
            parameters_sha256=parameters_sha256,
            policy_version=found.decision.policy_version,
            created_at=self._now,
            expires_at=min(self._now + within, task.deadline_at, grant.renewable_until or task.deadline_at),
        )
        waiting = replace(grant, state=GrantState.PENDING, expires_at=approval.expires_at)
        return _case(approval, waiting, (), self._standing.catalogue, {}, "" if task.implicit else task.purpose)


def _is_same(alike: Approval, theirs: Grant, mine: Grant, parameters_sha256: str) -> bool:
    """Whether two requests are one: by the same workload, to the same key, with the same hash."""
    by_whom = (mine.issuer, mine.subject, mine.jkt)
    return (
        alike.request_sha256 == mine.request_sha256
        and alike.parameters_sha256 == parameters_sha256
        and (theirs.issuer, theirs.subject, theirs.jkt) == by_whom
    )


def opened_event(case: Case, caller: Caller, now: datetime) -> Event:
    """The audit event of an approval that was opened."""
    approval = case.approval
    needs = [{"group": need.group, "quorum": need.quorum} for need in approval.needs]
    data = {"needs": needs, "request_sha256": approval.request_sha256, "expires_at": epoch(approval.expires_at)}
    return _event(approval, caller, now, "approval.opened", data=data)


class Approvals:
    def __init__(self, *, database: Database, standing: StandingReader, limits: Limits, clock: Clock) -> None:
        self._database = database
        self._standing = standing
        self._limits = limits
        self._clock = clock

    def find(self, caller: Caller, approval_id: str) -> Case:
        """One approval; NotFound for those who may not see it (INV-28)."""
        with self._database.read() as db:
            standing = self._standing.at(db, gate.era_of(db))
            approval = approvals.find_approval(db, approval_id) if is_id(approval_id, "apr") else None
            if approval is None or not may_see(current_caller(caller, standing), approval):
                raise _not_found(approval_id)
            return cases(db, [approval], standing.catalogue)[0]

    def page(
        self,
        caller: Caller,
        *,
        state: str | None = None,
        task_id: str | None = None,
        agent: str | None = None,
        resource: str | None = None,
        before: str | None = None,
        limit: int = 100,
    ) -> list[Case]:
        """Newest first, below the id `before`, of those the caller may see."""
        where = approvals.matching(state=state, task_id=task_id, agent=agent, resource=resource)
        with self._database.read() as db:
            standing = self._standing.at(db, gate.era_of(db))
            caller = current_caller(caller, standing)
            if not _sees_all(caller):
                groups = caller.principal.groups if caller.has(Role.APPROVER) else frozenset()
                where.append(approvals.seen_by(caller.name, groups))
            page = approvals.page_of_approvals(db, where=where, before=before, limit=limit)
            return cases(db, page, standing.catalogue)

    def of_grant(self, caller: Caller, grant_id: str) -> Case:
        """What the agent of a grant waits for."""
        with self._database.read() as db:
            standing = self._standing.at(db, gate.era_of(db))
            approval = approvals.approval_of_grant(db, grant_id) if is_id(grant_id, "grt") else None
            case = None if approval is None else cases(db, [approval], standing.catalogue)[0]
            if case is None or not case.grant.is_held_by(current_caller(caller, standing).principal):
                raise NotFound(f"there is no grant {grant_id[:64]!r} of yours that people were asked about")
        return case

    def polled(self, grant_id: str, *, every: timedelta) -> bool:
        """Note that its agent asks again; False where it asked less than `every` ago."""
        with self._database.begin() as db:
            now = self._clock()
            return approvals.poll(db, grant_id, now=now, not_since=now - every)

    def approve(self, caller: Caller, approval_id: str, narrowing: Narrowing) -> Case:
        """One person's yes, to all or to less of it; with the last that is needed the grant may be collected."""
        with (
            recorded(self._database, self._clock, caller, "approval.refused", "approve"),
            self._database.begin_issuing() as db,
        ):
            held = self._held(db, caller, approval_id)
            approval, grant, now = held.approval, held.grant, held.now
            scopes = None if narrowing.scopes is None else tuple(sorted(set(narrowing.scopes)))
            said = _Said(verdict=Verdict.APPROVE, scopes=scopes, ttl_s=narrowing.ttl_s, reason=narrowing.reason)
            held.require_approver()
            if held.said_before(said):
                return held.case()
            held.require_counts()
            held.require_open()
            refusal = held.standing.refusals.over(grant)
            if refusal is not None:
                raise LockedDown(f"a lockdown stands over {refusal.axis} {refusal.value!r}: {refusal.reason}")
            task = find_task(db, grant.task_id)
            if task is None or not task.is_open(now):
                raise TaskNotActive(f"task {grant.task_id} has ended: nothing can be issued for it any more")
            narrowing.require_fits(approval, held.votes)
            votes = held.vote(db, said)
            found = met(approval.needs, votes, held.requesters, held.standing.catalogue)
            if not are_met(approval.needs, found):
                return held.case(votes)
            collect_by = min(now + self._limits.collect_within, task.deadline_at)
            ended = end_approvals(
                db,
                ApprovalState.APPROVED,
                approvals.with_id(approval.id),
                now=now,
                actor=held.caller.name,
                reason=narrowing.reason,
                trace_id=caller.trace_id,
            )
            moved = move(
                db,
                models.Grant,
                GrantState.APPROVED,
                grants.with_id(grant.id),
                grants.unexpired(now),
                event=change_of(
                    now, held.caller.name, "grant.approved", trace_id=caller.trace_id, data={"approval_id": approval.id}
                ),
                expires_at=collect_by,
            )
            if not (ended and moved):
                # Rolled back: neither moves without the other.
                raise Conflict(f"approval {approval.id} was decided meanwhile")
            if grant.break_glass is not None:
                record(db, [step(grant, held.caller, now, "approved", approval_id=approval.id)])
            return self._now(db, approval.id, held.standing.catalogue)

    def deny(self, caller: Caller, approval_id: str, *, reason: str | None = None) -> Case:
        """One person's no, which is enough."""
        with (
            recorded(self._database, self._clock, caller, "approval.refused", "deny"),
            self._database.begin() as db,
        ):
            held = self._held(db, caller, approval_id)
            said = _Said(verdict=Verdict.DENY, reason=reason)
            held.require_approver()
            if held.said_before(said):
                return held.case()
            if held.requesters.include(held.caller.principal):
                raise Forbidden("this is your own request: withdraw it")
            held.require_open()
            held.vote(db, said)
            why = reason or f"denied by {held.caller.name}"
            self._end(db, held, ApprovalState.DENIED, GrantState.DENIED, why)
            return self._now(db, approval_id, held.standing.catalogue)

    def withdraw(self, caller: Caller, approval_id: str, *, reason: str | None = None) -> Case:
        """The requester takes its request back. For the agent of the grant and the orchestrator of its task."""
        with (
            recorded(self._database, self._clock, caller, "approval.refused", "withdraw"),
            self._database.begin() as db,
        ):
            held = self._held(db, caller, approval_id)
            grant = held.grant
            if not (grant.is_held_by(held.caller.principal) or held.caller.name == grant.orchestrator):
                raise RoleMissing(f"approval {approval_id} may be withdrawn by {grant.agent} or {grant.orchestrator}")
            if held.approval.state is ApprovalState.WITHDRAWN:
                return held.case()
            held.require_open()
            self._end(db, held, ApprovalState.WITHDRAWN, GrantState.REVOKED, reason or "withdrawn")
            return self._now(db, approval_id, held.standing.catalogue)

    def _end(self, db: Connection, held: _Held, to: ApprovalState, grant_to: GrantState, why: str) -> None:
        now, actor, trace_id = held.now, held.caller.name, held.caller.trace_id
        where = approvals.with_id(held.approval.id)
        end_approvals(db, to, where, now=now, actor=actor, reason=why, trace_id=trace_id)
        denied = grant_to is GrantState.DENIED
        event = change_of(
            now,
            actor,
            f"grant.{grant_to}",
            outcome="denied" if denied else "ok",
            reason=why,
            trace_id=trace_id,
            data={"approval_id": held.approval.id},
        )
        values = {"reason": why} if denied else {"reason": why, "revoked_at": now, "revoked_by": actor}
        of_it = grants.with_id(held.grant.id)
        end_grants(db, grant_to, of_it, now=now, urgency=Urgency.ENDED, event=event, **values)

    def _held(self, db: Connection, caller: Caller, approval_id: str) -> _Held:
        """The approval as it is and stays until this transaction ends, behind the lock of its grant."""
        unlocked = approvals.find_approval(db, approval_id) if is_id(approval_id, "apr") else None
        grant = None if unlocked is None else grants.find_grant(db, unlocked.grant_id, lock=True)
        now = self._clock()
        standing = self._standing.at(db, gate.era_of(db))
        caller = current_caller(caller, standing)
        approval = None if grant is None else approvals.find_approval(db, approval_id)
        if grant is None or approval is None or not may_see(caller, approval):
            raise _not_found(approval_id)
        return _Held(
            now=now,
            standing=standing,
            caller=caller,
            approval=approval,
            grant=grant,
            votes=approvals.votes_of(db, [approval.id])[approval.id],
            requesters=requesters_of(db, grant, standing.catalogue),
            purpose=approvals.purposes_of(db, [grant.task_id]).get(grant.task_id, ""),
        )

    def _now(self, db: Connection, approval_id: str, catalogue: Catalogue) -> Case:
        approval = approvals.find_approval(db, approval_id)
        if approval is None:
            raise RuntimeError(f"{approval_id} was there and is gone")
        return cases(db, [approval], catalogue)[0]


def _require_room_for_emergency(grant: Grant, mine: int) -> None:
    """INV-34: a bound of its own. Which agents have one is declared, so it bounds what a group is asked too."""
    if mine >= OPEN_BREAK_GLASSES:
        raise LimitExceeded(
            f"{mine} break-glass requests of {grant.agent} wait for people, as many as may: wait for them, or withdraw "
            "some",
            limit="open_break_glasses",
            value=OPEN_BREAK_GLASSES,
            retry_after_s=_COME_AGAIN_S,
        )


@dataclass(frozen=True, kw_only=True)
class _Said:
    verdict: Verdict
    scopes: tuple[str, ...] | None = None
    ttl_s: int | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Held:
    """One approval behind the lock of its grant, and who wants to say something to it."""

    now: datetime
    standing: Standing
    caller: Caller
    approval: Approval
    grant: Grant
    votes: Sequence[Vote]
    requesters: Requesters
    purpose: str

    def case(self, votes: Sequence[Vote] | None = None) -> Case:
        said = self.votes if votes is None else votes
        found = met(self.approval.needs, said, self.requesters, self.standing.catalogue)
        return _case(self.approval, self.grant, said, self.standing.catalogue, found, self.purpose)

    def require_approver(self) -> None:
        groups = " or ".join(sorted(self.approval.groups))
        if not self.caller.has(Role.APPROVER) or not self.caller.principal.groups & self.approval.groups:
            raise RoleMissing(f"{self.caller.name} is not an approver of {groups}: only they decide this")

    def said_before(self, said: _Said) -> bool:
        """Whether this very person said just this, so that asking again gets the same answer; Conflict for another."""
        for vote in self.votes:
            if vote.is_by(self.caller.principal):
                # INV-15: one vote each, whatever it was.
                if (vote.verdict, vote.scopes, vote.ttl_s) == (said.verdict, said.scopes, said.ttl_s):
                    return True
                raise Conflict(f"{self.caller.name} has voted on {self.approval.id} already: one vote each")
        return False

    def require_counts(self) -> None:
        """INV-15: nobody approves their own request, directly or through an identity they control."""
        voter = self.caller.principal
        if self.requesters.include(voter):
            raise Forbidden(f"{voter.name} asked for this itself: somebody else has to approve it")
        if not any(counts(need, voter, self.requesters) for need in self.approval.needs):
            raise Forbidden(
                f"{voter.name} and who asks for this have one owner: somebody of another has to approve it, unless the "
                'policy says @owner_may_approve("true")'
            )

        catalogue = self.standing.catalogue
        other = spoken_for(self.approval.needs, self.votes, voter, self.requesters, catalogue)
        if other is not None:
            raise Forbidden(
                f"{other.name} has approved it, and may be the same person as {voter.name}: somebody else has to "
                "approve it too"
            )

    def require_open(self) -> None:
        approval = self.approval
        overdue = approval.state is ApprovalState.OPEN and approval.expires_at <= self.now
        if approval.state is not ApprovalState.OPEN or overdue:
            state = ApprovalState.EXPIRED if overdue else approval.state
            raise Conflict(f"approval {approval.id} is {state}: there is nothing left to decide")

    def vote(self, db: Connection, said: _Said) -> list[Vote]:
        """Every vote with this one, which is written with its event (INV-32)."""
        principal = self.caller.principal
        vote = Vote(
            approval_id=self.approval.id,
            voter=principal.name,
            issuer=principal.issuer,
            subject=principal.subject,
            verdict=said.verdict,
            scopes=said.scopes,
            ttl_s=said.ttl_s,
            reason=said.reason,
            voted_at=self.now,
        )
        approvals.insert_vote(db, vote)
        data = {
            "verdict": str(said.verdict),
            "scopes": None if said.scopes is None else list(said.scopes),
            "ttl_s": said.ttl_s,
            "subject": principal.subject,
        }
        events = [_event(self.approval, self.caller, self.now, "approval.voted", reason=said.reason, data=data)]
        if self.grant.break_glass is not None:
            facts = {"approval_id": self.approval.id, "verdict": str(said.verdict)}
            events.append(step(self.grant, self.caller, self.now, "voted", **facts))
        record(db, events)
        return [*self.votes, vote]


def may_see(caller: Caller, approval: Approval) -> bool:
    """INV-28: everybody else is told that it does not exist."""
    if _sees_all(caller) or caller.name in (approval.agent, approval.orchestrator):
        return True
    return caller.has(Role.APPROVER) and bool(caller.principal.groups & approval.groups)


def cases(db: Connection, found: Sequence[Approval], catalogue: Catalogue) -> list[Case]:
    """Each approval with everything an approver is shown."""
    ids = [approval.id for approval in found]
    votes = approvals.votes_of(db, ids)
    held = {grant.id: grant for grant in grants.grants_with_ids(db, [approval.grant_id for approval in found])}
    purposes = approvals.purposes_of(db, {approval.task_id for approval in found})
    shown = []
    for approval in found:
        grant, said = held[approval.grant_id], votes[approval.id]
        number = met(approval.needs, said, requesters_of(db, grant, catalogue), catalogue) if said else {}
        shown.append(_case(approval, grant, said, catalogue, number, purposes.get(approval.task_id, "")))
    return shown


def requesters_of(db: Connection, grant: Grant, catalogue: Catalogue) -> Requesters:
    """Whose own yes to this grant does not count: all those it was handed down from are among them."""
    chain, above = [grant], grant.parent_grant_id
    while above is not None and len(chain) < _LONGEST_CHAIN:
        parent = grants.find_grant(db, above)
        if parent is None:
            break
        chain.append(parent)
        above = parent.parent_grant_id
    return Requesters.of(chain, catalogue)


_LONGEST_CHAIN = 64


def _case(
    approval: Approval,
    grant: Grant,
    votes: Sequence[Vote],
    catalogue: Catalogue,
    found: Mapping[str, int],
    purpose: str,
) -> Case:
    rule = catalogue.rule(grant.agent)
    resource = next((entry for entry in catalogue.resources if entry.identifier == approval.resource), None)
    return Case(
        approval=approval,
        grant=grant,
        votes=tuple(votes),
        met={need.group: found.get(need.group, 0) for need in approval.needs},
        owner=None if rule is None else rule.owner,
        sensitivity=None if resource is None else resource.sensitivity,
        environment=None if resource is None else resource.environment,
        purpose=purpose,
    )


def _sees_all(caller: Caller) -> bool:
    return caller.has(Role.ADMIN) or caller.has(Role.AUDITOR)


def _not_found(approval_id: str) -> NotFound:
    return NotFound(f"there is no approval {approval_id[:64]!r} that you may see")


def _event(
    approval: Approval, caller: Caller, now: datetime, type_: str, *, data: Mapping[str, Any], reason: str | None = None
) -> Event:
    return Event(
        id=new_id("evt", now),
        at=now,
        type=type_,
        actor=caller.name,
        task_id=approval.task_id,
        grant_id=approval.grant_id,
        agent=approval.agent,
        resource=approval.resource,
        policy_version=approval.policy_version,
        reason=reason,
        trace_id=caller.trace_id,
        data={"approval_id": approval.id, **data},
    )
