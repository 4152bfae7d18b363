"""What ends a token or a lease, and what tells whether it has ended: one call each, with the broker's own token.

A node that is behind knows neither what was made a moment ago nor what was ended. From OpenBao 2.7 on, what changed
something is answered with how far the storage was then (`X-Vault-Index`). With such an index, `since`, a node that has
not come so far answers a look with `Behind`. Without one a look is as new as the node that answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from broker.domain.errors import ProviderUnavailable
from broker.providers.vault.connection import Answer, Connection
from broker.providers.vault.login import Login
from broker.providers.vault.settings import COMPONENT

ACCESSOR = re.compile(r"[A-Za-z0-9][A-Za-z0-9.]{7,127}")
_MOST_DEPTH = 4


class Calls:
    """`ValueError` for a name that Vault cannot have given, before anything is asked."""

    def __init__(self, connection: Connection, login: Login) -> None:
        self._connection = connection
        self._login = login
        self._made_at: str | None = None

    @property
    def made_at(self) -> str | None:
        """The index at which this broker made something last; of what was made at once, one may be heard after a later.

        So it is second best, for what no step of its own end has told about.
        """
        return self._made_at

    def made(self, answer: Answer) -> None:
        """Keep the index of an answer that gave what was made."""
        self._made_at = answer.index or self._made_at

    def revoke_accessor(self, accessor: str) -> str | None:
        """End its token, and put its leases into Vault's queue. Answers the index, if a token was ended."""
        answer = self._ask("post", "auth/token/revoke-accessor", {"accessor": _accessor(accessor)})
        if not answer.ok and not says(answer, "invalid accessor"):
            answer.fail("revoke the token", "auth/token/revoke-accessor")
        # 204 alone: that it knows of no such token may say a node that is behind.
        return answer.index if answer.status == 204 else None

    def revoke_lease(self, reference: str) -> str | None:
        """End it at once. Answers the index of the active node, which says that it is done while its queue is at it."""
        # By path and not by body, so that Vault's policy can keep the broker to the leases of its own roles (INV-29).
        path = f"sys/leases/revoke/{path_of_lease(reference)}"
        answer = self._ask("put", path, {"sync": True})
        if not answer.ok and not says(answer, "invalid lease"):
            answer.fail("revoke the lease", path)
        return answer.index if answer.ok else None

    def is_token_dead(self, accessor: str, since: str | None = None) -> bool:
        answer = self._ask("post", "auth/token/lookup-accessor", {"accessor": _accessor(accessor)}, since)
        # The words and not the status: a 403 alone may be our own token, a 404 a proxy.
        if says(answer, "invalid accessor"):
            return True
        if answer.status == 200 and answer.table("data").get("accessor") == accessor:
            return False
        raise answer.unknown("look up the token", "auth/token/lookup-accessor")

    def lease(self, reference: str, since: str | None = None) -> Mapping[str, Any] | None:
        """What Vault knows of a lease; None only if it says that there is none."""
        answer = self._ask("put", "sys/leases/lookup", {"lease_id": path_of_lease(reference)}, since)
        if says(answer, "invalid lease"):
            return None
        data = answer.table("data")
        if answer.status == 200 and data.get("id") == reference:
            return data
        raise answer.unknown("look up the lease", "sys/leases/lookup")

    def leases_under(self, prefix: str, since: str | None = None, *, depth: int = _MOST_DEPTH) -> Iterable[str]:
        """Every lease under a prefix, which ends with a slash, and under what is in it, so many levels down."""
        answer = self._ask("list", f"sys/leases/lookup/{prefix}", None, since)
        # An empty list is a 404 with no errors; any other 404 says nothing about leases.
        if answer.status == 404 and answer.vaults and not answer.errors:
            return
        keys = answer.table("data").get("keys")
        if answer.status != 200 or not isinstance(keys, list):
            raise answer.unknown("list the leases of the broker", prefix)
        for key in keys:
            if not isinstance(key, str) or not COMPONENT.fullmatch(key.removesuffix("/")):
                raise ProviderUnavailable("Vault lists a lease whose name cannot be read")
            if not key.endswith("/"):
                yield prefix + key
            elif depth > 0:
                yield from self.leases_under(prefix + key, since, depth=depth - 1)

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None, since: str | None = None) -> Answer:
        return self._login.speak(lambda token: self._connection.call(method, path, token=token, body=body, since=since))


def path_of_lease(reference: str) -> str:
    """It came from Vault and was kept in a row; it goes into a path, so it is judged once more (INV-31)."""
    for part in reference.split("/"):
        _require(COMPONENT, part, "reference")
    return reference


def says(answer: Answer, words: str) -> bool:
    """Whether Vault itself says these words: the one thing that a proxy, a policy or a namespace cannot say."""
    return answer.refused and any(words in error for error in answer.errors)


def _accessor(text: str) -> str:
    _require(ACCESSOR, text, "handle")
    return text


def _require(pattern: re.Pattern[str], text: str, what: str) -> None:
    if not pattern.fullmatch(text):
        raise ValueError(f"not a {what} that Vault gave")
