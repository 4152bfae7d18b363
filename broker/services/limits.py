"""Limits on asking, before anything is looked up: requests, different resources and mints, over all brokers (INV-34).

The database hands out what is left of each limit in parts (`broker.store.allowances`), and what a broker was given it
counts down by itself: most requests cost a few look-ups in memory, and so does refusing them. Redis has no part in it:
a counter that can be flushed, or that only some brokers reach, is looser at the very moment it is needed (INV-36).

Only what hands out authority asks here. Ending it, and looking whether it lives, never do (INV-27).
"""

from __future__ import annotations

import hashlib
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime

from sqlalchemy import Connection

from broker.domain.audit import Event
from broker.domain.catalogue import Limits
from broker.domain.clock import Clock, epoch, from_epoch
from broker.domain.errors import BrokerError, LimitExceeded, Unavailable
from broker.domain.identity import Caller, is_id, new_id
from broker.services.batching import Batching
from broker.services.endings import ACTOR
from broker.services.standing import StandingReader
from broker.store import allowances
from broker.store.allowances import Wanted
from broker.store.database import Database
from broker.store.grants import find_grant
from broker.store.tasks import agents_among
from broker.store.transitions import record

_WAITING = 50  # callers; of the server's threads, some are always left for what ends authority
_ROUNDS = 10
_REMEMBERED = 100_000  # of each kind of thing; beyond it they are looked up again
_MINTS_AGAIN_S = 60  # a task that has had its mints gets one back only where a request came to nothing

_SAYS = {
    "requests_per_agent": "{value} has asked {bound} times",
    "requests_per_task": "task {value} has been asked for {bound} times",
    "requests_per_resource": "{value} has been asked for {bound} times",
    "requests_per_issuer": "those whom {value} attests have asked {bound} times",
    "resources_per_agent": "{value} has asked for {bound} different resources",
    "resources_per_task": "{bound} different resources have been asked for under task {value}",
    "mints_per_task": "task {value} has had {bound} credentials",
}
_OF_A_KIND = {"resources_per_agent": "resource_of_agent", "resources_per_task": "resource_of_task"}
_MINTS = "mints_per_task"
_NEVER = -1  # before every window

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class _Limit:
    """One limit of one agent, task, resource or issuer, in the window that is now; `window_s` is None for all time."""

    name: str
    value: str
    bound: int
    window_s: int | None
    start: int

    @property
    def key(self) -> Key:
        return self.name, self.value

    def reached(self, now_s: int) -> LimitExceeded:
        says = _SAYS[self.name].format(value=self.value[:200], bound=self.bound)
        if self.window_s is None:
            detail, wait_s = f"{says}, all it gets (limits.{self.name}): go on under a new task", _MINTS_AGAIN_S
        else:
            wait_s = max(1, self.start + self.window_s - now_s)
            detail = f"{says}, all there is in {self.window_s} s (limits.{self.name}): come again in {wait_s} s"
        return LimitExceeded(detail, limit=self.name, value=self.bound, retry_after_s=wait_s, window_s=self.window_s)


@dataclass(frozen=True, slots=True)
class _Kind:
    """That `resource` is one of the different ones that count towards `limit`."""

    limit: _Limit
    resource: str

    @property
    def key(self) -> Key:
        return _OF_A_KIND[self.limit.name], f"{self.limit.value}\0{self.resource}"


@dataclass(frozen=True, slots=True)
class _Asked:
    """One request and what it counts towards; `pair` is its task and agent, where it names a task."""

    now_s: int
    limits: tuple[_Limit, ...]
    kinds: tuple[_Kind, ...]
    pair: tuple[str, str] | None

    def of_no_task(self) -> _Asked:
        """Nobody uses up what another agent's task has left."""
        return replace(
            self,
            pair=None,
            limits=tuple(limit for limit in self.limits if not limit.name.endswith("_per_task")),
            kinds=tuple(kind for kind in self.kinds if not kind.limit.name.endswith("_per_task")),
        )


@dataclass(slots=True)
class _Held:
    """What this broker may still use of a limit in one window; `is_last`: it gets no more of that window."""

    start: int
    left: int = 0
    is_last: bool = False


@dataclass(slots=True)
class Minting:
    """Whether a credential was made in the end; what was not is given back to its task."""

    made: bool = False


