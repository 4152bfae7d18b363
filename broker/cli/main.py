"""The root of the command tree, and what every command's failure looks like."""

from __future__ import annotations

import gc
import importlib
import logging
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import click

from broker import __version__, sdk
from broker.cli import output
from broker.cli.client import refused
from broker.domain.errors import BrokerError, ConfigurationError

# Where each command is defined. A client command must not wait for the server's modules to be imported: an agent's
# script may run it often.
_COMMANDS: Mapping[str, str] = {
    "apply": "broker.cli.server",
    "approval": "broker.cli.approval",
    "audit": "broker.cli.audit",
    "check": "broker.cli.server",
    "conformance": "broker.cli.conformance",
    "dev": "broker.cli.dev",
    "exec": "broker.cli.running",
    "feed": "broker.cli.feed",
    "gateway": "broker.cli.gateway",
    "grant": "broker.cli.grant",
    "helper": "broker.cli.helper",
    "keys": "broker.cli.keys",
    "lease": "broker.cli.lease",
    "lockdown": "broker.cli.lockdown",
    "signal": "broker.cli.signal",
    "migrate": "broker.cli.server",
    "policy": "broker.cli.policy",
    "review": "broker.cli.review",
    "revoke": "broker.cli.revoke",
    "scheduler": "broker.cli.server",
    "serve": "broker.cli.server",
    "ssf": "broker.cli.ssf",
    "task": "broker.cli.task",
    "vault": "broker.cli.vault",
}


class _Commands(click.Group):
    """Turns refusals into sentences and exit codes; a stack trace is for bugs alone."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = _COMMANDS.get(cmd_name)
        if module is None:
            return None
        command: click.Command = getattr(_loaded(module), cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        # A command that keeps no log says one sentence; without a handler Python would print what is logged besides.
        logging.getLogger().addHandler(logging.NullHandler())
        try:
            return super().invoke(ctx)
        except ConfigurationError as problem:
            raise output.fail(_all_of(problem.problems), problems=problem.problems) from None
        except BrokerError as problem:
            raise output.fail(_because(problem)) from None
        except sdk.BrokerError as problem:
            raise refused(problem) from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
@output.json_option
def main() -> None:
    """Just-in-time credentials for AI agents.

    \b
    On a laptop:      broker dev
    In production:    broker check --config broker.toml
                      broker serve --config broker.toml
    As a client:      export BROKER_URL=… BROKER_TOKEN_FILE=…
                      broker task open --purpose "…" --agent NAME --deadline 1h

    Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 could not reach the broker.
    """


def _loaded(module: str) -> ModuleType:
    """What a module brings with it stays: to look for garbage among it, again and again, is a fifth of loading it."""
    if module in sys.modules:
        return sys.modules[module]
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        gc.freeze()
        gc.enable()


def _all_of(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return "\n".join([f"{len(problems)} things are wrong", *(f"- {problem}" for problem in problems)])


def _because(problem: BrokerError) -> str:
    """The sentence, and what the outside said where that is the cause: whoever runs this command may know."""
    if problem.__cause__ is None:
        return problem.detail
    said = str(getattr(problem.__cause__, "orig", None) or problem.__cause__).strip()
    return f"{problem.detail}: {said.splitlines()[0]}" if said else problem.detail
