"""Taking down what was done with grants, as their holders and their verifiers tell it.

No event of the sealed trail: nothing of the broker changes by it (INV-32), and it is not the broker's own word. What
somebody tells of a grant that is not theirs is refused like what does not exist (INV-28), and that is an event.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from broker import telemetry
from broker.domain.activity import (
    MAX_TOGETHER,
    Activity,
    Report,
    covers,
    place_of,
    require_in_time,
    require_no_secret,
    without_secrets,
)
from broker.domain.audit import Event
from broker.domain.catalogue import Catalogue, Limits
from broker.domain.clock import Clock, epoch
from broker.domain.errors import (
    BrokerError,
    Conflict,
    IdempotencyConflict,
    Invalid,
    InvalidTarget,
    LimitExceeded,
    NotFound,
    RoleMissing,
    Unavailable,
)
from broker.domain.identity import Caller, Principal, Role, is_id, new_id
from broker.services.refusals import recorded
from broker.services.standing import StandingReader, principal_of
from broker.store import activities, gate
from broker.store.activities import GivenGrant
from broker.store.database import Database
from broker.store.transitions import record

AGENT, VERIFIER = "agent", "verifier"
_AT_ONCE = 2
_PATIENCE_S = 5
_GRANTS_OF_TRACES = 1000
_MINUTE_S = 60


@dataclass(frozen=True, kw_only=True)
class Refused:
    """One report that was not taken down, and why: it is the reporter's, and stands at this place of what it sent."""

    place: int
    id: str
    why: BrokerError


