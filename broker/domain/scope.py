"""What a credential opens and for how long: scopes, and the ceilings that cut a lifetime (INV-08, INV-09)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import timedelta

from broker.domain.errors import InvalidScope

# RFC 6749 section 3.3: %x21 / %x23-5B / %x5D-7E, which leaves out blank, quote, backslash and CR LF.
_SCOPE_TOKEN = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]{1,200}")
MAX_SCOPES = 64


def parse_scope(text: str) -> frozenset[str]:
    """The scopes of a blank-separated list; `InvalidScope` for anything RFC 6749 does not allow.

    >>> sorted(parse_scope("contacts:read contacts:write"))
    ['contacts:read', 'contacts:write']
    """
    return scope_set(text.split(" ") if text else [])


def scope_set(scopes: Iterable[str]) -> frozenset[str]:
    """The same for scopes that came as a list."""
    found = list(scopes)
    if not found:
        raise InvalidScope("no scope was asked for: name at least one that the resource offers", member="scope")
    if len(found) > MAX_SCOPES:
        raise InvalidScope(f"{len(found)} scopes are more than the {MAX_SCOPES} one request may name", member="scope")
    for scope in found:
        if not _SCOPE_TOKEN.fullmatch(scope):
            raise InvalidScope(
                f"{scope!r} is not a scope: one to 200 printable ASCII characters, no blank", member="scope"
            )
    return frozenset(found)


def require_offered(wanted: frozenset[str], offered: frozenset[str], resource: str) -> None:
    """Refuse a scope that the resource does not offer, and say which it does."""
    unknown = sorted(wanted - offered)
    if unknown:
        raise InvalidScope(
            f"{resource} does not offer {', '.join(map(repr, unknown))}; it offers {', '.join(sorted(offered))}",
            member="scope",
        )


def effective_ttl(requested: timedelta | None, ceilings: Mapping[str, timedelta]) -> tuple[timedelta, str]:
    """The shortest of what was asked and every ceiling, and the name of the one that decided.

    An empty mapping is a TypeError, so that a forgotten ceiling cannot mean "unlimited". Where several
    are equally short the request decides, then the first named.

    >>> effective_ttl(timedelta(hours=1), {"policy": timedelta(minutes=15), "task": timedelta(minutes=9)})
    (datetime.timedelta(seconds=540), 'task')
    """
    if not ceilings:
        raise TypeError("effective_ttl needs at least one ceiling")
    limits = ({"request": requested} if requested is not None else {}) | dict(ceilings)
    decided_by = min(limits, key=lambda name: limits[name])
    return limits[decided_by], decided_by
