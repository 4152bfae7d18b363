"""From an intent to a secret in the agent's hand, with nothing ever alive that no row accounts for (INV-02, INV-03).

::

    issuance    intent: grant approved, lease intended       TX 1
                provider.prepare -> handle                   outside
                the handle is committed                      TX 2
                provider.issue -> secret                     outside
                lease held and grant active                  TX 3, both or nothing
                handed out

Whatever fails or never answers between two of them leaves a row that says what may exist, and `broker.services.debts`
pays it. An outcome that nobody heard counts as "not done" for handing out and as "done" for cleaning up (INV-05).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from broker.domain.clock import Clock
from broker.domain.errors import (
    BrokerError,
    Conflict,
    Invalid,
    LockedDown,
    ProviderRefused,
    ProviderUnavailable,
    Unavailable,
)
from broker.domain.grant import DynamicSecret, Grant, Issued
from broker.domain.identity import Caller, GrantId, new_id
from broker.domain.lease import Lease, RevocationClass, Urgency
from broker.domain.lifecycle import GrantState, LeaseState
from broker.providers.base import Handle, IssuedSecret, Provider, SecretRequest, require_foreseeable
from broker.services.endings import end_grants, end_with_descendants, lease_event
from broker.services.grant_events import grant_event
from broker.services.reconciliation import Reconciliation
from broker.services.standing import StandingReader
from broker.store import gate, grants, leases, locks, models
from broker.store.database import Database
from broker.store.tasks import Tasks
from broker.store.transitions import change_of, move, record, recorded_together

# Longer than every deadline of one issue together: then its issuer is taken for dead.
ISSUE_WITHIN = timedelta(seconds=60)
_AT_ONCE = 24  # of the server's threads, some are always left for what ends authority (INV-27)
_PATIENCE_S = 5
_OUTLASTED = "getting this credential took longer than it would have lived: try again"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Intent:
    """What TX 1 committed, and what has to be done about it."""

    grant: Grant
    lease: Lease
    caller: Caller
    catalogue_version: int
    longest: timedelta  # that anything of this resource lives, whatever was asked for
    parameters: Mapping[str, str] = field(default_factory=dict, repr=False)


class Secrets:
    def __init__(
        self,
        *,
        database: Database,
        standing: StandingReader,
        providers: Mapping[str, Provider],
        reconciliation: Reconciliation,
        clock: Clock,
    ) -> None:
        self._database = database
        self._standing = standing
        self._providers = providers
        self._reconciliation = reconciliation
        self._clock = clock
        self._tasks = Tasks()
        self._room = threading.BoundedSemaphore(_AT_ONCE)

    def require_foreseeable(self, grant: Grant, settings: Mapping[str, Any], parameters: Mapping[str, str]) -> None:
        """Before there is an intent: what the outside need not be asked about is not begun."""
        request = SecretRequest(grant_id=GrantId(grant.id), settings=settings, parameters=parameters)
        provider = self._provider(grant)
        try:
            require_foreseeable(provider, request, timedelta(seconds=grant.ttl_s))
        except BrokerError:
            raise
        except Exception as fault:
            # It is decided together with requests of others, which its fault is not to fail.
            _log.exception("a request was not foreseen", extra={"fields": {"grant_id": grant.id}})
            raise Unavailable("the broker could not get this credential: try again") from fault

    def obtain(self, intent: Intent) -> Issued:
        """The secret of a committed intent, or why there is none. After a failure the lease is owed or released."""
        made = _Made()
        try:
            with self._place():
                provider = self._provider(intent.grant)
                request = SecretRequest(
                    grant_id=GrantId(intent.grant.id), settings=intent.lease.settings, parameters=intent.parameters
                )
                made.late = provider.settles_after
                handle = made.handle = provider.prepare(request, self._left(intent))
                self._commit_handle(intent, handle, made.late)
                made.asked_at, made.unknown = self._clock(), True
                secret = provider.issue(handle, request, self._left(intent))
                made.reference, made.unknown = secret.reference, False
                made.expires_at = secret.lasts_until or secret.expires_at
            return self._confirm(intent, secret, str(handle.revocation))
        except BrokerError as problem:
            made.learn(problem)
            self._give_up(intent, made, problem)
            raise
        except Exception as problem:
            _log.exception("a secret was not issued", extra={"fields": {"grant_id": intent.grant.id}})
            fault = Unavailable("the broker could not get this credential: try again")
            self._give_up(intent, made, fault)
            raise fault from problem

    @contextmanager
    def _place(self) -> Iterator[None]:
        if not self._room.acquire(timeout=_PATIENCE_S):
            raise Unavailable(f"{_AT_ONCE} credentials are being fetched already: try again")
        try:
            yield
        finally:
            self._room.release()

    def _provider(self, grant: Grant) -> Provider:
        provider = self._providers.get(grant.provider)
        if provider is None:
            raise Unavailable(f"this broker has no provider {grant.provider!r}: ask its administrator")
        return provider

    def _left(self, intent: Intent) -> timedelta:
        """What is left of the grant; nothing outlives it (INV-08)."""
        left = intent.grant.expires_at - self._clock()
        if left <= timedelta(0):
            raise Unavailable(_OUTLASTED)
        return left

    def _commit_handle(self, intent: Intent, handle: Handle, late: timedelta) -> None:
        """TX 2: what revokes it is durable before it exists (INV-02). `late` is how long it may then take to appear."""
        with self._database.begin_issuing() as db:
            mine = leases.note(
                db,
                intent.lease.id,
                leases.in_state(LeaseState.INTENDED),
                handle=handle.value,
                revocation_class=str(handle.revocation),
                bound_s=None if handle.bound is None else int(handle.bound.total_seconds()),
                # From here on it may be asked for, whether or not we live to hear of it.
                unknown=True,
                # Its life begins as late as it may be made, and may be the longest there is: what its provider forgot
                # ends with nothing that was asked for, a user of a database by its own VALID UNTIL (INV-04).
                expires_at=max(handle.expires_at, intent.grant.expires_at, self._clock() + intent.longest) + late,
            )
        if not mine:
            raise Conflict(f"grant {intent.grant.id} was ended while its credential was being made")

    def _confirm(self, intent: Intent, secret: IssuedSecret, revocation_class: str) -> Issued:
        """TX 3: lease and grant together, behind the lock of the task; then it may leave (INV-01, INV-12)."""
        grant, lease = intent.grant, intent.lease
        with self._database.begin_issuing() as db:
            locks.hold_for_issuing(db, agents=(), tasks=[grant.task_id])
            now = self._clock()
            standing = self._standing.at(db, gate.era_of(db))
            task = self._tasks.hold_shared(db, [grant.task_id])[grant.task_id]
            refusal = standing.refusals.over(grant)
            if refusal is not None:
                raise LockedDown(
                    f"grant {grant.id} was ended meanwhile, along {refusal.axis} {refusal.value!r}: {refusal.reason}"
                )
            # Once more: that the provider went back in time may have shown while it was asked (INV-37).
            self._reconciliation.require_reconciled(db, grant.provider, now)
            if standing.catalogue.version != intent.catalogue_version:
                # What it was decided by is not what stands now (INV-14).
                raise Unavailable("the configuration changed while this credential was being made: try again")
            if secret.expires_at - now < timedelta(seconds=1):
                raise Unavailable(_OUTLASTED)
            told = replace(grant, state=GrantState.ACTIVE, issued_at=now, credential_sha256=secret.data.sha256())
            with recorded_together(db):
                # The grant before its lease, as whoever ends it takes them: so no two wait for each other.
                active = move(
                    db,
                    models.Grant,
                    GrantState.ACTIVE,
                    grants.with_id(grant.id),
                    grants.unexpired(now),
                    event=lambda _row: grant_event(told, intent.caller, now, "grant.issued", lease_id=lease.id),
                    returning=("expires_at",),
                    issued_at=now,
                    # Of what the row says by now: a ceiling may have shrunk while the provider was asked (INV-10).
                    expires_at=grants.at_the_latest(secret.expires_at),
                    credential_sha256=told.credential_sha256,
                )
                held = move(
                    db,
                    models.Lease,
                    LeaseState.HELD,
                    leases.with_id(lease.id),
                    event=lease_event(
                        now,
                        "lease.held",
                        task_id=grant.task_id,
                        trace_id=intent.caller.trace_id,
                        data={"facts": dict(secret.facts)},
                    ),
                    returning=leases.LEASE_FACTS,
                    reference=secret.reference,
                    facts=dict(secret.facts),
                    unknown=False,
                    expires_at=secret.lasts_until or secret.expires_at,
                )
            if not (held and active and task.is_open(now)):
                # Rolled back: neither moves without the other.
                raise Conflict(f"grant {grant.id} was ended while its credential was being made")
        [row] = active
        engine = intent.lease.settings.get("engine")
        kind = engine if isinstance(engine, str) else grant.provider
        credential = DynamicSecret(type=kind, data=secret.data, expires_at=row.expires_at)
        lease = replace(lease, state=LeaseState.HELD, revocation_class=revocation_class)
        return Issued(grant=replace(told, expires_at=row.expires_at), credential=credential, lease=lease)

    def _give_up(self, intent: Intent, made: _Made, problem: BrokerError) -> None:
        """End the grant and owe whatever may exist. What arrives after its lease was released is a debt of its own."""
        reason = getattr(problem, "reason", None) or problem.detail
        caller, lease_id = intent.caller, intent.lease.id
        try:
            with self._database.begin() as db:
                now = self._clock()
                known = made.known(intent)
                of_it = grants.with_id(intent.grant.id)
                said = {"outcome": problem.code, "reason": reason[:1000], "trace_id": caller.trace_id}
                failed = change_of(now, caller.name, "grant.failed", **said)
                if not end_grants(db, GrantState.FAILED, of_it, now=now, urgency=Urgency.URGENT, event=failed):
                    # Confirmed, and we did not hear that it was (INV-05).
                    why = "its issuing was not confirmed"
                    revoked = change_of(now, caller.name, "grant.revoked", reason=why, trace_id=caller.trace_id)
                    values = {"revoked_at": now, "revoked_by": caller.name, "reason": why}
                    end_with_descendants(db, of_it, now=now, urgency=Urgency.URGENT, event=revoked, **values)
                if not leases.learn(db, lease_id, next_attempt_at=now, **known) and made.exists:
                    late = replace(
                        intent.lease,
                        id=new_id("lea", now),
                        state=LeaseState.REVOKING,
                        urgency=int(Urgency.URGENT),
                        created_at=now,
                        next_attempt_at=now,
                        **known,
                    )
                    leases.insert_leases(db, [late])
                    record(db, [lease_event(now, "lease.owed", reason="it arrived late")(late)])
        except BrokerError as trouble:
            # The intent is durable, and recovery takes it up when its time is over.
            _log.error("an issue was not given up", extra={"fields": {"lease_id": lease_id, "why": trouble.detail}})


@dataclass(kw_only=True)
class _Made:
    """What one issue knows of what it made, so far."""

    handle: Handle | None = None
    late: timedelta = timedelta(0)  # how long after it was asked for a secret may be made that nobody heard of
    asked_at: datetime | None = None  # for the secret, and not refused: it exists, or may
    reference: str | None = None
    expires_at: datetime | None = None
    unknown: bool = False

    @property
    def exists(self) -> bool:
        return self.handle is not None

    def learn(self, problem: BrokerError) -> None:
        """What a failure says about it: a refusal that there is no secret, everything else nothing (INV-05)."""
        if isinstance(problem, ProviderRefused | Invalid):
            self.asked_at, self.unknown = None, False
        elif isinstance(problem, ProviderUnavailable):
            # How long it lives is known even where it has no name, and nothing calls it dead before.
            self.expires_at = problem.expires_at
            if problem.reference is not None:
                self.reference, self.unknown = problem.reference, False

    def known(self, intent: Intent) -> dict[str, Any]:
        found: dict[str, Any] = {"unknown": self.unknown}
        if self.handle is not None:
            asked = self.asked_at is not None
            bound = self.handle.bound if asked else None
            longest = None if self.asked_at is None or not self.unknown else self.asked_at + intent.longest
            ends_at = max(filter(None, (self.handle.expires_at, self.expires_at, intent.grant.expires_at, longest)))
            found |= {
                "handle": self.handle.value,
                # Without a secret there is the handle alone, which is dead when it is confirmed.
                "revocation_class": str(self.handle.revocation if asked else RevocationClass.HARD),
                "bound_s": None if bound is None else int(bound.total_seconds()),
                "expires_at": ends_at + self.late if self.unknown else ends_at,
            }
        if self.reference is not None:
            found["reference"] = self.reference
        return found


def intended_lease(grant: Grant, settings: Mapping[str, Any], now: datetime) -> Lease:
    """What TX 1 writes beside an approved grant: something may be made from here on, and nothing is yet."""
    return Lease(
        id=new_id("lea", now),
        grant_id=grant.id,
        provider=grant.provider,
        settings=settings,
        state=LeaseState.INTENDED,
        created_at=now,
        issue_by=now + ISSUE_WITHIN,
        expires_at=grant.expires_at,
        urgency=int(Urgency.EXPIRED),
    )
