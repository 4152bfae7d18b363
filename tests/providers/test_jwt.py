import base64
import copy
import dataclasses
import json
import pickle
import re
import time
from contextlib import contextmanager
from datetime import timedelta
from functools import cache

import jwt as pyjwt
import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from broker.domain.clock import epoch
from broker.domain.errors import Invalid, Unauthenticated
from broker.providers.jose import thumbprint
from broker.providers.jwt import (
    AccessToken,
    SigningKey,
    _signature,
    access_token_claims,
    algorithm_of,
    public_key,
    verify,
)
from tests.conftest import NOW

ALGORITHMS = ("ES256", "RS256", "EdDSA")
CLAIMS = {"iss": "https://broker.example", "sub": "Zoë", "exp": epoch(NOW) + 300}


@cache
def key(algorithm="ES256", _which=0):
    """RSA keys are slow to make, so one a process."""
    return SigningKey.generate(algorithm)


def keys(*some):
    return {k.kid: k.public for k in some or (key(),)}


@contextmanager
def refused(reason):
    with pytest.raises(Unauthenticated) as problem:
        yield
    assert re.search(reason, problem.value.reason), problem.value.reason


def b64(raw):
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def unb64(text):
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def signed(header, payload=CLAIMS, by=None):
    """A token whose header and payload are exactly these, with a signature that is right."""
    parts = (part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, payload))
    signing_input = ".".join(map(b64, parts))
    return f"{signing_input}.{b64(_signature((by or key())._private, signing_input.encode()))}"


def header_of(k=None, **changed):
    return {"alg": "ES256", "kid": (k or key()).kid, "typ": "at+jwt"} | changed


# --- Keys ---


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_public_jwk_has_these_members_and_nothing_private(algorithm):
    members = {"ES256": {"crv", "x", "y"}, "RS256": {"n", "e"}, "EdDSA": {"crv", "x"}}[algorithm]
    jwk = key(algorithm).public_jwk()
    assert jwk.keys() == members | {"kty", "alg", "use", "kid"}
    assert (jwk["alg"], jwk["use"], jwk["kid"]) == (algorithm, "sig", key(algorithm).kid)
    assert json.loads(json.dumps(jwk)) == jwk


def test_the_key_id_is_the_thumbprint_of_rfc_7638():
    n = (
        "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3"
        "oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdA"
        "ZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-"
        "kEgU8awapJzKnqDKgw"
    )
    public = rsa.RSAPublicNumbers(65537, int.from_bytes(unb64(n), "big")).public_key()
    assert thumbprint(public) == "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"


def test_the_thumbprint_of_an_ed25519_key_is_that_of_rfc_8037():
    jwk = {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}
    kid = "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"
    assert thumbprint(public_key(jwk | {"alg": "EdDSA", "use": "sig", "kid": kid})) == kid


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_key_comes_back_from_its_bytes_and_its_public_half_from_its_jwk(algorithm):
    original = key(algorithm)
    again = SigningKey.from_private_bytes(original.private_bytes())
    assert (again.kid, again.algorithm) == (original.kid, original.algorithm)
    token = again.sign(CLAIMS, typ="at+jwt")
    assert verify(token, {original.kid: public_key(original.public_jwk())}, typ={"at+jwt"}) == CLAIMS


@pytest.mark.parametrize(
    "changed",
    [
        {"kty": "oct"},
        {"crv": "P-384"},
        {"x": 1},
        {"x": "=="},
        {"x": b64(bytes(32))},  # not on the curve
        {"y": None},
        {"alg": "ES384"},
        {"alg": "none"},
        {"use": "enc"},
        {"kid": "another"},
        {"kid": ["x"]},
    ],
    ids=str,
)
def test_a_jwk_that_is_not_one_of_ours_is_refused(changed):
    with pytest.raises(Invalid, match="not a public key of ours"):
        public_key(key().public_jwk() | changed)


def test_keys_too_weak_or_of_another_kind_are_refused():
    for other in (ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 1024)):
        with pytest.raises(ValueError, match="is not a key of ours"):
            algorithm_of(other.public_key())
    for algorithm in ("HS256", "none", "es256", ""):
        with pytest.raises(ValueError, match="is not an algorithm we sign with"):
            SigningKey.generate(algorithm)


