"""`make demo` as its audience sees it: to a file, on a terminal, interrupted, with a broker that misbehaves."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import weakref
from pathlib import Path

import httpx
import pytest

from broker.sdk import Refused
from demo.expect import DemoFailed, answer, expect, refusal
from demo.stage import Stopped, taking_signals

ROOT = Path(__file__).parents[2]
DEMO = (sys.executable, "-m", "demo")
PATIENCE_S = 90
WHOLE_TOKEN = re.compile(r"ey[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}")

STEPS = (
    "An orchestrator opens a task",
    "An agent proves what it is, and gets a credential",
    "The API accepts a call",
    "A request beyond policy is refused, and told why",
    "The orchestrator completes the task",
    "The same call is now refused",
    "The receipt, and what the auditor sees",
)


@pytest.fixture
def place(tmp_path):
    """Where the demo makes its directories, so that one it leaves is seen; and that nothing of it still runs."""
    made = tmp_path / "tmp"
    made.mkdir()
    yield made
    assert list(made.iterdir()) == []
    assert processes_about(made) == []


def environment(place, **more):
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    return kept | {"TMPDIR": str(place), "TERM": "xterm-256color"} | more


def holds_a_token(said):
    # One that is wrapped beside its bar is whole all the same.
    return WHOLE_TOKEN.search(re.sub(r"[\s│]+", "", said))


def processes_about(place):
    listed = subprocess.run(("ps", "-A", "-o", "command"), capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if str(place) in line]


def run(place, command=DEMO, *, patience_s=PATIENCE_S, **more):
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(place, **more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=patience_s,
    )


def test_it_plays_the_main_job_to_a_file_and_leaves_nothing_behind(place):
    done = run(place)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    said = done.stdout
    # Its steps, numbered, in order.
    assert re.findall(r"^ (\d)  (.*?) ─", said, re.MULTILINE) == [(str(n), s) for n, s in enumerate(STEPS, start=1)]
    for words in (
        "← 201 Created",
        '"state": "active"',
        '"policies": ["crm-read"]',
        "← 200 OK",
        "Example Bakery",
        '"introspection": "active"',
        "← 403 Forbidden",
        "policy 'crm-write-bound' allows contacts:write",
        "context.sender_bound",
        '"outcome": "completed"',
        "← 401 Unauthorized",
        '"introspection": "not active"',
        "ended 2   confirmed dead 0   outstanding 2",
        "signature was checked",
        "grant.denied",
        "task.completed",
    ):
        assert words in said, words
    assert re.search(r"Refused \d+ ms after the task was completed", said)
    assert "What to try next" not in said
    # No token whole, no colour codes and cursor tricks, and no line that a page of 100 columns would break.
    assert "eyJ" in said
    assert not holds_a_token(said)
    assert said.replace("\n", "").isprintable()
    assert max(map(len, said.splitlines())) <= 100


class Terminal:
    """The demo on a terminal of its own, 80 columns wide."""

    def __init__(self, place, command=DEMO, **more):
        self.master, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.running = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(place, **more),
            stdin=end,
            stdout=end,
            stderr=end,
            start_new_session=True,
        )
        os.close(end)
        self.said = ""

    def read_until(self, words, *, patience_s=PATIENCE_S):
        """Everything it said once it said these words; without colours."""
        self._read(words, patience_s=patience_s)
        assert words in self.plain, f"{words!r} was not said before it ended; there was:\n{self.plain}"
        return self.plain

    def _read(self, words, *, patience_s=PATIENCE_S):
        deadline = time.monotonic() + patience_s
        while words not in self.plain:
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{words!r} did not come; there was:\n{self.plain}"
            try:
                more = os.read(self.master, 65536)
            except OSError:  # how Linux says that the other end is closed
                more = b""
            if not more:
                break
            self.said += more.decode()

    @property
    def plain(self):
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.said).replace("\r\n", "\n")

    def end(self, number):
        self.running.send_signal(number)
        self._read("\0never said")
        return self.running.wait(PATIENCE_S)

    def close(self):
        if self.running.poll() is None:
            self.running.terminate()
            self.running.wait(PATIENCE_S)
        os.close(self.master)


@pytest.fixture
def terminal(place):
    opened = []

    def open_terminal(**more):
        opened.append(Terminal(place, **more))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.close()


def test_on_a_terminal_it_stays_up_with_commands_that_work_until_ctrl_c(terminal, place):
    demo = terminal()
    said = demo.read_until("until you press Ctrl-C")
    assert "\x1b[" in demo.said
    assert not holds_a_token(said)
    story, _, advice = said.partition("What to try next")
    assert max(len(line) for line in story.splitlines()) <= 80
    # What is indented is said about the commands, what is not are the commands.
    commands = "\n".join(line for line in advice.splitlines()[1:-1] if not line.startswith("    "))
    setup, own_task, incident, receipt = re.split(r"\n\n+", commands.strip())[:4]
    assert max(len(line) for line in commands.replace(str(place), "/tmp").splitlines()) <= 80
    # The call is made here and not by curl, which is not on every machine.
    call = re.search(r'^curl -H "Authorization: Bearer \$CREDENTIAL" (http://\S+)$', own_task, re.MULTILINE)
    own_task = own_task.replace(call[0], 'echo "credential $CREDENTIAL"')
    revoke = incident.splitlines()[1]
    assert "--yes" in revoke and incident.splitlines()[2] == call[0]

    first = shell(f"{setup}\n{own_task}")
    credential = {"Authorization": f"Bearer {re.search(r'^credential (.+)$', first, re.MULTILINE)[1]}"}
    assert httpx.get(call[1], headers=credential, trust_env=False).status_code == 200
    second = shell(f"{setup}\n{revoke}\n{receipt}")
    assert httpx.get(call[1], headers=credential, trust_env=False).status_code == 401
    assert "1 ended" in second and "completed" in second

    assert demo.end(signal.SIGINT) == 0
    assert "their directory is removed" in demo.plain
    assert "Traceback" not in demo.plain


def shell(script):
    done = subprocess.run(("sh", "-ec", script), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["starting", "opens a task"])
def test_interrupted_it_ends_what_it_started_and_says_that_it_did_not_finish(terminal, moment, number):
    demo = terminal()
    demo.read_until(moment)
    assert demo.end(number) == 128 + number
    assert "their directory is removed" in demo.plain
    assert "Traceback" not in demo.plain


def test_a_signal_that_comes_while_python_drops_what_is_raised_is_taken_all_the_same():
    class Kept:
        pass

    kept = Kept()
    dropping = weakref.ref(kept, lambda _gone: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped), taking_signals():
        del kept
        assert dropping() is None
        threading.Event().wait(PATIENCE_S)


@pytest.fixture
def with_broker(tmp_path):
    """A command that plays the demo with another `broker` beside its Python: the lines of a Python program."""

    def beside(program):
        bin_ = tmp_path / "venv" / "bin"
        bin_.mkdir(parents=True)
        (bin_ / "python").symlink_to(sys.executable)
        (bin_.parent / "pyvenv.cfg").write_text((Path(sys.prefix) / "pyvenv.cfg").read_text())
        (bin_.parent / "lib").symlink_to(Path(sys.prefix) / "lib")
        broker = bin_ / "broker"
        broker.write_text(f"#!{sys.executable}\n{program}")
        broker.chmod(0o700)
        return (str(bin_ / "python"), "-m", "demo")

    return beside


def test_a_broker_that_does_not_start_is_shown_with_its_own_last_words(place, with_broker):
    program = "import sys; print('[bold]chapter[/bold] one'); print('the port is taken', file=sys.stderr); sys.exit(3)"
    done = run(place, with_broker(program))
    assert done.returncode == 1
    assert "expected the broker to run, but: it ended with 3" in done.stdout
    assert "The last lines of the log of the broker:" in done.stdout
    assert "│ [bold]chapter[/bold] one" in done.stdout
    assert "│ the port is taken" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


SAYS_YES_TO_ALL = """
import http.server, sys
print("yes to all", flush=True)

