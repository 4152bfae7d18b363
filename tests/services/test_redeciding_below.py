"""Live grants decided again, with what was handed down from them and with what waits for people."""

from dataclasses import replace
from datetime import timedelta

import pytest

from tests.approvals import apply as apply_asking
from tests.approvals import approve, ask, asking, collect, states
from tests.house import POLICIES
from tests.services.test_delegation import AGENTS, chain_of, state_of, with_everybody
from tests.services.test_redeciding import apply, grant_of, resources


@pytest.fixture
def chain(house):
    with_everybody(house)
    house.broker.redeciding.run()
    return chain_of(house, house.open_task(*AGENTS), *AGENTS[:3])


def test_what_was_handed_down_ends_with_what_a_new_version_forbids(house, chain):
    """INV-11, though the sub-agents are allowed what they have."""
    policies = house.broker.standing.now().catalogue.policies
    no = '@id("no") forbid (principal == Agent::"summarizer", action, resource);'
    apply(house, policies={**policies, "no.cedar": no})
    done = house.broker.redeciding.run()
    assert done.ended == 3
    assert {str(state_of(house, issued)) for issued in chain} == {"revoked"}
    assert "policy 'no' forbids it" in grant_of(house, chain[2]).reason


def test_what_was_handed_down_ends_at_the_ceiling_that_shrank_for_its_parent(house, chain):
    """INV-10: the resource allows less now, and the parent is older than its child."""
    house.clock.forward(seconds=50)
    task = house.open_task(*AGENTS)
    older = house.issue(task)
    house.clock.forward(seconds=30)
    younger = house.issue(None, by="scribe", parent_grant_id=older.grant.id, parent_by_token=True)
    apply(house, resources=resources(house, older.grant.resource, max_ttl_s=100))
    house.broker.redeciding.run()
    parent, child = grant_of(house, older), grant_of(house, younger)
    assert parent.expires_at == parent.created_at + timedelta(seconds=100)
    assert child.expires_at <= parent.expires_at
    assert all(grant_of(house, below).expires_at <= grant_of(house, chain[0]).expires_at for below in chain[1:])


def test_a_part_that_somebody_holds_is_come_back_to(house, second_house, chain, monkeypatch):
    """Nobody is waited for: the whole is left until its parts can be had."""
    from broker.store import redecisions

    held = redecisions.hold_below
    seen = []

    def letting_go(db, grants):
        below = held(db, grants)
        seen.append(set(grants))
        if len(seen) == 1:
            grants.clear()
            return {}
        return below

    monkeypatch.setattr(redecisions, "hold_below", letting_go)
    policies = house.broker.standing.now().catalogue.policies
    no = '@id("no") forbid (principal == Agent::"summarizer", action, resource);'
    apply(house, policies={**policies, "no.cedar": no})
    assert house.broker.redeciding.run().ended == 0
    assert house.is_active(chain[0])
    house.clock.forward(seconds=60)
    assert house.broker.redeciding.run().ended == 3


def test_a_policy_that_the_parent_comes_to_stand_on_takes_what_was_handed_down(house, chain):
    policies = house.broker.standing.now().catalogue.policies
    other = policies["open.cedar"].replace('@id("read-crm")', '@id("read-crm-anew")')
    apply(house, policies={"open.cedar": other})
    house.broker.redeciding.run()
    house.broker.revocation.revoke_along(house.caller("ada"), "policy", "read-crm-anew", reason="drill")
    assert {str(state_of(house, issued)) for issued in chain} == {"revoked"}


def test_what_people_approved_and_nobody_collected_is_judged_by_what_was_asked_for(house):
    apply_asking(house, asking(house))
    house.broker.redeciding.run()
    case = ask(house, house.open_task(), ttl=timedelta(seconds=300))
    approve(house, case)
    # It may be collected for longer than such a grant may live.
    bounded = (
        asking(house)
        .policies["asking.cedar"]
        .replace(
            'resource == Resource::"https://crm.example/api");',
            'resource == Resource::"https://crm.example/api") when { context.ttl_s <= 600 };',
        )
    )
    apply(house, policies={"asking.cedar": bounded})
    house.broker.redeciding.run()
    assert states(house, case) == ("approved", "approved")
    assert house.is_active(collect(house, case))


def test_what_was_collected_is_decided_again_like_any_other(house):
    apply_asking(house, asking(house))
    house.broker.redeciding.run()
    case = ask(house, house.open_task())
    approve(house, case)
    issued = collect(house, case)
    apply(house, policies=replace(house.broker.standing.now().catalogue).policies)
    house.broker.redeciding.run()
    assert house.is_active(issued)
    apply(house, policies=POLICIES)
    house.broker.redeciding.run()
    assert not house.is_active(issued)


def test_what_is_shortened_in_the_middle_shortens_what_is_below_it(house):
    """The root changes too, and what is below both is below each."""
    with_everybody(house)
    house.broker.redeciding.run()
    root, child, grandchild = chain_of(house, house.open_task(*AGENTS), *AGENTS[:3])
    text = house.broker.standing.now().catalogue.policies["open.cedar"]
    free = 'permit (principal, action == Action::"contacts:read"'
    assert free in text
    others = text.replace(free, 'permit (principal == Agent::"clerk", action == Action::"contacts:read"')
    resource = 'resource == Resource::"https://crm.example/api");'
    more = f"""
@id("root") permit (principal == Agent::"summarizer", action == Action::"contacts:read", {resource}
@id("middle") @max_ttl("60") permit (principal == Agent::"scribe", action == Action::"contacts:read", {resource}
"""
    apply(house, policies={"open.cedar": others + more})
    house.broker.redeciding.run()
    middle = grant_of(house, child)
    assert middle.expires_at == middle.created_at + timedelta(seconds=60)
    assert grant_of(house, grandchild).expires_at <= middle.expires_at
    assert grant_of(house, root).expires_at == root.grant.expires_at
    # What is shortened stands on what shortened it, and what is below it too.
    house.broker.revocation.revoke_along(house.caller("ada"), "policy", "middle", reason="drill")
    assert not house.is_active(child) and not house.is_active(grandchild) and house.is_active(root)
