"""What `make bench` says of a real OpenBao is shown first, and not said where it cannot be."""

import json
import os
import tempfile
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from benchmarks import client, decisions, load, openbao, secrets, verifying
from benchmarks.__main__ import open_task, options_from
from benchmarks.servers import RESOURCE, bench_settings, broker_on, postgres, prepare


@pytest.fixture
def directory(monkeypatch):
    """A short path, for the socket of PostgreSQL. Starting one changes the environment, which is put back."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", os.environ.get("XDG_RUNTIME_DIR", ""))
    with tempfile.TemporaryDirectory(prefix="broker-tests-") as made:
        yield Path(made)


def test_each_decision_that_is_measured_is_among_a_thousand_and_allowed(monkeypatch):
    monkeypatch.setattr(decisions, "_ROUNDS", 1)
    found = decisions.measure()
    assert (found.policies, found.decisions) == (1_000, 500)
    # It sees those that can concern it, and more than one.
    assert 2 < found.seen < 20


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
    monkeypatch.setattr(openbao, "ON_POSTGRESQL", openbao.ON_POSTGRESQL.replace('"postgresql"', '"parchment"'))
    with pytest.raises(SystemExit, match=r"(?s)OpenBao did not start.*parchment"):
        openbao.measure_revocation(directory / "revocation", 50)


def test_ours_is_told_as_a_multiple_of_theirs():
    ours = load.Figures(requests=10, failed=0, per_second=2000, p50=10, p99=40)
    theirs = load.Figures(requests=10, failed=0, per_second=1600, p50=15, p99=50)
    assert openbao.rates_beside(ours, theirs) == "1.25 × its rate, 0.80 × its p99"
    of_ours, of_theirs = load.Ended(count=5_000, seconds=1), load.Ended(count=10_000, seconds=36)
    assert openbao.ends_beside(of_ours, of_theirs) == "18.0 × as fast"


@pytest.fixture
def house(directory):
    """A real broker, a real OpenBao, and a real PostgreSQL where it makes logins."""
    with postgres(directory / "postgres") as url:
        with psycopg.connect(secrets.dsn(url), autocommit=True) as db:
            db.execute("CREATE DATABASE orders")
        target = sa.make_url(url).set(database="orders").render_as_string(hide_password=False)
        with secrets.outside(directory / "openbao", target) as outside:
            bench = secrets.with_secrets(
                bench_settings(directory / "sqlite", f"sqlite:///{directory}/broker.db"), outside
            )
            prepare(bench)
            with broker_on(bench), secrets.house(bench, outside) as house:
                yield house


def test_secrets_are_measured_beside_the_same_read_directly_and_none_is_left(house, monkeypatch):
    monkeypatch.setattr(secrets, "_WARM", 1)
    monkeypatch.setattr(secrets, "_AGENTS_A_TASK", 5)
    one = secrets.measure_one_client(house, 3)
    assert [figures.requests for figures in (one.direct, one.with_own_token, one.ours)] == [3, 3, 3]
    many = secrets.measure_many_clients(house, 0.3)
    for figures in (many.direct, many.with_own_token, many.ours):
        assert figures.requests > 0
        assert figures.failed == 0
    closed = secrets.measure_closing(house, 10)
    assert 0 < closed.authority_ended <= closed.dead
    assert closed.theirs > 0
    urgent = secrets.measure_backlog(house, 3000, 1)
    assert urgent.before >= urgent.left > 0
    assert len(urgent.one) == len(urgent.along_an_axis) == 1
    assert house.outside.logins() == 0


def test_an_end_that_leaves_logins_behind_is_no_figure(house, monkeypatch):
    monkeypatch.setattr(secrets.Outside, "revoke_all", lambda _self: None)
    with pytest.raises(SystemExit, match="PostgreSQL has 3 logins that were made for somebody, instead of 0"):
        secrets.measure_closing(house, 3)


def test_a_backlog_that_was_paid_too_soon_is_no_figure(house):
    with pytest.raises(SystemExit, match="0 debts were paid before the last revocation"):
        secrets.measure_backlog(house, 0, 1)


def test_what_the_broker_adds_is_told_beside_what_is_read_directly():
    def figures(per_second, p50, p99):
        return load.Figures(requests=10, failed=0, per_second=per_second, p50=p50, p99=p99)

    beside = secrets.Beside(direct=figures(50, 20, 30), with_own_token=figures(40, 25, 35), ours=figures(44, 29, 42.5))
    assert beside.added == "p50 +9.0 ms   p99 +12.5 ms"
    assert beside.rate == "0.88 × its rate, 1.10 × that with a token for each"


def test_checks_of_the_verifier_are_measured_while_the_feed_is_followed():
    measured = verifying.measure(200)
    for checks in (measured.seen, measured.new, measured.bound):
        assert 0 < checks.p50 <= checks.p99


def test_of_several_closings_the_one_in_the_middle_is_told():
    same = {"count": 2, "authority_ended": 0.1, "answered": 1, "theirs": 2, "theirs_with_tokens": 4}
    rounds = [secrets.Closed(dead=dead, **same) for dead in (2.2, 4.0, 1.8)]
    assert secrets.median_of(rounds).ratio == pytest.approx(1.1)


def test_the_start_of_a_program_is_measured_with_real_credentials(directory):
    bench = bench_settings(directory / "sqlite", f"sqlite:///{directory}/broker.db")
    prepare(bench)
    with broker_on(bench):
        task = open_task(bench, ["agent-0"])
        start = client.measure_start(bench.settings.issuer, [bench.token("agent-0")] * 3, task, RESOURCE)
        assert 0 < start.loading < start.beyond
        assert start.least <= start.beyond
        with pytest.raises(SystemExit, match="a program with the SDK failed"):
            client.measure_start(bench.settings.issuer, ["no.token.atall"], task, RESOURCE)
    told = client.Start(loading=0.03, beyond=0.0449, least=0.04).told
    assert told == "45 ms beyond the way (the best 40 ms), 30 ms of it loading"


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
    with pytest.raises(SystemExit):
        options_from(["--secrets"])
    assert 'make bench ARGS="--secrets"' in capsys.readouterr().err


def test_secrets_are_measured_by_themselves(capsys):
    with pytest.raises(SystemExit):
        options_from(["--peer", "openbao", "--secrets"])
    assert "leave out --peer openbao" in capsys.readouterr().err
