"""What a configuration's policies are expected to say: the tests of `tests.toml`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from broker.domain.catalogue import Catalogue
from broker.domain.errors import BrokerError, ConfigurationError
from broker.domain.identity import Principal
from broker.domain.policy.decision import ALLOW, DENY, NEEDS_APPROVAL, AccessRequest, Approved, Decision, TaskFacts
from broker.domain.policy.engine import PolicySet

_MEMBERS: Mapping[str, type] = {
    "name": str,
    "agent": str,
    "resource": str,
    "scopes": list,
    "ttl_s": int,
    "purpose": str,
    "labels": dict,
    "intent": str,
    "sender_bound": bool,
    "break_glass": bool,
    "claimed": dict,
    "delegation_depth": int,
    "live_grants": int,
    "recent_denials": int,
    "delegation_chain": list,
    "user": str,
    "user_attributes": dict,
    "approved_by": list,
    "approved_groups": list,
    "time": datetime,
    "expect": str,
    "policies": list,
    "max_ttl_s": int,
}
_REQUIRED = ("agent", "resource", "scopes", "expect")
_NOUNS = {str: "text", list: "a list of text", int: "a whole number", dict: "a table", bool: "true or false"}
_NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class PolicyTest:
    """One expectation of `tests.toml`."""

    name: str
    request: AccessRequest
    expect: str
    policies: tuple[str, ...] | None = None
    max_ttl_s: int | None = None


@dataclass(frozen=True, kw_only=True)
class PolicyTestResult:
    name: str
    passed: bool
    decision: Decision
    wrong: str = ""


def read_tests(document: Mapping[str, Any], catalogue: Catalogue) -> list[PolicyTest]:
    """The tests of a parsed `tests.toml`; ConfigurationError names what is wrong with which."""
    problems: list[str] = []
    tests: list[PolicyTest] = []
    entries = document.get("tests", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigurationError(["tests is not a list of tables: write each test under [[tests]]"])
    for number, entry in enumerate(entries):
        name = str(entry.get("name", f"number {number + 1}"))
        try:
            tests.append(_read_test(name, entry, catalogue))
        except (BrokerError, ValueError) as problem:
            problems.append(f"test {name!r}: {problem}")
    if set(document) - {"tests"}:
        problems.append(f"unknown members: {', '.join(sorted(set(document) - {'tests'}))}; write [[tests]]")
    if problems:
        raise ConfigurationError(problems)
    return tests


def _read_test(name: str, entry: Mapping[str, Any], catalogue: Catalogue) -> PolicyTest:
    unknown = sorted(set(entry) - set(_MEMBERS))
    if unknown:
        raise ValueError(f"unknown member {unknown[0]!r}; there are {', '.join(sorted(_MEMBERS))}")
    for required in _REQUIRED:
        if required not in entry:
            raise ValueError(f"{required} is missing")
    for member, value in entry.items():
        # type, not isinstance: True is an int to Python, and no lifetime.
        if type(value) is not _MEMBERS[member] or not _holds_text(value):
            noun = _NOUNS.get(_MEMBERS[member], "a date and time with its zone, 2026-03-02T12:00:00Z")
            raise ValueError(f"{member} is not {noun}")
    if entry["expect"] not in (ALLOW, DENY, NEEDS_APPROVAL):
        raise ValueError(f"expect is {entry['expect']!r}: say {ALLOW}, {DENY} or {NEEDS_APPROVAL}")
    rule = next((rule for rule in catalogue.principals if rule.name == entry["agent"]), None)
    if rule is None:
        raise ValueError(f"there is no principal {entry['agent']!r}")
    agent = Principal(
        name=rule.name,
        kind=rule.kind,
        issuer=rule.issuer,
        subject=rule.subject or rule.subject_prefix or "",
        roles=frozenset(),
        owner=rule.owner,
        attributes=rule.attributes,
    )
    request = AccessRequest(
        agent=agent,
        resource=catalogue.resource(entry["resource"]),
        scopes=frozenset(entry["scopes"]),
        ttl_s=entry.get("ttl_s", 300),
        task=TaskFacts(
            id="task_test",
            purpose=entry.get("purpose", "a test"),
            age_s=0,
            orchestrator="test",
            labels=entry.get("labels", {}),
        ),
        intent=entry.get("intent"),
        sender_bound=entry.get("sender_bound", False),
        claimed=entry.get("claimed", {}),
        now=entry.get("time", _NOON).astimezone(UTC),
        delegation_depth=entry.get("delegation_depth", len(entry.get("delegation_chain", ()))),
        chain=tuple(entry.get("delegation_chain", ())),
        approved=Approved(
            by=frozenset(entry.get("approved_by", ())), groups=frozenset(entry.get("approved_groups", ()))
        ),
        user=entry.get("user"),
        live_grants=entry.get("live_grants", 0),
        recent_denials=entry.get("recent_denials", 0),
        user_attributes=_sets(entry.get("user_attributes", {})),
        break_glass="a test" if entry.get("break_glass") else None,
    )
    policies = entry.get("policies")
    return PolicyTest(
        name=name,
        request=request,
        expect=entry["expect"],
        policies=None if policies is None else tuple(sorted(policies)),
        max_ttl_s=entry.get("max_ttl_s"),
    )


def _sets(attributes: Mapping[str, Any]) -> Mapping[str, list[str]]:
    """What an issuer would say of a user: text, or a list of it."""
    found = {name: value if isinstance(value, list) else [value] for name, value in attributes.items()}
    for name, values in found.items():
        if not _holds_text(values):
            raise ValueError(f"user_attributes.{name} is neither text nor a list of text")
    return found


def _holds_text(value: object) -> bool:
    """False for a list or labels with anything but text in it, and for a time without a zone."""
    match value:
        case list():
            return all(isinstance(item, str) for item in value)
        case datetime():
            return value.tzinfo is not None
        case _:
            return True


def run_tests(policy_set: PolicySet, tests: Iterable[PolicyTest]) -> list[PolicyTestResult]:
    """Decide each test's request and compare."""
    results = []
    for test in tests:
        decision = policy_set.decide(test.request)
        wrong = []
        if decision.outcome != test.expect:
            wrong.append(f"expected {test.expect}, got {decision.outcome}: {' '.join(decision.reasons)}".rstrip(": "))
        if test.policies is not None and tuple(sorted(decision.policies)) != test.policies:
            wrong.append(f"expected policies {', '.join(test.policies)}, got {', '.join(decision.policies)}")
        if test.max_ttl_s is not None and decision.max_ttl_s != test.max_ttl_s:
            wrong.append(f"expected max_ttl_s {test.max_ttl_s}, got {decision.max_ttl_s}")
        results.append(PolicyTestResult(name=test.name, passed=not wrong, decision=decision, wrong="; ".join(wrong)))
    return results
