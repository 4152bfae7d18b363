"""A credential on the requests of a program: for `httpx`, sync and async, and for `requests`.

To the resource's origin and to no other, whatever redirects say. A proof of possession is made for each request. Tried
again once where a resource wants a nonce in the proof (RFC 9449 section 9), and once with another credential where it
answers 401: both are refusals before any effect. A body that can be sent only once is not sent again.
"""

from __future__ import annotations

import re
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
_NONCE = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]{1,1024}")  # RFC 9449 section 8.1


class _Nonces:
    """The last nonce of each server, which it wants in the next proof (RFC 9449 section 8.2)."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str, int | None], str] = {}

    def of(self, url: httpx.URL) -> str | None:
        return self._last.get(_origin(url))

    def heed(self, url: httpx.URL, status: int, headers: Mapping[str, str]) -> bool:
        """Keep the nonce of an answer; whether it was a refusal for want of this one."""
        nonce = headers.get("DPoP-Nonce", "")
        if not _NONCE.fullmatch(nonce):
            return False
        is_new, self._last[_origin(url)] = self.of(url) != nonce, nonce
        return is_new and status == 401 and "use_dpop_nonce" in headers.get("WWW-Authenticate", "")


class _Auth:
    """What both flows of httpx know."""

    def __init__(self, allows: Callable[[httpx.URL], bool]) -> None:
        self._allows = allows
        self._nonces = _Nonces()

    def _present(self, request: httpx.Request, credential: Credential, dpop: DpopKey | None) -> httpx.Request:
        nonce = self._nonces.of(request.url)
        request.headers.update(headers_for(request.method, str(request.url), credential, dpop, nonce))
        return request

    def _wants_nonce(self, request: httpx.Request, response: httpx.Response, dpop: DpopKey | None) -> bool:
        if dpop is None or not self._allows(response.url):
            return False
        asked = self._nonces.heed(response.url, response.status_code, response.headers)
        return asked and _may_be_sent_again(request, response)


class SourceAuth(_Auth, httpx.Auth):
    def __init__(self, source: CredentialSource, allows: Callable[[httpx.URL], bool]) -> None:
        super().__init__(allows)
        self._source = source

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if not self._allows(request.url):
            yield request
            return
        dpop, credential = self._source.dpop, self._source.credential()
        response = yield self._present(request, credential, dpop)
        if self._wants_nonce(request, response, dpop):
            response = yield self._present(request, credential, dpop)
        if response.status_code == 401 and _may_be_sent_again(request, response):
            another = _another(self._source, credential)
            if another is not None:
                yield self._present(request, another, dpop)

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        raise TypeError("this source blocks: use the AsyncClient's credential() with httpx.AsyncClient")
        yield request


class AsyncSourceAuth(_Auth, httpx.Auth):
    def __init__(self, source: AsyncCredentialSource, allows: Callable[[httpx.URL], bool]) -> None:
        super().__init__(allows)
        self._source = source

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        raise TypeError("this source is for asyncio: use the Client's credential() with httpx.Client")
        yield request

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        if not self._allows(request.url):
            yield request
            return
        dpop, credential = self._source.dpop, await self._source.credential()
        response = yield self._present(request, credential, dpop)
        if self._wants_nonce(request, response, dpop):
            response = yield self._present(request, credential, dpop)
        if response.status_code == 401 and _may_be_sent_again(request, response):
            try:
                another = await self._source.another(credential)
            except _PASSING:
                return
            if another is not None:
                yield self._present(request, another, dpop)


class RequestsAuth:
    """What `requests` takes as `auth`. Nothing of `requests` is imported: it calls this with what it has prepared."""

    def __init__(self, source: CredentialSource, allows: Callable[[httpx.URL], bool]) -> None:
        self._source = source
        self._allows = allows
        self._nonces = _Nonces()

    def __call__(self, request: Any) -> Any:
        url = self._where(request)
        if url is not None:
            self._present(request, url, self._source.credential())
        # Also where it may not go: a redirect keeps the hook, and may lead to where it may.
        request.register_hook("response", self._answered)
        return request

    def _answered(self, response: Any, **how: Any) -> Any:
        request = response.request
        if response.is_redirect:
            # `requests` makes the next request of this one, and takes along what is on it.
            for header in ("Authorization", "DPoP"):
                request.headers.pop(header, None)
            return response
        url = self._where(request)
        if url is None:
            return response
        wants_nonce = self._nonces.heed(url, response.status_code, response.headers)
        if response.status_code != 401 or not (request.body is None or isinstance(request.body, str | bytes)):
            return response
        try:
            current = self._source.credential()
            # A nonce is wanted, or a redirect led here without any.
            if (wants_nonce and self._source.dpop is not None) or "Authorization" not in request.headers:
                response = self._again(response, url, current, how)
                self._nonces.heed(url, response.status_code, response.headers)
            if response.status_code == 401 and (another := _another(self._source, current)) is not None:
                response = self._again(response, url, another, how)
        except BaseException:
            # Nobody else has it in hand, and it holds a connection.
            response.close()
            raise
        return response

    def _again(self, response: Any, url: httpx.URL, credential: Credential, how: Mapping[str, Any]) -> Any:
        # Read to its end, so that its connection is free for what comes now.
        response.content  # noqa: B018
        response.close()
        request = response.request.copy()
        self._present(request, url, credential)
        answered = response.connection.send(request, **how)
        answered.history.append(response)
        answered.request = request
        return answered

    def _where(self, request: Any) -> httpx.URL | None:
        """Where it goes, if the credential may go there."""
        try:
            url = httpx.URL(request.url)
        except httpx.InvalidURL:
            return None
        return url if self._allows(url) else None

    def _present(self, request: Any, url: httpx.URL, credential: Credential) -> None:
        nonce = self._nonces.of(url)
        request.headers.update(headers_for(request.method, request.url, credential, self._source.dpop, nonce))


def _another(source: CredentialSource, refused: Credential) -> Credential | None:
    try:
        return source.another(refused)
    except _PASSING:
        # What the resource said is what there is to tell.
        return None


def _may_be_sent_again(request: httpx.Request, response: httpx.Response) -> bool:
    """Whether it was this request that was refused, not one that a redirect made of it, and its body is still there."""
    return response.url == request.url and isinstance(request.stream, httpx.ByteStream)


def headers_for(
    method: str, url: str, credential: Credential, dpop: DpopKey | None, nonce: str | None = None
) -> dict[str, str]:
    """The credential as headers; a bound one with a proof made for just this request."""
    if dpop is None:
        return {"Authorization": f"Bearer {credential.reveal()}"}
    proof = dpop.proof(method, url, access_token=credential.reveal(), nonce=nonce)
    return {"Authorization": f"DPoP {credential.reveal()}", "DPoP": proof}


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
