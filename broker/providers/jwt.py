"""The broker's own tokens: signing keys (RFC 7517, 7638), signatures (RFC 7515), access tokens (RFC 9068).

Signing is on the path of every grant, so it uses `cryptography` directly. Verifying here is for what we signed
ourselves and is stricter than any standard; the tokens of others are read in `broker.providers.jose`. A private key
leaves its `SigningKey` only as `private_bytes()`, to be sealed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NoReturn

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP256R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    EllipticCurvePublicNumbers,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey, RSAPublicNumbers
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key as generate_rsa_key
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_private_key,
)

from broker.domain import strict_json
from broker.domain.catalogue import SIGNING_ALGORITHMS
from broker.domain.clock import epoch
from broker.domain.errors import Invalid, Unauthenticated

PublicKey = EllipticCurvePublicKey | RSAPublicKey | Ed25519PublicKey
PrivateKey = EllipticCurvePrivateKey | RSAPrivateKey | Ed25519PrivateKey

MAX_TOKEN_BYTES = 8192

_MAX_DEPTH = 16
_RSA_BITS = 2048
_COORDINATE = 32  # bytes of a P-256 coordinate, and of each half of an ES256 signature
_HEADER = frozenset({"alg", "kid", "typ"})
_SHA256 = SHA256()
_ECDSA = ECDSA(_SHA256)
_PKCS1 = PKCS1v15()
_compact = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


@dataclass(frozen=True, slots=True, eq=False)
class SigningKey:
    """A key pair of ours; it prints as its name and cannot be pickled or copied (INV-30)."""

    kid: str
    algorithm: str
    _private: PrivateKey = field(repr=False)
    _headers: dict[str, bytes] = field(repr=False, default_factory=dict)

    @classmethod
    def generate(cls, algorithm: str) -> SigningKey:
        """A new key. RSA takes a tenth of a second or more: never in a transaction."""
        match algorithm:
            case "ES256":
                return cls._of(generate_private_key(SECP256R1()))
            case "RS256":
                return cls._of(generate_rsa_key(public_exponent=65537, key_size=_RSA_BITS))
            case "EdDSA":
                return cls._of(Ed25519PrivateKey.generate())
        raise ValueError(
            f"{algorithm!r:.40} is not an algorithm we sign with; use one of {', '.join(SIGNING_ALGORITHMS)}"
        )

    @classmethod
    def from_private_bytes(cls, der: bytes) -> SigningKey:
        """The key that `private_bytes` wrote; ValueError for anything else."""
        try:
            private = load_der_private_key(der, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            # "from None": what a parser says of a private key is not to be printed.
            raise ValueError("these bytes are not a private key in PKCS #8") from None
        if not isinstance(private, EllipticCurvePrivateKey | RSAPrivateKey | Ed25519PrivateKey):
            raise ValueError(f"{type(private).__name__} is not a kind of key we sign with")
        return cls._of(private)

    @classmethod
    def _of(cls, private: PrivateKey) -> SigningKey:
        public = private.public_key()
        return cls(thumbprint(public), algorithm_of(public), private)

    @property
    def public(self) -> PublicKey:
        return self._private.public_key()

    def public_jwk(self) -> dict[str, str]:
        """What the world may know of it (RFC 7517)."""
        return _required_members(self.public) | {"alg": self.algorithm, "use": "sig", "kid": self.kid}

    def private_bytes(self) -> bytes:
        """PKCS #8, DER, in the clear: only ever to be sealed at once."""
        return self._private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())

    def sign(self, payload: bytes | Mapping[str, Any], *, typ: str) -> str:
        """A compact JWS (RFC 7515) over these bytes, or over this mapping as JSON."""
        header = self._headers.get(typ)
        if header is None:
            protected = {"alg": self.algorithm, "kid": self.kid, "typ": typ}
            header = self._headers[typ] = _base64url(_compact(protected).encode()) + b"."
        raw = payload if isinstance(payload, bytes) else _compact(payload).encode()
        signing_input = header + _base64url(raw)
        return (signing_input + b"." + _base64url(_signature(self._private, signing_input))).decode("ascii")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a SigningKey is not pickled or copied")


