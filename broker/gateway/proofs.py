"""DPoP proofs of those who call (RFC 9449 section 4.3), each accepted once.

Memory of one process: there is one gateway process for an upstream, and a proof from before it started is refused,
because whether it was used then is not known (INV-20). Only what was proven is remembered, so no stranger fills it;
when it is full all are refused.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

import jwt

_WINDOW_S = 60
_MOST = 200_000
_LONGEST = 8_192
_LONGEST_JTI = 256
_KEY = ("crv", "kty", "x", "y")
_PARTS = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")


class NotProven(Exception):
    """Why the key was not proven. For the log, not for the caller."""


class Proofs:
    """What was shown, and remembers it for as long as it could be shown again."""

    def __init__(self, now: Callable[[], datetime], *, most: int = _MOST) -> None:
        self._now = now
        self._most = most
        self._started_at = int(now().timestamp())
        self._seen: dict[bytes, int] = {}
        self._lock = threading.Lock()

    def check(self, proof: str, *, token: str, thumbprint: str, method: str, url: str) -> None:
        """Raise NotProven unless `proof` was made for this request, by the key of `thumbprint`, and is new."""
        if len(proof) > _LONGEST or not _PARTS.fullmatch(proof):
            raise NotProven("it is not one JWT")
        key, said = _verified(proof)
        # Compared as what they are: neither says by its timing how much of it was right.
        if not _same(_thumbprint(key), thumbprint):
            raise NotProven("it was made with another key than the token is bound to")
        if not _same(_text(said, "ath"), _base64url(hashlib.sha256(token.encode("ascii")).digest())):
            raise NotProven("it was made for another token")
        if _text(said, "htm") != method or _normal(_text(said, "htu")) != _normal(url):
            raise NotProven("it was made for another request")
        made_at = said.get("iat")
        now = int(self._now().timestamp())
        if type(made_at) is not int or abs(now - made_at) > _WINDOW_S:
            raise NotProven("it is too old, or from the future")
        if made_at < self._started_at:
            raise NotProven("it was made before this process began, and may have been used then")
        jti = _text(said, "jti")
        if not 0 < len(jti) <= _LONGEST_JTI:
            raise NotProven("it has no usable jti")
        self._use_once(hashlib.sha256(f"{thumbprint} {jti}".encode()).digest(), now)

    def _use_once(self, name: bytes, now: int) -> None:
        with self._lock:
            if len(self._seen) >= self._most:
                self._seen = {name: until for name, until in self._seen.items() if until >= now}
            if name in self._seen:
                raise NotProven("it was used before")
            if len(self._seen) >= self._most:
                # Forgetting one would accept it twice (INV-34).
                raise NotProven("too many proofs are remembered to take another")
            # From the future by a whole window, it could still be shown a whole window later.
            self._seen[name] = now + 2 * _WINDOW_S + 1


def _verified(proof: str) -> tuple[Mapping[str, str], Mapping[str, Any]]:
    """Its public key and its claims, where that key signed it."""
    try:
        header = jwt.get_unverified_header(proof)
        jwk = header.get("jwk")
        if header.get("typ") != "dpop+jwt" or "crit" in header or not isinstance(jwk, Mapping) or "d" in jwk:
            raise NotProven("it is not a DPoP proof")
        key = {name: jwk[name] for name in _KEY}
        if (key["kty"], key["crv"]) != ("EC", "P-256") or not all(isinstance(value, str) for value in key.values()):
            raise NotProven("its key is not an ES256 key")
        # The algorithm is ours to choose, not the header's (INV-18).
        said = jwt.decode(
            proof,
            jwt.PyJWK(key, algorithm="ES256"),
            algorithms=["ES256"],
            options={"verify_iat": False, "verify_aud": False, "require": ["jti", "iat", "htm", "htu", "ath"]},
        )
    except (jwt.PyJWTError, KeyError, TypeError, ValueError, RecursionError) as problem:
        raise NotProven(f"it is not a DPoP proof: {type(problem).__name__}") from None
    return key, said


def _normal(url: str) -> tuple[str, str, int | None, str]:
    """Scheme, host, port and path, without query and fragment: as RFC 9449 compares them, percent signs left alone."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise NotProven("its htu is not an address") from None
    if parts.username is not None or parts.password is not None:
        raise NotProven("its htu names a user")
    default = {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, parts.hostname or "", port or default, parts.path or "/"


def _thumbprint(key: Mapping[str, str]) -> str:
    """RFC 7638."""
    return _base64url(hashlib.sha256(json.dumps(key, sort_keys=True, separators=(",", ":")).encode()).digest())


def _text(said: Mapping[str, Any], name: str) -> str:
    value = said.get(name)
    return value if isinstance(value, str) else ""


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
