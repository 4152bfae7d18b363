"""Tasks: the orchestrator's hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from broker.cli import output
from broker.cli.activity import drift, timeline
from broker.cli.client import client_options, idempotency_option, page_of, page_options
from broker.cli.parameters import Duration, facts_option, user_token_option
from broker.domain.lifecycle import TaskState
from broker.sdk import Client, Receipt, Task, calls


@click.group()
def task() -> None:
    """Open tasks, keep them alive, end them."""


@task.command("open")
@click.option("--purpose", required=True, help="What it is for, in a sentence; policies and people read it.")
@click.option("--agent", "agents", required=True, multiple=True, help="Who may work on it. May be repeated.")
@click.option("--deadline", "deadline_s", required=True, type=Duration(), help="How long it may take, like 1h.")
@click.option(
    "--heartbeat", "heartbeat_s", type=Duration(5, 86_400), help="It ends when nobody says so often that it lives."
)
@click.option(
    "--only",
    "ceiling",
    nargs=2,
    multiple=True,
    metavar="RESOURCE SCOPES",
    help='Nothing but this, e.g. --only https://crm.example/api "contacts:read contacts:write". May be repeated.',
)
@facts_option("--label", "labels", "A label, for policies and reports. May be repeated.")
@click.option("--part-of", "parent_task_id", help="The task of which it is a part, and with which it ends.")
@user_token_option
@click.option("--id-only", is_flag=True, help="Print the id of the task and nothing else.")
@idempotency_option
@client_options
def open_task(
    broker: Client, /, *, agents: tuple[str, ...], ceiling: tuple[tuple[str, str], ...], id_only: bool, **more: Any
) -> None:
    """Open a task. Everything issued for it dies with it.

    \b
    broker task open --purpose "summarise the leads of May" --agent summarizer --deadline 1h
    broker task open --purpose "only the leads of Berlin" --agent lead-finder --deadline 10m --part-of task_0198…
    TASK=$(broker task open --purpose "nightly report" --agent scribe --deadline 15m --id-only)
    """
    opened = broker.open_task(agents=agents, resources=_resources(ceiling), **more)
    if id_only and not output.wants_json():
        click.echo(opened.id)
    else:
        _show(opened)


def _resources(ceiling: tuple[tuple[str, str], ...]) -> dict[str, list[str]] | None:
    resources: dict[str, list[str]] = {}
    for resource, scopes in ceiling:
        if not scopes.split():
            raise click.BadParameter(f"no scope is named for {resource}", param_hint="--only")
        resources.setdefault(resource, []).extend(scopes.split())
    return resources or None


@task.command("list")
@click.option("--state", type=click.Choice([str(state) for state in TaskState]), help="In this state.")
@click.option("--agent", help="Tasks this agent may work on.")
@click.option("--user", help="Tasks on behalf of this person.")
@page_options
@client_options
def list_tasks(broker: Client, /, *, limit: int, cursor: str | None, **filters: Any) -> None:
    """Tasks you may see, newest first.

    \b
    broker task list --state active
    """
    found = page_of(broker, calls.tasks(page_size=limit, **filters), cursor)
    columns = ("id", "state", "purpose", "agents", "deadline", "ended")
    output.page(found, columns, _row, empty="no task is to be seen")


def _row(item: Mapping[str, Any]) -> tuple[Any, ...]:
    return item["id"], item["state"], item["purpose"], item["agents"], item["deadline_at"], item["ended_at"]


@task.command()
@click.argument("task_id")
@client_options
def show(broker: Client, /, *, task_id: str) -> None:
    """One task as it is now.

    \b
    broker task show task_0198…
    """
    _show(broker.task(task_id))


@task.command()
@click.argument("task_id")
@client_options
def heartbeat(broker: Client, /, *, task_id: str) -> None:
    """Say that a task still lives.

    \b
    broker task heartbeat task_0198…
    """
    _show(broker.heartbeat(task_id))


def _ending(name: str, sentence: str, end: Callable[..., Receipt]) -> None:
    @task.command(
        name,
        help=f"{sentence} Answers the receipt; again, the same one.\n\n"
        f'\b\nbroker task {name} task_0198…\nbroker task {name} task_0198… --reason "all rows are in"',
    )
    @click.argument("task_id")
    @click.option("--reason", help="Why; it goes into the audit trail.")
    @client_options
    def command(broker: Client, /, *, task_id: str, reason: str | None) -> None:
        output.show_receipt(end(broker, task_id, reason).raw)


_ending("complete", "End a task as completed, with everything issued for it.", Client.complete_task)
_ending("fail", "End a task as failed, with everything issued for it.", Client.fail_task)
_ending("cancel", "End a task as cancelled, with everything issued for it.", Client.cancel_task)


@task.command()
@click.argument("task_id")
@click.option("--jws", is_flag=True, help="Print only the receipt under the broker's signature.")
@client_options
def receipt(broker: Client, /, *, task_id: str, jws: bool) -> None:
    """What of a task is dead, and what is still exposed and until when.

    \b
    broker task receipt task_0198…
    broker task receipt task_0198… --jws > receipt.jws
    """
    found = broker.receipt(task_id)
    if jws and not output.wants_json():
        click.echo(found.jws)
    else:
        output.show_receipt(found.raw)


task.add_command(timeline)
task.add_command(drift)


def _show(found: Task) -> None:
    shown = {name: value for name, value in found.raw.items() if value not in (None, {}, [])}
    if found.raw.get("resources"):
        shown["resources"] = [f"{item['resource']} ({' '.join(item['scopes'])})" for item in found.raw["resources"]]
    output.show(found.raw, output.facts(shown))
