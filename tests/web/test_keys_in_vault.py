"""A broker whose keys Vault seals, as its callers see it while Vault is silent: no new token, and all else goes on."""

import shutil
from dataclasses import replace

import jwt
import pytest

from broker.providers.dev_issuer import DevIssuer
from broker.providers.vault.connection import Connection
from broker.services.keys import ISSUES_FOR
from broker.store.database import in_transaction
from broker.wiring import build
from tests.house import CRM, ISSUER, House, TestClock, catalogue_for, settings_for
from tests.services.sealings import KEY, OnFake, OnOpenBao
from tests.web.conftest import Web


@pytest.fixture(autouse=True)
def nobody_is_asked_in_a_transaction(monkeypatch):
    within = Connection.within

    def guarded(self, ask):
        assert not in_transaction(), "Vault was asked within a transaction"
        return within(self, ask)

    monkeypatch.setattr(Connection, "within", guarded)


@pytest.fixture(params=["fake", "openbao"])
def vault(request, tmp_path):
    made = OnFake(tmp_path) if request.param == "fake" else OnOpenBao(request.getfixturevalue("openbao"), tmp_path)
    yield made
    made.close()


@pytest.fixture
def broker_of(vault, migrated_file, tmp_path):
    """A broker on one store; another one is the same after a restart."""
    shutil.copyfile(migrated_file, tmp_path / "broker.db")
    clock, issuer = TestClock(), DevIssuer.create_or_load(tmp_path)
    settings = settings_for(f"sqlite:///{tmp_path / 'broker.db'}", tmp_path, catalogue_for(issuer))
    settings = replace(settings, master_key_file=None, vault_transit=KEY, vault=vault.settings)
    started = []

    def start():
        broker = build(settings, clock=clock)
        started.append(broker)
        broker.apply(by="tests")
        return Web(House(broker=broker, clock=clock, issuer=issuer))

    yield start
    for broker in started:
        broker.close()


def is_active(web, token):
    return web.introspect(token)["active"]


def test_while_vault_is_silent_no_token_is_made_and_verifying_and_revoking_goes_on(broker_of, vault):
    web = broker_of()
    task = web.open_task()
    kept, ended = (web.grant(task).json for _ in range(2))
    vault.falls_silent()
    try:
        web.house.clock.forward(seconds=int(ISSUES_FOR.total_seconds()))
        web.house.broker.keys.tend()
        refused = web.grant(task)
        assert (refused.status_code, refused.json["code"]) == (503, "unavailable")
        assert "Retry-After" in refused.headers
        assert "no token is signed: try again" in refused.json["detail"]
        asked = {"grant_type": "client_credentials", "resource": CRM, "scope": "contacts:read"}
        by_oauth = web.form("/oauth2/token", **asked, **web.assertion("scribe"))
        assert (by_oauth.status_code, "Retry-After" in by_oauth.headers) == (503, True)
        renewal = web.post(f"/v1/grants/{kept['grant']['id']}/renew", "summarizer", json={})
        assert (renewal.status_code, "Retry-After" in renewal.headers) == (503, True)
        assert web.get("/readyz").status_code == 200

        assert is_active(web, ended["credential"]["token"])
        receipt = web.post(f"/v1/grants/{ended['grant']['id']}/revoke", "summarizer", json={})
        assert receipt.status_code == 200
        assert not is_active(web, ended["credential"]["token"])
        assert is_active(web, kept["credential"]["token"])

        keys = jwt.PyJWKSet.from_dict(web.get("/oauth2/jwks").json)
        claims = jwt.decode(kept["credential"]["token"], options={"verify_signature": False})
        listed = web.get(claims["status"]["status_list"]["uri"].removeprefix(ISSUER))
        assert listed.status_code == 200
        header = jwt.get_unverified_header(listed.text)
        options = {"verify_exp": False, "verify_iat": False}
        assert jwt.decode(listed.text, keys[header["kid"]], algorithms=["ES256"], options=options)
        done = web.post(f"/v1/tasks/{task['id']}/complete", "pipeline", json={})
        assert (done.status_code, done.json["totals"]["ended"]) == (200, 2)
        assert done.json["jws"]
        assert not is_active(web, kept["credential"]["token"])
    finally:
        vault.answers_again()
    web.house.clock.forward(seconds=3)
    web.house.broker.keys.tend()
    assert web.grant(web.open_task()).status_code == 201


def test_a_broker_restarted_while_vault_is_silent_verifies_and_revokes(broker_of, vault):
    before = broker_of()
    task = before.open_task()
    issued = before.grant(task).json
    token, grant_id = issued["credential"]["token"], issued["grant"]["id"]
    published = before.get("/oauth2/jwks").json
    vault.falls_silent()
    try:
        web = broker_of()
        assert web.get("/oauth2/jwks").json == published
        assert is_active(web, token)
        refused = web.grant(task)
        assert (refused.status_code, "Retry-After" in refused.headers) == (503, True)
        # Nothing says yes in the broker's name: a verifier that finds no fresh list refuses (INV-24, INV-25).
        uri = jwt.decode(token, options={"verify_signature": False})["status"]["status_list"]["uri"]
        listed = web.get(uri.removeprefix(ISSUER))
        assert (listed.status_code, "Retry-After" in listed.headers) == (503, True)
        receipt = web.post(f"/v1/grants/{grant_id}/revoke", "summarizer", json={})
        assert (receipt.status_code, receipt.json["jws"]) == (200, None)
        assert not is_active(web, token)
    finally:
        vault.answers_again()
    web.house.clock.forward(seconds=3)
    web.house.broker.keys.tend()
    assert web.grant(task).status_code == 201
    # Read again once, and not for each request.
    assert web.house.broker.standing.now() is web.house.broker.standing.now()
    assert web.get(uri.removeprefix(ISSUER)).status_code == 200


def test_a_key_is_compromised_and_its_grants_end_while_vault_is_silent(broker_of, vault):
    """INV-27."""
    web = broker_of()
    token = web.grant(web.open_task()).json["credential"]["token"]
    kid = jwt.get_unverified_header(token)["kid"]
    vault.falls_silent()
    try:
        answer = web.post("/v1/revocations", "ada", json={"key": kid, "reason": "found in a log"})
        assert answer.status_code == 200
        assert not is_active(web, token)
    finally:
        vault.answers_again()
