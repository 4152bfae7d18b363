"""Policy versions, and what policy would say."""

from __future__ import annotations

from typing import Any

from broker.domain.identity import Caller
from broker.domain.scope import scope_set
from broker.services.administration import WhatIf
from broker.web import shapes
from broker.web.context import broker
from broker.web.operations import Operations, before_version, page

policies = Operations("policies")


@policies(
    "GET", "/v1/policies", "Configuration versions, newest first", query_=shapes.Page, answers={200: shapes.VersionPage}
)
def list_versions(caller: Caller, query: shapes.Page) -> tuple[int, Any]:
    found = broker().administration.versions(caller, before=before_version(query.cursor), limit=query.limit)
    return 200, page(found, [shapes.of_version(version) for version in found], query.limit, by="version")


@policies(
    "POST",
    "/v1/policies/evaluate",
    "What policy would say to a request; nothing is issued",
    body=shapes.Evaluate,
    answers={200: shapes.DecisionAnswer},
)
def evaluate(caller: Caller, body: shapes.Evaluate) -> tuple[int, Any]:
    decision = broker().administration.evaluate(
        caller,
        WhatIf(
            agent=body.agent,
            resource=body.resource,
            scopes=scope_set(body.scopes),
            ttl_s=body.ttl_s,
            purpose=body.purpose,
            labels=body.labels,
            intent=body.intent,
            sender_bound=body.sender_bound,
            claimed=body.context,
        ),
    )
    return 200, decision.as_json()
