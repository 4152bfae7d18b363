"""On what terms a request would be granted: who may ask for what, every ceiling, and policy's decision.

No transaction and no clock: what the store knows comes in as arguments, so that asking again means the same thing at
issue, at renewal and in a rehearsal.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from broker.domain.catalogue import Catalogue, Limits, Resource
from broker.domain.clock import epoch
from broker.domain.errors import Conflict, Forbidden, Invalid, RoleMissing, Unauthenticated
from broker.domain.grant import BREAK_GLASS_LIFE, Grant, GrantRequest
from broker.domain.identity import Principal, Role
from broker.domain.policy import NOBODY, AccessRequest, Approved, Decision, PolicySet, TaskFacts
from broker.domain.scope import effective_ttl, require_offered
from broker.domain.task import Task

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """`asked` is the canonical request that `decision` answers; `decided_by` names the ceiling that cut `ttl`.

    `ceilings` are all there were, policy's own among them.
    """

    ttl: timedelta
    decided_by: str
    requested: timedelta | None
    ceilings: Mapping[str, timedelta]
    asked: AccessRequest
    decision: Decision

    @property
    def allowed(self) -> bool:
        return self.decision.outcome == "allow"

    def as_json(self) -> dict[str, Any]:
        """What no other column of a grant tells of its decision, for whoever explains it or asks again."""
        said, attributes = self.asked.approved, {name: list(v) for name, v in self.asked.user_attributes.items()}
        return {
            "decided_at": epoch(self.asked.now),
            "requested_s": None if self.requested is None else int(self.requested.total_seconds()),
            "ceilings_s": {name: int(ceiling.total_seconds()) for name, ceiling in self.ceilings.items()},
            "ttl_s": self.asked.ttl_s,
            "delegation_depth": self.asked.delegation_depth,
            "risk": self.asked.risk,
            "live_grants": self.asked.live_grants,
            "recent_denials": self.asked.recent_denials,
            # Most requests have neither, and a row is as long as what it says.
            **({"user_attributes": attributes} if attributes else {}),
            **({"approved": {"by": sorted(said.by), "groups": sorted(said.groups)}} if said.by else {}),
        }


def user_of(request: GrantRequest, task: Task, parent: Grant | None) -> str | None:
    """On whose behalf: the parent's user, the task's, or the one whose token came with the request; never two."""
    bound = {name for name in (task.on_behalf_of, None if parent is None else parent.on_behalf_of) if name is not None}
    given = set() if request.user is None else {request.user.name}
    if parent is not None and parent.on_behalf_of is None and given:
        raise Forbidden(f"grant {parent.id} is on nobody's behalf: it is not handed down on that of a user")
    if len(bound | given) > 1:
        raise Forbidden("the task or the grant that is handed down is on behalf of another user")
    return next(iter(bound | given), None)


def attributes_of_user(request: GrantRequest, task: Task, parent: Grant | None) -> Mapping[str, Sequence[str]]:
    """What is known of that user: by the token that came with the request, or by the one that came before it."""
    if request.user is not None:
        return request.user.attributes
    if parent is not None and parent.on_behalf_of is not None:
        kept: Mapping[str, Sequence[str]] = (parent.terms or {}).get("user_attributes") or {}
        return kept
    return task.user_attributes or {}


def require_known_user(user: str | None, catalogue: Catalogue) -> None:
    """INV-17: who vouched for a user is configured still; what is called so since may speak of other people."""
    if user is not None and not is_known_user(user, catalogue):
        raise Forbidden(f"the issuer of {user!r} is not configured any more: nothing is given on that user's behalf")


def is_known_user(user: str, catalogue: Catalogue) -> bool:
    return user.partition(":")[0] in {issuer.name for issuer in catalogue.issuers if issuer.users}


def require_may_ask(principal: Principal, resource: Resource, scopes: frozenset[str], jkt: str | None) -> None:
    """What is asked of everybody before policy is: the role, scopes that are offered, a bound key where it must be."""
    if Role.AGENT not in principal.roles:
        raise RoleMissing(f"{principal.name} is not an agent: only a principal with that role gets credentials")
    require_offered(scopes, resource.offered, resource.identifier)
    if resource.require_dpop and jkt is None:
        raise Invalid(f"{resource.identifier} wants sender-bound tokens: send a DPoP proof (RFC 9449)", member="DPoP")


def terms(
    request: GrantRequest,
    *,
    principal: Principal,
    resource: Resource,
    task: Task,
    policies: PolicySet,
    limits: Limits,
    now: datetime,
    user: str | None = None,
    user_attributes: Mapping[str, Sequence[str]] | None = None,
    parent: Grant | None = None,
    approved: Approved = NOBODY,
    renewable_until: datetime | None = None,
    risk: str = "low",
    live_grants: int = 0,
    recent_denials: int = 0,
) -> Terms:
    """The minimum of all ceilings (INV-08), and what policy says to exactly that."""
    ceilings = {
        "resource": timedelta(seconds=resource.max_ttl_s),
        "broker": limits.max_ttl,
        "task": task.deadline_at - now,
        "proof": request.caller.proof_expires_at - now,
    }
    if request.ttl is None:
        ceilings["default"] = limits.default_ttl
    if parent is not None:
        ceilings["parent"] = parent.expires_at - now
    if request.user is not None:
        ceilings["user"] = request.user.expires_at - now
    if renewable_until is not None:
        ceilings["grant"] = renewable_until - now
    if request.break_glass is not None:
        ceilings["break_glass"] = BREAK_GLASS_LIFE
    ttl, decided_by = effective_ttl(request.ttl, ceilings)
    if ttl <= timedelta(0):
        # Within the leeway a workload token that just expired still names its bearer, and opens nothing.
        if decided_by == "proof":
            raise Unauthenticated("the workload token ends now")
        if decided_by == "user":
            raise Invalid("the user's token ends now: come back with a fresh one", member="on_behalf_of")
        raise Conflict(f"nothing is left to grant: the ceiling {decided_by!r} has been reached")
    asked = AccessRequest(
        agent=principal,
        resource=resource,
        scopes=request.scopes,
        ttl_s=int(ttl.total_seconds()),
        task=TaskFacts(
            id=task.id,
            # An implicit task has no purpose but the agent's own word, and that is no fact of ours.
            purpose="" if task.implicit else task.purpose,
            age_s=max(0, int((now - task.created_at).total_seconds())),
            orchestrator=task.orchestrator,
            labels=task.labels,
        ),
        intent=request.intent,
        sender_bound=request.jkt is not None,
        claimed=request.claimed,
        now=now,
        user=user,
        user_attributes=user_attributes or {},
        delegation_depth=0 if parent is None else len(parent.chain) + 1,
        chain=() if parent is None else (*parent.chain, parent.agent),
        approved=approved,
        risk=risk,
        live_grants=live_grants,
        recent_denials=recent_denials,
        break_glass=request.break_glass,
    )
    decision = policies.decide(asked)
    if decision.failure is not None:
        # A deny (INV-13), and a fault that somebody has to hear of.
        _log.error("policy failed", extra={"fields": {"failure": decision.failure, "agent": principal.name}})
    if decision.max_ttl_s is not None:
        ceilings["policy"] = timedelta(seconds=decision.max_ttl_s)
        if ceilings["policy"] < ttl:
            ttl, decided_by = ceilings["policy"], "policy"
    return Terms(
        ttl=ttl, decided_by=decided_by, requested=request.ttl, ceilings=ceilings, asked=asked, decision=decision
    )
