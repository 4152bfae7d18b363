"""What a command is told that asks for a credential and gives it to another program: for which task, and what."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import click

from broker.cli import output
from broker.cli.grant import LONGEST_TTL_S, LONGEST_WAIT_S, values_of
from broker.cli.parameters import Duration, facts_option
from broker.sdk import Approval, Client, Credential, CredentialSource


def asking_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a request. The command, below `client_options`, is called with a source that has asked nothing."""

    @click.option(
        "--task",
        "task_id",
        envvar="BROKER_TASK",
        show_envvar=True,
        help="Whose task it is for; without it one of its own, where that is allowed.",
    )
    @click.option("--resource", required=True, help="What it shall open: a registered identifier.")
    @click.option("--scope", "scopes", required=True, multiple=True, help="What it shall allow. May be repeated.")
    @click.option("--ttl", "ttl_s", type=Duration(1, LONGEST_TTL_S), help="How long each one shall live, like 5m.")
    @click.option("--intent", help="What you are about to do, in a sentence.")
    @facts_option("--param", "parameters", "For the system that makes the secret. May be repeated.")
    @functools.wraps(command)
    def run(
        broker: Client,
        /,
        *args: Any,
        task_id: str | None,
        resource: str,
        scopes: tuple[str, ...],
        ttl_s: int | None,
        intent: str | None,
        parameters: Mapping[str, str] | None,
        **kwargs: Any,
    ) -> Any:
        source = broker.credential(
            task_id, resource, scopes, ttl_s=ttl_s, intent=intent, parameters=values_of(parameters)
        )
        return command(source, *args, **kwargs)

    return run


def wait_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--wait", "wait_s", type=Duration(1, LONGEST_WAIT_S), help="Wait so long for people to decide, like 15m."
    )(command)


def first(source: CredentialSource, wait_s: int | None) -> Credential:
    """The credential, after people have decided where they are asked and we wait for them."""
    return source.credential() if wait_s is None else source.wait(wait_s, _told_once())


def _told_once() -> Callable[[Approval], None]:
    """Says how it stands, each time that it stands otherwise."""
    said: list[str] = []

    def told(approval: Approval) -> None:
        voted = len(approval.raw.get("votes") or ())
        sentence = f"waiting for people: {voted} of {approval.quorum} have voted on {approval.id}"
        if said[-1:] != [sentence]:
            said.append(sentence)
            output.say(sentence)

    return told
