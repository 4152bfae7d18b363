"""Client commands against a real broker: what they do, what they print, and how they fail."""

import contextlib
import json
import os
import subprocess

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from rich.console import Console

from broker.cli import output
from tests.cli.conftest import BROKER, CLEAN, CRM, READ, command, free_port

# --- Tasks ----------------------------------------------------------------------------------------------------------


def test_a_task_is_opened_listed_shown_and_kept_alive(run):
    opened = json.loads(
        run(
            *("task", "open", "--json", "--purpose", "count leads", "--agent", "summarizer", "--agent", "ledger-clerk"),
            *("--deadline", "90s", "--heartbeat", "30", "--label", "team=crm", "--label", "note=a=b"),
            *("--only", CRM, "contacts:read contacts:write", "--idempotency-key", "cli-1"),
        ).stdout
    )
    assert opened["agents"] == ["ledger-clerk", "summarizer"]
    assert opened["labels"] == {"team": "crm", "note": "a=b"}
    assert opened["resources"] == [{"resource": CRM, "scopes": ["contacts:read", "contacts:write"]}]
    assert json.loads(run("task", "show", opened["id"], "--json").stdout) == opened
    assert opened["id"] in run("task", "list", "--state", "active").stdout
    assert json.loads(run("task", "heartbeat", opened["id"], "--json").stdout)["state"] == "active"
    assert f"{CRM} (contacts:read contacts:write)" in run("task", "show", opened["id"]).stdout


def test_the_same_idempotency_key_opens_one_task(run):
    again = ("task", "open", "--purpose", "p", "--agent", "summarizer", "--deadline", "1h", "--id-only")
    assert run(*again, "--idempotency-key", "cli-2").stdout == run(*again, "--idempotency-key", "cli-2").stdout


@pytest.mark.parametrize(("verb", "state"), [("complete", "completed"), ("fail", "failed"), ("cancel", "cancelled")])
def test_ending_a_task_answers_its_receipt_with_a_line_for_each_grant(run, task, grant, verb, state):
    ended = run("task", verb, task, "--reason", "all rows are in").stdout
    assert f"outcome   {state}" in ended
    line = next(line.split("\t") for line in ended.splitlines() if line.startswith(grant))
    assert line[1:3] == ["summarizer", CRM]
    assert line[4] == "not yet" and line[5].endswith("Z")  # dead for the broker, not yet for one who is offline
    assert json.loads(run("task", "show", task, "--json").stdout)["reason"] == "all rows are in"


def test_a_receipt_is_the_api_s_own_as_json_and_a_signature_on_request(run, task, grant):
    completed = json.loads(run("task", "complete", task, "--json").stdout)
    receipt = json.loads(run("task", "receipt", task, "--json").stdout)
    assert receipt["grants"][0]["grant_id"] == completed["grants"][0]["grant_id"] == grant
    signed = run("task", "receipt", task, "--jws").stdout.strip()
    assert jwt.decode(signed, options={"verify_signature": False, "verify_aud": False})["sub"] == task


def test_a_page_says_how_to_get_the_next(run, task):
    second = run("task", "open", "--purpose", "p", "--agent", "summarizer", "--deadline", "60", "--id-only").stdout
    first = run("task", "list", "--limit", "1")
    assert second.strip() in first.stdout
    cursor = first.stderr.split("--cursor ")[1].strip()
    assert task in run("task", "list", "--limit", "1", "--cursor", cursor).stdout


# --- Grants ---------------------------------------------------------------------------------------------------------


def test_token_only_prints_the_token_and_nothing_else(run, task):
    printed = run("grant", "request", "--task", task, *READ, "--ttl", "2m", "--token-only", by="summarizer")
    assert printed.stderr == ""
    claims = jwt.decode(printed.stdout.removesuffix("\n"), options={"verify_signature": False, "verify_aud": False})
    assert claims["aud"] == CRM and claims["task_id"] == task
    assert claims["exp"] - claims["iat"] == 120


