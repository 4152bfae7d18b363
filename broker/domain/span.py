"""Spans of OpenTelemetry as activities: which are, and what of them is told.

By the semantic conventions for generative AI, databases, HTTP and RPC, and by attributes of our own, `broker.…`. Only
what is named here is ever looked at: prompts, queries, headers and bodies, which instrumentation also records, are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from broker.domain.activity import Kind, Outcome, Report, place_of

Attributes = Mapping[str, str]

GRANT, RESOURCE, SCOPE, KIND = "broker.grant_id", "broker.resource", "broker.scope", "broker.kind"
_STATUS = ("http.response.status_code", "http.status_code")
# What is kept of a span besides what was done; older names of the same thing come second.
_KEPT: Mapping[str, tuple[str, ...]] = {
    "gen_ai.agent.name": ("gen_ai.agent.name",),
    "gen_ai.tool.call.id": ("gen_ai.tool.call.id",),
    "gen_ai.tool.type": ("gen_ai.tool.type",),
    "mcp.method.name": ("mcp.method.name",),
    "db.system.name": ("db.system.name", "db.system"),
    "db.namespace": ("db.namespace", "db.name"),
    "db.collection.name": ("db.collection.name", "db.sql.table"),
    "http.request.method": ("http.request.method", "http.method"),
    "http.response.status_code": _STATUS,
    "server.address": ("server.address", "net.peer.name"),
    "rpc.system": ("rpc.system", "rpc.system.name"),
    "error.type": ("error.type",),
    "service.name": ("service.name",),
}
# Every name that is looked at; a reader need not understand the value of any other.
READ = frozenset(
    {
        GRANT, RESOURCE, SCOPE, KIND, "gen_ai.operation.name", "gen_ai.tool.name", "db.operation.name", "db.operation",
        "http.route", "url.template", "url.full", "http.url", "rpc.service", "rpc.method",
        *(name for names in _KEPT.values() for name in names),
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Span:
    """What of a span is read. `around` holds what its resource says, which is what its whole program says."""

    trace_id: str
    span_id: str
    name: str
    started_at: datetime
    failed: bool = False
    inbound: bool = False  # it answered somebody, and did not ask
    attributes: Attributes = field(default_factory=dict)
    around: Attributes = field(default_factory=dict)


def report_of(span: Span) -> Report | None:
    """The activity that a span is, or None: most spans are of a program's own affairs."""
    told = span.attributes
    found = _what(span)
    if found is None:
        return None
    kind, action = found
    own = told.get(GRANT)
    elsewhere = _first(told, "url.full", "http.url") if kind is Kind.REQUEST else None
    resource = told.get(RESOURCE) or (None if elsewhere is None else place_of(elsewhere))
    return Report(
        id=f"{span.trace_id}:{span.span_id}",
        kind=kind,
        action=action,
        at=span.started_at,
        grant_id=own or span.around.get(GRANT),
        trace_id=span.trace_id,
        resource=resource,
        scope=told.get(SCOPE),
        outcome=_outcome(span),
        attributes={
            name: value
            for name, names in _KEPT.items()
            if (value := _first(told, *names) or _first(span.around, *names)) is not None
        },
        loose=own is None,
        inbound=span.inbound,
        of_secret=own is None and _first(told, "db.system.name", "db.system") is not None,
    )


def _what(span: Span) -> tuple[Kind, str] | None:
    told = span.attributes
    ways: Iterable[tuple[Kind, Callable[[Attributes], str | None]]] = (
        (Kind.TOOL, _tool),
        (Kind.REQUEST, _database),
        (Kind.REQUEST, _remote),
        (Kind.REQUEST, _http),
    )
    action, kind = None, None
    for way, read in ways:
        action = read(told)
        if action is not None:
            kind = way
            break
    if told.get(KIND) in tuple(Kind):
        kind = Kind(told[KIND])
    elif kind is None and told.get(GRANT) is not None:
        # It names a grant itself, so somebody means it to be seen.
        kind = Kind.REQUEST if RESOURCE in told or SCOPE in told else Kind.TOOL
    return None if kind is None else (kind, action or span.name or str(kind))


def _tool(told: Attributes) -> str | None:
    name = told.get("gen_ai.tool.name")
    return name or ("" if told.get("gen_ai.operation.name") == "execute_tool" else None)


def _database(told: Attributes) -> str | None:
    if _first(told, "db.system.name", "db.system") is None:
        return None
    # What it is done to, and never the query: that holds what people are called.
    words = (_first(told, "db.operation.name", "db.operation"), _first(told, "db.collection.name", "db.sql.table"))
    return " ".join(word for word in words if word)


def _remote(told: Attributes) -> str | None:
    if _first(told, "rpc.system", "rpc.system.name") is None:
        return None
    return "/".join(word for word in (told.get("rpc.service"), told.get("rpc.method")) if word)


def _http(told: Attributes) -> str | None:
    method = _first(told, "http.request.method", "http.method")
    if method is None:
        return None
    route = _first(told, "http.route", "url.template")
    if route is None and (url := _first(told, "url.full", "http.url")) is not None:
        _, _, after = place_of(url).partition("://")
        route = "/" + after.partition("/")[2]
    return f"{method} {route}" if route else method


def _outcome(span: Span) -> Outcome:
    status = _first(span.attributes, *_STATUS) or ""
    if status in ("401", "403"):
        return Outcome.DENIED
    failed = span.failed or "error.type" in span.attributes or (status.isdecimal() and status >= "400")
    return Outcome.ERROR if failed else Outcome.OK


def _first(told: Attributes, *names: str) -> str | None:
    return next((told[name] for name in names if told.get(name)), None)
