"""A system outside that does what a test tells it to, and a house whose resources are made there.

What an agent may send is judged by the very code that judges it for Vault.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from threading import Thread

from werkzeug.serving import WSGIRequestHandler, make_server

from broker.domain.catalogue import Resource
from broker.domain.clock import Clock
from broker.domain.errors import ProviderRefused, ProviderUnavailable
from broker.domain.identity import GrantId
from broker.domain.secret import SecretData
from broker.providers.base import Handle, IssuedSecret, LiveSecret, RevocationClass, SecretRequest
from broker.providers.dev_issuer import DevIssuer
from broker.providers.targets import Login
from broker.providers.vault import SecretSource
from broker.web.app import create_app
from broker.wiring import build
from tests.house import POLICIES, House, TestClock, catalogue_for, settings_for

ORDERS = "urn:db:orders:readonly"
AGENTS = "urn:mtls:agents"
HOSTS = "urn:ssh:hosts"
PASSWORD = "s3cret-of-the-database"
SEALED = "503: Vault is sealed"
LONGEST = timedelta(seconds=900)  # max_ttl_s of every resource here, and so the life of every role

_RESOURCES = (
    Resource(
        identifier=ORDERS,
        provider="vault",
        scopes=("select",),
        settings={"engine": "database", "role": "jit-orders-ro", "target": "orders"},
    ),
    Resource(
        identifier=AGENTS,
        provider="vault",
        scopes=("connect",),
        settings={"engine": "pki", "role": "jit-agent", "bound_s": 60},
    ),
    Resource(
        identifier=HOSTS,
        provider="vault",
        scopes=("login",),
        settings={"engine": "ssh", "role": "jit-host", "principals": "deploy"},
    ),
)
_POLICY = """
@id("outside")
permit (principal == Agent::"summarizer", action, resource) when { resource.provider == "vault" };
"""


class Outside:
    """`down`: it answers nothing. `refuses`: it makes nothing. `alive`: what opens something, by its reference."""

    settles_after = timedelta(seconds=120)

    def __init__(self, clock: Clock) -> None:
        self.down = False
        self.refuses = False
        self.alive: dict[str, str] = {}  # by the handle it was made under
        self._clock = clock
        self._made = 0

    def foresee(self, request: SecretRequest, ttl: timedelta) -> None:
        SecretSource.parse(request.settings).checked(request.parameters)

    def prepare(self, request: SecretRequest, ttl: timedelta) -> Handle:
        source = SecretSource.parse(request.settings)
        self._require_up()
        self._made += 1
        expires_at = self._clock() + ttl
        return Handle(
            value=f"accessor-{self._made}", revocation=source.revocation, expires_at=expires_at, bound=source.bound
        )

    def issue(self, handle: Handle, request: SecretRequest, ttl: timedelta) -> IssuedSecret:
        self._require_up()
        if self.refuses:
            raise ProviderRefused("the system that makes this credential said no", reason="403: no such role")
        reference = f"{request.settings['engine']}/creds/{handle.value}"
        self.alive[reference] = handle.value
        made = {
            "database": {"username": "jit-grt-1", "password": PASSWORD},
            "pki": {"certificate": "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n", "ca_chain": ["x"]},
            "ssh": {"signed_key": "ssh-ed25519-cert-v01@openssh.com AAAA"},
        }[str(request.settings["engine"])]
        # As a database's users do: they have the life of their role, and end with their token if it is known.
        lasts_until = max(handle.expires_at, self._clock() + LONGEST) if "username" in made else None
        return IssuedSecret(
            data=SecretData(made), reference=reference, expires_at=handle.expires_at, lasts_until=lasts_until
        )

    def revoke(self, handle: Handle | None, reference: str | None) -> None:
        self._require_up()
        for name, under in list(self.alive.items()):
            if name == reference or (handle is not None and under == handle.value):
                del self.alive[name]

    def list_live(self, known: Collection[str] = ()) -> Collection[LiveSecret]:
        self._require_up()
        return [LiveSecret(reference=reference, revocation=RevocationClass.HARD) for reference in self.alive]

    def _require_up(self) -> None:
        if self.down:
            raise ProviderUnavailable("the system that makes this credential did not answer", reason=SEALED)


class Target:
    """The logins a database has, by the grant in their name, whatever the system that makes them knows."""

    def __init__(self) -> None:
        self.down = False
        self.logins: set[str] = set()

    def list_logins(self) -> Collection[Login]:
        if self.down:
            raise ProviderUnavailable("the database did not answer")
        return [
            Login(name=f"jit-{grant_id}", grant_id=GrantId(grant_id), valid_until=None, sessions=1)
            for grant_id in sorted(self.logins)
        ]

    def end(self, login: Login) -> None:
        self.logins.discard(login.grant_id)


class OutsideHouse(House):
    """A house on it; whoever asks finds it reconciled."""

    outside: Outside

    def pay(self, *, times: int = 1) -> None:
        """Let the debts be tried so often, each time as late as it takes for all of them to be due."""
        for _ in range(times):
            self.clock.forward(seconds=61)
            self.broker.debts.pay()


@contextmanager
def house_on_outside(
    store_url: str, directory: Path, *, looked: bool = True, target: Target | None = None, **limits: int
) -> Iterator[OutsideHouse]:
    clock = TestClock()
    outside = Outside(clock)
    issuer = DevIssuer.create_or_load(directory)
    catalogue = catalogue_for(issuer, policies=POLICIES | {"outside.cedar": _POLICY})
    catalogue = replace(catalogue, resources=(*catalogue.resources, *_RESOURCES))
    broker = build(
        settings_for(store_url, directory, catalogue, **limits),
        clock=clock,
        providers={"vault": outside},
        targets={} if target is None else {"orders": target},
    )
    broker.apply(by="tests")
    if looked:
        broker.reconciliation.run()
    house = OutsideHouse(broker=broker, clock=clock, issuer=issuer)
    house.outside = outside
    try:
        yield house
    finally:
        broker.close()


@contextmanager
def serving(house: House) -> Iterator[str]:
    """The address of the house over HTTP on loopback."""

    class Quiet(WSGIRequestHandler):
        def log(self, type: str, message: str, *args: object) -> None:
            pass

    server = make_server("127.0.0.1", 0, create_app(house.broker), threaded=True, request_handler=Quiet)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
