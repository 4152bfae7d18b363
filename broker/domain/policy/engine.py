"""The engine behind a policy set: which policies can concern a request, what they say, and what they would say.

Deciding happens inside the transaction that issues, so it asks the engine once or twice for each scope and no more.
Searching for a request that would be allowed is another question, for after the commit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Any
from zoneinfo import ZoneInfo

import cedarpy

from broker.domain.catalogue import UTC, Catalogue, unknown_zone
from broker.domain.errors import ConfigurationError
from broker.domain.policy.decision import ALLOW, DENY, NEEDS_APPROVAL, AccessRequest, Decision
from broker.domain.policy.reading import Path, Policy, read_policies, set_json, unsatisfiable
from broker.domain.policy.schema import agent_facts, one_line, resource_facts

_SLICES_KEPT = 4096
_NO_TAGS = "none"
_text = json.encoder.encode_basestring_ascii

# What of a request one member of the context tells, as JSON.
_Telling = Callable[[AccessRequest], str | None]
_MOST_REASONS = 20
_SCOPES_EXPLAINED = 3
_MOST_EVALUATIONS = 32


@dataclass(frozen=True, kw_only=True)
class _Slice:
    """The policies that can concern some agent, scope and resource, parsed, and what they read of a context."""

    policies: tuple[Policy, ...]
    plain: Any  # permits without @approval, and forbids
    asking: Any | None  # permits with @approval, and forbids
    glass: Any | None  # permits with @break_glass, and forbids: all that decides a break-glass
    reads: frozenset[Path]
    told: tuple[tuple[str, _Telling], ...]  # members of the context, and what of a request each tells
    tagged: bool  # labels or claims are among them

    def may_read(self, *path: str) -> bool:
        """Whether what is at this path can change the answer."""
        return _touches(self.reads, path)


@dataclass(frozen=True, kw_only=True)
class _Verdict:
    """What the engine said to one scope; `failures` are the policies it could not evaluate, in its words."""

    outcome: str
    policies: Sequence[str] = ()
    unevaluated: Sequence[str] = ()
    failures: Sequence[str] = ()


class PolicySet:
    """All policies of one configuration version."""

    def __init__(self, version: int, policies: Sequence[Policy], time_zone: str = UTC) -> None:
        self.version = version
        self.time_zone = time_zone
        self._by_id = {policy.id: policy for policy in policies}
        self._slices: dict[tuple[str, str, str], _Slice] = {}
        self._slices_by_policies: dict[tuple[str, ...], _Slice] = {}
        self._entities: dict[tuple[str, str, str], Any] = {}
        self._by_resource: dict[str | None, list[Policy]] = {}
        for policy in policies:
            head = policy.body["resource"]
            named = head["entity"]["id"] if head["op"] == "==" else None
            self._by_resource.setdefault(named, []).append(policy)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self._by_id)

    def policy(self, id_: str) -> Policy | None:
        """The policy of this name, to be told of."""
        return self._by_id.get(id_)

    def looked_at(self, request: AccessRequest) -> tuple[str, ...]:
        """What of the context the policies that can concern a request read, as they spell it."""
        reads = {path for scope in request.scopes for path in self._slice(request, scope).reads}
        return tuple(sorted(".".join(("context", *path)) for path in reads))

    @classmethod
    def compile(cls, catalogue: Catalogue, *, applied: bool = False) -> PolicySet:
        """Parse and check every policy; ConfigurationError names each problem with file, policy and remedy.

        `applied`: it is in force already. An approval nobody can give is refused where it would come into force, and
        where it did, it is one that nobody gives: no reason to answer nothing at all. Nor is a time zone that is not
        known on this machine: what looks at it is refused (INV-13).
        """
        problems: list[str] = []
        policies = read_policies(catalogue, problems)
        if not applied:
            problems += unsatisfiable(policies, catalogue)
            problems += unknown_zone(catalogue.time_zone)
        if problems:
            raise ConfigurationError(problems)
        return cls(catalogue.version, policies, catalogue.time_zone)

    def unfit(self) -> list[str]:
        """Why these policies must not come into force, though they can be read: nobody means what they say."""
        problems = [
            f"{policy.file}, policy {policy.id!r}: permits everything to everybody: name an agent, a scope or a "
            "resource, or write a condition"
            for policy in self._by_id.values()
            if policy.permits_everything
        ]
        return problems if self._by_id else ["there is no policy: everything would be denied, and every live grant end"]

    def decide(self, request: AccessRequest) -> Decision:
        """Allow, deny, or ask people. Every scope has to be allowed; a forbid always wins."""
        try:
            return self._decide(request)
        except Exception as problem:
            # INV-13: the engine could not be asked, so the answer is no. The agent can do nothing about it.
            return Decision(
                outcome=DENY,
                policies=(),
                policy_version=self.version,
                reasons=("the request could not be evaluated, and what is unknown is refused",),
                failure=one_line(f"{type(problem).__name__}: {problem}"),
            )

    def explain(self, request: AccessRequest, decision: Decision) -> tuple[str, ...]:
        """What would be allowed instead of a denied request, found by asking: at most 32 times, for a few scopes."""
        if not decision.refused_scopes:
            return ()
        sentences: list[str] = []
        left = _MOST_EVALUATIONS
        entities = _Entities(request, self._known_entities(request))
        for scope in decision.refused_scopes[:_SCOPES_EXPLAINED]:
            search = _Search(self, request, scope, entities, left)
            sentence = search.what_would_do()
            left = search.left
            if sentence is not None:
                subject = "it" if len(request.scopes) == 1 else f"{scope} on {request.resource.identifier}"
                sentences.append(f"{subject} {sentence}")
        return tuple(sentences)

    def facts_read(self, agent: str, scopes: Iterable[str], resource: str) -> frozenset[Path]:
        """The facts of context that can change what is said to such a request: two alike in them are decided alike."""
        slices = [self._slice_of((agent, scope, resource)) for scope in scopes]
        return frozenset(path for path in _LEAVES if any(found.may_read(*path) for found in slices))

    @cached_property
    def facts_read_by_any(self) -> frozenset[Path]:
        """The same of whatever request: those that no policy looks at decide nothing."""
        reads = {path for policy in self._by_id.values() for path in policy.reads}
        return frozenset(path for path in _LEAVES if _touches(reads, path))

    def _decide(self, request: AccessRequest) -> Decision:
        entities = _Entities(request, self._known_entities(request))
        decided: dict[str, None] = {}
        reasons: dict[str, None] = {}
        failures: dict[str, None] = {}
        ceilings: list[int] = []
        approvals: dict[tuple[str, int], None] = {}
        asking_people: list[Policy] = []
        refused: list[str] = []
        for scope in sorted(request.scopes):
            found = self._slice(request, scope)
            verdict = self._ask(found, request, scope, entities)
            policies = [self._by_id[id_] for id_ in verdict.policies]
            decided |= dict.fromkeys(verdict.policies)
            failures |= dict.fromkeys(verdict.failures)
            ceilings += [policy.max_ttl_s for policy in policies if policy.max_ttl_s is not None]
            if verdict.outcome == DENY:
                refused.append(scope)
                reasons |= dict.fromkeys(_why_not(found, request, scope, verdict, policies))
            elif verdict.outcome == NEEDS_APPROVAL:
                asking = ", ".join(f"{policy.quorum} of {policy.approval!r}" for policy in policies)
                reasons[f"{scope} waits for people: {asking}"] = None
                # Any one of the permits is enough, so the one that asks the fewest people is the one to wait for.
                fewest = min(policies, key=lambda policy: (policy.quorum, policy.id))
                approvals[(fewest.approval or "", fewest.quorum)] = None
                asking_people.append(fewest)
        if refused:
            return Decision(
                outcome=DENY,
                policies=tuple(id_ for id_ in decided if not self._by_id[id_].permits),
                policy_version=self.version,
                reasons=_first(reasons),
                refused_scopes=tuple(refused),
                failure=one_line("; ".join(failures)) if failures else None,
            )
        return Decision(
            outcome=NEEDS_APPROVAL if approvals else ALLOW,
            policies=tuple(decided),
            policy_version=self.version,
            reasons=_first(reasons),
            max_ttl_s=min(ceilings, default=None),
            approvals=tuple(approvals),
            owners_in=_owners_in(asking_people),
            approve_within_s=min((p.approve_within_s for p in asking_people if p.approve_within_s), default=None),
            failure=one_line("; ".join(failures)) if failures else None,
        )

    def _ask(self, found: _Slice, request: AccessRequest, scope: str, entities: _Entities) -> _Verdict:
        """What the policies of this slice say."""
        asked = {
            "principal": {"type": "Agent", "id": request.agent.name},
            "action": {"type": "Action", "id": scope},
            "resource": {"type": "Resource", "id": request.resource.identifier},
            "context": _context(found, request),
        }
        known = entities.for_slice(found)
        failures: list[str] = []
        passes = [(ALLOW, found.plain), (NEEDS_APPROVAL, found.asking)]
        if request.break_glass is not None:
            passes = [(NEEDS_APPROVAL, found.glass)]
        for outcome, policies in passes:
            if policies is None:
                continue
            answer = cedarpy.is_authorized(asked, policies, known)
            errors, reasons = answer.diagnostics.errors, answer.diagnostics.reasons
            if errors:
                # Cedar skips a policy it cannot evaluate. A forbid that was skipped might have forbidden (INV-13).
                failures += errors
                failed = [policy for policy in found.policies if _is_named(policy.id, errors)]
                forbids = [policy.id for policy in failed if not policy.permits]
                if forbids or not failed:
                    return _Verdict(outcome=DENY, policies=forbids, unevaluated=forbids, failures=failures)
            if answer.allowed or reasons:
                return _Verdict(
                    outcome=outcome if answer.allowed else DENY, policies=sorted(reasons), failures=failures
                )
        return _Verdict(outcome=DENY, failures=failures)

    def _slice(self, request: AccessRequest, scope: str) -> _Slice:
        return self._slice_of((request.agent.name, scope, request.resource.identifier))

    def _slice_of(self, key: tuple[str, str, str]) -> _Slice:
        found = self._slices.get(key)
        if found is None:
            if len(self._slices) >= _SLICES_KEPT:
                self._slices.clear()
                self._slices_by_policies.clear()
            found = self._slices[key] = self._cut(*key)
        return found

    def _cut(self, agent: str, scope: str, resource: str) -> _Slice:
        candidates = [*self._by_resource.get(resource, ()), *self._by_resource.get(None, ())]
        policies = tuple(policy for policy in candidates if policy.concerns(agent, scope, resource))
        # The same few concern most agents, and what is parsed is large: it is kept once for all of them.
        names = tuple(policy.id for policy in policies)
        found = self._slices_by_policies.get(names)
        if found is None:
            found = self._slices_by_policies[names] = _slice_of(policies, self.time_zone)
        return found

    def _known_entities(self, request: AccessRequest) -> Any:
        key = (request.agent.name, request.agent.subject, request.resource.identifier)
        known = self._entities.get(key)
        if known is None:
            if len(self._entities) >= _SLICES_KEPT:
                self._entities.clear()
            made = [
                _entity("Agent", request.agent.name, agent_facts(request.agent)),
                _entity("Resource", request.resource.identifier, resource_facts(request.resource)),
                _tags("Labels", _NO_TAGS, {}),
                _tags("Claimed", _NO_TAGS, {}),
            ]
            known = self._entities[key] = cedarpy.Entities.from_json_str(json.dumps(made))
        return known


def _slice_of(policies: tuple[Policy, ...], time_zone: str) -> _Slice:
    forbids = [policy for policy in policies if not policy.permits]
    glass = [policy for policy in policies if policy.break_glass]
    asking = [policy for policy in policies if policy.approval is not None and not policy.break_glass]
    reads = frozenset(path for policy in policies for path in policy.reads)
    return _Slice(
        policies=policies,
        plain=_parsed(policy for policy in policies if policy.approval is None and not policy.break_glass),
        asking=_parsed([*forbids, *asking]) if asking else None,
        glass=_parsed([*forbids, *glass]) if glass else None,
        reads=reads,
        told=_told(reads, time_zone),
        tagged=_touches(reads, ("claimed",)) or _touches(reads, ("task", "labels")),
    )


class _Entities:
    """What is known of one request's agent and resource; its labels and claims only where a policy looks at them."""

    def __init__(self, request: AccessRequest, known: Any) -> None:
        self._request = request
        self._known = known
        self._with_tags: Any = None

    def for_slice(self, found: _Slice) -> Any:
        if not found.tagged or not _has_tags(self._request):
            return self._known
        if self._with_tags is None:
            labels, claimed = self._request.task.labels, self._request.claimed_text()
            tags = [_tags("Labels", "task", labels), _tags("Claimed", "caller", claimed)]
            self._with_tags = self._known.with_added_json_str(json.dumps(tags))
        return self._with_tags


