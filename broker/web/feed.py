"""The feed as it goes over the wire: server-sent events (WHATWG HTML, 9.2), and the answers to whoever polls.

Two servers give it out, `broker serve` a few streams and `broker.web.feed_server` many; what a reader gets is made here
for both. Bytes that many readers get at once are made once.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from typing import Any

from broker import telemetry
from broker.domain.errors import BrokerError, Invalid
from broker.domain.feed import Position, Seen
from broker.domain.identity import Caller
from broker.services.broadcast import Edition
from broker.services.feed import Event, Start
from broker.web.context import current
from broker.wiring import Broker

MEDIA_TYPE = "text/event-stream"
# What a proxy must not do with a stream: keep it, change it, or wait until it has enough of it.
HEADERS = (("Content-Type", MEDIA_TYPE), ("Cache-Control", "no-store, no-transform"), ("X-Accel-Buffering", "no"))
STILL_THERE = b":\n\n"
MOST_ITEMS = 1000
# What goes to one reader at once: it may leave no more than that unread, and the loop that tells all of them makes it.
_AT_ONCE = 200
_BYTES_AT_ONCE = 64 * 1024
_RETRY = b"retry: 1000\n\n"
_LOOK_AGAIN_S = 2.0


def event(feed_id: str, seq: int, text: str) -> str:
    return f"id: {feed_id}:{seq}\nevent: revocation\ndata: {text}\n\n"


def _statement(statement: str) -> str:
    return f'event: statement\ndata: {{"statement":"{statement}"}}\n\n'


def reset_of(seen: Seen) -> dict[str, Any]:
    return {"feed": seen.feed_id, "seq": seen.seq, "head": seen.head}


@lru_cache(maxsize=32)
def news(edition: Edition, seq: int, stated: bool) -> bytes | None:
    """What is new in an edition for those who have come so far; None if it is too much, or not all remembered."""
    if edition.seq - seq > _AT_ONCE:
        return None
    texts = edition.after(seq)
    if texts is None or sum(map(len, texts)) > _BYTES_AT_ONCE:
        return None
    lines = [event(edition.feed_id, number, text) for number, text in enumerate(texts, seq + 1)]
    if edition.statement is not None and not stated:
        lines.append(_statement(edition.statement))
    return "".join(lines).encode()


def wanted() -> Position | None:
    """How far the caller says it has come, by the `Last-Event-ID` of a stream that broke.

    What we never gave out as an id is another feed's, and not an error: a browser's reader could not take it back.
    """
    text = current().header("Last-Event-ID")
    if text is None:
        return None
    try:
        return Position.parse(text)
    except Invalid:
        return Position(feed_id="", seq=0)


class Stream:
    """One reader's place in the feed, and what it is to get next."""

    __slots__ = ("_stated", "caller", "ends_at", "feed_id", "seq")

    def __init__(self, caller: Caller, start: Start, ends_at: datetime) -> None:
        self.caller = caller
        self.ends_at = ends_at
        self.feed_id = start.position.feed_id
        self.seq = start.position.seq
        self._stated = -1

    def opening(self, start: Start) -> bytes:
        if start.reset is None:
            return _RETRY
        reset = json.dumps(reset_of(start.reset), separators=(",", ":"))
        return _RETRY + f"id: {start.position}\nevent: reset\ndata: {reset}\n\n".encode()

    def next(self, edition: Edition, made: Callable[[Edition, int, bool], bytes | None] = news) -> bytes | None:
        """What is new for it, perhaps nothing; None where it has to be given `missed` events first."""
        if edition.seq < self.seq:
            return b""  # it has come further already, by a look of its own
        found = made(edition, self.seq, self._stated == edition.stated)
        if found is not None:
            self.seq, self._stated = edition.seq, edition.stated
        return found

    def missed(self, events: Iterable[Event]) -> bytes:
        """So many of the next events as fit; nothing if they are not kept any more, and then it has to start anew."""
        self.seq, made = _part(self.feed_id, self.seq, events)
        return made

    def remembered(self, edition: Edition) -> bytes | None:
        """The same, out of an edition; None where that does not remember them."""
        found = _remembered(edition, self.seq)
        if found is None:
            return None
        self.seq, made = found
        return made


def _part(feed_id: str, last: int, events: Iterable[Event]) -> tuple[int, bytes]:
    """So many of the events after the last one as fit, and which is the last one then."""
    lines: list[str] = []
    left = _BYTES_AT_ONCE
    for seq, text in events:
        left -= len(text)
        if seq != last + 1 or (lines and left < 0):
            break
        last = seq
        lines.append(event(feed_id, seq, text))
    return last, "".join(lines).encode()


@lru_cache(maxsize=64)
def _remembered(edition: Edition, seq: int) -> tuple[int, bytes] | None:
    texts = edition.after(seq)
    return None if texts is None else _part(edition.feed_id, seq, _numbered(texts[:_AT_ONCE], seq))


def _numbered(texts: Sequence[str], last: int) -> list[Event]:
    return [Event(seq, text) for seq, text in enumerate(texts, last + 1)]


