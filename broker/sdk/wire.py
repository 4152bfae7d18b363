"""The wire: one request to the broker and its answer, by `httpcore`, or by the `httpx` client that a program hands in.

It follows no redirect, knows no proxy and no environment, and adds no header, cookie or credential of its own. `httpx`
is not loaded for it: that would be half of what a program waits for before its first credential.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterable, Sized
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import httpcore

from broker.sdk.clock import Timing
from broker.sdk.exchange import Answer, Lost, Request

if TYPE_CHECKING:
    import httpx

# As many as httpx keeps: a program with more threads waits its turn.
_MOST = 100
_POOL: dict[str, Any] = {"max_connections": _MOST, "max_keepalive_connections": 20, "keepalive_expiry": 5.0}
_FAILURES = (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol)
_WHY = {
    "ConnectError": "the connection was refused, or its certificate was",
    "Timeout": "it did not answer in time",
    "UnsupportedProtocol": "the address is not one that can be asked",
}
# The receipt of a task with a hundred thousand grants is an eighth of it.
_MOST_BYTES = 256 << 20
_WITHOUT_END = "its answer did not end"
_WHOLE = 6  # as often as long as one wait may take, for an answer that comes drop by drop


class Wire(Protocol):
    """Safe to share between threads, and with a process that was forked. RuntimeError once it is closed.

    What cannot be had is `Lost`, and never an error that holds the request.
    """

    def send(self, request: Request) -> Answer | Lost: ...
    def close(self) -> None: ...


class AsyncWire(Protocol):
    """The same for asyncio, where nothing outlives a fork."""

    async def send(self, request: Request) -> Answer | Lost: ...
    async def close(self) -> None: ...


class _Open:
    """Until it is closed."""

    def __init__(self) -> None:
        self._is_closed = False

    def require(self) -> None:
        if self._is_closed:
            raise RuntimeError("the client is closed: make another one")

    def close(self) -> None:
        self._is_closed = True


class OwnWire:
    def __init__(self, origin: str, timing: Timing) -> None:
        self._origin, self._timing = origin, timing
        self._open = _Open()
        # And whose they are: after a fork the connections are the parent's, and so would the answers be. Together, so
        # that no thread sees the one without the other; a lock might be held by a thread that is not here any more.
        self._held = os.getpid(), self._made()

    def send(self, request: Request) -> Answer | Lost:
        self._open.require()
        content, ends_at = bytearray(), self._timing.monotonic() + _WHOLE * request.timeout_s
        try:
            with self._pool().stream(request.method, request.url, **_told(request)) as response:
                for part in response.iter_stream():
                    if _is_without_end(content, self._timing, ends_at):
                        return Lost(why=_WITHOUT_END)
                    content += part
        except _FAILURES as problem:
            return lost(problem)
        return _answer(response, bytes(content), self._timing)

    def close(self) -> None:
        self._open.close()
        self._pool().close()

    def _pool(self) -> httpcore.ConnectionPool:
        process, pool = self._held
        if process == os.getpid():
            return pool
        # One by one, and nothing is said on them: whoever held the pool's lock is not here to let go of it.
        for connection in pool.connections:
            connection.close()
        self._held = os.getpid(), self._made()
        return self._held[1]

    def _made(self) -> httpcore.ConnectionPool:
        return httpcore.ConnectionPool(ssl_context=_trusted(self._origin), **_POOL)


class OwnAsyncWire:
    """An event loop is not taken along by a fork, so neither are its connections."""

    def __init__(self, origin: str, timing: Timing) -> None:
        self._origin, self._timing = origin, timing
        self._open, self._pool = _Open(), self._made()
        self._under_way = 0

    async def send(self, request: Request) -> Answer | Lost:
        self._open.require()
        pool = self._pool
        self._under_way += 1
        try:
            return await self._sent(pool, request)
        except httpcore.PoolTimeout as problem:
            # Who is cancelled just as a connection is made leaves it in the pool, for nobody, for ever.
            if self._under_way <= _MOST and pool is self._pool:
                self._pool = self._made()
            return lost(problem)
        except _FAILURES as problem:
            return lost(problem)
        finally:
            self._under_way -= 1

    async def _sent(self, pool: httpcore.AsyncConnectionPool, request: Request) -> Answer | Lost:
        content, ends_at = bytearray(), self._timing.monotonic() + _WHOLE * request.timeout_s
        async with pool.stream(request.method, request.url, **_told(request)) as response:
            async for part in response.aiter_stream():
                if _is_without_end(content, self._timing, ends_at):
                    return Lost(why=_WITHOUT_END)
                content += part
        return _answer(response, bytes(content), self._timing)

    async def close(self) -> None:
        self._open.close()
        await self._pool.aclose()

    def _made(self) -> httpcore.AsyncConnectionPool:
        return httpcore.AsyncConnectionPool(ssl_context=_trusted(self._origin), **_POOL)


class GivenWire:
    """A program's own client, as transport only: its headers, cookies, base URL and authentication stay out of it.

    How long an answer may take and be, and what becomes of a fork, is the program's to say.
    """

    def __init__(self, http: httpx.Client, timing: Timing) -> None:
        self._http, self._timing = http, timing
        self._open = _Open()

    def send(self, request: Request) -> Answer | Lost:
        import httpx

        self._open.require()
        try:
            response = self._http.send(_built(request), auth=None, follow_redirects=False)
        except httpx.RequestError as problem:
            return lost(problem)
        return _read(response, self._timing)

    def close(self) -> None:
        """Of the wire alone."""
        self._open.close()


class GivenAsyncWire:
    def __init__(self, http: httpx.AsyncClient, timing: Timing) -> None:
        self._http, self._timing = http, timing
        self._open = _Open()

    async def send(self, request: Request) -> Answer | Lost:
        import httpx

        self._open.require()
        try:
            response = await self._http.send(_built(request), auth=None, follow_redirects=False)
        except httpx.RequestError as problem:
            return lost(problem)
        return _read(response, self._timing)

    async def close(self) -> None:
        """Of the wire alone."""
        self._open.close()


def lost(problem: Exception) -> Lost:
    """By its kind alone: the error itself holds the request, and the request holds the token (INV-30)."""
    kind = type(problem).__name__
    why = next((words for end, words in _WHY.items() if kind.endswith(end)), "the connection broke")
    return Lost(why=f"{why} ({kind})")


def _is_without_end(content: Sized, timing: Timing, ends_at: float) -> bool:
    """Whether no more is read after this; what came in one piece came."""
    return len(content) > _MOST_BYTES or (len(content) > 0 and timing.monotonic() > ends_at)


def _trusted(origin: str) -> ssl.SSLContext | None:
    """Whose certificates are taken. On loopback without TLS nobody's are needed, and loading them takes its time."""
    if origin.startswith("http:"):
        return None
    import certifi

    # Not the default one, which writes down the keys of each connection where SSLKEYLOGFILE says so (INV-30).
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(certifi.where())
    return context


