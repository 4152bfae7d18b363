"""Operations of the JSON API: a route, the shapes it reads and answers, and so its place in the OpenAPI document.

Declared in one breath, so that the document cannot say anything else than the code does.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

from flask import Blueprint, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from broker.domain.errors import Invalid
from broker.domain.identity import Caller, is_id
from broker.web import auth
from broker.web.answers import Answer, json_response
from broker.web.context import current
from broker.web.reading import json_body, query, raw_body
from broker.web.shapes import NoQuery, ProblemAnswer

Handler = Callable[..., tuple[int, Any] | tuple[int, Any, Mapping[str, str]] | Response]


@dataclass(frozen=True, kw_only=True)
class Operation:
    method: str
    path: str
    summary: str
    name: str
    body: type[BaseModel] | None
    query: type[BaseModel]
    answers: Mapping[int, type[BaseModel]]
    creates: bool
    proof: bool
    looks_again: bool
    ends: bool
    waits: bool
    streams: str | None


class Operations:
    """One blueprint and the operations declared on it."""

    def __init__(self, name: str) -> None:
        self.blueprint = Blueprint(name, __name__)
        self.declared: list[Operation] = []

    def __call__(
        self,
        method: str,
        path: str,
        summary: str,
        *,
        answers: Mapping[int, type[BaseModel]],
        body: type[BaseModel] | None = None,
        query_: type[BaseModel] = NoQuery,
        creates: bool = False,
        proof: bool = False,
        looks_again: bool = False,
        ends: bool = False,
        waits: bool = False,
        streams: str | None = None,
    ) -> Callable[[Handler], Handler]:
        """Declare `handler(caller, *ids, body?, query?)`; `creates` takes an Idempotency-Key, `proof` a DPoP header.

        `looks_again`: the verb asks anew, in its own transaction, who the caller is. `ends`: it takes authority away,
        and so must not wait for those who ask for some (INV-27). `waits`: with `Prefer: wait=20` it may answer later.
        `streams`: the handler answers a whole response instead, of this media type, and it goes on for long.

        The handler answers a status, an object, and headers where there are some.
        """

        def declare(handler: Handler) -> Handler:
            operation = Operation(
                method=method,
                path=path,
                summary=summary,
                name=handler.__name__,
                body=body,
                query=query_,
                answers=answers,
                creates=creates,
                proof=proof,
                looks_again=looks_again,
                ends=ends,
                waits=waits,
                streams=streams,
            )
            self.declared.append(operation)
            rule = path.replace("{", "<").replace("}", ">")
            self.blueprint.add_url_rule(rule, handler.__name__, _route(operation, handler), methods=[method])
            return handler

        return declare


def _route(operation: Operation, handler: Handler) -> Callable[..., Answer | Response]:
    optional_body = operation.body is not None and not any(
        field.is_required() for field in operation.body.model_fields.values()
    )

    @wraps(handler)
    def route(**ids: str) -> Answer | Response:
        call = current()
        caller: Caller = auth.caller(looks_again=operation.looks_again)
        given: dict[str, Any] = {}
        if operation.query is not NoQuery or call.query_string:
            read = query(operation.query)
            if operation.query is not NoQuery:
                given["query"] = read
        if operation.method in ("POST", "PUT"):
            raw = call.raw_body = raw_body(caller, ends=operation.ends)
            if operation.body is not None:
                given["body"] = json_body(operation.body, raw, optional=optional_body)
            elif raw.strip() not in (b"", b"{}"):
                raise Invalid("this request takes no body: leave it empty")
        answered = handler(caller, *ids.values(), **given)
        if isinstance(answered, Response):
            return answered
        status, answer, *headers = answered
        if status == 204:
            return Response(status=204)
        return json_response(answer, status, *headers)

    return route


def page(items: Sequence[Any], shown: Sequence[Any], limit: int, *, by: str = "id") -> dict[str, Any]:
    """A list answer; the cursor is what its last item is ordered `by`, and opaque to everybody else."""
    more = len(items) == limit
    cursor = base64.urlsafe_b64encode(str(getattr(items[-1], by)).encode()).decode() if more else None
    return {"items": list(shown), "next_cursor": cursor}


def before(cursor: str | None, prefix: str) -> str | None:
    """The id a cursor stands for."""
    return None if cursor is None else _opened(cursor, lambda text: is_id(text, prefix))


def before_version(cursor: str | None) -> int | None:
    """The number of the version a cursor stands for."""
    return None if cursor is None else int(_opened(cursor, re.compile("[1-9][0-9]{0,8}").fullmatch))


def _opened(cursor: str, fits: Callable[[str], object]) -> str:
    try:
        text = base64.b64decode(cursor, altchars=b"-_", validate=True).decode()
    except ValueError:
        text = ""
    if not fits(text):
        raise Invalid("cursor is not one that this list answered: start again without it", member="cursor")
    return text


def openapi(operations: Sequence[Operation], issuer: str, version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document of these operations."""
    models: list[tuple[type[BaseModel], Any]] = [(ProblemAnswer, "validation")]
    for operation in operations:
        models += [(model, "validation") for model in operation.answers.values()]
        models += [(operation.body, "validation")] if operation.body else []
    references, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")
    paths: dict[str, Any] = {}
    for operation in operations:
        responses: dict[str, Any] = {
            str(status): _content(references[(model, "validation")], "The answer.")
            | {"headers": _NOT_KEPT | (_WAIT if status == 202 else {})}
            for status, model in operation.answers.items()
        }
        if operation.streams is not None:
            # No schema: what a stream is made of has no place in it.
            content: dict[str, Any] = {operation.streams: {}}
            responses["200"] = {"description": "The stream.", "content": content, "headers": _NOT_TO_BE_KEPT}
        responses |= {str(status): {"$ref": f"#/components/responses/{status}"} for status in _refusals(operation)}
        entry: dict[str, Any] = {
            "operationId": operation.name,
            "summary": operation.summary,
            "parameters": _parameters(operation),
            "responses": responses,
        }
        if operation.body is not None:
            required = any(field.is_required() for field in operation.body.model_fields.values())
            schema = references[(operation.body, "validation")]
            entry["requestBody"] = {"required": required, "content": {"application/json": {"schema": schema}}}
        paths.setdefault(operation.path, {})[operation.method.lower()] = entry
    problem = references[(ProblemAnswer, "validation")]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Agent credential broker",
            "version": version,
            "description": "Just-in-time credentials for AI agents. Errors are RFC 9457 problem documents.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": issuer}],
        "security": [{"workload_token": []}],
        "paths": paths,
        "components": {
            "schemas": definitions.get("$defs", {}),
            "responses": {
                str(status): _content(problem, description, "application/problem+json") | {"headers": dict(headers)}
                for status, (description, headers) in _PROBLEMS.items()
            },
            "securitySchemes": {
                "workload_token": {
                    "type": "http",
                    "scheme": "bearer",
                    "bearerFormat": "JWT",
                    "description": f"A JWT of a trusted issuer with {issuer} as its only audience.",
                }
            },
        },
    }


