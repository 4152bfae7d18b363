"""A draft over what was asked before: what would differ is counted and shown, and nothing is done."""

from datetime import timedelta

import pytest
import sqlalchemy as sa

from broker.domain.errors import Conflict, Invalid, PolicyDenied, RoleMissing, Unavailable
from broker.domain.policy import DENY, Decision, PolicySet
from broker.services.drafts import Draft
from broker.store.models import AuditEvent, ConfigurationVersion, Grant
from tests.house import POLICIES

DAY = timedelta(days=1)
FORBID = '@id("no-crm") forbid (principal == Agent::"summarizer", action, resource);'


def replay(house, *, by="audrey", period=DAY, at_most=1000, **policies):
    draft = Draft(policies={**POLICIES, **{name.replace("_", "."): text for name, text in policies.items()}})
    return house.broker.replaying.replay(house.caller(by), draft, period=period, at_most=at_most)


@pytest.fixture
def asked(house):
    """Two that were allowed and one that was denied, by two agents."""
    allowed = house.issue(house.open_task())
    house.issue(house.open_task("scribe"), by="scribe")
    with pytest.raises(PolicyDenied):
        house.issue(house.open_task(), ttl=timedelta(seconds=900))
    return allowed


def rows(house):
    with house.broker.database.read() as db:
        counted = [db.execute(sa.select(sa.func.count()).select_from(t)).scalar_one() for t in (Grant, AuditEvent)]
        return counted, db.execute(sa.select(sa.func.max(ConfigurationVersion.version))).scalar_one()


def test_the_policies_in_force_differ_in_nothing_from_what_they_said(house, asked):
    found = replay(house)
    assert (found.requests, found.same, found.complete) == (3, 3, True)
    assert (found.newly_allowed, found.newly_denied, found.newly_asking, found.shortened) == (0, 0, 0, 0)
    assert found.samples == [] and found.by_agent == {} and found.by_policy == {}
    assert (found.live.looked_at, found.live.ended) == (2, 0)


def test_what_would_be_denied_is_counted_by_agent_and_by_policy_and_shown(house, asked):
    before = rows(house)
    found = replay(house, no_cedar=FORBID)
    assert (found.newly_denied, found.same) == (1, 2)
    assert found.by_agent == {"summarizer": 1} and found.by_policy == {"no-crm": 1}
    [sample] = found.samples
    assert (sample.grant_id, sample.recorded, sample.draft) == (asked.grant.id, "allow", "deny")
    assert sample.why == "policy 'no-crm' forbids it"
    assert (found.live.ended, found.live.by_policy) == (1, {"no-crm": 1})
    assert rows(house) == before
    assert house.is_active(asked)


def test_what_would_be_allowed_is_counted_too(house, asked):
    found = replay(house, crm_cedar=POLICIES["crm.cedar"].replace("<= 600", "<= 900"))
    assert (found.newly_allowed, found.same) == (1, 2)
    assert found.by_policy == {"crm-read": 1}
    assert (found.samples[0].recorded, found.samples[0].draft) == ("deny", "allow")


def test_what_would_live_shorter_is_told_by_how_much(house, asked):
    found = replay(house, crm_cedar=POLICIES["crm.cedar"].replace('@id("crm-read")', '@id("crm-read") @max_ttl("30")'))
    assert (found.shortened, found.same) == (1, 2)
    assert (found.samples[0].recorded, found.samples[0].draft) == ("300 s", "30 s")
    assert found.live.shortened == 1


def test_what_people_would_be_asked_about_is_counted_apart(house, asked):
    asking = POLICIES["crm.cedar"].replace('@id("crm-read")', '@id("crm-read") @approval("board")')
    assert replay(house, crm_cedar=asking).newly_asking == 1


def test_only_the_period_is_looked_at_and_only_so_many_the_newest_first(house, asked):
    house.clock.forward(seconds=3600)
    late = house.issue(house.open_task())
    found = replay(house, period=timedelta(seconds=60), no_cedar=FORBID)
    assert (found.requests, [sample.grant_id for sample in found.samples]) == (1, [late.grant.id])
    found = replay(house, at_most=1, no_cedar=FORBID)
    assert (found.requests, found.complete, [each.grant_id for each in found.samples]) == (1, False, [late.grant.id])
    assert replay(house).requests == 4


def test_ended_grants_are_requests_that_were_made(house, asked):
    house.broker.revocation.revoke_grant(house.caller("ada"), asked.grant.id)
    found = replay(house, no_cedar=FORBID)
    assert (found.requests, found.newly_denied, found.live.looked_at) == (3, 1, 1)


def test_an_engine_that_fails_is_neither_a_yes_nor_a_no(house, asked, monkeypatch):
    def decide(self, request):
        return Decision(outcome=DENY, policies=(), policy_version=self.version, failure="the engine broke")

    monkeypatch.setattr(PolicySet, "decide", decide)
    found = replay(house)
    assert (found.undecided, found.newly_denied, found.same) == (3, 0, 0)


def test_one_draft_at_a_time(house, monkeypatch):
    """INV-27: it takes a core for seconds."""
    refused = []

    def another(*_, **__):
        with pytest.raises(Unavailable) as busy:
            replay(house)
        refused.append(busy.value.detail)

    monkeypatch.setattr(house.broker.replaying, "replayed", another)
    replay(house)
    assert refused == ["a draft is being replayed already: try again when that is done"]


