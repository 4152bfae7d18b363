"""Requests that only a real server meets: lengths that lie, bodies that never come, bytes that are no HTTP (INV-35)."""

import json
import socket
import threading
import time
from contextlib import suppress

import httpx
import pytest

from tests.house import CRM
from tests.processes import JWT_BEARER, Deployment, until

FORM = "application/x-www-form-urlencoded"
TEN_MEGABYTES = 10_000_000


@pytest.fixture(scope="module")
def broker(migrated_file, tmp_path_factory):
    directory = tmp_path_factory.mktemp("broker")
    with Deployment.create(directory, f"sqlite:///{directory / 'broker.db'}").broker("--no-scheduler") as process:
        yield process


@pytest.fixture(autouse=True)
def still_there(broker):
    """Whatever was sent, the broker answers others afterwards, and has broken at nothing."""
    yield
    assert broker.get("/healthz").status_code == 200
    assert broker.get("/v1/tasks", "pipeline").status_code == 200
    lines = [json.loads(line) for line in broker.log.read_text().splitlines() if line.startswith("{")]
    assert not [line for line in lines if line["level"] == "error" or "exception" in line]


def spoken(broker, *chunks, close=False, wait_s=15, pause_s=0.0):
    """The bytes a raw client gets for these bytes, until the broker closes or has answered."""
    with socket.create_connection(("127.0.0.1", broker.port), timeout=wait_s) as connection:
        answer = b""
        # It need not read to the end what it has refused.
        with suppress(ConnectionResetError, BrokenPipeError):
            for chunk in chunks:
                connection.sendall(chunk)
                time.sleep(pause_s)
        with suppress(OSError):
            if close:
                connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            while part := connection.recv(65_536):
                answer += part
        return answer


