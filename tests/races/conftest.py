"""Two brokers on one store, one of them stopped in the middle of a transaction while the other runs into it.

Nothing here hopes for bad luck: the first is held at a named line, the second is started, and the first goes on only
when the database says that the second waits for it, or when the second is done because nothing made it wait.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import sqlalchemy as sa

from tests.conftest import postgres_database
from tests.house import House, build_house

PATIENCE_S = 20


class Pause:
    """A line at which one thread stops until it is told to go on: the first that comes by, after `passing` others."""

    def __init__(self, *, passing: int = 0) -> None:
        self._turn = threading.Lock()
        self._still_passing = passing
        self._reached = threading.Event()
        self._go = threading.Event()

    def pass_by(self) -> None:
        with self._turn:
            stops = self._still_passing == 0
            self._still_passing -= 1
        if stops:
            self._reached.set()
            assert self._go.wait(PATIENCE_S), "nobody let the stopped one go on"

    def until_reached(self, by: "Future[object]") -> None:
        """Wait until `by` stands there; its own error is raised if it ended before."""
        deadline = time.monotonic() + PATIENCE_S
        while not self._reached.wait(0.01):
            if by.done():
                raise AssertionError(f"it ended before it came to the line: {by.exception() or by.result()!r}")
            assert time.monotonic() < deadline, "it never came to the line"

    def go_on(self) -> None:
        self._go.set()


@dataclass
class Race:
    """`one` is stopped, `other` runs into it."""

    one: House
    other: House
    pool: ThreadPoolExecutor
    monkeypatch: pytest.MonkeyPatch
    # A pool of its own: the brokers' may be used up by those who wait.
    looking: sa.Engine = field(init=False)

    def __post_init__(self) -> None:
        self.looking = sa.create_engine(self.one.broker.database.engine.url, isolation_level="AUTOCOMMIT")

    @property
    def on_sqlite(self) -> bool:
        return bool(self.one.broker.database.is_sqlite)

    def stop(self, owner: object, name: str, *, after: bool = False, passing: int = 0) -> Pause:
        """Stop the first thread that calls `owner.name`, before it does or when it did; or the one after `passing`."""
        pause, original = Pause(passing=passing), getattr(owner, name)

        def stopped(*arguments: object, **more: object) -> object:
            if not after:
                pause.pass_by()
            answer = original(*arguments, **more)
            if after:
                pause.pass_by()
            return answer

        self.monkeypatch.setattr(owner, name, stopped)
        return pause

    def start(self, verb: Callable[..., object], *arguments: object, **more: object) -> "Future[object]":
        return self.pool.submit(verb, *arguments, **more)

    def run_into(self, first: Callable[[], object], pause: Pause, *seconds: Callable[[], object]) -> "list[Outcome]":
        """`first` until it is stopped; then the others, until each waits or is done; then all to the end."""
        running = self.start(first)
        pause.until_reached(running)
        others = [self.start(second) for second in seconds]
        waited = self.until_they_wait(*others)
        pause.go_on()
        return [outcome(running, waited=0), *(outcome(other, waited=waited) for other in others)]

    def until_they_wait(self, *others: "Future[object]", waiting: int | None = None) -> int:
        """Until all of the others, or `waiting` of them, wait for a lock or are done; answers how many wait."""
        deadline = time.monotonic() + PATIENCE_S
        wanted = len(others) if waiting is None else waiting
        # SQLite does not tell who waits: there, whoever is not done after a while does.
        patient_until = time.monotonic() + 0.3
        while True:
            done = sum(other.done() for other in others)
            waits = len(others) - done if self.on_sqlite else self.waiting_for_locks()
            if done + waits >= wanted and (not self.on_sqlite or time.monotonic() > patient_until or not waits):
                return waits
            assert time.monotonic() < deadline, f"{done} are done and {waits} wait, of {wanted}"
            time.sleep(0.01)

    def until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not done():
            assert time.monotonic() < deadline, "it never came to that"
            time.sleep(0.01)

    def waiting_for_locks(self) -> int:
        """How many transactions of this database PostgreSQL holds back."""
        statement = (
            "SELECT count(*) AS waiting FROM pg_stat_activity "
            "WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        return int(self.rows(statement)[0].waiting)

    @contextmanager
    def holding(self, statement: str, **parameters: object):
        """A transaction of nobody's that executed this and keeps what it locked until the block ends."""
        with self.one.broker.database.engine.connect() as connection, connection.begin() as transaction:
            connection.execute(sa.text(statement), parameters)
            yield
            transaction.rollback()

    def rows(self, statement: str, **parameters: object) -> list[sa.Row]:
        with self.looking.connect() as db:
            return list(db.execute(sa.text(statement), parameters))

    def live_under_ended_tasks(self) -> list[str]:
        """INV-12, asked of the rows."""
        found = self.rows(
            "SELECT g.id FROM grants g JOIN tasks t ON t.id = g.task_id "
            "WHERE t.state <> 'active' AND g.state = 'active'"
        )
        return [row.id for row in found]

    def state_of(self, issued: object) -> str:
        return str(self.rows("SELECT state FROM grants WHERE id = :id", id=issued.grant.id)[0].state)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Outcome:
    """What one of them came to: an answer or a refusal, and whether it had to wait."""

    answer: object
    refusal: BaseException | None
    waited: bool


def outcome(future: "Future[object]", *, waited: int) -> Outcome:
    wait([future], timeout=PATIENCE_S)
    assert future.done(), "it never ended"
    refusal = future.exception()
    return Outcome(answer=None if refusal else future.result(), refusal=refusal, waited=bool(waited))


@pytest.fixture
def threads():
    with ThreadPoolExecutor(64) as pool:
        yield pool


@pytest.fixture
def race(house, second_house, monkeypatch):
    with ThreadPoolExecutor(64) as pool:
        built = Race(house, second_house, pool, monkeypatch)
        yield built
        built.looking.dispose()


@pytest.fixture
def postgres_race(postgres, migrated_template, tmp_path, monkeypatch):
    """The same on PostgreSQL alone: where SQLite has one writer, there is nothing to interleave."""
    with postgres_database(postgres, template=migrated_template) as url, ThreadPoolExecutor(64) as pool:
        one = build_house(url, tmp_path)
        other = build_house(url, tmp_path, clock=one.clock)
        built = Race(one, other, pool, monkeypatch)
        yield built
        built.looking.dispose()
        one.broker.close()
        other.broker.close()