@pytest.mark.parametrize("who", ["summarizer", "pipeline", "crm-api"])
def test_drafts_are_for_admins_and_auditors_and_others_are_on_record(house, who):
    with pytest.raises(RoleMissing):
        replay(house, by=who)
    [event] = house.broker.audit_trail.page(house.caller("audrey"), {"type": "policies.refused"}, before=None, limit=10)
    assert (event.actor, event.outcome, event.data["verb"]) == (who, "role_missing", "replay")


BAD = [
    ({"x.cedar": "permit ("}, "x.cedar: not Cedar"),
    ({"x.cedar": "permit (principal, action, resource);"}, "has no @id"),
    ({"x.cedar": '@id("x") permit (principal == Agent::"nobody", action, resource);'}, "there is no agent 'nobody'"),
    ({"x.cedar": '@id("x") permit (principal, action, resource) when { context.ttl == 1 };'}, "policy 'x'"),
    ({"x.cedar": '@id("x") permit (principal, action, resource);'}, "permits everything to everybody"),
    ({"x.cedar": '@id("x") permit (principal, action, resource) when { true };'}, "permits everything to everybody"),
    ({"x.cedar": '@id("x") permit (principal is Agent, action, resource) unless { false };'}, "permits everything"),
    ({"x.cedar": ""}, "there is no policy"),
    ({"x.cedar": "// nothing yet"}, "there is no policy"),
]


@pytest.mark.parametrize(("policies", "said"), BAD)
def test_a_draft_that_cannot_come_into_force_is_refused_with_what_is_wrong(house, policies, said):
    draft = Draft(policies=policies)
    verbs = (
        lambda: house.broker.replaying.replay(house.caller("ada"), draft, period=DAY, at_most=10),
        lambda: house.broker.administration.foresee(house.caller("ada"), draft),
        lambda: house.broker.administration.replace_policies(house.caller("ada"), draft),
    )
    for verb in verbs:
        with pytest.raises(Invalid) as refusal:
            verb()
        assert said in refusal.value.detail and refusal.value.member == "policies"
    assert house.broker.standing.now().catalogue.version == 1
    assert house.issue(house.open_task()).grant.policy_version == 1


def test_a_schema_that_cannot_be_read_is_refused(house):
    with pytest.raises(Invalid, match="schema"):
        house.broker.replaying.replay(
            house.caller("ada"), Draft(policies=POLICIES, schema="type Context = {"), period=DAY, at_most=10
        )


# --- Putting policies in force ---------------------------------------------------------------------------------------


def test_policies_that_are_put_in_force_are_a_version_and_live_grants_are_decided_again(house, asked):
    version = house.broker.administration.replace_policies(
        house.caller("ada"), Draft(policies={**POLICIES, "no.cedar": FORBID})
    )
    assert version == 2
    standing = house.broker.standing.now().catalogue
    assert (standing.version, set(standing.policies)) == (2, {"crm.cedar", "no.cedar"})
    assert standing.principals == house.broker.settings.catalogue.principals
    assert house.broker.redeciding.run().ended == 1
    assert not house.is_active(asked)


def test_the_same_policies_again_are_the_same_version(house):
    assert house.broker.administration.replace_policies(house.caller("ada"), Draft(policies=POLICIES)) == 1


def test_policies_that_were_replaced_do_not_come_back_by_mistake(house):
    house.broker.administration.replace_policies(house.caller("ada"), Draft(policies={**POLICIES, "no.cedar": FORBID}))
    with pytest.raises(Conflict, match="allow-older"):
        house.broker.administration.replace_policies(house.caller("ada"), Draft(policies=POLICIES))


def test_what_was_applied_meanwhile_is_not_undone(house, second_house, monkeypatch):
    """Its principals and resources would be those of the version that was looked at."""
    ensure = house.broker.keys.ensure

    def meanwhile(algorithms):
        ensure(algorithms)
        monkeypatch.setattr(house.broker.keys, "ensure", ensure)
        second_house.broker.administration.replace_policies(
            second_house.caller("ada"), Draft(policies={**POLICIES, "no.cedar": FORBID})
        )

    monkeypatch.setattr(house.broker.keys, "ensure", meanwhile)
    other = Draft(policies={"crm.cedar": POLICIES["crm.cedar"].replace("600", "500")})
    with pytest.raises(Conflict, match="version 2 was applied meanwhile"):
        house.broker.administration.replace_policies(house.caller("ada"), other)
    assert "no.cedar" in house.broker.standing.now().catalogue.policies


@pytest.mark.parametrize("who", ["audrey", "summarizer"])
def test_putting_policies_in_force_is_for_admins(house, who):
    for verb in (house.broker.administration.replace_policies, house.broker.administration.foresee):
        with pytest.raises(RoleMissing):
            verb(house.caller(who), Draft(policies=POLICIES))


def test_policies_that_ask_people_about_everything_are_no_mistake(house):
    asking = '@id("ask") @approval("board") permit (principal, action, resource);'
    assert house.broker.administration.replace_policies(house.caller("ada"), Draft(policies={"a.cedar": asking})) == 2
