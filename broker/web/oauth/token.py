"""The token, introspection and revocation endpoints (RFC 6749, 7523, 8693, 8707, 9396, 9449; 7662; 7009).

A client proves itself with its workload token; there are no client secrets. Each grant type is another way to say
the same request, and ends in the same verb.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flask import Blueprint, Response, request

from broker.domain import strict_json
from broker.domain.clock import epoch
from broker.domain.errors import BrokerError, Invalid, InvalidTarget, InvalidTaskDetails, Unauthenticated
from broker.domain.grant import GrantRequest, Issued
from broker.domain.identity import Caller, Role
from broker.domain.scope import parse_scope
from broker.web.auth import authenticate, known_now, proven_key
from broker.web.context import broker
from broker.web.operations import json_response
from broker.web.problems import OAuthError, oauth_response
from broker.web.reading import TooLarge, form, raw_body, single_header

token = Blueprint("token", __name__)

CLIENT_CREDENTIALS = "client_credentials"
JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
TOKEN_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"  # noqa: S105 - a grant type
_ASSERTION_TYPES = (
    "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
    "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe",
)
_JWT = "urn:ietf:params:oauth:token-type:jwt"
_ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"  # noqa: S105 - a token type
_DETAILS_TYPE = "urn:broker:task"
_MAX_IDENTIFIER = 1000
_DETAILS_MEMBERS = {"type", "task_id", "purpose"}


@token.errorhandler(BrokerError)
@token.errorhandler(OAuthError)
def refused(problem: BrokerError | OAuthError) -> Response:
    return oauth_response(problem, broker().settings.issuer)


@token.errorhandler(TooLarge)
def too_large(_problem: TooLarge) -> Response:
    return oauth_response(OAuthError("invalid_request", "the body is longer than 64 KiB", status=413), "")


@token.post("/oauth2/token")
def issue_token() -> Response:
    given = form(raw_body(request))
    grant_type = given.get("grant_type")
    if grant_type is None:
        raise Invalid("grant_type is missing", member="grant_type")
    if grant_type == CLIENT_CREDENTIALS:
        return _issue(_client(given), given)
    if grant_type == JWT_BEARER:
        return _issue(_bearer(given, "assertion", "invalid_grant"), given)
    if grant_type == TOKEN_EXCHANGE:
        return _exchange(given)
    raise OAuthError("unsupported_grant_type", f"grant_type {grant_type[:100]} is not one this broker knows")


@token.post("/oauth2/introspect")
def introspect() -> Response:
    given = form(raw_body(request))
    caller = _client_or_bearer(given)
    if not caller.has(Role.VERIFIER):
        return json_response({"active": False})
    return json_response(dict(broker().verification.introspect(caller, _required(given, "token"))))


@token.post("/oauth2/revoke")
def revoke() -> Response:
    given = form(raw_body(request))
    caller = known_now(_client_or_bearer(given))
    found = broker().verification.live_token(_required(given, "token"))
    if found is None:
        # RFC 7009 section 2.2: a token that opens nothing is already what the client wants it to be.
        return Response(status=200)
    grant = found.grant
    if caller.name not in (grant.agent, grant.orchestrator):
        raise OAuthError("unauthorized_client", "this token is neither yours nor of a task you opened")
    broker().revocation.revoke_grant(caller, grant.id)
    return Response(status=200)


def _exchange(given: Mapping[str, str]) -> Response:
    """RFC 8693: a workload's own token for a credential, or a live credential for its renewal."""
    subject = _required(given, "subject_token")
    subject_type = _required(given, "subject_token_type")
    if subject_type not in (_JWT, _ACCESS_TOKEN):
        raise Invalid(
            f"subject_token_type is not supported: send {_JWT} or {_ACCESS_TOKEN}", member="subject_token_type"
        )
    if given.get("requested_token_type", _ACCESS_TOKEN) not in (_JWT, _ACCESS_TOKEN):
        raise Invalid(f"requested_token_type is not supported: ask for {_ACCESS_TOKEN}", member="requested_token_type")
    if "actor_token" in given:
        raise Invalid("actor_token: acting on behalf of a user is not configured here", member="actor_token")
    if "client_assertion" not in given:
        return _issue(_bearer(given, "subject_token", "invalid_request"), given, exchanged=True)
    caller = _client(given)
    held = broker().verification.live_token(subject)
    if held is None:
        own = _bearer(given, "subject_token", "invalid_request")
        if own.name != caller.name:
            raise Invalid("subject_token: it is another workload's token; exchange your own", member="subject_token")
        return _issue(caller, given, exchanged=True)
    grant = held.grant
    if not grant.is_held_by(caller.principal):
        raise Invalid("subject_token: it is another agent's credential; renew your own", member="subject_token")
    if _target(given, default=grant.resource) != grant.resource:
        raise InvalidTarget("a renewal keeps its resource: ask for a new grant instead", member="resource")
    if "scope" in given and parse_scope(given["scope"]) != frozenset(grant.scopes):
        raise OAuthError("invalid_scope", "a renewal keeps its scope: ask for a new grant instead")
    if given.get("task_id", grant.task_id) != grant.task_id:
        raise OAuthError("invalid_grant", "a renewal keeps its task: ask for a new grant instead")
    issued = broker().issuance.renew(caller, grant.id, ttl=None, jkt=proven_key())
    return _answer(issued, exchanged=True)


