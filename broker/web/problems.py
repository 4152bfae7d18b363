"""How a refusal looks outside: problem documents (RFC 9457) under `/v1`, OAuth errors (RFC 6749) under `/oauth2`.

The only place that knows both codes and HTTP statuses. An answer never holds a stack trace, a token, or why a
workload token was refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from broker.domain.errors import (
    BrokerError,
    Conflict,
    Forbidden,
    Invalid,
    InvalidProof,
    LimitExceeded,
    NonceRequired,
    NotFound,
    PolicyDenied,
    RoleMissing,
    Unauthenticated,
    Unavailable,
)
from broker.web.answers import Answer

# The first class that matches decides, so the narrow ones come first.
_STATUS: tuple[tuple[type[BrokerError], int], ...] = (
    (Unauthenticated, 401),
    (InvalidProof, 400),
    (NonceRequired, 400),
    (Invalid, 400),
    (Forbidden, 403),
    (NotFound, 404),
    (Conflict, 409),
    (LimitExceeded, 429),
    (Unavailable, 503),
)

TITLES: Mapping[str, str] = {
    "invalid_request": "The request cannot be understood",
    "invalid_target": "No such resource",
    "invalid_scope": "The scope is not offered",
    "invalid_authorization_details": "authorization_details cannot be read",
    "unauthenticated": "Who calls was not proven",
    "invalid_dpop_proof": "The DPoP proof proves nothing",
    "use_dpop_nonce": "The DPoP proof needs our nonce",
    "forbidden": "Not allowed",
    "role_missing": "The caller lacks the role",
    "policy_denied": "Policy does not allow it",
    "locked_down": "A lockdown stands over it",
    "not_found": "No such thing, or not for you to see",
    "conflict": "The state does not allow it",
    "task_not_active": "The task has ended",
    "idempotency_conflict": "The Idempotency-Key was used for something else",
    "limit_exceeded": "A limit is reached",
    "unavailable": "The broker cannot answer now",
    "provider_refused": "The system that makes the credential said no",
    "provider_unavailable": "The system that makes the credential did not answer",
    "configuration": "The broker's configuration or a key of it cannot be used",
    "method_not_allowed": "No such method here",
    "too_large": "The body is too large",
    "unsupported_media_type": "The wrong content type",
    "internal": "Something broke inside the broker",
}


def status_of(problem: BrokerError) -> int:
    return next((status for kind, status in _STATUS if isinstance(problem, kind)), 500)


def problem_response(problem: BrokerError, issuer: str, trace_id: str | None) -> Answer:
    """A BrokerError as `application/problem+json`."""
    status = status_of(problem)
    more: dict[str, Any] = {}
    if problem.member is not None:
        more["member"] = problem.member
    if isinstance(problem, Forbidden):
        # Null where somebody else than policy said no, so that nobody has to ask whether it is there.
        more["decision"] = None
    if isinstance(problem, PolicyDenied):
        more |= {"decision": problem.decision, "grant_id": problem.grant_id}
    if isinstance(problem, LimitExceeded):
        more["limit"] = {"name": problem.limit, "value": problem.value, "window_s": problem.window_s}
    return document(status, problem.code, problem.detail, issuer, trace_id, headers=_headers(problem, issuer), **more)


def document(
    status: int,
    code: str,
    detail: str,
    issuer: str,
    trace_id: str | None,
    *,
    headers: Mapping[str, str] | None = None,
    **more: Any,
) -> Answer:
    body = {
        "type": f"{issuer}/problems/{code}",
        "title": TITLES[code],
        "status": status,
        "detail": detail,
        "code": code,
        "trace_id": trace_id,
        **more,
    }
    return Answer(json.dumps(body), status, media_type="application/problem+json", headers=headers)


def _headers(problem: BrokerError, issuer: str) -> dict[str, str]:
    if isinstance(problem, Unauthenticated):
        # RFC 9728 section 5.1: where a client finds out how to authenticate here.
        metadata = f"{issuer}/.well-known/oauth-protected-resource/v1"
        return {"WWW-Authenticate": f'Bearer error="invalid_token", resource_metadata="{metadata}"'}
    if isinstance(problem, LimitExceeded):
        return {"Retry-After": str(problem.retry_after_s)}
    if isinstance(problem, Unavailable):
        return {"Retry-After": "2"}
    return {}


_OAUTH_CODES: tuple[tuple[type[BrokerError], str], ...] = (
    (RoleMissing, "unauthorized_client"),
    (Forbidden, "access_denied"),
    (Conflict, "invalid_grant"),
    (NotFound, "invalid_grant"),
    (LimitExceeded, "temporarily_unavailable"),
    (Unavailable, "temporarily_unavailable"),
)
# RFC 6749 section 5.2 allows these characters in error_description, and no others.
_NOT_IN_A_DESCRIPTION = re.compile(r"[^\x20-\x21\x23-\x5b\x5d-\x7e]")


class OAuthError(Exception):
    """An error that only the OAuth surface has a word for."""

    def __init__(self, error: str, description: str, *, status: int = 400) -> None:
        super().__init__(description)
        self.error = error
        self.description = description
        self.status = status


def oauth_response(
    problem: BrokerError | OAuthError,
    issuer: str,
    authorization: str = "",
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """A refusal as RFC 6749 section 5.2 wants it: with the scheme of the `Authorization` header that was tried."""
    if isinstance(problem, OAuthError):
        return _oauth(problem.error, problem.description, problem.status, headers or {})
    if isinstance(problem, Unauthenticated):
        scheme = "Basic" if authorization[:6].lower() == "basic " else "Bearer"
        return _oauth("invalid_client", problem.detail, 401, {"WWW-Authenticate": f'{scheme} realm="{issuer}"'})
    code = next((code for kind, code in _OAUTH_CODES if isinstance(problem, kind)), problem.code)
    overloaded = isinstance(problem, LimitExceeded | Unavailable)
    return _oauth(code, problem.detail, status_of(problem) if overloaded else 400, _headers(problem, issuer))


def _oauth(error: str, description: str, status: int, headers: Mapping[str, str]) -> Answer:
    plain = _NOT_IN_A_DESCRIPTION.sub("'", description)[:1000]
    return Answer(json.dumps({"error": error, "error_description": plain}), status, headers=headers)


REMEDIES: Mapping[str, str] = {
    "invalid_request": "The detail names the member and what to change. The request did nothing.",
    "invalid_target": "Name a resource exactly as the broker's administrator registered it.",
    "invalid_scope": "Ask for scopes the resource offers and the task includes.",
    "invalid_authorization_details": "Send one element of type urn:broker:task with a task_id.",
    "unauthenticated": "Send a fresh workload token of a trusted issuer with this broker as its only audience. "
    "Why a token was refused stands in the broker's log, under the trace id of the answer's X-Trace-Id header.",
    "invalid_dpop_proof": "Make a new proof for each request: method, URL, a fresh jti, the time now.",
    "use_dpop_nonce": "Repeat the request with the nonce of the DPoP-Nonce header in the proof.",
    "forbidden": "The detail says what is missing.",
    "role_missing": "Roles are given in the broker's configuration, under principals.",
    "policy_denied": "The decision names the policies and says what would be allowed.",
    "locked_down": "An admin lifts it with `broker lockdown lift ID`.",
    "not_found": "Check the id. What you may not see looks the same as what does not exist.",
    "conflict": "The thing has moved on: read it again.",
    "task_not_active": "Open a new task: an ended one never comes back.",
    "idempotency_conflict": "Use a new Idempotency-Key for a new request.",
    "limit_exceeded": "Wait as long as Retry-After says, or give back what is no longer needed.",
    "unavailable": "Try again as Retry-After says. Nothing was handed out.",
    "provider_refused": "Nothing was handed out. If it stays so, tell the broker's operator: what the other system "
    "said stands in the broker's log under the trace id.",
    "provider_unavailable": "Try again as Retry-After says. Nothing was handed out, and what the other system may have "
    "made is being revoked.",
    "configuration": "Only the broker's operator can mend it: tell them the detail. Nothing was handed out.",
    "method_not_allowed": "The Allow header lists the methods.",
    "too_large": "Requests are at most 64 KiB.",
    "unsupported_media_type": "JSON under /v1, form parameters under /oauth2.",
    "internal": "Nothing was handed out. Report the trace id.",
}


def page(code: str) -> str:
    """The human page of a problem type."""
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{TITLES[code]}</title>"
        "<style>body{font:1.1rem/1.5 system-ui;max-width:40rem;margin:4rem auto;padding:0 1rem}</style>"
        f"<h1>{TITLES[code]}</h1><p><code>{code}</code></p><p>{REMEDIES[code]}</p></html>"
    )
