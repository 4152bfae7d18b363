"""Bodies that do not come: whoever holds one back is refused, or left alone, and stops nobody else (INV-27, INV-35)."""

import inspect
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from broker.cli import server
from broker.domain.errors import Unavailable
from broker.services import issuance
from broker.services.batching import Batching
from broker.web.bodies import Bodies, Lane
from tests.house import CRM
from tests.processes import Deployment


class Client:
    """One that sends nothing until it is told to."""

    def __init__(self):
        self.sends = threading.Event()
        self.is_read = threading.Event()

    def read(self):
        self.is_read.set()
        assert self.sends.wait(10)
        return b"body"


@pytest.fixture
def slow():
    """Clients whose bodies are being read, all let go at the end."""
    with ThreadPoolExecutor(20) as threads:
        clients = []

        def start(lane, count=1, by=None):
            started = []
            for _ in range(count):
                client = Client()
                clients.append(client)
                started.append((client, threads.submit(lane.read, client.read, by)))
                assert client.is_read.wait(10)
            return started

        yield start
        for client in clients:
            client.sends.set()


def test_one_body_more_than_are_read_at_once_is_refused_at_once(slow):
    lane = Lane(6)
    [(first, reading), *_] = slow(lane, 6)
    with pytest.raises(Unavailable):
        lane.read(lambda: b"never read")
    first.sends.set()
    assert reading.result(10) == b"body"
    assert lane.read(lambda: b"mine") == b"mine"


def test_a_body_that_breaks_off_makes_room():
    lane = Lane(3)

    def broken():
        raise ConnectionResetError("gone")

    for _ in range(10):
        with pytest.raises(ConnectionResetError):
            lane.read(broken)
    assert lane.read(lambda: b"mine") == b"mine"


def test_one_caller_leaves_room_for_the_others(slow):
    lane = Lane(6)
    slow(lane, 4, by="scribe")
    with pytest.raises(Unavailable):
        lane.read(lambda: b"never read", "scribe")
    assert lane.read(lambda: b"mine", "summarizer") == b"mine"


def test_bodies_and_those_who_wait_for_a_grant_never_hold_every_thread():
    issuing = issuance._WAITING + inspect.signature(Batching).parameters["at_most"].default
    assert Bodies().at_once + issuing < server._THREADS


def test_who_ends_authority_waits_with_none_of_those_who_ask_for_it(sqlite_house):
    bodies = Bodies()
    named = {name: sqlite_house.caller(name) for name in ("ada", "pipeline", "summarizer")}
    assert bodies.lane(named["ada"], ends=True) is bodies.lane(named["pipeline"], ends=True) is bodies.ending
    assert bodies.lane(named["summarizer"], ends=True) is bodies.lane(named["ada"], ends=False) is bodies.proven
    assert bodies.lane(None, ends=True) is not bodies.lane(None, ends=False)


@pytest.fixture
def broker(migrated_file, tmp_path):
    with Deployment.create(tmp_path, f"sqlite:///{tmp_path / 'broker.db'}").broker("--no-scheduler") as process:
        yield process


@pytest.fixture
def stalled(broker):
    """Connections that announced a body of a thousand bytes and sent one."""
    with ExitStack() as held:

        def stall(path, count=64, *headers):
            head = [f"POST {path} HTTP/1.1", f"Host: 127.0.0.1:{broker.port}", "Content-Length: 1000", *headers]
            head.append("Content-Type: application/x-www-form-urlencoded")
            for _ in range(count):
                connection = held.enter_context(socket.create_connection(("127.0.0.1", broker.port), timeout=10))
                connection.sendall("\r\n".join(head).encode() + b"\r\n\r\nx")

        yield stall


def ask(broker):
    form = {"grant_type": "client_credentials", "resource": CRM, "scope": "contacts:read"}
    assertion = broker.deployment.token("summarizer")
    form |= {"client_assertion": assertion, "task_id": broker.open_task()}
    form["client_assertion_type"] = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
    return broker.client.post("/oauth2/token", data=form)


def revocation(broker, token):
    assertion_type = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
    return {
        "token": token,
        "client_assertion": broker.deployment.token("summarizer"),
        "client_assertion_type": assertion_type,
    }


def test_stalled_strangers_stop_nobody(broker, stalled):
    assert ask(broker).status_code == 200
    stalled("/oauth2/token")
    stalled("/oauth2/revoke", 20)
    started = time.monotonic()
    assert broker.get("/healthz").status_code == 200
    task = broker.open_task()
    granted = broker.grant(task)
    assert broker.post(f"/v1/grants/{granted.id}/revoke", "summarizer", {"reason": "x"}).status_code == 200
    assert broker.post("/v1/lockdowns", "ada", {"agent": "scribe", "reason": "drill"}).status_code == 201
    assert broker.complete(task)["outcome"] == "completed"
    # Verifiers that send their token as a header are known before their body is waited for.
    introspected = broker.client.post(
        "/oauth2/introspect", data={"token": granted.token}, headers=broker.as_("crm-api")
    )
    assert introspected.json() == {"active": False}
    assert ask(broker).status_code == 200
    assert time.monotonic() - started < 5


def test_more_stalled_strangers_than_are_waited_for_stop_strangers_alone(broker, stalled):
    stalled("/oauth2/token", 120)
    refused = ask(broker)
    assert (refused.status_code, refused.json()["error"]) == (503, "temporarily_unavailable")
    assert int(refused.headers["Retry-After"]) > 0
    granted = broker.grant(broker.open_task())
    as_verifier = broker.as_("crm-api")
    answer = broker.client.post("/oauth2/introspect", data={"token": granted.token}, headers=as_verifier)
    assert answer.json()["active"] is True
    assert broker.client.post("/oauth2/revoke", data=revocation(broker, granted.token)).status_code == 200


def test_a_stalled_agent_stops_no_other_and_nobody_who_ends_tasks(broker, stalled):
    task = broker.open_task()
    bearer = f"Authorization: Bearer {broker.deployment.token('scribe')}"
    stalled("/v1/grants", 32, bearer)
    stalled("/v1/grants/grt_0000000000000000000000000a/revoke", 32, bearer)
    assert broker.get("/healthz").status_code == 200
    assert broker.post("/v1/lockdowns", "ada", {"agent": "scribe", "reason": "drill"}).status_code == 201
    assert broker.post(f"/v1/tasks/{task}/complete", "pipeline", {"reason": "x"}).status_code == 200
    assert ask(broker).status_code == 200


def test_a_length_beside_chunks_is_refused(web):
    """RFC 9112 section 6.1: whoever reads the one and whoever reads the other see two different requests."""
    answer = web.post("/v1/tasks", "pipeline", json={}, headers={"Transfer-Encoding": "chunked"})
    assert (answer.status_code, answer.json["member"]) == (400, "Content-Length")
