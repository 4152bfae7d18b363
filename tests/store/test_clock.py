"""The database's clock decides where several brokers share one (INV-09)."""

from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from broker.domain.errors import Unavailable
from broker.store.clock import TRUSTED_FOR, DatabaseClock
from broker.store.database import Database
from broker.wiring import build
from tests.conftest import postgres_database
from tests.house import catalogue_for, settings_for


@pytest.fixture
def on_postgres(postgres, migrated_template):
    with postgres_database(postgres, template=migrated_template) as url:
        database = Database(url)
        yield database
        database.close()


class Ticks:
    def __init__(self):
        self.at = 1000.0

    def __call__(self):
        return self.at


def test_the_time_is_the_databases_and_goes_on_by_the_monotonic_clock(on_postgres):
    ticks = Ticks()
    clock = DatabaseClock(on_postgres, monotonic=ticks)
    with on_postgres.read() as db:
        before = db.execute(sa.text("SELECT clock_timestamp()")).scalar_one()
    first = clock()
    assert timedelta(0) <= first - before.replace(microsecond=0) <= timedelta(seconds=5)
    assert first.tzinfo is UTC
    assert first.microsecond == 0
    ticks.at += 30
    assert timedelta(seconds=29) <= clock() - first <= timedelta(seconds=31)


def test_a_machine_whose_own_clock_is_wrong_issues_by_the_databases(on_postgres, tmp_path, monkeypatch):
    from broker.providers.dev_issuer import DevIssuer

    # Every way to this machine's time is a trap: only the database's can be what decides.
    monkeypatch.setattr("broker.domain.clock.datetime", None)
    issuer = DevIssuer.create_or_load(tmp_path)
    url = on_postgres.engine.url.render_as_string(hide_password=False)
    broker = build(settings_for(url, tmp_path, catalogue_for(issuer)))
    now = broker.clock()
    assert abs(now - datetime.now(UTC)) < timedelta(seconds=5)
    broker.close()


def test_a_clock_that_nobody_could_set_for_a_minute_says_nothing(on_postgres):
    ticks = Ticks()
    clock = DatabaseClock(on_postgres, monotonic=ticks)
    clock()
    ticks.at += TRUSTED_FOR.total_seconds() + 1
    with pytest.raises(Unavailable, match="61 s ago"):
        clock()
    clock.look()
    assert clock()


def test_a_database_that_does_not_answer_is_no_clock(on_postgres):
    clock = DatabaseClock(Database("postgresql+psycopg://nobody@127.0.0.1:1/none"))
    with pytest.raises(Unavailable, match="what time it is"):
        clock()


def test_looking_again_sets_the_clock(on_postgres, tmp_path):
    from broker.providers.dev_issuer import DevIssuer

    issuer = DevIssuer.create_or_load(tmp_path)
    url = on_postgres.engine.url.render_as_string(hide_password=False)
    broker = build(settings_for(url, tmp_path, catalogue_for(issuer)))
    broker.apply(by="tests")
    ticks = Ticks()
    broker.clock._monotonic = ticks
    broker.look_again()
    ticks.at += TRUSTED_FOR.total_seconds() + 1
    broker.look_again()
    assert broker.clock()
    broker.close()
