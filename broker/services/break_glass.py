"""A break-glass, loud at each step: its audit events, and what is said of each to people.

Every one carries the agent's reason, and is an alert; most are told by every channel there is (`broker.domain.audit`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import Row

from broker.domain.audit import Event
from broker.domain.errors import Forbidden, Invalid
from broker.domain.grant import BREAK_GLASS_LIFE, Grant, GrantRequest
from broker.domain.identity import Caller, new_id

SUMMARIES: Mapping[str, str] = {
    "break_glass.requested": "BREAK-GLASS: an agent asks for what only an emergency opens; people decide",
    "break_glass.voted": "BREAK-GLASS: somebody decided about what an agent asks for",
    "break_glass.approved": "BREAK-GLASS: enough people have approved it; its agent may collect the credential",
    "break_glass.collected": "BREAK-GLASS: the credential was handed out; a review is owed",
    "break_glass.ended": "BREAK-GLASS: it has ended",
    "review.overdue": "BREAK-GLASS: nobody has reviewed it in time",
    "review.completed": "BREAK-GLASS: it was reviewed",
}


def step(grant: Grant, caller: Caller, now: datetime, what: str, **facts: str | int) -> Event:
    """`facts` are ours: names and ids, since an alert shows them as our own words."""
    return Event(
        id=new_id("evt", now),
        at=now,
        type=f"break_glass.{what}",
        actor=caller.name,
        task_id=grant.task_id,
        grant_id=grant.id,
        agent=grant.agent,
        user=grant.on_behalf_of,
        resource=grant.resource,
        reason=grant.break_glass,
        policy_version=grant.policy_version,
        trace_id=caller.trace_id,
        data={"by": caller.name, "scopes": " ".join(grant.scopes), **facts},
    )


def ended(row: Row[Any], told: Event, state: str, now: datetime) -> Event:
    """Of a grant that moved into `state`, of which `told` is the event."""
    credential = "none was handed out" if row.issued_at is None else "was handed out"
    return replace(
        told,
        id=new_id("evt", now),
        type="break_glass.ended",
        outcome="ok",
        reason=row.break_glass,
        data={"by": told.actor, "state": state, "credential": credential},
    )


def require_narrow(request: GrantRequest) -> None:
    """What policy is not even asked about: a break-glass is for one agent, and for minutes."""
    if request.break_glass is None:
        return
    if request.parent_grant_id is not None:
        raise Invalid("a break-glass is nothing that is handed down: leave parent_grant_id out", member="break_glass")
    if request.hand_to:
        raise Invalid("a break-glass is not handed down: leave hand_to out", member="hand_to")
    if request.ttl is not None and request.ttl > BREAK_GLASS_LIFE:
        raise Invalid(
            f"a break-glass lives {int(BREAK_GLASS_LIFE.total_seconds())} s at most, and is not renewed", member="ttl_s"
        )


def require_no_break_glass(grant: Grant, verb: str) -> None:
    if grant.break_glass is not None:
        raise Forbidden(f"grant {grant.id} is a break-glass, which is not {verb}: ask again, and people decide again")
