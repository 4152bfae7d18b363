"""DPoP proofs (RFC 9449 section 4.3): made for this request and this token, just now, with the key it is bound to.

A proof is used once. Who runs more than one process brings a memory that they share; without one each process
remembers for itself.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Sequence
from typing import Protocol
from urllib.parse import urlsplit

from broker.sdk.verifier import jose
from broker.sdk.verifier.jose import NotReadable
from broker.sdk.verifier.moments import LEEWAY_S, Moment
from broker.sdk.verifier.refused import PROOF_ALGORITHMS, Refused
from broker.sdk.verifier.tokens import Token

WINDOW_S = 60
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Once(Protocol):
    """What remembers proofs: `first` is True for each key once until it is forgotten, however many ask at a time."""

    def first(self, key: str, keep_s: float) -> bool: ...


class Memory:
    """Proofs of this process, at most `most` of them. None is forgotten while it could be accepted (INV-20)."""

    def __init__(self, monotonic: Callable[[], float], most: int) -> None:
        self._monotonic = monotonic
        self._most = most
        self._known: set[str] = set()
        self._by_end: list[tuple[float, str]] = []
        self.reset()

    def reset(self) -> None:
        """After a fork: whoever held the lock is not there."""
        self._lock = threading.Lock()

    def first(self, key: str, keep_s: float) -> bool:
        with self._lock:
            now = self._monotonic()
            while self._by_end and self._by_end[0][0] <= now:
                self._known.discard(heapq.heappop(self._by_end)[1])
            if key in self._known:
                return False
            if len(self._known) >= self._most:
                # Forgetting one to make room would let it be used again.
                raise Refused("too_many_proofs", scheme="DPoP")
            self._known.add(key)
            heapq.heappush(self._by_end, (now + keep_s, key))
            return True


def check(
    presented: str | Sequence[str] | None,
    token: Token,
    *,
    method: str,
    url: str,
    now: Moment,
    once: Once,
) -> None:
    """Refuse unless a proof, and exactly one, shows the key that the token is bound to."""
    proofs = [presented] if isinstance(presented, str) else list(presented or ())
    if len(proofs) != 1:
        raise Refused("bad_proof", "there is not exactly one DPoP header")
    try:
        parsed = jose.parse(proofs[0], brings_key=True)
        if parsed.typ != "dpop+jwt":
            raise NotReadable("it is not of type dpop+jwt")
        jwk = parsed.header.get("jwk")
        if not isinstance(jwk, dict) or parsed.algorithm not in PROOF_ALGORITHMS:
            raise NotReadable("it brings no key, or is signed in a way that is not taken")
        # A proof chooses among public keys and their algorithms, and gains nothing by that: the key is the one whose
        # thumbprint the broker wrote into the token.
        key = jose.key_of(jwk | {"alg": parsed.algorithm} if jwk.get("kty") == "RSA" else jwk)
        if key.thumbprint != token.bound_to:
            raise NotReadable("it is made with another key than the token is bound to")
        parsed.require(key)
        claims = jose.members(parsed.payload)
        if claims.get("ath") != token.ath:
            raise NotReadable("it is made for another token")
        if claims.get("htm") != method:
            raise NotReadable("it is made for another method")
        if _place(jose.text(claims, "htu", longest=4096)) != _place(url):
            raise NotReadable("it is made for another URL")
        issued_at, jti = jose.seconds(claims, "iat"), jose.text(claims, "jti", longest=256)
    except NotReadable as problem:
        raise Refused("bad_proof", str(problem)) from None
    # By this machine's clock and not by the broker's: clients keep to neither, and the window is wide.
    if not now.wall - WINDOW_S <= issued_at <= now.wall + LEEWAY_S:
        raise Refused("bad_proof", "it is too old, or from the future")
    # For the whole window and not for what is left of it: the wall clock may be set back meanwhile.
    if not once.first(f"{token.bound_to} {jti}", 2 * (WINDOW_S + LEEWAY_S)):
        raise Refused("replayed_proof")


def _place(url: str) -> tuple[str, str, int | None, str]:
    """What is compared of a URL: without query and fragment, the host in small letters, the default port left out."""
    try:
        parts = urlsplit(url)
        scheme = parts.scheme.lower()
        return scheme, (parts.hostname or "").lower(), parts.port or _DEFAULT_PORTS.get(scheme), parts.path or "/"
    except ValueError:
        raise NotReadable("its URL is none") from None
