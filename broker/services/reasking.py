"""Asking again what was decided once: whether another configuration, or another risk, would still allow it.

The facts of the configuration are the new ones, those of the moment the old: the time, the age of the task, what was
asked. So a change changes what it says it changes, and a policy about the hour ends nothing because somebody edited
another one. No transaction, no clock, and nothing is done here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, TypeVar

from sqlalchemy import Row

from broker.domain.catalogue import Catalogue, PrincipalRule, Resource
from broker.domain.clock import from_epoch
from broker.domain.errors import BrokerError
from broker.domain.identity import Principal
from broker.domain.lifecycle import GrantState
from broker.domain.policy import ALLOW, DENY, NEEDS_APPROVAL, AccessRequest, Decision, PolicySet, TaskFacts
from broker.domain.policy.reading import Path
from broker.domain.risk import Risks
from broker.services.asked import Versions, approved_of, decided_before_terms, holder
from broker.services.terms import is_known_user, require_may_ask

T = TypeVar("T")

_QUESTIONS_REMEMBERED = 1000  # of one agent for one thing
_ROWS_WITHOUT_A_PAUSE = 100
_PAUSE_S = 0.001


class Outcome(StrEnum):
    KEPT = "kept"
    SHORTENED = "shortened"
    ENDED = "ended"
    UNDECIDED = "undecided"


@dataclass(frozen=True, kw_only=True)
class Again:
    """What a recorded decision comes to now. `policies` allow it, or forbid it; `why` names no agent: many share it.

    `expires_at` is the latest at which what is out may end by the ceilings of now. `of_its_own`: it hangs on when the
    decision was made, and is not that of all that are alike.
    """

    outcome: Outcome
    why: str = ""
    policies: tuple[str, ...] = ()
    expires_at: datetime | None = None
    failure: str | None = None
    of_its_own: bool = False


class Reasking:
    """One configuration, asked about many recorded requests; identical questions are put to the engine once."""

    def __init__(
        self, *, catalogue: Catalogue, policies: PolicySet, versions: Versions, risks: Risks | None = None
    ) -> None:
        self.catalogue = catalogue
        self.policies = policies
        self._versions = versions
        self._risks = risks
        self._alike: dict[tuple[Any, ...], _Alike | str] = {}
        self._kept: dict[tuple[str, ...], Again] = {}  # what most come to, by the policies that allow it

    def again(self, row: Row[Any], now: datetime) -> Again:
        """Of a live grant: whether it stays, until when, or why not. `row` is one of `broker.store.redecisions`."""
        decided_at = decided_at_of(row)
        # A token from before the last renewal may live longer than what that renewal asked for. What is not collected
        # yet, or is being made, has no life but the one that was asked for.
        life_s = row.asked_ttl_s or row.ttl_s
        if row.state == str(GrantState.ACTIVE):
            life_s = int((row.expires_at - decided_at).total_seconds())
        risk = None if self._risks is None else self._risks.level(row.agent, row.on_behalf_of, now)
        decision = self._decided(row, decided_at, ttl_s=max(row.asked_ttl_s or row.ttl_s, life_s), risk=risk)
        if isinstance(decision, str):
            return Again(outcome=Outcome.ENDED, why=decision)
        if decision.outcome != ALLOW and decision.failure is not None:
            return Again(outcome=Outcome.UNDECIDED, why="policy could not be asked about it", failure=decision.failure)
        if decision.outcome == DENY:
            return Again(outcome=Outcome.ENDED, why=why_not(decision), policies=decision.policies)
        if decision.outcome == NEEDS_APPROVAL and not _approved(row, decision):
            return Again(outcome=Outcome.ENDED, why="people have to approve it now", policies=decision.policies)
        by, ceiling_s = "the resource's max_ttl_s", self.catalogue.resource(row.resource).max_ttl_s
        if decision.max_ttl_s is not None and decision.max_ttl_s < ceiling_s:
            by, ceiling_s = "@max_ttl of a policy", decision.max_ttl_s
        if life_s <= ceiling_s:
            kept = self._kept.get(decision.policies)
            if kept is None:
                kept = self._kept[decision.policies] = Again(outcome=Outcome.KEPT, policies=decision.policies)
            return kept
        why, bound = f"{by} is {ceiling_s} s now", decided_at + timedelta(seconds=ceiling_s)
        if bound <= now:
            return Again(outcome=Outcome.ENDED, why=why, policies=decision.policies, of_its_own=True)
        return Again(outcome=Outcome.SHORTENED, why=why, policies=decision.policies, expires_at=bound, of_its_own=True)

    def decided(self, row: Row[Any], *, ttl_s: int, risk: str | None = None) -> Decision | str:
        """What policy says to a recorded request under this configuration; or why it does not even come to that.

        `risk` is that of now; where it is not given, what it was then.
        """
        return self._decided(row, decided_at_of(row), ttl_s=ttl_s, risk=risk)

    def _decided(self, row: Row[Any], decided_at: datetime, *, ttl_s: int, risk: str | None) -> Decision | str:
        if row.on_behalf_of is not None and not is_known_user(row.on_behalf_of, self.catalogue):
            return "the issuer of the user it is for is not configured any more"
        key = (row.agent, row.issuer, row.subject, row.policy_version, row.resource, row.scopes, row.provider)
        # A break-glass is decided by other policies, whatever those read.
        asked_as = (row.sender_bound, row.break_glass is not None)
        alike = self._alike.get((key, asked_as))
        if alike is None:
            alike = self._alike[(key, asked_as)] = self._found(row)
        if isinstance(alike, str):
            return alike
        asked = _Asked(
            row=row,
            decided_at=decided_at,
            ttl_s=min(ttl_s, alike.resource.max_ttl_s),
            risk=risk or row.risk or "low",
        )
        question = tuple([tell(asked) for tell in alike.tells])
        decision = alike.decisions.get(question)
        if decision is None:
            decision = self.policies.decide(asked.request(alike))
            if decision.failure is None:
                # What could not be answered is asked again.
                if len(alike.decisions) >= _QUESTIONS_REMEMBERED:
                    alike.decisions.clear()
                alike.decisions[question] = decision
        return decision

    def _found(self, row: Row[Any]) -> _Alike | str:
        agent = self._found_holder(row)
        if isinstance(agent, str):
            return agent
        resource = self._found_resource(row, agent)
        if isinstance(resource, str):
            return resource
        reads = self.policies.facts_read(row.agent, json.loads(row.scopes), row.resource)
        return _Alike(agent=agent, resource=resource, tells=tuple(_TELLS.get(path, _nobody_elses) for path in reads))

    def _found_holder(self, row: Row[Any]) -> Principal | str:
        """Who holds it by this configuration, or why it is nobody who could.

        The workload token is not here to be looked at again, only its issuer and subject are. What else a rule demands
        of it was seen when the grant was decided, so a rule that is what it was then counts as it did then; one that
        demands something new is not known to be met, and unknown is never yes.
        """
        rule = self.catalogue.rule(row.agent)
        if rule is None:
            return "its principal is not configured any more"
        then = self._versions.at(row.policy_version) if row.policy_version is not None else None
        before = () if then is None else then.catalogue.principals
        if not rule.names(row.issuer, row.subject):
            return "its principal stands for another workload now"
        was = None if then is None else then.catalogue.rule(rule.name)
        if not _demands(rule) <= (frozenset() if was is None else _demands(was)):
            return "what is demanded of its workload token changed, and the token is not there to be looked at"
        for other in self.catalogue.rules_for(row.issuer, row.subject):
            if other.name == rule.name or other.rank < rule.rank:
                continue
            if any(old.name != rule.name and _same_workloads(other, old) for old in before):
                continue  # it was there, and was not who this is
            return "its workload is, or may be, another principal now"
        return holder(rule, row.issuer, row.subject, row.expires_at)

    def _found_resource(self, row: Row[Any], agent: Principal) -> Resource | str:
        try:
            resource = self.catalogue.resource(row.resource)
        except BrokerError:
            return "its resource is not registered any more"
        if resource.provider != row.provider:
            return "credentials of its resource come from elsewhere now"
        scopes = frozenset(json.loads(row.scopes))
        if not scopes <= resource.offered:
            return "its resource does not offer its scopes any more"
        try:
            require_may_ask(agent, resource, scopes, "bound" if row.sender_bound else None)
        except BrokerError as refusal:
            return _WHY.get(refusal.code, "it may not be asked for any more")
        return resource


_WHY = {
    "role_missing": "its principal is not an agent any more",
    "invalid_request": "its resource wants sender-bound tokens now, and this is not one",
}


def unhurried(rows: Iterable[T]) -> Iterator[T]:
    """These rows, with a pause now and then: asking is nothing but work for the interpreter, and issuing needs it too.

    Without it each thread that comes back from the store waits a whole switch interval, and issuing halves.
    """
    for number, row in enumerate(rows, 1):
        yield row
        if number % _ROWS_WITHOUT_A_PAUSE == 0:
            time.sleep(_PAUSE_S)


def why_not(decision: Decision) -> str:
    """In few words, so that many grants that end for one reason say the same."""
    if decision.policies:
        return f"policy {', '.join(map(repr, decision.policies))} forbids it"
    return "no policy permits it"


@dataclass(frozen=True, kw_only=True)
class _Alike:
    """What requests of one agent for one thing share; `tells` are what else of a request its policies look at."""

    agent: Principal
    resource: Resource
    tells: tuple[Callable[[_Asked], Any], ...]
    decisions: dict[tuple[Any, ...], Decision] = field(default_factory=dict)


class _Asked:
    """A recorded request, read only as far as somebody looks."""

    __slots__ = ("decided_at", "risk", "row", "ttl_s")

    def __init__(self, *, row: Row[Any], decided_at: datetime, ttl_s: int, risk: str) -> None:
        self.row = row
        self.decided_at = decided_at
        self.ttl_s = ttl_s
        self.risk = risk

    @property
    def minute(self) -> datetime:
        return self.decided_at.replace(second=0)

    @property
    def purpose(self) -> str:
        # An implicit task has no purpose but the agent's own word.
        return "" if self.row.implicit else str(self.row.purpose)

    @property
    def age_s(self) -> int:
        return max(0, int((self.decided_at - self.row.task_created_at).total_seconds()))

    def request(self, alike: _Alike) -> AccessRequest:
        row = self.row
        return AccessRequest(
            agent=alike.agent,
            resource=alike.resource,
            scopes=frozenset(json.loads(row.scopes)),
            ttl_s=self.ttl_s,
            task=TaskFacts(
                id=row.task_id,
                purpose=self.purpose,
                age_s=self.age_s,
                orchestrator=row.orchestrator,
                labels=json.loads(row.labels),
            ),
            intent=row.intent,
            sender_bound=bool(row.sender_bound),
            claimed=json.loads(row.claimed),
            now=self.decided_at,
            user=row.on_behalf_of,
            user_attributes=json.loads(row.user_attributes or "null") or {},
            delegation_depth=row.delegation_depth or 0,
            chain=tuple(row.chain.split()),
            approved=approved_of(json.loads(row.approved or "null")),
            risk=self.risk,
            live_grants=row.live_grants or 0,
            recent_denials=row.recent_denials or 0,
            break_glass=row.break_glass,
        )


# Each fact of a context, as far as it differs between requests of one agent for one thing. JSON is compared as text:
# what is spelled otherwise is asked about once more, and no two that differ are spelled alike.
_TELLS: Mapping[Path, Callable[[_Asked], Any]] = {
    ("task", "id"): lambda asked: asked.row.task_id,
    ("task", "purpose"): lambda asked: asked.purpose,
    ("task", "age_s"): lambda asked: asked.age_s,
    ("task", "orchestrator"): lambda asked: asked.row.orchestrator,
    ("task", "labels"): lambda asked: asked.row.labels,
    ("intent",): lambda asked: asked.row.intent,
    ("ttl_s",): lambda asked: asked.ttl_s,
    ("scopes",): lambda asked: None,
    ("sender_bound",): lambda asked: None,
    ("break_glass",): lambda asked: None,
    ("delegation_depth",): lambda asked: asked.row.delegation_depth,
    ("delegation_chain",): lambda asked: asked.row.chain,
    ("delegation_root",): lambda asked: asked.row.chain,
    ("user",): lambda asked: asked.row.on_behalf_of,
    ("user_attributes",): lambda asked: asked.row.user_attributes,
    ("approvals", "count"): lambda asked: asked.row.approved,
    ("approvals", "by"): lambda asked: asked.row.approved,
    ("approvals", "groups"): lambda asked: asked.row.approved,
    ("risk",): lambda asked: asked.risk,
    ("agent", "live_grants"): lambda asked: asked.row.live_grants or 0,
    ("agent", "recent_denials"): lambda asked: asked.row.recent_denials or 0,
    ("time", "hour"): lambda asked: asked.decided_at.hour,
    ("time", "weekday"): lambda asked: asked.decided_at.isoweekday(),
    # Whatever the zone is: each is a whole number of minutes away from UTC.
    ("local", "zone"): lambda asked: None,
    ("local", "hour"): lambda asked: asked.minute,
    ("local", "minute"): lambda asked: asked.minute,
    ("local", "weekday"): lambda asked: asked.minute,
    ("claimed",): lambda asked: asked.row.claimed,
}


def _nobody_elses(asked: _Asked) -> str:
    # A fact that is not known here makes each request one of its own.
    return str(asked.row.id)


def decided_at_of(row: Row[Any]) -> datetime:
    if row.decided_at is None:
        return decided_before_terms(row.created_at, row.expires_at, row.ttl_s)
    return from_epoch(row.decided_at)


def _demands(rule: PrincipalRule) -> frozenset[tuple[str, type, str | int | bool]]:
    # With the type, as in matching: to Python True is 1.
    return frozenset((name, type(value), value) for name, value in rule.claims.items())


def _same_workloads(rule: PrincipalRule, old: PrincipalRule) -> bool:
    mine, its = (rule.issuer, rule.subject, rule.subject_prefix), (old.issuer, old.subject, old.subject_prefix)
    return mine == its and _demands(rule) == _demands(old)


def _approved(row: Row[Any], decision: Decision) -> bool:
    """Whether people said yes to as much as is asked for now: the same groups, and as many of each."""
    given = {entry["group"]: entry["quorum"] for entry in json.loads(row.approvals or "null") or ()}
    return bool(given) and all(given.get(group, 0) >= quorum for group, quorum in decision.approvals)
