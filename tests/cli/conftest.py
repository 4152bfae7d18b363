"""A real broker process, one a run, and the commands run against it as a person would."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from broker.cli import main
from broker.cli.dev import load_dev
from broker.config.development import dev_issuer
from broker.domain.clock import system_clock
from tests.processes import free_port

CRM = "https://crm.example/api"
BROKER = (sys.executable, "-c", "from broker.cli import main; main()")
_TOKEN = re.compile(r"eyJ[\w-]+\.[\w-]+\.[\w-]+")
# Whoever runs the tests may have a broker of their own.
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("BROKER")}


@contextlib.contextmanager
def process(*arguments, directory, env=None):
    """`broker …` as a process of its own, with its output in files; killed at the end if it is still there."""
    with (directory / "stdout").open("wb") as out, (directory / "stderr").open("wb") as err:
        started = subprocess.Popen([*BROKER, *arguments], cwd=directory, env=env or CLEAN, stdout=out, stderr=err)
        try:
            yield started
        finally:
            if started.poll() is None:
                started.send_signal(signal.SIGTERM)
                try:
                    started.wait(30)
                except subprocess.TimeoutExpired:
                    started.kill()
                    started.wait()


def until_ready(started, url, directory):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert started.poll() is None, (directory / "stderr").read_text()
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/readyz", trust_env=False).status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError((directory / "stderr").read_text())


@dataclass(frozen=True)
class LiveBroker:
    """Where a broker process serves, and its development issuer."""

    url: str
    directory: Path

    def token(self, name):
        return dev_issuer(self.directory).token(f"dev:{name}", self.url, system_clock())


@pytest.fixture(scope="session")
def live_broker(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cli")
    port = free_port()
    with process("dev", "--directory", "dev", "--port", str(port), directory=directory) as started:
        until_ready(started, f"http://127.0.0.1:{port}", directory)
        yield LiveBroker(f"http://127.0.0.1:{port}", directory / "dev")


@pytest.fixture
def configuration(tmp_path):
    """The file of a development configuration that nobody serves."""
    load_dev(tmp_path, 8080)
    return tmp_path / "broker.toml"


def command(*arguments, env=None, ends=0):
    """Run a command in this process; whatever it says to people holds no token."""
    cleared = {name: None for name in os.environ if name.startswith("BROKER")}
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], env={**cleared, **(env or {})})
    assert not isinstance(result.exception, Exception), result.exception
    assert result.exit_code == ends, result.stderr + result.stdout
    assert not _TOKEN.search(result.stderr)
    return result


@pytest.fixture
def run(live_broker):
    """`run("task", "list", by="crm-pipeline")` against the live broker; `ends` is the exit code."""

    def run(*arguments, by="crm-pipeline", env=None, ends=0):
        identity = {"BROKER_URL": live_broker.url, "BROKER_TOKEN": live_broker.token(by)}
        return command(*arguments, env={**identity, **(env or {})}, ends=ends)

    return run


@pytest.fixture
def task(run):
    """The id of a task the summarizer may work on."""
    opened = run(
        *("task", "open", "--purpose", "summarise the leads of May", "--agent", "summarizer"),
        *("--deadline", "1h", "--label", "team=crm", "--id-only"),
    )
    return opened.stdout.strip()


@pytest.fixture
def grant(run, task):
    """The id of a live grant of the summarizer."""
    asked = run("grant", "request", "--task", task, *READ, by="summarizer")
    return re.search(r"grt_\w+", asked.stdout)[0]


READ = ("--resource", CRM, "--scope", "contacts:read")
