from datetime import UTC, datetime, timedelta

import pytest

from broker.domain.lifecycle import ApprovalState, GrantState, LeaseState, TaskState, is_live, sources

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
LIVE = {
    "grant": GrantState.ACTIVE,
    "expires_at": NOW + timedelta(seconds=1),
    "task": TaskState.ACTIVE,
    "deadline_at": NOW + timedelta(seconds=1),
    "locked_down": False,
    "now": NOW,
}


def test_a_grant_is_live_while_nothing_speaks_against_it():
    assert is_live(**LIVE)


@pytest.mark.parametrize(
    "against",
    [
        *({"grant": state} for state in GrantState if state is not GrantState.ACTIVE),
        *({"task": state} for state in TaskState if state is not TaskState.ACTIVE),
        {"expires_at": NOW},
        {"deadline_at": NOW},
        {"locked_down": True},
    ],
    ids=str,
)
def test_one_thing_against_it_ends_a_grant(against):
    assert not is_live(**LIVE | against)


@pytest.mark.parametrize("ended", [GrantState.REVOKED, GrantState.EXPIRED, GrantState.DENIED, GrantState.FAILED])
def test_nothing_leads_out_of_an_ended_grant(ended):
    """INV-23."""
    assert not any(ended in sources(state) for state in GrantState)


@pytest.mark.parametrize("ended", [state for state in TaskState if state is not TaskState.ACTIVE])
def test_nothing_leads_out_of_an_ended_task(ended):
    assert not any(ended in sources(state) for state in TaskState)


def test_a_lease_is_released_only_after_a_revocation_was_tried():
    """INV-04."""
    assert sources(LeaseState.RELEASED) == {LeaseState.REVOKING, LeaseState.STUCK}


def test_states_of_different_machines_with_the_same_word_are_not_confused():
    assert sources(ApprovalState.APPROVED) == {ApprovalState.OPEN}
    assert sources(GrantState.APPROVED) == {GrantState.PENDING}
