"""The token, introspection and revocation endpoints (RFC 6749, 7523, 8693, 8707, 9396, 9449; 7662; 7009).

A client proves itself with its workload token; there are no client secrets. Each grant type is another way to say
the same request, and ends in the same verb.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from flask import Blueprint, Response

from broker.domain import strict_json
from broker.domain.approval import Case
from broker.domain.clock import epoch
from broker.domain.errors import Invalid, InvalidTarget, InvalidTaskDetails, NotFound, Unauthenticated
from broker.domain.grant import Authority, GrantRequest, Issued
from broker.domain.identity import Caller, Role, User
from broker.domain.scope import parse_scope
from broker.services.users import is_of_a_user
from broker.web.answers import Answer, json_response
from broker.web.auth import authenticate, known_now, proven_key, user_behind
from broker.web.context import broker, current
from broker.web.oauth import deferred
from broker.web.problems import OAuthError
from broker.web.reading import form, raw_body

token = Blueprint("token", __name__)

CLIENT_CREDENTIALS = "client_credentials"
JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
TOKEN_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"  # noqa: S105 - a grant type
_SPIFFE_ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe"
_ASSERTION_TYPES = ("urn:ietf:params:oauth:client-assertion-type:jwt-bearer", _SPIFFE_ASSERTION)
# What is wrong where a workload token that came in this parameter is not accepted; any other is the client's own.
_ERROR_OF = {"assertion": "invalid_grant", "subject_token": "invalid_request", "actor_token": "invalid_request"}
_JWT = "urn:ietf:params:oauth:token-type:jwt"
_ID_JAG = "urn:ietf:params:oauth:token-type:id-jag"
_ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"  # noqa: S105 - a token type
_DETAILS_TYPE = "urn:broker:task"
_MAX_IDENTIFIER = 1000
_DETAILS_MEMBERS = {"type", "task_id", "purpose"}


@token.post("/oauth2/token")
def issue_token() -> Answer:
    given = form(raw_body(None))
    grant_type = given.get("grant_type")
    if grant_type is None:
        raise Invalid("grant_type is missing", member="grant_type")
    if grant_type == CLIENT_CREDENTIALS:
        return _issue(_client(given), given)
    if grant_type == JWT_BEARER:
        client = _client(given) if "client_assertion" in given else None
        if client is not None and _is_of_a_user(given, "assertion"):
            return _issue_for_user(client, given, "assertion")
        return _issue(_bearer(given, "assertion", client), given, sent_as="assertion")
    if grant_type == TOKEN_EXCHANGE:
        return _exchange(given)
    if grant_type == deferred.DEFERRED:
        return _poll(given)
    raise OAuthError("unsupported_grant_type", f"grant_type {grant_type[:100]} is not one this broker knows")


@token.post("/oauth2/introspect")
def introspect() -> Answer:
    caller, given = _proven_form(ends=False)
    if not caller.has(Role.VERIFIER):
        return json_response({"active": False})
    return json_response(dict(broker().verification.introspect(caller, _required(given, "token"))))


@token.post("/oauth2/revoke")
def revoke() -> Response:
    caller, given = _proven_form(ends=True)
    caller = known_now(caller)
    live = broker().verification.live_token(_required(given, "token"))
    # RFC 7009 section 2.2: a token that opens nothing is already what the client wants it to be. One that is not the
    # caller's gets the same answer, or this were where to try whether a found token still lives.
    if live is not None and (
        live.grant.is_held_by(caller.principal) or caller.name in (live.grant.orchestrator, *live.grant.chain[-1:])
    ):
        # Of a name that many workloads have, only the one that handed it down is told anything but this.
        with suppress(NotFound):
            broker().revocation.revoke_grant(caller, live.grant.id)
    return Response(status=200)


def _exchange(given: Mapping[str, str]) -> Answer:
    """RFC 8693: a workload's own token for a credential, or a live credential for its renewal."""
    subject = _required(given, "subject_token")
    subject_type = _required(given, "subject_token_type")
    if subject_type not in (_JWT, _ACCESS_TOKEN, _ID_JAG):
        raise Invalid(
            f"subject_token_type is not supported: send {_JWT}, {_ACCESS_TOKEN} or {_ID_JAG}",
            member="subject_token_type",
        )
    if given.get("requested_token_type", _ACCESS_TOKEN) not in (_JWT, _ACCESS_TOKEN):
        raise Invalid(f"requested_token_type is not supported: ask for {_ACCESS_TOKEN}", member="requested_token_type")
    client = _actor(given)
    if client is not None and _is_of_a_user(given, "subject_token"):
        return _issue_for_user(client, given, "subject_token", exchanged=True)
    if client is not None:
        live = broker().verification.live_token(subject)
        if live is not None and live.grant.is_held_by(client.principal):
            return _renew(client, live.grant, given)
        # Asked before anything else of the request is looked at: what is wrong with it would tell that the token lives.
        if live is not None and broker().issuance.may_take(client, live.grant):
            return _issue(client, given, exchanged=True, parent=live.grant)
    # A live credential that is not for them is read as a workload token, like a dead one, and refused like it.
    return _issue(_bearer(given, "subject_token", client), given, sent_as="subject_token", exchanged=True)


