"""One call to Vault: hvac's adapter, with what it lacks: an end to every call, no redirects, nothing from outside.

A call says what Vault answered or raises `ProviderUnavailable`. It judges no status: whether a 403 is a refusal or
says nothing depends on what was asked.
"""

from __future__ import annotations

import http.client
import io
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from json import JSONEncoder
from typing import Any, NoReturn

import certifi
import urllib3
from hvac.adapters import RawAdapter

from broker.domain import strict_json
from broker.domain.errors import Invalid, ProviderRefused, ProviderUnavailable
from broker.domain.secret import Secret
from broker.providers.vault.settings import DEADLINE, VaultSettings, address_of

MAX_BODY = 16 * 1024 * 1024  # a list of a quarter of a million leases
CONNECTIONS = 32  # kept open; more callers open more

_HEADERS = {
    "Accept": "application/json",
    "Accept-Encoding": "identity",
    "User-Agent": "agent-credential-broker",
    "X-Vault-Request": "true",
}
_INDEX_HEADER = "X-Vault-Index"
_IN_JSON = {"Content-Type": "application/json"}
_compact = JSONEncoder(separators=(",", ":")).encode

# Vault decides these before it does anything. 412 and the 47x of its clusters say nothing about what was done.
_REFUSALS = frozenset({400, 403, 404, 405, 429})

_INDEX = re.compile(r"[!-~]{1,512}")

_call = threading.local()


class Behind(ProviderUnavailable):
    """Nothing is known, because this node of Vault has not come as far as was asked for: worth asking again soon."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What came back. `body` is the JSON object of the answer, None where there is none; never printed."""

    status: int
    body: Mapping[str, Any] | None
    vaults: bool  # whether it is Vault who speaks, and not something on the way
    index: str | None = None  # how far the storage was at the node that answered, in its own words; None if not told

    def __repr__(self) -> str:
        return f"Answer({self.status})"

    @property
    def ok(self) -> bool:
        return self.status in (200, 204)

    @property
    def errors(self) -> tuple[str, ...]:
        found = self.body.get("errors") if self.body else None
        return tuple(error for error in found if isinstance(error, str)) if isinstance(found, list) else ()

    @property
    def refused(self) -> bool:
        """Whether Vault itself said no before doing anything."""
        return self.vaults and self.status in _REFUSALS

    @property
    def reason(self) -> str:
        """What Vault said went wrong, for our own log: one line, printable, short."""
        said = "; ".join(" ".join(error.split()) for error in self.errors)
        return f"{self.status}: {said.encode('ascii', 'backslashreplace').decode()[:300] or 'no explanation'}"

    def table(self, name: str) -> Mapping[str, Any]:
        """A member that is an object; an empty one where it is not there."""
        found = self.body.get(name) if self.body else None
        return found if isinstance(found, Mapping) else {}

    def fail(self, doing: str, at: str) -> NoReturn:
        """Raise what this answer means for something that was to be created; where it was asked is for our own log."""
        if self.refused:
            more = " (it asks to slow down)" if self.status == 429 else ""
            raise ProviderRefused(f"Vault refused to {doing}{more}", reason=f"{at}: {self.reason}")
        raise self.unknown(doing, at)

    def unknown(self, doing: str, at: str) -> ProviderUnavailable:
        """What this answer means where only a clear one counts."""
        reason = self.reason
        if 300 <= self.status < 400:
            # Followed, the token would go wherever the redirect says.
            reason = f"{self.status}: a redirect, which is not followed; configure the address of the active node"
        # OpenBao's says 429 without a word; with words that is somebody who is asked too much.
        is_behind = self.status == 412 or (self.status == 429 and self.vaults and not self.errors)
        kind = Behind if is_behind else ProviderUnavailable
        return kind(f"Vault did not say whether it could {doing}", reason=f"{at}: {reason}")


class _Adapter(RawAdapter):  # type: ignore[misc]
    """hvac says what to ask. It is asked here, without what requests does on the way, and read within its bounds."""

    def __init__(
        self, pool: urllib3.PoolManager, address: str, headers: Mapping[str, str], timeout: urllib3.Timeout
    ) -> None:
        self.base_uri = address
        self._pool = pool
        self._headers = headers
        self._timeout = timeout

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        raise_exception: bool = True,
        json: Mapping[str, Any] | None = None,
        wrap_ttl: None = None,
    ) -> Answer:
        """What it was answered, whatever that is. `raise_exception` and `wrap_ttl` are hvac's, and not for us."""
        response = self._pool.request(
            method.upper(),
            f"{self.base_uri}{url}",
            body=None if json is None else _compact(json).encode(),
            headers={**self._headers, **(headers or {}), **({} if json is None else _IN_JSON)},
            timeout=self._timeout,
            redirect=False,
            retries=False,
            preload_content=False,
        )
        try:
            return _answer(response)
        finally:
            # One that was read to its end is kept open for the next call all the same.
            response.close()


