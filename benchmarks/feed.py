"""The feed: how soon verifiers hear that a task is over, what thousands of streams cost, how fast the past is told."""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

import httpx

from benchmarks.servers import Bench, broker_on, free_port, resident_mib, running
from broker.config import Settings
from broker.domain.clock import system_clock
from broker.domain.feed import end_of_task
from broker.store import feed as rows
from broker.wiring import build

_STREAM = "/v1/revocations/feed"
_OPENED_AT_ONCE = 100


@dataclass(frozen=True, kw_only=True)
class Propagated:
    """From the answer of "complete" to the event, over all streams, in milliseconds."""

    streams: int
    p50: float
    p99: float
    last: float

    @property
    def told(self) -> str:
        return f"p50 {self.p50:6.1f} ms   p99 {self.p99:6.1f} ms   the last of all {self.last:6.1f} ms"


def with_feed(bench: Bench, streams: int = 6000) -> Bench:
    # One caller has them all, and two thirds are the most it may have.
    room = streams * 3 // 2 + 1
    feed = replace(
        bench.settings.feed, host="127.0.0.1", port=free_port(), streams=room, longest_stream=timedelta(hours=1)
    )
    return replace(bench, settings=replace(bench.settings, feed=feed))


def _serve_feed(settings: Settings) -> None:
    from broker.cli.feed import serve

    os.dup2(os.open(settings.source.with_name("feed.log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    serve(settings)


@contextmanager
def feed_on(bench: Bench) -> Iterator[int]:
    """The group of processes that answers the streams: on SQLite the broker itself."""
    port = bench.settings.feed.port
    with broker_on(bench) as pid:
        if bench.settings.store_url.startswith("sqlite"):
            yield pid
            return
        with running(functools.partial(_serve_feed, bench.settings), port=port, path="/healthz") as feeding:
            yield feeding


class _Listener(asyncio.Protocol):
    """One stream: when the first statement came, and when each event did."""

    def __init__(self, request: bytes, wanted: bytes = b"event: revocation") -> None:
        self._request = request
        self._wanted = wanted
        self.begun = asyncio.get_running_loop().create_future()
        self.heard: list[float] = []
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self.begun.done() and b"event: statement" in data:
            self.begun.set_result(None)
        if self._wanted in data:
            self.heard.append(time.perf_counter())

    def connection_lost(self, problem: Exception | None) -> None:
        self.lost = True
        if not self.begun.done():
            self.begun.set_exception(problem or ConnectionResetError("the stream ended"))


def _request(bench: Bench, *headers: str) -> bytes:
    lines = [f"GET {_STREAM} HTTP/1.1", "Host: feed", f"Authorization: Bearer {bench.token('crm-api')}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def _opened(bench: Bench, count: int) -> list[_Listener]:
    loop, request = asyncio.get_running_loop(), _request(bench)
    listeners: list[_Listener] = []
    while len(listeners) < count:
        more = min(_OPENED_AT_ONCE, count - len(listeners))
        port = bench.settings.feed.port
        made = await asyncio.gather(
            *(loop.create_connection(lambda: _Listener(request), "127.0.0.1", port) for _ in range(more))
        )
        new = [protocol for _, protocol in made]
        await asyncio.wait_for(asyncio.gather(*(protocol.begun for protocol in new)), 60)
        listeners += new
    return listeners


async def _propagated(bench: Bench, streams: int, times: int) -> Propagated:
    listeners = await _opened(bench, streams)
    headers = {"Authorization": f"Bearer {bench.token('pipeline')}"}
    latencies: list[float] = []
    async with httpx.AsyncClient(base_url=bench.settings.issuer, headers=headers, timeout=30) as client:
        body = {"purpose": "summarise the leads of May", "agents": ["agent-0"], "deadline_s": 3600}
        for _ in range(times):
            task = (await client.post("/v1/tasks", json=body)).json()["id"]
            for listener in listeners:
                listener.heard.clear()
            answer = await client.post(f"/v1/tasks/{task}/complete")
            answered = time.perf_counter()
            answer.raise_for_status()
            until = time.monotonic() + 30
            while not all(listener.heard for listener in listeners):
                if time.monotonic() > until or any(listener.lost for listener in listeners):
                    raise SystemExit("a stream did not hear that a task is over")
                await asyncio.sleep(0.002)
            # An event may be there before the answer is.
            latencies += [max(0.0, listener.heard[0] - answered) * 1000 for listener in listeners]
            await asyncio.sleep(0.1)
    for listener in listeners:
        listener.transport.close()
    latencies.sort()
    return Propagated(
        streams=streams,
        p50=latencies[len(latencies) // 2],
        p99=latencies[len(latencies) * 99 // 100],
        last=latencies[-1],
    )


def propagation(bench: Bench, streams: int, times: int) -> Propagated:
    """How soon so many streams hear that a task was completed, so many times one after the other."""
    with feed_on(bench):
        return asyncio.run(_propagated(bench, streams, times))


def memory_of_streams(bench: Bench, streams: int) -> tuple[float, float]:
    """MiB of the process that holds so many streams, without them and with them."""
    with feed_on(bench) as pid:
        httpx.get(f"http://127.0.0.1:{bench.settings.feed.port}/readyz", timeout=10).raise_for_status()
        before = resident_mib(pid)

        async def held() -> float:
            listeners = await _opened(bench, streams)
            await asyncio.sleep(5)
            if any(listener.lost for listener in listeners):
                raise SystemExit("a stream ended that nobody ended")
            after = resident_mib(pid)
            for listener in listeners:
                listener.transport.close()
            return after

        return before, asyncio.run(held())


def replay(bench: Bench, count: int) -> float:
    """Seconds until one reader that missed so many events has all of them and a statement."""
    broker = build(bench.settings)
    try:
        broker.feed.advance()
        before = broker.feed.look().seen
        for first in range(0, count, 10_000):
            ended = [end_of_task(f"task_{number:026}") for number in range(first, first + 10_000)]
            with broker.database.begin() as db:
                rows.announce(db, system_clock(), ended)
            broker.feed.advance()
    finally:
        broker.close()

    async def read() -> float:
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.settings.feed.port, limit=2**20)
        started = time.perf_counter()
        writer.write(_request(bench, f"Last-Event-ID: {before.position}"))
        heard, rest = 0, b""
        while True:
            part = await asyncio.wait_for(reader.read(2**18), 60)
            if not part:
                raise SystemExit("the replay ended early")
            rest = rest[-32:] + part
            heard += part.count(b"event: revocation")
            if b"event: statement" in rest:
                break
        took = time.perf_counter() - started
        writer.close()
        # A word that two parts divide is not counted: a few in a hundred thousand.
        if heard < count * 0.99:
            raise SystemExit(f"{heard} of {count} events were replayed")
        return took

    with feed_on(bench):
        return asyncio.run(read())
