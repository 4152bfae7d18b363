"""A house whose resources are made by a Vault that is nastier than the real one, over HTTP and by the real provider.

One clock for both: what time ends at Vault it ends in the house too.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from broker.domain.catalogue import Resource
from broker.domain.errors import BrokerError
from broker.domain.grant import Issued
from broker.domain.lease import Lease
from broker.domain.lifecycle import LeaseState
from broker.domain.task import Task
from broker.providers.dev_issuer import DevIssuer
from broker.providers.vault import VaultSettings
from broker.wiring import build
from tests.fakes.vault import FakeVault
from tests.house import POLICIES, House, TestClock, catalogue_for, settings_for

ORDERS = "urn:db:orders:readonly"
AGENTS = "urn:mtls:agents"
HOSTS = "urn:ssh:hosts"
CLOUD = "urn:cloud:deployer"
UNMADE = "urn:db:nobody-made-its-role"

_TABLES: dict[str, dict[str, Any]] = {
    ORDERS: {"engine": "database", "role": "jit-orders-ro"},
    AGENTS: {"engine": "pki", "role": "jit-agent", "bound_s": 60},
    HOSTS: {"engine": "ssh", "role": "jit-host", "principals": "deploy"},
    CLOUD: {
        "engine": "generic",
        "mount": "aws",
        "path": "sts/jit-deployer",
        "method": "write",
        "ttl_parameter": "ttl",
        "least_ttl_s": 600,
        "revocation": "ttl_only",
    },
    UNMADE: {"engine": "database", "role": "nobody-made-it"},
}
_RESOURCES = tuple(
    Resource(identifier=identifier, provider="vault", scopes=("use",), settings=table)
    for identifier, table in _TABLES.items()
)
_POLICY = """
@id("of-vault")
permit (principal, action == Action::"use", resource) when { resource.provider == "vault" };
"""


class OneClock(TestClock):
    """The fake's own time, moved for both."""

    def __init__(self, fake: FakeVault) -> None:
        self._fake = fake

    def __call__(self) -> datetime:
        return self._fake.now

    @property  # type: ignore[override]
    def at(self) -> datetime:
        return self._fake.now

    @at.setter
    def at(self, moment: datetime) -> None:
        self._fake.advance(moment - self._fake.now)

    def forward(self, **by: int) -> datetime:
        self._fake.advance(timedelta(**by))
        return self._fake.now


class VaultHouse(House):
    fake: FakeVault

    def ask(self, task: Task | None = None, **more: Any) -> Issued:
        """A secret, through the service; of the database if nothing else is said."""
        wanted = {"resource": ORDERS, "scope": "use", "takes_secrets": True} | more
        return self.issue(task or self.open_task(), **wanted)

    def lease_of(self, grant_id: str) -> Lease:
        lease = self.broker.verification.find_grant(self.caller("ada"), grant_id)[2]
        assert lease is not None
        return lease

    def leases(self) -> list[Lease]:
        """Every one, the oldest first."""
        return [lease for lease, _ in self.broker.leases.page(self.caller("ada"), {})][::-1]

    def tick(self, seconds: int = 61) -> None:
        """So much time, then one run of each of the broker's jobs; what Vault does not answer waits for the next."""
        self.clock.forward(seconds=seconds)
        for job in (
            self.broker.debts.recover,
            self.broker.sweeper.sweep,
            self.broker.debts.pay,
            self.broker.reconciliation.run,
        ):
            try:
                job()
            except BrokerError:
                continue

    def settle(self) -> None:
        """Let everything that is owed come to its end, however long that takes."""
        for _ in range(40):
            self.tick()
            if all(lease.state is LeaseState.RELEASED for lease in self.leases()):
                return
        raise AssertionError(f"this is still owed: {self.leases()}")

    def events(self, type_: str) -> list[Any]:
        return self.broker.audit_trail.page(self.caller("audrey"), {"type": type_}, before=None, limit=1000)

    def rows(self, statement: str) -> list[Any]:
        with self.broker.database.read() as db:
            return list(db.execute(sa.text(statement)))


@contextmanager
def fake_vault(tls: ssl.SSLContext | None = None) -> Iterator[FakeVault]:
    made = FakeVault(tls)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def house_on_vault(
    fake: FakeVault, store_url: str, directory: Path, *, looked: bool = True, ca_file: str | None = None, **limits: int
) -> Iterator[VaultHouse]:
    """Two houses on one store and one fake are two brokers. `looked`: it has compared, and issues."""
    for name in ("role-id", "secret-id"):
        (directory / name).write_text("a-word")
    table: dict[str, Any] = {
        "address": fake.address,
        "auth": {
            "method": "approle",
            "role_id_file": str(directory / "role-id"),
            "secret_id_file": str(directory / "secret-id"),
        },
        "deadline_s": 3,
        "lease_prefix_exclusive": True,
    }
    if ca_file is not None:
        table["ca_file"] = ca_file
    clock = OneClock(fake)
    issuer = DevIssuer.create_or_load(directory)
    catalogue = catalogue_for(issuer, policies=POLICIES | {"vault.cedar": _POLICY})
    catalogue = replace(catalogue, resources=(*catalogue.resources, *_RESOURCES))
    settings = replace(settings_for(store_url, directory, catalogue, **limits), vault=VaultSettings.parse(table))
    broker = build(settings, clock=clock)
    # Vault's queue works while the broker waits for it.
    broker.debts._providers["vault"]._ending._pause = lambda _seconds: fake.work()  # type: ignore[attr-defined]
    broker.apply(by="tests")
    if looked:
        broker.reconciliation.run()
    house = VaultHouse(broker=broker, clock=clock, issuer=issuer)
    house.fake = fake
    try:
        yield house
    finally:
        broker.close()
