"""What may be used once, used again, and used by fifty at once (INV-06, INV-20)."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from broker.wiring import build
from tests.hostile.conftest import Hostile, refused, refused_by_oauth
from tests.house import CRM, ISSUER, House, TestClock, catalogue_for, settings_for
from tests.workloads import dpop_proof, issuer_key

AT_ONCE = 50
JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"


def all_at_once(do, count=AT_ONCE):
    barrier = threading.Barrier(count)

    def run(number):
        barrier.wait()
        return do(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def request_of(web, **more):
    task = web.open_task()
    ask = {
        "grant_type": JWT_BEARER,
        "assertion": web.house.token("summarizer"),
        "resource": CRM,
        "scope": "contacts:read",
    }
    return ask | {"task_id": task["id"]} | more


def test_of_fifty_requests_with_one_dpop_proof_one_is_answered(web_on_both):
    web = web_on_both
    form = request_of(web)
    proof = dpop_proof(issuer_key(), url=f"{ISSUER}/oauth2/token", now=web.house.clock())
    answers = all_at_once(lambda _: web.app.test_client().post("/oauth2/token", data=form, headers={"DPoP": proof}))
    assert sorted(answer.status_code for answer in answers) == [200] + [400] * (AT_ONCE - 1)
    for answer in answers:
        if answer.status_code == 400:
            refused_by_oauth(answer, "invalid_dpop_proof")
    assert len(web.get("/v1/grants", "ada").json["items"]) == 1


def test_a_dpop_proof_that_was_used_at_one_door_is_used_at_all(web):
    task = web.open_task()
    key = issuer_key()
    proof = dpop_proof(key, url=f"{ISSUER}/v1/grants", now=web.house.clock())
    assert web.client.post("/v1/grants", json=ask(task), headers=web.as_("summarizer", DPoP=proof)).status_code == 201
    again = web.client.post("/v1/grants", json=ask(task), headers=web.as_("summarizer", DPoP=proof))
    assert refused(again, status=(400,))["code"] == "invalid_dpop_proof"
    other = dpop_proof(key, url=f"{ISSUER}/oauth2/token", now=web.house.clock())  # the same key and jti elsewhere
    answer = web.client.post("/oauth2/token", data=request_of(web), headers={"DPoP": other})
    refused_by_oauth(answer, "invalid_dpop_proof")


def ask(task):
    return {"task_id": task["id"], "resource": CRM, "scopes": ["contacts:read"]}


def test_of_fifty_requests_with_one_idempotency_key_all_get_the_one_task(web_on_both):
    web = web_on_both
    body = {"purpose": "x", "agents": ["summarizer"], "deadline_s": 60}
    headers = web.as_("pipeline", **{"Idempotency-Key": "one"})
    answers = all_at_once(lambda _: web.app.test_client().post("/v1/tasks", json=body, headers=headers))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json["id"] for answer in answers}) == 1
    assert len(web.get("/v1/tasks", "ada").json["items"]) == 1


def test_of_fifty_requests_with_one_idempotency_key_all_get_the_one_grant(web_on_both):
    web = web_on_both
    body, headers = ask(web.open_task()), web.as_("summarizer", **{"Idempotency-Key": "one"})
    answers = all_at_once(lambda _: web.app.test_client().post("/v1/grants", json=body, headers=headers))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json["grant"]["id"] for answer in answers}) == 1
    assert len(web.get("/v1/grants", "ada").json["items"]) == 1


def test_of_fifty_bodies_under_one_idempotency_key_one_is_served(web_on_both):
    web = web_on_both
    task, headers = web.open_task(), web.as_("summarizer", **{"Idempotency-Key": "one"})

    def send(number):
        body = ask(task) | {"ttl_s": 10 + number}
        return web.app.test_client().post("/v1/grants", json=body, headers=headers)

    answers = all_at_once(send)
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * (AT_ONCE - 1)
    for answer in answers:
        if answer.status_code == 409:
            assert refused(answer)["code"] == "idempotency_conflict"


def test_the_same_idempotency_key_of_another_caller_is_another_key(web):
    body = {"purpose": "x", "agents": ["summarizer"], "deadline_s": 60}
    made = {
        web.post("/v1/tasks", by, json=body, headers={"Idempotency-Key": "one"}).json["id"]
        for by in ("pipeline", "other-pipeline", "pipeline")
    }
    assert len(made) == 2


def test_the_same_request_in_other_bytes_is_another_request(web):
    """What was hashed are the bytes that came: nobody has to agree on what makes two bodies equal (INV-22)."""
    body = json.dumps({"purpose": "x", "agents": ["summarizer"], "deadline_s": 60})
    headers = web.as_("pipeline", **{"Idempotency-Key": "one"})
    first = web.client.post("/v1/tasks", data=body, headers=headers, content_type="application/json")
    other = web.client.post("/v1/tasks", data=body + " ", headers=headers, content_type="application/json")
    assert (first.status_code, refused(other)["code"]) == (201, "idempotency_conflict")


def test_an_idempotency_key_of_one_door_opens_no_other(web):
    task = web.open_task()
    key = {"Idempotency-Key": "one"}
    assert (
        web.post("/v1/grants", "scribe", json={"resource": CRM, "scopes": ["contacts:read"]}, headers=key).status_code
        == 201
    )
    assert task["state"] == "active"
    other = web.post("/v1/tasks", "scribe", json={"purpose": "x", "agents": ["scribe"], "deadline_s": 60}, headers=key)
    refused(other, status=(403, 409))


def test_a_task_that_fifty_end_at_once_ends_once_and_answers_one_receipt(web_on_both):
    web = web_on_both
    task = web.open_task()
    web.grant(task)
    headers = web.as_("pipeline")

    def end(number):
        verb = ("complete", "fail", "cancel")[number % 3]
        return web.app.test_client().post(f"/v1/tasks/{task['id']}/{verb}", json={}, headers=headers)

    answers = all_at_once(end)
    assert {answer.status_code for answer in answers} == {200}
    assert len({json.dumps({**answer.json, "jws": ""}, sort_keys=True) for answer in answers}) == 1
    types = [event["type"] for event in web.get(f"/v1/audit?task={task['id']}", "audrey").json["items"]]
    assert sum(type_ in ("task.completed", "task.failed", "task.cancelled") for type_ in types) == 1


def test_a_lockdown_is_lifted_once(web):
    lockdown = web.post("/v1/lockdowns", "ada", json={"agent": "nobody", "reason": "drill"}).json
    path = f"/v1/lockdowns/{lockdown['id']}"
    assert web.client.delete(path, headers=web.as_("ada")).status_code == 200
    refused(web.client.delete(path, headers=web.as_("ada")), status=(404,))


@pytest.fixture
def single_use(migrated_file, tmp_path):
    """A house whose issuer makes tokens for one use."""
    from broker.providers.dev_issuer import DevIssuer

    shutil.copyfile(migrated_file, tmp_path / "broker.db")
    issuer, clock = DevIssuer.create_or_load(tmp_path), TestClock()
    catalogue = catalogue_for(issuer, issuers=(replace(issuer.trusted(), single_use=True),))
    broker = build(settings_for(f"sqlite:///{tmp_path / 'broker.db'}", tmp_path, catalogue), clock=clock)
    broker.apply(by="tests")
    yield Hostile(House(broker=broker, clock=clock, issuer=issuer))
    broker.close()


def test_of_fifty_requests_with_one_single_use_token_one_is_answered(single_use):
    web = single_use
    headers = web.as_("pipeline")
    answers = all_at_once(lambda _: web.app.test_client().get("/v1/tasks", headers=headers))
    assert sorted(answer.status_code for answer in answers) == [200] + [401] * (AT_ONCE - 1)
    assert len({refused(answer)["detail"] for answer in answers if answer.status_code == 401}) == 1


def test_a_single_use_token_that_was_used_at_one_door_is_used_at_all(single_use):
    web = single_use
    token = web.house.token("summarizer")
    assert web.client.get("/v1/grants", headers={"Authorization": f"Bearer {token}"}).status_code == 200
    form = {"grant_type": JWT_BEARER, "assertion": token, "resource": CRM, "scope": "contacts:read"}
    refused_by_oauth(web.client.post("/oauth2/token", data=form), "invalid_grant")


def test_a_single_use_token_proves_the_client_and_is_exchanged_in_one_request(single_use):
    """Naming it twice in one request is using it twice."""
    web = single_use
    task = web.open_task()
    token = web.house.token("summarizer")
    exchange = {
        "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
        "subject_token": token,
        "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
        "resource": CRM,
        "scope": "contacts:read",
        "task_id": task["id"],
    }
    assert web.client.post("/oauth2/token", data=exchange).status_code == 200
    refused_by_oauth(web.client.post("/oauth2/token", data=exchange), "invalid_request")
