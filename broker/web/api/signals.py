"""Signals of risk, from whoever watches."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from broker.domain.errors import Invalid
from broker.domain.identity import Caller
from broker.web import shapes
from broker.web.context import broker
from broker.web.operations import Operations, before, page
from broker.web.reading import idempotency

signals = Operations("signals")


@signals(
    "POST",
    "/v1/signals",
    "Say that an agent or a user is at risk: policies see it, and live grants are decided again",
    body=shapes.SendSignal,
    answers={201: shapes.SignalAnswer},
    creates=True,
    ends=True,
)
def send_signal(caller: Caller, body: shapes.SendSignal) -> tuple[int, Any]:
    named = [(axis, value) for axis, value in (("agent", body.agent), ("user", body.user)) if value is not None]
    if len(named) != 1:
        raise Invalid("name exactly one of agent and user", member="agent")
    axis, value = named[0]
    sent = broker().signals.send(
        caller,
        axis,
        value,
        level=body.level,
        reason=body.reason,
        source=body.source,
        expires_in=timedelta(seconds=body.expires_s),
        idempotency=idempotency(),
    )
    return 201, shapes.of_signal(sent)


@signals("GET", "/v1/signals", "Signals, newest first", query_=shapes.SignalQuery, answers={200: shapes.SignalPage})
def list_signals(caller: Caller, query: shapes.SignalQuery) -> tuple[int, Any]:
    found = broker().signals.page(
        caller, standing_only=query.over == "false", before=before(query.cursor, "sig"), limit=query.limit
    )
    return 200, page(found, [shapes.of_signal(each) for each in found], query.limit)
