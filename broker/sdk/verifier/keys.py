"""The broker's public keys: from its own address and no other, fetched again in time, and kept while it is down.

The broker publishes a key before it signs with it, so that reading the set again in time already knows every key that
a good token can have. An unknown `kid` has the set fetched at once all the same, but not more often than every few
seconds: whoever makes up names must not make us ask (INV-35).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import MappingProxyType

from broker.sdk.clock import Timing
from broker.sdk.verifier import jose
from broker.sdk.verifier.jose import Key, NotReadable
from broker.sdk.verifier.transport import Lost, Transport

REFRESH_S = 15.0  # what the broker's Cache-Control says: a key that leaked is believed for so long at most
AGAIN_AFTER_S = 2.0
_MAX_BYTES, _MAX_KEYS = 65_536, 64


class Keys:
    """`now` is replaced as a whole, so that a reader needs no lock."""

    def __init__(self, transport: Transport, timing: Timing) -> None:
        self._transport = transport
        self._timing = timing
        self.now: Mapping[str, Key] = MappingProxyType({})
        self.problem: str | None = None
        self._asked_at = float("-inf")
        self._fetching = threading.Lock()

    def reset(self) -> None:
        """After a fork: whoever was fetching is not there."""
        self._fetching = threading.Lock()

    def refresh(self, *, at_most_every_s: float = AGAIN_AFTER_S) -> None:
        """Fetch the set, unless that was tried so shortly ago. Whoever comes meanwhile waits for the same answer."""
        came_at = self._timing.monotonic()
        with self._fetching:
            if self._asked_at >= came_at or self._timing.monotonic() - self._asked_at < at_most_every_s:
                return
            self._asked_at = self._timing.monotonic()
            try:
                body = self._transport.get("/oauth2/jwks", accept="application/jwk-set+json", max_bytes=_MAX_BYTES)
                known = self.now.values()
                found = jose.keys_of(body, max_bytes=_MAX_BYTES, most=_MAX_KEYS, known=known)
            except (Lost, NotReadable) as problem:
                # Those we have are still the broker's. What was signed with one that leaked ends by the feed as well.
                self.problem = f"the issuer's keys cannot be read: {problem}"
                return
            self.problem = None
            self.now = MappingProxyType(found)

    def find(self, kid: str | None) -> Key | None:
        return None if kid is None else self.now.get(kid)
