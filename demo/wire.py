"""An HTTP client that remembers its last exchange, so that what is shown is what went over the wire."""

from __future__ import annotations

import http
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One request and its answer. It holds tokens: only `demo.screen` shows it, and shortens them."""

    method: str
    path: str
    to: str
    authorization: str = field(repr=False)
    sent: Any = field(repr=False)
    status: int
    came: Any = field(repr=False)
    took_ms: float
    answered_at: float

    @property
    def phrase(self) -> str:
        return http.HTTPStatus(self.status).phrase

    def __str__(self) -> str:
        said = self.came if isinstance(self.came, dict) else {}
        why = said.get("detail") or said.get("error_description") or ""
        return f"{self.method} {self.path} was answered with {self.status} {self.phrase}" + (f": {why}" if why else "")


@dataclass(frozen=True, kw_only=True)
class Query:
    """One statement to a database: rows as text, or the error."""

    statement: str
    to: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    error: str | None = None
    took_ms: float
    answered_at: float

    def __str__(self) -> str:
        return f"{self.statement} was answered with {self.error or f'{len(self.rows)} rows: {self.rows[:3]}'}"


class Wire(httpx.Client):
    """`names` says what each origin is called."""

    def __init__(self, names: Mapping[str, str]) -> None:
        # No proxy of the environment: all of it is on loopback.
        super().__init__(trust_env=False, timeout=10.0, event_hooks={"response": [self._remember]})
        self._names = names
        self._last: Exchange | None = None

    @property
    def last(self) -> Exchange:
        if self._last is None:
            raise LookupError("nothing was sent yet")
        return self._last

    def _remember(self, response: httpx.Response) -> None:
        response.read()
        request = response.request
        origin = f"{request.url.scheme}://{request.url.netloc.decode()}"
        self._last = Exchange(
            method=request.method,
            path=request.url.raw_path.decode(),
            to=self._names.get(origin, origin),
            authorization=request.headers.get("Authorization", ""),
            sent=_parsed(request.read()),
            status=response.status_code,
            came=_parsed(response.content),
            took_ms=response.elapsed.total_seconds() * 1000,
            answered_at=time.perf_counter(),
        )


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content) if content else None
    except ValueError:
        return None
