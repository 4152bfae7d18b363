"""A WSGI middleware: what is behind it is reached by verified requests alone.

::

    app = VerifierMiddleware(app, verifier, scopes=["contacts:read"])

The application finds the `Verified` as `environ["broker.verified"]`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any
from urllib.parse import quote

from broker.sdk.verifier.refused import Refused
from broker.sdk.verifier.verifier import Verified, Verifier

VERIFIED = "broker.verified"
_PHRASES = {400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 503: "Service Unavailable"}


def verified_of(environ: Mapping[str, Any], verifier: Verifier, scopes: str | Iterable[str] = ()) -> Verified:
    """What a WSGI request may be answered for; raises `Refused`."""
    return verifier.check(
        environ.get("HTTP_AUTHORIZATION"), environ["REQUEST_METHOD"], url_of(environ), environ.get("HTTP_DPOP"), scopes
    )


def url_of(environ: Mapping[str, Any]) -> str:
    """The address that was asked for (PEP 3333)."""
    host = environ.get("HTTP_HOST") or f"{environ['SERVER_NAME']}:{environ['SERVER_PORT']}"
    raw = (environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")).encode("latin-1")
    return f"{environ['wsgi.url_scheme']}://{host}{quote(raw, safe=_SAFE) or '/'}"


# What a path may hold as it is (RFC 3986), so that it is spelled as the client spelled it.
_SAFE = "/;=,:@&+$!*'()~"


class VerifierMiddleware:
    """`public` are paths that anybody may ask for, like a health check, each exactly as it is."""

    def __init__(
        self,
        app: Callable[..., Iterable[bytes]],
        verifier: Verifier,
        *,
        scopes: str | Iterable[str] = (),
        public: Collection[str] = (),
    ) -> None:
        self._app, self._verifier, self._public = app, verifier, frozenset(public)
        self._scopes = tuple(scopes.split() if isinstance(scopes, str) else scopes)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ.get("PATH_INFO") not in self._public:
            try:
                environ[VERIFIED] = verified_of(environ, self._verifier, self._scopes)
            except Refused as refused:
                body = json.dumps(refused.body).encode()
                head = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), *refused.headers]
                start_response(f"{refused.status} {_PHRASES[refused.status]}", head)
                return [body]
        return self._app(environ, start_response)
