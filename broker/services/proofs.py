"""One-time things, and DPoP proofs (RFC 9449), which are one.

A proof is used by whoever inserts its row (INV-20): no look first, no cache, no Redis decides it.
"""

from __future__ import annotations

import hashlib
import re
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import SplitResult, urlsplit

from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql, sqlite

from broker.domain.audit import canonical_json
from broker.domain.clock import epoch, from_epoch
from broker.domain.errors import Invalid, InvalidProof, Unauthenticated
from broker.providers import jose
from broker.store.database import Database
from broker.store.models import ConsumedProof, table_of

ASSERTION, DPOP = "assertion", "dpop"
DPOP_ALGORITHMS = ("ES256", "ES384", "ES512", "EdDSA", "RS256", "PS256")
DPOP_WINDOW = timedelta(seconds=60)  # either side of now
# Two brokers' clocks may differ: what is forgotten by the fast one must be too old for the slow one.
MARGIN = timedelta(seconds=60)
MAX_JTI = 256

_DEFAULT_PORT = {"https": 443, "http": 80}
_URL = re.compile(r"[\x21-\x7e]{1,2048}")
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")

_consumed = table_of(ConsumedProof)


class Proofs:
    """Used proofs are rows; `broker.store.standing.forget` drops those that are past their `forget_at`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def consume(self, kind: str, key: str, *, forget_at: datetime, now: datetime) -> bool:
        """Use this proof, in a transaction of its own; False if it was used before."""
        with self._database.begin() as db:
            return consume(db, kind, key, forget_at=forget_at, now=now)

    def verify_dpop(self, proof: str, *, method: str, url: str, now: datetime, access_token: str | None = None) -> str:
        """The thumbprint (`jkt`) of the key this proof shows possession of; it is used up by being accepted.

        `url` is the address of the request as callers know it. With `access_token` the proof must be made for it.
        """
        try:
            parsed = jose.unverified(proof, brings_key=True)
            key = jose.public_key(parsed.header["jwk"])
            jose.check_signature(parsed, key=key, algorithms=DPOP_ALGORITHMS)
        except Unauthenticated as problem:
            raise InvalidProof(f"the DPoP proof was not accepted: {problem.reason}") from None
        except Invalid as problem:
            raise InvalidProof(f"the DPoP proof was not accepted: {problem.detail}") from None
        if parsed.typ != "dpop+jwt":
            raise InvalidProof("the DPoP proof's typ is not dpop+jwt")
        claims = parsed.claims
        if claims.get("htm") != method:
            raise InvalidProof(f"the DPoP proof's htm is not {method}")
        if _normalised(claims.get("htu")) != _normalised(url):
            raise InvalidProof("the DPoP proof's htu is not the address of this request")
        issued = claims.get("iat")
        window = int(DPOP_WINDOW.total_seconds())
        if type(issued) is not int or abs(epoch(now) - issued) > window:
            raise InvalidProof(f"the DPoP proof's iat is not within {window} s of the broker's time")
        jti = claims.get("jti")
        if not isinstance(jti, str) or not 0 < len(jti) <= MAX_JTI:
            raise InvalidProof(f"the DPoP proof's jti is not a string of 1 to {MAX_JTI} characters")
        if access_token is not None and claims.get("ath") != _sha256_base64url(access_token):
            raise InvalidProof("the DPoP proof's ath is not the hash of the access token that came with it")
        jkt = jose.thumbprint(key)
        # Last: a proof that is refused for another reason must not cost a row.
        if not self.consume(DPOP, joined(jkt, jti), forget_at=from_epoch(issued) + DPOP_WINDOW + MARGIN, now=now):
            raise InvalidProof("the DPoP proof was used before; make a new one for each request")
        return jkt


def consume(db: Connection, kind: str, key: str, *, forget_at: datetime, now: datetime) -> bool:
    """The same inside of a transaction: False if it was used before.

    Somebody else's insert that is not committed yet is waited for.
    """
    if forget_at <= now:
        raise ValueError("a proof that is forgotten at once can be used twice")
    dialect = sqlite if db.dialect.name == "sqlite" else postgresql
    row: dict[str, Any] = {"kind": kind, "key_sha256": hashlib.sha256(key.encode()).hexdigest(), "forget_at": forget_at}
    # The insert itself answers, by the row it returns: a look before it would be a race, and its row count is
    # something the PostgreSQL dialect does not tell.
    insert = dialect.insert(_consumed).values(row).on_conflict_do_nothing()
    return db.execute(insert.returning(_consumed.c.kind)).first() is not None


def joined(*parts: str) -> str:
    """Several strings as one key that no other strings give."""
    return canonical_json(list(parts)).decode()


def _sha256_base64url(text: str) -> str:
    return jose.base64url(hashlib.sha256(text.encode()).digest())


def _normalised(url: Any) -> tuple[str, str, int, str]:
    """Scheme, host, port and path, after RFC 3986 section 6.2; without query and fragment (RFC 9449 section 4.3)."""
    # urlsplit drops tabs and line ends without a word, so they are looked for first.
    if not isinstance(url, str) or not _URL.fullmatch(url):
        raise InvalidProof("the DPoP proof's htu is not an address")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise InvalidProof("the DPoP proof's htu is not an address") from None
    if parts.scheme not in _DEFAULT_PORT or not host or "@" in parts.netloc:
        raise InvalidProof("the DPoP proof's htu is not an http or https address")
    return parts.scheme, host, _DEFAULT_PORT[parts.scheme] if port is None else port, _path(parts)


def _path(parts: SplitResult) -> str:
    def spelled_once(found: re.Match[str]) -> str:
        character = chr(int(found[1], 16))
        return character if _UNRESERVED.fullmatch(character) else found[0].upper()

    segments: list[str] = []
    names = _ESCAPE.sub(spelled_once, parts.path).split("/")[1:] or [""]
    for index, name in enumerate(names):
        if name not in (".", ".."):
            segments.append(name)
            continue
        if name == ".." and segments:
            segments.pop()
        if index == len(names) - 1:
            segments.append("")
    return "/" + "/".join(segments)
