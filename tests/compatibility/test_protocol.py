"""The tables of the wire contract, row by row: methods, roles, statuses, and the members as they are written there."""

import re

import jwt
import pytest

from tests.house import CRM, ISSUER
from tests.web.conftest import Web

EVERYBODY = ("pipeline", "other-pipeline", "summarizer", "scribe", "crm-api", "ada", "audrey")

TASK = {"id", "state", "purpose", "agents", "orchestrator", "created_at", "deadline_at", "heartbeat_s", "ended_at",
        "reason", "labels", "parent_task_id", "on_behalf_of"}  # fmt: skip
GRANT = {"id", "task_id", "agent", "resource", "scopes", "state", "live", "issued_at", "expires_at", "ttl_s",
         "ttl_decided_by", "jti", "provider", "revocation_class", "parent_grant_id", "on_behalf_of", "decision",
         "revoked_at", "revoked_by", "reason", "lease"}  # fmt: skip
DECISION = {"outcome", "policies", "policy_version", "reasons"}
EVENT = {"id", "at", "type", "actor", "task_id", "grant_id", "agent", "user", "resource", "outcome", "reason",
         "policy_version", "trace_id", "data"}  # fmt: skip
RECEIPT = {"task_id", "ended_at", "outcome", "grants", "totals"}
LINE = {"grant_id", "agent", "resource", "provider", "revocation_class", "authority_ended_at", "confirmed_dead_at",
        "exposed_until"}  # fmt: skip
LIST = {"items", "next_cursor"}
ISSUED = {"grant", "credential"}
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


@pytest.fixture
def web(sqlite_house):
    return Web(sqlite_house)


def allowed(*names, hidden=(), instead=403):
    """Who gets the answer; to `hidden` the thing does not exist, and everybody else lacks the role."""
    return {name: None if name in names else 404 if name in hidden else instead for name in EVERYBODY}


STRANGERS = ("other-pipeline", "scribe", "crm-api")
READERS = allowed("pipeline", "summarizer", "ada", "audrey", hidden=STRANGERS)
OPEN = {"purpose": "x", "agents": ["summarizer"], "deadline_s": 60, "heartbeat_s": 30, "labels": {"a": "b"},
        "resources": [{"resource": CRM, "scopes": ["contacts:read"]}]}  # fmt: skip
ASK = {
    "task_id": "{task}",
    "resource": CRM,
    "scopes": ["contacts:read"],
    "ttl_s": 30,
    "intent": "x",
    "context": {"a": 1},
}
EVALUATE = {"agent": "summarizer", "resource": CRM, "scopes": ["contacts:read"]}

ROWS = [
    ("POST", "/v1/tasks", OPEN, allowed("pipeline", "other-pipeline"), 201, TASK),
    ("GET", "/v1/tasks", None, allowed(*EVERYBODY), 200, LIST),
    ("GET", "/v1/tasks/{task}", None, READERS, 200, TASK),
    ("POST", "/v1/tasks/{task}/heartbeat", None, allowed("pipeline", hidden=STRANGERS), 200, TASK),
    ("POST", "/v1/tasks/{task}/complete", {"reason": "x"}, allowed("pipeline", "ada", hidden=STRANGERS), 200, RECEIPT),
    ("POST", "/v1/tasks/{task}/fail", {"reason": "x"}, allowed("pipeline", "ada", hidden=STRANGERS), 200, RECEIPT),
    ("POST", "/v1/tasks/{task}/cancel", None, allowed("pipeline", "ada", hidden=STRANGERS), 200, RECEIPT),
    ("GET", "/v1/tasks/{task}/receipt", None, READERS, 200, RECEIPT),
    ("POST", "/v1/grants", ASK, allowed("summarizer", hidden=("scribe",)), 201, ISSUED),
    ("POST", "/v1/grants/{grant}/renew", {"ttl_s": 30}, allowed("summarizer", instead=404), 200, ISSUED),
    ("GET", "/v1/grants", None, allowed(*EVERYBODY), 200, LIST),
    ("GET", "/v1/grants/{grant}", None, READERS, 200, GRANT),
    ("POST", "/v1/grants/{grant}/revoke", {"reason": "x"},
     allowed("summarizer", "pipeline", "ada", hidden=STRANGERS), 200, RECEIPT),
    ("POST", "/v1/revocations", {"agent": "summarizer", "reason": "x"}, allowed("ada"), 200, {"samples", "receipt"}),
    ("POST", "/v1/revocations", {"all": "all", "reason": "x", "dry_run": True}, allowed("ada"), 200, {"samples"}),
    ("POST", "/v1/revocations", {"task": "{task}", "reason": "x", "lockdown": True}, allowed("ada"), 200, {"lockdown"}),
    ("GET", "/v1/lockdowns", None, allowed("ada"), 200, LIST),
    ("POST", "/v1/lockdowns", {"agent": "nobody", "reason": "x"}, allowed("ada"), 201, {"id", "reason"}),
    ("DELETE", "/v1/lockdowns/{lockdown}", None, allowed("ada"), 200, {"id", "lifted_at"}),
    ("GET", "/v1/policies", None, allowed("ada", "audrey"), 200, LIST),
    ("POST", "/v1/policies/evaluate", EVALUATE, allowed("ada", "audrey"), 200, DECISION),
    ("GET", "/v1/audit", None, allowed("ada", "audrey"), 200, LIST),
]  # fmt: skip


