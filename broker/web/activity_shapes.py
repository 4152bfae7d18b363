"""The shapes of what was done with grants: told, put into a line of time, and held against what was granted."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from broker.domain.activity import MAX_ATTRIBUTES, Beyond, Kind, Outcome, Report
from broker.domain.clock import rfc3339
from broker.domain.drift import Drift, GrantUse, Narrower, Outside, Unused
from broker.domain.errors import Invalid
from broker.services.activities import Refused, Taken
from broker.services.timeline import Line
from broker.web.reading import trace_id_of
from broker.web.shapes import Answer, Identifier, Name, Page, Request, Scope, When

Moment = Annotated[
    str,
    Field(
        pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?Z$",
        description="RFC 3339, UTC. Within the last day, by the broker's clock; kept to the second.",
        examples=["2026-03-01T12:00:00Z"],
    ),
]


class TellActivity(Request):
    """What was done once, with one grant."""

    id: Annotated[
        str,
        Field(
            pattern=r"^[\u0021-\u007e]{1,128}$",
            description="The reporter's own. Told again with it, it is the same activity.",
        ),
    ]
    kind: Literal["tool", "secret_use", "request"]
    action: Annotated[Name, Field(description="The tool, the method and route, the operation: what was called.")]
    at: Moment
    grant_id: Name | None = None
    traceparent: Annotated[
        Name | None,
        Field(description="Without a grant_id: the trace in which the caller asked for the grant."),
    ] = None
    scope: Annotated[Scope | None, Field(description="Which of the granted scopes it used.")] = None
    resource: Annotated[Identifier | None, Field(description="Where it went, if not to the resource itself.")] = None
    outcome: Literal["ok", "error", "denied", "unknown"] = "ok"
    attributes: Annotated[dict[Name, Name], Field(max_length=MAX_ATTRIBUTES)] = Field(
        default_factory=dict, description="A few words more. None may be called like a secret."
    )


class TellActivities(Request):
    activities: Annotated[list[TellActivity], Field(min_length=1, max_length=100)]


class TimelineQuery(Page):
    source: Annotated[
        Literal["broker", "report"] | None, Field(description="The broker's own word alone, or what was told alone.")
    ] = None
    grant: Name | None = None


class RefusedActivityAnswer(Answer):
    id: str
    code: str
    detail: str
    member: str | None


class TakenAnswer(Answer):
    recorded: int
    repeated: Annotated[int, Field(description="Told before, and now once more.")]
    refused: Annotated[list[RefusedActivityAnswer], Field(description="The others are taken down all the same.")]


class LineAnswer(Answer):
    """What happened at one moment."""

    id: str
    at: When
    source: Annotated[
        Literal["broker", "report"],
        Field(description="Whose word it is: the broker's, or that of a reporter, which nobody vouches for."),
    ]
    what: Annotated[str, Field(description="The type of an audit event, or activity.tool, .secret_use, .request.")]
    who: Annotated[str, Field(description="Who did it; of a report, who told it.")]
    role: Annotated[Literal["agent", "verifier"] | None, Field(description="Of a report: in which role.")]
    task_id: str
    grant_id: str | None
    agent: str | None
    resource: str | None
    scopes: list[str]
    action: str | None
    outcome: str
    reason: str | None
    beyond: Annotated[list[Beyond], Field(description="In which ways a report is outside of what was granted.")]
    attributes: dict[str, str]
    trace_id: str | None
    received_at: Annotated[When | None, Field(description="Of a report: when the broker was told.")]


class TimelinePage(Answer):
    """Oldest first. `next_cursor` is null where there is nothing more yet."""

    items: list[LineAnswer]
    next_cursor: str | None


class GrantUseAnswer(Answer):
    grant_id: str
    task_id: str
    agent: str
    resource: str
    granted: list[str]
    used: list[str]
    unused: Annotated[list[str], Field(description="Granted, and no report names it.")]
    reports: int
    unsaid: Annotated[int, Field(description="Reports that name no scope.")]
    first_at: When | None
    last_at: When | None


class UnusedAnswer(Answer):
    """Of all grants of one agent on one resource together."""

    agent: str
    resource: str
    grants: int
    unreported: Annotated[int, Field(description="Grants of which nobody tells anything.")]
    used: list[str]
    unused: list[str]
    unsaid: int


class OutsideAnswer(Answer):
    grant_id: str
    agent: str
    why: Beyond
    resource: str
    scope: str | None
    told_by: Literal["agent", "verifier"]
    denied: Annotated[bool, Field(description="Whoever was asked refused it.")]
    count: int
    first_at: When
    last_at: When


class NarrowerAnswer(Answer):
    """What would have been enough."""

    agent: str
    resource: str
    scopes: list[str]
    in_words: str
    policy: Annotated[str, Field(description="In Cedar; a start, to be read before it is used.")]


class DriftAnswer(Answer):
    task_id: str
    drifted: Annotated[bool, Field(description="Something was granted and not used, or used outside of it.")]
    grants: list[GrantUseAnswer]
    unused: list[UnusedAnswer]
    outside: list[OutsideAnswer]
    narrower: list[NarrowerAnswer]
    dropped: Annotated[int, Field(description="Activities that were told of and not kept, as there were too many.")]
    complete: bool


def report_of(told: TellActivity) -> Report:
    return Report(
        id=told.id,
        kind=Kind(told.kind),
        action=told.action,
        at=_moment(told.at),
        grant_id=told.grant_id,
        # Version, parent and flags are of no use here, and an invalid one is ignored, as its standard asks.
        trace_id=None if told.traceparent is None else trace_id_of(told.traceparent),
        resource=told.resource,
        scope=told.scope,
        outcome=Outcome(told.outcome),
        attributes=told.attributes,
    )


def _moment(text: str) -> datetime:
    try:
        return datetime.strptime(text[:19], "%Y-%m-%dT%H:%M:%S").replace(tzinfo=UTC)
    except ValueError:
        raise Invalid(f"at: {text[:19]} is no day and time there is", member="at") from None


def of_taken(taken: Taken) -> dict[str, Any]:
    return {"recorded": taken.recorded, "repeated": taken.repeated, "refused": list(map(_of_refused, taken.refused))}


def _of_refused(refused: Refused) -> dict[str, Any]:
    why = refused.why
    return {"id": refused.id, "code": why.code, "detail": why.detail, "member": why.member}


def of_line(line: Line) -> dict[str, Any]:
    return {
        "id": line.id,
        "at": rfc3339(line.at),
        "source": line.source,
        "what": line.what,
        "who": line.who,
        "role": line.role,
        "task_id": line.task_id,
        "grant_id": line.grant_id,
        "agent": line.agent,
        "resource": line.resource,
        "scopes": list(line.scopes),
        "action": line.action,
        "outcome": line.outcome,
        "reason": line.reason,
        "beyond": list(map(str, line.beyond)),
        "attributes": dict(line.attributes),
        "trace_id": line.trace_id,
        "received_at": _time(line.received_at),
    }


def of_drift(drift: Drift) -> dict[str, Any]:
    return {
        "task_id": drift.task_id,
        "drifted": drift.drifted,
        "grants": list(map(_members, drift.grants)),
        "unused": list(map(_members, drift.unused)),
        "outside": list(map(_members, drift.outside)),
        "narrower": list(map(_members, drift.narrower)),
        "dropped": drift.dropped,
        "complete": drift.complete,
    }


def _members(found: GrantUse | Unused | Outside | Narrower) -> dict[str, Any]:
    return {name: _plain(value) for name, value in vars(found).items()}


def _plain(value: Any) -> Any:
    return rfc3339(value) if isinstance(value, datetime) else list(value) if isinstance(value, tuple) else value


def _time(at: datetime | None) -> str | None:
    return None if at is None else rfc3339(at)
