"""Policy as code: one question, one answer, and the reasons (Cedar).

A policy set is parsed once and never changes. Anything but an explicit allow is a deny (INV-13): an error, a fact
that is missing, a policy that cannot be evaluated. What a caller sent is data to a policy and never a part of one
(INV-31): requests go to the engine as values, not as text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from difflib import get_close_matches
from typing import Any

import cedarpy

from broker.domain.audit import canonical_json
from broker.domain.catalogue import Catalogue, PrincipalRule, Resource
from broker.domain.errors import ConfigurationError
from broker.domain.identity import Principal

ALLOW, DENY, NEEDS_APPROVAL = "allow", "deny", "needs_approval"

# The types of every context. The actions, and what agents and resources are, come from the configuration.
BASE_SCHEMA = """\
// What a task was labelled with: context.task.labels.hasTag("team") && context.task.labels.getTag("team") == "crm"
entity Labels tags String;
// What the caller claims, as text. The broker vouches for none of it: use it to refuse, not to allow.
entity Claimed tags String;

type Task = { id: String, purpose: String, age_s: Long, orchestrator: String, labels: Labels };
type Time = { hour: Long, weekday: Long }; // UTC; Monday is 1

type Context = {
  task: Task,
  intent: String, // "" where the agent gave none
  ttl_s: Long,
  scopes: Set<String>, // everything this request asks for
  sender_bound: Bool,
  delegation_depth: Long,
  user?: String, // only on behalf of somebody
  risk: String,
  time: Time,
  claimed: Claimed,
};
"""

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ANNOTATIONS = ("id", "approval", "quorum", "max_ttl", "description")
_OWN_AGENT = ("owner", "issuer", "subject", "kind")
_OWN_RESOURCE = ("sensitivity", "environment", "provider")
_SLICES_KEPT = 4096
_MAX_TTL = 86_400
_NO_TAGS = "none"


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    id: str
    purpose: str
    age_s: int
    orchestrator: str
    labels: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class AccessRequest:
    """Everything a decision may look at. The broker's facts have names of their own, so a claim cannot shadow one."""

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
    delegation_depth: int = 0
    risk: str = "low"

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
            "claimed": _as_tags(self.claimed),
            "user": self.user,
            "delegation_depth": self.delegation_depth,
        }
        return hashlib.sha256(canonical_json(asked)).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Decision:
    """`policies` decided; `reasons` are sentences for the agent; `approvals` are (group, how many) still needed."""

    outcome: str
    policies: tuple[str, ...]
    policy_version: int
    reasons: tuple[str, ...] = ()
    max_ttl_s: int | None = None
    approvals: tuple[tuple[str, int], ...] = ()

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


@dataclass(frozen=True, kw_only=True)
class _Policy:
    id: str
    file: str
    permits: bool
    body: Mapping[str, Any]
    approval: str | None
    quorum: int
    max_ttl_s: int | None

    def concerns(self, agent: str, scope: str, resource: str) -> bool:
        """Whether its head may match; the engine decides whether it does."""
        return (
            _head_matches(self.body["principal"], "Agent", agent)
            and _head_matches(self.body["action"], "Action", scope)
            and _head_matches(self.body["resource"], "Resource", resource)
        )

    def condition(self) -> str:
        """Its when and unless as text, "" where it has none."""
        text = cedarpy.policies_from_json_str(_set_json([replace(self, body={**self.body, "annotations": {}})]))
        found = (
            text.partition(")")[2]
            if not self.body["conditions"]
            else text[text.index(" when ") :]
            if (" when " in text)
            else text[text.index(" unless ") :]
        )
        plain = found.strip().removesuffix(";").strip()
        while plain != (simpler := re.sub(r"(?<![\w])\(([\w.]+)\)", r"\1", plain)):
            plain = simpler
        return plain


@dataclass(frozen=True, kw_only=True)
class _Slice:
    """The policies that can concern one agent, scope and resource, parsed."""

    policies: tuple[_Policy, ...]
    plain: Any  # permits without @approval, and forbids
    asking: Any | None  # permits with @approval, and forbids


