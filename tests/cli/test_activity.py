"""What was done, told from a shell and shown in one."""

import json
import re

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from rich.console import Console

from broker.cli import output
from tests.cli.conftest import CRM


def tell(run, grant, *more, by="summarizer", ends=0):
    return run("grant", "report", grant, "--action", "search_contacts", *more, by=by, ends=ends)


def test_what_was_told_stands_in_the_line_of_time(run, task, grant):
    tell(run, grant, "--scope", "contacts:read", "--attribute", "batch=seven", "--id", f"a-{grant}")
    assert (
        "again"
        in tell(run, grant, "--scope", "contacts:read", "--attribute", "batch=seven", "--id", f"a-{grant}").stdout
    )
    tell(run, grant, "--scope", "contacts:delete", "--outcome", "denied", "--kind", "request", by="crm-api")
    run("task", "complete", task)
    lines = [line.split("\t") for line in run("task", "timeline", task).stdout.splitlines()]
    assert lines[0][:4] == ["at", "", "what", "who"]
    told = {line[2]: line for line in lines}
    assert told["grant.issued"][1:7] == ["●", "grant.issued", "summarizer", "–", "contacts:read", CRM]
    assert told["activity.tool"][1:9] == [
        "○", "activity.tool", "summarizer (agent)", "search_contacts", "contacts:read", CRM, "ok", "–",
    ]  # fmt: skip
    assert told["activity.request"][7:9] == ["denied", "scope not granted"]
    assert {"task.opened", "task.completed", "grant.revoked"} < told.keys()
    only = json.loads(run("task", "timeline", task, "--source", "report", "--json").stdout)
    assert [line["source"] for line in only["items"]] == ["report", "report"]
    first = run("task", "timeline", task, "--limit", "1")
    assert "--cursor" in first.stderr


def test_a_terminal_shows_what_is_outside_as_outside(run, task, grant, monkeypatch):
    tell(run, grant, "--resource", "https://mail.example/\x1b[2Japi")
    console = Console(force_terminal=True, color_system="standard", width=400, highlight=False, file=None)
    monkeypatch.setattr(output, "out", lambda: console)
    with console.capture() as shown:
        run("task", "timeline", task)
    text = shown.get()
    assert "not what was granted" in text
    assert "\x1b[1;33m" in text, "bold and yellow"
    assert "\x1b[2J" not in text, "INV-31"


def test_drift_fails_where_there_is_some_and_says_what_would_be_enough(run, task, grant):
    never = run("task", "drift", task, ends=1)
    assert "granted and never used" in never.stdout
    tell(run, grant, "--scope", "contacts:read")
    clean = run("task", "drift", task)
    assert (clean.stderr, "never used" in clean.stdout) == ("", False)
    tell(run, grant, "--scope", "contacts:delete", "--outcome", "denied")
    outside = run("task", "drift", task, ends=1)
    assert "scope not granted\tsummarizer\tcontacts:delete" in outside.stdout
    assert json.loads(run("task", "drift", task, "--json", ends=1).stdout)["outside"][0]["why"] == "scope"


def test_what_would_be_enough_is_shown_as_a_policy(run, task, tmp_path):
    key = tmp_path / "key.pem"
    made = ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    key.write_bytes(made)
    both = ("--resource", CRM, "--scope", "contacts:read", "--scope", "contacts:write", "--dpop-key", key)
    asked = run("grant", "request", "--task", task, *both, by="summarizer")
    tell(run, re.search(r"grt_\w+", asked.stdout)[0], "--scope", "contacts:read")
    shown = run("task", "drift", task, ends=1).stdout
    assert 'permit (principal == Agent::"summarizer", action in [Action::"contacts:read"], resource == ' in shown


@pytest.mark.parametrize("by", ["ledger-clerk", "crm-pipeline"])
def test_whoever_may_not_tell_is_told_so(run, grant, by):
    assert tell(run, grant, by=by, ends=1).stderr.startswith("error: ")


def test_an_activity_that_is_none_is_wrong_usage(run, grant):
    tell(run, grant, "--kind", "read", ends=2)
    assert "password" in tell(run, grant, "--attribute", "password=x", ends=1).stderr
