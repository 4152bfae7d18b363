"""`broker serve` with failpoints, and with a seeded bug if one is named; many of them, one after the other.

`python -m tests.crash.launcher` imports the broker once and then forks a process for each line of JSON it is given: a
crash programme starts more brokers than anybody else, and most of a start is importing. Each is a process group of its
own, with the command line of an operator. All that is added is added there: nothing in the product can be switched on.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NO_BUG = "-"


class Forked:
    """A process that is not our child, with what of `subprocess.Popen` its owner needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        # By its number alone we might wait for another one that got it later.
        self._handle = os.pidfd_open(pid)
        self._ended = False

    def poll(self) -> int | None:
        return self._exited(0)

    def wait(self, timeout: float) -> int:
        code = self._exited(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(["broker", "serve"], timeout)
        return code

    def _exited(self, timeout: float) -> int | None:
        """Not with which code: only its parent hears that."""
        if not self._ended:
            self._ended = bool(select.select([self._handle], [], [], timeout)[0])
            if self._ended:
                os.close(self._handle)
        return 0 if self._ended else None


class Launcher:
    """The process that forks brokers; for several threads."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._turn = threading.Lock()

    def launch(
        self, *, faults: Path, bug: str, command: list[str], environment: Mapping[str, str], log: Path
    ) -> Forked:
        asked = {"faults": str(faults), "bug": bug, "command": command, "log": str(log), "environment": environment}
        with self._turn:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            return Forked(int(self._process.stdout.readline()))


@contextmanager
def a_launcher(log: Path) -> Iterator[Launcher]:
    command = [sys.executable, "-m", "tests.crash.launcher"]
    with (
        log.open("ab") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        ) as process,
    ):
        # Its input ends with the block, and it with its input.
        yield Launcher(process)


@dataclass(frozen=True)
class Application:
    """What the broker's worker builds, in the worker: armed, and with the bug."""

    faults: str
    bug: str
    build: Any

    def __call__(self, *arguments: Any) -> Any:
        from tests.crash import bugs, failpoints

        if self.bug != NO_BUG:
            bugs.seed(self.bug)
        failpoints.arm(failpoints.Faults(Path(self.faults)))
        return self.build(*arguments)


def serve(asked: Mapping[str, Any]) -> None:
    """In the forked process: what `broker serve` does, to its end."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with open(os.devnull) as nothing, open(asked["log"], "ab") as log:
        for number, file in ((0, nothing), (1, log), (2, log)):
            os.dup2(file.fileno(), number)
    os.environ.update(asked["environment"])
    sys.argv = ["broker", *asked["command"]]

    from broker.cli import main, server

    server._application = Application(asked["faults"], asked["bug"], server._application)
    main()


def fork_as_told() -> None:
    # Imported here, once for all that are forked.
    for name in ("alembic.command", "broker.cli.server", "tests.crash.bugs", "tests.crash.failpoints"):
        importlib.import_module(name)

    # Nobody waits for them here; whoever asked for one holds a handle to it.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 1
            with contextlib.suppress(SystemExit):
                serve(json.loads(line))
                code = 0
            os._exit(code)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    from tests.crash import launcher

    # By its name and not as what was started, so that a worker that is spawned finds it.
    launcher.fork_as_told()