@dataclass(frozen=True, kw_only=True)
class Told:
    """What was read of one telling, and how much of it is no report: no use of a grant at all, or without an id."""

    reports: Sequence[Report]
    passed_over: int = 0
    malformed: int = 0

    def __len__(self) -> int:
        return len(self.reports) + self.passed_over + self.malformed


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What came of what was told. `passed_over` is what is no use of any grant of the reporter."""

    recorded: int
    repeated: int
    passed_over: int
    malformed: int
    refused: tuple[Refused, ...]


_NOTHING = Taken(recorded=0, repeated=0, passed_over=0, malformed=0, refused=())


class _PassedOver(Exception):
    """It is told of a program that works with a grant, and is something else that this program does."""


class Activities:
    def __init__(self, *, database: Database, standing: StandingReader, limits: Limits, clock: Clock) -> None:
        self._database = database
        self._standing = standing
        self._limits = limits
        self._clock = clock
        # Whatever is told, and by however many: what ends authority finds a connection, and a processor (INV-27).
        self._at_once = threading.BoundedSemaphore(_AT_ONCE)

    def require_reporter(self, caller: Caller) -> None:
        """Refuse whoever may tell of nothing, before anything of theirs is read (INV-26, INV-35)."""
        with recorded(self._database, self._clock, caller, "activity.refused", "report"):
            if not (caller.has(Role.AGENT) or caller.has(Role.VERIFIER)):
                raise RoleMissing(
                    f"{caller.name} is neither an agent nor a verifier: only those tell what was done with grants"
                )

    def take(self, caller: Caller, reports: Sequence[Report]) -> Taken:
        """Take down what is told of grants that the caller holds, or of resources that it verifies (INV-26)."""
        return self.take_read(caller, lambda: Told(reports=reports))

    def take_read(self, caller: Caller, read: Callable[[], Told]) -> Taken:
        """The same of what is yet to be read, where reading costs something: in the reporter's turn (INV-35)."""
        self.require_reporter(caller)
        with self._turn():
            told = read()
            if len(told.reports) > MAX_TOGETHER:
                raise Invalid(f"{len(told.reports)} activities are more than the {MAX_TOGETHER} of one request")
            taken = self._take(caller, told) if len(told) else _NOTHING
        telemetry.told(
            recorded=taken.recorded,
            repeated=taken.repeated,
            passed_over=taken.passed_over,
            refused=len(taken.refused) + taken.malformed,
        )
        return taken

    def _take(self, caller: Caller, told: Told) -> Taken:
        now, reports = self._clock(), told.reports
        looked = self._look(caller, reports)
        made: dict[int, Activity] = {}
        refused: dict[int, BrokerError] = {}
        passed_over = 0
        for place, report in enumerate(reports):
            try:
                made[place] = _activity(report, looked, now)
            except _PassedOver:
                passed_over += 1
            except BrokerError as problem:
                refused[place] = problem
        repeated = self._write(caller, len(told), made, refused, now)
        return Taken(
            recorded=len(reports) - passed_over - repeated - len(refused),
            repeated=repeated,
            passed_over=passed_over + told.passed_over,
            malformed=told.malformed,
            refused=tuple(Refused(place=at, id=reports[at].id, why=why) for at, why in sorted(refused.items())),
        )

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """So many read and write at once; whoever waits too long for its turn comes again."""
        if not self._at_once.acquire(timeout=_PATIENCE_S):
            raise Unavailable("too many tell at once what was done: try again")
        try:
            yield
        finally:
            self._at_once.release()

    def _look(self, caller: Caller, reports: Iterable[Report]) -> _Looked:
        named = {report.grant_id for report in reports if report.grant_id is not None}
        traces = {report.trace_id for report in reports if report.grant_id is None and report.trace_id is not None}
        with self._database.read() as db:
            standing = self._standing.at(db, gate.era_of(db))
            principal, catalogue = principal_of(caller, standing), standing.catalogue
            by_id = activities.given_grants(db, [name for name in named if is_id(name, "grt")])
            # Its own alone: whoever asks for a thousand grants in somebody else's trace must not hide theirs.
            of_traces = activities.given_in_traces(db, traces, holder=principal, limit=_GRANTS_OF_TRACES)
        in_trace: dict[str, list[GivenGrant]] = {}
        for grant in of_traces:
            in_trace.setdefault(grant.trace_id or "", []).append(grant)
        return _Looked(principal=principal, catalogue=catalogue, by_id=by_id, in_trace=in_trace)

    def _write(
        self,
        caller: Caller,
        count: int,
        made: dict[int, Activity],
        refused: dict[int, BrokerError],
        now: datetime,
    ) -> int:
        """Write what is new and not one too many; the rest leaves `made`. Answers how many are repeats.

        All of the `count` that were told are the reporter's, what comes to nothing too: it was read like the rest.
        """
        with self._database.begin() as db:
            told = activities.told_this_minute(db, caller.name, now=now, more=count)
            self._require_turn(told, now)
            known = activities.known_reports(db, [activity.report_sha256 for activity in made.values()])
            repeated = _sort_out_repeats(known, made, refused)
            if made:
                kept = activities.hold_tallies(db, (activity.grant_id for activity in made.values()), now=now)
                dropped = self._sort_out_excess(kept, made, refused)
                activities.insert_activities(db, list(made.values()), dropped, now=now)
            strangers = [problem for problem in refused.values() if isinstance(problem, NotFound)]
            if strangers:
                # One for all: whoever tries a thousand ids at once writes one line.
                record(db, [_refusal(caller, strangers[0], len(strangers), now)])
        return repeated

    def _require_turn(self, told: int, now: datetime) -> None:
        if told > self._limits.max_activities_per_minute:
            raise LimitExceeded(
                f"more than {self._limits.max_activities_per_minute} activities in a minute, which is as many as one "
                "reporter may tell of: tell of fewer, or later",
                limit="max_per_minute",
                value=self._limits.max_activities_per_minute,
                window_s=_MINUTE_S,
                retry_after_s=_MINUTE_S - epoch(now) % _MINUTE_S,
            )

    def _sort_out_excess(
        self, kept: Mapping[str, int], made: dict[int, Activity], refused: dict[int, BrokerError]
    ) -> Mapping[str, int]:
        """What is one too many of its grant goes from `made` to `refused`; answers how many, by grant."""
        counted, dropped = Counter(kept), Counter[str]()
        most = self._limits.max_activities_per_grant
        for place, activity in list(made.items()):
            if counted[activity.grant_id] < most:
                counted[activity.grant_id] += 1
                continue
            del made[place]
            dropped[activity.grant_id] += 1
            refused[place] = LimitExceeded(
                f"{most} activities of grant {activity.grant_id} are kept already: this one is only counted",
                limit="max_per_grant",
                value=most,
                retry_after_s=_MINUTE_S,
            )
        return dropped


