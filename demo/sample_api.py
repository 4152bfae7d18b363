"""A tiny CRM that opens to the broker's credentials: all that a verifier has to do, in one file.

::

    python -m demo.sample_api --broker http://127.0.0.1:8080 --token-file crm-api.token --port 8090
    curl -H "Authorization: Bearer $CREDENTIAL" http://127.0.0.1:8090/contacts

A call is answered only if three witnesses agree, and each answer says what they said:

1. the token itself: signed by the broker, for this API alone, not expired, with the scope that the call needs;
2. the signed status list, kept no longer than its `ttl`: enough for an API that must not ask on each call, and it
   learns of a revocation within 15 s;
3. introspection, which knows at once.

Whatever cannot be proven is refused, with 503 where asking again later may help (INV-24, INV-25).
"""

from __future__ import annotations

import argparse
import base64
import binascii
import re
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import jwt
from flask import Flask, Response, jsonify, request
from jwt.types import Options
from werkzeug.serving import make_server

from broker.sdk import BrokerError, Client

RESOURCE = "https://crm.example/api"
CONTACTS = (
    {"company": "Example Bakery", "mail": "office@bakery.example", "note": "asked for a quote"},
    {"company": "Example Cycles", "mail": "hello@cycles.example", "note": "wants to be called in June"},
)

# Chosen here and not by the token (INV-18): what this resource is signed with.
_ALGORITHMS = ("ES256",)
_REQUIRED = ("iss", "aud", "sub", "client_id", "iat", "exp", "jti", "scope", "status", "task_id", "grant_id")
_LIST_REQUIRED = ("sub", "iat", "exp", "ttl", "status_list")
_DEADLINE_S = 2.0
_KEYS_KEPT_S = 60.0
_BOUND_S = 15  # published by the broker: no status list may be trusted for longer
_MAX_TOKEN_BYTES = 8192
_MAX_LIST_BYTES = 1 << 20  # as sent, and once decompressed: four million tokens
_STATUSES = {0: "valid", 1: "revoked", 2: "suspended"}


class Refused(Exception):
    """Why a call is not answered, and what each witness had said until then."""

    def __init__(self, status: int, error: str, why: str, checked: Mapping[str, str] | None = None) -> None:
        super().__init__(why)
        self.status, self.error, self.why = status, error, why
        self.checked: Mapping[str, str] = checked or {}


def invalid(why: str) -> Refused:
    return Refused(401, "invalid_token", why)


def unprovable(why: str) -> Refused:
    return Refused(503, "temporarily_unavailable", why)


@dataclass(frozen=True, kw_only=True)
class Accepted:
    claims: Mapping[str, Any]
    checked: Mapping[str, str]


class SignedByBroker:
    """Reads what the broker signed: its type, its algorithm and its key are ours to choose, not the token's."""

    def __init__(self, issuer: str) -> None:
        self._issuer = issuer
        self._keys = jwt.PyJWKClient(f"{issuer}/oauth2/jwks", lifespan=_KEYS_KEPT_S, timeout=_DEADLINE_S)

    def claims(self, token: str, *, typ: str, required: tuple[str, ...], audience: str | None = None) -> dict[str, Any]:
        """The claims of a token of this type that has not expired; without `audience` it must name none."""
        options: Options = {"require": list(required), "strict_aud": True}
        try:
            header = jwt.get_unverified_header(token)
            if str(header.get("typ")).lower() != typ:
                raise invalid(f"the token is not of type {typ}")
            if header.get("alg") not in _ALGORITHMS:
                raise invalid(f"the token is not signed with {' or '.join(_ALGORITHMS)}")
            key = self._key(str(header.get("kid")))
            # Both clocks are this machine's, so there is no leeway.
            return jwt.decode(
                token, key, algorithms=list(_ALGORITHMS), issuer=self._issuer, audience=audience, options=options
            )
        except jwt.PyJWTError as problem:
            raise invalid(f"the token is not good: {problem}") from None

    def _key(self, kid: str) -> jwt.PyJWK:
        try:
            return self._keys.get_signing_key(kid)
        except (jwt.PyJWKClientConnectionError, jwt.PyJWKSetError, OSError, ValueError):
            raise unprovable("the broker's keys cannot be fetched") from None
        except jwt.PyJWKClientError:
            raise invalid("the token is signed by no key of the broker") from None


