"""The question a policy answers, and its answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from broker.domain.audit import canonical_json
from broker.domain.catalogue import Resource
from broker.domain.identity import Principal

ALLOW, DENY, NEEDS_APPROVAL = "allow", "deny", "needs_approval"


def claimed_text(claimed: Mapping[str, Any]) -> dict[str, str]:
    """Claims as text: a string as it is, anything else as its JSON."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True, separators=(",", ":"))
        for name, value in claimed.items()
    }


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """What the broker knows of the task. `purpose` is its orchestrator's word: "" where the agent opened it itself."""

    id: str
    purpose: str
    age_s: int
    orchestrator: str
    labels: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Approved:
    """Who had said yes when it was decided, and for which groups: nobody, until what was approved is collected."""

    by: frozenset[str] = frozenset()
    groups: frozenset[str] = frozenset()


NOBODY = Approved()


@dataclass(frozen=True, kw_only=True)
class AccessRequest:
    """Everything a decision may look at. The broker's facts have names of their own, so a claim cannot shadow one.

    `chain` are the agents that handed it down, the root first. `user_attributes` is what the issuer of the user said of
    them, as far as the configuration lets it in.
    """

    agent: Principal
    resource: Resource
    scopes: frozenset[str]
    ttl_s: int
    task: TaskFacts
    intent: str | None
    sender_bound: bool
    claimed: Mapping[str, Any]
    now: datetime
    user: str | None = None
    user_attributes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    delegation_depth: int = 0
    chain: tuple[str, ...] = ()
    approved: Approved = NOBODY
    risk: str = "low"
    # Of this moment, and so no part of what was asked.
    live_grants: int = 0
    recent_denials: int = 0
    break_glass: str | None = None  # why; None where it is not asked for as one

    def sha256(self) -> str:
        """Of what was asked, not of the moment it was asked in: the same request hashes the same (INV-14)."""
        asked = {
            "agent": self.agent.name,
            "resource": self.resource.identifier,
            "scopes": sorted(self.scopes),
            "ttl_s": self.ttl_s,
            "task_id": self.task.id,
            "intent": self.intent,
            "sender_bound": self.sender_bound,
            "claimed": self.claimed_text(),
            "user": self.user,
            "delegation_depth": self.delegation_depth,
            # Only where there is one: what waits for people while a broker is brought up to date keeps its hash.
            **({} if self.break_glass is None else {"break_glass": self.break_glass}),
        }
        return hashlib.sha256(canonical_json(asked)).hexdigest()

    def claimed_text(self) -> dict[str, str]:
        return claimed_text(self.claimed)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """`policies` decided; `reasons` are sentences for the agent; `approvals` are (group, how many) still needed.

    `owners_in` are the groups of `approvals` in which somebody of the requester's own owner counts too, and
    `approve_within_s` is how long policy lets it wait. `refused_scopes` are those that had no allow, and `failure` what
    the engine could not do: for the log, since an agent can do nothing about it and is shown neither.
    """

    outcome: str
    policies: tuple[str, ...]
    policy_version: int
    reasons: tuple[str, ...] = ()
    max_ttl_s: int | None = None
    approvals: tuple[tuple[str, int], ...] = ()
    owners_in: frozenset[str] = frozenset()
    approve_within_s: int | None = None
    refused_scopes: tuple[str, ...] = ()
    failure: str | None = None

    def with_reasons(self, more: tuple[str, ...]) -> Decision:
        """The same decision, with sentences added to its reasons."""
        return replace(self, reasons=tuple(dict.fromkeys((*self.reasons, *more))))

    def as_json(self) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "outcome": self.outcome,
            "policies": list(self.policies),
            "policy_version": self.policy_version,
            "reasons": list(self.reasons),
        }
        if self.approvals:
            shown["approvals"] = [{"group": group, "quorum": quorum} for group, quorum in self.approvals]
        return shown
