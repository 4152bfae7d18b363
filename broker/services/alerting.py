"""Telling somebody what must not wait: every audit event of such a type, once it is durable, at least once.

The event and the obligation to tell of it are one commit (`broker.store.transitions`); here it is paid.
"""

from __future__ import annotations

import logging
from datetime import timedelta

from broker.domain.audit import Event
from broker.domain.clock import Clock
from broker.domain.errors import ProviderUnavailable
from broker.domain.lease import next_attempt
from broker.providers.alerts import Alert, Alerts
from broker.services import break_glass
from broker.store import alerts
from broker.store.database import Database

_AT_ONCE = 20
_CLAIMED_FOR = timedelta(seconds=30)

_SUMMARIES = {
    **break_glass.SUMMARIES,
    "lease.stuck": "a credential could not be revoked six times; it may still be alive, and is tried again without end",
    "lease.found": "a credential was alive outside that no row accounted for; it is being killed",
    "login.found": "a database login was alive that no lease accounted for; it is being ended",
    "redecision.undecided": "policy could not be asked about grants that are out; unless it can soon, they are ended",
    "agent.locked_down": "an agent was denied so often that it was locked down; an admin looks, and lifts it",
    "lease.gone": "a credential we held is unknown to its provider; its grant was ended",
}

_log = logging.getLogger(__name__)


class Alerting:
    def __init__(self, *, database: Database, alerts: Alerts, clock: Clock) -> None:
        self._database = database
        self._alerts = alerts
        self._clock = clock

    def send_due(self) -> int:
        """Tell what is due; answers how many were taken. What was not is told again, later and later up to a minute."""
        now = self._clock()
        with self._database.read() as db:
            if not alerts.any_due(db, now=now):
                return 0
        with self._database.begin() as db:
            due = alerts.claim_due(db, now=now, again_at=now + _CLAIMED_FOR, limit=_AT_ONCE)
        taken = 0
        for event, attempts in due:
            try:
                self._alerts.send(_alert_of(event))
            except ProviderUnavailable as problem:
                _log.warning("an alert was not taken", extra={"fields": {"id": event.id, "reason": problem.reason}})
                again_at = next_attempt(attempts, now=self._clock())
                with self._database.begin() as db:
                    alerts.failed(db, event.id, again_at=again_at)
                continue
            with self._database.begin() as db:
                alerts.taken(db, event.id, now=self._clock())
            taken += 1
        return taken


def _alert_of(event: Event) -> Alert:
    names = {"grant_id": event.grant_id, "agent": event.agent, "resource": event.resource}
    ours = {name: value for name, value in {**names, **event.data}.items() if value is not None and name != "trouble"}
    # What a provider said, as it said it: it is nobody's word of ours.
    theirs = {"reason": event.reason, "trouble": event.data.get("trouble")}
    return Alert(
        id=event.id,
        at=event.at,
        kind=event.type,
        summary=_SUMMARIES.get(event.type, event.type),
        data=ours,
        claimed={name: value for name, value in theirs.items() if value is not None},
    )