@dataclass(frozen=True, kw_only=True)
class _Looked:
    """The grants that reports may be about, and who tells."""

    principal: Principal
    catalogue: Catalogue
    by_id: Mapping[str, GivenGrant]
    in_trace: Mapping[str, Sequence[GivenGrant]]

    def role_for(self, grant: GivenGrant) -> str | None:
        """In which role the reporter may tell of a grant; None where nothing may show that there is one (INV-28)."""
        who = self.principal
        held_by = (grant.agent, grant.issuer, grant.subject)
        if Role.AGENT in who.roles and held_by == (who.name, who.issuer, who.subject):  # INV-17
            return AGENT
        try:
            verifiers = self.catalogue.resource(grant.resource).verifiers
        except InvalidTarget:
            return None
        return VERIFIER if Role.VERIFIER in who.roles and who.name in verifiers else None

    def grant_of(self, report: Report) -> tuple[GivenGrant, str]:
        """The grant a report is about, and the role; NotFound where the caller may not tell of it."""
        if report.grant_id is not None:
            found = self.by_id.get(report.grant_id)
            role = None if found is None else self.role_for(found)
            if found is None or role is None:
                raise NotFound(f"there is no grant {report.grant_id[:64]!r} that you hold or verify", member="grant_id")
            if not report.may_be_of(found, role):
                raise _PassedOver
            return found, role
        if report.trace_id is None:
            raise Invalid("name the grant, by grant_id or by the traceparent it was asked for with", member="grant_id")
        within = self._in_trace(report)
        if not within:
            if report.loose:
                raise _PassedOver
            raise NotFound(
                "in this trace there is no grant that you hold; whoever verifies names the grant by grant_id",
                member="traceparent",
            )
        if len(within) > 1 and report.resource is not None:
            within = [grant for grant in within if covers(grant.resource, report.resource)] or within
        if len(within) > 1:
            within = [grant for grant in within if grant.issued_at <= report.at < grant.ended_at] or within
        if len(within) > 1:
            # A guess would be evidence against a grant that has nothing to do with it.
            raise Conflict(f"{len(within)} grants were issued in this trace: say which, by grant_id", member="grant_id")
        return within[0], AGENT

    def _in_trace(self, report: Report) -> list[GivenGrant]:
        """What the reporter itself holds: the trace of a verifier is chosen by whoever calls it, and ties nothing."""
        within = self.in_trace.get(report.trace_id or "", ())
        return [grant for grant in within if self.role_for(grant) == AGENT and report.may_be_of(grant, AGENT)]


def _sort_out_repeats(known: Mapping[str, Activity], made: dict[int, Activity], refused: dict[int, BrokerError]) -> int:
    """What was told before leaves `made`, and is refused if it was something else then. Answers how many were not."""
    earlier, repeated = dict(known), 0
    for place, activity in list(made.items()):
        first = earlier.setdefault(activity.report_sha256, activity)
        if first is activity:
            continue
        del made[place]
        if activity.says_the_same_as(first):
            repeated += 1
        else:
            refused[place] = IdempotencyConflict(
                "this id was told of something else: every activity has an id of its own", member="id"
            )
    return repeated


def _activity(report: Report, looked: _Looked, now: datetime) -> Activity:
    """The activity a report comes to; a BrokerError says why it comes to none."""
    grant, role = looked.grant_of(report)
    require_in_time(report.at, now)
    require_no_secret(report.attributes)
    return Activity(
        id=new_id("act", now),
        task_id=grant.task_id,
        grant_id=grant.id,
        reporter=looked.principal.name,
        role=role,
        report_sha256=_report_sha256(looked.principal, report.id),
        kind=str(report.kind),
        action=without_secrets(report.action)[:255],
        resource=grant.resource if report.resource is None else place_of(report.resource)[:1000],
        scope=report.scope,
        outcome=str(report.outcome),
        trace_id=report.trace_id,
        attributes={name: without_secrets(value)[:255] for name, value in report.attributes.items()},
        at=report.at,
        received_at=now,
    )


def _report_sha256(principal: Principal, report_id: str) -> str:
    # Of the very workload: of two that have one name, neither takes the other's ids (INV-17).
    told = "\0".join((principal.issuer, principal.subject, report_id))
    return hashlib.sha256(told.encode()).hexdigest()


def _refusal(caller: Caller, problem: NotFound, count: int, now: datetime) -> Event:
    return Event(
        id=new_id("evt", now),
        at=now,
        type="activity.refused",
        actor=caller.name,
        outcome=problem.code,
        reason=problem.detail,
        trace_id=caller.trace_id,
        data={"verb": "report", "subject": caller.principal.subject, "activities": count},
    )
