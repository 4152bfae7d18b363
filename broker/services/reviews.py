"""Reviews: owed from the moment a break-glass is collected, done once, by somebody who neither asked nor decided.

::

    collection    the review, with what hands the credential out      TX of collecting
    time          owed becomes overdue, and that is an alert           TX
    complete      a note, and it is done                               TX
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row

from broker.domain.audit import Event
from broker.domain.clock import Clock, rfc3339
from broker.domain.errors import Conflict, NotFound
from broker.domain.grant import Grant
from broker.domain.identity import Caller, Role, is_id, new_id
from broker.domain.lifecycle import GrantState, ReviewState
from broker.domain.review import Review, ReviewCase, require_apart
from broker.services.approval import requesters_of
from broker.services.endings import ACTOR
from broker.services.refusals import recorded
from broker.services.standing import StandingReader, current_caller
from broker.store import approvals, gate, grants, models, reviews
from broker.store.database import Database
from broker.store.transitions import move


@dataclass(frozen=True, kw_only=True)
class Owed:
    """How many reviews are owed, how many of those are overdue, and how many break-glass grants are out."""

    owed: int
    overdue: int
    live: int


class Reviews:
    def __init__(self, *, database: Database, standing: StandingReader, clock: Clock) -> None:
        self._database = database
        self._standing = standing
        self._clock = clock

    def find(self, caller: Caller, review_id: str) -> ReviewCase:
        """One review; NotFound for those who may not see it (INV-28)."""
        now = self._clock()
        with self._database.read() as db:
            standing = self._standing.at(db, gate.era_of(db))
            review = reviews.find_review(db, review_id) if is_id(review_id, "rev") else None
            case = None if review is None else _case(db, review, now)
            if case is None or not _may_see(current_caller(caller, standing), case):
                raise _not_found(review_id)
            return case

    def page(
        self,
        caller: Caller,
        *,
        state: str | None = None,
        agent: str | None = None,
        before: str | None = None,
        limit: int = 100,
    ) -> Sequence[ReviewCase]:
        """Newest first, below the id `before`, of those the caller may see."""
        now = self._clock()
        where = [] if state is None else reviews.in_state(state, now=now)
        where += [] if agent is None else [reviews.of_agent(agent)]
        with self._database.read() as db:
            standing = self._standing.at(db, gate.era_of(db))
            caller = current_caller(caller, standing)
            if not _sees_all(caller):
                groups = caller.principal.groups if caller.has(Role.APPROVER) else frozenset()
                if not groups:
                    return []
                where.append(approvals.of_groups(sorted(groups)))
            page = reviews.page_of_reviews(db, where=where, before=before, limit=limit)
            return [_case(db, review, now) for review in page]

    def complete(self, caller: Caller, review_id: str, note: str) -> ReviewCase:
        """Say what was found, which ends it. For an admin, an auditor or an approver who had no part in it."""
        with (
            recorded(self._database, self._clock, caller, "review.refused", "complete"),
            self._database.begin() as db,
        ):
            review = reviews.find_review(db, review_id, lock=True) if is_id(review_id, "rev") else None
            now = self._clock()
            standing = self._standing.at(db, gate.era_of(db))
            caller = current_caller(caller, standing)
            case = None if review is None else _case(db, review, now)
            if review is None or case is None or not _may_see(caller, case):
                raise _not_found(review_id)
            requesters = requesters_of(db, case.grant, standing.catalogue)
            require_apart(caller.principal, case.votes, requesters, standing.catalogue)
            if review.state is ReviewState.COMPLETED:
                if (review.completed_by, review.note) == (caller.name, note):
                    return case
                raise Conflict(f"review {review.id} was completed by {review.completed_by}: it is done once")
            if _is_out(case.grant, now):
                raise Conflict(f"grant {case.grant.id} may be in use still: review it when it has ended, or revoke it")
            moved = move(
                db,
                models.Review,
                ReviewState.COMPLETED,
                reviews.with_id(review.id),
                event=lambda row: _event(row, case.grant, now, caller.name, "review.completed", caller.trace_id, note),
                completed_at=now,
                completed_by=caller.name,
                note=note,
            )
            if not moved:
                raise RuntimeError(f"{review.id} is held here, and did not move")
            completed = reviews.find_review(db, review.id)
            if completed is None:
                raise RuntimeError(f"{review.id} was there and is gone")
            return _case(db, completed, now)

    def note_overdue(self) -> int:
        """Say of each review that is past its time that it is, once; answers how many."""
        now = self._clock()
        with self._database.read() as db:
            if not reviews.any_late(db, now=now):
                return 0

        with self._database.begin() as db:

            def told(row: Row[Any]) -> Event:
                grant = grants.find_grant(db, row.grant_id)
                return _event(row, grant, now, ACTOR, "review.overdue")

            return len(move(db, models.Review, ReviewState.OVERDUE, *reviews.late(now), event=told))

    def measure(self) -> Owed:
        now = self._clock()
        with self._database.read() as db:
            owed, overdue = reviews.counts(db, now=now)
            return Owed(owed=owed, overdue=overdue, live=reviews.live(db, now=now))


def _case(db: Connection, review: Review, now: datetime) -> ReviewCase:
    grant = grants.find_grant(db, review.grant_id)
    approval = approvals.approval_of_grant(db, review.grant_id)
    if grant is None or approval is None:
        raise RuntimeError(f"{review.id} is of a grant that people approved, and one of the two is gone")
    votes = approvals.votes_of(db, [approval.id])[approval.id]
    return ReviewCase(review=review, state=review.at(now), grant=grant, approval=approval, votes=votes)


def _is_out(grant: Grant, now: datetime) -> bool:
    return grant.state in (GrantState.APPROVED, GrantState.ACTIVE) and now < grant.expires_at


def _may_see(caller: Caller, case: ReviewCase) -> bool:
    if _sees_all(caller):
        return True
    return caller.has(Role.APPROVER) and bool(caller.principal.groups & case.approval.groups)


def _sees_all(caller: Caller) -> bool:
    return caller.has(Role.ADMIN) or caller.has(Role.AUDITOR)


def _not_found(review_id: str) -> NotFound:
    return NotFound(f"there is no review {review_id[:64]!r} that you may see")


def _event(
    row: Row[Any],
    grant: Grant | None,
    now: datetime,
    actor: str,
    type_: str,
    trace_id: str | None = None,
    note: str | None = None,
) -> Event:
    known = {} if grant is None else {"agent": grant.agent, "user": grant.on_behalf_of, "resource": grant.resource}
    return Event(
        id=new_id("evt", now),
        at=now,
        type=type_,
        actor=actor,
        grant_id=row.grant_id,
        reason=note,
        trace_id=trace_id,
        data={"by": actor, "review_id": row.id, "due_at": rfc3339(row.due_at)},
        **known,  # type: ignore[arg-type]
    )
