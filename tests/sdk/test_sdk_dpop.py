import copy
import hashlib
import pickle
from datetime import UTC, datetime

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from broker.providers import jose
from broker.sdk import DpopKey

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def key():
    return DpopKey.generate(now=lambda: NOW)


def read(proof):
    public = jwt.PyJWK(jwt.get_unverified_header(proof)["jwk"]).key
    return jwt.decode(proof, public, algorithms=["ES256"], options={"verify_iat": False})


def test_a_proof_says_method_address_time_and_a_fresh_id():
    mine = key()
    proof = mine.proof("POST", "https://user@crm.example/api?x=1#y")
    header, claims = jwt.get_unverified_header(proof), read(proof)
    assert (header["typ"], header["alg"], header["jwk"]) == ("dpop+jwt", "ES256", mine.public_jwk())
    assert set(header["jwk"]) == {"kty", "crv", "x", "y"}
    assert (claims["htm"], claims["htu"], claims["iat"]) == ("POST", "https://crm.example/api", int(NOW.timestamp()))
    assert set(claims) == {"htm", "htu", "iat", "jti"}
    assert claims["jti"] != read(mine.proof("POST", "https://crm.example/api"))["jti"]


def test_a_proof_for_presenting_a_token_holds_its_hash():
    claims = read(key().proof("GET", "https://crm.example", access_token="a.b.c", nonce="n"))
    assert claims["ath"] == jose.base64url(hashlib.sha256(b"a.b.c").digest())
    assert (claims["nonce"], claims["htu"]) == ("n", "https://crm.example/")


def test_the_thumbprint_is_the_one_the_broker_computes():
    for _ in range(3):
        mine = key()
        assert mine.thumbprint() == jose.thumbprint(jose.public_key(mine.public_jwk()))


def test_a_key_is_not_shown_copied_or_pickled():
    mine = key()
    assert repr(mine) == f"DpopKey({mine.thumbprint()})"
    for act in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            act(mine)


def test_a_key_on_another_curve_is_refused():
    with pytest.raises(ValueError, match="secp384r1"):
        DpopKey(ec.generate_private_key(ec.SECP384R1()))
