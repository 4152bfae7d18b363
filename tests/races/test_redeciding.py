"""Live grants decided again, beside those who renew them, end them, change the configuration, and decide them too."""

from dataclasses import replace
from datetime import timedelta

from broker.domain.errors import Conflict, PolicyDenied
from broker.services import issuance, redeciding, renewal, revocation
from tests.house import CRM, POLICIES

FORBID = '@id("no-crm") forbid (principal == Agent::"summarizer", action, resource);'


def apply(house, **more):
    catalogue = house.broker.standing.now().catalogue
    return house.broker.administration.apply(replace(catalogue, **more), by="ada", allow_older=True)


def forbid(house):
    return apply(house, policies={**POLICIES, "no.cedar": FORBID})


def shrink(house, max_ttl_s):
    found = house.broker.standing.now().catalogue.resources
    changed = tuple(replace(each, max_ttl_s=max_ttl_s) if each.identifier == CRM else each for each in found)
    return apply(house, resources=changed)


def renew(house, issued):
    return house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=timedelta(seconds=600))


def revoke(house, issued):
    return house.broker.revocation.revoke_grant(house.caller("ada"), issued.grant.id)


def expiry_of(race, issued):
    return race.one.broker.verification.find_grant(race.one.caller("ada"), issued.grant.id)[0].expires_at


def ends(race):
    return [row.grant_id for row in race.rows("SELECT grant_id FROM events WHERE type = 'grant.revoked'")]


def test_a_renewal_that_comes_while_the_grant_is_ended_gets_nothing(race):
    """INV-23."""
    issued = race.one.issue(race.one.open_task())
    forbid(race.one)
    pause = race.stop(redeciding.redecisions, "lock_grants", after=True)
    done, renewed = race.run_into(race.one.broker.redeciding.run, pause, lambda: renew(race.other, issued))
    assert renewed.waited
    assert done.answer.ended == 1
    assert isinstance(renewed.refusal, Conflict | PolicyDenied)
    assert race.state_of(issued) == "revoked"
    assert not race.one.is_active(issued)


def test_a_renewal_on_its_way_is_passed_over_and_its_grant_shortened_by_the_ceiling_it_got(race):
    """Shortened by what was read before it, the token it just answered with would end too early."""
    issued = race.one.issue(race.one.open_task(), ttl=timedelta(seconds=600))
    race.one.clock.forward(seconds=100)
    shrink(race.one, 120)
    read = race.stop(redeciding.redecisions, "recorded", after=True)
    running = race.start(race.one.broker.redeciding.run)
    read.until_reached(running)
    renewed = renew(race.other, issued)
    read.go_on()
    assert running.result().shortened == 0
    assert expiry_of(race, issued) == issued.grant.expires_at  # of the earlier token, until it is looked at again
    race.one.clock.forward(seconds=1)
    assert race.one.broker.redeciding.run().shortened == 1
    assert expiry_of(race, issued) == race.one.clock() + timedelta(seconds=119)
    race.one.clock.forward(seconds=118)
    assert race.one.is_active(renewed)


def test_a_grant_that_is_being_renewed_is_not_waited_for_and_not_forgotten(postgres_race):
    race = postgres_race
    issued, other = (race.one.issue(race.one.open_task(), ttl=timedelta(seconds=600)) for _ in range(2))
    pause = race.stop(renewal, "renew_grant", after=True)
    shrink(race.one, 120)
    running = race.start(renew, race.one, issued)
    pause.until_reached(running)
    assert race.other.broker.redeciding.run().shortened == 1
    assert expiry_of(race, other) == race.one.clock() + timedelta(seconds=120)
    pause.go_on()
    running.result()
    race.other.clock.forward(seconds=1)
    race.other.broker.redeciding.run()
    assert expiry_of(race, issued) == race.one.clock() + timedelta(seconds=119)


def test_a_revocation_that_comes_while_the_grant_is_ended_answers_that_it_has_ended(race):
    """INV-32: one end, one event."""
    issued = race.one.issue(race.one.open_task())
    forbid(race.one)
    pause = race.stop(redeciding, "end_with_descendants", after=True)
    done, revoked = race.run_into(race.one.broker.redeciding.run, pause, lambda: revoke(race.other, issued))
    assert revoked.waited
    assert done.answer.ended == 1
    assert revoked.answer.receipt.outcome == "revoked"
    assert ends(race) == [issued.grant.id]