class _Search:
    """For one refused scope, the smallest change to the request that would be allowed."""

    def __init__(self, policies: PolicySet, request: AccessRequest, scope: str, entities: _Entities, left: int) -> None:
        self._policies = policies
        self._request = request
        self._entities = entities
        self._scope = scope
        self._slice = policies._slice(request, scope)
        self.left = left

    def what_would_do(self) -> str | None:
        if not any(_may_permit(policy, self._request) for policy in self._slice.policies):
            return None
        ways: list[tuple[dict[str, Any], str]] = [({}, "")]
        if not self._request.sender_bound and self._slice.may_read("sender_bound"):
            ways.append(({"sender_bound": True}, " and a DPoP proof"))
        for changed, also in ways:
            if changed and self._allows(**changed):
                return "would be allowed with a DPoP proof: bind the credential to a key (RFC 9449)"
            if self._slice.may_read("ttl_s") and self._allows(**changed, ttl_s=1):
                return f"would be allowed with ttl_s = {self._longest(changed)}{also}: ask for at most that"
        return None

    def _longest(self, changed: Mapping[str, Any]) -> int:
        """The longest life found to be allowed: the very longest, unless the evaluations ran out before."""
        low, high = 1, self._request.ttl_s
        while high - low > 1 and self.left:
            middle = (low + high) // 2
            low, high = (middle, high) if self._allows(**changed, ttl_s=middle) else (low, middle)
        return low

    def _allows(self, **changed: Any) -> bool:
        if not self.left:
            return False
        # An approval asks a second time, so each question counts for two where there is one.
        self.left = max(0, self.left - (1 if self._slice.asking is None else 2))
        changed_request = replace(self._request, **changed)
        return self._policies._ask(self._slice, changed_request, self._scope, self._entities).outcome != DENY


