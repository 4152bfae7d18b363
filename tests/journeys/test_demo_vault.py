"""`make demo-vault` as its audience sees it: to a file, on a terminal, interrupted, with a Vault that ends nothing."""

import json
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psycopg
import pytest

from demo.screen import Screen
from demo.wire import Exchange
from tests.journeys.test_demo import ROOT, Terminal, holds_a_token, processes_about, run, shell
from tests.processes import until

DEMO = (sys.executable, "-m", "demo.vault")
# Longer than that of `make demo`: three servers, on a machine that may do much else.
PATIENCE_S = 240

STEPS = (
    "An administrator sets up OpenBao and the database",
    "The set-up is proven, with the broker's own token",
    "A task opens, and an agent gets a database login",
    "The agent queries the database",
    "A request beyond policy is refused, and told why",
    "What OpenBao and PostgreSQL say is alive",
    "The task ends, and the login with it",
    "The receipt says when it died, and the trail how it lived",
    "kill -9, in the middle of 20 requests",
)
# As OpenBao makes tokens and passwords.
_TOKEN = re.compile(r"\b(?:s|hvs|b)\.[A-Za-z0-9]{8,}")
_PASSWORD = re.compile(r"\"password\": \"(?!•+\")")


@pytest.fixture
def place():
    """Where the demo makes its directory, so that one it leaves is seen; and that nothing of it still runs."""
    # Not pytest's own: nobody else may enter that, and PostgreSQL does not run as root.
    with tempfile.TemporaryDirectory(prefix="broker-demo-test-") as directory:
        made = Path(directory)
        made.chmod(0o755)
        yield made
        assert list(made.iterdir()) == []
        assert processes_about(made) == []


def test_it_plays_the_main_job_with_a_database_login_to_a_file_and_leaves_nothing_behind(place):
    done = run(place, DEMO, patience_s=PATIENCE_S)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    said = done.stdout
    assert re.findall(r"^ (\d)  (.*?) ─", said, re.MULTILINE) == [(str(n), s) for n, s in enumerate(STEPS, start=1)]
    for words in (
        "auth/approle/role/jit-broker",
        "the broker cannot write policies",
        '"policies": ["orders-read"]',
        '"state": "held"',
        "Example Bakery",
        "permission denied for table orders",
        "ask for at most that",
        '"keys": [',
        "terminating connection due to administrator command",
        "password authentication failed",
        "there is none",
        "0 rows",
        "ended 1   confirmed dead 1   outstanding 0",
        "lease.released",
        "All nine steps went as they should.",
    ):
        assert words in said, words
    assert "What to try next" not in said
    # No token and no password, no colour codes, and no line that a page of 100 columns would break.
    assert "eyJ" in said and "••••" in said
    assert not holds_a_token(said)
    assert not _TOKEN.search(said) and not _PASSWORD.search(said)
    assert said.replace("\n", "").isprintable()
    assert max(map(len, said.splitlines())) <= 100


@pytest.fixture
def terminal(place):
    opened = []

    def open_terminal():
        opened.append(Terminal(place, DEMO))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.close()


def test_on_a_terminal_it_stays_up_with_commands_that_work_until_ctrl_c(terminal, place):
    demo = terminal()
    said = demo.read_until("until you press Ctrl-C", patience_s=PATIENCE_S)
    assert "\x1b[" in demo.said
    assert not holds_a_token(said) and not _TOKEN.search(said) and not _PASSWORD.search(said)
    story, _, advice = said.partition("What to try next")
    assert max(len(line) for line in story.splitlines()) <= 80
    commands = "\n".join(line for line in advice.splitlines()[1:-1] if not line.startswith("    "))
    assert max(len(line) for line in commands.replace(str(place), "/tmp").splitlines()) <= 80
    setup, own_task, complete, owed = re.split(r"\n\n+", commands.strip())[:4]
    [port] = re.findall(r"127\.0\.0\.1:(\d+), database orders", advice)

    first = shell(f"{setup}\n{own_task} --json\necho\necho task $TASK")
    issued = json.loads(first[: first.rindex("task ")])
    login, of_grant = issued["credential"]["data"], f"--grant {issued['grant']['id']}"
    at = f"host=127.0.0.1 port={port} dbname=orders user={login['username']} password={login['password']}"
    with psycopg.connect(at) as session:
        assert session.execute("SELECT count(*) FROM orders").fetchone() == (3,)
    second = shell(f"{setup}\nTASK={first.split()[-1]}\n{complete}")
    assert "completed" in second
    # The answer waits two seconds for the death at most, which on a busy machine may be too few.
    until(lambda: "released" in shell(f"{setup}\n{owed} {of_grant}"), what="the login's end", within_s=PATIENCE_S)
    with pytest.raises(psycopg.OperationalError, match="authentication failed"):
        psycopg.connect(at)

    assert demo.end(signal.SIGINT) == 0
    assert "their directory is removed" in demo.plain
    assert "Traceback" not in demo.plain


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("starting OpenBao", signal.SIGINT),
        ("sets up OpenBao", signal.SIGTERM),
        ("The agent queries", signal.SIGHUP),
        ("kill -9", signal.SIGINT),
    ],
)
def test_interrupted_it_ends_what_it_started_and_says_that_it_did_not_finish(terminal, moment, number):
    demo = terminal()
    demo.read_until(moment, patience_s=PATIENCE_S)
    assert demo.end(number) == 128 + number
    assert "their directory is removed" in demo.plain
    assert "Traceback" not in demo.plain