class Limiter:
    def __init__(self, *, database: Database, standing: StandingReader, limits: Limits, clock: Clock) -> None:
        self._database = database
        self._standing = standing
        self._limits = limits
        self._window_s = int(limits.window.total_seconds())
        self._clock = clock
        self._guard = threading.Lock()
        self._held: dict[Key, _Held] = {}
        self._now: dict[Key, _Limit] = {}  # as it was last found, which most often is how it is
        # In which window it was looked up, and whether it counts or may not.
        self._kinds: dict[Key, tuple[int, bool]] = {}
        self._told: dict[Key, int] = {}  # in which window it was said that a limit was reached
        self._pairs: set[tuple[str, str]] = set()  # (task, agent) of which the agent may ask under the task
        self._takes: Batching[_Asked, _Asked] = Batching(self._take_all, waiting=_WAITING)

    def require_open(self, caller: Caller) -> None:
        """Refuse, from memory alone, whoever could not ask for anything now; counts nothing."""
        now_s = epoch(self._clock())
        with self._guard:
            for limit in self._of_caller(caller, now_s):
                held = self._current(limit)
                if held is not None and held.is_last and not held.left:
                    raise limit.reached(now_s)

    @contextmanager
    def admitted(self, caller: Caller, *, resource: str, task_id: str | None) -> Iterator[Minting]:
        """Count one request before it is looked at, or raise LimitExceeded."""
        asked = self._asked(caller, resource, task_id)
        counted = self._spent(asked) or self._takes.submit(asked)
        minting = Minting()
        try:
            yield minting
        except Unavailable:
            raise  # what may have been made counts as made
        except BrokerError:
            # Once it is made, something may live outside whatever came then.
            if not minting.made:
                self._give_back(counted)
            raise
        if not minting.made:
            self._give_back(counted)

    @contextmanager
    def admitted_again(self, caller: Caller, grant_id: str) -> Iterator[Minting]:
        """The same for renewing and collecting: the grant says what it is for, if it is theirs."""
        grant = None
        if is_id(grant_id, "grt"):
            with self._database.read() as db:
                grant = find_grant(db, grant_id)
        resource, task_id = "", None
        if grant is not None and grant.is_held_by(caller.principal):
            resource, task_id = grant.resource, grant.task_id
        with self.admitted(caller, resource=resource, task_id=task_id) as minting:
            yield minting

    def is_told(self, agent: str, refusal: BrokerError) -> bool:
        """Whether a refusal is recorded: that a limit is reached is said once a window, however often somebody asks."""
        if isinstance(refusal, LimitExceeded):
            return self._is_news(refusal.limit, agent)
        return not isinstance(refusal, Unavailable)

    def _is_news(self, limit: str, value: str) -> bool:
        """Whether this broker has not said yet in this window that somebody reached a limit."""
        start = self._limit(limit, value, epoch(self._clock()), own_bound=0).start
        with self._guard:
            if self._told.get((limit, value), _NEVER) >= start:
                return False
            self._told[limit, value] = start
            return True

    def _asked(self, caller: Caller, resource: str, task_id: str | None) -> _Asked:
        agent, now_s = caller.name, epoch(self._clock())
        limits = self._of_caller(caller, now_s)
        kinds = []
        registered = self._standing.last_known().catalogue.find_resource(resource)
        if registered is not None:
            # What is not registered is refused as such; to count it would be a row for each name somebody makes up.
            limits.append(self._limit("requests_per_resource", resource, now_s, registered.max_requests))
            kinds.append(_Kind(self._limit("resources_per_agent", agent, now_s), resource))
        if task_id is None or not is_id(task_id, "task"):
            return _Asked(now_s, tuple(limits), tuple(kinds), None)
        limits.append(self._limit("requests_per_task", task_id, now_s))
        limits.append(_Limit(_MINTS, task_id, self._limits.mints_per_task, None, 0))
        if registered is not None:
            kinds.append(_Kind(self._limit("resources_per_task", task_id, now_s), resource))
        return _Asked(now_s, tuple(limits), tuple(kinds), (task_id, agent))

    def _of_caller(self, caller: Caller, now_s: int) -> list[_Limit]:
        catalogue = self._standing.last_known().catalogue
        agent, issuer = caller.name, caller.principal.issuer
        rule, attesting = catalogue.rule(agent), catalogue.issuer(issuer)
        return [
            self._limit("requests_per_agent", agent, now_s, None if rule is None else rule.max_requests),
            self._limit("requests_per_issuer", issuer, now_s, None if attesting is None else attesting.max_requests),
        ]

    def _limit(self, name: str, value: str, now_s: int, own_bound: int | None = None) -> _Limit:
        bound = getattr(self._limits, name) if own_bound is None else own_bound
        known = self._now.get((name, value))
        if known is not None and known.start <= now_s < known.start + self._window_s and known.bound == bound:
            return known
        # Windows of different ones begin at different moments, or all would be asked for at once.
        begins = zlib.crc32(value.encode()) % self._window_s
        start = (now_s - begins) // self._window_s * self._window_s + begins
        if len(self._now) >= _REMEMBERED:
            self._now.clear()
        found = self._now[name, value] = _Limit(name, value, bound, self._window_s, start)
        return found

    # --- In memory ----------------------------------------------------------------------------------------------------

    def _spent(self, asked: _Asked) -> _Asked | None:
        """Count it, if all it needs is held here; LimitExceeded where something of it is known to be reached."""
        with self._guard:
            return self._spend(asked)

    def _spend(self, asked: _Asked) -> _Asked | None:
        """The same, of whoever holds the guard."""
        if asked.pair is not None and asked.pair not in self._pairs:
            return None
        enough = True
        for limit in asked.limits:
            held = self._current(limit)
            if held is None or held.left == 0:
                if held is not None and held.is_last:
                    raise limit.reached(asked.now_s)
                enough = False
        for kind in asked.kinds:
            counts = self._known(kind)
            if counts is False:
                raise kind.limit.reached(asked.now_s)
            enough = enough and counts is True
        if not enough:
            return None
        for limit in asked.limits:
            self._held[limit.key].left -= 1
        return asked

    def _current(self, limit: _Limit) -> _Held | None:
        held = self._held.get(limit.key)
        return held if held is not None and held.start >= limit.start else None

    def _known(self, kind: _Kind) -> bool | None:
        """Whether it counts in this window, or may not; None where that was not looked up."""
        start, counts = self._kinds.get(kind.key, (_NEVER, False))
        return counts if start >= kind.limit.start else None

    def _give_back(self, counted: _Asked) -> None:
        """The mint of a request that came to no credential."""
        with self._guard:
            for limit in counted.limits:
                held = self._current(limit)
                if limit.name == _MINTS and held is not None:
                    held.left += 1

    # --- From the store -----------------------------------------------------------------------------------------------

    def _take_all(self, asks: Sequence[_Asked]) -> Sequence[_Asked | BrokerError]:
        """Fetch what these requests lack, for all in one transaction, and count them; a refusal is an answer."""
        answers: dict[int, _Asked | BrokerError] = {}
        for _ in range(_ROUNDS):
            # More than once where others used up meanwhile what was enough at the first look.
            self._take({number: asked for number, asked in enumerate(asks) if number not in answers}, answers)
            if len(answers) == len(asks):
                break
        late = Unavailable("others were quicker each time that this was counted: try again")
        return [answers.get(number, late) for number in range(len(asks))]

    def _take(self, asks: Mapping[int, _Asked], answers: dict[int, _Asked | BrokerError]) -> None:
        with self._guard:
            strangers = {asked.pair for asked in asks.values() if asked.pair is not None} - self._pairs
        with self._database.begin_issuing() as db:
            pairs = agents_among(db, strangers)
            strangers -= pairs
            asks = {number: asked.of_no_task() if asked.pair in strangers else asked for number, asked in asks.items()}
            with self._guard:
                unknown = {
                    kind.key: kind for asked in asks.values() for kind in asked.kinds if self._known(kind) is None
                }
            counting = _counting(db, unknown.values())
            new = [kind for key, kind in unknown.items() if key not in counting]
            newest: dict[Key, _Limit] = {}
            for limit in (*(limit for asked in asks.values() for limit in asked.limits), *(kind.limit for kind in new)):
                # A window may have turned between two of these requests: all of them count in the one that is now.
                if limit.key not in newest or newest[limit.key].start < limit.start:
                    newest[limit.key] = limit
            needed = Counter(limit.key for asked in asks.values() for limit in asked.limits)
            needed.update(kind.limit.key for kind in new)
            with self._guard:
                left = {key: self._left(limit) for key, limit in newest.items()}
            lacking = {
                key: count - left[key].left
                for key, count in needed.items()
                if not left[key].is_last and left[key].left < count
            }
            given = allowances.take(db, [self._wanted(newest[key], count) for key, count in lacking.items()])
            taken = {key: given[_row_of(key)] for key in lacking}
            fitting, first = self._first_of_their_kind(
                db, new, {key: left[key].left + taken.get(key, 0) for key in newest}
            )
            reached = {key for key, count in lacking.items() if taken[key] < count}
            record(db, [_reached(newest[key], self._clock()) for key in sorted(reached)])
        with self._guard:
            self._forget()
            self._pairs |= pairs
            for key, count in taken.items():
                held = self._current(newest[key])
                if held is None:
                    held = self._held[key] = _Held(newest[key].start)
                held.left += count
                held.is_last = held.is_last or key in reached
            for key, kind in unknown.items():
                if key in first and kind.limit.key in self._held:
                    self._held[kind.limit.key].left -= 1
                self._kinds[key] = newest.get(kind.limit.key, kind.limit).start, key in counting or key in fitting
            for number, asked in asks.items():
                try:
                    spent = self._spend(asked)
                except LimitExceeded as refusal:
                    answers[number] = refusal
                else:
                    if spent is not None:
                        answers[number] = spent

    def _left(self, limit: _Limit) -> _Held:
        """A copy of what is held of it."""
        held = self._current(limit)
        return _Held(limit.start) if held is None else replace(held)

    def _wanted(self, limit: _Limit, count: int) -> Wanted:
        name, key_sha256 = _row_of(limit.key)
        if limit.window_s is None:
            # As long as a task may last; asking again says it anew.
            forget_at = self._clock() + self._limits.max_deadline
        else:
            forget_at = from_epoch(limit.start + 2 * limit.window_s)
        return Wanted(
            name=name,
            key_sha256=key_sha256,
            window_start=limit.start,
            bound=limit.bound,
            asked=count,
            forget_at=forget_at,
        )

    def _first_of_their_kind(
        self, db: Connection, new: Sequence[_Kind], room: dict[Key, int]
    ) -> tuple[set[Key], set[Key]]:
        """Those for which there is room, and of these the ones that no other broker counted meanwhile."""
        fitting = []
        for kind in new:
            if room[kind.limit.key] > 0:
                room[kind.limit.key] -= 1
                fitting.append(replace(kind.limit, name=kind.key[0], value=kind.key[1], bound=1))
        given = allowances.take(db, [self._wanted(limit, 1) for limit in fitting])
        return {limit.key for limit in fitting}, {limit.key for limit in fitting if given[_row_of(limit.key)]}

    def _forget(self) -> None:
        """Keep memory bounded. What was held of a window that is not over is lost with it, which is tighter."""
        for remembered in (self._held, self._kinds, self._told, self._pairs):
            if len(remembered) > _REMEMBERED:
                remembered.clear()