def _issue(caller: Caller, given: Mapping[str, str], *, exchanged: bool = False) -> Response:
    details = _task_details(given.get("authorization_details"))
    task_id = given.get("task_id", details.get("task_id"))
    if details.get("task_id", task_id) != task_id:
        raise InvalidTaskDetails("task_id and authorization_details name two tasks", member="authorization_details")
    grant_request = GrantRequest(
        caller=caller,
        resource=_target(given),
        scopes=parse_scope(given.get("scope", "")),
        task_id=task_id,
        intent=details.get("purpose"),
        jkt=proven_key(),
    )
    return _answer(broker().issuance.issue(grant_request), exchanged=exchanged)


def _answer(issued: Issued, *, exchanged: bool) -> Response:
    credential, grant = issued.credential, issued.grant
    answer: dict[str, Any] = {
        "access_token": credential.token.reveal(),
        "token_type": credential.token_type,
        "expires_in": epoch(credential.expires_at) - epoch(broker().clock()),
        "scope": " ".join(grant.scopes),
        "grant_id": grant.id,
        "task_id": grant.task_id,
        "ttl_decided_by": grant.ttl_decided_by,
        "authorization_details": [{"type": _DETAILS_TYPE, "task_id": grant.task_id}],
    }
    if exchanged:
        answer["issued_token_type"] = _ACCESS_TOKEN
    return json_response(answer)


def _client(given: Mapping[str, str]) -> Caller:
    """The client, by its assertion (RFC 7523). Passwords and secrets are not a way in."""
    if _sends_a_secret(given):
        raise Unauthenticated("a client secret was sent")
    if given.get("client_assertion_type") not in _ASSERTION_TYPES:
        if "client_assertion" in given or "client_assertion_type" in given:
            raise Invalid(f"client_assertion_type must be {_ASSERTION_TYPES[0]}", member="client_assertion_type")
        raise Unauthenticated("no client assertion")
    if "client_assertion" not in given:
        raise Unauthenticated("no client assertion")
    caller = authenticate(given["client_assertion"])
    if given.get("client_id", caller.name) not in (caller.name, caller.principal.subject):
        raise Unauthenticated("client_id is not the subject of the assertion")
    return caller


def _sends_a_secret(given: Mapping[str, str]) -> bool:
    # Any Authorization header, not only one of a scheme Werkzeug can parse: a client that believes it authenticated
    # by "Basic ..." must not be taken for another one by what else it sent.
    return single_header("Authorization") is not None or "client_secret" in given


def _client_or_bearer(given: Mapping[str, str]) -> Caller:
    """Verifiers authenticate either way (RFC 7662 section 2.1)."""
    header = single_header("Authorization")
    if header is not None and header[:7].lower() == "bearer ":
        if "client_assertion" in given:
            raise Invalid("authenticate once: with client_assertion or with the Authorization header")
        return authenticate(header[7:])
    return _client(given)


def _bearer(given: Mapping[str, str], member: str, error: str) -> Caller:
    """A caller that could not authenticate as a client and sent its workload token as the grant itself."""
    workload_token = _required(given, member)
    if _sends_a_secret(given):
        raise Unauthenticated("a client secret was sent")
    try:
        caller = authenticate(workload_token)
    except Unauthenticated as refusal:
        raise OAuthError(error, f"{member}: {refusal.detail}") from refusal
    if "client_assertion" in given and _client(given).name != caller.name:
        raise OAuthError(error, f"{member}: it is not the client's own")
    if given.get("client_id", caller.name) not in (caller.name, caller.principal.subject):
        raise OAuthError("invalid_client", "client_id is not the subject of the token", status=401)
    return caller


def _target(given: Mapping[str, str], *, default: str | None = None) -> str:
    """The one resource: RFC 8707's `resource`, or the `audience` that cloud SDKs send."""
    resource, audience = given.get("resource"), given.get("audience")
    if resource is not None and audience is not None and resource != audience:
        raise InvalidTarget("resource and audience name two resources: a token has one audience", member="resource")
    found = resource or audience or default
    if found is None:
        raise InvalidTarget("name the resource the credential is for", member="resource")
    # As long as an identifier under /v1: what is refused later is recorded, and a column has an end.
    if len(found) > _MAX_IDENTIFIER:
        raise InvalidTarget(f"no resource has a name of more than {_MAX_IDENTIFIER} characters", member="resource")
    return found


def _task_details(text: str | None) -> Mapping[str, str]:
    """The task in `authorization_details` (RFC 9396): one element of our one type."""
    if text is None:
        return {}
    try:
        details = strict_json.loads(text.encode())
    except Invalid as problem:
        raise InvalidTaskDetails(problem.detail, member="authorization_details") from None
    shown = f'send [{{"type":"{_DETAILS_TYPE}","task_id":"task_..."}}]'
    if not isinstance(details, list) or len(details) != 1 or not isinstance(details[0], dict):
        raise InvalidTaskDetails(
            f"authorization_details is a list of one object: {shown}", member="authorization_details"
        )
    found = details[0]
    if found.get("type") != _DETAILS_TYPE:
        raise InvalidTaskDetails(
            f"the type of authorization_details is unknown: {shown}", member="authorization_details"
        )
    unknown = set(found) - _DETAILS_MEMBERS
    if unknown or not all(isinstance(value, str) and 0 < len(value) <= 1000 for value in found.values()):
        raise InvalidTaskDetails(
            f"authorization_details has other members than it may: {shown}", member="authorization_details"
        )
    if not all(value.isprintable() for value in found.values()):
        raise InvalidTaskDetails("authorization_details holds a control character", member="authorization_details")
    return found


def _required(given: Mapping[str, str], name: str) -> str:
    if name not in given:
        raise Invalid(f"{name} is missing", member=name)
    return given[name]
