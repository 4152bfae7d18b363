"""`broker ssf`: the streams of security events of all receivers, for admins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from broker.cli import output
from broker.cli.client import client_options, page_options
from broker.sdk import Client
from broker.sdk.exchange import Answer, Call, require_id

_COLUMNS = ("stream", "receiver", "status", "by", "waiting", "failures", "trouble", "last taken")


@click.group()
def ssf() -> None:
    """See, pause and delete the streams of security events (Shared Signals)."""


@ssf.command("list")
@page_options
@client_options
def list_streams(broker: Client, /, *, limit: int, cursor: str | None) -> None:
    """The streams of all receivers, newest first. For admins and auditors.

    \b
    broker ssf list
    """
    query = {"limit": str(limit)} | ({} if cursor is None else {"cursor": cursor})
    found = broker.send(Call(method="GET", path="/v1/event-streams", query=query, read=_read, repeatable=True))
    output.page(found, _COLUMNS, _row, empty="no receiver has a stream")


def _row(item: Mapping[str, Any]) -> tuple[Any, ...]:
    names = ("id", "receiver", "status", "set_by", "waiting", "failures", "trouble", "progress_at")
    return tuple(item[name] for name in names)


@ssf.command()
@click.argument("stream_id")
@client_options
def show(broker: Client, /, *, stream_id: str) -> None:
    """One stream as it is now; never what opens its receiver.

    \b
    broker ssf show stm_0198…
    """
    _show(broker.send(Call(method="GET", path=_path(stream_id), read=_read, repeatable=True)))


@ssf.command()
@click.argument("stream_id")
@click.option("--reason", required=True, help="Why; the receiver is told, and it goes into the audit trail.")
@client_options
def pause(broker: Client, /, *, stream_id: str, reason: str) -> None:
    """Send nothing more on a stream, until an admin lets it go on. What ends meanwhile is held.

    \b
    broker ssf pause stm_0198… --reason "the receiver is being replaced"
    """
    _show(broker.send(Call(method="POST", path=f"{_path(stream_id)}/pause", body={"reason": reason}, read=_read)))


@ssf.command()
@click.argument("stream_id")
@click.option("--reason", help="Why; the receiver is told, and it goes into the audit trail.")
@client_options
def resume(broker: Client, /, *, stream_id: str, reason: str | None) -> None:
    """Send again on a stream, with what was held, whoever paused it.

    \b
    broker ssf resume stm_0198…
    """
    body = {} if reason is None else {"reason": reason}
    _show(broker.send(Call(method="POST", path=f"{_path(stream_id)}/resume", body=body, read=_read)))


@ssf.command()
@click.argument("stream_id")
@client_options
def delete(broker: Client, /, *, stream_id: str) -> None:
    """Delete a stream, and what waits on it. Its receiver may make another.

    \b
    broker ssf delete stm_0198…
    """
    _show(broker.send(Call(method="DELETE", path=_path(stream_id), read=_read)))


def _path(stream_id: str) -> str:
    return f"/v1/event-streams/{require_id(stream_id, 'stream_id')}"


def _read(answer: Answer) -> Mapping[str, Any]:
    found: Mapping[str, Any] = answer.json()
    return found


def _show(found: Mapping[str, Any]) -> None:
    shown = {name: value for name, value in found.items() if value is not None}
    output.show(found, output.facts({**shown, "events": ", ".join(found["events"])}))
