"""The main job over real HTTP: a credential is issued for a task, the task ends, every verifier refuses it."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import jwt

from broker.domain.clock import system_clock
from tests.house import CRM
from tests.processes import until
from tests.workloads import dpop_proof, issuer_key

OFFLINE_BOUND_S = 15


def test_a_credential_dies_with_its_task_for_every_verifier(brokers):
    broker, verifiers_broker = brokers
    task_id, other_task_id = broker.open_task(), broker.open_task()
    grant, beside = broker.grant(task_id), broker.grant(other_task_id)

    # An API that checks offline: an unmodified library, knowing only where the keys are.
    keys = jwt.PyJWKClient(f"{verifiers_broker.url}/oauth2/jwks")
    key = keys.get_signing_key_from_jwt(grant.token)
    claims = jwt.decode(grant.token, key, algorithms=["ES256"], audience=CRM, issuer=broker.deployment.issuer)
    assert (claims["task_id"], claims["grant_id"], claims["scope"]) == (task_id, grant.id, "contacts:read")
    answer = verifiers_broker.introspect(grant.token).json()
    assert (answer["active"], answer["client_id"], answer["jti"]) == (True, "summarizer", claims["jti"])

    receipt = broker.complete(task_id)
    assert not verifiers_broker.is_active(grant.token)
    assert verifiers_broker.introspect(grant.token).json() == {"active": False}
    assert verifiers_broker.is_active(beside.token)
    assert [line["grant_id"] for line in receipt["grants"]] == [grant.id]
    assert receipt["totals"]["ended"] == 1
    assert broker.ask(task_id).json()["code"] == "task_not_active"

    # What the receipt says is what its signature covers, by a key that is published.
    receipt_key = keys.get_signing_key_from_jwt(receipt["jws"])
    signed = jwt.decode(receipt["jws"], receipt_key, algorithms=["ES256"], issuer=broker.deployment.issuer)
    assert signed["sub"] == task_id
    assert signed["receipt"] == {name: value for name, value in receipt.items() if name != "jws"}
    again = verifiers_broker.complete(task_id)
    assert [line["authority_ended_at"] for line in again["grants"]] == [receipt["grants"][0]["authority_ended_at"]]
    assert (again["ended_at"], again["outcome"]) == (receipt["ended_at"], "completed")
    assert verifiers_broker.get(f"/v1/tasks/{task_id}/receipt", "pipeline").json()["ended_at"] == receipt["ended_at"]

    # And the one that keeps a list learns of it within the published bound; the neighbour stays valid.
    until(lambda: verifiers_broker.status_of(grant.token) == 1, within_s=OFFLINE_BOUND_S, what="an invalid status")
    assert verifiers_broker.status_of(beside.token) == 0

    events = broker.get(f"/v1/audit?task={task_id}", "audrey").json()["items"]
    assert [event["type"] for event in events if event["outcome"] == "ok"] == [
        "grant.revoked",
        "task.completed",
        "grant.issued",
        "task.opened",
    ]


def test_a_status_list_fetched_before_a_revocation_is_replaced_within_the_bound(pair):
    _, broker = pair
    grant = broker.grant(broker.open_task())
    assert broker.status_of(grant.token) == 0
    assert broker.post(f"/v1/grants/{grant.id}/revoke", "summarizer").status_code == 200
    assert not broker.is_active(grant.token)
    until(lambda: broker.status_of(grant.token) == 1, within_s=OFFLINE_BOUND_S, what="an invalid status")


def test_of_fifty_requests_with_one_dpop_proof_at_two_brokers_one_is_answered(brokers):
    """INV-20, over real HTTP."""
    broker, other = brokers
    issuer, task_id = broker.deployment.issuer, broker.open_task()
    proof = dpop_proof(issuer_key(), url=f"{issuer}/v1/grants", now=system_clock())

    def use(number):
        return (broker, other)[number % 2].ask(task_id, DPoP=proof)

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(use, range(50)))
    assert sorted(answer.status_code for answer in answers) == [201] + [400] * 49
    assert {answer.json()["code"] for answer in answers if answer.status_code == 400} == {"invalid_dpop_proof"}
    won = next(answer.json() for answer in answers if answer.status_code == 201)
    assert won["credential"]["token_type"] == "DPoP"


def test_fifty_requests_with_one_idempotency_key_at_two_brokers_get_one_grant(brokers):
    """INV-06, over real HTTP."""
    broker, other = brokers
    task_id = broker.open_task()

    def ask(number):
        return (broker, other)[number % 2].ask(task_id, **{"Idempotency-Key": f"once-{task_id}"})

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, range(50)))
    assert {answer.status_code for answer in answers} == {201}, {answer.text for answer in answers}
    assert len({answer.json()["grant"]["id"] for answer in answers}) == 1
    listed = broker.get(f"/v1/grants?task={task_id}", "ada").json()["items"]
    assert len(listed) == 1


def test_what_a_broker_says_of_itself_is_where_it_says(solo):
    metadata = solo.get("/.well-known/oauth-authorization-server").json()
    assert metadata["issuer"] == solo.deployment.issuer
    for name in ("jwks_uri", "status_list_aggregation_endpoint"):
        assert httpx.get(metadata[name]).status_code == 200
