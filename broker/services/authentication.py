"""Who calls: a workload token becomes a Caller (RFC 7523, SPIFFE JWT-SVID, OIDC, Kubernetes, CI systems).

An unverified token chooses one thing, which configured issuer is tried; key source, algorithms, type and trust are
configuration's (INV-18). All refusals are one Unauthenticated; its reason is for our log.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from broker.domain import strict_json
from broker.domain.catalogue import Catalogue, TrustedIssuer
from broker.domain.clock import LEEWAY, from_epoch
from broker.domain.errors import Unauthenticated
from broker.domain.identity import Caller, WorkloadIdentity
from broker.providers import jose
from broker.providers.key_sets import KeySets
from broker.services.proofs import ASSERTION, MARGIN, Proofs, joined
from broker.store.database import Database

REMEMBERED = 10_000
REMEMBERED_BYTES = 24 * 1024 * 1024
_BESIDE_CLAIMS = 2048  # bytes of an entry: the caller, the principal, the table

# SPIFFE-ID 1.0 section 2. A root id names a trust domain, not a workload.
_SPIFFE_ID = re.compile(r"spiffe://([a-z0-9._-]{1,255})((?:/[A-Za-z0-9._-]+)+)")
_SVID_HEADERS = frozenset({"alg", "kid", "typ"})


class _Claims(Mapping[str, Any]):
    """Verified claims as the bytes they came in, read again when somebody looks: read, they take 17 times the room."""

    __slots__ = ("_payload",)

    def __init__(self, payload: bytes) -> None:
        self._payload = payload

    def __getitem__(self, name: str) -> Any:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def _read(self) -> dict[str, Any]:
        claims: dict[str, Any] = strict_json.loads(self._payload, max_bytes=jose.MAX_TOKEN_BYTES)
        return claims


@dataclass(frozen=True, kw_only=True, slots=True)
class _Accepted:
    """A token that was verified, and all that its acceptance rests on; `size` is what it takes of our memory."""

    caller: Caller
    size: int
    catalogue: Catalogue
    issuer: TrustedIssuer
    generation: int
    usable_until: datetime


class Authenticator:
    """`audience` is the broker's own issuer: the only audience it accepts."""

    def __init__(
        self,
        *,
        database: Database,
        key_sets: KeySets,
        audience: str,
        remembered: int = REMEMBERED,
        remembered_bytes: int = REMEMBERED_BYTES,
    ) -> None:
        self._proofs = Proofs(database)
        self._key_sets = key_sets
        self._audience = audience
        self._remembered = remembered
        self._remembered_bytes = remembered_bytes
        self._guard = threading.Lock()
        self._accepted: OrderedDict[bytes, _Accepted] = OrderedDict()
        self._size = 0

    def authenticate(self, token: str, catalogue: Catalogue, *, now: datetime, trace_id: str | None = None) -> Caller:
        """The principal this token proves, until the token's own end; opens a transaction for one-time tokens."""
        digest = _digest(token)
        caller = self._recall(digest, catalogue, now)
        if caller is None:
            identity, issuer, generation, payload = self._verified(token, catalogue, now, users=False)
            caller = Caller(
                principal=catalogue.principal_for(identity),
                proof_expires_at=identity.expires_at,
                identity=identity,
                catalogue_version=catalogue.version,
            )
            if issuer.single_use:
                self._use_up(identity, issuer, now)
            else:
                kept = replace(caller, identity=replace(identity, claims=_Claims(payload)))
                self._remember(
                    digest,
                    _Accepted(
                        caller=kept,
                        size=len(payload) + _BESIDE_CLAIMS,
                        catalogue=catalogue,
                        issuer=issuer,
                        generation=generation,
                        usable_until=identity.expires_at + LEEWAY,
                    ),
                )
        return caller if trace_id is None else replace(caller, trace_id=trace_id)

    def identify_user(
        self,
        token: str,
        catalogue: Catalogue,
        *,
        now: datetime,
        once: bool = False,
        admit: Callable[[WorkloadIdentity], None] = lambda _identity: None,
    ) -> WorkloadIdentity:
        """The person a token of an issuer with `users = true` was made for. Such a token never makes a caller.

        `once` is for a kind of token that is for one use, whatever its issuer's others are. `admit` refuses what is not
        for whoever presents it, before it is used up: who finds a token must not be able to spend it.
        """
        identity, issuer, _, _ = self._verified(token, catalogue, now, users=True)
        admit(identity)
        if issuer.single_use or once:
            self._use_up(identity, issuer, now)
        return identity

    def _verified(
        self, token: str, catalogue: Catalogue, now: datetime, *, users: bool
    ) -> tuple[WorkloadIdentity, TrustedIssuer, int, bytes]:
        parsed = jose.unverified(token)
        issuer = _issuer_to_try(parsed.claims, catalogue, users=users)
        is_svid = issuer.trust_domain is not None
        # Before the key is looked for: garbage must not cause a fetch.
        if parsed.algorithm not in issuer.algorithms:
            raise Unauthenticated(f"algorithm {parsed.algorithm} is not listed for {issuer.name}")
        key = self._key_sets.key_for(issuer, parsed.key_id, parsed.algorithm, now)
        claims = jose.verify(
            parsed,
            key=key.key,
            algorithms=issuer.algorithms,
            issuer=None if is_svid else issuer.issuer,
            audience=self._audience,
            now=now,
            max_lifetime=timedelta(seconds=issuer.max_lifetime_s),
            typ=jose.SVID_TYPES if is_svid else jose.USER_TYPES if users else jose.WORKLOAD_TYPES,
            headers=_SVID_HEADERS if is_svid else None,
        )
        identity = WorkloadIdentity(
            issuer=issuer.name, subject=claims["sub"], claims=claims, expires_at=from_epoch(claims["exp"])
        )
        return identity, issuer, key.generation, parsed.payload

    def _use_up(self, identity: WorkloadIdentity, issuer: TrustedIssuer, now: datetime) -> None:
        jti = identity.claims.get("jti")
        if jti is None:
            raise Unauthenticated(f"tokens of {issuer.name} are for one use, and this one has no jti")
        # Its `iss`, not our name for it: renaming an issuer must not make its tokens new.
        key = joined(issuer.issuer, jti)
        # Longer than it could be accepted (INV-20).
        forget_at = identity.expires_at + LEEWAY + MARGIN
        if not self._proofs.consume(ASSERTION, key, forget_at=forget_at, now=now):
            raise Unauthenticated(f"the token {ascii(jti)[:80]} of {issuer.name} was used before")

    def _recall(self, digest: bytes, catalogue: Catalogue, now: datetime) -> Caller | None:
        accepted = self._accepted.get(digest)
        if accepted is None:
            return None
        # Everything the acceptance rested on must still be so: this very configuration, these keys, this side of exp.
        if (
            accepted.catalogue is catalogue
            and now < accepted.usable_until
            and accepted.generation == self._key_sets.generation(accepted.issuer, now)
        ):
            with self._guard:
                if digest in self._accepted:
                    self._accepted.move_to_end(digest)
            return accepted.caller
        with self._guard:
            if self._accepted.get(digest) is accepted:
                self._forget(digest)
        return None

    def _remember(self, digest: bytes, accepted: _Accepted) -> None:
        with self._guard:
            if digest in self._accepted:
                self._forget(digest)
            self._accepted[digest] = accepted
            self._size += accepted.size
            # By what they take and not by their number alone: whoever may choose what is in its tokens chooses that.
            while len(self._accepted) > self._remembered or self._size > self._remembered_bytes:
                self._forget(next(iter(self._accepted)))

    def _forget(self, digest: bytes) -> None:
        """Called under the guard."""
        self._size -= self._accepted.pop(digest).size


