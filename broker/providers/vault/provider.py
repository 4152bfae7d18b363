"""Secrets of Vault: a child token for each grant, the secret read with it, and revocation that only a look-up ends.

The child token opens nothing but the brokered roles, is an orphan, cannot be renewed and dies with the grant; all its
leases die with it. Its accessor is the handle: committed by the caller before the secret exists (INV-02).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from hvac.api.auth_methods import Token

from broker.domain.clock import LEEWAY, Clock
from broker.domain.errors import Invalid, ProviderRefused, ProviderUnavailable
from broker.domain.identity import is_id
from broker.domain.secret import Secret
from broker.providers.base import (
    AtOnce,
    Handle,
    IssuedSecret,
    LiveSecret,
    RevocationClass,
    SecretData,
    SecretRequest,
)
from broker.providers.vault.calls import ACCESSOR, Calls
from broker.providers.vault.connection import Answer, Connection
from broker.providers.vault.ending import Ending
from broker.providers.vault.login import Login
from broker.providers.vault.settings import VaultSettings
from broker.providers.vault.sources import SecretSource, Wrong

_log = logging.getLogger(__name__)

# Vault gives a request at most 90 s (`default_max_request_duration`); what was past its token check when the token died
# may register a lease until then.
MAX_REQUEST = timedelta(seconds=90)
MARGIN = timedelta(seconds=30)

TRIAL_S = 30

_LEASE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9.]{7,127}")


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
        self._calls = Calls(self._connection, self._login)
        self._ending = Ending(self._calls, pause)

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
        self._calls.made(answer)
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
        self._ending.of(handle, reference)

    def revoke_many(
        self, owed: Sequence[tuple[Handle | None, str | None]], at_once: AtOnce = map
    ) -> Sequence[Exception | None]:
        """All tokens first, so that their leases are in Vault's queue; then what it leaves at once; a look at all."""
        return self._ending.of_many(owed, at_once)

    def list_live(self, known: Collection[str] = ()) -> Collection[LiveSecret]:
        """Every lease under the prefixes of our roles. One that ends while we look is left out."""
        found: list[LiveSecret] = []
        under: dict[str, SecretSource] = {}
        for source in self._sources():
            if source.lease_prefix is not None:
                # Of an older and a newer configuration of one role, the one that promises less.
                under[source.lease_prefix] = max(source, under.get(source.lease_prefix, source), key=_lasts)
        for prefix, source in sorted(under.items(), key=lambda item: item[0]):
            for reference in self._calls.leases_under(prefix):
                if reference in known:
                    found.append(LiveSecret(reference=reference))
                    continue
                lease = self._calls.lease(reference)
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
        self._calls.made(answer)
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

    def _drop(self, accessor: object) -> None:
        """A token that is not as asked is never used; it has no lease, and ends by itself if this fails."""
        if isinstance(accessor, str) and ACCESSOR.fullmatch(accessor):
            try:
                self._calls.revoke_accessor(accessor)
            except (ProviderRefused, ProviderUnavailable) as problem:
                _log.warning("a token was not dropped", extra={"fields": {"reason": problem.reason}})


def _wrong_with(auth: Mapping[str, Any], seconds: int) -> str | None:
    """What is not as it must be with a child token; None if all is."""
    accessor, token, policies = auth.get("accessor"), auth.get("client_token"), _strings(auth.get("policies"))
    if not isinstance(token, str) or not token:
        return "is missing"
    if auth.get("token_type") != "service" or not isinstance(accessor, str) or not ACCESSOR.fullmatch(accessor):
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


def _reference(lease_id: object, source: SecretSource) -> str | None:
    prefix = source.lease_prefix
    if prefix is None or not isinstance(lease_id, str) or not lease_id.startswith(prefix):
        return None
    return lease_id if _LEASE_ID.fullmatch(lease_id[len(prefix) :]) else None


def _lease_end(body: Mapping[str, Any], began_at: datetime) -> datetime | None:
    found = body.get("lease_duration")
    return began_at + timedelta(seconds=found) if type(found) is int and 0 < found < 10**9 else None


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
