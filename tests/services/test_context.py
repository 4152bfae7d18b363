"""What policies may look at, from where it comes to where it is kept: asked for, collected, renewed, decided again."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from broker.domain.errors import PolicyDenied
from broker.domain.identity import User
from broker.domain.policy import PolicySet
from broker.store import models
from tests.approvals import PEOPLE, apply, approve, ask, asking, collect
from tests.house import CRM

READ = 'action == Action::"contacts:read", resource == Resource::"https://crm.example/api"'


def configured(house, policies, **more):
    """The house with these policies, whose issuer of people says their groups."""
    found = asking(house, policies=policies, people=PEOPLE)
    issuers = tuple(
        replace(issuer, user_attributes={"groups": "groups"}) if issuer.users else issuer for issuer in found.issuers
    )
    apply(house, replace(found, issuers=issuers, **more))
    return house


def reads_where(condition):
    return f'@id("it") permit (principal, {READ}) when {{ {condition} }};'


def alice(house, *groups, **more):
    return User(
        name="people:alice",
        expires_at=house.clock() + timedelta(hours=1),
        attributes={"groups": groups} if groups else {},
        **more,
    )


FINANCE = (
    "context has user_attributes && context.user_attributes has groups && "
    'context.user_attributes.groups.contains("finance")'
)


def terms_of(house, issued):
    table = models.table_of(models.Grant)
    with house.broker.database.read() as db:
        return db.execute(sa.select(table.c.terms).where(table.c.id == issued.grant.id)).scalar_one()


def decided_again(house, policies, **more):
    """Apply other policies, or the same with another word, and have what is out decided again."""
    configured(house, f"{policies}\n// Again.", **more)
    return house.broker.redeciding.run()


# --- Of the user ---


def test_what_their_issuer_says_of_a_user_is_seen_and_kept(house):
    configured(house, reads_where(FINANCE))
    task = house.open_task()
    for user in (None, alice(house), alice(house, "hr")):
        with pytest.raises(PolicyDenied):
            house.issue(task, user=user)
    issued = house.issue(task, user=alice(house, "finance", "hr"))
    assert terms_of(house, issued)["user_attributes"] == {"groups": ["finance", "hr"]}
    assert decided_again(house, reads_where(FINANCE)).ended == 0
    assert house.is_active(issued)
    # No token of hers comes with a renewal, and what was known of her is.
    house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=timedelta(seconds=60))
    assert terms_of(house, issued)["user_attributes"] == {"groups": ["finance", "hr"]}
    assert decided_again(house, reads_where(FINANCE.replace("finance", "board"))).ended == 1


def test_a_task_for_a_user_knows_what_is_known_of_them(house):
    configured(house, reads_where(FINANCE))
    task = house.open_task(user=alice(house, "finance"))
    issued = house.issue(task)
    assert terms_of(house, issued)["user_attributes"] == {"groups": ["finance"]}
    part = house.open_task(parent_task_id=task.id, deadline_s=600)
    assert house.is_active(house.issue(part))
    # A fresh token of hers says how it is now.
    with pytest.raises(PolicyDenied):
        house.issue(task, user=alice(house, "hr"))


def test_what_is_handed_down_keeps_them(house):
    configured(house, reads_where(FINANCE))
    task = house.open_task("summarizer", "scribe")
    above = house.issue(task, user=alice(house, "finance"))
    below = house.issue(None, by="scribe", parent_grant_id=above.grant.id, parent_by_token=True)
    assert terms_of(house, below)["user_attributes"] == {"groups": ["finance"]}
    assert decided_again(house, reads_where(FINANCE)).ended == 0


def test_they_are_kept_while_people_decide(house):
    asks = f'@id("it") @approval("security") permit (principal, {READ}) when {{ {FINANCE} }};'
    configured(house, asks)
    case = ask(house, house.open_task(), scopes=frozenset({"contacts:read"}), user=alice(house, "finance"))
    approve(house, case)
    assert house.is_active(collect(house, case))


def test_two_users_who_differ_in_them_share_no_decision(house):
    configured(house, reads_where("context.ttl_s > 0"))
    task = house.open_task()
    of_finance, of_hr = (house.issue(task, user=alice(house, group)) for group in ("finance", "hr"))
    configured(house, reads_where(FINANCE))
    house.broker.redeciding.run()
    assert (house.is_active(of_finance), house.is_active(of_hr)) == (True, False)


# --- Who approved ---

BOARD = """
@id("asks")
@approval("security") @quorum("2")
permit (principal, action == Action::"contacts:write", resource);
@id("not-without-sue")
forbid (principal, action == Action::"contacts:write", resource)
when { context.approvals.count > 0 && !context.approvals.by.contains("sue") };
"""
WRITE = frozenset({"contacts:write"})


def test_who_approved_is_seen_when_it_is_collected(house):
    configured(house, BOARD)
    task = house.open_task()
    case = ask(house, task, scopes=WRITE)
    for by in ("sam", "sid"):
        approve(house, case, by=by)
    with pytest.raises(PolicyDenied, match="not-without-sue"):
        collect(house, case)
    other = ask(house, house.open_task(), scopes=WRITE)
    for by in ("sam", "sue"):
        approve(house, other, by=by)
    issued = collect(house, other)
    assert terms_of(house, issued)["approved"] == {"by": ["sam", "sue"], "groups": ["security"]}
    assert "approved" not in terms_of(house, case)
    assert decided_again(house, BOARD).ended == 0
    assert house.is_active(issued)
    assert decided_again(house, BOARD.replace('contains("sue")', 'contains("sid")')).ended == 1


def test_a_renewal_remembers_who_approved(house):
    with_sam = f"""{BOARD}
