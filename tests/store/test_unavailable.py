"""A store that does not answer is Unavailable, whatever its driver calls that; a bad row is not."""

import contextlib
import threading

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from broker.domain.errors import Unavailable
from broker.store import database as store
from broker.store.database import Database
from tests.conftest import postgres_database


def test_nobody_listening_is_unavailable():
    database = Database("postgresql+psycopg://nobody@127.0.0.1:1/none")
    for transaction in (database.begin, database.read, database.begin_issuing):
        with pytest.raises(Unavailable), transaction():
            pass


def test_a_file_that_is_no_database_is_unavailable(tmp_path):
    (tmp_path / "notes.txt").write_text("not a database, " * 100)
    with pytest.raises(Unavailable), Database(f"sqlite:///{tmp_path / 'notes.txt'}").read() as db:
        db.execute(sa.text("SELECT 1 FROM grants"))


def test_a_connection_that_is_cut_in_the_middle_is_unavailable(postgres):
    with postgres_database(postgres) as url:
        database = Database(url)
        with pytest.raises(Unavailable), database.begin() as db:
            pid = db.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
            cut(url, [pid])
            db.execute(sa.text("SELECT 1"))
        with database.read() as db:
            assert db.execute(sa.text("SELECT 1")).scalar_one() == 1
        database.close()


def test_a_row_that_breaks_a_rule_is_not_the_stores_fault(database):
    with pytest.raises(IntegrityError), database.begin() as db:
        db.execute(sa.text("INSERT INTO gate (id, era) VALUES (2, 0)"))


def test_issuing_never_takes_every_connection(database):
    """INV-27: whoever revokes finds one, however many wait to issue."""
    release, held = threading.Event(), threading.Semaphore(0)

    def issue():
        with database.begin_issuing() if not database.is_sqlite else database.read():
            held.release()
            release.wait(10)

    threads = [threading.Thread(target=issue, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert held.acquire(timeout=10)
    waiting = [threading.Thread(target=issue, daemon=True) for _ in range(20)] if not database.is_sqlite else []
    for thread in waiting:
        thread.start()
    with database.begin() as db:
        assert db.execute(sa.text("SELECT count(*) FROM gate")).scalar_one() == 1
    release.set()
    for thread in [*threads, *waiting]:
        thread.join(10)


def test_on_sqlite_whoever_waits_to_write_is_woken_and_does_not_sleep(tmp_path):
    """The driver's own patience is in the statement that begins, and nobody who waits here has come to that."""
    database = Database(f"sqlite:///{tmp_path / 'broker.db'}")
    begun, wrote = [], threading.Event()

    def write():
        with database.begin() as db:
            begun.append(db.execute(sa.text("SELECT 1")).scalar_one())
        wrote.set()

    sa.event.listen(database.engine, "begin", begun.append)
    other = threading.Thread(target=write, daemon=True)
    with database.begin():
        other.start()
        assert not wrote.wait(0.2)
        assert len(begun) == 1
    assert wrote.wait(10)
    other.join(10)
    database.close()


def test_on_sqlite_a_writer_that_does_not_end_is_unavailable_to_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr("broker.store.database._PATIENCE_S", 0.05)
    database = Database(f"sqlite:///{tmp_path / 'broker.db'}")
    problems = []

    def write():
        try:
            with database.begin():
                pass
        except Unavailable as problem:
            problems.append(problem)

    other = threading.Thread(target=write, daemon=True)
    with database.begin():
        other.start()
        other.join(10)
    assert len(problems) == 1
    write()
    assert len(problems) == 1
    database.close()


def test_every_statement_has_a_bound_on_postgresql(postgres):
    with postgres_database(postgres) as url:
        database = Database(url)
        with database.read() as db:
            for name in ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout"):
                assert db.execute(sa.text(f"SELECT current_setting('{name}')")).scalar_one() != "0"
        database.close()


@pytest.mark.parametrize("quiet_s", [0, 60], ids=["quiet", "just used"])
@pytest.mark.parametrize("way", ["begin", "look"])
def test_connections_that_were_cut_while_nobody_used_them_are_at_most_one_callers_trouble(
    postgres, monkeypatch, way, quiet_s
):
    """Of those that were used a moment ago the first is not asked whether it lives; once it broke the others are."""
    monkeypatch.setattr(store, "_QUIET_S", quiet_s)
    with postgres_database(postgres) as url:
        database = Database(url)

        def ask():
            if way == "look":
                return database.look("SELECT pg_backend_pid()", {})[0][0]
            with database.begin() as db:
                return db.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()

        with contextlib.ExitStack() as held:
            taken = [held.enter_context(database.engine.connect()) for _ in range(10)]
            pids = [each.execute(sa.text("SELECT pg_backend_pid()")).scalar_one() for each in taken]
        cut(url, pids)
        if quiet_s:
            with pytest.raises(Unavailable):
                ask()
        assert not {ask() for _ in range(12)} & set(pids)
        database.close()


def test_a_connection_that_was_used_a_moment_ago_is_not_asked_whether_it_lives(postgres, monkeypatch):
    with postgres_database(postgres) as url:
        database = Database(url)
        asked = []
        monkeypatch.setattr(database.engine.dialect, "do_ping", asked.append)
        for _ in range(3):
            with database.begin() as db:
                db.execute(sa.text("SELECT 1"))
        assert not asked
        monkeypatch.setattr(store, "_QUIET_S", 0)
        with database.begin() as db:
            db.execute(sa.text("SELECT 1"))
        assert len(asked) == 1
        database.close()


def cut(url, pids):
    admin = sa.create_engine(url)
    with admin.connect() as other:
        for pid in pids:
            # Asked to go, it takes a moment.
            other.execute(sa.text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
    admin.dispose()
