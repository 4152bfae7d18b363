"""Writes what the documentation takes from the code: `docs/reference/api.md` and `docs/reference/errors.md`.

    .venv/bin/python docs/generate.py

`tests/docs` compares the files with what this would write, so that they cannot fall behind.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from broker.domain import errors
from broker.web.app import API
from broker.web.operations import openapi
from broker.web.problems import REMEDIES, TITLES, oauth_response, status_of

REFERENCE = Path(__file__).parent / "reference"
ISSUER = "https://broker.example"

# The verbs decide who may do what, so the OpenAPI document cannot say it. A route that is missing here is an error.
WHO = {
    "POST /v1/tasks": "orchestrator",
    "GET /v1/tasks": "everybody, each their own; admin and auditor all",
    "GET /v1/tasks/{id}": "its orchestrator, its agents, admin, auditor",
    "POST /v1/tasks/{id}/heartbeat": "its orchestrator",
    "POST /v1/tasks/{id}/complete": "its orchestrator, admin",
    "POST /v1/tasks/{id}/fail": "its orchestrator, admin",
    "POST /v1/tasks/{id}/cancel": "its orchestrator, admin",
    "GET /v1/tasks/{id}/receipt": "its orchestrator, its agents, admin, auditor",
    "POST /v1/grants": "agent",
    "GET /v1/grants": "everybody, each their own; admin and auditor all",
    "GET /v1/grants/{id}": "its agent, the orchestrator of its task, admin, auditor",
    "GET /v1/grants/{id}/decision": "its agent, the orchestrator of its task, admin, auditor",
    "POST /v1/grants/{id}/renew": "its agent",
    "POST /v1/grants/{id}/revoke": "its agent, the orchestrator of its task, admin",
    "POST /v1/grants/{id}/credential": "its agent",
    "GET /v1/approvals": "approvers, what their groups are asked; all others, each their own; admin and auditor all",
    "GET /v1/approvals/{id}": "approvers of the groups that are asked, its agent, the orchestrator of its task, admin, "
    "auditor",
    "POST /v1/approvals/{id}/approve": "approvers of the groups that are asked, but for whoever asks and who owns it",
    "POST /v1/approvals/{id}/deny": "approvers of the groups that are asked",
    "POST /v1/approvals/{id}/withdraw": "its agent, the orchestrator of its task",
    "GET /v1/leases": "admin, auditor",
    "GET /v1/leases/{id}": "admin, auditor",
    "POST /v1/leases/{id}/abandon": "admin",
    "POST /v1/revocations": "admin",
    "GET /v1/revocations": "verifier, admin, auditor",
    "GET /v1/revocations/feed": "verifier, admin, auditor",
    "GET /v1/lockdowns": "admin",
    "POST /v1/lockdowns": "admin",
    "DELETE /v1/lockdowns/{id}": "admin",
    "GET /v1/signals": "admin, auditor, sentinel",
    "POST /v1/signals": "admin, sentinel",
    "GET /v1/event-streams": "admin, auditor",
    "GET /v1/event-streams/{id}": "admin, auditor",
    "POST /v1/event-streams/{id}/pause": "admin",
    "POST /v1/event-streams/{id}/resume": "admin",
    "DELETE /v1/event-streams/{id}": "admin",
    "GET /v1/policies": "admin, auditor",
    "POST /v1/policies/evaluate": "admin, auditor",
    "POST /v1/policies/replay": "admin, auditor",
    "PUT /v1/policies": "admin",
    "GET /v1/audit": "admin, auditor",
}

_API = """\
# The JSON API

Generated from the operations the broker declares; the same as OpenAPI 3.1 at `/openapi.json` of a running broker. The
OAuth endpoints are in [oauth.md](oauth.md), the errors in [errors.md](errors.md).

- Every request carries `Authorization: Bearer <workload token>`: a JWT of a trusted issuer with the broker's issuer as
  its only audience.
- Bodies are JSON, at most 64 KiB and 32 levels deep. An unknown member, a member given twice, a wrong type, NaN: 400,
  with the name.
- Times are RFC 3339 in UTC, durations whole seconds in members that end in `_s`.
- `Idempotency-Key`, where it is listed: the same key with the same body gives the same answer for a day; with another
  body it is 409.
- Lists are newest first, `{"items": [...], "next_cursor": ... | null}`; hand `next_cursor` back as `cursor`.
- What a caller may not see is 404, like what does not exist.
- `traceparent` (W3C Trace Context) is taken over into audit events, logs and tokens; an invalid one is ignored.
"""

_ERRORS = """\
# Errors

Generated from `broker.web.problems`. Under `/v1` a refusal is a problem document (RFC 9457), under `/oauth2` an OAuth
error (RFC 6749). A code is stable; the page at its `type`, `<issuer>/problems/<code>`, says the same as this table.

```json
{
  "type": "https://broker.example/problems/task_not_active",
  "title": "The task has ended",
  "status": 409,
  "detail": "task task_01m8… is completed: nothing can be issued for it",
  "code": "task_not_active",
  "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
  "member": "task_id"
}
```

`detail` is for people and may change. `member` names the member of the request that was wrong, where one was.
`policy_denied` also carries `decision` and `grant_id`. Why a workload token was refused is told to nobody: it stands in
the broker's log under the `trace_id`.

| code | status | OAuth error | title | what to do |
|---|---|---|---|---|
"""

_ERRORS_END = """\

