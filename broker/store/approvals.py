"""Approvals and votes: reading, counting, inserting, and the rows that wait.

Whoever changes one holds the row of its grant, so that votes are counted one after the other (INV-15).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, func, or_, select, text, update

from broker.domain.approval import Approval, Need, Verdict, Vote
from broker.domain.lifecycle import ApprovalState, GrantState
from broker.store import models
from broker.store.rows import among, insert_rows

_approvals = models.table_of(models.Approval)
_votes = models.table_of(models.Vote)
_grants = models.table_of(models.Grant)
_tasks = models.table_of(models.Task)
_NAMES = tuple(entry.name for entry in fields(Approval))
_VOTE = tuple(entry.name for entry in fields(Vote))
_SELECT = select(*(_approvals.c[name] for name in _NAMES))
# As text: SQLite takes a partial index only where the query spells its condition the way the index does.
_OPEN = text("approvals.state = 'open'")
_UNCOLLECTED = text("approvals.state = 'approved' AND approvals.collected_at IS NULL")
# What is told of an approval that moved.
APPROVAL_FACTS = ("id", "grant_id", "task_id", "agent", "resource", "policy_version")


def insert_approvals(db: Connection, approvals: Sequence[Approval]) -> None:
    rows = [
        {name: getattr(approval, name) for name in _NAMES}
        | {
            "state": str(approval.state),
            "scopes": list(approval.scopes),
            "needs": [asdict(need) for need in approval.needs],
            # Blanks on both sides, so that looking for " security " cannot find "security-leads".
            "groups": f" {' '.join(sorted(approval.groups))} ",
            "polled_at": None,
        }
        for approval in approvals
    ]
    insert_rows(db, models.Approval, rows)


def approval_of(row: Row[Any]) -> Approval:
    values = {name: getattr(row, name) for name in _NAMES}
    values |= {
        "state": ApprovalState(row.state),
        "scopes": tuple(row.scopes),
        "needs": tuple(Need(**need) for need in row.needs),
    }
    return Approval(**values)


def find_approval(db: Connection, approval_id: str) -> Approval | None:
    row = db.execute(_SELECT.where(_approvals.c.id == approval_id)).one_or_none()
    return None if row is None else approval_of(row)


def approval_of_grant(db: Connection, grant_id: str) -> Approval | None:
    row = db.execute(_SELECT.where(_approvals.c.grant_id == grant_id)).one_or_none()
    return None if row is None else approval_of(row)


def awaited_by(db: Connection, agent: str, *, now: datetime) -> list[Approval]:
    """Everything of this agent that people have yet to decide, or that it has yet to collect; there are few."""
    undecided = _SELECT.where(_OPEN, _approvals.c.agent == agent, _approvals.c.expires_at > now)
    still = (_grants.c.state == str(GrantState.APPROVED), _grants.c.expires_at > now)
    uncollected = _SELECT.join(_grants, _grants.c.id == _approvals.c.grant_id)
    uncollected = uncollected.where(_UNCOLLECTED, _approvals.c.agent == agent, *still)
    rows = [*db.execute(undecided), *db.execute(uncollected)]
    return sorted(map(approval_of, rows), key=lambda approval: approval.id)


def count_open(db: Connection, group: str, *, now: datetime) -> int:
    """How many wait for this group, without those of an emergency."""
    statement = select(func.count()).select_from(_approvals.join(_grants, _grants.c.id == _approvals.c.grant_id))
    statement = statement.where(_grants.c.break_glass.is_(None))
    return int(db.execute(statement.where(_OPEN, _approvals.c.expires_at > now, of_groups([group]))).scalar_one())


def page_of_approvals(
    db: Connection, *, where: Iterable[ColumnElement[bool]], before: str | None, limit: int
) -> list[Approval]:
    """Newest first, below the id `before`."""
    statement: Select[Any] = _SELECT.where(*where).order_by(_approvals.c.id.desc()).limit(limit)
    if before is not None:
        statement = statement.where(_approvals.c.id < before)
    return [approval_of(row) for row in db.execute(statement)]


def votes_of(db: Connection, approval_ids: Collection[str]) -> Mapping[str, list[Vote]]:
    """Each approval's votes, in the order in which they came."""
    found: dict[str, list[Vote]] = {approval_id: [] for approval_id in approval_ids}
    statement = select(_votes).where(_votes.c.approval_id.in_(list(found)))
    for row in db.execute(statement.order_by(_votes.c.voted_at, _votes.c.voter)) if found else ():
        values = {name: getattr(row, name) for name in _VOTE}
        values |= {"verdict": Verdict(row.verdict), "scopes": None if row.scopes is None else tuple(row.scopes)}
        found[row.approval_id].append(Vote(**values))
    return found


def insert_vote(db: Connection, vote: Vote) -> None:
    values = {name: getattr(vote, name) for name in _VOTE}
    scopes = None if vote.scopes is None else list(vote.scopes)
    insert_rows(db, models.Vote, [values | {"verdict": str(vote.verdict), "scopes": scopes}])


def purposes_of(db: Connection, task_ids: Collection[str]) -> Mapping[str, str]:
    """What each task is for, in its orchestrator's words; "" for one that an agent opened itself."""
    statement = select(_tasks.c.id, _tasks.c.purpose, _tasks.c.implicit).where(_tasks.c.id.in_(list(task_ids)))
    return {row.id: "" if row.implicit else row.purpose for row in db.execute(statement)}


def collect(db: Connection, approval_id: str, *, now: datetime) -> bool:
    """Use an approval up; whether it was this call that did (INV-20)."""
    statement = (
        update(_approvals)
        .where(
            _approvals.c.id == approval_id,
            _approvals.c.state == str(ApprovalState.APPROVED),
            _approvals.c.collected_at.is_(None),
        )
        .values(collected_at=now)
    )
    return db.execute(statement).rowcount == 1


def poll(db: Connection, grant_id: str, *, now: datetime, not_since: datetime) -> bool:
    """Note that its agent asks whether it is decided; False where it asked after `not_since` already."""
    rested = or_(_approvals.c.polled_at.is_(None), _approvals.c.polled_at <= not_since)
    statement = update(_approvals).where(_approvals.c.grant_id == grant_id, rested).values(polled_at=now)
    return db.execute(statement).rowcount == 1


def with_id(approval_id: str) -> ColumnElement[bool]:
    return _approvals.c.id == approval_id


def of_grants(db: Connection, grant_ids: Collection[str]) -> ColumnElement[bool]:
    return among(db, _approvals.c.grant_id, grant_ids)


def of_groups(groups: Iterable[str]) -> ColumnElement[bool]:
    return or_(*(_approvals.c.groups.contains(f" {group} ", autoescape=True) for group in groups))


def seen_by(name: str, groups: Collection[str]) -> ColumnElement[bool]:
    """Approvals this principal asked for, or its task did, or that wait for one of these groups."""
    mine = or_(_approvals.c.agent == name, _approvals.c.orchestrator == name)
    return or_(mine, of_groups(sorted(groups))) if groups else mine


def matching(
    *, state: str | None = None, task_id: str | None = None, agent: str | None = None, resource: str | None = None
) -> list[ColumnElement[bool]]:
    wanted = {"state": state, "task_id": task_id, "agent": agent, "resource": resource}
    return [_approvals.c[name] == value for name, value in wanted.items() if value is not None]
