"""The explained decision: what it tells, of a yes and of a no, and what it says where it cannot tell."""

from dataclasses import replace
from datetime import timedelta

import pytest
import sqlalchemy as sa

from broker.domain.errors import NotFound, PolicyDenied
from broker.store.models import ConfigurationVersion, Grant
from tests.approvals import apply, approve, ask, asking, collect, deny
from tests.house import CRM, POLICIES


def explain(house, grant_id, *, by="summarizer"):
    return house.broker.explaining.explain(house.caller(by), grant_id)


def denied(house, task, **more):
    with pytest.raises(PolicyDenied) as refusal:
        house.issue(task, **more)
    return refusal.value.grant_id


def apply_policies(house, **policies):
    catalogue = house.broker.standing.now().catalogue
    return house.broker.administration.apply(replace(catalogue, policies={**POLICIES, **policies}), by="tests")


def test_a_yes_names_the_policy_its_file_the_ceiling_that_cut_and_every_other(house):
    issued = house.issue(house.open_task(deadline_s=500), ttl=None)
    found = explain(house, issued.grant.id)
    assert (found.outcome, found.ttl_s, found.ttl_decided_by) == ("allow", 300, "default")
    assert [(policy.id, policy.file, policy.effect) for policy in found.policies] == [
        ("crm-read", "crm.cedar", "permit")
    ]
    assert found.ceilings_s == {"default": 300, "resource": 900, "broker": 3600, "task": 500, "proof": 3600}
    assert found.in_words == (
        f"summarizer was allowed contacts:read on {CRM}, by configuration version 1",
        "policy 'crm-read' in crm.cedar permits it when { context.ttl_s <= 600 }",
        "it lives 300 s, which is the broker's default, as no time was asked for",
        "what would have cut it next: the end of the task 500 s; max_ttl_s of the resource 900 s; max_ttl_s of the "
        "broker 3600 s; the end of the workload token it was asked with 3600 s",
    )
    assert found.looked_at == ("context.ttl_s",)
    assert found.missing == ()


def test_the_policy_s_own_ceiling_is_among_them_and_the_facts_are_those_before_it(house):
    issued = house.issue(house.open_task(), scope="contacts:write", jkt="k" * 43, ttl=timedelta(seconds=200))
    found = explain(house, issued.grant.id)
    assert (found.ttl_s, found.ttl_decided_by, found.requested_s) == (60, "policy", 200)
    assert found.ceilings_s["policy"] == 60
    assert found.policies[0].max_ttl_s == 60
    assert found.facts["context"]["ttl_s"] == 200
    assert found.facts["context"]["sender_bound"] is True


def test_a_no_tells_the_reasons_on_record_and_what_would_be_allowed(house):
    grant_id = denied(house, house.open_task(), ttl=timedelta(seconds=900))
    found = explain(house, grant_id)
    assert found.outcome == "deny" and found.policies == ()
    assert found.would_be_allowed == ("it would be allowed with ttl_s = 600: ask for at most that",)
    assert found.in_words == (
        f"summarizer was denied contacts:read on {CRM}, by configuration version 1",
        f"policy 'crm-read' allows contacts:read on {CRM} only when {{ context.ttl_s <= 600 }}",
        "no policy forbids it: what no policy permits is denied",
        "it would be allowed with ttl_s = 600: ask for at most that",
    )


def test_a_forbid_is_named_with_its_file(house):
    apply_policies(
        house, **{"no.cedar": '@id("no-crm") forbid (principal, action, resource) when { context.risk == "low" };'}
    )
    found = explain(house, denied(house, house.open_task()))
    assert [(policy.id, policy.effect) for policy in found.policies] == [("no-crm", "forbid")]
    assert "policy 'no-crm' stands in no.cedar" in found.in_words


def test_the_decision_stays_explained_by_the_version_that_made_it(house):
    issued = house.issue(house.open_task())
    apply_policies(house, **{"crm.cedar": POLICIES["crm.cedar"].replace("<= 600", "<= 10")})
    found = explain(house, issued.grant.id)
    assert found.policy_version == 1
    assert found.policies[0].condition == "when { context.ttl_s <= 600 }"
    assert found.missing == ()


def test_a_renewal_is_explained_with_its_own_ceilings_and_time(house):
    issued = house.issue(house.open_task())
    house.clock.forward(seconds=100)
    house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=timedelta(seconds=30))
    found = explain(house, issued.grant.id)
    assert found.decided_at == house.clock()
    assert (found.requested_s, found.ttl_s, found.ttl_decided_by) == (30, 30, "request")
    assert found.ceilings_s["grant"] == 3500
    assert found.facts["task"]["age_s"] == 100