def _is_of_a_user(given: Mapping[str, str], member: str) -> bool:
    return is_of_a_user(_required(given, member), broker().standing.last_known().catalogue)


def _issue_for_user(actor: Caller, given: Mapping[str, str], member: str, *, exchanged: bool = False) -> Answer:
    """RFC 8693 delegation: the user stays the subject, and the agent is who acts. Never a token without an actor."""
    with _judged(member):
        user = user_behind(given[member], actor)
    return _issue(actor, given, exchanged=exchanged, user=user)


def _actor(given: Mapping[str, str]) -> Caller | None:
    """Who acts (RFC 8693 section 2.1): the client, or where there is none the workload of `actor_token`."""
    client = _client(given) if "client_assertion" in given else None
    if "actor_token" not in given:
        if "actor_token_type" in given:
            raise Invalid("actor_token_type without an actor_token", member="actor_token_type")
        return client
    if given.get("actor_token_type") != _JWT:
        raise Invalid(f"actor_token_type is not supported: send {_JWT}", member="actor_token_type")
    return _bearer(given, "actor_token", client)


def _poll(given: Mapping[str, str]) -> Answer:
    """What was deferred, for the client that it was deferred for; however it proves itself."""
    client = "client_assertion" in given or "assertion" not in given
    made = deferred.poll(_client(given) if client else _bearer(given, "assertion", None), given)
    return _answer(made, exchanged=False) if isinstance(made, Issued) else made


def _renew(caller: Caller, grant: Authority, given: Mapping[str, str]) -> Answer:
    if _target(given, default=grant.resource) != grant.resource:
        raise InvalidTarget("a renewal keeps its resource: ask for a new grant instead", member="resource")
    if "scope" in given and parse_scope(given["scope"]) != frozenset(grant.scopes):
        raise OAuthError("invalid_scope", "a renewal keeps its scope: ask for a new grant instead")
    details = _task_details(given.get("authorization_details"))
    if (_task_of(given, details) or grant.task_id) != grant.task_id:
        raise OAuthError("invalid_grant", "a renewal keeps its task: ask for a new grant instead")
    broker().issuance.require_open(caller)
    issued = broker().renewal.renew(caller, grant.id, ttl=None, jkt=proven_key())
    return _answer(issued, exchanged=True)


