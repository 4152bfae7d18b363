"""Every way in which a token may be wrong, and the shapes of those that are right."""

import base64
import hashlib
import hmac
import json
import string
from datetime import timedelta

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from broker.domain.clock import epoch
from broker.domain.errors import Invalid, Unauthenticated
from broker.providers import jose
from tests.workloads import BROKER, IDP, NOW, claims, header, issuer_key, rsa_key, unauthenticated, workload_token

KEY = issuer_key()
HOUR = timedelta(hours=1)
AT = epoch(NOW)


def verify(token, *, key=KEY.public, algorithms=("ES256",), **changed):
    return jose.verify(
        token,
        **{
            "key": key,
            "algorithms": algorithms,
            "issuer": IDP,
            "audience": BROKER,
            "now": NOW,
            "max_lifetime": HOUR,
        }
        | changed,
    )


def refused(token, reason, **changed):
    with unauthenticated(reason):
        verify(token, **changed)


def test_a_good_token_gives_its_claims():
    assert verify(workload_token(KEY)) == claims()


@pytest.mark.parametrize("algorithm", ["ES256", "ES384", "ES512", "EdDSA", "RS256", "PS256"])
def test_each_asymmetric_algorithm_is_verified_where_it_is_listed(algorithm):
    key = issuer_key(algorithm=algorithm)
    token = workload_token(key)
    assert verify(token, key=key.public, algorithms=(algorithm,))
    refused(token, "is not among", key=key.public, algorithms=("RS384",))


def test_what_pyjwt_signs_is_accepted_and_what_we_sign_it_accepts():
    theirs = jwt.encode(claims(), KEY.private, algorithm="ES256", headers={"kid": "key-1"})
    assert verify(theirs) == claims()
    ours = jose.sign(claims(), key=KEY.private, algorithm="ES256", kid="key-1")
    options = {"verify_exp": False, "verify_iat": False}
    assert jwt.decode(ours, KEY.public, algorithms=["ES256"], audience=BROKER, options=options) == claims()


def test_a_key_of_pyjwt_is_a_key():
    assert verify(workload_token(KEY), key=jwt.PyJWK(KEY.jwk)) == claims()


@pytest.mark.parametrize(
    "algorithm", ["none", "None", "NONE", "", "HS256", "hs256", "es256", "ES256K", None, 1, ["ES256"]]
)
def test_an_algorithm_that_is_none_of_ours_is_refused(algorithm):
    refused(workload_token(KEY, headers={"alg": algorithm}), "algorithm", algorithms=("ES256", "HS256", "none"))


def test_a_token_without_alg_is_refused():
    refused(workload_token(KEY, headers={"without": ["alg"]}), "algorithm")


def test_a_token_signed_with_the_public_key_as_a_password_is_refused():
    """Algorithm confusion."""
    for password in (
        KEY.public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        KEY.public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        json.dumps(KEY.jwk).encode(),
    ):
        signing_input = ".".join(
            jose.base64url(json.dumps(part).encode()) for part in (header(KEY, alg="HS256"), claims())
        )
        digest = hmac.digest(password, signing_input.encode(), "sha256")
        refused(f"{signing_input}.{jose.base64url(digest)}", "HS256", algorithms=("HS256", "ES256"))


def test_the_key_says_what_it_verifies_and_not_the_token():
    token = workload_token(KEY, headers={"alg": "RS256"})
    refused(token, "cannot verify RS256", algorithms=("ES256", "RS256"))
    refused(workload_token(KEY), "cannot verify", key=issuer_key(algorithm="ES384").public)


def test_a_private_or_weak_key_verifies_nothing():
    refused(workload_token(KEY), "cannot verify", key=KEY.private)
    refused(
        workload_token(issuer_key(algorithm="RS256")), "cannot", key=rsa_key(1024).public_key(), algorithms=("RS256",)
    )


