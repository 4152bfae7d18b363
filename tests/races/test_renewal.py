"""A grant that is revoked or expires while it is renewed."""

from datetime import timedelta

import pytest

from broker.domain.errors import Conflict
from broker.services import renewal, revocation, sweeper
from tests.house import TestClock, build_house


def renew(house, issued):
    return house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=None)


def revoke(house, issued):
    return house.broker.revocation.revoke_grant(house.caller("ada"), issued.grant.id)


def test_a_grant_revoked_while_it_is_renewed_stays_revoked(race):
    """INV-23: the new token of a revoked grant opens nothing."""
    issued = race.one.issue(race.one.open_task())
    pause = race.stop(renewal, "renew_grant", after=True)
    renewed, revoked = race.run_into(lambda: renew(race.one, issued), pause, lambda: revoke(race.other, issued))
    assert revoked.waited
    assert revoked.answer.receipt.outcome == "revoked"
    assert race.state_of(issued) == "revoked"
    assert not race.one.is_active(renewed.answer)
    assert not race.one.is_active(issued)


def test_a_grant_that_is_being_revoked_is_not_renewed(race):
    """INV-23: no credential leaves for a grant that has ended."""
    issued = race.one.issue(race.one.open_task())
    pause = race.stop(revocation, "end_with_descendants", after=True)
    _, renewed = race.run_into(lambda: revoke(race.one, issued), pause, lambda: renew(race.other, issued))
    assert renewed.waited
    assert isinstance(renewed.refusal, Conflict)
    assert race.state_of(issued) == "revoked"


def test_of_two_renewals_at_once_neither_shortens_the_other(race):
    """The second is decided on what the first wrote."""
    issued = race.one.issue(race.one.open_task())
    race.one.clock.forward(seconds=100)
    pause = race.stop(renewal, "renew_grant", after=True)

    def shortly():
        return race.other.broker.renewal.renew(
            race.other.caller("summarizer"), issued.grant.id, ttl=timedelta(seconds=10)
        )

    long, short = race.run_into(lambda: renew(race.one, issued), pause, shortly)
    assert short.waited
    assert short.answer.grant.expires_at == long.answer.grant.expires_at
    race.one.clock.forward(seconds=299)
    assert race.one.is_active(long.answer)


class TestExpiry:
    """The sweeper's clock is a second ahead: for it the grant is over, for the broker that renews it is not."""

    @pytest.fixture
    def sweeping(self, race, store_url, tmp_path):
        ahead = build_house(store_url, tmp_path, clock=TestClock(race.one.clock() + timedelta(seconds=300)))
        yield ahead
        ahead.broker.close()

    @pytest.fixture
    def issued(self, race):
        issued = race.one.issue(race.one.open_task())
        race.one.clock.forward(seconds=299)
        return issued

    def test_a_renewal_that_came_in_after_the_sweeper_looked_wins(self, race, sweeping, issued):
        pause = race.stop(sweeper.grants, "any_due", after=True)
        sweep = race.start(sweeping.broker.sweeper.sweep)
        pause.until_reached(sweep)
        renewed = renew(race.one, issued)
        pause.go_on()
        assert sweep.result().grants_expired == 0
        assert race.state_of(issued) == "active"
        assert race.one.is_active(renewed)

    def test_a_renewal_on_its_way_is_waited_for(self, race, sweeping, issued):
        pause = race.stop(renewal, "renew_grant", after=True)
        renewed, swept = race.run_into(lambda: renew(race.one, issued), pause, sweeping.broker.sweeper.sweep)
        assert swept.answer.grants_expired == 0
        assert race.state_of(issued) == "active"
        assert race.one.is_active(renewed.answer)

    def test_a_renewal_that_comes_while_the_sweeper_expires_the_grant_is_too_late(self, race, sweeping, issued):
        """INV-23."""
        pause = race.stop(sweeper, "end_grants", after=True)
        swept, renewed = race.run_into(sweeping.broker.sweeper.sweep, pause, lambda: renew(race.one, issued))
        assert renewed.waited
        assert swept.answer.grants_expired == 1
        assert isinstance(renewed.refusal, Conflict)
        assert race.state_of(issued) == "expired"
