import asyncio
import copy
import inspect
import json
import logging
import pickle
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from urllib.parse import parse_qs

import httpx
import pytest

from broker import sdk
from broker.sdk import AsyncClient, Client, DpopKey
from broker.sdk.exchange import origin_of

TOKEN = "eyJhbGciOi.workload-token.c2lnbmF0dXJl"
CUT = None


@pytest.fixture(autouse=True)
def cut(server):
    global CUT
    CUT = server.CUT


def test_a_task_is_opened_with_what_was_given_and_nothing_else(client, server, a):
    server.answers((201, a.task()))
    task = client.open_task("summarize leads", ["summarizer"], 3600, resources={"urn:x": ["read"]})
    sent = server.seen[0]
    assert (sent.method, sent.path) == ("POST", "/v1/tasks")
    assert sent.json() == {
        "purpose": "summarize leads",
        "agents": ["summarizer"],
        "deadline_s": 3600,
        "resources": [{"resource": "urn:x", "scopes": ["read"]}],
    }
    assert sent.headers["Authorization"] == f"Bearer {TOKEN}"
    assert sent.headers["User-Agent"].startswith("agent-credential-broker-sdk/")
    assert task.agents == ("summarizer",)
    assert task.deadline_at - task.created_at == timedelta(hours=1)
    assert task.created_at.utcoffset() == timedelta(0)


@pytest.mark.parametrize(
    ("verb", "arguments", "request_line"),
    [
        ("task", ("task_1",), "GET /v1/tasks/task_1"),
        ("heartbeat", ("task_1",), "POST /v1/tasks/task_1/heartbeat"),
        ("grant", ("grt_1",), "GET /v1/grants/grt_1"),
        ("complete_task", ("task_1",), "POST /v1/tasks/task_1/complete"),
        ("fail_task", ("task_1", "why"), "POST /v1/tasks/task_1/fail"),
        ("cancel_task", ("task_1",), "POST /v1/tasks/task_1/cancel"),
        ("receipt", ("task_1",), "GET /v1/tasks/task_1/receipt"),
        ("revoke_grant", ("grt_1",), "POST /v1/grants/grt_1/revoke"),
    ],
)
def test_verbs_ask_where_the_protocol_says(client, server, a, verb, arguments, request_line):
    answer = {"task": a.task(), "heartbeat": a.task(), "grant": a.grant()}.get(verb, a.receipt())
    server.answers(answer)
    found = getattr(client, verb)(*arguments)
    assert f"{server.seen[0].method} {server.seen[0].path}" == request_line
    assert found.raw == answer


def test_a_receipt_says_what_is_still_exposed_and_until_when(client, server, a):
    server.answers(a.receipt())
    receipt = client.complete_task("task_1")
    assert receipt.totals.outstanding == 1
    assert receipt.grants[0].exposed_until == datetime(2026, 3, 1, 12, 0, 15, tzinfo=UTC)
    assert receipt.grants[0].confirmed_dead_at is None
    assert receipt.jws == "a.b.c"


def test_unknown_members_are_kept_and_missing_ones_named(client, server, a):
    server.answers(a.task(mood="good"), {"id": "task_1"})
    assert client.task("task_1").raw["mood"] == "good"
    with pytest.raises(sdk.NotTheBroker, match="the task's state is missing"):
        client.task("task_1")


@pytest.mark.parametrize("live", [None, "true", 1])
def test_a_grant_is_live_only_where_the_broker_says_true(client, server, a, live):
    server.answers(a.grant(live=live), {"active": live})
    assert client.grant("grt_1").live is False
    assert client.introspect("some.token").active is False


def test_lists_are_read_page_by_page(client, server, a):
    server.answers(
        {"items": [a.task(id="task_1"), a.task(id="task_2")], "next_cursor": "Zg=="},
        {"items": [a.task(id="task_3")], "next_cursor": None},
    )
    found = client.tasks(state="active", page_size=2)
    assert server.seen == []
    assert [task.id for task in found] == ["task_1", "task_2", "task_3"]
    assert [seen.path for seen in server.seen] == [
        "/v1/tasks?state=active&limit=2",
        "/v1/tasks?state=active&limit=2&cursor=Zg%3D%3D",
    ]


