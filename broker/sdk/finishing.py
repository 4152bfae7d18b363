"""What has to be done to its end, though whoever waits for it is cancelled: handing back, ending a task.

`asyncio.shield` alone keeps the work going and lets its caller leave; a loop that closes then cuts the work off. So the
caller stays until the work is done, and is cancelled after it. The work must be bounded by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """The result of the work; CancelledError, once it is done, where the caller was cancelled meanwhile."""
    doing = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not doing.done():
        try:
            await asyncio.wait([doing])
        except asyncio.CancelledError as told:
            cancelled = told
    if cancelled is not None:
        if not doing.cancelled() and (problem := doing.exception()) is not None:
            cancelled.add_note(f"what was to be done at the end failed: {problem}")
        raise cancelled
    return doing.result()
