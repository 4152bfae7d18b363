"""The broker's own tokens: signing keys (RFC 7517, 7638), signatures (RFC 7515), access tokens (RFC 9068).

Signing is on the path of every grant, so it uses `cryptography` directly. Tokens are read by the one strict reader,
`broker.providers.jose`; what this room asks of our own besides is stricter than any standard. A private key leaves
its `SigningKey` only as `private_bytes()`, to be sealed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NoReturn

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP256R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key as generate_rsa_key
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)

from broker.domain.catalogue import SIGNING_ALGORITHMS
from broker.domain.clock import epoch
from broker.domain.errors import Invalid, Unauthenticated
from broker.providers import jose

PublicKey = jose.PublicKey
PrivateKey = jose.PrivateKey

_RSA_BITS = 2048
_HALF = 32  # bytes of each half of an ES256 signature
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
    _headers: dict[str, str] = field(repr=False, default_factory=dict)

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
        return cls(jose.thumbprint(public), algorithm_of(public), private)

    @property
    def public(self) -> PublicKey:
        return self._private.public_key()

    def public_jwk(self) -> dict[str, str]:
        """What the world may know of it (RFC 7517)."""
        return jose.public_jwk(self.public) | {"alg": self.algorithm, "use": "sig", "kid": self.kid}

    def private_bytes(self) -> bytes:
        """PKCS #8, DER, in the clear: only ever to be sealed at once."""
        return self._private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())

    def sign(self, payload: bytes | Mapping[str, Any], *, typ: str) -> str:
        """A compact JWS (RFC 7515) over these bytes, or over this mapping as JSON."""
        header = self._headers.get(typ)
        if header is None:
            protected = {"alg": self.algorithm, "kid": self.kid, "typ": typ}
            header = self._headers[typ] = jose.base64url(_compact(protected).encode())
        raw = payload if isinstance(payload, bytes) else _compact(payload).encode()
        signing_input = f"{header}.{jose.base64url(raw)}"
        return f"{signing_input}.{jose.base64url(_signature(self._private, signing_input.encode('ascii')))}"

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


def public_key(jwk: Mapping[str, Any]) -> PublicKey:
    """The key in a JWK as `SigningKey.public_jwk` writes it; Invalid for anything else."""
    try:
        key = jose.public_key(jwk)
        means = {"alg": algorithm_of(key), "use": "sig", "kid": jose.thumbprint(key)}
    except (Invalid, ValueError) as problem:
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
    parsed = jose.unverified(token)
    if parsed.header.keys() != _HEADER or parsed.key_id is None:
        raise Unauthenticated("the header is not alg, kid and typ")
    key = keys.get(parsed.key_id)
    if key is None:
        raise Unauthenticated("the token names no key of ours")
    # As it is written: we write it one way.
    written = parsed.header["typ"]
    if written not in typ:
        raise Unauthenticated(f"a token of type {written[:40]!a} is not for this")
    # The key says which algorithm it is for; the token may only agree (INV-18).
    jose.check_signature(parsed, key=key, algorithms=(algorithm_of(key),))
    if now is not None:
        expires_at = parsed.claims.get("exp")
        if type(expires_at) is not int:
            raise Unauthenticated("the token has no exp in whole seconds")
        if epoch(now) >= expires_at:
            raise Unauthenticated("the token has expired")
    return dict(parsed.claims)


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


def _signature(key: PrivateKey, signing_input: bytes) -> bytes:
    if isinstance(key, EllipticCurvePrivateKey):
        # RFC 7518, 3.4: the two numbers, side by side; `cryptography` speaks DER.
        r, s = decode_dss_signature(key.sign(signing_input, _ECDSA))
        return r.to_bytes(_HALF, "big") + s.to_bytes(_HALF, "big")
    if isinstance(key, RSAPrivateKey):
        return key.sign(signing_input, _PKCS1, _SHA256)
    return key.sign(signing_input)