def test_a_list_that_goes_in_circles_is_left(client, server, a):
    page = {"items": [a.task()], "next_cursor": "x"}
    server.answers(page, page, page)
    with pytest.raises(sdk.NotTheBroker, match="same page"):
        list(client.tasks())


def test_audit_and_policies_are_read(client, server, a):
    event = {"id": "evt_1", "at": a.at(), "type": "grant.issued", "actor": "summarizer", "data": {"n": 1}}
    version = {"version": 3, "sha256": "ab", "applied_at": a.at(), "applied_by": "boot"}
    server.answers({"items": [event], "next_cursor": None}, {"items": [version], "next_cursor": None})
    assert [found.type for found in client.audit(type="grant.issued", grant="grt_1")] == ["grant.issued"]
    assert server.seen[0].path == "/v1/audit?type=grant.issued&grant=grt_1"
    assert next(client.policies()).version == 3


def test_a_revocation_is_a_dry_run_unless_said_otherwise(client, server, a):
    answer = {
        "id": None,
        "axis": "agent",
        "value": "x",
        "dry_run": True,
        "grants": 2,
        "by_agent": {"x": 2},
        "samples": [a.grant()],
        "lockdown": None,
        "receipt": None,
    }
    server.answers(answer, answer | {"dry_run": False, "receipt": a.receipt("revoked")})
    assert client.revoke("agent", "x", "leaked").dry_run
    assert server.seen[0].json() == {"agent": "x", "reason": "leaked", "dry_run": True, "lockdown": False}
    assert client.revoke("agent", "x", "leaked", dry_run=False).receipt.outcome == "revoked"
    with pytest.raises(sdk.Invalid, match="'dry_run' is not an axis"):
        client.revoke("dry_run", "x", "leaked")


def test_lockdowns_are_set_listed_and_lifted(client, server, a):
    lockdown = {"id": "lck_1", "axis": "agent", "value": "x", "reason": "r", "set_at": a.at(), "set_by": "root"}
    server.answers((201, lockdown), {"items": [lockdown], "next_cursor": None}, lockdown | {"lifted_at": a.at()})
    assert client.set_lockdown("agent", "x", "r").set_by == "root"
    assert [found.id for found in client.lockdowns()] == ["lck_1"]
    assert client.lift_lockdown("lck_1").lifted_at is not None
    assert [seen.method for seen in server.seen] == ["POST", "GET", "DELETE"]


def lease(a, **members):
    return {
        "id": "lea_1",
        "grant_id": "grt_1",
        "provider": "vault",
        "state": "stuck",
        "revocation_class": "hard",
        "owed_since": a.at(-60),
        "attempts": 6,
        "next_attempt_at": a.at(30),
        "last_error": "503: sealed",
        "created_at": a.at(-300),
        "expires_at": a.at(300),
        "confirmed_dead_at": None,
        "abandoned_at": None,
        "abandoned_by": None,
        "abandoned_reason": None,
    } | members


def test_leases_are_listed_shown_and_abandoned(client, server, a, time):
    given_up = lease(a, abandoned_at=a.at(), abandoned_by="ada", abandoned_reason="scrapped")
    server.answers({"items": [lease(a)], "next_cursor": None}, lease(a), given_up)
    [found] = client.leases(state="stuck", provider="vault", grant="grt_1")
    assert (found.attempts, found.last_error, found.confirmed_dead_at) == (6, "503: sealed", None)
    assert found.owed_since == time.at - timedelta(seconds=60)
    assert client.lease("lea_1") == found
    assert client.abandon_lease("lea_1", "scrapped").abandoned_by == "ada"
    assert [f"{seen.method} {seen.path}" for seen in server.seen] == [
        "GET /v1/leases?state=stuck&provider=vault&grant=grt_1",
        "GET /v1/leases/lea_1",
        "POST /v1/leases/lea_1/abandon",
    ]
    assert server.seen[2].json() == {"reason": "scrapped"}
    with pytest.raises(sdk.Invalid, match="not an id"):
        client.lease("../tasks")


