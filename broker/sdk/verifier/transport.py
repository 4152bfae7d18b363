"""Asking the broker, within bounds: so many bytes, so many seconds, no redirect, no compression, nobody else's proxy.

What cannot be had is `Lost`, with a sentence that holds neither token nor answer (INV-30).
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Mapping

import httpx

from broker.sdk.clock import Timing
from broker.sdk.errors import BrokerError
from broker.sdk.exchange import http_date
from broker.sdk.secret import Secret

DEADLINE_S = 2.0


class Lost(Exception):
    """No usable answer. `status` is that of an answer that says no."""

    def __init__(self, why: str, status: int | None = None) -> None:
        super().__init__(why)
        self.status = status


class Transport:
    """Safe to share between threads. `token` gives the caller's own workload token, or there is none."""

    def __init__(self, issuer: str, token: Callable[[], Secret] | None, timing: Timing) -> None:
        self._issuer = issuer
        self._token = token
        self._timing = timing
        # What `Date` in answers says against this machine's clock. Nobody signed it: it explains, and decides nothing.
        self.date_ahead_s = 0.0
        self.reset()

    def reset(self) -> None:
        """New connections; those there were are another process's now."""
        self._http = httpx.Client(trust_env=False, follow_redirects=False, timeout=DEADLINE_S)
        self._streaming: socket.socket | None = None

    def close(self) -> None:
        self.cut()
        self._http.close()

    def cut(self) -> None:
        """End the stream that is being read, from another thread."""
        found = self._streaming
        if found is not None:
            # Of the socket beneath, also where TLS is around it: closing that would wait for the reader.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(found, socket.SHUT_RDWR)

    def get(self, path: str, *, accept: str, max_bytes: int, authenticated: bool = False, wait_s: float = 0) -> bytes:
        """The body of a 200; `path` may be a whole address below the issuer's."""
        return self._asked("GET", path, accept, max_bytes, authenticated, wait_s)

    def post(self, path: str, form: Mapping[str, str], *, max_bytes: int) -> bytes:
        return self._asked("POST", path, "application/json", max_bytes, True, 0, form)

    def _asked(
        self,
        method: str,
        path: str,
        accept: str,
        max_bytes: int,
        authenticated: bool,
        wait_s: float,
        form: Mapping[str, str] | None = None,
    ) -> bytes:
        ends_at = self._timing.monotonic() + DEADLINE_S + wait_s
        body = bytearray()
        with self._opened(method, path, accept, authenticated, DEADLINE_S + wait_s, form) as answer:
            for chunk in answer.iter_raw():
                body += chunk
                if len(body) > max_bytes:
                    raise Lost(f"the answer has more than {max_bytes} bytes")
                # One byte at a time would never be a time-out of the connection.
                if self._timing.monotonic() >= ends_at:
                    raise Lost("the answer did not come in time")
        return bytes(body)

    @contextlib.contextmanager
    def stream(self, path: str, headers: Mapping[str, str], silence_s: float) -> Iterator[Iterator[bytes]]:
        """The pieces of an endless answer, as they come; one such at a time."""
        with self._opened("GET", path, "text/event-stream", True, silence_s, None, headers) as answer:
            if not answer.headers.get("content-type", "").startswith("text/event-stream"):
                raise Lost("the answer is no stream of events")
            self._streaming = answer.extensions["network_stream"].get_extra_info("socket")
            try:
                yield answer.iter_raw()
            finally:
                self._streaming = None

    @contextlib.contextmanager
    def _opened(
        self,
        method: str,
        path: str,
        accept: str,
        authenticated: bool,
        timeout_s: float,
        form: Mapping[str, str] | None,
        more: Mapping[str, str] | None = None,
    ) -> Iterator[httpx.Response]:
        url = path if path.startswith(self._issuer) else f"{self._issuer}{path}"
        # Not compressed: of a few KiB could come gigabytes, before anybody counts.
        headers = {"Accept": accept, "Accept-Encoding": "identity", **(more or {})}
        if authenticated:
            headers["Authorization"] = f"Bearer {self._own_token()}"
        timeout = httpx.Timeout(DEADLINE_S, read=timeout_s)
        why = ""
        try:
            with self._http.stream(method, url, headers=headers, data=form, timeout=timeout) as answer:
                dated = http_date(answer.headers.get("date"))
                if dated is not None:
                    self.date_ahead_s = (dated - self._timing.now()).total_seconds()
                if answer.status_code != 200:
                    raise Lost(f"the broker answered {answer.status_code}", answer.status_code)
                if answer.headers.get("content-encoding", "identity") != "identity":
                    raise Lost("the answer is compressed, which was not asked for")
                yield answer
                return
        except (httpx.HTTPError, httpx.InvalidURL) as problem:
            # Only its kind: the error itself holds the request, and the request holds the token (INV-30).
            why = type(problem).__name__
        raise Lost(f"the broker cannot be reached ({why})")

    def _own_token(self) -> str:
        if self._token is None:
            raise Lost("there is no workload token to ask with")
        try:
            return self._token().reveal()
        except BrokerError as problem:
            raise Lost(f"there is no workload token to ask with: {problem.title}") from None
        except Exception as problem:  # somebody else's function; what it says may hold what it was to give
            raise Lost(f"there is no workload token to ask with ({type(problem).__name__})") from None
