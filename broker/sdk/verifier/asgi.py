"""An ASGI middleware: what is behind it is reached by verified requests alone, by HTTP and by WebSocket.

::

    app = VerifierMiddleware(app, verifier, scopes=["contacts:read"])

The application finds the `Verified` as `scope["broker.verified"]`. A WebSocket is verified as it is opened, and not
again: close it at `verified.expires_at`.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, MutableMapping
from typing import Any
from urllib.parse import quote

from broker.sdk.verifier.refused import Refused
from broker.sdk.verifier.verifier import Verified, Verifier

VERIFIED = "broker.verified"
_SAFE = "/;=,:@&+$!*'()~"
_POLICY_VIOLATION = 1008
_HTTP_OF = {"ws": "http", "wss": "https"}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


async def verified_of(scope: Mapping[str, Any], verifier: Verifier, scopes: str | Iterable[str] = ()) -> Verified:
    """What an ASGI request may be answered for; raises `Refused`."""
    presented = _values(scope, b"authorization")
    if len(presented) > 1:
        # Which of two credentials counts is not ours to guess, and another program may guess otherwise.
        raise Refused("malformed_request")
    authorization = presented[0] if presented else None
    method = scope.get("method", "GET")
    return await verifier.check_async(authorization, method, url_of(scope), _values(scope, b"dpop"), scopes)


def url_of(scope: Mapping[str, Any]) -> str:
    """The address that was asked for."""
    scheme = scope.get("scheme", "http")
    hosts = _values(scope, b"host")
    server = scope.get("server") or ("localhost", None)
    host = hosts[0] if hosts else f"{server[0]}:{server[1]}"
    raw = scope.get("raw_path") or quote(scope["path"], safe=_SAFE).encode()
    return f"{_HTTP_OF.get(scheme, scheme)}://{host}{raw.partition(b'?')[0].decode('latin-1')}"


def _values(scope: Mapping[str, Any], name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]


class VerifierMiddleware:
    """`public` are paths that anybody may ask for, like a health check, each exactly as it is."""

    def __init__(
        self, app: App, verifier: Verifier, *, scopes: str | Iterable[str] = (), public: Collection[str] = ()
    ) -> None:
        self._app, self._verifier, self._public = app, verifier, frozenset(public)
        self._scopes = tuple(scopes.split() if isinstance(scopes, str) else scopes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # "lifespan" is the server speaking; every other kind is somebody from outside, also one that we do not know.
        if scope["type"] != "lifespan" and scope.get("path") not in self._public:
            try:
                found = await verified_of(scope, self._verifier, self._scopes)
            except Refused as refused:
                await _refuse(refused, scope, receive, send)
                return
            scope = {**scope, VERIFIED: found}
        await self._app(scope, receive, send)


async def _refuse(refused: Refused, scope: Scope, receive: Receive, send: Send) -> None:
    kind = "http.response"
    if scope["type"] == "websocket":
        await receive()
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": refused.code})
            return
        kind = "websocket.http.response"
    body = json.dumps(refused.body).encode()
    head = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), *refused.headers]
    headers = [(name.lower().encode(), value.encode()) for name, value in head]
    await send({"type": f"{kind}.start", "status": refused.status, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})
