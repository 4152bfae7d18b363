"""Telling receivers what ended: from the feed onto each stream, and from there by push (RFC 8935) or poll (RFC 8936).

A stream is a place in the feed. What comes after it becomes SETs, which wait as rows in one transaction with the place
that moves on; a row goes when its receiver took it and not before. So each SET is sent at least once, always as one
`jti`, in the order of the feed. A paused stream holds nothing of its own: its place stays where it is.
"""

from __future__ import annotations

import json
import logging
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from broker.domain import strict_json
from broker.domain.audit import Event
from broker.domain.catalogue import Catalogue
from broker.domain.clock import Clock
from broker.domain.errors import BrokerError, Invalid, NotFound, ProviderUnavailable
from broker.domain.identity import Caller, Role, new_id
from broker.domain.lease import next_attempt
from broker.domain.lifecycle import StreamState
from broker.domain.shared_signals import (
    MEDIA_TYPE,
    SET_TYPE,
    WORTH_REPEATING,
    Delivery,
    Stream,
    Told,
    error_code,
    key_of,
    lost,
    set_claims,
    told_of,
    transaction_of,
)
from broker.providers.posting import Network, Poster, public_or
from broker.services.feed import READERS, Feed
from broker.services.standing import StandingReader
from broker.services.streams import ALGORITHM, Streams
from broker.store import feed, gate, streams
from broker.store.database import Database
from broker.store.streams import Waiting
from broker.store.transitions import record

