"""From the text of policy files to policies that were checked: their names, annotations, types and what they read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from typing import Any

import cedarpy

from broker.domain.catalogue import Catalogue, PrincipalRule
from broker.domain.grant import BREAK_GLASS_LIFE
from broker.domain.identity import Role
from broker.domain.policy.schema import complete_schema, one_line, quoted

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ANNOTATIONS = (
    "id", "approval", "quorum", "approve_within", "owner_may_approve", "break_glass", "max_ttl", "description",
)  # fmt: skip
_OF_APPROVAL = ("quorum", "approve_within", "owner_may_approve")
_MAX_TTL = 86_400
_BREAK_GLASS_S = int(BREAK_GLASS_LIFE.total_seconds())
_FEWEST_TO_BREAK = 2
_LONGEST_WAIT = 604_800
_LONGEST_CONDITION = 500
_STRING = re.compile(r'("(?:[^"\\]|\\.)*")')
_NEEDLESS = re.compile(r"(?<!\w)\(([\w.]+)\)")

_TOO_DEEP = 'is nested too deeply: say ["a", "b"].contains(…) for a long row of ||, or write several policies'

# From the context down to what a condition looks at: ("task", "purpose"). () is the context as a whole.
Path = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """One policy. `condition` is its when and unless as text, `reads` what they need of the context."""

    id: str
    file: str
    permits: bool
    body: Mapping[str, Any]
    approval: str | None
    quorum: int
    approve_within_s: int | None
    owner_may_approve: bool  # an identity of the same owner as the requester counts
    break_glass: bool  # decides only what is asked for as one
    max_ttl_s: int | None
    condition: str
    reads: frozenset[Path]

    @property
    def permits_everything(self) -> bool:
        """Whether it is a permit without a head, a condition, or people who are asked."""
        open_heads = all(self.body[part]["op"] in ("All", "is") for part in ("principal", "action", "resource"))
        conditions = (entry for entry in self.body["conditions"])
        return self.permits and open_heads and self.approval is None and all(map(_says_nothing, conditions))

    def concerns(self, agent: str, scope: str, resource: str) -> bool:
        """Whether its head may match; the engine decides whether it does."""
        return (
            _head_matches(self.body["principal"], "Agent", agent)
            and _head_matches(self.body["action"], "Action", scope)
            and _head_matches(self.body["resource"], "Resource", resource)
        )


def read_policies(catalogue: Catalogue, problems: list[str]) -> list[Policy]:
    """Every policy of the configuration; what is wrong is added to `problems`, with file, policy and remedy."""
    schema, known = complete_schema(catalogue, problems), _known_names(catalogue)
    policies: list[Policy] = []
    for file in sorted(catalogue.policies):
        policies += _read_file(file, catalogue.policies[file], schema, known, problems)
    seen: dict[str, str] = {}
    for policy in policies:
        if policy.id in seen:
            problems.append(
                f"{policy.file}: the @id {policy.id!r} is taken by a policy in {seen[policy.id]}: choose another"
            )
        seen[policy.id] = policy.file
    return policies


def unsatisfiable(policies: Iterable[Policy], catalogue: Catalogue) -> Iterator[str]:
    """Approvals that nobody could ever give: a group no approver is in, or fewer of them than the quorum."""
    approvers: dict[str, list[PrincipalRule]] = {}
    for rule in catalogue.principals:
        if Role.APPROVER in rule.roles:
            for group in rule.groups:
                approvers.setdefault(group, []).append(rule)
    for policy in policies:
        if policy.approval is None:
            continue
        if policy.break_glass:
            yield from _unbreakable(policy, catalogue)
            continue
        where = f"{policy.file}, policy {policy.id!r}"
        asked = approvers.get(policy.approval, [])
        if not asked:
            nearest = get_close_matches(policy.approval, approvers, 1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "give approvers this group, or name another"
            yield f"{where}: no principal with role approver has the group {policy.approval!r}: {hint}"
            continue
        found = len(list(islice(catalogue.different_people(asked), policy.quorum)))
        if found < policy.quorum:
            yield (
                f"{where}: wants {policy.quorum} of {policy.approval!r}, which has {found} different people: "
                "add approvers to it, or lower the quorum"
            )


def _unbreakable(policy: Policy, catalogue: Catalogue) -> Iterator[str]:
    """A break-glass that nobody could give in an emergency, or that would leave nobody to review it."""
    where = f"{policy.file}, policy {policy.id!r}"
    named = policy.body["principal"].get("entity")
    agent = None if named is None else catalogue.rule(named["id"])
    if agent is not None and agent.subject is None:
        yield f"{where}: {agent.name} is everybody below a subject_prefix: @break_glass is for one workload"
    owner = None if agent is None else agent.owner
    others = [rule for rule in catalogue.principals if not _speaks_for(rule, agent) and not _answers_to(rule, owner)]
    approvers = [rule for rule in others if Role.APPROVER in rule.roles and policy.approval in rule.groups]
    group = list(islice(catalogue.different_people(approvers), policy.quorum))
    if len(group) < policy.quorum:
        yield (
            f"{where}: wants {policy.quorum} people of {policy.approval!r} who neither ask nor own who asks, and there "
            f"are {len(group)}: add approvers to it, or lower the quorum"
        )
        return
    overseers = [rule for rule in others if {Role.ADMIN, Role.AUDITOR} & set(rule.roles)]
    apart = catalogue.different_people([*group, *approvers, *overseers])
    if len(list(islice(apart, policy.quorum + 1))) <= policy.quorum:
        yield (
            f"{where}: when {policy.quorum} of {policy.approval!r} have approved it, nobody is left who may review it: "
            "add an approver, an auditor or an admin who neither asks nor approves"
        )


def _speaks_for(rule: PrincipalRule, agent: PrincipalRule | None) -> bool:
    if agent is None:
        return False
    return rule is agent or rule.owner == agent.name or (rule.subject is not None and rule.subject == agent.subject)


def _answers_to(rule: PrincipalRule, owner: str | None) -> bool:
    return owner is not None and owner in (rule.name, rule.subject, rule.owner)


def _read_file(
    file: str, text: str, schema: str, known: Mapping[str, frozenset[str]], problems: list[str]
) -> list[Policy]:
    try:
        parsed = json.loads(cedarpy.policies_to_json_str(text))
    except ValueError as problem:
        problems.append(f"{file}: not Cedar: {one_line(problem)}")
        return []
    except RecursionError:
        problems.append(f"{file}: {_TOO_DEEP}")
        return []
    if parsed["templates"]:
        problems.append(f"{file}: has a template (?principal or ?resource): write the policy out")
    read = [_read_policy(file, number, body, problems) for number, body in enumerate(parsed["staticPolicies"].values())]
    names = dict(zip(parsed["staticPolicies"], (policy.id for policy in read), strict=True))
    unknown = False
    for policy in read:
        for sentence in _unknown_names(policy, known):
            unknown = True
            problems.append(f"{file}, policy {policy.id!r}: {sentence}")
    if parsed["staticPolicies"] and not unknown:
        problems += _schema_problems(file, text, schema, names)
    return read


def _schema_problems(file: str, text: str, schema: str, names: Mapping[str, str]) -> Iterator[str]:
    try:
        result = cedarpy.validate_policies(text, schema)
    except ValueError as problem:
        yield f"the schema cannot be read: {one_line(problem)}"
        return
    for error in result.errors:
        name = names.get(error.policy_id or "", "?")
        sentence = one_line(error.error).removeprefix(f"for policy `{error.policy_id}`, ")
        yield f"{file}, policy {name!r}: {sentence}"


def _read_policy(file: str, number: int, body: Mapping[str, Any], problems: list[str]) -> Policy:
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
    for name in _OF_APPROVAL:
        if name in annotations and "approval" not in annotations:
            problems.append(f"{where}: @{name} without @approval asks nobody: say who approves")
    if annotations.get("owner_may_approve", "true") != "true":
        # Anything else could be meant as no, and no is what it is without the annotation.
        problems.append(f'{where}: write @owner_may_approve("true"), or leave it out: then they may not')
    max_ttl_s = _count(annotations, "max_ttl", _MAX_TTL, where, problems)
    break_glass = "break_glass" in annotations
    if break_glass:
        problems += [f"{where}: {wrong}" for wrong in _too_wide_to_break(annotations, body, max_ttl_s)]
        max_ttl_s = min(max_ttl_s or _BREAK_GLASS_S, _BREAK_GLASS_S)
    if "max_ttl" in annotations and not permits:
        problems.append(f"{where}: @max_ttl on a forbid shortens nothing: put it on a permit")
    try:
        condition = _condition(body)
    except ValueError:
        # The engine parses a policy it was given as text and then cannot read it back: every decision would fail.
        problems.append(f"{where}: {_TOO_DEEP}")
        condition = ""
    return Policy(
        id=id_,
        file=file,
        permits=permits,
        body=body,
        approval=approval,
        quorum=_count(annotations, "quorum", 10, where, problems) or 1,
        approve_within_s=_count(annotations, "approve_within", _LONGEST_WAIT, where, problems),
        owner_may_approve=annotations.get("owner_may_approve") == "true",
        break_glass=break_glass,
        max_ttl_s=max_ttl_s,
        condition=condition,
        reads=frozenset(_reads(body["conditions"])),
    )


def _too_wide_to_break(
    annotations: Mapping[str, str | None], body: Mapping[str, Any], max_ttl_s: int | None
) -> Iterator[str]:
    """What keeps a policy from being a break-glass: it says beforehand who may do exactly what, and asks two people."""
    if annotations["break_glass"] != "true":
        # Anything else could be meant as no, and no is what it is without the annotation.
        yield 'write @break_glass("true"), or leave it out'
    if body["effect"] != "permit":
        yield "@break_glass on a forbid opens nothing: put it on a permit"
    for part, noun in (("principal", "agent"), ("resource", "resource")):
        if body[part]["op"] != "==":
            yield f'@break_glass names its one {noun}: {part} == {noun.capitalize()}::"…", and no wildcard'
    if body["action"]["op"] not in ("==", "in"):
        yield '@break_glass names its scopes: action == Action::"…" or action in [Action::"…", …], and no wildcard'
    if "approval" not in annotations or not re.fullmatch("[2-9]|10", annotations.get("quorum") or ""):
        yield f'@break_glass is given by {_FEWEST_TO_BREAK} people at least: @approval("group") @quorum("2")'
    if "owner_may_approve" in annotations:
        yield "@owner_may_approve has no place beside @break_glass: who owns the agent never counts there"
    if max_ttl_s is not None and max_ttl_s > _BREAK_GLASS_S:
        yield f"@break_glass lives {_BREAK_GLASS_S} s at most: lower @max_ttl, or leave it out"


def _count(
    annotations: Mapping[str, str | None], name: str, highest: int, where: str, problems: list[str]
) -> int | None:
    if name not in annotations:
        return None
    text = annotations[name] or ""
    if re.fullmatch(r"[1-9][0-9]{0,5}", text) and int(text) <= highest:
        return int(text)
    problems.append(f"{where}: @{name}({quoted(text)}) is not a whole number from 1 to {highest}")
    return None


def _known_names(catalogue: Catalogue) -> Mapping[str, frozenset[str]]:
    return {
        "Agent": catalogue.principal_names,
        "Resource": frozenset(resource.identifier for resource in catalogue.resources),
        "Action": frozenset(scope for resource in catalogue.resources for scope in resource.scopes),
        "UserAttribute": frozenset(name for issuer in catalogue.issuers for name in issuer.user_attributes),
    }


def _unknown_names(policy: Policy, known: Mapping[str, frozenset[str]]) -> Iterator[str]:
    """Agents, resources and scopes a policy names and the configuration does not: a typo must not grant or block.

    Nor an attribute of users: to the engine `has` one that no issuer says is false, and no mistake.
    """
    nouns = {"Agent": "agent", "Resource": "resource", "Action": "scope", "UserAttribute": "user attribute"}
    attributes = [
        ("UserAttribute", path[1]) for path in sorted(policy.reads) if path[:1] == ("user_attributes",) and path[1:]
    ]
    for kind, name in dict.fromkeys([*_named(policy.body), *attributes]):
        if kind in known and name not in known[kind]:
            nearest = get_close_matches(name, known[kind], 1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "add it to the configuration, or correct the policy"
            yield f"there is no {nouns[kind]} {name!r}: {hint}"


def _says_nothing(condition: Mapping[str, Any]) -> bool:
    """`when { true }` or `unless { false }`."""
    always = {"Value": condition.get("kind") == "when"}
    return bool(condition.get("body") == always)


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


def set_json(policies: Iterable[Policy]) -> str:
    """These policies in the engine's own JSON."""
    return _set_json({policy.id: policy.body for policy in policies})


