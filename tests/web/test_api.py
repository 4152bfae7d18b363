"""The JSON API as the wire contract writes it: roles, shapes, statuses, idempotency, pages."""

import re
import shutil
import sys
from dataclasses import replace
from unicodedata import category
from urllib.parse import urlencode

import jwt
import pytest

from broker.domain.catalogue import Resource
from tests.house import CRM, ISSUER, LEDGER, build_house, catalogue_for
from tests.web.conftest import Web
from tests.workloads import dpop_proof, issuer_key


@pytest.fixture(scope="module")
def web_of_module(migrated_file, tmp_path_factory):
    """One application for many requests that are all refused."""
    directory = tmp_path_factory.mktemp("house")
    shutil.copyfile(migrated_file, directory / "broker.db")
    built = build_house(f"sqlite:///{directory / 'broker.db'}", directory)
    yield Web(built)
    built.broker.close()


def test_the_main_job(web_on_both):
    web = web_on_both
    task = web.open_task(labels={"team": "crm"}, resources=[{"resource": CRM, "scopes": ["contacts:read"]}])
    assert task["state"] == "active"
    assert task["resources"] == [{"resource": CRM, "scopes": ["contacts:read"]}]
    answer = web.grant(task, intent="read the leads", context={"batch": 7})
    assert answer.status_code == 201
    assert answer.headers["Cache-Control"] == "no-store"
    grant, credential = answer.json["grant"], answer.json["credential"]
    assert (grant["live"], grant["state"], grant["ttl_decided_by"]) == (True, "active", "default")
    assert credential["token_type"] == "Bearer"
    assert web.introspect(credential["token"])["active"] is True
    receipt = web.post(f"/v1/tasks/{task['id']}/complete", "pipeline").json
    assert receipt["totals"] == {"ended": 1, "confirmed_dead": 0, "outstanding": 1}
    assert web.introspect(credential["token"]) == {"active": False}
    shown = web.get(f"/v1/grants/{grant['id']}", "summarizer").json
    assert (shown["live"], shown["state"], shown["reason"]) == (False, "revoked", "task completed")
    assert "token" not in str(shown)


def test_a_receipt_is_signed_by_a_published_key(web):
    task = web.open_task()
    web.grant(task)
    web.post(f"/v1/tasks/{task['id']}/complete", "pipeline")
    receipt = web.get(f"/v1/tasks/{task['id']}/receipt", "pipeline").json
    keys = jwt.PyJWKSet.from_dict(web.get("/oauth2/jwks").json)
    key = keys[jwt.get_unverified_header(receipt["jws"])["kid"]]
    claims = jwt.decode(receipt["jws"], key, algorithms=["ES256"], options={"verify_iat": False})
    assert claims["receipt"] == {name: value for name, value in receipt.items() if name != "jws"}
    assert (claims["iss"], claims["sub"]) == (ISSUER, task["id"])


def test_a_refusal_carries_its_decision(web):
    answer = web.grant(web.open_task(), scopes=["contacts:write"])
    assert answer.status_code == 403
    assert answer.mimetype == "application/problem+json"
    assert answer.json["code"] == "policy_denied"
    assert answer.json["decision"]["outcome"] == "deny"
    assert answer.json["decision"]["reasons"]
    assert answer.json["detail"] in " ".join(answer.json["decision"]["reasons"])


@pytest.mark.parametrize("verb", ["complete", "fail", "cancel"])
def test_a_task_ends_once_and_answers_its_receipt_again(web, verb):
    task = web.open_task()
    first = web.post(f"/v1/tasks/{task['id']}/{verb}", "pipeline", json={"reason": "because"}).json
    again = web.post(f"/v1/tasks/{task['id']}/{verb}", "pipeline").json
    first.pop("jws"), again.pop("jws")
    assert first == again
    assert web.get(f"/v1/tasks/{task['id']}", "pipeline").json["reason"] == "because"


def test_a_heartbeat_moves_its_due_time(web):
    task = web.open_task(heartbeat_s=60)
    web.house.clock.forward(seconds=30)
    answer = web.post(f"/v1/tasks/{task['id']}/heartbeat", "pipeline")
    assert answer.json["heartbeat_due_at"] == "2026-03-01T12:01:30Z"
    assert web.post(f"/v1/tasks/{task['id']}/heartbeat", "summarizer").status_code == 403


