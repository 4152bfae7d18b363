"""One-time things are used once, by whoever comes first; DPoP proofs prove what RFC 9449 says."""

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from broker.domain.clock import epoch
from broker.domain.errors import InvalidProof
from broker.providers import jose
from broker.services import proofs as proofs_module
from broker.services.proofs import Proofs, consume, joined
from broker.store.models import ConsumedProof
from tests.workloads import BROKER, NOW, IssuerKey, dpop_proof, issuer_key, rsa_key

KEY = issuer_key()
SECOND = timedelta(seconds=1)
TOKEN_URL = f"{BROKER}/oauth2/token"


@pytest.fixture
def proofs(database):
    return Proofs(database)


def forgettable(database, now):
    """How many used proofs a sweep at `now` may drop."""
    with database.read() as db:
        due = sa.select(sa.func.count()).select_from(ConsumedProof).where(ConsumedProof.forget_at <= now)
        return db.execute(due).scalar_one()


def verify(proofs, proof, *, method="POST", url=TOKEN_URL, now=NOW, **more):
    return proofs.verify_dpop(proof, method=method, url=url, now=now, **more)


def all_at_once(count, do):
    barrier = threading.Barrier(count)

    def run(number):
        barrier.wait()
        return do(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


# --- one-time use ----------------------------------------------------------------------------------------------


def test_of_fifty_uses_at_once_exactly_one_wins(database, proofs):
    """INV-20."""
    later = NOW + timedelta(minutes=5)
    assert all_at_once(50, lambda _: proofs.consume("assertion", "one", forget_at=later, now=NOW)).count(True) == 1


def test_another_kind_or_key_is_another_proof(proofs):
    later = NOW + timedelta(minutes=5)
    used = [("assertion", "one"), ("dpop", "one"), ("assertion", "two"), ("assertion", "one")]
    assert [proofs.consume(kind, key, forget_at=later, now=NOW) for kind, key in used] == [True, True, True, False]


def test_a_use_that_is_rolled_back_did_not_happen(database, proofs):
    later = NOW + timedelta(minutes=5)
    with pytest.raises(ConnectionError), database.begin() as db:
        assert consume(db, "assertion", "one", forget_at=later, now=NOW)
        raise ConnectionError
    assert proofs.consume("assertion", "one", forget_at=later, now=NOW)


def test_a_proof_that_would_be_forgotten_at_once_is_a_mistake_of_ours(proofs):
    with pytest.raises(ValueError, match="twice"):
        proofs.consume("assertion", "one", forget_at=NOW, now=NOW)


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=3), st.lists(st.text('a,"\\[]'), max_size=3)
)
def test_different_strings_never_join_to_the_same_key(some, others):
    assert (joined(*some) == joined(*others)) is (some == others)


# --- DPoP ------------------------------------------------------------------------------------------------------


class Remembering(Proofs):
    """For what is refused before, or has nothing to do with, the database."""

    def __init__(self):
        self.used = {}

    def consume(self, kind, key, *, forget_at, now):
        return self.used.setdefault((kind, key), forget_at) is forget_at


@pytest.fixture
def remembering():
    return Remembering()


def refused(proof, reason, **changed):
    proofs = Remembering()
    with pytest.raises(InvalidProof, match=reason):
        verify(proofs, proof, **changed)
    assert not proofs.used  # a refused proof costs no row


def test_of_fifty_uses_of_one_dpop_proof_at_once_exactly_one_wins(proofs):
    """INV-20."""
    proof = dpop_proof(KEY)

    def use(_):
        try:
            return verify(proofs, proof)
        except InvalidProof as problem:
            return problem.detail

    answers = all_at_once(50, use)
    assert answers.count(jose.thumbprint(KEY.public)) == 1
    assert len([answer for answer in answers if "used before" in answer]) == 49