def test_a_grant_says_what_is_owed_for_it(client, server, a):
    owed = {"id": "lea_1", "state": "revoking", "attempts": 2, "confirmed_dead_at": None, "last_error": "503"}
    server.answers(a.grant(lease=owed | {"abandoned_at": None}), a.grant(), a.grant(lease={"id": "lea_1"}))
    assert client.grant("grt_1").lease.state == "revoking"
    assert client.grant("grt_1").lease is None
    with pytest.raises(sdk.NotTheBroker, match="the lease's state is missing"):
        client.grant("grt_1")


def test_a_secret_from_outside_is_asked_for_with_its_parameters_and_never_shown(client, server, a):
    server.answers((201, a.secret(password="hunter2")))
    grant, credential = client.request_grant("task_1", "urn:mtls", ["connect"], parameters={"csr": "-----BEGIN"})
    assert server.seen[0].json()["parameters"] == {"csr": "-----BEGIN"}
    assert (credential.type, credential.expires_at) == ("database", grant.expires_at)
    assert credential.reveal_data() == {"username": "jit-1", "password": "hunter2"}
    with pytest.raises(TypeError, match="reveal_data"):
        credential.reveal()
    shown = f"{credential} {credential!r} {credential.data} {vars(credential)} {grant!r}"
    assert "hunter2" not in shown and "jit-1" not in shown
    with pytest.raises(TypeError):
        pickle.dumps(credential)
    with pytest.raises(TypeError):
        copy.deepcopy(credential)


def test_policy_is_evaluated_without_issuing(client, server):
    server.answers({"outcome": "deny", "policies": ["p"], "policy_version": 2, "reasons": ["no"]})
    decision = client.evaluate_policy("summarizer", "urn:x", ["read"], ttl_s=60, sender_bound=False)
    assert (decision.outcome, decision.policy_version) == ("deny", 2)
    assert server.seen[0].json()["sender_bound"] is False


def test_introspection_authenticates_by_assertion(client, server):
    server.answers({"active": True, "scope": "read"})
    assert client.introspect("some.access.token").raw["scope"] == "read"
    form = parse_qs(server.seen[0].body.decode())
    assert form["client_assertion"] == [TOKEN]
    assert form["client_assertion_type"] == ["urn:ietf:params:oauth:client-assertion-type:jwt-bearer"]
    assert form["token"] == ["some.access.token"]
    assert "Authorization" not in server.seen[0].headers


def test_a_token_comes_from_the_token_endpoint_and_is_never_asked_for_twice(client, server, time):
    server.answers({"access_token": "a.b.c", "token_type": "Bearer", "expires_in": 300}, CUT, (503, {}), (429, {}))
    credential = client.token("urn:x", ["read", "write"], task_id="task_1")
    assert credential.reveal() == "a.b.c"
    assert credential.expires_at == time.at + timedelta(seconds=300)
    form = parse_qs(server.seen[0].body.decode())
    assert (form["scope"], form["task_id"], form["resource"]) == (["read write"], ["task_1"], ["urn:x"])
    for error in (sdk.Unreachable, sdk.Unreachable, sdk.Limited):
        with pytest.raises(error):
            client.token("urn:x", "read")
    assert len(server.seen) == 4
    assert time.slept == []


# What is tried again, and what is not


def test_a_cut_connection_is_tried_again_with_the_same_idempotency_key(client, server, a):
    server.answers(CUT, CUT, (201, a.issued()))
    grant, credential = client.request_grant("task_1", "https://crm.example/api", ["contacts:read"])
    assert (grant.id, credential.reveal()) == ("grt_1", "first.secret.token")
    keys = {seen.headers["Idempotency-Key"] for seen in server.seen}
    assert len(server.seen) == 3
    assert len(keys) == 1


def test_two_requests_have_two_idempotency_keys(client, server, a):
    server.answers((201, a.task()), (201, a.task()))
    client.open_task("x", ["y"], 60)
    client.open_task("x", ["y"], 60)
    assert server.seen[0].headers["Idempotency-Key"] != server.seen[1].headers["Idempotency-Key"]