ROLES = [
    ("POST", "/v1/tasks", {"purpose": "x", "agents": ["summarizer"], "deadline_s": 60}, {"pipeline", "other-pipeline"}),
    ("POST", "/v1/revocations", {"agent": "nobody", "reason": "drill"}, {"ada"}),
    ("POST", "/v1/revocations", {"agent": "nobody", "reason": "drill", "dry_run": True}, {"ada"}),
    ("GET", "/v1/lockdowns", None, {"ada"}),
    ("POST", "/v1/lockdowns", {"agent": "nobody", "reason": "drill"}, {"ada"}),
    ("DELETE", "/v1/lockdowns/lck_0000000000000000000000000a", None, {"ada"}),
    ("GET", "/v1/audit", None, {"ada", "audrey"}),
    ("GET", "/v1/leases", None, {"ada", "audrey"}),
    ("GET", "/v1/leases/lea_0000000000000000000000000a", None, {"ada", "audrey"}),
    ("POST", "/v1/leases/lea_0000000000000000000000000a/abandon", {"reason": "drill"}, {"ada"}),
    ("GET", "/v1/policies", None, {"ada", "audrey"}),
    ("GET", "/metrics", None, {"ada", "audrey"}),
    (
        "POST",
        "/v1/policies/evaluate",
        {"agent": "summarizer", "resource": CRM, "scopes": ["contacts:read"]},
        {"ada", "audrey"},
    ),
]
EVERYBODY = {"pipeline", "other-pipeline", "summarizer", "scribe", "crm-api", "ada", "audrey"}


@pytest.mark.parametrize(
    ("method", "path", "body", "allowed"), ROLES, ids=[f"{row[0]} {row[1]} {n}" for n, row in enumerate(ROLES)]
)
def test_each_door_opens_for_its_roles_alone(web, method, path, body, allowed):
    for name in sorted(EVERYBODY):
        answer = web.client.open(path, method=method, json=body, headers=web.as_(name))
        if name in allowed:
            assert answer.status_code in (200, 201, 404), (name, answer.json)
        else:
            assert (answer.status_code, answer.json["code"]) == (403, "role_missing"), name
    assert web.client.open(path, method=method, json=body).status_code == 401


def test_what_one_may_not_see_is_not_found(web):
    task = web.open_task()
    grant = web.grant(task).json["grant"]
    for path in (f"/v1/tasks/{task['id']}", f"/v1/tasks/{task['id']}/receipt", f"/v1/grants/{grant['id']}"):
        for stranger in ("other-pipeline", "scribe", "crm-api"):
            assert web.get(path, stranger).status_code == 404
        for reader in ("pipeline", "summarizer", "ada", "audrey"):
            assert web.get(path, reader).status_code == 200
    assert web.get("/v1/tasks", "scribe").json["items"] == []
    assert web.get("/v1/grants", "other-pipeline").json["items"] == []