@pytest.mark.parametrize("name", ["jwk", "jku", "x5u", "x5c", "crit", "b64"])
@pytest.mark.parametrize(
    "value", [None, "https://evil.test/jwks", [], ["exp"], ["b64"], False, {"kty": "oct", "k": "AA"}]
)
def test_a_header_that_brings_or_names_a_key_or_an_extension_is_refused(name, value):
    """INV-18."""
    refused(workload_token(KEY, headers={name: value}), f"header {name}")


@pytest.mark.parametrize("kid", [1, None, ["key-1"], {"kid": "key-1"}, True])
def test_a_kid_that_is_not_a_string_is_refused(kid):
    refused(workload_token(KEY, headers={"kid": kid}), "kid")


@pytest.mark.parametrize(
    "typ", ["JWT", "jwt", "JOSE", "application/jwt", "APPLICATION/JWT", "client-authentication+jwt"]
)
def test_a_workload_token_may_say_that_it_is_one(typ):
    assert verify(workload_token(KEY, headers={"typ": typ}))


def test_a_workload_token_need_not_say_its_type():
    assert verify(workload_token(KEY, headers={"without": ["typ"]}))


@pytest.mark.parametrize(
    "typ",
    [
        "at+jwt",
        "application/at+jwt",
        "AT+JWT",
        "dpop+jwt",
        "statuslist+jwt",
        "logout+jwt",
        "secevent+jwt",
        "id_token",
        "oauth-id-jag+jwt",
        "txntoken+jwt",
        "wit+jwt",
        "",
        " JWT",
        "application/application/jwt",
        None,
        1,
        ["JWT"],
    ],
)
def test_a_token_of_another_type_is_refused(typ):
    refused(workload_token(KEY, headers={"typ": typ}), "typ")


def test_only_the_headers_that_were_named_are_allowed_where_they_were():
    allowed = frozenset({"alg", "kid", "typ"})
    assert verify(workload_token(KEY), headers=allowed)
    refused(workload_token(KEY, headers={"x5t": "abc"}), "headers besides", headers=allowed)


TIMES = [
    ("no exp", {"without": ["exp"]}, "no exp"),
    ("exp as string", {"exp": str(AT + 60)}, "exp is"),
    ("exp as string with underscores", {"exp": "9_999_999_999"}, "exp is"),
    ("exp as float", {"exp": AT + 60.0}, "exp is"),
    ("exp as bool", {"exp": True}, "exp is"),
    ("exp null", {"exp": None}, "exp is"),
    ("exp as list", {"exp": [AT + 60]}, "exp is"),
    ("exp negative", {"exp": -1}, "exp is"),
    ("exp after the year 9999", {"exp": 253402300800, "without": ["iat"]}, "exp is"),
    ("exp past the leeway", {"iat": AT - 100, "exp": AT - 30}, "expired 30 s ago"),
    ("iat as float", {"iat": float(AT)}, "iat is"),
    ("iat null", {"iat": None}, "iat is"),
    ("iat as bool", {"iat": False}, "iat is"),
    ("iat in the future", {"iat": AT + 31}, "iat is 31 s in the future"),
    ("iat after exp", {"iat": AT + 10, "exp": AT + 5}, "iat is not before"),
    ("iat equal to exp", {"iat": AT, "exp": AT}, "iat is not before"),
    ("nbf as string", {"nbf": str(AT)}, "nbf is"),
    ("nbf in the future", {"nbf": AT + 31}, "nbf is 31 s in the future"),
    ("nbf after exp", {"nbf": AT + 10, "exp": AT + 5}, "nbf is not before"),
    ("life too long", {"exp": AT + 3601}, "lives 3601 s"),
    ("life too long, old token", {"iat": AT - 4000, "exp": AT + 10}, "lives 4010 s"),
    ("no iat, too long from now", {"without": ["iat"], "exp": AT + 3631}, "lives 3631 s"),
]


@pytest.mark.parametrize(("changed", "reason"), [case[1:] for case in TIMES], ids=[case[0] for case in TIMES])
def test_a_token_whose_times_are_wrong_is_refused(changed, reason):
    """INV-09, INV-19."""
    refused(workload_token(KEY, **changed), reason)


