"""The set-up of one broker's Vault from its configuration: as a script for a person, or applied and proven.

The administrator's token and the database's password pass through and are kept nowhere. What Vault gives in return, the
broker's own login, goes into the files that the configuration names, with mode 0600.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from broker.domain.clock import Clock
from broker.domain.errors import Invalid, ProviderRefused, ProviderUnavailable
from broker.domain.identity import GrantId, new_id
from broker.domain.secret import Secret
from broker.providers.vault.connection import Answer, Connection
from broker.providers.vault.provider import VaultProvider
from broker.providers.vault.settings import VaultSettings, component_of
from broker.providers.vault.setup import (
    DatabaseRole,
    Finding,
    Layout,
    VaultRequest,
    app_role,
    apply,
    check,
    policies_and_token_roles,
    wrapping_key,
)
from broker.providers.vault.sources import SecretSource

PROGRAMS = ("bao", "vault")
PASSWORD = "DATABASE_PASSWORD"  # noqa: S105 - the name of a variable

_PERIOD = "24h"  # a token from a file lives on as long as it is renewed once in this time
_WORD = re.compile(r"[\x21-\x7e]{1,4096}")
_MAX_FILE = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class BrokeredResource:
    """A resource whose secrets come from Vault."""

    identifier: str
    source: SecretSource
    max_ttl: timedelta


@dataclass(frozen=True, kw_only=True)
class DatabaseTarget:
    """The PostgreSQL in which users are made, as Vault reaches it, and the role of Vault that makes them.

    `connection_url` has the places in which Vault puts what it logs in with; `administrator` is its own user there.
    """

    role: DatabaseRole
    connection_url: str
    administrator: str
    database: str
    allowed_roles: tuple[str, ...]

    @property
    def config_path(self) -> str:
        return f"{self.role.source.mount}/config/{self.role.connection}"

    @property
    def connection_body(self) -> dict[str, str | list[str]]:
        """Everything but the password."""
        template, _ = self.role.requests()
        return {
            "plugin_name": "postgresql-database-plugin",
            "allowed_roles": list(self.allowed_roles),
            "connection_url": self.connection_url,
            "username": self.administrator,
            "username_template": template.body["username_template"],
        }

    @property
    def sql(self) -> str:
        """What a superuser runs in the database once, before Vault is told of it."""
        group = self.role.member_of
        return (
            f"-- Once, as a superuser, in the database {self.database}: what Vault's own user needs to make users and "
            "to end them.\n"
            f"{self.role.target_sql(administrator=self.administrator)}"
            f'-- What the users may do is what "{group}" may, for example:\n'
            f'-- GRANT SELECT ON ALL TABLES IN SCHEMA public TO "{group}";\n'
            f"-- And the password that Vault logs in with:\n"
            f"-- \\password {self.administrator}\n"
            f"{self._maintenance_sql}"
        )

    @property
    def _maintenance_sql(self) -> str:
        if self.role.source.target is None:
            return ""
        return (
            f"-- The login through which the broker looks at the users themselves, for its target "
            f"{self.role.source.target}:\n"
            f"{self.role.maintenance_sql(administrator=self.administrator)}"
            f"-- And its password, which goes into the url_file of the target:\n"
            f"-- \\password {self.role.maintenance}\n"
        )


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What became of each path of Vault, in order: written, or enabled, be it before; of each file: written or kept."""

    paths: Mapping[str, str]
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class VaultSetup:
    """What one broker needs at Vault. Names of policies follow the token role, so that two brokers do not collide."""

    settings: VaultSettings
    resources: tuple[BrokeredResource, ...]
    clock: Clock
    wrapping_key: str | None = None

    @property
    def layout(self) -> Layout:
        name = self.settings.token_role
        return Layout(
            sources=tuple(resource.source for resource in self.resources),
            token_role=name,
            broker_policy=f"{name}-broker",
            child_policy=f"{name}-secrets",
            max_ttl=max((resource.max_ttl for resource in self.resources), default=timedelta(hours=1)),
            wrapping_key=self.wrapping_key,
        )

    # --- what is to be there -----------------------------------------------------------------------------------------

    def database_target(
        self, url: str, *, resource: str | None, member_of: str | None, heir: str | None, connection: str | None
    ) -> DatabaseTarget:
        """The target of a resource with engine database; `Invalid` names what is wrong."""
        found = self._database_resource(resource)
        role = found.source.role_path.removeprefix("creds/")
        group = member_of or re.sub(r"[^a-z0-9_]", "_", role.lower())
        connection_url, administrator, database = _without_login(url)
        mates = [mate.source.role_path.removeprefix("creds/") for mate in self._databases(found.source.mount)]
        target = DatabaseTarget(
            role=DatabaseRole(
                source=found.source,
                connection=component_of(connection or role, "connection"),
                member_of=group,
                heir=heir or f"{group}_heir",
                max_ttl=found.max_ttl,
            ),
            connection_url=connection_url,
            administrator=administrator,
            database=database,
            # A connection with a name of its own may be shared by all of the broker's roles on this engine.
            allowed_roles=tuple(dict.fromkeys(mates)) if connection else (role,),
        )
        target.role.target_sql(administrator=administrator)
        return target

    def _databases(self, mount: str | None = None) -> list[BrokeredResource]:
        return [
            resource
            for resource in self.resources
            if resource.source.engine == "database" and mount in (None, resource.source.mount)
        ]

    def _database_resource(self, identifier: str | None) -> BrokeredResource:
        found = [resource for resource in self._databases() if identifier in (None, resource.identifier)]
        if len(found) == 1:
            return found[0]
        known = ", ".join(resource.identifier for resource in self._databases()) or "none"
        if found:
            raise Invalid(f"there are several resources with engine database: {known}; name one", member="resource")
        raise Invalid(f"no such resource has engine database; those that have it: {known}", member="resource")

    def requests(self, target: DatabaseTarget | None = None) -> tuple[VaultRequest, ...]:
        """All of it in the order in which it is written, without any secret."""
        return (*self._base(), *self._engine(target))

    def _base(self) -> tuple[VaultRequest, ...]:
        auth, layout = self.settings.auth, self.layout
        login = app_role(layout, name=layout.broker_policy, mount=auth.mount) if auth.method == "approle" else ()
        return (*policies_and_token_roles(layout), *wrapping_key(layout), *login)

    def _engine(self, target: DatabaseTarget | None) -> tuple[VaultRequest, ...]:
        if target is None:
            return ()
        _, role = target.role.requests()
        return (
            VaultRequest(path=f"sys/mounts/{target.role.source.mount}", body={"type": "database"}, once=True),
            VaultRequest(path=target.config_path, body=target.connection_body),
            role,
        )

    @property
    def left_to_do(self) -> str | None:
        """What of the login is not the broker's to know: who may log in is decided by whoever attests them."""
        auth, policy = self.settings.auth, self.layout.broker_policy
        if auth.method not in ("kubernetes", "jwt"):
            return None
        return (
            f"the role {auth.role} of auth/{auth.mount} is yours to make: bind it to the broker's own identity, with "
            f"token_policies={policy} token_no_default_policy=true token_type=service"
        )

    # --- as a script -------------------------------------------------------------------------------------------------

    def script(self, target: DatabaseTarget | None = None, *, program: str = "bao") -> str:
        """The same for a person with the command line of OpenBao or of Vault: a shell script without secrets."""
        lines = [
            "#!/bin/sh",
            "# What the broker needs at Vault. Run it as the administrator of Vault; it may be repeated.",
            "set -eu",
        ]
        at = {
            "VAULT_ADDR": self.settings.address,
            "VAULT_NAMESPACE": self.settings.namespace,
            "VAULT_CACERT": self.settings.ca_file,
        }
        for name, value in at.items():
            if value:
                lines += [f"{name}=${{{name}:-{shlex.quote(value)}}}", f"export {name}"]
        if target is not None:
            lines.append(f': "${{{PASSWORD}:?set it to the password of {target.administrator} in the database}}"')
        for request in self._base():
            lines += ["", *_command(request, program)]
        lines += ["", *self._login_commands(program)]
        for request in self._engine(target):
            if target is not None and request.path == target.config_path:
                lines += ["", *_connection_command(request, program)]
            else:
                lines += ["", *_command(request, program)]
        return "\n".join(lines) + "\n"

    def _login_commands(self, program: str) -> Iterator[str]:
        auth = self.settings.auth
        role = f"auth/{auth.mount}/role/{self.layout.broker_policy}"
        yield "# The broker's own login. As the user the broker runs as, or chown the files to it."
        if auth.method == "approle":
            role_id, secret_id = shlex.quote(auth.role_id_file), shlex.quote(auth.secret_id_file)
            yield f"(umask 077; {program} read -field=role_id {role}/role-id > {role_id})"
            yield f"(umask 077; {program} write -force -field=secret_id {role}/secret-id > {secret_id})"
        elif auth.method == "token_file":
            body = _token_body(self.layout)
            words = " ".join(shlex.quote(f"{name}={_plain(value)}") for name, value in body.items())
            file = shlex.quote(auth.token_file)
            yield f"(umask 077; {program} write -field=token auth/token/create {words} > {file})"
        else:
            yield f"# {self.left_to_do}"

    # --- applied -----------------------------------------------------------------------------------------------------

    def apply(
        self,
        token: Secret,
        target: DatabaseTarget | None = None,
        password: Secret | None = None,
        *,
        address: str | None = None,
    ) -> Applied:
        """Write it all as the administrator whose token this is; may be repeated. The first refusal ends it.

        A login that is in its files already and good is kept, so that a broker that runs goes on.
        """
        self._require_places()
        connection = Connection.of(replace(self.settings, address=address or self.settings.address))
        try:
            apply(self._base(), connection, token)
            files = dict(self._log_in(connection, token))
            for request in self._engine(target):
                if target is not None and password is not None and request.path == target.config_path:
                    request = replace(request, body={**request.body, "password": password.reveal()})
                apply([request], connection, token)
        finally:
            connection.close()
        paths = {request.path: "enabled" if request.once else "written" for request in self.requests(target)}
        return Applied(paths=paths, files=files)

    def _require_places(self) -> None:
        """Refuse before anything is written at Vault what could not be kept afterwards."""
        for file in self._files():
            parent = Path(file).parent
            if not (parent.is_dir() and os.access(parent, os.W_OK)):
                raise ProviderRefused(
                    f"{file} cannot be written; make the directory {parent}, or run this as a user who may write there"
                )

    def _files(self) -> tuple[str, ...]:
        auth = self.settings.auth
        if auth.method == "approle":
            return auth.role_id_file, auth.secret_id_file
        return (auth.token_file,) if auth.method == "token_file" else ()

    def _log_in(self, connection: Connection, token: Secret) -> Iterator[tuple[str, str]]:
        """Each file of the login, and whether it was written or kept."""
        auth = self.settings.auth
        if auth.method == "approle":
            role = f"auth/{auth.mount}/role/{self.layout.broker_policy}"
            role_id = _given(connection.call("get", f"{role}/role-id", token=token), "data", "role_id", role)
            kept = _word_in(auth.role_id_file)
            same_role = kept is not None and kept.reveal() == role_id.reveal()
            yield auth.role_id_file, _keep(auth.role_id_file, None if same_role else role_id)
            secret_id = _word_in(auth.secret_id_file) if same_role else None
            if secret_id is None or not _knows(connection, token, role, secret_id):
                answer = connection.call("post", f"{role}/secret-id", token=token, body={})
                yield auth.secret_id_file, _keep(auth.secret_id_file, _given(answer, "data", "secret_id", role))
            else:
                yield auth.secret_id_file, _keep(auth.secret_id_file, None)
        elif auth.method == "token_file":
            kept = _word_in(auth.token_file)
            if kept is not None and _is_ours(connection, kept, self.layout):
                yield auth.token_file, _keep(auth.token_file, None)
            else:
                answer = connection.call("post", "auth/token/create", token=token, body=_token_body(self.layout))
                made = _given(answer, "auth", "client_token", "auth/token/create")
                yield auth.token_file, _keep(auth.token_file, made)

    # --- proven ------------------------------------------------------------------------------------------------------

    def check(self) -> tuple[Finding, ...]:
        """Whether the broker's own token can do what it must, and nothing else that matters (INV-29)."""
        layout = self.layout
        provider = VaultProvider(self.settings, self.clock, lambda: layout.sources)
        try:
            return check(provider, layout, GrantId(new_id("grt", self.clock())))
        finally:
            provider.close()