def _issue(
    caller: Caller,
    given: Mapping[str, str],
    *,
    sent_as: str = "client_assertion",
    exchanged: bool = False,
    parent: Authority | None = None,
    user: User | None = None,
) -> Answer:
    """`sent_as` is the parameter that held the caller's workload token; a `parent` is handed down by its own token."""
    broker().issuance.require_open(caller)
    details = _task_details(given.get("authorization_details"))
    grant_request = GrantRequest(
        caller=caller,
        resource=_target(given, default=None if parent is None else parent.resource),
        scopes=parse_scope(given.get("scope", "")),
        task_id=_task_of(given, details),
        intent=details.get("purpose"),
        jkt=proven_key(),
        parent_grant_id=None if parent is None else parent.id,
        parent_by_token=parent is not None,
        user=user,
        may_wait=deferred.opted_in(given),
    )
    # Looked at again in there, at the time of the commit: it may have ended meanwhile.
    with _judged(sent_as):
        made = broker().issuance.request(grant_request)
    return deferred.pending(made) if isinstance(made, Case) else _answer(made, exchanged=exchanged)


def _task_of(given: Mapping[str, str], details: Mapping[str, str]) -> str | None:
    task_id = given.get("task_id", details.get("task_id"))
    if details.get("task_id", task_id) != task_id:
        raise InvalidTaskDetails("task_id and authorization_details name two tasks", member="authorization_details")
    return task_id


def _answer(issued: Issued, *, exchanged: bool) -> Answer:
    credential, grant = issued.token, issued.grant
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
    if given["client_assertion_type"] == _SPIFFE_ASSERTION and not _is_of_a_trust_domain(caller):
        raise Unauthenticated("client_assertion_type is jwt-spiffe, and the token's issuer is no SPIFFE trust domain")
    _require_subject(given, caller)
    return caller


def _is_of_a_trust_domain(caller: Caller) -> bool:
    issuers = broker().standing.last_known().catalogue.issuers
    return any(issuer.name == caller.principal.issuer and issuer.trust_domain is not None for issuer in issuers)


def _require_subject(given: Mapping[str, str], caller: Caller) -> None:
    if given.get("client_id", caller.name) not in (caller.name, caller.principal.subject):
        raise Unauthenticated("client_id is not the subject of the token")


def _sends_a_secret(given: Mapping[str, str]) -> bool:
    # Any Authorization header, not only one of a scheme Werkzeug can parse: a client that believes it authenticated
    # by "Basic ..." must not be taken for another one by what else it sent.
    return current().header("Authorization") is not None or "client_secret" in given


def _proven_form(*, ends: bool) -> tuple[Caller, Mapping[str, str]]:
    """The caller and its parameters. Verifiers authenticate either way (RFC 7662 section 2.1).

    Who sends its token as a header is known before its body is waited for, and waits with no stranger.
    """
    header = current().header("Authorization")
    if header is None or header[:7].lower() != "bearer ":
        given = form(raw_body(None, ends=ends))
        return _client(given), given
    caller = authenticate(header[7:])
    given = form(raw_body(caller, ends=ends))
    if "client_assertion" in given:
        raise Invalid("authenticate once: with client_assertion or with the Authorization header")
    return caller, given


def _bearer(given: Mapping[str, str], member: str, client: Caller | None) -> Caller:
    """The workload whose own token is the grant itself: a caller that could not authenticate as a client, or did."""
    workload_token = _required(given, member)
    if _sends_a_secret(given):
        raise Unauthenticated("a client secret was sent")
    # An actor_token is one only in an exchange, and only after it was read itself.
    others = ("client_assertion", "actor_token") if member == "subject_token" else ("client_assertion",)
    proven = {given.get(other) for other in others}
    if client is not None and workload_token in proven:
        # It is proven, and where its issuer's tokens are for one use, used.
        return client
    with _judged(member):
        caller = authenticate(workload_token)
        if client is not None and client.name != caller.name:
            current().caller = client.name
            raise Unauthenticated(f"{member} is not the client's own")
    _require_subject(given, caller)
    return caller


@contextmanager
def _judged(member: str) -> Iterator[None]:
    """A workload token that is not accepted, in the words for where it was sent. Why not, nobody outside is told."""
    try:
        yield
    except Unauthenticated as refusal:
        error = _ERROR_OF.get(member)
        if error is None:
            raise
        raise OAuthError(error, f"{member}: {refusal.detail}") from refusal


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
