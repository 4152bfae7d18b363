"""The broker's signing keys: sealed at rest, published before they sign, and out of trust the moment they leak.

A key is `next` (published, so that verifiers have it before they need it), then `current` (signs), then `retired`
(published while a token it signed may live); from anywhere it may become `compromised` and is trusted by nobody.
Every change turns the era, so that all brokers notice. A private key exists in the clear in memory only (INV-30).
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import ColumnElement, Connection, Row, func, literal, select

from broker.domain.audit import Event, canonical_json
from broker.domain.clock import Clock
from broker.domain.errors import ConfigurationError, NotFound, Unavailable
from broker.domain.identity import new_id
from broker.domain.lifecycle import KeyState
from broker.providers.jwt import PublicKey, SigningKey
from broker.store import gate, models
from broker.store.database import Database
from broker.store.rows import insert_rows
from broker.store.transitions import move, record

MASTER_KEY_BYTES = 32

_VERSION = b"\x01"
_NONCE_BYTES = 12
_PURPOSE = "signing key"
# Verifiers' clocks differ, and they keep a key set for a while after they fetched it.
_MARGIN = timedelta(minutes=5)
_ACTOR = "broker"
_PUBLISHED = (KeyState.CURRENT, KeyState.NEXT, KeyState.RETIRED)  # in the order of the key set

_Row = Row[*tuple[Any, ...]]

_keys = models.table_of(models.SigningKey)
_LISTED = (_keys.c.kid, _keys.c.algorithm, _keys.c.state, _keys.c.created_at, _keys.c.activated_at, _keys.c.retired_at)


class MasterKey:
    """What seals the signing keys at rest: AES-256-GCM, a random 96-bit nonce each, bound to what it is for."""

    __slots__ = ("__cipher",)

    def __init__(self, key: bytes) -> None:
        if len(key) != MASTER_KEY_BYTES:
            raise ConfigurationError([f"the master key has {len(key)} bytes and must have {MASTER_KEY_BYTES}"])
        self.__cipher = AESGCM(key)

    def seal(self, plaintext: bytes, *, purpose: str, kid: str, algorithm: str) -> bytes:
        """A version byte, the nonce, the ciphertext with its tag."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return _VERSION + nonce + self.__cipher.encrypt(nonce, plaintext, _bound_to(purpose, kid, algorithm))

    def unseal(self, blob: bytes, *, purpose: str, kid: str, algorithm: str) -> bytes:
        """What was sealed for exactly this; ConfigurationError for another master key or a changed or swapped blob."""
        try:
            if blob[:1] != _VERSION:
                raise InvalidTag
            nonce, ciphertext = blob[1 : 1 + _NONCE_BYTES], blob[1 + _NONCE_BYTES :]
            return self.__cipher.decrypt(nonce, ciphertext, _bound_to(purpose, kid, algorithm))
        except (InvalidTag, ValueError):
            raise _unusable(kid, "does not open under this master key, or its row was changed") from None

    def __repr__(self) -> str:
        return "[master key]"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a MasterKey is not pickled or copied")


@dataclass(frozen=True, kw_only=True)
class ListedKey:
    """A key as `broker keys list` shows it."""

    kid: str
    algorithm: str
    state: KeyState
    created_at: datetime
    activated_at: datetime | None
    retired_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class Published:
    """A key of the key set; `until` is when the last token it can have signed has expired."""

    jwk: Mapping[str, str]
    until: datetime | None


@dataclass(frozen=True, kw_only=True, eq=False)
class KeyRing:
    """The keys as one transaction saw them."""

    signing: Mapping[str, SigningKey]  # by algorithm
    published: Sequence[Published]
    verification_keys: Mapping[str, PublicKey]  # by kid: what may have signed a token that lives
    states: Mapping[str, KeyState]
    clock: Clock = field(repr=False)

    def current(self, algorithm: str) -> SigningKey:
        """The key that signs now."""
        key = self.signing.get(algorithm)
        if key is None:
            raise Unavailable(f"no {algorithm} key is current: run `broker apply`, which makes what is missing")
        return key

    def jwks(self) -> dict[str, Any]:
        """The JWK set (RFC 7517), current keys first. A retired key leaves it by the clock: no row changes then."""
        now = self.clock()
        return {"keys": [dict(key.jwk) for key in self.published if key.until is None or now < key.until]}


