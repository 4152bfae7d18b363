"""Sender-bound tokens (RFC 9449) from the first request to the last, on both surfaces."""

import shutil
from dataclasses import replace

import jwt
import pytest

from broker.domain.clock import from_epoch
from broker.domain.errors import InvalidProof
from broker.providers import jose
from broker.providers.dev_issuer import DevIssuer
from broker.services.proofs import Proofs
from broker.wiring import build
from tests.house import CRM, ISSUER, House, TestClock, catalogue_for, settings_for
from tests.web.conftest import Web
from tests.workloads import dpop_proof, issuer_key

KEY, OTHER = issuer_key(), issuer_key()
TOKEN, GRANTS = f"{ISSUER}/oauth2/token", f"{ISSUER}/v1/grants"
JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"


@pytest.fixture
def web(sqlite_house):
    return Web(sqlite_house)


class Prover:
    """Makes proofs at the house's time, a new one for each request."""

    def __init__(self, web):
        self.web, self.made = web, 0

    def __call__(self, url, key=KEY, **changed):
        self.made += 1
        claims = {"jti": f"proof-{self.made}"} | changed
        return {"DPoP": dpop_proof(key, url=url, now=self.web.house.clock(), **claims)}


@pytest.fixture
def prove(web):
    return Prover(web)


def form(web, task, **more):
    ask = {"grant_type": JWT_BEARER, "assertion": web.house.token("summarizer"), "resource": CRM}
    return {**ask, "scope": "contacts:read", "task_id": task["id"], **more}


def by_oauth(web, prove, task):
    answer = web.form("/oauth2/token", headers=prove(TOKEN), **form(web, task)).json
    return answer["grant_id"], answer["access_token"], answer["token_type"]


def by_api(web, prove, task):
    answer = web.client.post(
        "/v1/grants",
        json={"task_id": task["id"], "resource": CRM, "scopes": ["contacts:read"]},
        headers=web.as_("summarizer", **prove(GRANTS)),
    )
    credential = answer.json["credential"]
    return answer.json["grant"]["id"], credential["token"], credential["token_type"]


WAYS = pytest.mark.parametrize("ask", [by_oauth, by_api])


@WAYS
def test_a_token_that_was_asked_for_with_a_proof_is_bound_to_its_key(web, prove, ask):
    """RFC 9449 sections 5, 6.1 and 6.2."""
    _, token, token_type = ask(web, prove, web.open_task())
    assert token_type == "DPoP"
    claims = jwt.decode(token, options={"verify_signature": False})
    assert claims["cnf"] == {"jkt": jose.thumbprint(KEY.public)}
    shown = web.introspect(token)
    assert (shown["active"], shown["token_type"], shown["cnf"]) == (True, "DPoP", claims["cnf"])


@WAYS
def test_it_is_renewed_by_its_key_alone_and_stays_bound(web, prove, ask):
    """INV-21: by whoever holds the workload token and not the key, it cannot be made a bearer's."""
    grant_id, token, _ = ask(web, prove, web.open_task())
    renew = f"/v1/grants/{grant_id}/renew"
    exchange = {
        "grant_type": EXCHANGE,
        "subject_token": token,
        "subject_token_type": ACCESS_TOKEN,
        **web.assertion("summarizer"),
    }
    for wrong in ({}, prove(ISSUER + renew, OTHER)):
        answer = web.client.post(renew, json={}, headers=web.as_("summarizer", **wrong))
        assert answer.status_code == 403, answer.json
        assert "key" in answer.json["detail"]
    for wrong in ({}, prove(TOKEN, OTHER)):
        answer = web.client.post("/oauth2/token", data=exchange, headers=wrong)
        assert (answer.status_code, answer.json["error"]) == (400, "access_denied"), answer.json
    renewed = web.client.post(renew, json={}, headers=web.as_("summarizer", **prove(ISSUER + renew)))
    exchanged = web.client.post("/oauth2/token", data=exchange, headers=prove(TOKEN))
    for again, kind in (
        (renewed.json["credential"]["token"], renewed.json["credential"]["token_type"]),
        (exchanged.json["access_token"], exchanged.json["token_type"]),
    ):
        assert kind == "DPoP"
        assert web.introspect(again)["cnf"] == {"jkt": jose.thumbprint(KEY.public)}


