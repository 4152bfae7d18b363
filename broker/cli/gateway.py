"""`broker gateway`: the process beside a proxy. It has no database, and is a client of the broker like any other."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from granian import Granian
from granian.constants import Interfaces
from granian.log import LogLevels

from broker import telemetry
from broker.cli import output, serving, stopping
from broker.gateway.app import Gateway
from broker.gateway.settings import GatewaySettings, Wrong, read_settings

_log = logging.getLogger(__name__)


@click.command()
@click.option(
    "--config",
    "-c",
    "config",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("gateway.toml"),
    show_default=True,
    help="The gateway's own configuration file.",
)
@click.option("--check", is_flag=True, help="Say everything that is wrong with it, and do not start.")
@output.json_option
def gateway(config: Path, check: bool) -> None:
    """Say to nginx, Envoy or Traefik whether a request may pass, and with which credential of the upstream's.

    \b
    broker gateway --config gateway.toml --check
    broker gateway --config gateway.toml
    """
    try:
        settings = read_settings(config)
    except Wrong as wrong:
        raise output.fail("\n".join(wrong.problems), problems=wrong.problems) from None
    names = [upstream.name for upstream in settings.upstreams]
    if check:
        found = {"config": str(config), "listen": settings.listen, "broker": settings.broker, "upstreams": names}
        output.show(found, output.facts({**found, "result": "nothing is wrong"}))
        return
    telemetry.log_to(sys.stderr)
    _log.info("gateway", extra={"fields": {"listen": settings.listen, "upstreams": names}})
    _serve(settings)


def _serve(settings: GatewaySettings) -> None:
    """Until told to stop. One worker: what was proven once is remembered in one place."""
    host, port = ("127.0.0.1", 1) if settings.socket is not None else settings.address
    granian = Granian(
        "gateway",
        address=host,
        port=port,
        uds=settings.socket,
        # The group is the proxy's, by the directory that the socket is in.
        uds_permissions=None if settings.socket is None else 0o660,
        interface=Interfaces.ASGI,
        workers=1,
        workers_kill_timeout=20,
        respawn_failed_workers=True,
        log_level=LogLevels.warning,
        log_dictconfig=serving.LOG,
        websockets=False,
    )
    serving.say_only_news()
    stopping.also_before_it_serves()
    granian.serve(target_loader=functools.partial(_application, settings), wrap_loader=False)


def _application(settings: GatewaySettings) -> Callable[..., Any]:
    """Built in the worker's own process: connections do not survive a fork."""
    telemetry.log_to(sys.stderr)
    return Gateway(settings)
