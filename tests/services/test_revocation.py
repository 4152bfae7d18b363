"""Ending authority: single grants, tasks, every axis, lockdowns; at once for every verifier, and for good."""

import threading

import pytest

from broker.domain.errors import Invalid, NotFound, RoleMissing
from broker.domain.lifecycle import GrantState, TaskState
from broker.domain.refusal import AXES, Refusal, Refusals
from broker.store import grants as grant_rows
from tests.house import CRM


def test_a_task_that_ends_ends_everything_issued_for_it(house):
    task, other = house.open_task(), house.open_task()
    below = [house.issue(task) for _ in range(3)]
    beside = house.issue(other)
    signed = house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED)
    assert not any(map(house.is_active, below))
    assert house.is_active(beside)
    assert signed.receipt.outcome == "completed"
    assert {line.grant_id for line in signed.receipt.lines} == {issued.grant.id for issued in below}
    assert all(line.authority_ended_at == house.clock() for line in signed.receipt.lines)


def test_a_receipt_says_how_long_offline_verifiers_are_exposed_and_then_that_it_is_over(house):
    task = house.open_task()
    house.issue(task)
    totals = house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.FAILED).receipt.as_json()["totals"]
    assert totals == {"ended": 1, "confirmed_dead": 0, "outstanding": 1}
    house.clock.forward(seconds=15)
    totals = house.broker.tasks.receipt(house.caller("pipeline"), task.id).receipt.as_json()["totals"]
    assert totals == {"ended": 1, "confirmed_dead": 1, "outstanding": 0}


def test_ending_twice_answers_the_first_end(house):
    task = house.open_task()
    first = house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED, reason="done")
    house.clock.forward(seconds=1)
    again = house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.FAILED, reason="oops")
    assert (again.receipt.outcome, again.receipt.ended_at) == (first.receipt.outcome, first.receipt.ended_at)


def test_a_task_ended_after_its_deadline_has_expired(house):
    task = house.open_task(deadline_s=60)
    house.clock.forward(seconds=61)
    assert house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED).receipt.outcome == "expired"


@pytest.mark.parametrize("stranger", ["other-pipeline", "scribe", "crm-api"])
def test_a_stranger_cannot_tell_a_task_from_one_that_is_not_there(house, stranger):
    task = house.open_task()
    with pytest.raises(NotFound) as hidden:
        house.broker.tasks.end(house.caller(stranger), task.id, TaskState.COMPLETED)
    with pytest.raises(NotFound) as absent:
        house.broker.tasks.end(house.caller(stranger), task.id[:-2] + "00", TaskState.COMPLETED)
    assert hidden.value.detail.replace(task.id, "X") == absent.value.detail.replace(task.id[:-2] + "00", "X")


def test_an_agent_of_the_task_may_see_it_and_not_end_it(house):
    task = house.open_task()
    with pytest.raises(RoleMissing):
        house.broker.tasks.end(house.caller("summarizer"), task.id, TaskState.COMPLETED)


@pytest.mark.parametrize("who", ["summarizer", "pipeline", "ada"])
def test_a_grant_may_be_ended_by_its_holder_its_orchestrator_and_an_admin(house, who):
    issued = house.issue(house.open_task())
    receipt = house.broker.revocation.revoke_grant(house.caller(who), issued.grant.id, reason="enough").receipt
    assert receipt.outcome == "revoked"
    assert not house.is_active(issued)
    again = house.broker.revocation.revoke_grant(house.caller(who), issued.grant.id).receipt
    assert again.ended_at == receipt.ended_at


@pytest.mark.parametrize("who", ["scribe", "other-pipeline", "crm-api"])
def test_nobody_else_can_end_a_grant_or_learn_that_it_exists(house, who):
    issued = house.issue(house.open_task())
    with pytest.raises(NotFound):
        house.broker.revocation.revoke_grant(house.caller(who), issued.grant.id)
    assert house.is_active(issued)


def value_on(axis, issued):
    return {
        "task": issued.grant.task_id,
        "agent": "summarizer",
        "orchestrator": "pipeline",
        "resource": CRM,
        "provider": "jwt",
        "policy": "crm-read",
        "key": issued.grant.kids[0],
        "all": "all",
    }[axis]


@pytest.mark.parametrize("axis", [axis for axis in AXES if axis != "user"])
def test_everything_along_an_axis_ends_at_once_and_nothing_beside_it(house, axis):
    issued = house.issue(house.open_task())
    beside = house.issue(None, by="scribe")
    value = value_on(axis, issued)
    trial = house.broker.revocation.revoke_along(house.caller("ada"), axis, value, reason="drill", dry_run=True)
    assert house.is_active(issued)
    assert trial.by_agent["summarizer"] == 1
    done = house.broker.revocation.revoke_along(house.caller("ada"), axis, value, reason="drill")
    assert done.total == trial.total
    assert not house.is_active(issued)
    assert house.is_active(beside) is (axis in ("task", "agent", "orchestrator", "policy"))
    found, *_ = house.broker.verification.find_grant(house.caller("ada"), issued.grant.id)
    assert (found.state, found.reason, found.revoked_by) == (GrantState.REVOKED, "drill", "ada")


