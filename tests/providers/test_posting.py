"""One POST: where it may go, how long it may take, and what is told of it."""

import asyncio
import socket
import threading
from datetime import timedelta
from ipaddress import ip_address, ip_network

import pytest

from broker.domain.errors import ProviderUnavailable
from broker.providers.posting import Poster, is_public, is_public_name, public_or
from tests.ssf import LOOPBACK, Receiver

INSIDE = (
    "0.0.0.0", "10.0.0.1", "100.64.0.1", "127.0.0.1", "169.254.169.254", "172.16.0.1", "192.168.0.1", "192.0.2.1",
    "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "::", "::1", "fc00::1", "fe80::1",
    "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "64:ff9b::7f00:1",
    "2002:a00:1::", "2001:0:0:0:0:0:f5ff:fffe", "64:ff9b:1::808:808", "64:ff9b:1::a00:1", "::8.8.8.8", "::10.0.0.1",
    "::ffff:0:8.8.8.8", "::ffff:0:10.0.0.1", "fec0::1", "feff::1", "3fff::1", "3fff:fff:ffff::1", "5f00::1", "4000::1",
    "192.0.0.1", "192.0.0.9", "192.0.0.170", "192.88.99.1", "2606:4700::5efe:a00:1", "2606:4700::200:5efe:a00:1",
    "2606:4700::5efe:808:808", "2001:2::1", "2001:1::1", "2001:20::1", "100::1", "1fff::1",
)  # fmt: skip
PUBLIC = (
    "8.8.8.8", "192.0.1.1", "192.88.98.1", "2606:4700:4700::1111", "2001:4860:4860::8888", "2a00:1450::1", "3ffe::1",
    "64:ff9b::808:808", "::ffff:8.8.8.8",
)  # fmt: skip


@pytest.mark.parametrize("address", INSIDE)
def test_what_is_inside_is_not_public_however_it_is_spelled(address):
    assert not is_public(ip_address(address))
    assert not public_or(())(ip_address(address))


@pytest.mark.parametrize("address", PUBLIC)
def test_the_internet_is_public(address):
    assert is_public(ip_address(address))


def test_the_operator_may_allow_a_network():
    may_reach = public_or([ip_network("10.20.0.0/16")])
    assert may_reach(ip_address("10.20.3.4"))
    assert may_reach(ip_address("::ffff:10.20.3.4"))
    assert may_reach(ip_address("8.8.8.8"))
    assert not may_reach(ip_address("10.21.0.1"))
    assert not may_reach(ip_address("127.0.0.1"))
    assert public_or([ip_network("fec0::/10")])(ip_address("fec0::1"))


@pytest.mark.parametrize("host", ["localhost", "x.localhost", "127.0.0.1", "::1", "10.0.0.1"])
def test_a_host_that_is_plainly_inside_is_told_without_resolving(host, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", None)
    assert not is_public_name(host, ())
    assert is_public_name("receiver.example", ())


@pytest.fixture
def receiver():
    made = Receiver()
    yield made
    made.close()


def poster(may_reach=None, seconds=5.0):
    may_reach = may_reach or public_or(LOOPBACK)
    return Poster(deadline=timedelta(seconds=seconds), may_reach=may_reach)


def undelivered(url, using):
    with pytest.raises(ProviderUnavailable) as raised:
        using.post(url, b"x", {"Content-Type": "text/plain", "Authorization": "hunter2"})
    assert raised.value.__context__ is raised.value.__cause__ is None
    assert "hunter2" not in f"{raised.value} {raised.value.reason}"
    return raised.value.reason


def test_what_is_answered_is_read_so_far_and_no_further(receiver):
    receiver.answers = [(400, b"y" * 100_000, {"Content-Type": "application/json; charset=utf-8"})]
    answer = poster().post(receiver.url, b"x", {"Content-Type": "text/plain"}, read=1000)
    assert (answer.status, answer.body, answer.media_type) == (400, b"y" * 1000, "application/json")
    assert receiver.received[0][2] == "x"


def test_no_redirect_is_followed(receiver):
    receiver.answers = [(307, b"", {"Location": receiver.url})]
    assert poster().post(receiver.url, b"x", {}).status == 307
    assert len(receiver.received) == 1


def test_a_name_that_leads_inside_is_not_reached(receiver, monkeypatch):
    real = asyncio.base_events.socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, port, *more, **named: real("127.0.0.1", port, *more, **named)
    )
    port = receiver.url.rpartition(":")[2]
    assert "inside" in undelivered(f"http://receiver.example:{port}", poster(public_or(())))
    assert receiver.received == []


def test_the_address_that_was_judged_is_the_one_that_is_reached(receiver, monkeypatch):
    """A name that resolves to another address the second time gains nothing: there is no second time."""
    real, asked = socket.getaddrinfo, []

    def resolve(host, port, *more, **named):
        if host == "receiver.example":
            asked.append(host)
            return real("127.0.0.1" if len(asked) == 1 else "127.0.0.2", port, *more, **named)
        return real(host, port, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    url = receiver.url.replace("127.0.0.1", "receiver.example")
    only = poster(lambda address: str(address) == "127.0.0.1")
    assert only.post(url, b"x", {}).status == 202
    assert asked == ["receiver.example"]
    assert receiver.received[0][1]["Host"].startswith("receiver.example:")


def test_a_receiver_that_hangs_or_trickles_is_cut_off(receiver):
    receiver.released.clear()
    assert undelivered(receiver.url, poster(seconds=0.3)) == "no answer within 0.3 s"
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def trickle():
            connection, _ = server.accept()
            with connection:
                while not stop.wait(0.05):
                    try:
                        connection.sendall(b"H")
                    except OSError:
                        return

        thread = threading.Thread(target=trickle, daemon=True)
        thread.start()
        reason = undelivered(f"http://127.0.0.1:{server.getsockname()[1]}/", poster(seconds=0.3))
        assert reason in ("no answer within 0.3 s", "RemoteProtocolError")
        stop.set()
        thread.join(10)


def test_who_is_not_there_is_told_by_kind_alone():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert undelivered(f"http://127.0.0.1:{port}/hunter2", poster()) == "ConnectError"
