"""Engines and transactions: SQLite (WAL, FULL, one writer) and PostgreSQL, made to behave alike.

`Database.begin()` and `Database.read()` are the only ways to a transaction. While one is open on a thread,
`in_transaction()` says so, and the providers of the tests refuse to be called. A store that does not answer is
`Unavailable`, whatever its driver calls that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import (
    DatabaseError,
    DataError,
    DisconnectionError,
    IntegrityError,
    InterfaceError,
    ProgrammingError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from broker.domain.errors import Unavailable

_READS_ONLY = "reads_only"
_LEFT_AT = "left_at"  # by the monotonic clock
_QUIET_S = 1.0
_PATIENCE_S = 10  # for a connection, a lock, an unanswered packet: longer, and the caller is told to come again
# A statement nobody bounds holds its locks, and whoever waits for them, for ever.
_POSTGRESQL_BOUNDS = " ".join(
    f"-c {name}={value}"
    for name, value in {
        "timezone": "UTC",
        "lock_timeout": f"{_PATIENCE_S}s",
        "statement_timeout": "60s",
        "idle_in_transaction_session_timeout": "60s",
    }.items()
)

_log = logging.getLogger(__name__)


@dataclass
class _Noted:
    """Of one transaction, for when it has committed: (type, outcome) of each audit event, and whether the feed grew."""

    events: list[tuple[str, str]] = field(default_factory=list)
    announced: bool = False


_open: ContextVar[_Noted | None] = ContextVar("transaction", default=None)


def in_transaction() -> bool:
    """Whether this context holds a transaction open."""
    return _open.get() is not None


def recorded(events: Iterable[tuple[str, str]]) -> None:
    """Note audit events of the transaction that is open here, to be told of when it has committed."""
    noted = _open.get()
    if noted is not None:
        noted.events.extend(events)


def announced() -> None:
    """Note that the transaction that is open here wrote to the feed."""
    noted = _open.get()
    if noted is not None:
        noted.announced = True


class Database:
    """One engine; `url` is `sqlite:///path` or `postgresql+psycopg://…`.

    `committed` is told (type, outcome) of each audit event, when and only when it has become durable; `announced` is
    called when something was written to the feed.
    """

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = 10,
        committed: Callable[[Sequence[tuple[str, str]]], None] | None = None,
        announced: Callable[[], None] | None = None,
    ) -> None:
        self.engine = _engine(url, pool_size)
        self._committed = committed
        self._announced = announced
        self._issuing = threading.BoundedSemaphore(max(1, pool_size // 3))
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        self._turn = threading.Lock() if self.is_sqlite else None
        reading: dict[str, Any] = {_READS_ONLY: True} if self.is_sqlite else {"isolation_level": "AUTOCOMMIT"}
        self._reader = self.engine.execution_options(**reading)

    def begin(self) -> AbstractContextManager[Connection]:
        """A read-write transaction: committed at the end of the block, rolled back on any exception."""
        return _transaction(self.engine, self._committed, self._announced, self._turn)

    @contextmanager
    def begin_issuing(self) -> Iterator[Connection]:
        """The same for whatever gives authority: it gets a third of the connections, so that what ends it finds one.

        However issuing waits, for the gate or for a slow disk, revocation does not wait with it (INV-27).
        """
        if not self._issuing.acquire(timeout=_PATIENCE_S):
            raise Unavailable("the broker is busy issuing: try again")
        try:
            with self.begin() as connection:
                yield connection
        finally:
            self._issuing.release()

    def read(self) -> AbstractContextManager[Connection]:
        """Reading only: waits for no writer. On PostgreSQL each statement sees the newest state for itself."""
        return _transaction(self._reader)

    def look(self, statement: str, values: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """What one statement finds at this moment, as the driver gives it: a transaction would cost more than it does.

        Values are bound by name, in the driver's own way.
        """
        if in_transaction():
            raise RuntimeError("a transaction is open here, and this look would not see what it did")
        try:
            with self._alone() as driver:
                return list(driver.execute(statement, values).fetchall())
        except (self.engine.dialect.dbapi.Error, DatabaseError, InterfaceError, PoolTimeout) as problem:  # type: ignore[union-attr]
            raise _no_answer(problem) from problem

    @contextmanager
    def _alone(self) -> Iterator[Any]:
        """A driver's connection on which each statement is a transaction of its own; thrown away if it broke."""
        pooled = self.engine.raw_connection()
        driver: Any = pooled.driver_connection
        try:
            if not self.is_sqlite:
                driver.autocommit = True
            yield driver
            if not self.is_sqlite:
                driver.autocommit = False
        except BaseException:
            pooled.invalidate()
            raise
        finally:
            pooled.close()

    def close(self) -> None:
        self.engine.dispose()


