"""Live grants decided again, when what they were decided by has changed: those no longer allowed end, ceilings shorten.

::

    a new version    a run is ordered, in the transaction that turns the era: each grant is covered, or decided by it
    plan             its live grants are divided into shares
    a share          claimed, read, asked again; no transaction is open while the engine is asked
                     ended and shortened            TX, behind the gate: the version is still the newest
    the last share   the run is finished, and that is said

An answer that the engine could not give is neither a yes nor a reason to end everything at once: it is an alert, and it
is asked again for `UNDECIDED_FOR`; then it is a no (INV-13).
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row

from broker.domain.audit import Event
from broker.domain.catalogue import Catalogue
from broker.domain.clock import Clock, rfc3339
from broker.domain.grant import joined
from broker.domain.identity import new_id
from broker.domain.lease import Urgency
from broker.domain.lifecycle import GrantState
from broker.domain.risk import Risks
from broker.services.asked import Versions
from broker.services.drafts import fit
from broker.services.endings import ACTOR, end_with_descendants
from broker.services.reasking import Again, Outcome, Reasking, unhurried
from broker.services.standing import Standing, StandingReader
from broker.store import gate, grants, redecisions
from broker.store.database import Database
from broker.store.feed import note_shortened
from broker.store.redecisions import Share
from broker.store.signals import standing_signals
from broker.store.standing import latest_version
from broker.store.transitions import change_of, record, record_alike

UNDECIDED_FOR = timedelta(minutes=5)
_ASKED_AGAIN_AFTER = timedelta(seconds=10)
_LET_GO_AFTER = timedelta(seconds=1)  # by whoever holds a grant just now
_CLAIMED_FOR = timedelta(seconds=60)  # longer than a share takes on the slowest machine
_SHARE = 4000  # grants: the more, the more of them are alike; ended in one transaction, at worst
_SHARES_A_PASS = 2  # with the next pass a second later, issuing keeps most of the machine
_FORESEEN_AT_ONCE = 2000
_FORESEEN = 100_000
_SAMPLES = 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Redecided:
    """What one pass did, in grants."""

    looked_at: int = 0
    ended: int = 0
    shortened: int = 0
    undecided: int = 0


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """What a configuration would change among the live grants. `complete` is False where there were more to look at.

    The counts are of grants; `by_policy` names those that would forbid, or that allowed what nothing allows any more.
    """

    looked_at: int
    complete: bool
    ended: int
    shortened: int
    undecided: int
    by_agent: Mapping[str, int]
    by_policy: Mapping[str, int]
    by_reason: Mapping[str, int]
    samples: Sequence[Sample]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One grant that would not stay as it is."""

    grant_id: str
    agent: str
    resource: str
    scopes: tuple[str, ...]
    outcome: str
    why: str
    expires_at: datetime


@dataclass(kw_only=True)
class _Found:
    """What asking the grants of a share came to, by what has to be done."""

    looked_at: int = 0
    ended: dict[str, list[str]] = field(default_factory=dict)  # ids by why
    shortened: list[tuple[Row[Any], Again]] = field(default_factory=list)
    stands_on_more: list[tuple[Row[Any], Again]] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)
    failure: str | None = None

    def note(self, ids: Sequence[str], again: Again, *, final: bool) -> bool:
        """Whether that was all there is to say; `final`: what cannot be answered now is a no."""
        if again.outcome is Outcome.ENDED or (again.outcome is Outcome.UNDECIDED and final):
            self.ended.setdefault(again.why, []).extend(ids)
        elif again.outcome is Outcome.UNDECIDED:
            self.undecided += ids
            self.failure = again.failure
        return again.outcome in (Outcome.ENDED, Outcome.UNDECIDED)

    @property
    def changes(self) -> list[str]:
        changed = (row.id for row, _ in (*self.shortened, *self.stands_on_more))
        return [*(id_ for ids in self.ended.values() for id_ in ids), *changed]


def order_redecision(
    db: Connection,
    *,
    now: datetime,
    era: int,
    version: int,
    by: str,
    cause: str,
    agent: str | None = None,
    user: str | None = None,
) -> None:
    """Have all grants up to this era decided again, or an agent's or user's; in the transaction of what changed."""
    redecisions.order(
        db,
        {
            "id": new_id("run", now),
            "era": era,
            "version": version,
            "agent": agent,
            "user": user,
            "cause": cause,
            "ordered_at": now,
            "ordered_by": by,
        },
    )


