"""Signed tokens of others, read strictly: compact JWS (RFC 7515), JWT (RFC 7519), JWK (RFC 7517), as RFC 8725 advises.

PyJWT lends its algorithms; parsing and judging happen here, once, so that the bytes that were verified are the bytes
that are used (INV-22). Nothing in a token chooses a key source, an algorithm or a trust (INV-18): the caller says
which. The clock is an argument. What is refused is Unauthenticated, with the reason for our own log.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from jwt import PyJWK
from jwt.algorithms import Algorithm, get_default_algorithms
from jwt.exceptions import InvalidKeyError

from broker.domain import strict_json
from broker.domain.clock import LEEWAY, epoch
from broker.domain.errors import Invalid, Unauthenticated

PublicKey = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey
PrivateKey = RSAPrivateKey | EllipticCurvePrivateKey | Ed25519PrivateKey

MAX_TOKEN_BYTES = 8192
MAX_SUBJECT = 1000

# Which kinds of token may stand for a workload; None is "no typ at all". An access token (at+jwt), a DPoP proof or
# a status list of an issuer we trust is signed by the same keys and must not open this door (RFC 8725 3.11).
WORKLOAD_TYPES: frozenset[str | None] = frozenset({None, "jwt", "jose", "client-authentication+jwt"})
SVID_TYPES: frozenset[str | None] = frozenset({None, "jwt", "jose"})
USER_TYPES: frozenset[str | None] = frozenset({None, "jwt", "jose", "at+jwt", "oauth-id-jag+jwt"})

_BY_CURVE = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
_OF_EC = {curve: frozenset({name}) for curve, name in _BY_CURVE.items()}
_OF_RSA = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
_OF_ED25519 = frozenset({"EdDSA", "Ed25519"})
_NONE: frozenset[str] = frozenset()

_PYJWT = get_default_algorithms()
# Ed25519 is the fully specified name of RFC 9864 for what PyJWT knows as EdDSA.
_ALGORITHMS: Mapping[str, Algorithm] = {
    name: _PYJWT["EdDSA" if name == "Ed25519" else name] for name in (*_BY_CURVE.values(), *_OF_RSA, *_OF_ED25519)
}
ALGORITHMS = frozenset(_ALGORITHMS)

# Each of these would let the token bring or name its own key, or change what the signature covers.
_REFUSED_HEADERS = ("jku", "x5u", "x5c", "crit", "b64", "jwk")
_PRIVATE_MEMBERS = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LAST_SECOND = 253402300799  # 9999-12-31T23:59:59Z, the last one a datetime can hold


@dataclass(frozen=True, kw_only=True, slots=True)
class Unverified:
    """What a token says of itself. Good for one thing: choosing which key to try."""

    algorithm: str
    key_id: str | None
    typ: str | None  # lower case, without "application/"
    header: Mapping[str, Any]
    claims: Mapping[str, Any]
    payload: bytes = field(repr=False)
    signing_input: bytes = field(repr=False)
    signature: bytes = field(repr=False)


def unverified(token: str, *, brings_key: bool = False) -> Unverified:
    """The parts of a token that is well formed; nothing in them is proven.

    `brings_key` is for DPoP proofs alone: there the `jwk` header is the point, and required.
    """
    if len(token) > MAX_TOKEN_BYTES:
        raise Unauthenticated(f"the token has more than {MAX_TOKEN_BYTES} bytes")
    try:
        segments = token.encode("ascii").split(b".")
    except UnicodeEncodeError:
        raise Unauthenticated("the token is not ASCII") from None
    if len(segments) != 3:
        raise Unauthenticated(f"the token has {len(segments)} segments instead of 3")
    header = _members(_decoded(segments[0], "header"), "header")
    for name in _REFUSED_HEADERS:
        if name in header and not (brings_key and name == "jwk"):
            raise Unauthenticated(f"the token has the header {name}")
    if brings_key and not isinstance(header.get("jwk"), dict):
        raise Unauthenticated("the token has no jwk header")
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in _ALGORITHMS:
        raise Unauthenticated(f"algorithm {_shown(algorithm)} is none we verify")
    key_id = header.get("kid")
    if (key_id is not None and not isinstance(key_id, str)) or (key_id is None and "kid" in header):
        raise Unauthenticated("the header kid is not a string")
    typ = header.get("typ")
    if (typ is None and "typ" in header) or (typ is not None and not isinstance(typ, str)):
        raise Unauthenticated("the header typ is not a string")
    payload = _decoded(segments[1], "payload")
    return Unverified(
        algorithm=algorithm,
        key_id=key_id,
        typ=None if typ is None else typ.lower().removeprefix("application/"),
        header=header,
        claims=_members(payload, "payload"),
        payload=payload,
        signing_input=segments[0] + b"." + segments[1],
        signature=_decoded(segments[2], "signature"),
    )


def verify(
    token: str | Unverified,
    *,
    key: PublicKey | PyJWK,
    algorithms: tuple[str, ...],
    issuer: str | None,
    audience: str,
    now: datetime,
    max_lifetime: timedelta,
    typ: frozenset[str | None] = WORKLOAD_TYPES,
    leeway: timedelta = LEEWAY,
    headers: frozenset[str] | None = None,
) -> Mapping[str, Any]:
    """The claims of a token that is signed by `key`, of an expected type, for `audience` alone, and fresh (INV-19).

    `issuer` None leaves `iss` unread, for JWT-SVIDs. `headers`, if given, are the only ones allowed. Our own tokens
    are checked with `leeway` zero.
    """
    parsed = unverified(token) if isinstance(token, str) else token
    if parsed.typ not in typ:
        raise Unauthenticated(f"a token of type {_shown(parsed.typ)} is not for this")
    if headers is not None and not headers.issuperset(parsed.header):
        raise Unauthenticated(f"the token has headers besides {', '.join(sorted(headers))}")
    check_signature(parsed, key=key, algorithms=algorithms)
    claims = parsed.claims
    if issuer is not None and claims.get("iss") != issuer:
        raise Unauthenticated(f"iss is {_shown(claims.get('iss'))} instead of {issuer}")
    if claims.get("aud") != audience and claims.get("aud") != [audience]:
        raise Unauthenticated(f"aud is {_shown(claims.get('aud'))} instead of {audience} alone")
    _require_fresh(claims, epoch(now), int(max_lifetime.total_seconds()), int(leeway.total_seconds()))
    _require_string(claims.get("sub"), "sub")
    if "jti" in claims:
        _require_string(claims["jti"], "jti")
    return claims


def event_claims(parsed: Unverified) -> Mapping[str, Any]:
    """The claims of a security event token (RFC 8417), if they have its form; who signed it is another question.

    Such a token has no end and no `sub`, so that nothing else reads it as something else (SSF 1.0, section 4.1).
    """
    claims = parsed.claims
    for name in ("exp", "sub"):
        if name in claims:
            raise Unauthenticated(f"a security event has no {name}")
    if _seconds(claims, "iat") is None:
        raise Unauthenticated("the security event has no iat")
    _require_string(claims.get("jti"), "jti")
    return claims


def check_signature(parsed: Unverified, *, key: PublicKey | PyJWK, algorithms: tuple[str, ...]) -> None:
    """Refuse unless `key` made this signature with one of `algorithms`, which are ours and not the token's."""
    verifying = key.key if isinstance(key, PyJWK) else key
    algorithm = parsed.algorithm
    if algorithm not in algorithms:
        raise Unauthenticated(f"algorithm {algorithm} is not among {', '.join(algorithms)}")
    # The key says what it is for. Otherwise the token could have an RSA key tried as something else (RFC 8725 3.1).
    if algorithm not in algorithms_of(verifying):
        raise Unauthenticated(f"the key cannot verify {algorithm}")
    if not _ALGORITHMS[algorithm].verify(parsed.signing_input, verifying, parsed.signature):
        raise Unauthenticated("the signature is wrong")


