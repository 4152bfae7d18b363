"""`broker.sdk.run` for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from broker.sdk import calls
from broker.sdk.dpop import DpopKey
from broker.sdk.errors import BrokerError
from broker.sdk.exchange import Call
from broker.sdk.finishing import to_its_end
from broker.sdk.run import BEATS_PER_PERIOD, TASK_IS_GONE, Running, beat, ending, not_ended, note_loss
from broker.sdk.values import Task

if TYPE_CHECKING:
    from broker.sdk.aio import AsyncClient
    from broker.sdk.async_credential import AsyncCredentialSource
    from broker.sdk.receipts import Receipt


class AsyncRunningTask(Running):
    """`RunningTask` for asyncio."""

    def __init__(self, task: Task, client: AsyncClient) -> None:
        super().__init__(task, client.report)
        self._client = client
        self._sources: list[AsyncCredentialSource] = []

    def credential(
        self,
        resource: str,
        scopes: Iterable[str],
        *,
        agent: AsyncClient | None = None,
        ttl_s: int | None = None,
        intent: str | None = None,
        context: Mapping[str, Any] | None = None,
        dpop: DpopKey | None = None,
        parameters: Mapping[str, str] | None = None,
    ) -> AsyncCredentialSource:
        """A credential for this task, which ends with the block. `agent` asks for it where it is not us."""
        source = (agent or self._client).credential(
            self.id,
            resource,
            scopes,
            ttl_s=ttl_s,
            intent=intent,
            context=context,
            dpop=dpop,
            parameters=parameters,
        )
        self._sources.append(source)
        return source

    async def lapse(self) -> None:
        """What was asked for in the block is over, as its task is."""
        for source in self._sources:
            await source.lapse()


@contextlib.asynccontextmanager
async def async_running(client: AsyncClient, opening: Call[Task]) -> AsyncIterator[AsyncRunningTask]:
    run = AsyncRunningTask(await client.send(opening), client)
    async with _beating(client, run):
        try:
            yield run
        except BaseException as error:
            run.ending = True
            try:
                await to_its_end(_end(client, run, ending(run.id, error)))
            except BrokerError as problem:
                error.add_note(not_ended(run.id, problem))
            finally:
                await run.lapse()
            raise
        run.ending = True
        try:
            await to_its_end(_end(client, run, calls.complete_task(run.id)))
        finally:
            await run.lapse()


async def _end(client: AsyncClient, run: AsyncRunningTask, ending: Call[Receipt]) -> None:
    run.receipt = await client.send(ending)


@contextlib.asynccontextmanager
async def _beating(client: AsyncClient, run: Running) -> AsyncIterator[None]:
    if run.task.heartbeat_s is None:
        yield
        return
    every_s = run.task.heartbeat_s / BEATS_PER_PERIOD

    async def go_on() -> None:
        while True:
            await client.timing.async_sleep(every_s)
            try:
                await client.send(beat(run))
            except TASK_IS_GONE as error:
                note_loss(run, error)
                return
            except BrokerError:
                continue

    beating = asyncio.ensure_future(go_on())
    try:
        yield
    finally:
        beating.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await beating
