"""What is alive outside against what our rows account for: the one way to find what nobody owns (INV-03).

Every minute, for each provider. What nobody owns becomes a debt and an alert; what we think is held and is gone is
recorded and ended. Nothing is issued from a provider that was not looked at since this process began, or since the
database or the provider went back in time (INV-37).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from broker.domain.audit import Event
from broker.domain.clock import Clock
from broker.domain.errors import BrokerError, Unavailable
from broker.domain.identity import new_id
from broker.domain.lease import Lease, RevocationClass, Urgency
from broker.domain.lifecycle import GrantState, LeaseState
from broker.providers.base import LiveSecret, Provider
from broker.providers.targets import Login, Logins
from broker.services.endings import ACTOR, end_grants
from broker.services.standing import StandingReader
from broker.store import grants, leases, locks
from broker.store.database import Database
from broker.store.transitions import change_of, record

EVERY = timedelta(seconds=60)
# Younger than this, an unknown secret may be one whose issuer is just committing it.
OLD_ENOUGH = timedelta(seconds=150)
# The clocks of two brokers may differ by so much. A look that began later than this is of a clock that was set back.
_APART = timedelta(seconds=1)
# What is found alive is owed by then at the latest, if nobody tells when it ends.
_LONGEST = timedelta(days=1)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Reconciled:
    """What looks at providers found: secrets nobody owns, held ones that are gone, logins no lease knows."""

    looks: int = 0
    found: int = 0
    gone: int = 0
    logins: int = 0


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a provider was last looked at. `reachable` is whether the last try came to a complete look."""

    provider: str
    looked_at: datetime | None
    reachable: bool


def settings_in_use(database: Database, standing: StandingReader, provider: str) -> Iterable[Mapping[str, Any]]:
    """The settings of every source of a provider that may have live secrets: what is configured, and what once was."""
    configured = standing.now().catalogue.resources
    yield from (resource.settings for resource in configured if resource.provider == provider)
    with database.read() as db:
        earlier = leases.open_settings(db, provider)
    # An orphan that was found has none: it is known by its reference.
    yield from (settings for settings in earlier if settings)