class Connection:
    """The way to one Vault. Safe for threads: connections that whoever asks takes and gives back."""

    def __init__(
        self,
        address: str,
        *,
        namespace: str = "",
        ca_file: str | None = None,
        deadline: timedelta = DEADLINE,
    ) -> None:
        self._address = address_of(address, "address")
        self._namespace = namespace
        self._deadline_s = deadline.total_seconds()
        self._timeout = urllib3.Timeout(connect=min(3.0, self._deadline_s), read=self._deadline_s)
        # No proxy, no .netrc, no certificate bundle that the environment names.
        self._pool = urllib3.PoolManager(
            num_pools=1, maxsize=CONNECTIONS, cert_reqs="CERT_REQUIRED", ca_certs=ca_file or certifi.where()
        )
        self._pool.pool_classes_by_scheme = {"http": _PlainPool, "https": _TlsPool}

    @classmethod
    def of(cls, settings: VaultSettings) -> Connection:
        return cls(
            settings.address,
            namespace=settings.namespace,
            ca_file=settings.ca_file,
            deadline=settings.deadline,
        )

    def close(self) -> None:
        self._pool.clear()

    def adapter(self, token: Secret | None, *, since: str | None = None) -> _Adapter:
        """An hvac adapter that speaks with this token; for one caller, inside `within`.

        `since`: the index of an earlier answer, which the node that answers must have come to.
        """
        headers = dict(_HEADERS)
        if since is not None:
            headers[_INDEX_HEADER] = since
        if token is not None:
            headers["X-Vault-Token"] = token.reveal()
        if self._namespace:
            headers["X-Vault-Namespace"] = self._namespace
        return _Adapter(self._pool, self._address, headers, self._timeout)

    def call(
        self,
        method: str,
        path: str,
        *,
        token: Secret | None,
        body: Mapping[str, Any] | None = None,
        since: str | None = None,
    ) -> Answer:
        """One request to `/v1/<path>`; ProviderUnavailable if there is no whole answer within the deadline."""
        adapter = self.adapter(token, since=since)
        return self.within(lambda: adapter.request(method, f"/v1/{path}", json=body))

    def within(self, ask: Callable[[], Answer]) -> Answer:
        """What `ask` answers, if it does within the deadline; ProviderUnavailable otherwise."""
        _call.ends = time.monotonic() + self._deadline_s
        try:
            return ask()
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as problem:
            failure = ProviderUnavailable("Vault did not answer", reason=f"{self._address}: {_kind(problem)}")
        except Invalid as problem:
            failure = ProviderUnavailable("the answer of Vault could not be read", reason=problem.detail)
        finally:
            _call.ends = None
        # Out here, so that it has no context: that would be a request whose headers hold the token (INV-30).
        raise failure


def _answer(response: urllib3.BaseHTTPResponse) -> Answer:
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise Invalid("it is compressed")
    raw = bytearray()
    while chunk := response.read(64 * 1024, decode_content=False):
        raw += chunk
        if len(raw) > MAX_BODY:
            raise Invalid(f"it has more than {MAX_BODY} bytes")
    status = response.status
    index = response.headers.get(_INDEX_HEADER)
    if index is not None and not _INDEX.fullmatch(index):
        index = None
    if status == 204 and not raw:
        return Answer(status=status, body=None, vaults=True, index=index)
    try:
        body = strict_json.loads(bytes(raw), max_bytes=MAX_BODY)
    except Invalid:
        if status == 200:
            raise
        body = None
    if status == 200 and not isinstance(body, dict):
        raise Invalid("it is not a JSON object")
    if not isinstance(body, dict):
        return Answer(status=status, body=None, vaults=False)
    return Answer(status=status, body=body, vaults=status == 200 or isinstance(body.get("errors"), list), index=index)


def _kind(problem: Exception) -> str:
    """What happened, without the request: messages of exceptions hold URLs, and their chains hold headers."""
    names = [type(problem).__name__]
    cause = problem.__cause__ or problem.__context__
    while cause is not None and len(names) < 4:
        names.append(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    return " from ".join(dict.fromkeys(names))


# A time-out bounds each single read of a socket, so a server that sends one byte now and then holds a caller for ever.
# From here to the end of the file: the same with one end for the whole call.


class _Until(io.RawIOBase):
    """What is read from a socket until the call has to end."""

    def __init__(self, source: io.BufferedReader, sock: Any, ends: float) -> None:
        super().__init__()
        self._source, self._sock, self._ends = source, sock, ends

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left_s = self._ends - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the call did not end in time")
        self._sock.settimeout(left_s)
        return self._source.readinto1(buffer)

    def close(self) -> None:
        self._source.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        ends = getattr(_call, "ends", None)
        if ends is not None:
            self.fp = io.BufferedReader(_Until(self.fp, sock, ends))


class _PlainConnection(urllib3.connection.HTTPConnection):
    response_class = _Response


class _TlsConnection(urllib3.connection.HTTPSConnection):
    response_class = _Response


class _PlainPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _PlainConnection


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TlsConnection
