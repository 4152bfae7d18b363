"""Tasks: opened, kept alive, ended. Ending one ends everything issued for it in the same transaction (INV-12)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row

from broker.domain.audit import Event
from broker.domain.catalogue import Limits
from broker.domain.clock import Clock
from broker.domain.errors import Forbidden, Invalid, InvalidScope, NotFound, RoleMissing, TaskNotActive
from broker.domain.feed import end_of_task
from broker.domain.grant import IdempotencyClaim
from broker.domain.identity import Caller, Role, User, is_id, new_id
from broker.domain.lease import Urgency
from broker.domain.lifecycle import GrantState, TaskState
from broker.domain.receipt import Receipt, receipt_line
from broker.domain.scope import require_offered, scope_set
from broker.domain.task import Task
from broker.services.debts import Debts
from broker.services.endings import ACTOR, OWES_NOTHING, end_grants
from broker.services.idempotency import claimed
from broker.services.receipts import SignedReceipt, signed_receipt
from broker.services.refusals import recorded
from broker.services.standing import StandingReader, principal_of
from broker.store import gate, grants, leases, locks, models, tasks
from broker.store.database import Database
from broker.store.feed import announce
from broker.store.transitions import change_of, move, record

_CANCELLED_AT_ONCE = 100


@dataclass(frozen=True, kw_only=True)
class TaskRequest:
    caller: Caller
    purpose: str
    agents: tuple[str, ...]
    deadline: timedelta
    heartbeat: timedelta | None = None
    ceiling: Mapping[str, Sequence[str]] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    idempotency: IdempotencyClaim | None = None
    user: User | None = None
    parent_task_id: str | None = None


class TaskService:
    def __init__(
        self, *, database: Database, standing: StandingReader, debts: Debts, limits: Limits, issuer: str, clock: Clock
    ) -> None:
        self._database = database
        self._standing = standing
        self._debts = debts
        self._limits = limits
        self._issuer = issuer
        self._clock = clock

    def open(self, request: TaskRequest) -> Task:
        with recorded(self._database, self._clock, request.caller, "task.refused", "open"):
            return self._open(request)

    def _open(self, request: TaskRequest) -> Task:
        with self._database.begin_issuing() as db:
            named = request.parent_task_id
            above = [named] if named is not None and is_id(named, "task") else []
            locks.hold_for_issuing(db, agents=(), tasks=above)
            standing = self._standing.at(db, gate.era_of(db))
            now = self._clock()
            principal = principal_of(request.caller, standing)
            if Role.ORCHESTRATOR not in principal.roles:
                raise RoleMissing(f"{principal.name} is not an orchestrator: only one of those opens tasks")
            if request.user is not None and request.user.for_one:
                raise Invalid(
                    "on_behalf_of is for one client, or for what it says and no more (may_act, or an identity "
                    "assertion): a whole task is opened with a token that is not, or each grant is asked for with it",
                    member="on_behalf_of",
                )
            if request.deadline > self._limits.max_deadline:
                raise Invalid(
                    f"deadline_s {int(request.deadline.total_seconds())} is beyond this broker's maximum of "
                    f"{int(self._limits.max_deadline.total_seconds())}",
                    member="deadline_s",
                )
            unknown = sorted(set(request.agents) - standing.catalogue.principal_names)
            if unknown:
                raise Invalid(f"no principal is called {unknown[0]!r}: name configured agents", member="agents")
            ceiling: dict[str, list[str]] | None = None if request.ceiling is None else {}
            for identifier, scopes in (request.ceiling or {}).items():
                resource = standing.catalogue.resource(identifier)
                wanted = scope_set(scopes)
                require_offered(wanted, resource.offered, identifier)
                ceiling = (ceiling or {}) | {identifier: sorted(wanted)}
            task = Task(
                id=new_id("task", now),
                state=TaskState.ACTIVE,
                purpose=request.purpose,
                orchestrator=principal.name,
                agents=tuple(sorted(set(request.agents))),
                created_at=now,
                deadline_at=now + request.deadline,
                ceiling=ceiling,
                labels=dict(request.labels),
                heartbeat_s=None if request.heartbeat is None else int(request.heartbeat.total_seconds()),
                heartbeat_due_at=None if request.heartbeat is None else now + request.heartbeat,
                on_behalf_of=None if request.user is None else request.user.name,
                user_attributes=_attributes(request.user),
            )
            earlier = self._claimed(db, request, task, now)
            if earlier is not None:
                return earlier
            if request.parent_task_id is not None:
                task = self._inside(db, task, request, now)
            tasks.insert_tasks(db, [task])
            record(db, [_event(task, request.caller.name, now, "task.opened", trace_id=request.caller.trace_id)])
        return task

    def _inside(self, db: Connection, task: Task, request: TaskRequest, now: datetime) -> Task:
        """The task as a part of the one it names: nothing of it is more than that has (INV-10)."""
        named = request.parent_task_id or ""
        parent = tasks.Tasks().hold_shared(db, [named] if is_id(named, "task") else []).get(named)
        orchestrator = task.orchestrator
        if parent is None or not (orchestrator == parent.orchestrator or orchestrator in parent.agents):
            raise NotFound(f"there is no task {named[:64]!r} of which you may open a part", member="parent_task_id")
        if orchestrator != parent.orchestrator:
            _require_no_more_than_it_was_given(task, parent)
        if not parent.is_open(now):
            raise TaskNotActive(f"task {parent.id} has ended: no part of it can be opened", member="parent_task_id")
        depth = len(parent.tasks_above) + 1
        if depth > self._limits.max_delegation_depth:
            raise Forbidden(
                f"task {parent.id} is {depth - 1} deep already, which is as deep as this broker allows "
                "(max_delegation_depth)"
            )
        if task.deadline_at > parent.deadline_at:
            left_s = int((parent.deadline_at - now).total_seconds())
            raise Invalid(f"task {parent.id} ends in {left_s} s, and no part of it later", member="deadline_s")
        if None not in (task.on_behalf_of, parent.on_behalf_of) and task.on_behalf_of != parent.on_behalf_of:
            raise Forbidden(f"task {parent.id} is on behalf of another user")
        return replace(
            task,
            parent_task_id=parent.id,
            tasks_above=(*parent.tasks_above, parent.id),
            orchestrators_above=(*parent.orchestrators_above, parent.orchestrator),
            ceiling=_ceiling_inside(task, parent),
            on_behalf_of=task.on_behalf_of or parent.on_behalf_of,
            user_attributes=parent.user_attributes if task.on_behalf_of is None else task.user_attributes,
            upheld_until=min(
                (at for at in (parent.heartbeat_due_at, parent.upheld_until) if at is not None), default=None
            ),
        )

    def _claimed(self, db: Connection, request: TaskRequest, task: Task, now: datetime) -> Task | None:
        if request.idempotency is None:
            return None
        made_id = claimed(db, request.caller, request.idempotency, task.id, now)
        return None if made_id == task.id else tasks.find_task(db, made_id)

    def heartbeat(self, caller: Caller, task_id: str) -> Task:
        """Move the heartbeat's due time on. A task that lost it stays lost, whether or not the sweeper came by."""
        with (
            recorded(self._database, self._clock, caller, "task.refused", "heartbeat"),
            self._database.begin() as db,
        ):
            task, now = self._held(db, caller, task_id, admin=False)
            if not task.is_open(now):
                raise TaskNotActive(f"task {task.id} has ended: open a new one")
            if task.heartbeat_s is None:
                return task
            if not tasks.beat(db, task.id, now=now, heartbeat_s=task.heartbeat_s):
                raise TaskNotActive(f"task {task.id} has ended: open a new one")
            task = replace(task, heartbeat_due_at=now + timedelta(seconds=task.heartbeat_s))
            tasks.uphold(db, task)
            return task

    def end(self, caller: Caller, task_id: str, state: TaskState, *, reason: str | None = None) -> SignedReceipt:
        """Complete, fail or cancel, with everything below. Once ended, the answer is the receipt of how it ended."""
        with (
            recorded(self._database, self._clock, caller, "task.refused", str(state)),
            self._database.begin() as db,
        ):
            task, now = self._held(db, caller, task_id, admin=True, below=True)
            actor = caller.name
            if task.state is TaskState.ACTIVE and not task.is_open(now):
                state, reason, actor = TaskState.EXPIRED, _why_expired(task, now), ACTOR
            end_tasks(db, [task.id], state, now=now, actor=actor, reason=reason, trace_id=caller.trace_id)
            owing = grants.owing_under(db, tasks.tree_of(db, task.id))
        self._debts.pay_now(owing)
        return self.receipt_for(task.id)

    def cancel_opened_for(self, caller: Caller, user: str, *, opened_by: datetime, reason: str) -> int:
        """Cancel what was opened on a user's behalf up to then, each with everything below; answers how many.

        For an admin. What is owed outside is paid as after a bulk revocation, and nobody waits for it here.
        """
        before, cancelled = None, 0
        while True:
            with self._database.read() as db:
                where = tasks.matching(state=TaskState.ACTIVE, user=user)
                page = tasks.page_of_tasks(db, where=where, before=before, limit=_CANCELLED_AT_ONCE)
            for found in page:
                if found.created_at > opened_by:
                    continue
                with self._database.begin() as db:
                    task, now = self._held(db, caller, found.id, admin=True, below=True)
                    # What time ended is the sweeper's to say.
                    if task.is_open(now):
                        ended = end_tasks(db, [task.id], TaskState.CANCELLED, now=now, actor=caller.name, reason=reason)
                        cancelled += ended
            if len(page) < _CANCELLED_AT_ONCE:
                return cancelled
            before = page[-1].id

    def _held(
        self, db: Connection, caller: Caller, task_id: str, *, admin: bool, below: bool = False
    ) -> tuple[Task, datetime]:
        """The task as it is and stays until this transaction ends, and the time behind its lock.

        A time from before the wait would say that authority ended while verifiers still accepted it (INV-04).
        """
        task = _owned(db, caller, task_id, admin=admin)
        # With what is below it in one go: whoever issues to several tasks waits for them in one order.
        locks.hold_tasks_alone(db, tasks.tree_of(db, task.id, active=True) if below else [task.id])
        return _owned(db, caller, task_id, admin=admin), self._clock()

    def find(self, caller: Caller, task_id: str) -> Task:
        with self._database.read() as db:
            return visible_task(db, caller, task_id)

    def page(
        self,
        caller: Caller,
        *,
        state: str | None = None,
        agent: str | None = None,
        user: str | None = None,
        resource: str | None = None,
        before: str | None = None,
        limit: int = 100,
    ) -> list[Task]:
        # INV-28: what somebody else holds in the same task must not show by which tasks are listed.
        mine = None if sees_all(caller) else caller.name
        where = tasks.matching(state=state, agent=agent, user=user, resource=resource, grants_seen_by=mine)
        if not sees_all(caller):
            where.append(tasks.seen_by(caller.name))
        with self._database.read() as db:
            return tasks.page_of_tasks(db, where=where, before=before, limit=limit)

    def receipt(self, caller: Caller, task_id: str) -> SignedReceipt:
        """The receipt as it stands now."""
        with self._database.read() as db:
            task = visible_task(db, caller, task_id)
        # INV-28: of the parts an agent may not even see, it hears nothing.
        return self.receipt_for(task_id, parts=sees_all(caller) or caller.name == task.orchestrator)

    def receipt_for(self, task_id: str, *, parts: bool = True) -> SignedReceipt:
        now = self._clock()
        with self._database.read() as db:
            task = tasks.find_task(db, task_id)
            below = grants.issued_under(db, tasks.tree_of(db, task_id) if parts else [task_id])
            owed = leases.leases_of(db, [grant.id for grant in below if grant.provider != OWES_NOTHING])
        if task is None:
            raise NotFound(f"there is no task {task_id[:64]!r}")
        state, ended_at = task.state, task.ended_at
        if state is TaskState.ACTIVE and not task.is_open(now):
            # Time has ended it; that the sweeper comes later changes nothing.
            state, ended_at = TaskState.EXPIRED, task.ends_at
        receipt = Receipt(
            task_id=task.id,
            ended_at=ended_at,
            outcome=str(state),
            lines=[receipt_line(grant, ended_at=ended_at, now=now, lease=owed.get(grant.id)) for grant in below],
        )
        return signed_receipt(receipt, self._standing, self._issuer, now)


