"""The main job with a secret from outside: a database login that dies with its task, open session and all."""

import os

import psycopg
import pytest

from broker.domain.identity import is_id
from tests.house import POLICIES
from tests.openbao import connect
from tests.processes import until

ORDERS = "urn:db:orders:readonly"

_VAULT = """
[vault]
address = "{address}"
lease_prefix_exclusive = true
auth = {{ method = "approle", role_id_file = "{directory}/role-id", secret_id_file = "{directory}/secret-id" }}

[[resources]]
identifier = "urn:db:orders:readonly"
provider = "vault"
scopes = ["select"]
sensitivity = "confidential"
max_ttl_s = 600
vault = {{ engine = "database", mount = "database", role = "jit-orders-ro" }}
"""
_POLICY = """
@id("orders-read")
permit (principal == Agent::"summarizer", action == Action::"select", resource == Resource::"urn:db:orders:readonly");
"""


@pytest.fixture
def vault_deployment(deployment, openbao):
    for name in ("role-id", "secret-id"):
        os.chmod(openbao.directory / name, 0o600)
    deployment.configure(policies=POLICIES | {"orders.cedar": _POLICY})
    with deployment.configuration.open("a") as file:
        file.write(_VAULT.format(address=openbao.address, directory=openbao.directory))
    return deployment


def test_a_database_login_works_until_its_task_ends_and_the_receipt_says_when_it_died(vault_deployment, openbao):
    # Others of the run may have left some.
    before = set(openbao.leases("database/creds/jit-orders-ro"))
    with vault_deployment.broker() as broker:
        task_id = broker.open_task("summarizer")
        request = {"task_id": task_id, "resource": ORDERS, "scopes": ["select"], "intent": "count the orders"}
        answer = until(lambda: _granted(broker, request), what="reconciling with OpenBao")
        grant, credential = answer["grant"], answer["credential"]
        assert (grant["state"], grant["live"], grant["revocation_class"]) == ("active", True, "hard")
        assert credential["type"] == "database" and credential["expires_at"] == grant["expires_at"]
        assert is_id(grant["id"], "grt") and grant["lease"]["state"] == "held"

        session = connect(openbao, credential["data"])
        assert session.execute("SELECT item FROM orders").fetchone() == ("lamp",)

        assert broker.complete(task_id)["totals"]["ended"] == 1
        # The completion itself waits for the death, but no longer than two seconds.
        receipt = until(lambda: _all_dead(broker, task_id), what="the login's end")
        (line,) = receipt["grants"]
        assert line["confirmed_dead_at"] is not None and line["exposed_until"] is None, receipt
        assert receipt["totals"] == {"ended": 1, "confirmed_dead": 1, "outstanding": 0}
        with pytest.raises(psycopg.OperationalError):
            session.execute("SELECT 1")
        with pytest.raises(psycopg.OperationalError):
            connect(openbao, credential["data"])
        assert set(openbao.leases("database/creds/jit-orders-ro")) <= before


def _granted(broker, request):
    answer = broker.post("/v1/grants", "summarizer", request)
    assert answer.status_code in (201, 503), answer.text
    return answer.json() if answer.status_code == 201 else None


def _all_dead(broker, task_id):
    receipt = broker.get(f"/v1/tasks/{task_id}/receipt", "pipeline").json()
    return receipt if receipt["totals"]["outstanding"] == 0 else None
