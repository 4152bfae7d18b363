"""Real broker processes on loopback: started by the command an operator uses, stopped by the signals one sends.

A `Deployment` is one configuration on one database; its processes are the brokers that share it. Each is a process
group of its own and ends with its block.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import jwt

from broker.domain.clock import system_clock
from broker.providers.dev_issuer import DevIssuer
from tests.house import CRM, POLICIES

BROKER = Path(sys.executable).with_name("broker")
PATIENCE_S = 30
JWT_BEARER = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"

_CONFIGURATION = """
issuer = "{issuer}"

[server]
listen = "127.0.0.1:1"  # each process is told its own

[store]
url = "{store_url}"

[keys]
master_key_file = "master.key"

[grants]
max_live_per_agent = 100000

[limits]
requests_per_agent = 1000000
requests_per_task = 1000000
mints_per_task = 1000000

[policies]
directory = "policies"

[[issuers]]
name = "dev"
issuer = "http://dev.localhost"
jwks_file = "dev-issuer.jwks.json"
algorithms = ["ES256"]

[[issuers]]
name = "once"
issuer = "http://once.localhost"
jwks_file = "once/dev-issuer.jwks.json"
algorithms = ["ES256"]
single_use = true

[[principals]]
name = "courier"
kind = "agent"
issuer = "once"
subject = "dev:courier"
roles = ["agent"]
{principals}
[[resources]]
identifier = "https://crm.example/api"
scopes = ["contacts:read", "contacts:write"]
verifiers = ["crm-api"]
"""
_PRINCIPALS = {
    "pipeline": ("orchestrator", "orchestrator"),
    "summarizer": ("agent", "agent"),
    "scribe": ("agent", "agent"),
    "crm-api": ("service", "verifier"),
    "ada": ("person", "admin"),
    "grace": ("person", "admin"),
    "audrey": ("person", "auditor"),
}


def principal(name: str) -> str:
    kind, role = _PRINCIPALS[name]
    return (
        f'\n[[principals]]\nname = "{name}"\nkind = "{kind}"\nissuer = "dev"\nsubject = "dev:{name}"\n'
        f'roles = ["{role}"]\n'
    )


def free_port(consecutive: int = 1) -> int:
    """A port nobody has, or the first of several.

    Below those the system gives to outgoing connections: of them a port that was free a moment ago is somebody's soon.
    Each of the suite's workers has its own, because nobody listens yet on what was given out a moment ago, and of two
    servers on one port each hears some of what the other was asked.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    room = 12_000 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    while True:
        first = 20_000 + worker * room + secrets.randbelow(room - consecutive)
        with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
            for port in range(first, first + consecutive):
                opened.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def until(done: Callable[[], Any], *, within_s: float = PATIENCE_S, what: str = "it") -> Any:
    """Ask again and again until the answer is true, for what a real process does in its own time."""
    deadline = time.monotonic() + within_s
    while True:
        answer = done()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"{what} did not happen within {within_s} s"
        time.sleep(0.02)


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """One configuration directory on one store; its issuer is the address of its first process."""

    directory: Path
    store_url: str = field(repr=False)
    issuer: str
    dev_issuer: DevIssuer = field(repr=False)
    port: int

    @classmethod
    def create(cls, directory: Path, store_url: str) -> Deployment:
        directory.mkdir(parents=True, exist_ok=True)
        port = free_port()
        deployment = cls(
            directory=directory,
            store_url=store_url,
            issuer=f"http://127.0.0.1:{port}",
            dev_issuer=DevIssuer.create_or_load(directory),
            port=port,
        )
        key_file = directory / "master.key"
        key_file.touch(mode=0o600)
        key_file.write_bytes(secrets.token_bytes(32))
        (directory / "policies").mkdir()
        DevIssuer.create_or_load(directory / "once")
        deployment.configure()
        return deployment

    @property
    def configuration(self) -> Path:
        return self.directory / "broker.toml"

    def configure(self, *, without: tuple[str, ...] = (), policies: Mapping[str, str] = POLICIES) -> None:
        """Write the configuration file, less the principals in `without`; nobody is told."""
        principals = "".join(principal(name) for name in _PRINCIPALS if name not in without)
        text = _CONFIGURATION.format(issuer=self.issuer, store_url=self.store_url, principals=principals)
        self.configuration.write_text(text)
        for old in (self.directory / "policies").glob("*.cedar"):
            old.unlink()
        for name, policy in policies.items():
            (self.directory / "policies" / name).write_text(policy)

    def single_use_token(self) -> str:
        """A workload token of `courier`, whose issuer's tokens are accepted once each."""
        once = replace(DevIssuer.create_or_load(self.directory / "once"), issuer="http://once.localhost")
        return once.token("dev:courier", self.issuer, system_clock())

    def token(self, name: str) -> str:
        return self.dev_issuer.token(f"dev:{name}", self.issuer, system_clock(), timedelta(hours=1))

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """One `broker …` command to its end."""
        return subprocess.run(
            [BROKER, *arguments, "--config", self.configuration],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    @contextmanager
    def broker(self, *options: str, **settings: str) -> Iterator[BrokerProcess]:
        """A `broker serve` that is ready."""
        with self.starting(*options, **settings) as process:
            process.until_ready()
            yield process

    @contextmanager
    def starting(self, *options: str, **settings: str) -> Iterator[BrokerProcess]:
        """A `broker serve` on its way, so that several can start side by side."""
        process = BrokerProcess(self, options, settings)
        process.start()
        try:
            yield process
        finally:
            process.end()

    @contextmanager
    def scheduler(self) -> Iterator[subprocess.Popen[bytes]]:
        """A `broker scheduler`."""
        command = [BROKER, "scheduler", "--config", self.configuration]
        with (self.directory / "scheduler.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            yield process
        finally:
            _end_group(process)


class BrokerProcess:
    """One `broker serve` and what a client says to it."""

    def __init__(self, deployment: Deployment, options: tuple[str, ...], settings: Mapping[str, str]) -> None:
        self.deployment = deployment
        self.options = options
        self.settings = settings
        taken = list(deployment.directory.glob("broker-*.log"))
        self.port = free_port() if taken else deployment.port
        self.metrics_port = free_port(4)  # one for each worker
        self.log = deployment.directory / f"broker-{self.port}.log"
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE_S)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return str(self.client.base_url).rstrip("/")

    def start(self) -> None:
        environment = {
            **os.environ,
            "BROKER__SERVER__LISTEN": f"127.0.0.1:{self.port}",
            "BROKER__SERVER__METRICS_LISTEN": f"127.0.0.1:{self.metrics_port}",
            **{f"BROKER__{name.upper()}": value for name, value in self.settings.items()},
        }
        command = [BROKER, "serve", "--config", self.deployment.configuration, *self.options]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def until_ready(self) -> None:
        def is_ready() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, (
                f"the broker ended before it was ready:\n{self.log.read_text()[-3000:]}"
            )
            with contextlib.suppress(httpx.TransportError):
                return self.client.get("/readyz").status_code == 200
            return False

        until(is_ready, what=f"a broker on {self.url}")

    def stop(self) -> int:
        """As an operator does: SIGTERM to the process that was started; answers its exit code."""
        assert self._process is not None
        self.ask_to_stop()
        return self.wait()

    def ask_to_stop(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        assert self._process is not None
        return self._process.wait(PATIENCE_S)

    def kill(self) -> None:
        """As a power cut does: SIGKILL to all of its processes at once."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(PATIENCE_S)

    def end(self) -> None:
        self.client.close()
        if self._process is not None:
            _end_group(self._process)

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    # --- what a client says --------------------------------------------------------------------------------------

    def as_(self, name: str, **headers: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.deployment.token(name)}", **headers}

    def get(self, path: str, by: str | None = None) -> httpx.Response:
        return self.client.get(path, headers=self.as_(by) if by else {})

    def post(self, path: str, by: str, json: Any = None, **headers: str) -> httpx.Response:
        return self.client.post(path, headers=self.as_(by, **headers), json=json)

    def open_task(self, *agents: str, **more: Any) -> str:
        body = {"purpose": "summarise the leads of May", "agents": agents or ["summarizer"], "deadline_s": 3600, **more}
        answer = self.post("/v1/tasks", "pipeline", body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def ask(self, task_id: str, by: str = "summarizer", **headers: str) -> httpx.Response:
        """A request for a grant, whatever comes of it."""
        body = {"task_id": task_id, "resource": CRM, "scopes": ["contacts:read"]}
        return self.post("/v1/grants", by, body, **headers)

    def grant(self, task_id: str, by: str = "summarizer") -> Granted:
        answer = self.ask(task_id, by)
        assert answer.status_code == 201, answer.text
        return Granted.of(answer.json())

    def complete(self, task_id: str) -> dict[str, Any]:
        answer = self.post(f"/v1/tasks/{task_id}/complete", "pipeline")
        assert answer.status_code == 200, answer.text
        receipt: dict[str, Any] = answer.json()
        return receipt

    def introspect(self, token: str, by: str = "crm-api") -> httpx.Response:
        assertion = {"client_assertion_type": JWT_BEARER, "client_assertion": self.deployment.token(by)}
        return self.client.post("/oauth2/introspect", data={"token": token, **assertion})

    def is_active(self, token: str) -> bool:
        answer = self.introspect(token)
        assert answer.status_code == 200, answer.text
        return bool(answer.json()["active"])

    def status_of(self, token: str) -> int:
        """What an offline verifier reads in the status list its token points to: 0 valid, 1 invalid."""
        pointer = jwt.decode(token, options={"verify_signature": False})["status"]["status_list"]
        path = pointer["uri"].removeprefix(self.deployment.issuer)
        answer = self.client.get(path)
        assert answer.status_code == 200, answer.text
        keys = jwt.PyJWKSet.from_dict(self.client.get("/oauth2/jwks").json())
        key = keys[jwt.get_unverified_header(answer.text)["kid"]]
        claims = jwt.decode(answer.text, key, algorithms=["ES256"], issuer=self.deployment.issuer)
        assert claims["sub"] == pointer["uri"]
        text = claims["status_list"]["lst"]
        bits = zlib.decompress(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        return bits[pointer["idx"] // 4] >> 2 * (pointer["idx"] % 4) & 3


@dataclass(frozen=True, kw_only=True)
class Granted:
    """A credential that was handed out."""

    id: str
    task_id: str
    token: str = field(repr=False)

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Granted:
        grant = answer["grant"]
        return cls(id=grant["id"], task_id=grant["task_id"], token=answer["credential"]["token"])


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Whatever of it is still there; its first process may be gone and its workers not."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(PATIENCE_S)
