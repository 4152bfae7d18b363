import base64
import copy
import logging
import pickle
import threading
import traceback
from contextlib import contextmanager
from datetime import timedelta

import jwt as pyjwt
import pytest
import sqlalchemy as sa

from broker.domain.errors import (
    ConfigurationError,
    Invalid,
    NotFound,
    ProviderRefused,
    ProviderUnavailable,
    Unavailable,
)
from broker.domain.lifecycle import KeyState
from broker.providers import jwt
from broker.providers.vault.connection import Connection
from broker.providers.vault.transit import TransitKey
from broker.services.keys import ISSUES_FOR, Keys, MasterKey
from broker.store import gate
from broker.store.database import Database, in_transaction
from broker.store.models import AuditEvent, SigningKey
from tests.conftest import NOW
from tests.services.sealings import KEY, MASTER, OnFake, OnFile, OnOpenBao

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
GONE = HOUR + timedelta(minutes=5)  # max_ttl, and the margin
# Where no statement differs between the two databases, one of them says it all.
on_sqlite = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
every_seal = pytest.mark.parametrize("seal", ["file", "fake vault", "openbao"], indirect=True)
every_vault = pytest.mark.parametrize("seal", ["fake vault", "openbao"], indirect=True)
BOUND = {"purpose": "signing key", "kid": "kid-1", "algorithm": "ES256"}


class SettableClock:
    def __init__(self, now=NOW):
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return SettableClock()


@pytest.fixture(autouse=True)
def nobody_is_asked_in_a_transaction(monkeypatch):
    """Rule 5: whoever waits for Vault holds no connection of the store, and no lock."""
    within = Connection.within

    def guarded(self, ask):
        assert not in_transaction(), "Vault was asked within a transaction"
        return within(self, ask)

    monkeypatch.setattr(Connection, "within", guarded)


@pytest.fixture
def seal(request, tmp_path):
    """What seals the keys: a master key file, where a test does not say otherwise."""
    kind = getattr(request, "param", "file")
    if kind == "file":
        made = OnFile()
    elif kind == "openbao":
        made = OnOpenBao(request.getfixturevalue("openbao"), tmp_path)
    else:
        made = OnFake(tmp_path)
    yield made
    made.close()


@pytest.fixture
def keys_of(seal):
    def build(database, clock, *, wrong=False):
        sealing = seal.sealing(clock, wrong=wrong)
        return Keys(database=database, sealing=sealing, clock=clock, rotate_every=DAY, max_ttl=HOUR)

    return build


@pytest.fixture
def keys(keys_of, database, clock):
    made = keys_of(database, clock)
    made.ensure({"ES256"})
    return made


def ring_of(keys):
    keys.confirm()
    return ring_without_asking(keys)


def ring_without_asking(keys):
    with keys._database.read() as db:
        return keys.load(db)


def states(keys, algorithm="ES256"):
    return [str(key.state) for key in keys.listing() if key.algorithm == algorithm]


def kid_of(keys, state, algorithm="ES256"):
    (kid,) = [key.kid for key in keys.listing() if key.state == state and key.algorithm == algorithm]
    return kid


def events(database):
    with database.read() as db:
        rows = db.execute(sa.select(AuditEvent.type, AuditEvent.actor, AuditEvent.reason, AuditEvent.data))
        return sorted((row.type, row.data["kid"], row.actor, row.reason) for row in rows)


def era(database):
    with database.read() as db:
        return gate.era_of(db)


def published(keys):
    return [key["kid"] for key in ring_of(keys).jwks()["keys"]]


def at_once(*verbs):
    """Run each on its own thread, started together; raises what any of them raised."""
    together, wrong = threading.Barrier(len(verbs)), []

    def run(verb):
        try:
            together.wait()
            verb()
        except Exception as problem:
            wrong.append(problem)

    threads = [threading.Thread(target=run, args=(verb,)) for verb in verbs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise wrong[0]


# --- Sealing ---


def test_what_was_sealed_opens_again_and_never_looks_the_same_twice():
    master = MasterKey(MASTER)
    blobs = {master.seal(b"secret", **BOUND) for _ in range(100)}
    assert len({blob[1:13] for blob in blobs}) == 100
    assert all(blob[:1] == b"\x01" and b"secret" not in blob for blob in blobs)
    assert {MasterKey(MASTER).unseal(blob, **BOUND) for blob in blobs} == {b"secret"}


@pytest.mark.parametrize("changed", [{"purpose": "cookie"}, {"kid": "kid-2"}, {"algorithm": "EdDSA"}], ids=str)
def test_a_blob_opens_only_for_what_it_was_sealed_for(changed):
    master = MasterKey(MASTER)
    with pytest.raises(ConfigurationError, match="does not open under this master key"):
        master.unseal(master.seal(b"secret", **BOUND), **BOUND | changed)


def test_what_a_blob_is_bound_to_cannot_be_shifted_between_its_parts():
    master = MasterKey(MASTER)
    blob = master.seal(b"secret", purpose="a", kid="bc", algorithm="d")
    with pytest.raises(ConfigurationError):
        master.unseal(blob, purpose="ab", kid="c", algorithm="d")


def test_a_blob_changed_or_cut_anywhere_does_not_open():
    master = MasterKey(MASTER)
    blob = master.seal(b"secret", **BOUND)
    flipped = [blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :] for at in range(len(blob))]
    for wrong in [*flipped, *(blob[:at] for at in range(len(blob))), blob + b"\0", b"\x02" + blob[1:]]:
        with pytest.raises(ConfigurationError):
            master.unseal(wrong, **BOUND)


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_master_key_of_another_size_is_refused(size):
    with pytest.raises(ConfigurationError, match=f"has {size} bytes and must have 32"):
        MasterKey(bytes(size))