def _without_login(url: str) -> tuple[str, str, str]:
    """(as Vault wants it, user, database) of a PostgreSQL URL; `Invalid` where it holds a password or no user."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise Invalid("it cannot be read as a URL", member="database_url") from None
    if parts.password is not None or any(name == "password" for name, _ in parse_qsl(parts.query)):
        raise Invalid(
            "it holds a password, which others can read on a command line; leave it out and you are asked",
            member="database_url",
        )
    database = parts.path.removeprefix("/")
    if parts.scheme not in ("postgresql", "postgres") or not parts.username or not database or "/" in database:
        raise Invalid(
            "it must be postgresql://<Vault's own user>@<host>:<port>/<database>, as Vault reaches it",
            member="database_url",
        )
    if not url.isprintable() or "{{" in url or "#" in url or " " in url:
        raise Invalid("it has a character that has no place in such a URL", member="database_url")
    host = parts.netloc.rpartition("@")[2]
    query = f"?{parts.query}" if parts.query else ""
    return f"postgresql://{{{{username}}}}:{{{{password}}}}@{host}/{database}{query}", unquote(parts.username), database


def _command(request: VaultRequest, program: str) -> Iterator[str]:
    kind, _, rest = request.path.removeprefix("sys/").partition("/")
    if request.once:
        enable = {"mounts": "secrets", "auth": "auth"}[kind]
        listed = shlex.quote(f'"{rest}/"')
        yield f"{program} {enable} list -format=json | grep -qF {listed} ||"
        yield f"  {program} {enable} enable -path={rest} {request.body['type']}"
    elif kind == "policies":
        yield f"{program} policy write {rest.removeprefix('acl/')} - <<'HCL'"
        yield request.body["policy"]
        yield "HCL"
    else:
        yield f"{program} write {request.path} - <<'JSON'"
        yield json.dumps(request.body, indent=2)
        yield "JSON"


def _connection_command(request: VaultRequest, program: str) -> Iterator[str]:
    # By standard input: an argument can be read by everybody on the machine.
    yield f'printf %s "${PASSWORD}" | {program} write {request.path} \\'
    for name, value in request.body.items():
        yield f"  {shlex.quote(f'{name}={_plain(value)}')} \\"
    yield "  password=-"


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, list) else str(value)


def _token_body(layout: Layout) -> dict[str, str | bool | list[str]]:
    """A token for a file: an orphan, so that it does not end with the administrator's; without an end if renewed."""
    return {
        "policies": [layout.broker_policy],
        "no_default_policy": True,
        "no_parent": True,
        "period": _PERIOD,
        "display_name": layout.broker_policy,
    }


