"""How the demo looks: in a terminal, in a narrow one, and in a file.

Text from outside is never markup (INV-31), and no secret is shown (INV-30): whatever looks like a token is cut here,
wherever it stands, and a password is masked.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from broker.sdk import Event, Receipt, ReceiptLine
from demo.expect import DemoFailed
from demo.wire import Exchange, Query

_WIDEST = 100
_NARROWEST = 60
_SHOWN_OF_A_TOKEN = 12
_TOKEN = re.compile(r"ey[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")
_THEME = Theme(
    {
        "title": "bold",
        "actor": "bold cyan",
        "quiet": "dim",
        "name": "bright_blue",
        "value": "default",
        "bright": "bold yellow",
        "asked": "cyan",
        "asked.mark": "bold cyan",
        "good": "green",
        "good.mark": "bold green",
        "bad": "red",
        "bad.mark": "bold red",
    }
)
_INLINE = 56
_SECRET_MEMBERS = ("password", "private_key", "secret_id")
_MASK = "••••••••"


class Screen:
    def __init__(self) -> None:
        # What a terminal's encoding has no sign for must not end the demo.
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        self._console = Console(theme=_THEME, highlight=False)
        terminal = self._console.is_terminal
        self._console.width = max(_NARROWEST, min(self._console.width, _WIDEST)) if terminal else _WIDEST
        self._steps = 0

    @property
    def stays(self) -> bool:
        """Whether somebody is there, to read on and to end it."""
        return sys.stdin.isatty() and sys.stdout.isatty()

    @contextmanager
    def waiting(self, for_what: str) -> Iterator[None]:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            with self._console.status(Text(f"{for_what} …", style="quiet"), spinner="dots"):
                yield
        else:
            self._line(Text(f"{for_what} …"))
            yield

    def opening(self, title: str, subtitle: str, facts: Mapping[str, str]) -> None:
        self._blank()
        self._line(Text(title, style="title"))
        self.say(subtitle)
        self._blank()
        self._facts(facts)

    def step(self, title: str, *, actor: str) -> None:
        self._steps += 1
        self._blank()
        head = Text.assemble((f" {self._steps} ", "bold reverse"), " ", (title, "title"), " ")
        who = Text.assemble(" ", (actor, "actor"))
        rule = Text("─" * max(2, self._console.width - head.cell_len - who.cell_len), style="quiet")
        self._console.print(head, rule, who, sep="", no_wrap=True, overflow="ellipsis", crop=True)

    def say(self, sentence: str) -> None:
        self._indented(Text(_safe(sentence), style="quiet"))

    def aside(self, sentence: str) -> None:
        """Something to know in the middle of a step."""
        self._blank()
        self.say(sentence)

    def exchange(
        self,
        exchange: Exchange,
        *,
        sent_by: str,
        show: Collection[str],
        bright: Collection[str] = (),
        note: str = "",
        good: bool | None = None,
    ) -> None:
        """One request and its answer. Of the answer the members in `show`, by dotted path; the rest is counted.

        `good` is for a status that means something else here than it mostly does.
        """
        self._blank()
        line = Text.assemble((exchange.method, "bold"), " ", (_safe(exchange.path), "bold"), f"   to {exchange.to}")
        self._gutter([line], "asked", first="→")
        scheme, _, token = exchange.authorization.partition(" ")
        if token:
            whose = f"   {sent_by}"
            header = Text.assemble(("Authorization: ", "name"), f"{scheme} {shortened(token)}", (whose, "quiet"))
            self._gutter([header], "asked")
        if exchange.sent is not None:
            self._gutter(_document(_masked(exchange.sent), show=None, bright=()), "asked")
        style = "good" if (exchange.status < 400 if good is None else good) else "bad"
        status = Text.assemble(
            (f"{exchange.status} {exchange.phrase}", f"{style}.mark"), f"   {exchange.took_ms:.0f} ms"
        )
        if note:
            status.append(f"   {note}", style="bright")
        self._gutter([status], style, first="←")
        self._gutter(_document(_masked(exchange.came), show=show, bright=bright), style)

    def command(self, line: str, output: str, *, at_most: int = 100, columns: int = 100) -> None:
        """What somebody types, and what it printed; columns that tabs divide are drawn as such, the first of them."""
        self._blank()
        self._gutter([Text(_safe(part), style="bold") for part in line.splitlines()], "asked", first="$")
        rows = [line.split("\t")[:columns] for line in output.rstrip("\n").splitlines()]
        columns = max((len(row) for row in rows), default=0)
        widths = [max((len(row[at]) for row in rows if len(row) == columns), default=0) for at in range(columns)]
        lines = [
            Text("  ".join(f"{_safe(cell):<{width}}" for cell, width in zip(row, widths, strict=False)).rstrip())
            if len(row) == columns > 1
            else Text(_safe("  ".join(row)))
            for row in rows
        ]
        self._gutter(lines[:at_most], "good")
        if len(lines) > at_most:
            self._gutter([Text(f"… {len(lines) - at_most} more lines", style="quiet")], "good")

    def lines(self, title: str, text: str) -> None:
        """Lines of a file."""
        self._blank()
        self._indented(Text(title))
        self._gutter([Text(_safe(line)) for line in text.strip("\n").splitlines()], "asked")

    def query(self, query: Query, *, sent_by: str) -> None:
        """One statement to the database, and its rows or why there are none."""
        self._blank()
        self._gutter(
            [Text.assemble((_safe(query.statement), "bold"), f"   to {query.to}"), Text(_safe(f"as {sent_by}"))],
            "asked",
            first="→",
        )
        style = "good" if query.error is None else "bad"
        mark = f"{style}.mark"
        if query.error is not None:
            self._gutter([Text(_safe(line), style=mark) for line in query.error.splitlines()], style, first="←")
            return
        count = f"{len(query.rows)} row{'' if len(query.rows) == 1 else 's'}"
        self._gutter([Text.assemble((count, mark), f"   {query.took_ms:.0f} ms")], style, first="←")
        cells = [query.columns, *query.rows]
        widths = [max(len(row[at]) for row in cells) for at in range(len(query.columns))]
        for number, row in enumerate(cells):
            line = "  ".join(f"{_safe(cell):<{width}}" for cell, width in zip(row, widths, strict=True))
            self._gutter([Text(line.rstrip(), style="name" if number == 0 else "value")], style)

    def counts(self, heads: Sequence[str], rows: Sequence[Sequence[str]], *, bright: Collection[str] = ()) -> None:
        self._table(heads, rows, bright=bright)

    def claims(self, title: str, claims: Mapping[str, Any], meaning: Mapping[str, str]) -> None:
        """The claims named in `meaning`, each with what it is for."""
        self._blank()
        self._indented(Text(title))
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(style="name", no_wrap=True)
        table.add_column(overflow="fold", ratio=5)
        table.add_column(style="quiet", overflow="fold", ratio=4)
        for name, what in meaning.items():
            table.add_row(name, Text(_claim(claims.get(name), is_time=name == "exp"), style="value"), what)
        self._grid(table, indent=6)

    def outcome(self, sentence: str) -> None:
        self._blank()
        self._indented(Text(_safe(sentence), style="bold"), mark=Text("✓ ", style="good.mark"))

    def receipt(self, receipt: Receipt) -> None:
        rows = [
            (
                self._id(line.grant_id),
                line.agent,
                line.resource,
                _clock(line.authority_ended_at),
                _clock(line.confirmed_dead_at),
                _exposed(line),
            )
            for line in receipt.grants
        ]
        ended, dead, exposed = "authority\nended", "confirmed\ndead", "exposed\nuntil"
        self._table(("grant", "agent", "resource", ended, dead, exposed), rows, bright=(ended,))
        totals = receipt.totals
        self._blank()
        self._indented(
            Text.assemble(
                ("ended ", "quiet"),
                (str(totals.ended), "bright"),
                ("   confirmed dead ", "quiet"),
                (str(totals.confirmed_dead), "bright"),
                ("   outstanding ", "quiet"),
                (str(totals.outstanding), "bright"),
            )
        )

    def trail(self, events: Sequence[Event]) -> None:
        rows = [
            (
                _clock(event.at),
                event.type,
                event.actor,
                self._id(event.grant_id) if event.grant_id else "",
                event.reason or ", ".join(map(str, event.data.get("scopes", event.data.get("agents", ())))),
            )
            for event in events
        ]
        self._table(("at", "event", "by", "grant", "about"), rows, bright=("event",))

    def next_steps(self, title: str, steps: Mapping[str, str]) -> None:
        """Commands to copy. They are never wrapped, because a wrapped command is another one."""
        self._steps = 0  # what fails from here on fails in no step
        self._blank()
        self._line(Text.assemble((title, "title")))
        for what, command in steps.items():
            self._blank()
            self.say(what)
            for line in command.splitlines():
                self._console.print(Text(line, style="actor"), soft_wrap=True)

    def staying(self, sentence: str) -> None:
        self._blank()
        self._line(Text(sentence, style="bright"))

    def done(self, sentence: str) -> None:
        self._blank()
        self._line(Text(sentence, style="quiet"))

    def failure(self, problem: DemoFailed) -> None:
        self._blank()
        at = f"in step {self._steps}: " if self._steps else ""
        self._line(Text.assemble(("✗ The demo failed. ", "bad.mark"), _safe(f"{at}{problem}")))
        if problem.log:
            self._line(Text(f"  The last lines of the log of {problem.whose}:", style="quiet"))
            self._gutter([Text(_safe(line)) for line in problem.log], "bad")

    def _facts(self, facts: Mapping[str, str]) -> None:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(style="name", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in facts.items():
            table.add_row(name, Text(_safe(value)))
        self._grid(table, indent=4)

    def _table(self, heads: Sequence[str], rows: Sequence[Sequence[str]], *, bright: Collection[str]) -> None:
        table = Table(box=None, pad_edge=False, header_style="name", padding=(0, 2, 0, 0))
        for head in heads:
            table.add_column(head, style="bright" if head in bright else "default", overflow="fold")
        for row in rows:
            table.add_row(*(Text(_safe(cell)) for cell in row))
        self._blank()
        self._grid(table, indent=4)

    def _grid(self, table: Table, *, indent: int) -> None:
        # Line by line and without the blanks that fill its cells: in a file they are only in the way.
        options = self._console.options.update(width=self._console.width - indent)
        for line in self._console.render_lines(table, options, pad=False):
            self._line(Text.assemble(" " * indent, *((part.text, part.style or "") for part in line)))

    def _id(self, value: str) -> str:
        """An id by its end: beginnings are times, and alike."""
        prefix, _, rest = value.partition("_")
        return f"{prefix}_…{rest[-8:]}"

    def _gutter(self, lines: Sequence[Text], style: str, *, first: str = "") -> None:
        """Lines beside a bar, wrapped under their own beginning."""
        width = self._console.width - 8
        for line in lines:
            indent = len(line.plain) - len(line.plain.lstrip())
            body = line[indent:]
            for at, part in enumerate(body.wrap(self._console, max(20, width - indent - 2), overflow="fold")):
                hang = "  " if at else ""
                mark = Text(f"  {first or '│'} ", style=f"{style}.mark" if first else style)
                part.rstrip()
                self._line(Text.assemble(mark, " " * indent, hang, part))
                first = ""

    def _indented(self, text: Text, mark: Text | None = None) -> None:
        mark = mark or Text()
        for part in text.wrap(self._console, self._console.width - 8):
            self._line(Text.assemble("    ", mark, part))
            mark = Text(" " * mark.cell_len)

    def _line(self, text: Text) -> None:
        text.rstrip()
        self._console.print(text)

    def _blank(self) -> None:
        self._console.print()


def shortened(token: str) -> str:
    # The beginning of a JWT is its header, and public. Of another token even a few characters are some of the secret.
    return (token[:_SHOWN_OF_A_TOKEN] if token.startswith("ey") else token[:2]) + "…"


def _masked(value: Any) -> Any:
    """The same document without what opens something."""
    if isinstance(value, Mapping):
        return {name: _MASK if name in _SECRET_MEMBERS else _masked(member) for name, member in value.items()}
    return [_masked(item) for item in value] if isinstance(value, list) else value


def _safe(text: str) -> str:
    """Printable, and without a whole token."""
    cut = _TOKEN.sub(lambda found: shortened(found[0]), text)
    return "".join(character if character.isprintable() else "?" for character in cut)


def _clock(at: datetime | None) -> str:
    return "not yet" if at is None else at.astimezone(UTC).strftime("%H:%M:%SZ")


def _exposed(line: ReceiptLine) -> str:
    if line.exposed_until is not None:
        return _clock(line.exposed_until)
    return "not known" if line.confirmed_dead_at is None else "–"


def _claim(value: Any, *, is_time: bool) -> str:
    if is_time and isinstance(value, int):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    return _safe(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _document(value: Any, *, show: Collection[str] | None, bright: Collection[str]) -> list[Text]:
    """A JSON object as lines. Small objects and all lists of words stay on one."""
    if not isinstance(value, Mapping):
        return [] if value is None else [_scalar(value, False)]
    lines = [Text("{")]
    lines += _members(value, "", "  ", show, bright)
    return [*lines, Text("}")]


def _members(
    value: Mapping[str, Any], above: str, indent: str, show: Collection[str] | None, bright: Collection[str]
) -> Iterator[Text]:
    shown = [name for name in value if show is None or _is_shown(f"{above}{name}", show)]
    left_out = len(value) - len(shown)
    for name in shown:
        path, member = f"{above}{name}", value[name]
        end = "," if name != shown[-1] or left_out else ""
        head = Text.assemble(indent, (json.dumps(name), "name"), ": ")
        whole = json.dumps(member, ensure_ascii=False)
        narrowed = show is not None and any(wanted.startswith(f"{path}.") for wanted in show)
        if isinstance(member, Mapping) and member and (narrowed or len(whole) > _INLINE):
            yield head.append("{")
            yield from _members(member, f"{path}.", indent + "  ", show if narrowed else None, bright)
            yield Text(f"{indent}}}{end}")
        elif isinstance(member, list) and len(whole) > _INLINE:
            yield head.append("[")
            for at, item in enumerate(member):
                more = "," if at < len(member) - 1 else ""
                yield Text.assemble(indent, "  ", _scalar(item, path in bright), more)
            yield Text(f"{indent}]{end}")
        else:
            yield head.append_text(_scalar(member, path in bright)).append(end)
    if left_out:
        yield Text(f"{indent}… {left_out} more", style="quiet")


def _is_shown(path: str, show: Collection[str]) -> bool:
    return any(wanted == path or wanted.startswith(f"{path}.") or path.startswith(f"{wanted}.") for wanted in show)


def _scalar(value: Any, bright: bool) -> Text:
    # Escapes are shown as people read them: "when { team == "crm" }".
    written = f'"{value}"' if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return Text(_safe(written), style="bright" if bright else "value")
