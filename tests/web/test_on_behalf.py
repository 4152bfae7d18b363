"""An agent that acts for a person: both are in the token, the row, the audit trail and the policy's question."""

from dataclasses import replace
from datetime import timedelta

import jwt
import pytest

from broker.domain.clock import epoch
from broker.providers import jose
from broker.providers.dev_issuer import PEOPLE
from tests.house import ISSUER, POLICIES, catalogue_for
from tests.web.test_oauth import EXCHANGE

CRM = "https://crm.example/api"
ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"
JWT = "urn:ietf:params:oauth:token-type:jwt"
JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
ALICE = "people:alice"


def with_people(web, **more):
    catalogue = catalogue_for(web.house.issuer)
    web.house.broker.administration.apply(replace(catalogue, **more), by="tests")
    return web


@pytest.fixture
def people(web):
    return with_people(web)


@pytest.fixture
def people_on_both(web_on_both):
    return with_people(web_on_both)


def user_token(web, subject="alice", *, typ="JWT", **changed):
    now = web.house.clock()
    claims = {
        "iss": PEOPLE,
        "sub": subject,
        "aud": ISSUER,
        "iat": epoch(now),
        "exp": epoch(now + timedelta(hours=1)),
        "jti": f"jti-{subject}-{len(changed)}",
    } | changed
    key = web.house.issuer._key
    return jose.sign(claims, key=key, algorithm="ES256", kid=web.house.issuer.kid, typ=typ)


def exchange(web, token, task, *, by="summarizer", **more):
    asked = {
        "grant_type": EXCHANGE,
        "subject_token": token,
        "subject_token_type": ACCESS_TOKEN,
        "resource": CRM,
        "scope": "contacts:read",
        "task_id": task["id"],
        **(web.assertion(by) if by else {}),
    }
    return web.form("/oauth2/token", **asked | more)


def claims_of(token):
    return jwt.decode(token, options={"verify_signature": False})


def events_of(web, grant_id):
    return web.get(f"/v1/audit?grant={grant_id}", "audrey").json["items"]


# --- Three ways to say it ---------------------------------------------------------------------------------------------


def test_a_users_token_is_exchanged_for_one_with_both(people_on_both):
    web = people_on_both
    answer = exchange(web, user_token(web), web.open_task())
    assert answer.status_code == 200, answer.json
    claims = claims_of(answer.json["access_token"])
    assert (claims["sub"], claims["act"], claims["client_id"]) == (ALICE, {"sub": "summarizer"}, "summarizer")
    grant = web.get(f"/v1/grants/{answer.json['grant_id']}", "summarizer").json
    assert (grant["on_behalf_of"], grant["agent"]) == (ALICE, "summarizer")
    [event] = events_of(web, grant["id"])
    assert (event["user"], event["agent"], event["actor"]) == (ALICE, "summarizer", "summarizer")
    assert web.introspect(answer.json["access_token"])["sub"] == ALICE


def test_the_agent_may_be_the_actor_token(people):
    actor = {"actor_token": people.house.token("summarizer"), "actor_token_type": JWT}
    answer = exchange(people, user_token(people), people.open_task(), by=None, **actor)
    assert claims_of(answer.json["access_token"])["act"] == {"sub": "summarizer"}


def test_never_a_token_without_an_actor(people):
    refused = exchange(people, user_token(people), people.open_task(), by=None)
    assert (refused.status_code, refused.json["error"]) == (400, "invalid_request")
    direct = {"grant_type": JWT_BEARER, "assertion": user_token(people), "resource": CRM, "scope": "contacts:read"}
    assert people.form("/oauth2/token", **direct).json["error"] == "invalid_grant"
    asking = people.client.get("/v1/tasks", headers={"Authorization": f"Bearer {user_token(people)}"})
    assert asking.status_code == 401


def test_as_a_member_of_a_grants_request(people_on_both):
    web = people_on_both
    answer = web.grant(web.open_task(), on_behalf_of=user_token(web))
    assert answer.status_code == 201, answer.json
    assert answer.json["grant"]["on_behalf_of"] == ALICE
    assert claims_of(answer.json["credential"]["token"])["sub"] == ALICE


