"""`broker exec` with real programs: what they are given, what they are told, and what is left of it afterwards."""

import contextlib
import fcntl
import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from broker.cli import delivery
from tests.cli.conftest import BROKER, CLEAN, READ
from tests.processes import until

LEDGER = ("--resource", "https://ledger.example/api", "--scope", "entries:post")


@pytest.fixture
def env(live_broker):
    """The environment of a program run by the summarizer's platform."""
    return {**CLEAN, "BROKER_URL": live_broker.url, "BROKER_TOKEN": live_broker.token("summarizer")}


@pytest.fixture
def started(env, task, tmp_path):
    """`broker exec` on its way, with pipes; killed at the end if it is still there."""
    running = []

    def start(*arguments, asked=READ, more=None, before=(), **options):
        command = [*before, *BROKER, "exec", "--task", task, *asked, *map(str, arguments)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        made = subprocess.Popen(command, env={**env, **(more or {})}, cwd=tmp_path, text=True, **pipes)
        running.append(made)
        return made

    yield start
    for made in running:
        if made.poll() is None:
            made.kill()
        made.communicate()


@pytest.fixture
def ended(started):
    """`broker exec` to its end: (exit code, stdout, stderr)."""

    def run(*arguments, **options):
        made = started(*arguments, **options)
        out, err = made.communicate(timeout=60)
        return made.returncode, out, err

    return run


@pytest.fixture
def grants(run, task):
    """The states of the grants of the task, as they are now."""

    def states():
        listed = json.loads(run("grant", "list", "--task", task, "--json", by="summarizer").stdout)
        return [grant["state"] for grant in listed["items"]]

    return states


def shell(script):
    return ("--", "sh", "-c", script)


# --- What it is given ------------------------------------------------------------------------------------------------


def test_a_program_finds_the_token_in_its_variable_and_the_grant_is_handed_back(ended, grants):
    code, out, err = ended("--env", "CRM_TOKEN", *shell('printf %s "$CRM_TOKEN"'))
    assert (code, err) == (0, "")
    assert re.fullmatch(r"eyJ[\w-]+\.[\w-]+\.[\w-]+", out)
    assert grants() == ["revoked"]


def test_how_the_caller_proves_itself_stays_with_the_caller(ended, env, tmp_path):
    (tmp_path / "token").write_text(env["BROKER_TOKEN"])
    show = shell('echo "${BROKER_TOKEN-none} ${BROKER_TOKEN_FILE-none} ${BROKER_URL-none}"')
    more = {"BROKER_TOKEN_FILE": str(tmp_path / "token")}
    assert ended("--env", "T", *show, more=more)[1] == f"none none {env['BROKER_URL']}\n"
    kept = ended("--env", "T", "--with-identity", *show, more=more)[1]
    assert kept == f"{env['BROKER_TOKEN']} {tmp_path / 'token'} {env['BROKER_URL']}\n"


def test_a_file_is_for_its_owner_alone_in_memory_and_goes_with_the_program(ended):
    script = 'stat -c "%a %U" "$F" "$(dirname "$F")"; stat -f -c %T "$F"; cat "$F"; echo; echo "$F"'
    code, out, err = ended("--file", "F", *shell(script))
    assert (code, err) == (0, "")
    of_file, of_directory, kind, token, path = out.splitlines()
    me = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    assert (of_file, of_directory, kind) == (f"600 {me}", f"700 {me}", "tmpfs")
    assert token.startswith("eyJ")
    assert not Path(path).exists() and not Path(path).parent.exists()


def test_a_descriptor_is_read_once(ended):
    code, out, err = ended("--fd", "T", *shell('cat "$T"; echo; cat "$T"; echo "."'))
    assert (code, err) == (0, "")
    assert re.fullmatch(r"eyJ\S+\n\.\n", out)


def test_the_program_is_told_nothing_else_and_inherits_no_other_descriptor(ended):
    script = 'ls /proc/self/fd | tr "\\n" " "; env | grep -c eyJ'
    _, out, _ = ended("--env", "T", *shell(script))
    assert out == "0 1 2 3 1\n"  # 3 is the directory that ls reads


def test_the_secret_is_in_nobodys_arguments_and_not_in_our_own_environment(started):
    made = started("--env", "CRM_TOKEN", *shell('echo "$CRM_TOKEN"; read go'))
    token = made.stdout.readline().strip()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            assert token.encode() not in (process / "cmdline").read_bytes()
    with contextlib.suppress(PermissionError):  # whom it is closed to sees nothing at all
        assert token.encode() not in Path(f"/proc/{made.pid}/environ").read_bytes()
    made.communicate("go\n", timeout=60)


# With its capabilities root looks into everybody; without them it is a user like others.
AS_ANYBODY = ("setpriv", "--bounding-set=-all") if os.geteuid() == 0 else ()


def test_the_program_cannot_read_our_token_out_of_our_process(started, env):
    """INV-30"""
    script = 'cat /proc/$PPID/environ; head -c 1 /proc/$PPID/mem; cat /proc/self/environ | tr "\\0" "\\n" | grep ^T='
    out, err = started("--env", "T", *shell(script), before=AS_ANYBODY).communicate(timeout=60)
    assert err.count("Permission denied") == 2
    # It is itself as it was without us, and sees into itself.
    assert out.startswith("T=eyJ")
    assert env["BROKER_TOKEN"] not in out + err


def test_we_leave_no_core_file_and_the_program_may(started):
    """INV-30"""
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    allowed = 4096 if most == resource.RLIM_INFINITY else min(4096, most)
    made = started(
        *("--env", "T", *shell("grep core /proc/$PPID/limits; cat /proc/self/limits | grep core")),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (allowed, most)),
    )
    ours, its = [line.split()[4:6] for line in made.communicate(timeout=60)[0].splitlines()]
    hard = "unlimited" if most == resource.RLIM_INFINITY else str(most)
    assert (ours, its) == (["0", hard], [str(allowed), hard])


