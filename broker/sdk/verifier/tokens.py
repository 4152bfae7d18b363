"""The broker's access tokens (RFC 9068), read offline: signature, issuer, type, audience, times, and what binds them.

What is said here needs no network. Whether the token was revoked since is another question, and
`broker.sdk.verifier.feed` and `broker.sdk.verifier.lists` answer it.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from broker.sdk.verifier import jose
from broker.sdk.verifier.jose import Key, NotReadable
from broker.sdk.verifier.moments import LEEWAY_S, Moment
from broker.sdk.verifier.refused import Refused

_MAX_ACTORS = 32
_LIST_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")
_THUMBPRINT = re.compile(r"[A-Za-z0-9_-]{43}")

# What a revocation names: an axis and a value on it.
Mark = tuple[str, str]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Token:
    """One access token that is signed by `key`. `marks` are all the names by which a bulk revocation can mean it."""

    digest: bytes = field(repr=False)
    ath: str = field(repr=False)
    kid: str
    key: Key
    payload: bytes = field(repr=False)
    subject: str
    client_id: str
    actors: tuple[str, ...]
    task_id: str
    grant_id: str
    scopes: frozenset[str]
    issued_at: int
    not_before: int
    expires_at: int
    bound_to: str | None
    list_uri: str
    index: int
    marks: tuple[Mark, ...] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a token must be to be for this resource."""

    issuer: str
    audience: str
    typ: str
    algorithms: frozenset[str]
    longest_life_s: int

    @property
    def list_prefix(self) -> str:
        return f"{self.issuer}/status-lists/"


def read(token: str, keys: Mapping[str, Key], expected: Expected) -> Token:
    """The token, if it is the broker's and for this resource; its times are another question, asked again each time."""
    try:
        parsed = jose.parse(token)
    except NotReadable as problem:
        raise Refused("malformed_token", str(problem)) from None
    if parsed.typ != expected.typ:
        raise Refused("wrong_type", f"typ is not {expected.typ}")
    if parsed.algorithm not in expected.algorithms:
        raise Refused("wrong_algorithm", f"it is none of {', '.join(sorted(expected.algorithms))}")
    key = keys.get(parsed.kid or "")
    if key is None or parsed.kid is None:
        raise Refused("unknown_key")
    if parsed.algorithm != key.algorithm:
        # Otherwise a public key could be tried as an HMAC secret, or an RSA key as something else (RFC 8725 3.1).
        raise Refused("wrong_algorithm")
    try:
        parsed.require(key)
    except NotReadable:
        raise Refused("bad_signature") from None
    try:
        claims = jose.members(parsed.payload)
        if claims.get("iss") != expected.issuer:
            raise Refused("wrong_issuer")
        if claims.get("aud") not in (expected.audience, [expected.audience]):
            raise Refused("wrong_audience")
        return _token(token, parsed.payload, parsed.kid, key, claims, expected)
    except NotReadable as problem:
        raise Refused("malformed_token", str(problem)) from None