def request(broker, path, *headers, method="POST", by="pipeline", kind="application/json"):
    lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{broker.port}", "Connection: close"]
    lines += [f"Authorization: Bearer {broker.deployment.token(by)}", f"Content-Type: {kind}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def status(answer):
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.") else None


TASK = json.dumps({"purpose": "x", "agents": ["summarizer"], "deadline_s": 60}).encode()


def tasks(broker):
    return len(broker.get("/v1/tasks?limit=1000", "ada").json()["items"])


def test_a_body_may_come_in_chunks_and_slowly(broker):
    half = len(TASK) // 2
    chunks = [f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in (TASK[:half], TASK[half:])]
    answer = spoken(
        broker, request(broker, "/v1/tasks", "Transfer-Encoding: chunked"), *chunks, b"0\r\n\r\n", pause_s=0.05
    )
    assert status(answer) == 201, answer
    head = request(broker, "/v1/tasks", f"Content-Length: {len(TASK)}")
    assert status(spoken(broker, head, TASK[:half], TASK[half:], pause_s=0.05)) == 201


@pytest.mark.parametrize(("path", "kind"), [("/v1/tasks", "application/json"), ("/oauth2/token", FORM)])
def test_ten_megabytes_are_refused_however_they_come(broker, path, kind):
    before = tasks(broker)
    for content in (b"x" * TEN_MEGABYTES, (b"x" * 65_536 for _ in range(TEN_MEGABYTES // 65_536))):
        try:
            answer = httpx.post(
                broker.url + path, headers=broker.as_("pipeline", **{"Content-Type": kind}), content=content, timeout=15
            )
        except httpx.WriteError:
            continue  # refused and closed before the client had sent it all
        assert answer.status_code == 413
        wanted = "application/json" if path.startswith("/oauth2") else "application/problem+json"
        assert answer.headers["Content-Type"] == wanted
    assert tasks(broker) == before


def test_a_body_of_just_the_most_is_read_whole_and_one_byte_more_is_refused(broker):
    """In chunks it says no length, and what is cut off without a word would be another request."""
    for more, wanted in ((0, 201), (1, 413)):
        body = TASK + b" " * (65_536 - len(TASK) + more)
        for content in (body, (body[start : start + 9000] for start in range(0, len(body), 9000))):
            headers = broker.as_("pipeline", **{"Content-Type": "application/json"})
            assert broker.client.post("/v1/tasks", headers=headers, content=content).status_code == wanted


def test_a_body_that_says_it_is_enormous_is_refused_before_it_comes(broker):
    for length in ("10000000", "65537", "9223372036854775807"):
        started = time.monotonic()
        answer = spoken(broker, request(broker, "/v1/tasks", f"Content-Length: {length}"), b"{", close=True)
        assert status(answer) in (400, 413, None), answer
        assert time.monotonic() - started < 10


def test_a_body_that_is_shorter_than_it_said_changes_nothing(broker):
    before = tasks(broker)
    for path, body, kind in (("/v1/tasks", TASK, "application/json"), ("/oauth2/token", b"grant_type=x", FORM)):
        head = request(broker, path, f"Content-Length: {len(body) + 10}", kind=kind)
        assert status(spoken(broker, head, body, close=True)) in (400, None)
    cut = request(broker, "/v1/tasks", "Transfer-Encoding: chunked")
    assert status(spoken(broker, cut, f"{len(TASK):x}\r\n".encode() + TASK[:10], close=True)) in (400, None)
    assert tasks(broker) == before


def test_a_body_that_is_longer_than_it_said_is_read_as_far_as_it_said(broker):
    """What follows is another request, and as one it is nothing."""
    head = request(broker, "/v1/tasks", f"Content-Length: {len(TASK)}").replace(b"Connection: close\r\n", b"")
    answer = spoken(broker, head, TASK + b"GARBAGE\r\n\r\n", close=True)
    assert status(answer) == 201
    assert answer.count(b'"state":"active"') == 1


@pytest.mark.parametrize(
    "headers",
    [
        ("Content-Length: 10", "Content-Length: 20"),
        ("Content-Length: -1",),
        ("Content-Length: 1e1",),
        ("Content-Length: 0x10",),
        ("Content-Length: 10, 20",),
        ("Content-Length: 99999999999999999999999",),
        ("Transfer-Encoding: chunked, identity",),
        ("Transfer-Encoding: gzip",),
        ("Transfer-Encoding: xchunked",),
    ],
    ids=str,
)
def test_a_length_with_two_meanings_is_refused(broker, headers):
    """Otherwise one proxy's request is another one's two (RFC 9112 section 6.3)."""
    before = tasks(broker)
    assert status(spoken(broker, request(broker, "/v1/tasks", *headers), TASK, close=True)) in (
        400,
        411,
        413,
        501,
        None,
    )
    assert tasks(broker) == before


def test_a_chunked_body_with_a_length_beside_it_is_one_request_and_closes(broker):
    """RFC 9112 section 6.1: the chunks win, and nothing on this connection is believed afterwards."""
    smuggled = request(broker, "/v1/tasks", f"Content-Length: {len(TASK)}") + TASK
    chunk = f"{len(TASK):x}\r\n".encode() + TASK + b"\r\n0\r\n\r\n"
    head = request(broker, "/v1/tasks", f"Content-Length: {len(chunk)}", "Transfer-Encoding: chunked")
    answer = spoken(broker, head.replace(b"Connection: close\r\n", b""), chunk + smuggled, close=True)
    assert answer.count(b"HTTP/1.1 201") <= 2
    assert status(answer) in (201, 400, None)


@pytest.mark.parametrize(
    "raw",
    [
        b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\0" * 1000,
        b"GET /v1/tasks HTTP/1.1\r\nHost: a\r\nBroken\r\n\r\n", b"GET /v1/ta sks HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /v1/tasks HTTP/1.1\r\nHost: a\r\nX : y\r\n\r\n",
        b"GET /v1/tasks HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 1_000_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(5000)) + b"\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET http://evil.test/v1/tasks HTTP/1.1\r\nHost: evil.test\r\n\r\n",
        b"CONNECT evil.test:443 HTTP/1.1\r\nHost: evil.test\r\n\r\n", b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /../../etc/passwd HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /v1/\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /v1/tasks?\xff=\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
    ids=lambda raw: repr(raw[:40]),
)  # fmt: skip
def test_bytes_that_are_no_request_are_refused_or_dropped(broker, raw):
    answer = spoken(broker, raw.replace(b"\r\nHost", b"\r\nConnection: close\r\nHost"), close=True)
    found = status(answer)
    assert found is None or 200 <= found < 500, answer[:200]
    if found == 200:
        assert raw.startswith(b"OPTIONS")
    assert b"Traceback" not in answer
    assert b"root:" not in answer


@pytest.mark.parametrize("name", ["Authorization", "DPoP"])
def test_a_header_that_comes_twice_is_not_believed_once(broker, name):
    """Which of two would be taken is something two readers disagree on."""
    values = {
        "Authorization": tuple(f"Bearer {broker.deployment.token(by)}" for by in ("pipeline", "pipeline")),
        "DPoP": ("x", "y"),
    }[name]
    before = tasks(broker)
    headers = [(key, value) for key, value in broker.as_("pipeline").items() if key != name]
    headers += [("Content-Type", "application/json"), *((name, value) for value in values)]
    if name == "DPoP":
        answer = broker.client.post("/v1/grants", headers=headers, json={"resource": CRM, "scopes": ["contacts:read"]})
    else:
        answer = broker.client.post("/v1/tasks", headers=headers, content=TASK)
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert tasks(broker) == before


def test_a_flood_of_slow_bodies_leaves_room_for_others(broker):
    """Half-sent requests of nobody hold a connection each, and never the broker: who calls is asked before what."""
    held = []
    head = request(broker, "/v1/tasks", f"Content-Length: {len(TASK)}").replace(b"Bearer ey", b"Bearer xx")
    try:
        for _ in range(200):
            connection = socket.create_connection(("127.0.0.1", broker.port), timeout=10)
            connection.sendall(head + TASK[:5])
            held.append(connection)
        started = time.monotonic()
        assert broker.client.get("/healthz", timeout=10).status_code == 200
        assert broker.client.get("/v1/tasks", headers=broker.as_("pipeline"), timeout=10).status_code == 200
        assert time.monotonic() - started < 5
    finally:
        for connection in held:
            connection.close()


def test_fifty_clients_that_hang_up_leave_nothing_half_done(broker):
    before = tasks(broker)

    def hang_up():
        with socket.create_connection(("127.0.0.1", broker.port), timeout=10) as connection:
            connection.sendall(request(broker, "/v1/tasks", f"Content-Length: {len(TASK)}") + TASK)

    threads = [threading.Thread(target=hang_up) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Each was sent whole, so each may have been done; what was done has its event.
    until(lambda: settled(broker), what="quiet")
    assert before <= tasks(broker) <= before + 50
    events = broker.get("/v1/audit?type=task.opened&limit=1000", "audrey").json()["items"]
    assert len(events) == tasks(broker)


def settled(broker):
    first = tasks(broker)
    time.sleep(0.2)  # a real process finishes in its own time, and nothing says that it has
    return tasks(broker) == first


def test_no_log_line_holds_a_token_or_what_was_sent(broker):
    secret = "canary-8d1f"
    token = broker.deployment.token("summarizer")
    assertion = {"client_assertion_type": JWT_BEARER, "client_assertion": token}
    broker.client.post("/oauth2/token", data={"grant_type": "client_credentials", "scope": secret, **assertion})
    broker.client.post("/oauth2/token?secret=" + secret, data=assertion)
    broker.post("/v1/tasks", "pipeline", {"purpose": secret, "unknown": secret})
    broker.client.get("/v1/tasks/" + secret, headers=broker.as_("pipeline", **{"User-Agent": f"x\t{secret}"}))
    broker.client.get("/v1/tasks", headers={"Authorization": f"Bearer {token}x"})
    log = until(lambda: (text := broker.log.read_text()).count('"event": "request"') > 3 and text)
    assert secret not in log
    assert "eyJ" not in log
    assert token.rsplit(".", 1)[1] not in log


def refused_before_its_body(broker, path, kind):
    """The head of the answer to a request whose token is refused while its body is still on its way."""
    head = request(broker, path, f"Content-Length: {len(TASK)}", kind=kind).replace(b"Connection: close\r\n", b"")
    head = head.replace(b"Authorization: Bearer ", b"Authorization: Bearer x")
    with socket.create_connection(("127.0.0.1", broker.port), timeout=15) as connection:
        connection.sendall(head)
        answer = b""
        while b"\r\n\r\n" not in answer:
            part = connection.recv(65_536)
            assert part, answer
            answer += part
    return answer.partition(b"\r\n\r\n")[0].lower()


@pytest.mark.parametrize(("path", "kind"), [("/v1/tasks", "application/json"), ("/oauth2/revoke", FORM)])
def test_a_refusal_that_left_a_body_unread_says_that_the_connection_is_over(broker, path, kind):
    """The server ends such a connection. Unsaid, the client's next request on it would be lost without an answer."""
    answer = refused_before_its_body(broker, path, kind)
    assert status(answer.upper()) == 401
    assert b"\r\nconnection: close" in answer


def test_a_client_that_was_refused_loses_no_request_that_comes_after(broker):
    for _ in range(100):
        with httpx.Client(base_url=broker.client.base_url, trust_env=False) as client:
            refused = client.post("/v1/tasks", content=TASK, headers={"Authorization": "Bearer x"})
            assert refused.status_code == 401
            assert client.delete("/v1/lockdowns/none", headers=broker.as_("ada")).status_code == 404
