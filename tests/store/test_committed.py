"""What is counted is what became durable, under the names of the audit trail."""

import pytest

from broker.domain.audit import Event
from broker.store.database import Database
from broker.store.transitions import record
from tests.conftest import NOW


def event(number, **more):
    return Event(id=f"evt_{number}", at=NOW, type="grant.issued", actor="summarizer", **more)


@pytest.fixture
def told(store_url):
    heard = []
    database = Database(store_url, committed=heard.append)
    database.heard = heard
    yield database
    database.close()


def test_events_are_told_of_once_their_transaction_has_committed(told):
    with told.begin() as db:
        record(db, [event(1), event(2, outcome="denied")])
        record(db, [event(3)])
        assert told.heard == []
    assert told.heard == [[("grant.issued", "ok"), ("grant.issued", "denied"), ("grant.issued", "ok")]]


def test_what_was_rolled_back_is_not_told_of(told):
    with pytest.raises(KeyError), told.begin() as db:
        record(db, [event(1)])
        raise KeyError
    assert told.heard == []


def test_a_transaction_without_events_says_nothing(told):
    with told.begin():
        pass
    assert told.heard == []
