"""What the SDK reads of tokens and keys: one meaning, one algorithm a key, or nothing."""

import base64
import json

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA512

from broker.providers import jose as ours
from broker.sdk.verifier import jose
from broker.sdk.verifier.jose import NotReadable, key_of, keys_of, members, parse


def segment(value):
    return jose.base64url(value if isinstance(value, bytes) else json.dumps(value).encode())


def token(header, payload=b"{}", signature=b"x"):
    return ".".join(map(segment, (header, payload, signature)))


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":1,"a":2}',
        b'{"a":{"b":1,"b":1}}',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":"\\u0000"}',
        b'{"a":"\\ud800"}',
        b'{"a":"\xff"}',
        b'\xef\xbb\xbf{"a":1}',
        b'{"a":123456789012345678901234}',
        b"[1]",
        b'"a"',
        b"{",
        b"",
        b'{"a":' + b"[" * 40 + b"]" * 40 + b"}",
        b'{"a":' + b"[" * 4000 + b"]" * 4000 + b"}",
        b'{"a":"' + b"x" * 8192 + b'"}',
    ],
)
def test_json_that_two_readers_could_understand_differently_is_refused(raw):
    with pytest.raises(NotReadable):
        members(raw)


def test_brackets_within_strings_are_no_depth():
    assert members(b'{"a":"' + b"[{" * 50 + b'"}') == {"a": "[{" * 50}


@pytest.mark.parametrize("name", ["jku", "x5u", "x5c", "crit", "b64", "jwk"])
def test_a_header_that_would_choose_how_the_token_is_checked_is_refused(name):
    with pytest.raises(NotReadable, match="choose"):
        parse(token({"alg": "ES256", "typ": "at+jwt", name: ["x"]}))


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "a.b",
        "a.b.c.d",
        "é.b.c",
        token({"alg": "ES256"})[:-1] + "=",
        token({"alg": "ES256"}) + "\n",
        token({"alg": 5}),
        token({"alg": "ES256", "kid": 1}),
        token({"alg": "ES256", "typ": None}),
        token(b"{"),
        "x" * 8193,
    ],
)
def test_what_is_no_compact_jws_in_its_one_spelling_is_refused(broken):
    with pytest.raises(NotReadable):
        parse(broken)


def test_a_second_spelling_of_the_same_bytes_is_refused():
    assert base64.urlsafe_b64decode("eA==") == base64.urlsafe_b64decode("eB==") == b"x"
    whole = token({"alg": "ES256"})
    assert whole.endswith(".eA")
    parse(whole)
    with pytest.raises(NotReadable):
        parse(whole[:-1] + "B")


def raw_ecdsa(key, algorithm, size, signed):
    r, s = decode_dss_signature(key.sign(signed, ec.ECDSA(algorithm)))
    return r.to_bytes(size, "big") + s.to_bytes(size, "big")


P256, P521 = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP521R1())
RSA, ED = rsa.generate_private_key(65537, 2048), ed25519.Ed25519PrivateKey.generate()
SIGNERS = {
    "ES256": (P256, lambda signed: raw_ecdsa(P256, SHA256(), 32, signed)),
    "ES512": (P521, lambda signed: raw_ecdsa(P521, SHA512(), 66, signed)),
    "RS256": (RSA, lambda signed: RSA.sign(signed, padding.PKCS1v15(), SHA256())),
    "EdDSA": (ED, ED.sign),
}


def jwk_of(private):
    return ours.public_jwk(private.public_key())


@pytest.mark.parametrize("algorithm", SIGNERS)
def test_a_key_verifies_its_own_algorithm_and_has_the_thumbprint_of_rfc_7638(algorithm):
    private, sign = SIGNERS[algorithm]
    key = key_of(jwk_of(private))
    assert key.algorithm == algorithm
    assert key.thumbprint == ours.thumbprint(private.public_key())
    assert key.verifies(sign(b"said"), b"said")
    assert not key.verifies(sign(b"said"), b"changed")
    assert not key.verifies(b"", b"said")
    assert not key.verifies(sign(b"said") + b"\0", b"said")


def test_ecdsa_signatures_in_der_are_refused():
    assert not key_of(jwk_of(P256)).verifies(P256.sign(b"said", ec.ECDSA(SHA256())), b"said")


def test_the_token_cannot_say_another_algorithm_than_its_key_has():
    key = key_of(jwk_of(RSA))
    parsed = parse(token({"alg": "PS256", "typ": "at+jwt"}, signature=RSA.sign(b"x", padding.PKCS1v15(), SHA256())))
    with pytest.raises(NotReadable, match="algorithm"):
        parsed.require(key)


WEAK = rsa.generate_private_key(65537, 1024)


@pytest.mark.parametrize(
    "jwk",
    [
        jwk_of(P256) | {"d": "AAAA"},
        {"kty": "oct", "k": "c2VjcmV0"},
        {"kty": "oct"},
        jwk_of(P256) | {"use": "enc"},
        jwk_of(P256) | {"key_ops": ["sign"]},
        jwk_of(P256) | {"key_ops": 5},
        jwk_of(P256) | {"alg": "ES384"},
        jwk_of(P256) | {"alg": "HS256"},
        jwk_of(P256) | {"x": "AAAA"},
        jwk_of(P256) | {"crv": "secp256k1"},
        jwk_of(RSA) | {"alg": "HS256"},
        jwk_of(RSA) | {"alg": "none"},
        jwk_of(RSA) | {"e": segment((2**31 + 1).to_bytes(4, "big"))},
        {"kty": "RSA", "n": segment(WEAK.public_key().public_numbers().n.to_bytes(128, "big")), "e": "AQAB"},
        {"kty": "OKP", "crv": "Ed448", "x": "AAAA"},
        {"kty": "OKP", "crv": "Ed25519", "x": "AAAA"},
        {},
    ],
)
def test_a_key_that_is_private_weak_or_not_for_this_is_not_taken(jwk):
    with pytest.raises(NotReadable):
        key_of(jwk)


def key_set(*keys):
    return json.dumps({"keys": list(keys)}).encode()


def test_of_a_key_set_the_usable_keys_are_taken_and_known_ones_stay_the_same():
    first = keys_of(key_set(jwk_of(P256) | {"kid": "a"}), max_bytes=65536, most=8)
    again = keys_of(
        key_set(jwk_of(P256) | {"kid": "a"}, jwk_of(RSA) | {"kid": "b"}, {"kid": "c", "kty": "oct"}, 5, {"kty": "EC"}),
        max_bytes=65536,
        most=8,
        known=first.values(),
    )
    assert set(again) == {"a", "b"}
    assert again["a"] is first["a"]


def test_a_key_set_with_two_keys_of_one_name_or_with_too_many_is_refused_as_a_whole():
    with pytest.raises(NotReadable, match="one kid"):
        keys_of(key_set(jwk_of(P256) | {"kid": "a"}, jwk_of(RSA) | {"kid": "a"}), max_bytes=65536, most=8)
    with pytest.raises(NotReadable):
        keys_of(key_set(*[{}] * 9), max_bytes=65536, most=8)
    with pytest.raises(NotReadable):
        keys_of(key_set(jwk_of(P256) | {"kid": "a"}), max_bytes=64, most=8)
