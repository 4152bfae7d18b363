"""Every command with its options, as Markdown, from the commands themselves: `docs/reference/cli.md` is this text.

python -m broker.cli.reference > docs/reference/cli.md
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click

from broker.cli.main import main

_INTRODUCTION = """# Commands

Generated from the commands; `broker COMMAND --help` says the same.

Client commands find the broker by `BROKER_URL` (or `--url`) and prove who calls by the workload token in the file
`BROKER_TOKEN_FILE` (or `--token-file`), which is read for each request, or in `BROKER_TOKEN`. The others read the
configuration file of `--config`.

Every command but `serve` and `scheduler` takes `--json`: the API's own object on stdout, and on stderr
`{"error": ..., "problem": ...}` where it failed. Without it, results are tables on a terminal, and in a pipe lines
divided by tabs. Results go to stdout, all else to stderr. A duration is a number of seconds, or a number with `s`, `m`,
`h` or `d`: 300, 90s, 15m, 1h.

| exit code | means |
|---|---|
| 0 | done |
| 1 | refused, or failed |
| 2 | wrong usage: nothing was sent |
| 3 | the broker could not be reached |
"""


def cli_reference() -> str:
    """The whole reference."""
    return _INTRODUCTION + "".join(_group(main, click.Context(main, info_name="broker")))


def _group(group: click.Group, context: click.Context) -> Iterator[str]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is None or command.hidden:
            continue
        below = click.Context(command, info_name=name, parent=context)
        if not isinstance(command, click.Group) or command.invoke_without_command:
            yield _section(command, below)
        if isinstance(command, click.Group):
            yield from _group(command, below)


def _section(command: click.Command, context: click.Context) -> str:
    prose, example = _parts(command.help or "")
    lines = [
        f"\n## {context.command_path}\n",
        prose,
        "",
        "```sh",
        example,
        "```",
        "",
        "| option | meaning |",
        "|---|---|",
    ]
    return "\n".join([*lines, *_rows(command, context)]) + "\n"


def _parts(text: str) -> tuple[str, str]:
    """The prose of a help text, and its example: what follows the mark that keeps click from filling the lines."""
    prose, mark, example = inspect.cleandoc(text).partition("\b\n")
    if not mark:
        raise ValueError(f"a command without an example: {text[:60]!r}")
    return prose.strip(), example.rstrip()


def _rows(command: click.Command, context: click.Context) -> Iterator[str]:
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Argument):
            yield f"| `{parameter.make_metavar(context)}` | Required. |"
            continue
        record = parameter.get_help_record(context)
        if record is not None and "--help" not in parameter.opts:
            written, meaning = map(_cell, record)
            yield f"| `{written}` | {meaning} |"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


if __name__ == "__main__":
    click.echo(cli_reference(), nl=False)
