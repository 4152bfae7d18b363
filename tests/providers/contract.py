"""What the contract runs against: the provider on the fake Vault, and on a real OpenBao, each behind a wire."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

import psycopg
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from broker.domain.clock import system_clock
from broker.domain.identity import GrantId, new_id
from broker.providers.base import SecretRequest
from broker.providers.vault import VaultProvider, VaultSettings
from tests.fakes.vault import FakeVault
from tests.fakes.wire import Wire
from tests.openbao import DATABASE, SOURCES, OpenBao, connect
from tests.processes import until

TTL = timedelta(minutes=2)


def csr(common_name: str = "a.agents.example") -> str:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name)
    return request.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()).public_bytes(Encoding.PEM).decode()


def ssh_key() -> str:
    key = ed25519.Ed25519PrivateKey.generate().public_key()
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


class Stand(ABC):
    """One kind of Vault, and the truth about what lives there, learned without the provider."""

    clock: Callable[[], datetime]

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.provider = self.new_provider()

    def new_provider(self, **auth: Any) -> VaultProvider:
        return VaultProvider(self.settings(**auth), self.clock, lambda: SOURCES, pause=self.pause)

    # Vault's queue works while the provider waits.
    pause: Callable[[float], object] | None = None

    def request(self, table: Mapping[str, Any] = DATABASE, **parameters: str) -> SecretRequest:
        grant_id = GrantId(new_id("grt", system_clock()))
        return SecretRequest(grant_id=grant_id, settings=table, parameters=parameters)

    def issue(self, table: Mapping[str, Any] = DATABASE, ttl: timedelta = TTL, **parameters: str):
        """A request with its handle and its secret."""
        request = self.request(table, **parameters)
        handle = self.provider.prepare(request, ttl)
        return request, handle, self.provider.issue(handle, request, ttl)

    def close(self) -> None:
        self.provider.close()
        self.wire.close()

    @abstractmethod
    def settings(self, **auth: Any) -> VaultSettings:
        """How the provider reaches it, logging in like this."""

    @abstractmethod
    def opens(self, username: str, password: str) -> bool:
        """Whether this login works at the target."""

    @abstractmethod
    def living(self) -> int:
        """How many logins there are at the target."""

    @abstractmethod
    def pass_time(self, by: timedelta) -> None:
        """Let this much time go by, or wait for it."""

    @abstractmethod
    def until(self, done: Callable[[], bool]) -> None:
        """What Vault does in its own time."""

    @abstractmethod
    def forget_own_tokens(self) -> None:
        """All that the broker logged in with is revoked at Vault."""

    @abstractmethod
    def stop(self) -> None:
        """Vault answers nobody."""

    @abstractmethod
    def go_on(self) -> None:
        """It answers again."""


class OnFake(Stand):
    def __init__(self, fake: FakeVault, directory: Any) -> None:
        self.fake = fake
        self.clock = fake.clock
        self.pause = lambda seconds: fake.work()
        self._directory = directory
        for name in ("role-id", "secret-id", "jwt"):
            (directory / name).write_text("a-word")
        super().__init__(Wire(fake.address))

    def settings(self, **auth: Any) -> VaultSettings:
        files = {
            "role_id_file": str(self._directory / "role-id"),
            "secret_id_file": str(self._directory / "secret-id"),
        }
        return VaultSettings.parse(
            {
                "address": self.wire.address,
                "auth": auth or {"method": "approle", **files},
                "deadline_s": 2,
                "lease_prefix_exclusive": True,
            }
        )

    def jwt_file(self) -> str:
        return str(self._directory / "jwt")

    def own_token(self) -> str:
        return self.fake.own_token().id

    def opens(self, username: str, password: str) -> bool:
        return username in self.fake.alive

    def living(self) -> int:
        return len(self.fake.alive)

    def pass_time(self, by: timedelta) -> None:
        self.fake.advance(by)

    def until(self, done: Callable[[], bool]) -> None:
        self.fake.work()
        assert done()

    def child(self, accessor: str) -> Mapping[str, Any]:
        token = next(token for token in self.fake.tokens.values() if token.accessor == accessor)
        return {"meta": token.meta, "orphan": token.orphan, "renewable": token.renewable, "type": token.type}

    def forget_own_tokens(self) -> None:
        for token in [token for token in self.fake.tokens.values() if "jit-broker" in token.policies]:
            del self.fake.tokens[token.id]
        self.fake.advance(timedelta(seconds=5))

    def stop(self) -> None:
        self.fake.sealed = True

    def go_on(self) -> None:
        self.fake.sealed = False


class OnOpenBao(Stand):
    def __init__(self, bao: OpenBao) -> None:
        self.bao = bao
        self.clock = system_clock
        super().__init__(Wire(bao.address))

    def settings(self, **auth: Any) -> VaultSettings:
        changed = {"address": self.wire.address, "deadline_s": 5}
        return self.bao.settings(**changed, **({"auth": auth} if auth else {}))

    def jwt_file(self) -> str:
        return str(self.bao.directory / "jwt")

    def own_token(self) -> str:
        body = {"policies": ["jit-broker"], "no_default_policy": True, "ttl": "10m"}
        return self.bao.root("post", "auth/token/create", body)["auth"]["client_token"]

    def opens(self, username: str, password: str) -> bool:
        try:
            connect(self.bao, {"username": username, "password": password}).close()
        except psycopg.OperationalError:
            return False
        return True

    def living(self) -> int:
        with self.bao.superuser() as db:
            return db.execute("SELECT count(*) FROM pg_roles WHERE rolname LIKE 'jit-grt-%'").fetchone()[0]

    def pass_time(self, by: timedelta) -> None:
        end = self.clock() + by + timedelta(seconds=1)
        until(lambda: self.clock() >= end, what="the time")

    def until(self, done: Callable[[], bool]) -> None:
        until(done, what="what OpenBao does in its own time")

    def child(self, accessor: str) -> Mapping[str, Any]:
        return self.bao.root("post", "auth/token/lookup-accessor", {"accessor": accessor})["data"]

    def forget_own_tokens(self) -> None:
        for accessor in self.bao.root("list", "auth/token/accessors")["data"]["keys"]:
            if "jit-broker" in self.child(accessor)["policies"]:
                self.bao.root("post", "auth/token/revoke-accessor", {"accessor": accessor})

    def stop(self) -> None:
        self.bao.seal()

    def go_on(self) -> None:
        self.bao.unseal()