@pytest.mark.parametrize(
    "changed",
    [
        {"exp": AT - 29, "iat": AT - 100},
        {"iat": AT + 30},
        {"nbf": AT + 30},
        {"exp": AT + 3600},
        {"without": ["iat"], "exp": AT + 3630},
    ],
)
def test_honest_clocks_may_differ_by_the_leeway(changed):
    assert verify(workload_token(KEY, **changed))


def test_our_own_tokens_have_no_leeway():
    assert verify(workload_token(KEY, exp=AT + 1), leeway=timedelta(0))
    refused(workload_token(KEY, iat=AT - 1, exp=AT), "expired 0 s ago", leeway=timedelta(0))
    refused(workload_token(KEY, iat=AT + 1), "in the future", leeway=timedelta(0))


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"1e400", b"1e9", b"9" * 400, b"-0.0"])
def test_an_exp_that_only_some_readers_call_a_number_is_refused(number):
    payload = json.dumps(claims()).encode().replace(str(AT + 300).encode(), number)
    refused(KEY.sign(header(KEY), payload), "exp|NaN|Infinity|number|integer")


def test_a_token_for_one_audience_may_say_so_in_a_list():
    assert verify(workload_token(KEY, aud=[BROKER]))


@pytest.mark.parametrize(
    "audience",
    [
        None,
        "",
        [],
        "https://broker.example/",
        "https://BROKER.example",
        "https://broker.example.evil.test",
        1,
        {BROKER: 1},
        [BROKER, "https://other.example"],
        [BROKER, BROKER],
        [[BROKER]],
        f"{BROKER} https://other.example",
    ],
)
def test_a_token_that_is_not_for_this_broker_alone_is_refused(audience):
    """INV-19."""
    refused(workload_token(KEY, aud=audience), "aud is")


def test_a_token_without_audience_is_refused():
    refused(workload_token(KEY, without=["aud"]), "aud is")


@pytest.mark.parametrize(
    "issuer", [None, "", "https://idp.example/", "https://idp", [IDP], "https://idp.example.evil.test"]
)
def test_a_token_of_another_issuer_is_refused(issuer):
    refused(workload_token(KEY, iss=issuer), "iss is")
    refused(workload_token(KEY, without=["iss"]), "iss is")


@pytest.mark.parametrize("subject", [None, "", 1, ["a"], "a" * 1001, "a\nb", "a\x7f", "a\x85", "\t"])
def test_a_token_without_a_plain_subject_is_refused(subject):
    """INV-31."""
    refused(workload_token(KEY, sub=subject), "sub is not")
    refused(workload_token(KEY, without=["sub"]), "sub is not")


@pytest.mark.parametrize("jti", [None, 1, "", ["a"], True])
def test_a_jti_that_is_not_a_string_is_refused(jti):
    refused(workload_token(KEY, jti=jti), "jti is not")


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b'{"sub":"admin",' + json.dumps(claims()).encode()[1:], "twice"),
        (json.dumps(claims(sub="a\0b")).encode(), "NUL"),
        (json.dumps(claims(sub="\ud800")).encode(), "surrogate"),
        (json.dumps(claims(extra={"deep": ["\udfff"]})).encode(), "surrogate"),
        (json.dumps(claims()).encode("utf-16"), "UTF-8"),
        (b"\xef\xbb\xbf" + json.dumps(claims()).encode(), "byte order mark"),
        (json.dumps([claims()]).encode(), "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"[" * 2000 + b"]" * 2000, "deeper"),
        (b'{"a":1', "not JSON"),
    ],
)
def test_a_payload_that_can_be_read_in_two_ways_is_refused(payload, reason):
    refused(KEY.sign(header(KEY), payload), reason)


def test_a_header_that_can_be_read_in_two_ways_is_refused():
    refused(KEY.sign(b'{"alg":"none","alg":"ES256","kid":"key-1"}', claims()), "twice")
    refused(KEY.sign(b'["ES256"]', claims()), "not a JSON object")


