"""The pieces of production: serve, migrate, check, apply, scheduler."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import getpass
import logging
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path
from typing import Any

import click
from granian import Granian
from granian.constants import Interfaces
from granian.log import LogLevels

from broker import scheduler as scheduling
from broker import telemetry
from broker.cli import output, serving, stopping
from broker.cli.foreseen import foreseen
from broker.config import Settings, load
from broker.domain.errors import BrokerError
from broker.services.drafts import fit
from broker.services.redeciding import as_json
from broker.web.app import create_app
from broker.web.feed_server import FeedServer
from broker.wiring import Broker, build

_log = logging.getLogger(__name__)

_M_ARENA_MAX = -8  # of glibc's malloc.h
_THREADS = 256  # a request waits for its commit or its body; a thread that waits costs little


def config_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--config",
        "-c",
        "config",
        type=click.Path(path_type=Path, dir_okay=False),
        default=Path("broker.toml"),
        show_default=True,
        help="The configuration file.",
    )(command)


@click.command()
@config_option
@output.json_option
def check(config: Path) -> None:
    """Say everything that is wrong with a configuration, without starting.

    \b
    broker check --config /etc/broker/broker.toml
    """
    settings = load(config)
    policies = fit(settings.catalogue)
    catalogue = settings.catalogue
    value = {
        "config": str(config),
        "issuer": settings.issuer,
        "issuers": len(catalogue.issuers),
        "principals": len(catalogue.principals),
        "resources": len(catalogue.resources),
        "policies": len(policies.ids),
        "vault": settings.vault.address if settings.vault else None,
    }
    output.show(value, output.facts({**value, "result": "nothing is wrong"}))


@click.command()
@config_option
@output.json_option
def migrate(config: Path) -> None:
    """Bring the database to the revision this version expects. Safe to repeat.

    \b
    broker migrate --config /etc/broker/broker.toml
    """
    with opened(load(config), migrated=False) as house:
        house.migrate()
    output.show({"migrated": True}, output.facts({"migrated": True}))


@click.command()
@config_option
@click.option("--allow-older", is_flag=True, help="Go back to a configuration that was replaced, on purpose.")
@click.option("--dry-run", is_flag=True, help="Show what of the live grants it would end or shorten, and do nothing.")
@click.option("--yes", is_flag=True, help="Do not ask at a terminal, though live grants would end.")
@output.json_option
def apply(config: Path, allow_older: bool, dry_run: bool, yes: bool) -> None:
    """Store issuers, principals, resources and policies as the newest version.

    Every broker on this database follows at its next request. Live grants are decided again by it in the background:
    those it no longer allows end, and ceilings that shrank shorten what is out. At a terminal that is shown and asked
    about first.

    \b
    broker apply --config /etc/broker/broker.toml --dry-run
    broker apply --config /etc/broker/broker.toml
    """
    settings = load(config)
    with opened(settings) as house:
        if dry_run:
            found = as_json(house.redeciding.foresee(settings.catalogue))
            output.show(found, foreseen(found))
            return
        if _at_a_terminal() and not (yes or output.wants_json()):
            _ask(as_json(house.redeciding.foresee(settings.catalogue)))
        version = house.apply(by=f"cli:{getpass.getuser()}", allow_older=allow_older)
    output.show({"version": version}, output.facts({"version": version}))


def _at_a_terminal() -> bool:
    return sys.stdin.isatty()


def _ask(found: Mapping[str, Any]) -> None:
    """Show what would end, where something would, and go on only with a yes."""
    if not (found["ended"] or found["undecided"]):
        return
    foreseen(found)(output.err())
    if not click.confirm(f"{found['ended'] + found['undecided']} live grants would end. Apply it?", err=True):
        raise output.fail("nothing was applied")


@click.command()
@config_option
@click.option("--no-scheduler", is_flag=True, help="Leave sweeping to `broker scheduler`.")
@click.option("--migrate/--no-migrate", "and_migrate", default=True, show_default=True, help="Migrate before serving.")
def serve(config: Path, no_scheduler: bool, and_migrate: bool) -> None:
    """Answer requests, and sweep.

    \b
    broker serve --config /etc/broker/broker.toml
    """
    settings = load(config)
    prepare(settings, and_migrate=and_migrate)
    telemetry.log_to(sys.stderr)
    run(settings, sweeping=not no_scheduler)


def prepare(settings: Settings, *, and_migrate: bool) -> None:
    """What has to be true before the first request, said before the first request."""
    require_free(_addresses(settings))
    with opened(settings, migrated=not and_migrate) as house:
        if and_migrate:
            house.migrate()
        house.apply(by="broker serve")


def _addresses(settings: Settings) -> list[tuple[str, str | None, int | None]]:
    """All on which it will serve, each by the key that says so."""
    server = settings.server
    if server.unix_path is not None:
        _require_free_socket(server.unix_path)
    addresses = [("server.listen", server.host, server.port)]
    if server.metrics_port is not None:
        ports = range(server.metrics_port, server.metrics_port + server.workers)
        addresses += [("server.metrics_listen", server.metrics_host, port) for port in ports]
    if settings.store_url.startswith("sqlite:"):
        addresses.append(("feed.listen", settings.feed.host, settings.feed.port))
    return addresses


def require_free(addresses: Iterable[tuple[str, str | None, int | None]]) -> None:
    """Refuse an address on which somebody serves already.

    The server shares a port between its workers, and the system would share it with another broker just as well:
    requests would go to the one or the other, by chance.
    """
    for key, host, port in addresses:
        if host is None or port is None:
            continue
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # A port whose last connections linger is free; one that somebody listens on is not.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as problem:
                raise output.fail(
                    f"{key}: cannot listen on {host}, port {port} ({problem.strerror}); stop what listens there, or "
                    "choose another address"
                ) from None


def _require_free_socket(path: Path) -> None:
    """Take away the socket that a broker left behind when it was killed, and none that answers."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as problem:
            raise output.fail(f"server.listen: {path} cannot be tried ({problem.strerror})") from None
    raise output.fail(f"server.listen: somebody serves on {path} already; stop it, or choose another path")