@contextmanager
def _transaction(
    engine: Engine,
    committed: Callable[[Sequence[tuple[str, str]]], None] | None = None,
    announced: Callable[[], None] | None = None,
    turn: threading.Lock | None = None,
) -> Iterator[Connection]:
    if in_transaction():
        raise RuntimeError("a transaction is already open here; a verb opens one at a time")
    noted = _Noted()
    token = _open.set(noted)
    try:
        with _in(turn), engine.begin() as connection:
            yield connection
    except (IntegrityError, DataError, ProgrammingError):
        raise  # the row's fault, or ours, and not the store's
    except (DatabaseError, InterfaceError, PoolTimeout) as problem:
        # Also where the commit itself was not answered: unknown is "not done" to the caller (INV-05).
        raise _no_answer(problem) from problem
    finally:
        _open.reset(token)
    if committed is not None and noted.events:
        committed(noted.events)
    if announced is not None and noted.announced:
        announced()


@contextmanager
def _in(turn: threading.Lock | None) -> Iterator[None]:
    """SQLite has one writer, and whoever finds another one sleeps for longer and longer: here it is woken at once."""
    if turn is None:
        yield
    elif turn.acquire(timeout=_PATIENCE_S):
        try:
            yield
        finally:
            turn.release()
    else:
        raise _unanswered()


def _no_answer(problem: Exception) -> Unavailable:
    _log.warning("the store did not answer", extra={"fields": {"kind": type(problem).__name__}}, exc_info=problem)
    return _unanswered()


def _unanswered() -> Unavailable:
    return Unavailable("the broker's store did not answer, so nothing was handed out: try again")


def _engine(url: str, pool_size: int) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise ValueError("an in-memory SQLite database forgets its grants; name a file")
        engine = create_engine(
            parsed,
            poolclass=QueuePool,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=_PATIENCE_S,
            hide_parameters=True,
            connect_args={"timeout": _PATIENCE_S, "check_same_thread": False},
        )
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_immediate)
        return engine
    engine = create_engine(
        parsed,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=_PATIENCE_S,
        hide_parameters=True,  # an error message is logged, and parameters are not ours to log (INV-30)
        isolation_level="READ COMMITTED",
        connect_args={
            "options": _POSTGRESQL_BOUNDS,
            "connect_timeout": _PATIENCE_S,
            "tcp_user_timeout": _PATIENCE_S * 1000,
            "keepalives_idle": _PATIENCE_S,
        },
    )
    _ask_the_quiet(engine)
    return engine


def _ask_the_quiet(engine: Engine) -> None:
    """Ask a connection that was quiet for a while whether it still is one, before anything depends on it.

    A server that starts again ends those that nobody uses without their hearing of it. One that was used a moment ago
    is not asked: that would be one more answer to wait for in every transaction. But where one broke, the others that
    were there by then are asked, each before it is used again.
    """
    broke_at = float("-inf")

    def broke(_driver: Any, _record: ConnectionPoolEntry, _problem: BaseException | None) -> None:
        nonlocal broke_at
        broke_at = time.monotonic()

    def left(_driver: Any, record: ConnectionPoolEntry) -> None:
        record.info[_LEFT_AT] = time.monotonic()

    def taken(driver: Any, record: ConnectionPoolEntry, _proxy: Any) -> None:
        left_at = record.info.get(_LEFT_AT)
        if left_at is None or left_at > max(broke_at, time.monotonic() - _QUIET_S):
            return
        try:
            engine.dialect.do_ping(driver)
        except engine.dialect.loaded_dbapi.Error as problem:
            raise DisconnectionError from problem

    event.listen(engine, "invalidate", broke)
    event.listen(engine, "checkin", left)
    event.listen(engine, "checkout", taken)


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # The driver's own BEGIN is deferred: two readers that both turn writer deadlock. We begin ourselves.
    connection.isolation_level = None
    for pragma in (
        "journal_mode = WAL",
        "synchronous = FULL",  # NORMAL may lose a committed revocation on power loss (INV-23)
        "foreign_keys = ON",
        f"busy_timeout = {_PATIENCE_S * 1000}",
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_immediate(connection: Connection) -> None:
    reads_only = connection.get_execution_options().get(_READS_ONLY)
    connection.exec_driver_sql("BEGIN" if reads_only else "BEGIN IMMEDIATE")
