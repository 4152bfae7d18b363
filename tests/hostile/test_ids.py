"""Ids of others, ids of nothing, and everything else an address or a header may hold (INV-28, INV-31)."""

import re
from urllib.parse import quote

import pytest

from tests.hostile.conftest import assert_plain, refused
from tests.hostile.corpus import MALFORMED, TRICKS
from tests.house import CRM

ABSENT = "0" * 25 + "a"
DOORS = [
    ("GET", "/v1/tasks/{task}", None),
    ("GET", "/v1/tasks/{task}/receipt", None),
    ("GET", "/v1/tasks/{task}/timeline", None),
    ("GET", "/v1/tasks/{task}/drift", None),
    ("POST", "/v1/tasks/{task}/heartbeat", None),
    ("POST", "/v1/tasks/{task}/complete", {}),
    ("POST", "/v1/tasks/{task}/fail", {"reason": "x"}),
    ("POST", "/v1/tasks/{task}/cancel", {}),
    ("GET", "/v1/grants/{grant}", None),
    ("POST", "/v1/grants/{grant}/renew", {}),
    ("POST", "/v1/grants/{grant}/revoke", {}),
    ("POST", "/v1/grants", {"task_id": "{task}", "resource": CRM, "scopes": ["contacts:read"]}),
]
IDS = [f"{method} {path}" for method, path, _ in DOORS]


def call(web, door, by, **ids):
    method, path, body = door
    if body is not None:
        body = {name: value.format(**ids) if value == "{task}" else value for name, value in body.items()}
    return web.client.open(path.format(**ids), method=method, json=body, headers=web.as_(by))


def but_for(answer, *names):
    """The bytes of an answer and its headers, without the id that was asked for and the trace id."""
    text = answer.get_data(as_text=True).replace(answer.json["trace_id"], "-")
    for name in names:
        text = text.replace(name, "-")
    headers = [(name, value) for name, value in answer.headers if name not in ("Content-Length", "X-Trace-Id")]
    return answer.status_code, headers, text


@pytest.mark.parametrize("door", DOORS, ids=IDS)
@pytest.mark.parametrize("ended", [False, True])
def test_what_one_may_not_see_answers_as_what_is_not_there(web, door, ended):
    """INV-28; byte for byte, headers too, whatever state it is in."""
    task = web.open_task()
    grant = web.grant(task).json["grant"]
    if ended:
        web.post(f"/v1/tasks/{task['id']}/complete", "pipeline")
    theirs, absent = (
        {"task": task["id"], "grant": grant["id"]},
        {"task": f"task_{ABSENT}", "grant": f"grt_{ABSENT}"},
    )
    for stranger in ("other-pipeline", "scribe", "crm-api", "ledger-api"):
        seen, nothing = (call(web, door, stranger, **ids) for ids in (theirs, absent))
        assert but_for(seen, *theirs.values()) == but_for(nothing, *absent.values())
        refused(seen, status=(403, 404))


@pytest.mark.parametrize("door", DOORS[:-1], ids=IDS[:-1])
def test_the_verbs_of_others_over_what_one_may_see_lack_the_role(web, door):
    """An agent sees its task and an auditor sees all; neither may act on it."""
    task = web.open_task()
    grant = web.grant(task).json["grant"]
    before = web.tables()
    for by in ("summarizer", "audrey"):
        if door[0] == "GET" or (by == "summarizer" and "/grants/" in door[1]):
            continue
        answer = call(web, door, by, task=task["id"], grant=grant["id"])
        # A renewal is the holder's alone, for anybody else there is no such grant of theirs.
        code = "not_found" if "renew" in door[1] else "role_missing"
        assert refused(answer, status=(403, 404))["code"] == code
    assert web.tables() == before


NO_ID = [*TRICKS, *MALFORMED[:-1], "", ".", "..", "...", "%00", "task_", "task_x", f"TASK_{ABSENT}",
         f"grt_{ABSENT}".upper(), f"task_{ABSENT}\n", f" task_{ABSENT}", f"task_{ABSENT}/", f"evt_{ABSENT}",
         f"task_8{ABSENT[1:]}", f"task_{ABSENT[:-1]}u", f"task_{ABSENT}" * 2, "null", "undefined", "*", "%", "_", "0",
         "-1", "1e9"]  # fmt: skip


def test_nothing_but_an_id_of_ours_finds_anything(web):
    before = web.tables()
    for method, path, body in [*DOORS[:-1], ("DELETE", "/v1/lockdowns/{task}", None)]:
        for text in NO_ID:
            for spelled in {
                quote(text, safe="", errors="surrogatepass"),
                quote(text, safe="/", errors="surrogatepass"),
            }:
                address = path.replace("{task}", spelled).replace("{grant}", spelled)
                answer = web.client.open(address, method=method, json=body, headers=web.as_("ada"))
                if answer.status_code == 200:
                    # "" and "." lead to the list above.
                    assert method == "GET"
                    assert re.fullmatch(r"/v1/(tasks|grants)/?", address) is not None or set(text) <= {"."}
                    continue
                refused(answer, status=(403, 404, 405))
                assert_plain(answer)
    assert web.tables() == before


