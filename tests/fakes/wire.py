"""A wire between a client and a server on loopback that can lose an answer after the server has done its work."""

from __future__ import annotations

import contextlib
import re
import socket
import threading


class Wire:
    """Listens on `address` and passes everything on, until told to lose the answer to a request."""

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("http://").partition(":")
        self._target = (host, int(port))
        self._lost: list[re.Pattern[bytes]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        self._guard = threading.Lock()
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def loses_reply(self, match: str) -> None:
        """The next request whose first line matches is done, and its answer never arrives."""
        with self._guard:
            self._lost.append(re.compile(match.encode()))

    def close(self) -> None:
        with self._guard:
            for each in self._sockets:
                _close(each)
        self._thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
            except OSError:
                return
            for each in (client, server):
                # Otherwise headers and body, sent one after the other, wait for each other's acknowledgement.
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._guard:
                self._sockets += [client, server]
            losing = threading.Event()
            threading.Thread(target=self._forth, args=(client, server, losing), daemon=True).start()
            threading.Thread(target=self._back, args=(client, server, losing), daemon=True).start()

    def _forth(self, client: socket.socket, server: socket.socket, losing: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                line = data.partition(b"\r\n")[0]
                with self._guard:
                    found = next((pattern for pattern in self._lost if pattern.search(line)), None)
                    if found is not None:
                        self._lost.remove(found)
                        losing.set()
                server.sendall(data)
        _close(server)

    def _back(self, client: socket.socket, server: socket.socket, losing: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                if losing.is_set():
                    break
                client.sendall(data)
        _close(client)
        _close(server)


def _close(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
