"""The WSGI application: routes, limits, health, metrics. One request is one span, one log line."""

from __future__ import annotations

import json
from functools import cache

from flask import Flask, Response, request

from broker import __version__, telemetry
from broker.domain.errors import NotFound, RoleMissing
from broker.domain.identity import Role
from broker.web import auth, envelope, problems
from broker.web.answers import Answer, json_response, kept_response
from broker.web.api.activities import activities
from broker.web.api.approvals import approvals
from broker.web.api.audit import audit
from broker.web.api.event_streams import event_streams
from broker.web.api.grants import grants
from broker.web.api.leases import leases
from broker.web.api.policies import policies
from broker.web.api.reviews import reviews
from broker.web.api.revocations import revocations
from broker.web.api.signals import signals
from broker.web.api.tasks import tasks
from broker.web.bodies import Bodies
from broker.web.context import broker as house
from broker.web.context import current
from broker.web.front import Front
from broker.web.oauth import described
from broker.web.oauth.metadata import metadata
from broker.web.oauth.token import token
from broker.web.operations import openapi
from broker.web.otlp import otlp
from broker.web.reading import MAX_BODY_BYTES
from broker.web.ssf import ssf
from broker.wiring import Broker

API = (
    tasks,
    grants,
    approvals,
    reviews,
    leases,
    revocations,
    signals,
    event_streams,
    policies,
    audit,
    activities,
)
# What agents and verifiers ask all day long, and what nobody else waits for.
_BUSY = ("grants.request_grant", "token.issue_token", "token.introspect")


def create_app(built: Broker) -> Flask:
    app = Flask("broker", static_folder=None)
    app.extensions["broker"] = built
    app.extensions["bodies"] = bodies = Bodies()
    # A body is read by `broker.web.reading` alone; this is for whoever forgets.
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES
    app.url_map.strict_slashes = True
    app.url_map.merge_slashes = False
    for operations in API:
        app.register_blueprint(operations.blueprint)
    app.register_blueprint(token)
    app.register_blueprint(metadata)
    app.register_blueprint(otlp)
    app.register_blueprint(ssf)
    app.before_request(_begin)
    app.after_request(_end)
    app.register_error_handler(Exception, envelope.refusal)
    _add_pages(app)
    app.wsgi_app = Front(app, _BUSY, built, bodies)  # type: ignore[method-assign]
    return app


def _begin() -> None:
    envelope.begin(current())


def _end(response: Response) -> Response:
    call = current()
    # Added and not set: nothing before this line names them, and looking that up is a tenth of a short answer.
    response.headers.extend(envelope.last_headers(call, response.headers.keys()))
    route = request.url_rule.rule if request.url_rule is not None else "unknown"
    if route.startswith("/problems"):
        response.headers["Content-Security-Policy"] = "default-src 'none'; style-src 'unsafe-inline'"
    envelope.answered(call, route, response.status_code)
    return response


def _add_pages(app: Flask) -> None:
    @app.get("/healthz")
    def healthz() -> Answer:
        """Whether the process answers; says nothing of what it needs."""
        return json_response({"status": "ok"})

    @app.get("/readyz")
    def readyz() -> Answer:
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
        document = openapi(declared, _issuer(), __version__)
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


def _issuer() -> str:
    return house().settings.issuer
