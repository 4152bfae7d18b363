"""Tasks, for orchestrators; and for agents, who see those they may ask under."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from broker.domain.errors import Invalid
from broker.domain.identity import Caller
from broker.domain.lifecycle import TaskState
from broker.services.tasks import TaskRequest
from broker.web import shapes
from broker.web.auth import user_in_body
from broker.web.context import broker
from broker.web.operations import Operations, before, page
from broker.web.reading import idempotency

tasks = Operations("tasks")


@tasks("POST", "/v1/tasks", "Open a task", body=shapes.OpenTask, answers={201: shapes.TaskAnswer}, creates=True)
def open_task(caller: Caller, body: shapes.OpenTask) -> tuple[int, Any]:
    request = TaskRequest(
        caller=caller,
        purpose=body.purpose,
        agents=tuple(body.agents),
        deadline=timedelta(seconds=body.deadline_s),
        heartbeat=None if body.heartbeat_s is None else timedelta(seconds=body.heartbeat_s),
        ceiling=_ceiling(body),
        labels=body.labels,
        idempotency=idempotency(),
        user=user_in_body(body.on_behalf_of, caller),
        parent_task_id=body.parent_task_id,
    )
    return 201, shapes.of_task(broker().tasks.open(request))


def _ceiling(body: shapes.OpenTask) -> Mapping[str, list[str]] | None:
    if body.resources is None:
        return None
    ceiling: dict[str, list[str]] = {}
    for entry in body.resources:
        if entry.resource in ceiling:
            raise Invalid(
                f"resources: {entry.resource!r} is named twice; give its scopes in one entry", member="resources"
            )
        ceiling[entry.resource] = entry.scopes
    return ceiling


@tasks("GET", "/v1/tasks", "List tasks, newest first", query_=shapes.TaskQuery, answers={200: shapes.TaskPage})
def list_tasks(caller: Caller, query: shapes.TaskQuery) -> tuple[int, Any]:
    found = broker().tasks.page(
        caller,
        state=query.state,
        agent=query.agent,
        user=query.user,
        resource=query.resource,
        before=before(query.cursor, "task"),
        limit=query.limit,
    )
    return 200, page(found, [shapes.of_task(task) for task in found], query.limit)


@tasks("GET", "/v1/tasks/{id}", "One task", answers={200: shapes.TaskAnswer})
def show_task(caller: Caller, task_id: str) -> tuple[int, Any]:
    return 200, shapes.of_task(broker().tasks.find(caller, task_id))


@tasks("POST", "/v1/tasks/{id}/heartbeat", "Keep a task alive", answers={200: shapes.TaskAnswer})
def heartbeat(caller: Caller, task_id: str) -> tuple[int, Any]:
    return 200, shapes.of_task(broker().tasks.heartbeat(caller, task_id))


def _end(caller: Caller, task_id: str, state: TaskState, body: shapes.WithReason) -> tuple[int, Any]:
    return 200, shapes.of_receipt(broker().tasks.end(caller, task_id, state, reason=body.reason))


@tasks(
    "POST",
    "/v1/tasks/{id}/complete",
    "End a task as completed, with everything issued for it",
    body=shapes.WithReason,
    answers={200: shapes.ReceiptAnswer},
    ends=True,
)
def complete_task(caller: Caller, task_id: str, body: shapes.WithReason) -> tuple[int, Any]:
    return _end(caller, task_id, TaskState.COMPLETED, body)


@tasks(
    "POST",
    "/v1/tasks/{id}/fail",
    "End a task as failed, with everything issued for it",
    body=shapes.WithReason,
    answers={200: shapes.ReceiptAnswer},
    ends=True,
)
def fail_task(caller: Caller, task_id: str, body: shapes.WithReason) -> tuple[int, Any]:
    return _end(caller, task_id, TaskState.FAILED, body)


@tasks(
    "POST",
    "/v1/tasks/{id}/cancel",
    "End a task as cancelled, with everything issued for it",
    body=shapes.WithReason,
    answers={200: shapes.ReceiptAnswer},
    ends=True,
)
def cancel_task(caller: Caller, task_id: str, body: shapes.WithReason) -> tuple[int, Any]:
    return _end(caller, task_id, TaskState.CANCELLED, body)


@tasks("GET", "/v1/tasks/{id}/receipt", "The receipt as it stands now", answers={200: shapes.ReceiptAnswer})
def show_receipt(caller: Caller, task_id: str) -> tuple[int, Any]:
    return 200, shapes.of_receipt(broker().tasks.receipt(caller, task_id))
