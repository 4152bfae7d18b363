"""Secrets of Vault: a child token for each grant, the secret read with it, and revocation that only a look-up ends.

The child token opens nothing but the brokered roles, is an orphan, cannot be renewed and dies with the grant; all its
leases die with it. Its accessor is the handle: committed by the caller before the secret exists (INV-02).
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from hvac.api.auth_methods import Token

from broker.domain.clock import LEEWAY, Clock
from broker.domain.errors import Invalid, ProviderRefused, ProviderUnavailable
from broker.domain.identity import is_id
from broker.domain.secret import Secret
from broker.providers.base import (
    Handle,
    IssuedSecret,
    LiveSecret,
    RevocationClass,
    SecretData,
    SecretRequest,
)
from broker.providers.vault.connection import Answer, Connection
from broker.providers.vault.login import Login
from broker.providers.vault.settings import COMPONENT, VaultSettings
from broker.providers.vault.sources import SecretSource, Wrong

_log = logging.getLogger(__name__)

# Vault gives a request at most 90 s (`default_max_request_duration`); what was past its token check when the token died
# may register a lease until then.
MAX_REQUEST = timedelta(seconds=90)
MARGIN = timedelta(seconds=30)

# Between look-ups while Vault's own queue works on what we revoked; together less than a caller waits for a receipt.
CONFIRM_PAUSES_S = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)

# How much may live under a prefix for a list of it to cost less than asking about each.
WORTH_LISTING = 1000
SLOW_S = 1.0
LONG_FOR_S = 300.0  # after which it is tried again

# Several are given up together when Vault is so slow, so that whoever claimed them still has the claim.
MANY_S = 10.0
_TOO_SLOW = "Vault answers too slowly to be asked about every one of many"

TRIAL_S = 30

_ACCESSOR = re.compile(r"[A-Za-z0-9][A-Za-z0-9.]{7,127}")
_LEASE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9.]{7,127}")
_MOST_DEPTH = 4


class VaultProvider:
    """One Vault. `sources` answers every role that may have live secrets, those of older configurations too.

    `forgotten` is told when Vault does not know the broker's own token any more: it may have gone back in time.
    """

    def __init__(
        self,
        settings: VaultSettings,
        clock: Clock,
        sources: Callable[[], Iterable[SecretSource]] = tuple,
        *,
        pause: Callable[[float], object] | None = None,
        forgotten: Callable[[], object] = lambda: None,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._sources = sources
        self._connection = Connection.of(settings)
        self._login = Login(self._connection, settings.auth, clock, forgotten=forgotten)
        self._pause = pause or threading.Event().wait
        self._long: dict[str, float] = {}  # prefixes that are not worth listing, and until when

    @property
    def settles_after(self) -> timedelta:
        return MAX_REQUEST + MARGIN

    def close(self) -> None:
        self._connection.close()

    def foresee(self, request: SecretRequest, ttl: timedelta) -> None:
        source = SecretSource.parse(request.settings)
        if source.least_to_ask is not None and ttl < source.least_to_ask:
            least = int(source.least_to_ask.total_seconds())
            raise Invalid(f"a credential of this resource lives at least {least} s: ask for more", member="ttl_s")
        source.checked(request.parameters)

    def prepare(self, request: SecretRequest, ttl: timedelta) -> Handle:
        """A child token for this grant: service, orphan, not renewable, with exactly the policies of its role."""
        if not is_id(request.grant_id, "grt"):
            raise ValueError("a grant's id is needed")
        seconds = _whole_seconds(ttl)
        source = SecretSource.parse(request.settings)
        if source.least_ttl is not None and ttl < source.least_ttl:
            raise ProviderRefused("what is left of the grant is less than this credential can live: ask for more")
        source.checked(request.parameters)
        role = source.token_role or self._settings.token_role
        child = self._child_token(role, request.grant_id, seconds)
        return replace(child, revocation=source.revocation, bound=source.bound)

    def issue(self, handle: Handle, request: SecretRequest, ttl: timedelta) -> IssuedSecret:
        """Read the secret with the handle's own token. Whatever goes wrong after Vault began is unknown."""
        if handle.opens is None:
            raise ValueError("a handle read back from a row issues nothing: its token is gone")
        source = SecretSource.parse(request.settings)
        sent = source.body(request.grant_id, request.parameters, timedelta(seconds=_whole_seconds(ttl)))
        began_at = self._clock()
        method, body = ("get", None) if source.reads else ("post", sent)
        answer = self._connection.call(method, source.path, token=handle.opens, body=body)
        if answer.status != 200 or answer.body is None:
            answer.fail("give the secret", source.path)
        reference = _reference(answer.body.get("lease_id"), source)
        ends_at = lasts_until = _lease_end(answer.body, began_at)
        try:
            received = source.shape(source, sent, answer.table("data"))
            ends = [end for end in (ends_at, received.ends_at) if end is not None]
            lasts_until = max(ends, default=None)
            if source.leases and reference is None:
                raise Wrong("it has no lease under the prefix of its role, so that nothing could revoke it")
            if lasts_until is None or (source.leases and ends_at is None):
                raise Wrong("it does not say when it ends")
            # Where the token's death ends the secret, its lease may well be longer. Where nothing does, it may not, and
            # it is over when the last of what keeps it alive is: the certificate, whatever becomes of its lease.
            ends_at = min(*ends, handle.expires_at) if source.revocation is RevocationClass.HARD else lasts_until
            if source.revocation is not RevocationClass.HARD and ends_at > began_at + ttl + LEEWAY:
                raise Wrong("it lives longer than was asked for, and nothing can end it")
        except Wrong as problem:
            raise ProviderUnavailable(
                f"Vault gave a secret that must not be used: {problem}",
                reason=source.path,
                reference=reference,
                expires_at=lasts_until,
            ) from None
        return IssuedSecret(
            data=SecretData(received.data),
            reference=reference,
            expires_at=ends_at,
            lasts_until=lasts_until,
            facts=received.facts,
        )

    def revoke(self, handle: Handle | None, reference: str | None) -> None:
        """The accessor first, so that nothing more is read; then the lease at once; then look until both are gone."""
        self._confirm(handle, reference, [*self._end_token(handle), *self._end_lease(reference)])

    def revoke_many(self, owed: Sequence[tuple[Handle | None, str | None]]) -> Sequence[Exception | None]:
        """All tokens first, so that their leases are in Vault's queue; then each lease at once; then a look at all."""
        began = time.monotonic()
        # Each step has a part of the time, or a slow Vault is asked to end all of them and about none whether it did.
        until_tokens, until_looks, until_leases = (began + MANY_S * part / 4 for part in (1, 2, 3))
        dying = [_Dying(handle, reference) for handle, reference in owed]
        self._each(dying, until_tokens, lambda one: one.problems.extend(self._end_token(one.handle)))
        for one in dying:
            if one.failure is None and time.monotonic() <= until_looks and self._is_without_token(one.handle):
                one.handle = None
        self._each(dying, until_leases, lambda one: one.problems.extend(self._end_lease(one.reference)), by_queue=True)
        self._look_at_lists(dying, until_leases)
        # Where a list took its time, some is left for asking about each.
        ends_at = max(began + MANY_S, time.monotonic() + MANY_S / 4)
        self._each(dying, ends_at, lambda one: self._confirm(one.handle, one.reference, one.problems))
        return [one.failure for one in dying]

    def _each(
        self, dying: Sequence[_Dying], ends_at: float, step: Callable[[_Dying], None], *, by_queue: bool = False
    ) -> None:
        """The trouble of one is no other's; the first is always dealt with, so that some are however slow Vault is.

        `by_queue`: where there is no time for it, Vault's queue may yet do the same, so that one looks all the same.
        """
        for number, one in enumerate(dying):
            if one.failure is not None or one.is_dead:
                continue
            try:
                if number == 0 or time.monotonic() <= ends_at:
                    step(one)
                elif by_queue:
                    one.problems.append(_TOO_SLOW)
                else:
                    raise ProviderUnavailable(_TOO_SLOW)
            except (ProviderRefused, ProviderUnavailable, ValueError) as problem:
                one.failure = problem

    def _look_at_lists(self, dying: Sequence[_Dying], ends_at: float) -> None:
        """One look for many: what a list of what lives beside them leaves out is gone (INV-04).

        Only where there is nothing else to ask about; and a list without a name proves nothing, because it is a 404,
        which something on the way may say as well.
        """
        left = {one.reference: one for one in dying if one.reference is not None and one.is_revoked}
        for prefix in {reference.rpartition("/")[0] for reference in left}:
            listed = set() if self._is_long(prefix) or time.monotonic() > ends_at else self._listed(prefix)
            for reference, one in left.items():
                if listed and reference.rpartition("/")[0] == prefix and reference not in listed:
                    one.is_dead = True

    def _is_without_token(self, handle: Handle | None) -> bool:
        """Whether its token is certainly dead."""
        try:
            return handle is not None and self._is_token_dead(handle.value)
        except (ProviderRefused, ProviderUnavailable, ValueError):
            return False

    def _listed(self, prefix: str) -> Collection[str]:
        """What Vault lists under a prefix, or nothing; where that fails or takes long, it is not asked for a while."""
        began, listed, is_long = time.monotonic(), set[str](), True
        try:
            listed = set(self._leases_under(f"{_path_of_lease(prefix)}/", _MOST_DEPTH))
            is_long = len(listed) > WORTH_LISTING or time.monotonic() - began > SLOW_S
        except (ProviderRefused, ProviderUnavailable, ValueError) as problem:
            _log.info("the leases left were not listed", extra={"fields": {"kind": type(problem).__name__}})
        if is_long:
            self._long[prefix] = time.monotonic() + LONG_FOR_S
        return listed

    def _is_long(self, prefix: str) -> bool:
        """Whether listing it took longer, a while ago, than asking about each."""
        return time.monotonic() < self._long.get(prefix, 0.0)

    def _end_token(self, handle: Handle | None) -> list[str]:
        """Nothing more is read with it; answers what went wrong, which must not keep its lease from being ended."""
        problems: list[str] = []
        if handle is not None:
            self._attempt(problems, lambda: self._revoke_accessor(handle.value))
        return problems

    def _end_lease(self, reference: str | None) -> list[str]:
        """At once; answers what went wrong, which may be no harm."""
        problems: list[str] = []
        if reference is not None:
            self._attempt(problems, lambda: self._revoke_lease(reference))
        return problems

    def _confirm(self, handle: Handle | None, reference: str | None, problems: Sequence[str]) -> None:
        """Look until lease and token are gone."""
        # What a step could not do Vault's queue may yet do; but it will hardly, so the next debt is not kept waiting.
        pauses_s = CONFIRM_PAUSES_S[:3] if problems else CONFIRM_PAUSES_S
        alive: list[str] = []
        for pause_s in (*pauses_s, None):
            try:
                alive = self._alive(handle, reference)
            except (ProviderRefused, ProviderUnavailable) as problem:
                reason = "; ".join([*problems, problem.reason or problem.detail])
                raise ProviderUnavailable("Vault did not say whether it died", reason=reason) from None
            # What is gone is gone, whatever went wrong on the way.
            if not alive:
                return
            if pause_s is not None:
                self._pause(pause_s)
        raise ProviderUnavailable(
            f"Vault has not confirmed that {' and '.join(alive)} died", reason="; ".join(problems) or None
        )

    def list_live(self, known: Collection[str] = ()) -> Collection[LiveSecret]:
        """Every lease under the prefixes of our roles. One that ends while we look is left out."""
        found: list[LiveSecret] = []
        under: dict[str, SecretSource] = {}
        for source in self._sources():
            if source.lease_prefix is not None:
                # Of an older and a newer configuration of one role, the one that promises less.
                under[source.lease_prefix] = max(source, under.get(source.lease_prefix, source), key=_lasts)
        for prefix, source in sorted(under.items(), key=lambda item: item[0]):
            for reference in self._leases_under(prefix, 0):
                if reference in known:
                    found.append(LiveSecret(reference=reference))
                    continue
                lease = self._lease(reference)
                if lease is not None:
                    found.append(
                        LiveSecret(
                            reference=reference,
                            issued_at=_time(lease.get("issue_time")),
                            expires_at=_time(lease.get("expire_time")),
                            trouble=_trouble(lease),
                            revocation=source.revocation,
                            bound=source.bound,
                        )
                    )
        return tuple(found)

    def capabilities(self, paths: Iterable[str]) -> Mapping[str, frozenset[str]]:
        """What the broker's own token may do at each of these paths, as Vault judges it."""
        asked = list(paths)
        answer = self._login.speak(
            lambda token: self._connection.call("post", "sys/capabilities-self", token=token, body={"paths": asked})
        )
        if not answer.ok:
            answer.fail("say what the broker's token may do", "sys/capabilities-self")
        data = answer.table("data")
        return {path: frozenset(_strings(data.get(path))) for path in asked}

    def _alive(self, handle: Handle | None, reference: str | None) -> list[str]:
        """Which of both Vault still knows; the lease is asked about first, and while it is there nothing else."""
        if reference is not None and self._lease(reference) is not None:
            return ["the lease"]
        return ["the token"] if handle is not None and not self._is_token_dead(handle.value) else []

    def try_child_token(self, role: str, grant_id: str, paths: Iterable[str]) -> Mapping[str, frozenset[str]]:
        """What a child token of this role could do at each of these paths; it is made, asked about, and killed."""
        asked = list(paths)
        child = self._child_token(role, grant_id, TRIAL_S)
        body = {"accessor": child.value, "paths": asked}
        try:
            answer = self._login.speak(
                lambda token: self._connection.call("post", "sys/capabilities-accessor", token=token, body=body)
            )
        finally:
            self.revoke(child, None)
        if not answer.ok:
            answer.fail("say what a child token may do", "sys/capabilities-accessor")
        data = answer.table("data")
        return {path: frozenset(_strings(data.get(path))) for path in asked}

    # --- one call each -------------------------------------------------------------------------------------------

    def _child_token(self, role: str, grant_id: str, seconds: int) -> Handle:
        """A token that is exactly what a handle must be, or none."""
        began_at = self._clock()

        def create(token: Secret) -> Answer:
            api = Token(self._connection.adapter(token))
            return self._connection.within(
                lambda: api.create(
                    role_name=role,
                    ttl=f"{seconds}s",
                    explicit_max_ttl=f"{seconds}s",
                    renewable=False,
                    meta={"grant_id": grant_id},
                    display_name=f"jit-{grant_id}",
                    # What is not said is decided by the role: the broker cannot choose what its tokens may do.
                    no_parent=None,
                    no_default_policy=None,
                    num_uses=None,
                )
            )

        answer = self._login.speak(create)
        if not answer.ok:
            answer.fail("make a token for this grant", f"auth/token/create/{role}")
        auth = answer.table("auth")
        wrong = _wrong_with(auth, seconds)
        if wrong:
            self._drop(auth.get("accessor"))
            raise ProviderRefused(
                "Vault is not set up as the broker needs it",
                reason=f"a token of role {role} {wrong}: run `broker vault check`",
            )
        return Handle(
            value=auth["accessor"],
            revocation=RevocationClass.HARD,
            expires_at=began_at + timedelta(seconds=auth["lease_duration"]),
            opens=Secret(auth["client_token"]),
        )

    def _revoke_accessor(self, accessor: str) -> None:
        _require(_ACCESSOR, accessor, "handle")
        answer = self._login.speak(
            lambda token: self._connection.call(
                "post", "auth/token/revoke-accessor", token=token, body={"accessor": accessor}
            )
        )
        if not answer.ok and not _says(answer, "invalid accessor"):
            answer.fail("revoke the token", "auth/token/revoke-accessor")

    def _revoke_lease(self, reference: str) -> None:
        # By path and not by body, so that Vault's policy can keep the broker to the leases of its own roles (INV-29).
        path = f"sys/leases/revoke/{_path_of_lease(reference)}"
        answer = self._login.speak(lambda token: self._connection.call("put", path, token=token, body={"sync": True}))
        if not answer.ok and not _says(answer, "invalid lease"):
            answer.fail("revoke the lease", path)

    def _is_token_dead(self, accessor: str) -> bool:
        _require(_ACCESSOR, accessor, "handle")
        answer = self._login.speak(
            lambda token: self._connection.call(
                "post", "auth/token/lookup-accessor", token=token, body={"accessor": accessor}
            )
        )
        # The words and not the status: a 403 alone may be our own token, a 404 a proxy.
        if _says(answer, "invalid accessor"):
            return True
        if answer.status == 200 and answer.table("data").get("accessor") == accessor:
            return False
        raise answer.unknown("look up the token", "auth/token/lookup-accessor")

    def _lease(self, reference: str) -> Mapping[str, Any] | None:
        """What Vault knows of a lease; None only if it says that there is none."""
        _path_of_lease(reference)
        answer = self._login.speak(
            lambda token: self._connection.call("put", "sys/leases/lookup", token=token, body={"lease_id": reference})
        )
        if _says(answer, "invalid lease"):
            return None
        data = answer.table("data")
        if answer.status == 200 and data.get("id") == reference:
            return data
        raise answer.unknown("look up the lease", "sys/leases/lookup")

    def _leases_under(self, prefix: str, depth: int) -> Iterable[str]:
        answer = self._login.speak(
            lambda token: self._connection.call("list", f"sys/leases/lookup/{prefix}", token=token)
        )
        # An empty list is a 404 with no errors; any other 404 says nothing about leases.
        if answer.status == 404 and answer.vaults and not answer.errors:
            return
        keys = answer.table("data").get("keys")
        if answer.status != 200 or not isinstance(keys, list):
            raise answer.unknown("list the leases of the broker", prefix)
        for key in keys:
            if not isinstance(key, str) or not COMPONENT.fullmatch(key.removesuffix("/")):
                raise ProviderUnavailable("Vault lists a lease whose name cannot be read")
            if not key.endswith("/"):
                yield prefix + key
            elif depth < _MOST_DEPTH:
                yield from self._leases_under(prefix + key, depth + 1)

    def _drop(self, accessor: object) -> None:
        """A token that is not as asked is never used; it has no lease, and ends by itself if this fails."""
        if isinstance(accessor, str) and _ACCESSOR.fullmatch(accessor):
            self._attempt([], lambda: self._revoke_accessor(accessor))

    def _attempt(self, problems: list[str], step: Callable[[], None]) -> None:
        """A step whose failure must not keep the next from being tried."""
        try:
            step()
        except (ProviderRefused, ProviderUnavailable) as problem:
            problems.append(f"{problem.detail} ({problem.reason})" if problem.reason else problem.detail)
            _log.warning("a step of a revocation failed", extra={"fields": {"reason": problems[-1]}})