@pytest.mark.parametrize(
    "path",
    [
        "//v1/tasks", "/v1//tasks", "/v1/tasks/", "/v1/./tasks", "/v1/../v1/tasks", "/v1/%2e%2e/healthz", "/V1/tasks",
        "/v1/tasks;x=y", "/v1/tasks%00", "/v1/tasks%0d%0aX:y", "/v1", "/v1/", "/", "/oauth2/token/",
        "/oauth2//token", "/oauth2/%74oken%2f", "/problems/../v1/tasks", "/problems/%2e%2e", "/problems/{{7*7}}",
        "/problems/<script>", "/status-lists/-1", "/status-lists/1.0", "/status-lists/%31%00", "/status-lists/1e3",
        "/status-lists/٣", "/status-lists/9999999999", "/status-lists/..%2f1", "/.well-known/../oauth2/jwks",
        "/.git/config", "/etc/passwd", "/static/../app", "/console", "/debug", "/%ff%fe", "/" + "x" * 8000,
    ],
)  # fmt: skip
def test_an_address_of_nothing_is_not_found_and_never_followed(web, path):
    answer = web.client.get(path, headers=web.as_("ada"))
    assert answer.status_code in (404, 405), answer.status_code
    assert "Location" not in answer.headers
    assert answer.mimetype in ("application/problem+json", "application/json")
    assert_plain(answer)


QUERIES = [
    "limit=0", "limit=-1", "limit=1001", "limit=1.5", "limit=NaN", "limit=true", "limit=1e2", "limit=0x10", "limit=",
    "limit", "limit=99999999999999999999", "limit=1_0", "limit=%201", "limit=%2B1", "limit=1.0", "limit=%D9%A3",
    "limit=010", "limit=1&limit=2", "cursor=x", "cursor=", "cursor=%00", "cursor=" + "A" * 101,
    "cursor=YXByXzAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDBh", "cursor=..%2f", "cursor=%27%3B--", "unknown=x", "__proto__=x",
    "agent=a%00b", "agent=a%0ab", "agent=" + "x" * 2000, "state=gone", "state=ACTIVE", "state=active&state=active",
    "agent=", "[]=1", "agent[]=x", "a%00=b", "%=x", "%ff=x", "user=%E2%80%A8",
]  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/tasks", "/v1/grants", "/v1/audit"])
def test_a_query_is_read_as_strictly_as_a_body(web, path):
    for query in QUERIES:
        refused(web.get(f"{path}?{query}", "ada"), status=(400,))
    for text in TRICKS:
        answer = web.get(f"{path}?agent={quote(text)}", "ada")
        if text.isprintable():
            assert (answer.status_code, answer.json["items"]) == (200, [])
        else:
            refused(answer, member="agent", status=(400,))


def test_a_cursor_of_one_list_is_none_of_another(web):
    task = web.open_task()
    web.grant(task)
    cursor = web.get("/v1/tasks?limit=1", "ada").json["next_cursor"]
    for path in ("/v1/grants", "/v1/audit"):
        refused(web.get(f"{path}?cursor={cursor}", "ada"), member="cursor", status=(400,))


@pytest.mark.parametrize("key", ["", " ", "a b", "x" * 256, "ä", "a\tb", "\x7f", "a,b c"])
def test_an_idempotency_key_is_printable_and_short(web, key):
    before = web.tables()
    body = {"purpose": "x", "agents": ["summarizer"], "deadline_s": 60}
    answer = web.post("/v1/tasks", "pipeline", json=body, headers={"Idempotency-Key": key})
    refused(answer, member="Idempotency-Key", status=(400,))
    assert web.tables() == before


@pytest.mark.parametrize(
    "value",
    ["", "x", "00-" + "0" * 32 + "-00f067aa0ba902b7-01", "ff-" + "4" * 32 + "-00f067aa0ba902b7-01", "{{7*7}}", "é",
     "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01" * 100,
     "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01"],
)  # fmt: skip
def test_a_trace_context_that_is_none_is_ignored(web, value):
    answer = web.client.get("/v1/tasks", headers=web.as_("pipeline", traceparent=value, tracestate="x=" + "y" * 5000))
    assert answer.status_code == 200
    missing = web.client.get("/v1/tasks", headers={"traceparent": value})
    assert re.fullmatch("[0-9a-f]{32}", refused(missing, status=(401,))["trace_id"])


@pytest.mark.parametrize("method", ["PUT", "PATCH", "TRACE", "CONNECT", "PROPFIND", "{{7*7}}", "GET\u00e4"])
def test_a_method_that_is_none_here_is_answered_with_those_that_are(web, method):
    for path in ("/v1/tasks", "/v1/grants", "/v1/policies/evaluate", "/healthz", "/oauth2/jwks"):
        answer = web.client.open(path, method=method, headers=web.as_("ada"))
        assert answer.status_code == 405
        assert answer.headers["Allow"]
        assert_plain(answer)


def test_headers_others_forge_change_nothing(web):
    """No proxy is trusted here: what such headers say is somebody's text."""
    forged = {
        "X-Forwarded-For": "127.0.0.1", "X-Forwarded-Host": "evil.test", "X-Forwarded-Proto": "https",
        "Host": "evil.test", "X-Original-URL": "/v1/audit", "X-Rewrite-URL": "/v1/audit",
        "X-HTTP-Method-Override": "DELETE", "X-Forwarded-Prefix": "/evil", "Forwarded": "host=evil.test",
        "Cookie": "session=x", "Origin": "https://evil.test",
    }  # fmt: skip
    task = web.open_task()
    honest = web.get(f"/v1/tasks/{task['id']}", "pipeline")
    assert web.client.get(f"/v1/tasks/{task['id']}", headers=web.as_("pipeline", **forged)).data == honest.data
    metadata = web.client.get("/.well-known/oauth-authorization-server", headers=forged)
    assert "evil" not in metadata.get_data(as_text=True)
    answer = web.client.get("/v1/nothing", headers=forged)
    assert "evil" not in answer.get_data(as_text=True) + str(answer.headers)
    assert "Access-Control-Allow-Origin" not in answer.headers
