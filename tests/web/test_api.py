"""The JSON API as the wire contract writes it: roles, shapes, statuses, idempotency, pages."""

import jwt
import pytest

from tests.house import CRM, ISSUER


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


@pytest.mark.parametrize("body", [{}, {"agent": "a", "task": "b"}, {"agents": "a"}, {"all": False}, {"all": "some"}])
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
    answer = web.post("/v1/grants", headers={"traceparent": f"00-{trace}-x-01"})
    assert answer.json["trace_id"] != trace


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
