"""Keeping up with the broker, in a thread of its own: the stream, and long polls where there is no stream.

A connection counts as good once a statement was proven on it. After two streams that were not, long polls are tried;
while they work a stream is tried now and then, and where neither works both in turn, with a jittered pause that grows.
Whatever comes goes to `Feed`, under the lock; what `Feed` calls broken is asked for again from the last proof on, and
the second time from the beginning.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from broker.sdk.clock import Timing
from broker.sdk.verifier import jose
from broker.sdk.verifier.feed import Broken, Feed, Statement, statement_of
from broker.sdk.verifier.jose import NotReadable
from broker.sdk.verifier.keys import AGAIN_AFTER_S, REFRESH_S, Keys
from broker.sdk.verifier.moments import BrokerTime
from broker.sdk.verifier.signed import UnknownKey, claims_of
from broker.sdk.verifier.stream import frames
from broker.sdk.verifier.transport import Lost, Transport

_log = logging.getLogger("broker.sdk.verifier")

_STREAM, _POLL = "/v1/revocations/feed", "/v1/revocations"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 5.0
_STREAMS_FAIL = 2
_STREAM_AGAIN_S = 30.0
_SILENCE_S = 5.0  # the broker says something every two seconds
_UNPROVEN_IN_A_ROW = 3
_MAX_STATEMENT_BYTES = 8192
_MAX_PAGE_BYTES = 1000 * 4096


class Follower:
    """`lock` guards `feed` and `time`, which others read; `changed` is told when a proof or a failure is new."""

    def __init__(
        self,
        *,
        feed: Feed,
        keys: Keys,
        transport: Transport,
        time: BrokerTime,
        lock: Any,
        changed: threading.Condition,
        timing: Timing,
        issuer: str,
        bound_s: int,
        asks: bool,
    ) -> None:
        self._feed, self._keys, self._transport, self._time = feed, keys, transport, time
        self._lock, self._changed, self._timing = lock, changed, timing
        self._issuer, self._bound_s, self._asks = issuer, bound_s, asks
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._broken_in_a_row = 0
        self._unproven_in_a_row = 0
        self._proofs = 0  # on this connection
        self.channel = "none"
        self.problem: str | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="broker-verifier", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._transport.cut()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_SILENCE_S + 1)

    def _run(self) -> None:
        streams, failed, streams_failed = True, 0, 0
        while not self._over.is_set():
            self._keys.refresh(at_most_every_s=REFRESH_S if self._keys.now else AGAIN_AFTER_S)
            if not self._asks:
                self._tell(None)
                self._over.wait(AGAIN_AFTER_S)
                continue
            good = self._proved(self._stream if streams else self._poll)
            failed = 0 if good else failed + 1
            if streams:
                streams_failed = 0 if good else streams_failed + 1
                streams = streams_failed < _STREAMS_FAIL
            else:
                # Once only: while polls work, each of these interrupts them.
                streams, streams_failed = True, _STREAMS_FAIL - 1
            self._pause(failed)

    def _proved(self, way: Callable[[], None]) -> bool:
        """Whether a statement was proven on the way, however it ended."""
        self._proofs = 0
        why = "the connection ended"
        try:
            way()
        except (Lost, NotReadable) as problem:
            why = str(problem)
        except Broken as problem:
            why = str(problem)
            self._broken_in_a_row += 1
            _log.warning("the feed is not believed: %s", why)
            with self._lock:
                self._feed.distrust(start_over=self._broken_in_a_row > 1)
        except Exception as problem:  # a thread that died would leave everything refused, and nobody would know why
            why = f"it failed ({type(problem).__name__})"
            _log.error("following the feed failed: %s", type(problem).__name__)
        self._tell(why)
        return self._proofs > 0

    def _pause(self, failed: int) -> None:
        longest = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(failed, 8))
        self._over.wait(longest * (0.5 + self._timing.chance() / 2))

    def _tell(self, problem: str | None) -> None:
        if problem is not None and problem != self.problem and not self._over.is_set():
            _log.info("the feed of revocations is interrupted: %s", problem)
        self.problem = problem
        with self._changed:
            self._changed.notify_all()

    def _stream(self) -> None:
        position = self._feed.position
        headers = {} if position is None else {"Last-Event-ID": str(position)}
        last_proof_at, proofs = self._timing.monotonic(), 0
        with self._transport.stream(_STREAM, headers, _SILENCE_S) as pieces:
            for frame in frames(pieces):
                if self._over.is_set():
                    return
                if frame.event == "revocation":
                    with self._lock:
                        self._feed.event(frame.data)
                elif frame.event == "statement":
                    self._state(jose.members(frame.data.encode()).get("statement"), "stream")
                elif frame.event == "reset":
                    with self._lock:
                        self._feed.reset(jose.members(frame.data.encode()))
                now = self._timing.monotonic()
                if self._proofs > proofs:
                    last_proof_at, proofs = now, self._proofs
                elif now - last_proof_at > self._bound_s:
                    # Bytes come, and prove nothing: another connection may do better.
                    raise Lost("nothing was proven for so long as answers may be believed")

    def _poll(self) -> None:
        until = self._timing.monotonic() + _STREAM_AGAIN_S * (1 + self._timing.chance())
        while not self._over.is_set() and self._timing.monotonic() < until:
            asked_at = self._timing.monotonic()
            position = self._feed.position
            wait_s = 0 if position is None else max(1, min(30, self._bound_s // 3))
            after = "" if position is None else f"&after={quote(str(position), safe='')}"
            body = self._transport.get(
                f"{_POLL}?wait={wait_s}{after}",
                accept="application/json",
                max_bytes=_MAX_PAGE_BYTES,
                authenticated=True,
                wait_s=wait_s,
            )
            count = self._page(jose.members(body, max_bytes=_MAX_PAGE_BYTES))
            if not count and self._timing.monotonic() - asked_at < wait_s / 2:
                # It has nothing and does not wait either: it is not asked without end.
                self._over.wait(_FIRST_PAUSE_S)

    def _page(self, page: Mapping[str, Any]) -> int:
        items, reset = page.get("items"), page.get("reset")
        if not isinstance(items, list) or not isinstance(reset, dict | None) or len(items) > 1000:
            raise NotReadable("the answer is no page of the feed")
        with self._lock:
            if reset is not None:
                self._feed.reset(reset)
            for item in items:
                data = item.get("data") if isinstance(item, dict) else None
                if not isinstance(data, str):
                    raise NotReadable("the answer is no page of the feed")
                self._feed.event(data)
        # A full page is followed by another, and only then may there be what the statement speaks of.
        self._state(page.get("statement"), "poll", more=bool(items))
        return len(items)

    def _state(self, statement: object, channel: str, *, more: bool = False) -> None:
        if not isinstance(statement, str):
            raise NotReadable("there is no statement where one has to be")
        read = self._read(statement)
        with self._lock:
            proven = self._feed.statement(read)
            waits = self._feed.position is not None and self._feed.position.seq < read.seq
        if proven:
            self._proofs += 1
            self._broken_in_a_row = self._unproven_in_a_row = 0
            if self.channel != channel or self.problem is not None:
                _log.info("the feed of revocations is followed by %s", channel)
            self.channel, self.problem = channel, None
            self._tell(None)
        elif waits and not more:
            self._unproven_in_a_row += 1
            if self._unproven_in_a_row >= _UNPROVEN_IN_A_ROW:
                self._unproven_in_a_row = 0
                raise Broken("events that the broker speaks of do not come")
        self._keys.refresh(at_most_every_s=REFRESH_S)

    def _read(self, statement: str) -> Statement:
        try:
            claims = self._claims(statement)
        except UnknownKey:
            self._keys.refresh()
            claims = self._claims(statement)
        with self._lock:
            return statement_of(claims, self._time, bound_s=self._bound_s)

    def _claims(self, statement: str) -> Mapping[str, Any]:
        return claims_of(
            statement,
            self._keys,
            typ="feed-statement+jwt",
            issuer=self._issuer,
            max_bytes=_MAX_STATEMENT_BYTES,
            refuses_key=self._feed.refuses_key,
        )
