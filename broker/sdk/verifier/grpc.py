"""For gRPC servers: interceptors for `grpc.server` and `grpc.aio.server`.

::

    door = VerifierInterceptor(verifier, scopes={"/crm.Contacts/List": ["contacts:read"]})
    server = grpc.server(pool, interceptors=[door])

The token comes as metadata `authorization`. For tokens that are bound to a key, say `origin` to the `Verifier`: the
proof comes as metadata `dpop`, made for POST and `<origin>/<service>/<method>`.
A method finds the `Verified` by `verified()`. A stream is verified as it is opened, and not again: end it at
`verified().expires_at`.
"""

from __future__ import annotations

import contextvars
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Any, NoReturn

import grpc
import grpc.aio

from broker.sdk.verifier.refused import Refused
from broker.sdk.verifier.verifier import Verified, Verifier

_current: contextvars.ContextVar[Verified] = contextvars.ContextVar("broker_verified")
_CODES = {
    400: grpc.StatusCode.UNAUTHENTICATED,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    503: grpc.StatusCode.UNAVAILABLE,
}
_MAKERS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
_KINDS = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}


def verified() -> Verified:
    """Who the current call is verified for; LookupError where nobody checked."""
    return _current.get()


class _Door:
    """`scopes` by the full name of a method, or the same for all; a method that is not named needs none.

    `public` are methods that anybody may call.
    """

    def __init__(
        self,
        verifier: Verifier,
        *,
        scopes: Mapping[str, Iterable[str]] | Iterable[str] = (),
        public: Collection[str] = (),
    ) -> None:
        self._verifier, self._public = verifier, frozenset(public)
        by_method = {name: tuple(needed) for name, needed in scopes.items()} if isinstance(scopes, Mapping) else None
        self._by_method = by_method
        self._for_all = () if isinstance(scopes, Mapping) else tuple(scopes)

    def _question(self, method: str, context: Any) -> tuple[str | None, str, str, list[str], tuple[str, ...]]:
        found: dict[str, list[str]] = {}
        for name, value in context.invocation_metadata() or ():
            found.setdefault(name, []).append(value)
        presented = found.get("authorization", [])
        if len(presented) > 1:
            raise Refused("malformed_request")
        scopes = self._for_all if self._by_method is None else self._by_method.get(method, ())
        # Nobody tells a method by which name its server was called: without `origin` no proof fits.
        return presented[0] if presented else None, "POST", f"grpc://unknown{method}", found.get("dpop", []), scopes


def _status_of(refused: Refused) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    trailing = [(name.lower(), value) for name, value in refused.headers if name == "WWW-Authenticate"]
    return _CODES[refused.status], refused.description, tuple(trailing)


def _wrapped(handler: Any, around: Callable[[Any, bool], Any]) -> Any:
    kind = (handler.request_streaming, handler.response_streaming)
    behaviour = around(getattr(handler, _KINDS[kind]), handler.response_streaming)
    return _MAKERS[kind](behaviour, handler.request_deserializer, handler.response_serializer)


class VerifierInterceptor(_Door, grpc.ServerInterceptor):  # type: ignore[misc]
    """For `grpc.server`."""

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        handler, method = continuation(details), details.method
        if handler is None or method in self._public:
            return handler
        return _wrapped(handler, lambda behaviour, streams: self._around(behaviour, streams, method))

    def _around(self, behaviour: Callable[..., Any], streams: bool, method: str) -> Callable[..., Any]:
        # Around the behaviour and not in the interceptor: that is another thread, which has no call to end.
        def once(request: Any, context: grpc.ServicerContext) -> Any:
            self._admit(method, context)
            return behaviour(request, context)

        def stream(request: Any, context: grpc.ServicerContext) -> Any:
            self._admit(method, context)
            yield from behaviour(request, context)

        return stream if streams else once

    def _admit(self, method: str, context: grpc.ServicerContext) -> None:
        try:
            found = self._verifier.check(*self._question(method, context))
        except Refused as refused:
            _abort(context, refused)
        _current.set(found)


def _abort(context: grpc.ServicerContext, refused: Refused) -> NoReturn:
    code, sentence, trailing = _status_of(refused)
    context.set_trailing_metadata(trailing)
    context.abort(code, sentence)
    raise AssertionError("abort raises")


class AsyncVerifierInterceptor(_Door, grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """For `grpc.aio.server`."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler, method = await continuation(details), details.method
        if handler is None or method in self._public:
            return handler
        return _wrapped(handler, lambda behaviour, streams: self._around(behaviour, streams, method))

    def _around(self, behaviour: Callable[..., Any], streams: bool, method: str) -> Callable[..., Any]:
        async def once(request: Any, context: Any) -> Any:
            await self._admit(method, context)
            return await behaviour(request, context)

        async def stream(request: Any, context: Any) -> Any:
            await self._admit(method, context)
            answered = behaviour(request, context)
            if hasattr(answered, "__aiter__"):
                async for each in answered:
                    yield each
            else:
                await answered  # it writes by `context.write`

        return stream if streams else once

    async def _admit(self, method: str, context: Any) -> None:
        try:
            found = await self._verifier.check_async(*self._question(method, context))
        except Refused as refused:
            await context.abort(*_status_of(refused))
        _current.set(found)
