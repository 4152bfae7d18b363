"""Policy versions, and what policy would say."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from broker.domain.identity import Caller
from broker.domain.scope import scope_set
from broker.services.administration import WhatIf
from broker.services.drafts import Draft
from broker.services.redeciding import as_json
from broker.services.replaying import replayed_json
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
            break_glass=body.break_glass,
        ),
    )
    return 200, decision.as_json()


@policies(
    "POST",
    "/v1/policies/replay",
    "What a draft would have said to recorded requests, and would end of the live grants; nothing is done",
    body=shapes.Replay,
    answers={200: shapes.ReplayAnswer},
)
def replay(caller: Caller, body: shapes.Replay) -> tuple[int, Any]:
    draft = Draft(policies=body.policies, schema=body.schema_)
    found = broker().replaying.replay(caller, draft, period=timedelta(seconds=body.period_s), at_most=body.limit)
    return 200, replayed_json(found, as_json(found.live))


@policies(
    "PUT",
    "/v1/policies",
    "Put other policies in force, by which live grants are decided again; a dry run shows which would end",
    body=shapes.PutPolicies,
    query_=shapes.DryRun,
    answers={200: shapes.PolicyChangeAnswer},
)
def put_policies(caller: Caller, body: shapes.PutPolicies, query: shapes.DryRun) -> tuple[int, Any]:
    draft = Draft(policies=body.policies, schema=body.schema_)
    if query.dry_run == "true":
        live = as_json(broker().administration.foresee(caller, draft))
        return 200, {"version": None, "dry_run": True, "live": live}
    return 200, {"version": broker().administration.replace_policies(caller, draft), "dry_run": False, "live": None}