def test_a_task_is_opened_for_a_user_and_all_of_it_is_theirs(people_on_both):
    web = people_on_both
    task = web.open_task(on_behalf_of=user_token(web))
    assert task["on_behalf_of"] == ALICE
    mine = web.grant(task).json
    assert mine["grant"]["on_behalf_of"] == ALICE
    assert web.grant(task, on_behalf_of=user_token(web)).status_code == 201
    bobs = web.grant(task, on_behalf_of=user_token(web, "bob"))
    assert (bobs.status_code, bobs.json["code"]) == (403, "forbidden")
    assert [found["id"] for found in web.get("/v1/tasks?user=people:alice", "pipeline").json["items"]] == [task["id"]]


def test_what_is_handed_down_stays_the_users(people_on_both):
    web = people_on_both
    task = web.open_task("summarizer", "scribe")
    parent = web.grant(task, on_behalf_of=user_token(web), hand_to=["scribe"]).json
    named = {"parent_grant_id": parent["grant"]["id"]}
    child = web.grant(task, by="scribe", **named).json
    assert child["grant"]["on_behalf_of"] == ALICE
    claims = claims_of(child["credential"]["token"])
    assert (claims["sub"], claims["act"]) == (ALICE, {"sub": "scribe", "act": {"sub": "summarizer"}})
    assert web.grant(task, by="scribe", **named, on_behalf_of=user_token(web, "bob")).status_code == 403
    nobodys = web.grant(task, hand_to=["scribe"]).json["grant"]["id"]
    added = web.grant(task, by="scribe", parent_grant_id=nobodys, on_behalf_of=user_token(web))
    assert added.status_code == 403 and "nobody's behalf" in added.json["detail"]


def test_it_ends_with_the_users_token_also_when_it_is_renewed(people):
    ends = epoch(people.house.clock()) + 120
    answer = people.grant(people.open_task(), ttl_s=600, on_behalf_of=user_token(people, exp=ends)).json
    assert answer["grant"]["ttl_decided_by"] == "user"
    assert claims_of(answer["credential"]["token"])["exp"] == ends
    people.house.clock.forward(seconds=60)
    renewed = people.post(f"/v1/grants/{answer['grant']['id']}/renew", "summarizer", json={"ttl_s": 600}).json
    assert claims_of(renewed["credential"]["token"])["exp"] == ends
    assert renewed["grant"]["on_behalf_of"] == ALICE
    assert claims_of(renewed["credential"]["token"])["sub"] == ALICE


# --- The policy, and the user's axis ----------------------------------------------------------------------------------


def test_a_policy_sees_the_user(web):
    bob = 'context has user && context.user == "people:bob"'
    stop = {"stop.cedar": f'@id("not-bob") forbid (principal, action, resource) when {{ {bob} }};'}
    with_people(web, policies=POLICIES | stop)
    task = web.open_task()
    assert web.grant(task, on_behalf_of=user_token(web)).status_code == 201
    refused = web.grant(task, on_behalf_of=user_token(web, "bob"))
    assert (refused.status_code, refused.json["decision"]["policies"]) == (403, ["not-bob"])


@pytest.mark.parametrize("lockdown", [False, True], ids=["revocation", "lockdown"])
def test_all_of_a_user_is_revoked_and_nothing_of_another(people_on_both, lockdown):
    web = people_on_both
    task = web.open_task("summarizer", "scribe")
    alices = web.grant(task, on_behalf_of=user_token(web), hand_to=["scribe"]).json
    handed = web.grant(task, by="scribe", parent_grant_id=alices["grant"]["id"]).json
    bobs = web.grant(task, on_behalf_of=user_token(web, "bob")).json
    body = {"user": ALICE, "reason": "left the company", "lockdown": lockdown}
    assert web.post("/v1/revocations", "ada", json=body).json["grants"] == 2
    assert [web.introspect(each["credential"]["token"])["active"] for each in (alices, handed, bobs)] == [
        False, False, True,
    ]  # fmt: skip
    assert web.grant(task, on_behalf_of=user_token(web)).status_code == (403 if lockdown else 201)


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"aud": "https://other.example"},
        {"aud": [ISSUER, "https://other.example"]},
        {"iss": "http://stranger.localhost"},
        {"exp": 1},
        {"sub": "x" * 300},
        {"may_act": {"sub": "dev:scribe"}},
        {"may_act": {"sub": "dev:summarizer", "iss": "http://other.localhost"}},
        {"may_act": {"sub": "dev:summarizer", "and": "only on Mondays"}},
        {"may_act": "dev:summarizer"},
        {"may_act": None},
        {"may_act": {"sub": "dev:summarizer"}},
        {"cnf": {"jkt": "k" * 43}},
    ],
    ids=str,
)
def test_a_users_token_that_does_not_hold_is_refused_and_not_explained(people, changed):
    task = people.open_task()
    refused = people.grant(task, on_behalf_of=user_token(people, **changed))
    assert (refused.status_code, refused.json["member"]) == (400, "on_behalf_of"), refused.json
    assert refused.json["detail"].startswith("on_behalf_of is not accepted")
    exchanged = exchange(people, user_token(people, **changed), task)
    assert (exchanged.status_code, exchanged.json["error"]) == (400, "invalid_request")