def algorithm_of(key: object) -> str:
    """The one algorithm this public key may be used with (RFC 8725, 3.1)."""
    if isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
        return "ES256"
    if isinstance(key, RSAPublicKey) and key.key_size >= _RSA_BITS:
        return "RS256"
    if isinstance(key, Ed25519PublicKey):
        return "EdDSA"
    raise ValueError(f"{type(key).__name__} is not a key of ours: P-256, RSA from {_RSA_BITS} bits, or Ed25519")


def thumbprint(key: PublicKey) -> str:
    """RFC 7638 with SHA-256."""
    members = json.dumps(_required_members(key), sort_keys=True, separators=(",", ":"))
    return _text(hashlib.sha256(members.encode()).digest())


def public_key(jwk: Mapping[str, Any]) -> PublicKey:
    """The key in a JWK as `SigningKey.public_jwk` writes it; Invalid for anything else."""
    try:
        key: PublicKey
        match jwk.get("kty"), jwk.get("crv"):
            case "EC", "P-256":
                x, y = (int.from_bytes(_member(jwk, name), "big") for name in ("x", "y"))
                key = EllipticCurvePublicNumbers(x, y, SECP256R1()).public_key()
            case "RSA", None:
                n, e = (int.from_bytes(_member(jwk, name), "big") for name in ("n", "e"))
                key = RSAPublicNumbers(e, n).public_key()
            case "OKP", "Ed25519":
                key = Ed25519PublicKey.from_public_bytes(_member(jwk, "x"))
            case _:
                raise ValueError("kty and crv are none of ours")
        means = {"alg": algorithm_of(key), "use": "sig", "kid": thumbprint(key)}
    except (ValueError, UnsupportedAlgorithm) as problem:
        raise Invalid(f"not a public key of ours: {problem}") from None
    for name, value in means.items():
        if jwk.get(name) != value:
            raise Invalid(f"not a public key of ours: {name} must be {value}", member=name)
    return key