@WAYS
def test_it_is_a_bearer_token_nowhere(web, prove, ask):
    _, token, _ = ask(web, prove, web.open_task())
    for scheme in ("Bearer", "DPoP"):
        headers = {"Authorization": f"{scheme} {token}", **prove(GRANTS)}
        assert web.client.get("/v1/grants", headers=headers).status_code == 401
    answer = web.form("/oauth2/token", grant_type=JWT_BEARER, assertion=token, resource=CRM, scope="contacts:read")
    assert answer.json["error"] == "invalid_grant"


def test_a_policy_knows_whether_the_sender_is_bound(web, prove):
    task = web.open_task()
    write = {"task_id": task["id"], "resource": CRM, "scopes": ["contacts:write"]}
    assert web.post("/v1/grants", "summarizer", json=write).json["code"] == "policy_denied"
    bound = web.client.post("/v1/grants", json=write, headers=web.as_("summarizer", **prove(GRANTS)))
    assert (bound.status_code, bound.json["grant"]["ttl_decided_by"]) == (201, "policy")


def test_a_resource_may_insist(migrated_file, tmp_path):
    shutil.copyfile(migrated_file, tmp_path / "broker.db")
    issuer, clock = DevIssuer.create_or_load(tmp_path), TestClock()
    catalogue = catalogue_for(issuer)
    insisting = tuple(replace(resource, require_dpop=resource.identifier == CRM) for resource in catalogue.resources)
    catalogue = replace(catalogue, resources=insisting)
    broker = build(settings_for(f"sqlite:///{tmp_path / 'broker.db'}", tmp_path, catalogue), clock=clock)
    broker.apply(by="tests")
    web = Web(House(broker=broker, clock=clock, issuer=issuer))
    task = web.open_task()
    refused = web.grant(task)
    assert (refused.status_code, refused.json["member"]) == (400, "DPoP")
    assert web.form("/oauth2/token", **form(web, task)).json["error"] in ("invalid_request", "invalid_dpop_proof")
    assert by_api(web, Prover(web), task)[2] == "DPoP"
    broker.close()


SPELLED_OTHERWISE = [
    "HTTP://127.0.0.1:8080/oauth2/token", f"{TOKEN}?a=b", f"{TOKEN}#c", "http://127.0.0.1:8080/oauth2/%74oken",
    "http://127.0.0.1:8080/x/../oauth2/./token",
]  # fmt: skip
ANOTHER = [
    "http://127.0.0.1/oauth2/token", "https://127.0.0.1:8080/oauth2/token", "http://localhost:8080/oauth2/token",
    "http://127.0.0.1:8080/oauth2/token/", "http://127.0.0.1:8080/oauth2%2ftoken", "http://127.0.0.1:8080//oauth2/token",
    "http://127.0.0.1:8080@evil.test/oauth2/token", "http://evil.test/oauth2/token", GRANTS, "/oauth2/token", "",
]  # fmt: skip


def test_the_address_is_compared_as_addresses_are_and_is_the_issuers_own(web, prove):
    """RFC 9449 section 4.3 after RFC 3986 section 6.2; the Host of the request is somebody's text."""
    task = web.open_task()
    for url in SPELLED_OTHERWISE:
        assert web.form("/oauth2/token", headers=prove(url), **form(web, task)).status_code == 200, url
    for url in ANOTHER:
        answer = web.form("/oauth2/token", headers=prove(url), **form(web, task))
        assert (answer.status_code, answer.json["error"]) == (400, "invalid_dpop_proof"), url
    forged = {**prove("http://evil.test/oauth2/token"), "Host": "evil.test"}
    assert web.form("/oauth2/token", headers=forged, **form(web, task)).json["error"] == "invalid_dpop_proof"