def algorithms_of(key: object) -> frozenset[str]:
    """What a public key can verify; nothing for a private one, a weak one or a kind we do not take."""
    if isinstance(key, EllipticCurvePublicKey):
        return _OF_EC.get(key.curve.name, _NONE)
    if isinstance(key, RSAPublicKey):
        return _OF_RSA if 2048 <= key.key_size <= 8192 else _NONE
    return _OF_ED25519 if isinstance(key, Ed25519PublicKey) else _NONE


def public_key(jwk: Mapping[str, Any]) -> PublicKey:
    """The key of a JWK; `Invalid` if it is private, symmetric, weak or of a kind we do not take."""
    if not _PRIVATE_MEMBERS.isdisjoint(jwk):
        raise Invalid("the key has private members: whoever published it must replace it")
    kind = {"EC": "ES256", "RSA": "RS256", "OKP": "EdDSA"}.get(str(jwk.get("kty")))
    if kind is None:
        raise Invalid(f"key type {_shown(jwk.get('kty'))} is not EC, RSA or OKP")
    members = {name: jwk.get(name) for name in ("kty", "crv", "x", "y", "n", "e") if name in jwk}
    for name in members.keys() & {"x", "y", "n", "e"}:
        try:
            _decoded(str(members[name]).encode("ascii"), name)
        except (Unauthenticated, UnicodeEncodeError):
            raise Invalid(f"member {name} of the key is not base64url") from None
    try:
        key = _PYJWT[kind].from_jwk(members)
    except (InvalidKeyError, ValueError, TypeError):
        raise Invalid("the key has no valid parameters") from None
    # An enormous exponent makes each verification cost as much as a signature; Go's bound, which nobody misses.
    if isinstance(key, RSAPublicKey) and key.public_numbers().e >= 2**31:
        raise Invalid("the RSA exponent of the key is 2**31 or more")
    if not algorithms_of(key):
        raise Invalid("the key is too weak, or on a curve other than P-256, P-384, P-521 and Ed25519")
    return key  # type: ignore[no-any-return]  # algorithms_of knows only PublicKey


