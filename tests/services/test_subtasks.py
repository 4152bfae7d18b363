"""A part of a task is inside it, and ends with it."""

from dataclasses import replace
from datetime import timedelta

import pytest

from broker.domain.errors import (
    BrokerError,
    Forbidden,
    Invalid,
    InvalidScope,
    LockedDown,
    NotFound,
    TaskNotActive,
)
from broker.domain.identity import User
from broker.domain.lifecycle import GrantState, TaskState
from broker.store import tasks
from tests.house import CRM, LEDGER, catalogue_for
from tests.services.test_delegation import hand_down
from tests.services.test_verification import status_of


@pytest.fixture
def task(house):
    return house.open_task("summarizer", "scribe")


def part_of(house, task, *agents, **more):
    return house.open_task(*(agents or ("summarizer", "scribe")), parent_task_id=task.id, **{"deadline_s": 600} | more)


def complete(house, task, state=TaskState.COMPLETED):
    return house.broker.tasks.end(house.caller("pipeline"), task.id, state).receipt


def state_of(house, task):
    return house.broker.tasks.find(house.caller("ada"), task.id).state


def grant_state(house, issued):
    return house.broker.verification.find_grant(house.caller("ada"), issued.grant.id)[0].state


def test_a_tree_of_three_dies_with_its_root_in_one_receipt(house, task):
    part = part_of(house, task)
    deeper = part_of(house, part, deadline_s=60)
    issued = [house.issue(each) for each in (task, part, deeper)]
    beside = house.issue(house.open_task())
    receipt = complete(house, task)
    assert {line.grant_id for line in receipt.lines} == {each.grant.id for each in issued}
    assert not any(map(house.is_active, issued)) and house.is_active(beside)
    assert [state_of(house, each) for each in (task, part, deeper)] == ["completed", "cancelled", "cancelled"]
    events = house.broker.audit_trail.page(house.caller("audrey"), {"task_id": deeper.id}, before=None, limit=10)
    [ended] = [event for event in events if event.type == "task.cancelled"]
    assert ended.reason == "the task above it is completed"
    for each in (part, deeper):
        with pytest.raises(TaskNotActive):
            house.issue(each)


def test_a_part_that_ends_leaves_the_whole(house, task):
    part = part_of(house, task)
    inside, above = house.issue(part), house.issue(task)
    assert [line.grant_id for line in complete(house, part).lines] == [inside.grant.id]
    assert house.is_active(above) and not house.is_active(inside)


@pytest.mark.parametrize("by", ["sweep", "complete"])
def test_a_part_ends_when_time_ends_the_whole(house, by):
    whole = house.open_task(heartbeat=timedelta(seconds=60))
    part = part_of(house, whole, "summarizer", heartbeat=timedelta(seconds=600))
    issued = house.issue(part)
    house.clock.forward(seconds=60)
    # Before any row says so.
    assert not house.is_active(issued)
    assert status_of(house, issued) == 1
    with house.broker.database.begin() as db:
        assert not tasks.beat(db, part.id, now=house.clock(), heartbeat_s=60)
    assert grant_state(house, issued) is GrantState.ACTIVE
    with pytest.raises(TaskNotActive):
        house.issue(part)
    if by == "sweep":
        house.broker.sweeper.sweep()
    else:
        complete(house, part)
    assert state_of(house, part) is TaskState.EXPIRED
    assert grant_state(house, issued) is GrantState.REVOKED


def test_the_heartbeat_of_the_whole_keeps_its_parts(house):
    whole = house.open_task(heartbeat=timedelta(seconds=60))
    part = part_of(house, whole, "summarizer", heartbeat=timedelta(seconds=200))
    deeper = part_of(house, part, "summarizer", deadline_s=500)
    issued = house.issue(deeper)
    for _ in range(3):
        house.clock.forward(seconds=50)
        house.broker.tasks.heartbeat(house.caller("pipeline"), whole.id)
    assert house.is_active(issued)
    # The part's own was last sent when it was opened.
    house.clock.forward(seconds=50)
    house.broker.tasks.heartbeat(house.caller("pipeline"), whole.id)
    assert not house.is_active(issued)
    with pytest.raises(TaskNotActive):
        house.broker.tasks.heartbeat(house.caller("pipeline"), part.id)


def test_not_longer(house):
    whole = house.open_task(deadline_s=300)
    with pytest.raises(Invalid, match="ends in 300 s, and no part of it later"):
        part_of(house, whole, "summarizer", deadline_s=301)
    assert part_of(house, whole, "summarizer", deadline_s=300).deadline_at == whole.deadline_at


