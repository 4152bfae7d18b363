"""What the client knows of time: the wall clock, for the age of tokens; a monotonic one, for patience; and how to wait.

One object carries all of it, so that a caller (or a test) can replace it. Nothing else here asks for the time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime


def system_clock() -> datetime:
    """This machine's time in UTC."""
    return datetime.now(UTC)


async def _async_sleep(seconds: float) -> None:
    # Not before it is wanted: a program without an event loop does not load one.
    import asyncio

    await asyncio.sleep(seconds)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """`chance` is uniform in [0, 1); it spreads retries and renewals, and decides nothing else."""

    now: Callable[[], datetime] = system_clock
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    async_sleep: Callable[[float], Awaitable[None]] = _async_sleep
    chance: Callable[[], float] = random.random
