"""A credential on the requests of a program: for `httpx`, sync and async, and for `requests`.

To the resource's origin and to no other, whatever redirects say. A proof of possession is made for each request. Tried
again once where a resource wants a nonce in the proof (RFC 9449 section 9), and once with another credential where it
answers 401: both are refusals before any effect. A body that can be sent only once is not sent again.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any

import httpx

from broker.sdk.dpop import DpopKey
from broker.sdk.errors import Limited, Unreachable, invalid, printable
from broker.sdk.values import Credential

if TYPE_CHECKING:
    from broker.sdk.async_credential import AsyncCredentialSource
    from broker.sdk.credential import CredentialSource

_PASSING = (Unreachable, Limited)


class SourceAuth(httpx.Auth):
    def __init__(self, source: CredentialSource, allows: Callable[[httpx.URL], bool]) -> None:
        self._source = source
        self._allows = allows

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if not self._allows(request.url):
            yield request
            return
        dpop, credential = self._source.dpop, self._source.credential()
        response = yield present(request, credential, dpop)
        nonce = nonce_asked(response.status_code, response.headers, dpop)
        if nonce is not None and _is_repeatable(request):
            response = yield present(request, self._source.credential(), dpop, nonce)
        if response.status_code == 401 and _is_repeatable(request):
            another = _another(self._source, credential)
            if another is not None:
                yield present(request, another, dpop, nonce)

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        raise TypeError("this source blocks: use the AsyncClient's credential() with httpx.AsyncClient")
        yield request


class AsyncSourceAuth(httpx.Auth):
    def __init__(self, source: AsyncCredentialSource, allows: Callable[[httpx.URL], bool]) -> None:
        self._source = source
        self._allows = allows

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        raise TypeError("this source is for asyncio: use the Client's credential() with httpx.Client")
        yield request

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        if not self._allows(request.url):
            yield request
            return
        dpop, credential = self._source.dpop, await self._source.credential()
        response = yield present(request, credential, dpop)
        nonce = nonce_asked(response.status_code, response.headers, dpop)
        if nonce is not None and _is_repeatable(request):
            response = yield present(request, await self._source.credential(), dpop, nonce)
        if response.status_code == 401 and _is_repeatable(request):
            try:
                another = await self._source.another(credential)
            except _PASSING:
                return
            if another is not None:
                yield present(request, another, dpop, nonce)


class RequestsAuth:
    """What `requests` takes as `auth`. Nothing of `requests` is imported: it calls this with what it has prepared."""

    def __init__(self, source: CredentialSource, allows: Callable[[httpx.URL], bool]) -> None:
        self._source = source
        self._allows = allows

    def __call__(self, request: Any) -> Any:
        if self._may_have_it(request):
            self._present(request, self._source.credential())
        # Also where it may not: a redirect keeps the hook, and may lead to where it may.
        request.register_hook("response", self._answered)
        return request

    def _answered(self, response: Any, **how: Any) -> Any:
        request = response.request
        if response.is_redirect:
            # `requests` makes the next request of this one, and takes along what is on it.
            for header in ("Authorization", "DPoP"):
                request.headers.pop(header, None)
            return response
        if response.status_code != 401 or not self._may_have_it(request):
            return response
        if not (request.body is None or isinstance(request.body, str | bytes)):
            return response
        shown, nonce = _shown(request), nonce_asked(response.status_code, response.headers, self._source.dpop)
        current = self._source.credential()
        if nonce is not None or shown != current.reveal():
            # A nonce is wanted, or a redirect led here without it.
            response = self._again(response, current, nonce, how)
        if response.status_code == 401:
            another = _another(self._source, current)
            if another is not None:
                response = self._again(response, another, nonce, how)
        return response

    def _again(self, response: Any, credential: Credential, nonce: str | None, how: Mapping[str, Any]) -> Any:
        # Read to its end, so that its connection is free for what comes now.
        response.content  # noqa: B018
        response.close()
        request = response.request.copy()
        self._present(request, credential, nonce)
        answered = response.connection.send(request, **how)
        answered.history.append(response)
        answered.request = request
        return answered

    def _may_have_it(self, request: Any) -> bool:
        try:
            return self._allows(httpx.URL(request.url))
        except httpx.InvalidURL:
            return False

    def _present(self, request: Any, credential: Credential, nonce: str | None = None) -> None:
        request.headers.update(headers_for(request.method, request.url, credential, self._source.dpop, nonce))


def _another(source: CredentialSource, refused: Credential) -> Credential | None:
    try:
        return source.another(refused)
    except _PASSING:
        # What the resource said is what there is to tell.
        return None


def _is_repeatable(request: httpx.Request) -> bool:
    return isinstance(request.stream, httpx.ByteStream)


def _shown(request: Any) -> str:
    value: str = request.headers.get("Authorization", "")
    return value.partition(" ")[2]


def headers_for(
    method: str, url: str, credential: Credential, dpop: DpopKey | None, nonce: str | None = None
) -> dict[str, str]:
    """The credential as headers; a bound one with a proof made for just this request."""
    if dpop is None:
        return {"Authorization": f"Bearer {credential.reveal()}"}
    proof = dpop.proof(method, url, access_token=credential.reveal(), nonce=nonce)
    return {"Authorization": f"DPoP {credential.reveal()}", "DPoP": proof}


def present(
    request: httpx.Request, credential: Credential, dpop: DpopKey | None, nonce: str | None = None
) -> httpx.Request:
    """The request with the credential on it."""
    request.headers.update(headers_for(request.method, str(request.url), credential, dpop, nonce))
    return request


def nonce_asked(status: int, headers: Mapping[str, str], dpop: DpopKey | None) -> str | None:
    """The nonce a resource wants in the proof (RFC 9449 section 9), where that is why it refused."""
    if dpop is None or status != 401 or "use_dpop_nonce" not in headers.get("WWW-Authenticate", ""):
        return None
    return headers.get("DPoP-Nonce")


def destination(resource: str, origins: tuple[str, ...]) -> Callable[[httpx.URL], bool]:
    """Where a credential for this resource may go.

    A resource that is no address says nothing of where it is, and any server might be anybody's: it has to be said.
    """
    if not origins:
        url = _address(resource)
        if url is None:
            raise invalid(
                f"{printable(resource)} is not an address: say where its credential may go, "
                'auth("https://crm.example")',
                member="origins",
            )
        home = _origin(url)
        return lambda other: _origin(other) == home
    allowed = set()
    for origin in origins:
        url = _address(origin)
        if url is None:
            raise invalid(f"{origin!r} is not an http or https address", member="origins")
        allowed.add(_origin(url))
    return lambda other: _origin(other) in allowed


def _address(text: str) -> httpx.URL | None:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return None
    return url if url.scheme in ("http", "https") and url.host else None


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)