def test_a_master_key_shows_nothing_and_goes_nowhere():
    """INV-30."""
    master = MasterKey(MASTER)
    assert {repr(master), str(master), f"{master}"} == {"[master key]"}
    for leak in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not pickled or copied"):
            leak(master)


# --- Birth ---


def test_ensure_makes_a_current_and_a_next_key_of_each_algorithm(keys_of, database, clock):
    keys = keys_of(database, clock)
    keys.ensure(["RS256", "ES256", "EdDSA", "ES256"])
    for algorithm in ("ES256", "RS256", "EdDSA"):
        assert sorted(states(keys, algorithm)) == ["current", "next"]
        assert ring_of(keys).current(algorithm).algorithm == algorithm
    made = {key.kid for key in keys.listing()}
    current = {key.kid for key in keys.listing() if key.state == KeyState.CURRENT}
    assert {key.activated_at for key in keys.listing() if key.kid in current} == {NOW}
    expected = [("key.created", kid, "broker", None) for kid in made]
    expected += [("key.activated", kid, "broker", None) for kid in current]
    assert events(database) == sorted(expected)  # INV-32


def test_ensure_changes_nothing_where_the_keys_are_there(keys, database):
    before = (keys.listing(), events(database), era(database))
    keys.ensure({"ES256"})
    keys.ensure(())
    assert (keys.listing(), events(database), era(database)) == before


def test_two_brokers_that_start_at_once_make_one_set_of_keys(keys_of, database, clock):
    url = database.engine.url.render_as_string(hide_password=False)
    others = [Database(url) for _ in range(4)]
    brokers = [keys_of(other, clock) for other in others]
    at_once(*(lambda broker=broker: broker.ensure({"ES256", "EdDSA"}) for broker in brokers))
    for algorithm in ("ES256", "EdDSA"):
        assert sorted(states(brokers[0], algorithm)) == ["current", "next"]
    assert len({ring_of(broker).current("ES256").kid for broker in brokers}) == 1
    assert len(events(database)) == 6
    for other in others:
        other.close()


@on_sqlite
def test_an_algorithm_without_a_key_signs_nothing(keys):
    with pytest.raises(Unavailable, match="no RS256 key is current"):
        ring_of(keys).current("RS256")
    with pytest.raises(ValueError, match="is not an algorithm we sign with"):
        keys.ensure({"HS256"})


@on_sqlite
@every_seal
def test_every_change_turns_the_era(keys, database):
    seen = [era(database)]
    for change in (
        lambda: keys.ensure({"EdDSA"}),
        lambda: keys.rotate("ES256", actor="ada", now=NOW),
        lambda: keys.rotate_due(NOW + DAY),
        lambda: keys.compromise(kid_of(keys, "current"), actor="ada", reason="leaked", now=NOW),
    ):
        change()
        seen.append(era(database))
    assert seen == sorted(set(seen))


# --- The key set ---


@on_sqlite
@every_seal
def test_the_key_set_has_the_current_key_first_then_the_next(keys):
    assert published(keys) == [kid_of(keys, "current"), kid_of(keys, "next")]


@on_sqlite
@every_seal
def test_pyjwt_verifies_our_tokens_with_our_key_set(keys):
    keys.ensure({"RS256", "EdDSA"})
    ring = ring_of(keys)
    jwks = pyjwt.PyJWKSet.from_dict(ring.jwks())
    for algorithm in ("ES256", "RS256", "EdDSA"):
        token = ring.current(algorithm).sign({"sub": "agent"}, typ="at+jwt")
        kid = pyjwt.get_unverified_header(token)["kid"]
        assert pyjwt.decode(token, jwks[kid], algorithms=[algorithm]) == {"sub": "agent"}
        assert jwt.verify(token, ring.verification_keys, typ={"at+jwt"}) == {"sub": "agent"}