@pytest.mark.parametrize(
    "changed",
    [
        {"htm": "GET"}, {"htm": "post"}, {"iat": 1}, {"jti": None}, {"headers": {"typ": "JWT"}},
        {"headers": {"alg": "none"}}, {"headers": {"alg": "HS256"}}, {"headers": {"jwk": OTHER.jwk}},
        {"headers": {"jwk": KEY.jwk | {"d": "AA"}}}, {"headers": {"crit": ["x"]}}, {"padding": "x" * 8192},
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_proof_that_proves_nothing_is_no_proof_at_either_door(web, prove, changed):
    """And what came with it is not done as if it had not been there."""
    task = web.open_task()
    answer = web.form("/oauth2/token", headers=prove(TOKEN, **changed), **form(web, task))
    assert (answer.status_code, answer.json["error"]) == (400, "invalid_dpop_proof")
    body = {"task_id": task["id"], "resource": CRM, "scopes": ["contacts:read"]}
    answer = web.client.post("/v1/grants", json=body, headers=web.as_("summarizer", **prove(GRANTS, **changed)))
    assert (answer.status_code, answer.json["code"]) == (400, "invalid_dpop_proof")
    assert answer.json["detail"]
    assert web.get("/v1/grants", "ada").json["items"] == []


@pytest.mark.parametrize("text", ["", "x", "a.b.c", "a.b.c, d.e.f", "é", "{{7*7}}"])
def test_a_header_that_is_no_proof_is_not_passed_over(web, text):
    answer = web.form("/oauth2/token", headers={"DPoP": text}, **form(web, web.open_task()))
    assert (answer.status_code, answer.json["error"]) == (400, "invalid_dpop_proof")


def test_the_metadata_says_which_algorithms_a_proof_may_have(web, prove):
    said = web.get("/.well-known/oauth-authorization-server").json["dpop_signing_alg_values_supported"]
    task = web.open_task()
    for algorithm in said:
        headers = prove(TOKEN, issuer_key(algorithm=algorithm))
        assert web.form("/oauth2/token", headers=headers, **form(web, task)).status_code == 200, algorithm


def test_the_proof_for_a_protected_resource_in_the_standard(database):
    """RFC 9449 section 7.1: the proof, and the access token whose hash is in it."""
    proof = (
        "eyJ0eXAiOiJkcG9wK2p3dCIsImFsZyI6IkVTMjU2IiwiandrIjp7Imt0eSI6IkVDIiwieCI6Imw4dEZyaHgtMzR0VjNoUklDUkRZOXpDa0RscEJoRjQyVVFV"
        "ZldWQVdCRnMiLCJ5IjoiOVZFNGpmX09rX282NHpiVFRsY3VOSmFqSG10NnY5VERWclUwQ2R2R1JEQSIsImNydiI6IlAtMjU2In19.eyJqdGkiOiJlMWoz"
        "Vl9iS2ljOC1MQUVCIiwiaHRtIjoiR0VUIiwiaHR1IjoiaHR0cHM6Ly9yZXNvdXJjZS5leGFtcGxlLm9yZy9wcm90ZWN0ZWRyZXNvdXJjZSIsImlhdCI6M"
        "TU2MjI2MjYxOCwiYXRoIjoiZlVIeU8ycjJaM0RaNTNFc05yV0JiMHhXWG9hTnk1OUlpS0NBcWtzbVFFbyJ9.2oW9RP35yRqzhrtNP86L-Ey71EOptxRim"
        "PPToA1plemAgR6pxHF8y6-yqyVnmcw6Fy1dqd-jfxSYoMxhAJpLjA"
    )
    request = {"method": "GET", "url": "https://resource.example.org/protectedresource", "now": from_epoch(1562262618)}
    proofs = Proofs(database)
    with pytest.raises(InvalidProof, match="ath"):
        proofs.verify_dpop(proof, **request, access_token="another")
    jkt = proofs.verify_dpop(proof, **request, access_token="Kz~8mXK1EalYznwH-LC-1fBAo.4Ljp~zsPE_NeO.gxU")
    assert jkt == "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"
