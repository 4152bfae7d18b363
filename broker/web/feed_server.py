"""The feed for thousands of verifiers: one event loop that holds their connections, and no thread for any of them.

A request is parsed by h11 and answered by the same functions as in `broker serve`, on a few threads, because they ask
the store. From then on a stream is a connection and a place in the feed: what is new goes to all of them as the same
bytes. What waits to be sent to one is bounded, and who does not read it is cut off (INV-35).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import unquote_to_bytes

import h11
from werkzeug.exceptions import MethodNotAllowed, NotFound

from broker import telemetry
from broker.domain.errors import BrokerError, Unavailable
from broker.domain.feed import Position
from broker.services.broadcast import Edition, Places
from broker.web import auth, envelope, feed, shapes
from broker.web.answers import Answer, json_response
from broker.web.bodies import Bodies
from broker.web.context import Call, answering
from broker.web.feed import Poll, Stream
from broker.web.reading import query
from broker.wiring import Broker

_STREAM, _POLL, _HEALTH, _READY = "/v1/revocations/feed", "/v1/revocations", "/healthz", "/readyz"
_THREADS = 16
_ASKING = 2000  # requests that are answered or wait for it
_BESIDE = 1000  # connections beyond the streams: who asks, and who has not asked yet
_LONGEST_HEAD = 16 * 1024
_QUIET_FOR_S = 30.0
_TENDED_EVERY_S = 1.0
_SAID_EVERY_S = 5.0
_UNREAD = 64 * 1024  # bytes that one reader may leave in our memory
_UNACKNOWLEDGED_MS = 20_000
_DRAINED_WITHIN_S = 10.0
_EMPTY_WITHIN_S = 3.0
_LOOK_AGAIN_S = 0.02
_REPLAYS_AT_ONCE = 32  # that are made; who is slow to read one is in nobody's way

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A stream that has a place."""

    stream: Stream
    edition: Edition
    first: bytes
    headers: list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    """A poll that has a place until it is answered."""

    poll: Poll
    call: Call
    wait_s: int


class FeedServer:
    """Listens from `start` to `stop`, in a thread of its own."""

    def __init__(self, house: Broker, host: str, port: int) -> None:
        self._house = house
        self._address = (host, port)
        self._answers = _Answers(house)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="feed-answers")
        self._started = threading.Event()
        self._problem: OSError | None = None
        self._hall: _Hall | None = None
        self._thread = threading.Thread(target=self._run, name="feed-server", daemon=True)

    def start(self) -> None:
        """Returns when it listens; raises OSError where it cannot."""
        self._thread.start()
        self._started.wait()
        if self._problem is not None:
            raise self._problem

    def stop(self) -> None:
        """Every stream is ended in order; readers come again, perhaps to another broker."""
        if self._hall is not None:
            self._hall.from_elsewhere(self._hall.stopping.set)
        self._thread.join(10)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except OSError as problem:
            self._problem = problem
        finally:
            self._started.set()

    async def _serve(self) -> None:
        hall = _Hall(self._house, self._answers, self._threads)
        listener = _listener(*self._address)
        server = await hall.loop.create_server(lambda: _Connection(hall), sock=listener)
        tending = hall.loop.create_task(hall.tend())

        def told(edition: Edition) -> None:
            hall.from_elsewhere(hall.publish, edition)

        with self._house.broadcast.reading(told):
            self._hall = hall
            self._started.set()
            await hall.stopping.wait()
        server.close()
        tending.cancel()
        await hall.empty()


