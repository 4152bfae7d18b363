"""What was done with grants: told by agents and verifiers, and shown to whoever may see the task."""

from __future__ import annotations

import base64
import re
from typing import Any

from broker.domain.activity import Place
from broker.domain.clock import epoch, from_epoch
from broker.domain.identity import Caller
from broker.web import activity_shapes as shapes
from broker.web.context import broker
from broker.web.operations import Operations, opened

activities = Operations("activities")

_PLACE = re.compile(r"([0-9]{1,11})\.([0-7][0-9a-hjkmnp-tv-z]{25})")


@activities(
    "POST",
    "/v1/activities",
    "Tell what was done with grants",
    body=shapes.TellActivities,
    answers={200: shapes.TakenAnswer},
)
def tell_activities(caller: Caller, body: shapes.TellActivities) -> tuple[int, Any]:
    return 200, shapes.of_taken(broker().activities.take(caller, [shapes.report_of(told) for told in body.activities]))


@activities(
    "GET",
    "/v1/tasks/{id}/timeline",
    "Issue, use and end of everything of a task, in one line of time, oldest first",
    query_=shapes.TimelineQuery,
    answers={200: shapes.TimelinePage},
)
def show_timeline(caller: Caller, task_id: str, query: shapes.TimelineQuery) -> tuple[int, Any]:
    found = broker().timeline.page(
        caller, task_id, source=query.source, grant_id=query.grant, after=_after(query.cursor), limit=query.limit
    )
    more = _cursor(found[-1][1]) if len(found) == query.limit else None
    return 200, {"items": [shapes.of_line(line) for line, _ in found], "next_cursor": more}


@activities(
    "GET",
    "/v1/tasks/{id}/drift",
    "What was granted and never used, and what was used outside of what was granted",
    answers={200: shapes.DriftAnswer},
)
def show_drift(caller: Caller, task_id: str) -> tuple[int, Any]:
    return 200, shapes.of_drift(broker().timeline.drift(caller, task_id))


def _cursor(place: Place) -> str:
    return base64.urlsafe_b64encode(f"{epoch(place.at)}.{place.made}".encode()).decode()


def _after(cursor: str | None) -> Place | None:
    if cursor is None:
        return None
    seconds, made = opened(cursor, _PLACE.fullmatch).split(".")
    return Place(at=from_epoch(int(seconds)), made=made)
