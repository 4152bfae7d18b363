"""Risk: what somebody who watches says of an agent or a user, for a while, and what it comes to for one request."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

LEVELS = ("low", "medium", "high", "critical")
_RANK = {level: rank for rank, level in enumerate(LEVELS)}


@dataclass(frozen=True, kw_only=True)
class Signal:
    """`axis` is agent or user; `source` is what saw it, in the sender's word."""

    id: str
    axis: str
    value: str
    level: str
    reason: str
    source: str
    sent_at: datetime
    sent_by: str
    expires_at: datetime


class Risks:
    """All signals that were not over when they were read. Asking is two look-ups, however many there are."""

    def __init__(self, signals: Iterable[Signal]) -> None:
        self._of: dict[tuple[str, str], list[Signal]] = {}
        for signal in signals:
            self._of.setdefault((signal.axis, signal.value), []).append(signal)

    def level(self, agent: str, user: str | None, now: datetime) -> str:
        """The highest that is said of the agent or of the user it acts for, and is not over; `low` where nothing is."""
        if not self._of:
            return "low"
        said = self._of.get(("agent", agent), [])
        if user is not None:
            said = said + self._of.get(("user", user), [])
        return max((signal.level for signal in said if signal.expires_at > now), key=_RANK.__getitem__, default="low")