DEADLINE = timedelta(seconds=5)  # of one push
MOST_POLLED = 100
MOST_ACKNOWLEDGED = 1000
_READ_AT_ONCE = 200  # events of the feed in one transaction
_PUSHED_AT_ONCE = 100
_PUSHED_FOR_S = 5.0  # then another stream has its turn
_CLAIMED_FOR = timedelta(seconds=15)  # longer than that and one push
_AT_ONCE = 8
_NO_PROGRESS = timedelta(minutes=1)
_LONGEST_LIFE = timedelta(hours=1)  # of a token
_MOST_SAID = 4096

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One poll. `refused` are SETs that the receiver could not take, and why."""

    most: int = MOST_POLLED
    at_once: bool = False
    taken: Sequence[str] = ()
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Polled:
    """SETs by `jti`, signed; `more` where others wait besides."""

    sets: Mapping[str, str] = field(repr=False)
    more: bool


class Transmitting:
    """`counted` is told what became of SETs: delivered, refused, failed."""

    def __init__(
        self,
        *,
        database: Database,
        standing: StandingReader,
        feed: Feed,
        streams: Streams,
        inside: tuple[Network, ...],
        issuer: str,
        clock: Clock,
        counted: Callable[[str, int], None] = lambda _outcome, _count: None,
        monotonic: Callable[[], float] = time.monotonic,
        deadline: timedelta = DEADLINE,
    ) -> None:
        self._database = database
        self._standing = standing
        self._feed = feed
        self._streams = streams
        self._may_reach = public_or(inside)
        self._issuer = issuer
        self._clock = clock
        self._counted = counted
        self._monotonic = monotonic
        self._deadline = deadline
        self._guard = threading.Lock()
        self._posters: dict[str, Poster] = {}
        self._tls = ssl.create_default_context()
        self._pool: ThreadPoolExecutor | None = None

    # --- from the feed onto the streams ------------------------------------------------------------------------------

    def tell(self) -> int:
        """Put what the feed has onto every enabled stream; answers how many SETs that made."""
        self._feed.advance()
        idle_before = self._clock() - self._streams.bounds.inactivity_timeout
        with self._database.read() as db:
            seen = feed.look(db)
            behind = streams.behind(db, seen.feed_id, seen.seq)
            idle = streams.idle_polls(db, active_before=idle_before)
        for stream_id in idle:
            with _guarded("an idle stream was not paused", stream_id):
                self._stop_idle(stream_id, idle_before)
        made = 0
        for stream_id in behind:
            with _guarded("nothing was told on a stream", stream_id):
                made += self._tell_all(stream_id)
        return made

    def _stop_idle(self, stream_id: str, idle_before: datetime) -> None:
        with self._database.begin() as db:
            stream = streams.find_stream(db, streams.with_id(stream_id), lock=True)
            if stream is not None and stream.state is StreamState.ENABLED and stream.active_at <= idle_before:
                self._streams.stop(db, stream, reason="nobody polled it for too long", now=self._clock())

    def _tell_all(self, stream_id: str) -> int:
        total = 0
        while True:
            with self._database.begin() as db:
                made, more = self._tell_some(db, stream_id)
            total += made
            if not more:
                return total

    def _tell_some(self, db: Connection, stream_id: str) -> tuple[int, bool]:
        """So much of it as fits one transaction: how many SETs that made, and whether there is more to read."""
        stream = streams.find_stream(db, streams.with_id(stream_id), lock=True)
        if stream is None or stream.state is not StreamState.ENABLED:
            return 0, False
        now, seen = self._clock(), feed.look(db)
        catalogue = self._standing.at(db, gate.era_of(db)).catalogue
        hearing = _hearing(stream.receiver, catalogue)
        if hearing is None:
            # Nobody to tell: who was taken out of the configuration learns nothing more (INV-26).
            return 0, False
        room = self._streams.bounds.most_waiting - streams.count_waiting(db, stream.id)
        if room <= 0:
            if stream.progress_at <= now - _NO_PROGRESS:
                reason = f"{self._streams.bounds.most_waiting} events wait, and none was taken for a minute"
                self._streams.stop(db, stream, reason=reason, now=now)
            return 0, False
        oldest = feed.oldest(db)
        kept = oldest is not None and oldest <= stream.seq + 1
        if stream.feed_id != seen.feed_id or not (kept or stream.seq >= seen.seq):
            told = {seen.seq: lost(self._issuer, now)}
            upto, more = seen.seq, False
        else:
            limit = min(room, _READ_AT_ONCE)
            rows = feed.page(db, after=stream.seq, upto=seen.seq, limit=limit)
            told = {}
            for row in rows:
                event = json.loads(row.text)
                at = datetime.fromisoformat(event["at"])
                one = told_of(self._issuer, at, event)
                if hearing.concerns(db, one, at):
                    told[int(row.seq)] = one
            upto = int(rows[-1].seq) if rows else seen.seq
            more = upto < seen.seq
        made = self._written(db, stream, told, seen.feed_id, now)
        streams.change(db, stream.id, feed_id=seen.feed_id, seq=upto)
        return made, more

    def _written(self, db: Connection, stream: Stream, told: Mapping[int, Told], feed_id: str, now: datetime) -> int:
        wanted = {seq: one for seq, one in told.items() if one.type in stream.delivered}
        removed = streams.are_removed(db, stream.id, [one.subject for one in wanted.values()])
        rows = []
        for seq, one in wanted.items():
            if key_of(one.subject) in removed:
                continue
            jti = new_id("set", now)
            claims = set_claims(
                issuer=self._issuer,
                audience=stream.receiver,
                jti=jti,
                at=now,
                type_=one.type,
                subject=one.subject,
                event=one.event,
                transaction=transaction_of(feed_id, seq),
            )
            rows.append({"jti": jti, "stream_id": stream.id, "claims": claims, "made_at": now, "always": False})
        streams.insert_deliveries(db, rows)
        return len(rows)

    # --- by poll -----------------------------------------------------------------------------------------------------

    def poll(self, caller: Caller, stream_id: str, asked: Asked) -> Polled:
        """Forget what was taken or refused, and answer what waits. What is not acknowledged comes again."""
        # Known before anything is done: what ended just now is worth a look.
        stream = self._streams.find(caller, stream_id)
        if stream.method is not Delivery.POLL:
            raise NotFound(f"stream {stream.id} is not polled: its events are pushed")
        self._forget(stream, asked)
        if stream.state is StreamState.ENABLED:
            self._feed.advance()
            self._tell_all(stream.id)
        with self._database.read() as db:
            found = streams.waiting(db, stream, limit=asked.most + 1)
        return Polled(sets=self._signed(found[: asked.most]), more=len(found) > asked.most)

    def _forget(self, stream: Stream, asked: Asked) -> None:
        if not asked.taken and not asked.refused:
            return
        with self._database.begin() as db:
            now = self._clock()
            taken = _taken(db, stream, asked.taken, now)
            refused = _taken(db, stream, list(asked.refused), now)
            record(db, [_refused(stream, jti, asked.refused[jti], now) for jti in refused])
        self._counted("delivered", len(taken))
        self._counted("refused", len(refused))

    def _signed(self, found: Sequence[Waiting]) -> Mapping[str, str]:
        if not found:
            return {}
        # Now and not when it was made: a SET may wait longer than the key of its day is published.
        key = self._standing.now().keys.attesting(ALGORITHM)
        return {one.jti: key.sign(one.claims, typ=SET_TYPE) for one in found}

    # --- by push -----------------------------------------------------------------------------------------------------

    def push(self, *, patience_s: float = 1.0) -> int:
        """Begin to push on every stream that is due, and wait a moment for those that are quick; answers how many.

        A receiver that hangs holds up nobody but itself: it has a thread of few, and ever longer pauses.
        """
        now = self._clock()
        with self._database.read() as db:
            if not streams.any_due(db, now=now):
                return 0
        with self._database.begin() as db:
            claimed = streams.claim_due(db, now=now, until=now + _CLAIMED_FOR, limit=_AT_ONCE)
        pool = self._threads()
        begun: list[Future[None]] = [pool.submit(self._push, stream_id, fence) for stream_id, fence in claimed]
        wait(begun, timeout=patience_s)
        return len(begun)

    def _threads(self) -> ThreadPoolExecutor:
        with self._guard:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="push")
            return self._pool

    def _push(self, stream_id: str, fence: int) -> None:
        # Its claim ends by itself, and the next one tries again.
        with _guarded("nothing was pushed", stream_id):
            self._push_some(stream_id, fence)

    def _push_some(self, stream_id: str, fence: int) -> None:
        """In their order, until none waits, one is not taken, or another stream should have its turn."""
        with self._database.read() as db:
            stream = streams.held(db, stream_id, fence)
        if stream is None:
            return
        try:
            trouble = self._sent_all(stream, fence)
        except BrokerError as problem:
            trouble = problem.detail
        now = self._clock()
        if trouble is None:
            values: dict[str, Any] = {"failures": 0, "trouble": None, "next_attempt_at": now}
        else:
            fields = {"stream": stream.id, "receiver": stream.receiver, "reason": trouble}
            _log.warning("security events were not taken", extra={"fields": fields})
            again_at = next_attempt(stream.failures + 1, now=now)
            values = {"failures": stream.failures + 1, "trouble": trouble[:255], "next_attempt_at": again_at}
        with self._database.begin() as db:
            streams.pushed(db, stream.id, fence, **values)

    def _sent_all(self, stream: Stream, fence: int) -> str | None:
        """None, or what it was that was not taken."""
        headers = {"Content-Type": MEDIA_TYPE, "Accept": "application/json", "User-Agent": "agent-credential-broker"}
        authorization = self._streams.authorization(stream)
        if authorization is not None:
            headers["Authorization"] = authorization.reveal()
        begun = self._monotonic()
        while True:
            with self._database.read() as db:
                # Anew each time: it may have been paused, changed or taken over since (INV-07).
                current = streams.held(db, stream.id, fence)
                catalogue = self._standing.at(db, gate.era_of(db)).catalogue
                if current is None or current.endpoint_url != stream.endpoint_url:
                    return None
                told_to = _hearing(stream.receiver, catalogue) is not None
                found = streams.waiting(db, current, limit=_PUSHED_AT_ONCE) if told_to else []
            if not found:
                return None
            for jti, token in self._signed(found).items():
                trouble = self._sent(stream, jti, token, headers)
                if trouble is not None or self._monotonic() - begun > _PUSHED_FOR_S:
                    return trouble

    def _sent(self, stream: Stream, jti: str, token: str, headers: Mapping[str, str]) -> str | None:
        """None when it is done with: taken, or refused for what it is. Else why it has to be sent again."""
        host = stream.pushed_to
        try:
            answer = self._poster(stream.id).post(
                stream.endpoint_url or "", token.encode("ascii"), headers, read=_MOST_SAID
            )
        except ProviderUnavailable as problem:
            self._counted("failed", 1)
            return f"{host}: {problem.reason}"
        if answer.status == 202:
            with self._database.begin() as db:
                _taken(db, stream, [jti], self._clock())
            self._counted("delivered", 1)
            return None
        code = _code_in(answer.body) if answer.status == 400 else "none"
        if answer.status == 400 and code not in WORTH_REPEATING:
            # What it cannot take it will not take the next time, and what comes after must not wait for it for ever.
            with self._database.begin() as db:
                now = self._clock()
                if _taken(db, stream, [jti], now):
                    record(db, [_refused(stream, jti, code, now)])
            self._counted("refused", 1)
            return None
        self._counted("failed", 1)
        if 300 <= answer.status < 400:
            return f"{host}: it answered {answer.status}, a redirect, which is not followed"
        return f"{host}: it answered {answer.status}" + ("" if code == "none" else f", {code}")

    def _poster(self, stream_id: str) -> Poster:
        """One a stream, so that a resolver that hangs for one holds up that one alone."""
        with self._guard:
            known = self._posters.get(stream_id)
        if known is not None:
            return known
        # There is one more than before only here, so here is where those of streams that are gone go.
        with self._database.read() as db:
            existing = streams.ids(db)
        with self._guard:
            self._posters = {kept: poster for kept, poster in self._posters.items() if kept in existing}
            made = Poster(deadline=self._deadline, may_reach=self._may_reach, tls=self._tls)
            return self._posters.setdefault(stream_id, made)

    def run(self) -> None:
        """For the scheduler."""
        try:
            self.tell()
        finally:
            # What waits already goes out whatever there is with the feed.
            self.push()

    def backlog(self) -> Mapping[str, int]:
        with self._database.read() as db:
            return streams.backlog(db)

    def close(self) -> None:
        """What is being pushed is answered for, within its deadline."""
        with self._guard:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _guarded(what: str, stream_id: str) -> Iterator[None]:
    """What goes wrong on one stream is logged, and stops no other."""
    try:
        yield
    except BrokerError as problem:
        _log.warning(what, extra={"fields": {"stream": stream_id, "detail": problem.detail}})
    except Exception:
        _log.exception(what, extra={"fields": {"stream": stream_id}})


@dataclass(frozen=True, kw_only=True)
class _Hearing:
    """Of what a receiver may hear: of everything, or of what ended for these resources (INV-26)."""

    everything: bool
    resources: frozenset[str]

    def concerns(self, db: Connection, told: Told, at: datetime) -> bool:
        if self.everything or told.axis is None:
            return True
        return streams.concerns(db, told.axis, told.value, self.resources, unexpired_at=at - _LONGEST_LIFE)


def _hearing(receiver: str, catalogue: Catalogue) -> _Hearing | None:
    """None where it may hear of nothing, be it that nobody is called so any more."""
    rule = catalogue.rule(receiver)
    roles = set() if rule is None else set(rule.roles)
    if roles.isdisjoint(READERS):
        return None
    resources = frozenset(one.identifier for one in catalogue.resources if receiver in one.verifiers)
    return _Hearing(everything=not roles.isdisjoint({Role.AUDITOR, Role.ADMIN}), resources=resources)


def _taken(db: Connection, stream: Stream, jtis: Collection[str], now: datetime) -> list[str]:
    """Forget these; answers which of them waited on this stream."""
    # The stream before what waits on it, as whoever stops or deletes it: so no two wait for each other.
    if not jtis or streams.find_stream(db, streams.with_id(stream.id), lock=True) is None:
        return []
    taken = streams.taken(db, stream.id, jtis)
    if taken:
        streams.change(db, stream.id, progress_at=now)
    return taken


def _code_in(body: bytes) -> str:
    try:
        said = strict_json.loads(body, max_bytes=_MOST_SAID)
    except Invalid:
        return "none"
    return error_code(said.get("err")) if isinstance(said, dict) else "none"


def _refused(stream: Stream, jti: str, code: str, now: datetime) -> Event:
    data = {"stream_id": stream.id, "receiver": stream.receiver, "jti": jti}
    return Event(
        id=new_id("evt", now), at=now, type="stream.refused", actor=stream.receiver, outcome="refused",
        reason=f"the receiver answered {code}", data=data,
    )  # fmt: skip
