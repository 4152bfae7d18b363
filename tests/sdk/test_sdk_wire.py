"""One contract for each wire: the SDK's own and a program's, for threads and for asyncio, at servers that misbehave."""

import asyncio
import os
import socket
import ssl
import threading
import time
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import httpcore
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from broker.sdk.clock import Timing
from broker.sdk.exchange import Answer, Lost, Request, http_date
from broker.sdk.wire import _MOST, GivenAsyncWire, GivenWire, OwnAsyncWire, OwnWire, _trusted

REQUEST = Request(method="POST", url="", headers={"Authorization": "Bearer s3cr3t"}, content=b"{}", timeout_s=5.0)


class Threaded:
    def end(self):
        pass


class Own(Threaded):
    @contextmanager
    def open(self, url):
        wire = OwnWire(url, Timing())
        yield wire.send
        wire.close()


class Given(Threaded):
    @contextmanager
    def open(self, url):
        with httpx.Client(auth=("user", "pw"), headers={"X-Mine": "1"}, cookies={"c": "1"}, trust_env=False) as http:
            wire = GivenWire(http, Timing())
            yield wire.send
            wire.close()
            assert not http.is_closed


class _Async:
    def __init__(self):
        self.runner = asyncio.Runner()

    @contextmanager
    def open(self, url):
        wires = self.wire(url)
        wire = self.runner.run(wires.__aenter__())
        yield lambda request: self.runner.run(wire.send(request))
        self.runner.run(wires.__aexit__(None, None, None))

    def end(self):
        self.runner.close()


class OwnAsync(_Async):
    @asynccontextmanager
    async def wire(self, url):
        wire = OwnAsyncWire(url, Timing())
        yield wire
        await wire.close()


class GivenAsync(_Async):
    @asynccontextmanager
    async def wire(self, url):
        async with httpx.AsyncClient(auth=("user", "pw"), headers={"X-Mine": "1"}, trust_env=False) as http:
            wire = GivenAsyncWire(http, Timing())
            yield wire
            await wire.close()
            assert not http.is_closed


@pytest.fixture(params=[Own, Given, OwnAsync, GivenAsync])
def wire(request):
    found = request.param()
    yield found
    found.end()


