"""The audit trail, for auditors and admins."""

from __future__ import annotations

from typing import Any

from broker.domain.identity import Caller
from broker.web import shapes
from broker.web.context import broker
from broker.web.operations import Operations, before, page

audit = Operations("audit")


@audit("GET", "/v1/audit", "Events, newest first", query_=shapes.AuditQuery, answers={200: shapes.EventPage})
def list_events(caller: Caller, query: shapes.AuditQuery) -> tuple[int, Any]:
    wanted = {
        "type": query.type,
        "actor": query.actor,
        "task_id": query.task,
        "grant_id": query.grant,
        "agent": query.agent,
        "user": query.user,
        "resource": query.resource,
        "outcome": query.outcome,
        "trace_id": query.trace_id,
    }
    filters = {name: value for name, value in wanted.items() if value is not None}
    found = broker().audit_trail.page(caller, filters, before=before(query.cursor, "evt"), limit=query.limit)
    return 200, page(found, [shapes.of_event(event) for event in found], query.limit)
