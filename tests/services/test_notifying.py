"""The outbox of notices: owed with the approval, sent at least once, and to those who are asked."""

import json

import pytest

from broker.domain.approval import Route
from broker.domain.errors import ProviderUnavailable
from broker.services.notifying import Notifying, notice_of
from tests.approvals import apply, approve, ask, asking, deny
from tests.house import ISSUER


class Told:
    """A channel that a test listens to."""

    def __init__(self):
        self.notices, self.down, self.asked = [], False, 0

    def send(self, notice):
        self.asked += 1
        if self.down:
            raise ProviderUnavailable("a notice was not delivered", reason="503")
        self.notices.append(notice)


@pytest.fixture
def house(house):
    apply(house, asking(house))
    house.broker.issuance._routes = (
        Route(channel="everybody"),
        Route(channel="security", groups=frozenset({"security"})),
        Route(channel="databases", groups=frozenset({"databases"})),
    )
    return house


@pytest.fixture
def told():
    return {"everybody": Told(), "security": Told(), "databases": Told()}


def notifying(house, channels):
    broker = house.broker
    return Notifying(
        database=broker.database, standing=broker.standing, channels=channels, issuer=ISSUER, clock=house.clock
    )


def test_those_who_are_asked_are_told_once(house, told):
    case = ask(house, house.open_task())
    assert notifying(house, told).send_due() == 2
    assert [notice.id for notice in told["security"].notices] == [case.approval.id]
    assert told["databases"].notices == []
    house.clock.forward(seconds=600)
    assert notifying(house, told).send_due() == 0


def test_nothing_is_owed_where_nothing_was_committed(house, told):
    task = house.open_task()
    ask(house, task)
    ask(house, task)  # joins
    assert notifying(house, told).send_due() == 2


def test_what_was_not_taken_is_sent_again_later(house, told):
    told["security"].down = True
    case = ask(house, house.open_task())
    assert notifying(house, told).send_due() == 1
    assert notifying(house, told).send_due() == 0
    told["security"].down = False
    house.clock.forward(seconds=61)
    assert notifying(house, told).send_due() == 1
    assert [notice.id for notice in told["security"].notices] == [case.approval.id]


def test_a_channel_that_is_down_is_asked_once_a_pass_and_delays_nobody(house, told):
    told["everybody"].down = True
    for _ in range(3):
        ask(house, house.open_task())
    notifying(house, told).send_due()
    assert told["everybody"].asked == 1
    assert len(told["security"].notices) == 3


def test_of_what_is_decided_nobody_is_told_any_more(house, told):
    approved, denied, late = (ask(house, house.open_task()) for _ in range(3))
    approve(house, approved)
    deny(house, denied)
    house.clock.forward(seconds=3600)
    assert late.approval.expires_at <= house.clock()
    notifying(house, told).send_due()
    assert told["security"].notices == []
    told["security"].down = True
    assert notifying(house, told).send_due() == 0


def test_a_broker_sends_by_the_channels_it_knows_and_leaves_the_others(house, told):
    ask(house, house.open_task())
    assert notifying(house, {"everybody": told["everybody"]}).send_due() == 1
    assert notifying(house, {}).send_due() == 0
    assert notifying(house, told).send_due() == 1
    assert len(told["everybody"].notices) == len(told["security"].notices) == 1


def test_a_notice_links_to_the_approval_and_says_what_is_dangerous_first(house):
    case = ask(house, house.open_task(), intent="tidy up", claimed={"customer": 7})
    notice = notice_of(case, ISSUER)
    assert notice.link == f"{ISSUER}/v1/approvals/{case.approval.id}"
    assert list(notice.facts)[:4] == ["resource", "sensitivity", "scopes", "ttl"]
    assert notice.words == {
        "the agent says": "tidy up",
        "the task says": "summarise the leads of May",
        "claims customer": "7",
    }
    ours = json.dumps([notice.summary, dict(notice.facts)])
    assert "tidy" not in ours and "leads" not in ours


def test_what_one_sender_has_claimed_another_does_not_send(house, told):
    ask(house, house.open_task())
    other = notifying(house, told)
    sent_by_other = []
    told["everybody"].send = lambda _notice: sent_by_other.append(other.send_due())
    assert notifying(house, told).send_due() == 2
    assert sent_by_other == [0]
