"""Paying what is owed outside: claim, ask the provider, confirm, release; or back off, and tell somebody.

Each step is its own short transaction and no provider is called inside one. A debt is claimed by a fence, so that
of two workers only the last to claim it may say what came of it (INV-07); asking the outside twice is harmless. The
most urgent come first, always: some workers pay nothing else, so that no backlog and no slow Vault is before them.
Each provider has its own workers: one that hangs keeps nobody waiting for another.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row

from broker import telemetry
from broker.domain.clock import Clock
from broker.domain.errors import BrokerError, Unavailable
from broker.domain.lease import STUCK_AFTER, Lease, RevocationClass, Urgency, dead_at, next_attempt
from broker.domain.lifecycle import GrantState, LeaseState
from broker.providers.base import AtOnce, Handle, Provider, revoke_each
from broker.providers.targets import Logins
from broker.services.endings import ACTOR, end_grants, lease_event
from broker.services.reconciliation import OLD_ENOUGH
from broker.store import grants, leases, models
from broker.store.database import Database
from broker.store.transitions import change_of, move

# Who claimed a debt and was killed keeps it so long; asking twice does no harm, so it need not be longer.
_CLAIMED_FOR = timedelta(seconds=20)
_CLAIMED_AGAIN_S = 8.0  # while its provider is asked
_WORKERS = 8  # at one provider at once, for what is paid in its turn
_URGENT_WORKERS = 2  # of them, for nothing but what is urgent
_CLOSING_WORKERS = 8  # for what somebody is waiting for just now
_CLOSING_CALLS = 24  # that help them, all together
_CLOSING_S = 2.0
_TOGETHER = 16  # claimed by one worker at once
_CLOSERS = 4  # of one task: some record what died while others ask
_CLOSED_TOGETHER = (8, 50)  # claimed by each: at least, and at most
_INTENTS_AT_ONCE = 100
_ABANDONED_EVERY = timedelta(hours=1)
_LOOK_AGAIN = timedelta(seconds=5)

_log = logging.getLogger(__name__)


class Debts:
    """`providers` by the name that a resource's `provider` says."""

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
        self._guard = threading.Lock()
        self._lanes: dict[str, _Lane] = {}
        self._stopped = threading.Event()
        self._closed = threading.Event()

    def stop(self) -> None:
        """Claim nothing more in its turn; for somebody who waits, as long as requests are answered, until `close`.

        What is under way ends by the deadlines of its calls, and what is owed is in rows.
        """
        # Whoever pays until nothing is due goes on for as long as a backlog lasts, and a process waits for its threads.
        self._stopped.set()

    def close(self) -> None:
        """The same, and nobody who waits is served any more; back when what is under way has ended.

        Before the database is closed: a connection that comes back later is nobody's, and stays open.
        """
        self.stop()
        with self._guard:
            # From here on nobody is set to work: whoever was before is waited for.
            self._closed.set()
        for lane in self._lanes.values():
            lane.close()

    # --- What becomes a debt without anybody ending it ----------------------------------------------------------------

    def recover(self) -> int:
        """Intents whose issuer neither confirmed nor gave up in time: it is taken for dead, and what it may have made
        is owed. If it lives and is only slow, its confirmation finds the lease gone on (INV-07)."""
        now = self._clock()
        with self._database.read() as db:
            if not leases.abandoned_intents(db, now=now, limit=1):
                return 0
        with self._database.begin() as db:
            found = leases.abandoned_intents(db, now=now, limit=_INTENTS_AT_ONCE)
            of_found = grants.with_ids([lease.grant_id for lease in found if lease.grant_id is not None])
            # One that another transaction holds is being confirmed or ended there; the next run sees what came of it.
            of_them = grants.claimed(of_found, limit=_INTENTS_AT_ONCE)
            event = change_of(now, ACTOR, "grant.failed", reason="its issuer did not come back")
            moved = end_grants(db, GrantState.FAILED, of_them, now=now, urgency=Urgency.URGENT, event=event)
        return len(moved)

    # --- Paying -------------------------------------------------------------------------------------------------------

    def begin_to_pay(self) -> list[Future[int]]:
        """Begin with everything that is due at providers that are not being paid already; each answers how much it was.

        What falls due at the others meanwhile is found by those who pay them.
        """
        if self._stopped.is_set():
            return []
        with self._database.read() as db:
            owed = leases.providers_owed(db)
            due = [provider for provider in owed if leases.any_owed(db, provider, now=self._clock())]
        with self._guard:
            if self._closed.is_set():
                return []
            begun = [self._lane(provider).begin(self._pay_until_none, self._pay_urgent) for provider in due]
        return [paying for paying in begun if paying is not None]

    def pay(self) -> int:
        """The same, and wait until it is paid; answers how many were released."""
        return _sum_of(self.begin_to_pay())

    def pay_now(self, grant_ids: Collection[str]) -> None:
        """Pay what is owed for these grants, as much as can be in the time somebody waits for a receipt."""
        if not grant_ids or self._closed.is_set():
            return
        ends_at = time.monotonic() + _CLOSING_S
        with self._database.read() as db:
            owed = leases.providers_owed_for(db, grant_ids)
        least, most = _CLOSED_TOGETHER
        together = min(most, max(least, math.ceil(len(grant_ids) / _CLOSERS)))
        pay = functools.partial(self._pay_until_none, grant_ids=tuple(grant_ids), ends_at=ends_at, together=together)
        with self._guard:
            if self._closed.is_set():
                return
            lanes = [self._lane(provider) for provider in owed]
            running = [
                lane.closings.submit(pay, lane.provider, at_once=lane.at_once)
                for lane in lanes
                for _ in range(min(_CLOSERS, math.ceil(len(grant_ids) / together)))
            ]
        done, _ = wait(running, timeout=_CLOSING_S)
        for future in done:
            problem = future.exception()
            if problem is not None:
                # The authority has ended; what is owed is in rows, and the receipt says that it is owed.
                _log.warning("a closing was not paid at once", exc_info=problem)

    def _lane(self, provider: str) -> _Lane:
        """Of whoever holds the guard."""
        lane = self._lanes.get(provider)
        if lane is None:
            lane = self._lanes[provider] = _Lane(provider)
        return lane

    def _pay_urgent(self, provider: str, turns_over: threading.Event) -> int:
        paid = 0
        over = False
        while not over:
            try:
                paid += self._pay_until_none(provider, at_most_urgency=Urgency.URGENT)
            except BrokerError as problem:
                # The others may be at it for hours, and until they are done nobody comes instead of this one.
                _log.warning("urgent debts were not paid", extra={"fields": {"why": problem.detail}})
            over = turns_over.wait(0.25)
        return paid

    def _pay_until_none(
        self,
        provider: str,
        grant_ids: Collection[str] = (),
        ends_at: float | None = None,
        at_most_urgency: Urgency = Urgency.EXPIRED,
        together: int | None = None,
        at_once: AtOnce = map,
    ) -> int:
        paid = 0
        while not self._stopped.is_set() if ends_at is None else time.monotonic() < ends_at:
            now = self._clock()
            with self._database.begin() as db:
                claimed = leases.claim_owed(
                    db,
                    provider,
                    now=now,
                    again_at=now + _CLAIMED_FOR,
                    limit=together or _TOGETHER,
                    at_most_urgency=int(at_most_urgency),
                    grants=grant_ids,
                )
            if not claimed:
                break
            paid += self._pay_claimed(provider, claimed, at_once)
        return paid

    def _pay_claimed(self, provider: str, claimed: Sequence[Lease], at_once: AtOnce) -> int:
        """Answers how many of them were released."""
        died: dict[datetime, list[Lease]] = {}
        answers = list(self._asked_for(provider, claimed, at_once))
        # One moment for all that were confirmed by then: they are released together.
        confirmed_at = self._clock()
        for lease, problem in answers:
            try:
                if problem is not None:
                    raise problem
                died_at = self._died_at(lease, confirmed_at)
            except BrokerError as refusal:
                self._failed(lease, getattr(refusal, "reason", None) or refusal.detail)
            except Exception as fault:
                # A row that cannot be understood, or a provider with a fault: this debt's trouble, and nobody else's.
                _log.exception("a debt could not be paid", extra={"fields": {"lease_id": lease.id}})
                self._failed(lease, f"{type(fault).__name__}: see the broker's log")
            else:
                if died_at is not None:
                    died.setdefault(died_at, []).append(lease)
        return self._release(died)

    def _asked_for(
        self, name: str, claimed: Sequence[Lease], at_once: AtOnce
    ) -> Iterator[tuple[Lease, Exception | None]]:
        """Each with what its provider says of its end; those that need nobody to be asked with nothing."""
        owed: list[tuple[Lease, Handle | None]] = []
        for lease in claimed:
            if lease.dead_at is not None or (lease.handle is None and lease.reference is None):
                yield lease, None
                continue
            try:
                owed.append((lease, None if lease.handle is None else _handle_of(lease, lease.handle)))
            except ValueError as fault:
                yield lease, fault
        if not owed:
            return
        provider = self._providers.get(name)
        if provider is None:
            missing = Unavailable(f"no provider {name!r} is configured, and a lease is owed to it")
            yield from ((lease, missing) for lease, _ in owed)
            return
        with self._kept([lease for lease, _ in owed]):
            answers = revoke_each(provider, [(handle, lease.reference) for lease, handle in owed], at_once)
        yield from ((lease, answer) for (lease, _), answer in zip(owed, answers, strict=True))

    @contextmanager
    def _kept(self, claimed: Sequence[Lease]) -> Iterator[None]:
        """Keep the claim on them for as long as this takes, and no longer than this process lives.

        Otherwise a provider that answers more slowly than claims last is asked by one worker after the other, and none
        of them may say what came of it.
        """
        over = threading.Event()

        def keep() -> None:
            while not over.wait(_CLAIMED_AGAIN_S):
                try:
                    with self._database.begin() as db:
                        again_at = self._clock() + _CLAIMED_FOR
                        for lease in claimed:
                            leases.note(db, lease.id, leases.claimed_by(lease.fence), next_attempt_at=again_at)
                except BrokerError as problem:
                    _log.warning("a claim was not kept", extra={"fields": {"why": problem.detail}})

        keeper = threading.Thread(target=keep, name="claims", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            over.set()
            keeper.join()

    def _died_at(self, lease: Lease, now: datetime) -> datetime | None:
        """When its credential died, whose end is confirmed now; None while only time is waited for, which is noted.

        INV-04: a secret nobody heard of may appear after its token died. So it is not dead before it could no longer
        appear, everything the provider lists was looked at since, and what it could have been has ended by itself.
        """
        if lease.dead_at is not None:
            return self._when_reached(lease, lease.dead_at)
        if lease.handle is None and lease.reference is None:
            # Nothing was ever asked for: what is asked for has a handle first (INV-02).
            return now
        if lease.unknown:
            settles_at = lease.settles_at or now + self._providers[lease.provider].settles_after
            if now < settles_at:
                self._wait(lease, settles_at, settles_at=settles_at)
                return None
            if not self._was_looked_at_since(lease.provider, settles_at + OLD_ENOUGH):
                self._wait(lease, now + _LOOK_AGAIN)
                return None
            if self._is_ended_at_target(lease):
                return self._clock()
            return self._when_reached(lease, max(now, lease.expires_at))
        return self._when_reached(lease, dead_at(lease, confirmed_at=now))

    def _is_ended_at_target(self, lease: Lease) -> bool:
        """Whether a look at the database itself showed, or made it so, that no login of its grant is left."""
        target = self._targets.get(str(lease.settings.get("target")))
        if target is None:
            return False
        for login in target.list_logins():
            if login.grant_id == lease.grant_id:
                target.end(login)
        return True

    def _was_looked_at_since(self, provider: str, moment: datetime) -> bool:
        with self._database.read() as db:
            look = leases.last_look(db, provider)
        return look is not None and look.began_at is not None and look.began_at >= moment

    def _when_reached(self, lease: Lease, died_at: datetime) -> datetime | None:
        if died_at <= self._clock():
            return died_at
        self._wait(lease, died_at, dead_at=died_at)
        return None

    def _wait(self, lease: Lease, until: datetime, **known: datetime) -> None:
        with self._database.begin() as db:
            values: dict[str, Any] = {"next_attempt_at": until, **known}
            leases.note(db, lease.id, leases.claimed_by(lease.fence), **values)

    def _release(self, died: Mapping[datetime, Sequence[Lease]]) -> int:
        """Answers how many; `died` are leases by the moment at which their credentials died."""
        if not died:
            return 0
        now = self._clock()
        with self._database.begin() as db:
            released = {died_at: self._released(db, of_then, died_at, now) for died_at, of_then in died.items()}
            since = leases.owed_since(db, [row.id for rows in released.values() for row in rows])
        for died_at, rows in released.items():
            for row in rows:
                telemetry.confirmed_dead(row.provider, (died_at - since[row.id]).total_seconds())
        return len(since)

    def _released(
        self, db: Connection, of_then: Sequence[Lease], died_at: datetime, now: datetime
    ) -> Sequence[Row[Any]]:
        return move(
            db,
            models.Lease,
            LeaseState.RELEASED,
            leases.as_they_were(of_then),
            event=lease_event(now, "lease.released", data={"dead_at": int(died_at.timestamp())}),
            returning=leases.LEASE_FACTS,
            dead_at=died_at,
            next_attempt_at=None,
            last_error=None,
        )

    def _failed(self, lease: Lease, why: str) -> None:
        now = self._clock()
        failures = lease.attempts + 1
        again_at = next_attempt(failures, now=now)
        if lease.abandoned_at is not None:
            again_at = now + _ABANDONED_EVERY
        values = {"attempts": failures, "last_error": why[:1000], "next_attempt_at": again_at}
        mine = (leases.with_id(lease.id), leases.claimed_by(lease.fence))
        _log.warning("a debt was not paid", extra={"fields": {"lease_id": lease.id, "attempts": failures, "why": why}})
        with self._database.begin() as db:
            if failures >= STUCK_AFTER and lease.state is LeaseState.REVOKING:
                event = lease_event(now, "lease.stuck", reason=why[:1000])
                move(db, models.Lease, LeaseState.STUCK, *mine, event=event, returning=leases.LEASE_FACTS, **values)
            else:
                leases.note(db, lease.id, leases.claimed_by(lease.fence), **values)


class _Lane:
    """Those who pay one provider, in its turn and for who waits."""

    def __init__(self, provider: str) -> None:
        self.provider = provider
        self.closings = ThreadPoolExecutor(_CLOSING_WORKERS, thread_name_prefix=f"closings {provider}")
        # Closings wait for these, and these for nobody.
        self._calls = ThreadPoolExecutor(_CLOSING_CALLS, thread_name_prefix=f"calls {provider}")
        # And one who sees to the others.
        self._turns = ThreadPoolExecutor(_WORKERS + 1, thread_name_prefix=f"debts {provider}")
        self._paying: Future[int] | None = None

    def at_once(self, step: Callable[[Any], Any], items: Iterable[Any]) -> Iterable[Any]:
        """As `map`, with the help of those who have time.

        They begin with the first, and whoever asks with the last: it gets on however much the others have to do.
        """
        # Each in the context of whoever asks, by which a provider that is called in a transaction is found out.
        begun = [(item, self._calls.submit(copy_context().run, step, item)) for item in items]
        mine: dict[int, Any] = {}
        try:
            for place, (item, future) in reversed(list(enumerate(begun))):
                if future.cancel():
                    mine[place] = step(item)
            return [mine[place] if place in mine else future.result() for place, (_, future) in enumerate(begun)]
        finally:
            for _, future in begun:
                future.cancel()

    def begin(self, in_turn: Callable[[str], int], urgent: Callable[[str, threading.Event], int]) -> Future[int] | None:
        """Pay, unless it is being paid; None then."""
        if self._paying is not None and not self._paying.done():
            return None
        over = threading.Event()
        turns = [self._turns.submit(in_turn, self.provider) for _ in range(_WORKERS - _URGENT_WORKERS)]
        besides = [self._turns.submit(urgent, self.provider, over) for _ in range(_URGENT_WORKERS)]
        self._paying = self._turns.submit(self._see_to, turns, besides, over)
        return self._paying

    def _see_to(self, turns: Collection[Future[int]], besides: Collection[Future[int]], over: threading.Event) -> int:
        try:
            wait(turns)
            over.set()
            return _sum_of([*turns, *besides])
        except Exception as problem:
            # Said here: nobody waits for it but a test. What is owed is in rows, and the next run tries again.
            fields = {"provider": self.provider, "kind": type(problem).__name__}
            _log.warning("debts were not paid", extra={"fields": fields}, exc_info=problem)
            raise

    def close(self) -> None:
        for pool in (self._turns, self.closings, self._calls):
            pool.shutdown()


def _handle_of(lease: Lease, value: str) -> Handle:
    """The handle as it is read back: it revokes, and opens nothing."""
    return Handle(
        value=value,
        revocation=RevocationClass(lease.revocation_class or RevocationClass.TTL_ONLY),
        expires_at=lease.expires_at,
        bound=None if lease.bound_s is None else timedelta(seconds=lease.bound_s),
    )


def _sum_of(futures: Collection[Future[int]]) -> int:
    """What they all paid; the first problem of any, when all have had their turn."""
    return sum([future.result() for future in wait(futures).done])