Errors that only the OAuth surface has: `unsupported_grant_type`, and of [deferred tokens](oauth.md#deferred-tokens)
`authorization_pending`, `slow_down`, `expired_token` (all 400). A refused workload token is `invalid_client`
(401) where it came as a client assertion, `invalid_grant` (400) as an `assertion`, `invalid_request` (400) as a
`subject_token`. 429 and 503 carry `Retry-After`.

One code that no broker of this version answers yet has its place in the tree: `use_dpop_nonce`.
"""

# Refusals of the HTTP layer itself; they have no class in the tree of `broker.domain.errors`.
_HTTP = {"method_not_allowed": 405, "too_large": 413, "unsupported_media_type": 415, "internal": 500}


def api() -> str:
    """`docs/reference/api.md`."""
    document = openapi([operation for operations in API for operation in operations.declared], ISSUER, "0")
    routes = [
        (f"{method.upper()} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    lines = [_API, "| operation | who | what |", "|---|---|---|"]
    lines += [f"| [`{route}`](#{_anchor(route)}) | {WHO[route]} | {entry['summary']} |" for route, entry in routes]
    for route, operation in routes:
        lines += _operation(route, operation)
    lines += ["", "# Shapes"]
    for name, schema in sorted(document["components"]["schemas"].items()):
        lines += ["", f"### {name}", "", *_shape(schema)]
    return "\n".join(lines) + "\n"


def error_codes() -> str:
    """`docs/reference/errors.md`."""
    rows = []
    for code, title in TITLES.items():
        status, oauth = _HTTP.get(code), "–"
        kind = next((kind for kind in _tree(errors.BrokerError) if kind.code == code), None)
        if kind is not None:
            problem = _made(kind)
            status = status_of(problem)
            answer = oauth_response(problem, ISSUER)
            oauth = f"`{json.loads(answer.body)['error']}` ({answer.status})"
        rows.append(f"| `{code}` | {status} | {oauth} | {title} | {REMEDIES[code]} |\n")
    return _ERRORS + "".join(rows) + _ERRORS_END


def _tree(kind: type[errors.BrokerError]) -> Iterator[type[errors.BrokerError]]:
    yield kind
    for narrower in kind.__subclasses__():
        yield from _tree(narrower)


def _made(kind: type[errors.BrokerError]) -> errors.BrokerError:
    if kind is errors.PolicyDenied:
        return errors.PolicyDenied("", decision={})
    if kind is errors.LimitExceeded:
        return errors.LimitExceeded("", retry_after_s=1)
    return kind("")


def _operation(route: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", f"### {route}", "", f"{operation['summary']}. For: {WHO[route]}.", "")
    rows = [f"| `{entry['name']}` | {entry['in']} | {_type(entry['schema'])} |" for entry in operation["parameters"]]
    body = operation.get("requestBody")
    if body is not None:
        optional = "" if body["required"] else ", may be left out"
        rows.append(f"| body | JSON{optional} | {_type(body['content']['application/json']['schema'])} |")
    if rows:
        yield from ("| parameter | in | type |", "|---|---|---|", *rows, "")
    for status, answer in operation["responses"].items():
        if int(status) < 300:
            [(media_type, content)] = answer["content"].items()
            what = _type(content["schema"]) if "schema" in content else f"`{media_type}`"
            yield f"Answers {status} {what}."


def _shape(schema: Mapping[str, Any]) -> Iterator[str]:
    if "enum" in schema:
        yield _type(schema) + "."
        return
    if schema.get("additionalProperties") is True:
        yield "Newer brokers may add members: ignore those you do not know.\n"
    required = schema.get("required", ())
    yield "| member | type | |"
    yield "|---|---|---|"
    for name, member in schema.get("properties", {}).items():
        default = member.get("default")
        about = "required" if name in required else "" if default in (None, {}, []) else f"default `{_json(default)}`"
        yield f"| `{name}` | {_type(member)} | {about} |"


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{_anchor(name)})"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(choice) for choice in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{_json(value)}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {_type(schema['items'])}{_bounds(schema, 'Items')}"
    if kind == "object":
        values = next(iter(schema.get("patternProperties", {}).values()), schema.get("additionalProperties"))
        of = f" of {_type(values)}" if isinstance(values, Mapping) else ""
        return f"object{of}{_bounds(schema, 'Properties')}"
    if kind == "integer":
        return "integer" + _range(schema.get("minimum"), schema.get("maximum"))
    if kind == "string":
        return "string" + _bounds(schema, "Length")
    return str(kind)


def _bounds(schema: Mapping[str, Any], what: str) -> str:
    low, high = schema.get(f"min{what}"), schema.get(f"max{what}")
    unit = {"Items": "", "Properties": " members", "Length": " characters"}[what]
    return "" if high is None else f", {low} to {high}{unit}" if low is not None else f", at most {high}{unit}"


def _range(low: int | None, high: int | None) -> str:
    return "" if low is None or high is None else f", {low} to {high}"


def _json(value: object) -> str:
    return value if isinstance(value, str) else str(value).lower()


def _anchor(heading: str) -> str:
    """As GitHub makes them: lower case, blanks to dashes, punctuation dropped."""
    kept = "".join(character for character in heading.lower() if character.isalnum() or character in " -_")
    return kept.replace(" ", "-")


GENERATED = {"api.md": api, "errors.md": error_codes}


def main() -> None:
    for name, make in GENERATED.items():
        (REFERENCE / name).write_text(make())


if __name__ == "__main__":
    main()