def _given(answer: Answer, table: str, member: str, path: str) -> Secret:
    if not answer.ok:
        answer.fail("give the broker its login", path)
    found = answer.table(table).get(member)
    if not isinstance(found, str) or not _WORD.fullmatch(found):
        raise ProviderUnavailable("Vault gave the broker no login", reason=f"{path}: there is no {member}")
    return Secret(found)


def _knows(connection: Connection, token: Secret, role: str, secret_id: Secret) -> bool:
    """Whether Vault still takes this secret id; it forgets them where it was made anew."""
    body = {"secret_id": secret_id.reveal()}
    answer = connection.call("post", f"{role}/secret-id/lookup", token=token, body=body)
    return answer.status == 200 and bool(answer.table("data"))


def _is_ours(connection: Connection, kept: Secret, layout: Layout) -> bool:
    answer = connection.call("get", "auth/token/lookup-self", token=kept)
    return answer.status == 200 and answer.table("data").get("policies") == [layout.broker_policy]


def _word_in(path: str) -> Secret | None:
    """The one word of a file; None where there is none, which is to be written then."""
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_FILE).decode("ascii", "replace").strip()
    except OSError:
        return None
    return Secret(text) if _WORD.fullmatch(text) else None


def _keep(path: str, secret: Secret | None) -> str:
    """Put a secret into a file that nobody else can read at any moment; without one, the file stays as it is."""
    try:
        if secret is None:
            os.chmod(path, 0o600)
            return "kept"
        _replace(Path(path), f"{secret.reveal()}\n")
    except OSError as problem:
        raise ProviderRefused(f"{path} cannot be written: {problem.strerror}") from None
    return "written"


def _replace(target: Path, text: str) -> None:
    # Beside it and moved over it: a broker that logs in meanwhile reads the old one or the new one.
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")  # mode 0600
    try:
        with open(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except OSError:
        os.unlink(name)
        raise


def brokered(resources: Iterable[tuple[str, Mapping[str, object], int]]) -> tuple[BrokeredResource, ...]:
    """Resources from (identifier, `vault` table, longest life in seconds)."""
    return tuple(
        BrokeredResource(identifier=identifier, source=SecretSource.parse(table), max_ttl=timedelta(seconds=longest_s))
        for identifier, table, longest_s in resources
    )