_TEXT = {"type": "string"}
_NOT_KEPT = {
    "Cache-Control": {"description": "Nothing here may be kept.", "required": True, "schema": {"const": "no-store"}}
}
_NOT_TO_BE_KEPT = {"Cache-Control": {**_NOT_KEPT["Cache-Control"], "schema": _TEXT}}
_WAIT = {
    "Retry-After": {"description": "Seconds to wait.", "required": True, "schema": {"type": "integer", "minimum": 1}}
}
_CHALLENGE = {
    "WWW-Authenticate": {
        "description": "Where to learn how to authenticate (RFC 9728).",
        "required": True,
        "schema": _TEXT,
    }
}
_PROBLEMS: Mapping[int, tuple[str, Mapping[str, Any]]] = {
    400: ("The request cannot be understood; `member` names what is wrong, `detail` says what to do.", {}),
    401: ("Who calls was not proven.", _CHALLENGE),
    403: ("The caller may not; a `decision` comes with it where policy decided.", {}),
    404: ("No such thing, or not for this caller to see.", {}),
    409: ("The state does not allow it, or the Idempotency-Key was used for something else.", {}),
    413: ("The body is longer than 64 KiB.", {}),
    415: ("The body is not application/json.", {}),
    429: ("A limit is reached.", _WAIT),
    503: ("The broker cannot answer now; nothing was handed out.", _WAIT),
}


def _refusals(operation: Operation) -> list[int]:
    statuses = {400, 401, 403, 503}
    if "{" in operation.path or operation.proof:
        statuses.add(404)
    if operation.method in ("POST", "PUT"):
        statuses |= {409, 413}
    if operation.body is not None:
        statuses.add(415)
    if operation.proof:
        statuses.add(429)
    return sorted(statuses)


def _content(schema: Any, description: str, media_type: str = "application/json") -> dict[str, Any]:
    return {"description": description, "content": {media_type: {"schema": schema}}}


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": part[1:-1], "in": "path", "required": True, "schema": {"type": "string", "pattern": _id_of(operation)}}
        for part in operation.path.split("/")
        if part.startswith("{")
    ]
    schema = operation.query.model_json_schema()
    for name, property_ in schema.get("properties", {}).items():
        found.append({"name": name, "in": "query", "required": False, "schema": _inlined(property_, schema)})
    if operation.creates:
        key = {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"}
        found.append({"name": "Idempotency-Key", "in": "header", "required": False, "schema": key})
    if operation.waits:
        wait = {"type": "string", "description": "RFC 7240: wait=20 answers when it is decided, 20 s later at most."}
        found.append({"name": "Prefer", "in": "header", "required": False, "schema": wait})
    if operation.streams is not None:
        after = {"type": "string", "description": "Where a stream broke: the `id` of the last event that came."}
        found.append({"name": "Last-Event-ID", "in": "header", "required": False, "schema": after})
    if operation.proof:
        proof = {"type": "string", "description": "A DPoP proof (RFC 9449): the credential is bound to its key."}
        found.append({"name": "DPoP", "in": "header", "required": False, "schema": proof})
    return found


def _id_of(operation: Operation) -> str:
    prefix = {
        "tasks": "task",
        "grants": "grt",
        "leases": "lea",
        "lockdowns": "lck",
        "approvals": "apr",
        "event-streams": "stm",
    }[operation.path.split("/")[2]]
    return f"^{prefix}_[0-7][0-9a-hjkmnp-tv-z]{{25}}$"


def _inlined(property_: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    choices = [choice for choice in property_.get("anyOf", [property_]) if choice != {"type": "null"}]
    chosen = choices[0]
    if "$ref" in chosen:
        chosen = schema["$defs"][chosen["$ref"].rsplit("/", 1)[1]]
    return {name: value for name, value in chosen.items() if name not in ("title", "default")}