class _Answers:
    """What a request is answered with. On a few threads, because it asks the store."""

    def __init__(self, house: Broker) -> None:
        self._house = house
        self._bodies = Bodies()
        self.places = Places.shared(house.settings.feed.streams)

    def of(self, environ: dict[str, Any], *, too_many: bool) -> Answer | _Opened | _Waiting:
        call = Call(environ, self._house, self._bodies)
        with answering(call):
            try:
                envelope.begin(call)
                if too_many:
                    raise Unavailable("more ask for the feed than this broker can hear: try again")
                answer = self._routed(call)
            except Exception as problem:
                answer = envelope.refusal(problem)
            return self._logged(call, answer)

    def of_poll(self, waited: _Waiting) -> Answer:
        """What a poll that waited is answered with."""
        with answering(waited.call):
            try:
                answer = json_response(waited.poll.answer())
            except BrokerError as problem:
                answer = envelope.refusal(problem)
            return cast(Answer, self._logged(waited.call, answer))

    def _logged(self, call: Call, answer: Answer | _Opened | _Waiting) -> Answer | _Opened | _Waiting:
        if isinstance(answer, _Waiting):
            return answer
        status = 200
        if isinstance(answer, Answer):
            status = answer.status
            answer.headers += envelope.last_headers(call, [name for name, _ in answer.headers])
        path = call.environ["PATH_INFO"]
        route = path if path in (_STREAM, _POLL, _HEALTH, _READY) else "unknown"
        envelope.answered(call, route, status)
        return answer

    def _routed(self, call: Call) -> Answer | _Opened | _Waiting:
        path = call.environ["PATH_INFO"]
        if path not in (_STREAM, _POLL, _HEALTH, _READY):
            raise NotFound
        if call.method != "GET":
            raise MethodNotAllowed(valid_methods=["GET"])
        if path == _HEALTH:
            return json_response({"status": "ok"})
        if path == _READY:
            version = self._house.standing.now().catalogue.version
            return json_response({"status": "ok", "configuration_version": version})
        return self._stream(call) if path == _STREAM else self._poll(call)

    def _stream(self, call: Call) -> _Opened:
        caller = auth.caller()
        query(shapes.NoQuery)
        self._house.feed.admit(caller)
        self.places.take(caller.name)
        try:
            stream, edition, first = feed.opened(self._house, caller)
        except BaseException:
            self.places.give_back(caller.name)
            raise
        headers = [*feed.HEADERS, *envelope.last_headers(call, ["Cache-Control"])]
        return _Opened(stream=stream, edition=edition, first=first, headers=headers)

    def _poll(self, call: Call) -> Answer | _Waiting:
        caller = auth.caller()
        asked = query(shapes.FeedQuery)
        poll = Poll(self._house, caller, None if asked.after is None else Position.parse(asked.after))
        if asked.wait and not poll.is_answered:
            self.places.take(caller.name)
            return _Waiting(poll=poll, call=call, wait_s=asked.wait)
        return json_response(poll.answer())


