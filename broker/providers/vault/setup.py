"""What an administrator sets up at Vault for the broker, and the proof that it is so and no more (INV-29).

Everything to be written is a value that can be printed before it is applied. The broker itself can write none of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from types import MappingProxyType
from typing import Any

from broker.domain.errors import Invalid
from broker.domain.identity import GrantId
from broker.domain.secret import Secret
from broker.providers.vault.connection import Connection
from broker.providers.vault.provider import VaultProvider
from broker.providers.vault.settings import component_of, path_of
from broker.providers.vault.sources import SecretSource

# A child token may live as long as the longest grant and what revoking it takes.
MARGIN = timedelta(seconds=120)

_SQL_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_IN_USE = "path is already in use"

# The user is called jit-<grant id>-<random>, so that the database's own log and its roles tell the grant. PostgreSQL
# cuts names at 63.
USERNAME_TEMPLATE = '{{ printf "%s-%s" (.DisplayName | replace "token-" "" | truncate 44) (random 12) }}'
# What comes of it: a child token's display name is jit-<grant id>, in which Vault writes "-" for "_". Read by Python
# and by PostgreSQL alike.
USERNAME = "jit-grt-([0-7][0-9a-hjkmnp-tv-z]{25})-[A-Za-z0-9]{12}"

_SESSIONS = "PERFORM pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity WHERE usename = {text}; "


def _if_exists(statements: str) -> str:
    """A block that does nothing for a user that somebody dropped already: its lease must not become irrevocable."""
    exists = "EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = {text})"
    return f"DO $$ BEGIN IF {exists} THEN {statements} END IF; END $$;"


# How PostgreSQL ends a user for good: no new login, no open session, nothing owned, no role. {user} and {heir} stand
# for identifiers, {text} for the user's name as a literal. It begins in a transaction; harmless when the user is gone.
#
# PostgreSQL ends sessions neither at VALID UNTIL nor at DROP ROLE, and drops no role that owns anything. Vault runs
# these in one transaction, so the commits between them are what counts. The first: where dropping fails, the user may
# not log in all the same. The second: until it is committed whoever logs in again and again gets sessions that no list
# in the same transaction shows, and that outlive their role; the last one ends them.
ENDING = (
    "SELECT pg_catalog.set_config('jit.ended', coalesce((SELECT oid::text FROM pg_catalog.pg_roles "
    "WHERE rolname = {text}), ''), false)",
    _if_exists("ALTER ROLE {user} NOLOGIN;"),
    "COMMIT AND CHAIN",
    _if_exists(_SESSIONS + "REASSIGN OWNED BY {user} TO {heir}; DROP OWNED BY {user}; DROP ROLE {user};"),
    "COMMIT AND CHAIN",
    # By the number of the role, which has no name any more.
    "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity "
    "WHERE usesysid = nullif(pg_catalog.current_setting('jit.ended', true), '')::oid",
)


@dataclass(frozen=True, kw_only=True)
class VaultRequest:
    """One thing to write. `once`: it may be there already, and stays as it is."""

    path: str
    body: Mapping[str, Any] = field(default_factory=dict)
    once: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the set-up is for: the token roles and the secret roles of a configuration."""

    sources: tuple[SecretSource, ...]
    token_role: str = "jit"  # noqa: S105 - the name of a role
    broker_policy: str = "jit-broker"
    child_policy: str = "jit-secrets"
    max_ttl: timedelta = timedelta(hours=1)
    wrapping_key: str | None = None  # <mount>/keys/<name> of the transit engine, for the broker's own keys

    def __post_init__(self) -> None:
        for name in ("token_role", "broker_policy", "child_policy"):
            component_of(getattr(self, name), name)
        if self.wrapping_key is not None:
            path_of(self.wrapping_key, "wrapping_key")

    def transit(self, operation: str) -> str:
        """The path of an operation with the wrapping key."""
        mount, _, name = (self.wrapping_key or "").rpartition("/keys/")
        return f"{mount}/{operation}/{name}"

    @property
    def token_roles(self) -> tuple[str, ...]:
        """Those that open something: Vault takes no policy that allows nothing."""
        return tuple(sorted({source.token_role or self.token_role for source in self.sources}))

    def sources_of(self, token_role: str) -> tuple[SecretSource, ...]:
        return tuple(source for source in self.sources if (source.token_role or self.token_role) == token_role)

    def child_policy_of(self, token_role: str) -> str:
        """Each token role has a policy of its own, so that a role narrows what its tokens open."""
        return self.child_policy if token_role == self.token_role else f"{self.child_policy}-{token_role}"


