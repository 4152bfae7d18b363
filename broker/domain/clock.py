"""The one place where the time is asked for.

UTC, whole seconds. A verb reads `now` once, on its first line, and hands it on as an argument.
Expiry is exclusive: at `expires_at` it is over.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

Clock = Callable[[], datetime]

# Two honest clocks may differ by this much when we check somebody else's token. Our own expiries
# have no leeway: it would be authority nobody granted.
LEEWAY = timedelta(seconds=30)


def system_clock() -> datetime:
    """This machine's time in UTC, cut to the second."""
    return datetime.now(UTC).replace(microsecond=0)


def epoch(at: datetime) -> int:
    """Seconds since 1970, as JWT `NumericDate` wants them.

    >>> epoch(datetime(2026, 1, 1, tzinfo=UTC))
    1767225600
    """
    return int(at.timestamp())


def from_epoch(seconds: int) -> datetime:
    """The inverse of `epoch`.

    >>> from_epoch(1767225600).isoformat()
    '2026-01-01T00:00:00+00:00'
    """
    return datetime.fromtimestamp(seconds, UTC)


def rfc3339(at: datetime) -> str:
    """How every answer writes a time.

    >>> rfc3339(datetime(2026, 1, 1, tzinfo=UTC))
    '2026-01-01T00:00:00Z'
    """
    # Not strftime: it imports a module on each call, and threads queue for that.
    return f"{at.astimezone(UTC).replace(tzinfo=None, microsecond=0).isoformat()}Z"
