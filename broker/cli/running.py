"""`broker exec`: a program gets a credential without knowing of the broker, and the credential ends with it.

Handed back however the program ends. Where we are killed ourselves, the program is killed too, and what it had lives no
longer than the short life it was issued for.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import click

from broker.cli import child, output
from broker.cli.asking import asking_options, first, wait_option
from broker.cli.client import client_options
from broker.cli.delivery import PRESETS, Delivered, Render, Undeliverable, Way, Ways, delivered
from broker.sdk import BrokerError, Credential, CredentialSource, Limited, Unreachable

# How the caller proves itself is not the program's business: with it, it could ask for more.
_IDENTITY = ("BROKER_TOKEN", "BROKER_TOKEN_FILE")
_LOOK_AGAIN_S, _LOOK_AT_THE_LATEST_S = 1.0, 30.0


@click.command(context_settings={"allow_interspersed_args": False})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--env", "variables", type=Way(), multiple=True, help="Put it into this variable. May be repeated.")
@click.option(
    "--file",
    "files",
    type=Way(),
    multiple=True,
    help="Put it into a private file, kept fresh, whose path is in this variable. May be repeated.",
)
@click.option(
    "--fd",
    "descriptors",
    type=Way(),
    multiple=True,
    help="Let it be read once from the /dev/fd path in this variable. May be repeated.",
)
@click.option(
    "--as", "presets", type=click.Choice(list(PRESETS)), multiple=True, help="As programs of this kind look for it."
)
@click.option("--with-identity", is_flag=True, help="Leave BROKER_TOKEN and BROKER_TOKEN_FILE to the program.")
@wait_option
@client_options
@asking_options
def exec(
    source: CredentialSource,
    /,
    *,
    command: tuple[str, ...],
    variables: tuple[tuple[str, Render], ...],
    files: tuple[tuple[str, Render], ...],
    descriptors: tuple[tuple[str, Render], ...],
    presets: tuple[str, ...],
    with_identity: bool,
    wait_s: int | None,
) -> None:
    """Run a program with a credential that ends when the program does.

    NAME alone is the token, or all members of another secret as JSON; NAME=MEMBER is one of them. A variable and a
    descriptor hold what there was at the start. A file is replaced in time: use it for what runs longer than --ttl.
    The exit code is the program's, or 128+n where signal n ended it; 126 and 127 where it could not be started.

    \b
    broker exec --task "$TASK" --resource https://crm.example/api --scope contacts:read \\
        --env CRM_TOKEN -- ./report.sh
    broker exec --task "$TASK" --resource https://crm.example/api --scope contacts:read \\
        --file CRM_TOKEN_FILE -- ./worker --all-night
    broker exec --task "$TASK" --resource urn:db:orders:readonly --scope select \\
        --as postgres -- psql -h db.example orders
    broker exec --task "$TASK" --resource urn:db:orders:readonly --scope select \\
        --env DB_USER=username --env DB_PASSWORD=password -- ./legacy
    """
    ways = Ways.of(variables, files, descriptors, presets)
    without = () if with_identity else _IDENTITY
    with child.told():
        try:
            # Before there is a credential, and before there is a program that could look.
            core = child.closed()
            code = _run(source, ways, command, without, wait_s, core)
        except child.Stopped as stopped:
            code = 128 + stopped.number
        except (Undeliverable, child.NotStarted, OSError) as problem:
            raise output.fail(
                problem.strerror or str(problem) if isinstance(problem, OSError) else str(problem),
                code=problem.code if isinstance(problem, child.NotStarted) else output.REFUSED,
            ) from None
        finally:
            # From here on nothing interrupts: handing back is bounded by itself.
            child.hold()
            _hand_back(source)
    raise click.exceptions.Exit(code)


def _run(
    source: CredentialSource,
    ways: Ways,
    command: tuple[str, ...],
    without: tuple[str, ...],
    wait_s: int | None,
    core: child.Limits,
) -> int:
    credential = first(source, wait_s)
    with delivered(ways, credential) as found:
        program = child.Child(
            command, variables=found.variables, without=without, descriptors=found.descriptors, core=core
        )
        with _kept(source, ways, found, credential):
            return program.wait()


def _hand_back(source: CredentialSource) -> None:
    try:
        source.close("the program has ended")
    except BrokerError as problem:
        output.say(f"warning: the credential could not be handed back, and lives until it expires: {problem}")


@contextlib.contextmanager
def _kept(source: CredentialSource, ways: Ways, found: Delivered, credential: Credential) -> Iterator[None]:
    """Renewed in time, where the program can take a new one; otherwise it is said when it has expired."""
    over = threading.Event()
    work = _renewing if ways.are_renewed else _watching
    # It inherits that signals are held: they are for the main thread, which waits for them.
    thread = threading.Thread(target=work, args=(source, found, credential, over), name="renewing", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _renewing(source: CredentialSource, found: Delivered, credential: Credential, over: threading.Event) -> None:
    said = False
    pause_s = 0.0
    while not over.wait(pause_s):
        try:
            current = source.credential()
            if current is not credential:
                found.renew(current)
                credential, said = current, False
            # Not for long at once: a machine that sleeps stops the clock that we wait by.
            pause_s = min(max(source.due_in_s(), _LOOK_AGAIN_S), _LOOK_AT_THE_LATEST_S)
        except (Unreachable, Limited, OSError, Undeliverable) as problem:
            if not said:
                output.say(f"warning: the credential could not be renewed, which is tried again: {problem}")
            said, pause_s = True, _LOOK_AGAIN_S
        except BrokerError as problem:
            output.say(f"warning: the credential has ended while the program runs: {problem}")
            return


def _watching(source: CredentialSource, _found: Delivered, credential: Credential, over: threading.Event) -> None:
    if not over.wait(credential.life_s):
        output.say("warning: the credential has expired while the program runs: --file is kept fresh, --env is not")