def end_tasks(
    db: Connection,
    task_ids: Iterable[str],
    state: TaskState,
    *,
    now: datetime,
    actor: str,
    reason: str | None,
    trace_id: str | None = None,
) -> int:
    """End the tasks that are still active, every task below them and every grant below those; answers how many tasks.

    Nobody issues meanwhile: a grant or a part of a task is either seen here or refused there (INV-11, INV-12).
    """

    def task_ended(row: Row[Any]) -> Event:
        return _event(tasks.task_of(row, ()), actor, now, f"task.{state}", reason=reason, trace_id=trace_id)

    part_reason = f"the task above it is {state}"

    def part_ended(row: Row[Any]) -> Event:
        return _event(tasks.task_of(row, ()), actor, now, f"task.{part_state}", reason=part_reason, trace_id=trace_id)

    ids = sorted(task_ids)
    tree = {known for task_id in ids for known in tasks.tree_of(db, task_id, active=True)}
    locks.hold_tasks_alone(db, sorted(tree))
    tasks.hold(db, sorted(tree))
    where = [tasks.with_ids(db, ids)]
    if state is TaskState.EXPIRED:
        # A heartbeat that came in between must win.
        where.append(tasks.overdue(now))
    ended = move(db, models.Task, state, *where, event=task_ended, ended_at=now, reason=reason)
    if not ended:
        return 0
    every, level = list(ended), ended
    part_state = TaskState.EXPIRED if state is TaskState.EXPIRED else TaskState.CANCELLED
    while parts := tasks.active_below(db, [row.id for row in level]):
        # A part that was opened since the tree was read is held by its row alone: whoever issues to it waits there.
        tasks.hold(db, parts)
        level = move(
            db,
            models.Task,
            part_state,
            tasks.with_ids(db, parts),
            event=part_ended,
            ended_at=now,
            reason=part_reason,
        )
        every += level
    # Of a task that its deadline ended no token lives: each said so itself, by its `exp`.
    announce(db, now, [end_of_task(row.id) for row in every if row.deadline_at > now])
    below = grants.of_tasks(db, [row.id for row in every])
    why = f"task {state}"
    expired = change_of(now, ACTOR, "grant.expired", trace_id=trace_id)
    end_grants(db, GrantState.EXPIRED, below, grants.expired(now), now=now, urgency=Urgency.ENDED, event=expired)
    revoked = change_of(now, actor, "grant.revoked", reason=why, trace_id=trace_id)
    values = {"revoked_at": now, "revoked_by": actor, "reason": why}
    end_grants(db, GrantState.REVOKED, below, now=now, urgency=Urgency.ENDED, event=revoked, **values)
    return len(every)


