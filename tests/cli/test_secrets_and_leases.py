"""Commands for secrets that another system makes, and for what is owed there, against a broker in this process."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest

from broker.cli import output
from broker.domain.clock import rfc3339
from tests.cli.conftest import command
from tests.cli.test_client_commands import on_a_terminal
from tests.fakes.outside import AGENTS, LONGEST, ORDERS, PASSWORD, SEALED, house_on_outside, serving
from tests.web.test_leases import certificate_request

SELECT = ("--resource", ORDERS, "--scope", "select")


@pytest.fixture
def house(migrated_file, tmp_path):
    shutil.copyfile(migrated_file, tmp_path / "broker.db")
    with house_on_outside(f"sqlite:///{tmp_path / 'broker.db'}", tmp_path) as house:
        yield house


@pytest.fixture
def served(house):
    with serving(house) as url:
        yield SimpleNamespace(url=url, token=house.token)


@pytest.fixture
def run(served):
    def run(*arguments, by="ada", ends=0):
        return command(*arguments, env={"BROKER_URL": served.url, "BROKER_TOKEN": served.token(by)}, ends=ends)

    return run


@pytest.fixture
def task(house):
    return house.open_task().id


def ask(run, task, *more, asked=SELECT, **how):
    return run("grant", "request", "--task", task, *asked, *more, by="summarizer", **how)


@pytest.fixture
def stuck(run, task, house):
    """The id of a lease that is stuck."""
    grant = json.loads(ask(run, task, "--json").stdout)["grant"]
    house.outside.down = True
    run("grant", "revoke", grant["id"], by="summarizer")  # the first of six times
    house.pay(times=5)
    return grant["lease"]["id"]


# --- Secrets --------------------------------------------------------------------------------------------------------


def test_a_login_is_printed_a_member_a_line_below_its_grant(run, task):
    printed = ask(run, task)
    grant, secret = printed.stdout.split("\n\n")
    assert re.search(r"^lease +lea_\w+, held$", grant, re.MULTILINE)
    assert secret.splitlines() == [f"password  {PASSWORD}", "username  jit-grt-1"]
    assert PASSWORD not in grant + printed.stderr


def test_json_of_a_login_is_the_api_s_object_exactly(run, task):
    issued = json.loads(ask(run, task, "--json").stdout)
    assert set(issued) == {"grant", "credential"}
    assert issued["credential"] == {
        "type": "database",
        "data": {"username": "jit-grt-1", "password": PASSWORD},
        "expires_at": issued["grant"]["expires_at"],
    }


def test_token_only_of_a_login_is_its_data_and_nothing_else(run, task):
    printed = ask(run, task, "--token-only")
    assert json.loads(printed.stdout) == {"username": "jit-grt-1", "password": PASSWORD}
    assert printed.stderr == ""


def test_on_a_terminal_it_is_said_that_a_secret_is_shown_once(served, task):
    written, told = on_a_terminal(served, "summarizer", "grant", "request", "--task", task, *SELECT)
    assert PASSWORD in written
    assert f"this database secret opens {ORDERS} (select) until" in told and "It is shown once" in told
    assert PASSWORD not in told


def test_a_certificate_is_asked_for_with_a_file_and_printed_as_it_is(run, task, tmp_path):
    file = tmp_path / "request.pem"
    file.write_text(certificate_request())
    printed = ask(run, task, "--param", f"csr=@{file}", asked=("--resource", AGENTS, "--scope", "connect")).stdout
    assert "certificate\n-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n" in printed
    assert 'ca_chain  ["x"]' in printed


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "cannot be read"), (b"\xff\xfe", "is not text"), (b"x" * 16_385, "more than 16384 characters")],
)
def test_a_parameter_s_file_that_is_none_is_wrong_usage_and_is_not_quoted(run, task, tmp_path, content, says):
    file = tmp_path / "request.pem"
    if content is not None:
        file.write_bytes(content)
    told = ask(run, task, "--param", f"csr=@{file}", ends=2).stderr
    assert f"csr: {file}" in told and says in told
    assert "xxx" not in told


@pytest.mark.parametrize(
    ("param", "ends", "says"),
    [
        ("csr", 2, "is not KEY=VALUE"),
        ("csr=hello", 1, "csr must be one certificate request in PEM"),
        ("ttl=9h", 1, "takes no parameter 'ttl'; it takes: csr"),
    ],
)
def test_a_parameter_that_is_wrong_says_what_it_should_be(run, task, param, ends, says):
    asked = ("--resource", AGENTS, "--scope", "connect")
    assert says in ask(run, task, "--param", param, asked=asked, ends=ends).stderr


def test_a_parameter_that_is_given_twice_is_wrong_usage(run, task):
    assert "'csr' is given twice" in ask(run, task, "--param", "csr=a", "--param", "csr=b", ends=2).stderr


def test_an_outside_that_says_no_is_a_refusal_and_no_broker_that_is_not_there(run, task, house, monkeypatch):
    monkeypatch.setattr("broker.cli.client._PATIENCE_S", 0.1)
    house.outside.refuses = True
    told = ask(run, task, ends=1).stderr
    assert "said no" in told and "BROKER_URL" not in told and "403" not in told
    assert json.loads(ask(run, task, "--json", ends=1).stderr)["problem"]["code"] == "provider_refused"


@pytest.mark.parametrize("value", ["a\x1b[31mb", "a\nb\x1b", "", 7, None, ["a\x1b"], {"a": "\u202e"}])
def test_a_value_that_a_terminal_could_act_on_is_spelled_out_and_not_changed(capsys, value):
    output.secret({"name": value})
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\u202e" not in printed
    shown = printed.removeprefix("name").strip()
    assert shown == value if value == "" else json.loads(shown) == value


# --- What is owed ---------------------------------------------------------------------------------------------------


def test_a_receipt_says_what_is_confirmed_dead_and_of_what_class(run, task):
    ask(run, task)
    ended = run("task", "complete", task, by="pipeline")
    line = ended.stdout.splitlines()[-1].split("\t")
    assert line[4].endswith("Z") and line[5:] == ["no longer", "hard"]
    assert "confirmed dead 1, outstanding 0" in ended.stdout
    assert ended.stderr == ""


def test_a_receipt_says_what_is_still_owed_and_until_when_it_is_exposed(run, task, house):
    ask(run, task)
    # With nobody there who ends it, as long as its database lets it in.
    lasts_until = rfc3339(house.clock() + LONGEST)
    house.outside.down = True
    for ending in (("task", "complete", task), ("task", "receipt", task)):
        told = run(*ending, by="pipeline")
        line = told.stdout.splitlines()[-1].split("\t")
        assert line[4:] == ["not yet", lasts_until, "hard"]
        assert "1 made outside and not confirmed dead yet" in told.stderr
    house.outside.down = False
    house.pay()
    assert run("task", "receipt", task, by="pipeline").stderr == ""


def test_a_revocation_says_of_its_samples_what_is_owed(run, task, house):
    grant = json.loads(ask(run, task, "--json").stdout)["grant"]["id"]
    trial = run("revoke", "--provider", "vault", "--reason", "drill")
    assert grant in trial.stdout and "1 would end" in trial.stdout
    done = run("revoke", "--provider", "vault", "--reason", "drill", "--yes")
    line = next(line for line in done.stdout.splitlines() if line.startswith(grant)).split("\t")
    assert line[4] == "not yet" and line[6] == "hard"
    assert "1 made outside and not confirmed dead yet" in done.stderr


def test_a_grant_shows_its_lease(run, task, stuck, house):
    grant = json.loads(run("lease", "show", stuck, "--json").stdout)["grant_id"]
    shown = run("grant", "show", grant).stdout
    assert f"{stuck}, stuck: tried 6 times, the last time: {SEALED}" in shown
    house.outside.down = False
    house.pay()
    assert f"{stuck}, released: confirmed dead at" in run("grant", "show", grant).stdout


def test_stuck_leases_come_first_however_old_and_say_why(run, task, stuck, house):
    house.outside.down = False
    newer = [json.loads(ask(run, task, "--json").stdout)["grant"]["lease"]["id"] for _ in range(3)]
    listed = run("lease", "list", "--limit", "2")
    heading, *rows = [line.split("\t") for line in listed.stdout.splitlines()]
    assert heading == ["lease", "state", "provider", "grant", "owed since", "tried", "next try", "why it fails"]
    assert [row[0] for row in rows] == [stuck, newer[2], newer[1]]
    assert rows[0][1] == "stuck" and rows[0][4].endswith("Z") and rows[0][5] == "6" and rows[0][7] == SEALED
    assert rows[1][4] == "–"
    assert "1 stuck: mend what the last column says" in listed.stderr
    cursor = listed.stderr.split("--cursor ")[1].split()[0]
    rest = [line.split("\t")[0] for line in run("lease", "list", "--cursor", cursor).stdout.splitlines()[1:]]
    assert rest == [newer[0], stuck]


def test_leases_are_filtered(run, stuck):
    assert stuck in run("lease", "list", "--state", "stuck", "--provider", "vault").stdout
    assert json.loads(run("lease", "list", "--state", "held", "--json").stdout)["items"] == []
    assert run("lease", "list", "--state", "lost", ends=2).stderr


def test_a_stuck_lease_is_abandoned_with_a_reason_and_stays_on_the_list(run, stuck):
    assert "Missing option '--reason'" in run("lease", "abandon", stuck, ends=2).stderr
    given_up = run("lease", "abandon", stuck, "--reason", "the server was scrapped").stdout
    assert "abandoned_by" in given_up and "the server was scrapped" in given_up
    listed = run("lease", "list")
    assert f"{stuck}\tstuck, abandoned\t" in listed.stdout
    assert "stuck: mend" not in listed.stderr
    assert json.loads(run("lease", "show", stuck, "--json").stdout)["abandoned_reason"] == "the server was scrapped"


def test_leases_are_not_for_everybody_and_an_id_that_is_none_is_not_found(run):
    assert "neither an admin nor an auditor" in run("lease", "list", by="summarizer", ends=1).stderr
    assert "no lease" in run("lease", "show", "lea_nothing", ends=1).stderr
    assert "not an id" in run("lease", "show", "../tasks", ends=2).stderr


def test_an_empty_list_is_a_heading_alone(run):
    listed = run("lease", "list")
    assert len(listed.stdout.splitlines()) == 1 and listed.stderr == ""
