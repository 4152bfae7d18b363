"""Leases: what is owed to the systems that made secrets, and what keeps it from being paid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from broker.cli import output
from broker.cli.client import client_options, page_of, page_options
from broker.domain.lifecycle import LeaseState
from broker.sdk import Client, calls

_COLUMNS = ("lease", "state", "provider", "grant", "owed since", "tried", "next try", "why it fails")


@click.group()
def lease() -> None:
    """See what is owed outside, and give up what cannot be paid."""


@lease.command("list")
@click.option("--state", type=click.Choice([str(state) for state in LeaseState]), help="In this state.")
@click.option("--provider", help="Of this provider, like vault.")
@click.option("--grant", help="Of this grant.")
@page_options
@client_options
def list_leases(broker: Client, /, *, limit: int, cursor: str | None, **filters: Any) -> None:
    """What is held and owed outside, newest first.

    Without --state those that are stuck come first, however old they are: somebody has to look at them.

    \b
    broker lease list
    broker lease list --state stuck --json
    """
    found = page_of(broker, calls.leases(page_size=limit, **filters), cursor)
    if filters["state"] is None and cursor is None:
        stuck = page_of(broker, calls.leases(page_size=limit, **filters | {"state": str(LeaseState.STUCK)}), None)
        first = {item["id"] for item in stuck["items"]}
        others = [item for item in found["items"] if item["id"] not in first]
        found = {**found, "items": [*stuck["items"], *others]}
    output.page(found, _COLUMNS, _row, empty="nothing was made outside")
    stuck_now = sum(item["state"] == "stuck" and item["abandoned_at"] is None for item in found["items"])
    if stuck_now:
        output.say(
            f"{stuck_now} stuck: mend what the last column says, they are tried on by themselves. What will never be "
            "mended: broker lease abandon LEASE --reason ..."
        )


def _row(item: Mapping[str, Any]) -> tuple[Any, ...]:
    state = item["state"] if item["abandoned_at"] is None else f"{item['state']}, abandoned"
    return (
        item["id"],
        state,
        item["provider"],
        item["grant_id"] or "nobody's",
        item["owed_since"],
        item["attempts"],
        item["next_attempt_at"],
        item["last_error"],
    )


@lease.command()
@click.argument("lease_id")
@client_options
def show(broker: Client, /, *, lease_id: str) -> None:
    """One lease as it is now; never what it opens.

    \b
    broker lease show lea_0198…
    """
    _show(broker.lease(lease_id).raw)


@lease.command()
@click.argument("lease_id")
@click.option("--reason", required=True, help="Why; it goes into the audit trail.")
@client_options
def abandon(broker: Client, /, *, lease_id: str, reason: str) -> None:
    """Give up a stuck lease: nobody is told of it again.

    It stays open, because nobody confirmed that its secret is dead; it is still tried now and then, and counts as
    residual risk until it ends by itself.

    \b
    broker lease abandon lea_0198… --reason "the database server was scrapped"
    """
    _show(broker.abandon_lease(lease_id, reason).raw)


def _show(found: Mapping[str, Any]) -> None:
    output.show(found, output.facts({name: value for name, value in found.items() if value is not None}))