def test_a_dpop_proof_is_remembered_longer_than_it_could_be_accepted(database, proofs):
    ahead = dpop_proof(KEY, now=NOW + 60 * SECOND)
    assert verify(proofs, ahead)
    assert forgettable(database, NOW + 120 * SECOND) == 0
    with pytest.raises(InvalidProof, match="used before"):
        verify(proofs, ahead, now=NOW + 120 * SECOND)
    refused(ahead, "iat", now=NOW + 121 * SECOND)
    assert forgettable(database, NOW + 180 * SECOND) == 1


@pytest.mark.parametrize("algorithm", ["ES256", "ES384", "ES512", "EdDSA", "RS256", "PS256"])
def test_a_dpop_proof_gives_the_thumbprint_of_its_key(remembering, algorithm):
    key = issuer_key(algorithm=algorithm)
    assert verify(remembering, dpop_proof(key)) == jose.thumbprint(key.public)


def test_the_thumbprint_of_the_proof_in_the_standard(remembering):
    """RFC 9449 section 4.1; the thumbprint is in section 6.1."""
    proof = (
        "eyJ0eXAiOiJkcG9wK2p3dCIsImFsZyI6IkVTMjU2IiwiandrIjp7Imt0eSI6IkVDIiwieCI6Imw4dEZyaHgtMzR0VjNoUklDUkRZOXpDa0RscEJoRjQyVVFV"
        "ZldWQVdCRnMiLCJ5IjoiOVZFNGpmX09rX282NHpiVFRsY3VOSmFqSG10NnY5VERWclUwQ2R2R1JEQSIsImNydiI6IlAtMjU2In19.eyJqdGkiOiItQndDM"
        "0VTYzZhY2MybFRjIiwiaHRtIjoiUE9TVCIsImh0dSI6Imh0dHBzOi8vc2VydmVyLmV4YW1wbGUuY29tL3Rva2VuIiwiaWF0IjoxNTYyMjYyNjE2fQ.2-GxA6"
        "T8lP4vfrg8v-FdWP0A0zdrj8igiMLvqRMUvwnQg4PtFLbdLXiOSsX0x7NVY-FNyJK70nfbV37xRZT3Lg"
    )
    now = proofs_module.from_epoch(1562262616)
    jkt = verify(remembering, proof, url="https://server.example.com/token", now=now)
    assert jkt == "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"


AT = epoch(NOW)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"headers": {"typ": "JWT"}}, "typ"),
        ({"headers": {"typ": None}}, "typ"),
        ({"headers": {"alg": "none"}}, "algorithm"),
        ({"headers": {"alg": "HS256"}}, "algorithm"),
        ({"headers": {"alg": "RS384"}}, "RS384"),
        ({"headers": {"jwk": None}}, "jwk"),
        ({"headers": {"jwk": KEY.jwk | {"d": "AA"}}}, "private"),
        ({"headers": {"jwk": {"kty": "oct", "k": "AA"}}}, "private"),
        ({"headers": {"jwk": issuer_key().jwk}}, "signature"),
        ({"headers": {"jku": "https://evil.test"}}, "jku"),
        ({"headers": {"crit": ["exp"]}}, "crit"),
        ({"method": "GET"}, "htm"),
        ({"method": "post"}, "htm"),
        ({"htm": ["POST"]}, "htm"),
        ({"htm": None}, "htm"),
        ({"htu": None}, "htu"),
        ({"url": f"{BROKER}/oauth2/introspect"}, "htu"),
        ({"url": f"{BROKER}.evil.test/oauth2/token"}, "htu"),
        ({"url": "http://broker.example/oauth2/token"}, "htu"),
        ({"url": "https://broker.example:8443/oauth2/token"}, "htu"),
        ({"url": "https://broker.example/oauth2/token/"}, "htu"),
        ({"url": "https://broker.example/OAuth2/token"}, "htu"),
        ({"url": "https://broker.example/oauth2%2Ftoken"}, "htu"),
        ({"url": "https://user@broker.example/oauth2/token"}, "htu"),
        ({"url": "https://broker.example/oauth2/\ttoken"}, "htu"),
        ({"url": " https://broker.example/oauth2/token"}, "htu"),
        ({"url": "https://broker.example:port/oauth2/token"}, "htu"),
        ({"url": "https://[broker/oauth2/token"}, "htu"),
        ({"url": "/oauth2/token"}, "htu"),
        ({"url": ""}, "htu"),
        ({"iat": AT - 61}, "iat"),
        ({"iat": AT + 61}, "iat"),
        ({"iat": float(AT)}, "iat"),
        ({"iat": str(AT)}, "iat"),
        ({"iat": True}, "iat"),
        ({"iat": None}, "iat"),
        ({"jti": None}, "jti"),
        ({"jti": ""}, "jti"),
        ({"jti": 1}, "jti"),
        ({"jti": "x" * 257}, "jti"),
        ({"padding": "x" * 8192}, "8192"),
    ],
)
def test_a_dpop_proof_that_proves_something_else_is_refused(changed, reason):
    refused(dpop_proof(KEY, **changed), reason)


