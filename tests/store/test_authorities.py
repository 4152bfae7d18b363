"""What a verifier's question reads is what the whole row says."""

from dataclasses import fields
from datetime import timedelta

from broker.domain.grant import Authority
from broker.store.gate import era_of
from broker.store.grants import find_with_tasks
from broker.store.looks import find_authorities


def test_the_short_row_says_what_the_whole_one_says(house):
    task = house.open_task(deadline_s=60)
    made = [house.issue(task).grant for _ in range(3)]
    ids = [grant.id for grant in made]
    with house.broker.database.read() as db:
        whole, era = find_with_tasks(db, ids), era_of(db)
    short_era, short = find_authorities(house.broker.database, ids)
    assert short_era == era
    assert set(whole) == set(short) == set(ids)
    for grant_id, (grant, state, ends_at) in whole.items():
        authority = {entry.name: getattr(grant, entry.name) for entry in fields(Authority)}
        assert short[grant_id] == (Authority(**authority), state, ends_at)


def test_a_heartbeat_that_comes_due_first_is_when_time_ends_the_task(house):
    issued = house.issue(house.open_task(heartbeat=timedelta(seconds=10))).grant
    _, found = find_authorities(house.broker.database, [issued.id])
    _, _, ends_at = found[issued.id]
    assert ends_at == house.clock() + timedelta(seconds=10)


def test_what_is_not_there_is_not_found(house):
    assert find_authorities(house.broker.database, ["grt_00000000000000000000000000", "' OR 1=1 --"]) == (None, {})
