"""The gate between issuing and everything that must reach all that was issued.

Issuing holds the gate shared; a bulk revocation, a lockdown, a new configuration or a change of keys holds it alone
and turns its era. So each grant was committed either before such a change, in an era it covers, or after it, having
seen it; and whoever sees the era unchanged knows that none of the standing rows did.
"""

from __future__ import annotations

from sqlalchemy import Connection, select, update

from broker.store import locks
from broker.store.models import Gate

_ERA = select(Gate.era)  # composed once: every look asks it


def era_of(db: Connection) -> int:
    """The era now, without holding anything."""
    return int(db.execute(_ERA).scalar_one())


def hold_shared(db: Connection) -> int:
    """Keep the era from turning until this transaction ends; answers it."""
    locks.hold_for_issuing(db, agents=(), tasks=())
    # Its own statement: a snapshot taken before the lock was granted would show the era before the turn.
    return era_of(db)


def turn(db: Connection) -> int:
    """Wait until nobody issues, begin a new era, and answer the one that ended: the last that is covered."""
    locks.hold_gate_alone(db)
    return db.execute(update(Gate).values(era=Gate.era + 1).returning(Gate.era)).scalar_one() - 1
