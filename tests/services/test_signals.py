"""Signals of risk: policies see them, what is out is decided again at once, and they are over by themselves."""

from dataclasses import replace
from datetime import timedelta

import pytest
import sqlalchemy as sa

from broker.domain.errors import Conflict, IdempotencyConflict, Invalid, PolicyDenied, RoleMissing
from broker.domain.grant import IdempotencyClaim
from broker.domain.risk import LEVELS, Risks, Signal
from broker.store.models import Grant, Redecision
from tests.conftest import NOW
from tests.house import CRM, POLICIES

RISK = """
@id("not-at-risk") forbid (principal, action, resource)
when { context.risk == "high" || context.risk == "critical" };
"""
KEY = IdempotencyClaim(key_sha256="a" * 64, request_sha256="b" * 64)


@pytest.fixture
def watched(house):
    """A house whose policies know what a risk means."""
    catalogue = house.broker.standing.now().catalogue
    house.broker.administration.apply(replace(catalogue, policies={**POLICIES, "risk.cedar": RISK}), by="tests")
    house.broker.redeciding.run()
    return house


def send(house, value="summarizer", *, axis="agent", level="high", by="ada", expires_s=600, **more):
    said = {"level": level, "reason": "unusual volume", "source": "detector", **more}
    return house.broker.signals.send(house.caller(by), axis, value, expires_in=timedelta(seconds=expires_s), **said)


def events(house, type_):
    return house.broker.audit_trail.page(house.caller("audrey"), {"type": type_}, before=None, limit=100)


def test_what_an_agent_at_risk_holds_ends_at_once_and_nobody_else_s(watched):
    issued = watched.issue(watched.open_task())
    other = watched.issue(watched.open_task("scribe"), by="scribe")
    send(watched)
    assert not watched.is_active(issued)
    assert watched.is_active(other)
    grant = watched.broker.verification.find_grant(watched.caller("ada"), issued.grant.id)[0]
    assert grant.reason == "risk of agent summarizer is high: policy 'not-at-risk' forbids it"
    [sent] = events(watched, "signal.sent")
    assert (sent.actor, sent.agent, sent.reason) == ("ada", "summarizer", "unusual volume")
    assert (sent.data["level"], sent.data["source"]) == ("high", "detector")


def test_an_agent_at_risk_gets_nothing_and_is_told_which_policy_said_so(watched):
    send(watched)
    with pytest.raises(PolicyDenied, match="not-at-risk") as refusal:
        watched.issue(watched.open_task())
    found = watched.broker.explaining.explain(watched.caller("ada"), refusal.value.grant_id)
    assert found.facts["context"]["risk"] == "high" and found.missing == ()


def test_a_grant_is_not_renewed_at_risk(watched):
    catalogue = watched.broker.standing.now().catalogue
    issued = watched.issue(watched.open_task())
    watched.broker.redeciding.run = lambda: None  # as if the run had not come to it yet
    send(watched)
    assert catalogue.version == watched.broker.standing.now().catalogue.version
    with pytest.raises(PolicyDenied, match="not-at-risk"):
        watched.broker.renewal.renew(watched.caller("summarizer"), issued.grant.id, ttl=None)


def test_a_signal_is_over_by_itself(watched):
    send(watched, expires_s=60)
    watched.clock.forward(seconds=59)
    with pytest.raises(PolicyDenied):
        watched.issue(watched.open_task())
    watched.clock.forward(seconds=1)
    assert watched.is_active(watched.issue(watched.open_task()))


def test_the_highest_that_is_not_over_counts_and_a_lower_one_takes_nothing_back(watched):
    send(watched, level="critical", expires_s=60)
    send(watched, level="low")
    send(watched, level="medium")
    with pytest.raises(PolicyDenied):
        watched.issue(watched.open_task())
    watched.clock.forward(seconds=60)
    assert watched.is_active(watched.issue(watched.open_task()))


def test_a_risk_that_no_policy_minds_ends_nothing(watched):
    issued = watched.issue(watched.open_task())
    send(watched, level="medium")
    assert watched.is_active(issued)
    assert events(watched, "redecision.finished")[0].data["ended"] == 0


def test_a_user_s_risk_is_that_of_every_agent_that_acts_for_them(watched):
    issued = watched.issue(watched.open_task())
    mine = watched.issue(watched.open_task())
    with watched.broker.database.begin() as db:
        db.execute(sa.update(Grant).where(Grant.id == issued.grant.id).values(on_behalf_of="alice"))
    send(watched, "alice", axis="user")
    assert not watched.is_active(issued)
    assert watched.is_active(mine)


