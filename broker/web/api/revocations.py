"""Revocation along an axis, and lockdowns: the admin's hand."""

from __future__ import annotations

from typing import Any

from flask import Response

from broker.domain.feed import Position
from broker.domain.identity import Caller
from broker.domain.refusal import selector
from broker.web import feed, shapes
from broker.web.context import broker
from broker.web.operations import Operations, before, page
from broker.web.reading import idempotency

revocations = Operations("revocations")


@revocations(
    "POST",
    "/v1/revocations",
    "Revoke along one axis; a dry run shows what it would end",
    body=shapes.Revoke,
    answers={200: shapes.RevocationAnswer},
    creates=True,
    ends=True,
)
def revoke_along(caller: Caller, body: shapes.Revoke) -> tuple[int, Any]:
    axis, value = selector(body.members())
    outcome = broker().revocation.revoke_along(
        caller,
        axis,
        value,
        reason=body.reason,
        dry_run=body.dry_run,
        lockdown=body.lockdown,
        idempotency=idempotency(),
    )
    live = {grant.id: outcome.dry_run for grant in outcome.samples}
    return 200, shapes.of_revocation(outcome, live)


@revocations(
    "GET", "/v1/revocations", "The feed, for who polls it", query_=shapes.FeedQuery, answers={200: shapes.FeedAnswer}
)
def poll_feed(caller: Caller, query: shapes.FeedQuery) -> tuple[int, Any]:
    after = None if query.after is None else Position.parse(query.after)
    return 200, feed.polled(broker(), caller, after, query.wait)


@revocations(
    "GET", "/v1/revocations/feed", "The feed, as a stream of server-sent events", answers={}, streams=feed.MEDIA_TYPE
)
def stream_feed(caller: Caller) -> Response:
    return Response(feed.streaming(broker(), caller), headers=dict(feed.HEADERS), direct_passthrough=True)


@revocations(
    "GET", "/v1/lockdowns", "Lockdowns that stand", query_=shapes.LockdownQuery, answers={200: shapes.LockdownPage}
)
def list_lockdowns(caller: Caller, query: shapes.LockdownQuery) -> tuple[int, Any]:
    standing_only = query.lifted == "false"
    cursor = before(query.cursor, "lck")
    found = broker().revocation.lockdowns(caller, standing_only=standing_only, before=cursor, limit=query.limit)
    return 200, page(found, [shapes.of_lockdown(lockdown) for lockdown in found], query.limit)


@revocations(
    "POST",
    "/v1/lockdowns",
    "Refuse what comes next along one axis, and revoke what is out",
    body=shapes.SetLockdown,
    answers={201: shapes.LockdownAnswer},
    creates=True,
    ends=True,
)
def set_lockdown(caller: Caller, body: shapes.SetLockdown) -> tuple[int, Any]:
    axis, value = selector(body.members())
    lockdown = broker().revocation.set_lockdown(caller, axis, value, reason=body.reason, idempotency=idempotency())
    return 201, shapes.of_lockdown(lockdown)


@revocations("DELETE", "/v1/lockdowns/{id}", "Lift a lockdown", answers={200: shapes.LockdownAnswer})
def lift_lockdown(caller: Caller, lockdown_id: str) -> tuple[int, Any]:
    return 200, shapes.of_lockdown(broker().revocation.lift_lockdown(caller, lockdown_id))
