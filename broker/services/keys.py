"""The broker's signing keys: sealed at rest, published before they sign, and out of trust the moment they leak.

A key is `next` (published, so that verifiers have it before they need it), then `current` (signs), then `retired`
(published while a token it signed may live); from anywhere it may become `compromised` and is trusted by nobody.
Every change turns the era, so that all brokers notice. A private key exists in the clear in memory only (INV-30).

What seals them is a file, or a key in Vault. Vault is asked outside of transactions, every few seconds: while it does
not answer no token is signed, and whatever ends authority or tells about it goes on with what is in memory.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, NoReturn, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import ColumnElement, Connection, Row, func, literal, select

from broker.domain.audit import Event, canonical_json
from broker.domain.clock import Clock
from broker.domain.errors import (
    ConfigurationError,
    Invalid,
    NotFound,
    ProviderRefused,
    ProviderUnavailable,
    Unavailable,
)
from broker.domain.feed import end_of_trust
from broker.domain.identity import new_id
from broker.domain.lifecycle import KeyState
from broker.providers.jwt import PublicKey, SigningKey, public_key
from broker.store import gate, models
from broker.store.database import Database
from broker.store.feed import announce
from broker.store.rows import insert_rows
from broker.store.transitions import move, record

MASTER_KEY_BYTES = 32
# How long tokens are signed after Vault last showed that it opens our keys: it may change its leader meanwhile.
ISSUES_FOR = timedelta(seconds=30)

_VERSION = b"\x01"
_ENVELOPE = b"\x02"
_NONCE_BYTES = 12
_LENGTH_BYTES = 2
_AGAIN_AFTER = timedelta(seconds=5)
_PURPOSE = "signing key"
# Verifiers' clocks differ, and they keep a key set for a while after they fetched it.
_MARGIN = timedelta(minutes=5)
_ACTOR = "broker"
_PUBLISHED = (KeyState.CURRENT, KeyState.NEXT, KeyState.RETIRED)  # in the order of the key set

_Row = Row[*tuple[Any, ...]]

_keys = models.table_of(models.SigningKey)
_LISTED = (_keys.c.kid, _keys.c.algorithm, _keys.c.state, _keys.c.created_at, _keys.c.activated_at, _keys.c.retired_at)
_WHOLE = (*_LISTED, _keys.c.public_jwk, _keys.c.sealed_private_key)

_log = logging.getLogger(__name__)


class Sealing(Protocol):
    """What seals the signing keys at rest, each bound to what it is for."""

    @property
    def asks_outside(self) -> bool:
        """Whether it asks somebody: then never within a transaction, and there may be no answer."""

    @property
    def remedy(self) -> str:
        """What to do where a key does not open."""

    def seal(self, plaintext: bytes, *, purpose: str, kid: str, algorithm: str) -> bytes: ...

    def unseal(self, blob: bytes, *, purpose: str, kid: str, algorithm: str) -> bytes:
        """What was sealed for exactly this; ConfigurationError for what does not open, and never will.

        Where somebody is asked: ProviderRefused or ProviderUnavailable if there is no answer to that.
        """

    def close(self) -> None: ...


class Wrapping(Protocol):
    """A key outside that wraps 32 bytes at a time; `unwrap` raises `Invalid` for what it did not wrap for this."""

    @property
    def name(self) -> str: ...

    def wrap(self, plaintext: bytes, *, bound_to: bytes) -> str: ...

    def unwrap(self, wrapped: str, *, bound_to: bytes) -> bytes: ...

    def close(self) -> None: ...


class MasterKey:
    """Seals with one key from a file: AES-256-GCM, a random 96-bit nonce each, bound to what it is for."""

    __slots__ = ("__cipher",)

    asks_outside = False
    remedy = "put back the master key file this database was made with"

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
            raise _unusable(kid, "does not open under this master key, or its row was changed", self.remedy) from None

    def close(self) -> None:
        """Nothing is open."""

    def __repr__(self) -> str:
        return "[master key]"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a MasterKey is not pickled or copied")


class Envelope:
    """Seals each key with 32 bytes of its own, and keeps those beside it, wrapped by a key that is not ours to see.

    So neither the database nor the broker's disk opens anything, and whoever wraps sees no signing key.
    """

    asks_outside = True

    def __init__(self, wrapping: Wrapping) -> None:
        self._wrapping = wrapping

    @property
    def remedy(self) -> str:
        return f"let {self._wrapping.name} be the key in Vault this database was made with, old versions included"

    def seal(self, plaintext: bytes, *, purpose: str, kid: str, algorithm: str) -> bytes:
        """A version byte, the length of the wrapped bytes, they, and what they seal."""
        own = secrets.token_bytes(MASTER_KEY_BYTES)
        wrapped = self._wrapping.wrap(own, bound_to=_bound_to(purpose, kid, algorithm)).encode("ascii")
        sealed = MasterKey(own).seal(plaintext, purpose=purpose, kid=kid, algorithm=algorithm)
        return _ENVELOPE + len(wrapped).to_bytes(_LENGTH_BYTES, "big") + wrapped + sealed

    def unseal(self, blob: bytes, *, purpose: str, kid: str, algorithm: str) -> bytes:
        try:
            if blob[:1] != _ENVELOPE:
                raise Invalid("it is no envelope")
            begins = 1 + _LENGTH_BYTES
            ends = begins + int.from_bytes(blob[1:begins], "big")
            wrapped = blob[begins:ends].decode("ascii")
            own = self._wrapping.unwrap(wrapped, bound_to=_bound_to(purpose, kid, algorithm))
            return MasterKey(own).unseal(blob[ends:], purpose=purpose, kid=kid, algorithm=algorithm)
        except (Invalid, UnicodeDecodeError, ConfigurationError) as problem:
            said = problem.detail if isinstance(problem, Invalid) else "what it seals was changed"
        _log.error("a signing key does not open", extra={"fields": {"kid": kid[:64], "reason": said}})
        raise _unusable(kid, f"does not open under {self._wrapping.name}, or its row was changed", self.remedy)

    def close(self) -> None:
        self._wrapping.close()


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
    """The keys as one transaction saw them. `unopened` are the algorithms whose current key is still sealed."""

    signing: Mapping[str, SigningKey]  # by algorithm
    unopened: Collection[str]
    published: Sequence[Published]
    verification_keys: Mapping[str, PublicKey]  # by kid: what may have signed a token that lives
    states: Mapping[str, KeyState]
    clock: Clock = field(repr=False)
    may_issue: Callable[[], bool] = field(repr=False)
    generation: int  # of what is open: another one makes another ring of the same rows

    def current(self, algorithm: str) -> SigningKey:
        """The key that signs tokens now; Unavailable where none may be signed."""
        key = self.attesting(algorithm)
        if not self.may_issue():
            raise _no_answer()
        return key

    def attesting(self, algorithm: str) -> SigningKey:
        """The key that signs what is said of tokens, status lists and receipts: that goes on where issuing stops."""
        key = self.signing.get(algorithm)
        if key is not None:
            return key
        if algorithm in self.unopened:
            raise _no_answer()
        raise Unavailable(f"no {algorithm} key is current: run `broker apply`, which makes what is missing")

    def jwks(self) -> dict[str, Any]:
        """The JWK set (RFC 7517), current keys first. A retired key leaves it by the clock: no row changes then."""
        now = self.clock()
        return {"keys": [dict(key.jwk) for key in self.published if key.until is None or now < key.until]}


class Keys:
    def __init__(
        self,
        *,
        database: Database,
        sealing: Sealing,
        clock: Clock,
        rotate_every: timedelta,
        max_ttl: timedelta,
    ) -> None:
        self._database = database
        self._sealing = sealing
        self._clock = clock
        self._rotate_every = rotate_every
        self._published_after = max_ttl + _MARGIN
        self._confirming = threading.Lock()
        self._guard = threading.Lock()  # over the four below, never while somebody is asked
        self._opened: Mapping[str, SigningKey] = {}
        self._unusable: Mapping[str, ConfigurationError] = {}
        self._confirmed_at: datetime | None = None
        self._generation = 0

    @property
    def generation(self) -> int:
        """Another number when another set of keys is open, which turns no era."""
        return self._generation

    def close(self) -> None:
        self._sealing.close()

    def load(self, db: Connection) -> KeyRing:
        """The keys as the caller's transaction sees them; ConfigurationError if one does not open.

        Asks nobody outside: what `confirm` has not opened yet signs nothing.
        """
        now, generation = self._clock(), self._generation
        # One statement: read piece by piece, a key could be missed on its way from one state to the next.
        rows = _rows(db)
        trusted = self._trusted(rows, now)
        keys = self._known(trusted) if self._sealing.asks_outside else self._open(db, [row.kid for row in trusted])
        # The public half comes from the sealed private one: whoever can write to the table, but cannot seal, cannot
        # make us publish or believe a key of theirs.
        halves = {kid: (key.public, key.public_jwk()) for kid, key in keys.items()}
        if self._sealing.asks_outside and self._confirmed_at is None:
            halves |= _unproven(db, [row.kid for row in trusted if row.kid not in keys])
        current = {row.algorithm: row.kid for row in trusted if row.state == KeyState.CURRENT}
        seen = [row for row in trusted if row.kid in halves]
        return KeyRing(
            signing={algorithm: keys[kid] for algorithm, kid in current.items() if kid in keys},
            unopened=frozenset(algorithm for algorithm, kid in current.items() if kid not in keys),
            published=[Published(jwk=halves[row.kid][1], until=self._until(row)) for row in seen],
            verification_keys={row.kid: halves[row.kid][0] for row in seen if row.state != KeyState.NEXT},
            states={row.kid: KeyState(row.state) for row in rows},
            clock=self._clock,
            may_issue=self._is_confirmed if self._sealing.asks_outside else _always,
            generation=generation,
        )

    def confirm(self) -> None:
        """Where Vault seals the keys: open those that are not open yet, and see that it still opens one that is.

        Every process that signs or publishes asks every few seconds. ConfigurationError where one does not open;
        ProviderRefused or ProviderUnavailable where Vault cannot be asked, and then what is in memory stays.
        """
        if not self._sealing.asks_outside:
            return
        with self._confirming:
            now, known = self._clock(), self._opened
            with self._database.read() as db:
                rows = self._trusted(db.execute(select(*_WHOLE)).fetchall(), now)
            self._forget(known.keys() - {row.kid for row in rows})
            sealed = [row for row in rows if row.kid not in known]
            recent = self._confirmed_at is not None and abs(now - self._confirmed_at) < _AGAIN_AFTER
            wrong: list[str] = []
            for row in sealed if sealed or recent else rows[:1]:
                try:
                    key = self._unsealed(row)
                except ConfigurationError as problem:
                    wrong += problem.problems
                    # What was open once is ours, and its public half is proven.
                    self._learnt(unusable={} if row.kid in known else {row.kid: problem})
                else:
                    self._learnt(now, opened={} if row.kid in known else {row.kid: key})
            if wrong:
                raise ConfigurationError(wrong)

    def tend(self) -> None:
        """`confirm`, and go on where Vault cannot be asked: verifying and revoking needs no more than what is there."""
        try:
            self.confirm()
        except (ProviderRefused, ProviderUnavailable) as problem:
            _log.warning("the signing keys were not confirmed", extra={"fields": _said(problem)})

    def ensure(self, algorithms: Iterable[str], actor: str = _ACTOR) -> None:
        """A current and a next key for each of these algorithms; changes nothing where they are there already."""
        wanted = set(algorithms)
        now = self._clock()
        self.tend()
        with self._database.read() as db:
            # Under a wrong master key it fails here, and not after sealing more keys with it.
            self.load(db)
            rows = _rows(db)
        self._renew({algorithm: None for algorithm in wanted if _lacks(rows, algorithm)}, actor=actor, now=now)

    def rotate(self, algorithm: str | None = None, *, actor: str, now: datetime) -> list[str]:
        """Next becomes current, current becomes retired, and a new next is published; answers who signs now.

        Of two that rotate at once, one does: the other's current key is no longer current.
        """
        self.confirm()
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
        # Where Vault does not answer the sweep would wait for it each time, and revocations with the sweep (INV-27).
        if not due or (self._sealing.asks_outside and not self._is_confirmed()):
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
        if not _lacks(rows, algorithm):
            return
        try:
            self._renew({algorithm: None}, actor=actor, now=now)
        except (ProviderRefused, ProviderUnavailable) as problem:
            # What was distrusted stays so; `rotate_due` makes the missing key as soon as it can be sealed.
            _log.warning("no new signing key could be sealed", extra={"fields": _said(problem)})

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
        if gone:
            announce(db, now, [end_of_trust(kid)])
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
        # And whoever seals them may have to be asked.
        made = {algorithm: [self._made(algorithm) for _ in range(2)] for algorithm in sorted(retiring)}
        activated: list[str] = []
        born: dict[str, SigningKey] = {}
        with self._database.begin() as db:
            gate.turn(db)
            for algorithm, spare in made.items():
                kid = retiring[algorithm]
                if kid is not None:
                    # Retired first: the index `signing_keys_one_current_idx` never sees two.
                    _move(db, KeyState.RETIRED, kid, "key.retired", actor, now, retired_at=now)
                if not _kids(db, algorithm, KeyState.CURRENT, KeyState.NEXT):
                    born |= _born(db, *spare.pop(), actor, now)
                activated += _promote(db, algorithm, actor, now)
                if not _kids(db, algorithm, KeyState.NEXT):
                    born |= _born(db, *spare.pop(), actor, now)
        self._learnt(opened=born)
        return activated

    def _made(self, algorithm: str) -> tuple[SigningKey, bytes]:
        """A new key and its sealed form, which has been opened once: one that nobody can open must not sign."""
        key, asked_at = SigningKey.generate(algorithm), self._clock()
        private = key.private_bytes()
        bound = {"purpose": _PURPOSE, "kid": key.kid, "algorithm": key.algorithm}
        sealed = self._sealing.seal(private, **bound)
        if self._sealing.unseal(sealed, **bound) != private:
            raise _unusable(key.kid, "was sealed and opens as another", self._sealing.remedy)
        self._learnt(asked_at)
        return key, sealed

    def _trusted(self, rows: Iterable[_Row], now: datetime) -> list[_Row]:
        """Those whose tokens may live, current keys first."""
        return sorted(
            (row for row in rows if row.state != KeyState.COMPROMISED and not self._has_left(row, now)),
            key=lambda row: (_PUBLISHED.index(KeyState(row.state)), row.algorithm, row.kid),
        )

    def _is_confirmed(self) -> bool:
        confirmed_at = self._confirmed_at
        return confirmed_at is not None and abs(self._clock() - confirmed_at) < ISSUES_FOR

    def _known(self, rows: Iterable[_Row]) -> Mapping[str, SigningKey]:
        """What is open of these; ConfigurationError if one was found not to open."""
        opened, unusable = self._opened, self._unusable
        for row in rows:
            if row.kid in unusable:
                raise ConfigurationError(unusable[row.kid].problems)
        return {row.kid: opened[row.kid] for row in rows if row.kid in opened}

    def _learnt(
        self,
        confirmed_at: datetime | None = None,
        *,
        opened: Mapping[str, SigningKey] = MappingProxyType({}),
        unusable: Mapping[str, ConfigurationError] = MappingProxyType({}),
    ) -> None:
        with self._guard:
            if confirmed_at is not None:
                self._confirmed_at = confirmed_at
            if opened or unusable:
                self._opened = {**self._opened, **opened}
                others = {kid: problem for kid, problem in self._unusable.items() if kid not in opened}
                self._unusable = {**others, **unusable}
                self._generation += 1

    def _forget(self, kids: Collection[str]) -> None:
        """The private half of a key that is out of use need not stay in memory."""
        with self._guard:
            self._opened = {kid: key for kid, key in self._opened.items() if kid not in kids}

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
        der = self._sealing.unseal(blob, purpose=_PURPOSE, kid=row.kid, algorithm=row.algorithm)
        key = SigningKey.from_private_bytes(der)
        if (key.kid, key.algorithm) != (row.kid, row.algorithm):
            raise _unusable(row.kid, "holds another key than it says", self._sealing.remedy)
        return key

    def _until(self, row: _Row) -> datetime | None:
        return None if row.retired_at is None else row.retired_at + self._published_after

    def _has_left(self, row: _Row, now: datetime) -> bool:
        until = self._until(row)
        return until is not None and until <= now


def _always() -> bool:
    return True


def _unproven(db: Connection, kids: Collection[str]) -> dict[str, tuple[PublicKey, dict[str, str]]]:
    """The public halves as these rows say them, each under the name that it makes itself.

    Only for a broker that began while Vault was silent and has seen nothing open yet: it signs nothing, and without
    them every token that was issued before would be refused.
    """
    halves = {}
    statement = select(_keys.c.kid, _keys.c.algorithm, _keys.c.public_jwk).where(_keys.c.kid.in_(kids))
    for row in db.execute(statement):
        try:
            half = public_key(row.public_jwk)
        except Invalid as problem:
            raise ConfigurationError([f"signing key {row.kid[:64]!r} is {problem.detail}"]) from None
        if (row.public_jwk["kid"], row.public_jwk["alg"]) != (row.kid, row.algorithm):
            raise ConfigurationError([f"signing key {row.kid[:64]!r} publishes another key than it says"])
        halves[row.kid] = (half, row.public_jwk)
    return halves


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


def _born(db: Connection, key: SigningKey, sealed: bytes, actor: str, now: datetime) -> dict[str, SigningKey]:
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
    return {key.kid: key}


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


def _unusable(kid: str, what: str, remedy: str) -> ConfigurationError:
    return ConfigurationError(
        [
            f"signing key {kid[:64]!r} {what}: {remedy}, or give the key up and everything it signed with "
            f"`broker keys compromise`"
        ]
    )


def _no_answer() -> Unavailable:
    return Unavailable("what opens the broker's signing keys does not answer, so no token is signed: try again")


def _said(problem: ProviderRefused | ProviderUnavailable) -> dict[str, str | None]:
    return {"detail": problem.detail, "reason": problem.reason}
