"""The audit trail: who got what, for which task and person, under which policy, and when it ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from broker.cli import output
from broker.cli.client import client_options, page_of, page_options
from broker.sdk import Client, calls


@click.group()
def audit() -> None:
    """Read the audit trail."""


@audit.command("list")
@click.option("--type", help="Of this type, like grant.issued.")
@click.option("--actor", help="Done by this principal.")
@click.option("--task", help="About this task.")
@click.option("--grant", help="About this grant.")
@click.option("--agent", help="About this agent.")
@click.option("--user", help="About this person.")
@click.option("--resource", help="About this resource.")
@click.option("--outcome", help="With this outcome, like ok or denied.")
@click.option("--trace-id", help="Of this trace.")
@page_options
@client_options
def list_events(broker: Client, /, *, limit: int, cursor: str | None, **filters: Any) -> None:
    """Audit events, newest first.

    \b
    broker audit list --task task_0198…
    broker audit list --agent summarizer --type grant.denied --json
    """
    found = page_of(broker, calls.audit(page_size=limit, **filters), cursor)
    columns = ("at", "type", "actor", "outcome", "task", "grant", "resource", "reason")
    output.page(found, columns, _row, empty="no event is to be seen")


def _row(item: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(item[name] for name in ("at", "type", "actor", "outcome", "task_id", "grant_id", "resource", "reason"))
