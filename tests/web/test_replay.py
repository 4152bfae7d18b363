"""Drafts over the wire: who may, what is answered, and what a bad one gets."""

import pytest

from tests.house import POLICIES

FORBID = '@id("no-crm") forbid (principal == Agent::"summarizer", action, resource);'
DRAFT = {"policies": {**POLICIES, "no.cedar": FORBID}}


def put(web, by, body, query=""):
    return web.client.put(f"/v1/policies{query}", headers=web.as_(by), json=body)


def test_a_draft_is_replayed_and_then_put_in_force(web_on_both):
    web = web_on_both
    granted = web.grant(web.open_task()).json
    replayed = web.post("/v1/policies/replay", "audrey", json=DRAFT)
    assert replayed.status_code == 200
    assert (replayed.json["requests"], replayed.json["newly_denied"]) == (1, 1)
    assert replayed.json["live"]["samples"][0]["grant_id"] == granted["grant"]["id"]
    shown = put(web, "ada", DRAFT, "?dry_run=true").json
    assert (shown["version"], shown["dry_run"], shown["live"]["ended"]) == (None, True, 1)
    assert web.get("/v1/policies", "ada").json["items"][0]["version"] == 1
    assert put(web, "ada", DRAFT).json == {"version": 2, "dry_run": False, "live": None}
    web.house.broker.redeciding.run()
    assert web.introspect(granted["credential"]["token"]) == {"active": False}


@pytest.mark.parametrize(
    ("body", "member"),
    [
        ({}, "policies"),
        ({"policies": {}}, "policies"),
        ({"policies": {"../../etc/passwd": "x"}}, "policies"),
        ({"policies": {"x.txt": "x"}}, "policies"),
        ({"policies": {"x.cedar": 7}}, "policies"),
        ({"policies": [], "schema": "x"}, "policies"),
        ({"policies": {"x.cedar": "permit ("}}, "policies"),
        ({"policies": {"x.cedar": ""}}, "policies"),
        ({"policies": {"x.cedar": '@id("x") permit (principal, action, resource);'}}, "policies"),
        ({"policies": {"x.cedar": "a\u0000b"}}, "policies"),
        ({**DRAFT, "schema": ""}, "schema"),
        ({**DRAFT, "schema": "entity"}, "policies"),
        ({**DRAFT, "schema_": "x"}, "schema_"),
        ({**DRAFT, "principals": []}, "principals"),
    ],
)
def test_a_bad_draft_is_a_400_that_names_what_is_wrong(web, body, member):
    for answer in (web.post("/v1/policies/replay", "ada", json=body), put(web, "ada", body)):
        assert answer.status_code == 400, answer.json
        assert answer.json["member"].startswith(member)
    assert web.get("/v1/policies", "ada").json["items"][0]["version"] == 1


@pytest.mark.parametrize("more", [{"period_s": 0}, {"period_s": "1"}, {"limit": 0}, {"limit": 100_001}, {"limit": "x"}])
def test_a_replay_has_bounds(web, more):
    answer = web.post("/v1/policies/replay", "ada", json={**DRAFT, **more})
    assert (answer.status_code, answer.json["member"]) == (400, next(iter(more)))


@pytest.mark.parametrize("query", ["?dry_run=yes", "?dry_run", "?dryrun=true"])
def test_a_dry_run_that_is_not_spelled_like_one_puts_nothing_in_force(web, query):
    assert put(web, "ada", DRAFT, query).status_code == 400
    assert web.get("/v1/policies", "ada").json["items"][0]["version"] == 1


def test_each_door_opens_for_its_roles_alone(web):
    assert put(web, "audrey", DRAFT).status_code == 403
    assert put(web, "audrey", DRAFT, "?dry_run=true").status_code == 403
    assert web.post("/v1/policies/replay", "summarizer", json=DRAFT).status_code == 403
    assert web.client.put("/v1/policies", json=DRAFT).status_code == 401
    assert web.get("/v1/policies", "ada").json["items"][0]["version"] == 1
