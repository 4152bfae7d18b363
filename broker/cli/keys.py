"""Signing keys. They are the broker's own, so these commands need its configuration, not a workload token."""

from __future__ import annotations

import getpass
from datetime import UTC, datetime
from pathlib import Path

import click

from broker.cli import output
from broker.cli.server import config_option, opened
from broker.config import load
from broker.domain.clock import rfc3339
from broker.domain.identity import Caller, Principal, Role
from broker.wiring import Broker


@click.group()
def keys() -> None:
    """List, rotate and condemn signing keys."""


@keys.command("list")
@config_option
@output.json_option
def list_keys(config: Path) -> None:
    """All keys, newest first.

    \b
    broker keys list --config broker.toml
    """
    with opened(load(config)) as house:
        found = house.keys.listing()
    rows = [
        {
            "kid": key.kid,
            "algorithm": key.algorithm,
            "state": str(key.state),
            "created_at": rfc3339(key.created_at),
            "activated_at": None if key.activated_at is None else rfc3339(key.activated_at),
            "retired_at": None if key.retired_at is None else rfc3339(key.retired_at),
        }
        for key in found
    ]
    columns = ("kid", "algorithm", "state", "created_at", "activated_at", "retired_at")
    drawn = output.table(columns, [[row[column] for column in columns] for row in rows], empty="no keys yet")
    output.show({"items": rows, "next_cursor": None}, drawn)


@keys.command()
@config_option
@click.option("--algorithm", type=click.Choice(["ES256", "RS256", "EdDSA"]), help="Only this one; else all.")
@output.json_option
def rotate(config: Path, algorithm: str | None) -> None:
    """Sign with the next key from now on. Tokens out there stay good.

    \b
    broker keys rotate --config broker.toml
    """
    with opened(load(config)) as house:
        house.keys.rotate(algorithm, actor=_actor().name, now=house.clock())
    output.show({"rotated": algorithm or "all"}, output.facts({"rotated": algorithm or "all"}))


@keys.command()
@config_option
@click.argument("kid")
@click.option("--reason", required=True, help="Why; it goes into the audit trail.")
@click.option("--yes", is_flag=True, help="Do it. Without it, only what would end is shown.")
@output.json_option
def compromise(config: Path, kid: str, reason: str, yes: bool) -> None:
    """Stop trusting a key everywhere, and revoke everything it signed.

    \b
    broker keys compromise KID --reason "found in a log"          # shows what would end
    broker keys compromise KID --reason "found in a log" --yes
    """
    with opened(load(config)) as house:
        outcome = _condemn(house, kid, reason, yes)
    output.show(outcome, output.facts(outcome))
    if not yes:
        output.say("nothing was done: repeat with --yes")


def _condemn(house: Broker, kid: str, reason: str, yes: bool) -> dict[str, object]:
    caller = _actor()
    if yes:
        done = house.revocation.compromise_key(caller, kid, reason=reason)
    else:
        done = house.revocation.revoke_along(caller, "key", kid, reason=reason, dry_run=True)
    return {"kid": kid, "dry_run": done.dry_run, "grants": done.total, "by_agent": dict(done.by_agent)}


def _actor() -> Caller:
    """Whoever can read the master key is an admin already."""
    principal = Principal(
        name=f"cli:{getpass.getuser()}", kind="person", issuer="local", subject="local", roles=frozenset({Role.ADMIN})
    )
    return Caller(principal=principal, proof_expires_at=datetime.max.replace(tzinfo=UTC))
