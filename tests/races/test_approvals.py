"""Votes, withdrawals, collections and ends that meet."""

import pytest

from broker.domain.errors import BrokerError, Conflict, LimitExceeded
from broker.domain.lifecycle import TaskState
from broker.services import approval, collection, tasks
from tests.approvals import ASKING, PEOPLE, apply, approve, ask, asking, collect, deny, person, withdraw


def asks(race, *, quorum=1, voters=()):
    policies = ASKING.replace('@approval("security")\n', f'@approval("security") @quorum("{quorum}")\n', 1)
    apply(race.one, asking(race.one, policies=policies, people=(*PEOPLE, *voters)))


def states_of(race, case):
    [row] = race.rows(
        "SELECT g.state AS grant_state, a.state, (SELECT count(*) FROM votes v WHERE v.approval_id = a.id) AS votes "
        "FROM grants g JOIN approvals a ON a.grant_id = g.id WHERE a.id = :id",
        id=case.approval.id,
    )
    return row


def events(race, case, type_):
    found = race.rows("SELECT id FROM events WHERE grant_id = :id AND type = :type", id=case.grant.id, type=type_)
    return len(found)


def test_of_a_hundred_votes_at_once_exactly_the_quorum_counts(postgres_race):
    """INV-15: counted one after the other, one change of state, and everybody else is told that it is over."""
    race = postgres_race
    voters = tuple(person(f"voter-{number}", "security") for number in range(100))
    asks(race, quorum=7, voters=voters)
    case = ask(race.one, race.one.open_task())
    callers = [race.one.caller(voter.name) for voter in voters]

    def vote(number):
        house = race.one if number % 2 else race.other
        return house.broker.approvals.approve(callers[number], case.approval.id, approval.Narrowing())

    running = [race.start(vote, number) for number in range(100)]
    outcomes = [(future.exception(timeout=120), future) for future in running]
    counted = [future for refusal, future in outcomes if refusal is None]
    # Whoever found the store busy did not vote; nobody was counted beyond what was needed.
    assert len(counted) == 7
    assert all(isinstance(refusal, BrokerError) for refusal, _ in outcomes if refusal is not None)
    row = states_of(race, case)
    assert (row.state, row.grant_state, row.votes) == ("approved", "approved", 7)
    assert events(race, case, "approval.approved") == events(race, case, "grant.approved") == 1
    assert events(race, case, "approval.voted") == 7


def test_one_person_voting_many_times_at_once_has_one_vote(race):
    asks(race, quorum=2)
    case = ask(race.one, race.one.open_task())
    sam = race.one.caller("sam")

    def vote(number):
        return race.one.broker.approvals.approve(sam, case.approval.id, approval.Narrowing(ttl_s=number))

    running = [race.start(vote, number) for number in range(1, 11)]
    refusals = [future.exception(timeout=60) for future in running]
    assert refusals.count(None) == 1
    assert states_of(race, case).votes == 1
    assert states_of(race, case).state == "open"


def test_two_that_collect_at_once_get_one_credential(race):
    """INV-20."""
    asks(race)
    case = ask(race.one, race.one.open_task())
    approve(race.one, case)
    pause = race.stop(collection, "signed")
    first, second = race.run_into(lambda: collect(race.one, case), pause, lambda: collect(race.other, case))
    assert second.waited
    assert race.one.is_active(first.answer)
    assert isinstance(second.refusal, Conflict)
    assert events(race, case, "grant.issued") == events(race, case, "approval.collected") == 1


def test_a_yes_and_a_withdrawal_that_meet_leave_one_of_the_two(race):
    asks(race)
    case = ask(race.one, race.one.open_task())
    pause = race.stop(approval, "end_approvals")
    said, taken_back = race.run_into(lambda: approve(race.one, case), pause, lambda: withdraw(race.other, case))
    assert taken_back.waited
    assert said.refusal is None and isinstance(taken_back.refusal, Conflict)
    assert (states_of(race, case).state, states_of(race, case).grant_state) == ("approved", "approved")


