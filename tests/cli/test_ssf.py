"""`broker ssf`: what admins see of the streams of others, and do to them."""

import json

import httpx
import pytest


@pytest.fixture
def stream(live_broker):
    headers = {"Authorization": f"Bearer {live_broker.token('crm-api')}"}
    with httpx.Client(base_url=live_broker.url, headers=headers, trust_env=False, timeout=60) as client:
        made = client.post("/ssf/streams", json={"description": "the CRM"}).json()
        yield made["stream_id"]
        client.delete("/ssf/streams", params={"stream_id": made["stream_id"]})


def test_a_stream_is_listed_shown_paused_resumed_and_deleted(run, stream):
    listed = run("ssf", "list", by="ada").stdout
    assert stream in listed
    assert "crm-api" in listed
    assert "session-revoked, credential-change" in run("ssf", "show", stream, by="ada").stdout
    paused = json.loads(run("ssf", "pause", stream, "--reason", "maintenance", "--json", by="ada").stdout)
    assert (paused["status"], paused["set_by"], paused["reason"]) == ("paused", "admin", "maintenance")
    resumed = json.loads(run("ssf", "resume", stream, "--json", by="ada").stdout)
    assert resumed["status"] == "enabled"
    run("ssf", "delete", stream, by="ada")
    assert stream not in run("ssf", "list", "--limit", "5", by="ada").stdout


def test_the_streams_of_others_are_for_admins(run, stream):
    for arguments in (("list",), ("show", stream), ("pause", stream, "--reason", "x"), ("resume", stream)):
        assert "that is for admins" in run("ssf", *arguments, by="summarizer", ends=1).stderr


def test_a_stream_that_is_none_is_refused_before_anything_is_asked(run):
    assert "not an id" in run("ssf", "show", "../lockdowns", by="ada", ends=2).stderr
