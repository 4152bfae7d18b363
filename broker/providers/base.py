"""What a provider is: four methods, what crosses the floor to and from them, and how others plug in.

A provider creates and kills secrets in a system outside. It never sees the database and keeps no truth. Whoever calls
it has committed an intent before `prepare`, the handle before `issue`, and never holds a transaction open meanwhile.

It fails in three ways, and the difference decides what is owed:

- `Invalid`: the caller's parameters are wrong. Raised before anything is asked of the outside; nothing is owed.
- `ProviderRefused`: the outside said no, or would have given what must not be used. No secret exists; a handle may.
- `ProviderUnavailable`: the outside did not say. Unknown means created: a revocation is owed.

Others plug in by the entry point group `broker.providers`: the name is what a resource's `provider` says, the object
takes the provider's settings and the clock and answers a `Provider`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

from broker.domain.clock import Clock
from broker.domain.errors import ConfigurationError
from broker.domain.identity import GrantId
from broker.domain.lease import RevocationClass as RevocationClass
from broker.domain.secret import Secret
from broker.domain.secret import SecretData as SecretData

ENTRY_POINTS = "broker.providers"

Setting = str | int | bool
# As `map`: it is for whoever calls to say how many steps are taken at once. Read to its end, all are taken; a step
# must not use it itself.
AtOnce = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SecretRequest:
    """What to create, the same for `prepare` and `issue`.

    `settings` is the resource's own table of the configuration. `parameters` is what the agent sent; each provider
    has a closed set of names, and what they hold never becomes part of a path.
    """

    grant_id: GrantId
    settings: Mapping[str, Setting]
    parameters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Handle:
    """What can revoke a secret before there is one.

    `value` is stored, and revokes. `opens` is what `issue` reads the secret with: it lives in memory between the two
    calls and is never stored, so a handle read back from a row has none. `expires_at` is when everything made under
    the handle is over, if the outside enforces that.
    """

    value: str
    revocation: RevocationClass
    expires_at: datetime
    bound: timedelta | None = None
    opens: Secret | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class IssuedSecret:
    """A secret that exists. `reference` is its name outside, for revoking; None where it has none.

    `expires_at` is when it stops opening anything, which may be before what was asked, never after. `lasts_until` is
    when it does so even if the outside forgets to end it, where that is later. `facts` are not secret and belong into
    the audit trail: the name of the database user, the serial number of the certificate.
    """

    data: SecretData
    reference: str | None
    expires_at: datetime
    lasts_until: datetime | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LiveSecret:
    """A secret the outside says exists under what is ours alone.

    `issued_at` and `expires_at` are told where the outside was asked about it, `grant_id` where it can tell.
    `trouble` is what the outside says went wrong with revoking it. What a revocation of it means is the worst there is
    if `revocation` does not tell.
    """

    reference: str
    grant_id: GrantId | None = None
    issued_at: datetime | None = None
    expires_at: datetime | None = None
    trouble: str | None = None
    revocation: RevocationClass | None = None
    bound: timedelta | None = None


class Provider(Protocol):
    """An outside system that creates secrets. Each method has a deadline on each of its calls."""

    @property
    def settles_after(self) -> timedelta:
        """How long after an issue of unknown outcome a secret of it may still appear.

        Until then a debt is not clean, however dead its handle is.
        """

    def prepare(self, request: SecretRequest, ttl: timedelta) -> Handle:
        """Create what will revoke the secret; it opens nothing by itself and ends after `ttl`."""

    def issue(self, handle: Handle, request: SecretRequest, ttl: timedelta) -> IssuedSecret:
        """Create the secret under a handle that is committed."""

    def revoke(self, handle: Handle | None, reference: str | None) -> None:
        """Kill what is known by either; idempotent. Returns only when the outside confirmed both dead.

        For a `ttl_only` secret this means that no more can be obtained: what is out lives until it expires.
        """

    def list_live(self, known: Collection[str] = ()) -> Collection[LiveSecret]:
        """Every secret under what is ours alone; those whose reference is not `known` are looked at closely."""


@runtime_checkable
class RevokesMany(Protocol):
    """A provider that kills several faster than each by itself; each is confirmed as by `revoke`."""

    def revoke_many(
        self, owed: Sequence[tuple[Handle | None, str | None]], at_once: AtOnce
    ) -> Sequence[Exception | None]:
        """For each in order: None if it is confirmed dead, else what `revoke` would have raised for it."""


@runtime_checkable
class Foresees(Protocol):
    """A provider that can tell without asking the outside that a request will come to nothing."""

    def foresee(self, request: SecretRequest, ttl: timedelta) -> None:
        """`Invalid` for parameters it would not pass on, or a life it cannot give.

        Called while others wait for the same transaction: it reads nothing, asks nobody, and takes no time.
        """


def require_foreseeable(provider: Provider, request: SecretRequest, ttl: timedelta) -> None:
    """`Invalid` where it is known beforehand that `prepare` would refuse; then no intent is needed."""
    if isinstance(provider, Foresees):
        provider.foresee(request, ttl)


def revoke_each(
    provider: Provider, owed: Sequence[tuple[Handle | None, str | None]], at_once: AtOnce = map
) -> Sequence[Exception | None]:
    """What became of each; the trouble of one is no other's, nor is a fault of the provider's in killing several."""
    if isinstance(provider, RevokesMany) and len(owed) > 1:
        try:
            answers = provider.revoke_many(owed, at_once)
            if len(answers) == len(owed):
                return answers
            _log.error("a provider did not say of each whether it is dead", extra={"fields": {"owed": len(owed)}})
        except Exception:
            _log.exception("a provider could not kill several", extra={"fields": {"owed": len(owed)}})
    return list(at_once(lambda one: _problem_with(provider, *one), owed))


def _problem_with(provider: Provider, handle: Handle | None, reference: str | None) -> Exception | None:
    try:
        provider.revoke(handle, reference)
    except Exception as problem:
        return problem
    return None


class ProviderFactory(Protocol):
    """What an entry point names."""

    def __call__(self, settings: Mapping[str, Any], clock: Clock) -> Provider: ...


def third_party(name: str) -> ProviderFactory:
    """The provider that an installed package offers under this name; ConfigurationError if there is not exactly one."""
    found = tuple(entry_points(group=ENTRY_POINTS, name=name))
    if len(found) != 1:
        offered = sorted({point.name for point in entry_points(group=ENTRY_POINTS)})
        raise ConfigurationError(
            [
                f"{len(found)} installed packages offer a provider {name!r}; there must be one. "
                f"Offered are: {', '.join(offered) or 'none'}"
            ]
        )
    factory: ProviderFactory = found[0].load()
    return factory
