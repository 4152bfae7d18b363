"""What waits for people: what was asked for, who may say yes, what they said, and what is left of it.

Pure rules. An approval can narrow a request and never widen it (INV-16); nobody's own yes counts (INV-15).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from broker.domain.audit import canonical_json
from broker.domain.catalogue import Catalogue, PrincipalRule
from broker.domain.errors import Conflict, Invalid
from broker.domain.grant import Grant
from broker.domain.identity import Principal, Role
from broker.domain.lifecycle import ApprovalState, GrantState
from broker.domain.policy import Approved, Decision
from broker.domain.scope import scope_set


class Verdict(StrEnum):
    APPROVE = "approve"
    DENY = "deny"


@dataclass(frozen=True, kw_only=True)
class Need:
    """So many people of a group. `owner_may`: those of the requester's own owner count as well."""

    group: str
    quorum: int
    owner_may: bool = False


@dataclass(frozen=True, kw_only=True)
class Vote:
    """What one person said. `scopes` and `ttl_s` are what they left of the request, where they left less."""

    approval_id: str
    voter: str
    issuer: str
    subject: str
    verdict: Verdict
    scopes: tuple[str, ...] | None
    ttl_s: int | None
    reason: str | None
    voted_at: datetime

    def is_by(self, principal: Principal) -> bool:
        """Whether this person said it, by whatever name: one person has one vote."""
        return self.voter == principal.name or (self.issuer, self.subject) == (principal.issuer, principal.subject)


@dataclass(frozen=True, kw_only=True)
class Approval:
    """One request that waits, or waited. `scopes` and `ttl_s` are what was asked for; its grant holds the rest."""

    id: str
    state: ApprovalState
    grant_id: str
    task_id: str
    agent: str
    orchestrator: str
    resource: str
    scopes: tuple[str, ...]
    ttl_s: int
    needs: tuple[Need, ...]
    request_sha256: str
    parameters_sha256: str
    policy_version: int
    created_at: datetime
    expires_at: datetime
    ended_at: datetime | None = None
    ended_by: str | None = None
    reason: str | None = None
    collected_at: datetime | None = None

    @property
    def groups(self) -> frozenset[str]:
        return frozenset(need.group for need in self.needs)


