"""What the demo plays on: a broker and a sample API, each a real process on loopback, and one directory for all.

Whatever happens, they are ended and the directory is removed: at the end, on a failure, on Ctrl-C, SIGTERM or SIGHUP.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import httpx

from broker.domain.clock import system_clock
from broker.providers.dev_issuer import DevIssuer
from broker.sdk import Client
from demo.expect import DemoFailed
from demo.sample_api import RESOURCE
from demo.wire import Wire

ROOT = Path(__file__).parents[1]

_READY_WITHIN_S = 60.0
_ENDS_WITHIN_S = 5.0
_LAST_WORDS = 15
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """Somebody told the demo to stop. Not an Exception, so that nothing takes it for an answer."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass(kw_only=True)
class Process:
    name: str
    url: str
    log: Path
    running: subprocess.Popen[bytes] = field(repr=False)
    ends_by: signal.Signals = signal.SIGTERM
    over: bool = False

    @property
    def pid(self) -> int:
        return self.running.pid

    def require_running(self) -> None:
        code = self.running.poll()
        if code is not None:
            raise self.failed(f"{self.name} to run", f"it ended with {code}")

    def failed(self, expected: str, came: str) -> DemoFailed:
        return DemoFailed(expected, came, whose=self.name, log=self.last_words())

    def last_words(self) -> list[str]:
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_WORDS:]

    def end(self) -> None:
        """Ask it to stop, and after a while do not ask. Its children go with it."""
        self.running.send_signal(self.ends_by)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.running.wait(_ENDS_WITHIN_S)
        self.kill()

    def kill(self) -> None:
        """As a power cut does: it and its children, at once. Afterwards its number may be somebody else's."""
        if self.over:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.running.wait()
        self.over = True


@dataclass(frozen=True, kw_only=True)
class Stage:
    directory: Path
    broker: Process
    crm: Process
    wire: Wire
    _issuer: DevIssuer = field(repr=False)

    def token(self, name: str) -> str:
        """The workload token of a principal, as its runtime would hand it to it."""
        return workload_token(self._issuer, name, self.broker.url)

    def client(self, name: str) -> Client:
        """The broker as this principal reaches it."""
        return Client(self.broker.url, token=self.token(name), http=self.wire, retry_deadline_s=5.0)

    def require_running(self) -> None:
        for process in (self.broker, self.crm):
            process.require_running()


@contextlib.contextmanager
def stage() -> Iterator[Stage]:
    """Both processes, started and ready."""
    with contextlib.ExitStack() as end:
        end.enter_context(taking_signals())
        root = temporary_directory(end)
        directory, token_file = root / "broker", root / "crm-api.token"
        broker_url, crm_url = (f"http://127.0.0.1:{port}" for port in free_ports(2))
        issuer = DevIssuer.create_or_load(directory)
        token_file.touch(mode=0o600)
        token_file.write_text(workload_token(issuer, "crm-api", broker_url))
        started = [
            start(end, "the broker", broker_url, root, broker_command(directory, broker_url)),
            start(end, "the sample API", crm_url, root, _crm_command(crm_url, broker_url, token_file)),
        ]
        for process, path in zip(started, ("/readyz", "/healthz"), strict=True):
            wait_until_ready(process, path)
        wire = end.enter_context(Wire({broker_url: "the broker", crm_url: "the CRM"}))
        broker, crm = started
        try:
            yield Stage(directory=directory, broker=broker, crm=crm, wire=wire, _issuer=issuer)
        except DemoFailed as problem:
            if not problem.log:
                problem.whose, problem.log = broker.name, broker.last_words()
            raise


def workload_token(issuer: DevIssuer, name: str, broker_url: str) -> str:
    return issuer.token(f"dev:{name}", broker_url, system_clock(), timedelta(hours=1))


