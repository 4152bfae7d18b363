"""How values and names are written into a message: on one line (INV-31), and never with a password (INV-30)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

INT64 = range(-(2**63), 2**63)


class Wrong(ValueError):
    """What is wrong with one value and what to do; the reader adds where it stands."""


def quoted(values: Sequence[str]) -> str:
    return ", ".join(map(shown, values))


UNSHOWN: Any = object()


def nearest(name: str, known: Iterable[str]) -> str | None:
    near = get_close_matches(name[:100], list(known), 1, 0.6)
    return f"did you mean {bare(near[0])}?" if near else None


def bare(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name) else shown(name)


def a_type(value: object) -> str:
    names = {bool: "a boolean", int: "an integer", float: "a float", str: "a string", list: "an array", dict: "a table"}
    return names.get(type(value), "a date or time")


def shown(value: object) -> str:
    """A value as TOML writes it, on one line, without what opens something (INV-30, INV-31)."""
    if isinstance(value, str):
        value = _without_credentials(value)
        cut = value[:200].replace("\\", "\\\\").replace('"', '\\"')
        seen = "".join(c if c.isprintable() else f"\\u{ord(c):04X}" for c in cut)
        return f'"{seen}"' + ("…" if len(value) > 200 else "")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        # Python refuses to write very long integers in decimal.
        return str(value) if value in INT64 else "[an integer of more than 64 bits]"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, list | dict):
        return ("[…]" if value else "[]") if isinstance(value, list) else ("{…}" if value else "{}")
    return str(value)


def _without_credentials(text: str) -> str:
    """Text in which, if it is a URL, there is neither userinfo nor a query."""
    scheme, found, rest = text.partition("//")
    if not found:
        return text
    userinfo, at, host = rest.rpartition("@")
    if at:
        # A password with a "?" in it, or a query with an "@" in it: the two look alike.
        rest = "[not shown]" if {"?", "#"} & set(userinfo) else f"[not shown]@{host}"
    path, question, _ = rest.partition("?")
    return f"{scheme}//{path}" + ("?[not shown]" if question else "")


def without_password(url: str) -> str:
    """A URL reduced to what surely is no password; a URL that is not understood is reduced to nothing."""
    if url.startswith("sqlite:"):
        return url.partition("?")[0]
    plain = re.fullmatch(
        r"([a-z][a-z0-9+.-]*://)(?:[^?#]*@)?([A-Za-z0-9._-]*(?::[0-9]{1,5})?(?:/[A-Za-z0-9._/-]*)?)", url
    )
    if plain is None:
        return "[not shown]"
    return plain[1] + ("[not shown]@" if "@" in url else "") + plain[2]
