"""Policy as code: check it, test it, ask it. On a configuration here, or on the one a broker runs on."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from broker.cli import output
from broker.cli.client import reach
from broker.cli.foreseen import replayed
from broker.cli.parameters import Duration, facts_option
from broker.cli.server import config_option, opened
from broker.config import load
from broker.domain.clock import system_clock
from broker.domain.errors import ConfigurationError
from broker.domain.policy import ALLOW, PolicySet, read_tests, run_tests
from broker.domain.scope import scope_set
from broker.services.administration import WhatIf, evaluate
from broker.services.drafts import fit
from broker.services.redeciding import as_json
from broker.services.replaying import replayed_json

_DEFAULT_TTL_S = 300


@click.group()
def policy() -> None:
    """Check, test and ask policies."""


@policy.command()
@config_option
@output.json_option
def check(config: Path) -> None:
    """Compile the policies of a configuration, and say everything that is wrong with them.

    \b
    broker policy check --config broker.toml
    """
    catalogue = load(config).catalogue
    found = fit(catalogue)
    value = {"config": str(config), "files": sorted(catalogue.policies), "policies": list(found.ids)}
    output.show(value, output.facts({**value, "result": "nothing is wrong"}))


@policy.command()
@config_option
@click.option(
    "--tests",
    "tests_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file of tests; else tests.toml in the directory of the policies.",
)
@output.json_option
def test(config: Path, tests_file: Path | None) -> None:
    """Decide each request of a file of tests, and compare with what it expects.

    \b
    broker policy test --config broker.toml
    broker policy test --config broker.toml --tests policies/tests.toml
    """
    settings = load(config)
    catalogue = settings.catalogue
    policies = PolicySet.compile(catalogue)
    if tests_file is None:
        tests_file = (settings.policies_directory or config.parent) / "tests.toml"
    results = run_tests(policies, read_tests(_document(tests_file), catalogue))
    failures = sum(not result.passed for result in results)
    items = [
        {
            "name": result.name,
            "passed": result.passed,
            "outcome": result.decision.outcome,
            "policies": list(result.decision.policies),
            "wrong": result.wrong or None,
        }
        for result in results
    ]
    rows = [
        ["passed" if item["passed"] else "FAILED", item["name"], item["outcome"], item["policies"], item["wrong"]]
        for item in items
    ]
    columns = ("", "test", "decision", "policies", "what is wrong")
    drawn = output.table(columns, rows, empty="the file has no tests")
    output.show({"items": items, "passed": len(items) - failures, "failed": failures}, drawn)
    if failures:
        raise output.fail(f"{failures} of {len(items)} tests failed")
    output.say(f"all {len(items)} tests passed")


@policy.command("evaluate")
@click.option(
    "--config",
    "-c",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Decide here, by this configuration. Without it the broker at BROKER_URL is asked.",
)
@click.option("--agent", required=True, help="The name of the principal that would ask.")
@click.option("--resource", required=True, help="Its identifier.")
@click.option("--scope", "scopes", required=True, multiple=True, help="May be repeated: every one has to be allowed.")
@click.option("--ttl", "ttl_s", type=Duration(highest_s=86_400), default="300", show_default=True, help="How long.")
@click.option("--purpose", default="evaluation", show_default=True, help="Of the task it would ask under.")
@facts_option("--label", "labels", "A label of the task. May be repeated.")
@click.option("--intent", help="What the agent would say it is for.")
@click.option("--sender-bound", is_flag=True, help="As if it came with a DPoP proof.")
@click.option("--break-glass", is_flag=True, help="As if it were asked for as a break-glass.")
@facts_option("--context", "context", "What the agent would claim. May be repeated.")
@click.option("--url", envvar="BROKER_URL", show_envvar=True, metavar="URL", help="The broker's address.")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="BROKER_TOKEN_FILE",
    show_envvar=True,
    help="The file with your workload token. Or set BROKER_TOKEN.",
)
@click.option("--token", envvar="BROKER_TOKEN", hidden=True)
@output.json_option
def evaluate_request(
    config: Path | None,
    url: str | None,
    token_file: Path | None,
    token: str | None,
    labels: dict[str, str] | None,
    context: dict[str, str] | None,
    **asked: Any,
) -> None:
    """What policy would say to a request: allow, deny or needs_approval, and why. Nothing is issued.

    The exit code is 0 only for allow.

    \b
    broker policy evaluate --config broker.toml --agent summarizer \\
        --resource https://crm.example/api --scope contacts:read --purpose "summarise the leads of May"
    """
    if config is not None:
        decision = _decide_here(config, labels=labels or {}, claimed=context or {}, **asked)
    elif url:
        with reach(url, token_file, token) as broker:
            decision = broker.evaluate_policy(labels=labels, context=context, **asked).raw
    else:
        raise click.UsageError("whose policies? Give --config, or set BROKER_URL to ask a broker")
    output.show(decision, output.decision(decision))
    if decision["outcome"] != ALLOW:
        raise click.exceptions.Exit(output.REFUSED)


@policy.command("replay")
@click.argument("directory", required=False, type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--config",
    "-c",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Replay this whole configuration here, on its own database, instead of a directory at a broker.",
)
@click.option(
    "--period", "period_s", type=Duration(highest_s=2_592_000), default="24h", show_default=True, help="Back from now."
)
@click.option(
    "--limit",
    type=click.IntRange(1, 100_000),
    metavar="NUMBER",
    default=10_000,
    show_default=True,
    help="So many requests at most, the newest; and so many live grants.",
)
@click.option("--url", envvar="BROKER_URL", show_envvar=True, metavar="URL", help="The broker's address.")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="BROKER_TOKEN_FILE",
    show_envvar=True,
    help="The file with your workload token. Or set BROKER_TOKEN.",
)
@click.option("--token", envvar="BROKER_TOKEN", hidden=True)
@output.json_option
def replay_draft(
    directory: Path | None,
    config: Path | None,
    period_s: int,
    limit: int,
    url: str | None,
    token_file: Path | None,
    token: str | None,
) -> None:
    """What a draft would have said to the requests of a period, and what of the live grants it would end.

    DIRECTORY has the draft: its *.cedar files, and schema.cedarschema if there is one. Nothing is done.

    \b
    broker policy replay ./policies --period 24h
    broker policy replay --config broker.toml
    """
    if (directory is None) == (config is None):
        raise click.UsageError("which draft? Give the directory of its policies, or a whole configuration as --config")
    if config is not None:
        settings = load(config)
        with opened(settings) as house:
            found = house.replaying.replayed(
                settings.catalogue, fit(settings.catalogue), period=timedelta(seconds=period_s), at_most=limit
            )
        shown: Mapping[str, Any] = replayed_json(found, as_json(found.live))
    else:
        policies, schema = _draft(directory or Path())
        with reach(url, token_file, token) as broker:
            shown = broker.replay_policies(policies, schema, period_s, limit).raw
    output.show(shown, replayed(shown))


def _draft(directory: Path) -> tuple[dict[str, str], str | None]:
    """The texts of a directory of policies, and of its schema."""
    try:
        policies = {path.name: path.read_text() for path in sorted(directory.glob("*.cedar"))}
        schema = directory / "schema.cedarschema"
        return policies, schema.read_text() if schema.exists() else None
    except OSError as problem:
        raise click.BadParameter(f"{problem.filename} cannot be read ({problem.strerror})") from None
    except UnicodeDecodeError:
        raise click.BadParameter(f"a file of {directory} is not text in UTF-8") from None


def _decide_here(config: Path, *, scopes: tuple[str, ...], **asked: Any) -> Mapping[str, Any]:
    catalogue = load(config).catalogue
    what_if = WhatIf(scopes=scope_set(scopes), **asked)
    return evaluate(catalogue, PolicySet.compile(catalogue), what_if, now=system_clock()).as_json()


def _document(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as problem:
        raise ConfigurationError([f"{path}: cannot be read ({problem.strerror}); name the file with --tests"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise ConfigurationError([f"{path}: is not TOML: {problem}"]) from None