@pytest.mark.parametrize(
    ("said", "agent", "user", "level"),
    [
        ([], "a", None, "low"),
        ([("agent", "a", "medium")], "a", None, "medium"),
        ([("agent", "b", "high")], "a", None, "low"),
        ([("user", "a", "high")], "a", None, "low"),
        ([("agent", "a", "medium"), ("user", "u", "critical")], "a", "u", "critical"),
        ([("agent", "a", "high"), ("user", "u", "low")], "a", "u", "high"),
    ],
)
def test_what_is_said_comes_to_one_level(said, agent, user, level):
    def signal(axis, value, how_bad):
        rest = {"reason": "r", "source": "s", "sent_at": NOW, "sent_by": "ada"}
        return Signal(id="", axis=axis, value=value, level=how_bad, expires_at=NOW + timedelta(seconds=1), **rest)

    risks = Risks(signal(*each) for each in said)
    assert risks.level(agent, user, NOW) == level
    assert risks.level(agent, user, NOW + timedelta(seconds=1)) == "low"
    assert level in LEVELS


@pytest.mark.parametrize("who", ["summarizer", "pipeline", "crm-api", "audrey"])
def test_a_signal_from_somebody_without_the_role_is_refused_and_on_record(watched, who):
    issued = watched.issue(watched.open_task())
    with pytest.raises(RoleMissing, match="neither admin nor sentinel"):
        send(watched, by=who)
    [event] = events(watched, "signal.refused")
    assert (event.actor, event.outcome, event.data["verb"]) == (who, "role_missing", "send")
    assert watched.is_active(issued)
    assert not events(watched, "signal.sent")


def test_a_sentinel_may_send_signals_and_nothing_else(watched):
    catalogue = watched.broker.standing.now().catalogue
    rules = tuple(
        replace(rule, roles=("sentinel",)) if rule.name == "crm-api" else rule for rule in catalogue.principals
    )
    plain = tuple(replace(each, verifiers=()) for each in catalogue.resources)
    watched.broker.administration.apply(replace(catalogue, principals=rules, resources=plain), by="tests")
    assert send(watched, by="crm-api").sent_by == "crm-api"
    assert len(watched.broker.signals.page(watched.caller("crm-api"), standing_only=True)) == 1
    with pytest.raises(RoleMissing):
        watched.broker.revocation.revoke_along(watched.caller("crm-api"), "agent", "summarizer", reason="x")


def test_the_same_key_sends_one_signal(watched):
    first, again = (send(watched, idempotency=KEY) for _ in range(2))
    assert again == first
    with pytest.raises(IdempotencyConflict):
        send(watched, idempotency=replace(KEY, request_sha256="c" * 64))
    assert len(events(watched, "signal.sent")) == 1
    with watched.broker.database.read() as db:
        of_signals = sa.select(sa.func.count()).select_from(Redecision).where(Redecision.agent.is_not(None))
        assert db.execute(of_signals).scalar_one() == 1


def test_a_key_that_stands_for_something_else_is_no_signal(watched):
    watched.issue(watched.open_task(by="pipeline", idempotency=KEY))
    catalogue = watched.broker.standing.now().catalogue
    rules = tuple(
        replace(rule, roles=(*rule.roles, "admin")) if rule.name == "pipeline" else rule
        for rule in catalogue.principals
    )
    watched.broker.administration.apply(replace(catalogue, principals=rules), by="tests")
    with pytest.raises(Conflict, match="something else"):
        send(watched, by="pipeline", idempotency=KEY)


def test_an_agent_that_nobody_configured_cannot_be_at_risk(watched):
    """A typo would be a signal that reaches nobody, and look like one that did."""
    with pytest.raises(Invalid, match="no principal is called 'summariser'"):
        send(watched, "summariser")


def test_signals_are_listed_newest_first_and_those_that_are_over_on_request(watched):
    old, new = send(watched, expires_s=10), send(watched, "scribe", level="low", expires_s=60)
    watched.clock.forward(seconds=10)
    page = watched.broker.signals.page
    assert [each.id for each in page(watched.caller("audrey"), standing_only=True)] == [new.id]
    assert [each.id for each in page(watched.caller("ada"), standing_only=False)] == [new.id, old.id]
    assert [each.id for each in page(watched.caller("ada"), standing_only=False, before=new.id)] == [old.id]
    with pytest.raises(RoleMissing):
        page(watched.caller("summarizer"), standing_only=True)


def test_a_signal_that_is_durable_is_no_failure_and_what_is_out_ends_in_the_background(watched, monkeypatch):
    issued = watched.issue(watched.open_task())

    def breaks():
        raise RuntimeError("the store went away")

    with monkeypatch.context() as patched:
        patched.setattr(watched.broker.redeciding, "run", breaks)
        assert send(watched).level == "high"
    assert watched.is_active(issued)
    watched.broker.redeciding.run()
    assert not watched.is_active(issued)


def test_what_a_draft_would_end_is_shown_at_the_risk_of_now(watched):
    catalogue = watched.broker.standing.now().catalogue
    watched.issue(watched.open_task())
    send(watched, level="medium")
    stricter = RISK.replace('"high" ||', '"high" || context.risk == "medium" ||')
    seen = watched.broker.redeciding.foresee(replace(catalogue, policies={**POLICIES, "risk.cedar": stricter}))
    assert (seen.ended, seen.by_policy) == (1, {"not-at-risk": 1})
    assert CRM
