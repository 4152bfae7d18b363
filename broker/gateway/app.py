"""The gateway over HTTP: how each proxy asks, and what it is answered.

Where the original method and target stand is configured and never guessed: what one proxy sets, another passes on from
whoever calls. nginx and Envoy are told to set `X-Original-Method` and `X-Original-URI`; Traefik sets
`X-Forwarded-Method` and `X-Forwarded-Uri` by itself.

An ASGI application, because it has to see the headers as they came: a WSGI server takes `X_Original_Method` for
`X-Original-Method`, and so would let a caller say what only the proxy may.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from broker.gateway.authorizing import Asked, Authorizing, Passed, Refused
from broker.gateway.proofs import Proofs
from broker.gateway.settings import GatewaySettings, NoSecret, Upstream, secret_in
from broker.sdk import BrokerError, Client, CredentialSource, Timing

_log = logging.getLogger("broker.gateway")

_THREADS = 64  # each waits for the broker
_QUEUED = 256  # beyond them, who waits longer than a proxy does gets nothing from it
_PREFIX = "/authorize/"
_METHOD = re.compile(r"[A-Z]{1,20}")
_TARGET = re.compile(r"/[\x21-\x7e]{0,8191}")
_FROM: Mapping[str, tuple[str, str]] = {
    "nginx": ("x-original-method", "x-original-uri"),
    "envoy": ("x-original-method", "x-original-uri"),
    "traefik": ("x-forwarded-method", "x-forwarded-uri"),
}
# A caller that names another one in Connection asks a proxy to take it off, on this way or on the next.
_HARMLESS = frozenset({"close", "keep-alive", "te", "upgrade", "http2-settings"})

Message = MutableMapping[str, Any]
Answer = tuple[int, Sequence[tuple[str, str]]]


class Gateway:
    """`close` hands back what it was given."""

    def __init__(
        self, settings: GatewaySettings, *, timing: Timing | None = None, threads: int = _THREADS, queued: int = _QUEUED
    ) -> None:
        timing = timing or Timing()
        self._settings = settings
        # Whoever calls waits meanwhile, and asks again by itself.
        self._broker = Client(
            settings.broker,
            token_file=settings.token_file,
            timeout=settings.timeout_s,
            retry_deadline_s=settings.timeout_s,
            timing=timing,
        )
        self._threads = ThreadPoolExecutor(threads, "deciding")
        self._places = threading.BoundedSemaphore(threads + queued)
        self._sources: dict[str, CredentialSource] = {}
        proofs = Proofs(timing.now)
        self._upstreams: dict[str, Authorizing] = {}
        for upstream in settings.upstreams:
            source = self._source(upstream)
            if source is not None:
                self._sources[upstream.name] = source
            self._upstreams[upstream.name] = Authorizing(upstream, settings.broker, self._broker, source, proofs)

    async def __call__(
        self,
        scope: Mapping[str, Any],
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        # Whether we are there is said however many wait for the broker.
        status, headers = (200, []) if scope["path"] == "/healthz" else await self._decided(scope)
        # Nobody on the way may keep it: the next request is another question (INV-25).
        fixed = [("Cache-Control", "no-store"), ("Content-Length", "0")]
        encoded = [(name.encode("ascii"), value.encode("ascii")) for name, value in (*fixed, *headers)]
        await send({"type": "http.response.start", "status": status, "headers": encoded})
        await send({"type": "http.response.body", "body": b""})

    async def _decided(self, scope: Mapping[str, Any]) -> Answer:
        """As `answer` says it in a thread; 503 at once where too many wait for one (INV-35)."""
        if not self._places.acquire(blocking=False):
            return _refused(None, Refused(503, "too many wait already"))
        decided = self._threads.submit(self._in_its_place, scope["path"], scope["headers"])
        # A caller who goes away leaves the place taken until the work is done: no more than it holds is ever queued.
        return await asyncio.shield(asyncio.wrap_future(decided))

    def _in_its_place(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> Answer:
        try:
            return self.answer(path, headers)
        finally:
            self._places.release()

    def answer(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> Answer:
        """The status and the headers for a check at this path."""
        # Envoy asks below it, with the path of the request.
        name = path.removeprefix(_PREFIX).partition("/")[0]
        upstream = self._upstreams.get(name) if path.startswith(_PREFIX) else None
        try:
            sent = _Headers(headers)
            # First of all: who is not the proxy learns nothing, not even which upstreams there are.
            self._require_proxy(sent)
            if upstream is None:
                return 404, []
            passed = upstream.decide(self._asked(sent))
        except Refused as refusal:
            return _refused(name if upstream is not None else None, refusal)
        return _passed(name, passed)

    def close(self) -> None:
        self._threads.shutdown()
        for name, source in self._sources.items():
            try:
                source.close("the gateway has stopped")
            except BrokerError as problem:
                _log.warning("not handed back", extra={"fields": {"upstream": name, "code": problem.code}})
        self._broker.close()

    async def _live(
        self, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await asyncio.to_thread(self.close)
                await send({"type": "lifespan.shutdown.complete"})
                return

    def _source(self, upstream: Upstream) -> CredentialSource | None:
        asked = upstream.credential
        if asked is None:
            return None
        return self._broker.credential(asked.task, asked.resource, asked.scopes, ttl_s=asked.ttl_s)

    def _require_proxy(self, sent: _Headers) -> None:
        if self._settings.proxy_secret_file is None:
            return
        try:
            expected = secret_in(self._settings.proxy_secret_file).reveal()
        except NoSecret as problem:
            raise Refused(503, str(problem)) from None
        if not hmac.compare_digest(sent.one("x-gateway-secret").encode(), expected.encode()):
            raise Refused(403, "it was not the proxy that asked")

    def _asked(self, sent: _Headers) -> Asked:
        method, target = (sent.one(name) for name in _FROM[self._settings.proxy])
        named = {name.strip().lower() for value in sent.all("connection") for name in value.split(",")} - {""}
        if not named <= _HARMLESS:
            raise Refused(403, "its Connection header asks for another header to be taken off")
        if not _METHOD.fullmatch(method):
            raise Refused(403, "the proxy does not say which method it was")
        if not _TARGET.fullmatch(target):
            raise Refused(403, "the proxy does not say what it was for")
        return Asked(method=method, target=target, authorization=sent.one("authorization"), dpop=sent.one("dpop"))


class _Headers:
    """As they came. One that comes twice where it may come once is refused: which one counts is not ours to guess."""

    def __init__(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self._values: dict[str, list[str]] = {}
        for name, value in headers:
            self._values.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))

    def all(self, name: str) -> list[str]:
        return self._values.get(name, [])

    def one(self, name: str) -> str:
        """Its value; nothing where it did not come."""
        values = self.all(name)
        if len(values) > 1:
            raise Refused(403, f"its header {name} came more than once")
        return values[0] if values else ""


def _passed(name: str, passed: Passed) -> Answer:
    _log.info("passed", extra={"fields": {"upstream": name, "grant_id": passed.grant_id}})
    return 200, [(header, value.reveal()) for header, value in passed.headers.items()]


def _refused(name: str | None, refusal: Refused) -> Answer:
    _log.info("refused", extra={"fields": {"upstream": name, "status": refusal.status, "why": refusal.why}})
    headers = [("WWW-Authenticate", refusal.challenge)] if refusal.challenge else []
    if refusal.status == 503:
        headers.append(("Retry-After", "1"))
    return refusal.status, headers