@dataclass(frozen=True, kw_only=True)
class _List:
    packed: bytes
    bits: int
    issued_at: int
    kept_from: float
    kept_until: float

    def is_fresh(self, now: float) -> bool:
        # A clock that was set back must not make a list younger.
        return self.kept_from <= now < self.kept_until

    def status_at(self, index: int) -> int:
        if not 0 <= index < len(self.packed) * 8 // self.bits:
            raise invalid("the token points beyond its status list")
        at = index * self.bits
        return self.packed[at >> 3] >> (at & 7) & ((1 << self.bits) - 1)


class StatusLists:
    """IETF Token Status Lists of one broker, fetched when needed and kept for their `ttl`."""

    def __init__(self, issuer: str, signed: SignedByBroker, clock: Callable[[], float]) -> None:
        # Only the broker's own lists: whoever could name another place would be asked by us.
        self._place = re.compile(re.escape(issuer) + "/status-lists/[0-9]{1,9}")
        self._signed = signed
        self._clock = clock
        self._http = httpx.Client(timeout=_DEADLINE_S, follow_redirects=False, trust_env=False)
        self._kept: dict[str, _List] = {}
        self._fetching = threading.Lock()

    def say(self, reference: object) -> tuple[int, str]:
        """The status that a `status` claim points to, and a sentence of how fresh that is."""
        uri, index = self._where(reference)
        with self._fetching:
            now = self._clock()
            kept = self._kept.get(uri)
            if kept is None or not kept.is_fresh(now):
                # Forgotten first: if the new one cannot be had, the old one must not answer.
                self._kept.pop(uri, None)
                kept = self._kept[uri] = self._read(uri, self._fetch(uri), now)
        status = kept.status_at(index)
        as_of = datetime.fromtimestamp(kept.issued_at, UTC).strftime("%H:%M:%SZ")
        again_in = max(1, round(kept.kept_until - now))
        return status, f"{_STATUSES.get(status, 'unknown')}, as of {as_of}, asked again in {again_in} s"

    def close(self) -> None:
        self._http.close()

    def _where(self, reference: object) -> tuple[str, int]:
        entry = reference.get("status_list") if isinstance(reference, Mapping) else None
        uri, index = (entry.get("uri"), entry.get("idx")) if isinstance(entry, Mapping) else (None, None)
        if not isinstance(uri, str) or not self._place.fullmatch(uri) or type(index) is not int:
            raise invalid("the token points to no status list of the broker")
        return uri, index

    def _fetch(self, uri: str) -> str:
        try:
            with self._http.stream("GET", uri, headers={"Accept": "application/statuslist+jwt"}) as answer:
                if answer.status_code != 200:
                    raise unprovable(f"the broker answered {answer.status_code} for its status list")
                body = bytearray()
                for chunk in answer.iter_bytes():
                    body += chunk
                    if len(body) > _MAX_LIST_BYTES:
                        raise unprovable("the status list is too long to be one")
        except httpx.HTTPError:
            raise unprovable("the status list cannot be fetched") from None
        return body.decode("ascii", errors="replace")

    def _read(self, uri: str, token: str, now: float) -> _List:
        """A list that is proven to be this one and fresh. Nothing else may say "valid"."""
        try:
            claims = self._signed.claims(token, typ="statuslist+jwt", required=_LIST_REQUIRED)
        except Refused as problem:
            raise unprovable(f"the status list proves nothing: {problem.why}") from None
        issued_at, expires_at, ttl, entry = (claims[name] for name in ("iat", "exp", "ttl", "status_list"))
        if claims["sub"] != uri:
            raise unprovable("the status list is another one than the token points to")
        if any(type(value) is not int for value in (issued_at, expires_at, ttl)) or not 0 < ttl <= _BOUND_S:
            raise unprovable("the status list does not say for how long it is true")
        # Its own `exp` may be generous; the published bound is not.
        kept_until = min(now + ttl, expires_at, issued_at + _BOUND_S)
        if kept_until <= now:
            raise unprovable("the status list is stale")
        bits = entry.get("bits") if isinstance(entry, Mapping) else None
        if type(bits) is not int or bits not in (1, 2, 4, 8):
            raise unprovable("the status list does not say how wide its statuses are")
        packed = unpacked(entry.get("lst"))
        return _List(packed=packed, bits=bits, issued_at=issued_at, kept_from=now, kept_until=kept_until)