def _wrong_with(auth: Mapping[str, Any], seconds: int) -> str | None:
    """What is not as it must be with a child token; None if all is."""
    accessor, token, policies = auth.get("accessor"), auth.get("client_token"), _strings(auth.get("policies"))
    if not isinstance(token, str) or not token:
        return "is missing"
    if auth.get("token_type") != "service" or not isinstance(accessor, str) or not _ACCESSOR.fullmatch(accessor):
        return "is no service token with an accessor, so that it could not be revoked"
    if auth.get("orphan") is not True:
        return "is no orphan: it would die with the broker's own"
    if auth.get("renewable") is not False:
        return "can be renewed"
    # With one use left Vault revokes the lease it has just made.
    if auth.get("num_uses") != 0:
        return "has a limited number of uses"
    if not policies or {"root", "default"} & set(policies):
        return "has the policy root or default, or none"
    if type(auth.get("lease_duration")) is not int or not 1 <= auth["lease_duration"] <= seconds:
        return "lives longer than was asked for, or for ever"
    return None


def _lasts(source: SecretSource) -> tuple[int, timedelta]:
    """The more, the longer a secret may live on after it was revoked."""
    classes = (RevocationClass.HARD, RevocationClass.BOUNDED, RevocationClass.TTL_ONLY)
    return classes.index(source.revocation), source.bound or timedelta(0)


