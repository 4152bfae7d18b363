"""What one process tells its readers of the feed: read once, signed once, and shared by however many there are.

A thread looks whenever something was committed, and every so often because a message may be lost; it rests while nobody
reads. What it finds is an `Edition`, which never changes. A store that does not answer gives no new edition, and so no
new statement: readers see that for themselves (INV-24).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from broker.domain.errors import BrokerError, Unavailable
from broker.domain.feed import Position
from broker.services.feed import Feed, Looked, Start

STATED_EVERY_S = 1.5
_REMEMBERED = 4096  # events; who is further behind is answered from the store
_EARLY_S = 0.1  # a look that comes so early counts for the next statement
_AGAIN_AFTER_S = 1.0

_log = logging.getLogger(__name__)

Told = Callable[["Edition"], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Edition:
    """The feed at one moment: its newest events, above `since`, and a statement of just this moment.

    Whoever reads on needs the statement only where `stated` is another number than in the last one they were told.
    """

    looked: Looked
    since: int
    texts: Sequence[str] = field(repr=False)
    statement: str | None = field(repr=False)
    stated: int

    @property
    def feed_id(self) -> str:
        return self.looked.seen.feed_id

    @property
    def seq(self) -> int:
        return self.looked.seen.seq

    def after(self, seq: int) -> Sequence[str] | None:
        """The events above this number; None where not all of them are remembered."""
        return None if seq < self.since else self.texts[seq - self.since :]


class Broadcast:
    """`listen` begins to tell of commits elsewhere, and answers how to stop; `ring` is for those of this process."""

    def __init__(
        self,
        feed: Feed,
        *,
        listen: Callable[[Callable[[], None]], Callable[[], None]],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._feed = feed
        self._listen = listen
        self._monotonic = monotonic
        self._looking = threading.Lock()
        self._guard = threading.Lock()  # over what follows, and never while the store is asked
        self._changed = threading.Condition(self._guard)
        self._edition: Edition | None = None
        self._looked_at = self._stated_at = float("-inf")
        self._readers = 0
        self._told: list[Told] = []
        self._thread: threading.Thread | None = None
        self._stop_listening: Callable[[], None] | None = None
        self._bell = threading.Event()
        self._stopped = threading.Event()

    @property
    def is_stopped(self) -> bool:
        return self._stopped.is_set()

    def ring(self) -> None:
        """Something was committed: look now. Costs whoever committed it nothing."""
        self._bell.set()

    @contextmanager
    def reading(self, told: Told | None = None) -> Iterator[None]:
        """Within the block there is somebody to look for; each edition is given to `told`, on the thread that looks."""
        self._enter(told)
        try:
            yield
        finally:
            with self._guard:
                self._readers -= 1
                if told is not None:
                    self._told.remove(told)

    def _enter(self, told: Told | None) -> None:
        with self._guard:
            self._readers += 1
            if told is not None:
                self._told.append(told)
            if self._thread is None and not self._stopped.is_set():
                self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
                self._thread.start()
        self._bell.set()

    def newest(self) -> Edition:
        """The edition that readers have, while there are some; else one that was looked for after this was asked."""
        asked_at = self._monotonic()
        with self._guard:
            edition, age_s = self._edition, asked_at - self._looked_at
            if edition is not None and self._readers and age_s <= STATED_EVERY_S and not self._bell.is_set():
                return edition
        return self.look(asked_at)

    def begin(self, wanted: Position | None) -> tuple[Edition, Start]:
        """Where a reader that came so far goes on, and the edition it does so with."""
        edition = self.newest()
        if wanted is not None and wanted.feed_id == edition.feed_id and wanted.seq > edition.seq:
            # Another process may have told it of what this one has not seen.
            edition = self.look()
        return edition, self._feed.start(wanted, edition.looked)

    def wait(self, edition: Edition, *, at_most_s: float) -> Edition:
        """The newest edition as soon as there is another than this one, or after that time."""
        with self._changed:
            self._changed.wait_for(lambda: self._edition is not edition or self._stopped.is_set(), at_most_s)
            return self._edition or edition

    def until(self, edition: Edition, settled: Callable[[Edition], bool], *, at_most_s: float) -> None:
        """Wait for an edition after this one that settles it, or until the time is over."""
        until = self._monotonic() + at_most_s
        while (left_s := until - self._monotonic()) > 0 and not self.is_stopped:
            newer = self.wait(edition, at_most_s=left_s)
            if newer is not edition and settled(newer):
                return
            edition = newer

    def look(self, asked_at: float | None = None) -> Edition:
        """A new edition, or one whose look began after it was asked for: one look is enough for a crowd (INV-35).

        Readers of this process are told of it before this returns.
        """
        with self._looking:
            last = self._edition
            if last is not None and asked_at is not None and self._looked_at > asked_at:
                return last
            now = self._monotonic()
            looked = self._feed.look()
            since, texts = self._read(last, looked)
            due = now - self._stated_at >= STATED_EVERY_S - _EARLY_S
            if last is not None and last.looked.seen == looked.seen and not due:
                self._looked_at = now
                return last
            edition = Edition(
                looked=looked,
                since=since,
                texts=texts,
                statement=self._feed.statement(looked),
                stated=(0 if last is None else last.stated) + due,
            )
            with self._changed:
                self._edition, self._looked_at = edition, now
                self._stated_at = now if due else self._stated_at
                told = tuple(self._told)
                self._changed.notify_all()
            for tell in told:
                tell(edition)
        return edition

    def _read(self, last: Edition | None, looked: Looked) -> tuple[int, Sequence[str]]:
        """The newest events, and the number above which they are."""
        seen = looked.seen
        if last is None or last.feed_id != seen.feed_id or seen.seq - last.seq > _REMEMBERED:
            return seen.seq, ()
        if seen.seq == last.seq:
            return last.since, last.texts
        texts = (*last.texts, *self._feed.since(last.looked.seen, seen))[-_REMEMBERED:]
        return seen.seq - len(texts), texts

    def _run(self) -> None:
        while not self._stopped.is_set():
            with self._guard:
                due_in_s = self._stated_at + STATED_EVERY_S - self._monotonic()
                pause_s = max(0.0, due_in_s) if self._readers else None
            self._bell.wait(pause_s)
            self._bell.clear()
            with self._guard:
                idle = not self._readers
            if idle or self._stopped.is_set():
                continue
            self._look_or_wait()
        self._hush()

    def _look_or_wait(self) -> None:
        try:
            self._attend()
            self.look()
        except BrokerError as problem:
            _log.warning("the feed was not read", extra={"fields": {"detail": problem.detail}})
            self._stopped.wait(_AGAIN_AFTER_S)
        except Exception:
            # The next look does what this one did not; meanwhile nobody is told that all is well.
            _log.exception("the feed was not read")
            self._stopped.wait(_AGAIN_AFTER_S)

    def _attend(self) -> None:
        if self._stop_listening is None:
            self._stop_listening = self._listen(self.ring)

    def _hush(self) -> None:
        if self._stop_listening is not None:
            self._stop_listening()

    def stop(self) -> None:
        """Let every reader go, and look no more."""
        self._stopped.set()
        self._bell.set()
        with self._changed:
            self._changed.notify_all()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(5)


class Places:
    """How many may read at once, all together and of one caller: one more is told to come again (INV-35)."""

    def __init__(self, at_once: int, *, of_one_caller: int | None = None) -> None:
        self._at_once = at_once
        self._of_one_caller = at_once if of_one_caller is None else of_one_caller
        self._guard = threading.Lock()
        self._taken: dict[str, int] = {}

    @classmethod
    def shared(cls, at_once: int) -> Places:
        """Two thirds for one caller at most, so that one gone wrong leaves room for the others."""
        return cls(at_once, of_one_caller=max(1, at_once * 2 // 3))

    def take(self, name: str) -> None:
        if not self.try_take(name):
            raise Unavailable("as many read the feed here as may: poll, or try again")

    def try_take(self, name: str) -> bool:
        with self._guard:
            mine = self._taken.get(name, 0)
            if sum(self._taken.values()) >= self._at_once or mine >= self._of_one_caller:
                return False
            self._taken[name] = mine + 1
            return True

    def give_back(self, name: str) -> None:
        with self._guard:
            self._taken[name] -= 1
            if not self._taken[name]:
                del self._taken[name]