def _why_not(
    found: _Slice, request: AccessRequest, scope: str, verdict: _Verdict, forbids: Sequence[Policy]
) -> Iterator[str]:
    """Which policy said no, or which would have said yes to something else. Names no policy of somebody else's."""
    resource = request.resource.identifier
    for policy in forbids:
        if policy.id in verdict.unevaluated:
            yield f"policy {policy.id!r}, which may forbid {scope} on {resource}, could not be evaluated"
        else:
            yield f"policy {policy.id!r} forbids {scope} on {resource} {policy.condition}".strip()
    if forbids:
        return
    # What only a break-glass opens is not held out to who asks plainly: nobody is to be led to break one.
    near = [policy for policy in found.policies if _may_permit(policy, request)]
    if not near:
        yield f"no policy allows {scope} on {resource} to {request.agent.name}: ask for another scope"
    for policy in near:
        yield f"policy {policy.id!r} allows {scope} on {resource} only {policy.condition}".rstrip()


def _may_permit(policy: Policy, request: AccessRequest) -> bool:
    """Whether it is a permit of the kind that this request is decided by."""
    return policy.permits and policy.break_glass == (request.break_glass is not None)


def _owners_in(asking: Sequence[Policy]) -> frozenset[str]:
    """The groups in which the owner counts for every policy that asks them: one that says nothing says no."""
    strict = {policy.approval for policy in asking if not policy.owner_may_approve}
    return frozenset(policy.approval for policy in asking if policy.approval and policy.approval not in strict)


