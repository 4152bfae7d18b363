"""A store that is not there: every door says so in its own words, and none of them says yes (INV-13, INV-24)."""

import shutil

import pytest
import sqlalchemy as sa

from broker.store.database import Database
from broker.web.app import API
from tests.hostile.corpus import BODIES
from tests.house import CRM, build_house
from tests.processes import free_port
from tests.web.conftest import Web

OPERATIONS = [operation for room in API for operation in room.declared]
EXCHANGE = {
    "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
    "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
}
BY = {"tasks": "pipeline", "grants": "summarizer"}


def cut_off(web):
    """From now on the store is a server that nobody runs."""
    gone = Database(f"postgresql+psycopg://broker@127.0.0.1:{free_port()}/broker")
    database = web.house.broker.database
    database.close()
    database.engine, database._reader = gone.engine, gone._reader


def exhaust(web):
    """From now on every connection is in use, and none comes back."""
    database = web.house.broker.database
    database.close()
    url = database.engine.url
    full = sa.create_engine(url, poolclass=sa.pool.QueuePool, pool_size=1, max_overflow=0, pool_timeout=0.05)
    database.engine, database._reader = full, full
    database.held = full.connect()


@pytest.fixture(scope="module", params=[cut_off, exhaust], ids=["unreachable", "exhausted"])
def web(request, migrated_file, tmp_path_factory):
    """A broker that worked, and whose store is gone since."""
    directory = tmp_path_factory.mktemp("house")
    shutil.copyfile(migrated_file, directory / "broker.db")
    made = Web(build_house(f"sqlite:///{directory / 'broker.db'}", directory))
    task = made.open_task()
    made.task, made.live = task["id"], made.grant(task).json["credential"]["token"]
    made.app.config["PROPAGATE_EXCEPTIONS"] = False
    request.param(made)
    yield made
    database = made.house.broker.database
    if hasattr(database, "held"):
        database.held.close()
    database.close()


def says_so(answer):
    assert answer.status_code == 503, (answer.status_code, answer.get_data())
    assert int(answer.headers["Retry-After"]) > 0
    assert answer.headers["Cache-Control"] == "no-store"
    return answer.json


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: f"{operation.method} {operation.path}")
def test_the_json_api_answers_a_problem(web, operation):
    room = operation.path.split("/")[2]
    path = operation.path.replace("{id}", {"grants": "grt", "lockdowns": "lck"}.get(room, "task") + "_" + "0" * 26)
    body = BODIES.get(operation.body) if operation.body else None
    answer = web.client.open(path, method=operation.method, json=body, headers=web.as_(BY.get(room, "ada")))
    assert says_so(answer)["code"] == "unavailable"


@pytest.mark.parametrize("path", ["/readyz", "/status-lists", "/status-lists/1", "/metrics"])
def test_what_is_no_oauth_answers_a_problem_too(web, path):
    assert says_so(web.get(path, "ada"))["code"] == "unavailable"


@pytest.mark.parametrize("way", ["client", "bearer", "exchange", "renewal"])
def test_the_token_endpoint_answers_an_oauth_error(web, way):
    token = web.house.token("summarizer")
    form = {
        "client": {"grant_type": "client_credentials", **web.assertion("summarizer")},
        "bearer": {"grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer", "assertion": token},
        "exchange": {**EXCHANGE, "subject_token": token},
        "renewal": {**EXCHANGE, "subject_token": web.live, **web.assertion("summarizer")},
    }[way]
    answer = web.form("/oauth2/token", **form, resource=CRM, scope="contacts:read", task_id=web.task)
    assert says_so(answer)["error"] == "temporarily_unavailable"


@pytest.mark.parametrize("path", ["/oauth2/introspect", "/oauth2/revoke"])
@pytest.mark.parametrize("token", ["live", "unknown"])
def test_nobody_is_told_that_a_token_is_dead_or_gone(web, path, token):
    """ "Not active" would be an answer, and there is none (INV-05)."""
    by = "crm-api" if path.endswith("introspect") else "summarizer"
    sent = web.live if token == "live" else "nonsense"
    answer = web.form(path, token=sent, **web.assertion(by))
    assert says_so(answer)["error"] == "temporarily_unavailable"
    assert says_so(web.form(path, headers=web.as_(by), token=sent))["error"] == "temporarily_unavailable"


def test_keys_are_refused_in_the_words_of_their_surface(web):
    assert says_so(web.get("/oauth2/jwks"))["error"] == "temporarily_unavailable"


def test_what_needs_no_store_is_still_there(web):
    for path in ("/healthz", "/.well-known/oauth-authorization-server", "/openapi.json", "/problems/unavailable"):
        assert web.get(path).status_code == 200
    assert web.form("/oauth2/token").status_code == 400
    assert web.get("/v1/tasks").status_code == 401
