"""Revocation along the axis of an incident. Without `--yes` it only shows what would end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from broker.cli import output
from broker.cli.client import client_options
from broker.cli.grant import COLUMNS, row
from broker.sdk import Client, calls

_HELP = {
    "task": "Everything of this task.",
    "agent": "Everything this agent holds.",
    "user": "Everything on behalf of this person.",
    "orchestrator": "Everything under this orchestrator's tasks.",
    "resource": "Everything that opens this resource.",
    "provider": "Everything of this provider.",
    "policy": "Everything this policy allowed.",
    "key": "Everything signed by the key with this kid.",
}


def axis_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """One option for each axis; `selected` takes exactly one."""
    command = click.option("--all", "all", is_flag=True, help="Everything.")(command)
    for axis in reversed(list(_HELP)):
        command = click.option(f"--{axis}", axis, help=_HELP[axis])(command)
    return command


def selected(named: Mapping[str, Any]) -> tuple[str, str]:
    """(axis, value) of options that name exactly one, or wrong usage."""
    found = [(axis, "all" if axis == "all" else named[axis]) for axis in calls.AXES if named[axis]]
    if len(found) != 1:
        several = " and ".join(f"--{axis}" for axis, _ in found) or "none"
        raise click.UsageError(f"name exactly one of {', '.join('--' + axis for axis in calls.AXES)}; found: {several}")
    return found[0]


@click.command()
@axis_options
@click.option("--reason", required=True, help="Why; it goes into the audit trail.")
@click.option("--lockdown", is_flag=True, help="Refuse what comes next along this axis too, until it is lifted.")
@click.option("--yes", is_flag=True, help="Do it. Without it, only what would end is shown.")
@client_options
def revoke(broker: Client, /, *, reason: str, lockdown: bool, yes: bool, **named: Any) -> None:
    """Revoke along one axis, at once for any number of grants.

    Without --yes nothing is done: it shows how many grants would end, whose, and some of them.

    \b
    broker revoke --agent summarizer --reason "prompt injection, incident 42"
    broker revoke --agent summarizer --reason "prompt injection, incident 42" --lockdown --yes
    broker revoke --all --reason "signing key was seen in a log" --yes
    """
    axis, value = selected(named)
    outcome = broker.revoke(axis, value, reason, dry_run=not yes, lockdown=lockdown).raw
    output.show(outcome, _blast_radius(outcome))
    if not outcome["dry_run"]:
        output.say_owed(outcome["receipt"]["grants"])
    if outcome["dry_run"]:
        also = "" if lockdown else "; with --lockdown what comes next is refused too"
        output.say(f"nothing was done: repeat with --yes{also}")
    elif outcome["lockdown"] is not None:
        output.say(f"a lockdown stands: broker lockdown lift {outcome['lockdown']['id']}")


def _blast_radius(outcome: Mapping[str, Any]) -> output.Drawing:
    grants, dry_run = outcome["grants"], outcome["dry_run"]
    head = {
        "axis": outcome["axis"] if outcome["axis"] == "all" else f"{outcome['axis']} = {outcome['value']}",
        "grants": f"{grants} would end" if dry_run else f"{grants} ended",
        "revocation": outcome["id"],
        "lockdown": None if outcome["lockdown"] is None else outcome["lockdown"]["id"],
    }
    drawn = [output.facts({name: fact for name, fact in head.items() if fact is not None})]
    if grants:
        by_agent = sorted(outcome["by_agent"].items(), key=lambda pair: (-pair[1], pair[0]))
        drawn.append(output.table(("agent", "grants"), by_agent, empty=""))
        if dry_run:
            drawn.append(output.table(COLUMNS, map(row, outcome["samples"]), empty="no sample"))
        else:
            drawn.append(output.receipt_lines(outcome["receipt"]["grants"]))
    return output.both(*drawn)