def test_the_facts_are_those_of_agent_task_and_resource_and_the_agent_s_words_stand_apart(house):
    issued = house.issue(house.open_task(labels={"team": "crm"}), intent="count them", claimed={"customer": 7})
    facts = explain(house, issued.grant.id).facts
    assert facts["agent"]["name"] == "summarizer" and facts["agent"]["owner"] == "crm-team"
    assert facts["resource"]["sensitivity"] == "internal"
    assert facts["task"]["purpose"] == "summarise the leads of May" and facts["task"]["labels"] == {"team": "crm"}
    assert facts["agents_words"] == {"intent": "count them", "claimed": {"customer": 7}, "break_glass": ""}
    assert facts["context"]["local"] == {"zone": "UTC", "hour": 12, "minute": 0, "weekday": 7}
    assert "count them" not in " ".join(explain(house, issued.grant.id).in_words)


@pytest.mark.parametrize("who", ["scribe", "crm-api", "other-pipeline"])
def test_who_may_not_see_the_grant_is_told_that_there_is_none(house, who):
    """INV-28."""
    issued = house.issue(house.open_task())
    with pytest.raises(NotFound) as hidden:
        explain(house, issued.grant.id, by=who)
    with pytest.raises(NotFound) as absent:
        explain(house, "grt_" + "0" * 26, by=who)
    assert hidden.value.detail.replace(issued.grant.id, "") == absent.value.detail.replace("grt_" + "0" * 26, "")


@pytest.mark.parametrize("who", ["summarizer", "pipeline", "ada", "audrey"])
def test_who_may_see_the_grant_may_see_why(house, who):
    assert explain(house, house.issue(house.open_task()).grant.id, by=who).outcome == "allow"


def test_a_grant_from_before_its_ceilings_were_kept_says_so(house):
    issued = house.issue(house.open_task())
    with house.broker.database.begin() as db:
        db.execute(sa.update(Grant).values(terms=None))
    found = explain(house, issued.grant.id)
    assert found.ceilings_s is None
    assert found.decided_at == issued.grant.created_at
    assert found.missing == ("it was decided before the broker kept its ceilings: they are not known",)


def test_facts_that_do_not_hash_to_the_request_are_not_passed_off_as_it(house):
    """INV-14."""
    issued = house.issue(house.open_task())
    with house.broker.database.begin() as db:
        db.execute(sa.update(Grant).values(request_sha256="0" * 64))
    assert explain(house, issued.grant.id).missing == (
        "the facts are not all that it was decided on: the hash of its request is another",
    )


def test_policies_that_cannot_be_read_any_more_leave_what_is_on_record(house):
    issued = house.issue(house.open_task())
    apply_policies(house, **{"more.cedar": '@id("more") permit (principal == Agent::"scribe", action, resource);'})
    table = ConfigurationVersion.__table__
    with house.broker.database.begin() as db:
        document = db.execute(sa.select(table.c.document).where(table.c.version == 1)).scalar_one()
        broken = {**document, "policies": {"crm.cedar": "permit("}}
        db.execute(sa.update(table).where(table.c.version == 1).values(document=broken))
    found = explain(house, issued.grant.id)
    assert found.outcome == "allow"
    assert found.policies[0].id == "crm-read" and found.policies[0].file is None
    assert found.facts["agent"]["owner"] == "crm-team"
    assert found.missing == ("this broker cannot read the policies it was decided by: what they say is not told",)


def test_policies_that_answer_otherwise_today_do_not_rewrite_the_record(house):
    grant_id = denied(house, house.open_task(), ttl=timedelta(seconds=900))
    table = ConfigurationVersion.__table__
    apply_policies(house, **{"more.cedar": '@id("more") permit (principal == Agent::"scribe", action, resource);'})
    with house.broker.database.begin() as db:
        document = db.execute(sa.select(table.c.document).where(table.c.version == 1)).scalar_one()
        lax = {"crm.cedar": POLICIES["crm.cedar"].replace("<= 600", "<= 6000")}
        db.execute(sa.update(table).where(table.c.version == 1).values(document={**document, "policies": lax}))
    found = explain(house, grant_id)
    assert found.outcome == "deny" and found.would_be_allowed == ()
    assert found.missing == ("asked today, the same policies answer otherwise: what is on record counts",)


def test_what_people_were_asked_is_told_with_what_they_said(house):
    apply(house, asking(house))
    task = house.open_task()

    def told(case):
        return explain(house, case.grant.id).in_words[0]

    waiting = ask(house, task)
    assert ", and people have to approve it, by" in told(waiting)
    approve(house, waiting)
    assert ", and people approved it, by" in told(waiting)
    collect(house, waiting)
    assert ", and people approved it, by" in told(waiting)
    refused = ask(house, task, scopes=frozenset({"contacts:write"}))
    deny(house, refused, reason="not today")
    assert ", and people had to approve it and did not: not today, by" in told(refused)