def test_not_more_than_the_whole_may(house):
    whole = house.open_task(ceiling={CRM: ["contacts:read"]})
    with pytest.raises(InvalidScope, match="does not include contacts:write"):
        part_of(house, whole, "summarizer", ceiling={CRM: ["contacts:read", "contacts:write"]})
    with pytest.raises(InvalidScope, match="does not include entries:read"):
        part_of(house, whole, "summarizer", ceiling={LEDGER: ["entries:read"]})
    part = part_of(house, whole, "summarizer")
    assert part.ceiling == whole.ceiling
    with pytest.raises(InvalidScope):
        house.issue(part, scope="contacts:write", jkt="k" * 43)


def test_not_deeper_than_the_broker_allows(house, task):
    deepest = task
    for _ in range(3):
        deepest = part_of(house, deepest)
    with pytest.raises(Forbidden, match="3 deep already"):
        part_of(house, deepest)


def test_not_of_what_has_ended(house, task):
    complete(house, task)
    with pytest.raises(TaskNotActive, match="no part of it can be opened"):
        part_of(house, task)


@pytest.mark.parametrize("named", ["task_0000000000000000000000000a", "nonsense"])
def test_not_of_what_is_not_there(house, named):
    with pytest.raises(NotFound, match="of which you may open a part"):
        house.open_task(parent_task_id=named)


def test_not_of_somebody_elses(house, task):
    with pytest.raises(NotFound, match="of which you may open a part"):
        part_of(house, task, by="other-pipeline")


def test_an_agent_that_orchestrates_divides_its_task_among_those_it_names(house, task):
    catalogue = catalogue_for(house.issuer)
    leading = tuple(
        replace(rule, roles=("agent", "orchestrator")) if rule.name == "scribe" else rule
        for rule in catalogue.principals
    )
    house.broker.administration.apply(replace(catalogue, principals=leading), by="tests")
    part = part_of(house, task, "summarizer", by="scribe")
    with pytest.raises(Forbidden, match="no labels but those of the whole"):
        part_of(house, task, "summarizer", by="scribe", labels={"tier": "gold"})
    with pytest.raises(Forbidden, match="the same purpose"):
        part_of(house, task, "summarizer", by="scribe", purpose="something else")
    assert (part.orchestrator, part.parent_task_id) == ("scribe", task.id)
    with pytest.raises(Forbidden, match="does not name ada"):
        part_of(house, task, "summarizer", "ada", by="scribe")


def test_a_part_of_a_users_task_is_theirs(house):
    alice = User(name="people:alice", expires_at=house.clock() + timedelta(hours=1))
    whole = house.open_task(user=alice)
    assert part_of(house, whole, "summarizer").on_behalf_of == "people:alice"
    with pytest.raises(Forbidden, match="another user"):
        part_of(house, whole, "summarizer", user=User(name="people:bob", expires_at=alice.expires_at))


def test_what_is_handed_down_stays_in_its_task(house, task):
    issued = house.issue(task)
    with pytest.raises(BrokerError, match="of another task"):
        hand_down(house, issued, to="scribe", task_id=part_of(house, task).id)


@pytest.mark.parametrize("lockdown", [False, True], ids=["revocation", "lockdown"])
@pytest.mark.parametrize("axis", ["task", "orchestrator"])
def test_what_is_revoked_of_the_whole_reaches_its_parts(house, task, axis, lockdown):
    catalogue = catalogue_for(house.issuer)
    leading = tuple(
        replace(rule, roles=("agent", "orchestrator")) if rule.name == "scribe" else rule
        for rule in catalogue.principals
    )
    house.broker.administration.apply(replace(catalogue, principals=leading), by="tests")
    part = part_of(house, task, "summarizer", by="scribe")
    deeper = part_of(house, part, "summarizer", by="scribe", deadline_s=60)
    issued, beside = house.issue(deeper), house.issue(house.open_task(by="other-pipeline"))
    value = task.id if axis == "task" else "pipeline"
    done = house.broker.revocation.revoke_along(house.caller("ada"), axis, value, reason="drill", lockdown=lockdown)
    assert done.total == 1
    assert not house.is_active(issued) and house.is_active(beside)
    if lockdown:
        for each in (part, deeper, part_of(house, task, "summarizer", by="scribe", deadline_s=30)):
            with pytest.raises(LockedDown):
                house.issue(each)


def test_an_agent_hears_nothing_of_parts_it_is_not_named_in(house):
    """INV-28."""
    whole = house.open_task("summarizer", "scribe")
    part = part_of(house, whole, "scribe")
    above, inside = house.issue(whole), house.issue(part, by="scribe")

    def seen_by(name):
        return {line.grant_id for line in house.broker.tasks.receipt(house.caller(name), whole.id).receipt.lines}

    assert seen_by("summarizer") == {above.grant.id}
    assert seen_by("pipeline") == seen_by("ada") == {above.grant.id, inside.grant.id}
