"""A load generator that costs little: keep-alive HTTP/1.1 over asyncio, requests made ahead of time.

It runs on the same cores as what it measures, so what it costs is taken from the figure.
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Latencies are in milliseconds."""

    requests: int
    failed: int
    per_second: float
    p50: float
    p99: float


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How long it took until this many grants, or tokens, were over."""

    count: int
    seconds: float


def figures_of(seconds: Sequence[float], *, took: float, failed: int = 0) -> Figures:
    """Of how long each request took, and all of them together."""
    ordered = sorted(seconds)
    return Figures(
        requests=len(ordered),
        failed=failed,
        per_second=len(ordered) / took,
        p50=ordered[len(ordered) // 2] * 1000,
        p99=ordered[len(ordered) * 99 // 100] * 1000,
    )


def post(host: str, path: str, body: bytes, *, token: str | None = None, media_type: str = "application/json") -> bytes:
    """One request as it goes over the wire."""
    authorization = f"Authorization: Bearer {token}\r\n" if token else ""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\n{authorization}"
        f"Content-Type: {media_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def get(host: str, path: str, *, token: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\n\r\n".encode()


class _Connection(asyncio.Protocol):
    def __init__(self, work: _Work) -> None:
        self.work = work
        self.buffer = b""
        self.is_second = False
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.send()

    def send(self) -> None:
        request = self.work.next()
        if request is None:
            self.transport.close()
            return
        self.sent_at = time.perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head_end = self.buffer.find(b"\r\n\r\n")
        if head_end < 0:
            return
        head = self.buffer[:head_end].lower()
        at = head.find(b"content-length:")
        length = int(head[at + 15 :].partition(b"\r\n")[0]) if at >= 0 else 0
        if len(self.buffer) < head_end + 4 + length:
            return
        answer, self.buffer = self.buffer, b""
        if self.work.then is not None and not self.is_second and answer[9:12] == b"200":
            self.is_second = True
            self.transport.write(self.work.then(answer[head_end + 4 :]))
            return
        self.is_second = False
        self.work.answered(answer[9:12], time.perf_counter() - self.sent_at, answer)
        self.send()

    def connection_lost(self, problem: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(problem)


class _Work:
    """Requests, over and over, until a moment or a number of them, whichever comes first."""

    def __init__(
        self,
        requests: Sequence[bytes],
        seconds: float,
        count: int | None,
        expect: bytes,
        then: Callable[[bytes], bytes] | None,
    ) -> None:
        endless = itertools.cycle(requests)
        self.requests = endless if count is None else itertools.islice(endless, count)
        self.until = time.perf_counter() + seconds
        self.expect = expect
        self.then = then
        self.latencies: list[float] = []
        self.failed = 0
        self.sample: bytes = b""

    def next(self) -> bytes | None:
        return None if time.perf_counter() >= self.until else next(self.requests, None)

    def answered(self, status: bytes, seconds: float, answer: bytes) -> None:
        self.latencies.append(seconds)
        if status != self.expect:
            self.failed += 1
            self.sample = answer


async def _run(port: int, work: _Work, connections: int) -> None:
    loop = asyncio.get_running_loop()
    made = [await loop.create_connection(lambda: _Connection(work), "127.0.0.1", port) for _ in range(connections)]
    await asyncio.gather(*(protocol.done for _, protocol in made))


def run(
    port: int,
    requests: Sequence[bytes],
    *,
    seconds: float = 60,
    count: int | None = None,
    connections: int = 32,
    expect: bytes = b"200",
    then: Callable[[bytes], bytes] | None = None,
) -> Figures:
    """Send the requests over and over; anything but `expect` counts as failed, and one such answer is shown.

    `then` makes of the body of each answer the request that goes with it: both count as one.
    """
    started = time.perf_counter()
    work = _Work(requests, seconds, count, expect, then)
    asyncio.run(_run(port, work, connections))
    took = time.perf_counter() - started
    if work.failed:
        print(f"    one of {work.failed} unexpected answers: {work.sample[:600].decode(errors='replace')}")
    return figures_of(work.latencies, took=took, failed=work.failed)


class Line:
    """One connection that is kept, with a request on it at a time."""

    def __init__(self, port: int, token: str) -> None:
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def ask(self, method: str, path: str, body: bytes | None = None, *, token: str | None = None) -> bytes:
        """The body of the answer, which must be a good one."""
        headers = self._headers if token is None else {**self._headers, "Authorization": f"Bearer {token}"}
        self._connection.request(method, path, body, headers)
        answer = self._connection.getresponse()
        found = answer.read()
        if answer.status >= 300:
            raise SystemExit(
                f"{method} {path} was answered with {answer.status}: {found[:600].decode(errors='replace')}"
            )
        return found

    def close(self) -> None:
        self._connection.close()


def once(port: int, request: bytes) -> bytes:
    """The body of the answer to one request."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(request.replace(b"\r\nHost:", b"\r\nConnection: close\r\nHost:", 1))
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    return answer.partition(b"\r\n\r\n")[2]
