"""Locks that queue fairly (PostgreSQL advisory locks), and the one order in which they are taken.

First the gate, then agents, then tasks, then what is counted over all agents, then who opens approvals, then rows:
whoever takes some of them takes them in this order, so that no two wait for each other. Row locks would do for safety
and not for liveness: shared ones let latecomers overtake, and a stream of issuers would keep a task from ending for as
long as it flows (INV-27). SQLite has one writer, who waits for nobody, and needs none of this.
"""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection, text

# Any constants will do that differ from each other and from what else takes advisory locks in the same database.
_GATE = 0x6A69_7462_726F_6B72
_AGENT, _TASK, _STATUS_LISTS, _MIGRATION, _RECONCILING, _APPROVALS, _COUNTED = 7, 11, 13, 17, 19, 23, 29

# Ordered inside and locked outside: the locks are taken row by row, in that order.
_FOR_ISSUING = text(
    """
    SELECT CASE WHEN shared THEN pg_advisory_xact_lock_shared(key) ELSE pg_advisory_xact_lock(key) END
    FROM (
        SELECT 0 AS floor, CAST(:gate AS bigint) AS key, true AS shared
        UNION
        SELECT 1, hashtextextended(agent, :of_agents), false FROM unnest(CAST(:agents AS text[])) AS agent
        UNION
        SELECT 2, hashtextextended(task, :of_tasks), true FROM unnest(CAST(:tasks AS text[])) AS task
        UNION
        SELECT 3, hashtextextended(thing, :of_counted), false FROM unnest(CAST(:counted AS text[])) AS thing
        ORDER BY floor, key
    ) AS ordered
    """
)
_TASKS_ALONE = text(
    """
    SELECT pg_advisory_xact_lock(key)
    FROM (
        SELECT DISTINCT hashtextextended(task, :of_tasks) AS key FROM unnest(CAST(:tasks AS text[])) AS task
        ORDER BY key
    ) AS ordered
    """
)


def hold_for_issuing(
    db: Connection, *, agents: Collection[str], tasks: Collection[str], counted: Collection[str] = ()
) -> None:
    """Until this transaction ends: the gate does not turn, nobody else issues to these agents, these tasks go on.

    `counted` are things whose live grants are counted over all agents: nobody else issues for these either.
    """
    if db.dialect.name == "postgresql":
        values = {"gate": _GATE, "of_agents": _AGENT, "of_tasks": _TASK, "of_counted": _COUNTED}
        listed = {"agents": list(agents), "tasks": list(tasks), "counted": list(counted)}
        db.execute(_FOR_ISSUING, {**values, **listed})


def hold_tasks_alone(db: Connection, tasks: Collection[str]) -> None:
    """Wait until nobody issues under these tasks, and let nobody until this transaction ends."""
    if db.dialect.name == "postgresql":
        db.execute(_TASKS_ALONE, {"of_tasks": _TASK, "tasks": list(tasks)})


def hold_gate_alone(db: Connection) -> None:
    """Wait until nobody issues at all."""
    _hold(db, "pg_advisory_xact_lock(:key)", key=_GATE)


def hold_status_lists(db: Connection) -> None:
    """Be the only one who hands out places in status lists."""
    _hold(db, "pg_advisory_xact_lock(hashtextextended('', :key))", key=_STATUS_LISTS)


def hold_approvals(db: Connection) -> None:
    """Be the only one who opens approvals: how many wait for a group is counted over all agents (INV-34)."""
    _hold(db, "pg_advisory_xact_lock(hashtextextended('', :key))", key=_APPROVALS)


def hold_reconciling(db: Connection, provider: str) -> None:
    """Be the only one who writes down what a look at this provider found."""
    if db.dialect.name == "postgresql":
        lock = text("SELECT pg_advisory_xact_lock(hashtextextended(:provider, :key))")
        db.execute(lock, {"provider": provider, "key": _RECONCILING})


def hold_for_migration(db: Connection) -> None:
    """Be the only one who migrates, however long the one before takes."""
    if db.dialect.name == "postgresql":
        db.execute(text("SELECT set_config('lock_timeout', '0', true), set_config('statement_timeout', '0', true)"))
    _hold(db, "pg_advisory_xact_lock(hashtextextended('', :key))", key=_MIGRATION)


def _hold(db: Connection, lock: str, *, key: int) -> None:
    if db.dialect.name == "postgresql":
        db.execute(text(f"SELECT {lock}"), {"key": key})
