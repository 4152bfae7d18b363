"""Being told by PostgreSQL (LISTEN) that something was written to the feed, the moment its transaction has committed.

A hint: what there is to read is in rows, and whoever listens looks every so often anyway. It has a connection of its
own beside the pool.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from psycopg import Connection as Driver
from psycopg import Error as DriverError
from psycopg import sql
from sqlalchemy.exc import SQLAlchemyError

from broker.store.database import Database

_STOPPED_WITHIN_S = 0.5
_AGAIN_AFTER_S = 1.0

_log = logging.getLogger(__name__)


def listen(database: Database, channel: str, heard: Callable[[], None]) -> Callable[[], None]:
    """Call `heard` on each message, in a thread of its own; answers how to stop. On SQLite there is nobody to hear."""
    if database.is_sqlite:
        return lambda: None
    stop = threading.Event()
    thread = threading.Thread(target=_listen, args=(database, channel, heard, stop), name="listening", daemon=True)
    thread.start()

    def stopped() -> None:
        stop.set()
        thread.join(4 * _STOPPED_WITHIN_S)

    return stopped


def _listen(database: Database, channel: str, heard: Callable[[], None], stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            with database.engine.connect() as pooled:
                driver = pooled.connection.driver_connection
                # Out of the pool: who waits for messages all the time must not keep a place that others need.
                pooled.detach()
                assert isinstance(driver, Driver)  # noqa: S101 - the only driver of PostgreSQL we have
                driver.rollback()
                driver.autocommit = True
                driver.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
                # What was said while nobody listened is not said again.
                heard()
                while not stop.is_set():
                    for _ in driver.notifies(timeout=_STOPPED_WITHIN_S, stop_after=1):
                        heard()
        except (SQLAlchemyError, DriverError) as problem:
            _log.warning("the database is not heard", extra={"fields": {"kind": type(problem).__name__}})
            stop.wait(_AGAIN_AFTER_S)