def test_a_workloads_token_is_nobody_to_act_for(people):
    refused = people.grant(people.open_task(), on_behalf_of=people.house.token("scribe"))
    assert (refused.status_code, refused.json["member"]) == (400, "on_behalf_of")


def test_who_may_act_is_who_the_token_names(people):
    named = {"sub": "dev:summarizer", "iss": "http://dev.localhost"}
    task = people.open_task("summarizer", "scribe")
    assert people.grant(task, on_behalf_of=user_token(people, may_act=named)).status_code == 201
    assert people.grant(task, by="scribe", on_behalf_of=user_token(people, may_act=named)).status_code == 400


def test_a_whole_task_is_not_opened_with_what_is_for_one(people):
    """Everybody in the task would act by it, for anything."""
    named = {"sub": "dev:pipeline", "iss": "http://dev.localhost"}
    body = {"purpose": "p", "agents": ["summarizer"], "deadline_s": 60}
    for token in (user_token(people, may_act=named), assertion(people, client_id="pipeline")):
        refused = people.post("/v1/tasks", "pipeline", json=body | {"on_behalf_of": token})
        assert (refused.status_code, refused.json["member"]) == (400, "on_behalf_of"), refused.json


def test_act_in_a_users_token_is_not_believed(people):
    """Who acts is who proves it here, whatever somebody wrote into the token."""
    forged = user_token(people, act={"sub": "ada"})
    answer = exchange(people, forged, people.open_task())
    assert claims_of(answer.json["access_token"])["act"] == {"sub": "summarizer"}


# --- Identity assertions for another domain (ID-JAG) ------------------------------------------------------------------


def assertion(web, **changed):
    claims = {"client_id": "summarizer", "resource": CRM, "scope": "contacts:read"} | changed
    return user_token(web, typ="oauth-id-jag+jwt", jti=f"jag-{sorted(changed.items())}", **claims)


def by_assertion(web, token, task, by="summarizer", **more):
    asked = {"resource": CRM, "scope": "contacts:read", "task_id": task["id"], **web.assertion(by)}
    return web.form("/oauth2/token", grant_type=JWT_BEARER, assertion=token, **asked | more)


def test_an_identity_assertion_is_accepted_once_from_its_client(people_on_both):
    web = people_on_both
    task, token = web.open_task("summarizer", "scribe"), assertion(web)
    stolen = by_assertion(web, token, task, by="scribe")
    assert (stolen.status_code, stolen.json["error"]) == (400, "invalid_grant")
    answer = by_assertion(web, token, task)
    assert answer.status_code == 200, answer.json
    assert claims_of(answer.json["access_token"])["sub"] == ALICE
    again = by_assertion(web, token, task)
    assert (again.status_code, again.json["error"]) == (400, "invalid_grant")


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"scope": "contacts:write"}, "invalid_scope"),
        ({"resource": "https://ledger.example/api"}, "invalid_target"),
        ({"resource": ["https://ledger.example/api"]}, "invalid_target"),
        ({"client_id": "somebody"}, "invalid_grant"),
        ({"scope": ["contacts:read"]}, "invalid_grant"),
        ({"resource": 7}, "invalid_grant"),
    ],
)
def test_an_identity_assertion_is_good_for_what_it_says(people, changed, error):
    answer = by_assertion(people, assertion(people, **changed), people.open_task())
    assert (answer.status_code, answer.json["error"]) == (400, error), answer.json


