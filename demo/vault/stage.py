"""What this demo plays on: an empty OpenBao, a PostgreSQL with orders, and a broker that can be killed and started."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg

from broker.cli.dev import make_directory
from broker.providers.dev_issuer import DevIssuer
from broker.sdk import Client
from demo.expect import DemoFailed
from demo.stage import (
    Process,
    broker_command,
    free_ports,
    start,
    taking_signals,
    temporary_directory,
    wait_until_ready,
    workload_token,
)
from demo.vault.servers import DATABASE, OpenBao, PostgreSQL, start_openbao, start_postgres, unsealed
from demo.wire import Exchange, Query, Wire

ORDERS = "urn:db:orders:readonly"
ROLE = "jit-orders-ro"
LEASES = f"sys/leases/lookup/database/creds/{ROLE}"
CONFIGURATION = """
[vault]
address = "{address}"
auth = {{ method = "approle", role_id_file = "role-id", secret_id_file = "secret-id" }}
lease_prefix_exclusive = true

[[resources]]
identifier = "urn:db:orders:readonly"
provider = "vault"
scopes = ["select"]
sensitivity = "confidential"
max_ttl_s = 600
vault = {{ engine = "database", role = "jit-orders-ro" }}
"""
POLICY = """
@id("orders-read")
permit (
  principal == Agent::"summarizer",
  action == Action::"select",
  resource == Resource::"urn:db:orders:readonly"
) when { context.ttl_s <= 300 && context.task.purpose like "*order*" };
"""

_COMMAND_WITHIN_S = 60.0
_PATIENCE_S = 30.0
# Those of whoever runs the demo are for another Vault and another database.
_NOT_OURS = ("VAULT_", "BAO_", "BROKER_", "DATABASE_", "PG")


@dataclass(kw_only=True)
class VaultStage:
    directory: Path
    bao: OpenBao
    postgres: PostgreSQL
    wire: Wire
    broker_url: str
    _root: Path
    _end: contextlib.ExitStack = field(repr=False)
    _issuer: DevIssuer = field(repr=False)
    _broker: Process | None = None

    @property
    def broker(self) -> Process:
        if self._broker is None:
            raise LookupError("the broker was not started yet")
        return self._broker

    @property
    def database_url(self) -> str:
        """As Vault reaches it, with its own user, and without a password."""
        return f"postgresql://vault_admin@127.0.0.1:{self.postgres.port}/{DATABASE}"

    def start_broker(self) -> None:
        self._broker = start(
            self._end, "the broker", self.broker_url, self._root, broker_command(self.directory, self.broker_url)
        )
        wait_until_ready(self._broker, "/readyz")

    def token(self, name: str) -> str:
        return workload_token(self._issuer, name, self.broker_url)

    def client(self, name: str) -> Client:
        return Client(self.broker_url, token=self.token(name), http=self.wire, retry_deadline_s=_PATIENCE_S)

    def require_running(self) -> None:
        for process in (self.broker, self.bao.process, self.postgres.process):
            process.require_running()

    # --- what somebody types -----------------------------------------------------------------------------------------

    def run(self, *command: str, secrets: Mapping[str, str] | None = None) -> str:
        """What a command printed to stdout, in the broker's directory; `secrets` are in its environment."""
        programs = {"broker": Path(sys.executable).with_name("broker"), "bao": self.bao.program}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_OURS)}
        done = subprocess.run(  # noqa: S603 - the demo's own commands
            [programs[command[0]], *command[1:]],
            cwd=self.directory,
            env=kept | {"VAULT_ADDR": self.bao.url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"} | (secrets or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_WITHIN_S,
            check=False,
        )
        if done.returncode:
            said = (done.stdout + done.stderr).splitlines()[-15:]
            raise DemoFailed(
                f"`{' '.join(command[:3])}` to succeed", f"it ended with {done.returncode}", whose=command[0], log=said
            )
        return done.stdout

    # --- what the two servers say ------------------------------------------------------------------------------------

    def leases(self) -> tuple[Exchange, list[str]]:
        """Every lease of the broker's role, as the administrator of OpenBao sees it."""
        headers = {"Authorization": f"Bearer {self.bao.root_token}"}
        answer = self.wire.request("LIST", f"{self.bao.url}/v1/{LEASES}", headers=headers)
        if answer.status_code == 404:
            return self.wire.last, []
        if not answer.is_success:
            raise DemoFailed("the leases that are alive", self.wire.last)
        keys: list[str] = answer.json()["data"]["keys"]
        return self.wire.last, keys

    def as_superuser(self, statement: str) -> Query:
        with self.postgres.superuser() as session:
            return query(session, statement)

    def users(self) -> list[str]:
        """Users of the database that were made for agents."""
        return [name for (name,) in self.as_superuser(AGENTS_USERS).rows]


AGENTS_USERS = "SELECT rolname FROM pg_roles WHERE rolname LIKE 'jit-%' ORDER BY 1"


def query(session: psycopg.Connection, statement: str) -> Query:
    """One statement, and its rows or the server's error."""
    began = time.perf_counter()
    try:
        cursor = session.execute(statement)
        rows = cursor.fetchall() if cursor.description else []
        columns = tuple(column.name for column in cursor.description or ())
    except psycopg.Error as problem:
        return _asked(statement, began, error=_sentence(problem))
    return _asked(statement, began, columns=columns, rows=tuple(tuple(map(_cell, row)) for row in rows))


def login(server: PostgreSQL, user: str, password: str) -> Query:
    """An attempt to log in."""
    began = time.perf_counter()
    try:
        server.connect(user, password).close()
    except psycopg.Error as problem:
        return _asked("(log in)", began, error=_sentence(problem))
    return _asked("(log in)", began)


def _asked(statement: str, began: float, **answer: Any) -> Query:
    now = time.perf_counter()
    return Query(statement=statement, to="PostgreSQL", took_ms=(now - began) * 1000, answered_at=now, **answer)


def _sentence(problem: psycopg.Error) -> str:
    """What the server said, without the addresses that were tried."""
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    return next((line[line.index("FATAL") :] for line in lines if "FATAL" in line), lines[0])


def _cell(value: object) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What became of requests whose broker was killed: those that were delivered, and how many were cut off."""

    delivered: tuple[Mapping[str, Any], ...] = field(repr=False)
    cut: int


def cut_off(on: VaultStage, task_id: str, *, requests: int, after: int) -> Cut:
    """Ask so many times at once, and kill the broker as soon as `after` answers have arrived."""
    delivered: list[Mapping[str, Any]] = []
    wrong: list[str] = []
    came = threading.Condition()
    headers = {"Authorization": f"Bearer {on.token('summarizer')}"}
    body = {"task_id": task_id, "resource": ORDERS, "scopes": ["select"], "ttl_s": 120}

    def ask() -> None:
        try:
            answer = httpx.post(
                f"{on.broker_url}/v1/grants", json=body, headers=headers, trust_env=False, timeout=_PATIENCE_S
            )
        except httpx.TransportError:
            return
        with came:
            if answer.status_code == 201:
                delivered.append(answer.json())
            else:
                wrong.append(f"{answer.status_code} {answer.text[:200]}")
            came.notify()

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(requests)]
    for thread in threads:
        thread.start()
    with came:
        came.wait_for(lambda: wrong or len(delivered) >= after, timeout=_PATIENCE_S)
    on.broker.kill()
    for thread in threads:
        thread.join(_PATIENCE_S)
    if wrong or len(delivered) < after:
        raise on.broker.failed(f"{after} credentials before the broker was killed", "; ".join(wrong[:1]) or "fewer")
    return Cut(delivered=tuple(delivered), cut=requests - len(delivered))


@contextlib.contextmanager
def stage() -> Iterator[VaultStage]:
    """OpenBao and PostgreSQL started and empty; the broker has its directory and is not started."""
    with contextlib.ExitStack() as end:
        end.enter_context(taking_signals())
        root = temporary_directory(end)
        broker_port, bao_port, cluster_port, postgres_port = free_ports(4)
        process, program = start_openbao(end, root, bao_port, cluster_port)
        postgres = start_postgres(end, root, postgres_port)
        bao = unsealed(process, program)
        directory, broker_url = root / "broker", f"http://127.0.0.1:{broker_port}"
        make_directory(directory)
        with (directory / "broker.toml").open("a") as file:
            file.write(CONFIGURATION.format(address=bao.url))
        (directory / "policies" / "orders.cedar").write_text(POLICY)
        wire = end.enter_context(Wire({broker_url: "the broker", bao.url: "OpenBao"}))
        on = VaultStage(
            directory=directory,
            bao=bao,
            postgres=postgres,
            wire=wire,
            broker_url=broker_url,
            _root=root,
            _end=end,
            _issuer=DevIssuer.create_or_load(directory),
        )
        try:
            yield on
        except DemoFailed as problem:
            if not problem.log and on._broker is not None:
                problem.whose, problem.log = on.broker.name, on.broker.last_words()
            raise
