"""One statement without a transaction around it: it fails as a transaction does, and leaves nothing behind."""

import pytest
import sqlalchemy as sa

from broker.domain.errors import Unavailable
from broker.store.database import Database
from tests.conftest import postgres_database

_ERA = "SELECT era FROM gate"


def test_a_look_sees_what_was_committed_before_it(database):
    [[before]] = database.look(_ERA, {})
    with database.begin() as db:
        db.execute(sa.text("UPDATE gate SET era = era + 1"))
    assert database.look(_ERA, {}) == [(before + 1,)]


def test_no_look_is_taken_while_a_transaction_is_open_here(database):
    with database.begin(), pytest.raises(RuntimeError, match="a transaction is open"):
        database.look(_ERA, {})


def test_a_connection_that_was_looked_through_begins_transactions_again(database):
    """They share the connections, and what one leaves behind would be the other's: here, that nothing is undone."""
    for _ in range(20):
        database.look(_ERA, {})
    with pytest.raises(ZeroDivisionError), database.begin() as db:
        db.execute(sa.text("UPDATE gate SET era = era + 1000"))
        raise ZeroDivisionError
    [[era]] = database.look(_ERA, {})
    assert era < 1000


def test_nobody_listening_is_unavailable_to_a_look():
    with pytest.raises(Unavailable):
        Database("postgresql+psycopg://nobody@127.0.0.1:1/none").look(_ERA, {})


def test_a_file_that_is_no_database_is_unavailable_to_a_look(tmp_path):
    (tmp_path / "notes.txt").write_text("not a database, " * 100)
    with pytest.raises(Unavailable):
        Database(f"sqlite:///{tmp_path / 'notes.txt'}").look(_ERA, {})


def test_a_look_that_is_cut_in_the_middle_is_unavailable_and_the_next_one_is_not(postgres):
    with postgres_database(postgres) as url:
        database = Database(url)
        with pytest.raises(Unavailable):
            database.look("SELECT pg_terminate_backend(pg_backend_pid())", {})
        assert database.look("SELECT 1", {}) == [(1,)]
        database.close()
