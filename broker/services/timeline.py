"""A task in one line of time: what the broker did, and what was told of it; and what the two come to beside each other.

What the broker did is its audit trail, in which every change has an event (INV-32). What was told is evidence by its
reporter, and says so. Nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import Connection

from broker.domain.activity import Activity, Beyond, Place, beyond
from broker.domain.audit import Event
from broker.domain.drift import Drift, drift_of
from broker.domain.identity import Caller, Principal
from broker.services.tasks import sees_all, visible_task
from broker.store import activities, tasks
from broker.store.activities import GivenGrant, InLine, place_in_line
from broker.store.database import Database

BROKER, REPORT = "broker", "report"
SOURCES = (BROKER, REPORT)
_GRANTS_LOOKED_AT = 1_000
_USES_LOOKED_AT = 10_000
# Why something outside failed speaks of our set-up, and not to whoever works on a task.
_OF_OUR_SET_UP = ("lease.", "grant.failed")
_NOT_TOLD = "an administrator sees why"


@dataclass(frozen=True, kw_only=True)
class Line:
    """What happened at one moment. `source` says whose word it is: the broker's, or that of `who`, a reporter.

    `beyond` says in which ways a reported activity is outside of what was granted.
    """

    id: str
    at: datetime
    source: str
    what: str
    who: str
    task_id: str
    grant_id: str | None
    agent: str | None
    resource: str | None
    outcome: str
    scopes: tuple[str, ...] = ()
    action: str | None = None
    role: str | None = None
    reason: str | None = None
    trace_id: str | None = None
    received_at: datetime | None = None
    beyond: tuple[Beyond, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)


class Timeline:
    def __init__(self, *, database: Database) -> None:
        self._database = database

    def page(
        self,
        caller: Caller,
        task_id: str,
        *,
        source: str | None = None,
        grant_id: str | None = None,
        after: Place | None = None,
        limit: int = 100,
    ) -> list[tuple[Line, Place]]:
        """Oldest first, after a moment, each with its own; for whoever may see the task, what they may see of it.

        What is told later of an earlier moment takes its place there, and moves nothing else.
        """
        with self._database.read() as db:
            within, holder = _within(db, caller, task_id)
            part = InLine(task_ids=within, holder=holder, grant_id=grant_id, after=after, limit=limit)
            events = [] if source == REPORT else activities.events_in_line(db, part)
            told = [] if source == BROKER else activities.activities_in_line(db, part)
            given = activities.given_grants(db, {activity.grant_id for activity in told})
        found = [(_of_event(event, caller), place_in_line(event)) for event in events]
        found += [(_of_activity(activity, given[activity.grant_id]), place_in_line(activity)) for activity in told]
        return sorted(found, key=lambda each: (each[1].at, each[1].made))[:limit]

    def drift(self, caller: Caller, task_id: str) -> Drift:
        """What was granted and never used, and used outside of what was granted, as far as the caller may see it."""
        with self._database.read() as db:
            within, holder = _within(db, caller, task_id)
            given = activities.given_for_tasks(db, within, holder=holder, limit=_GRANTS_LOOKED_AT + 1)
            looked_at = given[:_GRANTS_LOOKED_AT]
            ids = [grant.id for grant in looked_at]
            uses = activities.used_of_grants(db, within, ids, limit=_USES_LOOKED_AT + 1)
            dropped = activities.dropped_of(db, ids)
        complete = len(given) == len(looked_at) and len(uses) <= _USES_LOOKED_AT
        return drift_of(task_id, looked_at, uses[:_USES_LOOKED_AT], dropped=dropped, complete=complete)


def _within(db: Connection, caller: Caller, task_id: str) -> tuple[list[str], Principal | None]:
    """The tasks that are told of, and who alone is told of what it holds, where that is not everybody (INV-28)."""
    task = visible_task(db, caller, task_id)
    if sees_all(caller) or caller.name == task.orchestrator:
        return tasks.tree_of(db, task.id), None
    return [task.id], caller.principal


def _of_event(event: Event, caller: Caller) -> Line:
    reason, scopes = event.reason, event.data.get("scopes")
    if reason is not None and event.type.startswith(_OF_OUR_SET_UP) and not sees_all(caller):
        reason = _NOT_TOLD
    return Line(
        id=event.id,
        at=event.at,
        source=BROKER,
        what=event.type,
        who=event.actor,
        task_id=event.task_id or "",
        grant_id=event.grant_id,
        agent=event.agent,
        resource=event.resource,
        outcome=event.outcome,
        scopes=tuple(map(str, scopes)) if isinstance(scopes, list) else (),
        reason=reason,
        trace_id=event.trace_id,
    )


def _of_activity(activity: Activity, grant: GivenGrant) -> Line:
    return Line(
        id=activity.id,
        at=activity.at,
        source=REPORT,
        what=f"activity.{activity.kind}",
        who=activity.reporter,
        task_id=activity.task_id,
        grant_id=activity.grant_id,
        agent=grant.agent,
        resource=activity.resource,
        outcome=activity.outcome,
        scopes=() if activity.scope is None else (activity.scope,),
        action=activity.action,
        role=activity.role,
        trace_id=activity.trace_id,
        received_at=activity.received_at,
        beyond=tuple(beyond(activity, grant)),
        attributes=activity.attributes,
    )