def test_a_key_that_was_published_is_the_one_that_signs_after_the_rotation(keys, database):
    first, second = kid_of(keys, "current"), kid_of(keys, "next")
    assert keys.rotate(actor="ada", now=NOW + HOUR) == [second]
    third = kid_of(keys, "next")
    assert (kid_of(keys, "retired"), kid_of(keys, "current")) == (first, second)
    assert published(keys) == [second, third, first]
    assert ring_of(keys).verification_keys.keys() == {first, second}
    times = {key.kid: (key.created_at, key.activated_at, key.retired_at) for key in keys.listing()}
    assert times == {
        first: (NOW, NOW, NOW + HOUR),
        second: (NOW, NOW + HOUR, None),
        third: (NOW + HOUR, None, None),
    }
    assert {("key.retired", first, "ada", None), ("key.activated", second, "ada", None)} <= set(events(database))
    assert ("key.created", third, "ada", None) in events(database)


@on_sqlite
@every_seal
def test_a_token_of_before_the_rotation_is_verified_after_it(keys):
    token = ring_of(keys).current("ES256").sign({"sub": "agent"}, typ="at+jwt")
    keys.rotate(actor="ada", now=NOW)
    assert jwt.verify(token, ring_of(keys).verification_keys, typ={"at+jwt"}) == {"sub": "agent"}


def test_a_retired_key_leaves_when_no_token_of_it_can_live_also_from_a_ring_read_before(keys, clock):
    first = kid_of(keys, "current")
    keys.rotate(actor="ada", now=NOW)
    ring = ring_of(keys)
    clock.now = NOW + GONE - timedelta(seconds=1)
    assert first in {key["kid"] for key in ring.jwks()["keys"]} & set(published(keys))
    clock.now = NOW + GONE
    assert first not in {key["kid"] for key in ring.jwks()["keys"]} | set(published(keys))
    assert first not in ring_of(keys).verification_keys
    assert ring_of(keys).states[first] is KeyState.RETIRED  # the row stays


@on_sqlite
@every_seal
def test_only_the_named_algorithm_is_rotated(keys):
    keys.ensure({"EdDSA"})
    keys.rotate("EdDSA", actor="ada", now=NOW)
    assert sorted(states(keys)) == ["current", "next"]
    assert sorted(states(keys, "EdDSA")) == ["current", "next", "retired"]
    with pytest.raises(NotFound, match="there are keys for: ES256, EdDSA"):
        keys.rotate("RS256", actor="ada", now=NOW)


def test_keys_are_rotated_when_they_signed_for_long_enough(keys):
    first = kid_of(keys, "current")
    assert keys.rotate_due(NOW + DAY - timedelta(seconds=1)) == 0
    assert kid_of(keys, "current") == first
    assert keys.rotate_due(NOW + DAY) == 1
    assert keys.rotate_due(NOW + DAY) == 0
    assert kid_of(keys, "retired") == first


@pytest.mark.parametrize("verb", ["rotate", "rotate_due"])
def test_of_two_that_rotate_at_once_the_key_set_stays_whole(keys_of, keys, database, clock, verb):
    url = database.engine.url.render_as_string(hide_password=False)
    others = [Database(url) for _ in range(4)]
    now = NOW + DAY

    def rotate(broker):
        return broker.rotate(actor="ada", now=now) if verb == "rotate" else broker.rotate_due(now)

    brokers = [keys_of(other, clock) for other in others]
    for broker in brokers:
        broker.confirm()
    at_once(*(lambda broker=broker: rotate(broker) for broker in brokers))
    found = states(keys)
    assert (found.count("current"), found.count("next")) == (1, 1)
    if verb == "rotate_due":
        assert found.count("retired") == 1
    ring = ring_of(keys)
    token = ring.current("ES256").sign({}, typ="at+jwt")
    assert jwt.verify(token, ring.verification_keys, typ={"at+jwt"}) == {}
    for other in others:
        other.close()


@on_sqlite
@every_seal
def test_a_rotation_that_saw_an_older_current_key_retires_nothing(keys):
    first = kid_of(keys, "current")
    keys.rotate(actor="ada", now=NOW)
    before = keys.listing()
    assert keys._renew({"ES256": first}, actor="grace", now=NOW) == []
    assert keys.listing() == before


def test_the_database_itself_refuses_a_second_current_key(keys, database):
    with pytest.raises(sa.exc.IntegrityError), database.begin() as db:
        db.execute(sa.update(SigningKey).where(SigningKey.state == "next").values(state="current"))


# --- Compromise ---


