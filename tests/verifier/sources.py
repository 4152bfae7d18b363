"""Brokers that a verifier can follow, behind one handle: the contract of `test_contract` is asked of each of them."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from broker.conformance.fake_broker import AUDIENCE, FakeBroker, Issued
from broker.sdk import DpopKey
from tests.house import CRM
from tests.processes import BrokerProcess, Deployment, Granted


class Source(Protocol):
    url: str
    audience: str
    token_source: Any

    def issue(self, *, agent: str = "summarizer", bound_to: DpopKey | None = None) -> Any:
        """A live token: it has `token`, `grant_id` and `task_id`. Each is of a task of its own."""

    def revoke_grant(self, issued: Any) -> None: ...

    def end_task(self, issued: Any) -> None: ...

    def revoke(self, axis: str, value: str) -> None:
        """Along `agent` or `resource`: what is out, and not what comes."""

    def rotate_keys(self) -> None:
        """What is issued from now on is signed by another key."""

    def stop(self) -> None: ...

    def start(self) -> None: ...

    def without(self, *channels: str) -> contextlib.AbstractContextManager[None]:
        """For so long these of `stream`, `poll`, `lists` do not answer."""


class FakeSource:
    audience = AUDIENCE
    token_source = "a-workload-token"

    def __init__(self) -> None:
        self._broker = FakeBroker(every_s=0.1)
        self.url = self._broker.url
        self.stop, self.start, self.without = self._broker.stop, self._broker.start, self._broker.without

    def issue(self, *, agent: str = "summarizer", bound_to: DpopKey | None = None) -> Issued:
        return self._broker.issue(sub=agent, client_id=agent, bound_to=bound_to)

    def revoke_grant(self, issued: Issued) -> None:
        self._broker.revoke("grant", grant_id=issued.grant_id)

    def end_task(self, issued: Issued) -> None:
        self._broker.revoke("task", task_id=issued.task_id)

    def revoke(self, axis: str, value: str) -> None:
        self._broker.revoke("tokens", **{axis: value}, issued_before=self._broker.now())

    def rotate_keys(self) -> None:
        self._broker.rotate()


class RealSource:
    """`broker serve` behind a door that can be shut for one channel or another."""

    audience = CRM

    def __init__(self, deployment: Deployment, process: BrokerProcess, door: Door) -> None:
        self._deployment, self._process, self._door = deployment, process, door
        self.url = deployment.issuer
        self.without = door.without

    def token_source(self) -> str:
        return self._deployment.token("crm-api")

    def issue(self, *, agent: str = "summarizer", bound_to: DpopKey | None = None) -> Granted:
        proof = {} if bound_to is None else {"DPoP": bound_to.proof("POST", f"{self.url}/v1/grants")}
        answer = self._process.ask(self._process.open_task(agent), agent, **proof)
        assert answer.status_code == 201, answer.text
        return Granted.of(answer.json())

    def revoke_grant(self, issued: Granted) -> None:
        assert self._process.post(f"/v1/grants/{issued.id}/revoke", "ada").status_code == 200

    def end_task(self, issued: Granted) -> None:
        self._process.complete(issued.task_id)

    def revoke(self, axis: str, value: str) -> None:
        body = {axis: value, "reason": "drill"}
        assert self._process.post("/v1/revocations", "ada", body).status_code == 200

    def rotate_keys(self) -> None:
        done = self._deployment.run("keys", "rotate")
        assert done.returncode == 0, done.stderr

    def stop(self) -> None:
        self._process.stop()

    def start(self) -> None:
        self._process.start()
        self._process.until_ready()


class Door:
    """A proxy on the issuer's port: it looks at the head of each request, and passes the rest on byte by byte."""

    _CHANNELS: Mapping[str, str] = {
        "stream": "/v1/revocations/feed",
        "poll": "/v1/revocations?",
        "lists": "/status-lists/",
    }

    def __init__(self, port: int, leads_to: int) -> None:
        self._leads_to = leads_to
        self._shut: tuple[str, ...] = ()
        self._open: set[socket.socket] = set()
        self._listening = socket.create_server(("127.0.0.1", port))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @contextmanager
    def without(self, *channels: str) -> Iterator[None]:
        self._shut = tuple(self._CHANNELS[channel] for channel in channels)
        if channels:
            # A verifier follows from its first moment on: a stream that is open already would go on.
            self._cut()
        try:
            yield
        finally:
            self._shut = ()

    def close(self) -> None:
        # Or `accept` goes on waiting.
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(10)
        self._cut()

    def _cut(self) -> None:
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                threading.Thread(target=self._pass, args=(connection,), daemon=True).start()

    def _pass(self, client: socket.socket) -> None:
        self._open.add(client)
        with client, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                read = client.recv(65536)
                if not read:
                    return
                head += read
            first, _, rest = head.partition(b"\r\n")
            if first.decode("latin-1").split(" ")[1].startswith(self._shut or ("\0",)):
                client.sendall(b"HTTP/1.1 503 Shut\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            # One request a connection, so that each is looked at.
            kept = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", b"\r\n" + rest)
            with socket.create_connection(("127.0.0.1", self._leads_to)) as broker:
                self._open.add(broker)
                broker.sendall(first + b"\r\nConnection: close" + kept)
                back = threading.Thread(target=_pour, args=(client, broker), daemon=True)
                back.start()
                _pour(broker, client)
                self._open.discard(broker)
        self._open.discard(client)


def _pour(source: socket.socket, into: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while read := source.recv(65536):
            into.sendall(read)
        into.shutdown(socket.SHUT_WR)


@contextmanager
def fake() -> Iterator[Source]:
    source = FakeSource()
    try:
        yield source
    finally:
        source.stop()


@contextmanager
def real(directory: Path, store_url: str) -> Iterator[Source]:
    deployment = Deployment.create(directory / "deployment", store_url)
    # The door has the issuer's port, so the broker takes another.
    (deployment.directory / "broker-door.log").touch()
    with deployment.broker() as process:
        door = Door(deployment.port, process.port)
        try:
            yield RealSource(deployment, process, door)
        finally:
            door.close()
