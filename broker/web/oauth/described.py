"""The OAuth surface and the public documents, for `/openapi.json`: what an endpoint takes and answers.

Written by hand beside the endpoints, because their forms are read by the rules of RFC 6749 and not by a shape; a test
holds every route of the application against it.
"""

from __future__ import annotations

from typing import Any

from broker.web.oauth.deferred import COMPLETION_MODE
from broker.web.oauth.metadata import GRANT_TYPES

_FORM = "application/x-www-form-urlencoded"
_TEXT: dict[str, Any] = {"type": "string"}
_HEADER = {"required": True, "schema": _TEXT}
_WAIT = {"Retry-After": {"required": True, "schema": {"type": "integer", "minimum": 1}}}
_ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:"
_TOKEN_TYPE = "urn:ietf:params:oauth:token-type:"  # noqa: S105 - a URN

_CLIENT = {
    "client_id": {**_TEXT, "description": "Not needed: the client is the subject of its assertion."},
    "client_assertion_type": {"enum": [f"{_ASSERTION_TYPE}jwt-bearer", f"{_ASSERTION_TYPE}jwt-spiffe"]},
    "client_assertion": {**_TEXT, "description": "The caller's workload token (RFC 7523)."},
}
_ERRORS = (
    "invalid_request", "invalid_client", "invalid_grant", "invalid_scope", "invalid_target",
    "invalid_authorization_details", "invalid_dpop_proof", "use_dpop_nonce", "unauthorized_client",
    "unsupported_grant_type", "access_denied", "temporarily_unavailable", "authorization_pending", "slow_down",
    "expired_token",
)  # fmt: skip


def components() -> dict[str, Any]:
    """The shapes that the OAuth endpoints name."""
    return {
        "OAuthError": _object(
            {
                "error": {"enum": list(_ERRORS)},
                "error_description": _TEXT,
                "deferral_code": {**_TEXT, "description": "With authorization_pending: what to poll with."},
                "expires_in": {"type": "integer", "minimum": 0, "description": "How long polling makes sense."},
                "interval": {"type": "integer", "minimum": 1, "description": "Seconds between two polls."},
            },
            required=("error", "error_description"),
        ),
        "TokenForm": _object(
            {
                "grant_type": {"enum": list(GRANT_TYPES)},
                **_CLIENT,
                "assertion": {**_TEXT, "description": "With jwt-bearer: the caller's workload token."},
                "subject_token": {
                    **_TEXT,
                    "description": "With token exchange: one's workload token or live credential.",
                },
                "subject_token_type": {"enum": [f"{_TOKEN_TYPE}jwt", f"{_TOKEN_TYPE}access_token"]},
                "requested_token_type": {"enum": [f"{_TOKEN_TYPE}access_token", f"{_TOKEN_TYPE}jwt"]},
                "resource": {**_TEXT, "maxLength": 1000, "description": "Exactly one registered resource (RFC 8707)."},
                "audience": {**_TEXT, "maxLength": 1000, "description": "Another word for resource."},
                "scope": {**_TEXT, "description": "Separated by single blanks."},
                "task_id": {**_TEXT, "description": "The task this is for."},
                "completion_mode": {
                    "enum": [COMPLETION_MODE],
                    "description": "The client can wait for people: authorization_pending instead of invalid_scope.",
                },
                "deferral_code": {**_TEXT, "description": "With the deferred grant type: what was answered."},
                "authorization_details": {**_TEXT, "description": "RFC 9396: one element of type urn:broker:task."},
            },
            required=("grant_type",),
        ),
        "TokenAnswer": _object(
            {
                "access_token": _TEXT,
                "token_type": {"enum": ["Bearer", "DPoP"]},
                "expires_in": {"type": "integer", "minimum": 0},
                "scope": _TEXT,
                "grant_id": _TEXT,
                "task_id": _TEXT,
                "ttl_decided_by": _TEXT,
                "authorization_details": {"type": "array", "items": {"type": "object"}},
                "issued_token_type": _TEXT,
            },
            required=("access_token", "token_type", "expires_in", "scope", "grant_id", "task_id"),
        ),
        "TokenToJudge": _object(
            {"token": _TEXT, "token_type_hint": _TEXT, **_CLIENT},
            required=("token",),
        ),
        "IntrospectionAnswer": _object({"active": {"type": "boolean"}}, required=("active",)),
        "AnyDocument": {"type": "object"},
    }


def paths() -> dict[str, Any]:
    """Every public route that is not of the JSON API."""
    token = _form("token", "TokenForm", "A credential, or the renewal of one", "TokenAnswer")
    token["parameters"] = [{"name": "DPoP", "in": "header", "required": False, "schema": _TEXT}]
    revoke = _form("revoke", "TokenToJudge", "Hand a credential back (RFC 7009)", None)
    introspect = _form("introspect", "TokenToJudge", "Is it live now? (RFC 7662)", "IntrospectionAnswer")
    # Verifiers may authenticate either way, and then need no assertion.
    for either in (introspect, revoke):
        either["security"] = [{}, {"workload_token": []}]
    metadata = _document("Metadata of this authorization server (RFC 8414)")
    return {
        "/oauth2/token": {"post": token},
        "/oauth2/introspect": {"post": introspect},
        "/oauth2/revoke": {"post": revoke},
        "/oauth2/jwks": {"get": _document("The keys that sign (RFC 7517)", "application/jwk-set+json")},
        "/oauth2/authorize": {"get": _page("There is no interactive flow", 400)},
        "/.well-known/oauth-authorization-server": {"get": metadata},
        "/.well-known/openid-configuration": {"get": metadata},
        "/.well-known/oauth-protected-resource/v1": {"get": _document("Metadata of the JSON API (RFC 9728)")},
        "/status-lists": {"get": _document("The status lists a live token may point to", kept=False)},
        "/status-lists/{id}": {"get": _status_list()},
        "/healthz": {"get": _document("Whether the process answers", kept=False, asks_the_store=False)},
        "/readyz": {"get": _document("Whether it can do its work", kept=False)},
        "/metrics": {"get": _metrics()},
        "/problems/{code}": {"get": _page("What a problem means, for people", 200)},
        "/openapi.json": {"get": _document("This document", asks_the_store=False)},
        "/v1/traces": {"post": _spans()},
    }