def free_ports(count: int) -> list[int]:
    """Below those the system gives to outgoing connections: who is started again finds its port free."""
    found: list[int] = []
    # All of them open at once, so that none is given twice.
    with contextlib.ExitStack() as opened:
        while len(found) < count:
            each, port = opened.enter_context(socket.socket()), 20_000 + secrets.randbelow(12_000)
            with contextlib.suppress(OSError):
                each.bind(("127.0.0.1", port))
                found.append(port)
    return found


@contextlib.contextmanager
def taking_signals() -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal end the block with `Stopped`, so that what it holds is cleared away."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    def again(lost: sys.UnraisableHookArgs) -> None:
        # It came while Python ran a callback, as imports do, which drops what is raised in it: in a moment, again.
        if isinstance(lost.exc_value, Stopped):
            retry = threading.Timer(0.05, os.kill, (os.getpid(), lost.exc_value.number))
            retry.daemon = True
            retry.start()
        else:
            hook(lost)

    # One that is ignored stays so: nohup and a shell's background jobs mean it.
    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heard}
    hook, sys.unraisablehook = sys.unraisablehook, again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """A signal that comes meanwhile is taken afterwards: what was begun is not left half done."""
    came: list[int] = []
    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {each: signal.signal(each, lambda number, frame: came.append(number)) for each in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def broker_command(directory: Path, url: str) -> list[str]:
    broker = Path(sys.executable).with_name("broker")
    if not broker.exists():
        raise DemoFailed(
            f"the broker command beside {sys.executable}", "there is none: `make demo` installs it, and runs this demo"
        )
    return [str(broker), "dev", "--directory", str(directory), "--port", url.rpartition(":")[2]]


def _crm_command(url: str, broker_url: str, token_file: Path) -> list[str]:
    port = url.rpartition(":")[2]
    module = [sys.executable, "-m", "demo.sample_api"]
    return [*module, "--broker", broker_url, "--token-file", str(token_file), "--port", port, "--resource", RESOURCE]


def start(
    end: contextlib.ExitStack,
    name: str,
    url: str,
    root: Path,
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    ends_by: signal.Signals = signal.SIGTERM,
    account: pwd.struct_passwd | None = None,
) -> Process:
    """A process that ends with `end`; its log is in `root`. It has this `environment`, or our own, and runs as
    `account` where that is given."""
    log = root / f"{name.rpartition(' ')[2]}.log"
    # Nothing of what is on loopback goes through a proxy; PyJWT's client would ask the environment.
    direct = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as output, deferred_signals():
        running = subprocess.Popen(  # noqa: S603 - the demo's own commands, and nothing from outside
            command,
            cwd=ROOT if account is None else root,
            env=dict(os.environ if environment is None else environment) | direct,
            **_runs_as(account),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Ctrl-C is for the demo, which then ends what it started in order.
            start_new_session=True,
        )
        process = Process(name=name, url=url, log=log, running=running, ends_by=ends_by)
        end.callback(_end, process)
    return process


def _runs_as(account: pwd.struct_passwd | None) -> dict[str, Any]:
    """What `subprocess` has to be told."""
    return {} if account is None else {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": ()}


def _end(process: Process) -> None:
    with deferred_signals():
        process.end()


def temporary_directory(end: contextlib.ExitStack) -> Path:
    """A directory that is removed with `end`."""
    with deferred_signals():
        root = Path(tempfile.mkdtemp(prefix="broker-demo-"))
        end.callback(_remove, root)
    return root


def _remove(root: Path) -> None:
    with deferred_signals():
        shutil.rmtree(root)


def wait_until_ready(process: Process, path: str, *, ready: Collection[int] = (200,)) -> None:
    """Ask until it answers with one of the statuses in `ready`."""
    deadline = time.monotonic() + _READY_WITHIN_S
    with httpx.Client(trust_env=False, timeout=2.0) as http:
        while time.monotonic() < deadline:
            process.require_running()
            with contextlib.suppress(httpx.HTTPError):
                if http.get(process.url + path).status_code in ready:
                    return
            time.sleep(0.05)
    raise process.failed(f"{process.name} to be ready within {_READY_WITHIN_S:.0f} s", "it was not")
