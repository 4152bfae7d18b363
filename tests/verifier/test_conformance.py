"""`broker conformance verifier` against our own doors as real processes, and against verifiers that are broken."""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from broker.conformance.cases import CASES, Stage, Target, run
from broker.conformance.fake_broker import AUDIENCE, FakeBroker
from broker.sdk.verifier import Refused, Verifier
from tests.processes import BROKER, free_port

ROOT = Path(__file__).parents[2]
BOUND_S = 4


@contextmanager
def serving(kind, issuer):
    port = free_port()
    command = [sys.executable, "-m", "tests.verifier.apps", kind, issuer, str(port), str(BOUND_S)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}/contacts"
    finally:
        process.terminate()
        process.wait(20)


def conformance(url, port, *more):
    command = [BROKER, "conformance", "verifier", url, "--listen", f"127.0.0.1:{port}", "--bound", str(BOUND_S), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("kind", ["flask", "asgi"])
def test_our_own_doors_pass_every_case(kind):
    port = free_port()
    with serving(kind, f"http://127.0.0.1:{port}") as url:
        done = conformance(url, port, "--json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    report = json.loads(done.stdout)
    assert (report["failed"], report["passed"]) == (0, len(CASES))
    assert all(set(case) == {"name", "passed", "expected", "observed", "seconds"} for case in report["cases"])


def test_the_report_is_a_table_for_people_and_a_failure_is_an_exit_code():
    port = free_port()
    with serving("flask", f"http://127.0.0.1:{port}") as url:
        done = conformance(url, port, "--only", "token: good", "--audience", "https://mail.example/api")
    assert done.returncode == 1
    assert "FAIL\ttoken: good\taccepted\ta good token is not accepted any more" in done.stdout
    assert "cases failed" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["http://127.0.0.1:1/x", "--wait", "0"], 3),
        (["nowhere", "--wait", "0"], 2),
        (["http://127.0.0.1:1/x", "--only", "nothing of that name"], 2),
        (["http://127.0.0.1:1/x", "--listen", "somewhere"], 2),
        (["http://127.0.0.1:1/x", "--bound", "99"], 2),
    ],
)
def test_wrong_usage_and_nobody_there_have_their_own_codes(arguments, code):
    command = [BROKER, "conformance", "verifier", *arguments]
    if "--listen" not in arguments:
        command += ["--listen", "127.0.0.1:0"]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == code


def test_names_are_told_apart():
    assert len({case.name for case in CASES}) == len(CASES)


class Broken(Stage):
    """A verifier in this process, with one guard taken out."""

    def __init__(self, broker, answer):
        super().__init__(broker, Target(url=f"{AUDIENCE}/contacts", bound_s=BOUND_S))
        self._answer = answer

    def ask(self, token, *, scheme="Bearer", proof=None):
        try:
            self._answer(f"{scheme} {token}", proof)
        except Refused as refused:
            return "refused", f"refused with {refused.status}"
        return "accepted", "accepted with 200"


@pytest.fixture
def stage():
    broker = FakeBroker(every_s=0.2)
    verifiers = []

    def make(**settings):
        settings = {"token_source": "x", "bound_s": BOUND_S} | settings
        verifier = Verifier(broker.url, AUDIENCE, **settings)
        verifiers.append(verifier)

        def answer(header, proof):
            return verifier.check(header, "GET", f"{AUDIENCE}/contacts", proof, "contacts:read")

        return verifier, Broken(broker, answer)

    yield make
    for each in verifiers:
        each.close()
    broker.close()


def failed(stage, *names):
    return [each.name for each in run(stage, [case for case in CASES if case.name in names]) if not each.passed]


def test_a_verifier_that_never_asks_whether_a_token_was_revoked_fails(stage, monkeypatch):
    monkeypatch.setattr(Verifier, "_missing_proof", lambda *_: None)
    _, broken = stage(token_source=None)
    names = ["revoked: a grant", "feed: silent for longer than the bound", "status list: stale"]
    assert failed(broken, "token: good", *names) == names


def test_a_verifier_that_takes_proofs_twice_fails(stage):
    class Forgetful:
        def first(self, key, keep_s):
            return True

    _, broken = stage(once=Forgetful())
    assert failed(broken, "dpop: replayed", "dpop: good") == ["dpop: replayed"]


def test_a_verifier_that_looks_at_no_signature_fails(stage, monkeypatch):
    monkeypatch.setattr("broker.sdk.verifier.jose.Key.verifies", lambda *_: True)
    _, broken = stage()
    assert "token: an unknown key under a known name" in failed(
        broken, "token: an unknown key under a known name", "token: good"
    )


def test_a_verifier_that_refuses_everybody_fails(stage):
    _, broken = stage(algorithms=["EdDSA"])
    assert failed(broken, "token: good") == ["token: good"]


def test_a_verifier_that_falls_over_fails_where_a_refusal_was_expected(stage):
    _, broken = stage()
    broken.ask = lambda token, **_: ("accepted", "") if len(token) < 1000 else ("broken", "answered 500")
    assert failed(broken, "token: too large") == ["token: too large"]