def test_a_compromised_key_is_trusted_by_nobody_and_the_next_one_signs(keys, database):
    stolen, following = kid_of(keys, "current"), kid_of(keys, "next")
    token = ring_of(keys).current("ES256").sign({"sub": "agent"}, typ="at+jwt")
    keys.compromise(stolen, actor="ada", reason="found on a laptop", now=NOW + HOUR)
    ring = ring_of(keys)
    assert ring.current("ES256").kid == following
    assert stolen not in published(keys)
    assert ring.states[stolen] is KeyState.COMPROMISED
    with pytest.raises(jwt.Unauthenticated):
        jwt.verify(token, ring.verification_keys, typ={"at+jwt"})
    assert sorted(states(keys)) == ["compromised", "current", "next"]
    assert ("key.compromised", stolen, "ada", "found on a laptop") in events(database)
    assert {key.retired_at for key in keys.listing() if key.kid == stolen} == {NOW + HOUR}


@on_sqlite
@every_seal
def test_saying_twice_that_a_key_is_compromised_changes_nothing_more(keys, database):
    stolen = kid_of(keys, "current")
    keys.compromise(stolen, actor="ada", reason="leaked", now=NOW)
    before = (keys.listing(), events(database))
    keys.compromise(stolen, actor="ada", reason="leaked again", now=NOW)
    assert (keys.listing(), events(database)) == before


@pytest.mark.parametrize("state", ["next", "retired"])
def test_a_key_that_does_not_sign_can_be_compromised_too(keys, state):
    keys.rotate(actor="ada", now=NOW)
    current, stolen = kid_of(keys, "current"), kid_of(keys, state)
    keys.compromise(stolen, actor="ada", reason="leaked", now=NOW + HOUR)
    assert kid_of(keys, "current") == current
    assert stolen not in published(keys)
    assert states(keys).count("next") == 1
    stopped = {key.retired_at for key in keys.listing() if key.kid == stolen}
    assert stopped == ({NOW} if state == "retired" else {NOW + HOUR})


@on_sqlite
@every_seal
def test_a_compromised_key_never_comes_back(keys):
    """INV-23."""
    stolen = kid_of(keys, "current")
    keys.compromise(stolen, actor="ada", reason="leaked", now=NOW)
    for _ in range(3):
        keys.rotate(actor="ada", now=NOW)
        keys.ensure({"ES256"})
    assert kid_of(keys, "compromised") == stolen
    assert stolen not in published(keys)


@on_sqlite
@every_seal
def test_a_key_nobody_made_cannot_be_compromised(keys, database):
    before = era(database)
    with pytest.raises(NotFound, match="there is no key 'unknown'"):
        keys.compromise("unknown", actor="ada", reason="leaked", now=NOW)
    assert era(database) == before


def test_a_compromise_within_another_transaction_stands_or_falls_with_it(keys, database):
    stolen, following = kid_of(keys, "current"), kid_of(keys, "next")
    with pytest.raises(ConnectionError), database.begin() as db:
        assert keys.mark_compromised(db, stolen, "ada", "leaked", NOW)
        raise ConnectionError
    assert kid_of(keys, "current") == stolen
    before = era(database)
    with database.begin() as db:
        assert keys.mark_compromised(db, stolen, "ada", "leaked", NOW)
        assert not keys.mark_compromised(db, stolen, "ada", "leaked", NOW)
    assert era(database) > before
    assert kid_of(keys, "current") == following
    assert sorted(states(keys)) == ["compromised", "current"]
    assert keys.rotate_due(NOW) == 0  # nothing new signs, but there is a next key again
    assert sorted(states(keys)) == ["compromised", "current", "next"]


@on_sqlite
@every_seal
def test_when_every_key_is_compromised_in_one_transaction_nothing_signs_until_new_ones_are_made(keys, database):
    with database.begin() as db:
        for kid in db.execute(sa.select(SigningKey.kid)).scalars().all():
            keys.mark_compromised(db, kid, "ada", "leaked", NOW)
    with pytest.raises(Unavailable):
        ring_of(keys).current("ES256")
    assert keys.rotate_due(NOW) == 1
    assert sorted(states(keys)) == ["compromised", "compromised", "current", "next"]


# --- What must not happen at rest ---


@on_sqlite
@every_seal
def test_another_broker_opens_what_this_one_sealed(keys_of, keys, database, clock):
    token = ring_of(keys_of(database, clock)).current("ES256").sign({}, typ="at+jwt")
    assert jwt.verify(token, ring_of(keys).verification_keys, typ={"at+jwt"}) == {}


@on_sqlite
@pytest.mark.parametrize(
    "verb",
    [
        ring_of,
        lambda keys: keys.ensure({"ES256"}),
        lambda keys: keys.ensure({"EdDSA"}),
        lambda keys: keys.rotate(actor="ada", now=NOW),
        lambda keys: keys.rotate_due(NOW + DAY),
    ],
)
def test_a_wrong_master_key_opens_nothing_and_seals_nothing(keys_of, keys, database, clock, verb):
    before = keys.listing()
    with pytest.raises(ConfigurationError, match="put back the master key file"):
        verb(keys_of(database, clock, wrong=True))
    assert keys.listing() == before


