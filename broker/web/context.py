"""The call that is being answered: its head as WSGI gave it, who calls, and the broker behind it.

Two doors lead here, Flask and `broker.web.front` before it. Whatever reads a request reads it from this one place, so
that no request means one thing at the one door and another at the other.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from flask import current_app, g, request
from werkzeug.http import parse_options_header
from werkzeug.sansio.utils import get_content_length
from werkzeug.wsgi import get_path_info

from broker.web.bodies import Bodies
from broker.wiring import Broker


class Call:
    """One request on its way. `caller` is the name of whoever proved to be it, for the log."""

    __slots__ = ("bodies", "body_was_read", "broker", "caller", "environ", "raw_body", "started", "trace_id")

    def __init__(self, environ: dict[str, Any], broker: Broker, bodies: Bodies) -> None:
        self.started = time.perf_counter()
        self.environ = environ
        self.broker = broker
        self.bodies = bodies
        self.trace_id = ""
        self.caller: str | None = None
        self.raw_body = b""
        self.body_was_read = False

    @property
    def method(self) -> str:
        return str(self.environ.get("REQUEST_METHOD", "GET")).upper()

    @property
    def path(self) -> str:
        return "/" + get_path_info(self.environ).lstrip("/")

    @property
    def query_string(self) -> bytes:
        return str(self.environ.get("QUERY_STRING", "")).encode("latin1")

    def header(self, name: str) -> str | None:
        """A header of the request. WSGI has one of each name: those that came twice were joined by the server."""
        key = name.upper().replace("-", "_")
        return self.environ.get(key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}")

    @property
    def content_length(self) -> int | None:
        """As many bytes as were announced; None where the body comes in chunks, or none does."""
        return get_content_length(self.header("Content-Length"), self.header("Transfer-Encoding"))

    @property
    def mimetype(self) -> str:
        return parse_options_header(self.header("Content-Type") or "")[0].lower()


_answered: ContextVar[Call | None] = ContextVar("call", default=None)


@contextmanager
def answering(call: Call) -> Iterator[None]:
    """Within the block, this is the call."""
    token = _answered.set(call)
    try:
        yield
    finally:
        _answered.reset(token)


def current() -> Call:
    """The call that is being answered here; of one that came by Flask's door, made at the first look."""
    call = _answered.get()
    if call is None:
        call = g.get("call")
    if call is None:
        house = current_app.extensions
        call = g.call = Call(request.environ, house.get("broker"), house.get("bodies"))  # type: ignore[arg-type]
    return call


def broker() -> Broker:
    return current().broker


def bodies() -> Bodies:
    return current().bodies
