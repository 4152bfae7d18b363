"""Events that were made from one for thousands of rows are those that each row would have had by itself."""

import dataclasses

import pytest

from broker.domain.audit import Event
from broker.domain.identity import is_id
from broker.domain.lifecycle import GrantState
from broker.store import models
from broker.store.events import page_of_events
from broker.store.grants import with_ids
from broker.store.transitions import GRANT_FACTS, change_of, move
from tests.conftest import NOW

MORE = {"reason": 'an incident, so: "all"', "trace_id": "0" * 32, "data": {"revocation": "é", "n": [1]}}


@pytest.fixture
def grants(house):
    task = house.open_task()
    return [house.issue(task).grant for _ in range(5)]


def moved_by(house, change, ids):
    with house.broker.database.begin() as db:
        return move(db, models.Grant, GrantState.EXPIRED, with_ids(ids), event=change, returning=GRANT_FACTS)


def kept(house, type_):
    with house.broker.database.read() as db:
        return page_of_events(db, {"type": type_}, before=None, limit=100)


@pytest.mark.parametrize("more", [MORE, {}], ids=["with all", "with nothing"])
def test_each_event_is_the_one_its_row_would_have_had_alone(house, grants, more):
    change = change_of(NOW, "broker", "grant.expired", **more)
    moved = moved_by(house, change, [grant.id for grant in grants])
    assert len(moved) == len(grants)
    found = {event.grant_id: event for event in kept(house, "grant.expired")}
    for row in moved:
        alone = change(row)
        assert isinstance(alone, Event)
        assert (alone.grant_id, alone.task_id, alone.agent) == (row.id, row.task_id, row.agent)
        assert (alone.user, alone.resource) == (row.on_behalf_of, row.resource)
        assert found[row.id] == dataclasses.replace(alone, id=found[row.id].id)
    ids = {event.id for event in found.values()}
    assert len(ids) == len(grants) and all(is_id(event_id, "evt") for event_id in ids)


def test_what_did_not_move_has_no_event(house, grants):
    change = change_of(NOW, "broker", "grant.expired")
    ids = [grant.id for grant in grants]
    moved_by(house, change, ids[:1])
    assert len(moved_by(house, change, ids)) == len(ids) - 1
    assert moved_by(house, change, ids) == []
    assert len(kept(house, "grant.expired")) == len(ids)
