"""Where Vault is and how the broker logs in: the `[vault]` table, judged before anything is asked of the network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from broker.domain.errors import Invalid
from broker.providers.key_sets import is_loopback

# Every part of a path is one of these, by fullmatch: no slash, no dot in front, nothing that needs escaping (INV-31).
COMPONENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
MOST_COMPONENTS = 8

DEADLINE = timedelta(seconds=10)

_SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount/token"
# What each way to log in needs, and where its auth method is usually mounted.
_METHODS: Mapping[str, tuple[tuple[str, ...], str]] = MappingProxyType(
    {
        "token_file": (("token_file",), ""),
        "approle": (("role_id_file", "secret_id_file"), "approle"),
        "kubernetes": (("role", "token_file"), "kubernetes"),
        "jwt": (("role", "token_file"), "jwt"),
    }
)


def path_of(text: object, member: str) -> str:
    """A path of plain components; `Invalid` for anything that could lead elsewhere.

    >>> path_of("teams/crm/database", "mount")
    'teams/crm/database'
    """
    parts = text.split("/") if isinstance(text, str) else []
    if not 1 <= len(parts) <= MOST_COMPONENTS or not all(COMPONENT.fullmatch(part) for part in parts):
        raise Invalid(
            f"{member} must be 1 to {MOST_COMPONENTS} parts of letters, digits, '_', '.' and '-' with '/' between "
            f"them, without '/' at its ends; it is {ascii(text)[:80]}",
            member=member,
        )
    return "/".join(parts)


def component_of(text: object, member: str) -> str:
    """One part of a path."""
    if not isinstance(text, str) or not COMPONENT.fullmatch(text):
        raise Invalid(
            f"{member} must begin with a letter or digit and hold only letters, digits, '_', '.' and '-'; "
            f"it is {ascii(text)[:80]}",
            member=member,
        )
    return text


def address_of(text: str, member: str) -> str:
    """The address of a Vault: https, or http on loopback, and nothing behind the port."""
    parts = urlsplit(text)
    # Rebuilt and compared: urlsplit drops some characters, and the rest of an address has no place here.
    if not parts.hostname or f"{parts.scheme}://{parts.netloc}" != text.rstrip("/") or "@" in parts.netloc:
        raise Invalid(
            f"{member} must be a scheme and a host, such as https://vault.example:8200; it is {text[:200]!a}",
            member=member,
        )
    # The token in the header opens everything: it never crosses a network in the clear.
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(text)):
        raise Invalid(f"{member} must be https; http is for loopback only", member=member)
    return text.rstrip("/")


@dataclass(frozen=True, kw_only=True)
class VaultAuth:
    """How the broker proves itself to Vault. Files are read again at each login, so that they can be rotated."""

    method: str
    mount: str = ""
    role: str = ""
    token_file: str = ""
    role_id_file: str = ""
    secret_id_file: str = ""

    def __post_init__(self) -> None:
        needed, mount = _METHODS.get(self.method, ((), ""))
        if not needed:
            raise Invalid(
                f"auth.method must be one of {', '.join(_METHODS)}; it is {self.method!a}", member="auth.method"
            )
        if self.method == "kubernetes" and not self.token_file:
            object.__setattr__(self, "token_file", _SERVICE_ACCOUNT)
        for name in ("role", "token_file", "role_id_file", "secret_id_file"):
            given = bool(getattr(self, name))
            if given != (name in needed):
                wanted = "is needed" if name in needed else "has no meaning"
                raise Invalid(f"auth.{name} {wanted} with method {self.method}", member=f"auth.{name}")
        if self.method == "token_file":
            if self.mount:
                raise Invalid("auth.mount has no meaning with method token_file", member="auth.mount")
        else:
            object.__setattr__(self, "mount", path_of(self.mount or mount, "auth.mount"))
        if self.role:
            component_of(self.role, "auth.role")


@dataclass(frozen=True, kw_only=True)
class VaultSettings:
    """One Vault, one namespace. `ca_file` is for a certificate authority that is not a public one."""

    address: str
    auth: VaultAuth
    token_role: str = "jit"  # noqa: S105 - the name of a role
    namespace: str = ""
    ca_file: str | None = None
    deadline: timedelta = DEADLINE  # of each call
    lease_prefix_exclusive: bool = field(default=False)

    def __post_init__(self) -> None:
        address_of(self.address, "address")
        if self.namespace:
            path_of(self.namespace.strip("/"), "namespace")
        component_of(self.token_role, "token_role")
        if self.ca_file is not None and not Path(self.ca_file).is_file():
            raise Invalid(f"ca_file {self.ca_file} is not a file", member="ca_file")
        if not timedelta(seconds=1) <= self.deadline <= timedelta(seconds=60):
            raise Invalid("deadline_s must be between 1 and 60", member="deadline_s")
        if not self.lease_prefix_exclusive:
            raise Invalid(
                "lease_prefix_exclusive must be true: what is found under the lease prefixes of the resources and "
                "belongs to no grant is killed, so nobody else may take secrets from those roles. Give the broker "
                "roles of its own, and say true",
                member="lease_prefix_exclusive",
            )

    @classmethod
    def parse(cls, table: Mapping[str, Any]) -> VaultSettings:
        """The `[vault]` table, its `auth` table within; `Invalid` names the key that is wrong."""
        given = dict(table)
        auth = given.pop("auth", None)
        if not isinstance(auth, Mapping):
            raise Invalid('auth must be a table such as { method = "approle", … }', member="auth")
        deadline_s = given.pop("deadline_s", 10)
        if type(deadline_s) is not int:
            raise Invalid("deadline_s must be a whole number of seconds", member="deadline_s")
        _require_known(auth, {member.name for member in fields(VaultAuth)}, "auth.")
        _require_known(given, {member.name for member in fields(cls)} - {"auth", "deadline"}, "")
        if "method" not in auth or "address" not in given:
            missing = "address" if "address" not in given else "auth.method"
            raise Invalid(f"{missing} is missing", member=missing)
        return cls(auth=VaultAuth(**auth), deadline=timedelta(seconds=deadline_s), **given)


def _require_known(table: Mapping[str, Any], known: set[str], prefix: str) -> None:
    for name, value in table.items():
        if name not in known:
            raise Invalid(f"{prefix}{name} is unknown; known are {', '.join(sorted(known))}", member=f"{prefix}{name}")
        wanted = bool if name == "lease_prefix_exclusive" else str
        if type(value) is not wanted:
            raise Invalid(
                f"{prefix}{name} must be a {'boolean' if wanted is bool else 'string'}", member=f"{prefix}{name}"
            )