@contextmanager
def listening(answer, *, tls=None, address="127.0.0.1"):
    """A server that gives each connection to `answer`, and tells how many there were."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as server:
        connections = []

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connections.append(connection)
                with connection, suppress(OSError):
                    answer(tls.wrap_socket(connection, server_side=True) if tls else connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        scheme = "https" if tls else "http"
        host = f"[{address}]" if ":" in address else address
        yield f"{scheme}://{host}:{server.getsockname()[1]}", connections
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


def read_one(connection):
    """A whole request with the body `{}`."""
    said = b""
    while not said.endswith(b"{}"):
        part = connection.recv(65536)
        if not part:
            raise ConnectionError("it was closed before that")
        said += part
    return said.decode()


def test_what_was_asked_arrives_and_nothing_else_and_so_does_the_answer(wire):
    heard = []

    def answer(connection):
        for _ in range(2):
            heard.append(read_one(connection))
            connection.sendall(
                b"HTTP/1.1 403 No\r\nContent-Length: 2\r\nX-Twice: a\r\nDPoP-NONCE: n\r\nX-Twice: b\r\n\r\nno"
            )

    with listening(answer) as (url, connections), wire.open(url) as send:
        for _ in range(2):
            told = send(replace(REQUEST, url=f"{url}/v1/tasks?x=1"))
            assert isinstance(told, Answer)
            assert (told.status, told.content) == (403, b"no")
            assert (told.headers["x-twice"], told.headers["dpop-nonce"]) == ("a, b", "n")
            assert datetime.now(UTC) - told.received_at < timedelta(seconds=30)
    assert len(connections) == 1, "the connection is used again"
    head, *rest = heard[0].partition("\r\n\r\n")[0].split("\r\n")
    assert head == "POST /v1/tasks?x=1 HTTP/1.1"
    named = dict(line.lower().split(": ", 1) for line in rest)
    assert named == {"host": url.removeprefix("http://"), "authorization": "bearer s3cr3t", "content-length": "2"}


def say(connection, content=b""):
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content)


def test_an_ipv6_address_is_named_in_brackets(wire):
    heard = []

    def answer(connection):
        heard.append(read_one(connection))
        say(connection)

    with listening(answer, address="::1") as (url, _), wire.open(url) as send:
        assert send(replace(REQUEST, url=url)).status == 200
    assert f"host: {url.removeprefix('http://')}\r\n" in heard[0].lower()


def test_a_wire_that_was_closed_says_so_and_sends_nothing(wire):
    def answer(connection):
        read_one(connection)
        say(connection)

    with listening(answer) as (url, connections):
        with wire.open(url) as send:
            pass
        with pytest.raises(RuntimeError, match="closed"):
            send(replace(REQUEST, url=url))
    assert connections == []


@pytest.mark.parametrize("wire", [Own, OwnAsync], indirect=True)
def test_an_answer_that_comes_drop_by_drop_is_given_up(wire):
    over = threading.Event()

    def answer(connection):
        read_one(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while not over.wait(0.03):
            connection.sendall(b"x")

    with listening(answer) as (url, _), wire.open(url) as send:
        began = time.monotonic()
        assert_lost(send(replace(REQUEST, url=url, timeout_s=0.1)), "did not end")
        assert time.monotonic() - began < 10
        over.set()


@pytest.mark.parametrize("wire", [Own, OwnAsync], indirect=True)
def test_an_answer_without_end_is_given_up(wire, monkeypatch):
    monkeypatch.setattr("broker.sdk.wire._MOST_BYTES", 1000)

    def answer(connection):
        for _ in range(2):
            read_one(connection)
            say(connection, b"x" * 200_000)

    with listening(answer) as (url, _), wire.open(url) as send:
        assert_lost(send(replace(REQUEST, url=url)), "did not end")


def test_a_process_that_was_forked_has_connections_of_its_own():
    """Otherwise each reads what the other was answered: a credential of somebody else's task."""
    said = []

    def answer(connection):
        for _ in range(2):
            head = read_one(connection)
            said.append((head.split()[1], connection.getpeername()))
            say(connection, head.split()[1].encode())

    with listening_at_once(answer) as url:
        wire = OwnWire(url, Timing())
        assert wire.send(replace(REQUEST, url=f"{url}/before")).content == b"/before"
        child = os.fork()
        if not child:
            answer_of = wire.send(replace(REQUEST, url=f"{url}/child"))
            os._exit(0 if isinstance(answer_of, Answer) and answer_of.content == b"/child" else 1)
        _, status = os.waitpid(child, 0)
        assert wire.send(replace(REQUEST, url=f"{url}/parent")).content == b"/parent"
        wire.close()
    assert os.waitstatus_to_exitcode(status) == 0
    assert [path for path, _ in said] == ["/before", "/child", "/parent"]
    before, child, parent = (peer for _, peer in said)
    assert before == parent != child


@contextmanager
def listening_at_once(answer):
    """The same, each connection with a thread of its own."""
    threads = []

    def serve(connection):
        copy = connection.dup()

        def speak():
            with copy, suppress(OSError):
                answer(copy)

        threads.append(threading.Thread(target=speak, daemon=True))
        threads[-1].start()

    with listening(serve) as (url, _):
        yield url
    for thread in threads:
        thread.join()


def test_connections_that_were_left_to_nobody_do_not_keep_the_others_waiting_for_ever():
    """One that is cancelled just as its connection is made leaves it behind; here all places are left so."""

    def answer(connection):
        read_one(connection)
        say(connection)

    async def main(url):
        wire = OwnAsyncWire(url, Timing())
        nowhere = httpcore.Origin(b"http", b"127.0.0.1", 1)
        wire._pool._connections += [httpcore.AsyncHTTPConnection(origin=nowhere) for _ in range(_MOST)]
        request = replace(REQUEST, url=url, timeout_s=0.05)
        assert_lost(await wire.send(request), "in time")
        assert (await wire.send(replace(request, timeout_s=5.0))).status == 200
        await wire.close()

    with listening(answer) as (url, _):
        asyncio.run(main(url))


