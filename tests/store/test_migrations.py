import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from broker.store.database import in_transaction
from broker.store.migration import is_current, migrate
from broker.store.models import Base, Gate


def test_migrations_from_empty_give_exactly_the_models(empty_database):
    assert not is_current(empty_database)
    migrate(empty_database)
    assert is_current(empty_database)
    with empty_database.begin() as db:
        assert compare_metadata(MigrationContext.configure(db), Base.metadata) == []


def test_migrating_twice_changes_nothing(database):
    migrate(database)
    with database.begin() as db:
        assert db.execute(sa.select(Gate.era)).scalars().all() == [1]


def test_a_transaction_says_that_it_is_open_and_does_not_nest(database):
    assert not in_transaction()
    with database.begin():
        assert in_transaction()
        with pytest.raises(RuntimeError, match="one at a time"), database.begin():
            pass
    assert not in_transaction()


def test_an_exception_undoes_the_whole_transaction(database):
    with pytest.raises(KeyError), database.begin() as db:
        db.execute(sa.update(Gate).values(era=99))
        raise KeyError
    with database.begin() as db:
        assert db.execute(sa.select(Gate.era)).scalar_one() == 1
