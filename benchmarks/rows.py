"""Rows beside what is measured; and sweeping, by the verb itself over rows that were copied into the store."""

from __future__ import annotations

import time
from datetime import datetime, timedelta

from sqlalchemy import text

from benchmarks.servers import Bench
from broker.domain.clock import from_epoch, system_clock
from broker.store import models
from broker.wiring import Broker, build

_PAST = from_epoch(1_700_000_000)
_OF_OURS = "grt_0"  # no id made now sorts there


def sweep_of_due_grants(bench: Bench, count: int) -> tuple[int, float]:
    """(rows moved, seconds) of sweeping this many grants that fell due."""
    broker = build(bench.settings)
    try:
        _drain(broker)
        copy_grants(broker, count, expires_at=_PAST + timedelta(seconds=60))
        started = time.perf_counter()
        moved = broker.sweeper.sweep().grants_expired
        return moved, time.perf_counter() - started
    finally:
        remove_copies(broker)
        broker.close()


def empty_sweep(bench: Bench, live: int) -> float:
    """Seconds of a sweep that finds nothing to do beside this many live grants."""
    broker = build(bench.settings)
    try:
        _drain(broker)
        copy_grants(broker, live, expires_at=system_clock() + timedelta(days=365))
        _drain(broker)
        started = time.perf_counter()
        for _ in range(10):
            broker.sweeper.sweep()
        return (time.perf_counter() - started) / 10
    finally:
        remove_copies(broker)
        broker.close()


def forget_allowances(bench: Bench) -> None:
    """Let every limit begin anew."""
    broker = build(bench.settings)
    try:
        with broker.database.begin() as db:
            db.execute(text("DELETE FROM allowances"))
    finally:
        broker.close()


def _drain(broker: Broker) -> None:
    """What earlier measurements left, and what a busy database does after them."""
    while any(vars(broker.sweeper.sweep()).values()):
        pass
    if not broker.database.is_sqlite:
        with broker.database.engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT").execute(text("VACUUM ANALYZE grants"))


def copy_grants(broker: Broker, count: int, *, expires_at: datetime, **differing: str) -> None:
    """Copies of one issued grant, active, with ids of their own; `differing` are columns, as SQL that knows `n`."""
    sqlite = broker.database.is_sqlite

    def moment(at: datetime) -> str:
        seconds = int(at.timestamp())
        return str(seconds) if sqlite else f"to_timestamp({seconds})"

    number = "substr('0000000000000000000000000' || n, -25)" if sqlite else "lpad(n::text, 25, '0')"
    copied = {
        "id": f"'{_OF_OURS}' || {number}",
        "state": "'active'",
        "status_list": "NULL",
        "status_index": "NULL",
        "revoked_at": "NULL",
        "issued_at": moment(_PAST),
        "expires_at": moment(expires_at),
        **differing,
    }
    columns = [column.name for column in models.table_of(models.Grant).columns]
    names = ", ".join(f'"{name}"' for name in columns)
    values = ", ".join(copied.get(name, f'g."{name}"') for name in columns)
    series = (
        f"WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < {count})"
        if sqlite
        else f"WITH s AS (SELECT generate_series(1, {count}) AS n)"
    )
    one = "(SELECT * FROM grants WHERE issued_at IS NOT NULL LIMIT 1)"
    with broker.database.begin() as db:
        db.execute(text(f"INSERT INTO grants ({names}) {series} SELECT {values} FROM s, {one} AS g"))
    if not sqlite:
        with broker.database.engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT").execute(text("VACUUM ANALYZE grants"))


def remove_copies(broker: Broker) -> None:
    """And what is on record of them."""
    with broker.database.begin() as db:
        db.execute(text(f"DELETE FROM events WHERE grant_id LIKE '{_OF_OURS}0%'"))
        db.execute(text(f"DELETE FROM grants WHERE id LIKE '{_OF_OURS}0%'"))
