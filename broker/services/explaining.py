"""The explained decision: why yes or why no, in a person's words, of a grant as its decision is on record.

Nothing is decided here. What the row does not keep comes from the configuration version that decided, which is a row
too; where that cannot be read, or gives another answer today, it is said and the record counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

from broker.domain.approval import in_quotes
from broker.domain.catalogue import unknown_zone
from broker.domain.errors import InvalidTarget, NotFound
from broker.domain.grant import Grant
from broker.domain.identity import Caller, is_id
from broker.domain.lifecycle import GrantState
from broker.domain.policy import (
    ALLOW,
    DENY,
    NEEDS_APPROVAL,
    AccessRequest,
    Decision,
    PolicySet,
    agent_facts,
    resource_facts,
)
from broker.domain.task import Task
from broker.services.asked import Kept, Version, Versions, asked, holder, kept_of
from broker.services.revocation import may_see
from broker.store.database import Database
from broker.store.grants import find_grant
from broker.store.tasks import find_task

_LONGEST_WORDS = 300

# What each ceiling is, for whoever wants more time.
_CEILINGS = {
    "request": "what was asked for",
    "default": "the broker's default, as no time was asked for",
    "resource": "max_ttl_s of the resource",
    "broker": "max_ttl_s of the broker",
    "task": "the end of the task",
    "proof": "the end of the workload token it was asked with",
    "parent": "the end of the grant it was handed down from",
    "user": "the end of the token of the user it is for",
    "approval": "what people left of it",
    "break_glass": "the longest that a break-glass lives",
    "grant": "the end of what this grant may be renewed to",
    "policy": "@max_ttl of the policy",
}


@dataclass(frozen=True, kw_only=True)
class DecidingPolicy:
    """A policy that decided. All but the id is None where its version cannot be read."""

    id: str
    file: str | None
    effect: str | None
    condition: str | None
    max_ttl_s: int | None


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """`in_words` is the whole of it, a sentence each; the rest is the same for programs.

    `missing` says what cannot be told, and why.
    """

    grant_id: str
    outcome: str
    policy_version: int | None
    decided_at: datetime
    in_words: tuple[str, ...]
    policies: tuple[DecidingPolicy, ...]
    reasons: tuple[str, ...]
    would_be_allowed: tuple[str, ...]
    ttl_s: int
    ttl_decided_by: str
    requested_s: int | None
    ceilings_s: Mapping[str, int] | None
    facts: Mapping[str, Any]
    looked_at: tuple[str, ...] | None
    missing: tuple[str, ...]


class Explaining:
    def __init__(self, *, database: Database, versions: Versions) -> None:
        self._database = database
        self._versions = versions

    def explain(self, caller: Caller, grant_id: str) -> Explanation:
        """Of any grant that came to a decision, denied ones too; NotFound for who may not see it (INV-28)."""
        with self._database.read() as db:
            grant = find_grant(db, grant_id) if is_id(grant_id, "grt") else None
            task = None if grant is None else find_task(db, grant.task_id)
        if grant is None or task is None or not may_see(caller, grant):
            raise NotFound(f"there is no grant {grant_id[:64]!r} that you may see")
        version = None if grant.policy_version is None else self._versions.at(grant.policy_version)
        return _explained(grant, task, version)


def _explained(grant: Grant, task: Task, version: Version | None) -> Explanation:
    found = kept_of(grant)
    question = _question(grant, task, found, version)
    policies = None if version is None else version.policies
    again = policies.decide(question) if policies is not None and question is not None else None
    agrees = again is not None and _agrees(again, grant)
    hints = policies.explain(question, again) if agrees and policies and question and again else ()
    outcome, reasons = str(grant.decision["outcome"]), tuple(map(str, grant.decision["reasons"]))
    deciding = tuple(_deciding(name, policies) for name in grant.decision["policies"])
    ceilings = dict(found.ceilings_s) if found.complete else None
    requested = {} if found.requested_s is None else {"request": found.requested_s}
    return Explanation(
        grant_id=grant.id,
        outcome=outcome,
        policy_version=grant.policy_version,
        decided_at=found.decided_at,
        in_words=(
            *_verdict(grant, outcome, deciding, reasons),
            *(_life(grant, requested | ceilings) if ceilings is not None and outcome == ALLOW else ()),
            *hints,
        ),
        policies=deciding,
        reasons=reasons,
        would_be_allowed=hints,
        ttl_s=grant.ttl_s,
        ttl_decided_by=grant.ttl_decided_by,
        requested_s=found.requested_s,
        ceilings_s=ceilings,
        facts=_facts(grant, task, found, question, version),
        looked_at=policies.looked_at(question) if policies is not None and question is not None else None,
        missing=tuple(_missing(grant, found, version, question, agrees=agrees)),
    )


def _question(grant: Grant, task: Task, found: Kept, version: Version | None) -> AccessRequest | None:
    """What was asked, as policy saw it; None where the configuration of then does not tell."""
    rule = None if version is None else version.catalogue.rule(grant.agent)
    if version is None or rule is None:
        return None
    try:
        resource = version.catalogue.resource(grant.resource)
    except InvalidTarget:
        return None
    return asked(
        grant, task, found, agent=holder(rule, grant.issuer, grant.subject, found.decided_at), resource=resource
    )


def _agrees(again: Decision, grant: Grant) -> bool:
    return again.outcome == grant.decision["outcome"] and set(again.policies) == set(grant.decision["policies"])


def _deciding(name: str, policies: PolicySet | None) -> DecidingPolicy:
    policy = None if policies is None else policies.policy(name)
    if policy is None:
        return DecidingPolicy(id=name, file=None, effect=None, condition=None, max_ttl_s=None)
    return DecidingPolicy(
        id=name,
        file=policy.file,
        effect="permit" if policy.permits else "forbid",
        condition=policy.condition or None,
        max_ttl_s=policy.max_ttl_s,
    )


def _verdict(grant: Grant, outcome: str, deciding: Sequence[DecidingPolicy], reasons: Sequence[str]) -> Iterator[str]:
    what = f"{', '.join(grant.scopes)} on {grant.resource}"
    by = f"by configuration version {grant.policy_version}"
    if outcome == ALLOW:
        yield f"{grant.agent} was allowed {what}, {by}"
        for policy in deciding:
            where = f" in {policy.file}" if policy.file else ""
            yield f"policy {policy.id!r}{where} permits it {policy.condition or 'without a condition'}"
        return
    if outcome == NEEDS_APPROVAL:
        yield f"{grant.agent} asked for {what}, and {_what_people_said(grant)}, {by}"
    else:
        yield f"{grant.agent} was denied {what}, {by}"
    yield from reasons
    if outcome == DENY and not deciding:
        yield "no policy forbids it: what no policy permits is denied"
    for policy in deciding:
        if outcome == DENY and policy.file:
            yield f"policy {policy.id!r} stands in {policy.file}"


def _what_people_said(grant: Grant) -> str:
    if grant.state is GrantState.PENDING:
        return "people have to approve it"
    if grant.issued_at is not None or grant.state is GrantState.APPROVED:
        return "people approved it"
    return f"people had to approve it and did not{f': {grant.reason}' if grant.reason else ''}"


def _life(grant: Grant, ceilings: Mapping[str, int]) -> Iterator[str]:
    """Which ceiling cut it, and how far away the others were."""
    decided = _CEILINGS.get(grant.ttl_decided_by, grant.ttl_decided_by)
    yield f"it lives {grant.ttl_s} s, which is {decided}"
    others = [
        f"{_CEILINGS.get(name, name)} {seconds} s"
        for name, seconds in sorted(ceilings.items(), key=_nearest)
        if name != grant.ttl_decided_by
    ]
    if others:
        yield f"what would have cut it next: {'; '.join(others)}"


def _nearest(ceiling: tuple[str, int]) -> tuple[int, str]:
    # By name where two are equally far, as a JSON object has no order.
    return ceiling[1], ceiling[0]


def _facts(
    grant: Grant, task: Task, found: Kept, question: AccessRequest | None, version: Version | None
) -> Mapping[str, Any]:
    """What was known when it was decided. `intent` and `claimed` are the agent's own words, vouched for by nobody."""
    agent: dict[str, Any] = {"name": grant.agent, "issuer": grant.issuer, "subject": grant.subject}
    resource: dict[str, Any] = {"identifier": grant.resource}
    if question is not None:
        agent |= agent_facts(question.agent)
        resource |= resource_facts(question.resource)
    return {
        "agent": agent,
        "resource": resource,
        "task": {
            "id": task.id,
            "purpose": "" if task.implicit else task.purpose,
            "age_s": max(0, int((found.decided_at - task.created_at).total_seconds())),
            "orchestrator": task.orchestrator,
            "labels": dict(task.labels),
        },
        "context": {
            "scopes": list(grant.scopes),
            "ttl_s": found.ttl_s,
            "sender_bound": grant.jkt is not None,
            "break_glass": grant.break_glass is not None,
            "user": grant.on_behalf_of,
            "user_attributes": {name: list(values) for name, values in found.user_attributes.items()},
            "delegation_depth": found.delegation_depth,
            "delegation_chain": list(grant.chain),
            "approved_by": sorted(found.approved.by),
            "risk": found.risk,
            "agent": {"live_grants": found.live_grants, "recent_denials": found.recent_denials},
            "time": {"hour": found.decided_at.hour, "weekday": found.decided_at.isoweekday()},
            "local": None if version is None else _local(found.decided_at, version.catalogue.time_zone),
        },
        "agents_words": {
            "intent": grant.intent or "",
            "claimed": dict(grant.claimed),
            "break_glass": in_quotes(grant.break_glass or "", _LONGEST_WORDS),
        },
    }


def _local(at: datetime, time_zone: str) -> Mapping[str, Any] | None:
    """The time of day there; None where this machine does not know the zone."""
    if any(unknown_zone(time_zone)):
        return None
    there = at.astimezone(ZoneInfo(time_zone))
    return {"zone": time_zone, "hour": there.hour, "minute": there.minute, "weekday": there.isoweekday()}


def _missing(
    grant: Grant, found: Kept, version: Version | None, question: AccessRequest | None, *, agrees: bool
) -> Iterator[str]:
    if not found.complete:
        yield "it was decided before the broker kept its ceilings: they are not known"
    elif found.live_grants is None:
        yield "it was decided before the broker kept what its agent held and was denied: it is not known"
    if version is None or question is None:
        yield "the configuration it was decided by does not tell of its agent and resource any more"
    elif version.policies is None:
        yield "this broker cannot read the policies it was decided by: what they say is not told"
    elif not agrees:
        yield "asked today, the same policies answer otherwise: what is on record counts"
    if question is not None and found.complete and question.sha256() != grant.request_sha256:
        # INV-14: the decision refers to one exact request, and this is not it.
        yield "the facts are not all that it was decided on: the hash of its request is another"
