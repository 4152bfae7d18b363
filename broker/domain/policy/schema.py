"""The types every policy is checked against: ours, and what the configuration adds to them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from broker.domain.catalogue import Catalogue, PrincipalRule, Resource
from broker.domain.identity import Principal

# The types of every context. The actions, and what agents and resources are, come from the configuration.
BASE_SCHEMA = """\
// What a task was labelled with: context.task.labels.hasTag("team") && context.task.labels.getTag("team") == "crm"
entity Labels tags String;
// What the caller claims, as text. The broker vouches for none of it: use it to refuse, not to allow.
entity Claimed tags String;

// purpose is "" for a task that an agent opened for itself: what it says of itself is in context.claimed.
type Task = { id: String, purpose: String, age_s: Long, orchestrator: String, labels: Labels };
// Of the agent as it stands now: grants it holds beside the one it asks for, and what it was refused lately.
type Standing = { live_grants: Long, recent_denials: Long };
type Time = { hour: Long, weekday: Long }; // UTC; Monday is 1
type Local = { zone: String, hour: Long, minute: Long, weekday: Long }; // in the time zone of the configuration
type Approvals = { count: Long, by: Set<String>, groups: Set<String> }; // who said yes: nobody before it is collected

type Context = {
  task: Task,
  intent: String, // "" where the agent gave none
  ttl_s: Long,
  scopes: Set<String>, // everything this request asks for
  sender_bound: Bool,
  break_glass: Bool, // asked for as one: then only permits with @break_glass count, and every forbid
  delegation_depth: Long,
  delegation_chain: Set<String>, // the agents it was handed down by
  delegation_root: String, // the first of them; the agent itself where it was not handed down
  user?: String, // only on behalf of somebody
  user_attributes?: UserAttributes, // likewise: what the issuers' user_attributes let in, each a set
  approvals: Approvals,
  risk: String,
  agent: Standing,
  time: Time,
  local: Local,
  claimed: Claimed,
};
"""


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
        **({"destination": dict(resource.destination)} if resource.destination else {}),
    }


def complete_schema(catalogue: Catalogue, problems: list[str]) -> str:
    """The schema of the policies directory, or ours, with the actions and attributes of this configuration."""
    agents = [
        ({"issuer": "", "subject": "", "kind": "", **_facts_of(rule)}, rule.name) for rule in catalogue.principals
    ]
    resources = [(resource_facts(resource), resource.identifier) for resource in catalogue.resources]
    scopes = sorted({scope for resource in catalogue.resources for scope in resource.scopes})
    said = sorted({name for issuer in catalogue.issuers for name in issuer.user_attributes})
    text = catalogue.schema or BASE_SCHEMA
    text += f"\ntype UserAttributes = {{ {', '.join(f'{quoted(name)}?: Set<String>' for name in said)} }};"
    text += f"\nentity Agent = {_record(agents, problems)};\nentity Resource = {_record(resources, problems)};\n"
    if scopes:
        names = ", ".join(map(quoted, scopes))
        text += f"action {names} appliesTo {{ principal: [Agent], resource: [Resource], context: Context }};\n"
    return text


def _facts_of(rule: PrincipalRule) -> dict[str, Any]:
    return dict(rule.attributes) | ({} if rule.owner is None else {"owner": rule.owner})


def _record(things: Sequence[tuple[Mapping[str, Any], str]], problems: list[str]) -> str:
    """A record type of all their attributes; one that some lack is optional."""
    types: dict[str, tuple[str, str]] = {}
    tables: dict[str, list[tuple[Mapping[str, Any], str]]] = {}
    for facts, thing in things:
        for name, value in facts.items():
            if isinstance(value, Mapping):
                tables.setdefault(name, []).append((value, thing))
            kind = _kind(value)
            first, example = types.setdefault(name, (kind, thing))
            if first != kind:
                problems.append(
                    f"attribute {name!r} is a {first} on {example!r} and a {kind} on {thing!r}: make them alike"
                )
    members = []
    for name, (kind, _) in sorted(types.items()):
        optional = "" if all(name in facts for facts, _ in things) else "?"
        members.append(f"{quoted(name)}{optional}: {_record(tables[name], problems) if kind == 'table' else kind}")
    return "{ " + ", ".join(members) + " }"


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "table"
    return "Bool" if isinstance(value, bool) else "Long" if isinstance(value, int) else "String"


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def one_line(problem: object) -> str:
    return " ".join(str(problem).split())[:300]