class Keys:
    def __init__(
        self,
        *,
        database: Database,
        master_key: MasterKey,
        clock: Clock,
        rotate_every: timedelta,
        max_ttl: timedelta,
    ) -> None:
        self._database = database
        self._master_key = master_key
        self._clock = clock
        self._rotate_every = rotate_every
        self._published_after = max_ttl + _MARGIN
        self._opened: Mapping[str, SigningKey] = {}

    def load(self, db: Connection) -> KeyRing:
        """The keys as the caller's transaction sees them; ConfigurationError if one cannot be unsealed."""
        now = self._clock()
        # One statement: read piece by piece, a key could be missed on its way from one state to the next.
        rows = _rows(db)
        trusted = sorted(
            (row for row in rows if row.state != KeyState.COMPROMISED and not self._has_left(row, now)),
            key=lambda row: (_PUBLISHED.index(KeyState(row.state)), row.algorithm, row.kid),
        )
        keys = self._open(db, [row.kid for row in trusted])
        return KeyRing(
            signing={row.algorithm: keys[row.kid] for row in trusted if row.state == KeyState.CURRENT},
            # The public half comes from the sealed private one: whoever can write to the table, but has not the
            # master key, cannot make us publish or believe a key of theirs.
            published=[Published(jwk=keys[row.kid].public_jwk(), until=self._until(row)) for row in trusted],
            verification_keys={row.kid: keys[row.kid].public for row in trusted if row.state != KeyState.NEXT},
            states={row.kid: KeyState(row.state) for row in rows},
            clock=self._clock,
        )

    def ensure(self, algorithms: Iterable[str], actor: str = _ACTOR) -> None:
        """A current and a next key for each of these algorithms; changes nothing where they are there already."""
        wanted = set(algorithms)
        now = self._clock()
        with self._database.read() as db:
            # Under a wrong master key it fails here, and not after sealing more keys with it.
            self.load(db)
            rows = _rows(db)
        self._renew({algorithm: None for algorithm in wanted if _lacks(rows, algorithm)}, actor=actor, now=now)

    def rotate(self, algorithm: str | None = None, *, actor: str, now: datetime) -> list[str]:
        """Next becomes current, current becomes retired, and a new next is published; answers who signs now.

        Of two that rotate at once, one does: the other's current key is no longer current.
        """
        with self._database.read() as db:
            self.load(db)
            rows = _rows(db)
        retiring = {row.algorithm: row.kid for row in rows if row.state == KeyState.CURRENT}
        if algorithm is not None:
            if algorithm not in retiring:
                have = ", ".join(sorted(retiring)) or "none"
                raise NotFound(f"no key for {algorithm[:40]!r} is current, there are keys for: {have}")
            retiring = {algorithm: retiring[algorithm]}
        return self._renew(retiring, actor=actor, now=now)

    def rotate_due(self, now: datetime) -> int:
        """Rotate what signed for long enough, and fill up what a compromise left without a next key."""
        with self._database.read() as db:
            rows = _rows(db)
        due: dict[str, str | None] = {
            algorithm: None for algorithm in {row.algorithm for row in rows} if _lacks(rows, algorithm)
        }
        due |= {
            row.algorithm: row.kid
            for row in rows
            if row.state == KeyState.CURRENT and row.activated_at <= now - self._rotate_every
        }
        if not due:
            return 0
        with self._database.read() as db:
            self.load(db)
        return len(self._renew(due, actor=_ACTOR, now=now))

    def compromise(self, kid: str, *, actor: str, reason: str, now: datetime) -> None:
        """Trust this key no longer, and sign with the next one from here on. Saying so twice changes nothing more.

        Needs neither this key nor the master key it was sealed with, so that a lost one can be given up.
        """
        with self._database.begin() as db:
            self.mark_compromised(db, kid, actor, reason, now)
        # Afterwards: distrust waits for no key to be made.
        self.fill_up(kid, actor=actor, now=now)

    def fill_up(self, kid: str, *, actor: str, now: datetime) -> None:
        """Make the current and next keys that the compromise of this one left missing."""
        with self._database.read() as db:
            rows = _rows(db)
        algorithm = next(row.algorithm for row in rows if row.kid == kid)
        if _lacks(rows, algorithm):
            self._renew({algorithm: None}, actor=actor, now=now)

    def mark_compromised(self, db: Connection, kid: str, actor: str, reason: str, now: datetime) -> bool:
        """The part of `compromise` for a transaction of the caller; `fill_up` then makes the new next key.

        Turns the era, so call it before locking any row. False if it was compromised before.
        """
        gate.turn(db)
        algorithm = db.execute(select(_keys.c.algorithm).where(_keys.c.kid == kid)).scalar_one_or_none()
        if algorithm is None:
            raise NotFound(f"there is no key {kid[:64]!r}: `broker keys list` shows them", member="kid")
        # A retired key keeps the time it stopped signing.
        stopped_at = func.coalesce(_keys.c.retired_at, literal(now, models.Instant()))
        gone = _move(db, KeyState.COMPROMISED, kid, "key.compromised", actor, now, reason, retired_at=stopped_at)
        _promote(db, algorithm, actor, now)
        return gone

    def listing(self) -> list[ListedKey]:
        """Every key there ever was, oldest first."""
        with self._database.read() as db:
            rows = _rows(db)
        return [ListedKey(**{**row._mapping, "state": KeyState(row.state)}) for row in rows]

    def _renew(self, retiring: Mapping[str, str | None], *, actor: str, now: datetime) -> list[str]:
        """Retire these current keys, by algorithm, where they still are, and have a current and a next key of each."""
        if not retiring:
            return []
        # Both may be missing, and finding RSA primes while holding the gate would stop all issuing.
        made = {algorithm: [SigningKey.generate(algorithm) for _ in range(2)] for algorithm in sorted(retiring)}
        activated = []
        with self._database.begin() as db:
            gate.turn(db)
            for algorithm, spare in made.items():
                kid = retiring[algorithm]
                if kid is not None:
                    # Retired first: the index `signing_keys_one_current_idx` never sees two.
                    _move(db, KeyState.RETIRED, kid, "key.retired", actor, now, retired_at=now)
                if not _kids(db, algorithm, KeyState.CURRENT, KeyState.NEXT):
                    self._bear(db, spare.pop(), actor, now)
                activated += _promote(db, algorithm, actor, now)
                if not _kids(db, algorithm, KeyState.NEXT):
                    self._bear(db, spare.pop(), actor, now)
        return activated

    def _bear(self, db: Connection, key: SigningKey, actor: str, now: datetime) -> None:
        sealed = self._master_key.seal(key.private_bytes(), purpose=_PURPOSE, kid=key.kid, algorithm=key.algorithm)
        row = {
            "kid": key.kid,
            "algorithm": key.algorithm,
            "state": str(KeyState.NEXT),
            "public_jwk": key.public_jwk(),
            "sealed_private_key": sealed,
            "created_at": now,
            "activated_at": None,
            "retired_at": None,
        }
        insert_rows(db, models.SigningKey, [row])
        record(db, [_event(key.kid, key.algorithm, "key.created", actor, now)])  # INV-32

    def _open(self, db: Connection, kids: Collection[str]) -> Mapping[str, SigningKey]:
        known = self._opened
        missing = [kid for kid in kids if kid not in known]
        read = {}
        if missing:
            sealed = select(_keys.c.kid, _keys.c.algorithm, _keys.c.sealed_private_key).where(_keys.c.kid.in_(missing))
            read = {row.kid: self._unsealed(row) for row in db.execute(sealed)}
        keys = {kid: known[kid] if kid in known else read[kid] for kid in kids}
        # Only these: the private half of a key that is out of use need not stay in memory.
        self._opened = keys
        return keys

    def _unsealed(self, row: _Row) -> SigningKey:
        blob = bytes(row.sealed_private_key)
        der = self._master_key.unseal(blob, purpose=_PURPOSE, kid=row.kid, algorithm=row.algorithm)
        key = SigningKey.from_private_bytes(der)
        if (key.kid, key.algorithm) != (row.kid, row.algorithm):
            raise _unusable(row.kid, "holds another key than it says")
        return key

    def _until(self, row: _Row) -> datetime | None:
        return None if row.retired_at is None else row.retired_at + self._published_after

    def _has_left(self, row: _Row, now: datetime) -> bool:
        until = self._until(row)
        return until is not None and until <= now


