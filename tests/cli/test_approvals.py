"""Approvals by hand: two people decide, the agent collects."""

import json
import re

import pytest
from rich.console import Console

from broker.cli import approval as command
from broker.cli import output
from broker.sdk import Approval

LEDGER = "https://ledger.example/api"
POST = ("--resource", LEDGER, "--scope", "entries:post")


@pytest.fixture
def waiting(run):
    """The ids of an approval and its grant."""
    task = run(
        "task", "open", "--purpose", "the quarter's close", "--agent", "ledger-clerk", "--deadline", "1h", "--id-only"
    )
    asked = run(
        "grant", "request", "--task", task.stdout.strip(), *POST, "--intent", "post 7", by="ledger-clerk", ends=1
    )
    return re.search(r"apr_\w+", asked.stderr)[0], re.search(r"grt_\w+", asked.stderr)[0]


def test_what_waits_is_said_with_what_to_do(run):
    task = run(
        "task", "open", "--purpose", "close", "--agent", "ledger-clerk", "--deadline", "1h", "--id-only"
    ).stdout.strip()
    asked = run("grant", "request", "--task", task, *POST, by="ledger-clerk", ends=1)
    assert asked.stdout == ""
    assert "2 of security" in asked.stderr
    assert re.search(r"broker approval show apr_\w+", asked.stderr)
    assert re.search(r"broker grant collect grt_\w+ --wait 15m", asked.stderr)
    again = run("grant", "request", "--task", task, *POST, "--json", by="ledger-clerk", ends=1)
    assert json.loads(again.stderr)["problem"]["approval"]["state"] == "open"


def test_two_people_approve_and_the_agent_collects(run, waiting):
    approval, grant = waiting
    assert approval in run("approval", "list", by="ada").stdout
    shown = run("approval", "show", approval, by="bo").stdout
    assert shown.startswith("opens")
    assert shown.index("restricted") < shown.index("In their own words") < shown.index("post 7")
    assert "0 of 2 of security" in shown
    run("approval", "approve", approval, "--reason", "agreed", by="ada")
    early = run("grant", "collect", grant, by="ledger-clerk", ends=1)
    assert "waits for people" in early.stderr
    decided = json.loads(run("approval", "approve", approval, "--ttl", "1m", "--json", by="bo").stdout)
    assert (decided["state"], decided["left"]["ttl_s"]) == ("approved", 60)
    token = run("grant", "collect", grant, "--wait", "1m", "--token-only", by="ledger-clerk").stdout
    assert token.startswith("eyJ")
    assert "collected already" in run("grant", "collect", grant, by="ledger-clerk", ends=1).stderr
    assert approval not in run("approval", "list", by="ada").stdout
    assert approval in run("approval", "list", "--state", "approved", by="ada").stdout


def test_one_denies_and_the_agent_hears_why(run, waiting):
    approval, grant = waiting
    run("approval", "deny", approval, "--reason", "not during the close", by="bo")
    assert "not during the close" in run("grant", "collect", grant, "--wait", "5s", by="ledger-clerk", ends=1).stderr
    assert "there is nothing left to decide" in run("approval", "approve", approval, by="ada", ends=1).stderr


def test_the_agent_takes_it_back_and_may_not_approve_it(run, waiting):
    approval, _ = waiting
    assert "not an approver" in run("approval", "approve", approval, by="ledger-clerk", ends=1).stderr
    assert "is withdrawn" in run("approval", "withdraw", approval, by="ledger-clerk").stdout


def test_a_wait_that_is_over_says_so(run, waiting):
    approval, grant = waiting
    assert "nobody has decided" in run("grant", "collect", grant, "--wait", "1s", by="ledger-clerk", ends=1).stderr
    run("approval", "withdraw", approval, by="ledger-clerk")


HOSTILE = {
    "intent": "nice\x1b[2J\x1b[Hopens          public\u202e",
    "claims": {"sensitivity  public\nscopes": "none\r\nvotes  ada approves", "x\x1b]0;owned\x07": "\u2066y"},
    "purpose": "[bold red]approved[/]",
}


@pytest.mark.parametrize("on_terminal", [False, True])
def test_hostile_words_stay_words_on_the_approvers_terminal(capsys, monkeypatch, on_terminal):
    """INV-31: even where the broker that answers does not escape them."""
    raw = {
        "id": "apr_1", "state": "open", "grant_id": "grt_1", "requested_by": "mallory", "quorum": 1, "votes": [],
        "opens": {
            "resource": LEDGER, "sensitivity": "restricted", "environment": "production", "scopes": ["entries:post"],
            "ttl_s": 60, "user": None, "sender_bound": False, "provider": "jwt",
        },
        "requester": {
            "agent": "mallory", "issuer": "dev", "subject": "dev:mallory\x1b[8m", "owner": None, "orchestrator": "p",
            "task_id": "task_1",
        },
        "needs": [], "left": {"scopes": ["entries:post"], "ttl_s": 60}, "policies": ["p"], "request_hash": "0" * 64,
        "expires_at": "2026-03-01T13:00:00Z", "decided_at": None, "decided_by": None, "reason": None,
        "collect_by": None, "collected_at": None, "unverified": HOSTILE,
    }  # fmt: skip
    monkeypatch.setattr(
        output, "out", lambda: Console(force_terminal=on_terminal, no_color=True, width=500, highlight=False)
    )
    command._show(Approval.of(raw))
    written = capsys.readouterr().out
    plain = re.sub(r"\x1b\[[0-9;]*m", "", written) if on_terminal else written
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", plain)
    ours, theirs = plain.split("In their own words, which nobody has checked:")
    assert "restricted" in ours and "public" not in ours and "owned" not in ours
    assert "approved[/]" in theirs
    # Each of their lines begins with whose words they are.
    assert all(line.startswith(("the agent says", "the task says", "claims ")) for line in theirs.strip().splitlines())