def test_retry_after_is_waited_for(client, server, a, time):
    server.answers(
        (503, a.problem(503, "unavailable"), {"Retry-After": "7"}), (429, {}, {"Retry-After": "3"}), a.task()
    )
    assert client.task("task_1").id == "task_1"
    assert time.slept == [7, 3]


def test_retry_after_as_a_date_is_read_by_the_brokers_clock(client, server, a, time):
    server.date_is_off_by_s = 5000
    at = format_datetime(time.at + timedelta(seconds=5004), usegmt=True)
    server.answers((503, {}, {"Retry-After": at}), a.task())
    client.task("task_1")
    assert time.slept == [4]


def test_what_the_system_outside_refused_is_not_asked_for_again(client, server, a, time):
    server.answers((503, a.problem(503, "provider_refused"), {"Retry-After": "1"}), a.grant())
    with pytest.raises(sdk.Unreachable) as error:
        client.request_grant("task_1", "urn:db:orders", ["select"])
    assert error.value.code == "provider_refused"
    assert (len(server.seen), time.slept) == (1, [])


def test_a_wait_beyond_the_deadline_is_not_begun(client, server, a, time):
    server.answers((429, a.problem(429, "limit_exceeded"), {"Retry-After": "21"}))
    with pytest.raises(sdk.Limited) as error:
        client.task("task_1")
    assert error.value.retry_after_s == 21
    assert time.slept == []
    assert len(server.seen) == 1


def test_trying_again_ends_at_the_deadline_with_jitter_spreading_the_tries(client, server, time):
    server.answers(*[(503, {})] * 50)
    time.chance = 0.99
    with pytest.raises(sdk.Unreachable):
        client.task("task_1")
    assert sum(time.slept) < 20
    assert time.slept[:3] == pytest.approx([0.2475, 0.495, 0.99])
    assert 5 < len(server.seen) <= 10


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (400, "invalid_request", sdk.Invalid),
        (401, "unauthenticated", sdk.NotAuthenticated),
        (403, "policy_denied", sdk.Refused),
        (404, "not_found", sdk.NotFound),
        (409, "conflict", sdk.Conflict),
        (413, "too_large", sdk.Invalid),
        (500, "internal", sdk.BrokerError),
    ],
)
def test_a_refusal_is_final_and_says_why(client, server, a, status, code, error):
    server.answers((status, a.problem(status, code, member="ttl_s", trace_id="t1")))
    with pytest.raises(error, match="A title: this is why") as raised:
        client.heartbeat("task_1")
    assert (raised.value.code, raised.value.status, raised.value.member) == (code, status, "ttl_s")
    assert raised.value.trace_id == "t1"
    assert len(server.seen) == 1


def test_a_refusal_carries_the_decision_and_survives_pickling(client, server, a):
    decision = {"outcome": "deny", "reasons": ["at most 60 s"]}
    server.answers((403, a.problem(403, "policy_denied", decision=decision)), (429, {}, {"Retry-After": "99"}))
    with pytest.raises(sdk.Refused) as refused:
        client.request_grant("task_1", "urn:x", ["read"])
    with pytest.raises(sdk.Limited) as limited:
        client.task("task_1")
    assert pickle.loads(pickle.dumps(refused.value)).decision == decision
    assert pickle.loads(pickle.dumps(limited.value)).retry_after_s == 99


def test_an_approval_that_is_needed_is_an_error_of_its_own_and_collected_once(client, server, a):
    pending = {"grant": a.grant(state="pending", live=False), "approval": {"id": "apr_1"}}
    server.answers((202, pending, {"Retry-After": "5"}), a.issued(), CUT)
    with pytest.raises(sdk.ApprovalPending) as error:
        client.request_grant("task_1", "urn:x", ["read"])
    assert (error.value.grant_id, error.value.approval["id"], error.value.retry_after_s) == ("grt_1", "apr_1", 5)
    assert client.collect_grant("grt_1")[1].reveal() == "first.secret.token"
    with pytest.raises(sdk.Unreachable):
        client.collect_grant("grt_1")
    assert len(server.seen) == 3