def test_bytes_that_are_no_private_key_are_refused_without_being_quoted():
    other = dsa.generate_private_key(1024).private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    for raw in (b"hunter2-hunter2", key().private_bytes()[:-9], other):
        with pytest.raises(ValueError) as problem:
            SigningKey.from_private_bytes(raw)
        assert problem.value.__cause__ is None
        assert "hunter2" not in str(problem.value)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_signing_key_shows_nothing_and_goes_nowhere(algorithm):
    """INV-30."""
    k = key(algorithm)
    k.sign(CLAIMS, typ="at+jwt")
    for shown in (repr(k), str(k), f"{k}", repr([k]), repr({"key": k})):
        assert re.fullmatch(r".*SigningKey\(kid='[\w-]{43}', algorithm='\w+'\).*", shown)
    for leak in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not pickled or copied"):
            leak(k)
    with pytest.raises(dataclasses.FrozenInstanceError):
        k.kid = "another"


# --- Tokens ---


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_signed_is_verified_here_and_by_pyjwt(algorithm):
    k = key(algorithm)
    token = k.sign(CLAIMS, typ="at+jwt")
    assert verify(token, keys(k), typ={"at+jwt"}, now=NOW) == CLAIMS
    jwks = pyjwt.PyJWKSet.from_dict({"keys": [other.public_jwk() for other in map(key, ALGORITHMS)]})
    options = {"verify_exp": False}
    assert pyjwt.get_unverified_header(token) == {"alg": algorithm, "kid": k.kid, "typ": "at+jwt"}
    assert pyjwt.decode(token, jwks[k.kid], algorithms=[algorithm], options=options) == CLAIMS


def test_bytes_are_signed_as_they_are():
    payload = b'{ "sub" : "spaced" }'
    token = key().sign(payload, typ="JWT")
    assert unb64(token.split(".")[1]) == payload
    assert verify(token, keys(), typ={"JWT"}) == {"sub": "spaced"}


def test_a_number_json_does_not_know_is_not_signed():
    with pytest.raises(ValueError, match="JSON"):
        key().sign({"exp": float("nan")}, typ="JWT")


def test_es256_signatures_are_64_bytes_whatever_the_numbers():
    """A number with leading zeros, one in 128 signatures, must keep its width."""
    for count in range(400):
        token = key().sign({"n": count}, typ="JWT")
        assert len(unb64(token.split(".")[2])) == 64
        assert verify(token, keys(), typ={"JWT"}) == {"n": count}


def test_expiry_is_exclusive_and_has_no_leeway():
    token = key().sign(CLAIMS, typ="at+jwt")
    assert verify(token, keys(), typ={"at+jwt"}, now=NOW + timedelta(seconds=299))
    with refused("has expired"):
        verify(token, keys(), typ={"at+jwt"}, now=NOW + timedelta(seconds=300))


@pytest.mark.parametrize("exp", [None, "1772370000", 1.5e9, True, [1]])
def test_a_token_without_an_expiry_in_whole_seconds_is_refused_where_one_is_asked_for(exp):
    token = key().sign({"exp": exp} if exp is not None else {}, typ="at+jwt")
    with refused("no exp"):
        verify(token, keys(), typ={"at+jwt"}, now=NOW)


