"""The public keys of trusted issuers: JWK sets (RFC 7517), OIDC discovery, SPIFFE bundles.

Where keys come from is configuration's word alone (INV-18). A fetch is one flight per issuer, in a thread of its own,
so that whoever needs a key that is already known never waits for the network; tokens cannot cause more than one
flight in `RETRY_AFTER` (INV-35). Never follows a redirect, never leaves https except for loopback.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import logging
import os
import ssl
import stat
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import httpx

from broker.domain import strict_json
from broker.domain.catalogue import TrustedIssuer
from broker.domain.errors import Invalid, Unauthenticated
from broker.providers import jose

REFRESH_EVERY = timedelta(minutes=5)
RETRY_AFTER = timedelta(seconds=30)
FIRST_RETRY_AFTER = timedelta(seconds=5)  # nothing works before the first fetch does
KEPT_FOR = timedelta(hours=24)  # without news of the issuer
DEADLINE = timedelta(seconds=5)
MAX_BODY = 256 * 1024
SSF_DISCOVERY = "ssf_discovery"  # a key source like `discovery`, of a transmitter of security events
MAX_KEYS = 100
# Of all issuers together. A flood of unknown kids while some are slow must leave workers for everybody else.
MOST_WAITING = 16

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class VerificationKey:
    """`generation` is of the key set it was found in: when that has changed, the key may be gone."""

    kid: str | None
    key: jose.PublicKey
    algorithms: frozenset[str]
    generation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _KeySet:
    generation: int
    digest: bytes
    keys: tuple[VerificationKey, ...]
    by_kid: Mapping[str, VerificationKey | None]  # None: two keys claim that kid


class _Held:
    """What is known of one issuer. Readers take no lock: `current` is replaced whole."""

    def __init__(self, issuer: TrustedIssuer) -> None:
        self.issuer = issuer
        self.is_file = issuer.key_source.endswith("_file")
        self.guard = threading.Lock()
        self.current: _KeySet | None = None
        self.obtained_at: datetime | None = None
        self.asked_at: datetime | None = None
        self.flight: threading.Event | None = None
        self.late: threading.Thread | None = None  # the last flight that did not land in time
        self.file_state: tuple[int, ...] | None = None
        self.file_is_good = False

    def usable(self, now: datetime) -> _KeySet | None:
        """The key set, unless the issuer was silent for too long."""
        obtained_at = self.obtained_at
        return None if obtained_at is None or now - obtained_at >= KEPT_FOR else self.current

    def accept(self, raw: bytes, now: datetime) -> None:
        """Replace the keys by those of this document; `Invalid` leaves the old ones. Called under the guard."""
        digest = hashlib.sha256(raw).digest()
        if self.current is None or self.current.digest != digest:
            generation = self.current.generation + 1 if self.current else 1
            self.current = _read(raw, digest, generation, self.issuer)
        self.obtained_at = now


class KeySets:
    """Key sets by where they come from, so that a new version of the configuration keeps what is known."""

    def __init__(self, *, deadline: timedelta = DEADLINE) -> None:
        self._deadline_s = deadline.total_seconds()
        self._guard = threading.Lock()
        self._by_source: dict[tuple[str, str, str | None], _Held] = {}
        self._waiting = threading.BoundedSemaphore(MOST_WAITING)
        self._tls: ssl.SSLContext | None = None

    def key_for(self, issuer: TrustedIssuer, kid: str | None, algorithm: str, now: datetime) -> VerificationKey:
        """The one key that may verify this header; Unauthenticated if there is none, or none was ever had.

        Whether an issuer of ours answers is not for whoever sends tokens to learn: the reason says it to the log. An
        unknown `kid` waits for a refresh, if one is due or under way.
        """
        if kid is None and issuer.trust_domain is not None:
            raise Unauthenticated("a JWT-SVID without kid")
        held = self._held(issuer)
        self._tend(held, now)
        found = _find(held.usable(now), kid, algorithm)
        if found is None and not held.is_file and self._wait(held, now):
            found = _find(held.usable(now), kid, algorithm)
        if found is not None:
            return found
        if held.current is None:
            raise Unauthenticated(f"no keys of {issuer.name} were obtained yet: can its key source be reached?")
        if held.usable(now) is None:
            raise Unauthenticated(f"the keys of {issuer.name} are too old: it did not answer for {KEPT_FOR}")
        raise Unauthenticated(f"{issuer.name} has no key {ascii(kid)[:80]} for {algorithm}")

    def generation(self, issuer: TrustedIssuer, now: datetime) -> int:
        """A number that changes when the issuer's keys do; 0 when there are none to trust. Never waits for a network.

        It also starts the ordinary refresh, so that remembering tokens does not keep removed keys alive.
        """
        held = self._held(issuer)
        self._tend(held, now)
        usable = held.usable(now)
        return 0 if usable is None else usable.generation

    def refresh(self, issuers: Iterable[TrustedIssuer], now: datetime) -> None:
        """Fetch what may be fetched again, all at once, and wait for it: at start, and for the scheduler."""
        started = []
        for issuer in issuers:
            held = self._held(issuer)
            if held.is_file:
                self._tend(held, now)
            else:
                started.append(self._flight(held, now))
        for flight in started:
            if flight is not None:
                flight.wait(self._deadline_s + 1)

    def _held(self, issuer: TrustedIssuer) -> _Held:
        source = (issuer.issuer, issuer.key_source, issuer.location)
        held = self._by_source.get(source)
        if held is None:
            with self._guard:
                held = self._by_source.setdefault(source, _Held(issuer))
        return held

    def _tend(self, held: _Held, now: datetime) -> None:
        if held.is_file:
            self._read_file(held, now)
        # abs: a clock that was set back must not stop refreshing until it has caught up.
        elif held.asked_at is None or abs(now - held.asked_at) >= REFRESH_EVERY:
            self._flight(held, now)

    def _wait(self, held: _Held, now: datetime) -> bool:
        """Wait for the flight that is under way or allowed; False if there is none."""
        flight = self._flight(held, now)
        if flight is None:
            # It may have landed after the caller looked.
            return True
        if not self._waiting.acquire(blocking=False):
            raise Unauthenticated(f"the keys of {held.issuer.name} are being fetched, and enough wait for keys already")
        try:
            flight.wait(self._deadline_s + 1)
        finally:
            self._waiting.release()
        return True

    def _flight(self, held: _Held, now: datetime) -> threading.Event | None:
        with held.guard:
            if held.flight is not None:
                return held.flight
            pause = FIRST_RETRY_AFTER if held.current is None else RETRY_AFTER
            if held.asked_at is not None and abs(now - held.asked_at) < pause:
                return None
            # A resolver that hangs keeps its thread beyond the deadline: one an issuer, not one a flight.
            if held.late is not None and held.late.is_alive():
                return None
            flight = threading.Event()
            fly = threading.Thread(target=self._fly, args=(held, now, flight), name="key-set", daemon=True)
            fly.start()
            held.asked_at, held.flight = now, flight
            return flight

    def _fly(self, held: _Held, now: datetime, flight: threading.Event) -> None:
        try:
            asyncio.run(self._land(held, now, flight))
        finally:
            # Where not even a loop could be made.
            self._landed(held, flight)

    async def _land(self, held: _Held, now: datetime, flight: threading.Event) -> None:
        try:
            raw = await asyncio.wait_for(self._fetch(held.issuer), self._deadline_s)
            with held.guard:
                held.accept(raw, now)
        except TimeoutError:
            held.late = threading.current_thread()
            _log.warning("the keys of %s did not come within %s s", held.issuer.name, self._deadline_s)
        except (httpx.HTTPError, httpx.InvalidURL, Invalid, OSError) as problem:
            # The old keys stay: one failed fetch must not lock everybody out, nor may it be an attacker's tool to.
            _log.warning("the keys of %s could not be fetched: %s", held.issuer.name, problem)
        except Exception:
            _log.exception("the keys of %s could not be fetched", held.issuer.name)
        finally:
            # Here and not after the loop has ended: that waits for the thread which asks the resolver.
            self._landed(held, flight)

    def _landed(self, held: _Held, flight: threading.Event) -> None:
        with held.guard:
            if held.flight is flight:
                held.flight = None
        flight.set()

    async def _fetch(self, issuer: TrustedIssuer) -> bytes:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        async with httpx.AsyncClient(
            verify=self._tls, follow_redirects=False, trust_env=False, timeout=self._deadline_s
        ) as client:
            if issuer.key_source not in ("discovery", SSF_DISCOVERY):
                return await _get(client, issuer.location or "")
            document = await _get(client, _discovery_url(issuer))
            return await _get(client, discovered_uri(document, issuer))

    def _read_file(self, held: _Held, now: datetime) -> None:
        path = held.issuer.location or ""
        try:
            status = os.stat(path)
            state = (status.st_mtime_ns, status.st_size, status.st_ino, status.st_dev)
        except (OSError, ValueError):
            return  # what was read stays, for as long as that of a silent server
        if state == held.file_state:
            if held.file_is_good:
                held.obtained_at = now
            return
        # Whoever has keys goes on with them while another reads; the first readers wait.
        if not held.guard.acquire(blocking=held.current is None):
            return
        try:
            if state == held.file_state:
                return
            good = False
            try:
                if not stat.S_ISREG(status.st_mode):
                    raise Invalid("it is not a regular file")
                with open(path, "rb") as file:
                    held.accept(_within(file.read(MAX_BODY + 1)), now)
                good = True
            except (Invalid, OSError) as problem:
                _log.warning("the key file of %s could not be read: %s", held.issuer.name, problem)
            # Last: whoever sees this state takes no lock and relies on the keys being there.
            held.file_is_good, held.file_state = good, state
        finally:
            held.guard.release()


def _discovery_url(issuer: TrustedIssuer) -> str:
    if issuer.key_source != SSF_DISCOVERY:
        return f"{issuer.issuer.rstrip('/')}/.well-known/openid-configuration"
    # SSF 1.0 section 7.2: between the host and the path.
    parts = urlsplit(issuer.issuer)
    return f"{parts.scheme}://{parts.netloc}/.well-known/ssf-configuration{parts.path.rstrip('/')}"


def discovered_uri(raw: bytes, issuer: TrustedIssuer) -> str:
    """The `jwks_uri` of a discovery document, which must be of this very issuer."""
    document = strict_json.loads(raw, max_bytes=MAX_BODY)
    if not isinstance(document, dict) or document.get("issuer") != issuer.issuer:
        raise Invalid("the discovery document is another issuer's")
    uri = document.get("jwks_uri")
    if not isinstance(uri, str):
        raise Invalid("the discovery document has no jwks_uri")
    # Another host is common. Plain http only from loopback to loopback: a public issuer must not be able to point
    # us at services of this machine.
    if urlsplit(uri).scheme != "https" and not is_loopback(issuer.issuer):
        raise Invalid("the discovery document's jwks_uri is not https")
    return uri


async def _get(client: httpx.AsyncClient, url: str) -> bytes:
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(url)):
        raise Invalid("keys are fetched by https only, or by http from loopback")
    if parts.username is not None or parts.password is not None:
        raise Invalid("the address of the keys holds a user name")
    # Identity: a small compressed body can be an enormous one.
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    async with client.stream("GET", url, headers=headers) as answer:
        if answer.status_code != 200:
            raise Invalid(f"{parts.hostname} answered {answer.status_code}")
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise Invalid(f"{parts.hostname} answered compressed")
        body = bytearray()
        async for chunk in answer.aiter_raw():
            body += chunk
            _within(body)
        return bytes(body)


def _within(body: Any) -> Any:
    if len(body) > MAX_BODY:
        raise Invalid(f"the key set has more than {MAX_BODY} bytes")
    return body


def usable_algorithms(raw: bytes, issuer: TrustedIssuer) -> frozenset[str]:
    """What the keys of this document could check for this issuer; `Invalid` if it is no key set."""
    keys = _read(raw, b"", 0, issuer).keys
    return frozenset(algorithm for key in keys for algorithm in key.algorithms)


def is_loopback(url: str) -> bool:
    """Whether this address can only be on this machine, by its name alone: nothing is resolved.

    >>> is_loopback("http://127.0.0.1:8080"), is_loopback("http://localhost.evil.test")
    (True, False)
    """
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or host.endswith(".localhost") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read(raw: bytes, digest: bytes, generation: int, issuer: TrustedIssuer) -> _KeySet:
    document = strict_json.loads(raw, max_bytes=MAX_BODY)
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise Invalid("the key set has no list of keys")
    if len(entries) > MAX_KEYS:
        raise Invalid(f"the key set has {len(entries)} keys; at most {MAX_KEYS} are read")
    keys: list[VerificationKey] = []
    by_kid: dict[str, VerificationKey | None] = {}
    for entry in entries:
        key = _key(entry, generation, issuer)
        if key is None:
            continue
        keys.append(key)
        if key.kid is not None:
            by_kid[key.kid] = None if key.kid in by_kid else key
    return _KeySet(generation=generation, digest=digest, keys=tuple(keys), by_kid=by_kid)


def _key(entry: Any, generation: int, issuer: TrustedIssuer) -> VerificationKey | None:
    """The key, or None for one that is not for us: sets hold keys of every kind and purpose (RFC 7517 section 5)."""
    if not isinstance(entry, dict):
        return None
    kid, use = entry.get("kid"), entry.get("use")
    if issuer.trust_domain is not None:
        # The same bundle holds X.509 authorities; only this use may sign a JWT-SVID.
        if use != "jwt-svid" or kid is None:
            return None
    elif use not in (None, "sig"):
        return None
    operations = entry.get("key_ops", ["verify"])
    if not isinstance(operations, list) or "verify" not in operations or not isinstance(kid, str | None):
        return None
    try:
        key = jose.public_key(entry)
    except Invalid as problem:
        _log.warning("key %s of %s is not used: %s", ascii(kid)[:80], issuer.name, problem.detail)
        return None
    algorithms = jose.algorithms_of(key)
    if "alg" in entry:
        algorithms = frozenset(name for name in algorithms if name == entry["alg"])
    return VerificationKey(kid=kid, key=key, algorithms=algorithms, generation=generation) if algorithms else None


def _find(key_set: _KeySet | None, kid: str | None, algorithm: str) -> VerificationKey | None:
    """None means "not known, perhaps new"; what a refresh would not mend is Unauthenticated at once."""
    if key_set is None:
        return None
    if kid is None:
        fitting = [key for key in key_set.keys if algorithm in key.algorithms]
        if len(fitting) > 1:
            raise Unauthenticated(f"the token names no kid, and {len(fitting)} keys could have signed it")
        return fitting[0] if fitting else None
    if kid not in key_set.by_kid:
        return None
    found = key_set.by_kid[kid]
    if found is None:
        raise Unauthenticated(f"several keys are called {ascii(kid)[:80]}")
    if algorithm not in found.algorithms:
        raise Unauthenticated(f"key {ascii(kid)[:80]} is not for {algorithm}")
    return found
