"""What is no proof of this request, and for how long one is remembered."""

import json

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from broker.gateway.proofs import NotProven, Proofs
from broker.sdk import DpopKey
from tests.sdk.conftest import FakeTime

URL = "https://crm.example/api/contacts"
TOKEN = "first.secret.token"


@pytest.fixture
def time():
    return FakeTime()


@pytest.fixture
def key(time):
    return DpopKey.generate(now=lambda: time.at)


@pytest.fixture
def proofs(time):
    made = Proofs(lambda: time.at)
    time.move(300)
    return made


def check(proofs, key, proof, **changed):
    asked = {"token": TOKEN, "thumbprint": key.thumbprint(), "method": "GET", "url": URL} | changed
    proofs.check(proof, **asked)


def test_a_proof_is_good_once_and_is_remembered_for_as_long_as_it_could_be_shown(proofs, key, time):
    """INV-20"""
    time.move(60)
    proof = key.proof("GET", URL, access_token=TOKEN)
    time.move(-60)  # made by a clock that is a minute ahead of ours
    check(proofs, key, proof)
    for _ in range(4):
        with pytest.raises(NotProven, match="used before"):
            check(proofs, key, proof)
        time.move(30)
    time.move(1)
    with pytest.raises(NotProven, match="too old"):
        check(proofs, key, proof)


@pytest.mark.parametrize("off_s", [-61, 61])
def test_one_that_is_too_old_or_from_the_future_is_refused(proofs, key, time, off_s):
    time.move(off_s)
    proof = key.proof("GET", URL, access_token=TOKEN)
    time.move(-off_s)
    with pytest.raises(NotProven, match="too old, or from the future"):
        check(proofs, key, proof)


def test_one_from_before_we_began_is_refused(key, time):
    """Whether it was used then, nobody here knows."""
    proof = key.proof("GET", URL, access_token=TOKEN)
    time.move(1)
    with pytest.raises(NotProven, match="before this process began"):
        check(Proofs(lambda: time.at), key, proof)
    time.move(-1)
    check(Proofs(lambda: time.at), key, proof)


def test_when_no_more_can_be_remembered_none_is_taken(key, time):
    """INV-34: losing memory tightens."""
    proofs = Proofs(lambda: time.at, most=2)
    for _ in range(2):
        check(proofs, key, key.proof("GET", URL, access_token=TOKEN))
    with pytest.raises(NotProven, match="too many"):
        check(proofs, key, key.proof("GET", URL, access_token=TOKEN))
    time.move(122)
    check(proofs, key, key.proof("GET", URL, access_token=TOKEN))


@pytest.mark.parametrize(
    "changed",
    [
        {"method": "POST"},
        {"token": "another.token"},
        {"thumbprint": "x" * 43},
        {"url": "https://crm.example/api/contacts/"},
        {"url": "https://crm.example/api/Contacts"},
        {"url": "https://crm.example/api%2Fcontacts"},
        {"url": "http://crm.example/api/contacts"},
        {"url": "https://crm.example:8443/api/contacts"},
    ],
)
def test_one_for_anything_else_is_refused(proofs, key, changed):
    with pytest.raises(NotProven):
        check(proofs, key, key.proof("GET", URL, access_token=TOKEN), **changed)


def test_a_query_is_not_part_of_it(proofs, key):
    check(proofs, key, key.proof("GET", f"{URL}?a=1", access_token=TOKEN), url=f"{URL}?b=2")


PRIVATE = ec.generate_private_key(ec.SECP256R1())


def signed(time, key=PRIVATE, *, alg="ES256", headers=(), **claims):
    jwk = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(PRIVATE.public_key()))
    good = {
        "jti": "one",
        "htm": "GET",
        "htu": URL,
        "iat": int(time.at.timestamp()),
        "ath": "0oGgBOF4ieuvuVSX0scozhB45hhahAdq9R_ctv7v3_U",
    }
    header = {"typ": "dpop+jwt", "jwk": jwk} | dict(headers)
    return jwt.encode(good | claims, key, algorithm=alg, headers=header)


@pytest.mark.parametrize(
    "made",
    [
        {"headers": {"typ": "JWT"}},
        {"headers": {"jwk": None}},
        {"headers": {"jwk": {"kty": "RSA", "n": "AQAB", "e": "AQAB"}}},
        {"headers": {"jwk": {"kty": "EC", "crv": "P-256", "x": 1, "y": 2}}},
        {"headers": {"jwk": json.loads(jwt.algorithms.ECAlgorithm.to_jwk(PRIVATE))}},
        {"headers": {"crit": ["x"], "x": 1}},
        {"key": "x" * 64, "alg": "HS256"},
        {"key": ec.generate_private_key(ec.SECP256R1())},
        {"jti": 7},
        {"jti": ""},
        {"jti": "x" * 257},
        {"iat": 1.5},
        {"iat": "now"},
        {"htu": "https://[::1"},
        {"htu": "https://user@crm.example/api/contacts"},
        {"ath": None},
    ],
)
def test_what_is_no_proof_is_refused_and_does_not_raise_anything_else(proofs, time, made):
    thumbprint = DpopKey(PRIVATE).thumbprint()
    with pytest.raises(NotProven):
        proofs.check(signed(time, **made), token=TOKEN, thumbprint=thumbprint, method="GET", url=URL)


def test_what_those_are_made_from_is_one(proofs, time):
    proofs.check(signed(time), token=TOKEN, thumbprint=DpopKey(PRIVATE).thumbprint(), method="GET", url=URL)


@pytest.mark.parametrize("text", ["", "a.b", "a.b.c.d", "a.b.c\n", "é.b.c", "a" * 9000, "..", "eyJ.eyJ.x"])
def test_what_is_no_jwt_is_refused(proofs, key, text):
    with pytest.raises(NotProven):
        check(proofs, key, text)
