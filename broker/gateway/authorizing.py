"""The gateway's decision: may this request pass to this upstream, and with which credential?

Everything is asked of the broker at this moment. A refusal says to the caller what the standard says (RFC 6750, RFC
9449) and no more; why stands in the log.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from broker.gateway.proofs import NotProven, Proofs
from broker.gateway.settings import NoSecret, Upstream, header_value, secret_in
from broker.sdk import BrokerError, Client, CredentialSource, Secret
from broker.sdk.verifier import jose

_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{1,8192}")
_TYPES = ("at+jwt", "jwt")  # what a resource's `token_typ` may be
_SAID = re.compile(r"[\x21-\x7e]{1,512}")
# Who acts for which task, for the log of the upstream.
_TOLD = {"X-Broker-Agent": "client_id", "X-Broker-Task": "task_id", "X-Broker-Grant": "grant_id"}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request that a proxy holds: what it was sent with, and for what. `target` is the path with its query."""

    method: str
    target: str
    authorization: str = field(repr=False)
    dpop: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Passed:
    """The headers to put on it, in place of any it has; an empty one takes off what it has."""

    headers: Mapping[str, Secret] = field(repr=False)
    grant_id: str


class Refused(Exception):
    """`challenge` is for the caller, `why` for the log."""

    def __init__(self, status: int, why: str, challenge: str | None = None) -> None:
        super().__init__(why)
        self.status, self.why, self.challenge = status, why, challenge


class Authorizing:
    """For one upstream, by tokens of `issuer`. `source` gives its credential where the broker makes it, else a file."""

    def __init__(
        self, upstream: Upstream, issuer: str, broker: Client, source: CredentialSource | None, proofs: Proofs
    ) -> None:
        self._upstream = upstream
        self._issuer = issuer
        self._broker = broker
        self._source = source
        self._proofs = proofs

    def decide(self, asked: Asked) -> Passed:
        """The headers with which it may pass; raises Refused."""
        needed = self._upstream.methods.get(asked.method)
        if needed is None:
            raise Refused(403, "its method is none that the upstream is opened for")
        scheme, token = self._presented(asked.authorization)
        claims = self._live(token)
        self._require_possession(asked, scheme, token, claims)
        scope = claims.get("scope")
        held = scope.split(" ") if isinstance(scope, str) else []
        if not set(needed) <= set(held):
            wanted = " ".join(needed)
            raise Refused(403, "its scopes are not enough", f'{scheme} error="insufficient_scope", scope="{wanted}"')
        grant_id = claims.get("grant_id")
        told = {
            name: Secret(value)
            for name, claim in _TOLD.items()
            if isinstance(value := claims.get(claim), str) and _SAID.fullmatch(value)
        }
        # The caller's token is for us, and stays here where the upstream's own goes elsewhere (INV-30).
        taken_off = {} if self._upstream.header.lower() == "authorization" else {"Authorization": Secret("")}
        return Passed(
            headers={**told, **taken_off, self._upstream.header: self._credential()},
            grant_id=grant_id if isinstance(grant_id, str) else "",
        )

    def _presented(self, authorization: str) -> tuple[str, str]:
        scheme, _, token = authorization.partition(" ")
        wanted = "DPoP" if self._upstream.require_dpop else "Bearer"
        if not authorization:
            raise Refused(401, "it has no token", wanted)
        spelled = {"bearer": "Bearer", "dpop": "DPoP"}.get(scheme.lower())
        # Two of them come joined by a comma, which no token has: which one is meant is not ours to guess.
        if spelled is None or not _TOKEN.fullmatch(token):
            raise Refused(401, "its Authorization is not one token", f'{wanted} error="invalid_token"')
        # Whoever has never had one of ours does not make us ask the broker (INV-35). Nothing is proven by it.
        if not self._looks_like_ours(token):
            raise Refused(401, "its token is none of the broker's", f'{wanted} error="invalid_token"')
        return spelled, token

    def _looks_like_ours(self, token: str) -> bool:
        try:
            parsed = jose.parse(token)
            return parsed.typ in _TYPES and jose.members(parsed.payload).get("iss") == self._issuer
        except jose.NotReadable:
            return False

    def _live(self, token: str) -> Mapping[str, Any]:
        try:
            answer = self._broker.introspect(token)
        except BrokerError as problem:
            # Ours is refused, or the broker is away: that says nothing of theirs, and is never a yes (INV-24).
            raise Refused(503, f"the broker cannot be asked: {problem.code}") from None
        claims = answer.raw
        if not answer.active or claims.get("aud") != self._upstream.audience:
            raise Refused(401, "the broker says that it opens nothing here", 'Bearer error="invalid_token"')
        return claims

    def _require_possession(self, asked: Asked, scheme: str, token: str, claims: Mapping[str, Any]) -> None:
        """A bound token needs its proof, and an unbound one is taken only where that is enough (INV-21)."""
        confirmation = claims.get("cnf")
        if confirmation is None:
            if scheme == "DPoP" or self._upstream.require_dpop:
                raise Refused(401, "it is not bound to a key", 'DPoP error="invalid_token", algs="ES256"')
            return
        thumbprint = confirmation.get("jkt") if isinstance(confirmation, Mapping) else None
        if scheme != "DPoP" or not isinstance(thumbprint, str) or len(confirmation) != 1:
            raise Refused(401, "it is bound to a key and shown without", 'DPoP error="invalid_token", algs="ES256"')
        try:
            self._proofs.check(
                asked.dpop,
                token=token,
                thumbprint=thumbprint,
                method=asked.method,
                url=f"{self._upstream.origin}{asked.target}",
            )
        except NotProven as problem:
            raise Refused(401, f"its proof: {problem}", 'DPoP error="invalid_dpop_proof", algs="ES256"') from None

    def _credential(self) -> Secret:
        """What the upstream wants in its header."""
        try:
            if self._upstream.credential_file is not None:
                secret = secret_in(self._upstream.credential_file)
            else:
                secret = header_value(self._brokered(), "the secret of the broker")
        except NoSecret as problem:
            raise Refused(503, f"there is no credential of the upstream: {problem}") from None
        except BrokerError as problem:
            raise Refused(503, f"there is no credential of the upstream: {problem.code}") from None
        value = secret.reveal()
        if self._upstream.scheme == "basic":
            return Secret(f"Basic {base64.b64encode(value.encode()).decode()}")
        return Secret(f"Bearer {value}" if self._upstream.scheme == "bearer" else value)

    def _brokered(self) -> str:
        if self._source is None or self._upstream.credential is None:
            raise NoSecret("nothing gives it")
        credential = self._source.credential()
        if credential.token is not None:
            return credential.reveal()
        data, member = credential.reveal_data(), self._upstream.credential.member
        names = ("username", "password") if member is None and self._upstream.scheme == "basic" else (member,)
        values = [value for name in names if name is not None and isinstance(value := data.get(name), str)]
        if len(values) != len(names):
            raise NoSecret(f"the secret has no member {member!r}; it has: {', '.join(sorted(data))}")
        return ":".join(values)