def test_a_grant_is_explained_in_words_and_what_the_agent_wrote_stays_text(run, task):
    """INV-31: neither a claim nor an intent moves the cursor, colours a line or makes one."""
    hostile = "a\x1b[31mb\u202ec\nallowed: everything"
    asked = run("grant", "request", "--task", task, *READ, "--context", f"note={hostile}", "--json", by="summarizer")
    grant = json.loads(asked.stdout)["grant"]["id"]
    told = run("grant", "explain", grant, by="summarizer").stdout
    assert told.startswith(f"summarizer was allowed contacts:read on {CRM}, by configuration version ")
    assert "policy 'crm-read' in crm.cedar permits it" in told
    assert "which is the broker's default" in told
    line = next(line for line in told.splitlines() if line.startswith("the agent says: claimed"))
    assert "allowed: everything" in line
    assert "\x1b" not in told and "\u202e" not in told
    found = json.loads(run("grant", "explain", grant, "--json", by="summarizer").stdout)
    assert found["grant_id"] == grant and found["facts"]["agents_words"]["claimed"] == {"note": hostile}


def test_a_denied_grant_is_explained_with_what_would_be_allowed(run, task):
    refused = run("grant", "request", "--task", task, *READ, "--ttl", "14m", by="summarizer", ends=1)
    grant = refused.stderr.split("kept as ")[1].strip()
    told = run("grant", "explain", grant, by="summarizer").stdout
    assert told.startswith(f"summarizer was denied contacts:read on {CRM}")
    assert "would be allowed with ttl_s = 600" in told


def test_a_credential_comes_with_its_grant_and_the_ceiling_that_decided(run, task):
    asked = run(
        *("grant", "request", "--task", task, *READ, "--intent", "count", "--context", "row=7"), by="summarizer"
    )
    assert "ttl_s             300, decided by default" in asked.stdout
    assert "policies          crm-read, version 1" in asked.stdout
    assert asked.stdout.splitlines()[-1].startswith("eyJ")


def test_json_of_a_credential_is_the_api_s_object(run, task):
    issued = json.loads(run("grant", "request", "--task", task, *READ, "--json", by="summarizer").stdout)
    assert set(issued) == {"grant", "credential"}
    assert set(issued["credential"]) == {"type", "token", "token_type", "expires_at"}
    assert issued["credential"]["expires_at"] == issued["grant"]["expires_at"]


def test_a_grant_is_listed_shown_renewed_and_handed_back(run, grant):
    assert grant in run("grant", "list", "--state", "active", "--agent", "summarizer", by="summarizer").stdout
    assert json.loads(run("grant", "show", grant, "--json", by="summarizer").stdout)["live"] is True
    shown = run("grant", "show", grant, by="summarizer").stdout
    assert "decision          allow" in shown and "eyJ" not in shown
    renewed = run("grant", "renew", grant, "--ttl", "60", "--token-only", by="summarizer").stdout
    assert jwt.decode(renewed.strip(), options={"verify_signature": False, "verify_aud": False})["grant_id"] == grant
    assert grant in run("grant", "revoke", grant, "--reason", "done early", by="summarizer").stdout
    assert json.loads(run("grant", "show", grant, "--json", by="summarizer").stdout)["live"] is False


def test_a_key_file_binds_the_credential_and_is_needed_to_renew_it(run, task, tmp_path):
    key_file = tmp_path / "dpop.pem"
    key = ec.generate_private_key(ec.SECP256R1())
    key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    bound = ("--dpop-key", key_file, "--json")
    scope = ("--resource", CRM, "--scope", "contacts:write")
    issued = json.loads(run("grant", "request", "--task", task, *scope, *bound, by="summarizer").stdout)
    assert issued["credential"]["token_type"] == "DPoP"
    refused = run("grant", "renew", issued["grant"]["id"], by="summarizer", ends=1)
    assert "DPoP" in refused.stderr
    run("grant", "renew", issued["grant"]["id"], *bound, by="summarizer")


@pytest.mark.parametrize("content", [None, b"", b"no key", "rsa", "p384"])
def test_a_key_file_that_is_none_says_how_to_make_one(run, task, tmp_path, content):
    key_file = tmp_path / "dpop.pem"
    if content == "p384":
        key = ec.generate_private_key(ec.SECP384R1())
        content = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    elif content == "rsa":
        from tests.workloads import rsa_key

        content = rsa_key().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    if content is not None:
        key_file.write_bytes(content)
    told = run("grant", "request", "--task", task, *READ, "--dpop-key", key_file, by="summarizer", ends=2).stderr
    assert "openssl genpkey" in told


