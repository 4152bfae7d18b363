"""Breakers: an agent that is denied again and again has to pause after each further denial, and is then locked down.

What counts are its denials on record, back for a window, or since an admin last lifted a lockdown over it. They are
counted behind its lock, so that many requests at once over many brokers are told the same (INV-34); who has to pause is
remembered, and told so before anything is looked up. Only asking pauses: an agent may always hand back what it holds.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection
from datetime import datetime, timedelta

from sqlalchemy import Connection

from broker.domain.audit import DENIAL_OUTCOMES, Event
from broker.domain.catalogue import Limits
from broker.domain.clock import Clock
from broker.domain.errors import BrokerError, LimitExceeded, PolicyDenied
from broker.domain.identity import first_id, new_id
from broker.services.endings import ACTOR
from broker.services.revocation import Revocation
from broker.services.standing import Standing, StandingReader
from broker.store import gate
from broker.store.database import Database
from broker.store.events import Denials, count_denials
from broker.store.standing import has_lockdown

_REMEMBERED = 10_000
_THROTTLE = "denials_throttle"

_log = logging.getLogger(__name__)


def is_denial(refusal: object) -> bool:
    """Whether an answer counts; an audit event calls what policy denied by its outcome."""
    if not isinstance(refusal, BrokerError):
        return False
    return isinstance(refusal, PolicyDenied) or refusal.code in DENIAL_OUTCOMES


class Breakers:
    def __init__(
        self,
        *,
        database: Database,
        standing: StandingReader,
        revocation: Revocation,
        limits: Limits,
        clock: Clock,
    ) -> None:
        self._database = database
        self._standing = standing
        self._revocation = revocation
        self._limits = limits
        self._clock = clock
        self._guard = threading.Lock()
        self._paused: dict[str, datetime] = {}  # until when, as it was last seen

    def require_rested(self, agent: str) -> None:
        """Refuse who has to pause, from memory alone."""
        until = self._paused.get(agent)
        if until is None:
            return
        now, lifted_at = self._clock(), self._standing.last_known().lifted_at.get(agent)
        forgiven = lifted_at is not None and lifted_at >= until - self._limits.throttle_pause
        if now < until and not forgiven:
            raise self._pause(agent, until, now)

    def denials(self, db: Connection, agents: Collection[str], standing: Standing, now: datetime) -> dict[str, Denials]:
        """What each was denied of late; whoever decides by it holds their locks."""
        back = now - self._limits.denials_window
        since = dict.fromkeys(agents, back)
        for agent in since.keys() & standing.lifted_at.keys():
            # Ids have the second they were made in: those of the second in which it was lifted are forgiven too.
            since[agent] = max(back, standing.lifted_at[agent] + timedelta(seconds=1))
        return count_denials(db, {agent: first_id("evt", at) for agent, at in since.items()})

    def require_rest(self, agent: str, found: Denials, now: datetime) -> None:
        """The same of what was counted just now: LimitExceeded while the pause after the newest denial lasts."""
        if found.count < self._limits.denials_throttle or found.newest_at is None:
            return
        until = found.newest_at + self._limits.throttle_pause
        if now < until:
            self._remember(agent, until)
            raise self._pause(agent, until, now)

    def after_denials(self, agents: Collection[str]) -> None:
        """What follows of denials that are on record now. Nothing that fails here changes what was answered."""
        try:
            self._follow(agents)
        except Exception:
            # The next denial of the agent comes here again.
            _log.exception("denials were not followed", extra={"fields": {"agents": sorted(agents)}})

    def _follow(self, agents: Collection[str]) -> None:
        with self._database.read() as db:
            now = self._clock()
            found = self.denials(db, agents, self._standing.at(db, gate.era_of(db)), now)
            # Who is locked down already does not stop everybody's issuing to be found so once more (INV-27).
            locked = {agent for agent in agents if has_lockdown(db, "agent", agent)}
        for agent, denials in found.items():
            if denials.count >= self._limits.denials_throttle and denials.newest_at is not None:
                self._remember(agent, denials.newest_at + self._limits.throttle_pause)
            if denials.count >= self._limits.denials_lockdown and agent not in locked:
                self._lock_down(agent)

    def _lock_down(self, agent: str) -> None:
        def why(db: Connection) -> str | None:
            # Lifted meanwhile, perhaps by who saw the one that another broker set: then it begins anew.
            now = self._clock()
            count = self.denials(db, [agent], self._standing.at(db, gate.era_of(db)), now)[agent].count
            if count < self._limits.denials_lockdown:
                return None
            within_s = int(self._limits.denials_window.total_seconds())
            return f"{agent} was denied {count} times within {within_s} s (limits.denials_lockdown)"

        if self._revocation.lock_down_agent(agent, why) is not None:
            _log.warning("an agent was locked down", extra={"fields": {"agent": agent}})

    def _remember(self, agent: str, until: datetime) -> None:
        with self._guard:
            if len(self._paused) > _REMEMBERED:
                self._paused.clear()
            self._paused[agent] = until

    def _pause(self, agent: str, until: datetime, now: datetime) -> LimitExceeded:
        wait_s = max(1, int((until - now).total_seconds()))
        most = self._limits.denials_throttle
        return LimitExceeded(
            f"{agent} was denied {most} times or more of late (limits.{_THROTTLE}) and pauses after each further one: "
            f"come again in {wait_s} s, with what it may have",
            limit=_THROTTLE,
            value=most,
            retry_after_s=wait_s,
            window_s=int(self._limits.denials_window.total_seconds()),
        )


def throttled(agent: str, before: Denials, after: Denials, limits: Limits, now: datetime) -> list[Event]:
    """That an agent has to pause from now on, in the transaction of the denial that makes it so."""
    if not before.count < limits.denials_throttle <= after.count:
        return []
    data = {"denials": after.count, "pause_s": int(limits.throttle_pause.total_seconds())}
    return [Event(id=new_id("evt", now), at=now, type="agent.throttled", actor=ACTOR, agent=agent, data=data)]
