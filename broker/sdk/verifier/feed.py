"""The feed of revocations as a state machine without I/O: what is refused, and until when a "not refused" counts.

Events come one after the other and are chained by a hash. A signed statement says which event is the newest and what
the chain is there. So a statement that fits proves that nothing was forged, changed, left out or exchanged, and until
it is too old, that nothing was revoked since. An event is refused by at once, before any statement speaks of it. What
turns out to be no part of the chain is taken back, together with all trust in what was received after the last proof:
then nothing but a status list fetched later says yes, until the chain is whole again.

Not thread-safe: whoever holds it brings a lock.
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from broker.sdk.verifier import jose
from broker.sdk.verifier.jose import NotReadable
from broker.sdk.verifier.moments import LEEWAY_S, OVER, BrokerTime, Moment, Until
from broker.sdk.verifier.tokens import Mark, Token

MAX_EVENT_BYTES = 65_536
AXES = ("agent", "user", "resource", "key", "all")
_FEED_ID = re.compile(r"[A-Za-z0-9_.~-]{1,128}")
_HEADS_KEPT = 1024
_UNPROVEN_KEPT = 200_000
_PASSED_OVER = 3
_NEVER = float("inf")


class Broken(Exception):
    """The feed contradicts itself. Nothing received since the last proof is believed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    feed: str
    seq: int
    head: bytes = field(repr=False)

    def __str__(self) -> str:
        return f"{self.feed}:{self.seq}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """What the broker signed about its feed, and for how long that is fresh."""

    feed: str
    seq: int
    head: bytes = field(repr=False)
    issued_at: int
    until: Until


@dataclass(frozen=True, kw_only=True, slots=True)
class Since:
    """From when on a status list has to be, to say yes: the monotonic time it was asked for, and its `iat`.

    `complete_from` is for one that is kept and brought up to date by the feed: its `iat` has to be later than the
    moment from which on we have every event. None: no statement about event `seq` or a later one has said yet when
    that was.
    """

    asked_after: float
    seq: int = 0
    issued_from: int = 0
    complete_from: int | None = None


class Refusals:
    """What is refused, until no token it could concern is alive."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._grants: dict[str, float] = {}
        self._tasks: dict[str, float] = {}
        self._marks: dict[Mark, tuple[int, float]] = {}

    def __len__(self) -> int:
        return len(self._grants) + len(self._tasks) + len(self._marks)

    def over(self, token: Token) -> bool:
        if token.grant_id in self._grants or token.task_id in self._tasks:
            return True
        marks = self._marks
        return bool(marks) and any(
            token.issued_at <= found[0] for mark in token.marks if (found := marks.get(mark)) is not None
        )

    def over_key(self, kid: str, issued_at: int) -> bool:
        before, forget_at = self._marks.get(("key", kid), (0, 0.0))
        return issued_at < before and forget_at == _NEVER

    def add(self, refusal: Refusal, forget_at: float) -> bool:
        """Whether there was room for it."""
        if len(self) >= self._most:
            return False
        if refusal.kind == "grant":
            self._grants[refusal.name] = max(self._grants.get(refusal.name, 0.0), forget_at)
        elif refusal.kind == "task":
            self._tasks[refusal.name] = max(self._tasks.get(refusal.name, 0.0), forget_at)
        else:
            mark = (refusal.kind, refusal.name)
            before, until = self._marks.get(mark, (0, 0.0))
            self._marks[mark] = (max(before, refusal.issued_before), max(until, forget_at))
        return True

    def forget(self, now: float) -> None:
        for ends in (self._grants, self._tasks):
            for name in [name for name, end in ends.items() if end <= now]:
                del ends[name]
        for mark in [mark for mark, (_, end) in self._marks.items() if end <= now]:
            del self._marks[mark]


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """`kind` is grant, task or an axis of bulk revocations; `issued_before` counts for these alone."""

    kind: str
    name: str
    issued_before: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """`refusal` is None where it does not say whom it concerns: then only a newer status list can.

    `unsure`: it may concern tokens beyond its refusal as well, of which a newer status list knows.
    """

    seq: int
    at: int
    refusal: Refusal | None
    unsure: bool


