"""What stands above every request at one era: configuration, policies, keys, refusals, risks; read once per era.

What is added to it turns the era (`broker.store.gate`), so whoever sees the same era misses nothing. A revocation whose
rows have all followed is dropped without a turn: to remember it longer changes no answer.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from sqlalchemy import Connection

from broker.domain.catalogue import Catalogue
from broker.domain.clock import Clock
from broker.domain.errors import LockedDown, Unavailable
from broker.domain.grant import Authority
from broker.domain.identity import Caller, Principal
from broker.domain.policy import PolicySet
from broker.domain.refusal import Refusals
from broker.domain.risk import Risks
from broker.services.keys import KeyRing, Keys
from broker.store import gate
from broker.store.database import Database
from broker.store.signals import standing_signals
from broker.store.standing import latest_configuration, lifted_from_agents, standing_refusals


@dataclass(frozen=True, kw_only=True)
class Standing:
    era: int
    catalogue: Catalogue
    policies: PolicySet
    keys: KeyRing
    refusals: Refusals
    risks: Risks
    lifted_at: Mapping[str, datetime]  # by agent: when a lockdown over it was lifted last, of the last day


class StandingReader:
    """The newest `Standing`, from memory where the era did not turn."""

    def __init__(self, *, database: Database, keys: Keys, clock: Clock) -> None:
        self._database = database
        self._keys = keys
        self._clock = clock
        self._guard = threading.Lock()
        self._newest: Standing | None = None

    def at(self, db: Connection, era: int) -> Standing:
        """What stands at `era`, which was read in this transaction before this call.

        Rows may be newer than `era` says, never older: the next look finds the era turned and reads again.
        """
        newest = self._newest
        if newest is not None and newest.era == era and newest.keys.generation == self._keys.generation:
            return newest
        with self._guard:
            newest = self._newest
            if newest is not None and newest.era == era and newest.keys.generation == self._keys.generation:
                return newest
            read = self._read(db, era)
            if newest is None or newest.era <= era:
                self._newest = read
            return read

    def since(self, era: int) -> Standing:
        """What stands at `era`, which was read before this call, or at a later one; for who holds no transaction."""
        newest = self._newest
        return newest if newest is not None and newest.era == era else self.now()

    def now(self) -> Standing:
        """What stands now, in a transaction of its own."""
        with self._database.read() as db:
            return self.at(db, gate.era_of(db))

    def last_known(self) -> Standing:
        """What stood at the last look. For routing and authentication only: a verb looks again in its transaction."""
        return self._newest or self.now()

    def _read(self, db: Connection, era: int) -> Standing:
        row = latest_configuration(db)
        if row is None:
            raise Unavailable("no configuration was applied to this database yet: run `broker apply --config FILE`")
        known = self._newest
        if known is not None and known.catalogue.version == row.version:
            catalogue, policies = known.catalogue, known.policies
        else:
            catalogue = Catalogue.from_document(row.version, row.document)
            policies = PolicySet.compile(catalogue, applied=True)
        refusals = Refusals(standing_refusals(db))
        now = self._clock()
        return Standing(
            era=era,
            catalogue=catalogue,
            policies=policies,
            keys=self._keys.load(db),
            refusals=refusals,
            # Those that end meanwhile end by themselves, wherever somebody asks.
            risks=Risks(standing_signals(db, now=now)),
            lifted_at=lifted_from_agents(db, since=now - timedelta(days=1)),
        )


def require_no_refusal(grant: Authority, standing: Standing) -> None:
    """LockedDown where what is about to be handed out would be covered by what stands above everything."""
    refusal = standing.refusals.over(grant)
    if refusal is not None:
        raise LockedDown(f"a lockdown stands over {refusal.axis} {refusal.value!r} ({refusal.id}): {refusal.reason}")


def principal_of(caller: Caller, standing: Standing) -> Principal:
    """Who the caller is under the configuration of this transaction, which may be newer than that of the door."""
    if caller.identity is None or caller.catalogue_version == standing.catalogue.version:
        return caller.principal
    return standing.catalogue.principal_for(caller.identity)


def current_caller(caller: Caller, standing: Standing) -> Caller:
    """The caller as this configuration knows it; Unauthenticated if it is nobody there."""
    principal = principal_of(caller, standing)
    return replace(caller, principal=principal, catalogue_version=standing.catalogue.version)
