"""Proofs of a key: for this request, this token, now, once."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from broker.conformance.fake_broker import SigningKey
from broker.sdk import DpopKey
from broker.sdk.clock import system_clock
from broker.sdk.verifier import Memory, Refused
from tests.verifier.conftest import URL, why


@pytest.fixture
def key():
    return DpopKey.generate()


@pytest.fixture
def issued(broker, key):
    return broker.issue(bound_to=key)


def shown(verifier, issued, proof, **more):
    return why(verifier, issued, authorization=f"DPoP {issued.token}", dpop=proof, **more)


def test_a_proof_opens_once_and_says_that_the_token_is_bound(verifier, issued, key):
    proof = key.proof("GET", URL, access_token=issued.token)
    assert verifier.check(f"DPoP {issued.token}", "GET", URL, proof).bound
    assert shown(verifier, issued, proof) == "replayed_proof"
    assert shown(verifier, issued, [key.proof("GET", URL, access_token=issued.token)]) is None


def test_of_many_who_show_one_proof_at_a_time_one_gets_in(verifier, issued, key):
    proof = key.proof("GET", URL, access_token=issued.token)
    with ThreadPoolExecutor(16) as pool:
        seen = list(pool.map(lambda _: shown(verifier, issued, proof), range(64)))
    assert sorted(map(str, seen)) == ["None"] + ["replayed_proof"] * 63


def test_a_bound_token_is_no_bearer_token_and_an_unbound_one_takes_no_proof(broker, verifier, issued, key):
    proof = key.proof("GET", URL, access_token=issued.token)
    with pytest.raises(Refused) as refused:
        verifier.check(f"Bearer {issued.token}", "GET", URL, proof)
    assert refused.value.code == "bound_token"
    assert refused.value.www_authenticate.startswith('DPoP error="invalid_token"')
    plain = broker.issue()
    assert shown(verifier, plain, key.proof("GET", URL, access_token=plain.token)) == "unbound_token"


def test_a_resource_may_want_every_token_bound(broker, verifier_of, issued, key):
    verifier = verifier_of(require_dpop=True)
    assert why(verifier, broker.issue()) == "unbound_token"
    assert shown(verifier, issued, key.proof("GET", URL, access_token=issued.token)) is None
    with pytest.raises(Refused) as refused:
        verifier.check(None, "GET", URL)
    assert refused.value.www_authenticate.startswith("DPoP algs=")


@pytest.mark.parametrize("dpop", [None, [], "", "a.b.c", "x" * 9000])
def test_what_is_not_exactly_one_proof_is_refused(verifier, issued, dpop):
    with pytest.raises(Refused) as refused:
        verifier.check(f"DPoP {issued.token}", "GET", URL, dpop)
    assert refused.value.code == "bad_proof"
    assert refused.value.www_authenticate.startswith('DPoP error="invalid_dpop_proof"')


def test_two_proofs_are_one_too_many(verifier, issued, key):
    two = [key.proof("GET", URL, access_token=issued.token) for _ in range(2)]
    assert shown(verifier, issued, two) == "bad_proof"


def test_a_proof_for_something_else_is_refused(broker, verifier, issued, key):
    other, token = DpopKey.generate(), issued.token
    old = DpopKey.generate(now=lambda: system_clock() - timedelta(seconds=62))
    young = DpopKey.generate(now=lambda: system_clock() + timedelta(seconds=30))
    for proof in (
        key.proof("POST", URL, access_token=token),
        key.proof("GET", f"{URL}/1", access_token=token),
        key.proof("GET", "https://mail.example/api/contacts", access_token=token),
        key.proof("GET", URL.replace("https", "http"), access_token=token),
        key.proof("GET", URL.replace("crm.example", "crm.example:8443"), access_token=token),
        key.proof("GET", URL, access_token="another"),
        key.proof("GET", URL),
        other.proof("GET", URL, access_token=token),
    ):
        assert shown(verifier, issued, proof) == "bad_proof"
    for late in (old, young):
        bound = broker.issue(bound_to=late)
        assert shown(verifier, bound, late.proof("GET", URL, access_token=bound.token)) == "bad_proof"


def test_query_fragment_case_of_the_host_and_the_default_port_make_no_difference(verifier, issued, key):
    def proof():
        return key.proof("GET", "https://CRM.example:443/api/contacts", access_token=issued.token)

    assert shown(verifier, issued, proof(), url=f"{URL}?page=2#top") is None


def test_the_name_clients_know_wins_over_what_the_request_says(verifier_of, issued, key):
    verifier = verifier_of(origin="https://crm.example")
    proof = key.proof("GET", URL, access_token=issued.token)
    assert shown(verifier, issued, proof, url="http://10.0.0.7:8000/api/contacts?x=1") is None
    evil = key.proof("GET", "https://evil.example/api/contacts", access_token=issued.token)
    assert shown(verifier, issued, evil, url="https://evil.example/api/contacts") == "bad_proof"


def proof_of(signer, claims, **header):
    return signer.sign(claims, typ=header.pop("typ", "dpop+jwt"), kid=None, **({"jwk": signer.jwk} | header))


@pytest.mark.parametrize(
    ("header", "claims"),
    [
        ({"typ": "jwt"}, {}),
        ({"alg": "none"}, {}),
        ({"alg": "HS256"}, {}),
        ({"alg": "ES384"}, {}),
        ({"jwk": None}, {}),
        ({"jwk": {"kty": "oct", "k": "AAAA"}}, {}),
        ({"crit": ["x"]}, {}),
        ({}, {"jti": None}),
        ({}, {"jti": "x" * 300}),
        ({}, {"iat": "now"}),
        ({}, {"htu": None}),
        ({}, {"htu": "https://[broken"}),
        ({}, {"htm": "get"}),
    ],
)
def test_a_proof_that_is_not_well_formed_is_refused(broker, verifier, header, claims):
    signer = SigningKey()

    class Bound:
        def thumbprint(self):
            return signer.kid

    issued = broker.issue(bound_to=Bound())
    ath = DpopKey.generate().proof("GET", URL, access_token=issued.token)  # only for its `ath`
    import base64
    import json

    ath = json.loads(base64.urlsafe_b64decode(ath.split(".")[1] + "=="))["ath"]
    good = {"jti": "one", "htm": "GET", "htu": URL, "iat": int(time.time()), "ath": ath}
    assert shown(verifier, issued, proof_of(signer, good)) is None
    said = {name: value for name, value in (good | {"jti": "two"} | claims).items() if value is not None}
    assert shown(verifier, issued, proof_of(signer, said, **header)) == "bad_proof"


def test_a_proof_whose_private_key_came_with_it_is_refused(broker, verifier):
    signer = SigningKey()
    issued = broker.issue(cnf={"jkt": signer.kid})
    assert shown(verifier, issued, proof_of(signer, {}, jwk=signer.jwk | {"d": "AAAA"})) == "bad_proof"


def test_the_memory_forgets_what_is_over_and_nothing_before_it(clocks):
    memory = Memory(lambda: clocks.monotonic, 2)
    assert memory.first("a", 10)
    assert memory.first("b", 20)
    assert not memory.first("a", 10)
    with pytest.raises(Refused) as refused:
        memory.first("c", 10)
    assert (refused.value.code, refused.value.status) == ("too_many_proofs", 503)
    clocks.forward(10)
    assert memory.first("c", 10)
    assert not memory.first("b", 20)


def test_processes_can_share_a_memory(broker, verifier_of, issued, key):
    seen = set()

    class Shared:
        def first(self, name, keep_s):
            assert keep_s >= 60
            return name not in seen and not seen.add(name)

    one, two = verifier_of(once=Shared()), verifier_of(once=Shared())
    proof = key.proof("GET", URL, access_token=issued.token)
    assert shown(one, issued, proof) is None
    assert shown(two, issued, proof) == "replayed_proof"


def test_a_refused_request_uses_up_no_proof(broker, verifier, key):
    issued = broker.issue(bound_to=key)
    proof = key.proof("GET", URL, access_token=issued.token)
    assert shown(verifier, issued, proof, scopes=["contacts:write"]) == "insufficient_scope"
    assert shown(verifier, issued, proof) is None
