"""The development issuer: workload tokens for one laptop, where nothing attests anything.

Whoever can read its key file is everybody, so it makes tokens only for a broker on loopback.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from broker.domain.catalogue import TrustedIssuer
from broker.domain.clock import epoch
from broker.domain.errors import ConfigurationError
from broker.providers import jose
from broker.providers.key_sets import is_loopback

ISSUER = "http://dev.localhost"
PEOPLE = "http://people.localhost"


@dataclass(frozen=True, kw_only=True)
class DevIssuer:
    issuer: str
    jwks_file: Path
    kid: str
    _key: ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def create_or_load(cls, directory: Path) -> DevIssuer:
        """The issuer of this directory, made on first use: `dev-issuer.pem` (0600) and `dev-issuer.jwks.json`."""
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        key = _load_or_make(directory / "dev-issuer.pem")
        kid = jose.thumbprint(key.public_key())
        jwk = jose.public_jwk(key.public_key()) | {"kid": kid, "use": "sig", "alg": "ES256"}
        document = json.dumps({"keys": [jwk]}, indent=2).encode()
        jwks_file = directory / "dev-issuer.jwks.json"
        if not jwks_file.exists() or jwks_file.read_bytes() != document:
            _write_whole(jwks_file, document, mode=0o644)
        return cls(issuer=ISSUER, jwks_file=jwks_file, kid=kid, _key=key)

    def trusted(self, name: str = "dev") -> TrustedIssuer:
        """How the configuration would declare it."""
        return TrustedIssuer(name=name, issuer=self.issuer, key_source="jwks_file", location=str(self.jwks_file))

    def of_people(self) -> DevIssuer:
        """The same key as the issuer of users' tokens."""
        return replace(self, issuer=PEOPLE)

    def token(self, subject: str, audience: str, now: datetime, lifetime: timedelta = timedelta(hours=1)) -> str:
        """A workload token of `subject` for the broker `audience`, which must be on loopback."""
        if not is_loopback(audience):
            raise ConfigurationError(
                [f"{audience} is not on loopback: the development issuer is for a laptop; configure a real one"]
            )
        claims = {
            "iss": self.issuer,
            "sub": subject,
            "aud": audience,
            "iat": epoch(now),
            "exp": epoch(now + lifetime),
            "jti": secrets.token_urlsafe(16),
        }
        return jose.sign(claims, key=self._key, algorithm="ES256", kid=self.kid)


def _load_or_make(path: Path) -> ec.EllipticCurvePrivateKey:
    if not path.exists():
        made = ec.generate_private_key(ec.SECP256R1())
        pem = made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        _write_whole(path, pem, mode=0o600, replace=False)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ConfigurationError([f"{path} may be read by others: run `chmod 600` on it, or delete it for a new key"])
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except ValueError:
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigurationError([f"{path} does not hold a P-256 private key: delete it for a new one"])
    return key


def _write_whole(path: Path, content: bytes, *, mode: int, replace: bool = True) -> None:
    """The file appears complete or not at all; without `replace` the first of two writers wins."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), "wb") as file:
            file.write(content)
        if replace:
            os.replace(draft, path)
        else:
            with contextlib.suppress(FileExistsError):
                os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)