class Redeciding:
    def __init__(self, *, database: Database, standing: StandingReader, versions: Versions, clock: Clock) -> None:
        self._database = database
        self._standing = standing
        self._versions = versions
        self._clock = clock
        self._reasking: tuple[int, Reasking] | None = None

    def run(self) -> Redecided:
        """One pass over what is ordered: so many shares, and the rest in the next pass or by another broker."""
        with self._database.read() as db:
            if not redecisions.any_open(db):
                return Redecided()
        with self._database.begin() as db:
            redecisions.plan(db, now=self._clock(), size=_SHARE)
        done: Counter[str] = Counter()
        for _ in range(_SHARES_A_PASS):
            now = self._clock()
            with self._database.begin() as db:
                share = redecisions.claim(db, now=now, again_at=now + _CLAIMED_FOR)
            if share is None:
                break
            done.update(self._follow(share))
        with self._database.begin() as db:
            now = self._clock()
            for run, counts in redecisions.finish(db, now=now):
                record(db, [_finished(run, counts, now)])
        return Redecided(**done)

    def foresee(self, catalogue: Catalogue, *, at_most: int = _FORESEEN) -> Foreseen:
        """What would change if this configuration were applied now. Changes nothing."""
        now = self._clock()
        with self._database.read() as db:
            # Not what stands: nothing may have been applied yet.
            risks = Risks(standing_signals(db, now=now))
        reasking = Reasking(
            catalogue=catalogue,
            policies=fit(catalogue),
            versions=self._versions,
            risks=risks,
        )
        counts: Counter[str] = Counter()
        by_agent: Counter[str] = Counter()
        by_policy: Counter[str] = Counter()
        by_reason: Counter[str] = Counter()
        samples: list[Sample] = []
        after, looked_at = "", 0
        complete = False
        while looked_at < at_most and not complete:
            wanted = min(_FORESEEN_AT_ONCE, at_most - looked_at)
            with self._database.read() as db:
                page = redecisions.live(db, now=now, after=after, limit=wanted)
            for row in unhurried(page):
                again = reasking.again(row, now)
                counts[again.outcome] += 1
                if again.outcome is Outcome.KEPT:
                    continue
                by_agent[row.agent] += 1
                by_policy.update(again.policies or row.policies.split())
                by_reason[again.why] += 1
                if len(samples) < _SAMPLES:
                    samples.append(_sample(row, again))
            looked_at += len(page)
            complete = len(page) < wanted
            after = page[-1].id if page else after
        return Foreseen(
            looked_at=looked_at,
            complete=complete,
            ended=counts[Outcome.ENDED],
            shortened=counts[Outcome.SHORTENED],
            undecided=counts[Outcome.UNDECIDED],
            by_agent=dict(by_agent.most_common()),
            by_policy=dict(by_policy.most_common()),
            by_reason=dict(by_reason.most_common()),
            samples=samples,
        )

    def _follow(self, share: Share) -> Mapping[str, int]:
        now = self._clock()
        final = share.run.ordered_at + UNDECIDED_FOR <= now
        with self._database.read() as db:
            standing = self._standing.at(db, gate.era_of(db))
            facts = standing.policies.facts_read_by_any
            kinds = list(unhurried(redecisions.kinds(db, share, now=now, facts=facts)))
        found = _Found()
        singly = self._asked_by_kind(kinds, standing, now, found, final=final)
        if singly:
            with self._database.read() as db:
                rows = redecisions.recorded(db, share, now=now, ids=singly)
            self._asked(rows, standing, now, found, final=final)
        return self._carried_out(share, found, standing)

    def _asked_by_kind(
        self, kinds: Iterable[tuple[Row[Any], str]], standing: Standing, now: datetime, found: _Found, *, final: bool
    ) -> list[str]:
        """What has to be done about each kind; answers the ids of those of which one says nothing of the others."""
        reasking, singly = self._by(standing), list[str]()
        for row, told in unhurried(kinds):
            ids = told.split()
            found.looked_at += len(ids)
            again = reasking.again(row, now)
            if again.of_its_own or _more_of(row, again):
                singly += ids
            else:
                found.note(ids, again, final=final)
        return singly

    def _asked(
        self, rows: Iterable[Row[Any]], standing: Standing, now: datetime, found: _Found, *, final: bool
    ) -> None:
        """What has to be done about each."""
        reasking = self._by(standing)
        for row in unhurried(rows):
            again = reasking.again(row, now)
            more = _more_of(row, again)
            if more:
                again = _unless_refused(again, more, standing)
            if not found.note((row.id,), again, final=final):
                if again.outcome is Outcome.SHORTENED and row.state == str(GrantState.ACTIVE):
                    found.shortened.append((row, again))
                if more:
                    found.stands_on_more.append((row, again))

    def _by(self, standing: Standing) -> Reasking:
        kept = self._reasking
        if kept is not None and kept[0] == standing.era:
            return kept[1]
        made = Reasking(
            catalogue=standing.catalogue,
            policies=standing.policies,
            versions=self._versions,
            risks=standing.risks,
        )
        self._reasking = (standing.era, made)
        return made

    def _carried_out(self, share: Share, found: _Found, standing: Standing) -> Mapping[str, int]:
        """End and shorten in one transaction, if nobody took the share over and no newer version came (INV-07)."""
        version, ended = standing.catalogue.version, 0
        with self._database.begin() as db:
            gate.hold_shared(db)
            now = self._clock()
            if latest_version(db) != version:
                # Decided by what does not count any more (INV-14): its own run is ordered, and this share is due again.
                redecisions.give_back(db, share, due_at=now)
                return {}
            if not redecisions.is_ours(db, share):
                return {}
            held = redecisions.lock_grants(db, found.changes) if found.changes else {}
            below = redecisions.hold_below(db, held) if held else {}
            for why, ids in found.ended.items():
                ended += _ended(db, share, why, [id_ for id_ in ids if id_ in held], version, now)
            shortened = _shortened(db, share, found, held, below, version, now)
            redecided = _stood_on(db, share, found, held, below, version, now)
            # Renewed since it was read, or held by somebody who renews or ends it: looked at again.
            left = set(found.changes) - {id_ for ids in found.ended.values() for id_ in ids if id_ in held}
            passed_over = redecisions.given(db, left - shortened - redecided)
            redecisions.note(db, share, looked_at=found.looked_at, ended=ended, shortened=len(shortened))
            if found.undecided:
                redecisions.give_back(db, share, due_at=now + _ASKED_AGAIN_AFTER)
                if redecisions.note_undecided(db, share.run.id, now=now):
                    record(db, [_undecided(share.run, found, version, now)])
            elif passed_over:
                redecisions.give_back(db, share, due_at=now + _LET_GO_AFTER)
            else:
                redecisions.done(db, share, now=now)
        if found.undecided:
            fields = {"grants": len(found.undecided), "failure": found.failure}
            _log.error("policy could not be asked about live grants", extra={"fields": fields})
        return {
            "looked_at": found.looked_at,
            "ended": ended,
            "shortened": len(shortened),
            "undecided": len(found.undecided),
        }