def test_a_token_of_another_type_is_refused():
    """A status list or a receipt of ours must not pass for an access token."""
    for typ in ("statuslist+jwt", "receipt+jwt", "JWT", "AT+JWT", "application/at+jwt", ""):
        with refused("is not for this"):
            verify(key().sign(CLAIMS, typ=typ), keys(), typ={"at+jwt"})


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (lambda: header_of(alg="none"), "is none we verify"),
        (lambda: header_of(alg="HS256"), "is none we verify"),
        (lambda: header_of(alg="RS256"), "is not among ES256"),
        (lambda: header_of(alg="es256"), "is none we verify"),
        (lambda: header_of(alg=["ES256"]), "is none we verify"),
        (lambda: header_of(kid="unknown"), "no key of ours"),
        (lambda: header_of(kid=None), "kid is not a string"),
        (lambda: header_of(typ=None), "typ is not a string"),
        (lambda: header_of(crit=["exp"]), "has the header crit"),
        (lambda: header_of(jwk=key().public_jwk()), "has the header jwk"),
        (lambda: header_of(jku="https://evil.test"), "has the header jku"),
        (lambda: header_of(x5c=[]), "has the header x5c"),
        (lambda: header_of(b64=False), "has the header b64"),
        (lambda: {"alg": "ES256", "typ": "at+jwt"}, "is not alg, kid and typ"),
        (lambda: {"alg": "ES256", "kid": key().kid}, "is not alg, kid and typ"),
        (lambda: header_of(cty="JWT"), "is not alg, kid and typ"),
        (list, "not a JSON object"),
        (lambda: b"{", "the header"),
        (lambda: b'{"alg":"ES256","alg":"ES256"}', "twice"),
        (lambda: b"\xff", "not UTF-8"),
    ],
)
def test_a_header_that_is_not_exactly_ours_is_refused_though_the_signature_is_right(header, reason):
    with refused(reason):
        verify(signed(header()), keys(), typ={"at+jwt"})


@pytest.mark.parametrize(
    "payload", [b"{", b"[]", b'"x"', b'{"a":1,"a":2}', b'{"exp":NaN}', b'{"a":"\\ud800"}', b"[" * 100 + b"]" * 100]
)
def test_a_payload_that_can_be_read_two_ways_is_refused_though_the_signature_is_right(payload):
    with refused("the payload"):
        verify(signed(header_of(), payload), keys(), typ={"at+jwt"})