def _token(token: str, payload: bytes, kid: str, key: Key, claims: Mapping[str, Any], expected: Expected) -> Token:
    issued_at, expires_at = jose.seconds(claims, "iat"), jose.seconds(claims, "exp")
    not_before = jose.seconds(claims, "nbf") if "nbf" in claims else issued_at
    if not issued_at < expires_at <= issued_at + expected.longest_life_s:
        # Refusals are remembered for as long as a token can live, and not for longer.
        raise NotReadable(f"it does not live for 1 to {expected.longest_life_s} s")
    jose.text(claims, "jti")
    subject, client_id = jose.text(claims, "sub"), jose.text(claims, "client_id")
    task_id, grant_id = jose.text(claims, "task_id"), jose.text(claims, "grant_id")
    scope = claims.get("scope", "")
    if not isinstance(scope, str):
        raise NotReadable("scope is not a string")
    actors = _actors(claims)
    list_uri, index = _place(claims, expected.list_prefix)
    ascii_token = token.encode("ascii")
    digest = hashlib.sha256(ascii_token).digest()
    marks: list[Mark] = [("all", ""), ("resource", expected.audience), ("key", kid), ("user", subject)]
    # The subject may be a user or the first agent of a chain; names of the one are never names of the other.
    marks += [("agent", agent) for agent in sorted({client_id, subject, *actors})]
    return Token(
        digest=digest,
        ath=jose.base64url(digest),
        kid=kid,
        key=key,
        payload=payload,
        subject=subject,
        client_id=client_id,
        actors=actors,
        task_id=task_id,
        grant_id=grant_id,
        scopes=frozenset(scope.split(" ")) - {""},
        issued_at=issued_at,
        not_before=not_before,
        expires_at=expires_at,
        bound_to=_bound_to(claims),
        list_uri=list_uri,
        index=index,
        marks=tuple(marks),
    )


def _actors(claims: Mapping[str, Any]) -> tuple[str, ...]:
    """Who acts, then for whom that one acts, and so on (RFC 8693 section 4.1)."""
    found: list[str] = []
    below: Mapping[str, Any] = claims
    while "act" in below:
        act = below["act"]
        if not isinstance(act, dict) or len(found) == _MAX_ACTORS:
            raise NotReadable("act is not a chain of actors")
        found.append(jose.text(act, "sub"))
        below = act
    return tuple(found)


def _bound_to(claims: Mapping[str, Any]) -> str | None:
    if "cnf" not in claims:
        return None
    cnf = claims["cnf"]
    # One way of being bound is known here. A token that is bound in another way as well is not half of a bound one.
    if not isinstance(cnf, dict) or list(cnf) != ["jkt"] or not _THUMBPRINT.fullmatch(str(cnf["jkt"])):
        raise NotReadable("cnf is not the thumbprint of one key")
    return str(cnf["jkt"])


def _place(claims: Mapping[str, Any], prefix: str) -> tuple[str, int]:
    status = claims.get("status")
    entry = status.get("status_list") if isinstance(status, dict) else None
    uri, index = (entry.get("uri"), entry.get("idx")) if isinstance(entry, dict) else (None, None)
    # Only the broker's own lists: whoever could name another place would be asked by us.
    if not isinstance(uri, str) or not uri.startswith(prefix) or not _LIST_ID.fullmatch(uri, len(prefix)):
        raise NotReadable("it points to no status list of the issuer")
    if type(index) is not int or not 0 <= index < 2**31:
        raise NotReadable("its place in the status list is not a number")
    return uri, index


def require_now(token: Token, now: Moment) -> None:
    """Refuse outside of the token's life. Its end is exclusive, without leeway: that would be authority nobody gave."""
    if now.broker >= token.expires_at:
        raise Refused("expired")
    if now.broker + LEEWAY_S < max(token.issued_at, token.not_before):
        raise Refused("not_yet_valid")


class Seen:
    """Tokens whose signature was verified, by their hash: of at most `most`, the oldest makes room."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._tokens: dict[bytes, Token] = {}
        self.reset()

    def reset(self) -> None:
        """After a fork: whoever held the lock is not there."""
        self._lock = threading.Lock()

    def get(self, token: str, keys: Mapping[str, Key]) -> Token | None:
        if len(token) > jose.MAX_TOKEN_BYTES:
            return None
        found = self._tokens.get(hashlib.sha256(token.encode("ascii", "replace")).digest())
        # A key that is no longer published verifies nothing any more.
        return found if found is not None and keys.get(found.kid) is found.key else None

    def put(self, token: Token) -> None:
        with self._lock:
            self._tokens.pop(token.digest, None)
            while self._tokens and len(self._tokens) >= self._most:
                del self._tokens[next(iter(self._tokens))]
            if self._most:
                self._tokens[token.digest] = token
