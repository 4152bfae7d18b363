"""A recorded request, put together again from what its grant's row keeps: to explain it, or to ask it anew.

What the configuration tells (the agent's attributes, the resource) comes from a version, the one it was decided by or
another; the task and the moment are those of the decision.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row

from broker.domain.catalogue import Catalogue, PrincipalRule, Resource
from broker.domain.clock import from_epoch
from broker.domain.errors import BrokerError
from broker.domain.identity import Principal, WorkloadIdentity
from broker.domain.policy import AccessRequest, PolicySet, TaskFacts
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
    complete: bool


def kept_of(row: Row[Any] | Any) -> Kept:
    """Of a grant, or of a row with its columns."""
    terms = row.terms
    if terms is None:
        # What it got is the best that is known of what was asked: it is no longer than that.
        return Kept(
            decided_at=max(row.created_at, row.expires_at - timedelta(seconds=row.ttl_s)),
            requested_s=None,
            ceilings_s={},
            ttl_s=row.ttl_s,
            delegation_depth=0,
            risk="low",
            complete=False,
        )
    return Kept(
        decided_at=from_epoch(terms["decided_at"]),
        requested_s=terms["requested_s"],
        ceilings_s=terms["ceilings_s"],
        ttl_s=terms["ttl_s"],
        delegation_depth=terms["delegation_depth"],
        risk=terms["risk"],
        complete=True,
    )


def rule_named(catalogue: Catalogue, name: str) -> PrincipalRule | None:
    return next((rule for rule in catalogue.principals if rule.name == name), None)


def holder(rule: PrincipalRule, row: Row[Any] | Any, decided_at: datetime) -> Principal:
    """Who holds a grant, as this rule describes them; that the rule is theirs was found out before."""
    return rule.principal(WorkloadIdentity(issuer=row.issuer, subject=row.subject, claims={}, expires_at=decided_at))


def asked(
    row: Row[Any] | Any,
    task: Row[Any] | Any,
    found: Kept,
    *,
    agent: Principal,
    resource: Resource,
    ttl_s: int | None = None,
    risk: str | None = None,
) -> AccessRequest:
    """The request as it was decided, by this configuration; `ttl_s` and `risk` where they are no longer what they were.

    `row` has the columns of a grant, `task` those of its task.
    """
    return AccessRequest(
        agent=agent,
        resource=resource,
        scopes=frozenset(row.scopes),
        ttl_s=found.ttl_s if ttl_s is None else ttl_s,
        task=TaskFacts(
            id=row.task_id,
            purpose="" if task.implicit else task.purpose,
            age_s=max(0, int((found.decided_at - task.created_at).total_seconds())),
            orchestrator=row.orchestrator,
            labels=task.labels,
        ),
        intent=row.intent,
        sender_bound=row.jkt is not None,
        claimed=row.claimed,
        now=found.decided_at,
        user=row.on_behalf_of,
        delegation_depth=found.delegation_depth,
        risk=found.risk if risk is None else risk,
    )
