"""Standing refusals: lockdowns and bulk revocations, and which grants they cover.

A lockdown covers whatever matches for as long as it stands. A bulk revocation covers what was issued up to its era
(`broker.store.gate`). Both take effect when their one row commits, for any number of grants; the rows follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from broker.domain.errors import Invalid
from broker.domain.grant import Authority

AXES = ("task", "agent", "user", "orchestrator", "resource", "provider", "policy", "key", "all")


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """`era` is None for a lockdown. On the axis `all` the value is "all"."""

    id: str
    axis: str
    value: str
    reason: str
    era: int | None = None

    def covers(self, grant: Authority) -> bool:
        if self.era is not None and grant.era > self.era:
            return False
        return self.axis == "all" or self.value in grant.on_axis(self.axis)


class Refusals:
    """All that stand at one moment. Asking is a few dictionary look-ups, however many there are."""

    def __init__(self, refusals: Iterable[Refusal]) -> None:
        self._by_axis: dict[str, dict[str, list[Refusal]]] = {}
        for refusal in refusals:
            self._by_axis.setdefault(refusal.axis, {}).setdefault(refusal.value, []).append(refusal)

    def over(self, grant: Authority) -> Refusal | None:
        """One that covers this grant, or None."""
        for axis, by_value in self._by_axis.items():
            for value in ("all",) if axis == "all" else grant.on_axis(axis):
                for refusal in by_value.get(value, ()):
                    if refusal.covers(grant):
                        return refusal
        return None

    def along(self, axis: str, value: str) -> Refusal | None:
        """One over exactly this, whatever its era; or None."""
        return next(iter(self._by_axis.get(axis, {}).get(value, ())), None)

    def __iter__(self) -> Iterator[Refusal]:
        for by_value in self._by_axis.values():
            for refusals in by_value.values():
                yield from refusals


def require_axis(axis: str, value: str) -> None:
    """Refuse an axis that does not exist, and on `all` anything but "all": a typo must not stop the world."""
    if axis not in AXES:
        raise Invalid(f"{axis!r} is not an axis: name one of {', '.join(AXES)}", member=axis)
    if axis == "all" and value != "all":
        raise Invalid('to revoke everything say {"all": "all"}', member="all")


def selector(members: Mapping[str, str | None]) -> tuple[str, str]:
    """The one axis and value of a request that names exactly one."""
    named = [(axis, value) for axis, value in members.items() if value is not None]
    if len(named) != 1:
        found = ", ".join(axis for axis, _ in named) or "none"
        raise Invalid(f"name exactly one of {', '.join(AXES)}; found: {found}", member="selector")
    require_axis(*named[0])
    return named[0]