def test_the_program_can_be_dumped_and_looked_into_as_without_us(started):
    asks = "import ctypes; print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"  # PR_GET_DUMPABLE
    made = started("--env", "T", "--", sys.executable, "-c", asks)
    assert made.communicate(timeout=60)[0] == "1\n"


def test_words_after_the_programs_name_are_its_own(ended):
    assert ended("--env", "T", "echo", "--json", "--help", "--")[1] == "--json --help --\n"


def test_what_is_not_asked_for_rightly_is_wrong_usage_and_asks_for_nothing(ended, grants):
    wrong = {
        ("true",): "how does the program take it",
        ("--env", "A", "--file", "A", "true"): "A is given twice",
        ("--env", "A=", "true"): "is not NAME",
        ("--env", "a-b", "true"): "is not NAME",
        ("--env", "A"): "Missing argument 'COMMAND...'",
    }
    for arguments, why in wrong.items():
        code, _, err = ended(*arguments)
        assert code == 2 and why in err
    assert grants() == []


def test_a_member_that_the_secret_has_not_is_said_with_those_it_has_and_handed_back(ended, grants):
    code, out, err = ended("--env", "P=password", *shell("echo started"))
    assert (code, out) == (1, "")
    assert "error: the secret has no member 'password'; it has: token" in err
    assert grants() == ["revoked"]


# --- How it ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "expected"), [("exit 0", 0), ("exit 41", 41), ("kill -KILL $$", 137), ("kill -SEGV $$", 139)]
)
def test_the_exit_code_is_the_programs(ended, grants, script, expected):
    assert ended("--env", "T", *shell(script))[0] == expected
    assert grants() == ["revoked"]


def test_a_program_that_cannot_be_started_says_so_as_a_shell_would(ended, grants, tmp_path):
    (tmp_path / "text").write_text("not a program")
    code, _, err = ended("--env", "T", "--", "no-such-program")
    assert code == 127 and "there is no program no-such-program" in err
    code, _, err = ended("--env", "T", "--", "./text")
    assert code == 126 and "./text cannot be started: Permission denied" in err
    assert grants() == ["revoked", "revoked"]


def test_a_refusal_starts_nothing(ended, run, task):
    run("task", "complete", task)
    code, out, err = ended("--env", "T", *shell("echo started"))
    assert (code, out) == (1, "") and "error:" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_goes_to_the_program_and_what_it_makes_of_it_counts(started, grants, number):
    name = signal.Signals(number).name.removeprefix("SIG")
    made = started("--env", "T", *shell(f'trap "echo told; exit 7" {name}; echo ready; while :; do read x; done'))
    assert made.stdout.readline() == "ready\n"
    assert grants() == ["active"]
    made.send_signal(number)
    out, _ = made.communicate(timeout=60)
    assert (made.returncode, out) == (7, "told\n")
    assert grants() == ["revoked"]


def test_a_program_that_a_signal_ends_ends_as_it_says(started, grants):
    made = started("--env", "T", *shell("echo ready; exec sleep 600"))
    assert made.stdout.readline() == "ready\n"
    made.terminate()
    made.communicate(timeout=60)
    assert made.returncode == 143
    assert grants() == ["revoked"]


