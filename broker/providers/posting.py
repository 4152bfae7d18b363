"""One POST to an address that somebody gave: one end for all of it, no redirect, no proxy, and no way inside.

Who names an address may have the broker talk to what only the broker can reach, so where `may_reach` is given it judges
each address the name resolves to, and the connection goes to the very one that was judged. What is raised holds neither
the address nor what was sent (INV-30).
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any

import httpcore

from broker.domain.errors import ProviderUnavailable

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# What IANA gave out for the Internet, and what of it is for something else. Beyond it are site-local addresses, the
# forms that hold an IPv4 one (compatible, translated, the NAT64 of a site), and what nobody was given yet.
_UNICAST = ipaddress.ip_network("2000::/3")
_NOT_PUBLIC = tuple(
    map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2001:db8::/32", "3fff::/20"))
)
_ISATAP = (0x0000_5EFE, 0x0200_5EFE)  # RFC 5214 section 6.1


@dataclass(frozen=True, kw_only=True)
class Answered:
    status: int
    body: bytes = field(repr=False)
    media_type: str = ""


class Poster:
    """Posts to one place at a time. A resolver that hangs keeps one thread beyond the deadline, and not one a POST.

    Whoever makes many gives them one `tls`: a context holds every authority it believes, which is a megabyte.
    """

    def __init__(
        self,
        *,
        deadline: timedelta,
        may_reach: Callable[[IpAddress], bool] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._deadline_s = deadline.total_seconds()
        self._backend = None if may_reach is None else _Judged(may_reach)
        self._tls = tls or ssl.create_default_context()
        self._late: threading.Thread | None = None

    def post(self, url: str, body: bytes, headers: Mapping[str, str], *, read: int = 0) -> Answered:
        """What was answered, with at most `read` bytes of its body; ProviderUnavailable where nothing was."""
        found = self._posted(url, body, headers, read)
        # Raised here, without a context: that would be a request with its address.
        if isinstance(found, str):
            raise ProviderUnavailable("it was not delivered", reason=found)
        return found

    def _posted(self, url: str, body: bytes, headers: Mapping[str, str], read: int) -> Answered | str:
        if self._late is not None:
            self._late.join(0.2)
            if self._late.is_alive():
                return "an earlier one still waits for its name to be resolved"
        outcome: SimpleQueue[Answered | str] = SimpleQueue()
        post = threading.Thread(
            target=lambda: asyncio.run(self._post(url, body, headers, read, outcome)), name="post", daemon=True
        )
        post.start()
        try:
            return outcome.get(timeout=self._deadline_s + 1)
        except Empty:
            self._late = post
            return f"no answer within {self._deadline_s:g} s"

    async def _post(
        self, url: str, body: bytes, headers: Mapping[str, str], read: int, outcome: SimpleQueue[Answered | str]
    ) -> None:
        found: Answered | str = "it could not be sent"
        try:
            # One end for all of it: a client has one for each single read.
            async with asyncio.timeout(self._deadline_s):
                found = await self._answered(url, body, headers, read)
        except TimeoutError:
            self._late = threading.current_thread()
            found = f"no answer within {self._deadline_s:g} s"
        except NotReached:
            found = "its address is inside, where nothing is sent; the operator may allow its network"
        except (
            httpcore.NetworkError,
            httpcore.ProtocolError,
            httpcore.TimeoutException,
            OSError,
            ValueError,
        ) as problem:
            # By its kind alone: the messages of some hold the address.
            found = f"{type(problem).__name__}"
        finally:
            # Here and not after the loop has ended: that waits for the thread which asks the resolver.
            outcome.put(found)

    async def _answered(self, url: str, body: bytes, headers: Mapping[str, str], read: int) -> Answered:
        pool = httpcore.AsyncConnectionPool(ssl_context=self._tls, network_backend=self._backend)
        async with pool, pool.stream("POST", url, headers=list(headers.items()), content=body) as answer:
            said = {name.lower(): value for name, value in answer.headers}
            media_type = said.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
            got = bytearray()
            if read:
                async for part in answer.aiter_stream():
                    got += part[: read - len(got)]
                    if len(got) >= read:
                        break
            return Answered(status=answer.status, body=bytes(got), media_type=media_type)


class NotReached(Exception):
    """A name leads only to where nothing is sent."""


class _Judged(httpcore.AsyncNetworkBackend):
    """Connects to an address that was judged, and not to the name again: it could be another the second time."""

    def __init__(self, may_reach: Callable[[IpAddress], bool]) -> None:
        self._may_reach = may_reach
        self._plain = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(address[0]) for _, _, _, _, address in found]
        allowed = [address for address in addresses if self._may_reach(ipaddress.ip_address(address.partition("%")[0]))]
        if not allowed:
            raise NotReached
        return await self._plain.connect_tcp(
            allowed[0], port, timeout=timeout, local_address=local_address, socket_options=socket_options
        )


def is_public(address: IpAddress) -> bool:
    """Whether this is an address of the Internet, and no way around to one that is not.

    >>> is_public(ipaddress.ip_address("8.8.8.8")), is_public(ipaddress.ip_address("::ffff:169.254.169.254"))
    (True, False)
    """
    embedded = _embedded(address)
    if embedded is not None:
        return is_public(embedded)
    if isinstance(address, ipaddress.IPv6Address) and (
        address not in _UNICAST or (int(address) >> 32) & 0xFFFF_FFFF in _ISATAP
    ):
        return False
    # Not by `is_global` alone: what that knows depends on the release of Python.
    return address.is_global and not address.is_multicast and not any(address in network for network in _NOT_PUBLIC)


def _embedded(address: IpAddress) -> IpAddress | None:
    """The IPv4 address that a gateway would make of this one."""
    if not isinstance(address, ipaddress.IPv6Address):
        return None
    if address.teredo is not None:
        return address.teredo[1]
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour


def public_or(networks: Iterable[Network]) -> Callable[[IpAddress], bool]:
    """Judges addresses: those of the Internet, and those of these networks besides."""
    allowed = tuple(networks)

    def may_reach(address: IpAddress) -> bool:
        found = _embedded(address) or address
        return is_public(found) or any(found in network for network in allowed)

    return may_reach


def is_public_name(host: str, networks: Iterable[Network]) -> bool:
    """Whether a host may be reached, as far as that can be told without resolving it.

    >>> is_public_name("receiver.example", ()), is_public_name("10.0.0.1", ()), is_public_name("localhost", ())
    (True, False, False)
    """
    if host == "localhost" or host.endswith(".localhost"):
        host = "127.0.0.1"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return True
    return public_or(networks)(address)
