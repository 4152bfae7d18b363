"""Signals of risk: an agent or a user is said to be at risk, policies see it, and what is out is decided again at once.

A signal decides nothing by itself; policies do, by `context.risk`. It turns the era, so each grant was either decided
knowing it, or is covered by the run it orders (`broker.services.redeciding`).
"""

from __future__ import annotations

import logging
from datetime import datetime, timedelta

from broker.domain.audit import Event
from broker.domain.clock import Clock, rfc3339
from broker.domain.errors import Conflict, Invalid, RoleMissing
from broker.domain.grant import IdempotencyClaim
from broker.domain.identity import Caller, Role, new_id
from broker.domain.risk import LEVELS, Signal
from broker.providers.wakeups import Wakeups
from broker.services.idempotency import claimed
from broker.services.redeciding import Redeciding, order_redecision
from broker.services.refusals import recorded
from broker.services.standing import StandingReader
from broker.store import gate
from broker.store.database import Database
from broker.store.signals import find_signal, insert_signal, page_of_signals
from broker.store.transitions import record

_log = logging.getLogger(__name__)


class Signals:
    def __init__(
        self,
        *,
        database: Database,
        standing: StandingReader,
        redeciding: Redeciding,
        wakeups: Wakeups,
        clock: Clock,
    ) -> None:
        self._database = database
        self._standing = standing
        self._redeciding = redeciding
        self._wakeups = wakeups
        self._clock = clock

    def send(
        self,
        caller: Caller,
        axis: str,
        value: str,
        *,
        level: str,
        reason: str,
        source: str,
        expires_in: timedelta,
        idempotency: IdempotencyClaim | None = None,
    ) -> Signal:
        """Say that an agent, or a user, is at risk for so long. For an admin, or a sentinel."""
        with recorded(self._database, self._clock, caller, "signal.refused", "send"):
            _require_sender(caller)
        if axis not in ("agent", "user") or level not in LEVELS:
            raise Invalid(f"a signal is about an agent or a user, and its level is one of {', '.join(LEVELS)}")
        catalogue = self._standing.now().catalogue
        if axis == "agent" and value not in catalogue.principal_names:
            raise Invalid(f"no principal is called {value[:200]!r}: name a configured agent", member="agent")
        with self._database.begin() as db:
            era = gate.turn(db)
            now = self._clock()
            signal = Signal(
                id=new_id("sig", now),
                axis=axis,
                value=value,
                level=level,
                reason=reason,
                source=source,
                sent_at=now,
                sent_by=caller.name,
                expires_at=now + expires_in,
            )
            made_id = signal.id if idempotency is None else claimed(db, caller, idempotency, signal.id, now)
            if made_id != signal.id:
                earlier = find_signal(db, made_id)
                if earlier is None:
                    raise Conflict("this Idempotency-Key was used for something else: use a new key")
                return earlier
            insert_signal(db, signal)
            record(db, [_sent(signal, caller, now)])
            order_redecision(
                db,
                now=now,
                era=era,
                version=catalogue.version,
                by=caller.name,
                cause=f"risk of {axis} {value} is {level}"[:255],
                agent=value if axis == "agent" else None,
                user=value if axis == "user" else None,
            )
        self._wakeups.wake()
        try:
            self._redeciding.run()
        except Exception:
            # It was said and is durable; like what does not fit into one pass, the rest follows in the background.
            _log.exception("grants were not decided again at once", extra={"fields": {"signal": signal.id}})
        return signal

    def page(self, caller: Caller, *, standing_only: bool, before: str | None = None, limit: int = 100) -> list[Signal]:
        """Newest first, below the id `before`."""
        with recorded(self._database, self._clock, caller, "signal.refused", "list"):
            if not caller.has(Role.AUDITOR):
                _require_sender(caller)
        with self._database.read() as db:
            return page_of_signals(db, now=self._clock() if standing_only else None, before=before, limit=limit)


def _require_sender(caller: Caller) -> None:
    if not (caller.has(Role.ADMIN) or caller.has(Role.SENTINEL)):
        raise RoleMissing(f"{caller.name} is neither admin nor sentinel: only those may say what is at risk")


def _sent(signal: Signal, caller: Caller, now: datetime) -> Event:
    return Event(
        id=new_id("evt", now),
        at=now,
        type="signal.sent",
        actor=caller.name,
        agent=signal.value if signal.axis == "agent" else None,
        user=signal.value if signal.axis == "user" else None,
        reason=signal.reason,
        trace_id=caller.trace_id,
        data={
            "id": signal.id,
            "level": signal.level,
            "source": signal.source,
            "expires_at": rfc3339(signal.expires_at),
        },
    )
