"""What a command prints, for people and with `--json` for programs; and its exit code.

0 done, 1 refused or failed, 2 wrong usage, 3 could not reach the broker. Results go to stdout, all else to stderr.
On a terminal tables are drawn; in a pipe a row is a line and tabs divide it. Text that came from somebody else is
text: nothing in it is markup, a control sequence or another line (INV-31).
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

Drawing = Callable[[Console], None]


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


# As wide as what is printed: a terminal breaks a long line by itself, and an id it broke can still be copied. A cell
# that is broken to fit cannot.
_WIDTH = 10_000


def out() -> Console:
    return Console(highlight=False, soft_wrap=True, width=_WIDTH)


def err() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True, width=_WIDTH)


def show(value: Any, human: Drawing) -> None:
    """The result: `value` as JSON, or what `human` prints."""
    if wants_json():
        click.echo(json.dumps(value, indent=2))
    else:
        human(out())


def say(sentence: str) -> None:
    """Something to know that is not the result."""
    if not wants_json():
        err().print(Text("\n").join(map(_cell, sentence.splitlines())))


def fail(sentence: str, *, code: int = REFUSED, **more: Any) -> click.exceptions.Exit:
    """Report a failure and answer the exception to raise."""
    if wants_json():
        click.echo(json.dumps({"error": sentence, **more}), err=True)
    else:
        lines = Text("\n").join(map(_cell, sentence.splitlines()))
        err().print(Text("error: ", style="bold red").append(lines))
    return click.exceptions.Exit(code)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, empty: str, styles: Iterable[str] = ()) -> Drawing:
    """Rows under headings; where there are none, `empty` is said. `styles`: how each is drawn on a terminal."""
    cells = [[_cell(value) for value in row] for row in rows]
    drawn_as = list(styles) or [""] * len(cells)

    def draw(console: Console) -> None:
        if not console.is_terminal:
            for line in [list(map(Text, columns)), *cells]:
                # Not the console: it makes blanks of tabs, and `cut` finds no field.
                click.echo("\t".join(cell.plain for cell in line))
            return
        if not cells:
            console.print(Text(empty, style="dim"))
            return
        drawn = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for column in columns:
            drawn.add_column(column, no_wrap=True)
        for row, style in zip(cells, drawn_as, strict=True):
            drawn.add_row(*row, style=style)
        console.print(drawn)

    return draw


def facts(pairs: Mapping[str, Any]) -> Drawing:
    """One thing: its members, one a line."""

    def draw(console: Console) -> None:
        width = max(map(len, pairs), default=0)
        for name, value in pairs.items():
            console.print(Text(f"{name:<{width}}  ", style="bold").append(_cell(value)))

    return draw


def sentences(lines: Iterable[str]) -> Drawing:
    """One a line."""

    def draw(console: Console) -> None:
        for line in lines:
            console.print(_cell(line))

    return draw


def both(*drawings: Drawing) -> Drawing:
    """One below the other, with an empty line between them."""

    def draw(console: Console) -> None:
        for number, drawing in enumerate(drawings):
            if number:
                console.print()
            drawing(console)

    return draw


def titled(title: str, drawing: Drawing) -> Drawing:
    """A line above it that says what it is."""

    def draw(console: Console) -> None:
        console.print(_cell(title))
        drawing(console)

    return draw


def page(
    value: Mapping[str, Any], columns: Sequence[str], row: Callable[[Mapping[str, Any]], Sequence[Any]], *, empty: str
) -> None:
    """One page of a list, and how to get the next."""
    show(value, table(columns, [row(item) for item in value["items"]], empty=empty))
    say_more(value)


def say_more(value: Mapping[str, Any]) -> None:
    """Say how to get the next page, if there may be one."""
    if value.get("next_cursor"):
        say(f"there may be more: --cursor {value['next_cursor']}")


def decision(value: Mapping[str, Any]) -> Drawing:
    """What policy said, and why."""

    def draw(console: Console) -> None:
        version = value["policy_version"] or "not applied yet"
        facts({"outcome": value["outcome"], "policies": value["policies"], "version": version})(console)
        for reason in value["reasons"]:
            console.print(Text("- ").append(_cell(reason)))

    return draw


def lease(value: Mapping[str, Any]) -> str:
    """What is owed for a grant, in a line."""
    state, dead_at, tried = value["state"], value["confirmed_dead_at"], value["attempts"]
    if dead_at is not None:
        return f"{value['id']}, {state}: confirmed dead at {dead_at}"
    if state in ("intended", "held"):
        return f"{value['id']}, {state}"
    times = {0: "not tried yet", 1: "tried once"}.get(tried, f"tried {tried} times")
    why = f", the last time: {value['last_error']}" if value["last_error"] else ""
    given_up = f"; abandoned at {value['abandoned_at']}" if value["abandoned_at"] else ""
    return f"{value['id']}, {state}: {times}{why}{given_up}"


def secret(data: Mapping[str, Any]) -> None:
    """What a secret consists of, to stdout: a name and its value a line, text of several lines below its name.

    Never changed: what a terminal could take for something else is printed as JSON spells it.
    """
    width = max((len(name) for name in data if _is_short(data[name])), default=0)
    for name, value in data.items():
        click.echo(f"{name:<{width}}  {_spelled(value)}" if _is_short(value) else f"{name}\n{value.rstrip()}")


def _is_short(value: Any) -> bool:
    return not (isinstance(value, str) and "\n" in value and all(line.isprintable() for line in value.split("\n")))


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value)


def show_receipt(value: Mapping[str, Any]) -> None:
    """A receipt, and where to look for what is still owed."""
    show(value, receipt(value))
    say_owed(value["grants"])


def say_owed(lines: Iterable[Mapping[str, Any]]) -> None:
    """Say of grants that have ended how many secrets outside are not confirmed dead yet."""
    owed = sum(_is_owed(line) for line in lines)
    if owed:
        say(
            f"{owed} made outside and not confirmed dead yet: the broker tries on, and a receipt that is asked for "
            "later says when it is. Why it takes long, an admin sees with: broker lease list"
        )


def _is_owed(line: Mapping[str, Any]) -> bool:
    outside = line["provider"] != "jwt"
    return outside and line["authority_ended_at"] is not None and line["confirmed_dead_at"] is None


def receipt(value: Mapping[str, Any]) -> Drawing:
    """What ended, one grant a line, and until when each is still exposed: to offline verifiers, or outside."""
    totals = value["totals"]
    head = {
        "task": value["task_id"],
        "outcome": value["outcome"],
        "ended at": value["ended_at"],
        "grants": f"{len(value['grants'])}: authority ended for {totals['ended']}, confirmed dead "
        f"{totals['confirmed_dead']}, outstanding {totals['outstanding']}",
    }
    if not value["grants"]:
        return facts(head)
    return both(facts(head), receipt_lines(value["grants"]))


def receipt_lines(lines: Iterable[Mapping[str, Any]]) -> Drawing:
    """The grants of a receipt, as a table."""
    columns = ("grant", "agent", "resource", "authority ended", "confirmed dead", "exposed until", "revocation")
    rows = [
        [
            line["grant_id"],
            line["agent"],
            line["resource"],
            line["authority_ended_at"] or "not yet",
            line["confirmed_dead_at"] or "not yet",
            line["exposed_until"] or ("no longer" if line["confirmed_dead_at"] else "unknown"),
            line["revocation_class"],
        ]
        for line in lines
    ]
    return table(columns, rows, empty="nothing had been issued")


def _cell(value: Any) -> Text:
    if value is None or value == "":
        return Text("–")
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    if isinstance(value, list | tuple | set | frozenset):
        return _cell(", ".join(map(str, value)))
    if isinstance(value, Mapping):
        return _cell(", ".join(f"{name}={item}" for name, item in value.items()))
    text = str(value)
    return Text("".join(character if character.isprintable() else "?" for character in text))