def missed(house: Broker, stream: Stream, edition: Edition) -> bytes:
    """A part of what the reader of a stream missed, out of the edition where that remembers it. May ask the store."""
    made = stream.remembered(edition)
    if made is not None:
        return made
    last = Position(feed_id=stream.feed_id, seq=stream.seq)
    return stream.missed(house.feed.replay(last, edition.seq, at_most=_AT_ONCE))


def opened(house: Broker, caller: Caller) -> tuple[Stream, Edition, bytes]:
    """A stream for this caller, the edition it begins with, and its first bytes. Ends with the caller's token."""
    house.feed.admit(caller)
    edition, start = house.broadcast.begin(wanted())
    ends_at = min(caller.proof_expires_at, house.clock() + house.settings.feed.longest_stream)
    stream = Stream(caller, start, ends_at)
    return stream, edition, stream.opening(start)


def goes_on(house: Broker, stream: Stream, edition: Edition, now: datetime) -> bool:
    """Whether its caller may read on, and still reads this feed."""
    return now < stream.ends_at and stream.feed_id == edition.feed_id and house.feed.still_reads(stream.caller)


class Streaming:
    """The body of a stream in `broker serve`: it holds a thread and a place until it is closed."""

    def __init__(self, house: Broker, stream: Stream, edition: Edition, first: bytes) -> None:
        self._house = house
        self._caller = stream.caller
        self._parts = self._until_unavailable(self._read(stream, edition, first))
        self._open = True
        telemetry.streams(1)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self._parts)

    def _read(self, stream: Stream, edition: Edition, first: bytes) -> Iterator[bytes]:
        house = self._house
        yield first
        with house.broadcast.reading():
            while goes_on(house, stream, edition, house.clock()) and not house.broadcast.is_stopped:
                part = stream.next(edition)
                if part is None:
                    part = missed(house, stream, edition)
                    if not part:
                        return  # it comes again and says how far it has come; what is not kept any more is a reset then
                    yield part
                    continue
                if part:
                    yield part
                newer = house.broadcast.wait(edition, at_most_s=_LOOK_AGAIN_S)
                if newer is edition:
                    # Nothing to say: whether somebody listens shows only when something is said.
                    yield STILL_THERE
                edition = newer

    @staticmethod
    def _until_unavailable(parts: Iterator[bytes]) -> Iterator[bytes]:
        # What was sent cannot be taken back: a stream that cannot go on ends, and its reader comes again.
        with contextlib.suppress(BrokerError):
            yield from parts

    def close(self) -> None:
        if self._open:
            self._open = False
            self._parts.close()  # type: ignore[attr-defined]
            self._house.feed_places.give_back(self._caller.name)
            telemetry.streams(-1)


def streaming(house: Broker, caller: Caller) -> Streaming:
    """The body of a stream; Unavailable where as many are open as may."""
    house.feed.admit(caller)
    house.feed_places.take(caller.name)
    try:
        return Streaming(house, *opened(house, caller))
    except BaseException:
        house.feed_places.give_back(caller.name)
        raise


class Poll:
    """One question of somebody who polls: what came after this?"""

    def __init__(self, house: Broker, caller: Caller, after: Position | None) -> None:
        self._house = house
        self.caller = caller
        house.feed.admit(caller)
        self.edition, self._start = house.broadcast.begin(after)

    @property
    def is_answered(self) -> bool:
        return self._start.reset is not None or self.edition.seq > self._start.position.seq

    def hear(self, edition: Edition) -> bool:
        """Whether there is something to answer, now that this is the newest edition."""
        self.edition = edition
        return edition.feed_id != self._start.position.feed_id or self.is_answered

    def answer(self) -> dict[str, Any]:
        """May ask the store."""
        if self.edition.feed_id != self._start.position.feed_id:
            self.edition, self._start = self._house.broadcast.begin(self._start.position)
        events = self._events()
        if not events and self.is_answered and self._start.reset is None:
            # What it missed is not kept any more, or of another feed by now.
            self.edition = self._house.broadcast.look()
            self._start = self._house.feed.start(None, self.edition.looked)
        edition, start = self.edition, self._start
        position = replace(start.position, seq=events[-1].seq) if events else start.position
        return {
            "items": [{"seq": number, "data": text} for number, text in events],
            "next_after": str(position),
            "statement": edition.statement,
            "reset": None if start.reset is None else reset_of(start.reset),
        }

    def _events(self) -> Sequence[Event]:
        last = self._start.position
        if self._start.reset is not None or self.edition.seq <= last.seq:
            return ()
        texts = self.edition.after(last.seq)
        if texts is None:
            return self._house.feed.replay(last, self.edition.seq, at_most=MOST_ITEMS)
        return _numbered(texts[:MOST_ITEMS], last.seq)


def polled(house: Broker, caller: Caller, after: Position | None, wait_s: int) -> dict[str, Any]:
    """The answer to one who polls; where too many wait already, at once."""
    poll = Poll(house, caller, after)
    if wait_s > 0 and not poll.is_answered and house.feed_waiting.try_take(caller.name):
        try:
            with house.broadcast.reading():
                house.broadcast.until(poll.edition, poll.hear, at_most_s=wait_s)
        finally:
            house.feed_waiting.give_back(caller.name)
    return poll.answer()
