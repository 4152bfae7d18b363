"""Secrets appear nowhere but in the one answer that hands them out (INV-30): a whole life, failures and all.

Every password the fake Vault makes has the same beginning and every token of its the same shape, so that one nobody
thought of is found too.
"""

import io
import logging
import re

import pytest
import sqlalchemy as sa

from broker import telemetry
from tests.providers.contract import csr, ssh_key
from tests.vault_house import AGENTS, CLOUD, HOSTS, ORDERS, fake_vault, house_on_vault
from tests.web.conftest import Web
from tests.web.test_vault import ask, losing_the_answer_with_the_secret, mend, without_a_policy

PASSWORD = re.compile(r"canary-[0-9a-f]{4}")
VAULT_TOKEN = re.compile(r"\bs\.[0-9a-f]{24}\b")
JWS_SIGNATURE = re.compile(r"eyJ[\w-]+\.[\w-]+\.[\w-]{40,}")
CREDENTIALS = {
    ORDERS: {},
    AGENTS: {"parameters": {"csr": csr()}},
    HOSTS: {"parameters": {"public_key": ssh_key()}},
    CLOUD: {"ttl_s": 900},
}


@pytest.fixture
def logged():
    """Everything that is logged, by the broker and its libraries, down to debug, as lines of ours."""
    root, lines = logging.getLogger(), io.StringIO()
    handler = logging.StreamHandler(lines)
    handler.setFormatter(telemetry.JsonLines())
    level = root.level
    quiet = {name: logging.getLogger(name).level for name in list(logging.root.manager.loggerDict)}
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    for name in quiet:
        logging.getLogger(name).setLevel(logging.NOTSET)
    yield lines
    root.removeHandler(handler)
    root.setLevel(level)
    for name, before in quiet.items():
        logging.getLogger(name).setLevel(before)


@pytest.fixture
def web(logged, store_url, tmp_path):
    with fake_vault() as fake, house_on_vault(fake, store_url, tmp_path) as house:
        yield Web(house)


def live(web):
    """One life of each kind of credential, and what can go wrong; answers every body but those that hand out."""
    fake, handed_out, bodies = web.house.fake, [], []
    task = web.open_task()
    for resource, more in CREDENTIALS.items():
        answer = ask(web, resource, task, **more)
        assert answer.status_code == 201, answer.json
        handed_out.append(answer.get_data(as_text=True))
    token = web.grant(task).json["credential"]["token"]
    bodies.append(web.form("/oauth2/introspect", token=token, **web.assertion("crm-api")))
    for fails in (losing_the_answer_with_the_secret, without_a_policy):
        fails(fake)
        bodies.append(ask(web, task=task))
        mend(fake)
    bodies.append(ask(web, AGENTS, task, parameters={"csr": "canary-0000"}))
    bodies.append(web.client.get("/v1/tasks", headers={"Authorization": f"Bearer {web.house.token('ada')}x"}))
    bodies.append(web.form("/oauth2/token", grant_type="nonsense", **web.assertion("summarizer")))
    fake.target_works = False
    bodies.append(web.post(f"/v1/tasks/{task['id']}/complete", "pipeline"))
    for _ in range(7):
        web.house.tick(61)
        web.house.broker.reconciliation.run()
    fake.target_works = True
    for path in ("/v1/grants", "/v1/leases", "/v1/audit", f"/v1/tasks/{task['id']}/receipt", "/metrics"):
        bodies.append(web.get(path, "ada" if path != "/v1/audit" else "audrey"))
    return [token, *handed_out], [answer.get_data(as_text=True) for answer in bodies]


def dump(web):
    """Every value of every table."""
    engine = web.house.broker.database.engine
    with engine.connect() as db:
        for table in sa.inspect(engine).get_table_names():
            for row in db.exec_driver_sql(f"SELECT * FROM {table}"):
                yield f"{table}: " + " ".join(
                    bytes(value).decode("latin-1") if isinstance(value, bytes | memoryview) else str(value)
                    for value in row
                )


def test_no_secret_is_in_the_database_the_log_the_metrics_an_error_or_the_audit_trail(web, logged):
    handed_out, bodies = live(web)
    # What is looked for is there to be found: in the answers that hand it out, and only there.
    assert any(PASSWORD.search(text) for text in handed_out) and JWS_SIGNATURE.search(handed_out[0])
    workload = web.house.token("summarizer")
    rows, log = list(dump(web)), logged.getvalue()
    assert len(rows) > 50 and log.count("\n") > 100
    for place, texts in {"log": log.splitlines(), "database": rows, "answers": bodies}.items():
        for text in texts:
            for secret in (PASSWORD, VAULT_TOKEN):
                assert not secret.search(text), (place, text)
            # A receipt is signed, and is no credential.
            signed = [found for found in JWS_SIGNATURE.findall(text) if '"jws"' not in text]
            assert not signed, (place, text)
            assert handed_out[0] not in text and workload not in text, (place, text)
            assert "PRIVATE KEY" not in text, (place, text)