def child_policy(sources: Iterable[SecretSource]) -> str:
    """What a child token may do: take secrets from the brokered roles."""
    rules = {source.path: ["read"] if source.reads else ["create", "update"] for source in sources}
    return "\n".join(_rule(path, capabilities) for path, capabilities in sorted(rules.items()))


def broker_policy(layout: Layout) -> str:
    """The least the broker needs: make child tokens, kill them and their leases, see what lives. It reads no secret."""
    lines = []
    for role in layout.token_roles:
        # Without a word on policies, uses or ids: those are the role's to decide.
        allowed = ["display_name", "explicit_max_ttl", "meta", "renewable", "ttl"]
        lines.append(_rule(f"auth/token/create/{role}", ["create", "update"], allowed=allowed))
    for path in ("auth/token/revoke-accessor", "auth/token/lookup-accessor", "sys/leases/lookup"):
        lines.append(_rule(path, ["create", "update"]))
    for prefix in sorted({source.lease_prefix for source in layout.sources if source.lease_prefix}):
        lines.append(_rule(f"sys/leases/lookup/{prefix}*", ["list", "sudo"]))
        lines.append(_rule(f"sys/leases/revoke/{prefix}*", ["create", "update"]))
    if layout.wrapping_key is not None:
        # Without "create", which would make a key of any kind under this name where it is missing.
        lines += [_rule(layout.transit(operation), ["update"]) for operation in ("encrypt", "decrypt")]
    # How the broker keeps its own token, and how it shows what it and its children may do.
    lines.append(_rule("auth/token/lookup-self", ["read"]))
    lines.append(_rule("auth/token/renew-self", ["create", "update"]))
    lines.append(_rule("sys/capabilities-self", ["create", "update"]))
    lines.append(_rule("sys/capabilities-accessor", ["create", "update"]))
    return "\n".join(lines)


def _rule(path: str, capabilities: list[str], *, allowed: list[str] | None = None) -> str:
    quoted = ", ".join(f'"{capability}"' for capability in capabilities)
    if allowed is None:
        return f'path "{path}" {{\n  capabilities = [{quoted}]\n}}'
    parameters = "\n".join(f'    "{name}" = []' for name in allowed)
    return f'path "{path}" {{\n  capabilities = [{quoted}]\n  allowed_parameters = {{\n{parameters}\n  }}\n}}'


def policies_and_token_roles(layout: Layout) -> tuple[VaultRequest, ...]:
    """The policies, and the token roles that bound what a child token can be."""
    requests = [VaultRequest(path=f"sys/policies/acl/{layout.broker_policy}", body={"policy": broker_policy(layout)})]
    for role in layout.token_roles:
        policy = layout.child_policy_of(role)
        requests.append(
            VaultRequest(path=f"sys/policies/acl/{policy}", body={"policy": child_policy(layout.sources_of(role))})
        )
        requests.append(
            VaultRequest(
                path=f"auth/token/roles/{role}",
                body={
                    "allowed_policies": [policy],
                    # The broker's own token may end or be replaced without ending what it made.
                    "orphan": True,
                    "renewable": False,
                    # Batch tokens have no accessor and cannot be revoked.
                    "token_type": "service",
                    "token_no_default_policy": True,
                    "token_explicit_max_ttl": int((layout.max_ttl + MARGIN).total_seconds()),
                    "token_num_uses": 0,
                },
            )
        )
    return tuple(requests)


