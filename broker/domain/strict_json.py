"""The one reader of JSON that others wrote (RFC 8259, read as I-JSON, RFC 7493).

Whatever two readers could understand differently is refused: duplicate members, NaN, a lone surrogate, a number
that does not survive. It never guesses an encoding, and never recurses deeper than it was told.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from broker.domain.errors import Invalid

MAX_BYTES = 65536
MAX_DEPTH = 32

# Possessive, and an unterminated string runs to the end: with backtracking, 64 KiB of \" would cost seconds.
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]++|\\.)*+"?+|[\[\]{}]', re.DOTALL)
_SHOWN = 60


def loads(raw: bytes, *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH) -> Any:
    """The value these bytes can only mean; `Invalid` says what is wrong and, where that is cheap, where.

    >>> loads(b'{"a": [1, null]}')
    {'a': [1, None]}
    """
    if len(raw) > max_bytes:
        raise Invalid(f"the JSON has {len(raw)} bytes; at most {max_bytes} are read")
    _require_depth(raw, max_depth)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise Invalid(f"the JSON is not UTF-8 at byte {problem.start}") from None
    if text.startswith("\ufeff"):
        raise Invalid("the JSON begins with a byte order mark; send it without")
    try:
        value = _decoder.decode(text)
    except json.JSONDecodeError as problem:
        # "from None": the error holds the whole document, and documents hold secrets (INV-30).
        raise Invalid(f"not JSON: {problem.msg} at line {problem.lineno}, column {problem.colno}") from None
    except _NoNumber as problem:
        raise _located(text, problem) from None
    if b"\\u" in raw:  # in valid UTF-8 only an escape can spell a NUL or half a surrogate pair
        _require_text(value, "")
    return value


def _require_depth(raw: bytes, max_depth: int) -> None:
    if raw.count(b"[") + raw.count(b"{") <= max_depth:
        return
    depth = 0
    for token in _STRING_OR_BRACKET.findall(raw):
        if token in (b"[", b"{"):
            depth += 1
            if depth > max_depth:
                raise Invalid(f"the JSON is nested deeper than {max_depth} levels")
        elif token in (b"]", b"}"):
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise Invalid(f"member {_shown(name)} appears twice", member=name[:_SHOWN])
            seen.add(name)
    return members


class _NoNumber(Exception):
    """A number that is none, or that two readers would read differently; where it stands is not known yet."""


def _integer(digits: str) -> int:
    # The length first: converting many digits takes quadratic time.
    if len(digits) > 20 or not -(2**63) <= (value := int(digits)) < 2**63:
        raise _NoNumber("an integer beyond 64 bits")
    return value


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _NoNumber("a number too large to be one")
    return value


def _constant(name: str) -> NoReturn:
    raise _NoNumber(f"{name}, which is not JSON")


def _located(text: str, problem: _NoNumber) -> Invalid:
    """The same document once more, for the sentence alone: the member in which the number stands."""

    def kept(read: Callable[[str], Any]) -> Callable[[str], Any]:
        def number(digits: str) -> Any:
            try:
                return read(digits)
            except _NoNumber as found:
                return found

        return number

    again = json.JSONDecoder(
        object_pairs_hook=_object,
        parse_int=kept(_integer),
        parse_float=kept(_float),
        parse_constant=kept(_constant),
    )
    try:
        path = _path_to_number(again.decode(text), "")
    except (json.JSONDecodeError, Invalid):
        path = ""  # something else is wrong behind it; the number came first
    where = f"{_shown(path)} is " if path else "it holds "
    return Invalid(f"{where}{problem}: send a number that every reader understands", member=path[:_SHOWN] or None)


def _path_to_number(value: Any, path: str) -> str:
    """Where the first one stands that is none; "" for the document itself, and where there is none."""
    if isinstance(value, _NoNumber):
        return path
    below: Iterable[tuple[str, Any]] = ()
    if isinstance(value, dict):
        below = ((f"{path}.{name}" if path else name, item) for name, item in value.items())
    elif isinstance(value, list):
        below = ((f"{path}[{index}]", item) for index, item in enumerate(value))
    return next((found for step, item in below if (found := _path_to_number(item, step))), "")


def _require_text(value: Any, path: str) -> None:
    if isinstance(value, str):
        _require_string(value, path)
    elif isinstance(value, dict):
        for name, item in value.items():
            _require_string(name, path)
            _require_text(item, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _require_text(item, f"{path}[{index}]")


def _require_string(text: str, path: str) -> None:
    # Both pass through Python and break later: PostgreSQL refuses a NUL, encoding refuses half a pair.
    where = f" in {_shown(path)}" if path else ""
    if "\0" in text:
        raise Invalid(f"a string{where} holds a NUL", member=path[:_SHOWN] or None)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Invalid(f"a string{where} holds half a surrogate pair", member=path[:_SHOWN] or None) from None


def _shown(text: str) -> str:
    return ascii(text[:_SHOWN])


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant)
