"""A recorded request, put together again from what its grant's row keeps: to explain it, or to ask it anew.

What the configuration tells (the agent's attributes, the resource) comes from a version, the one it was decided by or
another; the task and the moment are those of the decision.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from broker.domain.catalogue import Catalogue, PrincipalRule, Resource
from broker.domain.clock import from_epoch
from broker.domain.errors import BrokerError
from broker.domain.grant import Grant
from broker.domain.identity import Principal, WorkloadIdentity
from broker.domain.policy import NOBODY, AccessRequest, Approved, PolicySet, TaskFacts
from broker.domain.task import Task
from broker.services.standing import StandingReader
from broker.store.database import Database
from broker.store.standing import configuration

_VERSIONS_KEPT = 4


@dataclass(frozen=True, kw_only=True)
class Version:
    """A configuration as it was applied. `policies` is None where this broker cannot read them any more."""

    catalogue: Catalogue
    policies: PolicySet | None


class Versions:
    """Configuration versions by their number; each is immutable, so a few are remembered."""

    def __init__(self, *, database: Database, standing: StandingReader) -> None:
        self._database = database
        self._standing = standing
        self._guard = threading.Lock()
        self._known: dict[int, Version] = {}

    def at(self, number: int) -> Version | None:
        """None where there is no such version. Holds no transaction, and is not to be asked within one."""
        newest = self._standing.last_known()
        if newest.catalogue.version == number:
            return Version(catalogue=newest.catalogue, policies=newest.policies)
        known = self._known.get(number)
        if known is not None:
            return known
        # One at a time: to read a thousand policies takes a core for a while, and anybody with a grant may ask.
        with self._guard:
            known = self._known.get(number)
            if known is None:
                known = self._read(number)
                if known is not None:
                    if len(self._known) >= _VERSIONS_KEPT:
                        self._known.pop(next(iter(self._known)))
                    self._known[number] = known
        return known

    def _read(self, number: int) -> Version | None:
        with self._database.read() as db:
            row = configuration(db, number)
        if row is None:
            return None
        catalogue = Catalogue.from_document(row.version, row.document)
        try:
            policies = PolicySet.compile(catalogue)
        except BrokerError:
            # It was checked by the engine of its time.
            return Version(catalogue=catalogue, policies=None)
        return Version(catalogue=catalogue, policies=policies)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What is kept of a decision beside the columns of a grant; not `complete` where it was made before terms were."""

    decided_at: datetime
    requested_s: int | None
    ceilings_s: Mapping[str, int]
    ttl_s: int
    delegation_depth: int
    risk: str
    live_grants: int | None
    recent_denials: int | None
    complete: bool
    user_attributes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    approved: Approved = NOBODY


def kept_of(grant: Grant) -> Kept:
    """What a grant keeps of its decision."""
    terms = grant.terms
    if terms is None:
        # What it got is the best that is known of what was asked: it is no longer than that.
        return Kept(
            decided_at=decided_before_terms(grant.created_at, grant.expires_at, grant.ttl_s),
            requested_s=None,
            ceilings_s={},
            ttl_s=grant.ttl_s,
            delegation_depth=0,
            risk="low",
            live_grants=None,
            recent_denials=None,
            complete=False,
        )
    return Kept(
        decided_at=from_epoch(terms["decided_at"]),
        requested_s=terms["requested_s"],
        ceilings_s=terms["ceilings_s"],
        ttl_s=terms["ttl_s"],
        delegation_depth=terms["delegation_depth"],
        risk=terms["risk"],
        # None of a grant that was decided before the broker kept them.
        live_grants=terms.get("live_grants"),
        recent_denials=terms.get("recent_denials"),
        complete=True,
        user_attributes=terms.get("user_attributes") or {},
        approved=approved_of(terms.get("approved")),
    )


def approved_of(said: Mapping[str, Sequence[str]] | None) -> Approved:
    """Who had said yes, as the terms of a grant keep it."""
    return NOBODY if said is None else Approved(by=frozenset(said["by"]), groups=frozenset(said["groups"]))


def decided_before_terms(created_at: datetime, expires_at: datetime, ttl_s: int) -> datetime:
    """When a grant was decided that does not say so, perhaps by a renewal."""
    return max(created_at, expires_at - timedelta(seconds=ttl_s))


def holder(rule: PrincipalRule, issuer: str, subject: str, decided_at: datetime) -> Principal:
    """Who holds a grant, as this rule describes them; that the rule is theirs was found out before."""
    return rule.principal(WorkloadIdentity(issuer=issuer, subject=subject, claims={}, expires_at=decided_at))


def asked(grant: Grant, task: Task, found: Kept, *, agent: Principal, resource: Resource) -> AccessRequest:
    """The request as policy saw it when it was decided, with agent and resource as a configuration tells of them."""
    return AccessRequest(
        agent=agent,
        resource=resource,
        scopes=frozenset(grant.scopes),
        ttl_s=found.ttl_s,
        task=TaskFacts(
            id=task.id,
            purpose="" if task.implicit else task.purpose,
            age_s=max(0, int((found.decided_at - task.created_at).total_seconds())),
            orchestrator=task.orchestrator,
            labels=task.labels,
        ),
        intent=grant.intent,
        sender_bound=grant.jkt is not None,
        claimed=grant.claimed,
        now=found.decided_at,
        user=grant.on_behalf_of,
        user_attributes=found.user_attributes,
        delegation_depth=found.delegation_depth,
        chain=grant.chain,
        approved=found.approved,
        risk=found.risk,
        live_grants=found.live_grants or 0,
        recent_denials=found.recent_denials or 0,
        break_glass=grant.break_glass,
    )
