"""Policy as code from the command line: on a file, and on a broker that runs."""

import json
import shutil

import pytest

from tests.cli.conftest import CRM, command

ASKED = ("policy", "evaluate", "--agent", "summarizer", "--resource", CRM, "--scope", "contacts:read")
LEADS = ("--purpose", "summarise the leads of May")


def test_check_names_every_policy(configuration):
    checked = json.loads(command("policy", "check", "--config", configuration, "--json").stdout)
    assert "crm-read" in checked["policies"] and "crm.cedar" in checked["files"]
    assert "nothing is wrong" in command("policy", "check", "--config", configuration).stdout


def test_check_says_what_is_wrong_with_which(configuration):
    (configuration.parent / "policies" / "new.cedar").write_text("permit (principal, action, resource);")
    told = command("policy", "check", "--config", configuration, ends=1).stderr
    assert "new.cedar, policy number 1: has no @id" in told


def test_the_sample_policies_pass_their_tests(configuration):
    passed = command("policy", "test", "--config", configuration)
    assert "all 15 tests passed" in passed.stderr
    assert passed.stdout.count("passed\t") == 15


def test_a_policy_that_changed_its_mind_fails_its_test(configuration):
    crm = configuration.parent / "policies" / "crm.cedar"
    crm.write_text(crm.read_text().replace("context.ttl_s <= 600", "context.ttl_s <= 3600"))
    failed = command("policy", "test", "--config", configuration, ends=1)
    row = next(line for line in failed.stdout.splitlines() if line.startswith("FAILED"))
    assert row.split("\t")[1:3] == ["not for an hour", "allow"] and "expected deny, got allow" in row
    assert "1 of 15 tests failed" in failed.stderr
    as_json = json.loads(command("policy", "test", "--config", configuration, "--json", ends=1).stdout)
    assert (as_json["passed"], as_json["failed"]) == (14, 1)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("tests = 1 2", "is not TOML"),
        ('[[tests]]\nname = "t"\nagent = "nobody"\nresource = "r"\nscopes = ["s"]\nexpect = "deny"\n', "no principal"),
        ('[[tests]]\nname = "t"\nagnet = "summarizer"\n', "unknown member 'agnet'"),
        ("[[test]]\n", "write [[tests]]"),
        (b"\xff", "is not TOML"),
    ],
)
def test_a_file_of_tests_that_cannot_be_read_is_a_sentence(configuration, tmp_path, content, says):
    file = tmp_path / "t.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    told = command("policy", "test", "--config", configuration, "--tests", file, ends=1).stderr
    assert says in told


def test_a_file_of_tests_that_is_missing_is_named(configuration):
    (configuration.parent / "policies" / "tests.toml").unlink()
    assert "name the file with --tests" in command("policy", "test", "--config", configuration, ends=1).stderr


def test_evaluate_answers_by_a_file(configuration):
    at = ("--config", configuration)
    assert json.loads(command(*ASKED, *LEADS, *at, "--json").stdout)["policies"] == ["crm-read"]
    denied = command(*ASKED, *LEADS, *at, "--ttl", "1h", ends=1).stdout
    assert "outcome   deny" in denied and "it would be allowed with ttl_s = 600" in denied
    writing = (*ASKED, "--scope", "contacts:write", *LEADS, *at, "--label", "team=crm")
    command(*writing, ends=1)
    command(*writing, "--sender-bound")


def test_evaluate_says_when_people_would_be_asked(configuration):
    asked = ("policy", "evaluate", "--agent", "ledger-clerk", "--resource", "https://ledger.example/api")
    answered = command(*asked, "--scope", "entries:post", "--config", configuration, ends=1).stdout
    assert "needs_approval" in answered and "waits for people" in answered


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (("--agent", "nobody"), "no principal is called 'nobody'"),
        (("--resource", "urn:none"), "not a resource this broker knows"),
        (("--scope", "none"), "it offers contacts:read"),
    ],
)
def test_evaluate_of_what_does_not_exist_is_a_sentence(configuration, changed, says):
    assert says in command(*ASKED, *changed, "--config", configuration, ends=1).stderr


def test_evaluate_asks_the_broker_where_no_file_is_given(run):
    decision = json.loads(run(*ASKED, *LEADS, "--json", by="ada").stdout)
    assert (decision["outcome"], decision["policy_version"]) == ("allow", 1)
    run(*ASKED, *LEADS, "--ttl", "1h", by="ada", ends=1)
    assert "admin" in run(*ASKED, *LEADS, by="summarizer", ends=1).stderr


def test_evaluate_of_nobody_s_policies_is_wrong_usage():
    assert "Give --config, or set BROKER_URL" in command(*ASKED, ends=2).stderr


class TestReplaying:
    """A draft over what was asked, at a broker and on a configuration's own database."""

    @pytest.fixture
    def draft(self, live_broker, tmp_path):
        shutil.copytree(live_broker.directory / "policies", tmp_path / "draft")
        file = tmp_path / "draft" / "crm.cedar"
        file.write_text(file.read_text().replace("context.ttl_s <= 600", "context.ttl_s <= 60"))
        return tmp_path / "draft"

    def test_what_a_draft_would_change_is_told_and_nothing_is_done(self, run, grant, draft):
        found = json.loads(run("policy", "replay", draft, "--json", by="ada").stdout)
        assert found["requests"] >= 1 and found["newly_denied"] >= 1
        assert found["live"]["ended"] >= 1
        told = run("policy", "replay", draft, "--period", "1h", by="ada").stdout
        assert "newly denied" in told and grant in told and "no policy permits it" in told
        assert json.loads(run("grant", "show", grant, "--json", by="summarizer").stdout)["live"] is True

    def test_a_bad_draft_is_refused_with_what_is_wrong(self, run, draft):
        (draft / "crm.cedar").write_text("permit (")
        assert "crm.cedar: not Cedar" in run("policy", "replay", draft, by="ada", ends=1).stderr

    def test_it_is_not_for_agents(self, run, draft):
        assert "neither admin nor auditor" in run("policy", "replay", draft, by="summarizer", ends=1).stderr

    def test_one_draft_and_no_other(self, run, draft, configuration):
        assert "which draft?" in run("policy", "replay", ends=2).stderr
        assert "which draft?" in run("policy", "replay", draft, "--config", configuration, ends=2).stderr

    def test_a_configuration_is_replayed_on_its_own_database(self, configuration):
        command("migrate", "--config", configuration)
        command("apply", "--config", configuration)
        found = json.loads(command("policy", "replay", "--config", configuration, "--json").stdout)
        assert (found["requests"], found["complete"], found["live"]["grants"]) == (0, True, 0)

    def test_a_file_that_is_not_text_is_named(self, run, draft):
        (draft / "crm.cedar").write_bytes(b"\xff\xfe")
        assert "not text" in run("policy", "replay", draft, by="ada", ends=2).stderr