def unpacked(lst: object, *, max_bytes: int = _MAX_LIST_BYTES) -> bytes:
    """The bytes of a `lst`. Inflated within bounds: a few KiB can hold gigabytes of zeros."""
    try:
        compressed = base64.b64decode(str(lst).encode("ascii") + b"=" * (-len(str(lst)) % 4), b"-_", validate=True)
        inflater = zlib.decompressobj()
        packed = inflater.decompress(compressed, max_bytes + 1)
    except (UnicodeEncodeError, binascii.Error, zlib.error):
        raise unprovable("the status list cannot be decompressed") from None
    # `eof` says that the checksum was there and right: a list that was cut short would end in fewer revocations.
    if len(packed) > max_bytes or not inflater.eof:
        raise unprovable("the status list is not whole, or too large")
    return packed


class Verifier:
    """Says whether a token opens something here, now. `broker` asks by introspection, with this API's own identity."""

    def __init__(self, *, issuer: str, audience: str, broker: Client, clock: Callable[[], float] = time.time) -> None:
        self._audience = audience
        self._broker = broker
        self._signed = SignedByBroker(issuer)
        self._lists = StatusLists(issuer, self._signed, clock)

    def check(self, token: str, scope: str) -> Accepted:
        checked: dict[str, str] = {}
        try:
            claims = self._token(token, scope)
            checked["token"] = "valid"  # noqa: S105 - a verdict
            status, checked["status_list"] = self._lists.say(claims["status"])
            if status != 0:
                raise invalid("the status list says that the credential was revoked")
            checked["introspection"] = self._introspection(token, claims)
            if checked["introspection"] != "active":
                raise invalid("the broker says that the credential is no longer active")
        except Refused as problem:
            raise Refused(problem.status, problem.error, problem.why, checked) from None
        return Accepted(claims=claims, checked=checked)

    def close(self) -> None:
        self._lists.close()

    def _token(self, token: str, scope: str) -> dict[str, Any]:
        if len(token) > _MAX_TOKEN_BYTES:
            raise invalid("the token is too long")
        claims = self._signed.claims(token, typ="at+jwt", required=_REQUIRED, audience=self._audience)
        # Bound to a key, and shown here without its proof: somebody else's, perhaps (INV-21).
        if "cnf" in claims:
            raise invalid("the credential is bound to a key, and this API takes no proofs of one")
        if not isinstance(claims["scope"], str) or scope not in claims["scope"].split():
            raise Refused(403, "insufficient_scope", f"the call needs the scope {scope}")
        return claims

    def _introspection(self, token: str, claims: Mapping[str, Any]) -> str:
        try:
            answer = self._broker.introspect(token)
        except BrokerError as problem:
            raise unprovable(f"the broker cannot be asked: {problem.title}") from None
        # An answer about another token would be no answer.
        same = all(answer.raw.get(name) == claims[name] for name in ("jti", "aud", "grant_id"))
        return "active" if answer.active and same else "not active"


def create_app(verifier: Verifier) -> Flask:
    app = Flask("demo.sample_api")
    app.json.sort_keys = False  # type: ignore[attr-defined]

    @app.get("/healthz")
    def healthz() -> Response:
        return jsonify(status="ok")

    @app.get("/contacts")
    def contacts() -> Response:
        accepted = verifier.check(bearer_token(), "contacts:read")
        return jsonify(contacts=CONTACTS, checked=accepted.checked)

    @app.errorhandler(Refused)
    def refused(problem: Refused) -> Response:
        answer = jsonify(error=problem.error, error_description=problem.why, checked=problem.checked)
        answer.status_code = problem.status
        if problem.status == 503:
            answer.headers["Retry-After"] = "1"
        else:
            # RFC 6750, section 3.
            answer.headers["WWW-Authenticate"] = f'Bearer error="{problem.error}"'
        return answer

    return app


def bearer_token() -> str:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise invalid("there is no bearer token in the Authorization header")
    return token


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.sample_api", description="A tiny CRM for the demo.")
    parser.add_argument("--broker", required=True, help="the broker's address, which is also its issuer")
    parser.add_argument("--token-file", type=Path, required=True, help="this API's own workload token")
    parser.add_argument("--resource", default=RESOURCE, help="the audience that credentials must be for")
    parser.add_argument("--port", type=int, required=True)
    at = parser.parse_args()
    # Whoever calls waits meanwhile, so the broker is not asked twice for long.
    broker = Client(at.broker, token_file=at.token_file, timeout=_DEADLINE_S, retry_deadline_s=_DEADLINE_S)
    app = create_app(Verifier(issuer=broker.url, audience=at.resource, broker=broker))
    make_server("127.0.0.1", at.port, app, threaded=True).serve_forever()


if __name__ == "__main__":
    main()
