"""What this broker is, for machines: RFC 8414, RFC 9728, RFC 7517, and the status lists' own documents."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flask import Blueprint, Response

from broker.domain.catalogue import Catalogue
from broker.domain.errors import NotFound
from broker.domain.receipt import OFFLINE_BOUND
from broker.services.proofs import DPOP_ALGORITHMS
from broker.web.answers import Answer, json_response, kept_response
from broker.web.context import broker
from broker.web.oauth.deferred import COMPLETION_MODE, DEFERRED

metadata = Blueprint("metadata", __name__)

GRANT_TYPES = (
    "client_credentials",
    "urn:ietf:params:oauth:grant-type:jwt-bearer",
    "urn:ietf:params:oauth:grant-type:token-exchange",
    DEFERRED,
)
_KEPT_FOR_S = 60


@metadata.get("/.well-known/oauth-authorization-server")
@metadata.get("/.well-known/openid-configuration")
def server_metadata() -> Response:
    issuer = broker().settings.issuer
    catalogue = broker().standing.last_known().catalogue
    scopes = sorted({scope for resource in catalogue.resources for scope in resource.scopes})
    algorithms = _assertion_algorithms(catalogue)
    return _kept(
        {
            "issuer": issuer,
            # MCP clients demand the member, though nothing interactive is here yet.
            "authorization_endpoint": f"{issuer}/oauth2/authorize",
            "token_endpoint": f"{issuer}/oauth2/token",
            "introspection_endpoint": f"{issuer}/oauth2/introspect",
            "revocation_endpoint": f"{issuer}/oauth2/revoke",
            "jwks_uri": f"{issuer}/oauth2/jwks",
            "status_list_aggregation_endpoint": f"{issuer}/status-lists",
            "scopes_supported": scopes,
            "response_types_supported": ["none"],
            "grant_types_supported": list(GRANT_TYPES),
            "completion_modes_supported": [COMPLETION_MODE],
            "token_endpoint_auth_methods_supported": ["private_key_jwt"],
            "token_endpoint_auth_signing_alg_values_supported": algorithms,
            "introspection_endpoint_auth_methods_supported": ["private_key_jwt"],
            "introspection_endpoint_auth_signing_alg_values_supported": algorithms,
            "revocation_endpoint_auth_methods_supported": ["private_key_jwt"],
            "revocation_endpoint_auth_signing_alg_values_supported": algorithms,
            "authorization_details_types_supported": ["urn:broker:task"],
            "dpop_signing_alg_values_supported": list(DPOP_ALGORITHMS),
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["RS256", "ES256"],
            "service_documentation": f"{issuer}/openapi.json",
        }
    )


@metadata.get("/.well-known/oauth-protected-resource/v1")
def resource_metadata() -> Response:
    issuer = broker().settings.issuer
    document: dict[str, Any] = {
        "resource": f"{issuer}/v1",
        "bearer_methods_supported": ["header"],
        "resource_documentation": f"{issuer}/openapi.json",
    }
    # A SPIFFE trust domain is no authorization server that anybody could ask; an empty list is left out (RFC 9728).
    servers = sorted(
        entry.issuer
        for entry in broker().standing.last_known().catalogue.issuers
        if not entry.users and entry.issuer.startswith(("https://", "http://"))
    )
    if servers:
        document["authorization_servers"] = servers
    return _kept(document)


@metadata.get("/oauth2/jwks")
def jwks() -> Response:
    # No longer than a status list: a key that is no longer trusted must not live on in a cache (INV-25).
    document = json.dumps(dict(broker().verification.jwks())).encode()
    kept_for_s = int(OFFLINE_BOUND.total_seconds())
    return kept_response(document, kept_for_s=kept_for_s, media_type="application/jwk-set+json")


@metadata.get("/status-lists")
def status_lists() -> Answer:
    return json_response(dict(broker().verification.status_lists()))


@metadata.get("/status-lists/<list_id>")
def status_list(list_id: str) -> Response:
    # As many digits as our lists can ever have, and only those (INV-31).
    if not (list_id.isascii() and list_id.isdigit() and len(list_id) <= 9):
        raise NotFound("a status list has a number: see /status-lists")
    token = broker().verification.status_list(int(list_id))
    response = Response(token, mimetype="application/statuslist+jwt")
    # The token says itself how long it may be kept; a shared cache in between would add to the bound.
    response.headers["Cache-Control"] = "no-store"
    return response


@metadata.get("/oauth2/authorize")
def authorize() -> Response:
    page = (
        "<!doctype html><html lang=en><title>Nothing to sign in to</title><h1>Nothing to sign in to</h1>"
        "<p>This broker issues credentials to workloads that prove their identity at <code>/oauth2/token</code>. "
        "There is no interactive flow.</p></html>"
    )
    return Response(page, 400, mimetype="text/html")


def _assertion_algorithms(catalogue: Catalogue) -> list[str]:
    """Those in which at least one trusted issuer may sign; which one it is for whom is not for everybody."""
    return sorted({name for issuer in catalogue.issuers if not issuer.users for name in issuer.algorithms})


def _kept(document: Mapping[str, Any]) -> Response:
    return kept_response(json.dumps(document).encode(), kept_for_s=_KEPT_FOR_S)