def _told(request: Request) -> dict[str, Any]:
    phases = ("connect", "read", "write", "pool")
    return {
        # Host as well: of an IPv6 address httpcore leaves the brackets out.
        "headers": [("Host", urlsplit(request.url).netloc), *request.headers.items()],
        "content": request.content,
        "extensions": {"timeout": dict.fromkeys(phases, request.timeout_s)},
    }


def _answer(response: httpcore.Response, content: bytes, timing: Timing) -> Answer:
    headers = _joined((name.decode("latin-1"), value.decode("latin-1")) for name, value in response.headers)
    return Answer(status=response.status, headers=headers, content=content, received_at=timing.now())


def _built(request: Request) -> httpx.Request:
    # Built by hand, not by the client: a client that was handed to us may carry a base URL, cookies or headers.
    import httpx

    timeout = httpx.Timeout(request.timeout_s).as_dict()
    return httpx.Request(
        request.method,
        request.url,
        headers=request.headers,
        content=request.content,
        extensions={"timeout": timeout},
    )


def _read(response: httpx.Response, timing: Timing) -> Answer:
    headers = _joined(response.headers.multi_items())
    return Answer(status=response.status_code, headers=headers, content=response.content, received_at=timing.now())


def _joined(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """By lower-case name; of a field that came more than once, all (RFC 9110 section 5.2)."""
    found: dict[str, str] = {}
    for name, value in headers:
        name = name.lower()
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found
