"""The transit engine as what wraps the broker's own keys: a key of Vault's that never leaves it.

It sees 32 random bytes at a time and never a signing key: what those bytes seal stays with the broker. Each is bound,
as associated data, to what it is for. Old versions of Vault's key open what they
wrapped until an administrator ends that.
"""

from __future__ import annotations

import base64
import binascii
import re

from broker.domain.clock import Clock
from broker.domain.errors import Invalid, ProviderUnavailable
from broker.providers.vault.connection import Answer, Connection
from broker.providers.vault.login import Login
from broker.providers.vault.settings import VaultSettings, component_of, path_of

# As Vault writes it, with the version of its key. What is longer than any key of ours is nothing we wrapped.
_WRAPPED = re.compile(r"vault:v[1-9][0-9]{0,8}:[A-Za-z0-9+/]{4,1000}={0,2}")


def transit_paths(key: str) -> tuple[str, str]:
    """(mount, name) of a key such as `transit/keys/broker`."""
    mount, found, name = key.rpartition("/keys/")
    if not found:
        raise Invalid(f"a key of the transit engine is <mount>/keys/<name>; it is {ascii(key)[:80]}")
    return path_of(mount, "mount"), component_of(name, "name")


class TransitKey:
    """One key of one Vault. Every call is a request, with the broker's own token: never within a transaction."""

    def __init__(self, settings: VaultSettings, key: str, clock: Clock) -> None:
        mount, name = transit_paths(key)
        self.name = f"{mount}/keys/{name}"
        self._encrypt, self._decrypt = f"{mount}/encrypt/{name}", f"{mount}/decrypt/{name}"
        self._connection = Connection.of(settings)
        self._login = Login(self._connection, settings.auth, clock)

    def close(self) -> None:
        self._connection.close()

    def wrap(self, plaintext: bytes, *, bound_to: bytes) -> str:
        """What only this key opens, and only for the same `bound_to`. ProviderRefused, or ProviderUnavailable."""
        answer = self._ask(self._encrypt, {"plaintext": _text(plaintext), "associated_data": _text(bound_to)})
        if not answer.ok:
            answer.fail("wrap a key of the broker", self._encrypt)
        wrapped = answer.table("data").get("ciphertext")
        if not isinstance(wrapped, str) or not _WRAPPED.fullmatch(wrapped):
            raise ProviderUnavailable("Vault wrapped a key in a way that cannot be read", reason=self._encrypt)
        return wrapped

    def unwrap(self, wrapped: str, *, bound_to: bytes) -> bytes:
        """What was wrapped for exactly this; `Invalid` where Vault says that it is not that.

        ProviderRefused where the broker may not ask, ProviderUnavailable where there is no answer: that says nothing
        about what was wrapped.
        """
        if not _WRAPPED.fullmatch(wrapped):
            raise Invalid("Vault wrote nothing like it")
        answer = self._ask(self._decrypt, {"ciphertext": wrapped, "associated_data": _text(bound_to)})
        # Vault says 400 of a ciphertext that was changed, is bound to something else, or is of a key or a version that
        # it does not have. Taken for silence, a row that somebody planted would be one that cannot be judged yet.
        if answer.refused and answer.status == 400:
            raise Invalid(answer.reason)
        if not answer.ok:
            answer.fail("unwrap a key of the broker", self._decrypt)
        plaintext = answer.table("data").get("plaintext")
        try:
            return base64.b64decode(plaintext if isinstance(plaintext, str) else "-", validate=True)
        except (binascii.Error, ValueError):
            pass
        # Out here, without what could not be read: it may be most of a key (INV-30).
        raise ProviderUnavailable("Vault unwrapped a key in a way that cannot be read", reason=self._decrypt)

    def _ask(self, path: str, body: dict[str, str]) -> Answer:
        return self._login.speak(lambda token: self._connection.call("post", path, token=token, body=body))


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