def test_a_bulk_revocation_is_effective_before_any_row_followed(house, monkeypatch):
    issued = house.issue(house.open_task())
    monkeypatch.setattr(house.broker.revocation, "follow", lambda *_, **__: 0)
    house.broker.revocation.revoke_along(house.caller("ada"), "agent", "summarizer", reason="drill")
    found, live, _ = house.broker.verification.find_grant(house.caller("ada"), issued.grant.id)
    assert found.state is GrantState.ACTIVE
    assert not live
    assert not house.is_active(issued)
    monkeypatch.undo()
    assert house.broker.sweeper.sweep().grants_revoked == 1
    found, *_ = house.broker.verification.find_grant(house.caller("ada"), issued.grant.id)
    assert found.state is GrantState.REVOKED


def test_what_is_issued_after_a_bulk_revocation_is_not_covered_by_it(house):
    task = house.open_task()
    house.issue(task)
    house.broker.revocation.revoke_along(house.caller("ada"), "agent", "summarizer", reason="drill")
    assert house.is_active(house.issue(task))


def test_lifting_a_lockdown_brings_nothing_back(house):
    task = house.open_task()
    issued = house.issue(task)
    lockdown = house.broker.revocation.set_lockdown(house.caller("ada"), "all", "all", reason="drill")
    assert not house.is_active(issued)
    house.broker.revocation.lift_lockdown(house.caller("ada"), lockdown.id)
    assert not house.is_active(issued)
    assert house.is_active(house.issue(task))
    with pytest.raises(NotFound):
        house.broker.revocation.lift_lockdown(house.caller("ada"), lockdown.id)


@pytest.mark.parametrize("who", ["summarizer", "pipeline", "audrey"])
def test_only_an_admin_revokes_along_an_axis(house, who):
    with pytest.raises(RoleMissing):
        house.broker.revocation.revoke_along(house.caller(who), "all", "all", reason="no")
    with pytest.raises(RoleMissing):
        house.broker.revocation.set_lockdown(house.caller(who), "all", "all", reason="no")


@pytest.mark.parametrize(("axis", "value"), [("agents", "x"), ("all", "everything"), ("", "")])
def test_an_axis_that_does_not_exist_is_refused(house, axis, value):
    with pytest.raises(Invalid):
        house.broker.revocation.revoke_along(house.caller("ada"), axis, value, reason="no")


def test_a_condemned_key_takes_its_tokens_with_it(house):
    task = house.open_task()
    issued = house.issue(task)
    house.broker.revocation.compromise_key(house.caller("ada"), issued.grant.kids[0], reason="found in a log")
    assert issued.grant.kids[0] not in {key["kid"] for key in house.broker.verification.jwks()["keys"]}
    assert not house.is_active(issued)
    after = house.issue(task)
    assert after.grant.kids != issued.grant.kids
    assert house.is_active(after)


@pytest.mark.parametrize("axis", AXES)
def test_the_refusal_in_memory_and_the_refusal_in_sql_cover_the_same_grants(house, axis):
    issued = [house.issue(house.open_task("summarizer", "scribe"), by=name).grant for name in ("summarizer", "scribe")]
    values = [
        "summarizer",
        "pipeline",
        CRM,
        "jwt",
        "crm-read",
        "crm",
        "all",
        issued[0].task_id,
        issued[0].kids[0],
        "%",
        "_",
    ]
    for value in values:
        for era in (None, issued[0].era - 1, issued[0].era):
            refusal = Refusal(id="lck_x", axis=axis, value=value, reason="", era=era)
            in_memory = {grant.id for grant in issued if Refusals([refusal]).over(grant)}
            with house.broker.database.read() as db:
                in_sql = set(grant_rows.unended_ids(db, grant_rows.covered_by(refusal), limit=10))
            assert in_memory == (in_sql if axis != "all" or value == "all" else set())


def test_rows_that_follow_at_once_are_counted_all_the_same(house, monkeypatch):
    """A sweep that comes between the revocation and its count must not make it answer that nothing was ended."""
    task = house.open_task()
    issued = house.issue(task)
    revocation = house.broker.revocation
    count = grant_rows.count_by_agent

    def after_a_sweep(*arguments):
        sweep = threading.Thread(target=revocation.follow_all, kwargs={"at_most": 1000})
        sweep.start()
        sweep.join()
        return count(*arguments)

    monkeypatch.setattr(grant_rows, "count_by_agent", after_a_sweep)
    done = revocation.revoke_along(house.caller("ada"), "task", task.id, reason="drill")
    assert done.total == 1 and [grant.id for grant in done.samples] == [issued.grant.id]
    assert not house.is_active(issued)