def wrapping_key(layout: Layout) -> tuple[VaultRequest, ...]:
    """The key that wraps the broker's own: it can neither be exported nor deleted. One that is there stays as it is."""
    if layout.wrapping_key is None:
        return ()
    mount = layout.wrapping_key.rpartition("/keys/")[0]
    return (
        VaultRequest(path=f"sys/mounts/{mount}", body={"type": "transit"}, once=True),
        VaultRequest(path=layout.wrapping_key, body={"type": "aes256-gcm96", "exportable": False}),
    )


def app_role(layout: Layout, *, name: str = "jit-broker", mount: str = "approle") -> tuple[VaultRequest, ...]:
    """An AppRole through which the broker logs in with its policy and nothing else."""
    return (
        VaultRequest(path=f"sys/auth/{mount}", body={"type": "approle"}, once=True),
        VaultRequest(
            path=f"auth/{mount}/role/{component_of(name, 'name')}",
            body={
                "token_policies": [layout.broker_policy],
                "token_no_default_policy": True,
                "token_type": "service",
                "token_ttl": 3600,
                "token_max_ttl": 86400,
            },
        ),
    )


@dataclass(frozen=True, kw_only=True)
class DatabaseRole:
    """An example role for PostgreSQL. `member_of` holds the privileges, `heir` gets what a user leaves behind.

    `connection` is there already, with whatever is secret in it, and allows the role. Its user names change.
    """

    source: SecretSource
    connection: str
    member_of: str
    heir: str
    max_ttl: timedelta = timedelta(minutes=10)

    def __post_init__(self) -> None:
        component_of(self.connection, "connection")
        for name in ("member_of", "heir"):
            if not _SQL_NAME.fullmatch(getattr(self, name)):
                raise Invalid(f"{name} must be a PostgreSQL name in lower case", member=name)

    @property
    def creation_statement(self) -> str:
        # By membership: with grants on each table PostgreSQL fails near 2,400 live users, "row is too big".
        return (
            "CREATE ROLE \"{{name}}\" LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}' "
            f'IN ROLE "{self.member_of}"'
        )

    @property
    def revocation_statements(self) -> tuple[str, ...]:
        """`ENDING` as Vault takes it, which puts the user's name in its place."""
        names = {"user": '"{{name}}"', "text": "'{{name}}'", "heir": f'"{self.heir}"'}
        return tuple(statement.format(**names) for statement in ENDING)

    def requests(self) -> tuple[VaultRequest, ...]:
        mount, role = self.source.mount, self.source.role_path.removeprefix("creds/")
        return (
            VaultRequest(
                path=f"{mount}/config/{self.connection}",
                body={"username_template": USERNAME_TEMPLATE, "verify_connection": False},
            ),
            VaultRequest(
                path=f"{mount}/roles/{role}",
                body={
                    "db_name": self.connection,
                    "creation_statements": [self.creation_statement],
                    "revocation_statements": list(self.revocation_statements),
                    "default_ttl": int(self.max_ttl.total_seconds()),
                    "max_ttl": int(self.max_ttl.total_seconds()),
                },
            ),
        )

    def target_sql(self, *, administrator: str) -> str:
        """What a superuser runs once in the database, so that Vault's own user can create and end users.

        `createrole_self_grant` and `pg_signal_backend` are what ending sessions and reassigning needs (PostgreSQL 16).
        """
        if not _SQL_NAME.fullmatch(administrator):
            raise Invalid("administrator must be a PostgreSQL name in lower case", member="administrator")
        return (
            f'CREATE ROLE "{self.member_of}" NOLOGIN;\n'
            f'CREATE ROLE "{self.heir}" NOLOGIN;\n'
            f'CREATE ROLE "{administrator}" LOGIN CREATEROLE;\n'
            f"ALTER ROLE \"{administrator}\" SET createrole_self_grant = 'set, inherit';\n"
            f'GRANT pg_signal_backend TO "{administrator}";\n'
            f'GRANT "{self.member_of}" TO "{administrator}" WITH ADMIN OPTION;\n'
            f'GRANT "{self.heir}" TO "{administrator}";\n'
        )

    @property
    def maintenance(self) -> str:
        """The name of the login through which the broker looks at the database itself."""
        return f"{self.member_of}_maintenance"

    def maintenance_sql(self, *, administrator: str) -> str:
        """What a superuser runs once where the broker looks at the database itself: a login of its own for that.

        Whoever may drop a user of PostgreSQL is its administrator, so this one acts as Vault's own user does: it may
        what that may and no more, and nothing that belongs to others. It has no password yet.
        """
        if not _SQL_NAME.fullmatch(administrator):
            raise Invalid("administrator must be a PostgreSQL name in lower case", member="administrator")
        if not _SQL_NAME.fullmatch(self.maintenance):
            raise Invalid(f"member_of is too long for {self.maintenance} beside it", member="member_of")
        return (
            f'CREATE ROLE "{self.maintenance}" LOGIN NOINHERIT;\n'
            f'GRANT "{administrator}" TO "{self.maintenance}";\n'
            f"ALTER ROLE \"{self.maintenance}\" SET role = '{administrator}';\n"
        )