def test_the_signature_of_another_key_is_refused():
    token = signed(header_of(key("ES256", 1)), by=key())
    with refused("signature is wrong"):
        verify(token, keys(key(), key("ES256", 1)), typ={"at+jwt"})


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("part", [0, 1, 2])
def test_one_changed_bit_anywhere_is_refused(algorithm, part):
    k = key(algorithm)
    segments = k.sign(CLAIMS, typ="at+jwt").split(".")
    raw = unb64(segments[part])
    for at in {0, len(raw) // 2, len(raw) - 1}:
        changed = bytearray(raw)
        changed[at] ^= 1
        token = ".".join([*segments[:part], b64(bytes(changed)), *segments[part + 1 :]])
        with refused("."):
            verify(token, keys(k), typ={"at+jwt"})


@pytest.mark.parametrize("size", [0, 1, 63, 65, 128])
def test_an_es256_signature_of_another_length_is_refused(size):
    token = key().sign(CLAIMS, typ="at+jwt").rsplit(".", 1)[0] + "." + b64(bytes(size))
    with refused("signature is wrong|canonical"):
        verify(token, keys(), typ={"at+jwt"})


def test_an_es256_signature_whose_numbers_have_more_zeros_in_front_is_refused():
    """The same two numbers in another width would be a second spelling of the token."""
    head, _, signature = key().sign(CLAIMS, typ="at+jwt").rpartition(".")
    raw = unb64(signature)
    with refused("signature is wrong"):
        verify(f"{head}.{b64(raw[:32] + bytes(1) + raw[32:])}", keys(), typ={"at+jwt"})


def test_a_signature_of_zeros_is_refused():
    """The one that some verifiers took for any payload (CVE-2022-21449)."""
    token = key().sign(CLAIMS, typ="at+jwt").rsplit(".", 1)[0] + "." + b64(bytes(64))
    with refused("signature is wrong"):
        verify(token, keys(), typ={"at+jwt"})


def respelled(token):
    head, payload, signature = token.split(".")
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    # 64 bytes leave four spare bits in the last letter; they must be zero.
    spare = alphabet[alphabet.index(signature[-1]) + 1]
    return {
        "padding": token + "==",
        "space": token + " ",
        "newline": token + "\n",
        "newline inside": f"{head}\n.{payload}.{signature}",
        "spare bits": f"{head}.{payload}.{signature[:-1]}{spare}",
        "two segments": f"{head}.{payload}",
        "four segments": f"{token}.",
        "no signature": f"{head}.{payload}.",
        "not ascii": f"{token}é",
        "nothing": "",
        "dots": "..",
        "null": f"{token}\0",
    }


@pytest.mark.parametrize("how", respelled("a.b.c"))
def test_there_is_one_spelling_of_a_token(how):
    token = key().sign(CLAIMS, typ="at+jwt")
    assert verify(token, keys(), typ={"at+jwt"})
    with refused("canonical|segments|ASCII"):
        verify(respelled(token)[how], keys(), typ={"at+jwt"})


@pytest.mark.parametrize("spelled", [b"%s=", b"%s\n", b"!%s", b" %s"])
def test_a_segment_in_another_alphabet_is_refused_though_the_signature_is_right(spelled):
    head, payload, _ = (part.encode() for part in key().sign({"a": 1}, typ="at+jwt").split("."))
    signing_input = head + b"." + spelled % payload
    with refused("payload is not canonical"):
        verify(f"{signing_input.decode()}.{b64(_signature(key()._private, signing_input))}", keys(), typ={"at+jwt"})


def test_a_token_of_more_than_8_kib_is_refused_before_it_is_read():
    token = key().sign({"x": "y" * 8192}, typ="at+jwt")
    with refused("more than 8192 bytes"):
        verify(token, keys(), typ={"at+jwt"})


# --- The access token ---

TOKEN = AccessToken(
    issuer="https://broker.example",
    subject="alice",
    audience="https://crm.example/api",
    client_id="summarizer",
    issued_at=NOW,
    expires_at=NOW + timedelta(seconds=300),
    jti="jti-1",
    scopes=("contacts:write", "contacts:read"),
    task_id="task_1",
    grant_id="grt_1",
    jkt="thumb",
    status_uri="https://broker.example/status-lists/1",
    status_index=48213,
    trace_id="4bf92f3577b34da6a3ce929d0e0e4736",
    actors=("summarizer", "planner", "root"),
)


def test_an_access_token_has_exactly_the_claims_of_the_contract():
    assert access_token_claims(TOKEN) == {
        "iss": "https://broker.example",
        "sub": "alice",
        "aud": "https://crm.example/api",
        "client_id": "summarizer",
        "iat": epoch(NOW),
        "nbf": epoch(NOW),
        "exp": epoch(NOW) + 300,
        "jti": "jti-1",
        "scope": "contacts:read contacts:write",
        "authorization_details": [{"type": "urn:broker:task", "task_id": "task_1"}],
        "act": {"sub": "summarizer", "act": {"sub": "planner", "act": {"sub": "root"}}},
        "cnf": {"jkt": "thumb"},
        "status": {"status_list": {"idx": 48213, "uri": "https://broker.example/status-lists/1"}},
        "txn": "4bf92f3577b34da6a3ce929d0e0e4736",
        "grant_id": "grt_1",
        "task_id": "task_1",
    }


def test_actor_binding_and_trace_are_there_only_where_there_is_something_to_say():
    plain = dataclasses.replace(TOKEN, actors=(), jkt=None, trace_id=None)
    assert access_token_claims(TOKEN).keys() - access_token_claims(plain).keys() == {"act", "cnf", "txn"}


@pytest.mark.parametrize("lifetime", [timedelta(0), timedelta(seconds=-1), timedelta(milliseconds=900)])
def test_a_token_that_ends_before_it_begins_is_not_made(lifetime):
    with pytest.raises(ValueError, match="INV-09"):
        access_token_claims(dataclasses.replace(TOKEN, expires_at=NOW + lifetime))


def test_how_long_signing_takes():
    claims = access_token_claims(TOKEN)
    for algorithm in ALGORITHMS:
        k, count = key(algorithm), 200
        token = k.sign(claims, typ="at+jwt")
        began = time.perf_counter()
        for _ in range(count):
            k.sign(claims, typ="at+jwt")
        between = time.perf_counter()
        for _ in range(count):
            verify(token, keys(k), typ={"at+jwt"}, now=NOW)
        ended = time.perf_counter()
        signing, verifying = (between - began) / count * 1e6, (ended - between) / count * 1e6
        print(f"{algorithm}: sign {signing:.0f} µs, verify {verifying:.0f} µs")  # noqa: T201
