"""Telling the people who are asked, by every channel that is theirs: once it is durable, at least once.

The approval and the obligation to tell of it are one commit (`broker.store.notices`); here it is paid. Whoever is told
late is told nothing: of what is decided already, there is nothing left to say. The steps of a break-glass are told by
every channel, whosever it is, and however late (`broker.store.announcements`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime, timedelta

from broker.domain.approval import Case
from broker.domain.audit import Event
from broker.domain.clock import Clock, rfc3339
from broker.domain.errors import ProviderUnavailable
from broker.domain.lease import next_attempt
from broker.domain.lifecycle import ApprovalState
from broker.domain.policy import claimed_text
from broker.providers.notices import Channel, Notice
from broker.services.approval import cases
from broker.services.break_glass import SUMMARIES
from broker.services.standing import StandingReader
from broker.store import announcements, approvals, gate, notices
from broker.store.database import Database

_AT_ONCE = 10
_CLAIMED_FOR = timedelta(seconds=90)  # longer than so many can take

_log = logging.getLogger(__name__)


class Notifying:
    def __init__(
        self,
        *,
        database: Database,
        standing: StandingReader,
        channels: Mapping[str, Channel],
        issuer: str,
        clock: Clock,
    ) -> None:
        self._database = database
        self._standing = standing
        self._channels = channels
        self._issuer = issuer
        self._clock = clock

    def send_due(self) -> int:
        """Tell what is due; answers how much was taken. What was not is told again, later and later up to a minute."""
        now = self._clock()
        if not self._channels:
            return 0
        return self._notify(now) + self._announce(now)

    def _notify(self, now: datetime) -> int:
        with self._database.read() as db:
            if not notices.any_due(db, self._channels, now=now):
                return 0
        with self._database.begin() as db:
            due = notices.claim_due(db, self._channels, now=now, again_at=now + _CLAIMED_FOR, limit=_AT_ONCE)
        sent, silent = 0, set[str]()
        for approval_id, channel, attempts in due:
            # One that did not answer is not asked for each of the others, who wait for theirs meanwhile.
            done = channel not in silent and self._told(approval_id, channel)
            with self._database.begin() as db:
                if done:
                    notices.taken(db, approval_id, channel, now=self._clock())
                    sent += 1
                else:
                    silent.add(channel)
                    again_at = next_attempt(attempts, now=self._clock())
                    notices.failed(db, approval_id, channel, again_at=again_at)
        return sent

    def _announce(self, now: datetime) -> int:
        with self._database.read() as db:
            if not announcements.any_due(db, self._channels, now=now):
                return 0
        with self._database.begin() as db:
            announcements.owe(db, self._channels, now=now)
            due = announcements.claim_due(db, self._channels, now=now, again_at=now + _CLAIMED_FOR, limit=_AT_ONCE)
        sent, silent = 0, set[str]()
        for event, channel, attempts in due:
            done = channel not in silent and self._sent(announcement_of(event, self._issuer), channel)
            with self._database.begin() as db:
                if done:
                    announcements.taken(db, event.id, channel, now=self._clock())
                    sent += 1
                else:
                    silent.add(channel)
                    again_at = next_attempt(attempts, now=self._clock())
                    announcements.failed(db, event.id, channel, again_at=again_at)
        return sent

    def _told(self, approval_id: str, channel: str) -> bool:
        with self._database.read() as db:
            standing = self._standing.at(db, gate.era_of(db))
            approval = approvals.find_approval(db, approval_id)
            if approval is None or approval.state is not ApprovalState.OPEN or approval.expires_at <= self._clock():
                return True
            [case] = cases(db, [approval], standing.catalogue)
        return self._sent(notice_of(case, self._issuer), channel)

    def _sent(self, notice: Notice, channel: str) -> bool:
        try:
            self._channels[channel].send(notice)
        except ProviderUnavailable as problem:
            fields = {"notice": notice.id, "channel": channel, "reason": problem.reason}
            _log.warning("a notice was not taken", extra={"fields": fields})
            return False
        return True


def notice_of(case: Case, issuer: str) -> Notice:
    """What is told of an approval: what is dangerous first, in our words; then theirs."""
    approval, grant = case.approval, case.grant
    asked = ", ".join(f"{need.quorum} of {need.group}" for need in approval.needs)
    facts = {
        "resource": approval.resource,
        "sensitivity": f"{case.sensitivity or 'unknown'}, {case.environment or 'unknown'}",
        "scopes": " ".join(approval.scopes),
        "ttl": f"{min(approval.ttl_s, grant.ttl_s)} s",
        "for user": grant.on_behalf_of or "nobody",
        "asked by": f"{grant.agent} of {case.owner or 'nobody'}",
        "task": f"{grant.task_id} of {grant.orchestrator}",
        "asked of": asked,
        "decide until": rfc3339(approval.expires_at),
        "approval": approval.id,
    }
    claims = {f"claims {name}": text for name, text in claimed_text(grant.claimed).items()}
    words = {"the agent says": grant.intent or "", "the task says": case.purpose, **claims}
    loud = ""
    if grant.break_glass is not None:
        loud, words = "BREAK-GLASS: ", {"the emergency": grant.break_glass, **words}
    return Notice(
        id=approval.id,
        at=approval.created_at,
        summary=f"{loud}{grant.agent} asks for {' '.join(approval.scopes)} on {approval.resource}: {asked} decide",
        link=f"{issuer}/v1/approvals/{approval.id}",
        command=f"broker approval show {approval.id}",
        expires_at=approval.expires_at,
        facts=facts,
        words={name: text for name, text in words.items() if text},
    )


def announcement_of(event: Event, issuer: str) -> Notice:
    """What is told of a step of a break-glass: what happened in our words, then what somebody wrote."""
    review, approval = event.data.get("review_id"), event.data.get("approval_id")
    about = ("review", "reviews", review) if review else ("approval", "approvals", approval)
    if about[2] is None:
        about = ("grant", "grants", event.grant_id)
    noun, path, id_ = about
    known = {"agent": event.agent, "resource": event.resource, "for user": event.user, "grant": event.grant_id}
    facts = {name: str(value) for name, value in {**known, **event.data}.items() if value is not None}
    whose = "the reviewer says" if event.type == "review.completed" else "the emergency"
    return Notice(
        id=event.id,
        at=event.at,
        kind=event.type,
        summary=f"{SUMMARIES[event.type]} ({event.agent}, {event.resource})",
        link=f"{issuer}/v1/{path}/{id_}",
        command=f"broker {noun} show {id_}",
        expires_at=None,
        facts=facts,
        words={} if event.reason is None else {whose: event.reason},
    )
