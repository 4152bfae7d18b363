"""A grant that is revoked while it is being handed down, at any depth."""

import pytest

from broker.domain.errors import Conflict, NotFound, TaskNotActive
from broker.domain.lifecycle import TaskState
from broker.services import endings, issuance, renewal, revocation

AGENTS = ("summarizer", "scribe")


@pytest.fixture
def task(race):
    return race.one.open_task(*AGENTS)


def hand_down(house, parent):
    # To whichever of the two has it not.
    to = AGENTS[len(parent.grant.chain) % 2 == 0]
    return house.issue(None, by=to, parent_grant_id=parent.grant.id, parent_by_token=True)


def revoke(house, issued):
    return house.broker.revocation.revoke_grant(house.caller("ada"), issued.grant.id)


def chain_of(race, task, depth):
    chain = [race.one.issue(task)]
    for _ in range(depth):
        chain.append(hand_down(race.one, chain[-1]))
    return chain


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_what_is_being_handed_down_ends_with_the_root_that_is_revoked_meanwhile(race, task, depth):
    """INV-11: including those being issued."""
    chain = chain_of(race, task, depth)
    pause = race.stop(issuance, "insert_grants")
    issued, ended = race.run_into(lambda: hand_down(race.one, chain[-1]), pause, lambda: revoke(race.other, chain[0]))
    assert ended.waited and ended.refusal is None
    everything = [*chain, issued.answer]
    assert {race.state_of(each) for each in everything} == {"revoked"}
    assert not any(race.one.is_active(each) for each in everything)
    assert {line.grant_id for line in ended.answer.receipt.lines} == {each.grant.id for each in everything}


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_what_is_asked_for_while_the_root_is_revoked_is_refused(race, task, depth):
    chain = chain_of(race, task, depth)
    pause = race.stop(revocation, "end_with_descendants", after=True)
    _, asked = race.run_into(lambda: revoke(race.one, chain[0]), pause, lambda: hand_down(race.other, chain[-1]))
    assert asked.waited
    assert isinstance(asked.refusal, Conflict | NotFound)
    assert race.rows("SELECT id FROM grants WHERE state = 'active'") == []


def test_a_renewal_below_ends_with_the_root(race, task):
    """The two take their rows in one order, and neither is thrown out for a deadlock."""
    root, child = chain_of(race, task, 1)
    pause = race.stop(renewal, "renew_grant")
    renewed, ended = race.run_into(
        lambda: race.one.broker.renewal.renew(race.one.caller(child.grant.agent), child.grant.id, ttl=None),
        pause,
        lambda: revoke(race.other, root),
    )
    assert ended.waited and ended.refusal is None
    assert not race.one.is_active(renewed.answer)
    assert race.state_of(child) == "revoked"


def test_the_root_is_revoked_while_its_task_ends(race, task):
    """From above and from all sides at once: both answer."""
    chain = chain_of(race, task, 3)
    pause = race.stop(endings, "move", after=True)
    revoked, ended = race.run_into(
        lambda: revoke(race.one, chain[0]),
        pause,
        lambda: race.other.broker.tasks.end(race.other.caller("pipeline"), task.id, TaskState.COMPLETED),
    )
    assert ended.waited
    assert revoked.refusal is None and ended.refusal is None
    assert {race.state_of(each) for each in chain} == {"revoked"}


def test_twenty_children_at_once_and_the_root_goes(race, task):
    root = race.one.issue(task)
    running = [race.start(hand_down, house, root) for house in (race.one, race.other) for _ in range(10)]
    revoke(race.one, root)
    for each in running:
        problem = each.exception(timeout=30)
        assert problem is None or isinstance(problem, Conflict | NotFound | TaskNotActive), problem
    assert race.rows("SELECT id FROM grants WHERE state = 'active'") == []