# The broker as it is; but after the set-up, Vault says that a user has ended and has done nothing.
_ENDS_NOTHING = """
import os, subprocess, sys
import httpx
real = {broker!r}
if "--apply" not in sys.argv:
    os.execv(real, [real, *sys.argv[1:]])
code = subprocess.call([real, *sys.argv[1:]])
role = os.environ["VAULT_ADDR"] + "/v1/database/roles/jit-orders-ro"
headers = {{"X-Vault-Token": os.environ["VAULT_TOKEN"]}}
changed = httpx.post(role, headers=headers, json={{"db_name": "jit-orders-ro", "revocation_statements": ["SELECT 1"]}})
sys.exit(code if changed.is_success else 9)
"""
_REFUSES = """
import sys
print("[bold]Vault[/bold] refused", file=sys.stderr)
sys.exit(3)
"""


@pytest.fixture
def with_broker(tmp_path):
    """A command that plays the demo with another `broker` beside its Python: the lines of a Python program."""

    def beside(program):
        bin_ = tmp_path / "venv" / "bin"
        bin_.mkdir(parents=True)
        (bin_ / "python").symlink_to(sys.executable)
        (bin_.parent / "pyvenv.cfg").write_text((Path(sys.prefix) / "pyvenv.cfg").read_text())
        (bin_.parent / "lib").symlink_to(Path(sys.prefix) / "lib")
        (bin_ / "broker").write_text(f"#!{sys.executable}\n{program}")
        (bin_ / "broker").chmod(0o700)
        return (str(bin_ / "python"), "-m", "demo.vault")

    return beside


def test_a_login_that_outlives_its_task_fails_the_demo_whatever_the_receipt_says(place, with_broker):
    program = _ENDS_NOTHING.format(broker=str(Path(sys.executable).with_name("broker")))
    done = run(place, with_broker(program), patience_s=PATIENCE_S)
    assert done.returncode == 1, done.stdout + done.stderr
    told = " ".join(done.stdout.split())
    assert "The demo failed. in step 7: expected that the open session is cut, but:" in told
    assert "went as they should" not in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_command_that_fails_is_shown_with_its_own_words(place, with_broker):
    done = run(place, with_broker(_REFUSES), patience_s=PATIENCE_S)
    assert done.returncode == 1
    assert "in step 1: expected `broker vault setup` to succeed, but:" in " ".join(done.stdout.split())
    assert "│ [bold]Vault[/bold] refused" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_without_openbao_it_says_how_to_get_it(place):
    hidden = (
        "import importlib.util, runpy; importlib.util.find_spec = lambda name: None; import demo.vault.__main__ as m"
    )
    done = subprocess.run(
        (sys.executable, "-c", f"{hidden}; raise SystemExit(m.main())"),
        cwd=ROOT,
        env={"TMPDIR": str(place), "PATH": "/usr/bin:/bin"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 1
    assert "make demo-vault" in " ".join(done.stdout.split())


@pytest.mark.parametrize("show", [("data",), ("data.password",), ("data.list",)])
def test_a_password_is_masked_wherever_it_stands(capsys, show):
    came = {"data": {"username": "u", "password": "hunter2", "list": [{"password": "hunter2"}]}}
    exchange = Exchange(
        method="GET",
        path="/",
        to="somebody",
        authorization="Bearer s.hunter2hunter2",
        sent={"password": "hunter2"},
        status=200,
        came=came,
        took_ms=1,
        answered_at=0,
    )
    Screen().exchange(exchange, sent_by="it", show=show)
    said = capsys.readouterr().out
    assert "•" in said and "hunter2" not in said
