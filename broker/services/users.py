"""On whose behalf an agent acts: a person's token, from an issuer of people, becomes a User (RFC 8693, ID-JAG).

Such a token never makes a caller: whoever presents it has proven itself by another, and stays visible as the actor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime

from broker.domain.catalogue import Catalogue, claim_at
from broker.domain.errors import Unauthenticated
from broker.domain.identity import Principal, User, WorkloadIdentity
from broker.providers import jose
from broker.services.authentication import Authenticator

# draft-ietf-oauth-identity-assertion-authz-grant: for one client, once, and for no more than it says.
_ID_JAG = "oauth-id-jag+jwt"
_LONGEST_NAME = 255
_LONGEST_VALUE = 255
_MOST_VALUES = 100


def is_of_a_user(token: str, catalogue: Catalogue) -> bool:
    """Whether this claims to come from an issuer of people. It chooses where a token is read, and nothing else."""
    try:
        issuer = jose.unverified(token).claims.get("iss")
    except Unauthenticated:
        return False
    return any(trusted.users and trusted.issuer == issuer for trusted in catalogue.issuers)


def acting_for(
    authenticator: Authenticator, token: str, actor: Principal, catalogue: Catalogue, *, now: datetime
) -> User:
    """The user behind this token, if `actor` may act for them by it; else Unauthenticated, whose reason is for our log.

    Opens a transaction for tokens that are for one use.
    """
    is_grant = jose.unverified(token).typ == _ID_JAG

    def admit(identity: WorkloadIdentity) -> None:
        if "cnf" in identity.claims:
            # INV-21: whoever presents it here has not shown its key.
            raise Unauthenticated("the user's token is bound to a key")
        _require_may_act(identity, actor, catalogue)
        if is_grant and identity.claims.get("client_id") not in (actor.name, actor.subject):
            raise Unauthenticated("the identity assertion was made for another client")

    identity = authenticator.identify_user(token, catalogue, now=now, once=is_grant, admit=admit)
    name = f"{identity.issuer}:{identity.subject}"
    if len(name) > _LONGEST_NAME:
        raise Unauthenticated(f"a subject of more than {_LONGEST_NAME} characters with its issuer is too long to keep")
    return User(
        name=name,
        expires_at=identity.expires_at,
        resources=_several(identity, "resource") if is_grant else None,
        scopes=_words(identity, "scope") if is_grant else None,
        for_one=is_grant or "may_act" in identity.claims,
        attributes=_attributes(identity, catalogue),
    )


def _attributes(identity: WorkloadIdentity, catalogue: Catalogue) -> Mapping[str, tuple[str, ...]]:
    """What the configuration lets in of what the issuer says of its user; each is a set of text.

    What is there and is no text refuses the token: left out, a policy that forbids by it would forbid nothing.
    """
    wanted = next(trusted.user_attributes for trusted in catalogue.issuers if trusted.name == identity.issuer)
    found: dict[str, tuple[str, ...]] = {}
    for name, path in wanted.items():
        claim = claim_at(identity.claims, path)
        if claim is not None and claim[1] is not None:
            found[name] = _texts(claim[1], path)
    return found


def _texts(value: object, path: str) -> tuple[str, ...]:
    found: set[str] = set()
    for one in value if isinstance(value, list) else [value]:
        text = json.dumps(one) if isinstance(one, bool | int) else one
        if not (isinstance(text, str) and text.isprintable() and len(text) <= _LONGEST_VALUE):
            raise Unauthenticated(f"the claim {path} of the user's token is neither plain text nor a list of it")
        found.add(text)
    if len(found) > _MOST_VALUES:
        raise Unauthenticated(f"the claim {path} of the user's token has more than {_MOST_VALUES} values")
    return tuple(sorted(found))


def _require_may_act(identity: WorkloadIdentity, actor: Principal, catalogue: Catalogue) -> None:
    """RFC 8693 section 4.4: who names one that may act names all that may."""
    claims = identity.claims
    if "may_act" not in claims:
        return
    named = claims["may_act"]
    if not isinstance(named, Mapping) or named.get("sub") != actor.subject:
        raise Unauthenticated("may_act names somebody else")
    issuers = {trusted.name: trusted.issuer for trusted in catalogue.issuers}
    # A subject means nothing without its issuer (INV-17); left out, it is the issuer of the token (RFC 8693).
    if named.get("iss", issuers[identity.issuer]) != issuers.get(actor.issuer):
        raise Unauthenticated("may_act names somebody of another issuer")
    if set(named) - {"sub", "iss"}:
        raise Unauthenticated("may_act says more than who: what is not understood is not met")


def _several(identity: WorkloadIdentity, claim: str) -> frozenset[str] | None:
    value = identity.claims.get(claim)
    if value is None:
        return None
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise Unauthenticated(f"the claim {claim} is not a name or a list of names")
    return frozenset(values)


def _words(identity: WorkloadIdentity, claim: str) -> frozenset[str] | None:
    value = identity.claims.get(claim)
    if value is None:
        return None
    if not isinstance(value, str):
        raise Unauthenticated(f"the claim {claim} is not text")
    return frozenset(value.split())
