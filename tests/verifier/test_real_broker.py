"""The SDK and a real broker: real processes, real tokens, real ends, on both stores."""

import pytest

from broker.sdk import DpopKey
from broker.sdk.verifier import Verifier
from tests.house import CRM
from tests.processes import Deployment, until
from tests.verifier.conftest import why


@pytest.fixture
def deployment(store_url, tmp_path):
    return Deployment.create(tmp_path / "deployment", store_url)


def test_what_a_real_broker_issues_is_accepted_until_it_ends_and_refused_within_the_bound(deployment):
    with (
        deployment.broker() as broker,
        Verifier(deployment.issuer, CRM, token_source=lambda: deployment.token("crm-api")) as verifier,
    ):
        task, other = broker.open_task(), broker.open_task()
        ends, stays = broker.grant(task), broker.grant(other)
        found = verifier.check(f"Bearer {ends.token}", "GET", f"{CRM}/contacts", scopes=["contacts:read"])
        assert (found.agent, found.task_id, found.grant_id) == ("summarizer", task, ends.id)
        assert why(verifier, stays.token) is None
        broker.complete(task)
        until(lambda: why(verifier, ends.token) == "revoked", within_s=17, what="the refusal")
        assert why(verifier, stays.token) is None


def test_a_real_broker_that_is_gone_is_no_reason_to_say_yes(deployment):
    with (
        deployment.broker() as broker,
        Verifier(deployment.issuer, CRM, token_source=lambda: deployment.token("crm-api"), bound_s=5) as verifier,
    ):
        granted = broker.grant(broker.open_task())
        assert why(verifier, granted.token) is None
        broker.stop()
        until(lambda: why(verifier, granted.token) == "not_fresh", within_s=8, what="the refusal")


def test_a_bound_token_of_a_real_broker_opens_with_its_proof_alone(deployment):
    key, url = DpopKey.generate(), f"{CRM}/contacts"
    with (
        deployment.broker() as broker,
        Verifier(deployment.issuer, CRM, token_source=lambda: deployment.token("crm-api")) as verifier,
    ):
        proof = key.proof("POST", f"{deployment.issuer}/v1/grants")
        answer = broker.ask(broker.open_task(), DPoP=proof)
        assert answer.status_code == 201, answer.text
        token = answer.json()["credential"]["token"]
        assert why(verifier, token) == "bound_token"
        shown = {"authorization": f"DPoP {token}", "dpop": key.proof("GET", url, access_token=token), "url": url}
        assert why(verifier, token, **shown) is None
        assert why(verifier, token, **shown) == "replayed_proof"