def test_no_token_of_a_user_is_kept(people, caplog):
    token = user_token(people)
    people.open_task(on_behalf_of=token)
    people.grant(people.open_task(), on_behalf_of=token)
    people.grant(people.open_task(), on_behalf_of=token[:-4] + "AAAA")
    with people.house.broker.database.engine.connect() as db:
        stored = "\n".join(db.connection.driver_connection.iterdump())
    for part in token.split(".")[1:]:
        assert part not in stored and part not in caplog.text


def test_nothing_is_given_for_a_user_whose_issuer_was_taken_out(people_on_both):
    web = people_on_both
    task = web.open_task(on_behalf_of=user_token(web))
    out = web.grant(task).json
    catalogue = catalogue_for(web.house.issuer)
    web.house.broker.administration.apply(replace(catalogue, issuers=catalogue.issuers[:1]), by="tests")
    refused = web.grant(task)
    assert (refused.status_code, refused.json["code"]) == (403, "forbidden")
    assert web.post(f"/v1/grants/{out['grant']['id']}/renew", "summarizer", json={}).status_code == 403
    web.house.broker.redeciding.run()
    assert web.introspect(out["credential"]["token"]) == {"active": False}


# --- What their issuer says of them -----------------------------------------------------------------------------------

BY_GROUP = """
@id("of-finance")
permit (principal, action == Action::"contacts:read", resource)
when {
  context has user_attributes && context.user_attributes has groups &&
  context.user_attributes.groups.contains("finance")
};
@id("of-level-three")
permit (principal, action == Action::"contacts:read", resource)
when {
  context has user_attributes && context.user_attributes has level &&
  context.user_attributes.level.contains("3")
};
"""


@pytest.fixture
def known(web):
    catalogue = catalogue_for(web.house.issuer)
    said = {"groups": "groups", "level": "org.level"}
    issuers = tuple(replace(one, user_attributes=said) if one.users else one for one in catalogue.issuers)
    return with_people(web, issuers=issuers, policies={"by-group.cedar": BY_GROUP})


@pytest.mark.parametrize(
    ("claims", "status"),
    [
        ({}, 403),
        ({"groups": "finance"}, 201),
        ({"groups": ["hr", "finance"]}, 201),
        ({"groups": ["hr"]}, 403),
        ({"groups": []}, 403),
        ({"groups": None}, 403),
        ({"org": {"level": 3}}, 201),
        ({"org": {"level": True}}, 403),
        ({"level": 3}, 403),
        ({"user_attributes": {"groups": ["finance"]}}, 403),
    ],
)
def test_policy_sees_what_the_configuration_lets_in_and_nothing_else(known, claims, status):
    answer = known.grant(known.open_task(), on_behalf_of=user_token(known, **claims))
    assert answer.status_code == status, answer.json
    shown = exchange(known, user_token(known, **claims), known.open_task())
    assert shown.status_code == (200 if status == 201 else 400)


@pytest.mark.parametrize(
    "groups",
    [
        {"finance": True},
        [["finance"]],
        [1.5],
        3.5,
        ["finance", None],
        ["a\0b"],
        ["a\nb"],
        ["\u202efinance"],
        ["x" * 256],
        [f"group-{number}" for number in range(101)],
    ],
)
def test_what_is_no_plain_text_is_refused_and_not_left_out(known, groups):
    """Left out, a policy that forbids by it would forbid nothing."""
    answer = known.grant(known.open_task(), on_behalf_of=user_token(known, groups=groups))
    assert (answer.status_code, answer.json["member"]) == (400, "on_behalf_of")
    body = {"purpose": "x", "agents": ["summarizer"], "deadline_s": 60}
    opened = known.post("/v1/tasks", "pipeline", json={**body, "on_behalf_of": user_token(known, groups=groups)})
    assert (opened.status_code, opened.json["member"]) == (400, "on_behalf_of")


def test_a_task_does_not_tell_what_is_known_of_its_user(known):
    groups = ["finance", "of-three-and-four"]
    task = known.open_task(on_behalf_of=user_token(known, groups=groups))
    assert groups[1] not in str(task)
    answer = known.grant(task)
    assert answer.status_code == 201
    assert groups[1] not in str(answer.json)