def test_a_refusal_names_the_policy_and_what_to_change_once(run, task):
    refused = run("grant", "request", "--task", task, *READ, "--ttl", "1h", by="summarizer", ends=1)
    assert refused.stdout == ""
    assert refused.stderr.count("policy 'crm-read' allows contacts:read") == 1
    assert "it would be allowed with ttl_s = 600" in refused.stderr
    assert "(configuration version 1); kept as grt_" in refused.stderr


def test_a_refusal_as_json_holds_the_whole_problem(run, task):
    refused = run("--json", "grant", "request", "--task", task, *READ, "--ttl", "1h", by="summarizer", ends=1)
    assert refused.stdout == ""
    assert json.loads(refused.stderr)["problem"]["decision"]["outcome"] == "deny"


def test_a_scope_that_is_not_offered_says_which_are(run, task):
    refused = run(
        *("grant", "request", "--task", task, "--resource", CRM, "--scope", "nothing"), by="summarizer", ends=1
    )
    assert "it offers contacts:read, contacts:write" in refused.stderr


# --- Revocation and lockdowns ---------------------------------------------------------------------------------------


def test_a_revocation_without_yes_shows_the_blast_radius_and_ends_nothing(run, task, grant):
    shown = run("revoke", "--task", task, "--reason", "incident 42", by="ada")
    assert "1 would end" in shown.stdout and "summarizer\t1" in shown.stdout and grant in shown.stdout
    assert "nothing was done: repeat with --yes" in shown.stderr
    assert json.loads(run("grant", "show", grant, "--json", by="ada").stdout)["live"] is True


def test_a_revocation_with_yes_ends_it(run, task, grant):
    done = json.loads(run("revoke", "--task", task, "--reason", "incident 42", "--yes", "--json", by="ada").stdout)
    assert done["dry_run"] is False and done["grants"] == 1 and done["by_agent"] == {"summarizer": 1}
    assert json.loads(run("grant", "show", grant, "--json", by="ada").stdout)["live"] is False


def test_a_revocation_with_lockdown_refuses_what_comes_next_until_it_is_lifted(run, task, grant):
    done = run("revoke", "--task", task, "--reason", "incident 42", "--lockdown", "--yes", by="ada")
    lockdown = done.stderr.split("broker lockdown lift ")[1].strip()
    assert lockdown in run("lockdown", "list", by="ada").stdout
    refused = run("grant", "request", "--task", task, *READ, by="summarizer", ends=1)
    assert "lockdown" in refused.stderr
    assert json.loads(run("lockdown", "lift", lockdown, "--json", by="ada").stdout)["lifted_by"] == "ada"
    assert lockdown not in run("lockdown", "list", by="ada").stdout
    assert lockdown in run("lockdown", "list", "--lifted", by="ada").stdout
    run("grant", "request", "--task", task, *READ, by="summarizer")


def test_a_lockdown_is_set_along_one_axis(run, task):
    stands = json.loads(run("lockdown", "set", "--task", task, "--reason", "incident 42", "--json", by="ada").stdout)
    assert (stands["axis"], stands["value"], stands["set_by"]) == ("task", task, "ada")
    run("lockdown", "lift", stands["id"], by="ada")


def test_everything_is_an_axis_of_its_own(run, grant):
    shown = run("revoke", "--all", "--reason", "drill", by="ada")
    assert "axis    all" in shown.stdout and "would end" in shown.stdout


@pytest.mark.parametrize("verb", ["revoke", "lockdown set"])
@pytest.mark.parametrize("axes", [(), ("--agent", "summarizer", "--task", "task_1"), ("--all", "--user", "u")])
def test_anything_but_one_axis_is_wrong_usage(run, verb, axes):
    assert "name exactly one of --task, --agent" in run(*verb.split(), *axes, "--reason", "r", by="ada", ends=2).stderr


def test_only_an_admin_revokes_along_an_axis(run):
    assert "admin" in run("revoke", "--all", "--reason", "r", "--yes", by="summarizer", ends=1).stderr


# --- Audit ----------------------------------------------------------------------------------------------------------


def test_the_audit_trail_is_filtered(run, task, grant):
    events = json.loads(run("audit", "list", "--task", task, "--type", "grant.issued", "--json", by="ada").stdout)
    assert [event["grant_id"] for event in events["items"]] == [grant]
    assert events["next_cursor"] is None
    listed = run("audit", "list", "--grant", grant, "--actor", "summarizer", by="ada").stdout.splitlines()
    assert listed[0].startswith("at\ttype\tactor") and len(listed) == 2


