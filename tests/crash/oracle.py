"""The oracle: the truth at OpenBao and at PostgreSQL, our rows, the log of the clients and the audit trail, compared.

`look` says what is wrong whenever it is asked; `unsettled` what must have ended some time after the last fault.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from broker.domain.lifecycle import GrantState, LeaseState, TaskState
from broker.store import models
from tests.crash.clients import Log
from tests.crash.outside import Lane
from tests.house import CRM

_TASKS, _GRANTS, _LEASES, _EVENTS = map(models.table_of, (models.Task, models.Grant, models.Lease, models.AuditEvent))
_UNENDED = (GrantState.PENDING, GrantState.APPROVED, GrantState.ACTIVE)


@dataclass(frozen=True)
class Rows:
    """Our database at one moment."""

    tasks: dict[str, Any]
    grants: dict[str, Any]
    leases: list[Any]
    events: list[Any]

    @property
    def open(self) -> list[Any]:
        return [lease for lease in self.leases if lease.state != LeaseState.RELEASED]

    def leases_of(self, grant_id: str | None) -> list[Any]:
        return [lease for lease in self.leases if lease.grant_id == grant_id]


@dataclass(frozen=True)
class Found:
    """What one look saw. `wrong` is never right; `unsettled` may be so until everything was paid."""

    wrong: list[str]
    unsettled: list[str]
    open_debts: int
    figures: Counter[str] = field(default_factory=Counter)


class Oracle:
    def __init__(self, lane: Lane, store_url: str, log: Log) -> None:
        self._lane = lane
        self._log = log
        isolation = {} if store_url.startswith("sqlite") else {"isolation_level": "REPEATABLE READ"}
        self._engine = sa.create_engine(store_url, **isolation)

    def close(self) -> None:
        self._engine.dispose()

    def rows(self) -> Rows:
        with self._engine.connect() as db:
            if self._engine.dialect.name == "sqlite":
                # Its driver begins nothing for a reader, and then each statement would see another moment.
                db.exec_driver_sql("BEGIN")
            return Rows(
                tasks={row.id: row for row in db.execute(sa.select(_TASKS.c.id, _TASKS.c.state))},
                grants={row.id: row for row in db.execute(sa.select(_GRANTS))},
                leases=list(db.execute(sa.select(_LEASES))),
                events=list(db.execute(sa.select(_EVENTS).order_by(_EVENTS.c.id))),
            )

    def look(self) -> Found:
        # First what was said, then the truth: what was called dead before must be dead now. And what is alive now has a
        # row by then, because the row came first.
        log, before, world = self._log.so_far(), self.rows(), self._lane.world
        references, logins, accessors = self._lane.leases(), world.logins(), world.accessors()
        rows = self.rows()
        world.grants |= rows.grants.keys()
        mine = {name: grant for name, grant in logins.items() if grant in rows.grants}
        wrong = [
            *log.trouble,
            *_without_a_row(log, rows),
            *_called_dead(before, references, mine, accessors),
            *_orphans(rows, mine),
            *_authority(rows),
            *_twice(log, rows),
            *_answers_forgotten(log, rows),
            *_untold(rows),
        ]
        figures: Counter[str] = Counter()
        unsettled = [f"{grant.id} is still {grant.state}" for grant in rows.grants.values() if grant.state in _UNENDED]
        known = {lease.reference for lease in rows.open if lease.reference}
        for reference in sorted(references):
            unsettled.append(f"lease {reference} is alive, {'a debt' if reference in known else 'and in no open row'}")
        handles = {lease.handle for lease in rows.leases if lease.handle}
        unsettled += [f"token {handle} is alive" for handle in sorted(handles & accessors)]
        if not references:
            # OpenBao knows nothing of it any more: only a row says that it is not over.
            figures["logins OpenBao forgot"] = len(mine)
            for name, grant_id in mine.items():
                if not any(lease.unknown and lease.grant_id == grant_id for lease in rows.open):
                    unsettled.append(f"login {name} is alive, OpenBao does not know it, and no debt speaks of it")
        else:
            unsettled += [f"login {name} is alive" for name in sorted(mine)]
        unsettled += [
            f"{lease.id} is {lease.state}: {lease.last_error}"
            for lease in rows.open
            if not (lease.unknown and lease.expires_at > datetime.now(UTC))
        ]
        figures["orphans found"] = sum(event.type == "lease.found" for event in rows.events)
        figures["leases"] = len(rows.leases)
        figures["grants"] = len(rows.grants)
        return Found(wrong=wrong, unsettled=unsettled, open_debts=len(rows.open), figures=figures)


def _without_a_row(log: Log, rows: Rows) -> Iterator[str]:
    """INV-01."""
    issued = {event.grant_id for event in rows.events if event.type == "grant.issued"}
    for grant_id in {received.grant_id for received in log.received}:
        if grant_id not in rows.grants:
            yield f"{grant_id} was delivered, and there is no such grant"
        elif grant_id not in issued:
            yield f"{grant_id} was delivered, and was never active"


def _called_dead(
    before: Rows, references: set[str], logins: dict[str, str | None], accessors: set[str]
) -> Iterator[str]:
    """INV-04."""
    for lease in before.leases:
        if lease.state != LeaseState.RELEASED:
            continue
        if lease.reference in references:
            yield f"{lease.id} is released, and its secret is alive: {lease.reference}"
        if lease.handle in accessors:
            yield f"{lease.id} is released, and its token is alive"
    owed = {lease.grant_id for lease in before.open}
    paid = {lease.grant_id for lease in before.leases} - owed
    for name, grant_id in logins.items():
        if grant_id in paid:
            yield f"everything of {grant_id} is released, and {name} can log in"


def _orphans(rows: Rows, logins: dict[str, str | None]) -> Iterator[str]:
    """INV-03."""
    for name, grant_id in logins.items():
        if not rows.leases_of(grant_id):
            yield f"{name} can log in, and no lease speaks of it"


def _authority(rows: Rows) -> Iterator[str]:
    """INV-12, and that no end of a grant is without its debt."""
    for grant in rows.grants.values():
        if grant.state == GrantState.ACTIVE and rows.tasks[grant.task_id].state != TaskState.ACTIVE:
            yield f"{grant.id} is active under a task that has ended"
    for lease in rows.leases:
        if lease.grant_id is None or lease.state not in (LeaseState.INTENDED, LeaseState.HELD):
            continue
        state = rows.grants[lease.grant_id].state
        if state != (GrantState.APPROVED if lease.state == LeaseState.INTENDED else GrantState.ACTIVE):
            yield f"{lease.id} is {lease.state}, and its grant is {state}: a debt nobody recorded"


def _twice(log: Log, rows: Rows) -> Iterator[str]:
    """INV-06 and INV-20."""
    for uses in log.proofs.values():
        if uses > 1:
            yield f"a token for one use was accepted {uses} times"
    live: defaultdict[str, set[str]] = defaultdict(set)
    for received in log.received:
        grant = rows.grants.get(received.grant_id)
        if grant is not None and grant.state == GrantState.ACTIVE:
            live[received.key].add(grant.id)
    for grants in live.values():
        if len(grants) > 1:
            yield f"one key has several live grants: {sorted(grants)}"


def _answers_forgotten(log: Log, rows: Rows) -> Iterator[str]:
    """INV-23."""
    for task_id in log.opened:
        if task_id not in rows.tasks:
            yield f"{task_id} was opened, and is not there"
    for task_id, state in log.ended.items():
        if rows.tasks[task_id].state != state:
            yield f"{task_id} was answered to be {state}, and is {rows.tasks[task_id].state}"
    for grant_id in log.revoked:
        if rows.grants[grant_id].state in _UNENDED:
            yield f"{grant_id} was answered to be revoked, and is {rows.grants[grant_id].state}"


def _untold(rows: Rows) -> Iterator[str]:
    """INV-32: each state has its event, once, and no event speaks of what is not so."""
    of_grants = Counter((event.grant_id, event.type) for event in rows.events if event.type.startswith("grant."))
    of_tasks = Counter((event.task_id, event.type) for event in rows.events if event.type.startswith("task."))
    of_leases = Counter((event.data.get("lease_id"), event.type) for event in rows.events)
    found = {event.data["reference"] for event in rows.events if event.type == "lease.found"}

    def differ(what: str, told: int, true: bool) -> Iterator[str]:
        if told != true:
            yield f"{what}: {told} events, and it is {true}"

    for task in rows.tasks.values():
        yield from differ(f"{task.id} opened", of_tasks[task.id, "task.opened"], True)
        for state in TaskState:
            if state != TaskState.ACTIVE:
                yield from differ(f"{task.id} {state}", of_tasks[task.id, f"task.{state}"], task.state == state)
    for grant in rows.grants.values():
        outside = grant.resource != CRM
        yield from differ(f"{grant.id} approved", of_grants[grant.id, "grant.approved"], outside)
        yield from differ(f"{grant.id} issued", of_grants[grant.id, "grant.issued"], grant.issued_at is not None)
        for state in (GrantState.FAILED, GrantState.REVOKED, GrantState.EXPIRED):
            yield from differ(f"{grant.id} {state}", of_grants[grant.id, f"grant.{state}"], grant.state == state)
    for lease in rows.leases:
        owed = lease.state not in (LeaseState.INTENDED, LeaseState.HELD)
        orphan = lease.reference in found and lease.handle is None
        yield from differ(f"{lease.id} owed", of_leases[lease.id, "lease.owed"] + orphan, owed)
        yield from differ(f"{lease.id} released", of_leases[lease.id, "lease.released"], lease.state == "released")
        if lease.state == LeaseState.HELD:
            yield from differ(f"{lease.id} held", of_leases[lease.id, "lease.held"], True)
        if lease.state == LeaseState.STUCK:
            yield from differ(f"{lease.id} stuck", of_leases[lease.id, "lease.stuck"], True)
