"""Issuers, their key files, and the workload tokens they sign, good and hostile."""

import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from broker.domain.catalogue import TrustedIssuer
from broker.domain.clock import epoch
from broker.domain.errors import Unauthenticated
from broker.providers import jose

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
BROKER = "https://broker.example"
IDP = "https://idp.example"
SUBJECT = "summarizer"


@contextmanager
def unauthenticated(reason):
    """The block must be refused for a reason that matches, and outside look like every other refusal."""
    with pytest.raises(Unauthenticated) as problem:
        yield
    assert re.search(reason, problem.value.reason), problem.value.reason
    assert str(problem.value) == problem.value.detail == "the workload token was not accepted"


@cache
def rsa_key(bits=2048):
    """Slow to make, so one a process and size."""
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


_MAKE = {
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ES384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ES512": lambda: ec.generate_private_key(ec.SECP521R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
    "RS256": rsa_key,
    "PS256": rsa_key,
}


@dataclass(frozen=True, kw_only=True)
class IssuerKey:
    """A signing key of somebody else; `kid` None leaves it out of keys and tokens."""

    algorithm: str = "ES256"
    kid: str | None = "key-1"
    private: object = field(repr=False)

    @property
    def public(self):
        return self.private.public_key()

    @property
    def jwk(self):
        return jose.public_jwk(self.public) | ({} if self.kid is None else {"kid": self.kid})

    def sign(self, header, payload):
        """A compact JWS over exactly these bytes, whatever they are; a dict is written as JSON."""
        parts = (part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, payload))
        signing_input = ".".join(map(jose.base64url, parts))
        algorithm = jose._ALGORITHMS[self.algorithm]
        return f"{signing_input}.{jose.base64url(algorithm.sign(signing_input.encode(), self.private))}"


def issuer_key(kid="key-1", algorithm="ES256"):
    return IssuerKey(algorithm=algorithm, kid=kid, private=_MAKE[algorithm]())


def key_set(*keys, **members):
    """The JWK set of these keys as bytes; `members` go into each of them."""
    return json.dumps({"keys": [key.jwk | members if isinstance(key, IssuerKey) else key for key in keys]}).encode()


def write_key_set(path: Path, *keys, **members) -> Path:
    # Replaced and not rewritten, as Kubernetes and any careful rotation do it.
    draft = path.with_suffix(".draft")
    draft.write_bytes(key_set(*keys, **members))
    draft.replace(path)
    return path


def claims(*, now=NOW, lifetime=timedelta(minutes=5), without=(), **changed):
    """The claims of a good token of `IDP`, changed by name; `without` names those to leave out."""
    made = {
        "iss": IDP,
        "sub": SUBJECT,
        "aud": BROKER,
        "iat": epoch(now),
        "exp": epoch(now + lifetime),
    } | changed
    return {name: value for name, value in made.items() if name not in without}


def header(key, *, without=(), **changed):
    made = {"alg": key.algorithm, "typ": "JWT"} | ({} if key.kid is None else {"kid": key.kid}) | changed
    return {name: value for name, value in made.items() if name not in without}


def workload_token(key, *, headers=None, **changed):
    """A token that is accepted, unless something is changed: claims by name, headers by `headers`."""
    return key.sign(header(key, **(headers or {})), claims(**changed))


def trusted_issuer(jwks_file, *, name="corp", **changed):
    return TrustedIssuer(
        **{"name": name, "issuer": IDP, "key_source": "jwks_file", "location": str(jwks_file)} | changed
    )


def dpop_proof(key, *, method="POST", url=f"{BROKER}/oauth2/token", jti="proof-1", now=NOW, headers=None, **changed):
    """A DPoP proof of possession of `key`."""
    jwk = {name: value for name, value in key.jwk.items() if name != "kid"}
    made = {"typ": "dpop+jwt", "alg": key.algorithm, "jwk": jwk} | (headers or {})
    payload = {"jti": jti, "htm": method, "htu": url, "iat": epoch(now)} | changed
    return key.sign(made, {name: value for name, value in payload.items() if value is not None})