def _first(reasons: Iterable[str]) -> tuple[str, ...]:
    """As many as somebody reads: a decision is stored, and 64 scopes could have a book of reasons."""
    every = tuple(reasons)
    if len(every) <= _MOST_REASONS:
        return every
    return (*every[:_MOST_REASONS], f"and {len(every) - _MOST_REASONS} reasons more: ask for fewer scopes at once")


# --- What the engine is told of a request ---


def _in_zone(time_zone: str) -> dict[Path, _Telling]:
    """The time of day there. A zone this machine does not know is an error where somebody looks (INV-13)."""

    def local(asked: AccessRequest) -> datetime:
        return asked.now.astimezone(ZoneInfo(time_zone))

    return {
        ("local", "zone"): lambda asked: _text(time_zone),
        ("local", "hour"): lambda asked: str(local(asked).hour),
        ("local", "minute"): lambda asked: str(local(asked).minute),
        ("local", "weekday"): lambda asked: str(local(asked).isoweekday()),
    }


def _lists(attributes: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {name: list(values) for name, values in attributes.items()}


# By hand, and only what the policies of a slice read: making and parsing a context is most of what a decision costs.
# Every text goes through the encoder, so that it stays a value (INV-31). None is a fact that is not there.
_LEAVES: dict[Path, _Telling] = {
    ("task", "id"): lambda asked: _text(asked.task.id),
    ("task", "purpose"): lambda asked: _text(asked.task.purpose),
    ("task", "age_s"): lambda asked: str(asked.task.age_s),
    ("task", "orchestrator"): lambda asked: _text(asked.task.orchestrator),
    ("task", "labels"): lambda asked: _reference("Labels", "task" if _has_tags(asked) else _NO_TAGS),
    ("intent",): lambda asked: _text(asked.intent or ""),
    ("ttl_s",): lambda asked: str(asked.ttl_s),
    ("scopes",): lambda asked: json.dumps(sorted(asked.scopes)),
    ("sender_bound",): lambda asked: "true" if asked.sender_bound else "false",
    ("break_glass",): lambda asked: "false" if asked.break_glass is None else "true",
    ("delegation_depth",): lambda asked: str(asked.delegation_depth),
    ("delegation_chain",): lambda asked: json.dumps(sorted(set(asked.chain))),
    ("delegation_root",): lambda asked: _text(asked.chain[0] if asked.chain else asked.agent.name),
    ("user",): lambda asked: None if asked.user is None else _text(asked.user),
    ("user_attributes",): lambda asked: None if asked.user is None else json.dumps(_lists(asked.user_attributes)),
    ("approvals", "count"): lambda asked: str(len(asked.approved.by)),
    ("approvals", "by"): lambda asked: json.dumps(sorted(asked.approved.by)),
    ("approvals", "groups"): lambda asked: json.dumps(sorted(asked.approved.groups)),
    ("risk",): lambda asked: _text(asked.risk),
    ("agent", "live_grants"): lambda asked: str(asked.live_grants),
    ("agent", "recent_denials"): lambda asked: str(asked.recent_denials),
    ("time", "hour"): lambda asked: str(asked.now.hour),
    ("time", "weekday"): lambda asked: str(asked.now.isoweekday()),
    ("claimed",): lambda asked: _reference("Claimed", "caller" if _has_tags(asked) else _NO_TAGS),
    **_in_zone(UTC),
}


def _told(reads: frozenset[Path], time_zone: str) -> tuple[tuple[str, _Telling], ...]:
    """The members of a context that these reads can see, in the order of the schema."""
    flat: dict[str, _Telling] = {}
    records: dict[str, list[tuple[str, _Telling]]] = {}
    for path, tell in (_LEAVES | _in_zone(time_zone)).items():
        if _touches(reads, path):
            if len(path) == 1:
                flat[path[0]] = tell
            else:
                records.setdefault(path[0], []).append((path[1], tell))
    return (*((name, _record(members)) for name, members in records.items()), *flat.items())


def _record(members: Sequence[tuple[str, _Telling]]) -> _Telling:
    return lambda asked: _object(members, asked)


def _object(members: Iterable[tuple[str, _Telling]], request: AccessRequest) -> str:
    return "{" + ", ".join([f'"{name}": {text}' for name, tell in members if (text := tell(request)) is not None]) + "}"


def _context(found: _Slice, request: AccessRequest) -> str:
    return _object(found.told, request)


def _touches(reads: Iterable[Path], path: Path) -> bool:
    """Whether somebody reads what is at this path, something within it, or all around it."""
    return any(read[: len(path)] == path[: len(read)] for read in reads)


def _has_tags(request: AccessRequest) -> bool:
    return bool(request.task.labels or request.claimed)


def _reference(kind: str, name: str) -> str:
    return f'{{"__entity": {{"type": "{kind}", "id": "{name}"}}}}'


def _parsed(policies: Iterable[Policy]) -> Any:
    return cedarpy.PolicySet.from_json_str(set_json(policies))


def _is_named(policy_id: str, errors: Iterable[Any]) -> bool:
    return any(f"`{policy_id}`" in str(error) for error in errors)


def _entity(kind: str, name: str, attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {"uid": {"type": kind, "id": name}, "attrs": dict(attributes), "parents": []}


def _tags(kind: str, name: str, tags: Mapping[str, str]) -> dict[str, Any]:
    return {**_entity(kind, name, {}), "tags": dict(tags)}