def _counting(db: Connection, kinds: Iterable[_Kind]) -> set[Key]:
    """Those of these kinds that count in their window already, by whichever broker."""
    windows: dict[str, dict[str, tuple[Key, int]]] = {}
    for kind in kinds:
        name, key_sha256 = _row_of(kind.key)
        windows.setdefault(name, {})[key_sha256] = kind.key, kind.limit.start
    found: set[Key] = set()
    for name, by_hash in windows.items():
        taken = allowances.taken_in(db, name, {key_sha256: start for key_sha256, (_, start) in by_hash.items()})
        found |= {by_hash[key_sha256][0] for key_sha256 in taken}
    return found


def _row_of(key: Key) -> Key:
    # A task may have any name, and a resource a long one: neither has to fit into an index.
    name, value = key
    return name, hashlib.sha256(value.encode()).hexdigest()


def _reached(limit: _Limit, now: datetime) -> Event:
    """Said once a window by each broker that finds it so; what is refused from then on is a count alone (INV-35)."""
    axis = limit.name.rpartition("_per_")[2]
    about = {"agent": "agent", "task": "task_id", "resource": "resource"}.get(axis)
    return Event(
        id=new_id("evt", now),
        at=now,
        type="limit.reached",
        actor=ACTOR,
        outcome=LimitExceeded.code,
        data={"limit": limit.name, "value": limit.value, "bound": limit.bound, "window_s": limit.window_s},
        **({} if about is None else {about: limit.value}),  # type: ignore[arg-type]
    )