# --- Who calls, and where -------------------------------------------------------------------------------------------


def test_the_token_file_is_read_and_wins_over_the_variable(run, live_broker, tmp_path):
    token_file = tmp_path / "token"
    token_file.write_text(live_broker.token("ada") + "\n")
    run("audit", "list", "--limit", "1", env={"BROKER_TOKEN_FILE": str(token_file), "BROKER_TOKEN": "nonsense"})
    run("audit", "list", "--limit", "1", "--token-file", token_file, "--url", live_broker.url, env={"BROKER_URL": "x"})


def test_a_token_that_is_not_accepted_says_what_to_check_and_never_shows_it(run, live_broker):
    from broker.config.development import dev_issuer
    from broker.domain.clock import system_clock

    other = dev_issuer(live_broker.directory).token("dev:ada", "http://127.0.0.1:1", system_clock())
    told = run("audit", "list", env={"BROKER_TOKEN": other}, ends=1).stderr
    assert "BROKER_TOKEN_FILE" in told
    assert f"its audience is http://127.0.0.1:1, and the broker is {live_broker.url}" in told
    assert "its subject dev:ada" in told and "it expires at 20" in told
    assert not any(part in told for part in other.split("."))


def test_a_token_that_is_no_token_is_refused_like_any_other(run):
    told = run("audit", "list", env={"BROKER_TOKEN": "hunter2"}, ends=1).stderr
    assert "not accepted" in told and "hunter2" not in told


def test_a_token_file_that_is_missing_is_named(run, tmp_path):
    told = run("audit", "list", env={"BROKER_TOKEN_FILE": str(tmp_path / "none")}, ends=1).stderr
    assert "none does not exist" in told


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({}, "Set BROKER_URL"),
        ({"BROKER_URL": "http://127.0.0.1:1"}, "Set BROKER_TOKEN_FILE"),
        ({"BROKER_URL": "http://broker.example", "BROKER_TOKEN": "x"}, "use https"),
        ({"BROKER_URL": "https://broker.example/path", "BROKER_TOKEN": "x"}, "scheme and host only"),
        ({"BROKER_URL": "https://broker.example", "BROKER_TOKEN": "two words"}, "characters that no token has"),
    ],
)
def test_what_the_environment_does_not_say_is_wrong_usage(env, says):
    assert says in command("task", "list", env=env, ends=2).stderr


def test_a_token_on_the_command_line_is_refused_and_not_repeated():
    told = command("task", "list", "--url", "http://127.0.0.1:1", "--token", "hunter2", ends=2).stderr
    assert "can be read by others" in told and "hunter2" not in told


def test_a_broker_that_is_not_there_is_an_exit_code_of_its_own(monkeypatch):
    monkeypatch.setattr("broker.cli.client._PATIENCE_S", 0.1)
    env = {"BROKER_URL": f"http://127.0.0.1:{free_port()}", "BROKER_TOKEN": "x"}
    assert "is BROKER_URL right" in command("task", "list", env=env, ends=3).stderr
    assert "error" in json.loads(command("task", "list", "--json", env=env, ends=3).stderr)


def test_what_is_not_there_or_not_yours_is_one_answer(run, task):
    assert "no task" in run("task", "show", task, by="crm-api", ends=1).stderr
    assert "no task" in run("task", "show", "task_nothing", ends=1).stderr


@pytest.mark.parametrize("unsafe", ["../lockdowns", "task_1/complete", "task 1", ""])
def test_an_id_that_is_none_is_wrong_usage(run, unsafe):
    assert "not an id" in run("task", "show", unsafe, ends=2).stderr


@pytest.mark.parametrize(
    "duration", ["0", "-1", "1.5", "1e3", "nan", "inf", "", " 5", "5 m", "1w", "٣", "9999999999", "1h30m", "true"]
)
def test_a_duration_that_is_none_is_wrong_usage(run, duration):
    told = run("task", "open", "--purpose", "p", "--agent", "a", f"--deadline={duration}", ends=2).stderr
    assert "--deadline" in told and ("not a duration" in told or "it has to be from 1 s" in told)


@pytest.mark.parametrize(("duration", "seconds"), [("300", 300), ("90s", 90), ("15m", 900), ("1h", 3600)])
def test_a_duration_has_a_unit_or_is_seconds(run, duration, seconds):
    asked = ("task", "open", "--json", "--purpose", "p", "--agent", "summarizer", "--deadline", duration)
    opened = json.loads(run(*asked).stdout)
    assert _s(opened["deadline_at"]) - _s(opened["created_at"]) == seconds


