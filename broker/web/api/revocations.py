"""Revocation along an axis, and lockdowns: the admin's hand."""

from __future__ import annotations

from typing import Any

from broker.domain.identity import Caller
from broker.domain.refusal import selector
from broker.web import shapes
from broker.web.context import broker
from broker.web.operations import Operations

revocations = Operations("revocations")


@revocations(
    "POST",
    "/v1/revocations",
    "Revoke along one axis; a dry run shows what it would end",
    body=shapes.Revoke,
    answers={200: shapes.RevocationAnswer},
)
def revoke_along(caller: Caller, body: shapes.Revoke) -> tuple[int, Any]:
    axis, value = selector(body.members())
    outcome = broker().revocation.revoke_along(
        caller, axis, value, reason=body.reason, dry_run=body.dry_run, lockdown=body.lockdown
    )
    live = {grant.id: outcome.dry_run for grant in outcome.samples}
    return 200, shapes.of_revocation(outcome, live)


@revocations(
    "GET", "/v1/lockdowns", "Lockdowns that stand", query_=shapes.LockdownQuery, answers={200: shapes.LockdownPage}
)
def list_lockdowns(caller: Caller, query: shapes.LockdownQuery) -> tuple[int, Any]:
    found = broker().revocation.lockdowns(caller, standing_only=query.lifted == "false")
    return 200, {"items": [shapes.of_lockdown(lockdown) for lockdown in found], "next_cursor": None}


@revocations(
    "POST",
    "/v1/lockdowns",
    "Refuse what comes next along one axis, and revoke what is out",
    body=shapes.SetLockdown,
    answers={201: shapes.LockdownAnswer},
)
def set_lockdown(caller: Caller, body: shapes.SetLockdown) -> tuple[int, Any]:
    axis, value = selector(body.members())
    return 201, shapes.of_lockdown(broker().revocation.set_lockdown(caller, axis, value, reason=body.reason))


@revocations("DELETE", "/v1/lockdowns/{id}", "Lift a lockdown", answers={200: shapes.LockdownAnswer})
def lift_lockdown(caller: Caller, lockdown_id: str) -> tuple[int, Any]:
    return 200, shapes.of_lockdown(broker().revocation.lift_lockdown(caller, lockdown_id))
