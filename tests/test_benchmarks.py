"""What `make bench` says of a peer is shown first, on a real one, and not said where it cannot be."""

import json
import os
import tempfile
from pathlib import Path

import pytest

from benchmarks import load, openbao
from benchmarks.__main__ import options_from


@pytest.fixture
def directory(monkeypatch):
    """A short path, for the socket of PostgreSQL. Starting one changes the environment, which is put back."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", os.environ.get("XDG_RUNTIME_DIR", ""))
    with tempfile.TemporaryDirectory(prefix="broker-tests-") as made:
        yield Path(made)


def audited(token: str | None, *, path: str = "auth/jwt/login", type: str = "response", kind: str = "service") -> str:
    auth = {"client_token": token, "accessor": f"accessor of {token}", "token_type": kind} if token else {}
    return json.dumps({"type": type, "request": {"path": path}, "auth": auth})


def test_a_token_of_a_login_is_counted_once_and_nothing_else_is():
    audit = [
        audited("one"),
        audited("one"),
        audited("two"),
        audited(None),
        audited("asked for", type="request"),
        audited("of the administrator", path="auth/token/create"),
        audited("that no store knows", kind="batch"),
    ]
    assert openbao.tracked_tokens(audit) == {"one", "two"}


def test_logins_of_a_real_peer_are_measured_and_their_tokens_are_real(directory):
    figures = openbao.measure_logins(directory / "logins", seconds=0.5, life_s=20)
    assert figures.requests > 0
    assert figures.failed == 0


def test_logins_whose_tokens_nothing_tracks_are_no_figure(directory, monkeypatch):
    administer = openbao.OpenBao.root

    def with_batch_tokens(self, method, path, body=None):
        more = {"token_type": "batch"} if path.startswith("auth/jwt/role/") else {}
        return administer(self, method, path, {**body, **more} if body else None)

    monkeypatch.setattr(openbao.OpenBao, "root", with_batch_tokens)
    with pytest.raises(SystemExit, match="its audit file has 0 new tokens"):
        openbao.measure_logins(directory / "logins", seconds=0.5, life_s=20)


def test_a_revocation_is_over_when_no_child_is_left(directory):
    ended = openbao.measure_revocation(directory / "revocation", 50)
    assert ended.count == 50
    assert ended.seconds > 0


def test_a_revocation_that_leaves_children_alive_is_no_figure(directory, monkeypatch):
    administer = openbao.OpenBao.root

    def orphaning(self, method, path, body=None):
        return administer(self, method, path.replace("auth/token/revoke", "auth/token/revoke-orphan"), body)

    monkeypatch.setattr(openbao.OpenBao, "root", orphaning)
    monkeypatch.setattr(openbao, "REVOKED_WITHIN_S", 2)
    with pytest.raises(SystemExit, match="50 children of a revoked token are still there"):
        openbao.measure_revocation(directory / "revocation", 50)


def test_a_peer_that_does_not_start_says_why(directory, monkeypatch):
    monkeypatch.setattr(openbao, "CONFIGURATION", openbao.CONFIGURATION.replace('"postgresql"', '"parchment"'))
    with pytest.raises(SystemExit, match=r"(?s)OpenBao did not start.*parchment"):
        openbao.measure_revocation(directory / "revocation", 50)


def test_ours_is_told_as_a_multiple_of_theirs():
    ours = load.Figures(requests=10, failed=0, per_second=2000, p50=10, p99=40)
    theirs = load.Figures(requests=10, failed=0, per_second=1600, p50=15, p99=50)
    assert openbao.rates_beside(ours, theirs) == "1.25 × its rate, 0.80 × its p99"
    of_ours, of_theirs = load.Ended(count=5_000, seconds=1), load.Ended(count=10_000, seconds=36)
    assert openbao.ends_beside(of_ours, of_theirs) == "18.0 × as fast"


def test_a_peer_is_not_measured_beside_another_store(capsys):
    with pytest.raises(SystemExit):
        options_from(["--peer", "openbao", "--only", "sqlite"])
    assert "leave out --only sqlite" in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_asked_for_with_the_command_that_installs_it(capsys, monkeypatch):
    monkeypatch.setattr(openbao, "is_installed", lambda: False)
    with pytest.raises(SystemExit):
        options_from(["--peer", "openbao"])
    assert 'make bench ARGS="--peer openbao"' in capsys.readouterr().err
    assert options_from([]).peer is None