class Scene:
    def __init__(self, web):
        task = web.open_task()
        lockdown = web.post("/v1/lockdowns", "ada", json={"agent": "nobody", "reason": "drill"}).json
        grant = web.grant(task).json["grant"]
        self.ids = {"{task}": task["id"], "{grant}": grant["id"], "{lockdown}": lockdown["id"]}

    def filled(self, value):
        if isinstance(value, dict):
            return {name: self.filled(below) for name, below in value.items()}
        for name, id_ in self.ids.items():
            value = value.replace(name, id_) if isinstance(value, str) else value
        return value


@pytest.mark.parametrize("row", ROWS, ids=[f"{row[0]} {row[1]} {number}" for number, row in enumerate(ROWS)])
def test_a_row_answers_each_role_as_written(web, row):
    method, path, body, expected, status, members = row
    for by, refusal in expected.items():
        scene = Scene(web)
        answer = web.client.open(scene.filled(path), method=method, json=scene.filled(body), headers=web.as_(by))
        if refusal is None:
            assert answer.status_code == status, (by, answer.json)
            assert answer.mimetype == "application/json"
            assert answer.json.keys() >= members, (by, members - answer.json.keys())
        else:
            assert answer.status_code == refusal, (by, answer.json)
            code = {403: "role_missing", 404: "not_found"}[refusal]
            assert answer.json["type"] == f"{ISSUER}/problems/{code}"
    refused = web.client.open(Scene(web).filled(path), method=method, json=body)
    assert (refused.status_code, refused.json["code"]) == (401, "unauthenticated")


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health_is_for_everybody(web, path):
    assert web.get(path).json["status"] == "ok"


def test_objects_carry_what_they_must_and_times_are_rfc_3339(web):
    task = web.open_task(heartbeat_s=60)
    grant = web.grant(task).json["grant"]
    web.post(f"/v1/tasks/{task['id']}/complete", "pipeline", json={"reason": "done"})
    task, grant = web.get(f"/v1/tasks/{task['id']}", "ada").json, web.get(f"/v1/grants/{grant['id']}", "ada").json
    events = web.get("/v1/audit", "ada").json["items"]
    receipt = web.get(f"/v1/tasks/{task['id']}/receipt", "ada").json
    assert task.keys() >= TASK
    assert grant.keys() >= GRANT
    assert grant["decision"].keys() >= DECISION
    assert all(event.keys() == EVENT for event in events)
    assert receipt["grants"][0].keys() == LINE
    assert receipt["totals"].keys() == {"ended", "confirmed_dead", "outstanding"}
    assert grant["lease"] is None
    for thing in (task, grant, receipt, *receipt["grants"], *events):
        for name, value in thing.items():
            if name.endswith("_at") or name in ("at", "exposed_until"):
                assert value is None or TIME.fullmatch(value), (name, value)
            if name.endswith("_s"):
                assert value is None or type(value) is int


def test_a_receipt_is_the_same_as_a_jws_under_the_brokers_key(web):
    task = web.open_task()
    web.grant(task)
    ended = web.post(f"/v1/tasks/{task['id']}/complete", "pipeline").json
    assert ended.keys() == RECEIPT | {"jws"}
    shown = web.get(f"/v1/tasks/{task['id']}/receipt", "pipeline").json
    key = jwt.PyJWKSet.from_dict(web.get("/oauth2/jwks").json)[jwt.get_unverified_header(shown["jws"])["kid"]]
    claims = jwt.decode(shown["jws"], key, algorithms=["ES256"], options={"verify_iat": False})
    assert claims["receipt"] == {name: shown[name] for name in RECEIPT}


def test_the_access_token_has_the_claims_that_are_written_and_no_others(web):
    """No personal data, one audience; `act` only with delegation and `cnf` only with a key."""
    task = web.open_task()
    answer = web.grant(task).json
    token = answer["credential"]["token"]
    assert answer["credential"].keys() == {"type", "token", "token_type", "expires_at"}
    header, claims = jwt.get_unverified_header(token), jwt.decode(token, options={"verify_signature": False})
    assert header.keys() == {"alg", "kid", "typ"}
    assert (header["alg"], header["typ"]) == ("ES256", "at+jwt")
    assert claims.keys() == {
        "iss", "sub", "aud", "client_id", "iat", "nbf", "exp", "jti", "scope", "authorization_details", "status", "txn",
        "grant_id", "task_id",
    }  # fmt: skip
    assert (claims["iss"], claims["sub"], claims["aud"], claims["client_id"]) == (
        ISSUER,
        "summarizer",
        CRM,
        "summarizer",
    )
    assert claims["exp"] - claims["iat"] == 300
    assert claims["authorization_details"] == [{"type": "urn:broker:task", "task_id": task["id"]}]
    assert claims["status"]["status_list"].keys() == {"idx", "uri"}
    assert claims["status"]["status_list"]["uri"].startswith(f"{ISSUER}/status-lists/")
    assert re.fullmatch("[0-9a-f]{32}", claims["txn"])
    assert re.fullmatch("grt_[0-9a-z]{26}", claims["grant_id"])


