"""What seals the broker's keys, to be tested alike: a master key file, a fake Vault, a real OpenBao."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from broker.providers.vault import VaultAuth, VaultSettings
from broker.providers.vault.setup import Layout, VaultRequest, broker_policy, wrapping_key
from broker.providers.vault.transit import TransitKey
from broker.services.keys import Envelope, MasterKey, Sealing
from tests.fakes.vault import FakeVault
from tests.openbao import OpenBao

MASTER = b"m" * 32
KEY = "transit/keys/broker"
OTHER = "transit/keys/other"

Clock = Callable[[], datetime]


class OnFile:
    """Nobody is asked, so nobody is ever silent."""

    def sealing(self, clock: Clock, *, wrong: bool = False) -> Sealing:
        return MasterKey(b"w" * 32 if wrong else MASTER)

    def close(self) -> None:
        """Nothing is open."""


class OnFake:
    """The broker logs in with an AppRole; `transit/keys/other` is another key there."""

    def __init__(self, directory: Path) -> None:
        self.fake = FakeVault()
        self.fake.transit = {"broker": [os.urandom(32)], "other": [os.urandom(32)]}
        for name in ("role-id", "secret-id"):
            (directory / name).write_text("known-to-the-fake")
        self.settings = VaultSettings.parse(
            {
                "address": self.fake.address,
                "lease_prefix_exclusive": True,
                "deadline_s": 2,
                "auth": {
                    "method": "approle",
                    "role_id_file": str(directory / "role-id"),
                    "secret_id_file": str(directory / "secret-id"),
                },
            }
        )
        self._made: list[TransitKey] = []

    def wrapping(self, clock: Clock, key: str = KEY) -> TransitKey:
        self._made.append(TransitKey(self.settings, key, clock))
        return self._made[-1]

    def sealing(self, clock: Clock, *, wrong: bool = False) -> Sealing:
        return Envelope(self.wrapping(clock, OTHER if wrong else KEY))

    def falls_silent(self) -> None:
        self.fake.sealed = True

    def answers_again(self) -> None:
        self.fake.sealed = False

    def rotate(self) -> None:
        self.fake.transit["broker"].append(os.urandom(32))

    def require_version(self, version: int) -> None:
        self.fake.least_version = version

    def close(self) -> None:
        for made in self._made:
            made.close()
        self.fake.close()


class OnOpenBao:
    """The least policy that `broker vault setup` writes, and a token that has it and nothing else."""

    def __init__(self, bao: OpenBao, directory: Path) -> None:
        self.bao = bao
        self._made: list[TransitKey] = []
        self._tokens: dict[str, VaultSettings] = {}
        for key in (KEY, OTHER):
            name = f"jit-keys-{key.rpartition('/')[2]}"
            layout = Layout(sources=(), broker_policy=name, wrapping_key=key)
            policy = VaultRequest(path=f"sys/policies/acl/{name}", body={"policy": broker_policy(layout)})
            bao.apply(policy, *wrapping_key(layout))
            body = {"policies": [name], "no_default_policy": True, "ttl": "1h"}
            file = directory / name
            file.touch(mode=0o600)
            file.write_text(bao.root("post", "auth/token/create-orphan", body)["auth"]["client_token"])
            auth = VaultAuth(method="token_file", token_file=str(file))
            self._tokens[key] = VaultSettings(address=bao.address, auth=auth, lease_prefix_exclusive=True)

    @property
    def settings(self) -> VaultSettings:
        return self._tokens[KEY]

    def wrapping(self, clock: Clock, key: str = KEY) -> TransitKey:
        self._made.append(TransitKey(self._tokens[key], key, clock))
        return self._made[-1]

    def sealing(self, clock: Clock, *, wrong: bool = False) -> Sealing:
        return Envelope(self.wrapping(clock, OTHER if wrong else KEY))

    def falls_silent(self) -> None:
        self.bao.seal()

    def answers_again(self) -> None:
        self.bao.unseal()

    def rotate(self) -> None:
        self.bao.root("post", f"{KEY}/rotate", {})

    def require_version(self, version: int) -> None:
        self.bao.root("post", f"{KEY}/config", {"min_decryption_version": version})

    def close(self) -> None:
        for made in self._made:
            made.close()
        for key in (KEY, OTHER):
            self.bao.root("post", f"{key}/config", {"deletion_allowed": True})
            self.bao.root("delete", key)