def test_a_program_that_will_not_stop_keeps_its_credential_until_it_does(started, grants):
    made = started("--env", "T", *shell('trap "" TERM; echo ready; read go; echo done'))
    assert made.stdout.readline() == "ready\n"
    made.terminate()
    out, _ = made.communicate("go\n", timeout=60)
    assert (made.returncode, out) == (0, "done\n")
    assert grants() == ["revoked"]


def at_a_terminal():
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


# Says each signal that it gets, and ends with the last of them.
_LISTENING = """
import os, signal, sys
told = {signal.SIGINT, signal.SIGUSR1}
signal.pthread_sigmask(signal.SIG_BLOCK, told)
if sys.argv[1] == "apart":
    os.setpgid(0, 0)
print("ready", flush=True)
while (number := signal.sigwait(told)) != signal.SIGUSR1:
    print(number.name, flush=True)
print("over", flush=True)
"""


@pytest.mark.parametrize(("where", "times"), [("with us", 1), ("apart", 0)])
def test_what_a_terminal_says_is_the_terminals_to_say(started, where, times):
    """It tells both of us; passed on as well, an interrupt would count twice. One that left us shows what is passed."""
    controller, terminal = pty.openpty()
    ends = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    made = started("--env", "T", "--", sys.executable, "-c", _LISTENING, where, preexec_fn=at_a_terminal, **ends)
    os.close(terminal)
    seen = b""

    def until_said(text):
        nonlocal seen
        while text not in seen:
            seen += os.read(controller, 1024)

    until_said(b"ready")
    os.write(controller, b"\x03")
    until_said(b"SIGINT" if times else b"^C")
    # Signals are taken lowest number first: what is passed on of the interrupt comes before this.
    made.send_signal(signal.SIGUSR1)
    until_said(b"over")
    assert made.wait(60) == 0
    os.close(controller)
    assert seen.count(b"SIGINT") == times


