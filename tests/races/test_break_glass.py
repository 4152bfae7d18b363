"""Break-glass where two meet: two people who give it, two that collect, two who review, a review and its time."""

from broker.domain.errors import Conflict
from broker.services import approval, collection, reviews
from tests.approvals import approve, collect, states
from tests.break_glass import break_glass, broken, glass_house, review_of


def test_two_people_who_give_it_at_once_are_two(race):
    glass_house(race.one)
    case = break_glass(race.one)
    pause = race.stop(approval, "step")
    first, second = race.run_into(lambda: approve(race.one, case), pause, lambda: approve(race.other, case, by="sue"))
    assert second.waited
    assert first.refusal is None and second.refusal is None
    assert states(race.one, case) == ("approved", "approved")
    assert len(race.rows("SELECT id FROM events WHERE type = 'break_glass.approved'")) == 1


def test_one_person_at_two_brokers_at_once_is_one_person(race):
    glass_house(race.one)
    case = break_glass(race.one)
    pause = race.stop(approval, "step")
    first, second = race.run_into(lambda: approve(race.one, case), pause, lambda: approve(race.other, case))
    assert second.waited
    assert first.refusal is None and second.refusal is None
    assert states(race.one, case) == ("open", "pending")
    assert len(race.rows("SELECT voter FROM votes")) == 1


def test_two_that_collect_at_once_get_one_credential_and_owe_one_review(race):
    glass_house(race.one)
    case = break_glass(race.one)
    approve(race.one, case)
    approve(race.one, case, by="sue")
    pause = race.stop(collection, "step")
    first, second = race.run_into(lambda: collect(race.one, case), pause, lambda: collect(race.other, case))
    assert second.waited
    assert race.one.is_active(first.answer)
    assert isinstance(second.refusal, Conflict)
    assert len(race.rows("SELECT id FROM reviews")) == 1


def test_two_who_review_at_once_leave_one_review(race):
    glass_house(race.one)
    case, _ = broken(race.one)
    race.one.broker.revocation.revoke_grant(race.one.caller("ada"), case.grant.id)
    review_id, pause = review_of(race.one, case), race.stop(reviews, "require_apart")

    def complete(house, by):
        return house.broker.reviews.complete(house.caller(by), review_id, f"found by {by}")

    first, second = race.run_into(lambda: complete(race.one, "ada"), pause, lambda: complete(race.other, "audrey"))
    assert second.waited
    assert first.refusal is None and isinstance(second.refusal, Conflict)
    assert [row.completed_by for row in race.rows("SELECT completed_by FROM reviews")] == ["ada"]


def test_a_review_that_is_done_while_its_time_passes_is_done(race):
    glass_house(race.one)
    case, _ = broken(race.one)
    race.one.broker.revocation.revoke_grant(race.one.caller("ada"), case.grant.id)
    review_id = review_of(race.one, case)
    race.one.clock.forward(days=2)
    race.other.clock.at = race.one.clock.at
    pause = race.stop(reviews, "require_apart")
    done, late = race.run_into(
        lambda: race.one.broker.reviews.complete(race.one.caller("ada"), review_id, "as it was said"),
        pause,
        race.other.broker.reviews.note_overdue,
    )
    assert done.refusal is None
    assert (late.refusal, late.answer) == (None, 0)
    assert [row.state for row in race.rows("SELECT state FROM reviews")] == ["completed"]
