"""`broker dev`: everything on one laptop, loopback only. Its directory can be deleted at any time."""

from __future__ import annotations

import re
import secrets
import shutil
import sys
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path

import click

from broker import samples
from broker.cli import output
from broker.cli.parameters import Duration
from broker.config import Settings, load
from broker.config.development import dev_issuer
from broker.domain.clock import system_clock

_DIRECTORY = Path(".broker-dev")
_PORT = 8080


@click.group(invoke_without_command=True)
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=_DIRECTORY,
    show_default=True,
    help="Where its database, keys and configuration live.",
)
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    metavar="PORT",
    help="Where it listens; the one it had before, or 8080 the first time.",
)
@click.pass_context
def dev(context: click.Context, directory: Path, port: int | None) -> None:
    """A whole broker on one laptop: SQLite, a development issuer, sample principals and policies.

    \b
    broker dev
    broker dev token summarizer
    """
    context.obj = (directory, port)
    if context.invoked_subcommand is None:
        serve_dev(directory, port)


@dev.command()
@click.argument("name")
@click.option("--user", "of_user", is_flag=True, help="NAME is a person on whose behalf an agent shall act.")
@click.option(
    "--lifetime", "lifetime_s", type=Duration(1, 3600), default="1h", show_default=True, help="How long it is good for."
)
@output.json_option
@click.pass_obj
def token(at: tuple[Path, int | None], name: str, of_user: bool, lifetime_s: int) -> None:
    """A workload token of the development issuer for principal NAME, or the token of a user.

    \b
    export BROKER_URL=http://127.0.0.1:8080
    export BROKER_TOKEN=$(broker dev token summarizer)
    broker dev token --user alice > alice.jwt
    """
    settings = load_dev(*at)
    if of_user:
        lifetime = timedelta(seconds=lifetime_s)
        signed = dev_issuer(at[0]).of_people().token(name, settings.issuer, system_clock(), lifetime)
        output.show({"token": signed}, lambda console: click.echo(signed))
        return
    subjects = {rule.name: rule.subject for rule in settings.catalogue.principals if rule.subject is not None}
    subject = subjects.get(name)
    if subject is None:
        near = get_close_matches(name, subjects, 1)
        hint = f"did you mean {near[0]!r}? There are" if near else "there are"
        raise output.fail(f"no principal is called {name!r} here; {hint}: {', '.join(subjects)}")
    signed = dev_issuer(at[0]).token(subject, settings.issuer, system_clock(), timedelta(seconds=lifetime_s))
    output.show({"token": signed}, lambda console: click.echo(signed))


def serve_dev(directory: Path, port: int | None) -> None:
    # Not before it is wanted: a token, which is made for each command that is tried, would take ten times as long.
    from broker import telemetry
    from broker.cli.server import prepare, run

    settings = load_dev(directory, port)
    prepare(settings, and_migrate=True)
    telemetry.log_to(sys.stderr)
    output.err().print(
        f"[bold]broker[/bold] on {settings.issuer}, everything in {directory}\n\n"
        f"  export BROKER_URL={settings.issuer}\n"
        "  export BROKER_TOKEN=$(broker dev token crm-pipeline)\n"
        '  broker task open --purpose "summarise the leads of May" --agent summarizer --deadline 1h\n'
    )
    run(settings, sweeping=True)


def load_dev(directory: Path, port: int | None) -> Settings:
    """The settings of a development directory, which is made if it is not there."""
    make_directory(directory)
    port = _port(directory, port)
    address = f"127.0.0.1:{port}"
    overrides = {"BROKER__ISSUER": f"http://{address}", "BROKER__SERVER__LISTEN": address}
    return load(directory / "broker.toml", environ=overrides)


def make_directory(directory: Path) -> None:
    """A directory with a configuration, sample policies, a master key and a development issuer."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    dev_issuer(directory)
    if not (directory / "master.key").exists():
        key_file = directory / "master.key"
        key_file.touch(mode=0o600)
        key_file.write_bytes(secrets.token_bytes(32))
    if not (directory / "policies").exists():
        shutil.copytree(samples.directory() / "policies", directory / "policies")
    if not (directory / "broker.toml").exists():
        shutil.copyfile(samples.directory() / "development.toml", directory / "broker.toml")
    for copy in (directory / "broker.toml", *(directory / "policies").iterdir()):
        # A copy has the mode of its original, or of the umask, and what others may write is refused.
        copy.chmod(copy.stat().st_mode & ~0o022)


def _port(directory: Path, given: int | None) -> int:
    """The port, kept: `broker dev token` must name the audience that `broker dev --port` listens as."""
    kept = directory / "port"
    if given is not None:
        kept.write_text(f"{given}\n")
        return given
    text = kept.read_text().strip() if kept.exists() else ""
    return int(text) if re.fullmatch("[0-9]{1,5}", text) else _PORT
