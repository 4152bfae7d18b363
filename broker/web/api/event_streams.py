"""The streams of security events of all receivers: the admin's hand. Receivers have `/ssf` for their own."""

from __future__ import annotations

from typing import Any

from broker.domain.identity import Caller
from broker.web import shapes
from broker.web.context import broker
from broker.web.operations import Operations, before, page

event_streams = Operations("event_streams")


@event_streams(
    "GET",
    "/v1/event-streams",
    "List the streams of security events, newest first",
    query_=shapes.Page,
    answers={200: shapes.EventStreamPage},
)
def list_event_streams(caller: Caller, query: shapes.Page) -> tuple[int, Any]:
    found = broker().streams.page(caller, before=before(query.cursor, "stm"), limit=query.limit)
    streams = [overseen.stream for overseen in found]
    return 200, page(streams, [shapes.of_event_stream(each) for each in found], query.limit)


@event_streams(
    "GET", "/v1/event-streams/{id}", "One stream of security events", answers={200: shapes.EventStreamAnswer}
)
def show_event_stream(caller: Caller, stream_id: str) -> tuple[int, Any]:
    return 200, shapes.of_event_stream(broker().streams.show(caller, stream_id))


@event_streams(
    "POST",
    "/v1/event-streams/{id}/pause",
    "Send nothing more on a stream until an admin lets it go on; its receiver is told",
    body=shapes.Abandon,
    answers={200: shapes.EventStreamAnswer},
)
def pause_event_stream(caller: Caller, stream_id: str, body: shapes.Abandon) -> tuple[int, Any]:
    return 200, shapes.of_event_stream(broker().streams.pause(caller, stream_id, reason=body.reason))


@event_streams(
    "POST",
    "/v1/event-streams/{id}/resume",
    "Send again on a stream, with what was held; its receiver is told",
    body=shapes.WithReason,
    answers={200: shapes.EventStreamAnswer},
)
def resume_event_stream(caller: Caller, stream_id: str, body: shapes.WithReason) -> tuple[int, Any]:
    return 200, shapes.of_event_stream(broker().streams.resume(caller, stream_id, reason=body.reason))


@event_streams(
    "DELETE",
    "/v1/event-streams/{id}",
    "Delete a stream, and what waits on it",
    answers={200: shapes.EventStreamAnswer},
)
def delete_event_stream(caller: Caller, stream_id: str) -> tuple[int, Any]:
    return 200, shapes.of_event_stream(broker().streams.remove(caller, stream_id))