def test_a_grant_that_somebody_is_revoking_is_ended_once(race):
    """INV-23, INV-32."""
    issued = race.one.issue(race.one.open_task())
    forbid(race.one)
    pause = race.stop(revocation, "end_with_descendants", after=True)
    revoked, done = race.run_into(lambda: revoke(race.one, issued), pause, race.other.broker.redeciding.run)
    assert revoked.refusal is None and done.refusal is None
    assert done.answer.ended == 0
    race.other.clock.forward(seconds=1)
    race.other.broker.redeciding.run()
    assert ends(race) == [issued.grant.id]
    assert not race.rows("SELECT id FROM redecisions WHERE finished_at IS NULL")


def test_a_revocation_along_an_axis_waits_for_a_share_and_both_come_to_their_end(race):
    """INV-27: they take the gate and then rows, so neither waits for the other for ever."""
    for _ in range(5):
        race.one.issue(race.one.open_task())
    forbid(race.one)
    pause = race.stop(redeciding, "end_with_descendants", after=True)

    def along():
        return race.other.broker.revocation.revoke_along(race.other.caller("ada"), "agent", "summarizer", reason="x")

    done, revoked = race.run_into(race.one.broker.redeciding.run, pause, along)
    assert revoked.waited
    assert done.answer.ended == 5
    assert revoked.refusal is None and revoked.answer.total == 0
    assert len(ends(race)) == 5


def test_a_version_that_comes_between_the_question_and_the_deed_stops_the_deed(race):
    """INV-14: what is done is what counts when it is done."""
    issued = race.one.issue(race.one.open_task())
    forbid(race.one)
    asked = race.stop(race.one.broker.redeciding, "_asked_by_kind", after=True)
    running = race.start(race.one.broker.redeciding.run)
    asked.until_reached(running)
    apply(race.other, policies=POLICIES)
    asked.go_on()
    assert running.result().ended == 0
    assert race.one.broker.redeciding.run().ended == 0
    assert race.one.is_active(issued)
    assert not race.rows("SELECT id FROM redecisions WHERE finished_at IS NULL")


def test_a_grant_that_is_issued_while_a_version_is_applied_is_covered_or_decided_by_it(race):
    """Between the two there is no gap: the gate turns only when nobody issues."""
    task = race.one.open_task()
    pause = race.stop(issuance, "insert_grants", after=True)
    issued, applied = race.run_into(lambda: race.one.issue(task), pause, lambda: forbid(race.other))
    assert applied.waited
    assert race.one.is_active(issued.answer)
    assert race.one.broker.redeciding.run().ended == 1
    assert not race.one.is_active(issued.answer)


def test_two_brokers_share_the_work_and_no_grant_is_done_twice(race, monkeypatch):
    monkeypatch.setattr(redeciding, "_SHARE", 2)
    issued = [race.one.issue(race.one.open_task()) for _ in range(8)]
    forbid(race.one)
    pause = race.stop(redeciding, "end_with_descendants", after=True)
    first, second = race.run_into(race.one.broker.redeciding.run, pause, race.other.broker.redeciding.run)
    assert second.waited is race.on_sqlite
    assert first.answer.ended + second.answer.ended == 8
    assert sorted(ends(race)) == sorted(each.grant.id for each in issued)
    race.one.broker.redeciding.run()
    assert not race.rows("SELECT id FROM redecisions WHERE finished_at IS NULL")


def test_a_grant_that_is_issued_while_a_signal_is_sent_is_covered_or_decided_by_it(race):
    risky = '@id("risk") forbid (principal, action, resource) when { context.risk == "high" };'
    apply(race.one, policies={**POLICIES, "risk.cedar": risky})
    race.one.broker.redeciding.run()
    task = race.one.open_task()
    pause = race.stop(issuance, "insert_grants", after=True)

    def signal():
        said = {"level": "high", "reason": "r", "source": "s", "expires_in": timedelta(seconds=600)}
        return race.other.broker.signals.send(race.other.caller("ada"), "agent", "summarizer", **said)

    issued, sent = race.run_into(lambda: race.one.issue(task), pause, signal)
    assert sent.waited and sent.refusal is None
    assert not race.one.is_active(issued.answer)
    assert race.state_of(issued.answer) == "revoked"


def test_what_somebody_holds_a_part_of_is_come_back_to_and_nobody_is_waited_for(postgres_race):
    """A task that ends takes its grants in an order of its own, and two that wait could wait for each other."""
    race = postgres_race
    root = race.one.issue(race.one.open_task("summarizer", "scribe"))
    part = race.one.issue(None, by="scribe", parent_grant_id=root.grant.id, parent_by_token=True)
    forbid(race.one)
    with race.holding("SELECT id FROM grants WHERE id = :id FOR UPDATE", id=part.grant.id):
        assert race.one.broker.redeciding.run().ended == 0
        assert race.one.is_active(root)
    race.one.clock.forward(seconds=60)
    assert race.one.broker.redeciding.run().ended == 2
    assert {race.state_of(each) for each in (root, part)} == {"revoked"}
