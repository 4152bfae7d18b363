"""The WSGI application: routes, error pages, limits, health, metrics. One request is one span, one log line."""

from __future__ import annotations

import json
import secrets
import time
from functools import cache
from importlib.metadata import version

from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException

from broker import telemetry
from broker.domain.errors import BrokerError, Invalid, NotFound, RoleMissing, Unauthenticated
from broker.domain.identity import Role
from broker.web import auth, problems
from broker.web.api.audit import audit
from broker.web.api.grants import grants
from broker.web.api.policies import policies
from broker.web.api.revocations import revocations
from broker.web.api.tasks import tasks
from broker.web.bodies import Bodies
from broker.web.context import broker as house
from broker.web.oauth import described
from broker.web.oauth.metadata import metadata
from broker.web.oauth.token import token
from broker.web.operations import json_response, kept_response, openapi
from broker.web.problems import OAuthError
from broker.web.reading import MAX_BODY_BYTES, TooLarge, UnsupportedMediaType, printable, trace_id_of
from broker.wiring import Broker

API = (tasks, grants, revocations, policies, audit)
_SECURITY_HEADERS = (
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"),
)


def create_app(built: Broker) -> Flask:
    app = Flask("broker", static_folder=None)
    app.extensions["broker"] = built
    app.extensions["bodies"] = Bodies()
    # A body is read by `broker.web.reading` alone; this is for whoever forgets. One more, because a body without a
    # length that reaches this limit is cut off there without a word, and the reader must see that there was more.
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES + 1
    app.url_map.strict_slashes = True
    app.url_map.merge_slashes = False
    for operations in API:
        app.register_blueprint(operations.blueprint)
    app.register_blueprint(token)
    app.register_blueprint(metadata)
    app.before_request(_begin)
    app.after_request(_end)
    _add_error_pages(app)
    _add_pages(app)
    return app


def _begin() -> None:
    g.started = time.perf_counter()
    g.trace_id = trace_id_of(request.headers.get("traceparent", "")) or secrets.token_hex(16)
    g.caller = None
    if "Content-Length" in request.headers and "Transfer-Encoding" in request.headers:
        # RFC 9112 section 6.1: whoever reads the one and whoever reads the other see two different requests.
        raise Invalid("Content-Length and Transfer-Encoding: send the one or the other", member="Content-Length")


def _end(response: Response) -> Response:
    # Added and not set: nothing before this line names them, and looking that up is a tenth of a short answer.
    response.headers.extend((*_SECURITY_HEADERS, ("X-Trace-Id", g.trace_id)))
    # Whatever says nothing else is for whoever asked, now: a refusal that is kept outlives its reason.
    response.headers.setdefault("Cache-Control", "no-store")
    if not g.get("body_was_read", False) and (request.content_length or "Transfer-Encoding" in request.headers):
        # The server ends a connection on which a body was left unread. Unsaid, the client's next request on it is lost.
        response.headers["Connection"] = "close"
    if request.url_rule is not None and request.url_rule.rule.startswith("/problems"):
        response.headers["Content-Security-Policy"] = "default-src 'none'; style-src 'unsafe-inline'"
    route = request.url_rule.rule if request.url_rule is not None else "unknown"
    seconds = time.perf_counter() - g.started
    telemetry.answered(
        method=request.method,
        route=route,
        status=response.status_code,
        seconds=seconds,
        caller=g.caller,
        trace_id=g.trace_id,
    )
    return response


def _add_error_pages(app: Flask) -> None:
    """Each refusal in the words of its surface, for what never reached an endpoint too."""

    def refused(problem: BrokerError | OAuthError) -> Response:
        cause = problem.__cause__ if isinstance(problem, OAuthError) else problem
        if isinstance(cause, Unauthenticated):
            telemetry.unauthenticated(printable(cause.reason), g.trace_id)
        if isinstance(problem, OAuthError) or _is_oauth():
            return problems.oauth_response(problem, _issuer(), request.headers.get("Authorization", ""))
        return problems.problem_response(problem, _issuer(), g.trace_id)

    def said(status: int, code: str, detail: str, **headers: str) -> Response:
        if _is_oauth():
            error = "server_error" if status == 500 else "invalid_request"
            answer = problems.oauth_response(OAuthError(error, detail, status=status), _issuer())
            answer.headers.update(headers)
            return answer
        return problems.document(status, code, detail, _issuer(), g.trace_id, headers=headers)

    def other(problem: HTTPException) -> Response:
        status = problem.code or 500
        if status == 405:
            allowed = ", ".join(sorted(getattr(problem, "valid_methods", None) or ()))
            method, path = printable(request.method), printable(request.path)
            return said(405, "method_not_allowed", f"{method} is not a method of {path}: use {allowed}", Allow=allowed)
        if status == 413:
            return too_large(TooLarge())
        if status == 404:
            return said(
                404, "not_found", f"there is nothing at {printable(request.path)}: see {_issuer()}/openapi.json"
            )
        return said(status, "invalid_request", printable(problem.name))

    def too_large(_problem: TooLarge) -> Response:
        return said(413, "too_large", "the body is longer than 64 KiB, the most this broker reads")

    def media_type(problem: UnsupportedMediaType) -> Response:
        return said(415, "unsupported_media_type", f"send the body as {problem.wanted}")

    def broken(problem: Exception) -> Response:
        telemetry.broke(problem, g.trace_id)
        return said(500, "internal", f"it was logged under trace id {g.trace_id}: tell the broker's administrator")

    app.register_error_handler(BrokerError, refused)
    app.register_error_handler(OAuthError, refused)
    app.register_error_handler(HTTPException, other)
    app.register_error_handler(TooLarge, too_large)
    app.register_error_handler(UnsupportedMediaType, media_type)
    app.register_error_handler(Exception, broken)


def _add_pages(app: Flask) -> None:
    @app.get("/healthz")
    def healthz() -> Response:
        """Whether the process answers; says nothing of what it needs."""
        return json_response({"status": "ok"})

    @app.get("/readyz")
    def readyz() -> Response:
        """Whether it can do its work: the store answers, and holds a configuration."""
        standing = house().standing.now()
        return json_response({"status": "ok", "configuration_version": standing.catalogue.version})

    @app.get("/metrics")
    def metrics() -> Response:
        """For those who cannot reach the separate port: behind a workload token of an admin or auditor."""
        caller = auth.caller()
        if not (caller.has(Role.ADMIN) or caller.has(Role.AUDITOR)):
            raise RoleMissing(f"{caller.name} is neither admin nor auditor: scrape the metrics port instead")
        body, media_type = telemetry.exposition()
        return Response(body, content_type=media_type)

    @cache
    def described_api() -> bytes:
        # Once: it takes a tenth of a second, and anybody may ask (INV-35).
        declared = [operation for operations in API for operation in operations.declared]
        document = openapi(declared, _issuer(), version("agent-credential-broker"))
        document["paths"] |= described.paths()
        document["components"]["schemas"] |= described.components()
        return json.dumps(document, separators=(",", ":")).encode()

    @app.get("/openapi.json")
    def openapi_document() -> Response:
        return kept_response(described_api(), kept_for_s=60)

    @app.get("/problems/<code>")
    def problem_page(code: str) -> Response:
        title = problems.TITLES.get(code)
        if title is None:
            raise NotFound("there is no such problem")
        return Response(problems.page(code), mimetype="text/html")


def _is_oauth() -> bool:
    return request.path.startswith("/oauth2/")


def _issuer() -> str:
    return house().settings.issuer