def public_jwk(key: PublicKey) -> dict[str, str]:
    """The required members of a key's JWK, in their one canonical spelling."""
    name = "EdDSA" if isinstance(key, Ed25519PublicKey) else "RS256" if isinstance(key, RSAPublicKey) else "ES256"
    members: Mapping[str, Any] = _PYJWT[name].to_jwk(key, as_dict=True)
    return {member: members[member] for member in ("crv", "e", "kty", "n", "x", "y") if member in members}


def thumbprint(key: PublicKey) -> str:
    """RFC 7638, SHA-256: computed of the key and not of how somebody spelled it."""
    text = json.dumps(public_jwk(key), sort_keys=True, separators=(",", ":"))
    return base64url(hashlib.sha256(text.encode()).digest())


def sign(
    claims: Mapping[str, Any], *, key: PrivateKey, algorithm: str, kid: str | None = None, typ: str = "JWT"
) -> str:
    """A compact JWT; for the development issuer. The broker's own tokens are signed elsewhere."""
    header = {"alg": algorithm, "typ": typ} | ({} if kid is None else {"kid": kid})
    parts = (json.dumps(part, separators=(",", ":")).encode() for part in (header, dict(claims)))
    signing_input = ".".join(map(base64url, parts))
    return f"{signing_input}.{base64url(_ALGORITHMS[algorithm].sign(signing_input.encode(), key))}"


def base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _decoded(segment: bytes, name: str) -> bytes:
    try:
        raw = base64.urlsafe_b64decode(segment + b"==")
    except binascii.Error:
        raw = b""
    # Python's decoder skips what it does not know. Only one spelling per value: a second one would be another
    # token to every cache and replay check, and the same to every verifier.
    if base64.urlsafe_b64encode(raw).rstrip(b"=") != segment or not segment:
        raise Unauthenticated(f"the {name} is not canonical base64url")
    return raw


def _members(raw: bytes, name: str) -> dict[str, Any]:
    try:
        value = strict_json.loads(raw, max_bytes=MAX_TOKEN_BYTES)
    except Invalid as problem:
        raise Unauthenticated(f"the {name}: {problem.detail}") from None
    if not isinstance(value, dict):
        raise Unauthenticated(f"the {name} is not a JSON object")
    return value


def _require_fresh(claims: Mapping[str, Any], now: int, max_lifetime: int, leeway: int) -> None:
    expires, issued, begins = (_seconds(claims, name) for name in ("exp", "iat", "nbf"))
    if expires is None:
        raise Unauthenticated("the token has no exp")
    if expires + leeway <= now:
        raise Unauthenticated(f"the token expired {now - expires} s ago")
    for name, starts in (("iat", issued), ("nbf", begins)):
        if starts is None:
            continue
        if starts > now + leeway:
            raise Unauthenticated(f"{name} is {starts - now} s in the future")
        if starts >= expires:
            raise Unauthenticated(f"{name} is not before exp")
    # Without iat only what is left of its life can be bounded.
    life, bound = (expires - now, max_lifetime + leeway) if issued is None else (expires - issued, max_lifetime)
    if life > bound:
        raise Unauthenticated(f"the token lives {life} s; {max_lifetime} s are allowed")


def _seconds(claims: Mapping[str, Any], name: str) -> int | None:
    if name not in claims:
        return None
    value = claims[name]
    if type(value) is not int or not 0 <= value <= _LAST_SECOND:  # `type`: True is an int to isinstance
        raise Unauthenticated(f"{name} is {_shown(value)} instead of a whole number of seconds")
    return value


def _require_string(value: Any, name: str) -> None:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_SUBJECT or _CONTROL.search(value):
        raise Unauthenticated(f"{name} is not a string of 1 to {MAX_SUBJECT} characters without control characters")


def _shown(value: object) -> str:
    return ascii(value)[:80]