def _require_no_more_than_it_was_given(part: Task, whole: Task) -> None:
    """An agent that divides its task says nothing new of it: policies would take it for the orchestrator's word."""
    strangers = sorted(set(part.agents) - set(whole.agents))
    if strangers:
        raise Forbidden(
            f"task {whole.id} does not name {', '.join(strangers)}: only {whole.orchestrator} brings in others"
        )
    said = sorted(name for name, value in part.labels.items() if whole.labels.get(name) != value)
    if said or part.purpose != whole.purpose:
        raise Forbidden(
            f"only {whole.orchestrator} says what a part of task {whole.id} is for: give it the same purpose and no "
            f"labels but those of the whole{f' (not {said[0]})' if said else ''}"
        )


def _attributes(user: User | None) -> Mapping[str, list[str]] | None:
    if user is None or not user.attributes:
        return None
    return {name: list(values) for name, values in user.attributes.items()}


def _ceiling_inside(task: Task, parent: Task) -> Mapping[str, list[str]] | None:
    if parent.ceiling is None:
        return task.ceiling
    if task.ceiling is None:
        return parent.ceiling
    for identifier, scopes in task.ceiling.items():
        beyond = sorted(set(scopes) - set(parent.ceiling.get(identifier, ())))
        if beyond:
            raise InvalidScope(
                f"task {parent.id} does not include {', '.join(beyond)} on {identifier}: no part of it does",
                member="resources",
            )
    return task.ceiling