@on_sqlite
@every_seal
def test_keys_whose_master_key_is_lost_can_be_given_up(keys_of, keys, database, clock):
    after = keys_of(database, clock, wrong=True)
    for lost in (kid_of(keys, "next"), kid_of(keys, "current")):
        after.compromise(lost, actor="ada", reason="master key lost", now=NOW)
    assert ring_of(after).current("ES256").kid == kid_of(after, "current")
    assert sorted(states(after)) == ["compromised", "compromised", "current", "next"]


def swap(db):
    rows = db.execute(sa.select(SigningKey.kid, SigningKey.sealed_private_key)).all()
    for (kid, _), (_, blob) in zip(rows, reversed(rows), strict=True):
        db.execute(sa.update(SigningKey).where(SigningKey.kid == kid).values(sealed_private_key=blob))


def flip(db):
    for kid, blob in db.execute(sa.select(SigningKey.kid, SigningKey.sealed_private_key)).all():
        changed = bytes(blob[:-1]) + bytes([blob[-1] ^ 1])
        db.execute(sa.update(SigningKey).where(SigningKey.kid == kid).values(sealed_private_key=changed))


def call_it_another_algorithm(db):
    db.execute(sa.update(SigningKey).where(SigningKey.state == "next").values(algorithm="EdDSA"))


@on_sqlite
@every_seal
@pytest.mark.parametrize("tamper", [swap, flip, call_it_another_algorithm])
def test_a_row_that_was_tampered_with_is_not_used(keys_of, keys, database, clock, tamper):
    with database.begin() as db:
        tamper(db)
    with pytest.raises(ConfigurationError, match="its row was changed"):
        ring_of(keys_of(database, clock))


@on_sqlite
@every_seal
def test_a_key_planted_in_the_table_is_neither_published_nor_believed(keys_of, keys, database, clock):
    mallory = jwt.SigningKey.generate("ES256")
    with database.begin() as db:
        db.execute(sa.update(SigningKey).where(SigningKey.state == "next").values(public_jwk=mallory.public_jwk()))
    assert mallory.kid not in {key["kid"] for key in ring_of(keys_of(database, clock)).jwks()["keys"]}
    with database.begin() as db:
        blob = db.execute(sa.select(SigningKey.sealed_private_key)).scalars().first()
        values = {"algorithm": "ES256", "state": "retired", "created_at": NOW, "sealed_private_key": blob}
        db.execute(sa.insert(SigningKey).values(kid=mallory.kid, public_jwk=mallory.public_jwk(), **values))
    with pytest.raises(ConfigurationError):
        ring_of(keys_of(database, clock))


@on_sqlite
def test_a_sealed_key_that_is_not_the_one_its_row_names_is_not_used(keys_of, keys, database, clock):
    """Even somebody with the master key cannot publish one key under the name of another."""
    other, kid = jwt.SigningKey.generate("ES256"), kid_of(keys, "next")
    bound = {"purpose": "signing key", "kid": kid, "algorithm": "ES256"}
    blob = MasterKey(MASTER).seal(other.private_bytes(), **bound)
    with database.begin() as db:
        db.execute(sa.update(SigningKey).where(SigningKey.kid == kid).values(sealed_private_key=blob))
    with pytest.raises(ConfigurationError, match="holds another key than it says"):
        ring_of(keys_of(database, clock))


def test_no_private_key_is_in_a_row_a_log_a_repr_or_an_error(keys_of, keys, database, clock, caplog):
    """INV-30."""
    caplog.set_level(logging.DEBUG)
    keys.rotate(actor="ada", now=NOW)
    ring = ring_of(keys)
    secret = [ring.current("ES256")._private.private_numbers().private_value.to_bytes(32, "big")]
    secret += [key.private_bytes() for key in keys._opened.values()] + [MASTER]
    spelled = {form for raw in secret for form in (raw, raw.hex().encode(), *map(base64_of, (raw, raw[1:], raw[2:])))}
    seen = [repr(ring), repr(keys), repr(keys._opened), caplog.text]
    with database.begin() as db:
        for table in ("signing_keys", "events"):
            seen += [
                str(bytes(v)) + bytes(v).hex() if isinstance(v, bytes | memoryview) else repr(v)
                for row in db.execute(sa.text(f"SELECT * FROM {table}"))
                for v in row
            ]
        blobs = [bytes(blob) for blob in db.execute(sa.select(SigningKey.sealed_private_key)).scalars()]
    try:
        ring_of(keys_of(database, clock, wrong=True))
    except ConfigurationError:
        seen.append(traceback.format_exc())
    text = "\n".join(seen).encode()
    assert len(spelled) >= 10
    assert not [form for form in spelled if form in text or any(form in blob for blob in blobs)]


