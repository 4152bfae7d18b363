"""What goes out: a status, a body, its headers. An `Answer` is a WSGI application, so either door can give it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from typing import Any

from flask import Response, request

_LINES = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}
_compact = json.JSONEncoder(separators=(",", ":")).encode


class Answer:
    """Never kept by anybody, unless its headers say otherwise."""

    __slots__ = ("body", "headers", "status")

    def __init__(
        self,
        body: str,
        status: int = 200,
        *,
        media_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status = status
        self.body = body.encode()
        self.headers = [("Content-Type", media_type), ("Content-Length", str(len(self.body)))]
        if headers:
            self.headers += headers.items()

    def __call__(self, _environ: Any, start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response(_LINES[self.status], self.headers)
        return [self.body]


def json_response(answer: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(_compact(answer), status, headers=headers)


def kept_response(document: bytes, *, kept_for_s: int, media_type: str = "application/json") -> Response:
    """A public document that may be kept for so long, and is asked for again by its ETag."""
    response = Response(document, mimetype=media_type)
    response.headers["Cache-Control"] = f"public, max-age={kept_for_s}"
    response.set_etag(hashlib.sha256(document).hexdigest()[:32])
    response.make_conditional(request)
    return response