@dataclass
class _Dying:
    """One of many that are being ended. `handle` is None where there is no token, or none any more."""

    handle: Handle | None
    reference: str | None
    problems: list[str] = field(default_factory=list)  # of steps, which may have done no harm
    failure: Exception | None = None
    is_dead: bool = False

    @property
    def is_revoked(self) -> bool:
        """Whether all that was asked of Vault was done, as it says; so that a look at the lease is all that is left."""
        return self.failure is None and self.handle is None and not self.problems


def _reference(lease_id: object, source: SecretSource) -> str | None:
    prefix = source.lease_prefix
    if prefix is None or not isinstance(lease_id, str) or not lease_id.startswith(prefix):
        return None
    return lease_id if _LEASE_ID.fullmatch(lease_id[len(prefix) :]) else None


def _lease_end(body: Mapping[str, Any], began_at: datetime) -> datetime | None:
    found = body.get("lease_duration")
    return began_at + timedelta(seconds=found) if type(found) is int and 0 < found < 10**9 else None


def _path_of_lease(reference: str) -> str:
    # It came from Vault and was kept in a row; it goes into a path, so it is judged once more (INV-31).
    for part in reference.split("/"):
        _require(COMPONENT, part, "reference")
    return reference


def _require(pattern: re.Pattern[str], text: str, what: str) -> None:
    if not pattern.fullmatch(text):
        raise ValueError(f"not a {what} that Vault gave")


def _says(answer: Answer, words: str) -> bool:
    """Whether Vault itself says these words: the one thing that a proxy, a policy or a namespace cannot say."""
    return answer.refused and any(words in error for error in answer.errors)


def _strings(found: object) -> tuple[str, ...]:
    return tuple(text for text in found if isinstance(text, str)) if isinstance(found, list) else ()


def _time(text: object) -> datetime | None:
    if not isinstance(text, str):
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return None
    return at if at.tzinfo is not None else None


def _trouble(lease: Mapping[str, Any]) -> str | None:
    found = lease.get("revoke_error")
    return " ".join(found.split())[:300] if isinstance(found, str) and found else None


def _whole_seconds(ttl: timedelta) -> int:
    seconds = int(ttl.total_seconds())
    if seconds < 1:
        raise ValueError("a credential lives at least one second")
    return seconds
