"""How late it is at the broker, and for how long something signed may be believed.

Three witnesses: this machine's wall clock, its monotonic clock, and the `iat` of what the broker signed. Each statement
proves that it is at least that late at the broker, and from then on the monotonic clock counts: so a wall clock that
stands still or is set back makes nothing younger. A wall clock that is behind what was signed is noticed and nothing
is believed; one that is ahead makes everything look old, which refuses as well. Both errors are on the safe side.
"""

from __future__ import annotations

from dataclasses import dataclass

from broker.sdk.clock import Timing

LEEWAY_S = 5
# Two crystals differ by less than this, so that what one statement proved loses so much of its weight a second.
_DRIFT = 0.001


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """Now, on both clocks of this machine; `broker` is how late it is there at least."""

    wall: float
    monotonic: float
    broker: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Until:
    """When something stops being fresh, on both clocks. Whichever comes first counts.

    The monotonic clock cannot be set, but on some systems it stands still while the machine sleeps; the wall clock
    does not.
    """

    wall: float
    monotonic: float

    def is_over(self, now: Moment) -> bool:
        return now.monotonic >= self.monotonic or now.wall >= self.wall


OVER = Until(wall=float("-inf"), monotonic=float("-inf"))


class BrokerTime:
    """Not thread-safe: whoever holds it brings a lock."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._ahead_of_monotonic: float | None = None
        self._proven_at = 0.0
        self.behind_s = 0.0  # how far the wall clock is behind what was signed last; 0 where it is not

    def now(self) -> Moment:
        wall, monotonic = self._timing.now().timestamp(), self._timing.monotonic()
        return Moment(wall=wall, monotonic=monotonic, broker=max(wall, self._at_least(monotonic)))

    def saw(self, issued_at: int) -> bool:
        """Take note of an `iat` whose signature was verified; False where this machine's clock is behind it."""
        now = self.now()
        behind = issued_at - now.wall
        self.behind_s = behind if behind > LEEWAY_S else 0.0
        if self.behind_s:
            return False
        if issued_at > self._at_least(now.monotonic):
            self._ahead_of_monotonic, self._proven_at = issued_at - now.monotonic, now.monotonic
        return True

    def until(self, issued_at: int, lasts_s: float) -> Until:
        """When something that was received now, and signed at `issued_at`, is older than `lasts_s`."""
        now = self.now()
        left = issued_at + lasts_s - now.broker
        return Until(wall=issued_at + lasts_s + LEEWAY_S, monotonic=now.monotonic + left)

    def _at_least(self, monotonic: float) -> float:
        if self._ahead_of_monotonic is None:
            return float("-inf")
        return self._ahead_of_monotonic + monotonic - _DRIFT * (monotonic - self._proven_at)