def test_a_withdrawal_and_a_yes_that_meet_leave_one_of_the_two(race):
    asks(race)
    case = ask(race.one, race.one.open_task())
    pause = race.stop(approval, "end_approvals")
    taken_back, said = race.run_into(lambda: withdraw(race.one, case), pause, lambda: approve(race.other, case))
    assert said.waited
    assert taken_back.refusal is None and isinstance(said.refusal, Conflict)
    assert (states_of(race, case).state, states_of(race, case).grant_state) == ("withdrawn", "revoked")
    assert states_of(race, case).votes == 0


def test_a_yes_and_a_no_that_meet_leave_one_of_the_two(race):
    asks(race)
    case = ask(race.one, race.one.open_task())
    pause = race.stop(approval, "end_approvals")
    no, yes = race.run_into(lambda: deny(race.one, case), pause, lambda: approve(race.other, case, by="sue"))
    assert yes.waited
    assert no.refusal is None and isinstance(yes.refusal, Conflict)
    assert states_of(race, case).grant_state == "denied"


def complete(house, task):
    return house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED)


def test_a_task_completed_while_somebody_says_yes_ends_what_was_approved(race):
    """INV-12."""
    asks(race)
    task = race.one.open_task()
    case = ask(race.one, task)
    pause = race.stop(approval, "end_approvals")
    said, ended = race.run_into(lambda: approve(race.one, case), pause, lambda: complete(race.other, task))
    assert ended.waited
    assert said.refusal is None and ended.refusal is None
    assert (states_of(race, case).state, states_of(race, case).grant_state) == ("approved", "revoked")
    with pytest.raises(Conflict):
        collect(race.one, case)


def test_a_yes_while_the_task_is_completed_comes_too_late(race):
    """INV-12."""
    asks(race)
    task = race.one.open_task()
    case = ask(race.one, task)
    pause = race.stop(tasks, "end_grants", after=True, passing=1)
    ended, said = race.run_into(lambda: complete(race.one, task), pause, lambda: approve(race.other, case))
    assert said.waited
    assert ended.refusal is None
    assert isinstance(said.refusal, Conflict)
    assert states_of(race, case).grant_state == "revoked"


def test_a_task_completed_while_its_grant_is_collected_ends_that_grant_too(race):
    """INV-12, INV-23."""
    asks(race)
    task = race.one.open_task()
    case = ask(race.one, task)
    approve(race.one, case)
    pause = race.stop(collection, "signed")
    collected, ended = race.run_into(lambda: collect(race.one, case), pause, lambda: complete(race.other, task))
    assert ended.waited
    assert [line.grant_id for line in ended.answer.receipt.lines] == [case.grant.id]
    assert not race.one.is_active(collected.answer)
    assert race.live_under_ended_tasks() == []


def test_a_collection_asked_for_while_its_task_is_being_completed_is_refused(race):
    """INV-12."""
    asks(race)
    task = race.one.open_task()
    case = ask(race.one, task)
    approve(race.one, case)
    pause = race.stop(tasks, "move", after=True)
    ended, collected = race.run_into(lambda: complete(race.one, task), pause, lambda: collect(race.other, case))
    assert collected.waited
    assert ended.refusal is None and isinstance(collected.refusal, Conflict)
    assert events(race, case, "grant.issued") == 0


def test_a_group_is_not_asked_more_than_its_limit_however_many_agents_ask_at_once(postgres_race, monkeypatch):
    """INV-34: agents do not wait for each other, and what they open is counted together."""
    race = postgres_race
    everybody = ASKING.replace('principal == Agent::"summarizer"', "principal", 1)
    apply(race.one, asking(race.one, policies=everybody))
    for house in (race.one, race.other):
        limits = house.broker.settings.limits
        house.broker.issuance._limits = type(limits)(max_open_approvals_per_group=1)
    task = race.one.open_task("summarizer", "scribe")
    pause = race.stop(approval.approvals, "count_open", after=True)
    first, second = race.run_into(
        lambda: ask(race.one, task), pause, lambda: ask(race.other, task, by="scribe", intent="mine")
    )
    assert second.waited
    assert first.refusal is None
    assert isinstance(second.refusal, LimitExceeded)
