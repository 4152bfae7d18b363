"""Vault: set up for the broker, and the proof that it is so. For the administrator of Vault, on the broker's machine.

No secret is taken from the command line, which everybody on the machine can read, and none is printed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
from click.core import ParameterSource

from broker.cli import output
from broker.cli.server import config_option
from broker.config import load, vault_administrator
from broker.domain.errors import Invalid, ProviderRefused, ProviderUnavailable
from broker.domain.secret import Secret
from broker.wiring import vault_setup

_PASSWORD = "DATABASE_PASSWORD"  # noqa: S105 - the name of a variable
_MOST_OF_A_FILE = 64 * 1024


@click.group()
def vault() -> None:
    """Set up Vault or OpenBao for the broker, and prove it."""


def _database_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = (
        click.option(
            "--database-url",
            metavar="URL",
            help="Make the PostgreSQL role of a resource too: where Vault reaches the database, with Vault's own user "
            "and without a password, like postgresql://vault_admin@db.example:5432/orders.",
        ),
        click.option(
            "--database-password-file",
            type=click.Path(path_type=Path, dir_okay=False),
            help=f"The file with the password of that user. Or set {_PASSWORD}, or be asked.",
        ),
        click.option("--database-password", envvar=_PASSWORD, hidden=True),
        click.option("--resource", help="Whose role it is; not needed where one resource has engine database."),
        click.option(
            "--member-of",
            metavar="ROLE",
            help="The group in the database that holds the privileges; the name of Vault's role with _ for -.",
        ),
        click.option(
            "--heir", metavar="ROLE", help="Who inherits what a user leaves behind; the group's name and _heir."
        ),
        click.option(
            "--connection",
            metavar="NAME",
            help="What Vault calls the connection, where several resources share one; the name of Vault's role.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@vault.command("setup")
@config_option
@click.option("--apply", "and_apply", is_flag=True, help="Do it, as the administrator in VAULT_ADDR and VAULT_TOKEN.")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file with the administrator's token. Or set VAULT_TOKEN, or be asked.",
)
@_database_options
@click.option("--sql", "only_sql", is_flag=True, help="Print what a superuser runs in the database, and nothing else.")
@click.option(
    "--program",
    type=click.Choice(["bao", "vault"]),
    default="bao",
    show_default=True,
    help="Whose command line the script that is printed uses.",
)
@output.json_option
def setup(
    config: Path,
    and_apply: bool,
    token_file: Path | None,
    only_sql: bool,
    program: str,
    database_url: str | None,
    database_password_file: Path | None,
    database_password: str | None,
    **names: str | None,
) -> None:
    """Give the broker what it needs at Vault, and no more: policies, token role, login.

    Prints a script for the command line of OpenBao or Vault, or does the same itself with --apply. With
    --database-url it makes a role whose PostgreSQL users end for good: no login, no open session, nothing left.
    All of it may be repeated. A login that is in its files already and good is kept.

    \b
    broker vault setup --config broker.toml                                        # prints a script
    broker vault setup --config broker.toml --apply                                # policies, token role, login
    DB=postgresql://vault_admin@db.example:5432/orders
    broker vault setup --config broker.toml --database-url $DB --sql | psql orders # what the database needs first
    broker vault setup --config broker.toml --database-url $DB --apply             # and the role that makes its users
    """
    _refuse_passwords_on_the_command_line()
    if (only_sql or any(names.values()) or database_password_file) and database_url is None:
        raise click.UsageError("which database? Give --database-url too")
    if only_sql and and_apply:
        raise click.UsageError("--sql prints and --apply writes: run one after the other")
    made = vault_setup(load(config, before_vault_setup=True))
    with _wrong_usage():
        target = made.database_target(database_url, **names) if database_url else None
    if target is not None and only_sql:
        sql = target.sql
        output.show({"sql": sql}, lambda console: click.echo(sql, nl=False))
        return
    if not and_apply:
        script = made.script(target, program=program)
        listed = [{"path": item.path, "body": dict(item.body)} for item in made.requests(target)]
        value = {"applied": False, "requests": listed, "script": script, "sql": target.sql if target else None}
        output.show(value, lambda console: click.echo(script, nl=False))
        if target is not None:
            output.say("the database comes first: the same command with --sql prints what a superuser runs there")
        return
    administrator = vault_administrator()
    token = _secret(token_file, administrator.token, "the administrator's token at Vault", "VAULT_TOKEN")
    password = None
    if target is not None:
        given = Secret(database_password) if database_password else None
        what = f"the password of {target.administrator} in the database"
        password = _secret(database_password_file, given, what, _PASSWORD)
    at = administrator.address or made.settings.address
    if at.rstrip("/") != made.settings.address:
        output.say(f"VAULT_ADDR is {at}, and the broker's configuration says {made.settings.address}: is it the same?")
    # The one step that reaches further than Vault itself.
    hint = {target.config_path: "was done what --sql prints, and is the password right?"} if target else {}
    with _asking_vault(hint):
        done = made.apply(token, target, password, address=at)
    rows = [*(("Vault", *written) for written in done.paths.items()), *(("file", *kept) for kept in done.files.items())]
    value = {
        "applied": True,
        "address": at,
        "vault": dict(done.paths),
        "files": dict(done.files),
        "left_to_do": made.left_to_do,
    }
    output.show(value, output.table(("where", "what", "state"), rows, empty="nothing"))
    if made.left_to_do:
        output.say(made.left_to_do)
    output.say(f"now prove it: broker vault check --config {config}")


@vault.command("check")
@config_option
@output.json_option
def check(config: Path) -> None:
    """Prove with the broker's own token that it can do what it must at Vault, and nothing else that matters.

    Makes a token as for a grant, asks what that one could open, and ends it. Takes no secret.

    \b
    broker vault check --config /etc/broker/broker.toml
    """
    made = vault_setup(load(config))
    with _asking_vault():
        found = made.check()
    wrong = [finding for finding in found if not finding.ok]
    items = [{"path": finding.path, "what": finding.sentence, "ok": finding.ok} for finding in found]
    rows = [("ok" if item["ok"] else "WRONG", item["what"], item["path"]) for item in items]
    drawn = output.table(("", "what must be so", "path"), rows, empty="nothing was asked")
    output.show({"ok": not wrong, "address": made.settings.address, "findings": items}, drawn)
    if wrong:
        raise output.fail(
            f"{len(wrong)} of {len(found)} are not as they must be: run `broker vault setup --apply` as the "
            "administrator of Vault, and take away what else the broker's token was given"
        )


def _refuse_passwords_on_the_command_line() -> None:
    context = click.get_current_context()
    if context.get_parameter_source("database_password") is ParameterSource.COMMANDLINE:
        raise click.UsageError(
            f"a password on the command line can be read by others: use --database-password-file or {_PASSWORD}"
        )


def _secret(file: Path | None, given: Secret | None, what: str, variable: str) -> Secret:
    """A secret from its file, from the environment, or typed by whoever sits there."""
    if file is not None:
        try:
            with file.open("rb") as opened:
                text = opened.read(_MOST_OF_A_FILE).decode().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as problem:
            reason = problem.strerror if isinstance(problem, OSError) else "it is not UTF-8"
            raise output.fail(f"{file} cannot be read: {reason}") from None
        if not text:
            raise output.fail(f"{file} is empty: {what} belongs there")
        return Secret(text)
    if given is not None:
        return given
    if not sys.stdin.isatty():
        raise click.UsageError(f"{what} is needed: set {variable}, or name a file")
    return Secret(click.prompt(what, hide_input=True, err=True))


@contextmanager
def _wrong_usage() -> Iterator[None]:
    try:
        yield
    except Invalid as problem:
        option = f"--{problem.member.replace('_', '-')}" if problem.member else None
        raise click.BadParameter(problem.detail, param_hint=option) from None


@contextmanager
def _asking_vault(hints: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
    """What Vault said is for whoever runs this: they administer it. `hints` has more for what was asked at a path."""
    try:
        yield
    except (ProviderRefused, ProviderUnavailable) as problem:
        code = output.REFUSED if isinstance(problem, ProviderRefused) else output.UNREACHABLE
        reason = problem.reason or ""
        hint = next((hint for path, hint in hints.items() if reason.startswith(f"{path}: ")), "")
        told = [f"{problem.detail}: {reason}" if reason else problem.detail, *([hint] if hint else [])]
        raise output.fail("\n".join(told), code=code) from None