class PolicySet:
    """All policies of one configuration version."""

    def __init__(self, version: int, policies: Sequence[_Policy]) -> None:
        self.version = version
        self._policies = tuple(policies)
        self._by_id = {policy.id: policy for policy in policies}
        self._slices: dict[tuple[str, str, str], _Slice] = {}
        self._entities: dict[tuple[str, str, str], Any] = {}
        self._by_resource: dict[str | None, list[_Policy]] = {}
        for policy in policies:
            head = policy.body["resource"]
            named = head["entity"]["id"] if head["op"] == "==" else None
            self._by_resource.setdefault(named, []).append(policy)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self._by_id)

    @classmethod
    def compile(cls, catalogue: Catalogue) -> PolicySet:
        """Parse and check every policy; ConfigurationError names each problem with file, policy and remedy."""
        problems: list[str] = []
        schema = complete_schema(catalogue, problems)
        policies: list[_Policy] = []
        for file in sorted(catalogue.policies):
            policies += _read_file(file, catalogue.policies[file], schema, catalogue, problems)
        seen: dict[str, str] = {}
        for policy in policies:
            if policy.id in seen:
                problems.append(
                    f"{policy.file}: the @id {policy.id!r} is taken by a policy in {seen[policy.id]}: choose another"
                )
            seen[policy.id] = policy.file
        if problems:
            raise ConfigurationError(problems)
        return cls(catalogue.version, policies)

    def decide(self, request: AccessRequest) -> Decision:
        """Allow, deny, or ask people. Every scope has to be allowed; a forbid always wins."""
        try:
            return self._decide(request)
        except Exception:
            # INV-13: the engine could not be asked, so the answer is no. The agent can do nothing about it.
            return Decision(
                outcome=DENY,
                policies=(),
                policy_version=self.version,
                reasons=("the request could not be evaluated, and what is unknown is refused",),
            )

    def _decide(self, request: AccessRequest) -> Decision:
        entities, context = self._facts(request)
        decided: dict[str, None] = {}
        reasons: list[str] = []
        ceilings: list[int] = []
        approvals: dict[tuple[str, int], None] = {}
        denied = False
        for scope in sorted(request.scopes):
            outcome, ids, why = self._decide_scope(request, scope, entities, context)
            decided |= dict.fromkeys(ids)
            reasons += why
            if outcome == DENY:
                denied = True
            ceilings += [
                policy.max_ttl_s for policy in map(self._by_id.__getitem__, ids) if policy.max_ttl_s is not None
            ]
            if outcome == NEEDS_APPROVAL:
                # Any one of the permits is enough, so the one that asks the fewest people is the one to wait for.
                asking = min((self._by_id[id_] for id_ in ids), key=lambda policy: (policy.quorum, policy.id))
                approvals[(asking.approval or "", asking.quorum)] = None
        if denied:
            forbids = tuple(id_ for id_ in decided if not self._by_id[id_].permits)
            return Decision(
                outcome=DENY, policies=forbids, policy_version=self.version, reasons=tuple(dict.fromkeys(reasons))
            )
        return Decision(
            outcome=NEEDS_APPROVAL if approvals else ALLOW,
            policies=tuple(decided),
            policy_version=self.version,
            reasons=tuple(dict.fromkeys(reasons)),
            max_ttl_s=min(ceilings, default=None),
            approvals=tuple(approvals),
        )

    def _decide_scope(
        self, request: AccessRequest, scope: str, entities: Any, context: Mapping[str, Any]
    ) -> tuple[str, Sequence[str], Sequence[str]]:
        """(outcome, policies that decided, reasons) for one scope."""
        found = self._slice(request.agent.name, scope, request.resource.identifier)
        outcome, ids = self._ask(found, request, scope, entities, context)
        if outcome == ALLOW:
            return outcome, ids, ()
        if outcome == NEEDS_APPROVAL:
            asking = ", ".join(f"{self._by_id[id_].quorum} of {self._by_id[id_].approval!r}" for id_ in ids)
            return outcome, ids, (f"{scope} waits for people: {asking}",)
        return outcome, ids, self._why_not(found, request, scope, ids, entities, context)

    def _ask(
        self, found: _Slice, request: AccessRequest, scope: str, entities: Any, context: Mapping[str, Any]
    ) -> tuple[str, Sequence[str]]:
        asked = {
            "principal": {"type": "Agent", "id": request.agent.name},
            "action": {"type": "Action", "id": scope},
            "resource": {"type": "Resource", "id": request.resource.identifier},
            "context": context,
        }
        for outcome, policies in ((ALLOW, found.plain), (NEEDS_APPROVAL, found.asking)):
            if policies is None:
                continue
            answer = cedarpy.is_authorized(asked, policies, entities)
            if answer.diagnostics.errors:
                # Cedar skips a policy it cannot evaluate. A forbid that was skipped might have forbidden (INV-13).
                failed = [policy.id for policy in found.policies if _is_named(policy.id, answer.diagnostics.errors)]
                unevaluated = [id_ for id_ in failed if not self._by_id[id_].permits]
                if unevaluated or not failed:
                    return DENY, unevaluated
            if answer.allowed:
                return outcome, sorted(answer.diagnostics.reasons)
            if answer.diagnostics.reasons:
                return DENY, sorted(answer.diagnostics.reasons)
        return DENY, ()

    def _why_not(
        self,
        found: _Slice,
        request: AccessRequest,
        scope: str,
        forbids: Sequence[str],
        entities: Any,
        context: Mapping[str, Any],
    ) -> list[str]:
        """Which policy said no, or which would have said yes to something else. Names no policy of somebody else's."""
        resource = request.resource.identifier
        if forbids:
            return [
                f"policy {id_!r} forbids {scope} on {resource} {self._by_id[id_].condition()}".strip()
                for id_ in forbids
            ]
        near = [policy for policy in found.policies if policy.permits]
        if not near:
            return [f"no policy allows {scope} on {resource} to {request.agent.name}: ask for another scope"]
        reasons = [
            f"policy {policy.id!r} allows {scope} on {resource} only {policy.condition()}".rstrip() for policy in near
        ]
        return reasons + self._what_would_do(found, request, scope, entities, context)

    def _what_would_do(
        self, found: _Slice, request: AccessRequest, scope: str, entities: Any, context: Mapping[str, Any]
    ) -> list[str]:
        """The smallest change to the request that would be allowed, found by asking."""

        def allows(**changed: Any) -> bool:
            return self._ask(found, request, scope, entities, {**context, **changed})[0] != DENY

        bound = {"sender_bound": True}
        for changed, also in (({}, ""), (bound, " and a DPoP proof")):
            if changed and request.sender_bound:
                continue
            if changed and allows(**changed):
                return ["it would be allowed with a DPoP proof: bind the credential to a key (RFC 9449)"]
            if allows(**changed, ttl_s=1):
                low, high = 1, request.ttl_s
                while high - low > 1:
                    middle = (low + high) // 2
                    low, high = (middle, high) if allows(**changed, ttl_s=middle) else (low, middle)
                return [f"it would be allowed with ttl_s = {low}{also}: ask for at most that"]
        return []

    def _facts(self, request: AccessRequest) -> tuple[Any, dict[str, Any]]:
        labels, claimed = dict(request.task.labels), _as_tags(request.claimed)
        entities = self._known_entities(request)
        if labels or claimed:
            added = [_tags("Labels", "task", labels), _tags("Claimed", "caller", claimed)]
            entities = entities.with_added_json_str(json.dumps(added))
        context: dict[str, Any] = {
            "task": {
                "id": request.task.id,
                "purpose": request.task.purpose,
                "age_s": request.task.age_s,
                "orchestrator": request.task.orchestrator,
                "labels": _reference("Labels", "task" if labels or claimed else _NO_TAGS),
            },
            "intent": request.intent or "",
            "ttl_s": request.ttl_s,
            "scopes": sorted(request.scopes),
            "sender_bound": request.sender_bound,
            "delegation_depth": request.delegation_depth,
            "risk": request.risk,
            "time": {"hour": request.now.hour, "weekday": request.now.isoweekday()},
            "claimed": _reference("Claimed", "caller" if labels or claimed else _NO_TAGS),
        }
        if request.user is not None:
            context["user"] = request.user
        return entities, context

    def _known_entities(self, request: AccessRequest) -> Any:
        key = (request.agent.name, request.agent.subject, request.resource.identifier)
        known = self._entities.get(key)
        if known is None:
            if len(self._entities) >= _SLICES_KEPT:
                self._entities.clear()
            made = [
                {
                    "uid": {"type": "Agent", "id": request.agent.name},
                    "attrs": agent_facts(request.agent),
                    "parents": [],
                },
                {
                    "uid": {"type": "Resource", "id": request.resource.identifier},
                    "attrs": resource_facts(request.resource),
                    "parents": [],
                },
                _tags("Labels", _NO_TAGS, {}),
                _tags("Claimed", _NO_TAGS, {}),
            ]
            known = self._entities[key] = cedarpy.Entities.from_json_str(json.dumps(made))
        return known

    def _slice(self, agent: str, scope: str, resource: str) -> _Slice:
        key = (agent, scope, resource)
        found = self._slices.get(key)
        if found is None:
            if len(self._slices) >= _SLICES_KEPT:
                self._slices.clear()
            candidates = [*self._by_resource.get(resource, ()), *self._by_resource.get(None, ())]
            policies = tuple(policy for policy in candidates if policy.concerns(agent, scope, resource))
            asking = [policy for policy in policies if not policy.permits or policy.approval is not None]
            plain = [policy for policy in policies if policy.approval is None]
            found = self._slices[key] = _Slice(
                policies=policies,
                plain=_parsed(plain),
                asking=_parsed(asking) if any(policy.permits for policy in asking) else None,
            )
        return found


