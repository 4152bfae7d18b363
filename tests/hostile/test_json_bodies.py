"""Every member of every POST under `/v1`, filled with everything it must not hold (INV-31, INV-35).

The members are those of the shapes themselves, so that a new one cannot be forgotten here.
"""

import json
import typing
from dataclasses import replace

import pytest
from pydantic import BaseModel

from broker.web import shapes
from broker.web.app import API
from tests.approvals import ASKING, apply, approve, ask, asking
from tests.break_glass import EMERGENCY, broken, review_of
from tests.hostile.conftest import Hostile, event_stream, refused, stuck_lease
from tests.hostile.corpus import (
    AXES,
    BODIES,
    MALFORMED,
    NOT_A_BOOLEAN,
    NOT_A_NUMBER_OF_SECONDS,
    NOT_A_STRING,
    TRICKS,
    at,
    leaves,
    objects,
    replaced,
)
from tests.house import CRM

OPERATIONS = {operation.name: operation for room in API for operation in room.declared if operation.body is not None}
CALLERS = (
    dict.fromkeys(("request_grant", "renew_grant", "revoke_grant", "collect_grant", "withdraw"), "summarizer")
    | {"tell_activities": "summarizer"}
    | dict.fromkeys(("revoke_along", "set_lockdown", "evaluate", "abandon_lease"), "ada")
    | dict.fromkeys(("put_policies", "replay", "send_signal", "complete_review"), "ada")
    | dict.fromkeys(("put_policies", "replay", "send_signal", "pause_event_stream", "resume_event_stream"), "ada")
    | dict.fromkeys(("approve", "deny"), "sam")
)


class Scene:
    """A task with a live grant, and the door of one operation before it."""

    def __init__(self, web, name):
        self.web, self.operation, self.by = web, OPERATIONS[name], CALLERS.get(name, "pipeline")
        # Many scenes share one house, and none of them is about limits.
        web.house.broker.issuance._limits = replace(
            web.house.broker.settings.limits,
            max_live_per_agent=100_000,
            max_open_approvals_per_agent=100_000,
            max_open_approvals_per_group=100_000,
        )
        task = web.open_task()
        grant = web.grant(task).json["grant"]
        self.path = self.operation.path.replace("{id}", self._id(task["id"], grant["id"]))
        self.body = BODIES[self.operation.body]
        if "task_id" in self.body:
            # A break-glass has tests of its own: with one it would be refused for what is beside it.
            self.body = self.body | {"task_id": task["id"], "break_glass": None}
            self.body = self.body | {"task_id": task["id"]}
        if "activities" in self.body:
            self.body = replaced(self.body, ("activities", 0, "grant_id"), grant["id"])

    def _id(self, task_id, grant_id):
        if "/leases/" in self.operation.path:
            return stuck_lease(self.web.house.broker, grant_id)
        if "/reviews/" in self.operation.path:
            return self._reviewable()
        if "/event-streams/" in self.operation.path:
            return event_stream(self.web)
        if "/approvals/" in self.operation.path or self.operation.name == "collect_grant":
            return self._waiting()
        return task_id if "/tasks/" in self.operation.path else grant_id

    def _waiting(self):
        """The id of what waits for people, or of its grant when they have said yes."""
        house = self.web.house
        apply(house, asking(house, policies=ASKING + EMERGENCY))
        case = ask(house, house.open_task())
        if self.operation.name != "collect_grant":
            return case.approval.id
        approve(house, case)
        return case.grant.id

    def _reviewable(self):
        """The id of a review that can be completed."""
        house = self.web.house
        apply(house, asking(house, policies=ASKING + EMERGENCY))
        case, _ = broken(house)
        house.broker.revocation.revoke_grant(house.caller("ada"), case.grant.id)
        return review_of(house, case)

    def send(self, body, **more):
        raw = body if isinstance(body, str | bytes) else json.dumps(body)
        return self.web.send(self.operation, self.path, self.by, raw, **more)

    def with_raw(self, path, text):
        """The body with this text in place of a member, as it is."""
        return json.dumps(replaced(self.body, path, "@@")).replace('"@@"', text)


@pytest.fixture(scope="module")
def one_web(module_house):
    """What is refused changes nothing, so one house is enough for all of it."""
    return Hostile(module_house)


@pytest.fixture(params=sorted(OPERATIONS))
def scene(request, one_web):
    made = Scene(one_web, request.param)
    before = one_web.tables()
    yield made
    assert one_web.tables() == before, "a refused request changed something"


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_the_good_request_of_each_kind_is_accepted(web, name):
    """Otherwise the refusals below would be refused for this."""
    answer = Scene(web, name).send(Scene(web, name).body)
    assert answer.status_code in (200, 201), answer.json


