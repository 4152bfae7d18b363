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
        **_ssf_shapes(),
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
        **_ssf_paths(),
        "/healthz": {"get": _document("Whether the process answers", kept=False, asks_the_store=False)},
        "/readyz": {"get": _document("Whether it can do its work", kept=False)},
        "/metrics": {"get": _metrics()},
        "/problems/{code}": {"get": _page("What a problem means, for people", 200)},
        "/openapi.json": {"get": _document("This document", asks_the_store=False)},
        "/v1/traces": {"post": _spans()},
    }


_STREAM_ID = {**_TEXT, "maxLength": 64}
_SENTENCE = {**_TEXT, "maxLength": 1000}
_URIS = {"type": "array", "items": {**_TEXT, "minLength": 1, "maxLength": 255}, "maxItems": 100}
_SUBJECT = {"type": "object", "description": "A subject identifier (RFC 9493, SSF 1.0).", "required": ["format"]}
_SETS = {"type": "object", "description": "SETs by jti.", "additionalProperties": _TEXT}


def _ssf_shapes() -> dict[str, Any]:
    """Shapes of Shared Signals (OpenID SSF 1.0, RFC 8935, RFC 8936). Unknown members are ignored."""
    delivery = _object(
        {"method": {"enum": ["urn:ietf:rfc:8935", "urn:ietf:rfc:8936"]}, "endpoint_url": _TEXT}, required=("method",)
    )
    wish: dict[str, Any] = {"delivery": delivery, "events_requested": _URIS, "description": _SENTENCE}
    status = {"stream_id": _STREAM_ID, "status": {"enum": ["enabled", "paused", "disabled"]}, "reason": _SENTENCE}
    subject = {"stream_id": _STREAM_ID, "subject": _SUBJECT}
    whole = {"type": "integer", "minimum": 0}
    return {
        "StreamWish": _object(wish, required=()),
        "StreamChange": _object({"stream_id": _STREAM_ID, **wish}, required=("stream_id",)),
        "StreamConfiguration": _object(
            {
                "stream_id": _TEXT,
                "iss": _TEXT,
                "aud": _TEXT,
                "events_supported": _URIS,
                "events_delivered": _URIS,
                "min_verification_interval": whole,
                "inactivity_timeout": whole,
                **wish,
            },
            required=("stream_id", "iss", "aud", "events_delivered", "delivery"),
        ),
        "StreamStatus": _object(status, required=("stream_id", "status")),
        "StreamSubject": _object({**subject, "verified": {"type": "boolean"}}, required=("stream_id", "subject")),
        "StreamVerification": _object({"stream_id": _STREAM_ID, "state": _SENTENCE}, required=("stream_id",)),
        "StreamPoll": _object(
            {
                "maxEvents": whole,
                "returnImmediately": {"type": "boolean"},
                "ack": {"type": "array", "items": {**_TEXT, "minLength": 1, "maxLength": 1000}, "maxItems": 1000},
                "setErrs": {"type": "object", "additionalProperties": {"type": "object"}, "maxProperties": 1000},
            },
            required=(),
        ),
        "StreamPolled": _object({"sets": _SETS, "moreAvailable": {"type": "boolean"}}, required=("sets",)),
        "SetRefused": _object({"err": _TEXT, "description": _TEXT}, required=("err", "description")),
    }


def _ssf_paths() -> dict[str, Any]:
    named = [{"name": "stream_id", "in": "query", "required": True, "schema": _STREAM_ID}]
    either = [{**named[0], "required": False}]
    configuration = {
        "get": _of_stream("Read one stream, or all of one's own", None, "AnyJson", either),
        "post": _of_stream("Create a stream", "StreamWish", "StreamConfiguration", status="201"),
        "patch": _of_stream("Change a stream", "StreamChange", "StreamConfiguration"),
        "put": _of_stream("Replace a stream", "StreamChange", "StreamConfiguration"),
        "delete": _of_stream("Delete a stream", None, None, named, status="204"),
    }
    status = {
        "get": _of_stream("The status of a stream", None, "StreamStatus", named),
        "post": _of_stream("Enable, pause or disable a stream", "StreamStatus", "StreamStatus"),
    }
    id_ = [{"name": "id", "in": "path", "required": True, "schema": _TEXT}]
    heard: dict[str, Any] = {
        "summary": "Security events of other transmitters (RFC 8935)",
        "security": [],
        "requestBody": {"required": True, "content": {"application/secevent+jwt": {"schema": _TEXT}}},
        "responses": {
            "202": {"description": "Heard, now or before."},
            "400": {
                "description": "Refused, in the words of RFC 8935.",
                "content": {"application/json": {"schema": _reference("SetRefused")}},
            },
            **{refused: {"$ref": f"#/components/responses/{refused}"} for refused in ("413", "503")},
        },
    }
    add = _of_stream("Hear of a subject again", "StreamSubject", None)
    remove = _of_stream("Hear no more of a subject", "StreamSubject", None, status="204")
    return {
        "/.well-known/ssf-configuration": {"get": _document("Metadata of this transmitter (SSF 1.0)")},
        "/ssf/streams": configuration,
        "/ssf/status": status,
        "/ssf/subjects:add": {"post": add},
        "/ssf/subjects:remove": {"post": remove},
        "/ssf/verify": {
            "post": _of_stream("Have a verification event", "StreamVerification", None, status="204"),
        },
        "/ssf/poll/{id}": {"post": _of_stream("Poll a stream (RFC 8936)", "StreamPoll", "StreamPolled", id_)},
        "/ssf/events": {"post": heard},
    }


def _of_stream(
    summary: str,
    body: str | None,
    answer: str | None,
    parameters: list[dict[str, Any]] | None = None,
    *,
    status: str = "200",
) -> dict[str, Any]:
    """One operation on a stream, for its receiver."""
    done: dict[str, Any] = {"description": "The answer." if answer else "Done."}
    if answer is not None:
        schema: dict[str, Any] = {} if answer == "AnyJson" else _reference(answer)
        done |= {"content": {"application/json": {"schema": schema}}, "headers": {"Cache-Control": _HEADER}}
    refusals = ("400", "401", "403", "404", "409", "413", "415", "429", "503")
    found: dict[str, Any] = {
        "summary": summary,
        "parameters": parameters or [],
        "responses": {status: done, **{one: {"$ref": f"#/components/responses/{one}"} for one in refusals}},
    }
    if body is not None:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": _reference(body)}}}
    return found


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
            "413": said("More than 1 MiB, or unpacked than 1 MiB of protobuf or 4 MiB of JSON."),
            "415": said("Another media type, or compressed in another way."),
            "429": said("A limit is reached.", **_WAIT),
            "503": said("The broker cannot answer now.", **_WAIT),
        },
    }