def agent_facts(agent: Principal) -> dict[str, Any]:
    """What a policy may know of an agent. Configuration may not name an attribute like one of ours."""
    facts: dict[str, Any] = {**agent.attributes, "issuer": agent.issuer, "subject": agent.subject, "kind": agent.kind}
    return facts if agent.owner is None else {**facts, "owner": agent.owner}


def resource_facts(resource: Resource) -> dict[str, Any]:
    return {
        **resource.attributes,
        "sensitivity": resource.sensitivity,
        "environment": resource.environment,
        "provider": resource.provider,
    }


def complete_schema(catalogue: Catalogue, problems: list[str]) -> str:
    """The schema of the policies directory, or ours, with the actions and attributes of this configuration."""
    agents = [
        ({"issuer": "", "subject": "", "kind": "", **_facts_of(rule)}, rule.name) for rule in catalogue.principals
    ]
    resources = [(resource_facts(resource), resource.identifier) for resource in catalogue.resources]
    scopes = sorted({scope for resource in catalogue.resources for scope in resource.scopes})
    text = catalogue.schema or BASE_SCHEMA
    text += f"\nentity Agent = {_record(agents, problems)};\nentity Resource = {_record(resources, problems)};\n"
    if scopes:
        names = ", ".join(map(_quoted, scopes))
        text += f"action {names} appliesTo {{ principal: [Agent], resource: [Resource], context: Context }};\n"
    return text