def _digest(token: str) -> bytes:
    # The whole token: a key made of its beginning is the same for everybody's.
    if len(token) > jose.MAX_TOKEN_BYTES:
        raise Unauthenticated(f"the token has more than {jose.MAX_TOKEN_BYTES} bytes")
    return hashlib.sha256(token.encode(errors="surrogatepass")).digest()


def _issuer_to_try(unverified_claims: Mapping[str, Any], catalogue: Catalogue, *, users: bool) -> TrustedIssuer:
    unverified_issuer, unverified_subject = unverified_claims.get("iss"), unverified_claims.get("sub")
    kind = "users" if users else "workloads"
    candidates = [issuer for issuer in catalogue.issuers if issuer.users is users]
    found = [issuer for issuer in candidates if issuer.trust_domain is None and issuer.issuer == unverified_issuer]
    if not found:
        domain = trust_domain_of(unverified_subject)
        if domain is not None:
            found = [issuer for issuer in candidates if issuer.trust_domain == domain]
    if len(found) != 1:
        shown = ascii(unverified_issuer)[:200]
        raise Unauthenticated(
            f"{len(found)} trusted issuers of {kind} fit iss {shown}, sub {ascii(unverified_subject)[:200]}"
        )
    return found[0]


def trust_domain_of(subject: object) -> str | None:
    """The trust domain of a workload's SPIFFE ID, or None for anything else.

    >>> trust_domain_of("spiffe://prod.example/ns/agents"), trust_domain_of("spiffe://prod.example/a/../b")
    ('prod.example', None)
    """
    if not isinstance(subject, str) or len(subject) > 2048:
        return None
    found = _SPIFFE_ID.fullmatch(subject)
    if found is None or any(segment in (".", "..") for segment in found[2].split("/")):
        return None
    return found[1]
