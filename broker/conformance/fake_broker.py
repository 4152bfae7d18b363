"""A broker to try verifiers with: the public surface over real HTTP, honest until it is told otherwise.

It has keys, metadata, status lists, the feed in both forms, and introspection; no store, no callers, no policies. It
hands out whatever token a test wants. Never for anything but tests: it gives tokens to nobody in particular.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import secrets
import socket
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from broker.sdk import DpopKey
from broker.sdk.clock import Timing

AUDIENCE = "https://crm.example/api"
SCOPE = "contacts:read"
CHANNELS = frozenset({"jwks", "stream", "poll", "lists", "introspection"})
_LIST_SIZE = 4096
_STATEMENT_S = 12
_PAGE = 1000


def base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


class SigningKey:
    """An ES256 key with its name."""

    def __init__(self) -> None:
        self._private = ec.generate_private_key(ec.SECP256R1())
        self.jwk = DpopKey(self._private).public_jwk()
        self.kid = DpopKey(self._private).thumbprint()

    @property
    def published(self) -> dict[str, str]:
        return self.jwk | {"kid": self.kid, "alg": "ES256", "use": "sig"}

    def sign(self, claims: Mapping[str, Any], *, typ: str, **header: Any) -> str:
        """A compact JWS; what is given as `header` replaces what would stand there."""
        head = {"alg": "ES256", "typ": typ, "kid": self.kid} | header
        signed = ".".join(base64url(json.dumps(part).encode()) for part in (head, dict(claims)))
        r, s = decode_dss_signature(self._private.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{base64url(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


@dataclass(frozen=True, kw_only=True)
class Issued:
    """A token, and what a revocation can name of it."""

    token: str = field(repr=False)
    claims: Mapping[str, Any]
    kid: str

    @property
    def grant_id(self) -> str:
        return str(self.claims["grant_id"])

    @property
    def task_id(self) -> str:
        return str(self.claims["task_id"])


@dataclass(frozen=True)
class Frame:
    """An event of the stream, before it is written."""

    event: str
    data: str
    id: str | None = None

    def __bytes__(self) -> bytes:
        name = f"id: {self.id}\n" if self.id else ""
        return f"{name}event: {self.event}\ndata: {self.data}\n\n".encode()


def honest(frame: Frame) -> Iterable[bytes]:
    return [bytes(frame)]


class FakeBroker:
    """`serves`: which channels answer; the others say 503. `mangle` writes each event of the stream. `tamper_list`
    gets the claims of a status list and answers what is sent. `age_s` makes statements and lists so much older.
    `hidden` are numbers of events that are never sent. `silent`: streams stay open, and nothing comes.
    """

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0, every_s: float = 2.0, timing: Timing | None = None):
        self._timing = timing or Timing()
        self._host, self._every_s = host, every_s
        self._turn = threading.Condition()
        self._connections: set[socket.socket] = set()
        self._streams: set[socket.socket] = set()
        self.clock_ahead_s = 0.0
        self.keys = [SigningKey()]
        self.coming = SigningKey()
        self.issued: list[Issued] = []
        self.asked: list[str] = []  # paths, as they come
        self._revoked: set[str] = set()  # tokens
        self.heal()
        self.begin_feed()
        self._port = port
        self._server: ThreadingHTTPServer | None = None
        self.start()
        self.url = f"http://{host}:{self._port}"

    # -- how it behaves -------------------------------------------------------------------------------------------

    def heal(self) -> None:
        """Be an honest broker again."""
        with self._turn:
            self.serves = set(CHANNELS)
            self.mangle: Callable[[Frame], Iterable[bytes]] = honest
            self.tamper_list: Callable[[dict[str, Any]], str] = self.signed_list
            self.tamper_data: Callable[[int, str], str] = lambda _, data: data
            self.statement_signed_by: SigningKey | None = None
            self.age_s = 0.0
            self.silent = False
            self.hidden: set[int] = set()
            self._turn.notify_all()

    def begin_feed(self, seq: int = 0) -> None:
        """Another feed, as after a restore: nothing that was in the one before is kept."""
        with self._turn:
            self.feed = secrets.token_urlsafe(9)
            self._first = seq
            self._events: list[str] = []
            self._heads = [hashlib.sha256(self.feed.encode()).digest()]
            self._turn.notify_all()
        self.cut()

    def forget_before(self, seq: int) -> None:
        """Keep events after `seq` only: who asks for earlier ones gets a reset."""
        self._first = seq

    def start(self) -> None:
        server = _Server((self._host, self._port), _handler(self))
        self._server, self._port = server, server.server_port
        self._thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No longer there: connections are refused, streams are cut."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            self._thread.join()
        self._end(self._connections)

    close = stop

    def cut(self) -> None:
        """End all streams."""
        self._end(self._streams)

    def connected(self, connection: socket.socket, *, over: bool = False) -> None:
        with self._turn:
            (self._connections.discard if over else self._connections.add)(connection)

    def _end(self, connections: set[socket.socket]) -> None:
        with self._turn:
            found = list(connections)
            self._turn.notify_all()
        for each in found:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def without(self, *channels: str) -> Iterator[None]:
        self.serves -= set(channels)
        self.cut()
        yield
        self.serves |= set(channels)

    # -- what it hands out -----------------------------------------------------------------------------------------

    @property
    def newest(self) -> int:
        """The number of the newest event."""
        return len(self._events)

    def now(self) -> int:
        return int(self._timing.now().timestamp() + self.clock_ahead_s)

    def rotate(self) -> SigningKey:
        """The next key signs from now on. It was published before, and those before it stay so."""
        self.keys.insert(0, self.coming)
        self.coming = SigningKey()
        return self.keys[0]

    def key_set(self) -> dict[str, Any]:
        return {"keys": [key.published for key in (*self.keys, self.coming)]}

    def issue(
        self,
        *,
        key: SigningKey | None = None,
        bound_to: DpopKey | None = None,
        status_list: str = "1",
        header: Mapping[str, Any] | None = None,
        typ: str = "at+jwt",
        **claims: Any,
    ) -> Issued:
        """A token for the audience; a claim that is given replaces what would stand there, and None leaves it out."""
        now, index = self.now(), len(self.issued)
        said: dict[str, Any] = {
            "iss": self.url,
            "sub": "summarizer",
            "aud": AUDIENCE,
            "client_id": "summarizer",
            "iat": now,
            "nbf": now,
            "exp": now + 300,
            "jti": secrets.token_urlsafe(12),
            "scope": SCOPE,
            "status": {"status_list": {"idx": index, "uri": f"{self.url}/status-lists/{status_list}"}},
            "grant_id": f"grt_{secrets.token_hex(8)}",
            "task_id": f"task_{secrets.token_hex(8)}",
        }
        if bound_to is not None:
            said["cnf"] = {"jkt": bound_to.thumbprint()}
        said = {name: value for name, value in (said | claims).items() if value is not None}
        signing = key or self.keys[0]
        issued = Issued(token=signing.sign(said, typ=typ, **(header or {})), claims=said, kid=signing.kid)
        self.issued.append(issued)
        return issued

    def revoke(self, kind: str, *, only: Iterable[Issued] = (), **members: Any) -> int:
        """One event; and in status lists and introspection the tokens it means, or those in `only`. Its number."""
        with self._turn:
            at = datetime.fromtimestamp(self.now(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            seq = len(self._events) + 1
            event = {"seq": seq, "at": at, "kind": kind, **members}
            meant = [each for each in self.issued if _means(event, each)]
            self._revoked |= {each.token for each in (*meant, *only)}
            data = json.dumps(event)
            self._events.append(data)
            self._heads.append(hashlib.sha256(self._heads[-1] + data.encode()).digest())
            self._turn.notify_all()
        return seq

    def revoke_quietly(self, *issued: Issued) -> None:
        """In status lists and introspection, and in no event."""
        self._revoked |= {each.token for each in issued}

    def proof(self, key: DpopKey, issued: Issued, method: str, url: str) -> str:
        return key.proof(method, url, access_token=issued.token)

    # -- what it says under its signature ----------------------------------------------------------------------------

    def statement(self, **claims: Any) -> str:
        issued_at = int(self.now() - self.age_s)
        said = {
            "iss": self.url,
            "iat": issued_at,
            "exp": issued_at + _STATEMENT_S,
            "feed": self.feed,
            "seq": len(self._events),
            "head": base64url(self._heads[-1]),
        }
        return (self.statement_signed_by or self.keys[0]).sign(said | claims, typ="feed-statement+jwt")

    def list_claims(self, name: str) -> dict[str, Any]:
        packed = bytearray(_LIST_SIZE // 4)
        for index, each in enumerate(self.issued):
            if each.token in self._revoked and index < _LIST_SIZE:
                packed[index >> 2] |= 1 << 2 * (index & 3)
        issued_at = int(self.now() - self.age_s)
        return {
            "iss": self.url,
            "sub": f"{self.url}/status-lists/{name}",
            "iat": issued_at,
            "exp": issued_at + 12,
            "ttl": 10,
            "status_list": {"bits": 2, "lst": base64url(zlib.compress(bytes(packed), 9))},
        }

    def signed_list(self, claims: Mapping[str, Any]) -> str:
        return self.keys[0].sign(claims, typ="statuslist+jwt")

    def reset(self) -> dict[str, Any]:
        return {"feed": self.feed, "seq": len(self._events), "head": base64url(self._heads[-1])}

    # -- how it is asked ---------------------------------------------------------------------------------------------

    def known_after(self, after: str | None) -> int | None:
        """The number to go on from; None where that is not kept."""
        feed, _, seq = (after or "").rpartition(":")
        if feed != self.feed or not seq.isdigit() or not self._first <= int(seq) <= len(self._events):
            return None
        return int(seq)

    def events_after(self, seq: int) -> list[tuple[int, str]]:
        found = list(enumerate(self._events[seq:], start=seq + 1))
        return [(number, self.tamper_data(number, data)) for number, data in found if number not in self.hidden]

    def page(self, after: str | None, wait_s: float) -> dict[str, Any]:
        with self._turn:
            seq, reset = self.known_after(after), None
            if seq is None:
                reset, seq = self.reset(), len(self._events)
            elif not self.events_after(seq):
                self._turn.wait(wait_s)
                seq = self.known_after(after)
                if seq is None:
                    reset, seq = self.reset(), len(self._events)
            items = self.events_after(seq)[:_PAGE]
            next_seq = items[-1][0] if items else seq
            return {
                "items": [{"seq": number, "data": data} for number, data in items],
                "next_after": f"{self.feed}:{next_seq}",
                "statement": self.statement(),
                "reset": reset,
            }

    def stream(self, after: str | None, connection: socket.socket) -> Iterator[bytes]:
        """What is written to one stream, until its connection ends."""
        with self._turn:
            self._streams.add(connection)
        try:
            yield b"retry: 1000\n\n"
            feed, seq = self.feed, self.known_after(after)
            if seq is None:
                seq = len(self._events)
                yield from self.mangle(Frame("reset", json.dumps(self.reset())))
            said_at = float("-inf")
            while "stream" in self.serves and self._server is not None and feed == self.feed:
                with self._turn:
                    found, newest = self.events_after(seq), len(self._events)
                    statement = Frame("statement", json.dumps({"statement": self.statement()}))
                if self.silent:
                    yield b": \n\n"
                else:
                    for number, data in found:
                        yield from self.mangle(Frame("revocation", data, f"{feed}:{number}"))
                    seq = max(seq, newest)
                    if found or self._timing.monotonic() >= said_at + self._every_s:
                        said_at = self._timing.monotonic()
                        yield from self.mangle(statement)
                with self._turn:
                    if len(self._events) == newest:
                        self._turn.wait(self._every_s / 4)
        finally:
            with self._turn:
                self._streams.discard(connection)

    def introspection(self, token: str) -> dict[str, Any]:
        found = next((each for each in self.issued if each.token == token), None)
        if found is None or found.token in self._revoked or self.now() >= found.claims["exp"]:
            return {"active": False}
        return {"active": True, **found.claims}

    def metadata(self) -> dict[str, Any]:
        return {
            "issuer": self.url,
            "jwks_uri": f"{self.url}/oauth2/jwks",
            "introspection_endpoint": f"{self.url}/oauth2/introspect",
            "authorization_endpoint": f"{self.url}/oauth2/authorize",
            "token_endpoint": f"{self.url}/oauth2/token",
            "response_types_supported": ["none"],
        }


def _means(event: Mapping[str, Any], issued: Issued) -> bool:
    claims = issued.claims
    if event["kind"] in ("grant", "task"):
        name = f"{event['kind']}_id"
        return bool(claims[name] == event[name])
    if event["kind"] != "tokens" or claims["iat"] > event["issued_before"]:
        return False
    actors, act = [], claims.get("act")
    while act:
        actors.append(act["sub"])
        act = act.get("act")
    return bool(
        event.get("all")
        or event.get("resource") == claims["aud"]
        or event.get("key") == issued.kid
        or event.get("agent") in (claims["client_id"], claims["sub"], *actors)
        or event.get("user") == claims["sub"]
    )


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a verifier that goes away in the middle of an answer is no error of ours."""


