"""Limits of one broker: what each counts, what a refusal says and costs, and who never waits behind one."""

from dataclasses import replace
from datetime import timedelta

import pytest
import sqlalchemy as sa

from broker.domain.errors import BrokerError, Conflict, InvalidTarget, LimitExceeded, NotFound
from broker.domain.grant import GrantRequest
from broker.domain.lifecycle import TaskState
from broker.store import allowances
from broker.store.allowances import Wanted
from broker.store.models import Allowance, AuditEvent
from tests.house import CRM, LEDGER, build_house
from tests.services.test_redeciding import apply, events


@pytest.fixture
def built(store_url, tmp_path):
    """Makes a broker with these limits, or another one beside it."""
    houses = []

    def make(**limits):
        clock = houses[0].clock if houses else None
        houses.append(build_house(store_url, tmp_path, clock=clock, **limits))
        return houses[-1]

    yield make
    for house in houses:
        house.broker.close()


def refused(ask):
    with pytest.raises(LimitExceeded) as refusal:
        ask()
    return refusal.value


def rows(house, model):
    with house.broker.database.engine.connect() as db:
        return db.execute(sa.select(sa.func.count()).select_from(model)).scalar_one()


def statements(house, ask):
    """How many the store was sent meanwhile."""
    sent = []
    heard = lambda *arguments: sent.append(arguments[2])  # noqa: E731
    sa.event.listen(house.broker.database.engine, "before_cursor_execute", heard)
    try:
        ask()
    finally:
        sa.event.remove(house.broker.database.engine, "before_cursor_execute", heard)
    return len(sent)


def test_a_refusal_says_which_limit_its_value_and_when_to_come_again(built):
    house = built(requests_per_agent=2)
    task = house.open_task()
    for _ in range(2):
        house.issue(task)
    refusal = refused(lambda: house.issue(task))
    assert (refusal.limit, refusal.value, refusal.window_s) == ("requests_per_agent", 2, 60)
    assert 1 <= refusal.retry_after_s <= 60
    assert f"come again in {refusal.retry_after_s} s" in refusal.detail
    house.clock.forward(seconds=refusal.retry_after_s - 1)
    refused(lambda: house.issue(task))
    house.clock.forward(seconds=1)
    house.issue(task)


def test_a_refused_request_costs_nothing_and_leaves_nothing(built):
    """INV-35: however often it comes, and the trail says once that the limit was reached."""
    house = built(requests_per_agent=2)
    task = house.open_task()
    for _ in range(2):
        house.issue(task)
    refused(lambda: house.issue(task))
    before = rows(house, AuditEvent), rows(house, Allowance)
    caller = house.caller("summarizer")
    request = GrantRequest(caller=caller, task_id=task.id, resource=CRM, scopes=frozenset({"contacts:read"}))

    def again():
        for _ in range(100):
            refused(lambda: house.broker.issuance.issue(request))

    assert statements(house, again) == 0
    assert (rows(house, AuditEvent), rows(house, Allowance)) == before
    [event] = events(house, "limit.reached")
    assert (event.actor, event.agent, event.data["limit"], event.data["bound"]) == (
        "broker",
        "summarizer",
        "requests_per_agent",
        2,
    )


def test_most_requests_ask_nobody_whether_they_may_be_made(built):
    house = built(requests_per_agent=1000)
    task = house.open_task()
    for _ in range(3):
        house.issue(task)
    limiter = house.broker.issuance._limiter
    caller = house.caller("summarizer")

    def admit():
        with limiter.admitted(caller, resource=CRM, task_id=task.id):
            pass

    assert statements(house, admit) == 0


def test_an_agent_at_its_limit_completes_hands_back_and_is_verified_all_the_same(built):
    """INV-27: what ends authority, and what asks whether it lives, is behind no limit."""
    house = built(requests_per_agent=3, denials_throttle=1, throttle_pause=timedelta(seconds=60), denials_lockdown=9)
    task, other = house.open_task(), house.open_task()
    kept, handed_back = house.issue(task), house.issue(task)
    with pytest.raises(BrokerError):
        house.issue(task, resource=LEDGER, scope="entries:read")
    assert refused(lambda: house.issue(other)).limit == "denials_throttle"
    house.broker.revocation.revoke_grant(house.caller("summarizer"), handed_back.grant.id)
    assert not house.is_active(handed_back)
    assert house.is_active(kept)
    house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED)
    assert not house.is_active(kept)


def test_renewals_and_collections_are_requests_too(built):
    house = built(requests_per_agent=3)
    task = house.open_task()
    issued = house.issue(task)
    for _ in range(2):
        house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=None)
    caller = house.caller("summarizer")
    assert refused(lambda: house.broker.renewal.renew(caller, issued.grant.id, ttl=None)).limit == "requests_per_agent"
    assert refused(lambda: house.broker.collection.collect(caller, issued.grant.id)).limit == "requests_per_agent"


def test_renewals_are_mints_and_what_came_to_nothing_is_not(built):
    house = built(mints_per_task=3)
    task = house.open_task()
    issued = house.issue(task)
    for _ in range(5):
        with pytest.raises(BrokerError):
            house.issue(task, resource=LEDGER, scope="entries:read")
    for _ in range(2):
        house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=None)
    refusal = refused(lambda: house.issue(task))
    assert (refusal.limit, refusal.value, refusal.window_s) == ("mints_per_task", 3, None)
    house.clock.forward(seconds=600)
    refused(lambda: house.issue(task))
    house.issue(house.open_task())


