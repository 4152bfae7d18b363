"""A real `broker dev`, and a place where the documents' commands reach it."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

_BROKER = Path(sys.executable).with_name("broker")
_CURL = Path(__file__).with_name("curl.py")
_STARTED_WITHIN_S = 60
_ADDRESS = "http://127.0.0.1:8080"


@dataclass(frozen=True)
class Laptop:
    """`bin` has a `broker` whose `dev` is the running one, and a `curl`."""

    url: str
    directory: Path
    bin: Path

    def here(self, text: str) -> str:
        """What a document shows, with the address it shows replaced by that of the running broker."""
        return text.replace(_ADDRESS, self.url)

    def run(self, command: list[str], text: str, *, cwd: Path) -> subprocess.CompletedProcess[str]:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
        environ["PATH"] = f"{self.bin}:{environ['PATH']}"
        directory = cwd / ".broker-dev"
        if not directory.exists():
            directory.symlink_to(self.directory)
        return subprocess.run(
            command,
            input=self.here(text),
            cwd=cwd,
            env=environ,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )


@pytest.fixture
def laptop(tmp_path_factory):
    """A new one for each test: what one document locks down must not stop the next."""
    directory = tmp_path_factory.mktemp("laptop")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    programs = directory / "bin"
    programs.mkdir()
    broker = shlex.quote(str(_BROKER))
    _program(
        programs / "broker",
        f'if [ "$1" = dev ]; then shift; exec {broker} dev --port {port} "$@"; fi\nexec {broker} "$@"',
    )
    _program(programs / "curl", f'exec {shlex.quote(sys.executable)} {shlex.quote(str(_CURL))} "$@"')
    log = directory / "broker.log"
    with log.open("wb") as stream:
        process = subprocess.Popen([_BROKER, "dev", "--port", str(port)], cwd=directory, stderr=stream)
    try:
        _wait_for(url, process, log)
        yield Laptop(url, directory / ".broker-dev", programs)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _STARTED_WITHIN_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise RuntimeError(f"broker dev did not start:\n{log.read_text()}")


def _program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