def _more_of(row: Row[Any], again: Again) -> Sequence[str]:
    """The policies that allow it now and did not when it was decided."""
    if again.outcome not in (Outcome.KEPT, Outcome.SHORTENED):
        return ()
    return [name for name in again.policies if f" {name} " not in row.policies]


def _unless_refused(again: Again, more: Sequence[str], standing: Standing) -> Again:
    """What it stands on from now on may be refused already, and its rows followed: then it ends like those did."""
    for name in more:
        if standing.refusals.along("policy", name) is not None:
            why = f"policy {name!r}, which allows it now, is locked down"
            return Again(outcome=Outcome.ENDED, why=why, policies=again.policies)
    return again


def _ended(db: Connection, share: Share, why: str, ids: Sequence[str], version: int, now: datetime) -> int:
    if not ids:
        return 0
    reason, by = _reason(share, why), share.run.ordered_by
    event = change_of(now, by, "grant.revoked", reason=reason, data={"configuration_version": version})
    values = {"revoked_at": now, "revoked_by": by, "reason": reason}
    where = (redecisions.among_ids(db, ids), grants.unexpired(now))
    return len(end_with_descendants(db, *where, now=now, urgency=Urgency.URGENT, event=event, **values))


def _shortened(
    db: Connection,
    share: Share,
    found: _Found,
    held: Mapping[str, Row[Any]],
    below: Mapping[str, list[Row[Any]]],
    version: int,
    now: datetime,
) -> set[str]:
    """Let what is out end at its new ceiling. What was renewed since it was read is left: its ceiling is another."""
    alike: dict[tuple[datetime, datetime, str], list[Row[Any]]] = {}
    for row, again in found.shortened:
        mine = held.get(row.id)
        if mine is not None and mine.jti == row.jti and again.expires_at is not None and again.expires_at > now:
            alike.setdefault((again.expires_at, mine.expires_at, again.why), []).append(row)
    for (until, before, why), rows in alike.items():
        redecisions.shorten(db, [row.id for row in rows], until)
        note_shortened(db, [row.id for row in rows], ends_at=until, token_ends_at=before)
        data = {"configuration_version": version, "expires_at": rfc3339(until), "expired_before_at": rfc3339(before)}
        change = change_of(now, share.run.ordered_by, "grant.shortened", reason=_reason(share, why), data=data)
        record_alike(db, change, rows)
        # INV-10: what was handed down ends with it at the latest.
        later = [part for row in rows for part in below.get(row.id, ()) if part.expires_at > until]
        if later:
            redecisions.shorten(db, [part.id for part in later], until)
            note_shortened(
                db, [part.id for part in later], ends_at=until, token_ends_at=max(part.expires_at for part in later)
            )
            with_it = {"configuration_version": version, "expires_at": rfc3339(until)}
            why_too = _reason(share, f"what it was handed down from: {why}")
            record_alike(
                db, change_of(now, share.run.ordered_by, "grant.shortened", reason=why_too, data=with_it), later
            )
    return {row.id for rows in alike.values() for row in rows}