def base64_of(raw):
    # Without the ends, which depend on what stands beside it.
    return base64.b64encode(raw[: len(raw) // 3 * 3])


@on_sqlite
@every_seal
def test_keys_are_unsealed_once(keys, database):
    first, again = ring_of(keys), ring_of(keys)
    assert first.current("ES256") is again.current("ES256")


@on_sqlite
@every_seal
def test_a_private_key_that_is_out_of_use_does_not_stay_in_memory(keys, clock):
    first = kid_of(keys, "current")
    keys.rotate(actor="ada", now=NOW)
    ring_of(keys)
    assert first in keys._opened
    clock.now = NOW + GONE
    ring_of(keys)
    assert first not in keys._opened


# --- Sealed by a key in Vault ---

on_the_fake = pytest.mark.parametrize("seal", ["fake vault"], indirect=True)
SECOND = timedelta(seconds=1)


@contextmanager
def silence(seal):
    seal.falls_silent()
    try:
        yield
    finally:
        seal.answers_again()


def signs(ring):
    try:
        return ring.current("ES256").sign({"sub": "agent"}, typ="at+jwt") is not None
    except Unavailable as problem:
        assert "no token is signed" in problem.detail
        return False


@on_sqlite
@every_vault
def test_while_vault_is_silent_no_token_is_signed_and_all_that_is_said_of_tokens_goes_on(keys, seal, clock):
    ring = ring_of(keys)
    token = ring.current("ES256").sign({"sub": "agent"}, typ="at+jwt")
    with silence(seal):
        clock.now += ISSUES_FOR - SECOND
        with pytest.raises(ProviderUnavailable):
            keys.confirm()
        assert signs(ring)  # it may be changing its leader
        clock.now += SECOND
        for seen in (ring, ring_without_asking(keys)):
            assert not signs(seen)
            assert seen.attesting("ES256").sign({}, typ="statuslist+jwt")
            assert jwt.verify(token, seen.verification_keys, typ={"at+jwt"}) == {"sub": "agent"}
            assert len(seen.jwks()["keys"]) == 2
    keys.confirm()
    assert signs(ring)


@on_sqlite
@every_vault
def test_a_broker_that_starts_while_vault_is_silent_verifies_and_signs_nothing(keys, keys_of, seal, database, clock):
    token = ring_of(keys).current("ES256").sign({"sub": "agent"}, typ="at+jwt")
    before = keys.listing()
    with silence(seal):
        fresh = keys_of(database, clock)
        fresh.ensure({"ES256"})
        ring = ring_without_asking(fresh)
        assert jwt.verify(token, ring.verification_keys, typ={"at+jwt"}) == {"sub": "agent"}
        assert ring.jwks() == ring_without_asking(keys).jwks()
        assert not signs(ring)
        with pytest.raises(Unavailable, match="no token is signed"):
            ring.attesting("ES256")
        with pytest.raises(Unavailable, match="no RS256 key is current"):
            ring.current("RS256")
        clock.now += timedelta(seconds=3)  # the log-in that failed is tried again
        with pytest.raises(ProviderUnavailable):
            fresh.ensure({"RS256"})
        assert fresh.listing() == before
    clock.now += timedelta(seconds=3)
    fresh.tend()
    assert fresh.generation != ring.generation
    assert signs(ring_without_asking(fresh))


@on_sqlite
@every_vault
def test_a_key_planted_while_vault_is_silent_is_dropped_when_it_answers(keys, keys_of, seal, database, clock):
    mallory = jwt.SigningKey.generate("ES256")
    with database.begin() as db:
        blob = db.execute(sa.select(SigningKey.sealed_private_key)).scalars().first()
        values = {"algorithm": "ES256", "state": "retired", "created_at": NOW, "sealed_private_key": blob}
        db.execute(sa.insert(SigningKey).values(kid=mallory.kid, public_jwk=mallory.public_jwk(), **values))
    with silence(seal):
        # Whoever has seen a key open believes no row that has not.
        assert mallory.kid not in ring_without_asking(keys).verification_keys
        fresh = keys_of(database, clock)
        fresh.tend()
        assert mallory.kid in ring_without_asking(fresh).verification_keys
    clock.now += timedelta(seconds=3)
    with pytest.raises(ConfigurationError, match="its row was changed"):
        fresh.tend()
    with pytest.raises(ConfigurationError, match="its row was changed"):
        ring_without_asking(fresh)
    fresh.compromise(mallory.kid, actor="ada", reason="planted", now=NOW)
    assert mallory.kid not in ring_of(fresh).verification_keys
    assert signs(ring_of(fresh))


@on_sqlite
@on_the_fake
@pytest.mark.parametrize(
    "half", [{}, {"kty": "EC"}, jwt.SigningKey.generate("ES256").public_jwk()], ids=["nothing", "a part", "another"]
)
def test_not_even_while_vault_is_silent_is_a_key_published_under_the_name_of_another(
    keys, keys_of, seal, database, clock, half
):
    with database.begin() as db:
        db.execute(sa.update(SigningKey).where(SigningKey.state == "next").values(public_jwk=half))
    with silence(seal), pytest.raises(ConfigurationError, match="signing key"):
        ring_without_asking(keys_of(database, clock))


@on_sqlite
@every_vault
def test_distrust_waits_for_no_vault(keys, seal, clock, database):
    """INV-27: the compromise stands, the next key signs, and the missing one follows."""
    stolen, following = kid_of(keys, "current"), kid_of(keys, "next")
    with silence(seal):
        keys.compromise(stolen, actor="ada", reason="leaked", now=NOW)
        ring = ring_without_asking(keys)
        assert stolen not in ring.verification_keys
        assert ring.attesting("ES256").kid == following
        assert sorted(states(keys)) == ["compromised", "current"]
        clock.now += ISSUES_FOR
        with pytest.raises(ProviderUnavailable):
            keys.rotate(actor="ada", now=clock.now)
    keys.confirm()
    assert keys.rotate_due(clock.now) == 0
    assert sorted(states(keys)) == ["compromised", "current", "next"]


@on_sqlite
@on_the_fake
def test_the_sweep_does_not_wait_for_a_vault_that_was_silent(keys, seal, clock):
    """Its rotation is due at every pass, and before the next pass nothing is revoked by it (INV-27)."""
    clock.now += DAY
    seal.falls_silent()
    asked = len(seal.fake.seen)
    assert keys.rotate_due(clock.now) == 0
    assert len(seal.fake.seen) == asked
    seal.answers_again()
    keys.confirm()
    assert keys.rotate_due(clock.now) == 1


@on_sqlite
@on_the_fake
def test_reading_waits_for_no_vault_that_hangs(keys, keys_of, seal, database, clock):
    entered, leave = threading.Event(), threading.Event()

    def hang(call):
        entered.set()
        assert leave.wait(10)
        call.answer(503, {"errors": ["Vault is sealed"]})

    clock.now += DAY
    seal.fake.fault("decrypt", hang)
    asking = threading.Thread(target=keys.tend)
    asking.start()
    try:
        assert entered.wait(10)
        assert len(ring_without_asking(keys).verification_keys) == 1
        keys.compromise(kid_of(keys, "next"), actor="ada", reason="leaked", now=NOW)
    finally:
        leave.set()
        asking.join()


@on_sqlite
@on_the_fake
def test_vault_is_asked_once_in_a_while_however_often_somebody_looks(keys, seal, clock):
    asked = len(seal.fake.seen)
    for _ in range(10):
        keys.tend()
    assert len(seal.fake.seen) == asked
    clock.now += timedelta(seconds=10)
    for _ in range(10):
        keys.tend()
    assert len(seal.fake.seen) == asked + 1


@on_sqlite
@every_vault
def test_the_key_in_vault_is_rotated_and_old_versions_open_what_they_sealed(keys, keys_of, seal, database, clock):
    seal.rotate()
    keys.rotate(actor="ada", now=NOW)
    assert signs(ring_of(keys_of(database, clock)))
    # When none is left that the first version sealed, it may go.
    keys.rotate(actor="ada", now=NOW)
    clock.now += GONE
    seal.require_version(2)
    assert signs(ring_of(keys_of(database, clock)))


@on_sqlite
@every_vault
def test_a_version_that_is_ended_too_early_stops_issuing_and_not_verifying(keys, keys_of, seal, database, clock):
    ring = ring_of(keys)
    token = ring.current("ES256").sign({}, typ="at+jwt")
    seal.rotate()
    seal.require_version(2)
    clock.now += ISSUES_FOR
    with pytest.raises(ConfigurationError, match="old versions included"):
        keys.confirm()
    ring = ring_without_asking(keys)
    assert not signs(ring)
    assert jwt.verify(token, ring.verification_keys, typ={"at+jwt"}) == {}
    with pytest.raises(ConfigurationError, match="old versions included"):
        keys_of(database, clock).ensure({"ES256"})
    seal.require_version(1)
    keys.confirm()
    assert signs(ring)


@on_sqlite
@every_vault
def test_another_key_of_vault_opens_nothing_and_seals_nothing(keys, keys_of, database, clock):
    before = keys.listing()
    verbs = [
        lambda other: other.ensure({"EdDSA"}),
        lambda other: other.rotate(actor="ada", now=NOW),
        lambda other: other.confirm(),
    ]
    for verb in verbs:
        other = keys_of(database, clock, wrong=True)
        with pytest.raises(ConfigurationError, match=KEY.replace("broker", "other")):
            verb(other)
        assert other.rotate_due(NOW + DAY) == 0
        with pytest.raises(ConfigurationError):
            ring_without_asking(other)
    assert keys.listing() == before


@on_sqlite
@on_the_fake
def test_a_key_that_could_not_be_opened_again_never_comes_to_sign(keys, seal):
    """A policy that lets the broker seal and not unseal would end its issuing at the next start."""
    before = keys.listing()
    for _ in range(2):
        seal.fake.answers("decrypt", 403, {"errors": ["permission denied"]}, times=2)
        with pytest.raises(ProviderRefused):
            keys.rotate(actor="ada", now=NOW)
    assert keys.listing() == before


@on_sqlite
@on_the_fake
def test_what_one_way_of_sealing_sealed_the_other_does_not_open(keys, seal, database, clock):
    envelope = seal.sealing(clock)
    with pytest.raises(ConfigurationError, match="let transit/keys/broker be the key"):
        envelope.unseal(MasterKey(MASTER).seal(b"secret", **BOUND), **BOUND)
    with pytest.raises(ConfigurationError, match="put back the master key file"):
        MasterKey(MASTER).unseal(envelope.seal(b"secret", **BOUND), **BOUND)


@every_vault
def test_vault_itself_opens_what_it_wrapped_for_one_key_for_no_other(seal, clock):
    """So that an envelope is nothing to whoever may ask Vault, but has not the row it belongs to."""
    blob = seal.sealing(clock).seal(b"secret", **BOUND)
    wrapped = blob[3 : 3 + int.from_bytes(blob[1:3], "big")].decode()
    key = seal.wrapping(clock)
    bound_to = b'\x01["signing key","kid-1","ES256"]'
    assert len(key.unwrap(wrapped, bound_to=bound_to)) == 32
    for other in (b"", bound_to.replace(b"kid-1", b"kid-2"), bound_to.replace(b"ES256", b"EdDSA")):
        with pytest.raises(Invalid):
            key.unwrap(wrapped, bound_to=other)


@on_the_fake
def test_an_envelope_changed_or_cut_anywhere_does_not_open(seal, clock):
    envelope = seal.sealing(clock)
    blob = envelope.seal(b"secret", **BOUND)
    assert envelope.unseal(blob, **BOUND) == b"secret"
    flipped = [blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :] for at in range(0, len(blob), 5)]
    for wrong in [*flipped, *(blob[:at] for at in range(0, len(blob), 7)), blob + b"\0"]:
        with pytest.raises(ConfigurationError, match="its row was changed"):
            envelope.unseal(wrong, **BOUND)


@on_sqlite
@every_vault
def test_neither_database_nor_log_nor_vault_has_a_private_key(
    keys, keys_of, seal, database, clock, caplog, monkeypatch
):
    """INV-30. Vault and whoever reads along see what opens a key, and never the key."""
    caplog.set_level(logging.DEBUG)
    owns, sent = [], []
    wrap, call = TransitKey.wrap, Connection.call

    def noted(self, plaintext, **more):
        owns.append(plaintext)
        return wrap(self, plaintext, **more)

    def overheard(self, method, path, **more):
        answer = call(self, method, path, **more)
        sent.append(f"{more.get('body')} {answer.body}")
        return answer

    monkeypatch.setattr(TransitKey, "wrap", noted)
    monkeypatch.setattr(Connection, "call", overheard)
    keys.rotate(actor="ada", now=NOW)
    with silence(seal):
        clock.now += ISSUES_FOR
        keys.tend()
    ring = ring_of(keys_of(database, clock))
    seen = [repr(ring), repr(keys), repr(keys._sealing), repr(keys._opened), caplog.text]
    with database.begin() as db:
        for row in db.execute(sa.text("SELECT * FROM signing_keys")):
            seen += [str(bytes(v)) + bytes(v).hex() if isinstance(v, bytes) else repr(v) for v in row]
        seen += [repr(row) for row in db.execute(sa.text("SELECT * FROM events"))]
        blobs = [bytes(blob) for blob in db.execute(sa.select(SigningKey.sealed_private_key)).scalars()]
    private = [key.private_bytes() for key in keys._opened.values()]
    private += [key._private.private_numbers().private_value.to_bytes(32, "big") for key in keys._opened.values()]
    assert (len(private), len(owns)) == (6, 2)
    for raw in [*private, *owns]:
        forms = [raw, raw.hex().encode(), *map(base64_of, (raw, raw[1:], raw[2:]))]
        assert not [form for form in forms if form in "\n".join(seen).encode() or any(form in blob for blob in blobs)]
    for raw in private:
        forms = [raw.hex().encode(), *map(base64_of, (raw, raw[1:], raw[2:]))]
        assert not [form for form in forms if form in "\n".join(sent).encode()]
    # It is not that nothing was looked at.
    assert base64.b64encode(owns[0]).decode() in "\n".join(sent)
