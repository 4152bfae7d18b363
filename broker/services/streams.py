"""Streams of security events: what receivers and admins may do with them (OpenID SSF 1.0, section 8).

A receiver is a principal that may read the feed, and has one stream. It sees its own and no other (INV-28). What opens
the receiver is sealed before it is kept, and never told again (INV-30). Nothing here talks to anybody outside.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import Connection, Row

from broker.domain.audit import Event
from broker.domain.clock import Clock
from broker.domain.errors import ConfigurationError, Conflict, Forbidden, Invalid, LimitExceeded, NotFound, RoleMissing
from broker.domain.identity import Caller, Role, is_id, new_id
from broker.domain.lifecycle import StreamState
from broker.domain.secret import Secret
from broker.domain.shared_signals import (
    STREAM_UPDATED,
    VERIFICATION,
    Delivery,
    Stream,
    StreamBounds,
    Subject,
    Wish,
    could_be_told_of,
    set_claims,
    stream_subject,
)
from broker.providers.alerts import webhook_url
from broker.providers.posting import Network, is_public_name
from broker.services.feed import READERS, Feed
from broker.services.keys import Keys, Sealing
from broker.services.refusals import recorded
from broker.store import feed, models, streams
from broker.store.database import Database
from broker.store.transitions import move, record

MOST_REMOVED = 1000
MOST_URL = 2000
_ACTIVE_AGAIN = timedelta(seconds=10)
ALGORITHM = "RS256"
_AUTHORIZATION = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,1022}[\x21-\x7e])?")
_PURPOSE = "stream authorization"
_SEAL = "AES-256-GCM"
_ADMIN, _RECEIVER, BROKER = "admin", "receiver", "broker"

_MOVED = {
    StreamState.ENABLED: "stream.enabled",
    StreamState.PAUSED: "stream.paused",
    StreamState.DISABLED: "stream.disabled",
}


@dataclass(frozen=True, kw_only=True)
class Overseen:
    """A stream as an admin sees it; `waiting` is how many SETs its receiver has not taken."""

    stream: Stream
    waiting: int


class Streams:
    def __init__(
        self,
        *,
        database: Database,
        feed: Feed,
        keys: Keys,
        sealing: Sealing,
        bounds: StreamBounds,
        inside: tuple[Network, ...],
        issuer: str,
        clock: Clock,
    ) -> None:
        self._database = database
        self._feed = feed
        self._keys = keys
        self._sealing = sealing
        self.bounds = bounds
        self._inside = inside
        self._issuer = issuer
        self._clock = clock

    # --- a receiver's own --------------------------------------------------------------------------------------------

    def create(self, caller: Caller, wish: Wish) -> Stream:
        """A stream that tells what ends from now on; Conflict where the receiver has one."""
        self._admit(caller)
        self._require_reachable(wish)
        # Outside of any transaction: finding primes takes a while, and whoever seals may have to be asked.
        self._keys.ensure((ALGORITHM,), actor=caller.name)
        self._feed.advance()
        stream_id = new_id("stm", self._clock())
        sealed = self._sealed(stream_id, wish.authorization)
        with (
            recorded(self._database, self._clock, caller, "stream.denied", "create"),
            self._database.begin() as db,
        ):
            now = self._clock()
            seen = feed.look(db)
            stream = Stream(
                id=stream_id,
                receiver=caller.name,
                state=StreamState.ENABLED,
                reason=None,
                set_by=_RECEIVER,
                method=wish.method,
                endpoint_url=wish.endpoint_url,
                sealed_authorization=sealed,
                events_requested=wish.events_requested,
                description=wish.description,
                feed_id=seen.feed_id,
                seq=seen.seq,
                failures=0,
                trouble=None,
                created_at=now,
                active_at=now,
                progress_at=now,
                verified_at=None,
            )
            if not streams.insert_stream(db, stream):
                raise Conflict(f"{caller.name} has a stream: read it, and change or delete that one")
            record(db, [_event(caller.name, stream, now, "stream.created", trace_id=caller.trace_id)])  # INV-32
        return stream

    def mine(self, caller: Caller) -> Stream | None:
        """The receiver's stream, if it has one."""
        self._admit(caller)
        with self._database.read() as db:
            return streams.find_stream(db, streams.of_receiver(caller.name))

    def find(self, caller: Caller, stream_id: str) -> Stream:
        """The receiver's stream of this id; looking at it is activity of the receiver's."""
        self._admit(caller)
        now = self._clock()
        with self._database.read() as db:
            stream = _found(db, stream_id, receiver=caller.name)
        # Not at each look: who polls looks all the time.
        if stream.active_at <= now - _ACTIVE_AGAIN:
            with self._database.begin() as db:
                streams.change(db, stream.id, active_at=now)
        return stream

    def update(self, caller: Caller, stream_id: str, wish: Wish, *, keeps_authorization: bool) -> Stream:
        """The stream as it is wished for; what was not taken yet goes where it is delivered then.

        With the authorization, where it is delivered is kept too: as it is by now, and not as the wish has it.
        """
        self._admit(caller)
        self._require_reachable(wish)
        sealed = self._sealed(stream_id, wish.authorization)
        with self._database.begin() as db:
            before = self._held(db, caller, stream_id)
            now = self._clock()
            keeps = keeps_authorization
            after = replace(
                before,
                # What opens a receiver is sent to that one alone, and another may have been named meanwhile (INV-30).
                method=before.method if keeps else wish.method,
                endpoint_url=before.endpoint_url if keeps else wish.endpoint_url,
                sealed_authorization=before.sealed_authorization if keeps else sealed,
                events_requested=wish.events_requested,
                description=wish.description,
                active_at=now,
            )
            values = {
                "method": str(after.method),
                "endpoint_url": after.endpoint_url,
                "sealed_authorization": after.sealed_authorization,
                "events_requested": None if after.events_requested is None else list(after.events_requested),
                "description": after.description,
                "active_at": now,
                # Whoever waits for an earlier place to answer again is not to wait for this one.
                "next_attempt_at": now,
                "failures": 0,
                "trouble": None,
            }
            streams.change(db, stream_id, **values)
            record(db, [_event(caller.name, after, now, "stream.updated", trace_id=caller.trace_id)])
        return after

    def set_state(self, caller: Caller, stream_id: str, to: StreamState, *, reason: str | None) -> Stream:
        """What the receiver wants of it. Where an admin stopped it, only an admin lets it go on."""
        self._admit(caller)
        with (
            recorded(self._database, self._clock, caller, "stream.denied", str(to)),
            self._database.begin() as db,
        ):
            stream = self._held(db, caller, stream_id)
            now = self._clock()
            streams.change(db, stream.id, active_at=now)
            if stream.state is to:
                return stream
            _require_not_stopped(stream)
            return self._moved(db, stream, to, reason=reason, set_by=_RECEIVER, by=caller.name, now=now)

    def delete(self, caller: Caller, stream_id: str) -> None:
        """With all that waits on it. Not where an admin stopped it: a new one would go on."""
        self._admit(caller)
        with (
            recorded(self._database, self._clock, caller, "stream.denied", "delete"),
            self._database.begin() as db,
        ):
            stream = self._held(db, caller, stream_id)
            _require_not_stopped(stream)
            self._deleted(db, stream, by=caller.name, trace_id=caller.trace_id)

    def remove_subject(self, caller: Caller, stream_id: str, subject: Subject) -> None:
        """Tell nothing more that is about exactly this; of what we could never tell, nothing is kept or said."""
        self._admit(caller)
        with (
            recorded(self._database, self._clock, caller, "stream.denied", "remove_subject"),
            self._database.begin() as db,
        ):
            stream = self._held(db, caller, stream_id)
            now = self._clock()
            streams.change(db, stream.id, active_at=now)
            if not could_be_told_of(subject):
                return
            if streams.count_removed(db, stream.id) >= MOST_REMOVED:
                raise LimitExceeded(
                    f"{MOST_REMOVED} subjects are removed from this stream already",
                    limit="removed_subjects",
                    value=MOST_REMOVED,
                    retry_after_s=3600,
                )
            if streams.remove_subject(db, stream.id, subject):
                record(db, [_event(caller.name, stream, now, "stream.subject_removed", subject=dict(subject))])

    def add_subject(self, caller: Caller, stream_id: str, subject: Subject) -> None:
        """Tell again what is about this. All subjects are there to begin with, so of others there is nothing to do."""
        self._admit(caller)
        with self._database.begin() as db:
            stream = self._held(db, caller, stream_id)
            now = self._clock()
            streams.change(db, stream.id, active_at=now)
            if streams.add_subject(db, stream.id, subject):
                record(db, [_event(caller.name, stream, now, "stream.subject_added", subject=dict(subject))])

    def verify(self, caller: Caller, stream_id: str, state: str | None) -> None:
        """Have a verification event on the stream; not more often than it says."""
        self._admit(caller)
        with (
            recorded(self._database, self._clock, caller, "stream.denied", "verify"),
            self._database.begin() as db,
        ):
            stream = self._held(db, caller, stream_id)
            now = self._clock()
            if stream.state is StreamState.DISABLED:
                raise Invalid("the stream is disabled, and nothing is sent on it: enable it first", member="stream_id")
            if stream.verified_at is not None:
                wait = stream.verified_at + self.bounds.min_verification_interval - now
                if wait.total_seconds() > 0:
                    raise LimitExceeded(
                        "verification was asked for a moment ago: see min_verification_interval",
                        limit="verifications",
                        value=1,
                        window_s=int(self.bounds.min_verification_interval.total_seconds()),
                        retry_after_s=int(wait.total_seconds()),
                    )
            if streams.count_waiting(db, stream.id) >= self.bounds.most_waiting:
                # A paused stream would else be filled with these for ever.
                raise LimitExceeded(
                    f"{self.bounds.most_waiting} events wait on this stream: take some first",
                    limit="most_waiting",
                    value=self.bounds.most_waiting,
                    retry_after_s=60,
                )
            streams.change(db, stream.id, verified_at=now, active_at=now)
            self._say(db, stream, VERIFICATION, {} if state is None else {"state": state}, now, always=False)
            record(db, [_event(caller.name, stream, now, "stream.verified", trace_id=caller.trace_id)])

    # --- an admin's hand ---------------------------------------------------------------------------------------------

    def page(self, caller: Caller, *, before: str | None = None, limit: int = 100) -> list[Overseen]:
        """Newest first, below the id `before`."""
        self._oversee(caller, "list", reads=True)
        with self._database.read() as db:
            found = streams.page_of_streams(db, before=before, limit=limit)
            return [Overseen(stream=one, waiting=streams.count_waiting(db, one.id)) for one in found]

    def show(self, caller: Caller, stream_id: str) -> Overseen:
        self._oversee(caller, "show", reads=True)
        with self._database.read() as db:
            return self._overseen(db, _found(db, stream_id))

    def pause(self, caller: Caller, stream_id: str, *, reason: str) -> Overseen:
        """Tell the receiver that nothing comes any more for now, and hold what there is."""
        return self._stopped_or_let_go(caller, stream_id, StreamState.PAUSED, reason=reason)

    def resume(self, caller: Caller, stream_id: str, *, reason: str | None = None) -> Overseen:
        return self._stopped_or_let_go(caller, stream_id, StreamState.ENABLED, reason=reason)

    def remove(self, caller: Caller, stream_id: str) -> Overseen:
        """Delete a receiver's stream; answers what it was. Its receiver may make another."""
        self._oversee(caller, "delete")
        with self._database.begin() as db:
            overseen = self._overseen(db, _found(db, stream_id, lock=True))
            self._deleted(db, overseen.stream, by=caller.name, trace_id=caller.trace_id)
        return overseen

    def _stopped_or_let_go(self, caller: Caller, stream_id: str, to: StreamState, *, reason: str | None) -> Overseen:
        self._oversee(caller, "pause" if to is StreamState.PAUSED else "resume")
        with self._database.begin() as db:
            stream = _found(db, stream_id, lock=True)
            now = self._clock()
            if stream.state is to:
                # The receiver's own pause becomes one that the receiver does not end.
                stream = replace(stream, set_by=_ADMIN, reason=reason)
                streams.change(db, stream.id, set_by=_ADMIN, reason=reason)
                record(db, [_event(caller.name, stream, now, _MOVED[to], reason=reason)])
            else:
                stream = self._moved(db, stream, to, reason=reason, set_by=_ADMIN, by=caller.name, now=now)
            return self._overseen(db, stream)

    def _oversee(self, caller: Caller, verb: str, *, reads: bool = False) -> None:
        with recorded(self._database, self._clock, caller, "stream.denied", verb):
            if not (caller.has(Role.ADMIN) or (reads and caller.has(Role.AUDITOR))):
                raise RoleMissing(f"{caller.name} may not {verb} the streams of others: that is for admins")

    @staticmethod
    def _overseen(db: Connection, stream: Stream) -> Overseen:
        return Overseen(stream=stream, waiting=streams.count_waiting(db, stream.id))

    # --- what both are made of ---------------------------------------------------------------------------------------

    def stop(self, db: Connection, stream: Stream, *, reason: str, now: datetime) -> Stream:
        """Pause it on the broker's own account, and say so to the receiver."""
        return self._moved(db, stream, StreamState.PAUSED, reason=reason, set_by=BROKER, by=BROKER, now=now)

    def _moved(
        self,
        db: Connection,
        stream: Stream,
        to: StreamState,
        *,
        reason: str | None,
        set_by: str,
        by: str,
        now: datetime,
    ) -> Stream:
        values: dict[str, Any] = {"reason": reason, "set_by": set_by, "progress_at": now, "active_at": now}
        if stream.state is StreamState.DISABLED:
            # What ended meanwhile was not held.
            seen = feed.look(db)
            values |= {"feed_id": seen.feed_id, "seq": seen.seq}
        if to is StreamState.DISABLED:
            streams.drop_waiting(db, stream.id)
        after = replace(stream, state=to, **values)

        def moved(_row: Row[Any]) -> Event:
            return _event(by, after, now, _MOVED[to], reason=reason)

        move(db, models.EventStream, to, models.EventStream.id == stream.id, event=moved, **values)
        if set_by != _RECEIVER:
            said = {"status": str(to)} | ({} if reason is None else {"reason": reason})
            self._say(db, after, STREAM_UPDATED, said, now, always=True)
        return after

    def _say(
        self, db: Connection, stream: Stream, type_: str, event: Mapping[str, Any], now: datetime, *, always: bool
    ) -> None:
        """What is about the stream itself, which no receiver can choose not to hear."""
        jti = new_id("set", now)
        claims = set_claims(
            issuer=self._issuer,
            audience=stream.receiver,
            jti=jti,
            at=now,
            type_=type_,
            subject=stream_subject(stream.id),
            event=event,
            transaction=jti,
        )
        row = {"jti": jti, "stream_id": stream.id, "claims": claims, "made_at": now, "always": always}
        streams.insert_deliveries(db, [row])

    def _deleted(self, db: Connection, stream: Stream, *, by: str, trace_id: str | None) -> None:
        streams.delete_stream(db, stream.id)
        record(db, [_event(by, stream, self._clock(), "stream.deleted", trace_id=trace_id)])

    def _admit(self, caller: Caller) -> None:
        with recorded(self._database, self._clock, caller, "stream.denied", "receive"):
            if not any(caller.has(role) for role in READERS):
                raise RoleMissing(f"{caller.name} is no verifier: streams are for those, auditors and admins")

    @staticmethod
    def _held(db: Connection, caller: Caller, stream_id: str) -> Stream:
        return _found(db, stream_id, receiver=caller.name, lock=True)

    def authorization(self, stream: Stream) -> Secret | None:
        """What opens the receiver. May ask whoever sealed it, so never within a transaction."""
        if stream.sealed_authorization is None:
            return None
        try:
            opened = self._sealing.unseal(stream.sealed_authorization, purpose=_PURPOSE, kid=stream.id, algorithm=_SEAL)
        except ConfigurationError:
            problem = ConfigurationError([f"the authorization of stream {stream.id} does not open: have it set anew"])
        else:
            return Secret(opened.decode("ascii"))
        raise problem

    def _sealed(self, stream_id: str, authorization: Secret | None) -> bytes | None:
        if authorization is None:
            return None
        if not _AUTHORIZATION.fullmatch(authorization.reveal()):
            # It becomes a header: what could begin another one is none (INV-31).
            raise Invalid("authorization_header is 1 to 1024 printable ASCII characters", member="delivery")
        plain = authorization.reveal().encode("ascii")
        return self._sealing.seal(plain, purpose=_PURPOSE, kid=stream_id, algorithm=_SEAL)

    def _require_reachable(self, wish: Wish) -> None:
        if wish.method is Delivery.POLL or wish.endpoint_url is None:
            return
        if len(wish.endpoint_url) > MOST_URL:
            raise Invalid(f"endpoint_url has more than {MOST_URL} characters", member="delivery")
        try:
            webhook_url(wish.endpoint_url)
        except Invalid as problem:
            raise Invalid(f"endpoint_url: {problem.detail}", member="delivery") from None
        # A name is judged when it is resolved, each time; an address can be told from here.
        if not is_public_name(urlsplit(wish.endpoint_url).hostname or "", self._inside):
            raise Invalid(
                "endpoint_url is inside, where nothing is pushed; ask the broker's operator", member="delivery"
            )


def _found(db: Connection, stream_id: str, *, receiver: str | None = None, lock: bool = False) -> Stream:
    where = [streams.with_id(stream_id)] + ([] if receiver is None else [streams.of_receiver(receiver)])
    stream = streams.find_stream(db, *where, lock=lock) if is_id(stream_id, "stm") else None
    if stream is None:
        raise NotFound(f"there is no stream {stream_id[:64]!r} of yours")
    return stream


def _require_not_stopped(stream: Stream) -> None:
    if stream.set_by == _ADMIN and stream.state is not StreamState.ENABLED:
        raise Forbidden("an admin stopped this stream: ask one to let it go on")


def _event(
    actor: str, stream: Stream, now: datetime, type_: str, *, reason: str | None = None, trace_id: str | None = None,
    **more: Any,
) -> Event:  # fmt: skip
    data = {"stream_id": stream.id, "receiver": stream.receiver, "method": str(stream.method), **more}
    data["pushed_to"] = stream.pushed_to
    return Event(id=new_id("evt", now), at=now, type=type_, actor=actor, reason=reason, trace_id=trace_id, data=data)