@dataclass(frozen=True, kw_only=True)
class Narrowed:
    """What the votes left of a request."""

    scopes: frozenset[str]
    ttl_s: int


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything an approver is shown: the broker's facts, and the words of those who ask.

    `owner` answers for the agent. `sensitivity` and `environment` are None where the resource is not registered any
    more; `purpose` is its orchestrator's word, and "" where the agent opened the task itself.
    """

    approval: Approval
    grant: Grant
    votes: Sequence[Vote]
    met: Mapping[str, int]
    owner: str | None
    sensitivity: str | None
    environment: str | None
    purpose: str

    @property
    def may_be_collected(self) -> bool:
        approved = self.approval.state is ApprovalState.APPROVED and self.grant.state is GrantState.APPROVED
        return approved and self.approval.collected_at is None

    @property
    def is_to_be_waited_for(self) -> bool:
        """Whether a credential may still come of it."""
        return self.grant.state is GrantState.PENDING or self.may_be_collected


@dataclass(frozen=True, kw_only=True)
class Route:
    """By which channel a group is told that it is asked; without groups, every group. A break-glass is told by all."""

    channel: str
    groups: frozenset[str] = frozenset()

    def leads_to(self, case: Case) -> bool:
        return not self.groups or case.grant.break_glass is not None or bool(self.groups & case.approval.groups)


def needs_of(decision: Decision) -> tuple[Need, ...]:
    """Whom a decision asks."""
    return tuple(
        Need(group=group, quorum=quorum, owner_may=group in decision.owners_in) for group, quorum in decision.approvals
    )


def parameters_hash(parameters: Mapping[str, str]) -> str:
    """What is kept of the parameters of a request: they belong to it, and a provider may take one for secret."""
    return hashlib.sha256(canonical_json(dict(parameters))).hexdigest()


# --- Who may say yes ---


@dataclass(frozen=True, kw_only=True)
class Requesters:
    """Those whose own yes does not count: whoever asks, whoever it asks for, and who answers for them (INV-15)."""

    names: frozenset[str]
    identities: frozenset[tuple[str, str]]
    owners: frozenset[str]

    @classmethod
    def of(cls, grants: Iterable[Grant], catalogue: Catalogue) -> Requesters:
        """Of a grant, and of those it was handed down from.

        The orchestrator counts as a requester: it opened the task, so what the agent asks for it asks for too. So does
        the user on whose behalf it is.
        """
        names: set[str] = set()
        identities: set[tuple[str, str]] = set()
        for grant in grants:
            names |= {grant.agent, grant.orchestrator, *grant.orchestrators_above}
            # The same subject of another issuer may be the same person, and the doubt is not the asker's.
            names |= set() if grant.on_behalf_of is None else {grant.on_behalf_of.partition(":")[2]}
            identities.add((grant.issuer, grant.subject))
        rules = [rule for name in names if (rule := catalogue.rule(name)) is not None]
        owners = frozenset(rule.owner for rule in rules if rule.owner is not None)
        # One workload may have two names.
        identities |= {(rule.issuer, rule.subject) for rule in rules if rule.subject is not None}
        return cls(names=frozenset(names), identities=frozenset(identities), owners=owners)

    def include(self, voter: Principal) -> bool:
        """Whether this is one of them themselves; no policy makes that count."""
        # With its owner: what one of them answers for speaks with their voice, as does their subject of another issuer.
        called = {voter.name, voter.subject, voter.owner}
        return bool(called & self.names) or any(voter.subject == subject for _, subject in self.identities)

    def are_owned_like(self, voter: Principal) -> bool:
        """Whether this is who answers for one of them, or is answered for by the same."""
        return bool({voter.name, voter.subject, voter.owner} & self.owners)


def counts(need: Need, voter: Principal, requesters: Requesters) -> bool:
    """Whether a yes of this person is one of those that a need asks for."""
    if Role.APPROVER not in voter.roles or need.group not in voter.groups or requesters.include(voter):
        return False
    return need.owner_may or not requesters.are_owned_like(voter)


def met(
    needs: Iterable[Need], votes: Iterable[Vote], requesters: Requesters, catalogue: Catalogue
) -> Mapping[str, int]:
    """How many people of each group said yes, who still are who they were under this configuration.

    Who left the group, or came to own the agent, is not counted any more; the strictest need of a group counts.
    """
    voters = _who_said_yes(votes, catalogue)
    found: dict[str, int] = {}
    for need in needs:
        number = len(_counted(need, voters, requesters, catalogue))
        found[need.group] = min(number, found.get(need.group, number))
    return found


def spoken_for(
    needs: Iterable[Need], votes: Iterable[Vote], voter: Principal, requesters: Requesters, catalogue: Catalogue
) -> Principal | None:
    """Who said yes already and may be the same person, where a yes of this one would therefore add nothing."""
    voters, found = _who_said_yes(votes, catalogue), None
    for need in needs:
        if not counts(need, voter, requesters):
            continue
        before = _counted(need, voters, requesters, catalogue)
        same = next((other for other in before if catalogue.are_one_person(voter, other)), None)
        if same is None:
            return None
        found = same
    return found


def _who_said_yes(votes: Iterable[Vote], catalogue: Catalogue) -> list[Principal]:
    return [voter for vote in votes if vote.verdict is Verdict.APPROVE and (voter := _voter(vote, catalogue))]


def _counted(
    need: Need, voters: Iterable[Principal], requesters: Requesters, catalogue: Catalogue
) -> Sequence[Principal]:
    """Those of them whose yes counts, each person once, by however many principals they speak (INV-15)."""
    return list(catalogue.different_people(voter for voter in voters if counts(need, voter, requesters)))


def approved_by(needs: Iterable[Need], votes: Iterable[Vote], requesters: Requesters, catalogue: Catalogue) -> Approved:
    """Those whose yes counts under this configuration, and the groups they said it for."""
    voters = _who_said_yes(votes, catalogue)
    counted = [(need.group, voter.name) for need in needs for voter in _counted(need, voters, requesters, catalogue)]
    return Approved(by=frozenset(name for _, name in counted), groups=frozenset(group for group, _ in counted))


def are_met(needs: Iterable[Need], found: Mapping[str, int]) -> bool:
    return all(found.get(need.group, 0) >= need.quorum for need in needs)


def _voter(vote: Vote, catalogue: Catalogue) -> Principal | None:
    """The voter as this configuration knows it, or None where it knows nobody of that name and identity (INV-17)."""
    rule = catalogue.rule(vote.voter)
    if rule is None or rule.issuer != vote.issuer or not _is_subject(rule, vote.subject):
        return None
    return Principal(
        name=rule.name,
        kind=rule.kind,
        issuer=vote.issuer,
        subject=vote.subject,
        roles=frozenset(Role(role) for role in rule.roles),
        owner=rule.owner,
        groups=frozenset(rule.groups),
    )


def _is_subject(rule: PrincipalRule, subject: str) -> bool:
    if rule.subject is not None:
        return rule.subject == subject
    return rule.subject_prefix is not None and subject.startswith(rule.subject_prefix)


# --- What is left of the request ---


def narrowed(approval: Approval, votes: Iterable[Vote]) -> Narrowed:
    """What every yes leaves: several narrowings intersect, and nothing is ever added (INV-16)."""
    scopes, ttl_s = frozenset(approval.scopes), approval.ttl_s
    for vote in votes:
        if vote.verdict is Verdict.APPROVE:
            scopes = scopes if vote.scopes is None else scopes & frozenset(vote.scopes)
            ttl_s = ttl_s if vote.ttl_s is None else min(ttl_s, vote.ttl_s)
    return Narrowed(scopes=scopes, ttl_s=ttl_s)


@dataclass(frozen=True, kw_only=True)
class Narrowing:
    """What one person wants to leave of a request."""

    scopes: Sequence[str] | None = None
    ttl_s: int | None = None
    reason: str | None = field(default=None)

    def require_fits(self, approval: Approval, votes: Iterable[Vote]) -> None:
        """Refuse what would widen, and what would leave nothing."""
        if self.scopes is not None:
            beyond = sorted(scope_set(self.scopes) - frozenset(approval.scopes))
            if beyond:
                raise Invalid(
                    f"{', '.join(beyond)} was not asked for: an approval can leave out scopes of "
                    f"{', '.join(approval.scopes)} and add none",
                    member="scopes",
                )
            if not narrowed(approval, votes).scopes & frozenset(self.scopes):
                raise Conflict(
                    "another approver left other scopes, and together nothing is left: agree with them, or deny it"
                )
        if self.ttl_s is not None and self.ttl_s > approval.ttl_s:
            raise Invalid(
                f"ttl_s {self.ttl_s} is more than the {approval.ttl_s} that were asked for: an approval only shortens",
                member="ttl_s",
            )


# --- Other people's words ---


def in_quotes(text: str, longest: int) -> str:
    """Somebody's words as an approver may be shown them: on one line, cut, and nothing in them acts (INV-31).

    What a terminal or a page would obey, or hide, or turn around, is written as the escape that it is.

    >>> in_quotes("read\\x1b[2K\\u202eonly", 40)
    'read\\\\x1b[2K\\\\u202eonly'
    """
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text[:longest]
    )
    return shown if len(text) <= longest and len(shown) <= 2 * longest else f"{shown[: 2 * longest]}…"
