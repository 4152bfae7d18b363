"""What is around every answer, whichever door it leaves by: its trace, its refusal, its last headers, its log line."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable

from werkzeug.exceptions import HTTPException

from broker import telemetry
from broker.domain.errors import BrokerError, Invalid, LimitExceeded, Unauthenticated
from broker.web import problems
from broker.web.answers import Answer
from broker.web.context import Call, current
from broker.web.problems import OAuthError
from broker.web.reading import TooLarge, UnsupportedMediaType, printable, trace_id_of

_SECURITY_HEADERS = (
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"),
)


def begin(call: Call) -> None:
    """Name the call, and refuse what is two requests in one."""
    call.trace_id = trace_id_of(call.header("traceparent") or "") or secrets.token_hex(16)
    if call.header("Content-Length") is not None and call.header("Transfer-Encoding") is not None:
        # RFC 9112 section 6.1: whoever reads the one and whoever reads the other see two different requests.
        raise Invalid("Content-Length and Transfer-Encoding: send the one or the other", member="Content-Length")


def last_headers(call: Call, named: Iterable[str]) -> list[tuple[str, str]]:
    """What every answer says besides what it says itself, which is `named`."""
    headers = [*_SECURITY_HEADERS, ("X-Trace-Id", call.trace_id)]
    if "Cache-Control" not in named:
        # Whatever says nothing else is for whoever asked, now: a refusal that is kept outlives its reason.
        headers.append(("Cache-Control", "no-store"))
    if not call.body_was_read and (call.content_length or call.header("Transfer-Encoding") is not None):
        # The server ends a connection on which a body was left unread. Unsaid, the client's next request on it is lost.
        headers.append(("Connection", "close"))
    return headers


def answered(call: Call, route: str, status: int) -> None:
    """Count the call and write its line. `route` is the rule and never the path."""
    telemetry.answered(
        method=call.method,
        route=route,
        status=status,
        seconds=time.perf_counter() - call.started,
        caller=call.caller,
        trace_id=call.trace_id,
    )


def refusal(problem: Exception) -> Answer:
    """Each refusal in the words of its surface, for what never reached an endpoint too."""
    call = current()
    issuer = call.broker.settings.issuer
    if isinstance(problem, BrokerError | OAuthError):
        cause = problem.__cause__ if isinstance(problem, OAuthError) else problem
        if isinstance(cause, Unauthenticated):
            telemetry.unauthenticated(printable(cause.reason), call.trace_id)
        if isinstance(cause, LimitExceeded):
            telemetry.limited(cause.limit)
        if isinstance(problem, OAuthError) or _is_oauth(call):
            return problems.oauth_response(problem, issuer, call.header("Authorization") or "")
        return problems.problem_response(problem, issuer, call.trace_id)
    if isinstance(problem, TooLarge):
        return _said(413, "too_large", "the body is longer than 64 KiB, the most this broker reads")
    if isinstance(problem, UnsupportedMediaType):
        return _said(415, "unsupported_media_type", f"send the body as {problem.wanted}")
    if isinstance(problem, HTTPException):
        return _of_http(call, problem)
    telemetry.broke(problem, call.trace_id)
    return _said(500, "internal", f"it was logged under trace id {call.trace_id}: tell the broker's administrator")


def _of_http(call: Call, problem: HTTPException) -> Answer:
    status = problem.code or 500
    if status == 405:
        allowed = ", ".join(sorted(getattr(problem, "valid_methods", None) or ()))
        method, path = printable(call.method), printable(call.path)
        return _said(405, "method_not_allowed", f"{method} is not a method of {path}: use {allowed}", Allow=allowed)
    if status == 413:
        return refusal(TooLarge())
    if status == 404:
        issuer = call.broker.settings.issuer
        return _said(404, "not_found", f"there is nothing at {printable(call.path)}: see {issuer}/openapi.json")
    return _said(status, "invalid_request", printable(problem.name))


def _said(status: int, code: str, detail: str, **headers: str) -> Answer:
    call = current()
    issuer = call.broker.settings.issuer
    if _is_oauth(call):
        error = "server_error" if status == 500 else "invalid_request"
        return problems.oauth_response(OAuthError(error, detail, status=status), issuer, headers=headers)
    return problems.document(status, code, detail, issuer, call.trace_id, headers=headers)


def _is_oauth(call: Call) -> bool:
    return call.path.startswith("/oauth2/")
