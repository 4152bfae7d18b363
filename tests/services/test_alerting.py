"""Whoever must hear of it hears of it: the event and the obligation to tell are one commit."""

import pytest

from broker.domain.errors import ProviderUnavailable
from broker.services.alerting import Alerting
from tests.fakes.outside import house_on_outside
from tests.services.test_secrets import ask


class Told:
    def __init__(self):
        self.down, self.alerts = False, []

    def send(self, alert):
        if self.down:
            raise ProviderUnavailable("the alert was not taken by the webhook", reason="503")
        self.alerts.append(alert)


@pytest.fixture
def house(store_url, tmp_path):
    with house_on_outside(store_url, tmp_path) as made:
        yield made


def alerting(house, told):
    return Alerting(database=house.broker.database, alerts=told, clock=house.clock)


def stick(house):
    issued = ask(house)
    house.outside.down = True
    house.broker.revocation.revoke_grant(house.caller("ada"), issued.grant.id)
    house.pay(times=5)
    return issued


def test_a_stuck_lease_is_told_once(house):
    told = Told()
    issued = stick(house)
    assert alerting(house, told).send_due() == 1
    assert alerting(house, told).send_due() == 0
    (alert,) = told.alerts
    assert (alert.kind, alert.data["grant_id"], alert.data["attempts"]) == ("lease.stuck", issued.grant.id, 6)


def test_what_was_not_taken_is_told_again_with_the_same_id(house):
    told = Told()
    told.down = True
    stick(house)
    sender = alerting(house, told)
    assert sender.send_due() == 0
    told.down = False
    assert sender.send_due() == 0, "not before its time"
    house.clock.forward(seconds=61)
    assert sender.send_due() == 1
    house.clock.forward(seconds=61)
    assert sender.send_due() == 0 and len(told.alerts) == 1


def test_a_teller_that_was_killed_has_it_told_by_another(house):
    class Killed(Told):
        def send(self, alert):
            raise SystemExit

    stick(house)
    with pytest.raises(SystemExit):
        alerting(house, Killed()).send_due()
    told = Told()
    house.clock.forward(seconds=31)
    assert alerting(house, told).send_due() == 1


def test_what_nobody_needs_to_hear_of_is_not_told(house):
    ask(house)
    told = Told()
    assert alerting(house, told).send_due() == 0 and told.alerts == []


def test_what_nobody_owned_is_told(house):
    house.outside.alive["database/creds/jit/stray"] = "unknown"
    house.broker.reconciliation.look("vault")
    told = Told()
    assert alerting(house, told).send_due() == 1
    assert told.alerts[0].kind == "lease.found"