def test_a_token_of_more_than_eight_kib_is_refused_before_it_is_read():
    refused("." * 8193, "8192 bytes")
    refused(workload_token(KEY, padding="x" * 6200), "8192 bytes")
    assert verify(workload_token(KEY, padding="x" * 5700))


def test_only_three_segments_of_canonical_base64url_are_a_token():
    token = workload_token(KEY)
    head, body, signature = token.split(".")
    last = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"
    loose = signature[:-1] + last[last.index(signature[-1]) + 1]  # 64 bytes leave four bits over, which must be zero
    assert base64.urlsafe_b64decode(loose + "==") == base64.urlsafe_b64decode(signature + "==")
    for hostile in (
        "",
        "..",
        f"{head}.{body}",
        f"{head}.{body}.",
        f"{head}..{signature}",
        f"{token}.",
        f"{token}.{signature}",
        f"{token}.a.b",
        f"{token}==",
        f"{token}\n",
        f" {token}",
        f"{head}.{body[:4]}\n{body[4:]}.{signature}",
        f"{head}.{body}.{signature[:-1]}",
        f"{head}.{body}.{loose}",
        f"{head}.{body}.{signature[:40]}+{signature[41:]}",
        f"{head}.{body}.{signature}é",
        token.replace(".", "\N{ONE DOT LEADER}"),
    ):
        refused(hostile, "segments|base64url|ASCII|signature|the header")


def test_a_changed_token_is_refused():
    """INV-22."""
    head, body, signature = workload_token(KEY).split(".")
    other_head, other_body, other_signature = workload_token(KEY, sub="admin", headers={"typ": "JOSE"}).split(".")
    for hostile in (
        f"{head}.{other_body}.{signature}",
        f"{other_head}.{body}.{signature}",
        f"{head}.{body}.{other_signature}",
        f"{head}.{body}.{jose.base64url(bytes(64))}",
        f"{head}.{body}.{jose.base64url(bytes(8))}",
    ):
        refused(hostile, "signature is wrong")
    refused(workload_token(KEY), "signature is wrong", key=issuer_key().public)


@given(st.text(max_size=80) | st.text(alphabet="eyJ0.-_=A{}\n", max_size=80))
def test_whatever_comes_as_a_token_is_refused_and_nothing_else(text):
    with pytest.raises(Unauthenticated):
        verify(text)


JSON_VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers(), max_size=2)


@given(
    st.dictionaries(st.sampled_from(["iss", "sub", "aud", "exp", "iat", "nbf", "jti"]), JSON_VALUES, min_size=1),
    st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit", "zip"]), JSON_VALUES),
)
def test_no_claim_or_header_of_any_type_breaks_the_reader(changed, headers):
    token = KEY.sign(header(KEY, **headers), claims() | changed)
    try:
        verify(token)
    except Unauthenticated as problem:
        assert problem.reason.isprintable()


def test_what_is_shown_of_a_token_does_not_include_its_signature():
    """INV-30."""
    token = workload_token(KEY)
    assert token.split(".")[2] not in repr(jose.unverified(token))
    assert "signature" not in repr(jose.unverified(token))


# RFC 7638 section 3.1, and RFC 8037 appendix A.3.
RFC_7638 = {
    "kty": "RSA",
    "n": "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n"
    "3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5haj"
    "rn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw",
    "e": "AQAB",
    "alg": "RS256",
    "kid": "2011-04-29",
}
RFC_8037 = {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}


@pytest.mark.parametrize(
    ("jwk", "expected"),
    [
        (RFC_7638, "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"),
        (RFC_8037, "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"),
    ],
)
def test_thumbprints_are_those_of_the_standards(jwk, expected):
    assert jose.thumbprint(jose.public_key(jwk)) == expected


