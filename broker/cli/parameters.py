"""What options accept: durations, and facts as KEY=VALUE. Anything else is wrong usage, and nothing is sent."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import IO, Any

import click

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION = re.compile(r"([0-9]{1,10})([smhd]?)", re.ASCII)
_LONGEST_S = 31_536_000
_LONGEST_TOKEN = 8192
_FACT = re.compile(r"([^=]+)=(.*)", re.DOTALL)


class Duration(click.ParamType[int]):
    """Whole seconds within bounds (INV-09): 300, 90s, 15m, 1h or 2d.

    >>> Duration().convert("15m", None, None)
    900
    """

    name = "duration"

    def __init__(self, lowest_s: int = 1, highest_s: int = _LONGEST_S) -> None:
        self._bounds = range(lowest_s, highest_s + 1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = _DURATION.fullmatch(str(value))
        if found is None:
            self.fail(f"{value!r} is not a duration: write seconds, or a number with s, m, h or d, like 90s or 15m")
        seconds = int(found[1]) * _UNITS[found[2]]
        if seconds not in self._bounds:
            self.fail(f"{value!r} is {seconds} s: it has to be from {self._bounds[0]} s to {self._bounds[-1]} s")
        return seconds

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "DURATION"


class Fact(click.ParamType[tuple[str, str]]):
    """KEY=VALUE; the value may be empty and may hold more equals signs.

    >>> Fact().convert("team=crm", None, None)
    ('team', 'crm')
    """

    name = "fact"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        found = _FACT.fullmatch(value)
        if found is None:
            self.fail(f"{value!r} is not KEY=VALUE")
        return found[1], found[2]

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "KEY=VALUE"


def facts_option(name: str, variable: str, help: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """An option that may be repeated, and comes as one mapping."""

    def merged(
        context: click.Context, parameter: click.Parameter, pairs: Sequence[tuple[str, str]]
    ) -> dict[str, str] | None:
        found: dict[str, str] = {}
        for key, value in pairs:
            if key in found:
                # Which of the two was meant is not ours to guess.
                raise click.BadParameter(f"{key!r} is given twice", ctx=context, param=parameter)
            found[key] = value
        return found or None

    return click.option(name, variable, type=Fact(), multiple=True, callback=merged, help=help)


def user_token_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--on-behalf-of FILE`: in a file, because everybody on the machine can read the arguments of a command."""

    def read(context: click.Context, parameter: click.Parameter, file: IO[str] | None) -> str | None:
        if file is None:
            return None
        try:
            return file.read(_LONGEST_TOKEN + 1).strip()
        except UnicodeDecodeError:
            wrong = "it is not text"
        # Outside of the handler: its error holds what the file does.
        raise click.BadParameter(wrong, context, parameter)

    return click.option(
        "--on-behalf-of",
        type=click.File(encoding="utf-8"),
        callback=read,
        help="A file with the token of the user for whom it is; - is standard input.",
    )(command)
