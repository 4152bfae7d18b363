"""Configuration as numbered versions, so that all brokers on one database decide alike.

A version is immutable. An older one never overwrites a newer one unless that is asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from broker.domain.audit import Event, canonical_json
from broker.domain.catalogue import Catalogue
from broker.domain.clock import Clock
from broker.domain.errors import Conflict, Invalid, RoleMissing
from broker.domain.identity import Caller, Role, WorkloadIdentity, new_id
from broker.domain.policy import AccessRequest, Decision, PolicySet, TaskFacts
from broker.domain.scope import require_offered
from broker.providers.wakeups import Wakeups
from broker.services.drafts import Draft, drafted, fit
from broker.services.keys import Keys
from broker.services.redeciding import Foreseen, Redeciding, order_redecision
from broker.services.refusals import recorded
from broker.services.standing import StandingReader
from broker.store import gate, standing
from broker.store.database import Database
from broker.store.transitions import record


@dataclass(frozen=True, kw_only=True)
class AppliedVersion:
    version: int
    sha256: str
    applied_at: datetime
    applied_by: str


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """A request that nobody made, under a task that nobody opened."""

    agent: str
    resource: str
    scopes: frozenset[str]
    ttl_s: int
    purpose: str
    labels: Mapping[str, str]
    intent: str | None
    sender_bound: bool
    claimed: Mapping[str, Any]
    break_glass: bool = False


class Administration:
    def __init__(
        self,
        *,
        database: Database,
        standing: StandingReader,
        redeciding: Redeciding,
        keys: Keys,
        wakeups: Wakeups,
        clock: Clock,
    ) -> None:
        self._database = database
        self._standing = standing
        self._redeciding = redeciding
        self._keys = keys
        self._wakeups = wakeups
        self._clock = clock

    def apply(self, catalogue: Catalogue, *, by: str, allow_older: bool = False, onto: int | None = None) -> int:
        """Store the configuration as the newest version, unless it is already; answers its number.

        `onto` is the version that it was made from, where one was: what was applied since then is not undone.

        Raises Conflict where this very configuration was once applied and a newer one followed: a broker restarted
        with a stale file must not undo what others run on. `allow_older` says that this is meant.
        """
        fit(catalogue)
        self._keys.ensure({resource.signing_algorithm for resource in catalogue.resources} | {"ES256"})
        document = catalogue.as_document()
        sha256 = hashlib.sha256(canonical_json(document)).hexdigest()
        with self._database.read() as db:
            latest = standing.latest_configuration(db)
        if latest is not None and latest.sha256 == sha256:
            return int(latest.version)
        now = self._clock()
        with self._database.begin() as db:
            # Turning the era is what makes every broker look again; it also makes two that apply take turns.
            era = gate.turn(db)
            latest = standing.latest_configuration(db)
            if latest is not None and latest.sha256 == sha256:
                return int(latest.version)
            if onto is not None and latest is not None and latest.version != onto:
                raise Conflict(f"configuration version {latest.version} was applied meanwhile: look, and try again")
            earlier = standing.has_configuration(db, sha256)
            if earlier is not None and latest is not None and not allow_older:
                raise Conflict(
                    f"this configuration is version {earlier}, and version {latest.version} was applied after it: "
                    "bring the file up to date, or say `broker apply --allow-older` to go back on purpose"
                )
            version = 1 if latest is None else int(latest.version) + 1
            row = {"version": version, "sha256": sha256, "document": document, "applied_at": now, "applied_by": by}
            standing.insert_configuration(db, row)
            event = Event(
                id=new_id("evt", now),
                at=now,
                type="configuration.applied",
                actor=by,
                policy_version=version,
                data={"version": version, "sha256": sha256},
            )
            record(db, [event])
            if latest is not None:
                # What is out was decided by the version before: up to this era all of it, and nothing after it.
                order_redecision(db, now=now, era=era, version=version, by=by, cause=f"configuration version {version}")
        self._wakeups.wake()
        return version

    def replace_policies(self, caller: Caller, draft: Draft) -> int:
        """Apply the configuration in force with other policies; answers the number of the version."""
        with recorded(self._database, self._clock, caller, "policies.refused", "replace"):
            require_admin(caller)
            catalogue, _ = drafted(self._standing.now().catalogue, draft)
            return self.apply(catalogue, by=caller.name, onto=catalogue.version)

    def foresee(self, caller: Caller, draft: Draft) -> Foreseen:
        """What that would change among the live grants."""
        with recorded(self._database, self._clock, caller, "policies.refused", "replace"):
            require_admin(caller)
        catalogue, _ = drafted(self._standing.now().catalogue, draft)
        return self._redeciding.foresee(catalogue)

    def versions(self, caller: Caller, *, before: int | None = None, limit: int = 100) -> list[AppliedVersion]:
        """Newest first, below the version `before`."""
        require_reader(caller)
        with self._database.read() as db:
            return [
                AppliedVersion(
                    version=row.version, sha256=row.sha256, applied_at=row.applied_at, applied_by=row.applied_by
                )
                for row in standing.configurations(db, before=before, limit=limit)
            ]

    def evaluate(self, caller: Caller, asked: WhatIf) -> Decision:
        """What policy would say; nothing is issued or recorded."""
        require_reader(caller)
        standing = self._standing.now()
        return evaluate(standing.catalogue, standing.policies, asked, now=self._clock())


def evaluate(catalogue: Catalogue, policies: PolicySet, asked: WhatIf, *, now: datetime) -> Decision:
    """What these policies say to a request under a task that began just now."""
    rule = next((rule for rule in catalogue.principals if rule.name == asked.agent), None)
    if rule is None:
        raise Invalid(f"no principal is called {asked.agent[:200]!r}: name a configured agent", member="agent")
    resource = catalogue.resource(asked.resource)
    require_offered(asked.scopes, resource.offered, resource.identifier)
    identity = WorkloadIdentity(
        issuer=rule.issuer, subject=rule.subject or rule.subject_prefix or "", claims={}, expires_at=now
    )
    task = TaskFacts(
        id=new_id("task", now), purpose=asked.purpose, age_s=0, orchestrator=asked.agent, labels=asked.labels
    )
    request = AccessRequest(
        agent=rule.principal(identity),
        resource=resource,
        scopes=asked.scopes,
        ttl_s=asked.ttl_s,
        task=task,
        intent=asked.intent,
        sender_bound=asked.sender_bound,
        claimed=asked.claimed,
        now=now,
        break_glass="an evaluation" if asked.break_glass else None,
    )
    decision = policies.decide(request)
    return decision.with_reasons(policies.explain(request, decision))


def require_admin(caller: Caller) -> None:
    if not caller.has(Role.ADMIN):
        raise RoleMissing(f"{caller.name} is not an admin: policies are not theirs to change")


def require_reader(caller: Caller) -> None:
    if not (caller.has(Role.ADMIN) or caller.has(Role.AUDITOR)):
        raise RoleMissing(f"{caller.name} is neither admin nor auditor: policies are not theirs to read")
