"""Grants, for the agents that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from broker.domain.approval import Case
from broker.domain.grant import GrantRequest
from broker.domain.identity import Caller
from broker.domain.lifecycle import GrantState
from broker.domain.scope import scope_set
from broker.web import shapes
from broker.web.auth import proven_key, user_in_body
from broker.web.context import broker
from broker.web.operations import Operations, before, page
from broker.web.reading import idempotency, preferred_wait_s

grants = Operations("grants")

_LOOK_AGAIN_S = 5  # people are not faster


@grants(
    "POST",
    "/v1/grants",
    "Ask for a credential",
    body=shapes.RequestGrant,
    answers={201: shapes.IssuedAnswer, 202: shapes.PendingAnswer},
    creates=True,
    proof=True,
    looks_again=True,
)
def request_grant(caller: Caller, body: shapes.RequestGrant) -> tuple[int, Any] | tuple[int, Any, Mapping[str, str]]:
    request = GrantRequest(
        caller=caller,
        resource=body.resource,
        scopes=scope_set(body.scopes),
        task_id=body.task_id,
        ttl=None if body.ttl_s is None else timedelta(seconds=body.ttl_s),
        intent=body.intent,
        claimed=body.context,
        parameters=body.parameters,
        takes_secrets=True,
        hand_to=tuple(body.hand_to or ()),
        parent_grant_id=body.parent_grant_id,
        user=user_in_body(body.on_behalf_of, caller),
        may_wait=True,
        break_glass=None if body.break_glass is None else body.break_glass.reason,
        idempotency=idempotency(),
        jkt=proven_key(),
    )
    made = broker().issuance.request(request)
    if isinstance(made, Case):
        return 202, shapes.of_pending(made), {"Retry-After": str(_LOOK_AGAIN_S)}
    return 201, shapes.of_issued(made)


@grants(
    "POST",
    "/v1/grants/{id}/credential",
    "Collect the credential of a grant that people have approved, once",
    body=shapes.CollectGrant,
    answers={200: shapes.IssuedAnswer},
    proof=True,
    looks_again=True,
)
def collect_grant(caller: Caller, grant_id: str, body: shapes.CollectGrant) -> tuple[int, Any]:
    issued = broker().collection.collect(caller, grant_id, jkt=proven_key(), parameters=body.parameters)
    return 200, shapes.of_issued(issued)


@grants(
    "POST",
    "/v1/grants/{id}/renew",
    "A new token for the same grant, decided again",
    body=shapes.RenewGrant,
    answers={200: shapes.IssuedAnswer},
    proof=True,
    looks_again=True,
)
def renew_grant(caller: Caller, grant_id: str, body: shapes.RenewGrant) -> tuple[int, Any]:
    ttl = None if body.ttl_s is None else timedelta(seconds=body.ttl_s)
    return 200, shapes.of_issued(broker().renewal.renew(caller, grant_id, ttl=ttl, jkt=proven_key()))


@grants("GET", "/v1/grants", "List grants, newest first", query_=shapes.GrantQuery, answers={200: shapes.GrantPage})
def list_grants(caller: Caller, query: shapes.GrantQuery) -> tuple[int, Any]:
    wanted = {
        "state": query.state,
        "task_id": query.task,
        "agent": query.agent,
        "user": query.user,
        "resource": query.resource,
        "break_glass": query.break_glass,
    }
    filters = {name: str(value) for name, value in wanted.items() if value is not None}
    found = broker().verification.page_of_grants(caller, filters, before=before(query.cursor, "grt"), limit=query.limit)
    return 200, page([grant for grant, _, _ in found], [shapes.of_grant(*each) for each in found], query.limit)


@grants("GET", "/v1/grants/{id}", "One grant, never its credential", answers={200: shapes.GrantAnswer}, waits=True)
def show_grant(caller: Caller, grant_id: str) -> tuple[int, Any]:
    """With `Prefer: wait`, when people have decided about it, or the time is over."""
    found = broker().waiting.until(
        lambda: broker().verification.find_grant(caller, grant_id),
        lambda seen: seen[0].state is not GrantState.PENDING or seen[0].expires_at <= broker().clock(),
        by=caller.name,
        at_most_s=preferred_wait_s(),
    )
    return 200, shapes.of_grant(*found)


@grants(
    "GET",
    "/v1/grants/{id}/decision",
    "Why it was decided so: policies, ceilings, facts, and what would be allowed",
    answers={200: shapes.ExplanationAnswer},
)
def explain_grant(caller: Caller, grant_id: str) -> tuple[int, Any]:
    return 200, shapes.of_explanation(broker().explaining.explain(caller, grant_id))


@grants(
    "POST",
    "/v1/grants/{id}/revoke",
    "End one grant",
    body=shapes.WithReason,
    answers={200: shapes.ReceiptAnswer},
    ends=True,
)
def revoke_grant(caller: Caller, grant_id: str, body: shapes.WithReason) -> tuple[int, Any]:
    return 200, shapes.of_receipt(broker().revocation.revoke_grant(caller, grant_id, reason=body.reason))
