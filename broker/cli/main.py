"""The root of the command tree, and what every command's failure looks like."""

from __future__ import annotations

from typing import Any

import click

from broker import sdk
from broker.cli import output
from broker.cli.client import refused
from broker.cli.dev import dev
from broker.cli.keys import keys
from broker.cli.policy import policy
from broker.cli.server import apply, check, migrate, scheduler, serve
from broker.domain.errors import BrokerError, ConfigurationError, PolicyDenied


class _Commands(click.Group):
    """Turns refusals into sentences and exit codes; a stack trace is for bugs alone."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigurationError as problem:
            raise output.fail("\n".join(problem.problems), problems=problem.problems) from None
        except PolicyDenied as problem:
            raise output.fail(problem.detail, code=output.REFUSED, decision=problem.decision) from None
        except BrokerError as problem:
            raise output.fail(problem.detail) from None
        except sdk.BrokerError as problem:
            raise refused(problem) from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="agent-credential-broker")
@output.json_option
def main() -> None:
    """Just-in-time credentials for AI agents.

    \b
    On a laptop:      broker dev
    In production:    broker check --config broker.toml
                      broker serve --config broker.toml
    As a client:      export BROKER_URL=… BROKER_TOKEN_FILE=…
                      broker task open --purpose "…" --agent NAME --deadline 1h
    """


for command in (serve, migrate, check, apply, scheduler, dev, policy, keys):
    main.add_command(command)