def pki_role(source: SecretSource, *, allowed_domains: tuple[str, ...], max_ttl: timedelta) -> VaultRequest:
    """A role whose certificates have leases, so that an accessor revokes them too."""
    role = source.role_path.split("/")[1]
    return VaultRequest(
        path=f"{source.mount}/roles/{role}",
        body={
            "allowed_domains": list(allowed_domains),
            "allow_subdomains": True,
            "allow_localhost": False,
            "allow_ip_sans": False,
            "allow_wildcard_certificates": False,
            "generate_lease": True,
            "no_store": False,
            # Vault makes no key of "any" kind, and an agent that brings its own may choose.
            "key_type": "any" if source.accepts else "ec",
            "key_bits": 0 if source.accepts else 256,
            "use_csr_common_name": "common_name" not in source.fixed,
            "use_csr_sans": "common_name" not in source.fixed,
            "ttl": int(max_ttl.total_seconds()),
            "max_ttl": int(max_ttl.total_seconds()),
        },
    )


def ssh_role(source: SecretSource, *, max_ttl: timedelta = timedelta(minutes=5)) -> VaultRequest:
    """A role that signs user certificates for the source's principals; the key id tells the grant."""
    role = source.role_path.split("/")[1]
    return VaultRequest(
        path=f"{source.mount}/roles/{role}",
        body={
            "key_type": "ca",
            "allow_user_certificates": True,
            "allow_host_certificates": False,
            "allow_user_key_ids": False,
            "allowed_users": source.fixed["valid_principals"],
            "default_extensions": {"permit-pty": ""},
            "key_id_format": "{{token_display_name}}",
            "ttl": int(max_ttl.total_seconds()),
            "max_ttl": int(max_ttl.total_seconds()),
        },
    )


def apply(requests: Iterable[VaultRequest], connection: Connection, token: Secret) -> None:
    """Write it all, in order, as the administrator whose token this is; the first refusal ends it. May be repeated."""
    for request in requests:
        answer = connection.call("post", request.path, token=token, body=request.body)
        if answer.ok or (request.once and any(_IN_USE in error for error in answer.errors)):
            continue
        answer.fail(f"write {request.path}", request.path)


# --- the proof -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing the broker's own token must be able to do, or must not."""

    path: str
    sentence: str
    ok: bool


def check(provider: VaultProvider, layout: Layout, probe: GrantId) -> tuple[Finding, ...]:
    """Whether the broker's token can do what it must and nothing else that matters, and each child token likewise.

    Vault judges its own policies, so that nothing dangerous has to be tried. A child token is really made and killed
    for each token role; `probe` is the grant id it carries. ProviderRefused or ProviderUnavailable where Vault cannot
    be asked: that is no proof.
    """
    needed, forbidden = _needed(layout), _forbidden(layout)
    found = provider.capabilities([*needed, *forbidden])
    findings = [
        # Root can do all of it, and everything else.
        Finding(path=path, sentence=f"the broker can {why}", ok="root" not in found[path] and wanted <= found[path])
        for path, (wanted, why) in needed.items()
    ]
    findings += [_cannot("the broker", path, why, found[path]) for path, why in forbidden.items()]
    for role in layout.token_roles:
        opens = {source.path: source for source in layout.sources_of(role)}
        closed = {**_ADMINISTRATION, f"auth/token/create/{role}": "make tokens"}
        held = provider.try_child_token(role, probe, [*opens, *closed])
        for path, source in opens.items():
            wanted = {"read"} if source.reads else {"update"}
            who = f"a child token of {role}"
            findings.append(Finding(path=path, sentence=f"{who} can take a secret", ok=wanted <= held[path]))
        findings += [_cannot(f"a child token of {role}", path, why, held[path]) for path, why in closed.items()]
    return tuple(findings)


