"""One decision among a thousand policies: the engine itself, without a store and without a server.

Every policy was checked against the schema and is one that somebody could have written: half of them permits of one
agent, the rest for many, with conditions on facts of every kind. A decision sees those that can concern it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

from broker.domain.catalogue import Catalogue, PrincipalRule, Resource, TrustedIssuer
from broker.domain.clock import from_epoch
from broker.domain.identity import WorkloadIdentity
from broker.domain.policy import AccessRequest, PolicySet, TaskFacts

POLICIES = 1_000
_AGENTS = 500
_RESOURCES = 50
_FORBIDS = 100
_ROUNDS = 40
_NOON = from_epoch(1_772_452_800)


@dataclass(frozen=True, kw_only=True)
class Decided:
    """Microseconds of one decision: of those that were measured, and of the first of each slice, which cuts it."""

    decisions: int
    policies: int
    seen: float
    median_us: float
    p99_us: float
    first_us: float

    @property
    def told(self) -> str:
        return (
            f"{self.median_us:8.1f} µs median, {self.p99_us:.1f} µs p99 of {self.decisions:,}, "
            f"which see {self.seen:.1f} of {self.policies:,}; the first of a slice {self.first_us:,.0f} µs"
        )


def measure() -> Decided:
    catalogue = _catalogue()
    policies = PolicySet.compile(catalogue)
    requests = list(_requests(catalogue))
    first = [_timed(policies, request) for request in requests]
    took = [_timed(policies, request) for _ in range(_ROUNDS) for request in requests]
    seen = [
        len(policies._slice_of((request.agent.name, scope, request.resource.identifier)).policies)
        for request in requests
        for scope in request.scopes
    ]
    return Decided(
        decisions=len(took),
        policies=len(policies.ids),
        seen=statistics.mean(seen),
        median_us=statistics.median(took),
        p99_us=statistics.quantiles(took, n=100)[98],
        first_us=statistics.median(first),
    )


def _timed(policies: PolicySet, request: AccessRequest) -> float:
    started = time.perf_counter_ns()
    decision = policies.decide(request)
    took = (time.perf_counter_ns() - started) / 1_000
    if decision.outcome != "allow":
        raise SystemExit(f"{request.agent.name} was not allowed: {' '.join(decision.reasons)}")
    return took


def _resource(number: int) -> str:
    return f"https://service-{number % _RESOURCES}.example/api"


def _catalogue() -> Catalogue:
    people = TrustedIssuer(
        name="people",
        issuer="https://people.example",
        key_source="discovery",
        users=True,
        user_attributes={"groups": "groups"},
    )
    return Catalogue(
        issuers=(people,),
        principals=tuple(
            PrincipalRule(name=f"agent-{number}", kind="agent", issuer="dev", subject=f"dev:agent-{number}")
            for number in range(_AGENTS)
        ),
        resources=tuple(
            Resource(identifier=_resource(number), scopes=("read", "write"), destination={"region": "eu-1"})
            for number in range(_RESOURCES)
        ),
        policies={"bench.cedar": "\n".join(_texts())},
        time_zone="Europe/Berlin",
    )


def _texts() -> Iterator[str]:
    for number in range(_AGENTS):
        who, where = f'principal == Agent::"agent-{number}"', f'resource == Resource::"{_resource(number)}"'
        yield f'@id("read-{number}") permit ({who}, action == Action::"read", {where}) when {{ context.ttl_s <= 600 }};'
    for number in range(POLICIES - _AGENTS - _FORBIDS - 4):
        who, where = f'principal == Agent::"agent-{number}"', f'resource == Resource::"{_resource(number)}"'
        bound = "when { context.sender_bound }"
        yield f'@id("write-{number}") permit ({who}, action == Action::"write", {where}) {bound};'
    for number in range(_FORBIDS):
        where = f'resource == Resource::"{_resource(number)}"'
        hours = f"context.local.hour < {number % 5} && context.local.weekday > 5"
        yield f'@id("night-{number}") forbid (principal, action, {where}) when {{ {hours} }};'
    yield '@id("at-risk") forbid (principal, action, resource) when { context.risk == "critical" };'
    yield '@id("deep") forbid (principal, action, resource) when { context.delegation_depth > 3 };'
    yield '@id("abroad") forbid (principal, action, resource) unless { resource.destination.region like "eu-*" };'
    yield (
        '@id("no-guests") forbid (principal, action, resource) when { context has user_attributes && '
        'context.user_attributes has groups && context.user_attributes.groups.contains("guests") };'
    )


def _requests(catalogue: Catalogue) -> Iterator[AccessRequest]:
    for number, rule in enumerate(catalogue.principals):
        identity = WorkloadIdentity(
            issuer=rule.issuer, subject=rule.subject or "", claims={}, expires_at=_NOON + timedelta(hours=1)
        )
        yield AccessRequest(
            agent=rule.principal(identity),
            resource=catalogue.resource(_resource(number)),
            scopes=frozenset({"read"}),
            ttl_s=300,
            task=TaskFacts(id=f"task_{number}", purpose="leads", age_s=number, orchestrator="pipeline", labels={}),
            intent="prepare the Monday call",
            sender_bound=False,
            claimed={},
            now=_NOON,
            user="people:alice",
            user_attributes={"groups": ("sales",)},
        )
