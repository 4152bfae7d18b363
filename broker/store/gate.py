"""The gate between issuing and everything that must reach all that was issued.

Issuing holds the gate shared; a bulk revocation, a lockdown, a new configuration or a change of keys holds it alone
and turns its era. So each grant was committed either before such a change, in an era it covers, or after it, having
seen it; and whoever sees the era unchanged knows that none of the standing rows did.
"""

from __future__ import annotations

from sqlalchemy import Connection, select, text, update

from broker.store.models import Gate

# Any constant will do; it must only differ from other advisory locks in the same database.
_LOCK = 0x6A69_7462_726F_6B72


def era_of(db: Connection) -> int:
    """The era now, without holding anything."""
    return db.execute(select(Gate.era)).scalar_one()


def hold_shared(db: Connection) -> int:
    """Keep the era from turning until this transaction ends; answers it."""
    if db.dialect.name == "postgresql":
        # Row locks would let a stream of issuers starve the one who revokes; advisory locks queue fairly (INV-27).
        # Its own statement: a snapshot taken before the lock was granted would show the era before the turn.
        db.execute(text("SELECT pg_advisory_xact_lock_shared(:lock)"), {"lock": _LOCK})
    return era_of(db)


def turn(db: Connection) -> int:
    """Wait until nobody issues, begin a new era, and answer the one that ended: the last that is covered."""
    if db.dialect.name == "postgresql":
        db.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    return db.execute(update(Gate).values(era=Gate.era + 1).returning(Gate.era)).scalar_one() - 1
