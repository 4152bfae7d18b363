"""What is owed for a break-glass afterwards: that somebody who neither asked nor approved looks at its use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from broker.domain.approval import Approval, Requesters, Verdict, Vote
from broker.domain.catalogue import Catalogue
from broker.domain.errors import Forbidden
from broker.domain.grant import Grant
from broker.domain.identity import Principal
from broker.domain.lifecycle import ReviewState


@dataclass(frozen=True, kw_only=True)
class Review:
    """As it was when it was read. `completed_by` said `note`, which is what they found."""

    id: str
    state: ReviewState
    grant_id: str
    opened_at: datetime
    due_at: datetime
    completed_at: datetime | None = None
    completed_by: str | None = None
    note: str | None = None

    def at(self, now: datetime) -> ReviewState:
        """Its state now: what is past its time is overdue, whether or not its row says so yet."""
        if self.state is ReviewState.OWED and self.due_at <= now:
            return ReviewState.OVERDUE
        return self.state


@dataclass(frozen=True, kw_only=True)
class ReviewCase:
    """A review with everything that is looked at; `state` is that of this moment."""

    review: Review
    state: ReviewState
    grant: Grant
    approval: Approval
    votes: Sequence[Vote]

    @property
    def approved_by(self) -> tuple[str, ...]:
        return tuple(vote.voter for vote in self.votes if vote.verdict is Verdict.APPROVE)


def require_apart(reviewer: Principal, votes: Sequence[Vote], requesters: Requesters, catalogue: Catalogue) -> None:
    """Nobody reviews what they asked for, own who asked, or had a voice in (INV-15)."""
    if requesters.include(reviewer):
        raise Forbidden(f"{reviewer.name} asked for this itself: somebody else reviews it")
    if requesters.are_owned_like(reviewer):
        raise Forbidden(f"{reviewer.name} and who asked for this have one owner: somebody of another reviews it")
    if any(vote.is_by(reviewer) for vote in votes):
        raise Forbidden(f"{reviewer.name} decided about this: somebody who did not reviews it")
    for vote in votes:
        if catalogue.are_one_person(reviewer, _as_voted(vote, catalogue)):
            raise Forbidden(
                f"{vote.voter} decided about this, and may be the same person as {reviewer.name}: somebody who did not "
                "reviews it"
            )


@dataclass(frozen=True, kw_only=True)
class _Voter:
    """Who voted, whether or not they are configured still."""

    name: str
    subject: str
    owner: str | None


def _as_voted(vote: Vote, catalogue: Catalogue) -> _Voter:
    rule = catalogue.rule(vote.voter)
    return _Voter(name=vote.voter, subject=vote.subject, owner=None if rule is None else rule.owner)