def _why_expired(task: Task, now: datetime) -> str:
    return "its deadline passed" if task.deadline_at <= now else "its heartbeat was lost"


def sees_all(caller: Caller) -> bool:
    return caller.has(Role.ADMIN) or caller.has(Role.AUDITOR)


def visible_task(db: Connection, caller: Caller, task_id: str) -> Task:
    """The task, for those who may see it; one answer for all the others (INV-28)."""
    task = tasks.find_task(db, task_id) if is_id(task_id, "task") else None
    if task is None or not (sees_all(caller) or caller.name == task.orchestrator or caller.name in task.agents):
        raise NotFound(f"there is no task {task_id[:64]!r} that you may see")
    return task


def _owned(db: Connection, caller: Caller, task_id: str, *, admin: bool) -> Task:
    task = visible_task(db, caller, task_id)
    if caller.name == task.orchestrator or (admin and caller.has(Role.ADMIN)):
        return task
    raise RoleMissing(
        f"task {task.id} belongs to {task.orchestrator}: only it{' or an admin' if admin else ''} may do this"
    )


def _event(
    task: Task, actor: str, now: datetime, type_: str, *, reason: str | None = None, trace_id: str | None = None
) -> Event:
    return Event(
        id=new_id("evt", now),
        at=now,
        type=type_,
        actor=actor,
        task_id=task.id,
        user=task.on_behalf_of,
        reason=reason,
        trace_id=trace_id,
        data={"agents": list(task.agents), "purpose": task.purpose} if task.agents else {},
    )