def test_a_weak_key_proves_nothing():
    refused(dpop_proof(IssuerKey(algorithm="RS256", kid=None, private=rsa_key(1024))), "weak")


@pytest.mark.parametrize("changed", [{"iat": AT - 60}, {"iat": AT + 60}, {"jti": "x" * 256}])
def test_a_dpop_proof_at_the_edge_is_accepted(remembering, changed):
    assert verify(remembering, dpop_proof(KEY, **changed))


@pytest.mark.parametrize(
    "url",
    [
        "HTTPS://BROKER.example/oauth2/token",
        "https://broker.example:443/oauth2/token",
        "https://broker.example:/oauth2/token",
        f"{TOKEN_URL}?a=b",
        f"{TOKEN_URL}#c",
        "https://broker.example/oauth2/%74oken",
        "https://broker.example/oauth2/./x/../token",
        "https://broker.example/../oauth2/token",
    ],
)
def test_one_address_may_be_spelled_in_several_ways(remembering, url):
    assert verify(remembering, dpop_proof(KEY, url=url))
    assert verify(remembering, dpop_proof(KEY, jti="other"), url=url)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("http://[::1]:80", "http://[::1]/", True),
        ("https://a.example", "https://a.example/", True),
        ("https://a.example/b/..", "https://a.example/", True),
        ("https://a.example/b/.", "https://a.example/b/", True),
        ("https://a.example/%7eb%2f", "https://a.example/~b%2F", True),
        ("https://a.example/b//c", "https://a.example/b/c", False),
        ("https://a.example:80/", "https://a.example/", False),
        ("https://a.example/b%2e%2e", "https://a.example/", False),
        ("https://a.example/b/%2e%2e", "https://a.example/", True),
    ],
)
def test_addresses_are_compared_after_normalisation(one, other, same):
    assert (proofs_module._normalised(one) == proofs_module._normalised(other)) is same


def test_a_proof_for_an_access_token_is_bound_to_that_token(remembering):
    ath = jose.base64url(hashlib.sha256(b"the token").digest())
    assert verify(remembering, dpop_proof(KEY, ath=ath), access_token="the token")
    refused(dpop_proof(KEY, ath=ath), "ath", access_token="another")
    refused(dpop_proof(KEY), "ath", access_token="the token")
    refused(dpop_proof(KEY, ath=1), "ath", access_token="the token")


def test_another_key_may_use_the_same_jti(proofs):
    assert verify(proofs, dpop_proof(KEY)) != verify(proofs, dpop_proof(issuer_key()))


@given(st.text(max_size=60) | st.text("https:/.%2e@[]:0#?", max_size=40))
def test_no_address_breaks_the_comparison(url):
    try:
        proofs_module._normalised(url)
    except InvalidProof as problem:
        assert problem.detail
