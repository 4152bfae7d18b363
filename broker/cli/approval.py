"""Approvals: the hand of the people who are asked. What the broker knows is shown first, the requester's words last.

Nothing of those words is markup, a control sequence or another line here: a reader must be able to trust the lines
above them (INV-31).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from broker.cli import output
from broker.cli.client import client_options, page_of, page_options
from broker.cli.parameters import Duration
from broker.domain.lifecycle import ApprovalState
from broker.sdk import Approval, Client, calls

_LONGEST_TTL_S = 86_400


@click.group()
def approval() -> None:
    """Decide what policy lets people decide."""


@approval.command("list")
@click.option(
    "--state",
    type=click.Choice([*map(str, ApprovalState), "all"]),
    default=str(ApprovalState.OPEN),
    show_default=True,
    help="In this state.",
)
@click.option("--task", help="Of this task.")
@click.option("--agent", help="Asked for by this agent.")
@click.option("--resource", help="For this resource.")
@page_options
@client_options
def list_approvals(broker: Client, /, *, limit: int, cursor: str | None, state: str, **filters: Any) -> None:
    """What your groups are asked, newest first; of an agent, what it asked for.

    \b
    broker approval list
    broker approval list --state all --agent summarizer --json
    """
    wanted = filters | {"state": None if state == "all" else state}
    found = page_of(broker, calls.approvals(page_size=limit, **wanted), cursor)
    columns = ("id", "state", "sensitivity", "resource", "scopes", "ttl", "user", "agent", "votes", "until", "kind")
    output.page(found, columns, _row, empty="nobody asks you for anything")


def _row(item: Mapping[str, Any]) -> tuple[Any, ...]:
    opens, yes = item["opens"], sum(vote["verdict"] == "approve" for vote in item["votes"])
    return (
        item["id"],
        item["state"],
        opens["sensitivity"],
        opens["resource"],
        item["left"]["scopes"],
        f"{item['left']['ttl_s']} s",
        opens["user"],
        item["requested_by"],
        f"{yes} of {item['quorum']}",
        item["expires_at"],
        "BREAK-GLASS" if item.get("break_glass") else None,
    )


@approval.command()
@click.argument("approval_id")
@client_options
def show(broker: Client, /, *, approval_id: str) -> None:
    """One approval: what it would open, who asks, who said what; and last what they say it is for.

    \b
    broker approval show apr_0198…
    """
    _show(broker.approval(approval_id))


@approval.command()
@click.argument("approval_id")
@click.option("--scope", "scopes", multiple=True, help="Leave only this of it. May be repeated.")
@click.option("--ttl", "ttl_s", type=Duration(1, _LONGEST_TTL_S), help="Leave it no longer than this, like 5m.")
@click.option("--reason", help="Why; it goes into the audit trail.")
@client_options
def approve(
    broker: Client, /, *, approval_id: str, scopes: tuple[str, ...], ttl_s: int | None, reason: str | None
) -> None:
    """Say yes, to all of it or to less. What is not asked for cannot be added.

    \b
    broker approval approve apr_0198… --reason "agreed with the CRM team"
    broker approval approve apr_0198… --scope contacts:read --ttl 5m
    """
    _show(broker.approve(approval_id, scopes or None, ttl_s, reason))


@approval.command()
@click.argument("approval_id")
@click.option("--reason", help="Why; it goes into the audit trail, and to whoever asked.")
@client_options
def deny(broker: Client, /, *, approval_id: str, reason: str | None) -> None:
    """Say no. One is enough.

    \b
    broker approval deny apr_0198… --reason "not during the close"
    """
    _show(broker.deny(approval_id, reason))


@approval.command()
@click.argument("approval_id")
@click.option("--reason", help="Why; it goes into the audit trail.")
@client_options
def withdraw(broker: Client, /, *, approval_id: str, reason: str | None) -> None:
    """Take your own request back: for the agent that asked, and the orchestrator of its task.

    \b
    broker approval withdraw apr_0198… --reason "found another way"
    """
    _show(broker.withdraw(approval_id, reason))


def _show(found: Approval) -> None:
    raw, opens, requester = found.raw, found.opens, found.raw["requester"]
    whole = list(found.scopes) == opens["scopes"] and found.ttl_s == opens["ttl_s"]
    loud = "asked for as one: it opens this at once, everybody is told, and a review is owed"
    shown: dict[str, Any] = {
        "BREAK-GLASS": loud if found.break_glass else None,
        "opens": opens["resource"],
        "sensitivity": f"{opens['sensitivity'] or 'unknown'}, {opens['environment'] or 'unknown'}",
        "scopes": opens["scopes"],
        "ttl": f"{opens['ttl_s']} s",
        "for user": opens["user"],
        "bound to a key": opens["sender_bound"],
        "asked by": f"{requester['agent']} (of {requester['owner'] or 'nobody'}), subject {requester['subject']}",
        "task": f"{requester['task_id']} of {requester['orchestrator']}",
        "policies": raw["policies"],
        "approval": f"{found.id} is {found.state}",
        "asked of": [f"{need['approved']} of {need['quorum']} of {need['group']}" for need in raw["needs"]],
        "votes": [_vote(vote) for vote in raw["votes"]],
        "what is left": None if whole else f"{', '.join(found.scopes)} for {found.ttl_s} s",
        "decide until": raw["expires_at"] if found.state == "open" else None,
        "decided": None if found.decided_by is None else f"{raw['decided_at']} by {found.decided_by}",
        "reason": found.reason,
        "collect until": raw.get("collect_by"),
        "collected": raw["collected_at"],
        "grant": found.grant_id,
    }
    said = found.unverified
    claims = {f"claims {name}": text for name, text in (said.get("claims") or {}).items()}
    theirs = {
        "the emergency": said.get("break_glass"),
        "the agent says": said.get("intent"),
        "the task says": said.get("purpose"),
        **claims,
    }
    always = ("for user", "votes")
    ours = output.facts({name: value for name, value in shown.items() if value not in (None, []) or name in always})
    words = {_in_one_line(name): _quoted(value) for name, value in theirs.items() if value}
    if not words:
        output.show(raw, ours)
        return
    theirs_alone = output.titled("In their own words, which nobody has checked:", output.facts(words))
    output.show(raw, output.both(ours, theirs_alone))


def _vote(vote: Mapping[str, Any]) -> str:
    left = [] if vote["scopes"] is None else [f"only {' '.join(vote['scopes'])}"]
    left += [] if vote["ttl_s"] is None else [f"for {vote['ttl_s']} s"]
    return " ".join([vote["voter"], "denies" if vote["verdict"] == "deny" else "approves", *left])


def _quoted(text: object) -> str:
    # In quotes, so that words which look like a line of ours are still seen to be theirs.
    return f"“{text}”"


def _in_one_line(name: str) -> str:
    plain = "".join(character if character.isprintable() else "?" for character in name)
    return plain if len(plain) <= 40 else f"{plain[:39]}…"
