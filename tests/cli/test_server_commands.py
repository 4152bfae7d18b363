"""The commands that hold a configuration: what they do, how they end, and that each failure is a sentence."""

import json
import re
import signal
import socket
import subprocess
import time
from datetime import timedelta

import httpx
import jwt
import pytest

from broker.config import load
from broker.config.development import dev_issuer
from broker.domain.grant import GrantRequest
from broker.services.tasks import TaskRequest
from broker.wiring import build
from tests.cli.conftest import BROKER, CLEAN, CRM, command, free_port, process, until_ready
from tests.processes import until

# --- check, migrate, apply ------------------------------------------------------------------------------------------


def test_check_counts_what_it_found(configuration):
    checked = json.loads(command("check", "--config", configuration, "--json").stdout)
    assert (checked["issuers"], checked["principals"], checked["resources"]) == (2, 10, 3)
    assert "nothing is wrong" in command("check", "--config", configuration).stdout


def test_check_says_everything_at_once(configuration):
    text = configuration.read_text()
    configuration.write_text(
        text.replace('listen = "', 'listne = "').replace('sensitivity = "internal"', "sensitivity = 1")
    )
    told = command("check", "--config", configuration, ends=1).stderr
    assert "2 things are wrong" in told and "listne" in told and "sensitivity" in told
    problems = json.loads(command("check", "--config", configuration, "--json", ends=1).stderr)["problems"]
    assert len(problems) == 2


def test_check_refuses_a_policy_that_names_what_does_not_exist(configuration):
    crm = configuration.parent / "policies" / "crm.cedar"
    crm.write_text(crm.read_text().replace('Agent::"summarizer"', 'Agent::"summariser"'))
    told = command("check", "--config", configuration, ends=1).stderr
    assert "crm.cedar" in told and "did you mean 'summarizer'?" in told


@pytest.mark.parametrize("name", ["check", "migrate", "apply", "serve", "scheduler", "policy check", "keys list"])
def test_a_configuration_that_is_missing_is_a_sentence(name, tmp_path):
    told = command(*name.split(), "--config", tmp_path / "none.toml", ends=1).stderr
    assert "none.toml" in told and "Traceback" not in told


@pytest.mark.parametrize("name", ["migrate", "apply", "serve", "scheduler", "keys list", "keys rotate"])
def test_a_database_that_does_not_answer_is_a_sentence(name, configuration):
    elsewhere = f"postgresql+psycopg://broker:hunter2@127.0.0.1:{free_port()}/broker"
    configuration.write_text(configuration.read_text().replace("sqlite:///broker.db", elsewhere))
    told = command(*name.split(), "--config", configuration, ends=1).stderr
    assert "did not answer" in told and "connection failed" in told
    assert "hunter2" not in told and len(told.splitlines()) == 1


@pytest.mark.parametrize("name", ["apply", "scheduler", "keys list", "serve --no-migrate"])
def test_a_database_that_was_not_migrated_says_what_to_run(name, configuration):
    assert "run `broker migrate`" in command(*name.split(), "--config", configuration, ends=1).stderr


