"""`Reporter` for asyncio. Apart from it, so that a program without an event loop does not load one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from broker.sdk import calls
from broker.sdk.clock import Timing
from broker.sdk.errors import Unreachable
from broker.sdk.exchange import Call
from broker.sdk.reporting import GATHER_S, MOST_WAITING, Reports, halves_of, known

if TYPE_CHECKING:
    from broker.sdk.activities import Activity, OfGrant, Told


class AsyncReporter(Reports):
    """`Reports` told by a task of the event loop, which is there while something waits."""

    def __init__(
        self, send: Callable[[Call[Told]], Awaitable[Told]], timing: Timing, most_waiting: int = MOST_WAITING
    ) -> None:
        super().__init__(timing, most_waiting)
        self._send = send
        self._task: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    def put(self, grant: OfGrant | None, action: str, *, traceparent: str | None, at: Any = None, **more: Any) -> None:
        super().put(grant, action, traceparent=traceparent, at=at, **more)
        self._begin()

    def _begin(self) -> None:
        if not self._waiting or (self._task is not None and not self._task.done()):
            return
        try:
            self._task = asyncio.get_running_loop().create_task(self._run())
        except RuntimeError:
            # Outside of a loop: it waits for the next one, or for `flush`.
            return

    async def flush(self, timeout_s: float = 5.0) -> bool:
        """Tell what waits, now; whether all of it was told in time."""
        self._hurry.set()
        self._begin()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=timeout_s)
        self._hurry.clear()
        return not self.waiting

    async def close(self, timeout_s: float = 2.0) -> None:
        """Tell what waits, for so long; the rest is dropped, and nothing more is taken."""
        await self.flush(timeout_s)
        self._most_waiting = 0
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])
        self.drop_all()

    async def _run(self) -> None:
        while self._waiting:
            await self._gather()
            batch = self.take()
            try:
                pause_s = await self._tell(batch)
            except asyncio.CancelledError:
                # Whether it was taken is not known; telling it again is the same activity.
                self.failed(batch, Unreachable("unreachable", "The client was closed", "it was not told in time"))
                raise
            finally:
                self.landed(batch)
            if pause_s:
                await self._timing.async_sleep(pause_s)

    async def _gather(self) -> None:
        """Let the first one wait for company, unless somebody waits for it."""
        hurried = asyncio.ensure_future(self._hurry.wait())
        slept = asyncio.ensure_future(self._timing.async_sleep(GATHER_S))
        try:
            await asyncio.wait([hurried, slept], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in (hurried, slept):
                each.cancel()

    async def _tell(self, batch: list[Activity]) -> float:
        try:
            self.answered(await self._send(calls.tell(batch)))
        except Exception as problem:
            why = known(problem)
            halves = halves_of(batch, why)
            return max([await self._tell(half) for half in halves]) if halves else self.failed(batch, why)
        return 0
