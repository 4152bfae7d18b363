"""Approvals over HTTP: what waits, what an approver is shown, polling, and deferred tokens."""

import threading

import pytest

from tests.approvals import ASKING, apply, asking, person
from tests.house import CRM, LEDGER

DEFERRED = "urn:ietf:params:oauth:grant-type:deferred"
BOTH = ["contacts:read", "contacts:write"]


@pytest.fixture
def web(web):
    apply(web.house, asking(web.house))
    return web


def ask(web, task=None, **more):
    answer = web.grant(task or web.open_task(), **{"scopes": BOTH} | more)
    assert answer.status_code == 202, answer.json
    return answer.json


def say(web, pending, verb, by, **body):
    return web.post(f"/v1/approvals/{pending['approval']['id']}/{verb}", by, json=body)


def collect(web, pending, by="summarizer", **body):
    return web.post(f"/v1/grants/{pending['grant']['id']}/credential", by, json=body)


def test_a_request_waits_is_approved_and_is_collected(web):
    answer = web.grant(web.open_task(), scopes=BOTH, ttl_s=120, intent="tidy up")
    assert answer.status_code == 202
    assert answer.headers["Retry-After"] == "5"
    pending = answer.json
    assert (pending["grant"]["state"], pending["grant"]["live"]) == ("pending", False)
    assert "credential" not in pending
    assert collect(web, pending).status_code == 409
    approved = say(web, pending, "approve", "sam", scopes=["contacts:read"], reason="reading is enough")
    assert approved.status_code == 200
    assert approved.json["state"] == "approved"
    assert approved.json["left"] == {"scopes": ["contacts:read"], "ttl_s": 120}
    assert approved.json["collect_by"] is not None
    collected = collect(web, pending)
    assert collected.status_code == 200
    assert collected.json["grant"]["scopes"] == ["contacts:read"]
    assert web.introspect(collected.json["credential"]["token"])["scope"] == "contacts:read"
    again = collect(web, pending)
    assert (again.status_code, again.json["code"]) == (409, "conflict")


def test_what_is_dangerous_comes_first_and_in_the_brokers_words(web):
    pending = ask(web, ttl_s=90, intent="everything is harmless", context={"customer": 7, "urgent": "yes"})
    shown = web.get(f"/v1/approvals/{pending['approval']['id']}", "sam")
    names = list(shown.json)
    assert names[:4] == ["id", "state", "break_glass", "opens"] and names[-1] == "unverified"
    assert shown.json["opens"] == {
        "resource": CRM,
        "sensitivity": "internal",
        "environment": "production",
        "scopes": BOTH,
        "ttl_s": 90,
        "user": None,
        "sender_bound": False,
        "provider": "jwt",
    }
    assert shown.json["requester"]["owner"] == "crm-team"
    assert shown.json["unverified"] == {
        "break_glass": None,
        "intent": "everything is harmless",
        "claims": {"customer": "7", "urgent": "yes"},
        "purpose": "summarise the leads of May",
    }
    assert shown.json["request_hash"] == pending["approval"]["request_hash"]