def _facts_of(rule: PrincipalRule) -> dict[str, Any]:
    return dict(rule.attributes) | ({} if rule.owner is None else {"owner": rule.owner})


def _record(things: Sequence[tuple[Mapping[str, Any], str]], problems: list[str]) -> str:
    """A record type of all their attributes; one that some lack is optional."""
    types: dict[str, tuple[str, str]] = {}
    for facts, thing in things:
        for name, value in facts.items():
            kind = "Bool" if isinstance(value, bool) else "Long" if isinstance(value, int) else "String"
            first, example = types.setdefault(name, (kind, thing))
            if first != kind:
                problems.append(
                    f"attribute {name!r} is a {first} on {example!r} and a {kind} on {thing!r}: make them alike"
                )
    members = []
    for name, (kind, _) in sorted(types.items()):
        optional = "" if all(name in facts for facts, _ in things) else "?"
        members.append(f"{_quoted(name)}{optional}: {kind}")
    return "{ " + ", ".join(members) + " }"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _read_file(file: str, text: str, schema: str, catalogue: Catalogue, problems: list[str]) -> list[_Policy]:
    try:
        parsed = json.loads(cedarpy.policies_to_json_str(text))
    except ValueError as problem:
        problems.append(f"{file}: not Cedar: {_one_line(problem)}")
        return []
    if parsed["templates"]:
        problems.append(f"{file}: has a template (?principal or ?resource): write the policy out")
    read = [_read_policy(file, number, body, problems) for number, body in enumerate(parsed["staticPolicies"].values())]
    names = dict(zip(parsed["staticPolicies"], (policy.id for policy in read), strict=True))
    unknown = False
    for policy in read:
        for sentence in _unknown_names(policy, catalogue):
            unknown = True
            problems.append(f"{file}, policy {policy.id!r}: {sentence}")
    if parsed["staticPolicies"] and not unknown:
        problems += _schema_problems(file, text, schema, names)
    return read


