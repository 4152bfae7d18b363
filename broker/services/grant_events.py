"""The audit events of a grant that is made, in the words of its decision; and of one that is asked for once more."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from broker.domain.audit import Event
from broker.domain.errors import BrokerError, PolicyDenied
from broker.domain.grant import Grant
from broker.domain.identity import Caller, new_id
from broker.domain.lifecycle import GrantState


def sentence(decision: Mapping[str, object]) -> str:
    """Why, as the decision on a grant tells it."""
    reasons = decision.get("reasons")
    return " ".join(map(str, reasons)) if isinstance(reasons, list) and reasons else "no policy allows this"


def grant_event(grant: Grant, caller: Caller, now: datetime, type_: str, **facts: Any) -> Event:
    """`facts` are more of what is told about it; none of it may be secret (INV-30)."""
    allowed = grant.state is not GrantState.DENIED
    return Event(
        id=new_id("evt", now),
        at=now,
        type=type_,
        actor=caller.name,
        outcome="ok" if allowed else "denied",
        task_id=grant.task_id,
        grant_id=grant.id,
        agent=grant.agent,
        user=grant.on_behalf_of,
        resource=grant.resource,
        reason=None if allowed else sentence(grant.decision)[:1000],
        policy_version=grant.policy_version,
        trace_id=caller.trace_id,
        data={
            "issuer": grant.issuer,
            "subject": grant.subject,
            "scopes": list(grant.scopes),
            "ttl_s": grant.ttl_s,
            "policies": list(grant.policies),
            "intent": grant.intent,
            "jti": grant.jti,
            "request_sha256": grant.request_sha256,
            **({} if grant.parent_grant_id is None else {"parent_grant_id": grant.parent_grant_id}),
            **({"chain": list(grant.chain)} if grant.chain else {}),
            **facts,
        },
    )


def refused_again(
    grant: Grant | None, caller: Caller, now: datetime, refusal: BrokerError, type_: str, **data: str
) -> Event:
    """Of asking once more for a grant that there is, or that there is none of: renewing it, collecting it."""
    known = (
        {}
        if grant is None
        else {
            "task_id": grant.task_id,
            "grant_id": grant.id,
            "user": grant.on_behalf_of,
            "resource": grant.resource,
            "policy_version": grant.policy_version,
        }
    )
    return Event(
        id=new_id("evt", now),
        at=now,
        type=type_,
        actor=caller.name,
        # Not whose grant it is: it is a denial of who asked, and nobody is locked down by another's.
        agent=caller.name,
        outcome="denied" if isinstance(refusal, PolicyDenied) else refusal.code,
        reason=refusal.detail[:1000],
        trace_id=caller.trace_id,
        data={**data, "subject": caller.principal.subject},
        **known,  # type: ignore[arg-type]
    )