def _set_json(bodies: Mapping[str, Mapping[str, Any]]) -> str:
    return json.dumps({"staticPolicies": bodies, "templates": {}, "templateLinks": []})


def _condition(body: Mapping[str, Any]) -> str:
    """Its when and unless as one line of Cedar, "" where it has none."""
    everything = {"op": "All"}
    headless = {
        "effect": "permit",
        "principal": everything,
        "action": everything,
        "resource": everything,
        "conditions": body["conditions"],
    }
    text = cedarpy.policies_from_json_str(_set_json({"it": headless}))
    plain = text.strip().removeprefix("permit(principal, action, resource)").removesuffix(";").strip()
    # The engine writes parentheses round every access; strings stay as they are.
    pieces = _STRING.split(plain)
    shown = "".join(piece if number % 2 else _without_needless(piece) for number, piece in enumerate(pieces))
    return shown if len(shown) <= _LONGEST_CONDITION else f"{shown[: _LONGEST_CONDITION - 1]}…"


def _without_needless(text: str) -> str:
    while (simpler := _NEEDLESS.sub(r"\1", text)) != text:
        text = simpler
    return text


def _reads(expression: Any) -> Iterator[Path]:
    """Every path into the context that an expression (Cedar's JSON) may look at."""
    if isinstance(expression, list):
        for item in expression:
            yield from _reads(item)
    elif isinstance(expression, Mapping):
        path = _context_path(expression)
        if path is not None:
            yield path
        else:
            for item in expression.values():
                yield from _reads(item)


def _context_path(expression: Mapping[str, Any]) -> Path | None:
    """The path of `context`, `context.a.b` or `context.a has b`; None for anything else."""
    if expression == {"Var": "context"}:
        return ()
    for operator in (".", "has"):
        access = expression.get(operator)
        if isinstance(access, Mapping) and isinstance(access.get("left"), Mapping) and "attr" in access:
            above = _context_path(access["left"])
            return None if above is None else (*above, access["attr"])
    return None