def _schema_problems(file: str, text: str, schema: str, names: Mapping[str, str]) -> Iterator[str]:
    try:
        result = cedarpy.validate_policies(text, schema)
    except ValueError as problem:
        yield f"the schema cannot be read: {_one_line(problem)}"
        return
    for error in result.errors:
        name = names.get(error.policy_id or "", "?")
        sentence = _one_line(error.error).removeprefix(f"for policy `{error.policy_id}`, ")
        yield f"{file}, policy {name!r}: {sentence}"


def _read_policy(file: str, number: int, body: Mapping[str, Any], problems: list[str]) -> _Policy:
    annotations: Mapping[str, str | None] = body.get("annotations", {})
    id_ = annotations.get("id") or ""
    where = f"{file}, policy {id_!r}" if id_ else f"{file}, policy number {number + 1}"
    if not id_:
        problems.append(f'{where}: has no @id: put @id("a-name") above it, for decisions to name it')
    elif not _ID.fullmatch(id_):
        problems.append(f"{where}: an @id is one to 64 letters, digits, dots, dashes and underscores")
    for name in annotations:
        if name not in _ANNOTATIONS:
            nearest = get_close_matches(name, _ANNOTATIONS, 1)
            hint = (
                f"did you mean @{nearest[0]}?"
                if nearest
                else f"there are {', '.join('@' + known for known in _ANNOTATIONS)}"
            )
            problems.append(f"{where}: @{name} means nothing here: {hint}")
    permits = body["effect"] == "permit"
    approval = annotations.get("approval")
    if "approval" in annotations and (not approval or not permits):
        problems.append(f'{where}: @approval names the group that is asked, on a permit: @approval("security")')
    if "quorum" in annotations and "approval" not in annotations:
        problems.append(f"{where}: @quorum without @approval asks nobody: say who approves")
    if "max_ttl" in annotations and not permits:
        problems.append(f"{where}: @max_ttl on a forbid shortens nothing: put it on a permit")
    return _Policy(
        id=id_,
        file=file,
        permits=permits,
        body=body,
        approval=approval,
        quorum=_count(annotations, "quorum", 10, where, problems) or 1,
        max_ttl_s=_count(annotations, "max_ttl", _MAX_TTL, where, problems),
    )


def _count(
    annotations: Mapping[str, str | None], name: str, highest: int, where: str, problems: list[str]
) -> int | None:
    if name not in annotations:
        return None
    text = annotations[name] or ""
    if re.fullmatch(r"[1-9][0-9]{0,5}", text) and int(text) <= highest:
        return int(text)
    problems.append(f"{where}: @{name}({_quoted(text)}) is not a whole number from 1 to {highest}")
    return None


