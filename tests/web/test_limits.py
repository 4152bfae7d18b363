"""Limits as they look outside: 429, which limit, when to come again; and who is told nothing of the kind."""

import pytest
import sqlalchemy as sa
from prometheus_client import REGISTRY

from broker.store.models import ConsumedProof
from tests.house import CRM, ISSUER, LEDGER, build_house
from tests.web.conftest import Web
from tests.workloads import dpop_proof, issuer_key


@pytest.fixture
def web(store_url, tmp_path):
    house = build_house(store_url, tmp_path, requests_per_agent=3, denials_throttle=2, denials_lockdown=50)
    yield Web(house)
    house.broker.close()


def at_its_limit(web):
    task = web.open_task()
    tokens = [web.grant(task).json["credential"]["token"] for _ in range(3)]
    return task, tokens


def refusals(limit):
    return REGISTRY.get_sample_value("broker_limited_requests_total", {"limit": limit}) or 0


def test_a_problem_names_the_limit_its_value_and_when_to_come_again(web):
    task, _ = at_its_limit(web)
    before = refusals("requests_per_agent")
    answer = web.grant(task)
    assert (answer.status_code, answer.json["code"]) == (429, "limit_exceeded")
    assert answer.json["limit"] == {"name": "requests_per_agent", "value": 3, "window_s": 60}
    assert 1 <= int(answer.headers["Retry-After"]) <= 60
    assert "summarizer has asked 3 times" in answer.json["detail"]
    assert refusals("requests_per_agent") == before + 1


def test_oauth_says_it_in_its_own_words(web):
    task, _ = at_its_limit(web)
    asked = {"grant_type": "client_credentials", "resource": CRM, "scope": "contacts:read", "task_id": task["id"]}
    answer = web.form("/oauth2/token", **asked, **web.assertion("summarizer"))
    assert (answer.status_code, answer.json["error"]) == (429, "temporarily_unavailable")
    assert "requests_per_agent" in answer.json["error_description"]
    assert 1 <= int(answer.headers["Retry-After"]) <= 60


def test_ending_and_looking_are_behind_no_limit(web):
    """INV-27."""
    task, tokens = at_its_limit(web)
    assert web.grant(task).status_code == 429
    assert web.introspect(tokens[0])["active"]
    grant_id = web.introspect(tokens[0])["grant_id"]
    assert web.post(f"/v1/grants/{grant_id}/revoke", "summarizer").status_code == 200
    assert web.form("/oauth2/revoke", token=tokens[1], **web.assertion("summarizer")).status_code == 200
    assert [web.introspect(token)["active"] for token in tokens] == [False, False, True]
    assert web.get(f"/v1/grants/{grant_id}", "summarizer").status_code == 200
    assert web.post(f"/v1/tasks/{task['id']}/heartbeat", "pipeline").status_code in (200, 409)
    assert web.post(f"/v1/tasks/{task['id']}/complete", "pipeline").status_code == 200
    assert not web.introspect(tokens[2])["active"]


def test_an_agent_that_pauses_is_told_so_and_ends_what_it_holds(web):
    task = web.open_task()
    token = web.grant(task).json["credential"]["token"]
    grant_id = web.introspect(token)["grant_id"]
    for _ in range(2):
        assert web.grant(task, resource=LEDGER, scopes=["entries:read"]).status_code == 403
    answer = web.grant(task)
    assert (answer.status_code, answer.json["limit"]["name"]) == (429, "denials_throttle")
    assert web.post(f"/v1/grants/{grant_id}/revoke", "summarizer").status_code == 200


@pytest.mark.parametrize("path", ["/v1/grants", "/oauth2/token"])
def test_a_refused_request_does_not_even_use_up_its_proof(web, path):
    """INV-35: or each were a row."""
    task, _ = at_its_limit(web)
    web.grant(task)
    key = issuer_key("ES256")
    for number in range(3):
        proof = dpop_proof(key, url=f"{ISSUER}{path}", now=web.house.clock(), jti=f"proof-{number}")
        if path == "/v1/grants":
            body = {"task_id": task["id"], "resource": CRM, "scopes": ["contacts:read"]}
            answer = web.post(path, "summarizer", json=body, headers={"DPoP": proof})
        else:
            asked = {"grant_type": "client_credentials", "resource": CRM, "scope": "contacts:read"}
            given = {**asked, "task_id": task["id"], **web.assertion("summarizer")}
            answer = web.form(path, headers={"DPoP": proof}, **given)
        assert answer.status_code == 429, answer.json
    with web.house.broker.database.read() as db:
        assert db.execute(sa.select(sa.func.count()).select_from(ConsumedProof)).scalar_one() == 0
