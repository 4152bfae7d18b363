"""A gateway with a real broker behind it, and an upstream that knows nothing of either."""

import asyncio
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jwt
import pytest

from broker.gateway.app import Gateway
from broker.gateway.settings import read_settings
from broker.sdk import Client, DpopKey
from tests.cli.conftest import CRM, live_broker  # noqa: F401 - a fixture
from tests.sdk.conftest import FakeTime

KEY = "upstream-key-of-the-crm"
ORIGIN = "https://crm.example"
PROXY_SECRET = "only-the-proxy-knows"

SETTINGS = """\
listen = "unix:gateway.sock"
broker = "{broker}"
token_file = "verifier.token"
proxy = "{proxy}"

[[upstreams]]
name = "crm"
audience = "https://crm.example/api"
origin = "{origin}"
methods = {{ "GET,HEAD" = ["contacts:read"], "POST" = ["contacts:write"] }}
credential_file = "crm.key"
"""


@dataclass
class Place:
    """The directory of a gateway: what stands in its files, and the application as the proxy asks it."""

    directory: object
    broker: object
    time: FakeTime = None
    opened: list = field(default_factory=list)

    def write(self, name, text, mode=0o600):
        path = self.directory / name
        path.touch(mode=mode)
        path.chmod(mode)
        path.write_text(text)
        return path

    def configure(self, *, proxy="nginx", origin=ORIGIN, more="", top=""):
        text = SETTINGS.format(broker=self.broker.url, proxy=proxy, origin=origin)
        return self.write("gateway.toml", top + text + more)

    def gateway(self, *, bounds=(), **configured):
        timing = None if self.time is None else self.time.timing()
        made = Gateway(read_settings(self.configure(**configured)), timing=timing, **dict(bounds))
        self.opened.append(made)
        return made


@pytest.fixture
def place(tmp_path, live_broker):  # noqa: F811
    made = Place(tmp_path, live_broker)
    made.write("verifier.token", live_broker.token("crm-api"))
    made.write("crm.key", f"{KEY}\n")
    yield made
    for gateway in made.opened:
        gateway.close()


def ask(gateway, path="/authorize/crm", **headers):
    """(status, headers) of a check; a header by its name with underscores, None to leave it out."""
    given = {"x_original_method": "GET", "x_original_uri": "/api/contacts?page=2"} | headers
    sent = [
        (name.replace("_", "-").encode(), each.encode("latin-1"))
        for name, value in given.items()
        if value is not None
        for each in (value if isinstance(value, list) else [value])
    ]
    status, answered = gateway.answer(path, sent)
    assert len(dict(answered)) == len(answered)
    return status, dict(answered)


async def call(gateway, path, **headers):
    """(status, headers) as a proxy has it over HTTP."""
    sent = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    messages = []

    async def send(message):
        messages.append(message)

    await gateway({"type": "http", "path": path, "headers": sent}, asyncio.Event().wait, send)
    told = {name.decode(): value.decode() for name, value in messages[0]["headers"]}
    return messages[0]["status"], told


def like_ours(issuer, *, typ="at+jwt", **claims):
    """What has the form of a token of the broker's; nobody that checks it takes it for one."""
    payload = json.dumps({"iss": issuer} | claims).encode()
    return jwt.api_jws.encode(payload, "k" * 64, algorithm="HS512", headers={"typ": typ})


class Work:
    """A task and its agent's hand."""

    def __init__(self, broker):
        self.url = broker.url
        self.orchestrator = Client(broker.url, token=broker.token("crm-pipeline"))
        self.agent = Client(broker.url, token=broker.token("summarizer"))
        self.task = self.orchestrator.open_task(
            "summarise the leads of May", ["summarizer"], 3600, labels={"team": "crm"}
        )

    def grant(self, scope="contacts:read", resource=CRM, **more):
        grant, credential = self.agent.request_grant(self.task.id, resource, [scope], **more)
        return grant, credential.reveal()

    def bound(self, scope="contacts:write"):
        key = DpopKey.generate()
        return key, self.grant(scope, dpop=key)[1]

    def close(self):
        self.orchestrator.close()
        self.agent.close()


@pytest.fixture
def work(live_broker):  # noqa: F811
    made = Work(live_broker)
    yield made
    made.close()


@pytest.fixture
def upstream():
    """Opens to its own key alone; `seen` are the headers of each request."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            seen.append((self.command, self.path, self.headers))
            body = b"contacts"
            self.send_response(200 if self.headers.get_all("Authorization") == [f"Bearer {KEY}"] else 418)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_DELETE = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.seen = seen
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
