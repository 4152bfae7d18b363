"""The reference is what the commands say, and every command says enough."""

from pathlib import Path

import click
import pytest

from broker.cli import main
from broker.cli.reference import cli_reference

WRITTEN = Path(__file__).parents[2] / "docs" / "reference" / "cli.md"


def commands(group=main, context=None):
    context = context or click.Context(main, info_name="broker")
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        below = click.Context(command, info_name=name, parent=context)
        yield below.command_path, command
        if isinstance(command, click.Group):
            yield from commands(command, below)


COMMANDS = dict(commands())
LEAVES = {path: command for path, command in COMMANDS.items() if not isinstance(command, click.Group)}


def test_the_reference_is_what_the_code_says():
    assert WRITTEN.read_text() == cli_reference(), "run: python -m broker.cli.reference > docs/reference/cli.md"


def test_the_reference_has_every_command_once():
    headings = [line.removeprefix("## ") for line in WRITTEN.read_text().splitlines() if line.startswith("## ")]
    assert headings == sorted(set(headings), key=headings.index)
    assert set(headings) == {*LEAVES, "broker dev", "broker feed"}


@pytest.mark.parametrize("path", LEAVES)
def test_every_command_shows_an_example_of_itself(path):
    example = LEAVES[path].help.partition("\b\n")[2]
    assert path in example


@pytest.mark.parametrize("path", LEAVES)
def test_every_command_takes_json_or_answers_nothing(path):
    options = {option for parameter in LEAVES[path].params for option in parameter.opts}
    assert "--json" in options or path in ("broker serve", "broker scheduler")


@pytest.mark.parametrize("path", COMMANDS)
def test_every_option_says_what_it_is_for(path):
    silent = [
        parameter.name
        for parameter in COMMANDS[path].params
        if isinstance(parameter, click.Option) and not parameter.hidden and not parameter.help
    ]
    assert silent == []
