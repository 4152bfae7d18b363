"""DPoP (RFC 9449): a key that never leaves this process, and proofs of holding it.

A proof is for one request: method, URL, time and a fresh id. It is never reused, not even for a retry.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from broker.sdk.clock import system_clock

# `cryptography` is loaded where it is used: a program that binds nothing to a key does not wait for it.
if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec


class DpopKey:
    """An ES256 key. It cannot be printed, copied or pickled."""

    __slots__ = ("_jwk", "_key", "_now")

    def __init__(self, key: ec.EllipticCurvePrivateKey, *, now: Callable[[], datetime] = system_clock) -> None:
        if key.curve.name != "secp256r1":
            raise ValueError(f"the key is on {key.curve.name}: ES256 needs secp256r1")
        self._key = key
        self._now = now
        numbers = key.public_key().public_numbers()
        self._jwk = {
            "crv": "P-256",
            "kty": "EC",
            "x": _base64url(numbers.x.to_bytes(32, "big")),
            "y": _base64url(numbers.y.to_bytes(32, "big")),
        }

    @classmethod
    def generate(cls, *, now: Callable[[], datetime] = system_clock) -> DpopKey:
        from cryptography.hazmat.primitives.asymmetric import ec

        return cls(ec.generate_private_key(ec.SECP256R1()), now=now)

    def public_jwk(self) -> dict[str, str]:
        return dict(self._jwk)

    def thumbprint(self) -> str:
        """RFC 7638: what `cnf.jkt` of a token bound to this key says."""
        return _base64url(hashlib.sha256(_compact(self._jwk)).digest())

    def proof(self, method: str, url: str, *, access_token: str | None = None, nonce: str | None = None) -> str:
        """A new proof for one request; with `access_token`, one for presenting it (`ath`)."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

        claims: dict[str, Any] = {
            "jti": secrets.token_urlsafe(16),
            "htm": method,
            "htu": _without_query(url),
            "iat": int(self._now().timestamp()),
        }
        if access_token is not None:
            claims["ath"] = _base64url(hashlib.sha256(access_token.encode("ascii")).digest())
        if nonce is not None:
            claims["nonce"] = nonce
        header = {"typ": "dpop+jwt", "alg": "ES256", "jwk": self._jwk}
        signed = f"{_base64url(_compact(header))}.{_base64url(_compact(claims))}"
        # RFC 7518 section 3.4: r and s at full length, not the DER that the library gives.
        r, s = decode_dss_signature(self._key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{_base64url(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"

    def __repr__(self) -> str:
        return f"DpopKey({self.thumbprint()})"

    def __reduce__(self) -> Any:
        raise TypeError("a DpopKey is not pickled or copied")


def _without_query(url: str) -> str:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path or "/", "", ""))


def _compact(value: Mapping[str, Any]) -> bytes:
    # Sorted, because RFC 7638 hashes the members in that order.
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