class Reconciliation:
    def __init__(
        self,
        *,
        database: Database,
        providers: Mapping[str, Provider],
        targets: Mapping[str, Logins],
        clock: Clock,
    ) -> None:
        self._database = database
        self._providers = providers
        self._targets = targets
        self._clock = clock
        self._since: dict[str, datetime] = {}
        self._numbers: dict[str, int] = {}
        self._silent: dict[str, datetime] = {}  # when we last looked in vain
        self._tried: dict[str, datetime] = {}  # by target, when we last looked
        self._told: dict[str, frozenset[str]] = {}  # by target, the logins that were told of and could not be ended

    def begin(self) -> None:
        """From now on this process trusts only looks that begin after this."""
        for name in self._providers:
            if name not in self._since:
                self._since[name] = self._clock()

    def distrust(self, provider: str) -> None:
        """Trust no earlier look: the provider does not know us any more, so it may have gone back in time."""
        # Within the same second a look may have begun before and asked after.
        self._since[provider] = self._clock() + timedelta(seconds=1)

    def require_reconciled(self, db: Connection, provider: str, now: datetime) -> None:
        """Raise Unavailable unless it was looked at since we can trust (INV-37); the caller's transaction asks."""
        if provider not in self._providers:
            raise Unavailable(f"this broker has no provider {provider!r}: ask its administrator")
        # Before ours is read: one that another thread reads meanwhile may be newer, and is no sign of going back.
        seen = self._numbers.get(provider, 0)
        look = leases.last_look(db, provider)
        number = 0 if look is None else look.number
        if number < seen:
            self._since[provider] = now
            self._numbers[provider] = number
        elif number > self._numbers.get(provider, 0):
            self._numbers[provider] = number
        since = self._trusted_since(provider, now)
        if look is None or look.began_at is None or not since <= look.began_at <= now + _APART:
            leases.want_look(db, provider, now=now)
            raise Unavailable(
                f"the broker has not yet compared what {provider} says is alive with its own rows: try again shortly"
            )

    def run(self) -> Reconciled:
        """Look at every provider that is due. One that does not answer keeps no other from its turn."""
        self.begin()
        total = Reconciled()
        failures: list[BrokerError] = []
        for name in self._providers:
            if not self._is_due(name):
                continue
            try:
                found, gone = self.look(name)
            except BrokerError as problem:
                self._silent[name] = self._clock()
                failures.append(problem)
                continue
            total = Reconciled(looks=total.looks + 1, found=total.found + found, gone=total.gone + gone)
        for name in self._targets:
            # One that does not answer may have died half-way through making a login: then above all it is looked for.
            if not (total.looks or (failures and self._is_long_since(name))):
                continue
            self._tried[name] = self._clock()
            try:
                total = replace(total, logins=total.logins + self.look_at_target(name))
            except BrokerError as problem:
                failures.append(problem)
        if failures:
            raise failures[0]
        return total

    def looks(self) -> list[Look]:
        """How each provider was last looked at, by us or by another broker."""
        with self._database.read() as db:
            found = leases.looks(db)
        return [
            Look(
                provider=name,
                looked_at=found.get(name),
                reachable=name in found and (name not in self._silent or found[name] > self._silent[name]),
            )
            for name in self._providers
        ]

    def look(self, name: str) -> tuple[int, int]:
        """One complete look at a provider; answers how much was (found, gone)."""
        provider = self._providers[name]
        began_at = self._clock()
        with self._database.read() as db:
            known = {lease.reference: lease for lease in leases.open_leases(db, name) if lease.reference is not None}
        live = provider.list_live(known.keys())
        found = self._owe_what_nobody_owns(name, [secret for secret in live if secret.reference not in known], began_at)
        alive = {secret.reference for secret in live}
        gone = self._end_what_is_gone(
            [lease for lease in known.values() if lease.state is LeaseState.HELD and lease.reference not in alive]
        )
        with self._database.begin() as db:
            leases.looked(db, name, began_at=began_at)
        return found, gone

    def look_at_target(self, name: str) -> int:
        """End the logins a database has for grants of ours to which nothing open belongs; answers how many.

        A provider that died half-way through making one knows nothing of it, so its list does not show it.
        """
        target = self._targets[name]
        logins = target.list_logins()
        with self._database.read() as db:
            owned = leases.accounted_for(db, [login.grant_id for login in logins])
        strangers = [login for login in logins if login.grant_id not in owned]
        if strangers:
            # Ended and released between the list and our rows, it was nobody's only by our slowness.
            left = {login.name for login in target.list_logins()}
            strangers = [login for login in strangers if login.name in left]
        told = self._told.pop(name, frozenset())
        failures: list[BrokerError] = []
        alive: set[str] = set()
        for login in strangers:
            if login.name not in told:
                now = self._clock()
                with self._database.begin() as db:
                    record(db, [_login_event(name, login, now)])
                _log.error("a login nobody owns", extra={"fields": {"target": name, "grant_id": login.grant_id}})
            # One that cannot be ended yet keeps no other alive, and is not news at each look.
            try:
                target.end(login)
            except BrokerError as problem:
                alive.add(login.name)
                failures.append(problem)
        self._told[name] = frozenset(alive)
        if failures:
            raise failures[0]
        return len(strangers)

    def _is_due(self, name: str) -> bool:
        now = self._clock()
        with self._database.read() as db:
            look = leases.last_look(db, name)
        if look is None or look.began_at is None or not -_APART <= now - look.began_at < EVERY:
            return True
        if look.began_at < self._trusted_since(name, now):
            return True
        return look.wanted_at is not None and look.began_at <= look.wanted_at

    def _is_long_since(self, target: str) -> bool:
        tried = self._tried.get(target)
        return tried is None or abs(self._clock() - tried) >= EVERY

    def _trusted_since(self, provider: str, now: datetime) -> datetime:
        since = self._since.setdefault(provider, now)
        if since > now + _APART:
            # The clock was set back. Waiting until it is there again would be waiting for hours.
            since = self._since[provider] = now
        return since

    def _owe_what_nobody_owns(self, name: str, strangers: Collection[LiveSecret], now: datetime) -> int:
        # A time that is not told is no reason to let it live.
        old = [secret for secret in strangers if secret.issued_at is None or now - secret.issued_at >= OLD_ENOUGH]
        if not old:
            return 0
        with self._database.begin() as db:
            # Two that look at once would each owe it, and each tell somebody.
            locks.hold_reconciling(db, name)
            accounted = leases.open_references(db, name, [secret.reference for secret in old])
            found = [secret for secret in old if secret.reference not in accounted]
            leases.insert_leases(db, [_debt(name, secret, _grant_of(db, secret), now) for secret in found])
            record(db, [_found_event(name, secret, now) for secret in found])
        for secret in found:
            _log.error("a secret nobody owns", extra={"fields": {"provider": name, "reference": secret.reference}})
        return len(found)

    def _end_what_is_gone(self, missing: Collection[Lease]) -> int:
        """Held, and not in the list any more. That the provider forgot it is not its death: it is owed to its end."""
        gone = 0
        for lease in missing:
            if lease.grant_id is None:
                continue
            with self._database.begin() as db:
                now = self._clock()
                why = f"{lease.provider} does not know its secret any more"
                event = change_of(now, ACTOR, "grant.revoked", reason=why)
                values = {"revoked_at": now, "revoked_by": ACTOR, "reason": why}
                # What ended by itself just now is the sweep's.
                of_it = (grants.with_id(lease.grant_id), grants.unexpired(now))
                if not end_grants(
                    db, GrantState.REVOKED, *of_it, now=now, urgency=Urgency.URGENT, event=event, **values
                ):
                    continue
                leases.note(db, lease.id, unknown=True, settles_at=now)
                record(db, [_gone_event(lease, why, now)])
            _log.error("a held secret is gone", extra={"fields": {"lease_id": lease.id, "provider": lease.provider}})
            gone += 1
        return gone


