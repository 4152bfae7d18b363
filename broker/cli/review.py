"""Reviews: what was opened by a break-glass, looked at afterwards by somebody who neither asked nor decided."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from broker.cli import output
from broker.cli.client import client_options, page_of, page_options
from broker.domain.lifecycle import ReviewState
from broker.sdk import Client, Review, calls

_COLUMNS = ("id", "state", "due", "agent", "resource", "scopes", "approved by", "grant", "completed by")
_OPEN = "open"  # owed or overdue


@click.group()
def review() -> None:
    """Look at what was opened in an emergency."""


@review.command("list")
@click.option(
    "--state",
    type=click.Choice([_OPEN, *map(str, ReviewState), "all"]),
    default=_OPEN,
    show_default=True,
    help="In this state.",
)
@click.option("--agent", help="Of what this agent opened.")
@page_options
@client_options
def list_reviews(broker: Client, /, *, limit: int, cursor: str | None, state: str, agent: str | None) -> None:
    """Reviews you may see, newest first; those that are overdue before all others.

    \b
    broker review list
    broker review list --state all --json
    """
    wanted = None if state == "all" else state
    found = page_of(broker, calls.reviews(page_size=limit, state=wanted, agent=agent), cursor)
    items = list(found["items"])
    if cursor is None and wanted in (None, _OPEN):
        items = _late_first(broker, items, agent)
    late = sum(item["state"] == ReviewState.OVERDUE for item in items)
    if late:
        output.say(f"BREAK-GLASS: {late} not reviewed in time")
    output.page({**found, "items": items}, _COLUMNS, _row, empty="no review is owed")


def _late_first(broker: Client, items: list[Any], agent: str | None) -> list[Any]:
    late = page_of(broker, calls.reviews(state=str(ReviewState.OVERDUE), agent=agent), None)["items"]
    first = {item["id"] for item in late}
    return [*late, *(item for item in items if item["id"] not in first)]


def _row(item: Mapping[str, Any]) -> tuple[Any, ...]:
    state = "OVERDUE" if item["state"] == ReviewState.OVERDUE else item["state"]
    names = ("due_at", "agent", "resource", "scopes", "approved_by", "grant_id", "completed_by")
    return (item["id"], state, *(item[name] for name in names))


@review.command()
@click.argument("review_id")
@client_options
def show(broker: Client, /, *, review_id: str) -> None:
    """One review: what was opened, who said yes; and last what the agent said the emergency was.

    \b
    broker review show rev_0198…
    """
    _show(broker.review(review_id))


@review.command()
@click.argument("review_id")
@click.argument("note")
@client_options
def complete(broker: Client, /, *, review_id: str, note: str) -> None:
    """Say what you found. For somebody who neither asked nor decided; it is done once, and stays.

    \b
    broker review complete rev_0198… "one entry posted, as the incident says; the cause is in INC-7"
    """
    _show(broker.complete_review(review_id, note))


def _show(found: Review) -> None:
    raw = found.raw
    late = f"OVERDUE since {raw['due_at']}" if found.state == ReviewState.OVERDUE else found.state
    shown: dict[str, Any] = {
        "review": f"{found.id} is {late}",
        "due": raw["due_at"],
        "opened": raw["resource"],
        "scopes": raw["scopes"],
        "by": raw["agent"],
        "for user": raw["user"],
        "approved by": raw["approved_by"],
        "policies": raw["policies"],
        "collected": raw["opened_at"],
        "grant": f"{found.grant_id} is {raw['grant_state']}, until {raw['grant_expires_at']}",
        "approval": found.approval_id,
        "completed": None if found.completed_by is None else f"{raw['completed_at']} by {found.completed_by}",
        "note": found.note,
    }
    ours = output.facts({name: value for name, value in shown.items() if value not in (None, [])})
    words = output.facts({"the emergency": f"“{found.unverified.get('reason')}”"})
    theirs = output.titled("In the agent's own words, which nobody has checked:", words)
    output.show(raw, output.both(ours, theirs))
