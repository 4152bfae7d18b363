"""A real HTTP server that answers what a test tells it to, and a clock that moves only when told."""

import json
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from broker.sdk import AsyncClient, Client, Timing

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
TOKEN = "eyJhbGciOi.workload-token.c2lnbmF0dXJl"


@dataclass
class FakeTime:
    """Sleeping is moving it; `slept` says how long each time."""

    at: datetime = NOW
    slept: list[float] = field(default_factory=list)
    chance: float = 0.0

    def move(self, seconds):
        self.at += timedelta(seconds=seconds)

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.move(seconds)

    async def async_sleep(self, seconds):
        self.sleep(seconds)

    def timing(self):
        return Timing(
            now=lambda: self.at,
            monotonic=lambda: self.at.timestamp(),
            sleep=self.sleep,
            async_sleep=self.async_sleep,
            chance=lambda: self.chance,
        )


@dataclass(frozen=True)
class Seen:
    method: str
    path: str
    headers: dict
    body: bytes

    def json(self):
        return json.loads(self.body)


class Scripted:
    """Answers each request with the next of its script; what is not in the script is a 599 that no test expects."""

    CUT = object()

    def __init__(self, time):
        self.time = time
        self.script = []
        self.seen = []
        self.date_is_off_by_s = 0
        self.answering = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def answers(self, *replies):
        """Each: CUT, a body for 200, (status, body), (status, body, headers), or a function of the request."""
        self.script.extend(replies)

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self):
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                length = int(self.headers.get("Content-Length") or 0)
                seen = Seen(self.command, self.path, dict(self.headers.items()), self.rfile.read(length))
                with scripted.answering:
                    scripted.seen.append(seen)
                    reply = scripted.script.pop(0) if scripted.script else (599, {})
                if callable(reply):
                    reply = reply(seen)
                if reply is Scripted.CUT:
                    self.close_connection = True
                    return
                status, body, headers = (*reply, {})[:3] if isinstance(reply, tuple) else (200, reply, {})
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_DELETE = answer

            def date_time_string(self, timestamp=None):
                at = scripted.time.at + timedelta(seconds=scripted.date_is_off_by_s)
                return format_datetime(at, usegmt=True)

            def log_message(self, *_):
                pass

        return Handler


@pytest.fixture
def time():
    return FakeTime()


@pytest.fixture
def server(time):
    scripted = Scripted(time)
    yield scripted
    scripted.close()


@pytest.fixture(scope="session")
def http():
    """A program's own, one for the run: loading the certificates is most of what it costs."""
    with httpx.Client(trust_env=False) as http:
        yield http


@pytest.fixture
def client(server, time):
    with Client(server.url, token=TOKEN, timing=time.timing()) as client:
        yield client


@pytest.fixture
def async_client(server, time):
    """To be closed by the test, inside of its event loop."""
    return AsyncClient(server.url, token=TOKEN, timing=time.timing())


@pytest.fixture
def a(time):
    return Answers(time)


class Answers:
    """Bodies as the broker sends them."""

    def __init__(self, time):
        self.time = time

    def at(self, in_s=0):
        return (self.time.at + timedelta(seconds=in_s)).strftime("%Y-%m-%dT%H:%M:%SZ")

    def task(self, **members):
        return {
            "id": "task_1",
            "state": "active",
            "purpose": "summarize leads",
            "agents": ["summarizer"],
            "orchestrator": "crew",
            "created_at": self.at(),
            "deadline_at": self.at(3600),
            "heartbeat_s": None,
            "ended_at": None,
            "reason": None,
            "labels": {},
            "parent_task_id": None,
            "on_behalf_of": None,
        } | members

    def grant(self, **members):
        return {
            "id": "grt_1",
            "task_id": "task_1",
            "agent": "summarizer",
            "resource": "https://crm.example/api",
            "scopes": ["contacts:read"],
            "state": "active",
            "live": True,
            "issued_at": self.at(),
            "expires_at": self.at(300),
            "renewable_until": self.at(3600),
            "ttl_s": 300,
            "ttl_decided_by": "default",
            "jti": "j",
            "provider": "jwt",
            "revocation_class": "bounded",
            "decision": {"outcome": "allow", "policies": ["crm-read"], "policy_version": 1, "reasons": []},
            "lease": None,
        } | members

    def issued(self, token="first.secret.token", ttl_s=300, token_type="Bearer", **grant):
        credential = {"type": "jwt", "token": token, "token_type": token_type, "expires_at": self.at(ttl_s)}
        return {"grant": self.grant(**grant), "credential": credential}

    def secret(self, password="first", ttl_s=300, **grant):
        """As of a grant whose secret another system makes: a database login."""
        members = {"provider": "vault", "revocation_class": "hard", "renewable_until": None, "jti": None}
        credential = {"type": "database", "data": {"username": "jit-1", "password": password}}
        issued = self.grant(expires_at=self.at(ttl_s), **members | grant)
        return {"grant": issued, "credential": credential | {"expires_at": self.at(ttl_s)}}

    def receipt(self, outcome="completed"):
        line = {
            "grant_id": "grt_1",
            "agent": "summarizer",
            "resource": "https://crm.example/api",
            "provider": "jwt",
            "revocation_class": "bounded",
            "authority_ended_at": self.at(),
            "confirmed_dead_at": None,
            "exposed_until": self.at(15),
        }
        return {
            "task_id": "task_1",
            "ended_at": self.at(),
            "outcome": outcome,
            "grants": [line],
            "totals": {"ended": 1, "confirmed_dead": 0, "outstanding": 1},
            "jws": "a.b.c",
        }

    def problem(self, status, code, detail="this is why", **members):
        return {
            "type": f"https://broker.example/problems/{code}",
            "title": "A title",
            "status": status,
            "detail": detail,
            "code": code,
        } | members
