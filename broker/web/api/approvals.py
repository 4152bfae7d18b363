"""Approvals, for the people who decide, and for the agents that wait for them.

Nothing is decided by a GET: a link in a message, and whatever follows links, changes nothing.
"""

from __future__ import annotations

from typing import Any

from broker.domain.approval import Narrowing
from broker.domain.identity import Caller
from broker.web import shapes
from broker.web.context import broker
from broker.web.operations import Operations, before, page

approvals = Operations("approvals")


@approvals(
    "GET",
    "/v1/approvals",
    "List approvals, newest first",
    query_=shapes.ApprovalQuery,
    answers={200: shapes.ApprovalPage},
)
def list_approvals(caller: Caller, query: shapes.ApprovalQuery) -> tuple[int, Any]:
    found = broker().approvals.page(
        caller,
        state=None if query.state is None else str(query.state),
        task_id=query.task,
        agent=query.agent,
        resource=query.resource,
        before=before(query.cursor, "apr"),
        limit=query.limit,
    )
    items = [case.approval for case in found]
    return 200, page(items, [shapes.of_approval(case) for case in found], query.limit)


@approvals("GET", "/v1/approvals/{id}", "One approval, as its approvers see it", answers={200: shapes.ApprovalAnswer})
def show_approval(caller: Caller, approval_id: str) -> tuple[int, Any]:
    return 200, shapes.of_approval(broker().approvals.find(caller, approval_id))


@approvals(
    "POST",
    "/v1/approvals/{id}/approve",
    "Say yes, to all of it or to less",
    body=shapes.Approve,
    answers={200: shapes.ApprovalAnswer},
    looks_again=True,
)
def approve(caller: Caller, approval_id: str, body: shapes.Approve) -> tuple[int, Any]:
    narrowing = Narrowing(scopes=body.scopes, ttl_s=body.ttl_s, reason=body.reason)
    return 200, shapes.of_approval(broker().approvals.approve(caller, approval_id, narrowing))


@approvals(
    "POST",
    "/v1/approvals/{id}/deny",
    "Say no, which ends it",
    body=shapes.WithReason,
    answers={200: shapes.ApprovalAnswer},
    looks_again=True,
    ends=True,
)
def deny(caller: Caller, approval_id: str, body: shapes.WithReason) -> tuple[int, Any]:
    return 200, shapes.of_approval(broker().approvals.deny(caller, approval_id, reason=body.reason))


@approvals(
    "POST",
    "/v1/approvals/{id}/withdraw",
    "Take one's own request back",
    body=shapes.WithReason,
    answers={200: shapes.ApprovalAnswer},
    looks_again=True,
    ends=True,
)
def withdraw(caller: Caller, approval_id: str, body: shapes.WithReason) -> tuple[int, Any]:
    return 200, shapes.of_approval(broker().approvals.withdraw(caller, approval_id, reason=body.reason))