@id("sam-is-enough")
permit (principal, action == Action::"contacts:write", resource) when {{ context.approvals.by.contains("sam") }};
"""
    configured(house, with_sam)
    case = ask(house, house.open_task(), scopes=WRITE)
    for by in ("sam", "sue"):
        approve(house, case, by=by)
    issued = collect(house, case)
    renewed = house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=timedelta(seconds=9))
    assert renewed.grant.decision["policies"] == ["sam-is-enough"]
    assert terms_of(house, renewed)["approved"]["by"] == ["sam", "sue"]


def test_only_votes_that_count_are_seen(house):
    """INV-15: who left the group meanwhile has approved nothing."""
    one_of = BOARD.replace('@quorum("2")', '@quorum("1")')
    configured(house, BOARD)
    case = ask(house, house.open_task(), scopes=WRITE)
    for by in ("sam", "sue"):
        approve(house, case, by=by)
    left = tuple(rule for rule in PEOPLE if rule.name != "sue")
    apply(house, asking(house, policies=one_of, people=left))
    with pytest.raises(PolicyDenied, match="not-without-sue"):
        collect(house, case)


# --- When, where to, and by whom ---


def test_the_hour_of_the_zone_decides_and_a_live_grant_keeps_its_moment(house):
    hours = reads_where("context.local.hour >= 13 && context.local.hour < 17")
    configured(house, hours, time_zone="Europe/Berlin")
    house.clock.at = datetime(2026, 3, 2, 11, 59, tzinfo=UTC)
    task = house.open_task(deadline_s=36_000)
    with pytest.raises(PolicyDenied):
        house.issue(task)
    house.clock.forward(seconds=60)
    issued = house.issue(task, ttl=timedelta(seconds=900))
    house.clock.at = datetime(2026, 3, 2, 12, 5, tzinfo=UTC)
    assert decided_again(house, hours, time_zone="Europe/Berlin").ended == 0
    assert house.is_active(issued)
    # Another zone is another configuration, and the moment is what it was.
    assert decided_again(house, hours, time_zone="Asia/Tokyo").ended == 1


def test_where_a_resource_leads_is_the_configurations_word(house):
    found = asking(house)
    [crm] = [resource for resource in found.resources if resource.identifier == CRM]

    def leading(region):
        there = replace(crm, destination={"region": region})
        return tuple(there if resource.identifier == CRM else resource for resource in found.resources)

    eu = reads_where('resource has destination && resource.destination.region == "eu"')
    configured(house, eu, resources=leading("eu"))
    issued = house.issue(house.open_task())
    configured(house, eu, resources=leading("us"))
    house.broker.redeciding.run()
    assert not house.is_active(issued)
    with pytest.raises(PolicyDenied):
        house.issue(house.open_task())


def test_who_handed_it_down_is_seen_and_told_apart_when_decided_again(house):
    by_summarizer = reads_where(
        'context.delegation_chain.contains("summarizer") || context.delegation_root == "summarizer"'
    )
    configured(house, by_summarizer)
    task = house.open_task("summarizer", "scribe")
    above = house.issue(task)
    below = house.issue(None, by="scribe", parent_grant_id=above.grant.id, parent_by_token=True)
    with pytest.raises(PolicyDenied):
        house.issue(task, by="scribe")
    assert decided_again(house, by_summarizer).ended == 0
    assert house.is_active(below)
    house.broker.renewal.renew(house.caller("scribe"), below.grant.id, ttl=timedelta(seconds=30))
    facts = house.broker.explaining.explain(house.caller("ada"), below.grant.id).facts["context"]
    assert facts["delegation_chain"] == ["summarizer"]
    decided_again(house, reads_where("context.delegation_chain.isEmpty()"))
    assert (house.is_active(above), house.is_active(below)) == (True, False)


def test_two_that_differ_in_the_chain_alone_share_no_decision(house):
    configured(house, reads_where("context.ttl_s > 0"))
    task = house.open_task("summarizer", "scribe")
    above = house.issue(task)
    own = house.issue(task, by="scribe")
    handed = house.issue(None, by="scribe", parent_grant_id=above.grant.id, parent_by_token=True)
    configured(house, reads_where("context.delegation_chain.isEmpty()"))
    house.broker.redeciding.run()
    assert (house.is_active(own), house.is_active(handed)) == (True, False)


def test_no_claim_of_the_caller_is_a_fact(house):
    configured(house, reads_where(f"({FINANCE}) || context.approvals.count > 0 || context.break_glass"))
    claimed = {"user_attributes": {"groups": ["finance"]}, "approvals": {"count": 9}, "break_glass": True}
    with pytest.raises(PolicyDenied):
        house.issue(house.open_task(), claimed=claimed, user=alice(house))


def test_a_grant_from_before_these_were_kept_is_decided_by_what_is_known(house):
    configured(house, reads_where("context.ttl_s > 0"))
    issued = house.issue(house.open_task(), user=alice(house, "finance"))
    table = models.table_of(models.Grant)
    with house.broker.database.begin() as db:
        db.execute(sa.update(table).values(terms=None))
    # What is not known is not there: unknown is never yes.
    assert decided_again(house, reads_where(FINANCE)).ended == 1
    assert not house.is_active(issued)


def test_a_replay_asks_with_the_same_facts(house):
    configured(house, reads_where(FINANCE))
    task = house.open_task()
    house.issue(task, user=alice(house, "finance"))
    with pytest.raises(PolicyDenied):
        house.issue(task, user=alice(house, "hr"))
    catalogue = house.broker.standing.now().catalogue
    draft = replace(catalogue, policies={"draft.cedar": reads_where(FINANCE.replace("finance", "hr"))})
    found = house.broker.replaying.replayed(draft, PolicySet.compile(draft), period=timedelta(hours=1), at_most=10)
    assert (found.newly_allowed, found.newly_denied) == (1, 1)


def test_a_configuration_without_any_of_it_is_the_document_it_always_was(sqlite_house):
    document = sqlite_house.broker.standing.now().catalogue.as_document()
    text = json.dumps(document)
    for name in ("time_zone", "destination", "user_attributes"):
        assert f'"{name}"' not in text