def test_an_oauth_refusal_is_read_like_a_problem(client, server):
    server.answers((400, {"error": "access_denied", "error_description": "policy says no"}))
    with pytest.raises(sdk.Refused, match="policy says no") as error:
        client.token("urn:x", "read")
    assert error.value.code == "access_denied"


def test_a_proof_is_made_anew_on_each_try(client, server, a):
    key = DpopKey.generate()
    server.answers(CUT, (201, a.issued(token_type="DPoP")))
    client.request_grant("task_1", "urn:x", ["read"], dpop=key)
    first, second = (seen.headers["DPoP"] for seen in server.seen)
    assert first != second


def test_a_nonce_that_is_asked_for_is_used_once(client, server, a):
    wanted = (400, a.problem(400, "use_dpop_nonce"), {"DPoP-Nonce": "n-1"})
    server.answers(wanted, (201, a.issued(token_type="DPoP")), wanted, wanted)
    key = DpopKey.generate()
    client.request_grant("task_1", "urn:x", ["read"], dpop=key)
    with pytest.raises(sdk.Invalid):
        client.request_grant("task_1", "urn:x", ["read"], dpop=key)
    assert len(server.seen) == 4


def test_a_bearer_token_where_a_bound_one_was_asked_for_is_refused(client, server, a):
    server.answers((201, a.issued(token_type="Bearer")))
    with pytest.raises(sdk.NotTheBroker, match="not bound"):
        client.request_grant("task_1", "urn:x", ["read"], dpop=DpopKey.generate())


# Where a token may go


def test_a_redirect_is_not_followed(client, server, a):
    server.answers((307, {}, {"Location": f"{server.url}/v1/elsewhere"}), a.task())
    with pytest.raises(sdk.NotTheBroker, match="redirect"):
        client.task("task_1")
    assert len(server.seen) == 1


def test_a_client_that_was_handed_in_adds_nothing_and_goes_nowhere_else(server, a):
    server.answers((302, {}, {"Location": f"{server.url}/x"}), a.task())
    with httpx.Client(
        follow_redirects=True, auth=("user", "pass"), headers={"X-Mine": "1"}, base_url="https://evil.test"
    ) as http:
        client = Client(server.url, token=TOKEN, http=http)
        with pytest.raises(sdk.NotTheBroker):
            client.task("task_1")
        assert client.task("task_1").id == "task_1"
        client.close()
        assert not http.is_closed
    assert server.seen[1].headers["Authorization"] == f"Bearer {TOKEN}"
    assert "X-Mine" not in server.seen[1].headers


