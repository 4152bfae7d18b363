"""Ending what was made for a grant: its token, so that nothing more is read; its lease, at once; then a look at both.

Only a look confirms (INV-04): that a step was done says Vault before it is; and only a look that is no older than the
making of what it is about. Of many, the leases are first left to Vault's queue, which has them since their tokens died,
where lists of that age tell what it has ended. Otherwise, and for what is left, each lease is revoked, which reaches
the active node whatever node answers a look.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from broker.domain.errors import ProviderRefused, ProviderUnavailable
from broker.providers.base import AtOnce, Handle
from broker.providers.vault.calls import Calls, path_of_lease
from broker.providers.vault.connection import Behind

_log = logging.getLogger(__name__)

# Between look-ups while Vault's own queue works on what we revoked; together less than a caller waits for a receipt.
CONFIRM_PAUSES_S = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
QUEUE_PAUSE_S = 0.02
QUEUE_FRUITLESS = 5  # lists one after the other that confirm nobody: the queue is busy with others, or stuck

# How much may live under a prefix for a list of it to cost less than asking about each.
WORTH_LISTING = 1000
SLOW_S = 1.0
SPARED = 100  # times as long as one took that does not, it is not asked for again
LONG_FOR_S = 300.0  # nor so long one that failed
_FEW = 16  # cost less to revoke than lists to wait for

# Several are given up together when Vault is so slow, so that whoever claimed them still has the claim.
MANY_S = 10.0
_TOO_SLOW = "Vault answers too slowly to be asked about every one of many"


@dataclass
class Dying:
    """What is being ended. `handle` is None where there is no token, or none any more."""

    handle: Handle | None
    reference: str | None
    since: str | None = None  # an index at which it was there already, or had been
    problems: list[str] = field(default_factory=list)  # of steps, which may have done no harm
    failure: Exception | None = None
    is_dead: bool = False

    @property
    def is_left(self) -> bool:
        return self.failure is None and not self.is_dead

    @property
    def is_a_lease_alone(self) -> bool:
        """Whether all that was asked of Vault was done, as it says, and a look at the lease is all that is left."""
        return self.is_left and self.handle is None and self.reference is not None and not self.problems


class Ending:
    """`pause` waits so many seconds."""

    def __init__(self, calls: Calls, pause: Callable[[float], object] | None = None) -> None:
        self._calls = calls
        self._pause = pause or threading.Event().wait
        self._long: dict[str, float] = {}  # prefixes that are not worth listing, and until when

    def of(self, handle: Handle | None, reference: str | None) -> None:
        """End one; ProviderUnavailable where Vault does not confirm both dead."""
        one = Dying(handle, reference)
        self._end_token(one)
        self._end_lease(one)
        self._confirm(one)

    def of_many(
        self, owed: Sequence[tuple[Handle | None, str | None]], at_once: AtOnce = map
    ) -> Sequence[Exception | None]:
        """End each; answers for each in order None, or why it is not confirmed dead. Steps are taken by `at_once`."""
        began = time.monotonic()
        # Each step has a part of the time, or a slow Vault is asked to end all of them and about none whether it did.
        until_tokens, until_looks, until_leases = (began + MANY_S * part / 4 for part in (1, 2, 3))
        dying = [Dying(handle, reference) for handle, reference in owed]
        self._each(dying, until_tokens, self._end_token, at_once)
        since = _agreed(dying)
        if since is not None:
            self._each(dying, until_looks, self._look_at_token, at_once, or_later=True)
            if len(dying) > _FEW:
                self._wait_for_queue(dying, until_leases, since)
        self._each(dying, until_leases, self._end_lease, at_once, by_queue=True)
        if since is None:
            # Not before: a node that knew of no token may be one that is behind, and the leases may have told how far.
            since = _agreed(dying)
            self._each(dying, until_leases, self._look_at_token, at_once, or_later=True)
        self._look_at_lists(dying, until_leases, since)
        # Where a list took its time, some is left for asking about each.
        ends_at = max(began + MANY_S, time.monotonic() + MANY_S / 4)
        self._each(dying, ends_at, self._confirm, at_once)
        return [one.failure for one in dying]

    def _each(
        self,
        dying: Sequence[Dying],
        ends_at: float,
        step: Callable[[Dying], None],
        at_once: AtOnce,
        *,
        or_later: bool = False,
        by_queue: bool = False,
    ) -> None:
        """The trouble of one is no other's; the first is always dealt with, so that some are however slow Vault is.

        `or_later`: a later step does the same for those for whom there is no time. `by_queue`: Vault's queue may do it,
        so that one looks all the same.
        """

        def deal_with(numbered: tuple[int, Dying]) -> None:
            number, one = numbered
            if not one.is_left:
                return
            try:
                if number == 0 or time.monotonic() <= ends_at:
                    step(one)
                elif by_queue:
                    one.problems.append(_TOO_SLOW)
                elif not or_later:
                    raise ProviderUnavailable(_TOO_SLOW)
            except (ProviderRefused, ProviderUnavailable, ValueError) as problem:
                one.failure = problem

        for _ in at_once(deal_with, enumerate(dying)):
            pass

    # --- Steps --------------------------------------------------------------------------------------------------------

    def _end_token(self, one: Dying) -> None:
        """Nothing more is read with it."""
        handle = one.handle
        if handle is not None:
            self._attempt(one, lambda: self._calls.revoke_accessor(handle.value))

    def _end_lease(self, one: Dying) -> None:
        """At once."""
        reference = one.reference
        if reference is not None:
            self._attempt(one, lambda: self._calls.revoke_lease(reference))

    def _attempt(self, one: Dying, step: Callable[[], str | None]) -> None:
        """What goes wrong must not keep the next step from being tried, and may be no harm."""
        try:
            index = step()
        except (ProviderRefused, ProviderUnavailable) as problem:
            one.problems.append(f"{problem.detail} ({problem.reason})" if problem.reason else problem.detail)
            _log.warning("a step of a revocation failed", extra={"fields": {"reason": one.problems[-1]}})
        else:
            # The first: a later step that had nothing left to do may have been answered by a node that is behind.
            one.since = one.since or index

    def _look_at_token(self, one: Dying) -> None:
        """No token is left to look at where it is certainly dead; what is not certain is asked again with the lease."""
        try:
            if one.handle is not None and self._calls.is_token_dead(one.handle.value, self._since(one)):
                one.handle = None
        except (ProviderRefused, ProviderUnavailable, ValueError):
            return

    def _wait_for_queue(self, dying: Sequence[Dying], ends_at: float, since: str) -> None:
        """While it gets on: what it ends needs no request of its own."""
        fruitless = 0
        while fruitless < QUEUE_FRUITLESS:
            left = _leases_alone(dying)
            if not self._look_at_lists(dying, ends_at, since):
                break
            now_left = _leases_alone(dying)
            if not now_left:
                break
            fruitless = 0 if now_left < left else fruitless + 1
            self._pause(QUEUE_PAUSE_S)

    def _since(self, one: Dying) -> str | None:
        """Where its own end told nothing, as where a step failed, it may still be that we made it."""
        return one.since or self._calls.made_at

    def _look_at_lists(self, dying: Sequence[Dying], ends_at: float, since: str | None) -> bool:
        """One look for many: what a list of what lives beside them leaves out is gone (INV-04).

        Answers whether there was such a list, so that one more may tell more. Only where there is nothing else to ask
        about; and a list without a name proves nothing, because it is a 404, which something on the way may say too.
        """
        told = False
        left = {one.reference: one for one in dying if one.reference is not None and one.is_a_lease_alone}
        for prefix in {reference.rpartition("/")[0] for reference in left}:
            listed = () if self._is_long(prefix) or time.monotonic() > ends_at else self._listed(prefix, since)
            told |= bool(listed)
            for reference, one in left.items():
                if listed and reference.rpartition("/")[0] == prefix and reference not in listed:
                    one.is_dead = True
        return told

    def _listed(self, prefix: str, since: str | None) -> Collection[str]:
        """What Vault lists under a prefix, or nothing; where that fails or takes long, it is not asked for a while."""
        began = time.monotonic()
        try:
            listed = set(self._calls.leases_under(f"{path_of_lease(prefix)}/", since, depth=0))
        except Behind:
            return ()
        except (ProviderRefused, ProviderUnavailable, ValueError) as problem:
            _log.info("the leases left were not listed", extra={"fields": {"kind": type(problem).__name__}})
            self._long[prefix] = time.monotonic() + LONG_FOR_S
            return ()
        took = time.monotonic() - began
        if len(listed) > WORTH_LISTING or took > SLOW_S:
            self._long[prefix] = time.monotonic() + SPARED * took
        return listed

    def _is_long(self, prefix: str) -> bool:
        """Whether listing it took longer, a while ago, than asking about each."""
        return time.monotonic() < self._long.get(prefix, 0.0)

    def _confirm(self, one: Dying) -> None:
        """Look until lease and token are gone."""
        # What a step could not do Vault's queue may yet do; but it will hardly, so the next debt is not kept waiting.
        pauses_s = CONFIRM_PAUSES_S[:3] if one.problems else CONFIRM_PAUSES_S
        alive: str | None = None
        for pause_s in (*pauses_s, None):
            try:
                alive = self._alive(one)
                # What is gone is gone, whatever went wrong on the way.
                if alive is None:
                    return
            except (ProviderRefused, ProviderUnavailable) as problem:
                if pause_s is None or not isinstance(problem, Behind):
                    reason = "; ".join([*one.problems, problem.reason or problem.detail])
                    raise ProviderUnavailable("Vault did not say whether it died", reason=reason) from None
            if pause_s is not None:
                self._pause(pause_s)
        raise ProviderUnavailable(f"Vault has not confirmed that {alive} died", reason="; ".join(one.problems) or None)

    def _alive(self, one: Dying) -> str | None:
        """What of it Vault still knows; the lease is asked about first, and while it is there nothing else."""
        if one.reference is not None and self._calls.lease(one.reference, self._since(one)) is not None:
            return "the lease"
        if one.handle is not None and not self._calls.is_token_dead(one.handle.value, self._since(one)):
            return "the token"
        return None


def _leases_alone(dying: Sequence[Dying]) -> int:
    return sum(one.is_a_lease_alone for one in dying)


def _agreed(dying: Sequence[Dying]) -> str | None:
    """An index that any of them was told is good for all: all that is owed was made before the first was ended."""
    since = next((one.since for one in dying if one.since), None)
    for one in dying:
        one.since = one.since or since
    return since