def test_the_good_requests_have_every_member_there_is():
    def named(model, body):
        names = {field.alias or name for name, field in model.model_fields.items()}
        if issubclass(model, BaseModel) and {"agent", "all"} <= names:
            names -= {*AXES, "all"} - {"agent"}  # exactly one of them may be there
        if model is shapes.SendSignal:
            names -= {"user"}  # likewise
        assert body.keys() == names, model
        for name, field in model.model_fields.items():
            for part in parts(field.annotation):
                if isinstance(part, type) and issubclass(part, BaseModel):
                    named(part, body[name][0] if isinstance(body[name], list) else body[name])

    def parts(annotation):
        arguments = typing.get_args(annotation)
        return [annotation] if not arguments else [found for each in arguments for found in parts(each)]

    assert {operation.body for operation in OPERATIONS.values()} == BODIES.keys()
    for model, body in BODIES.items():
        named(model, body)


def test_no_string_holds_what_would_change_a_line_a_header_or_a_query(scene):
    for path, value in leaves(scene.body):
        if not isinstance(value, str):
            continue
        # What a caller claims is free JSON: it becomes a fact for policies, and never a line of anything.
        texts = ("a\0b", "a\ud800b", "a\udc00b") if path[0] == "context" else MALFORMED
        for text in texts:
            refused(scene.send(replaced(scene.body, path, text)), member=path[0])


def test_no_free_member_is_called_what_would_change_a_line_or_a_query(scene):
    for free in ("labels", "context", "parameters"):
        if free in scene.body:
            for text in MALFORMED:
                problem = refused(scene.send(scene.body | {free: {text: "x"}}))
                assert problem["member"].startswith(free) or problem["member"] == text[:60], problem


def test_a_string_is_a_string(scene):
    for path, value in leaves(scene.body):
        if isinstance(value, str) and path[0] != "context":
            for wrong in NOT_A_STRING:
                refused(scene.send(replaced(scene.body, path, wrong)), member=path[0], status=(400,))
            if path[0] != "labels":
                refused(scene.send(replaced(scene.body, path, "")), status=(400,))


def test_a_duration_is_a_whole_number_of_seconds_within_bounds(scene):
    """INV-09."""
    for path, value in leaves(scene.body):
        if type(value) is int:
            for text in NOT_A_NUMBER_OF_SECONDS:
                unreadable = text in ("060", "0x3c", "+60", "6_0")
                refused(scene.send(scene.with_raw(path, text)), member=None if unreadable else path[0], status=(400,))


def test_a_boolean_is_a_boolean(scene):
    for path, value in leaves(scene.body):
        if type(value) is bool:
            for text in NOT_A_BOOLEAN:
                refused(scene.send(scene.with_raw(path, text)), member=path[0], status=(400,))


def test_a_list_is_a_list_that_is_neither_empty_nor_endless(scene):
    for name, value in scene.body.items():
        if isinstance(value, list):
            for wrong in (value[0], {"0": value[0]}, [value], [None], value * 101):
                refused(scene.send(scene.body | {name: wrong}), member=name, status=(400,))
            if name != "resources":
                refused(scene.send(scene.body | {name: []}), member=name, status=(400,))
    for free in ("labels", "context", "parameters"):
        if free in scene.body:
            many = {str(number): "x" for number in range(33)}
            for wrong in ([], "x", [["team", "crm"]], many):
                refused(scene.send(scene.body | {free: wrong}), member=free, status=(400,))


def test_an_unknown_member_is_refused_by_its_name_wherever_it_is(scene):
    for path in objects(scene.body):
        for name in ("unknown", "Purpose", "__proto__", "constructor", "ttl", "on_behalf_of_", "../x", "{{7*7}}"):
            body = replaced(scene.body, path, at(scene.body, path) | {name: "x"})
            problem = refused(scene.send(body), status=(400,))
            assert problem["member"].endswith(name), problem
            assert "leave it out" in problem["detail"]


def test_a_member_that_is_there_twice_is_refused_by_its_name_wherever_it_is(scene):
    for path in [*objects(scene.body), ("labels",), ("context",)]:
        if path and path[0] not in scene.body:
            continue
        for name in at(scene.body, path):
            found = json.dumps(at(scene.body, path))
            for first in (json.dumps(name), "".join(f"\\u{ord(letter):04x}" for letter in name).join('""')):
                twice = "{" + f"{first}: {json.dumps(at(scene.body, path)[name])}, " + found[1:]
                raw = twice if not path else scene.with_raw(path, twice)
                problem = refused(scene.send(raw), member=name, status=(400,))
                assert "twice" in problem["detail"]


NO_OBJECT = (
    b"", b" ", b"null", b"true", b"1", b'"{}"', b"[]", b"[{}]", b"{", b"{}}", b"{} {}", b"{'a': 1}", b"{a: 1}",
    b'{"a": 1,}', b"// {}", b"{}\x00", b"\x00{}", b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"\xff", b"\xc0\xaf",
    b'{"a": "\xed\xa0\x80"}', b'{"a": "' + b"x" * 70_000 + b'"}', b"[" * 60_000, b'{"a":' * 10_000,
    b"[" * 33 + b"]" * 33, b"<x/>", b"a=b", b"%PDF-1.4", b"PK\x03\x04", b"GET / HTTP/1.1\r\n\r\n",
)  # fmt: skip