class TestApplying:
    """What would end is shown, by `--dry-run` and before it is done at a terminal."""

    @pytest.fixture
    def live(self, configuration):
        """A configuration of which the file now forbids what a live grant was given."""
        command("migrate", "--config", configuration)
        command("apply", "--config", configuration)
        settings = load(configuration)
        broker, issuer = build(settings), dev_issuer(configuration.parent)
        now, standing = broker.clock(), broker.standing.now()

        def caller(name):
            token = issuer.token(f"dev:{name}", settings.issuer, now)
            return broker.authenticator.authenticate(token, standing.catalogue, now=now)

        asked = {"purpose": "summarise the leads of May", "agents": ("summarizer",), "deadline": timedelta(hours=1)}
        task = broker.tasks.open(TaskRequest(caller=caller("crm-pipeline"), **asked))
        scopes = frozenset({"contacts:read"})
        request = GrantRequest(caller=caller("summarizer"), task_id=task.id, resource=CRM, scopes=scopes)
        grant = broker.issuance.issue(request).grant
        broker.close()
        policies = configuration.parent / "policies" / "crm.cedar"
        policies.write_text(policies.read_text().replace("context.ttl_s <= 600", "context.ttl_s <= 60"))
        yield grant.id

    def test_a_dry_run_shows_what_would_end_and_applies_nothing(self, configuration, live):
        shown = json.loads(command("apply", "--config", configuration, "--dry-run", "--json").stdout)
        assert (shown["grants"], shown["ended"], shown["shortened"], shown["undecided"]) == (1, 1, 0, 0)
        assert (shown["by_agent"], shown["by_policy"]) == ({"summarizer": 1}, {"crm-read": 1})
        assert shown["samples"][0]["grant_id"] == live
        drawn = command("apply", "--config", configuration, "--dry-run").stdout
        assert live in drawn and "no policy permits it" in drawn
        assert json.loads(command("apply", "--config", configuration, "--json").stdout) == {"version": 2}

    def test_at_a_terminal_it_asks_and_a_no_applies_nothing(self, configuration, live, monkeypatch):
        monkeypatch.setattr("broker.cli.server._at_a_terminal", lambda: True)
        refused = command("apply", "--config", configuration, ends=1)  # there is nobody to say yes
        assert "1 live grants would end" in refused.stderr
        monkeypatch.setattr("click.confirm", lambda *_, **__: False)
        assert "nothing was applied" in command("apply", "--config", configuration, ends=1).stderr
        monkeypatch.setattr("click.confirm", lambda *_, **__: True)
        assert "2" in command("apply", "--config", configuration).stdout

    def test_with_yes_nobody_is_asked(self, configuration, live, monkeypatch):
        monkeypatch.setattr("broker.cli.server._at_a_terminal", lambda: True)
        assert "2" in command("apply", "--config", configuration, "--yes").stdout

    def test_where_nothing_would_end_nobody_is_asked(self, configuration, monkeypatch):
        monkeypatch.setattr("broker.cli.server._at_a_terminal", lambda: True)
        command("migrate", "--config", configuration)
        assert "1" in command("apply", "--config", configuration).stdout

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("permit (", "not Cedar"),
            ('@id("x") permit (principal == Agent::"nobody", action, resource);', "there is no agent 'nobody'"),
            ('@id("x") permit (principal, action, resource) when { context.ttl == 1 };', "ttl"),
            ("permit (principal, action, resource);", "has no @id"),
        ],
    )
    def test_policies_that_cannot_be_used_leave_the_version_before_in_force(self, configuration, live, text, said):
        (configuration.parent / "policies" / "new.cedar").write_text(text)
        for more in ((), ("--dry-run",)):
            refused = command("apply", "--config", configuration, *more, ends=1)
            assert "new.cedar" in refused.stderr and said in refused.stderr
        (configuration.parent / "policies" / "new.cedar").unlink()
        assert json.loads(command("apply", "--config", configuration, "--json").stdout) == {"version": 2}


def test_migrate_may_be_repeated_and_apply_answers_the_version(configuration):
    for _ in range(2):
        command("migrate", "--config", configuration)
        assert json.loads(command("apply", "--config", configuration, "--json").stdout) == {"version": 1}


# --- keys -----------------------------------------------------------------------------------------------------------


def test_keys_are_listed_rotated_and_condemned_only_when_told_so_twice(configuration):
    at = ("--config", configuration)
    command("migrate", *at)
    command("apply", *at)

    def states():
        return {key["kid"]: key["state"] for key in json.loads(command("keys", "list", *at, "--json").stdout)["items"]}

    first = states()
    (current,) = (kid for kid, state in first.items() if state == "current")
    command("keys", "rotate", *at)
    assert states()[current] == "retired"
    told = command("keys", "compromise", current, "--reason", "seen in a log", *at)
    assert "nothing was done" in told.stderr and states()[current] == "retired"
    command("keys", "compromise", current, "--reason", "seen in a log", "--yes", *at)
    assert states()[current] == "compromised"
    assert current in command("keys", "list", *at).stdout


def test_a_key_that_does_not_exist_is_a_sentence(configuration):
    at = ("--config", configuration)
    command("migrate", *at)
    command("apply", *at)
    assert "no key" in command("keys", "compromise", "none", "--reason", "r", "--yes", *at, ends=1).stderr


# --- dev ------------------------------------------------------------------------------------------------------------


def test_a_name_that_is_nobody_s_suggests_one(tmp_path):
    told = command("dev", "--directory", tmp_path / "dev", "token", "sumarizer", ends=1).stderr
    assert "did you mean 'summarizer'?" in told and "crm-pipeline" in told


def test_a_development_token_names_the_port_that_was_served_last(tmp_path):
    at = ("dev", "--directory", tmp_path / "dev")
    command(*at, "--port", "9123", "token", "ada")
    token = command(*at, "token", "ada", "--lifetime", "5m").stdout.strip()
    claims = jwt.decode(token, options={"verify_signature": False})
    assert claims["aud"] == "http://127.0.0.1:9123" and claims["exp"] - claims["iat"] == 300


