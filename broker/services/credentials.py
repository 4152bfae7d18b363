"""From a grant to its token (RFC 9068). Signing is pure computation: it asks nobody and changes nothing."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from broker.domain.grant import Credential, Grant, Issued
from broker.domain.secret import Secret
from broker.providers.jwt import AccessToken, access_token_claims
from broker.services.standing import Standing


def signed(grant: Grant, standing: Standing, *, issuer: str, issued_at: datetime, expires_at: datetime) -> Issued:
    """One token of this grant, and the grant with the token's hash. It may not be handed out before that is durable."""
    if grant.jti is None or grant.status_list is None or grant.status_index is None:
        raise RuntimeError(f"{grant.id} was never issued and cannot be signed")
    resource = standing.catalogue.resource(grant.resource)
    claims = access_token_claims(
        AccessToken(
            issuer=issuer,
            subject=grant.subject_name,
            audience=grant.resource,
            client_id=grant.agent,
            issued_at=issued_at,
            expires_at=expires_at,
            jti=grant.jti,
            scopes=grant.scopes,
            task_id=grant.task_id,
            grant_id=grant.id,
            jkt=grant.jkt,
            status_uri=f"{issuer}/status-lists/{grant.status_list}",
            status_index=grant.status_index,
            trace_id=grant.trace_id,
            actors=grant.actors,
        )
    )
    token = Secret(standing.keys.current(resource.signing_algorithm).sign(claims, typ=resource.token_typ))
    credential = Credential(
        type="jwt", token=token, token_type="Bearer" if grant.jkt is None else "DPoP", expires_at=expires_at
    )
    return Issued(grant=replace(grant, credential_sha256=token.sha256()), credential=credential)
