"""`Verifier`: may this request come in? Answers out of memory, and keeps what it needs to know up to date by itself.

A yes needs four things: a good token (`tokens`), where it is bound the proof of its key (`proofs`), no refusal
(`feed`, `lists`), and a proof that this is how it is now: a signed statement of the feed, or a status list, that is not
older than the bound. What cannot be proven is refused with 503 (INV-24, INV-25).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from broker.sdk.client import token_source as source_of
from broker.sdk.clock import Timing
from broker.sdk.exchange import origin_of
from broker.sdk.verifier import jose, proofs, tokens
from broker.sdk.verifier.feed import Feed
from broker.sdk.verifier.following import Follower
from broker.sdk.verifier.jose import NotReadable
from broker.sdk.verifier.keys import Keys
from broker.sdk.verifier.lists import INVALID, VALID, Lists
from broker.sdk.verifier.moments import LEEWAY_S, BrokerTime, Moment
from broker.sdk.verifier.refused import Refused
from broker.sdk.verifier.tokens import Token
from broker.sdk.verifier.transport import Lost, Transport

_log = logging.getLogger("broker.sdk.verifier")

SHORTEST_BOUND_S, LONGEST_BOUND_S = 4, 15
_NEEDS = 3  # keys, then a list, then a list that is newer
_MOST_REVOKED = 100_000
_MAX_ANSWER_BYTES = 65_536
_ALGORITHMS = ("ES256", "RS256", "EdDSA")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """A request that may come in: who asks, in whose name, for which task, with what scopes, until when."""

    subject: str
    agent: str
    actors: tuple[str, ...]
    task_id: str
    grant_id: str
    scopes: frozenset[str]
    expires_at: datetime
    bound: bool
    _payload: bytes = field(repr=False)

    @property
    def claims(self) -> dict[str, Any]:
        """All that the token says; a copy each time, because what is kept here is used again."""
        found: dict[str, Any] = json.loads(self._payload)
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """How the verifier is, for health pages and metrics.

    `channel` is where a yes would come from now: "stream", "poll", "lists", or "none". `fresh_for_s` is how long the
    feed's last proof still counts; 0 where it does not. `seq` is the newest proven event.
    """

    channel: str
    fresh_for_s: float
    fresh_until: datetime | None
    feed: str | None
    seq: int | None
    keys: int
    refusals: int
    clock_behind_s: float
    problem: str | None

    @property
    def ready(self) -> bool:
        return self.channel != "none" and self.keys > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Presented:
    token: str = field(repr=False)
    scheme: str
    method: str
    url: str
    dpop: str | Sequence[str] | None = field(repr=False)
    scopes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Need:
    """What has to be fetched for an answer, and the answer where that does not help."""

    fetch: Callable[[], None]
    refused: Refused


class Verifier:
    """Checks requests for one resource of one broker. Safe between threads, after a fork, and in an event loop.

    `issuer`: the broker's address. `audience`: the resource's identifier, compared exactly. `token_source`: this
    resource's own workload token, with which it reads the feed: a path, which is read each time, a string, or a
    function; without one, status lists are all there is. `bound_s`: for how long a proof that nothing was revoked
    counts. `origin`: scheme and host by which clients know this resource, where that is not what requests say.
    `introspect`: ask the broker about each request as well, which knows at once. `once`: what remembers DPoP proofs,
    for those who run more than one process.
    """

    def __init__(
        self,
        issuer: str,
        audience: str,
        *,
        token_source: Path | str | Callable[[], str] | None = None,
        bound_s: int = LONGEST_BOUND_S,
        require_dpop: bool = False,
        origin: str | None = None,
        introspect: bool = False,
        token_typ: str = "at+jwt",  # noqa: S107 - a media type
        algorithms: Iterable[str] = _ALGORITHMS,
        longest_life_s: int = 3600,
        resource_metadata: str | None = None,
        cache_size: int = 10_000,
        most_refusals: int = 1_000_000,
        most_proofs: int = 100_000,
        once: proofs.Once | None = None,
        timing: Timing | None = None,
    ) -> None:
        if not SHORTEST_BOUND_S <= bound_s <= LONGEST_BOUND_S:
            raise ValueError(f"bound_s is {bound_s}: it has to be from {SHORTEST_BOUND_S} to {LONGEST_BOUND_S}")
        if introspect and token_source is None:
            raise ValueError("introspection needs a token_source: the broker answers only who is a verifier")
        self._timing = timing or Timing()
        self._issuer, self._bound_s, self._introspects = origin_of(issuer), bound_s, introspect
        self._require_dpop, self._origin, self._resource_metadata = require_dpop, origin, resource_metadata
        self._expected = tokens.Expected(
            issuer=self._issuer,
            audience=audience,
            typ=token_typ.lower(),
            algorithms=frozenset(algorithms),
            longest_life_s=longest_life_s,
        )
        own = None
        if token_source is not None:
            own = source_of(None, token_source) if isinstance(token_source, Path) else source_of(token_source, None)
        self._asks = own is not None
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        self._time = BrokerTime(self._timing)
        self._transport = Transport(self._issuer, own, self._timing)
        self._keys = Keys(self._transport, self._timing)
        self._most_refusals = most_refusals
        self._feed = self._new_feed()
        self._lists = Lists(
            transport=self._transport,
            keys=self._keys,
            time=self._time,
            lock=self._lock,
            timing=self._timing,
            issuer=self._issuer,
            bound_s=self._bound_s,
            refuses_key=lambda kid, issued_at: self._feed.refuses_key(kid, issued_at),
        )
        self._seen = tokens.Seen(cache_size)
        self._once = once or proofs.Memory(self._timing.monotonic, most_proofs)
        self._revoked: dict[bytes, int] = {}
        self._follower: Follower | None = None
        self._closed = False
        _ALL.add(self)

    @property
    def audience(self) -> str:
        return self._expected.audience

    # -- answers ------------------------------------------------------------------------------------------------

    def check(
        self,
        authorization: str | None,
        method: str,
        url: str,
        dpop: str | Sequence[str] | None = None,
        scopes: str | Iterable[str] = (),
    ) -> Verified:
        """What the request may be answered for; raises `Refused`.

        `authorization` and `dpop` are the values of the headers `Authorization` and `DPoP`; `url` is the whole address
        that was asked for. It answers out of memory, but for a key or a status list that is not there yet: then it
        waits for one fetch of each, two seconds at most.
        """
        refused: Refused
        try:
            presented = self._presented(authorization, method, url, dpop, scopes)
            outcome = self._judge(presented)
            for _ in range(_NEEDS):
                if isinstance(outcome, Verified):
                    break
                outcome.fetch()
                outcome = self._judge(presented)
            return self._settled(presented, outcome)
        except Refused as problem:
            refused = copy(problem)
        # Crash reporters read the variables of every frame, and of those of the error before it (INV-30).
        del authorization, dpop
        presented = outcome = None  # type: ignore[assignment]
        raise refused

    async def check_async(
        self,
        authorization: str | None,
        method: str,
        url: str,
        dpop: str | Sequence[str] | None = None,
        scopes: str | Iterable[str] = (),
    ) -> Verified:
        """`check` for an event loop: what it has to wait for, it waits for elsewhere."""
        refused: Refused
        try:
            presented = self._presented(authorization, method, url, dpop, scopes)
            outcome = self._judge(presented)
            for _ in range(_NEEDS):
                if isinstance(outcome, Verified):
                    break
                await asyncio.to_thread(outcome.fetch)
                outcome = self._judge(presented)
            if self._introspects:
                return await asyncio.to_thread(self._settled, presented, outcome)
            return self._settled(presented, outcome)
        except Refused as problem:
            refused = copy(problem)
        del authorization, dpop
        presented = outcome = None  # type: ignore[assignment]
        raise refused

    def _presented(
        self,
        authorization: str | None,
        method: str,
        url: str,
        dpop: str | Sequence[str] | None,
        scopes: str | Iterable[str],
    ) -> _Presented:
        needed = tuple(scopes.split() if isinstance(scopes, str) else scopes)
        default = "DPoP" if self._require_dpop else "Bearer"
        if not authorization:
            raise Refused("missing_token", scheme=default, scopes=needed, resource_metadata=self._resource_metadata)
        scheme, _, token = authorization.partition(" ")
        known = {"bearer": "Bearer", "dpop": "DPoP"}.get(scheme.lower())
        token = token.strip(" ")
        if known is None or not token or " " in token or "," in token:
            raise Refused("malformed_request", scheme=default, resource_metadata=self._resource_metadata)
        return _Presented(token=token, scheme=known, method=method, url=self._own(url), dpop=dpop, scopes=needed)

    def _own(self, url: str) -> str:
        if self._origin is None:
            return url
        # What a proxy or a client writes into `Host` is not what clients know us by.
        _, _, rest = url.partition("://")
        _, slash, path = rest.partition("/")
        return f"{self._origin}{slash}{path}"

    def _judge(self, presented: _Presented) -> Verified | _Need:
        """The answer as far as memory goes. A proof is used up last, so that this may be asked again."""
        self._start()
        try:
            keys = self._keys.now
            token = self._seen.get(presented.token, keys)
            if token is None:
                try:
                    token = tokens.read(presented.token, keys, self._expected)
                except Refused as problem:
                    if problem.code != "unknown_key":
                        raise
                    return self._need_keys(problem, presented)
                self._seen.put(token)
            return self._judge_token(token, presented)
        except Refused as problem:
            raise self._challenged(problem, presented) from None

    def _judge_token(self, token: Token, presented: _Presented) -> Verified | _Need:
        with self._lock:
            now = self._time.now()
            if self._time.behind_s:
                raise Refused(*self._unproven())
            tokens.require_now(token, now)
            self._require_scheme(token, presented)
            if self._feed.refuses(token) or token.digest in self._revoked:
                raise Refused("revoked")
            need = self._missing_proof(token, now)
        if need is not None:
            return _Need(fetch=need.fetch, refused=self._challenged(need.refused, presented))
        if not token.scopes.issuperset(presented.scopes):
            raise Refused("insufficient_scope", scopes=presented.scopes)
        if token.bound_to is not None:
            proofs.check(presented.dpop, token, method=presented.method, url=presented.url, now=now, once=self._once)
        return Verified(
            subject=token.subject,
            agent=token.client_id,
            actors=token.actors,
            task_id=token.task_id,
            grant_id=token.grant_id,
            scopes=token.scopes,
            expires_at=datetime.fromtimestamp(token.expires_at, UTC),
            bound=token.bound_to is not None,
            _payload=token.payload,
        )

    def _require_scheme(self, token: Token, presented: _Presented) -> None:
        # INV-21: whoever took a bound token from its holder has no use of it.
        if token.bound_to is not None and presented.scheme != "DPoP":
            raise Refused("bound_token", scheme="DPoP")
        if token.bound_to is None and (presented.scheme == "DPoP" or self._require_dpop):
            raise Refused("unbound_token", scheme="DPoP")

    def _missing_proof(self, token: Token, now: Moment) -> _Need | None:
        """What is missing to prove that the token was not revoked; None where that is proven, Refused where it was."""
        found, since = self._lists.get(token.list_uri), self._feed.since
        if found is not None and found.asked_at > since.asked_after and found.issued_at >= since.issued_from:
            complete = since.complete_from is not None and found.issued_at >= since.complete_from
            by_feed, by_itself = complete and self._feed.is_fresh(now), not found.fresh.is_over(now)
            status = found.status_at(token.index)
            # The feed tells what ended since the list was made, and nothing else that may have changed.
            if by_itself or (by_feed and status in (VALID, INVALID)):
                self._require_valid(status, token)
                return None
        uri, refused = token.list_uri, Refused(*self._unproven())
        return _Need(fetch=lambda: self._lists.refresh(uri, newer_than=since.asked_after), refused=refused)

    def _unproven(self) -> tuple[str, str]:
        """The code and the detail of why nothing can be proven."""
        off = self._time.behind_s or self._transport.date_ahead_s
        if abs(off) > LEEWAY_S:
            return "clock", f"it is {abs(off):.0f} s {'behind' if off > 0 else 'ahead'}"
        return "not_fresh", self._problem() or ""

    def _require_valid(self, status: int | None, token: Token) -> None:
        if status == VALID:
            return
        if status is None:
            raise Refused("no_such_place")
        if status != INVALID:
            raise Refused("suspended")
        # For ever, whatever a list says later (INV-23).
        if len(self._revoked) >= _MOST_REVOKED:
            del self._revoked[next(iter(self._revoked))]
        self._revoked[token.digest] = token.expires_at
        raise Refused("revoked")

    def _need_keys(self, problem: Refused, presented: _Presented) -> _Need:
        if not self._keys.now:
            problem = Refused("no_keys", self._keys.problem or "")
        return _Need(fetch=self._keys.refresh, refused=self._challenged(problem, presented))

    def _challenged(self, problem: Refused, presented: _Presented) -> Refused:
        scheme = "DPoP" if self._require_dpop else problem.scheme
        if presented.scheme == "DPoP":
            scheme = "DPoP"
        return Refused(
            problem.code,
            problem.detail,
            scopes=problem.scopes,
            scheme=scheme,
            resource_metadata=self._resource_metadata,
        )

    def _settled(self, presented: _Presented, outcome: Verified | _Need) -> Verified:
        if isinstance(outcome, _Need):
            raise outcome.refused
        if self._introspects and not self._is_active(presented.token, outcome):
            raise self._challenged(Refused("revoked"), presented)
        return outcome

    def _is_active(self, token: str, verified: Verified) -> bool:
        try:
            body = self._transport.post("/oauth2/introspect", {"token": token}, max_bytes=_MAX_ANSWER_BYTES)
            said = jose.members(body, max_bytes=_MAX_ANSWER_BYTES)
        except (Lost, NotReadable) as problem:
            raise Refused("not_fresh", f"introspection failed: {problem}") from None
        claims = verified.claims
        # An answer about another token would be no answer.
        return said.get("active") is True and all(said.get(name) == claims.get(name) for name in ("jti", "grant_id"))

    # -- its own life ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to follow the feed; the first check does it as well."""
        self._start()

    def wait_ready(self, timeout_s: float = 10.0) -> State:
        """Wait until it can say yes; TimeoutError, with what is in the way, where that takes too long."""
        self._start()
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self.state().ready, timeout_s)
        found = self.state()
        if not found.ready:
            raise TimeoutError(f"not ready after {timeout_s} s: {found.problem or 'the broker said nothing yet'}")
        return found

    async def ready(self, timeout_s: float = 10.0) -> State:
        """`wait_ready` for an event loop."""
        return await asyncio.to_thread(self.wait_ready, timeout_s)

    def state(self) -> State:
        with self._lock:
            now = self._time.now()
            fresh, proven = self._feed.is_fresh(now), self._feed.proven
            left = self._feed.fresh.monotonic - now.monotonic if fresh else 0.0
            refusals, behind, lists = len(self._feed), self._time.behind_s, self._lists.fresh
        channel = "none"
        if fresh and self._follower is not None:
            channel = self._follower.channel
        elif not self._closed and (not lists.is_over(now) or self._only_lists()):
            channel = "lists"
        return State(
            channel=channel,
            fresh_for_s=round(left, 3),
            fresh_until=datetime.fromtimestamp(now.wall + left, UTC) if fresh else None,
            feed=None if proven is None else proven.feed,
            seq=None if proven is None else proven.seq,
            keys=len(self._keys.now),
            refusals=refusals,
            clock_behind_s=round(behind, 1),
            problem=self._problem(),
        )

    def _only_lists(self) -> bool:
        """Whether there is no feed to wait for, and nothing speaks against the lists."""
        return not self._asks and not self._lists.problem and not self._time.behind_s

    def _problem(self) -> str | None:
        follower = self._follower
        found = (follower and follower.problem, self._lists.problem, self._keys.problem)
        return "; ".join(each for each in found if each) or None

    def _start(self) -> None:
        if self._follower is not None:
            return
        with self._lock:
            if self._closed:
                raise Refused("not_fresh", "the verifier is closed")
            if self._follower is None:
                self._follower = Follower(
                    feed=self._feed,
                    keys=self._keys,
                    transport=self._transport,
                    time=self._time,
                    lock=self._lock,
                    changed=self._changed,
                    timing=self._timing,
                    issuer=self._issuer,
                    bound_s=self._bound_s,
                    asks=self._asks,
                )
                self._follower.start()

    def _new_feed(self) -> Feed:
        return Feed(self._time, longest_life_s=self._expected.longest_life_s, most_refusals=self._most_refusals)

    def close(self) -> None:
        """Stop following. From then on everything is refused."""
        with self._lock:
            self._closed = True
            follower, self._follower = self._follower, None
        if follower is not None:
            follower.close()
        with self._lock:
            self._feed = self._new_feed()
        self._transport.close()
        with self._changed:
            self._changed.notify_all()

    def after_fork(self) -> None:
        """In a child process the thread is not there, and connections and locks are the parent's: begin anew.

        What is refused stays refused, keys stay known; what was fresh has to be proven again.
        """
        self._lock, self._changed = threading.Lock(), threading.Condition()
        self._follower = None
        self._transport.reset()
        self._keys.reset()
        self._lists.reset(self._lock)
        self._seen.reset()
        if isinstance(self._once, proofs.Memory):
            self._once.reset()
        self._feed.distrust(start_over=False)

    def __enter__(self) -> Verifier:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Verifier({self._issuer!r}, {self._expected.audience!r})"


_ALL: weakref.WeakSet[Verifier] = weakref.WeakSet()


def _after_fork() -> None:
    for each in list(_ALL):
        each.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