def _stood_on(
    db: Connection,
    share: Share,
    found: _Found,
    held: Mapping[str, Row[Any]],
    below: Mapping[str, list[Row[Any]]],
    version: int,
    now: datetime,
) -> set[str]:
    """Write down by which other policies grants are allowed now, so that a revocation along one of those finds them."""
    alike: dict[tuple[tuple[str, ...], tuple[str, ...]], list[Row[Any]]] = {}
    for row, again in found.stands_on_more:
        mine = held.get(row.id)
        if mine is not None and mine.jti == row.jti:
            names = joined(mine.policies.split(), *again.policies)
            alike.setdefault((names, again.policies), []).append(row)
    for (names, policies), rows in alike.items():
        redecisions.stand_on(db, [row.id for row in rows], names)
        for row in rows:
            grant = grants.find_grant(db, row.id) if row.id in below else None
            if grant is not None:
                grants.hand_down(db, grant)
        data = {"configuration_version": version, "policies": list(policies)}
        change = change_of(now, share.run.ordered_by, "grant.redecided", reason=share.run.cause, data=data)
        record_alike(db, change, rows)
    return {row.id for rows in alike.values() for row in rows}


def _reason(share: Share, why: str) -> str:
    return f"{share.run.cause}: {why}"[:1000]


def as_json(found: Foreseen) -> dict[str, Any]:
    """The same for the API and for programs."""
    samples = [
        vars(sample) | {"scopes": list(sample.scopes), "expires_at": rfc3339(sample.expires_at)}
        for sample in found.samples
    ]
    shown = {name: value for name, value in vars(found).items() if name not in ("looked_at", "samples")}
    return {"grants": found.looked_at, **shown, "samples": samples}


def _sample(row: Row[Any], again: Again) -> Sample:
    return Sample(
        grant_id=row.id,
        agent=row.agent,
        resource=row.resource,
        scopes=tuple(json.loads(row.scopes)),
        outcome=str(again.outcome),
        why=again.why,
        expires_at=again.expires_at or row.expires_at,
    )


def _undecided(run: Row[Any], found: _Found, version: int, now: datetime) -> Event:
    until = rfc3339(run.ordered_at + UNDECIDED_FOR)
    return Event(
        id=new_id("evt", now),
        at=now,
        type="redecision.undecided",
        actor=ACTOR,
        outcome="unavailable",
        reason=(found.failure or "")[:1000] or None,
        policy_version=version,
        data={"cause": run.cause, "grants": len(found.undecided), "ended_unless_decided_before": until},
    )


def _finished(run: Row[Any], counts: Row[Any], now: datetime) -> Event:
    data = {"cause": run.cause, "grants": counts.looked_at, "ended": counts.ended, "shortened": counts.shortened}
    _log.info("live grants were decided again", extra={"fields": data})
    return Event(
        id=new_id("evt", now),
        at=now,
        type="redecision.finished",
        actor=ACTOR,
        agent=run.agent,
        user=run.user,
        policy_version=run.version,
        data=data,
    )
