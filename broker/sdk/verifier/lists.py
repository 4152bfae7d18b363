"""Status lists (IETF Token Status List): fetched when needed, proven, unpacked within bounds, and never an older one.

A list may answer in two ways. While it is fresh it says all there is to say. Kept for longer, it says what had ended
when it was made, and the feed says what ended since.
"""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from broker.sdk.clock import Timing
from broker.sdk.verifier import jose
from broker.sdk.verifier.jose import NotReadable
from broker.sdk.verifier.keys import Keys
from broker.sdk.verifier.moments import OVER, BrokerTime, Until
from broker.sdk.verifier.signed import RefusesKey, UnknownKey, claims_of
from broker.sdk.verifier.transport import Lost, Transport

VALID, INVALID = 0, 1
MAX_SENT_BYTES = 1 << 18
MAX_UNPACKED_BYTES = 1 << 20  # the broker's have 2**15
AGAIN_AFTER_S = 1.0
_WIDTHS = (1, 2, 4, 8)
_MOST_KEPT, _MOST_TIMES = 256, 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusList:
    """One list that was proven. `asked_at` is when it was asked for, by the monotonic clock."""

    packed: bytes = field(repr=False)
    bits: int
    issued_at: int
    asked_at: float
    fresh: Until

    def status_at(self, index: int) -> int | None:
        """The status at `index`; None beyond the end, where a list says nothing (INV-24)."""
        at = index * self.bits
        if at >> 3 >= len(self.packed):
            return None
        return self.packed[at >> 3] >> (at & 7) & ((1 << self.bits) - 1)


class Lists:
    """`get` and `refresh` are safe between threads; of one list, one is fetched at a time."""

    def __init__(
        self,
        *,
        transport: Transport,
        keys: Keys,
        time: BrokerTime,
        lock: Any,
        timing: Timing,
        issuer: str,
        bound_s: int,
        refuses_key: RefusesKey,
    ) -> None:
        self._transport, self._keys, self._time, self._timing = transport, keys, time, timing
        self._refuses_key = refuses_key
        self._issuer, self._bound_s = issuer, bound_s
        self._kept: OrderedDict[str, StatusList] = OrderedDict()
        self._newest: OrderedDict[str, int] = OrderedDict()
        self._tries: OrderedDict[str, tuple[float, float, bool]] = OrderedDict()  # asked at, done at, worked
        self.problem: str | None = None
        self.fresh = OVER  # until when the newest of them all is
        self.reset(lock)

    def reset(self, lock: Any) -> None:
        """`lock` guards all that is kept; after a fork there is another one."""
        self._lock = lock
        self._fetching = tuple(threading.Lock() for _ in range(8))

    def get(self, uri: str) -> StatusList | None:
        """For those who hold the lock."""
        return self._kept.get(uri)

    def refresh(self, uri: str, *, newer_than: float = float("-inf")) -> None:
        """Fetch a list, unless that failed a moment ago, and later than `newer_than` by the monotonic clock.

        Whoever comes meanwhile waits for the same answer.
        """
        came_at = self._timing.monotonic()
        with self._fetching[hash(uri) % len(self._fetching)]:
            now = self._timing.monotonic()
            asked_at, done_at, worked = self._tries.get(uri, (float("-inf"), float("-inf"), True))
            # The first keeps a crowd from asking one after the other, the second one from asking all the time.
            if asked_at > newer_than and (done_at >= came_at or (not worked and now - asked_at < AGAIN_AFTER_S)):
                return
            worked = self._fetch(uri, now)
            with self._lock:
                _put(self._tries, uri, (now, self._timing.monotonic(), worked), _MOST_TIMES)

    def _fetch(self, uri: str, now: float) -> bool:
        try:
            found = self._proven(uri, self._fetched(uri), now)
        except (Lost, NotReadable) as problem:
            self.problem = f"the status list cannot be used: {problem}"
            return False
        with self._lock:
            self._keep(uri, found)
        return True

    def _fetched(self, uri: str) -> str:
        body = self._transport.get(uri, accept="application/statuslist+jwt", max_bytes=MAX_SENT_BYTES)
        return body.decode("ascii", "replace")

    def _proven(self, uri: str, token: str, asked_at: float) -> StatusList:
        try:
            claims = self._claims(token)
        except UnknownKey:
            self._keys.refresh()
            claims = self._claims(token)
        if claims.get("sub") != uri:
            raise NotReadable("it is another list than the one that was asked for")
        issued_at, expires_at, ttl = (jose.seconds(claims, name) for name in ("iat", "exp", "ttl"))
        entry = claims.get("status_list")
        bits = entry.get("bits") if isinstance(entry, dict) else None
        if type(bits) is not int or bits not in _WIDTHS or not isinstance(entry, dict):
            raise NotReadable("it does not say how wide its statuses are")
        packed = unpacked(entry.get("lst"))
        # Its own `exp` may be generous; the published bound is not.
        lasts_s = min(ttl, self._bound_s, expires_at - issued_at)
        with self._lock:
            if issued_at < self._newest.get(uri, 0):
                # INV-23: an older list could say "valid" of what a newer one said was revoked.
                raise NotReadable("it is older than one that was here before")
            if not self._time.saw(issued_at):
                raise NotReadable(f"this machine's clock is {self._time.behind_s:.0f} s behind the issuer's")
            fresh = self._time.until(issued_at, lasts_s)
            if fresh.is_over(self._time.now()):
                raise NotReadable("it is stale, or this machine's clock is ahead of the issuer's")
        return StatusList(packed=packed, bits=bits, issued_at=issued_at, asked_at=asked_at, fresh=fresh)

    def _claims(self, token: str) -> Mapping[str, Any]:
        return claims_of(
            token,
            self._keys,
            typ="statuslist+jwt",
            issuer=self._issuer,
            max_bytes=MAX_SENT_BYTES,
            refuses_key=self._refuses_key,
        )

    def _keep(self, uri: str, found: StatusList) -> None:
        if found.issued_at < self._newest.get(uri, 0):
            return
        self.problem, self.fresh = None, found.fresh
        _put(self._newest, uri, found.issued_at, _MOST_TIMES)
        _put(self._kept, uri, found, _MOST_KEPT)


def _put(kept: OrderedDict[str, Any], name: str, value: Any, most: int) -> None:
    kept[name] = value
    kept.move_to_end(name)
    while len(kept) > most:
        kept.popitem(last=False)


def unpacked(lst: object, *, max_bytes: int = MAX_UNPACKED_BYTES) -> bytes:
    """The bytes of a `lst`. Inflated within bounds: a few KiB can hold gigabytes of zeros."""
    compressed = jose.decoded(lst, longest=MAX_SENT_BYTES)
    inflater = zlib.decompressobj()
    try:
        packed = inflater.decompress(compressed, max_bytes + 1)
    except zlib.error:
        raise NotReadable("it cannot be decompressed") from None
    # `eof` says that the checksum was there and right: a list that was cut short would end in fewer revocations.
    if len(packed) > max_bytes or not inflater.eof or inflater.unused_data:
        raise NotReadable("it is not whole, or too large")
    return packed
