"""A break-glass by hand: asked for with a reason, given by two, listed first, reviewed by a third."""

import json
import re

import pytest

CRM = "https://crm.example/api"
WRITE = ("--resource", CRM, "--scope", "contacts:write")


@pytest.fixture
def emergency(run):
    """The ids of an approval and its grant."""

    def asked(reason):
        task = run("task", "open", "--purpose", "repair", "--agent", "support-agent", "--deadline", "1h", "--id-only")
        answer = run(
            "grant", "request", "--task", task.stdout.strip(), *WRITE, "--break-glass", reason, by="support-agent",
            ends=1,
        )  # fmt: skip
        return re.search(r"apr_\w+", answer.stderr)[0], re.search(r"grt_\w+", answer.stderr)[0]

    return asked


def test_it_is_loud_from_the_first_line_to_the_review(run, emergency):
    approval, grant = emergency("every lead is in the wrong region")
    shown = run("approval", "show", approval, by="bo").stdout
    assert shown.startswith("BREAK-GLASS")
    assert shown.index("In their own words") < shown.index("every lead is in the wrong region")
    assert "BREAK-GLASS" in run("approval", "list", by="ada").stdout
    for by in ("ada", "bo"):
        run("approval", "approve", approval, by=by)
    run("grant", "collect", grant, "--token-only", by="support-agent")
    for _ in range(3):
        task = run("task", "open", "--purpose", "leads", "--agent", "summarizer", "--deadline", "1h", "--id-only")
        run(
            "grant", "request", "--task", task.stdout.strip(), "--resource", CRM, "--scope", "contacts:read",
            by="summarizer",
        )  # fmt: skip
    # However old it is, and however short the page.
    listed = run("grant", "list", "--limit", "1", by="ada")
    assert listed.stdout.splitlines()[1].startswith(grant)
    assert listed.stdout.splitlines()[1].endswith("BREAK-GLASS")
    assert "BREAK-GLASS: 1 out" in listed.stderr
    assert json.loads(run("grant", "list", "--limit", "1", "--json", by="ada").stdout)["items"][0]["id"] == grant
    assert run("grant", "show", grant, by="ada").stdout.startswith("BREAK-GLASS")
    review = re.search(rf"^(rev_\w+)\t.*{grant}", run("review", "list", by="cleo").stdout, re.MULTILINE)[1]
    assert "may be in use still" in run("review", "complete", review, "fine", by="cleo", ends=1).stderr
    run("grant", "revoke", grant, by="support-agent")
    assert "decided about this" in run("review", "complete", review, "fine", by="ada", ends=1).stderr
    done = run("review", "complete", review, "two contacts were moved", by="cleo").stdout
    assert f"{review} is completed" in done and "two contacts were moved" in done
    assert "every lead is in the wrong region" in run("review", "show", review, by="ada").stdout
    assert review not in run("review", "list", by="cleo").stdout
    assert review in run("review", "list", "--state", "all", by="cleo").stdout


def test_what_the_agent_wrote_is_text_and_cut(run, emergency):
    approval, grant = emergency("[bold]y[/bold] " + "x" * 900)
    for command in (("approval", "show", approval), ("grant", "show", grant)):
        shown = run(*command, by="ada").stdout
        assert "[bold]y[/bold]" in shown
        assert "x" * 400 not in shown
    run("grant", "revoke", grant, by="support-agent")


def test_it_is_refused_to_who_is_not_declared(run):
    task = run(
        "task", "open", "--purpose", "x", "--agent", "summarizer", "--deadline", "1h", "--id-only"
    ).stdout.strip()
    refused = run("grant", "request", "--task", task, *WRITE, "--break-glass", "now", by="summarizer", ends=1)
    assert "Policy does not allow it" in refused.stderr


def test_what_policy_would_say_can_be_asked_beforehand(run):
    asked = ("policy", "evaluate", "--agent", "support-agent", *WRITE)
    assert "needs_approval" in run(*asked, "--break-glass", by="ada", ends=1).stdout
    assert "deny" in run(*asked, by="ada", ends=1).stdout