def _handler(broker: FakeBroker) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            broker.connected(self.connection)

        def finish(self) -> None:
            broker.connected(self.connection, over=True)
            super().finish()

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            broker.asked.append(self.path)
            name = parts.path.rpartition("/")[2]
            if parts.path == "/oauth2/jwks":
                self._when("jwks", broker.key_set)
            elif parts.path.startswith("/.well-known/"):
                self._when("jwks", broker.metadata)
            elif parts.path == "/status-lists":
                self._when("lists", lambda: {"status_lists": [f"{broker.url}/status-lists/1"]})
            elif parts.path.startswith("/status-lists/"):
                self._when("lists", lambda: broker.tamper_list(broker.list_claims(name)).encode())
            elif parts.path == "/v1/revocations":
                self._when("poll", lambda: broker.page(query.get("after"), float(query.get("wait", 0))))
            elif parts.path == "/v1/revocations/feed" and "stream" in broker.serves:
                self._stream()
            else:
                self._answer(503, {})

        def do_POST(self) -> None:
            form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode())
            broker.asked.append(self.path)
            self._when("introspection", lambda: broker.introspection(form.get("token", [""])[0]))

        def _when(self, channel: str, body: Callable[[], Any]) -> None:
            self._answer(200, body()) if channel in broker.serves else self._answer(503, {})

        def _answer(self, status: int, body: Any) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            kind = "application/statuslist+jwt" if isinstance(body, bytes) else "application/json"
            with contextlib.suppress(OSError):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def _stream(self) -> None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                for piece in broker.stream(self.headers.get("Last-Event-ID"), self.connection):
                    self.wfile.write(piece)
                    self.wfile.flush()

        def date_time_string(self, timestamp: float | None = None) -> str:
            at = datetime.fromtimestamp(0, UTC) + timedelta(seconds=broker.now())
            return at.strftime("%a, %d %b %Y %H:%M:%S GMT")

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing: who runs it reads the report."""

    return Handler
