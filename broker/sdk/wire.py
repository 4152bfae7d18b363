"""The wire: one request to the broker and its answer, by `httpcore`, or by the `httpx` client that a program hands in.

It follows no redirect, knows no proxy and no environment, and adds no header, cookie or credential of its own. `httpx`
is not loaded for it: that would be half of what a program waits for before its first credential.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import httpcore

from broker.sdk.clock import Timing
from broker.sdk.exchange import Answer, Lost, Request

if TYPE_CHECKING:
    import httpx

# As many as httpx keeps: a program with more threads waits its turn.
_POOL: dict[str, Any] = {"max_connections": 100, "max_keepalive_connections": 20, "keepalive_expiry": 5.0}
_FAILURES = (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol)
_WHY = {
    "ConnectError": "the connection was refused, or its certificate was",
    "Timeout": "it did not answer in time",
    "UnsupportedProtocol": "the address is not one that can be asked",
}


class Wire(Protocol):
    """Safe to share between threads. What cannot be had is `Lost`, and never an error that holds the request."""

    def send(self, request: Request) -> Answer | Lost: ...
    def close(self) -> None: ...


class AsyncWire(Protocol):
    async def send(self, request: Request) -> Answer | Lost: ...
    async def close(self) -> None: ...


class OwnWire:
    def __init__(self, origin: str, timing: Timing) -> None:
        self._timing = timing
        self._pool = httpcore.ConnectionPool(ssl_context=_trusted(origin), **_POOL)

    def send(self, request: Request) -> Answer | Lost:
        try:
            response = self._pool.request(request.method, request.url, **_told(request))
        except _FAILURES as problem:
            return lost(problem)
        return _answer(response, self._timing)

    def close(self) -> None:
        self._pool.close()


class OwnAsyncWire:
    def __init__(self, origin: str, timing: Timing) -> None:
        self._timing = timing
        self._pool = httpcore.AsyncConnectionPool(ssl_context=_trusted(origin), **_POOL)

    async def send(self, request: Request) -> Answer | Lost:
        try:
            response = await self._pool.request(request.method, request.url, **_told(request))
        except _FAILURES as problem:
            return lost(problem)
        return _answer(response, self._timing)

    async def close(self) -> None:
        await self._pool.aclose()


class GivenWire:
    """A program's own client, as transport only: its headers, cookies, base URL and authentication stay out of it."""

    def __init__(self, http: httpx.Client, timing: Timing) -> None:
        self._http, self._timing = http, timing

    def send(self, request: Request) -> Answer | Lost:
        import httpx

        try:
            response = self._http.send(_built(request), auth=None, follow_redirects=False)
        except httpx.RequestError as problem:
            return lost(problem)
        return _read(response, self._timing)

    def close(self) -> None:
        """It is the program's."""


class GivenAsyncWire:
    def __init__(self, http: httpx.AsyncClient, timing: Timing) -> None:
        self._http, self._timing = http, timing

    async def send(self, request: Request) -> Answer | Lost:
        import httpx

        try:
            response = await self._http.send(_built(request), auth=None, follow_redirects=False)
        except httpx.RequestError as problem:
            return lost(problem)
        return _read(response, self._timing)

    async def close(self) -> None:
        """It is the program's."""


def lost(problem: Exception) -> Lost:
    """By its kind alone: the error itself holds the request, and the request holds the token (INV-30)."""
    kind = type(problem).__name__
    why = next((words for end, words in _WHY.items() if kind.endswith(end)), "the connection broke")
    return Lost(why=f"{why} ({kind})")


def _trusted(origin: str) -> ssl.SSLContext | None:
    """Whose certificates are taken. On loopback without TLS nobody's are needed, and loading them takes its time."""
    if origin.startswith("http:"):
        return None
    import certifi

    return ssl.create_default_context(cafile=certifi.where())


def _told(request: Request) -> dict[str, Any]:
    phases = ("connect", "read", "write", "pool")
    return {
        "headers": list(request.headers.items()),
        "content": request.content,
        "extensions": {"timeout": dict.fromkeys(phases, request.timeout_s)},
    }


def _answer(response: httpcore.Response, timing: Timing) -> Answer:
    headers = _joined((name.decode("latin-1"), value.decode("latin-1")) for name, value in response.headers)
    return Answer(status=response.status, headers=headers, content=response.content, received_at=timing.now())


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
