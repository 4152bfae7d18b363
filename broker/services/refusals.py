"""Refusals on record: what a caller asked for and may not have is an event, like a change is.

Issuing records its own, in the transaction that refuses. A refusal changes nothing, so elsewhere it has a transaction
of its own, after the verb's was rolled back. What cannot be understood, and whoever is not authenticated, costs no row:
anybody could fill the trail (INV-35).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from broker.domain.audit import Event
from broker.domain.clock import Clock
from broker.domain.errors import BrokerError, Conflict, Forbidden, InvalidScope, InvalidTarget, LimitExceeded, NotFound
from broker.domain.identity import Caller, new_id
from broker.store.database import Database
from broker.store.transitions import record

_ANSWERS = (Forbidden, NotFound, Conflict, LimitExceeded, InvalidScope, InvalidTarget)


@contextmanager
def recorded(database: Database, clock: Clock, caller: Caller, type_: str, verb: str) -> Iterator[None]:
    """Record what the block refuses, as `type_` with the verb, and let the refusal pass."""
    try:
        yield
    except _ANSWERS as refusal:
        with database.begin() as db:
            record(db, [_event(refusal, clock, caller, type_, verb)])
        raise


def _event(refusal: BrokerError, clock: Clock, caller: Caller, type_: str, verb: str) -> Event:
    now = clock()
    return Event(
        id=new_id("evt", now),
        at=now,
        type=type_,
        actor=caller.name,
        outcome=refusal.code,
        reason=refusal.detail[:1000],
        trace_id=caller.trace_id,
        data={"verb": verb, "subject": caller.principal.subject},
    )