def test_lists_go_page_by_page_newest_first(web):
    made = [web.open_task()["id"] for _ in range(5)]
    seen, cursor = [], None
    while True:
        page = web.get(f"/v1/tasks?limit=2{f'&cursor={cursor}' if cursor else ''}", "pipeline").json
        seen += [task["id"] for task in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == made[::-1]


def test_lists_are_filtered(web):
    first, second = web.open_task(), web.open_task("scribe")
    web.grant(first)
    web.post(f"/v1/tasks/{second['id']}/cancel", "pipeline")
    assert [task["id"] for task in web.get("/v1/tasks?state=active", "ada").json["items"]] == [first["id"]]
    assert [task["id"] for task in web.get("/v1/tasks?agent=scribe", "ada").json["items"]] == [second["id"]]
    assert len(web.get(f"/v1/grants?task={first['id']}&state=active", "ada").json["items"]) == 1
    assert web.get("/v1/grants?agent=scribe", "ada").json["items"] == []
    types = [event["type"] for event in web.get(f"/v1/audit?task={second['id']}", "audrey").json["items"]]
    assert types == ["task.cancelled", "task.opened"]


def test_the_same_idempotency_key_opens_one_task_and_makes_one_grant(web):
    body = {"purpose": "x", "agents": ["summarizer"], "deadline_s": 60}
    key = {"Idempotency-Key": "6b2f"}
    first, again = (web.post("/v1/tasks", "pipeline", json=body, headers=key) for _ in range(2))
    assert first.json["id"] == again.json["id"]
    other = web.post("/v1/tasks", "pipeline", json=body | {"deadline_s": 61}, headers=key)
    assert (other.status_code, other.json["code"]) == (409, "idempotency_conflict")
    ask = {"task_id": first.json["id"], "resource": CRM, "scopes": ["contacts:read"]}
    grants = [web.post("/v1/grants", "summarizer", json=ask, headers=key).json["grant"]["id"] for _ in range(2)]
    assert len(set(grants)) == 1


def test_a_dry_run_shows_the_blast_radius_and_changes_nothing(web):
    token = web.grant(web.open_task()).json["credential"]["token"]
    trial = web.post("/v1/revocations", "ada", json={"all": "all", "reason": "drill", "dry_run": True}).json
    assert (trial["dry_run"], trial["grants"], trial["by_agent"]) == (True, 1, {"summarizer": 1})
    assert trial["samples"][0]["agent"] == "summarizer"
    assert web.introspect(token)["active"] is True
    done = web.post("/v1/revocations", "ada", json={"all": True, "reason": "drill", "lockdown": True}).json
    assert done["lockdown"]["axis"] == "all"
    assert done["receipt"]["totals"]["ended"] == 1
    assert web.introspect(token) == {"active": False}
    assert web.grant(web.open_task()).json["code"] == "locked_down"
    lifted = web.client.delete(f"/v1/lockdowns/{done['lockdown']['id']}", headers=web.as_("ada"))
    assert lifted.json["lifted_by"] == "ada"
    assert web.get("/v1/lockdowns", "ada").json["items"] == []
    assert web.grant(web.open_task()).status_code == 201


@pytest.mark.parametrize("body", [{}, {"agent": "a", "task": "b"}, {"agents": "a"}, {"all": False}, {"all": "some"},
                                  {"all": 1}, {"all": 1.0}, {"all": "true"}, {"all": ["all"]}])  # fmt: skip
def test_a_revocation_names_exactly_one_axis(web, body):
    answer = web.post("/v1/revocations", "ada", json=body | {"reason": "drill"})
    assert answer.status_code == 400


def test_a_limit_answers_how_long_to_wait(web, tmp_path, monkeypatch):
    from dataclasses import replace

    limits = replace(web.house.broker.settings.limits, max_live_per_agent=1)
    monkeypatch.setattr(web.house.broker.issuance, "_limits", limits)
    task = web.open_task()
    web.grant(task)
    answer = web.grant(task)
    assert (answer.status_code, answer.json["code"]) == (429, "limit_exceeded")
    assert int(answer.headers["Retry-After"]) > 0


def test_a_trace_id_is_taken_over_and_a_malformed_one_ignored(web):
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    task = web.post(
        "/v1/tasks", "pipeline", json={"purpose": "x", "agents": ["summarizer"], "deadline_s": 9}, headers=headers
    ).json
    event = web.get(f"/v1/audit?task={task['id']}", "audrey").json["items"][0]
    assert event["trace_id"] == trace
    malformed = ["x-01", "00f067aa0ba902b7-01-extra", "00f067aa0ba902b7-01-", "0" * 16 + "-01", "00f067aa0ba902b7"]
    for rest in malformed:
        answer = web.post("/v1/grants", headers={"traceparent": f"00-{trace}-{rest}"})
        assert answer.json["trace_id"] != trace, rest
    # A version to come may have more fields after the four that we know (W3C Trace Context section 4.3).
    answer = web.post("/v1/grants", headers={"traceparent": f"01-{trace}-00f067aa0ba902b7-01-extra"})
    assert answer.json["trace_id"] == trace


def test_every_problem_has_a_page_for_people(web):
    from broker.web.problems import REMEDIES, TITLES

    assert TITLES.keys() == REMEDIES.keys()
    for code in TITLES:
        assert web.get(f"/problems/{code}").status_code == 200
    assert web.get("/problems/no_such").status_code == 404


def test_health_and_readiness(web):
    assert web.get("/healthz").json == {"status": "ok"}
    assert web.get("/readyz").json == {"status": "ok", "configuration_version": 1}


def test_metrics_name_routes_and_never_paths(web):
    task = web.open_task()
    web.get(f"/v1/tasks/{task['id']}", "pipeline")
    text = web.get("/metrics", "audrey").get_data(as_text=True)
    assert "broker_http_requests_total" in text
    assert task["id"] not in text


def test_a_method_somebody_made_up_is_no_new_time_series(web):
    def methods():
        text = web.get("/metrics", "audrey").get_data(as_text=True)
        return set(re.findall(r'broker_http_requests_total{method="([^"]*)"', text))

    for number in range(3):
        assert web.client.open("/v1/tasks", method=f"BREW{number}").status_code == 405
    assert methods() <= {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "other"}
    assert "other" in methods()


def test_the_description_is_made_once_and_kept_by_its_etag(web, monkeypatch):
    first = web.get("/openapi.json")
    monkeypatch.setattr("broker.web.app.openapi", lambda *_: 1 / 0)
    again = web.get("/openapi.json")
    assert again.get_data() == first.get_data()
    tag = {"If-None-Match": first.headers["ETag"]}
    assert web.client.get("/openapi.json", headers=tag).status_code == 304


def test_the_same_idempotency_key_gives_one_order_and_one_lockdown(web_on_both):
    web = web_on_both
    headers = {"Idempotency-Key": "stop-1"}
    token = web.grant(web.open_task()).json["credential"]["token"]
    order = {"agent": "summarizer", "reason": "incident", "lockdown": True}
    first, again = (web.post("/v1/revocations", "ada", json=order, headers=headers).json for _ in range(2))
    assert web.introspect(token) == {"active": False}
    assert (first["id"], first["lockdown"]) == (again["id"], again["lockdown"])
    other = web.post("/v1/revocations", "ada", json=order | {"reason": "another"}, headers=headers)
    assert (other.status_code, other.json["code"]) == (409, "idempotency_conflict")
    # The same key elsewhere is for something else.
    wrong = web.post("/v1/lockdowns", "ada", json={"agent": "summarizer", "reason": "incident"}, headers=headers)
    assert (wrong.status_code, wrong.json["code"]) == (409, "idempotency_conflict")
    headers = {"Idempotency-Key": "stop-2"}
    made = [web.post("/v1/lockdowns", "ada", json={"agent": "scribe", "reason": "x"}, headers=headers) for _ in "ab"]
    assert [answer.status_code for answer in made] == [201, 201]
    assert made[0].json == made[1].json
    assert len(web.get("/v1/lockdowns", "ada").json["items"]) == 2
    ordered = web.get("/v1/audit?type=revocation.ordered", "audrey").json["items"]
    assert len(ordered) == 2


def test_a_key_that_bound_a_credential_gives_no_bearer_token(web):
    """INV-21: who repeats the request without the proof is answered with no token at all."""
    task, key, sent = web.open_task(), issuer_key(), {"Idempotency-Key": "bound"}

    def proof(number):
        now = web.house.clock()
        return {"DPoP": dpop_proof(key, url=f"{ISSUER}/v1/grants", jti=f"proof-{number}", now=now)}

    ask = {"task_id": task["id"], "resource": CRM, "scopes": ["contacts:read"]}
    first = web.post("/v1/grants", "summarizer", json=ask, headers=sent | proof(1))
    again = web.post("/v1/grants", "summarizer", json=ask, headers=sent | proof(2))
    assert first.json["grant"]["id"] == again.json["grant"]["id"]
    assert again.json["credential"]["token_type"] == "DPoP"
    bare = web.post("/v1/grants", "summarizer", json=ask, headers=sent)
    assert (bare.status_code, bare.json["code"]) == (409, "idempotency_conflict")


def test_a_refusal_that_policy_did_not_make_has_no_decision_and_says_so(web):
    answer = web.post("/v1/tasks", "summarizer", json={"purpose": "x", "agents": ["summarizer"], "deadline_s": 60})
    assert (answer.status_code, answer.json["decision"]) == (403, None)
    assert "decision" not in web.get("/v1/nothing").json


def all_pages(web, path, by, limit=2):
    items, cursor = [], None
    while True:
        page = web.get(f"{path}limit={limit}{f'&cursor={cursor}' if cursor else ''}", by).json
        assert len(page["items"]) <= limit
        items += page["items"]
        cursor = page["next_cursor"]
        if cursor is None:
            return items


def test_lockdowns_and_versions_go_page_by_page_too(web):
    made = [
        web.post("/v1/lockdowns", "ada", json={"agent": f"agent-{number}", "reason": "drill"}).json["id"]
        for number in range(5)
    ]
    assert [item["id"] for item in all_pages(web, "/v1/lockdowns?", "ada")] == made[::-1]
    web.client.delete(f"/v1/lockdowns/{made[2]}", headers=web.as_("ada"))
    assert [item["id"] for item in all_pages(web, "/v1/lockdowns?lifted=true&", "ada")] == made[::-1]
    assert len(all_pages(web, "/v1/lockdowns?", "ada")) == 4
    catalogue = catalogue_for(web.house.issuer)
    for number in range(2, 6):
        resources = (*catalogue.resources, Resource(identifier=f"urn:test:{number}", scopes=("a",)))
        web.house.broker.administration.apply(replace(catalogue, resources=resources), by="tests")
    assert [item["version"] for item in all_pages(web, "/v1/policies?", "audrey")] == [5, 4, 3, 2, 1]
    for path in ("/v1/lockdowns", "/v1/policies"):
        for query in ("limit=0", "limit=1001", "limit=1_0", "limit=10.0", "limit=%2010", "cursor=bm9uZQ=="):
            answer = web.get(f"{path}?{query}", "ada")
            assert (answer.status_code, answer.json["member"]) == (400, query.split("=")[0])


def test_tasks_are_found_by_their_resource(web_on_both):
    web = web_on_both
    within = web.open_task(resources=[{"resource": CRM, "scopes": ["contacts:read"]}])
    elsewhere = web.open_task("scribe", resources=[{"resource": LEDGER, "scopes": ["entries:read"]}])
    granted, neither = web.open_task("summarizer", "scribe"), web.open_task()
    assert web.grant(granted).status_code == 201
    assert web.grant(neither, scopes=["contacts:write"]).status_code == 403

    def found(by, resource):
        answer = web.get("/v1/tasks?" + urlencode({"resource": resource}), by)
        assert answer.status_code == 200, answer.json
        return {task["id"] for task in answer.json["items"]}

    for by in ("ada", "pipeline", "summarizer"):
        assert found(by, CRM) == {within["id"], granted["id"]}, by
    assert found("ada", LEDGER) == {elsewhere["id"]}
    # What another agent holds in the same task is none of its business.
    assert found("scribe", CRM) == set()
    for odd in ('"', "x') OR 1=1 --", "$.a", '"]}', "nothing"):
        assert found("ada", odd) == set()


@pytest.mark.parametrize(
    "character", [chr(point) for point in range(sys.maxunicode) if category(chr(point)) == "Cf"][::5]
)
def test_no_character_may_hide_or_reorder_its_neighbours(web_of_module, character):
    """An approver, and whoever reads a log, must see the sentence that was sent."""
    web = web_of_module
    text = f"pay{character}ment"
    body = {"purpose": "x", "agents": ["summarizer"], "deadline_s": 60}
    ask = {"resource": CRM, "scopes": ["contacts:read"], "task_id": "task_0000000000000000000000000a"}
    for path, by, sent in (
        ("/v1/tasks", "pipeline", body | {"purpose": text}),
        ("/v1/tasks", "pipeline", body | {"labels": {"team": text}}),
        ("/v1/tasks", "pipeline", body | {"labels": {text: "crm"}}),
        ("/v1/grants", "summarizer", ask | {"intent": text}),
        ("/v1/revocations", "ada", {"agent": "nobody", "reason": text, "dry_run": True}),
        ("/v1/lockdowns", "ada", {"agent": "nobody", "reason": text}),
        ("/v1/tasks/task_0000000000000000000000000a/complete", "pipeline", {"reason": text}),
    ):
        answer = web.post(path, by, json=sent)
        assert (answer.status_code, answer.json["code"]) == (400, "invalid_request"), (path, sent)
        assert character not in answer.get_data(as_text=True)
    form = {"grant_type": "client_credentials", "scope": text, **web.assertion("summarizer")}
    assert web.form("/oauth2/token", **form).json["error"] == "invalid_request"


def test_other_writing_is_nobodys_business(web):
    for purpose in ("Mäkelä: lasku № 7", "請求書を要約する", "ملخص العملاء", "résumé 😀"):
        assert web.open_task(purpose=purpose)["purpose"] == purpose
