"""The feed: what ended, numbered and chained, and a statement that vouches for it.

What ends authority writes to an outbox in its own transaction (`broker.store.feed.announce`), so what was committed is
told and nothing else. Here it gets its numbers; any process may do that, and several at once do it once. Where a reader
cannot be given all it missed it is told to start anew, and never left to believe that it heard everything (INV-25).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

from broker.domain import audit
from broker.domain.clock import Clock, epoch
from broker.domain.errors import RoleMissing, Unauthenticated, Unavailable
from broker.domain.feed import Position, Seen, first_head, next_head
from broker.domain.identity import Caller, Role, new_id
from broker.domain.receipt import COMMITTED_WITHIN, OFFLINE_BOUND
from broker.services.endings import ACTOR
from broker.services.refusals import recorded
from broker.services.standing import StandingReader, current_caller
from broker.store import feed
from broker.store.database import Database
from broker.store.transitions import record

# Older than this, a statement vouches for nothing (INV-25): what has a time before `iat` may be committed after it, and
# its receipt promises the published bound from that time on.
BOUND = OFFLINE_BOUND - COMMITTED_WITHIN
# A broker keeps a status list for 2 s, in whole seconds. Whoever starts anew hears what came since then as events, so
# that a list they fetch now and the feed together miss nothing.
_LOOKS_BACK = timedelta(seconds=5)
# A lost heartbeat ends a task when the sweeper comes by, every second. If it does not, we cannot vouch for the feed.
_SWEPT_WITHIN = COMMITTED_WITHIN
# A shortened grant is told by the first look after its end, unless another process stalls while it holds the row.
_TOLD_WITHIN = timedelta(seconds=2)
AT_ONCE = 1000
READERS = (Role.VERIFIER, Role.AUDITOR, Role.ADMIN)
STATEMENT_TYPE = "feed-statement+jwt"

_log = logging.getLogger(__name__)


class Event(NamedTuple):
    """One event as it goes out."""

    seq: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Looked:
    """The feed when all that was committed before `at` had its number; `vouched` if nothing else had ended by then."""

    seen: Seen
    at: datetime
    vouched: bool


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a reader begins: where it was, or with a `reset` to where it has to."""

    position: Position
    reset: Seen | None = None