def test_what_is_no_json_object_is_refused(scene):
    for raw in NO_OBJECT:
        if not raw and scene.operation.body.__name__ in ("WithReason", "RenewGrant", "Approve", "CollectGrant"):
            continue  # an absent body says nothing, and nothing is what these may say
        refused(scene.send(raw), status=(400, 413))


NOT_JSON = (
    None, "", "text/plain", "text/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
    "application/xml", "application/problem+json", "application/jsonp", "application/json/../x", "json", "*/*",
    "application/json, text/plain", "text/plain; application/json", "application/octet-stream",
)  # fmt: skip


def test_a_body_of_another_content_type_is_refused(scene):
    for content_type in NOT_JSON:
        problem = refused(scene.send(scene.body, content_type=content_type), status=(415,))
        assert problem["detail"] == "send the body as application/json"


def test_a_body_in_another_encoding_is_refused_whatever_it_says_it_is(scene):
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-7", "latin-1", "cp037"):
        raw = json.dumps({"ä": scene.body}, ensure_ascii=False).encode(encoding)
        for charset in (encoding, "utf-8", "none"):
            refused(scene.send(raw, content_type=f"application/json; charset={charset}"), status=(400,))


def test_a_query_is_refused_where_there_is_none(scene):
    path = scene.path
    for query in ("?a=b", "?reason=x", "?access_token=x", "?..%2f=1", "?%00=1", "?a=b&a=c"):
        scene.path = path + query
        refused(scene.send(scene.body), status=(400,))


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_a_trick_is_text_like_any_other(web, name):
    """It is stored and answered as it came, or refused as a name of nothing; nothing ever acts on it (INV-31)."""
    scene = Scene(web, name)
    for path, value in leaves(scene.body):
        for text in TRICKS if isinstance(value, str) else ():
            answer = scene.send(replaced(scene.body, path, text))
            if answer.status_code >= 400:
                refused(answer)
                # Some of them end what they are sent to, and then there must be another.
            else:
                assert answer.mimetype == "application/json"
                assert "49" not in answer.json.get("purpose", "")
                if path[0] in ("purpose", "labels") and "purpose" in answer.json:
                    assert at(answer.json, path) == text
                if path[0] == "reason" and "set_at" in answer.json:
                    assert answer.json["reason"] == text
            if "/{id}/" in scene.operation.path or "lockdown" in name or name == "revoke_along":
                scene = Scene(web, name)
    assert web.get("/v1/tasks", "ada").status_code == 200


@pytest.mark.parametrize("axis", AXES)
def test_the_longest_value_of_each_axis_fits_every_column_it_ends_in(web_on_both, axis):
    """SQLite keeps whatever comes; PostgreSQL refuses what is longer than its column, and that would be a 5xx."""
    web = web_on_both
    for length in (255, 256, 1000, 1001):
        for path, more in (("/v1/revocations", {"lockdown": True}), ("/v1/lockdowns", {})):
            answer = web.post(path, "ada", json={axis: "x" * length, "reason": "r" * 1000, **more})
            if answer.status_code >= 400:
                refused(answer, member=axis, status=(400,))
                assert length > 255


def test_the_longest_text_of_each_member_fits_every_column_it_ends_in(web_on_both):
    """Counted in characters and not in bytes, by both databases."""
    web = web_on_both
    longest = "😀" * 1000
    labels = {"ä" * 255: "😀" * 255} | {str(number): "x" * 255 for number in range(31)}
    task = web.open_task(purpose=longest, labels=labels)
    assert (task["purpose"], task["labels"]) == (longest, labels)
    context = {f"{number}": ["😀" * 100, 1.5, -0.0, 1e308, 2**63 - 1, None, {"a": {"b": []}}] for number in range(32)}
    answer = web.grant(task, intent=longest, context=context)
    assert answer.status_code == 201, answer.json
    grant = answer.json["grant"]["id"]
    assert web.post(f"/v1/grants/{grant}/revoke", "pipeline", json={"reason": longest}).status_code == 200
    assert web.get(f"/v1/grants/{grant}", "summarizer").json["reason"] == longest
    assert web.post(f"/v1/tasks/{task['id']}/fail", "pipeline", json={"reason": longest}).status_code == 200
    assert web.get(f"/v1/audit?task={task['id']}", "audrey").json["items"][0]["reason"] == longest


def test_a_duration_beyond_the_brokers_own_bound_names_it(web):
    answer = web.post("/v1/tasks", "pipeline", json={"purpose": "x", "agents": ["summarizer"], "deadline_s": 86_401})
    assert "86400" in refused(answer, member="deadline_s", status=(400,))["detail"]


def test_a_resource_that_is_named_twice_in_a_ceiling_is_refused(web):
    twice = [{"resource": CRM, "scopes": ["contacts:read"]}] * 2
    body = {"purpose": "x", "agents": ["summarizer"], "deadline_s": 60, "resources": twice}
    refused(web.post("/v1/tasks", "pipeline", json=body), member="resources", status=(400,))
