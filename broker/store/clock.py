"""The database's clock: the one that decides where several brokers may share a database (INV-09).

Between two looks it is carried on by this machine's monotonic clock, which drifts a little and never jumps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from broker.domain.errors import Unavailable
from broker.store.database import Database

# Far less than what two honest clocks drift apart in it would matter; long enough for a failover.
TRUSTED_FOR = timedelta(seconds=60)


class DatabaseClock:
    """A `Clock`. Somebody calls `look` every few seconds; a clock nobody set for a minute says nothing at all."""

    def __init__(self, database: Database, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._monotonic = monotonic
        self._set: tuple[datetime, float] | None = None

    def __call__(self) -> datetime:
        if self._set is None:
            self.look()
        assert self._set is not None  # noqa: S101 - look sets it or raises
        at, when = self._set
        elapsed = timedelta(seconds=self._monotonic() - when)
        if elapsed > TRUSTED_FOR:
            # A guess would be somebody's authority: none is better (INV-13).
            raise Unavailable(f"the database's clock was last read {int(elapsed.total_seconds())} s ago")
        return (at + elapsed).replace(microsecond=0)

    def look(self) -> None:
        """Set it anew. Raises Unavailable where the database does not answer."""
        try:
            with self._database.engine.connect() as connection:
                db = connection.execution_options(isolation_level="AUTOCOMMIT")
                before = self._monotonic()
                at = db.execute(text("SELECT clock_timestamp()")).scalar_one()
                after = self._monotonic()
        except SQLAlchemyError as problem:
            raise Unavailable("the database does not answer what time it is") from problem
        # It was read somewhere in between; half the round trip is the smallest error there can be.
        self._set = (at.astimezone(UTC), (before + after) / 2)