def test_nohup_stays_nohup(started):
    made = started(
        "--env", "T", *shell("echo ready; read go; echo done"),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    assert made.stdout.readline() == "ready\n"
    made.send_signal(signal.SIGHUP)
    out, _ = made.communicate("go\n", timeout=60)
    assert (made.returncode, out) == (0, "done\n")


def test_where_we_are_killed_the_program_dies_too_and_the_next_one_removes_what_was_left(started, ended):
    made = started("--file", "F", *shell('echo $$ "$F"; exec sleep 600'))
    pid, path = made.stdout.readline().split()
    made.kill()
    made.wait(60)
    until(lambda: not Path(f"/proc/{pid}").exists() or _is_dead(pid), what="the program's end")
    assert Path(path).exists()
    # One that lives is left alone.
    other = started("--file", "F", *shell('echo "$F"; read go; cat "$F"'))
    kept = other.stdout.readline().strip()
    assert ended("--file", "F", "true")[0] == 0
    assert not Path(path).parent.exists()
    assert other.communicate("go\n", timeout=60)[0].startswith("eyJ")
    assert not Path(kept).exists()


def _is_dead(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"


def test_told_to_stop_before_there_is_a_program_takes_the_request_back(started, run, live_broker):
    opened = run("task", "open", "--purpose", "p", "--agent", "ledger-clerk", "--deadline", "1h", "--id-only").stdout
    made = started(
        *("--task", opened.strip(), "--env", "T", "--wait", "10m"),
        *shell("echo started"),
        asked=LEDGER,
        more={"BROKER_TOKEN": live_broker.token("ledger-clerk")},
    )
    assert "waiting for people: 0 of 2 have voted on apr_" in made.stderr.readline()
    made.terminate()
    out, _ = made.communicate(timeout=60)
    assert (made.returncode, out) == (143, "")
    [grant] = json.loads(run("grant", "list", "--task", opened.strip(), "--json", by="ledger-clerk").stdout)["items"]
    assert grant["state"] == "revoked"


def test_people_are_waited_for(started, run, live_broker):
    opened = run("task", "open", "--purpose", "p", "--agent", "ledger-clerk", "--deadline", "1h", "--id-only").stdout
    made = started(
        *("--task", opened.strip(), "--env", "T", "--wait", "10m"),
        *shell("echo started"),
        asked=LEDGER,
        more={"BROKER_TOKEN": live_broker.token("ledger-clerk")},
    )
    approval = re.search(r"apr_\w+", made.stderr.readline())[0]
    for person in ("ada", "bo"):
        run("approval", "approve", approval, by=person)
    out, _ = made.communicate(timeout=60)
    assert (made.returncode, out) == (0, "started\n")


def test_a_broker_that_is_away_at_the_end_costs_a_sentence_and_not_the_exit_code(tmp_path, live_broker, run, task):
    """Bounded: it does not wait for the broker to come back."""
    relay = subprocess.Popen(
        [sys.executable, "-c", _RELAY, live_broker.url.rpartition(":")[2]], stdout=subprocess.PIPE, text=True
    )
    try:
        url = f"http://127.0.0.1:{relay.stdout.readline().strip()}"
        env = {**CLEAN, "BROKER_URL": url, "BROKER_TOKEN": live_broker.token("summarizer")}
        command = [*BROKER, "exec", "--task", task, *READ, "--env", "T", *shell("echo up; read go; exit 5")]
        made = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert made.stdout.readline() == "up\n"
        relay.kill()
        relay.wait()
        _, err = made.communicate("go\n", timeout=30)
        assert made.returncode == 5
        assert "warning: the credential could not be handed back, and lives until it expires" in err
    finally:
        relay.kill()
        relay.communicate()


_RELAY = """
import socket, sys, threading
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
def carry(source, target):
    while data := source.recv(65536):
        target.sendall(data)
while True:
    client, _ = server.accept()
    broker = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    threading.Thread(target=carry, args=(client, broker), daemon=True).start()
    threading.Thread(target=carry, args=(broker, client), daemon=True).start()
"""


# --- Kept fresh ------------------------------------------------------------------------------------------------------


def test_a_file_is_renewed_in_time_and_always_whole(started, grants):
    made = started("--ttl", "4s", "--file", "F", *shell('echo "$F"; read go; cat "$F"'))
    path = Path(made.stdout.readline().strip())
    first, seen = path.read_text(), set()

    def another():
        seen.add(path.read_text())
        return len(seen) > 1

    until(another, what="a renewal")
    assert all(re.fullmatch(r"eyJ[\w-]+\.[\w-]+\.[\w-]+", token) for token in seen | {first})
    assert grants() == ["active"]
    out, err = made.communicate("go\n", timeout=60)
    assert (out in seen, err, made.returncode) == (True, "", 0)
    assert grants() == ["revoked"]


def test_a_task_that_ends_meanwhile_is_told_and_the_program_goes_on(started, run, task):
    made = started("--ttl", "4s", "--file", "F", *shell("echo up; read go; echo done"))
    assert made.stdout.readline() == "up\n"
    run("task", "complete", task)
    assert "warning: the credential has ended while the program runs" in made.stderr.readline()
    out, _ = made.communicate("go\n", timeout=60)
    assert (made.returncode, out) == (0, "done\n")


def test_a_variable_that_grew_old_is_told(started):
    made = started("--ttl", "1s", "--env", "T", *shell("echo up; read go"))
    assert made.stdout.readline() == "up\n"
    assert "the credential has expired while the program runs: --file is kept fresh" in made.stderr.readline()
    made.communicate("go\n", timeout=60)


# --- Forms of other programs' files ----------------------------------------------------------------------------------


class Login:
    token = None

    def __init__(self, **data):
        self.data = data

    def reveal_data(self):
        return self.data


def test_a_login_becomes_a_service_and_a_line_of_a_password_file():
    login = Login(username="jit:1", password="p\\w=#x")
    assert delivery.service_file(login) == "[broker]\nuser=jit:1\npassword=p\\w=#x\n"
    assert delivery.password_file(login) == "*:*:*:jit\\:1:p\\\\w=#x\n"


@pytest.mark.parametrize("bad", ["a\nhost=evil.test", "a\r", "a\0", " a", "a "])
def test_no_value_becomes_a_line_of_its_own(bad):
    """INV-31"""
    for login in (Login(username=bad, password="p"), Login(username="u", password=bad)):
        for render in (delivery.service_file, delivery.password_file):
            with pytest.raises(delivery.Undeliverable):
                render(login)


def test_a_members_text_is_itself_and_anything_else_json():
    login = Login(port=5432, chain=["a"], name="x")
    rendered = [delivery.member_of(name)(login) for name in ("port", "chain", "name")]
    assert rendered == ["5432", '["a"]', "x"]
    assert json.loads(delivery.whole(login)) == login.data


def test_what_no_variable_holds_and_no_descriptor_takes_is_refused():
    with (
        pytest.raises(delivery.Undeliverable, match="no variable holds"),
        delivery.delivered(delivery.Ways(variables={"A": delivery.member_of("a")}), Login(a="x\0y")),
    ):
        pass
    with (
        pytest.raises(delivery.Undeliverable, match="too long"),
        delivery.delivered(delivery.Ways(descriptors={"A": delivery.member_of("a")}), Login(a="x" * 2**20)),
    ):
        pass