# --- serve and scheduler, as processes ------------------------------------------------------------------------------


def stop(started):
    started.send_signal(signal.SIGTERM)
    return started.wait(30)


def lines_of(directory):
    return [json.loads(line) for line in (directory / "stderr").read_text().splitlines()]


def serve_on(configuration, port):
    text = configuration.read_text()
    configuration.write_text(text.replace("127.0.0.1:8080", f"127.0.0.1:{port}"))
    return f"http://127.0.0.1:{port}"


def test_serve_logs_json_and_ends_gracefully_on_sigterm(configuration, tmp_path):
    url = serve_on(configuration, free_port())
    with process("serve", "--config", str(configuration), directory=tmp_path) as started:
        until_ready(started, url, tmp_path)
        with httpx.Client(trust_env=False) as connection:
            connection.get(f"{url}/healthz")
            # A connection that is kept alive must not keep the broker alive.
            assert stop(started) == 0
    assert (tmp_path / "stdout").read_text() == ""
    assert "/readyz" in {line.get("route") for line in lines_of(tmp_path)}


def refused_to_serve(configuration):
    """What `broker serve` says as it refuses to; one that serves after all does not go on for ever."""
    with process("serve", "--config", str(configuration), directory=configuration.parent) as started:
        assert started.wait(60) == 1
    told = (configuration.parent / "stderr").read_text()
    assert len(told.splitlines()) == 1
    return told


def test_a_port_in_use_is_a_sentence(configuration, tmp_path):
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as taken:
        serve_on(configuration, taken.getsockname()[1])
        told = refused_to_serve(configuration)
    assert "server.listen: cannot listen on 127.0.0.1" in told and "choose another address" in told


def test_a_metrics_port_in_use_is_a_sentence(configuration):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        text = configuration.read_text().replace("[server]", f'[server]\nmetrics_listen = "127.0.0.1:{port}"')
        configuration.write_text(text)
        serve_on(configuration, free_port())
        assert "server.metrics_listen" in refused_to_serve(configuration)


def answers(path):
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def test_a_socket_left_behind_is_taken_away_and_one_that_answers_is_not(configuration, tmp_path):
    path = tmp_path / "s"
    text = configuration.read_text().replace('listen = "127.0.0.1:8080"', f'listen = "unix:{path}"')
    configuration.write_text(text)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        assert "somebody serves on" in refused_to_serve(configuration)
    assert path.is_socket()  # nobody listens any more
    with process("serve", "--config", str(configuration), directory=tmp_path) as started:
        deadline = time.monotonic() + 60
        while not answers(path):
            assert started.poll() is None and time.monotonic() < deadline, (tmp_path / "stderr").read_text()
            time.sleep(0.05)
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
            assert client.get("http://127.0.0.1/healthz").status_code == 200
        assert stop(started) == 0
    assert not path.exists()


def test_the_scheduler_logs_json_and_ends_on_sigterm(configuration, tmp_path):
    command("migrate", "--config", configuration)
    command("apply", "--config", configuration)
    with process("scheduler", "--config", str(configuration), directory=tmp_path) as started:
        # It says so when it can be told to stop; before that a signal ends it the hard way.
        until(lambda: '"sweeping"' in (tmp_path / "stderr").read_text())
        assert stop(started) == 0
    assert (tmp_path / "stdout").read_text() == ""
    assert all(line["level"] == "info" for line in lines_of(tmp_path))


# --- The tree -------------------------------------------------------------------------------------------------------


def test_the_command_itself_lists_what_there_is(tmp_path):
    ran = subprocess.run([*BROKER, "--help"], cwd=tmp_path, env=CLEAN, capture_output=True, text=True, check=True)
    assert re.search(r"^  lockdown ", ran.stdout, re.MULTILINE) and "Exit codes" in ran.stdout


def test_a_command_that_does_not_exist_is_wrong_usage():
    assert "No such command" in command("grnat", ends=2).stderr


def test_a_client_command_imports_nothing_of_the_server(tmp_path):
    script = (
        "import sys; from broker.cli import main\n"
        "for name in ('task', 'grant', 'revoke', 'lockdown', 'audit'): main.get_command(None, name)\n"
        "print({'flask', 'granian', 'sqlalchemy', 'cedarpy', 'broker.wiring'} & set(sys.modules))"
    )
    ran = subprocess.run([BROKER[0], "-c", script], cwd=tmp_path, env=CLEAN, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
