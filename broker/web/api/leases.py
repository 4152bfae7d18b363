"""Leases: what is owed outside, for admins and auditors."""

from __future__ import annotations

from typing import Any

from broker.domain.identity import Caller
from broker.web import shapes
from broker.web.context import broker
from broker.web.operations import Operations, before, page

leases = Operations("leases")


@leases("GET", "/v1/leases", "List leases, newest first", query_=shapes.LeaseQuery, answers={200: shapes.LeasePage})
def list_leases(caller: Caller, query: shapes.LeaseQuery) -> tuple[int, Any]:
    wanted = {"state": query.state, "provider": query.provider, "grant": query.grant}
    filters = {name: str(value) for name, value in wanted.items() if value is not None}
    found = broker().leases.page(caller, filters, before=before(query.cursor, "lea"), limit=query.limit)
    return 200, page([lease for lease, _ in found], [shapes.of_lease(*each) for each in found], query.limit)


@leases("GET", "/v1/leases/{id}", "One lease", answers={200: shapes.LeaseAnswer})
def show_lease(caller: Caller, lease_id: str) -> tuple[int, Any]:
    return 200, shapes.of_lease(*broker().leases.find(caller, lease_id))


@leases(
    "POST",
    "/v1/leases/{id}/abandon",
    "Say that a stuck lease is given up: it stays open, and counts as residual risk",
    body=shapes.Abandon,
    answers={200: shapes.LeaseAnswer},
)
def abandon_lease(caller: Caller, lease_id: str, body: shapes.Abandon) -> tuple[int, Any]:
    return 200, shapes.of_lease(*broker().leases.abandon(caller, lease_id, reason=body.reason))