HOSTILE = [
    "\x1b[2J\x1b[1;1Happroved",
    "read\u202eylno",
    "line one\r\nsensitivity: public",
    "\x07\x08\x9b31m",
    "zero\u200bwidth\ufeff",
    "\ud800",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_words_of_an_agent_are_escaped_for_the_approver(web, text):
    """INV-31: whatever a claim holds, it stays a claim and on its line."""
    task = web.open_task()
    body = {"task_id": task["id"], "resource": CRM, "scopes": BOTH, "context": {"note": text}}
    answer = web.post("/v1/grants", "summarizer", json=body)
    if answer.status_code == 400:
        return  # what no JSON text may hold
    shown = web.get(f"/v1/approvals/{answer.json['approval']['id']}", "sam")
    for words in shown.json["unverified"]["claims"].values():
        assert words.isprintable() and words.isascii()
    assert shown.json["opens"]["sensitivity"] == "internal"


def test_long_words_are_cut(web):
    pending = ask(web, intent="a" * 1000, context={"note": "b" * 5000, "n" * 255: {"deep": ["c" * 3000]}})
    unverified = web.get(f"/v1/approvals/{pending['approval']['id']}", "sam").json["unverified"]
    assert unverified["intent"] == "a" * 300 + "…"
    assert max(map(len, [*unverified["claims"], *unverified["claims"].values()])) <= 101


@pytest.mark.parametrize("by", ["scribe", "dana", "other-pipeline", "crm-api"])
def test_who_may_not_see_an_approval_is_told_there_is_none(web, by):
    """INV-28."""
    pending = ask(web)
    path = f"/v1/approvals/{pending['approval']['id']}"
    unknown = "/v1/approvals/apr_" + "0" * 26
    assert web.get(path, by).status_code == web.get(unknown, by).status_code == 404
    for verb in ("approve", "deny", "withdraw"):
        assert web.post(f"{path}/{verb}", by, json={}).status_code == 404
    assert web.get("/v1/approvals", by).json["items"] == []
    assert collect(web, pending, by=by).status_code == 404


@pytest.mark.parametrize(("by", "status"), [("summarizer", 403), ("olga", 403), ("ada", 403), ("sam", 200)])
def test_whose_yes_counts(web, by, status):
    answer = say(web, ask(web), "approve", by)
    assert answer.status_code == status
    assert "decision" in answer.json or status == 200


def test_nothing_is_decided_by_a_get(web):
    pending = ask(web)
    for verb in ("approve", "deny", "withdraw"):
        assert web.get(f"/v1/approvals/{pending['approval']['id']}/{verb}", "sam").status_code == 405
    assert web.get(f"/v1/approvals/{pending['approval']['id']}", "sam").json["state"] == "open"


def test_a_list_has_the_approvers_own_newest_first(web):
    first, second = ask(web), ask(web)
    say(web, first, "deny", "sue", reason="no")
    listed = web.get("/v1/approvals?limit=1", "sam").json
    assert [item["id"] for item in listed["items"]] == [second["approval"]["id"]]
    rest = web.get(f"/v1/approvals?limit=1&cursor={listed['next_cursor']}", "sam").json
    assert [(item["id"], item["state"]) for item in rest["items"]] == [(first["approval"]["id"], "denied")]
    assert len(web.get("/v1/approvals?state=open", "sam").json["items"]) == 1
    assert web.get("/v1/approvals?state=undecided", "sam").status_code == 400
    assert web.get("/v1/approvals?cursor=bm8", "sam").status_code == 400


def test_what_widens_is_a_400_with_its_member(web):
    pending = ask(web, ttl_s=60)
    for body, member in (({"scopes": [*BOTH, "entries:read"]}, "scopes"), ({"ttl_s": 61}, "ttl_s")):
        refused = say(web, pending, "approve", "sam", **body)
        assert (refused.status_code, refused.json["member"]) == (400, member)
    assert web.get(f"/v1/approvals/{pending['approval']['id']}", "sam").json["votes"] == []


def test_a_limit_is_a_429_and_says_when_to_come_again(web):
    for _ in range(10):
        ask(web)
    answer = web.grant(web.open_task(), scopes=BOTH)
    assert (answer.status_code, answer.json["code"]) == (429, "limit_exceeded")
    assert answer.headers["Retry-After"] == "60"


# --- Waiting ---


def test_a_poll_that_may_wait_answers_when_it_is_decided(web):
    pending = ask(web)
    answered = []

    def poll():
        client = web.app.test_client()
        path = f"/v1/grants/{pending['grant']['id']}"
        answered.append(client.get(path, headers=web.as_("summarizer", Prefer="wait=20")).json)

    waiting = threading.Thread(target=poll)
    waiting.start()
    assert say(web, pending, "approve", "sam").status_code == 200
    waiting.join(60)
    assert [grant["state"] for grant in answered] == ["approved"]


@pytest.mark.parametrize("prefer", ["", "wait", "wait=soon", "wait=-1", "respond-async", "wait=0", "wait=²"])
def test_a_preference_that_is_none_does_not_wait(web, monkeypatch, prefer):
    pending = ask(web)
    waited = []
    monkeypatch.setattr(
        type(web.house.broker.waiting),
        "until",
        lambda _self, look, _settled, *, by, at_most_s: waited.append(at_most_s) or look(),
    )
    web.client.get(
        f"/v1/grants/{pending['grant']['id']}", headers=web.as_("summarizer", Prefer=prefer.encode().decode("latin1"))
    )
    assert waited == [0]


@pytest.mark.parametrize(
    ("prefer", "at_most_s"), [("wait=20", 20), ("respond-async, WAIT = 7", 7), ("wait=999999", 20)]
)
def test_nobody_waits_longer_than_twenty_seconds(web, monkeypatch, prefer, at_most_s):
    pending = ask(web)
    waited = []
    monkeypatch.setattr(
        type(web.house.broker.waiting),
        "until",
        lambda _self, look, _settled, *, by, at_most_s: waited.append(at_most_s) or look(),
    )
    web.client.get(f"/v1/grants/{pending['grant']['id']}", headers=web.as_("summarizer", Prefer=prefer))
    assert waited == [at_most_s]


# --- Deferred tokens ---


def token(web, task, by="summarizer", headers=None, **more):
    given = {"grant_type": "client_credentials", "resource": CRM, "scope": " ".join(BOTH), "task_id": task["id"]}
    return web.form("/oauth2/token", headers=headers, **web.assertion(by, **given | more))


def poll(web, code, by="summarizer", **more):
    return web.form("/oauth2/token", **web.assertion(by, grant_type=DEFERRED, deferral_code=code, **more))


def deferred(web, task=None, **more):
    answer = token(web, task or web.open_task(), completion_mode="deferred", **more)
    assert (answer.status_code, answer.json["error"]) == (400, "authorization_pending"), answer.json
    return answer.json


def approve_by_grant(web, grant_id, by="sam", verb="approve"):
    [found] = [item for item in web.get("/v1/approvals", by).json["items"] if item["grant_id"] == grant_id]
    return web.post(f"/v1/approvals/{found['id']}/{verb}", by, json={})


def test_a_client_that_did_not_opt_in_is_told_that_approval_is_required(web):
    answer = token(web, web.open_task())
    assert (answer.status_code, answer.json["error"]) == (400, "invalid_scope")
    assert "approval is required" in answer.json["error_description"]
    assert web.get("/v1/approvals", "sam").json["items"] == []


def test_a_deferred_token_is_polled_for(web):
    answer = deferred(web)
    assert answer.keys() == {"error", "error_description", "deferral_code", "expires_in", "interval"}
    assert (answer["expires_in"], answer["interval"]) == (3600, 5)
    code = answer["deferral_code"]
    assert poll(web, code).json["error"] == "authorization_pending"
    assert poll(web, code).json["error"] == "slow_down"
    web.house.clock.forward(seconds=5)
    again = poll(web, code)
    assert again.json["error"] == "authorization_pending"
    assert again.json["expires_in"] == 3595
    assert again.headers["Cache-Control"] == "no-store"
    assert approve_by_grant(web, code).status_code == 200
    got = poll(web, code)
    assert got.status_code == 200, got.json
    assert got.json["scope"] == "contacts:read contacts:write"
    assert web.introspect(got.json["access_token"])["active"]
    assert poll(web, code).json["error"] == "invalid_grant"


def test_a_denied_one_is_access_denied_and_a_late_one_expired_token(web):
    denied, withdrawn, late, uncollected = (deferred(web)["deferral_code"] for _ in range(4))
    approve_by_grant(web, denied, verb="deny")
    approve_by_grant(web, withdrawn, by="summarizer", verb="withdraw")
    approve_by_grant(web, uncollected)
    assert poll(web, denied).json["error"] == "access_denied"
    assert poll(web, withdrawn).json["error"] == "access_denied"
    web.house.clock.forward(seconds=3600)
    assert poll(web, late).json["error"] == "expired_token"
    assert poll(web, uncollected).json["error"] == "expired_token"
    web.house.broker.sweeper.sweep()
    assert poll(web, late).json["error"] == "expired_token"


def test_a_code_is_of_use_to_its_client_alone(web):
    code = deferred(web)["deferral_code"]
    for other in (poll(web, code, by="scribe"), poll(web, code[:-1] + "0"), poll(web, "no code"), poll(web, "../x")):
        assert (other.status_code, other.json["error"]) == (400, "invalid_grant")
    assert poll(web, "").json["error"] == "invalid_request"


def test_what_a_client_cannot_mean_is_refused(web):
    answer = token(web, web.open_task(), completion_mode="later")
    assert (answer.status_code, answer.json["error"]) == (400, "invalid_request")


def test_opting_in_changes_nothing_where_nobody_is_asked(web):
    answer = token(web, web.open_task(), scope="contacts:read", completion_mode="deferred")
    assert answer.status_code == 200
    refused = token(web, web.open_task(), completion_mode="deferred", resource="https://nowhere.example")
    assert refused.json["error"] == "invalid_target"


def test_who_cannot_authenticate_as_a_client_polls_with_its_assertion(web):
    task = web.open_task()
    bearer = "urn:ietf:params:oauth:grant-type:jwt-bearer"
    given = {"resource": CRM, "scope": " ".join(BOTH), "task_id": task["id"], "completion_mode": "deferred"}
    code = web.form("/oauth2/token", grant_type=bearer, assertion=web.house.token("summarizer"), **given).json[
        "deferral_code"
    ]
    approve_by_grant(web, code)
    got = web.form("/oauth2/token", grant_type=DEFERRED, assertion=web.house.token("summarizer"), deferral_code=code)
    assert got.status_code == 200, got.json


def test_what_policy_forbids_meanwhile_is_access_denied(web):
    code = deferred(web)["deferral_code"]
    approve_by_grant(web, code)
    forbidding = ASKING + '@id("freeze") forbid (principal, action == Action::"contacts:write", resource);'
    apply(web.house, asking(web.house, policies=forbidding))
    assert poll(web, code).json["error"] == "access_denied"


def test_the_metadata_lists_the_grant_type(web):
    document = web.get("/.well-known/oauth-authorization-server").json
    assert DEFERRED in document["grant_types_supported"]


def test_an_approver_by_another_name_sees_what_their_group_is_asked(web):
    apply(web.house, asking(web.house, people=(person("zoe", "security"), person("zed", "security"))))
    pending = ask(web, resource=LEDGER, scopes=["entries:read"])
    assert say(web, pending, "approve", "zoe").json["needs"][0]["approved"] == 1
    assert say(web, pending, "approve", "zed").json["state"] == "approved"
