"""`broker feed`: a server for the streams of many verifiers; renewing the feed; and watching it."""

from __future__ import annotations

import getpass
import json
import logging
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from broker import scheduler, telemetry
from broker.cli import output, stopping
from broker.cli.client import client_options
from broker.cli.server import config_option, opened, require_free, stay_on_one_core
from broker.config import Settings, load
from broker.sdk import Client
from broker.sdk.exchange import Answer, Call
from broker.web.feed_server import FeedServer

_log = logging.getLogger(__name__)

_FILES_BESIDE = 1500  # connections that ask, the store's, the log
_WAIT_S = 3  # of one poll: a client of the command line gives up on an answer after ten


@click.group(invoke_without_command=True)
@config_option
@click.pass_context
def feed(context: click.Context, config: Path) -> None:
    """Answer the streams of thousands of verifiers, beside `broker serve`, on PostgreSQL.

    \b
    broker feed --config /etc/broker/broker.toml
    """
    if context.invoked_subcommand is None:
        serve(load(config))


def serve(settings: Settings) -> None:
    """Hold streams until told to stop."""
    host, port = settings.feed.host, settings.feed.port
    if host is None or port is None:
        raise output.fail("where should it listen? Write listen into the section [feed], like 127.0.0.1:8081")
    if settings.store_url.startswith("sqlite:"):
        raise output.fail("on SQLite one process writes: there `broker serve` itself listens where [feed] says")
    metrics = (settings.feed.metrics_host, settings.feed.metrics_port)
    require_free([("feed.listen", host, port), ("feed.metrics_listen", *metrics)])
    with stopping.waited_for() as told, opened(settings) as house:
        telemetry.log_to(sys.stderr)
        _allow_files(settings.feed.streams)
        stay_on_one_core()
        house.keys.tend()
        house.key_sets.refresh(house.standing.now().catalogue.issuers, house.clock())
        running = scheduler.start(house, only=("look again", "confirm keys"))
        if metrics[0] is not None and metrics[1] is not None:
            telemetry.serve_metrics(metrics[0], metrics[1])
        server = FeedServer(house, host, port)
        server.start()
        _log.info("feeding")
        told()
        server.stop()
        house.stop()
        running.shutdown(wait=True)


def _allow_files(streams: int) -> None:
    """Each stream is an open file: as many as the system lets us have."""
    wanted = streams + _FILES_BESIDE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    may_have = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < may_have:
        resource.setrlimit(resource.RLIMIT_NOFILE, (may_have, hard))
    if may_have < wanted:
        fields = {"allowed": may_have, "needed": wanted}
        _log.warning("too few files may be open for all streams: raise the limit", extra={"fields": fields})


@feed.command()
@config_option
@click.option("--reason", required=True, help="Why; it goes into the audit trail.")
@output.json_option
def renew(config: Path, reason: str) -> None:
    """Begin the feed anew, after the database was restored: every verifier asks for every status list again.

    \b
    broker feed renew --config /etc/broker/broker.toml --reason "restored from backup"
    """
    with opened(load(config)) as house:
        house.feed.renew(reason, by=f"cli:{getpass.getuser()}")
    output.show({"renewed": True}, output.facts({"renewed": True}))


@feed.command()
@click.option("--after", help="Go on where an earlier look ended: next_after of its last line.")
@click.option("--once", is_flag=True, help="Show what there is, and end.")
@client_options
def watch(broker: Client, /, *, after: str | None, once: bool) -> None:
    """What ends, as verifiers hear of it, one event a line. For verifiers, admins and auditors.

    It shows; it verifies nothing and decides nothing.

    \b
    broker feed watch
    """
    while True:
        found = broker.send(_poll(after, 0 if once else _WAIT_S))
        if once and after is None and found["reset"] is not None:
            # From the oldest on, and not from now on; where that is not kept any more, it is answered with a reset.
            after = f"{found['reset']['feed']}:0"
            continue
        if found["reset"] is not None:
            output.say(f"the feed is at {found['next_after']}")
        for item in found["items"]:
            click.echo(item["data"] if output.wants_json() else _line(item["data"]))
        is_all = found["next_after"] == after
        after = found["next_after"]
        if once and is_all:
            return


def _poll(after: str | None, wait_s: int) -> Call[Mapping[str, Any]]:
    query = {"wait": str(wait_s)} if after is None else {"wait": str(wait_s), "after": after}
    return Call(method="GET", path="/v1/revocations", query=query, read=_read, repeatable=True)


def _read(answer: Answer) -> Mapping[str, Any]:
    found: Mapping[str, Any] = answer.json()
    return found


def _line(data: str) -> str:
    """An event for people; text in it came from the broker's configuration and requests (INV-31)."""
    event = json.loads(data)
    told = " ".join(f"{name}={value}" for name, value in event.items() if name not in ("seq", "at", "kind"))
    line = f"{event['seq']}\t{event['at']}\t{event['kind']}\t{told}"
    return "".join(character if character.isprintable() or character == "\t" else "?" for character in line)
