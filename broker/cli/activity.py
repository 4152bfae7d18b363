"""What was done with grants: told from a shell, and shown of a task in one line of time or beside what was granted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import click

from broker.cli import output
from broker.cli.client import client_options, page_of, page_options
from broker.cli.parameters import facts_option
from broker.domain.clock import system_clock
from broker.sdk import Activity, Client, calls
from broker.sdk.activities import KINDS, OUTCOMES

_COLUMNS = ("at", "", "what", "who", "with", "scopes", "on", "came to", "note", "grant")
# The broker's own word is a full point, what somebody told is a hollow one.
_MARKS = {"broker": "●", "report": "○"}
_BEYOND = {
    "resource": "not what was granted",
    "scope": "scope not granted",
    "before_issue": "before its issue",
    "after_end": "after its end",
}
_STYLES = {
    "grant.issued": "green", "grant.renewed": "green", "grant.approved": "green", "grant.revoked": "red",
    "grant.expired": "red", "grant.denied": "bold red", "grant.refused": "bold red", "activity.tool": "cyan",
    "activity.secret_use": "cyan", "activity.request": "cyan",
}  # fmt: skip


@click.command()
@click.argument("task_id")
@click.option("--grant", help="Of this grant alone.")
@click.option(
    "--source", type=click.Choice(["broker", "report"]), help="The broker's own word alone, or what was told."
)
@page_options
@client_options
def timeline(broker: Client, /, *, task_id: str, limit: int, cursor: str | None, **filters: Any) -> None:
    """Issue, use and end of everything of a task and its parts, oldest first.

    ● is the broker's own word, ○ what an agent or a verifier told, which nobody vouches for.

    \b
    broker task timeline task_0198…
    broker task timeline task_0198… --source report --json
    """
    found = page_of(broker, calls.timeline(task_id, page_size=limit, **filters), cursor)
    lines = found["items"]
    drawn = output.table(_COLUMNS, map(_row, lines), empty="nothing happened", styles=map(_style, lines))
    output.show(found, drawn)
    output.say_more(found)


def _row(line: Mapping[str, Any]) -> tuple[Any, ...]:
    notes = [_BEYOND.get(way, way) for way in line["beyond"]]
    if line["reason"]:
        notes.append(line["reason"])
    return (
        line["at"],
        _MARKS.get(line["source"], "?"),
        line["what"],
        line["who"] if line["role"] is None else f"{line['who']} ({line['role']})",
        line["action"],
        line["scopes"],
        line["resource"],
        line["outcome"],
        "; ".join(notes),
        line["grant_id"],
    )


def _style(line: Mapping[str, Any]) -> str:
    if line["beyond"]:
        return "bold yellow"
    if line["source"] == "report" and line["outcome"] in ("denied", "error"):
        return "yellow"
    return _STYLES.get(line["what"], "")


@click.command()
@click.argument("task_id")
@client_options
def drift(broker: Client, /, *, task_id: str) -> None:
    """What was granted and never used, and what was used outside of what was granted, as far as it was told.

    The exit code is 0 only where there is neither.

    \b
    broker task drift task_0198…
    """
    found = broker.drift(task_id)
    output.show(found.raw, _drift(found.raw))
    if found.drifted:
        raise output.fail(f"drift: {len(found.unused)} times granted and not used, {len(found.outside)} times outside")


def _drift(found: Mapping[str, Any]) -> output.Drawing:
    grants = found["grants"]
    head: dict[str, Any] = {
        "task": found["task_id"],
        "grants": f"{len(grants)}, of {sum(not grant['reports'] for grant in grants)} nobody tells anything",
        "told of": f"{sum(grant['reports'] for grant in grants)} activities",
    }
    if found["dropped"]:
        head["not kept"] = f"{found['dropped']} more, which were too many"
    if not found["complete"]:
        head["complete"] = False
    drawn = [output.facts(head)]
    if found["unused"]:
        drawn.append(output.titled("granted and never used:", _unused(found["unused"])))
    if found["outside"]:
        drawn.append(output.titled("used outside of what was granted:", _outside(found["outside"])))
    for each in found["narrower"]:
        drawn.append(output.sentences([each["in_words"], each["policy"]]))
    return output.both(*drawn)


def _unused(found: Iterable[Mapping[str, Any]]) -> output.Drawing:
    columns = ("agent", "resource", "never used", "used", "grants", "untold of", "without a scope")
    names = ("agent", "resource", "unused", "used", "grants", "unreported", "unsaid")
    return output.table(columns, [[each[name] for name in names] for each in found], empty="")


def _outside(found: Iterable[Mapping[str, Any]]) -> output.Drawing:
    columns = ("why", "agent", "scope", "resource", "told by", "times", "refused", "first", "last", "grant")
    names = ("agent", "scope", "resource", "told_by", "count", "denied", "first_at", "last_at", "grant_id")
    rows = [[_BEYOND.get(each["why"], each["why"]), *(each[name] for name in names)] for each in found]
    return output.table(columns, rows, empty="")


@click.command()
@click.argument("grant_id")
@click.option("--action", required=True, help="What was called: a tool, a method and route, an operation.")
@click.option("--kind", type=click.Choice(KINDS), default="tool", show_default=True, help="What it was.")
@click.option("--scope", help="Which of the granted scopes it used.")
@click.option("--resource", help="Where it went, if not to the resource itself.")
@click.option("--outcome", type=click.Choice(OUTCOMES), default="ok", show_default=True, help="What it came to.")
@facts_option("--attribute", "attributes", "A word more. May be repeated.")
@click.option(
    "--at", type=click.DateTime(["%Y-%m-%dT%H:%M:%SZ"]), metavar="TIME", help="When, like 2026-03-01T12:00:00Z; now."
)
@click.option("--id", "report_id", help="Yours for it; told again with it, it is the same activity.")
@client_options
def report(
    broker: Client,
    /,
    *,
    grant_id: str,
    report_id: str | None,
    at: datetime | None,
    attributes: Mapping[str, str] | None,
    **told: Any,
) -> None:
    """Tell what was done with a grant: for its agent, and for verifiers of its resource.

    \b
    broker grant report grt_0198… --action search_contacts --scope contacts:read
    broker grant report grt_0198… --kind request --action "GET /contacts" --outcome denied
    """
    named = {} if report_id is None else {"id": report_id}
    when = system_clock() if at is None else at.replace(tzinfo=UTC)
    activity = Activity(grant_id=grant_id, at=when, attributes=attributes or {}, **told, **named)
    answer = broker.tell([activity])
    if answer.refused:
        raise output.fail(answer.refused[0].detail, code=output.REFUSED, refused=answer.raw["refused"])
    output.show(answer.raw, output.facts({"id": activity.id, "told": "again" if answer.repeated else "now"}))