def run(settings: Settings, *, sweeping: bool) -> None:
    """Serve until told to stop; requests under way are answered first."""
    server = settings.server
    granian = Granian(
        "broker",
        address=server.host or "127.0.0.1",
        port=server.port or 8080,
        uds=server.unix_path,
        interface=Interfaces.WSGI,
        workers=server.workers,
        blocking_threads=_THREADS,
        backpressure=4 * _THREADS,
        workers_kill_timeout=20,
        respawn_failed_workers=True,
        log_level=LogLevels.warning,
        log_dictconfig=serving.LOG,
        websockets=False,
    )
    serving.say_only_news()
    stopping.also_before_it_serves()
    # Whose core is whose, by the number of the process that has it; shared with the workers, which choose one each.
    cores = multiprocessing.Array("i", server.workers)
    granian.serve(target_loader=functools.partial(_application, settings, sweeping, cores), wrap_loader=False)


def _application(settings: Settings, sweeping: bool, cores: SynchronizedArray[int]) -> Callable[..., Any]:
    """The WSGI application, built in the worker's own process: connections and threads do not survive a fork."""
    telemetry.log_to(sys.stderr)
    try:
        return _built(settings, sweeping, cores)
    except (BrokerError, OSError) as problem:
        _log.error("cannot serve", extra={"fields": {"detail": str(problem)}})
        raise SystemExit(output.REFUSED) from None


def _built(settings: Settings, sweeping: bool, cores: SynchronizedArray[int]) -> Callable[..., Any]:
    stay_on_one_core(cores)
    _share_memory()
    house = build(settings)
    # One process writes on SQLite (decision 0011), so there the feed's server is a thread of this one.
    at = settings.feed if house.database.is_sqlite else None
    feed = None if at is None or at.host is None or at.port is None else FeedServer(house, at.host, at.port)

    def stop() -> None:
        if feed is not None:
            feed.stop()
        # Or the threads that pay go on until no debt is due, and the process waits for them.
        house.stop()

    stopping.in_worker(stop)
    # Before anything is read of them: what Vault has opened once needs no trust in a row.
    house.keys.tend()
    # Fetched before the first request needs them; an issuer that is down now is tried again when its token comes.
    house.key_sets.refresh(house.standing.now().catalogue.issuers, house.clock())
    scheduling.start(house, only=None if sweeping else ("look again", "confirm keys"))
    server = settings.server
    if server.metrics_host is not None and server.metrics_port is not None:
        telemetry.serve_metrics(server.metrics_host, server.metrics_port, server.workers)
    if feed is not None:
        feed.start()
    application: Callable[..., Any] = create_app(house).wsgi_app
    _keep_for_good()
    return application


def _keep_for_good() -> None:
    """What is there before the first request stays: to look through all of it for garbage keeps everybody waiting.

    Measured: 0.16 s, in the middle of somebody's request.
    """
    gc.collect()
    gc.freeze()


def stay_on_one_core(taken: SynchronizedArray[int]) -> None:
    """Keep this worker's threads together, and away from the other workers': only one of them runs Python at a time.

    Spread over cores they hand the interpreter's lock from one to the other, and each hand-over wakes a core. Measured:
    a third more grants, at two thirds of the latency; and two workers on one core do no more than one.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        # From another core for another broker on the same machine.
        core = (os.getppid() + _place_among(taken)) % len(cores)
        os.sched_setaffinity(0, {cores[core]})
    # Whoever waits for the lock asks for it this often; each time costs, and a batch is not done sooner for it.
    sys.setswitchinterval(0.02)


def _share_memory() -> None:
    """Let this worker's threads allocate from the same two heaps, where the C library would give each its own.

    They take turns at running Python, so heaps of their own save no waiting, and what is free in one is not in another.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_ARENA_MAX, 2)


def _place_among(taken: SynchronizedArray[int]) -> int:
    """The first place that nobody holds who lives; one who took over from a worker that died gets that one's."""
    with taken.get_lock():
        free = [place for place, holder in enumerate(taken[:]) if not (holder and _lives(holder))]
        place = free[0] if free else 0
        taken[place] = os.getpid()
        return place


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@click.command()
@config_option
def scheduler(config: Path) -> None:
    """Sweep, beside several `broker serve --no-scheduler`.

    \b
    broker scheduler --config /etc/broker/broker.toml
    """
    settings = load(config)
    with stopping.waited_for() as told, opened(settings) as house:
        telemetry.log_to(sys.stderr)
        running = scheduling.start(house)
        _log.info("sweeping")
        told()
        # First, or the job that pays goes on until nothing more is due.
        house.debts.stop()
        running.shutdown(wait=True)


@contextlib.contextmanager
def opened(settings: Settings, *, migrated: bool = True) -> Iterator[Broker]:
    """A broker for one command; `migrated` refuses a database that is not at the revision this version expects."""
    house = build(settings)
    try:
        if migrated and not house.is_migrated():
            raise output.fail("the database is not at the revision this version expects: run `broker migrate`")
        yield house
    finally:
        house.close()