def _s(time):
    from datetime import datetime

    return datetime.fromisoformat(time).timestamp()


@pytest.mark.parametrize("label", ["team", "=crm", ""])
def test_a_fact_that_is_none_is_wrong_usage(run, label):
    told = run("task", "open", "--purpose", "p", "--agent", "a", "--deadline", "1h", "--label", label, ends=2).stderr
    assert "is not KEY=VALUE" in told


def test_a_fact_given_twice_is_wrong_usage(run):
    twice = ("--label", "team=crm", "--label", "team=ledger")
    told = run("task", "open", "--purpose", "p", "--agent", "a", "--deadline", "1h", *twice, ends=2).stderr
    assert "'team' is given twice" in told


# --- On a terminal --------------------------------------------------------------------------------------------------


def on_a_terminal(live_broker, by, *arguments):
    """What a command writes to a terminal, and what to stderr beside it."""
    main_end, command_end = os.openpty()
    identity = {"BROKER_URL": live_broker.url, "BROKER_TOKEN": live_broker.token(by), "NO_COLOR": "1", "TERM": "xterm"}
    started = subprocess.Popen(
        [*BROKER, *arguments], env={**CLEAN, **identity}, stdout=command_end, stderr=subprocess.PIPE, text=True
    )
    os.close(command_end)
    written = b""
    # Read while it runs, or a full terminal would stop it; its end is an error on Linux.
    with contextlib.suppress(OSError):
        while part := os.read(main_end, 4096):
            written += part
    os.close(main_end)
    _, told = started.communicate(timeout=60)
    assert started.returncode == 0, told
    return written.decode(), told


def test_on_a_terminal_it_is_said_what_a_token_is_and_the_token_is_not_repeated(live_broker, task):
    written, told = on_a_terminal(live_broker, "summarizer", "grant", "request", "--task", task, *READ, "--token-only")
    assert written.startswith("eyJ") and len(written.split()) == 1
    assert "It is shown once" in told and "eyJ" not in told


def test_on_a_terminal_no_cell_is_broken_to_fit(live_broker, task, grant):
    written, _ = on_a_terminal(live_broker, "ada", "audit", "list", "--grant", grant)
    assert "at  " in written and "\t" not in written
    assert any(task in line and grant in line and CRM in line for line in written.splitlines())


@pytest.mark.parametrize("on_terminal", [False, True])
def test_text_of_others_cannot_change_the_terminal(capsys, on_terminal):
    # The broker refuses such text today; what stands in its database may be older, or of another broker.
    hostile = "a[bold]b\x1b[31mc\u202ed\ne\tf"
    console = Console(force_terminal=on_terminal, no_color=True, width=200, file=None)
    output.table(("text",), [[hostile]], empty="")(console)
    output.facts({"text": hostile, "list": [hostile], "map": {hostile: hostile}})(console)
    written = capsys.readouterr().out
    shown = "a[bold]b?[31mc?d?e?f"
    assert written.count(shown) == 5 and "[31m" in written
    assert not any(mark in written for mark in ("\x1b[31m", "\u202e", "\te", "d\n"))


# --- Signals ----------------------------------------------------------------------------------------------------------


def test_a_signal_is_sent_and_listed(run):
    said = ("--level", "medium", "--reason", "odd hours", "--source", "siem", "--expires", "5m")
    sent = json.loads(run("signal", "send", "--agent", "ledger-clerk", *said, "--json", by="ada").stdout)
    assert (sent["axis"], sent["value"], sent["level"], sent["source"]) == ("agent", "ledger-clerk", "medium", "siem")
    assert sent["id"] in run("signal", "list", by="ada").stdout
    assert sent["id"] in run("signal", "list", "--over", "--limit", "5", by="ada").stdout


def test_a_signal_is_about_one_and_no_agent_s_to_send(run):
    said = ("--level", "high", "--reason", "r")
    assert "exactly one" in run("signal", "send", *said, by="ada", ends=2).stderr
    assert "exactly one" in run("signal", "send", *said, "--agent", "a", "--user", "b", by="ada", ends=2).stderr
    assert "neither admin nor sentinel" in run("signal", "send", *said, "--agent", "scribe", ends=1).stderr