def verify(
    token: str, keys: Mapping[str, PublicKey], *, typ: Collection[str], now: datetime | None = None
) -> dict[str, Any]:
    """The claims of a token that one of `keys` (by kid) signed, of one of these types; else Unauthenticated.

    With `now` it must have an `exp` that is still to come, without leeway. Issuer, audience and what else the claims
    mean are the caller's to judge.
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
    if header.keys() != _HEADER or not all(isinstance(value, str) for value in header.values()):
        raise Unauthenticated("the header is not alg, kid and typ, each a string")
    key = keys.get(header["kid"])
    if key is None:
        raise Unauthenticated("the token names no key of ours")
    # The key says which algorithm it is for; the token may only agree (INV-18).
    if header["alg"] != algorithm_of(key):
        raise Unauthenticated("the algorithm is not that of the key")
    if header["typ"] not in typ:
        raise Unauthenticated(f"a token of type {header['typ'][:40]!a} is not for this")
    _require_signature(key, _decoded(segments[2], "signature"), segments[0] + b"." + segments[1])
    claims = _members(_decoded(segments[1], "payload"), "payload")
    if now is not None:
        expires_at = claims.get("exp")
        if type(expires_at) is not int:
            raise Unauthenticated("the token has no exp in whole seconds")
        if epoch(now) >= expires_at:
            raise Unauthenticated("the token has expired")
    return claims


@dataclass(frozen=True, kw_only=True)
class AccessToken:
    """What one access token says. `actors` begins with who acts now, then who that one acts for, and so on up."""

    issuer: str
    subject: str
    audience: str
    client_id: str
    issued_at: datetime
    expires_at: datetime
    jti: str
    scopes: Iterable[str]
    task_id: str
    grant_id: str
    jkt: str | None
    status_uri: str
    status_index: int
    trace_id: str | None
    actors: tuple[str, ...] = ()


def access_token_claims(token: AccessToken) -> dict[str, Any]:
    """The claims of RFC 9068, with RFC 9396 details, RFC 8693 actors, RFC 9449 binding and a status list index.

    `act`, `cnf` and `txn` are there only where there is something to say. No personal data.
    """
    issued_at, expires_at = epoch(token.issued_at), epoch(token.expires_at)
    if expires_at <= issued_at:
        raise ValueError(f"grant {token.grant_id}: a token must end after it begins (INV-09)")
    claims: dict[str, Any] = {
        "iss": token.issuer,
        "sub": token.subject,
        "aud": token.audience,
        "client_id": token.client_id,
        "iat": issued_at,
        "nbf": issued_at,
        "exp": expires_at,
        "jti": token.jti,
        "scope": " ".join(sorted(token.scopes)),
        "authorization_details": [{"type": "urn:broker:task", "task_id": token.task_id}],
    }
    act: dict[str, Any] | None = None
    for actor in reversed(token.actors):
        act = {"sub": actor} if act is None else {"sub": actor, "act": act}
    if act is not None:
        claims["act"] = act
    if token.jkt is not None:
        claims["cnf"] = {"jkt": token.jkt}
    claims["status"] = {"status_list": {"idx": token.status_index, "uri": token.status_uri}}
    if token.trace_id is not None:
        claims["txn"] = token.trace_id
    claims["grant_id"] = token.grant_id
    claims["task_id"] = token.task_id
    return claims


def _required_members(key: PublicKey) -> dict[str, str]:
    if isinstance(key, EllipticCurvePublicKey):
        point = key.public_numbers()
        x, y = (number.to_bytes(_COORDINATE, "big") for number in (point.x, point.y))
        return {"kty": "EC", "crv": "P-256", "x": _text(x), "y": _text(y)}
    if isinstance(key, RSAPublicKey):
        numbers = key.public_numbers()
        n, e = (number.to_bytes((number.bit_length() + 7) // 8, "big") for number in (numbers.n, numbers.e))
        return {"kty": "RSA", "n": _text(n), "e": _text(e)}
    return {"kty": "OKP", "crv": "Ed25519", "x": _text(key.public_bytes(Encoding.Raw, PublicFormat.Raw))}


def _signature(key: PrivateKey, signing_input: bytes) -> bytes:
    if isinstance(key, EllipticCurvePrivateKey):
        # RFC 7518, 3.4: the two numbers, side by side; `cryptography` speaks DER.
        r, s = decode_dss_signature(key.sign(signing_input, _ECDSA))
        return r.to_bytes(_COORDINATE, "big") + s.to_bytes(_COORDINATE, "big")
    if isinstance(key, RSAPrivateKey):
        return key.sign(signing_input, _PKCS1, _SHA256)
    return key.sign(signing_input)


def _require_signature(key: PublicKey, signature: bytes, signing_input: bytes) -> None:
    try:
        if isinstance(key, EllipticCurvePublicKey):
            if len(signature) != 2 * _COORDINATE:
                raise InvalidSignature
            r, s = (int.from_bytes(half, "big") for half in (signature[:_COORDINATE], signature[_COORDINATE:]))
            key.verify(encode_dss_signature(r, s), signing_input, _ECDSA)
        elif isinstance(key, RSAPublicKey):
            key.verify(signature, signing_input, _PKCS1, _SHA256)
        else:
            key.verify(signature, signing_input)
    except InvalidSignature:
        raise Unauthenticated("the signature does not match") from None


def _members(raw: bytes, name: str) -> dict[str, Any]:
    try:
        value = strict_json.loads(raw, max_bytes=MAX_TOKEN_BYTES, max_depth=_MAX_DEPTH)
    except Invalid as problem:
        raise Unauthenticated(f"the {name} cannot be read: {problem.detail}") from None
    if not isinstance(value, dict):
        raise Unauthenticated(f"the {name} is not a JSON object")
    return value


def _member(jwk: Mapping[str, Any], name: str) -> bytes:
    value = jwk.get(name)
    raw = _canonical(value.encode()) if isinstance(value, str) else None
    if raw is None:
        raise ValueError(f"{name} is not base64url")
    return raw


def _decoded(segment: bytes, name: str) -> bytes:
    raw = _canonical(segment)
    if raw is None:
        raise Unauthenticated(f"the {name} is not canonical base64url")
    return raw


def _canonical(segment: bytes) -> bytes | None:
    try:
        raw = base64.urlsafe_b64decode(segment + b"=" * (-len(segment) % 4))
    except binascii.Error:
        return None
    # Python's decoder skips what it does not know, and spare bits at the end: a second spelling would be another
    # token to every cache, and the same to every verifier.
    return raw if segment and _base64url(raw) == segment else None


def _base64url(raw: bytes) -> bytes:
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


def _text(raw: bytes) -> str:
    return _base64url(raw).decode("ascii")