def _unknown_names(policy: _Policy, catalogue: Catalogue) -> Iterator[str]:
    """Agents, resources and scopes a policy names and the configuration does not: a typo must not grant or block."""
    known = {
        "Agent": catalogue.principal_names,
        "Resource": frozenset(resource.identifier for resource in catalogue.resources),
        "Action": frozenset(scope for resource in catalogue.resources for scope in resource.scopes),
    }
    nouns = {"Agent": "agent", "Resource": "resource", "Action": "scope"}
    for kind, name in dict.fromkeys(_named(policy.body)):
        if kind in known and name not in known[kind]:
            nearest = get_close_matches(name, known[kind], 1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "add it to the configuration, or correct the policy"
            yield f"there is no {nouns[kind]} {name!r}: {hint}"


def _named(value: Any) -> Iterator[tuple[str, str]]:
    """Every entity in a policy's JSON, in its head or in its conditions."""
    if isinstance(value, Mapping):
        if set(value) == {"type", "id"} and isinstance(value["type"], str) and isinstance(value["id"], str):
            yield value["type"], value["id"]
        for item in value.values():
            yield from _named(item)
    elif isinstance(value, list):
        for item in value:
            yield from _named(item)


def _head_matches(head: Mapping[str, Any], kind: str, name: str) -> bool:
    wanted = {"type": kind, "id": name}
    match head["op"]:
        case "==":
            return bool(head["entity"] == wanted)
        case "in":
            # Nothing has parents here, so "in" is "is one of".
            return wanted in head.get("entities", [head.get("entity")])
        case _:
            return True


def _set_json(policies: Iterable[_Policy]) -> str:
    return json.dumps(
        {"staticPolicies": {policy.id: policy.body for policy in policies}, "templates": {}, "templateLinks": []}
    )


def _parsed(policies: Iterable[_Policy]) -> Any:
    return cedarpy.PolicySet.from_json_str(_set_json(policies))


def _is_named(policy_id: str, errors: Iterable[Any]) -> bool:
    return any(f"`{policy_id}`" in str(error) for error in errors)


def _reference(kind: str, name: str) -> dict[str, Any]:
    return {"__entity": {"type": kind, "id": name}}


def _tags(kind: str, name: str, tags: Mapping[str, str]) -> dict[str, Any]:
    return {"uid": {"type": kind, "id": name}, "attrs": {}, "parents": [], "tags": dict(tags)}


def _as_tags(claimed: Mapping[str, Any]) -> dict[str, str]:
    """Claims as text: a string as it is, anything else as its JSON."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True, separators=(",", ":"))
        for name, value in claimed.items()
    }


def _one_line(problem: object) -> str:
    return " ".join(str(problem).split())[:300]


_TEST_MEMBERS = {
    "name", "agent", "resource", "scopes", "ttl_s", "purpose", "labels", "intent", "sender_bound", "claimed",
    "time", "expect", "policies", "max_ttl_s",
}  # fmt: skip


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
    wrong: str = field(default="")


def read_tests(document: Mapping[str, Any], catalogue: Catalogue) -> list[PolicyTest]:
    """The tests of a parsed `tests.toml`; ConfigurationError names what is wrong with which."""
    problems: list[str] = []
    tests: list[PolicyTest] = []
    for number, entry in enumerate(document.get("tests", [])):
        name = str(entry.get("name", f"number {number + 1}"))
        try:
            tests.append(_read_test(name, entry, catalogue))
        except (KeyError, TypeError, ValueError, LookupError) as problem:
            problems.append(f"test {name!r}: {problem}")
        except Exception as problem:
            problems.append(f"test {name!r}: {problem}")
    if set(document) - {"tests"}:
        problems.append(f"unknown members: {', '.join(sorted(set(document) - {'tests'}))}; write [[tests]]")
    if problems:
        raise ConfigurationError(problems)
    return tests


def _read_test(name: str, entry: Mapping[str, Any], catalogue: Catalogue) -> PolicyTest:
    unknown = sorted(set(entry) - _TEST_MEMBERS)
    if unknown:
        raise ValueError(f"unknown member {unknown[0]!r}; there are {', '.join(sorted(_TEST_MEMBERS))}")
    for required in ("agent", "resource", "scopes", "expect"):
        if required not in entry:
            raise ValueError(f"{required} is missing")
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
        ttl_s=int(entry.get("ttl_s", 300)),
        task=TaskFacts(
            id="task_test",
            purpose=str(entry.get("purpose", "a test")),
            age_s=0,
            orchestrator="test",
            labels=dict(entry.get("labels", {})),
        ),
        intent=entry.get("intent"),
        sender_bound=bool(entry.get("sender_bound", False)),
        claimed=dict(entry.get("claimed", {})),
        now=entry.get("time") or datetime.fromisoformat("2026-03-02T12:00:00+00:00"),
    )
    policies = entry.get("policies")
    return PolicyTest(
        name=name,
        request=request,
        expect=entry["expect"],
        policies=None if policies is None else tuple(sorted(policies)),
        max_ttl_s=entry.get("max_ttl_s"),
    )


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