def _cannot(who: str, path: str, why: str, found: frozenset[str]) -> Finding:
    # No answer for a path is no proof either.
    return Finding(path=path, sentence=f"{who} cannot {why}", ok=found == {"deny"})


_ADMINISTRATION: Mapping[str, str] = MappingProxyType(
    {
        "auth/token/create": "make tokens of its own choosing",
        "auth/token/create-orphan": "make orphans of its own choosing",
        "sys/mounts/jit-probe": "mount engines",
        "sys/auth/jit-probe": "enable auth methods",
        "sys/policies/acl/jit-probe": "write policies",
        "sys/leases/revoke-force/jit-probe": "make Vault forget leases",
        "sys/leases/revoke-prefix/jit-probe": "revoke leases of others",
        "sys/leases/tidy": "tidy leases, which forgets some",
        "sys/seal": "seal Vault",
        "sys/raw/jit-probe": "read the storage",
        "identity/entity": "change identities",
    }
)


def _needed(layout: Layout) -> dict[str, tuple[frozenset[str], str]]:
    """What the broker's token must be able to do, path by path."""
    update = frozenset({"update"})
    needed = {f"auth/token/create/{role}": (update, "make child tokens") for role in layout.token_roles}
    needed |= {
        "auth/token/revoke-accessor": (update, "kill a child token by its accessor"),
        "auth/token/lookup-accessor": (update, "see that a child token is dead"),
        "sys/leases/lookup": (update, "see that a lease is dead"),
        "auth/token/renew-self": (update, "keep its own token"),
    }
    if layout.wrapping_key is not None:
        needed[layout.transit("encrypt")] = (update, "wrap its own keys")
        needed[layout.transit("decrypt")] = (update, "unwrap its own keys")
    for source in layout.sources:
        if source.lease_prefix:
            listing = f"sys/leases/lookup/{source.lease_prefix}"
            needed[listing] = (frozenset({"list", "sudo"}), f"list what lives under {source.path}")
            needed[f"sys/leases/revoke/{source.lease_prefix}jit-probe"] = (update, f"revoke leases of {source.path}")
    return needed


def _forbidden(layout: Layout) -> dict[str, str]:
    """What would let the broker's token extend itself, or open what it only brokers."""
    forbidden = dict(_ADMINISTRATION)
    forbidden |= {
        f"sys/policies/acl/{layout.broker_policy}": "change its own policy",
        "sys/leases/revoke/jit-probe/creds/other/x": "revoke leases of other roles",
        "sys/leases/lookup/jit-probe/": "list leases of other roles",
    }
    for role in layout.token_roles:
        forbidden[f"auth/token/roles/{role}"] = "change what child tokens may be"
        forbidden[f"sys/policies/acl/{layout.child_policy_of(role)}"] = "change what child tokens may do"
    if layout.wrapping_key is not None:
        forbidden |= {
            layout.wrapping_key: "make or delete the key that wraps its own",
            f"{layout.wrapping_key}/config": "change the key that wraps its own",
            f"{layout.wrapping_key}/rotate": "rotate the key that wraps its own",
            layout.transit("export/encryption-key"): "export the key that wraps its own",
            layout.transit("encrypt").replace("/encrypt/", "/encrypt/jit-probe-"): "use another key",
        }
    for source in layout.sources:
        forbidden[source.path] = "take a secret itself"
        for kind in ("config", "roles"):
            forbidden[f"{source.mount}/{kind}/jit-probe"] = f"change {kind} of {source.mount}"
    return forbidden
