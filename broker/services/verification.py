"""Token introspection (RFC 7662), status lists (IETF Token Status List), and the question behind both: is it live now?

Reads only. Never calls a provider: a verifier's answer may not wait for Vault. Unknown is "not active" (INV-24).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from broker.domain.clock import Clock, epoch
from broker.domain.errors import BrokerError, InvalidTarget, NotFound, Unauthenticated
from broker.domain.grant import Authority, Grant
from broker.domain.identity import Caller, Role, is_id
from broker.domain.lease import Lease
from broker.domain.lifecycle import is_live
from broker.domain.receipt import COMMITTED_WITHIN, OFFLINE_BOUND
from broker.domain.status_list import claims as status_list_claims
from broker.domain.status_list import encode
from broker.providers.jwt import verify
from broker.services.batching import Batching
from broker.services.endings import OWES_NOTHING
from broker.services.keys import KeyRing
from broker.services.revocation import may_see
from broker.services.standing import Standing, StandingReader, principal_of
from broker.store import gate
from broker.store.database import Database
from broker.store.feed import newest_lists
from broker.store.grants import find_with_tasks, invalid_indexes, matching, page_of_grants, seen_by
from broker.store.leases import leases_of
from broker.store.looks import Found, find_authorities
from broker.store.standing import STATUS_LIST_SIZE, status_list, status_lists

# Our own memory, the verifier's, and what a commit may take after its time was read add up to the published bound.
_KEPT_FOR = timedelta(seconds=2)
_USABLE_FOR = OFFLINE_BOUND - COMMITTED_WITHIN
_TTL = _USABLE_FOR - _KEPT_FOR
_LISTS_REMEMBERED = 64
_TOKENS_REMEMBERED = 8_192  # with their claims, a few KiB each
_NOT_CONFIRMED = "its end is not confirmed yet; an administrator sees why"
_TOKEN_TYPES = ("at+jwt", "JWT")


@dataclass(frozen=True, kw_only=True)
class LiveToken:
    """A token of ours that opens something at this moment: what it says, its grant, and what stands over both."""

    claims: Mapping[str, Any]
    grant: Authority
    standing: Standing


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """A grant at the moment of one look, and what stood over it."""

    grant: Authority | None
    live: bool
    standing: Standing


@dataclass(frozen=True)
class _Mark:
    """What has to be as it was, or a list that is kept would not say what has ended since (INV-24).

    That is the era, and the newest event of the feed that sends verifiers to the lists: they come at once.
    """

    era: int
    lists_seq: int


@dataclass(frozen=True, kw_only=True)
class _List:
    mark: _Mark | None
    built_at: datetime
    token: str


class Verification:
    def __init__(self, *, database: Database, standing: StandingReader, issuer: str, clock: Clock) -> None:
        self._database = database
        self._standing = standing
        self._issuer = issuer
        self._clock = clock
        self._looks: Batching[str, _Seen] = Batching(self._look)
        self._verified: dict[bytes, tuple[KeyRing, Mapping[str, Any]]] = {}
        self._lists: dict[int, _List] = {}
        self._building = tuple(threading.Lock() for _ in range(8))

    def introspect(self, caller: Caller, token: str) -> Mapping[str, Any]:
        """RFC 7662's answer; `{"active": false}` says nothing more, whatever the reason (INV-26)."""
        live = self.live_token(token)
        if live is None:
            return {"active": False}
        try:
            resource = live.standing.catalogue.resource(live.grant.resource)
        except InvalidTarget:
            return {"active": False}
        # Who was a verifier at the door may be nobody in the configuration of this look.
        principal = principal_of(caller, live.standing)
        if Role.VERIFIER not in principal.roles or principal.name not in resource.verifiers:
            return {"active": False}
        token_type = "DPoP" if "cnf" in live.claims else "Bearer"
        return {"active": True, "token_type": token_type, **live.claims}

    def live_token(self, token: str) -> LiveToken | None:
        """The claims of a token of ours that opens something now, with its grant; None for anything else."""
        now = self._clock()
        claims = self._claims(token, self._standing.last_known().keys, now)
        if claims is None:
            # Signed by a key that was made since our last look, perhaps.
            claims = self._claims(token, self._standing.now().keys, now)
        if claims is None:
            return None
        seen = self._looks.submit(str(claims["grant_id"]))
        # A key that was compromised since is not in the ring of this look.
        if seen.grant is None or not seen.live or self._claims(token, seen.standing.keys, now) is None:
            return None
        if claims["aud"] != seen.grant.resource:
            return None
        return LiveToken(claims=claims, grant=seen.grant, standing=seen.standing)

    def find_grant(self, caller: Caller, grant_id: str) -> tuple[Grant, bool, Lease | None]:
        """The grant, whether it is live, and its lease; NotFound for those who may not see it (INV-28)."""
        now = self._clock()
        with self._database.read() as db:
            found = find_with_tasks(db, [grant_id]).get(grant_id) if is_id(grant_id, "grt") else None
            standing = self._standing.at(db, gate.era_of(db))
            lease = None if found is None else _leases_of(db, [found[0]], caller).get(grant_id)
        if found is None or not may_see(caller, found[0]):
            raise NotFound(f"there is no grant {grant_id[:64]!r} that you may see")
        return found[0], _live(standing, now, *found), lease

    def page_of_grants(
        self, caller: Caller, filters: Mapping[str, str], *, before: str | None, limit: int
    ) -> list[tuple[Grant, bool, Lease | None]]:
        """Newest first, below the id `before`, of those the caller may see; each as `find_grant` answers it."""
        now = self._clock()
        where = matching(**filters)
        if not (caller.has(Role.ADMIN) or caller.has(Role.AUDITOR)):
            where.append(seen_by(caller.name))
        with self._database.read() as db:
            page = page_of_grants(db, where=where, before=before, limit=limit)
            found = find_with_tasks(db, [grant.id for grant in page])
            owed = _leases_of(db, page, caller)
            standing = self._standing.at(db, gate.era_of(db))
        return [(grant, _live(standing, now, *found[grant.id]), owed.get(grant.id)) for grant in page]

    def jwks(self) -> Mapping[str, Any]:
        return self._standing.now().keys.jwks()

    def status_list(self, list_id: int) -> str:
        """A signed status list, never older than its `iat` says by more than the bound."""
        kept = self._fresh(list_id)
        if kept is None:
            # One builder of a list at a time: a crowd of verifiers costs one scan (INV-35).
            with self._building[list_id % len(self._building)]:
                kept = self._fresh(list_id) or self._build(list_id)
        return kept.token

    def status_lists(self) -> Mapping[str, Any]:
        with self._database.read() as db:
            live = status_lists(db, now=self._clock())
        return {"status_lists": [self.status_uri(list_id) for list_id in live]}

    def status_uri(self, list_id: int) -> str:
        return f"{self._issuer}/status-lists/{list_id}"

    def _look(self, grant_ids: Sequence[str]) -> Sequence[_Seen | BrokerError]:
        now = self._clock()
        era, found = find_authorities(self._database, set(grant_ids))
        # What stands is read with the rows or after them, so no refusal is missed (INV-24).
        standing = self._standing.last_known() if era is None else self._standing.since(era)
        return [self._seen(found.get(grant_id), standing, now) for grant_id in grant_ids]

    def _seen(self, row: Found | None, standing: Standing, now: datetime) -> _Seen:
        if row is None:
            return _Seen(grant=None, live=False, standing=standing)
        return _Seen(grant=row[0], live=_live(standing, now, *row), standing=standing)

    def _claims(self, token: str, keys: KeyRing, now: datetime) -> Mapping[str, Any] | None:
        digest = hashlib.sha256(token.encode(errors="surrogatepass")).digest()
        known = self._verified.get(digest)
        if known is not None and known[0] is keys:
            return known[1] if epoch(now) < known[1]["exp"] else None
        try:
            claims = verify(token, keys.verification_keys, now=now, typ=_TOKEN_TYPES)
        except Unauthenticated:
            return None
        if claims.get("iss") != self._issuer or not isinstance(claims.get("grant_id"), str):
            return None
        if len(self._verified) >= _TOKENS_REMEMBERED:
            self._verified.clear()
        self._verified[digest] = (keys, claims)
        return claims

    def _fresh(self, list_id: int) -> _List | None:
        now = self._clock()
        with self._database.read() as db:
            mark = _mark(db)
        kept = self._lists.get(list_id)
        return None if kept is None or mark is None or kept.mark != mark or now - kept.built_at >= _KEPT_FOR else kept

    def _build(self, list_id: int) -> _List:
        now = self._clock()
        with self._database.read() as db:
            # Before the rows: what ends meanwhile makes the next look build anew.
            era, mark = gate.era_of(db), _mark(db)
            row = status_list(db, list_id)
            if row is None or row.last_expiry_at <= now:
                # Nothing alive points to an old one, so nobody makes us scan it.
                raise NotFound(f"there is no status list {list_id} to which a token could still point")
            standing = self._standing.at(db, era)
            invalid = invalid_indexes(db, list_id, standing.refusals, now=now)
        claims = status_list_claims(
            uri=self.status_uri(list_id),
            issued_at=now,
            expires_at=now + _USABLE_FOR,
            ttl_s=int(_TTL.total_seconds()),
            lst=encode(bits=2, size=STATUS_LIST_SIZE, invalid=invalid),
            bits=2,
        )
        token = standing.keys.attesting("ES256").sign({"iss": self._issuer, **claims}, typ="statuslist+jwt")
        built = _List(mark=mark, built_at=now, token=token)
        if len(self._lists) >= _LISTS_REMEMBERED:
            self._lists.clear()
        self._lists[list_id] = built
        return built


def _mark(db: Connection) -> _Mark | None:
    """None while such an event has no number yet: there may be two of them, and nothing tells the one from both."""
    lists_seq = newest_lists(db)
    return None if lists_seq is None else _Mark(gate.era_of(db), lists_seq)


def _leases_of(db: Connection, page: Sequence[Grant], caller: Caller) -> Mapping[str, Lease]:
    """What is owed for them; why it was not paid speaks of our set-up, and not to agents."""
    owed = leases_of(db, [grant.id for grant in page if grant.provider != OWES_NOTHING])
    if caller.has(Role.ADMIN) or caller.has(Role.AUDITOR):
        return owed
    return {
        grant_id: lease if lease.last_error is None else replace(lease, last_error=_NOT_CONFIRMED)
        for grant_id, lease in owed.items()
    }


def _live(standing: Standing, now: datetime, grant: Authority, task_state: Any, ends_at: datetime) -> bool:
    return is_live(
        grant=grant.state,
        expires_at=grant.expires_at,
        task=task_state,
        deadline_at=ends_at,
        locked_down=standing.refusals.over(grant) is not None,
        now=now,
    )