def test_what_was_made_is_a_mint_whatever_came_of_it_then(built):
    """A secret may live outside though its agent, who ended the grant meanwhile, was told that it got none."""
    house = built(mints_per_task=1)
    task = house.open_task()
    for made in (False, True):
        with (
            pytest.raises(Conflict),
            house.broker.issuance._limiter.admitted(
                house.caller("summarizer"), resource=CRM, task_id=task.id
            ) as minting,
        ):
            minting.made = made
            raise Conflict("it was ended meanwhile")
    assert refused(lambda: house.issue(task)).limit == "mints_per_task"


def test_nobody_uses_up_what_another_agents_task_has_left(built):
    house = built(requests_per_task=3)
    task = house.open_task("summarizer")
    for _ in range(5):
        with pytest.raises(NotFound):
            house.issue(task, by="scribe")
    for _ in range(3):
        house.issue(task)
    assert refused(lambda: house.issue(task)).limit == "requests_per_task"


def test_a_sub_agent_counts_towards_the_task_of_the_grant_it_was_handed(built):
    house = built(requests_per_task=2)
    task = house.open_task("summarizer", "scribe")
    issued = house.issue(task, hand_to=("scribe",))
    ask = {"by": "scribe", "parent_grant_id": issued.grant.id}
    house.issue(None, **ask)
    assert refused(lambda: house.issue(None, **ask)).limit == "requests_per_task"


def test_names_that_somebody_makes_up_leave_no_rows(built):
    house = built(denials_throttle=1000, denials_lockdown=1001)
    task = house.open_task()
    house.issue(task)
    before = rows(house, Allowance)
    for number in range(20):
        with pytest.raises(InvalidTarget):
            house.issue(task, resource=f"https://made-up-{number}.example")
    assert rows(house, Allowance) == before


def test_rows_of_windows_past_are_forgotten(built):
    house = built()
    house.issue(house.open_task())
    assert rows(house, Allowance) > 0
    house.clock.forward(seconds=90_000)
    house.broker.sweeper.sweep()
    assert rows(house, Allowance) == 0


def test_live_grants_that_end_make_room_again(built):
    house = built(max_live_per_task=2, max_live_per_resource=3, max_live_per_issuer=3)
    task, other = house.open_task(), house.open_task()
    first = house.issue(task)
    house.issue(task)
    refusal = refused(lambda: house.issue(task))
    assert (refusal.limit, refusal.value) == ("live_per_task", 2)
    house.issue(other)
    assert refused(lambda: house.issue(other)).limit in ("live_per_resource", "live_per_issuer")
    house.broker.revocation.revoke_grant(house.caller("summarizer"), first.grant.id)
    house.issue(task)
    house.clock.forward(seconds=301)
    house.issue(other)


def test_a_limit_of_live_grants_is_told_once_a_window(built):
    house = built(max_live_per_agent=1)
    task = house.open_task()
    house.issue(task)
    for _ in range(5):
        assert refused(lambda: house.issue(task)).limit == "max_live_per_agent"
    assert [event.outcome for event in events(house, "grant.refused")] == ["limit_exceeded"]
    house.clock.forward(seconds=60)
    refused(lambda: house.issue(task))
    assert len(events(house, "grant.refused")) == 2


def test_a_bound_that_is_applied_counts_at_the_next_request(built):
    house = built()
    task = house.open_task()
    house.issue(task)
    catalogue = house.broker.standing.now().catalogue
    resources = tuple(replace(resource, max_live=1) for resource in catalogue.resources)
    apply(house, resources=resources)
    # The locks were taken by the configuration before: unknown is no yes, and the next look knows.
    with pytest.raises(BrokerError):
        house.issue(task)
    assert refused(lambda: house.issue(task)).limit == "live_per_resource"


# --- Allowances -------------------------------------------------------------------------------------------------------


def wanted(house, asked, *, window=0, bound=80):
    return Wanted(name="it", key_sha256="k", window_start=window, bound=bound, asked=asked, forget_at=house.clock.at)


def take(house, *more, **options):
    with house.broker.database.begin() as db:
        return allowances.take(db, [wanted(house, *more, **options)])["it", "k"]


def test_an_allowance_is_handed_out_in_parts_that_shrink_and_never_beyond_its_bound(house):
    given = [take(house, 1) for _ in range(40)]
    assert given[0] == 1 + 79 // allowances.AHEAD
    assert given == sorted(given, reverse=True)
    assert sum(given) == 80
    assert given[-1] == 0


def test_of_a_large_bound_no_more_than_so_much_is_handed_out_ahead(house):
    assert take(house, 1, bound=10**9) == take(house, 1, bound=10**9) == 1 + allowances.MOST_AHEAD


def test_what_is_asked_is_given_as_far_as_there_is(house):
    assert take(house, 79) == 79
    assert take(house, 5) == 1


def test_a_window_that_is_over_comes_back_for_no_broker_whose_clock_is_late(house):
    assert take(house, 80) == 80
    assert take(house, 80, window=60) == 80
    assert take(house, 1, window=0) == 0


def test_a_bound_that_was_lowered_counts_for_the_window_that_is_open(house):
    assert take(house, 20) > 20
    assert take(house, 1, bound=10) == 0
