"""A broker behind a test client, all that is in its tables, and what a refusal looks like."""

import logging
import shutil
from dataclasses import replace

import pytest
import sqlalchemy as sa

from broker.domain.lifecycle import LeaseState
from broker.services.secrets import intended_lease
from broker.store.grants import find_grant
from broker.store.leases import insert_leases
from broker.store.models import Base
from tests.house import UNLIMITED, build_house
from tests.web.conftest import Web

PROBLEM = {"type", "title", "status", "detail", "code", "trace_id"}


class Hostile(Web):
    """The application, watched: what it stores, what it logs, what it answers."""

    def tables(self):
        """Every row of every table, but for what a refusal may leave: its event, a count, status indexes in reserve."""
        found = {}
        with self.house.broker.database.read() as db:
            for table in Base.metadata.sorted_tables:
                rows = [tuple(row) for row in db.execute(sa.select(table).order_by(*table.primary_key))]
                if table.name == "events":
                    rows = [row for row in rows if row[table.c.keys().index("outcome")] == "ok"]
                if table.name not in ("status_lists", "allowances"):
                    found[table.name] = rows
        return found

    def send(self, operation, path, by, raw, content_type="application/json", **headers):
        return self.client.open(
            path, method=operation.method, data=raw, headers=self.as_(by, **headers), content_type=content_type
        )


def refused(answer, *, member=None, status=range(400, 500)):
    """The answer is a problem document, whole, safe to show, and about this member."""
    assert answer.status_code in status, (answer.status_code, answer.get_data(as_text=True)[:500])
    assert answer.mimetype == "application/problem+json", answer.mimetype
    problem = answer.json
    assert problem.keys() >= PROBLEM, problem
    assert problem["status"] == answer.status_code
    assert problem["type"].endswith(f"/problems/{problem['code']}")
    assert len(problem["detail"]) < 5000
    assert_plain(answer)
    if member is not None:
        assert problem.get("member", "").split(".")[0].split("[")[0] == member, problem
        assert member in problem["detail"], problem
    return problem


def refused_by_oauth(answer, error=None, *, status=(400, 401, 413)):
    """The answer is an error of RFC 6749 section 5.2, and nothing else."""
    assert answer.status_code in status, (answer.status_code, answer.get_data(as_text=True)[:500])
    assert answer.mimetype == "application/json"
    assert answer.json.keys() == {"error", "error_description"}, answer.json
    assert error is None or answer.json["error"] == error, answer.json
    description = answer.json["error_description"]
    assert description.isascii()
    assert description.isprintable()
    assert not set(description) & {'"', "\\"}
    assert answer.headers["Cache-Control"] == "no-store"
    assert_plain(answer)
    return answer.json


def assert_plain(answer):
    text = answer.get_data(as_text=True)
    for trace in ("Traceback", 'File "', ".py", "sqlalchemy", "psycopg", "sqlite3"):
        assert trace not in text, text
    assert "Set-Cookie" not in answer.headers
    for name, value in answer.headers:
        assert value.isascii(), (name, value)
        assert value.isprintable(), (name, value)


def stuck_lease(broker, grant_id):
    """The id of a lease of this grant that is owed and cannot be paid."""
    with broker.database.begin() as db:
        now = broker.clock()
        lease = intended_lease(find_grant(db, grant_id), {}, now)
        insert_leases(db, [replace(lease, state=LeaseState.STUCK, attempts=6, next_attempt_at=now)])
    return lease.id


def event_stream(web):
    """The id of the stream of security events of crm-api."""
    web.post("/ssf/streams", "crm-api", json={})
    return web.get("/ssf/streams", "crm-api").json[0]["stream_id"]


@pytest.fixture(scope="module")
def module_house(migrated_file, tmp_path_factory):
    """A whole broker for all tests of a module, where none of them leaves anything in the way of another."""
    directory = tmp_path_factory.mktemp("house")
    shutil.copyfile(migrated_file, directory / "broker.db")
    built = build_house(f"sqlite:///{directory / 'broker.db'}", directory, **UNLIMITED)
    yield built
    built.broker.close()


@pytest.fixture
def house(store_url, tmp_path):
    built = build_house(store_url, tmp_path, **UNLIMITED)
    yield built
    built.broker.close()


@pytest.fixture
def sqlite_house(migrated_file, tmp_path):
    shutil.copyfile(migrated_file, tmp_path / "broker.db")
    built = build_house(f"sqlite:///{tmp_path / 'broker.db'}", tmp_path, **UNLIMITED)
    yield built
    built.broker.close()


@pytest.fixture
def web(sqlite_house):
    return Hostile(sqlite_house)


@pytest.fixture
def web_on_both(house):
    return Hostile(house)


@pytest.fixture(autouse=True)
def nothing_breaks(caplog):
    """No request of this room may end in an error nobody expected, whatever else the test looks at."""
    caplog.set_level(logging.INFO)
    yield
    assert not [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