def _rows(db: Connection) -> Sequence[_Row]:
    return db.execute(select(*_LISTED).order_by(_keys.c.created_at, _keys.c.kid)).fetchall()


def _lacks(rows: Iterable[_Row], algorithm: str) -> bool:
    have = {row.state for row in rows if row.algorithm == algorithm}
    return not have.issuperset({KeyState.CURRENT, KeyState.NEXT})


def _kids(db: Connection, algorithm: str, *states: KeyState) -> list[str]:
    where: list[ColumnElement[bool]] = [_keys.c.algorithm == algorithm, _keys.c.state.in_([str(s) for s in states])]
    return list(db.execute(select(_keys.c.kid).where(*where).order_by(_keys.c.created_at, _keys.c.kid)).scalars())


def _promote(db: Connection, algorithm: str, actor: str, now: datetime) -> list[str]:
    """Let the oldest next key sign, where none does."""
    if _kids(db, algorithm, KeyState.CURRENT):
        return []
    oldest = _kids(db, algorithm, KeyState.NEXT)[:1]
    for kid in oldest:
        _move(db, KeyState.CURRENT, kid, "key.activated", actor, now, activated_at=now)
    return oldest


def _move(
    db: Connection,
    to: KeyState,
    kid: str,
    type_: str,
    actor: str,
    now: datetime,
    reason: str | None = None,
    **values: Any,
) -> bool:
    def moved(row: _Row) -> Event:
        return _event(row.kid, row.algorithm, type_, actor, now, reason)

    return bool(move(db, models.SigningKey, to, _keys.c.kid == kid, event=moved, **values))


def _event(kid: str, algorithm: str, type_: str, actor: str, now: datetime, reason: str | None = None) -> Event:
    data = {"kid": kid, "algorithm": algorithm}
    return Event(id=new_id("evt", now), at=now, type=type_, actor=actor, reason=reason, data=data)


def _bound_to(purpose: str, kid: str, algorithm: str) -> bytes:
    # As JSON: run together, two different triples could be the same bytes.
    return _VERSION + canonical_json([purpose, kid, algorithm])


def _unusable(kid: str, what: str) -> ConfigurationError:
    return ConfigurationError(
        [
            f"signing key {kid[:64]!r} {what}: put back the master key file this database was made with, or give the "
            f"key up and everything it signed with `broker keys compromise`"
        ]
    )