def _grant_of(db: Connection, secret: LiveSecret) -> str | None:
    """The grant it says it belongs to, if there is such a row."""
    if secret.grant_id is None or grants.find_grant(db, secret.grant_id) is None:
        return None
    return secret.grant_id


def _debt(name: str, secret: LiveSecret, grant_id: str | None, now: datetime) -> Lease:
    ends_at = secret.expires_at
    if ends_at is None or (secret.revocation is not RevocationClass.HARD and ends_at <= now):
        # What is being revoked there says that it ends now, and what cannot be revoked does not.
        ends_at = now + _LONGEST
    return Lease(
        id=new_id("lea", now),
        grant_id=grant_id,
        provider=name,
        settings={},
        state=LeaseState.REVOKING,
        revocation_class=None if secret.revocation is None else str(secret.revocation),
        bound_s=None if secret.bound is None else int(secret.bound.total_seconds()),
        reference=secret.reference,
        created_at=now,
        issue_by=now,
        expires_at=ends_at,
        urgency=int(Urgency.URGENT),
        next_attempt_at=now,
    )


def _found_event(name: str, secret: LiveSecret, now: datetime) -> Event:
    return Event(
        id=new_id("evt", now),
        at=now,
        type="lease.found",
        actor=ACTOR,
        outcome="orphan",
        grant_id=secret.grant_id,
        reason="alive outside, and no row accounted for it",
        data={"provider": name, "reference": secret.reference, "trouble": secret.trouble},
    )


def _login_event(target: str, login: Login, now: datetime) -> Event:
    return Event(
        id=new_id("evt", now),
        at=now,
        type="login.found",
        actor=ACTOR,
        outcome="orphan",
        grant_id=login.grant_id,
        reason="alive at the database, and no lease accounted for it",
        data={"target": target, "login": login.name, "sessions": login.sessions},
    )


def _gone_event(lease: Lease, why: str, now: datetime) -> Event:
    return Event(
        id=new_id("evt", now),
        at=now,
        type="lease.gone",
        actor=ACTOR,
        outcome="gone",
        grant_id=lease.grant_id,
        reason=why,
        data={"lease_id": lease.id, "provider": lease.provider, "reference": lease.reference},
    )