class Feed:
    def __init__(self, time: BrokerTime, *, longest_life_s: int, most_refusals: int) -> None:
        self._time = time
        self._kept_s = longest_life_s + 120  # clocks differ, and nothing depends on forgetting early
        self._most = most_refusals
        self._proven_refusals = Refusals(most_refusals)
        self._unproven: deque[Event] = deque()
        self._unproven_refusals = Refusals(_UNPROVEN_KEPT)
        self._heads: dict[int, bytes] = {}
        self._waiting: Statement | None = None
        self._proven_at = 0
        self._passed_over: tuple[int | None, int] = (None, 0)
        self._forgot_at = 0.0
        self.position: Position | None = None
        self.proven: Position | None = None
        self.fresh = OVER
        self.since = Since(asked_after=float("-inf"))

    def refuses(self, token: Token) -> bool:
        return self._unproven_refusals.over(token) or self._proven_refusals.over(token)

    def refuses_key(self, kid: str, issued_at: int) -> bool:
        """Whether nothing counts any more that this key signed at this time.

        Not by what a statement can still bear out: otherwise a forged event would silence the very statements that do
        not. A reset takes that chance away, and from then on it counts: who has a key that leaked could send one.
        """
        return self._proven_refusals.over_key(kid, issued_at)

    def is_fresh(self, now: Moment) -> bool:
        return not self.fresh.is_over(now)

    def __len__(self) -> int:
        return len(self._proven_refusals) + len(self._unproven)

    def reset(self, members: Mapping[str, Any]) -> None:
        """Go on from somewhere else. All refusals stay (INV-23), and every status list is too old now."""
        try:
            feed, seq, head = jose.text(members, "feed"), members.get("seq"), jose.decoded(members.get("head"))
        except NotReadable:
            raise Broken("a reset does not say where to go on") from None
        if not _FEED_ID.fullmatch(feed) or type(seq) is not int or seq < 0 or len(head) != 32:
            raise Broken("a reset does not say where to go on")
        if seq == 0 and head != _first_head(feed):
            raise Broken("the chain does not begin with the feed's own name")
        self._keep_unproven()
        self.position = Position(feed=feed, seq=seq, head=head)
        self.proven, self._proven_at, self.fresh, self._waiting = None, 0, OVER, None
        self._heads = {seq: head}
        self._only_newer_lists()

    def event(self, data: str) -> None:
        """One event, exactly as it was sent. One that was here before is passed over."""
        if self.position is None:
            raise Broken("an event came before the feed said where it begins")
        event = self._read(data)
        if event.seq <= self.position.seq:
            before, known = self._heads.get(event.seq - 1), self._heads.get(event.seq)
            if before is not None and known is not None and _next_head(before, data) != known:
                raise Broken(f"event {event.seq} came again and was another one")
            return
        if event.seq != self.position.seq + 1:
            raise Broken(f"after event {self.position.seq} came event {event.seq}")
        if len(self._unproven) >= _UNPROVEN_KEPT:
            raise Broken("too many events came without a statement")
        head = _next_head(self.position.head, data)
        self.position = Position(feed=self.position.feed, seq=event.seq, head=head)
        self._heads[event.seq] = head
        self._heads.pop(event.seq - _HEADS_KEPT, None)
        self._unproven.append(event)
        if event.refusal is None or event.unsure:
            self._only_newer_lists(issued_from=event.at)
        if event.refusal is not None:
            self._unproven_refusals.add(event.refusal, _NEVER)
        if self._waiting is not None and self._waiting.seq == event.seq:
            self._prove(self._waiting)

    def statement(self, statement: Statement) -> bool:
        """Whether it proves what we have; one that speaks of more waits until that has come."""
        if self.position is None or statement.feed != self.position.feed:
            raise Broken("a statement is about another feed")
        if statement.seq > self.position.seq:
            if self._waiting is None or statement.issued_at >= self._waiting.issued_at:
                self._waiting = statement
            return False
        return self._prove(statement)

    def distrust(self, *, start_over: bool) -> None:
        """Go back to the last proof, or to nothing where that did not help, and forget what came after it."""
        self.position = None if start_over else self.proven
        self.proven, self.fresh, self._waiting = self.position, OVER, None
        self._unproven.clear()
        self._unproven_refusals = Refusals(_UNPROVEN_KEPT)
        self._heads = {} if self.position is None else {self.position.seq: self.position.head}
        self._only_newer_lists()

    def _prove(self, statement: Statement) -> bool:
        if self.proven is not None and statement.seq < self.proven.seq and statement.issued_at > self._proven_at:
            # What comes next would have numbers that we know, and would be passed over.
            raise Broken("the feed was set back")
        head = self._heads.get(statement.seq)
        if head is None:
            return False  # of so long ago that it proves nothing new
        if head != statement.head:
            raise Broken("the chain of events is not the one that the broker signed")
        self._waiting = None
        if self.proven is None or statement.seq >= self.proven.seq:
            self.proven = Position(feed=statement.feed, seq=statement.seq, head=head)
            self._proven_at = max(self._proven_at, statement.issued_at)
        self._believe(statement.seq)
        self._require_spoken_of()
        if statement.until.monotonic > self.fresh.monotonic:
            self.fresh = statement.until
        if self.since.complete_from is None and statement.seq >= self.since.seq:
            # One more, because whole seconds were cut off: what happened within that one may have come after the list.
            self.since = replace(self.since, complete_from=statement.issued_at + 1)
        return True

    def _require_spoken_of(self) -> None:
        """An event may be sent right before the statement that does not know it yet, but not before several."""
        oldest = self._unproven[0].seq if self._unproven else None
        self._passed_over = (oldest, self._passed_over[1] + 1 if self._passed_over[0] == oldest else 1)
        if oldest is not None and self._passed_over[1] >= _PASSED_OVER:
            raise Broken("the broker does not speak of an event that came")

    def _believe(self, seq: int) -> None:
        """Events up to `seq` are proven: what they refuse is refused for as long as it matters."""
        now = self._time.now().monotonic
        if now - self._forgot_at > 60:
            self._forgot_at = now
            self._proven_refusals.forget(now)
        if not self._unproven:
            return
        while self._unproven and self._unproven[0].seq <= seq:
            self._keep(self._unproven.popleft(), now)
        self._unproven_refusals = Refusals(_UNPROVEN_KEPT)
        for event in self._unproven:
            if event.refusal is not None:
                self._unproven_refusals.add(event.refusal, _NEVER)

    def _keep_unproven(self) -> None:
        now = self._time.now().monotonic
        while self._unproven:
            self._keep(self._unproven.popleft(), now)
        self._unproven_refusals = Refusals(_UNPROVEN_KEPT)

    def _keep(self, event: Event, now: float) -> None:
        # Whoever has a key that leaked goes on signing with it.
        is_key = event.refusal is not None and event.refusal.kind == "key"
        forget_at = _NEVER if is_key else now + self._kept_s
        # What cannot be remembered is left to the status lists, so that a flood of revocations revokes too much for a
        # moment and never too little.
        if event.refusal is not None and not self._proven_refusals.add(event.refusal, forget_at):
            self._only_newer_lists(issued_from=event.at)

    def _only_newer_lists(self, *, issued_from: int = 0) -> None:
        self.since = Since(
            asked_after=self._time.now().monotonic,
            seq=0 if self.position is None else self.position.seq,
            issued_from=max(self.since.issued_from, issued_from),
        )

    def _read(self, data: str) -> Event:
        try:
            members = jose.members(data.encode(), max_bytes=MAX_EVENT_BYTES)
        except (NotReadable, UnicodeEncodeError):
            raise Broken("an event cannot be read") from None
        seq = members.get("seq")
        if type(seq) is not int or seq < 1:
            raise Broken("an event has no number")
        # A time that is far ahead would have no list be new enough.
        latest = int(self._time.now().broker) + LEEWAY_S
        at, refusal = min(_at(members.get("at")), latest), _refusal(members)
        unsure_after = members.get("unsure_after")
        if refusal is None or type(unsure_after) is not int or not 0 <= unsure_after < refusal.issued_before:
            return Event(seq=seq, at=at, refusal=refusal, unsure=False)
        # What was issued later may be of after the revocation. Until then all of it was of before.
        return Event(seq=seq, at=at, refusal=replace(refusal, issued_before=unsure_after), unsure=True)