def test_who_waits_while_all_places_are_taken_takes_nobodys_place():
    over = threading.Event()

    def answer(connection):
        read_one(connection)
        over.wait(30)

    async def main(url):
        wire = OwnAsyncWire(url, Timing())
        pool = wire._pool
        request = replace(REQUEST, url=url, timeout_s=20.0)
        others = [asyncio.create_task(wire.send(request)) for _ in range(_MOST)]
        while len(pool.connections) < _MOST:
            await asyncio.sleep(0.01)
        assert_lost(await wire.send(replace(request, timeout_s=0.05)), "in time")
        assert wire._pool is pool
        over.set()
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await wire.close()

    with listening_at_once(answer) as url:
        asyncio.run(main(url))


def test_no_file_is_told_the_keys_of_a_connection(monkeypatch, tmp_path):
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    trusted = _trusted("https://broker.example")
    assert trusted.keylog_filename is None
    assert trusted.verify_mode is ssl.CERT_REQUIRED
    assert trusted.check_hostname
    assert trusted.cert_store_stats()["x509_ca"] > 50


def test_a_redirect_is_an_answer_and_is_not_followed(wire):
    def answer(connection):
        read_one(connection)
        connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n")

    with listening(answer) as (url, connections), wire.open(url) as send:
        assert send(replace(REQUEST, url=url)).status == 302
    assert len(connections) == 1


def test_no_answer_is_lost_and_says_nothing_of_the_request(wire):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    with wire.open(url) as send:
        assert_lost(send(replace(REQUEST, url=url)), "refused")


def test_a_server_that_hangs_is_given_up(wire):
    over = threading.Event()

    def answer(connection):
        read_one(connection)
        over.wait(30)

    with listening(answer) as (url, _), wire.open(url) as send:
        assert_lost(send(replace(REQUEST, url=url, timeout_s=0.2)), "in time")
        over.set()


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", b"SSH-2.0-x\r\n\r\n"])
def test_an_answer_that_breaks_off_or_is_none_is_lost(wire, said):
    def answer(connection):
        read_one(connection)
        connection.sendall(said)

    with listening(answer) as (url, _), wire.open(url) as send:
        assert_lost(send(replace(REQUEST, url=url)), "broke")


def test_a_connection_that_was_ended_meanwhile_is_not_used_again(wire):
    ended = threading.Event()

    def answer(connection):
        read_one(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        connection.shutdown(socket.SHUT_RDWR)
        ended.set()

    with listening(answer) as (url, connections), wire.open(url) as send:
        for _ in range(3):
            ended.clear()
            assert send(replace(REQUEST, url=url)).status == 200
            assert ended.wait(5)
    assert len(connections) == 3


def test_a_certificate_of_nobody_is_refused_before_anything_is_said(wire, tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = tmp_path / "server.pem"
    pem.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + certificate.public_bytes(Encoding.PEM)
    )
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(pem)
    heard = []

    def answer(connection):
        heard.append(read_one(connection))

    with listening(answer, tls=tls) as (url, _), wire.open(url) as send:
        assert_lost(send(replace(REQUEST, url=url)), "certificate")
    assert heard == []


def assert_lost(told, why):
    assert isinstance(told, Lost)
    assert why in told.why
    assert "s3cr3t" not in repr(told)


@pytest.mark.parametrize(
    "text",
    ["Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"],
)
def test_each_form_of_a_date_is_read(text):
    assert http_date(text) == datetime(1994, 11, 6, 8, 49, 37, tzinfo=UTC)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "now",
        "Sun, 31 Feb 1994 08:49:37 GMT",
        "Sun, 06 Mai 1994 08:49:37 GMT",
        "Fri, 31 Dec 9999 23:59:59 -1200",
    ],
)
def test_what_is_no_date_is_none(text):
    assert http_date(text) is None
