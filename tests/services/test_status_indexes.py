"""Places in status lists, handed out in a transaction by whoever reserved them before it."""

import threading
from datetime import timedelta

from broker.services.status_indexes import StatusIndexes
from tests.conftest import NOW


def test_whoever_takes_a_place_in_a_transaction_waits_for_nobody_who_reserves(database):
    """On SQLite each would wait for the other: for the one writer, and for the guard."""
    indexes = StatusIndexes(database=database, longest_life=timedelta(hours=1))
    indexes.reserve(1, NOW)
    begun = threading.Event()
    begin = database.begin

    def begins():
        begun.set()
        return begin()

    reserving = threading.Thread(target=indexes.reserve, args=(100_000, NOW), daemon=True)
    with begin():
        database.begin = begins
        reserving.start()
        assert begun.wait(10)
        taken = []
        taking = threading.Thread(target=lambda: taken.append(indexes.take("task_1", NOW)), daemon=True)
        taking.start()
        taking.join(3)
        assert len(taken) == 1
    reserving.join(10)
    assert not reserving.is_alive()


def test_two_who_need_more_at_once_reserve_it_once(database):
    indexes = StatusIndexes(database=database, longest_life=timedelta(hours=1))
    threads = [threading.Thread(target=indexes.reserve, args=(1, NOW), daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    first = indexes.take("task_1", NOW)
    again = StatusIndexes(database=database, longest_life=timedelta(hours=1))
    again.reserve(1, NOW)
    assert again.take("task_1", NOW) == (first[0], first[1] + 16_384)
