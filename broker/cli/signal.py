"""Signals of risk: what somebody who watches says of an agent or a user."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from broker.cli import output
from broker.cli.client import client_options, idempotency_option, page_of, page_options
from broker.cli.parameters import Duration
from broker.sdk import Client, calls

_COLUMNS = ("id", "axis", "value", "level", "reason", "source", "sent at", "sent by", "expires")


@click.group()
def signal() -> None:
    """Say that an agent or a user is at risk."""


@signal.command()
@click.option("--agent", help="The name of a principal.")
@click.option("--user", help="Somebody on whose behalf agents act.")
@click.option("--level", type=click.Choice(["low", "medium", "high", "critical"]), required=True, help="How bad.")
@click.option("--reason", required=True, help="Why; it goes into the audit trail.")
@click.option("--source", default="cli", show_default=True, help="What saw it.")
@click.option(
    "--expires", "expires_s", type=Duration(highest_s=2_592_000), default="1h", show_default=True, help="For how long."
)
@idempotency_option
@client_options
def send(broker: Client, /, *, agent: str | None, user: str | None, **said: Any) -> None:
    """Policies see the highest level that is not over, as `context.risk`; live grants are decided again at once.

    \b
    broker signal send --agent summarizer --level high --reason "unusual volume" --expires 30m
    """
    if (agent is None) == (user is None):
        raise click.UsageError("who is at risk? Give exactly one of --agent and --user")
    sent = broker.send_signal("user" if agent is None else "agent", agent or user or "", **said).raw
    output.show(sent, output.facts(sent))


@signal.command("list")
@click.option("--over", is_flag=True, help="Those that are over as well.")
@page_options
@client_options
def list_signals(broker: Client, /, *, over: bool, limit: int, cursor: str | None) -> None:
    """Signals, newest first.

    \b
    broker signal list
    """
    found = page_of(broker, calls.signals(over=over, page_size=limit), cursor)
    output.page(found, _COLUMNS, _row, empty="nobody is said to be at risk")


def _row(item: Mapping[str, Any]) -> tuple[Any, ...]:
    names = ("id", "axis", "value", "level", "reason", "source", "sent_at", "sent_by", "expires_at")
    return tuple(item[name] for name in names)
