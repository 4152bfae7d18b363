"""Server-sent events, as the WHATWG describes them, out of bytes as they come, within bounds.

What is not UTF-8, has no end, or is larger than an event can be is `NotReadable`: whoever sends that is not the feed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from broker.sdk.verifier.jose import NotReadable

MAX_LINE_BYTES = 65_536 + 64
_LINE_END = re.compile(rb"\r\n|\n|\r")


@dataclass(frozen=True, slots=True)
class Frame:
    """One event. A comment is an event named ":", because it shows that somebody is there."""

    event: str
    data: str
    id: str | None = None


def frames(pieces: Iterable[bytes]) -> Iterator[Frame]:
    event, id, size = "message", None, 0
    data: list[str] = []
    for line in _lines(pieces):
        size += len(line)
        if size > MAX_LINE_BYTES:
            raise NotReadable("an event is too large to be one")
        if not line:
            if data:
                yield Frame(event, "\n".join(data), id)
            event, data, id, size = "message", [], None, 0
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not name:
            yield Frame(":", "")
        elif name == "event":
            event = value
        elif name == "data":
            data.append(value)
        elif name == "id":
            id = value


def _lines(pieces: Iterable[bytes]) -> Iterator[str]:
    rest = b""
    for piece in pieces:
        rest += piece
        # A carriage return at the end may be half of a line end.
        whole, held = (rest[:-1], b"\r") if rest.endswith(b"\r") else (rest, b"")
        *lines, tail = _LINE_END.split(whole)
        rest = tail + held
        for line in lines:
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError:
                raise NotReadable("a line is not UTF-8") from None
        if len(rest) > MAX_LINE_BYTES:
            raise NotReadable("a line is too long to be one")