def _object(properties: dict[str, Any], *, required: tuple[str, ...]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


def _reference(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _error(description: str, **headers: Any) -> dict[str, Any]:
    content = {"application/json": {"schema": _reference("OAuthError")}}
    return {"description": description, "content": content, "headers": {"Cache-Control": _HEADER, **headers}}


def _form(name: str, form: str, summary: str, answer: str | None) -> dict[str, Any]:
    done: dict[str, Any] = {"description": "The answer." if answer else "It opens nothing, from now on or already."}
    if answer is not None:
        done |= {
            "content": {"application/json": {"schema": _reference(answer)}},
            "headers": {"Cache-Control": _HEADER},
        }
    return {
        "operationId": f"oauth_{name}",
        "summary": summary,
        "security": [],
        "requestBody": {"required": True, "content": {_FORM: {"schema": _reference(form)}}},
        "responses": {
            "200": done,
            "400": _error("Refused; error_description says what to change."),
            "401": _error("The client was not proven.", **{"WWW-Authenticate": _HEADER}),
            "413": _error("The body is longer than 64 KiB."),
            "429": _error("A limit is reached.", **_WAIT),
            "503": _error("The broker cannot answer now; nothing was handed out.", **_WAIT),
        },
    }


def _document(
    summary: str, media_type: str = "application/json", *, kept: bool = True, asks_the_store: bool = True
) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "description": "The document.",
        "content": {media_type: {"schema": _reference("AnyDocument")}},
    }
    responses: dict[str, Any] = {"200": answer}
    if asks_the_store:
        responses["503"] = {"$ref": "#/components/responses/503"}
    if kept:
        answer["headers"] = {"ETag": _HEADER, "Cache-Control": _HEADER}
        responses["304"] = {"description": "As it was, by If-None-Match."}
    return {"summary": summary, "security": [], "responses": responses}


def _page(summary: str, status: int) -> dict[str, Any]:
    found: dict[str, Any] = {str(status): {"description": summary, "content": {"text/html": {"schema": _TEXT}}}}
    entry: dict[str, Any] = {"summary": summary, "security": [], "responses": found}
    if status == 200:
        entry["parameters"] = [{"name": "code", "in": "path", "required": True, "schema": _TEXT}]
        found["404"] = {"$ref": "#/components/responses/404"}
    return entry


def _status_list() -> dict[str, Any]:
    found = _document("One status list, signed (IETF Token Status List)", "application/statuslist+jwt", kept=False)
    found["responses"]["200"]["content"]["application/statuslist+jwt"]["schema"] = _TEXT
    found["responses"]["404"] = {"$ref": "#/components/responses/404"}
    number = {"type": "string", "pattern": "^[0-9]{1,9}$"}
    return found | {"parameters": [{"name": "id", "in": "path", "required": True, "schema": number}]}


def _metrics() -> dict[str, Any]:
    refused = {status: {"$ref": f"#/components/responses/{status}"} for status in ("401", "403", "503")}
    answer = {"description": "Prometheus' text format.", "content": {"text/plain": {"schema": _TEXT}}}
    return {"summary": "Metrics, for admins and auditors", "responses": {"200": answer, **refused}}


def _spans() -> dict[str, Any]:
    """OTLP/HTTP: what is in the bodies is its own standard's, and a refusal is a google.rpc.Status."""
    either = {
        "application/json": {"schema": _reference("AnyDocument")},
        "application/x-protobuf": {"schema": {"type": "string", "format": "binary"}},
    }
    not_kept = {"Cache-Control": {"required": True, "schema": {"const": "no-store"}}}

    def said(description: str, **headers: Any) -> dict[str, Any]:
        return {"description": description, "content": either, "headers": {**not_kept, **headers}}

    return {
        "operationId": "take_spans",
        "summary": "Spans of OpenTelemetry (OTLP/HTTP), of which those are kept that are uses of grants",
        "parameters": [
            {"name": "Content-Encoding", "in": "header", "required": False, "schema": {"enum": ["gzip", "deflate"]}}
        ],
        "requestBody": {"required": True, "content": either},
        "responses": {
            "200": said("Taken; partialSuccess says what was not, and why."),
            "400": said("Not spans in OTLP."),
            "401": said("Who calls was not proven.", **{"WWW-Authenticate": _HEADER}),
            "403": said("The caller is neither agent nor verifier."),
            "413": said("More than 1 MiB, or than 4 MiB unpacked."),
            "415": said("Another media type, or compressed in another way."),
            "429": said("A limit is reached.", **_WAIT),
            "503": said("The broker cannot answer now.", **_WAIT),
        },
    }