class _Hall:
    """All connections of one loop. Everything here runs on it but `from_elsewhere`, and so needs no lock."""

    def __init__(self, house: Broker, answers: _Answers, threads: ThreadPoolExecutor) -> None:
        self.loop = asyncio.get_running_loop()
        self.stopping = asyncio.Event()
        self.replays = asyncio.Semaphore(_REPLAYS_AT_ONCE)
        self.house = house
        self.places = answers.places
        self.edition: Edition | None = None
        self.listeners: set[_Connection] = set()  # who gets each edition
        self._answers = answers
        self._threads = threads
        self._asking = 0
        self._connections: set[_Connection] = set()
        self._room = house.settings.feed.streams + _BESIDE
        self._catalogue_version = -1
        self._said_at = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    def from_elsewhere(self, do: Callable[..., object], *arguments: Any) -> None:
        """Have this done on the loop, said by another thread."""
        with contextlib.suppress(RuntimeError):  # it is closed, and there is nobody to do it for
            self.loop.call_soon_threadsafe(do, *arguments)

    def publish(self, edition: Edition) -> None:
        self.edition, self._said_at = edition, self.loop.time()
        self._let_go(edition)
        for connection in tuple(self.listeners):
            connection.tell(edition)

    def _let_go(self, edition: Edition) -> None:
        """End what is over. Whether each caller may still read is asked only when there is a newer configuration."""
        version, now = self.house.standing.last_known().catalogue.version, self.house.clock()
        changed, self._catalogue_version = version != self._catalogue_version, version
        for connection in tuple(self.listeners):
            connection.end_if_over(edition, now, changed=changed)

    async def tend(self) -> None:
        """What no edition brings about: times that are over, and who is told nothing while the store is away."""
        while True:
            await asyncio.sleep(_TENDED_EVERY_S)
            now = self.loop.time()
            for connection in tuple(self._connections):
                connection.tend(now)
            if self.edition is not None and now - self._said_at > _SAID_EVERY_S:
                self._said_at = now
                with contextlib.suppress(BrokerError):  # nobody knows what time it is: the next look says
                    self._let_go(self.edition)
                for connection in tuple(self.listeners):
                    connection.still_there()

    def came(self, connection: _Connection) -> bool:
        """Whether there is room for one more."""
        if len(self._connections) >= self._room:
            return False
        self._connections.add(connection)
        return True

    def went(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        self.listeners.discard(connection)

    async def empty(self) -> None:
        """End them all, and wait a little until what was just said is on its way."""
        for connection in tuple(self._connections):
            connection.end()
        until = self.loop.time() + _EMPTY_WITHIN_S
        while self._connections and self.loop.time() < until:
            await asyncio.sleep(_LOOK_AGAIN_S)

    def do(self, what: Coroutine[Any, Any, None], connection: _Connection) -> None:
        """Something that waits, for one connection; if it breaks, that connection is over and nothing else is."""
        task = self.loop.create_task(what)
        self._tasks.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and task.exception() is not None:
                _log.error("a connection to the feed broke", exc_info=task.exception())
                connection.abort()

        task.add_done_callback(done)

    async def answer(self, environ: dict[str, Any]) -> Answer | _Opened | _Waiting:
        too_many = self._asking >= _ASKING
        self._asking += 1
        try:
            answer: Answer | _Opened | _Waiting = await self.ask(lambda: self._answers.of(environ, too_many=too_many))
            return answer
        finally:
            self._asking -= 1

    async def answer_poll(self, waiting: _Waiting) -> Answer:
        answer: Answer = await self.ask(lambda: self._answers.of_poll(waiting))
        return answer

    async def ask(self, work: Callable[[], Any]) -> Any:
        return await self.loop.run_in_executor(self._threads, work)


class _Connection(asyncio.Protocol):
    """One client: it asks, and then it may read the feed until it goes."""

    __slots__ = ("_busy", "_chunked", "_drained", "_hall", "_opened", "_parser", "_since", "_transport", "_waiting")

    _transport: asyncio.Transport

    def __init__(self, hall: _Hall) -> None:
        self._hall = hall
        self._parser: h11.Connection | None = h11.Connection(h11.SERVER, max_incomplete_event_size=_LONGEST_HEAD)
        self._busy = False  # with what it asked
        self._chunked = True
        self._since = hall.loop.time()
        self._opened: Stream | None = None
        self._waiting: tuple[_Waiting, float] | None = None
        self._drained: asyncio.Future[None] | None = None

    # --- What the transport says --------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_UNREAD)
        if not self._hall.came(self):
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._busy:
            # It has asked, and hears the answer before it asks again; whoever reads a stream has nothing more to say.
            self._transport.abort()
            return
        try:
            self._parser.receive_data(data)
            self._read(self._parser)
        except h11.RemoteProtocolError:
            self._transport.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            self._transport.close()

    def connection_lost(self, problem: Exception | None) -> None:
        self._hall.went(self)
        if self._waiting is not None:
            self._hall.places.give_back(self._waiting[0].poll.caller.name)
            self._waiting = None
        if self._opened is not None:
            self._hall.places.give_back(self._opened.caller.name)
            telemetry.streams(-1)
            self._opened = None
        self.resume_writing()

    def pause_writing(self) -> None:
        self._drained = self._hall.loop.create_future()

    def resume_writing(self) -> None:
        drained, self._drained = self._drained, None
        if drained is not None and not drained.done():
            drained.set_result(None)

    # --- Asking -------------------------------------------------------------------------------------------------------

    def _read(self, parser: h11.Connection) -> None:
        found = parser.next_event()
        if isinstance(found, h11.ConnectionClosed):
            self._transport.close()
        elif isinstance(found, h11.Request):
            self._busy = True
            self._chunked = found.http_version != b"1.0"
            # A body is not read, nor what comes with this request: the answer ends the connection then.
            parser.next_event()
            self._hall.do(self._answer(_environ(found)), self)

    async def _answer(self, environ: dict[str, Any]) -> None:
        answer = await self._hall.answer(environ)
        if isinstance(answer, Answer):
            self._send(answer)
        elif isinstance(answer, _Waiting):
            if self._transport.is_closing():
                self._hall.places.give_back(answer.poll.caller.name)
                return
            self._waiting = (answer, self._hall.loop.time() + answer.wait_s)
            self._hall.listeners.add(self)
            if self._hall.edition is not None:
                self.tell(self._hall.edition)
        else:
            if self._transport.is_closing():
                self._hall.places.give_back(answer.stream.caller.name)
                return
            await self._begin(answer)

    def _send(self, answer: Answer) -> None:
        """A whole answer; then it may ask again, if it has said all of what it asked."""
        parser = self._parser
        if parser is None or self._transport.is_closing():
            return
        reason = HTTPStatus(answer.status).phrase.encode()
        head = h11.Response(status_code=answer.status, headers=answer.headers, reason=reason)
        self._transport.write(
            b"".join(parser.send(part) or b"" for part in (head, h11.Data(data=answer.body), h11.EndOfMessage()))
        )
        self._busy, self._since = False, self._hall.loop.time()
        if self._hall.stopping.is_set():
            self._transport.close()
        elif parser.our_state is h11.DONE and parser.their_state is h11.DONE and not parser.trailing_data[0]:
            parser.start_next_cycle()
        else:
            self._transport.close()

    # --- Reading the feed ---------------------------------------------------------------------------------------------

    async def _begin(self, opened: _Opened) -> None:
        self._opened, self._parser = opened.stream, None
        telemetry.streams(1)
        named = [*opened.headers, ("Transfer-Encoding", "chunked") if self._chunked else ("Connection", "close")]
        head = "HTTP/1.1 200 OK\r\n" + "".join(f"{name}: {value}\r\n" for name, value in named) + "\r\n"
        self._transport.write(head.encode("ascii") + self._framed(opened.first))
        await self._catch_up(opened.stream, opened.edition)

    async def _catch_up(self, stream: Stream, edition: Edition) -> None:
        """Give it all it missed, as fast as it reads; from then on it gets what is new as it comes."""
        while not self._transport.is_closing():
            newest = self._hall.edition
            if newest is not None and newest.feed_id == stream.feed_id and newest.seq >= edition.seq:
                edition = newest
            news = stream.next(edition, self._made)
            if news is not None:
                self._write(news)
                self._hall.listeners.add(self)
                return
            await self._replay(stream, edition)

    async def _replay(self, stream: Stream, edition: Edition) -> None:
        """As much of what it missed as may wait for it, and then wait until it has read that."""
        missed = b""
        async with self._hall.replays:
            with contextlib.suppress(BrokerError):
                missed = await self._hall.ask(lambda: feed.missed(self._hall.house, stream, edition))
        if not missed:
            # It comes again and says how far it has come; what is not kept any more is a reset then.
            self.end()
            return
        self._transport.write(self._framed(missed))
        if self._drained is not None:
            try:
                await asyncio.wait_for(asyncio.shield(self._drained), _DRAINED_WITHIN_S)
            except TimeoutError:
                self._cut_off()

    def tell(self, edition: Edition) -> None:
        if self._waiting is not None:
            if self._waiting[0].poll.hear(edition):
                self._reply()
        elif self._opened is not None:
            news = self._opened.next(edition, self._made)
            if news is None:
                # More came at once than may be left unread: it gets that in parts.
                self._hall.listeners.discard(self)
                self._hall.do(self._catch_up(self._opened, edition), self)
            elif news:
                self._write(news)

    def end_if_over(self, edition: Edition, now: datetime, *, changed: bool) -> None:
        stream = self._opened
        if stream is None:
            return
        is_over = now >= stream.ends_at or stream.feed_id != edition.feed_id
        if is_over or (changed and not self._hall.house.feed.still_reads(stream.caller)):
            self.end()

    def still_there(self) -> None:
        """Whether somebody listens shows only when something is said."""
        if self._opened is not None:
            self._write(self._framed(feed.STILL_THERE))

    @property
    def _made(self) -> Callable[[Edition, int, bool], bytes | None]:
        return _chunked_news if self._chunked else feed.news

    def _framed(self, data: bytes) -> bytes:
        return _chunk(data) if self._chunked else data

    def _write(self, data: bytes) -> None:
        if self._transport.get_write_buffer_size() > _UNREAD:
            self._cut_off()
        elif data:
            self._transport.write(data)

    def _cut_off(self) -> None:
        if self._opened is not None and not self._transport.is_closing():
            telemetry.cut_off()
            _log.warning("nobody reads this stream", extra={"fields": {"caller": self._opened.caller.name}})
        self.abort()

    # --- Ending -------------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """In order: what was asked is answered, a stream is complete."""
        if self._waiting is not None:
            self._reply()
            return
        if self._busy and self._opened is None:
            return  # it is being answered
        if self._opened is not None and not self._transport.is_closing():
            self._transport.write(b"0\r\n\r\n" if self._chunked else b"")
        self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def tend(self, now: float) -> None:
        if self._waiting is not None:
            if now >= self._waiting[1]:
                self._reply()
        elif self._parser is not None and not self._busy and now - self._since > _QUIET_FOR_S:
            self._transport.close()

    def _reply(self) -> None:
        assert self._waiting is not None  # noqa: S101 - who calls has looked
        waiting, self._waiting = self._waiting[0], None
        self._hall.listeners.discard(self)
        self._hall.places.give_back(waiting.poll.caller.name)
        self._hall.do(self._replied(waiting), self)

    async def _replied(self, waiting: _Waiting) -> None:
        self._send(await self._hall.answer_poll(waiting))


@lru_cache(maxsize=32)
def _chunked_news(edition: Edition, seq: int, stated: bool) -> bytes | None:
    news = feed.news(edition, seq, stated)
    return _chunk(news) if news else news


def _chunk(data: bytes) -> bytes:
    """One chunk of a body without a length (RFC 9112, 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def _environ(request: h11.Request) -> dict[str, Any]:
    """The head of a request as WSGI has it (PEP 3333), which is how everything here reads one."""
    path, _, query_string = request.target.partition(b"?")
    environ: dict[str, Any] = {
        "REQUEST_METHOD": request.method.decode("ascii"),
        "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
        "QUERY_STRING": query_string.decode("latin-1"),
    }
    for raw_name, raw_value in request.headers:
        name, value = raw_name.decode("ascii").upper().replace("-", "_"), raw_value.decode("latin-1")
        key = name if name in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{name}"
        environ[key] = f"{environ[key]},{value}" if key in environ else value
    return environ


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=4096)
    # What the kernel keeps for a reader that does not read is bounded too, and one that is gone is noticed. Connections
    # take these over.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNREAD)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS)
    return listener
