"""The documentation, taken apart: blocks of code, links, headings, and the commands it names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]
HOW_TOS = sorted((ROOT / "docs" / "how-to").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "deploy" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_COMMAND = re.compile(r"(?:^|[\s(;|&])broker (?=[a-z-])")


@dataclass(frozen=True)
class Block:
    path: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{name_of(self.path)}:{self.line}"


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, *languages: str) -> list[Block]:
    text = path.read_text()
    return [
        Block(path, text.count("\n", 0, found.start()) + 1, found[1], found[2])
        for found in _FENCE.finditer(text)
        if not languages or found[1] in languages
    ]


def all_blocks(*languages: str) -> list[Block]:
    return [block for path in DOCUMENTS for block in blocks(path, *languages)]


def prose(path: Path) -> str:
    return _FENCE.sub("", path.read_text())


def links(path: Path) -> list[str]:
    """Those that lead to somewhere in this repository."""
    return [target for target in _LINK.findall(prose(path)) if not re.match(r"[a-z]+:", target)]


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings: lower case, blanks to dashes, punctuation dropped."""
    found = (_HEADING.findall(prose(path)) if path.suffix == ".md" else []) or []
    plain = (re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in found)
    return {"".join(c for c in heading if c.isalnum() or c in " -_").replace(" ", "-") for heading in plain}


def commands(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(as it is written, its words) of every `broker …` in blocks that are commands and in the text between them."""
    texts = [block.text for block in blocks(path, "sh", "console", "yaml")] + _INLINE.findall(prose(path))
    for text in texts:
        text = text.replace("\\\n", " ")
        for found in _COMMAND.finditer(text):
            written = _until_it_ends(text[found.end() :])
            yield f"broker {written}", shlex.split(written.replace("…", ""))


def _until_it_ends(text: str) -> str:
    """Up to a pipe, a redirection, a closing parenthesis, a comment or the end of the line, outside of quotes."""
    quote = ""
    for index, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "|)>;\n" or (character == "#" and text[index - 1] == " "):
            return text[:index].strip()
    return text.strip()


def what_is_wrong(words: list[str], command: click.Command) -> str | None:
    """Why these words are no command of this tree, or None."""
    words = list(words)
    while words[:1] == ["broker"]:  # a container, a user or a database of that name came before
        del words[0]
    while words:
        word = words.pop(0)
        if word == "--":
            return None
        if word.startswith("--"):
            option = _option(command, word.partition("=")[0])
            if option is None:
                return f"{command.name} has no option {word}"
            if not getattr(option, "is_flag", False) and "=" not in word:
                del words[: option.nargs]
        elif isinstance(command, click.Group):
            below = command.get_command(click.Context(command), word)
            if below is None:
                return f"{command.name} has no command {word}"
            command = below
    return None


def _option(command: click.Command, name: str) -> click.Option | None:
    for parameter in command.params:
        if isinstance(parameter, click.Option) and name in (*parameter.opts, *parameter.secondary_opts):
            return parameter
    return click.Option(["--help"], is_flag=True) if name == "--help" else None
