"""What verifiers are told: introspection, status lists, keys; each by an unmodified verifier where there is one."""

import base64
import json
import zlib
from dataclasses import replace
from datetime import timedelta

import jwt
import pytest

from broker.domain.errors import NotFound
from broker.domain.lifecycle import TaskState
from tests.house import CRM, ISSUER, LEDGER, POLICIES, catalogue_for


def status_of(house, issued):
    token = house.broker.verification.status_list(issued.grant.status_list)
    keys = jwt.PyJWKSet.from_dict(house.broker.verification.jwks())
    key = keys[jwt.get_unverified_header(token)["kid"]]
    claims = jwt.decode(token, key, algorithms=["ES256"], options={"verify_exp": False, "verify_iat": False})
    bits = claims["status_list"]["bits"]
    raw = zlib.decompress(base64.urlsafe_b64decode(claims["status_list"]["lst"] + "=="))
    index = issued.grant.status_index
    assert jwt.get_unverified_header(token)["typ"] == "statuslist+jwt"
    assert claims["sub"] == f"{ISSUER}/status-lists/{issued.grant.status_list}"
    assert claims["ttl"] <= 15
    assert claims["exp"] - claims["iat"] <= 15
    return raw[index * bits // 8] >> (index * bits % 8) & (2**bits - 1)


def test_introspection_answers_a_verifier_of_that_audience_and_nobody_else(house):
    token = house.issue(house.open_task()).credential.token.reveal()
    answer = house.broker.verification.introspect(house.caller("crm-api"), token)
    assert answer["active"] is True
    assert (answer["aud"], answer["scope"], answer["token_type"]) == (CRM, "contacts:read", "Bearer")
    for stranger in ("ledger-api", "ada", "summarizer", "pipeline"):
        assert house.broker.verification.introspect(house.caller(stranger), token) == {"active": False}


def damaged(token):
    head, payload, signature = token.split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
    widened = base64.urlsafe_b64encode(json.dumps(claims | {"scope": "contacts:write"}).encode()).rstrip(b"=").decode()
    none = base64.urlsafe_b64encode(b'{"alg":"none","typ":"at+jwt"}').rstrip(b"=").decode()
    return [
        "",
        ".",
        "..",
        "a.b.c",
        token[:-1],
        token + "A",
        token + "=",
        " " + token,
        f"{head}.{widened}.{signature}",
        f"{none}.{payload}.",
        f"{head}.{payload}.",
        f"{head}.{payload}.{signature[::-1]}",
        "x" * 10_000,
        "\ud800",
        "\x00",
    ]


def test_anything_but_a_live_token_of_ours_is_inactive(house):
    token = house.issue(house.open_task()).credential.token.reveal()
    for wrong in [*damaged(token), house.token("summarizer")]:
        assert house.broker.verification.introspect(house.caller("crm-api"), wrong) == {"active": False}, wrong[:40]


def test_a_status_list_shows_a_task_that_fell_silent_without_waiting_for_the_sweeper(house):
    silent, other = house.open_task(heartbeat=timedelta(seconds=30)), house.open_task()
    of_silent, of_other = house.issue(silent), house.issue(other)
    house.clock.forward(seconds=29)
    assert (status_of(house, of_silent), status_of(house, of_other)) == (0, 0)
    house.clock.forward(seconds=2)
    assert (status_of(house, of_silent), status_of(house, of_other)) == (1, 0)
    assert not house.is_active(of_silent)


def test_a_token_is_inactive_the_second_it_expires(house):
    issued = house.issue(house.open_task())
    house.clock.forward(seconds=299)
    assert house.is_active(issued)
    house.clock.forward(seconds=1)
    assert not house.is_active(issued)


def test_a_token_of_a_resource_that_was_taken_out_is_inactive(house):
    issued = house.issue(house.open_task())
    catalogue = catalogue_for(house.issuer)
    kept = tuple(resource for resource in catalogue.resources if resource.identifier == LEDGER)
    nothing = {"none.cedar": '@id("none") forbid (principal, action, resource);'}
    house.broker.administration.apply(replace(catalogue, resources=kept, policies=nothing), by="tests")
    assert not house.is_active(issued)


def test_a_status_list_shows_a_revocation_at_once_and_only_it(house):
    task = house.open_task()
    ended, kept = house.issue(task), house.issue(task)
    assert (status_of(house, ended), status_of(house, kept)) == (0, 0)
    house.broker.revocation.revoke_grant(house.caller("summarizer"), ended.grant.id)
    house.clock.forward(seconds=5)
    assert (status_of(house, ended), status_of(house, kept)) == (1, 0)


def test_a_status_list_shows_a_bulk_revocation_without_waiting_for_rows_or_its_own_age(house, monkeypatch):
    issued = house.issue(house.open_task())
    assert status_of(house, issued) == 0
    monkeypatch.setattr(house.broker.revocation, "follow", lambda *_, **__: 0)
    house.broker.revocation.revoke_along(house.caller("ada"), "agent", "summarizer", reason="drill")
    assert status_of(house, issued) == 1


def test_a_status_list_shows_the_end_of_a_task_that_nobody_swept(house):
    issued = house.issue(house.open_task(deadline_s=60))
    house.clock.forward(seconds=60)
    assert status_of(house, issued) == 1


def test_one_tasks_indexes_are_side_by_side_and_never_given_twice(house, second_house):
    tasks = [house.open_task() for _ in range(3)]
    seen = set()
    for task in tasks:
        own = [house.issue(task).grant for _ in range(8)]
        assert [grant.status_index for grant in own] == list(range(own[0].status_index, own[0].status_index + 8))
        seen |= {(grant.status_list, grant.status_index) for grant in own}
    seen |= {(grant.status_list, grant.status_index) for grant in [second_house.issue(tasks[0]).grant]}
    assert len(seen) == 25


def test_a_status_list_that_is_not_there_is_not_found(house):
    with pytest.raises(NotFound):
        house.broker.verification.status_list(999)


def test_status_lists_are_named_as_long_as_a_token_may_point_to_them(house):
    issued = house.issue(house.open_task())
    uri = f"{ISSUER}/status-lists/{issued.grant.status_list}"
    assert house.broker.verification.status_lists() == {"status_lists": [uri]}
    house.clock.forward(hours=4)
    assert house.broker.verification.status_lists() == {"status_lists": []}


def test_another_broker_on_the_same_store_answers_the_same(house, second_house):
    task = house.open_task()
    issued = house.issue(task)
    assert second_house.is_active(issued)
    house.broker.keys.rotate(None, actor="ada", now=house.clock())
    after = house.issue(task)
    assert second_house.is_active(after)
    assert second_house.is_active(issued)
    house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED)
    assert not second_house.is_active(issued)
    assert not second_house.is_active(after)


def test_a_new_configuration_is_followed_by_every_broker_in_its_next_decision(house, second_house):
    task = house.open_task()
    second_house.issue(task)
    stale = second_house.caller("summarizer")
    narrower = {"crm.cedar": POLICIES["crm.cedar"].replace("context.ttl_s <= 600", "context.ttl_s <= 1")}
    house.broker.administration.apply(replace(catalogue_for(house.issuer), policies=narrower), by="tests")
    with pytest.raises(Exception, match="crm-read"):
        second_house.issue(task, caller=stale)