class Feed:
    def __init__(self, *, database: Database, standing: StandingReader, issuer: str, clock: Clock) -> None:
        self._database = database
        self._standing = standing
        self._issuer = issuer
        self._clock = clock
        self._looking = threading.Lock()
        self._newest: Seen | None = None

    def admit(self, caller: Caller) -> None:
        """Refuse whoever is no verifier, auditor or admin: the feed names grants, tasks and agents (INV-28)."""
        with recorded(self._database, self._clock, caller, "feed.refused", "read"):
            if not any(caller.has(role) for role in READERS):
                raise RoleMissing(f"{caller.name} is no verifier, auditor or admin: only those read the feed")

    def still_reads(self, caller: Caller) -> bool:
        """Whether its token is good still, and it is a reader in the newest configuration this process knows."""
        if caller.proof_expires_at <= self._clock():
            return False
        try:
            known = current_caller(caller, self._standing.last_known())
        except Unauthenticated:
            return False
        return any(known.has(role) for role in READERS)

    def advance(self) -> bool:
        """Have a number for everything that was committed before this was called.

        Answers whether all that had ended by then was among it, so far as no token says it by itself.
        """
        now = self._clock()
        with self._database.read() as db:
            due = feed.any_shortened_due(db, now=now)
        while due:
            with self._database.begin() as db:
                due = feed.tell_shortened(db, now=now, at_most=AT_ONCE) == AT_ONCE
        with self._database.read() as db:
            # Before anything is numbered: what is told from here on may have missed its number, and shows here.
            untold = feed.any_shortened_due(db, now=now - _TOLD_WITHIN)
            untold = untold or feed.heartbeats_lost(db, before=now - _SWEPT_WITHIN, now=now)
        with self._database.read() as db:
            seen = feed.look(db)
        while seen.waiting or not seen.feed_id:
            with self._database.begin() as db:
                if feed.number(db, now=now, at_most=AT_ONCE) < AT_ONCE:
                    break
        return not untold

    def look(self) -> Looked:
        """Number what waits, and look. A feed that went back in time is replaced by another (INV-23)."""
        # One at a time: of two looks the later one may be compared first, and the earlier one would seem a step back.
        with self._looking:
            at = self._clock()
            vouched = self.advance()
            seen = self._seen()
            newest = self._newest
            if newest is not None and newest.feed_id == seen.feed_id and _went_back(newest, seen):
                self.renew("its newest event is older than one that was seen", instead_of=seen.feed_id)
                vouched = self.advance()
                seen = self._seen()
            self._newest = seen
            self._standing.now()
            return Looked(seen=seen, at=at, vouched=vouched)

    def _seen(self) -> Seen:
        with self._database.read() as db:
            return feed.look(db)

    def since(self, last: Seen, looked: Seen) -> Sequence[str]:
        """The texts between two looks at one feed; if they do not continue its chain, it is replaced by another."""
        with self._database.read() as db:
            rows = feed.page(db, after=last.seq, upto=looked.seq, limit=looked.seq - last.seq)
        head = last.head
        for row in rows:
            head = next_head(head, row.text)
        if head != looked.head or len(rows) != looked.seq - last.seq:
            self.renew("its events are not those that were seen", instead_of=looked.feed_id)
            raise Unavailable("the feed begins anew: try again")
        return [row.text for row in rows]

    def replay(self, last: Position, upto: int, *, at_most: int = AT_ONCE) -> Sequence[Event]:
        """The next events that a reader missed; none where the next one is not kept, or it is another feed by now."""
        with self._database.read() as db:
            rows = feed.page(db, after=last.seq, upto=upto, limit=at_most)
            # Looked at afterwards: a feed that is still this one was this one when the events were read.
            still = feed.look(db).feed_id == last.feed_id
        # What is forgotten goes from the oldest on, so that a gap anywhere else is nothing we told.
        if not still or [row.seq for row in rows] != list(range(last.seq + 1, last.seq + 1 + len(rows))):
            return ()
        return [Event(row.seq, row.text) for row in rows]

    def start(self, wanted: Position | None, looked: Looked) -> Start:
        """Where a reader that came so far goes on; a reset where that is another feed, or not kept any more."""
        seen = looked.seen
        if wanted is not None and wanted.feed_id == seen.feed_id and wanted.seq <= seen.seq:
            if wanted.seq == seen.seq:
                return Start(position=wanted)
            with self._database.read() as db:
                oldest = feed.oldest(db)
            if oldest is not None and oldest <= wanted.seq + 1:
                return Start(position=wanted)
        with self._database.read() as db:
            row = feed.before(db, looked.at - _LOOKS_BACK)
        seq, head = (0, first_head(seen.feed_id)) if row is None else (int(row.seq), str(row.head))
        reset = Seen(feed_id=seen.feed_id, seq=seq, head=head)
        return Start(position=reset.position, reset=reset)

    def statement(self, looked: Looked) -> str | None:
        """That this was all by then, signed; None where that cannot be said."""
        if not looked.vouched:
            _log.error(
                "the feed is not vouched for: a task lost its heartbeat and nobody ended it (does a sweeper run?), or "
                "a shortened grant is over and who is to tell of it stalls (does every broker get on?)"
            )
            return None
        claims = {
            "iss": self._issuer,
            "iat": epoch(looked.at),
            "exp": epoch(looked.at + BOUND),
            "feed": looked.seen.feed_id,
            "seq": looked.seen.seq,
            "head": looked.seen.head,
        }
        try:
            return self._standing.last_known().keys.attesting("ES256").sign(claims, typ=STATEMENT_TYPE)
        except Unavailable as problem:
            _log.warning("the feed is not vouched for", extra={"fields": {"detail": problem.detail}})
            return None

    def renew(self, why: str, *, by: str = ACTOR, instead_of: str | None = None) -> bool:
        """Begin another feed, so that every reader starts anew: what it is numbered by went back in time."""
        with self._database.begin() as db:
            now = self._clock()
            renewed = feed.renew(db, now=now, instead_of=instead_of)
            if renewed:
                told = audit.Event(id=new_id("evt", now), at=now, type="feed.renewed", actor=by, reason=why)
                record(db, [told])  # INV-32
        if renewed:
            _log.error("the feed begins anew", extra={"fields": {"reason": why}})
        return renewed


def _went_back(newest: Seen, seen: Seen) -> bool:
    return seen.seq < newest.seq or (seen.seq == newest.seq and seen.head != newest.head)