def test_the_signature_of_rfc_8037_is_verified():
    token = (
        "eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc.hgyY0il_MGCj"
        "P0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg"
    )
    head, body, signature = token.split(".")
    parsed = jose.Unverified(
        algorithm="EdDSA",
        key_id=None,
        typ=None,
        header={},
        claims={},
        payload=b"",
        signing_input=f"{head}.{body}".encode(),
        signature=base64.urlsafe_b64decode(signature + "=="),
    )
    jose.check_signature(parsed, key=jose.public_key(RFC_8037), algorithms=("EdDSA",))


def test_two_spellings_of_one_key_have_one_thumbprint():
    padded = base64.urlsafe_b64encode(b"\0\0" + base64.urlsafe_b64decode(RFC_7638["n"] + "==")).rstrip(b"=").decode()
    assert jose.thumbprint(jose.public_key(RFC_7638 | {"n": padded})) == jose.thumbprint(jose.public_key(RFC_7638))


def big_exponent():
    numbers = rsa.RSAPublicNumbers(2**31 + 1, rsa_key().public_key().public_numbers().n)
    return jwt.algorithms.RSAAlgorithm.to_jwk(numbers.public_key(), as_dict=True)


@pytest.mark.parametrize(
    ("jwk", "reason"),
    [
        (KEY.jwk | {"d": "AA"}, "private"),
        ({"kty": "oct", "k": "c2VjcmV0"}, "private"),
        ({"kty": "oct"}, "key type"),
        ({}, "key type"),
        ({"kty": ["EC"]}, "key type"),
        (KEY.jwk | {"crv": "P-384"}, "parameters"),
        (KEY.jwk | {"crv": None}, "parameters"),
        (KEY.jwk | {"x": KEY.jwk["y"]}, "parameters"),
        (KEY.jwk | {"x": 12}, "base64url|parameters"),
        (KEY.jwk | {"x": KEY.jwk["x"] + "="}, "base64url"),
        (KEY.jwk | {"x": KEY.jwk["x"] + "é"}, "base64url"),
        ({"kty": "EC", "crv": "P-256"}, "parameters"),
        ({"kty": "RSA", "e": "AQAB"}, "parameters"),
        (RFC_7638 | {"e": "AA"}, "parameters"),
        (RFC_7638 | {"n": RFC_7638["n"][:100]}, "weak"),
        (big_exponent(), "exponent"),
        (RFC_8037 | {"x": "AAAA"}, "parameters"),
        (RFC_8037 | {"crv": "X25519"}, "parameters"),
        (jwt.algorithms.OKPAlgorithm.to_jwk(ed448.Ed448PrivateKey.generate().public_key(), as_dict=True), "curve"),
        (
            jwt.algorithms.ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256K1()).public_key(), as_dict=True),
            "curve",
        ),
    ],
)
def test_a_key_that_is_not_public_strong_and_for_signatures_is_refused(jwk, reason):
    with pytest.raises(Invalid, match=reason):
        jose.public_key(jwk)


@given(
    st.dictionaries(st.sampled_from(["kty", "crv", "x", "y", "n", "e"]), JSON_VALUES | st.sampled_from(["EC", "RSA"]))
)
def test_no_key_breaks_the_reader(jwk):
    with pytest.raises(Invalid):
        jose.public_key(jwk)


def test_a_dpop_proof_brings_its_key_and_nothing_else_may():
    token = KEY.sign(header(KEY, jwk=KEY.jwk, typ="dpop+jwt"), claims())
    assert jose.unverified(token, brings_key=True).header["jwk"] == KEY.jwk
    with unauthenticated("header jwk"):
        jose.unverified(token)
    for jwk in (None, "key", []):
        with unauthenticated("no jwk"):
            jose.unverified(KEY.sign(header(KEY, jwk=jwk), claims()), brings_key=True)


def test_the_hash_of_the_specification_is_what_base64url_gives():
    # RFC 9449 section 7.1: ath of the example's access token.
    access_token = "Kz~8mXK1EalYznwH-LC-1fBAo.4Ljp~zsPE_NeO.gxU"
    assert (
        jose.base64url(hashlib.sha256(access_token.encode()).digest()) == "fUHyO2r2Z3DZ53EsNrWBb0xWXoaNy59IiKCAqksmQEo"
    )