def test_a_proxy_of_the_environment_does_not_see_the_token(server, a, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    server.answers(a.task())
    with Client(server.url, token=TOKEN) as client:
        assert client.task("task_1").id == "task_1"


@pytest.mark.parametrize(
    "url", ["https://broker.example", "https://broker.example:8443/", "http://[::1]:8080", "http://127.0.0.1"]
)
def test_an_address_that_keeps_a_token_private_is_taken(url):
    assert origin_of(url) == url.rstrip("/")


def test_one_address_is_one_origin_however_it_is_written():
    assert origin_of("HTTPS://Broker.Example:443/") == "https://broker.example"


@pytest.mark.parametrize(
    "url",
    [
        "http://broker.example",
        "http://127.0.0.1.evil.test",
        "http://localhost.evil.test",
        "http://10.0.0.1",
        "ftp://localhost",
        "https://user:pw@broker.example",
        "https://broker.example/path",
        "https://broker.example?x=1",
        "https://broker.example?",
        "https://broker.example#x",
        "broker.example",
        "https://broker.example:eighty",
        "https://broker.example\t",
        "https://broker .example",
        "https://broker.example\\@evil.test",
        "https://broker%2eexample",
        "https://bröker.example",
        "https://[::1%25eth0]",
        "https://[::1",
        "https://evil[::1]",
        "https://a..b",
        f"https://{'x' * 64}.example",
        "https://broker.example:",
        "https://",
        "",
    ],
)
def test_an_address_that_does_not_is_refused(url):
    with pytest.raises(sdk.Invalid):
        Client(url, token=TOKEN)


@pytest.mark.parametrize("id_", ["../lockdowns", "..", "", "task_1/complete", "task_1?x=1", "täsk"])
def test_an_id_never_becomes_another_route(client, server, id_):
    with pytest.raises(sdk.Invalid):
        client.complete_task(id_)
    assert server.seen == []


def test_one_string_is_not_a_list_of_scopes(client):
    with pytest.raises(sdk.Invalid, match="give a list"):
        client.request_grant("task_1", "urn:x", "read")


# The workload token


def test_a_token_file_is_read_for_each_request(server, a, tmp_path):
    path = tmp_path / "token"
    path.write_text("first.token\n")
    server.answers(a.task(), lambda _: path.write_text("third.token") and (503, {}), a.task())
    with Client(server.url, token_file=path) as client:
        client.task("task_1")
        path.write_text("second.token")
        client.task("task_1")
    sent = [seen.headers["Authorization"] for seen in server.seen]
    assert sent == ["Bearer first.token", "Bearer second.token", "Bearer third.token"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"one.token\ntwo.token\n", "more than one line"),
        (b"one token", "blanks"),
        (b"\xff\xfe", "not text"),
    ],
)
def test_a_token_file_that_holds_no_token_says_so_and_not_what_it_holds(server, tmp_path, content, why):
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with Client(server.url, token_file=path) as client, pytest.raises(sdk.NotAuthenticated, match=why) as error:
        client.task("task_1")
    assert "one.token" not in "".join(traceback.format_exception(error.value))
    assert server.seen == []


@pytest.mark.parametrize("given", [{}, {"token": ""}, {"token": "a\nb"}, {"token": "x", "token_file": "y"}])
def test_a_client_needs_exactly_one_token(server, given):
    with pytest.raises(sdk.NotAuthenticated):
        Client(server.url, **given)


def test_a_token_function_is_asked_for_each_request(server, a):
    tokens = iter(["one", "two"])
    server.answers(a.task(), a.task())
    with Client(server.url, token=lambda: next(tokens)) as client:
        client.task("task_1")
        client.task("task_1")
    assert [seen.headers["Authorization"] for seen in server.seen] == ["Bearer one", "Bearer two"]


# Secrecy


def test_a_credential_cannot_be_shown_copied_or_pickled(client, server, a):
    server.answers((201, a.issued()))
    grant, credential = client.request_grant("task_1", "urn:x", ["read"])
    shown = f"{grant} {credential} {credential!r} {credential.token} {[credential]} {vars(credential)}"
    assert "secret" in shown
    assert "first.secret.token" not in shown
    for act in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            act(credential)
        with pytest.raises(TypeError):
            act(credential.token)
    assert credential.reveal() == "first.secret.token"


def test_a_providers_secret_is_as_secret(client, server, a):
    secret = {"type": "database", "data": {"username": "u", "password": "hunter2"}, "expires_at": a.at(60)}
    server.answers((201, {"grant": a.grant(provider="vault"), "credential": secret}))
    _, credential = client.request_grant("task_1", "urn:db", ["select"])
    assert "hunter2" not in repr(credential)
    assert credential.reveal_data()["password"] == "hunter2"
    with pytest.raises(TypeError, match="no token"):
        credential.reveal()


def shown_by(error):
    """What a crash reporter sends away: the variables of every frame, of the SDK's alone as ours hold the token."""
    shown = traceback.TracebackException.from_exception(error, capture_locals=True)
    return "".join(str(frame.locals) for frame in shown.stack if "/broker/sdk/" in frame.filename) + repr(
        (str(error), error.args, error.__context__)
    )


