"""Lockdowns: standing refusals, lifted explicitly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from broker.cli import output
from broker.cli.client import client_options, idempotency_option, page_of
from broker.cli.revoke import axis_options, selected
from broker.sdk import Client, calls


@click.group()
def lockdown() -> None:
    """Refuse everything along an axis, until it is lifted."""


@lockdown.command("list")
@click.option("--lifted", is_flag=True, help="Those that were lifted as well.")
@click.option("--cursor", help="Go on where an earlier page ended.")
@client_options
def list_lockdowns(broker: Client, /, *, lifted: bool, cursor: str | None) -> None:
    """Lockdowns that stand.

    \b
    broker lockdown list --lifted
    """
    found = page_of(broker, calls.lockdowns(lifted=lifted), cursor)
    columns = ("id", "axis", "value", "reason", "set at", "set by", "lifted at")
    output.page(found, columns, _row, empty="no lockdown stands")


def _row(item: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(item[name] for name in ("id", "axis", "value", "reason", "set_at", "set_by", "lifted_at"))


@lockdown.command("set")
@axis_options
@click.option("--reason", required=True, help="Why; it goes into the audit trail, and to those who are refused.")
@idempotency_option
@client_options
def set_lockdown(broker: Client, /, *, reason: str, idempotency_key: str | None, **named: Any) -> None:
    """Refuse what comes next along one axis, and revoke what is out. At once, without asking again.

    What it would revoke is shown by `broker revoke` with the same axis.

    \b
    broker lockdown set --agent summarizer --reason "incident 42"
    broker lockdown set --all --reason "the database is being restored"
    """
    axis, value = selected(named)
    stands = broker.set_lockdown(axis, value, reason, idempotency_key=idempotency_key)
    output.show(stands.raw, output.facts(stands.raw))


@lockdown.command()
@click.argument("lockdown_id")
@client_options
def lift(broker: Client, /, *, lockdown_id: str) -> None:
    """Lift a lockdown. What it revoked stays revoked.

    \b
    broker lockdown lift lck_0198…
    """
    lifted = broker.lift_lockdown(lockdown_id)
    output.show(lifted.raw, output.facts(lifted.raw))
