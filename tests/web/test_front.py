"""Both doors: whatever is asked, the front answers it as Flask would, to the last header."""

import json
import re

import pytest

from broker.web.app import _BUSY

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
FORM = "application/x-www-form-urlencoded"
JSON = "application/json"
CRM = "https://crm.example/api"


class Doors:
    """The same application by its front, and by Flask alone."""

    def __init__(self, web):
        self.web = web
        self.front = web.app.wsgi_app

    def ask(self, path, **request):
        by_front = self._asked(self.front, path, request)
        by_flask = self._asked(self.front._flask, path, request)
        return by_front, by_flask

    def _asked(self, door, path, request):
        self.web.app.wsgi_app = door
        try:
            answer = self.web.client.open(path, **{"method": "POST", **request})
        finally:
            self.web.app.wsgi_app = self.front
        return answer.status, sorted(answer.headers.items()), answer.get_data(as_text=True)


@pytest.fixture
def doors(web):
    return Doors(web)


@pytest.fixture
def task(web):
    return web.open_task()["id"]


def by(web, name, **more):
    return {**web.as_(name), "traceparent": TRACE, **more}


def same(answers):
    """The two answers, without what differs between any two: ids, tokens, and how long they are."""

    def plain(answer):
        status, headers, body = answer
        body = re.sub(r'"(grt_[0-9a-z]{26}|eyJ[A-Za-z0-9_.-]+|[A-Za-z0-9_-]{22})"', '"made"', body)
        return status, [pair for pair in headers if pair[0] != "Content-Length" or "made" not in body], body

    front, flask = map(plain, answers)
    assert front == flask
    return front


REFUSED = {
    "no token": {"headers": {"traceparent": TRACE}, "data": "{}", "content_type": JSON},
    "a basic scheme": {"headers": {"Authorization": "Basic eDp5", "traceparent": TRACE}, "data": ""},
    "garbage for a token": {"headers": {"Authorization": "Bearer eyJ", "traceparent": TRACE}, "data": "a=b"},
    "a query": {"query_string": "a=b", "headers": {"traceparent": TRACE}, "data": "a=b", "content_type": FORM},
    "no body": {"headers": {"traceparent": TRACE}},
    "a form of nothing": {"headers": {"traceparent": TRACE}, "data": "grant_type=x", "content_type": FORM},
    "half a form": {"headers": {"traceparent": TRACE}, "data": "%zz&&=", "content_type": FORM},
    "a long body": {"headers": {"traceparent": TRACE}, "data": "a=" + "x" * 70_000, "content_type": FORM},
    "two lengths": {"headers": {"traceparent": TRACE, "Transfer-Encoding": "chunked"}, "data": "a=b"},
    "an odd host": {"headers": {"traceparent": TRACE, "Host": "[/<>:x"}, "data": "a=b", "content_type": FORM},
    "another method": {"method": "PUT", "headers": {"traceparent": TRACE}},
    "options": {"method": "OPTIONS", "headers": {"traceparent": TRACE}},
}


@pytest.mark.parametrize("path", ["/v1/grants", "/oauth2/token", "/oauth2/introspect"])
@pytest.mark.parametrize("request_", REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_refused_alike(doors, path, request_):
    status, headers, _ = same(doors.ask(path, **request_))
    assert status[0] in "24"
    assert ("X-Trace-Id", TRACE.split("-")[1]) in headers


OF_AN_AGENT = {
    "good": {"data": lambda body: json.dumps(body), "content_type": JSON},
    "another type": {"data": lambda body: json.dumps(body), "content_type": "text/plain"},
    "a type with a parameter": {"data": lambda body: json.dumps(body), "content_type": "Application/JSON; charset=x"},
    "a member more": {"data": lambda body: json.dumps({**body, "more": 1}), "content_type": JSON},
    "a member twice": {"data": lambda body: '{"task_id":1,' + json.dumps(body)[1:], "content_type": JSON},
    "no object": {"data": lambda body: json.dumps([body]), "content_type": JSON},
    "not json": {"data": lambda body: json.dumps(body)[:-1], "content_type": JSON},
    "too long": {"data": lambda body: json.dumps({**body, "intent": "x" * 70_000}), "content_type": JSON},
    "beyond policy": {"data": lambda body: json.dumps({**body, "ttl_s": 86_400}), "content_type": JSON},
    "a query": {"data": lambda body: json.dumps(body), "content_type": JSON, "query_string": "limit=1"},
}


@pytest.mark.parametrize("request_", OF_AN_AGENT.values(), ids=OF_AN_AGENT)
def test_what_an_agent_asks_is_answered_alike(web, doors, task, request_):
    body = {"task_id": task, "resource": CRM, "scopes": ["contacts:read"]}
    request = {**request_, "data": request_["data"](body)}
    same(doors.ask("/v1/grants", headers=by(web, "summarizer"), **request))


@pytest.mark.parametrize("key", ["a-key", "a key"])
def test_an_idempotency_key_means_the_same_at_both_doors(web, doors, task, key):
    body = json.dumps({"task_id": task, "resource": CRM, "scopes": ["contacts:read"]})
    headers = by(web, "summarizer", **{"Idempotency-Key": key})
    (*_, front), (*_, flask) = doors.ask("/v1/grants", headers=headers, data=body, content_type=JSON)
    front, flask = json.loads(front), json.loads(flask)
    assert front.get("grant", {}).get("id") == flask.get("grant", {}).get("id")
    assert front.get("detail") == flask.get("detail")


def test_a_token_is_issued_and_introspected_alike(web, doors, task):
    asked = web.assertion("summarizer", grant_type="client_credentials", resource=CRM, scope="contacts:read")
    headers = {"traceparent": TRACE}
    status, _, _ = same(doors.ask("/oauth2/token", headers=headers, data={**asked, "task_id": task}))
    assert status.startswith("200")
    token = web.form("/oauth2/token", **asked, task_id=task).json["access_token"]
    for name in ("crm-api", "summarizer", "ada"):
        same(doors.ask("/oauth2/introspect", headers=by(web, name), data={"token": token}))
        same(doors.ask("/oauth2/introspect", headers=headers, data={"token": token, **web.assertion(name)}))


def test_what_breaks_is_said_alike_and_shows_nothing_of_itself(web, doors, monkeypatch):
    monkeypatch.setattr(web.house.broker.verification, "introspect", lambda *_: 1 / 0)
    status, _, body = same(doors.ask("/oauth2/introspect", headers=by(web, "crm-api"), data={"token": "x"}))
    assert status.startswith("500")
    assert "division" not in body


@pytest.mark.parametrize("path", ["/v1/grants/", "//v1/grants", "/v1/grants/..", "/v1/Grants", "/oauth2/token/x", "/"])
def test_a_path_that_is_not_exactly_one_of_its_own_goes_on_to_flask(doors, path):
    same(doors.ask(path, headers={"traceparent": TRACE}))
    assert path not in doors.front._routes


def test_every_busy_operation_has_its_way_and_nothing_else_has(doors):
    assert len(doors.front._routes) == len(_BUSY) == 3


def test_a_call_is_over_when_it_is_answered(web, doors):
    """Threads answer one call after the other: nothing of the last one may be there for the next."""
    from broker.web import context

    web.form("/oauth2/introspect", token="x", **web.assertion("crm-api"))
    assert context._answered.get() is None
