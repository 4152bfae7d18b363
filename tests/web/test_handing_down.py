"""A sub-agent presents its parent's token, or names its grant: RFC 8693 and `/v1`."""

import jwt
import pytest

from broker.providers.dev_issuer import DevIssuer
from tests.web.test_oauth import EXCHANGE

CRM = "https://crm.example/api"
ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"
JWT = "urn:ietf:params:oauth:token-type:jwt"


@pytest.fixture
def task(web):
    return web.open_task("summarizer", "scribe")


@pytest.fixture
def parent(web, task):
    return web.grant(task).json


def exchange(web, parent, **more):
    asked = {
        "grant_type": EXCHANGE,
        "subject_token": parent["credential"]["token"],
        "subject_token_type": ACCESS_TOKEN,
        "scope": "contacts:read",
    }
    return web.form("/oauth2/token", **asked | more)


def claims_of(token):
    return jwt.decode(token, options={"verify_signature": False})


@pytest.mark.parametrize("way", ["client", "actor_token", "both"])
def test_a_parents_token_is_exchanged_for_a_part_of_it(web, task, parent, way):
    token = web.house.token("scribe")
    actor = {"actor_token": token, "actor_token_type": JWT}
    client = {**web.assertion("scribe"), "client_assertion": token}
    answer = exchange(web, parent, **{"client": client, "actor_token": actor, "both": client | actor}[way])
    assert answer.status_code == 200, answer.json
    assert answer.json["issued_token_type"] == ACCESS_TOKEN
    assert answer.json["task_id"] == task["id"]
    claims = claims_of(answer.json["access_token"])
    assert (claims["sub"], claims["act"], claims["aud"]) == ("summarizer", {"sub": "scribe"}, CRM)
    child = web.get(f"/v1/grants/{answer.json['grant_id']}", "scribe").json
    assert (child["parent_grant_id"], child["chain"]) == (parent["grant"]["id"], ["summarizer"])


def test_two_actors_are_refused(web, parent):
    actor = {"actor_token": web.house.token("summarizer"), "actor_token_type": JWT}
    refused = exchange(web, parent, **web.assertion("scribe"), **actor)
    assert (refused.status_code, refused.json["error"]) == (400, "invalid_request")


@pytest.mark.parametrize(
    ("actor", "says"),
    [
        ({"actor_token": "nonsense", "actor_token_type": JWT}, "actor_token"),
        ({"actor_token": "nonsense"}, "actor_token_type"),
        ({"actor_token_type": JWT}, "actor_token_type"),
    ],
)
def test_an_actor_that_is_not_proven_is_refused(web, parent, actor, says):
    refused = exchange(web, parent, **actor)
    assert (refused.status_code, refused.json["error"]) == (400, "invalid_request")
    assert says in refused.json["error_description"]


def test_an_act_that_somebody_wrote_into_a_subject_token_means_nothing(web, task, tmp_path):
    """Only a token of ours is a parent: what a workload's own token says of actors is not read."""
    forger = DevIssuer.create_or_load(tmp_path / "forger")
    forged = forger.token("dev:summarizer", "http://127.0.0.1:8080", web.house.clock())
    refused = exchange(web, {"credential": {"token": forged}}, **web.assertion("scribe"), resource=CRM)
    assert (refused.status_code, refused.json["error"]) == (400, "invalid_request")


def refusals(web, token, **asked):
    answer = exchange(web, {"credential": {"token": token}}, **web.assertion("scribe"), **asked)
    return answer.status_code, answer.json["error"], answer.json["error_description"]


@pytest.mark.parametrize("asked", [{}, {"scope": "no:such"}, {"resource": "https://ledger.example/api"}])
def test_whom_the_task_does_not_name_cannot_tell_a_live_token_from_a_dead_one(web, asked):
    """INV-28."""
    theirs = web.grant(web.open_task("summarizer")).json
    live = refusals(web, theirs["credential"]["token"], **asked)
    web.post(f"/v1/grants/{theirs['grant']['id']}/revoke", "summarizer", json={})
    assert live == refusals(web, theirs["credential"]["token"], **asked)
    assert live[:2] == (400, "invalid_request")


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"scope": "contacts:read contacts:write"}, "invalid_scope"),
        ({"resource": "https://ledger.example/api"}, "invalid_target"),
        ({"task_id": "task_0000000000000000000000000a"}, "invalid_request"),
    ],
)
def test_more_than_the_parent_has_is_refused(web, parent, asked, error):
    answer = exchange(web, parent, **web.assertion("scribe"), **asked)
    assert (answer.status_code, answer.json["error"]) == (400, error), answer.json


def test_a_grant_is_named_as_the_parent(web_on_both):
    web = web_on_both
    task = web.open_task("summarizer", "scribe")
    parent = web.grant(task, hand_to=["scribe"]).json
    unnamed = web.grant(task).json["grant"]["id"]
    refused = web.grant(task, by="scribe", parent_grant_id=unnamed)
    assert (refused.status_code, refused.json["member"]) == (404, "parent_grant_id")
    answer = web.grant(task, by="scribe", parent_grant_id=parent["grant"]["id"])
    assert answer.status_code == 201, answer.json
    assert answer.json["grant"]["parent_grant_id"] == parent["grant"]["id"]
    assert web.introspect(answer.json["credential"]["token"])["act"] == {"sub": "scribe"}
    nothing = web.grant(task, by="scribe", parent_grant_id="grt_0000000000000000000000000a")
    assert (nothing.status_code, nothing.json["member"]) == (404, "parent_grant_id")


def test_who_handed_it_down_takes_it_back_by_its_token(web, parent):
    child = exchange(web, parent, **web.assertion("scribe")).json
    answer = web.form("/oauth2/revoke", token=child["access_token"], **web.assertion("summarizer"))
    assert answer.status_code == 200
    assert web.introspect(child["access_token"]) == {"active": False}
    assert web.introspect(parent["credential"]["token"])["active"]


def test_who_holds_a_part_does_not_end_the_whole(web, parent):
    exchange(web, parent, **web.assertion("scribe"))
    answer = web.form("/oauth2/revoke", token=parent["credential"]["token"], **web.assertion("scribe"))
    assert answer.status_code == 200
    assert web.introspect(parent["credential"]["token"])["active"]