def test_a_refusal_by_policy_carries_the_decision(web):
    answer = web.grant(web.open_task(), scopes=["contacts:write"])
    assert answer.status_code == 403
    assert answer.json["type"] == f"{ISSUER}/problems/policy_denied"
    assert answer.json["decision"].keys() >= DECISION
    page = web.get(answer.json["type"].removeprefix(ISSUER))
    assert (page.status_code, page.mimetype) == (200, "text/html")


OAUTH_DOCUMENTS = [
    ("/.well-known/oauth-authorization-server", "application/json"),
    ("/.well-known/openid-configuration", "application/json"),
    ("/.well-known/oauth-protected-resource/v1", "application/json"),
    ("/oauth2/jwks", "application/jwk-set+json"),
    ("/status-lists", "application/json"),
    ("/status-lists/1", "application/statuslist+jwt"),
    ("/openapi.json", "application/json"),
]


@pytest.mark.parametrize(("path", "media_type"), OAUTH_DOCUMENTS)
def test_each_public_document_is_for_everybody(web, path, media_type):
    web.grant(web.open_task())
    answer = web.get(path)
    assert (answer.status_code, answer.mimetype) == (200, media_type)
    assert web.client.post(path, data={}).status_code == 405


def test_a_status_list_is_as_the_standard_wants_it(web):
    token = web.grant(web.open_task()).json["credential"]["token"]
    pointer = jwt.decode(token, options={"verify_signature": False})["status"]["status_list"]
    text = web.get(pointer["uri"].removeprefix(ISSUER)).get_data(as_text=True)
    assert jwt.get_unverified_header(text)["typ"] == "statuslist+jwt"
    claims = jwt.decode(text, options={"verify_signature": False})
    assert claims["sub"] == pointer["uri"]
    assert claims["ttl"] <= 15
    assert claims["exp"] > claims["iat"]
    assert claims["status_list"].keys() == {"bits", "lst"}
    assert claims["status_list"]["bits"] == 2
    assert pointer["uri"] in web.get("/status-lists").json["status_lists"]


def test_there_is_no_interactive_flow(web):
    for query in ("", "?response_type=code&client_id=x&redirect_uri=https://evil.test"):
        answer = web.get(f"/oauth2/authorize{query}")
        assert (answer.status_code, answer.mimetype) == (400, "text/html")
        assert "Location" not in answer.headers
        assert "evil" not in answer.get_data(as_text=True)


def test_an_implicit_task_lives_as_long_as_its_token(web):
    form = {"grant_type": "client_credentials", "resource": CRM, "scope": "contacts:read", **web.assertion("scribe")}
    answer = web.form("/oauth2/token", **form).json
    task = web.get(f"/v1/tasks/{answer['task_id']}", "scribe").json
    grant = web.get(f"/v1/grants/{answer['grant_id']}", "scribe").json
    assert task["deadline_at"] == grant["expires_at"]
    refused = web.form("/oauth2/token", **(form | web.assertion("summarizer")))
    assert (refused.status_code, refused.json["error"]) == (400, "invalid_request")


def test_introspection_says_no_more_than_a_verifier_needs(web):
    """INV-26."""
    token = web.grant(web.open_task()).json["credential"]["token"]
    shown = web.introspect(token)
    claims = jwt.decode(token, options={"verify_signature": False})
    assert shown == {"active": True, "token_type": "Bearer", **claims}
    for by in ("ledger-api", "ada", "audrey", "summarizer", "pipeline"):
        assert web.introspect(token, by=by) == {"active": False}


def test_an_idempotency_key_is_taken_on_every_post_that_creates(web):
    key = {"Idempotency-Key": "one"}
    task = web.open_task()
    for path, by, body in (
        ("/v1/tasks", "pipeline", OPEN),
        ("/v1/grants", "summarizer", {"task_id": task["id"], "resource": CRM, "scopes": ["contacts:read"]}),
    ):
        first, again = (web.post(path, by, json=body, headers=key).json for _ in range(2))
        assert (first.get("id") or first["grant"]["id"]) == (again.get("id") or again["grant"]["id"])


def test_lists_are_filtered_by_every_word_that_is_written(web):
    task = web.open_task()
    grant = web.grant(task).json["grant"]
    for query in ("state=active", f"task={task['id']}", "agent=summarizer", f"resource={CRM}"):
        assert [shown["id"] for shown in web.get(f"/v1/grants?{query}", "ada").json["items"]] == [grant["id"]], query
    for query in ("state=revoked", f"task=task_{'0' * 26}", "agent=scribe", "resource=x", "user=nobody"):
        assert web.get(f"/v1/grants?{query}", "ada").json["items"] == [], query
    for query in ("state=active", "agent=summarizer"):
        assert [shown["id"] for shown in web.get(f"/v1/tasks?{query}", "ada").json["items"]] == [task["id"]], query