class Yes(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")
    do_POST = do_GET

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Yes).serve_forever()
"""


def test_a_broker_that_answers_something_else_fails_the_demo_in_that_step(place, with_broker):
    done = run(place, with_broker(SAYS_YES_TO_ALL))
    assert done.returncode == 1
    assert "The demo failed. in step 1: expected an open task, but:" in done.stdout
    assert "│ yes to all" in done.stdout
    assert "went as they should" not in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_without_the_broker_command_it_says_how_to_get_it(place, with_broker, tmp_path):
    command = with_broker("")
    (tmp_path / "venv" / "bin" / "broker").unlink()
    done = run(place, command)
    assert done.returncode == 1
    assert "make demo" in done.stdout


def test_an_expectation_says_what_it_was_and_what_came():
    expect("a dead credential", True, "one")
    with pytest.raises(DemoFailed, match="expected a dead credential, but: a live one"):
        expect("a dead credential", False, "a live one")


def test_a_refusal_where_an_answer_was_expected_fails_the_demo():
    def refuses():
        raise Refused("policy_denied", "Policy does not allow it", "not at night")

    assert answer("a number", lambda: 7) == 7
    with pytest.raises(DemoFailed, match="expected a number, but: Policy does not allow it: not at night"):
        answer("a number", refuses)
    with pytest.raises(DemoFailed, match="expected a number, but: ConnectError"):
        answer("a number", lambda: (_ for _ in ()).throw(httpx.ConnectError("")))
    assert refusal("a refusal", refuses).code == "policy_denied"
    with pytest.raises(DemoFailed, match="expected a refusal, but: it was allowed"):
        refusal("a refusal", lambda: 7)
