"""What a command prints, for people and with `--json` for programs; and its exit code.

0 done, 1 refused or failed, 2 wrong usage, 3 could not reach the broker. Results go to stdout, all else to stderr.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

REFUSED, USAGE, UNREACHABLE = 1, 2, 3


_JSON = "broker.json"


def wants_json() -> bool:
    """Whether `--json` was given, before the command or after it."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(_JSON))


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--json` on a command."""

    def remember(context: click.Context, _: click.Parameter, given: bool) -> None:
        # A context shares `meta` with those above and below it, so either place counts.
        context.meta[_JSON] = given or context.meta.get(_JSON, False)

    return click.option(
        "--json", "as_json", is_flag=True, expose_value=False, is_eager=True, callback=remember, help="Print JSON."
    )(command)


def out() -> Console:
    return Console(highlight=False, soft_wrap=True)


def err() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


def show(value: Any, human: Callable[[Console], None]) -> None:
    """The result: `value` as JSON, or what `human` prints."""
    if wants_json():
        click.echo(json.dumps(value, indent=2, default=str))
    else:
        human(out())


def say(sentence: str) -> None:
    """Something to know that is not the result."""
    if not wants_json():
        err().print(Text(sentence))


def fail(sentence: str, *, code: int = REFUSED, **more: Any) -> click.exceptions.Exit:
    """Report a failure and answer the exception to raise."""
    if wants_json():
        click.echo(json.dumps({"error": sentence, **more}, default=str), err=True)
    else:
        err().print(Text("error: ", style="bold red").append(sentence, style="default"))
    return click.exceptions.Exit(code)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, empty: str) -> Callable[[Console], None]:
    """Rows under headings. Cells are text: nothing in them is markup (INV-31)."""
    cells = [[_cell(value) for value in row] for row in rows]

    def draw(console: Console) -> None:
        if not cells:
            console.print(Text(empty))
            return
        drawn = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            drawn.add_column(column, overflow="fold")
        for row in cells:
            drawn.add_row(*row)
        console.print(drawn)

    return draw


def facts(pairs: Mapping[str, Any]) -> Callable[[Console], None]:
    """One thing: its members, one a line."""

    def draw(console: Console) -> None:
        width = max(map(len, pairs), default=0)
        for name, value in pairs.items():
            console.print(Text(f"{name:<{width}}  ", style="bold").append(_cell(value)))

    return draw


def decision(value: Mapping[str, Any]) -> Callable[[Console], None]:
    """What policy said, and why."""

    def draw(console: Console) -> None:
        version = value["policy_version"] or "not applied yet"
        facts({"outcome": value["outcome"], "policies": value["policies"], "version": version})(console)
        for reason in value["reasons"]:
            console.print(Text("- ").append(_cell(reason)))

    return draw


def _cell(value: Any) -> Text:
    if value is None:
        return Text("–")
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    if isinstance(value, list | tuple | set | frozenset):
        return Text(", ".join(str(item) for item in value) or "–")
    if isinstance(value, Mapping):
        return Text(json.dumps(value))
    text = str(value)
    return Text("".join(character if character.isprintable() else "?" for character in text))