def _refusal(members: Mapping[str, Any]) -> Refusal | None:
    """Whom an event concerns; None where that cannot be said, which concerns everybody."""
    kind = members.get("kind")
    try:
        if kind in ("grant", "task"):
            return Refusal(kind=kind, name=jose.text(members, f"{kind}_id"))
        named = [axis for axis in AXES if axis in members]
        if kind != "tokens" or len(named) != 1:
            return None
        (axis,) = named
        before = jose.seconds(members, "issued_before")
        if axis == "all" and members["all"] is not True:
            return None
        name = "" if axis == "all" else jose.text(members, axis)
    except NotReadable:
        return None
    return Refusal(kind=axis, name=name, issued_before=before)


def _at(value: object) -> int:
    try:
        return int(datetime.fromisoformat(str(value)).timestamp())
    except (ValueError, OverflowError, OSError):
        return 0


def _first_head(feed: str) -> bytes:
    return hashlib.sha256(feed.encode()).digest()


def _next_head(head: bytes, data: str) -> bytes:
    return hashlib.sha256(head + data.encode()).digest()


def statement_of(claims: Mapping[str, Any], time: BrokerTime, *, bound_s: int, longest_s: int = 60) -> Statement:
    """A statement whose signature was verified, as it was received now; NotReadable for one that proves nothing."""
    issued_at, expires_at = jose.seconds(claims, "iat"), jose.seconds(claims, "exp")
    if not issued_at < expires_at <= issued_at + longest_s:
        raise NotReadable("it does not say for how long it is true")
    seq, head = claims.get("seq"), jose.decoded(claims.get("head"))
    if type(seq) is not int or seq < 0 or len(head) != 32:
        raise NotReadable("it does not say where the feed is")
    if not time.saw(issued_at):
        raise NotReadable(f"this machine's clock is {time.behind_s:.0f} s behind the issuer's")
    until = time.until(issued_at, min(bound_s, expires_at - issued_at))
    now = time.now()
    if until.is_over(now):
        late = now.broker - issued_at
        raise NotReadable(f"it is {late:.0f} s old, or this machine's clock is ahead of the issuer's")
    return Statement(
        feed=jose.text(claims, "feed"),
        seq=seq,
        head=head,
        issued_at=issued_at,
        until=until,
    )