@pytest.mark.parametrize("reply", ["cut", "echo", "garbage", "torn", "no grant", "no expiry"])
def test_no_error_shows_a_token_even_with_its_variables(client, server, a, reply):
    def answer(seen):
        if reply == "cut":
            return CUT
        if reply == "echo":
            return 400, a.problem(400, "invalid_request", f"you sent {seen.headers['Authorization']} {seen.body}")
        if reply == "garbage":
            return 200, f"<html>{seen.headers['Authorization']}</html>".encode()
        if reply == "torn":
            return 201, json.dumps(a.issued()).encode()[:-1]
        if reply == "no expiry":
            return 201, {"credential": {"type": "jwt", "token": "first.secret.token"}, "grant": a.grant()}
        return 201, {"credential": a.issued()["credential"], "grant": {"id": "grt_1"}}

    server.answers(*[answer] * 12)
    with pytest.raises(sdk.BrokerError) as error:
        client.request_grant("task_1", "urn:x", ["read"], on_behalf_of="user.secret.token")
    shown = shown_by(error.value)
    assert "exchange" in repr(traceback.extract_tb(error.value.__traceback__))
    # A context may hold the whole answer, as a JSONDecodeError does.
    assert error.value.__context__ is None
    for secret in (TOKEN, "first.secret.token", "user.secret.token"):
        assert secret not in shown


def test_the_brokers_text_cannot_move_the_cursor(client, server, a):
    server.answers((409, a.problem(409, "conflict", "gone\x1b[2J\nroot# ")))
    with pytest.raises(sdk.Conflict) as error:
        client.task("task_1")
    assert str(error.value) == "A title: gone?[2J?root# "


def test_nothing_secret_is_logged(client, server, a, caplog):
    caplog.set_level(logging.DEBUG)
    server.answers(CUT, (201, a.issued()), {"active": True})
    client.request_grant("task_1", "urn:x", ["read"])
    client.introspect("some.access.token")
    for secret in (TOKEN, "first.secret.token", "some.access.token"):
        assert secret not in caplog.text


# Traces


def test_a_trace_is_passed_on(client, server, a):
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    server.answers(a.task(), a.task())
    client.with_trace(trace).task("task_1")
    client.task("task_1")
    assert server.seen[0].headers["traceparent"] == trace
    assert "traceparent" not in server.seen[1].headers
    with pytest.raises(sdk.Invalid):
        client.with_trace("x\r\nEvil: 1")


# asyncio


def test_the_async_client_does_the_same(async_client, server, a, time):
    server.answers(
        CUT,
        (503, {}, {"Retry-After": "2"}),
        (201, a.issued()),
        {"items": [a.task(id="task_1")], "next_cursor": "c"},
        {"items": [a.task(id="task_2")], "next_cursor": None},
        (403, a.problem(403, "policy_denied")),
        (302, {}, {"Location": "/x"}),
    )

    async def main():
        async with async_client as client:
            grant, credential = await client.request_grant("task_1", "urn:x", ["read"])
            assert (grant.id, credential.reveal()) == ("grt_1", "first.secret.token")
            assert [task.id async for task in client.tasks()] == ["task_1", "task_2"]
            with pytest.raises(sdk.Refused):
                await client.grant("grt_1")
            with pytest.raises(sdk.NotTheBroker):
                await client.grant("grt_1")

    asyncio.run(main())
    assert time.slept == [0, 2]
    assert len({seen.headers["Idempotency-Key"] for seen in server.seen[:3]}) == 1


def test_both_clients_have_the_same_verbs_with_the_same_arguments():
    def verbs(kind):
        return {name: value for name, value in vars(kind).items() if hasattr(value, "__wrapped__")}

    assert verbs(Client).keys() == verbs(AsyncClient).keys()
    assert len(verbs(Client)) == 42
    for name, verb in verbs(Client).items():
        assert inspect.signature(verb) == inspect.signature(verbs(AsyncClient)[name])


def test_json_that_cannot_be_said_is_refused_before_it_is_sent(client, server):
    for value in (float("nan"), object()):
        with pytest.raises(sdk.Invalid):
            client.request_grant("task_1", "urn:x", ["read"], context={"x": value})
    assert server.seen == []


def test_the_body_is_json(client, server, a):
    server.answers((201, a.issued()))
    client.request_grant("task_1", "urn:x", ["read"], context={"lead": "é"})
    assert server.seen[0].headers["Content-Type"] == "application/json"
    assert json.loads(server.seen[0].body)["context"] == {"lead": "é"}
