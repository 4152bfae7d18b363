"""Live grants after a new configuration: what ends, what is shortened, what stays, and what cannot be told."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from broker.domain.errors import Conflict, LockedDown, PolicyDenied
from broker.domain.policy import DENY, Decision, PolicySet, engine
from broker.services import reasking, redeciding
from broker.store import redecisions
from broker.store.models import Grant, Redecision, RedecisionShare, Task
from tests.house import CRM, LEDGER, POLICIES

OPEN = '@id("everybody") permit (principal, action, resource) when { context.ttl_s > 0 };'


def apply(house, **more):
    """A new version: the newest with other members."""
    catalogue = house.broker.standing.now().catalogue
    return house.broker.administration.apply(replace(catalogue, **more), by="ada", allow_older=True)


def with_policies(house, **policies):
    return apply(house, policies={**POLICIES, **{name.replace("_", "."): text for name, text in policies.items()}})


def principals(house, name, **changed):
    """The principals with one of them changed, or taken out."""
    found = house.broker.standing.now().catalogue.principals
    if not changed:
        return tuple(rule for rule in found if rule.name != name)
    return tuple(replace(rule, **changed) if rule.name == name else rule for rule in found)


def resources(house, identifier, **changed):
    found = house.broker.standing.now().catalogue.resources
    if not changed:
        return tuple(resource for resource in found if resource.identifier != identifier)
    return tuple(replace(each, **changed) if each.identifier == identifier else each for each in found)


def grant_of(house, issued):
    return house.broker.verification.find_grant(house.caller("ada"), issued.grant.id)[0]


def events(house, type_):
    return house.broker.audit_trail.page(house.caller("audrey"), {"type": type_}, before=None, limit=1000)


# --- What ends ------------------------------------------------------------------------------------------------------


def test_what_a_new_version_forbids_ends_and_says_why(house):
    issued = house.issue(house.open_task())
    version = with_policies(
        house, no_cedar='@id("no-crm") forbid (principal == Agent::"summarizer", action, resource);'
    )
    assert house.is_active(issued)  # until the run came to it
    done = house.broker.redeciding.run()
    assert (done.looked_at, done.ended, done.shortened) == (1, 1, 0)
    assert not house.is_active(issued)
    grant = grant_of(house, issued)
    assert (str(grant.state), grant.revoked_by) == ("revoked", "ada")
    assert grant.reason == f"configuration version {version}: policy 'no-crm' forbids it"
    [event] = events(house, "grant.revoked")
    assert (event.actor, event.grant_id, event.data["configuration_version"]) == ("ada", grant.id, version)


def test_what_no_policy_permits_any_more_ends(house):
    issued = house.issue(house.open_task())
    stricter = POLICIES["crm.cedar"].replace("<= 600", "<= 60")
    version = with_policies(house, crm_cedar=stricter)
    house.broker.redeciding.run()
    assert grant_of(house, issued).reason == f"configuration version {version}: no policy permits it"


def test_a_grant_that_would_stand_on_a_policy_that_is_locked_down_ends(house):
    """The rows of the lockdown have followed, and nobody else would end it or tell verifiers of it."""
    issued = house.issue(house.open_task())
    house.broker.revocation.set_lockdown(house.caller("ada"), "policy", "everybody", reason="drill")
    with_policies(house, open_cedar=OPEN)
    # Nor is it handed out anew before it comes to that.
    with pytest.raises(LockedDown):
        house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=None)
    assert house.is_active(issued)
    house.broker.redeciding.run()
    assert not house.is_active(issued)
    assert grant_of(house, issued).reason.endswith("policy 'everybody', which allows it now, is locked down")


def test_what_is_still_allowed_stays_as_it_is_and_no_event_is_written_for_it(house):
    issued = house.issue(house.open_task())
    before = grant_of(house, issued)
    with_policies(house, more_cedar='@id("more") permit (principal == Agent::"scribe", action, resource);')
    done = house.broker.redeciding.run()
    assert (done.looked_at, done.ended, done.shortened, done.undecided) == (1, 0, 0, 0)
    assert grant_of(house, issued) == before
    [finished] = events(house, "redecision.finished")
    assert finished.data == {"cause": "configuration version 2", "grants": 1, "ended": 0, "shortened": 0}
    assert not events(house, "grant.redecided")


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (lambda house: {"principals": principals(house, "scribe")}, "its principal is not configured any more"),
        (lambda house: {"principals": principals(house, "scribe", roles=())}, "its principal is not an agent any more"),
        (
            lambda house: {"principals": principals(house, "scribe", subject="dev:somebody-else")},
            "its principal stands for another workload now",
        ),
        (
            lambda house: {"principals": principals(house, "scribe", issuer="elsewhere")},
            "its principal stands for another workload now",
        ),
        (
            lambda house: {"principals": principals(house, "scribe", claims={"tier": "gold"})},
            "what is demanded of its workload token changed, and the token is not there to be looked at",
        ),
        (
            lambda house: {
                "principals": (
                    *principals(house, "scribe"),
                    *(
                        replace(rule, subject=None, subject_prefix="dev:")
                        for rule in house.broker.standing.now().catalogue.principals
                        if rule.name == "scribe"
                    ),
                    *(
                        replace(rule, name="newcomer")
                        for rule in house.broker.standing.now().catalogue.principals
                        if rule.name == "scribe"
                    ),
                )
            },
            "its workload is, or may be, another principal now",
        ),
        (lambda house: {"resources": resources(house, CRM)}, "its resource is not registered any more"),
        (
            lambda house: {"resources": resources(house, CRM, scopes=("contacts:write",))},
            "its resource does not offer its scopes any more",
        ),
        (
            lambda house: {"resources": resources(house, CRM, require_dpop=True)},
            "its resource wants sender-bound tokens now, and this is not one",
        ),
        (
            lambda house: {"resources": resources(house, CRM, provider="outside")},
            "credentials of its resource come from elsewhere now",
        ),
    ],
)
def test_a_principal_or_resource_that_is_not_what_it_was_takes_its_grants_along(house, changed, why):
    """Unknown is never yes (INV-13), and what does not change does not end."""
    of_scribe = house.issue(house.open_task("scribe"), by="scribe")
    # A policy may not name what is not there, so these name nobody.
    apply(house, policies={"all.cedar": OPEN.replace("everybody", "scribe-read")})
    house.broker.redeciding.run()
    assert house.is_active(of_scribe)
    version = apply(house, **changed(house))
    house.broker.redeciding.run()
    grant = grant_of(house, of_scribe)
    assert (str(grant.state), grant.reason) == ("revoked", f"configuration version {version}: {why}")


def test_claims_that_were_demanded_before_count_as_seen(house):
    apply(house, policies={"all.cedar": OPEN})
    issued = house.issue(house.open_task("scribe"), by="scribe")
    # The token proved nothing of the kind; what the rule of its version demanded is what is known to have been proven.
    apply(house, principals=principals(house, "scribe", attributes={"tier": "gold"}, owner="somebody"))
    house.broker.redeciding.run()
    assert house.is_active(issued)


def test_a_changed_attribute_is_a_changed_fact(house):
    apply(
        house,
        principals=principals(house, "scribe", attributes={"clearance": "internal"}),
        policies={
            "all.cedar": '@id("cleared") permit (principal, action, resource) '
            'when { principal has clearance && principal.clearance == "internal" };'
        },
    )
    issued = house.issue(house.open_task("scribe"), by="scribe")
    apply(house, principals=principals(house, "scribe", attributes={"clearance": "none"}))
    house.broker.redeciding.run()
    assert not house.is_active(issued)


def test_the_moment_of_the_decision_is_still_its_moment(house):
    """A policy about the hour ends nothing because another one was edited later in the day."""
    hour = house.clock().hour
    by_hour = (
        '@id("by-hour") permit (principal == Agent::"summarizer", action, resource) when { context.time.hour == %d };'
    )
    with_policies(house, crm_cedar=by_hour % hour)
    issued = house.issue(house.open_task(deadline_s=7200), ttl=timedelta(seconds=900))
    house.clock.at = house.clock.at.replace(minute=59, second=59)
    issued = house.issue(house.open_task(deadline_s=7200), ttl=timedelta(seconds=900))
    house.clock.forward(seconds=60)
    with_policies(
        house, crm_cedar=by_hour % hour, more_cedar=OPEN.replace("principal,", 'principal == Agent::"scribe",')
    )
    house.broker.redeciding.run()
    assert house.is_active(issued)


# --- What is shortened ----------------------------------------------------------------------------------------------


def test_a_ceiling_that_shrank_shortens_what_is_out(house):
    issued = house.issue(house.open_task(), ttl=timedelta(seconds=600))
    began = house.clock()
    version = apply(house, resources=resources(house, CRM, max_ttl_s=120))
    done = house.broker.redeciding.run()
    assert (done.ended, done.shortened) == (0, 1)
    grant = grant_of(house, issued)
    assert grant.expires_at == began + timedelta(seconds=120)
    [event] = events(house, "grant.shortened")
    assert event.reason == f"configuration version {version}: the resource's max_ttl_s is 120 s now"
    assert event.data["expired_before_at"] == "2026-03-01T12:10:00Z"
    house.clock.forward(seconds=119)
    assert house.is_active(issued)
    house.clock.forward(seconds=1)
    assert not house.is_active(issued)  # though its token says otherwise


def test_a_ceiling_that_is_passed_already_ends_it(house):
    issued = house.issue(house.open_task(), ttl=timedelta(seconds=600))
    house.clock.forward(seconds=120)
    apply(house, resources=resources(house, CRM, max_ttl_s=120))
    assert house.broker.redeciding.run().ended == 1
    assert "the resource's max_ttl_s is 120 s now" in grant_of(house, issued).reason


def test_a_policy_s_ceiling_counts_too(house):
    issued = house.issue(house.open_task())
    with_policies(house, crm_cedar=POLICIES["crm.cedar"].replace('@id("crm-read")', '@id("crm-read") @max_ttl("30")'))
    house.broker.redeciding.run()
    assert grant_of(house, issued).expires_at == house.clock() + timedelta(seconds=30)


def test_a_shortened_grant_never_grows_again(house):
    issued = house.issue(house.open_task(), ttl=timedelta(seconds=600))
    apply(house, resources=resources(house, CRM, max_ttl_s=120))
    house.broker.redeciding.run()
    shortened = grant_of(house, issued).expires_at
    apply(house, resources=resources(house, CRM, max_ttl_s=900))
    house.broker.redeciding.run()
    assert grant_of(house, issued).expires_at == shortened


def test_its_status_says_invalid_from_then_on_whether_or_not_the_sweeper_came(house):
    """INV-24: an offline verifier has nothing but the list and the token's own `exp`, and that one lies now."""
    issued = house.issue(house.open_task(), ttl=timedelta(seconds=600))
    apply(house, resources=resources(house, CRM, max_ttl_s=120))
    house.broker.redeciding.run()
    from broker.store.grants import invalid_indexes

    def invalid():
        with house.broker.database.read() as db:
            return invalid_indexes(db, issued.grant.status_list, [], now=house.clock())

    assert invalid() == []
    house.clock.forward(seconds=120)
    assert invalid() == [issued.grant.status_index]


def test_an_earlier_longer_token_is_not_forgotten_behind_a_short_renewal(house):
    """The renewal asked for little; what is out before it lives longer, and is what the new policy is asked about."""
    issued = house.issue(house.open_task(), ttl=timedelta(seconds=600))
    house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=timedelta(seconds=30))
    with_policies(house, crm_cedar=POLICIES["crm.cedar"].replace("<= 600", "<= 60"))
    house.broker.redeciding.run()
    assert not house.is_active(issued)


# --- What stays, by other policies ----------------------------------------------------------------------------------


def test_a_grant_that_another_policy_allows_now_is_found_along_that_one(house):
    issued = house.issue(house.open_task())
    renamed = POLICIES["crm.cedar"].replace('"crm-read"', '"crm-read-by-another-name"')
    with_policies(house, crm_cedar=renamed)
    house.broker.redeciding.run()
    assert grant_of(house, issued).policies == ("crm-read", "crm-read-by-another-name")
    [event] = events(house, "grant.redecided")
    assert event.data["policies"] == ["crm-read-by-another-name"]
    house.broker.revocation.revoke_along(house.caller("ada"), "policy", "crm-read-by-another-name", reason="a test")
    assert not house.is_active(issued)


def test_what_people_approved_stays_while_no_more_of_them_are_asked_for(house):
    issued = house.issue(house.open_task())
    with house.broker.database.begin() as db:
        approved = {"outcome": "needs_approval", "policies": ["crm-read"], "policy_version": 1, "reasons": []}
        approved["approvals"] = [{"group": "board", "quorum": 2}]
        db.execute(sa.update(Grant).values(decision=approved))
    asking = '@id("crm-read") @approval("board") @quorum("%d") permit (principal, action, resource);'
    apply(house, policies={"crm.cedar": asking % 2})
    house.broker.redeciding.run()
    assert house.is_active(issued)
    apply(house, policies={"crm.cedar": asking % 3})
    house.broker.redeciding.run()
    assert grant_of(house, issued).reason == "configuration version 3: people have to approve it now"


def test_what_nobody_approved_ends_where_people_are_asked_now(house):
    issued = house.issue(house.open_task())
    apply(house, policies={"crm.cedar": '@id("crm-read") @approval("board") permit (principal, action, resource);'})
    house.broker.redeciding.run()
    assert not house.is_active(issued)


# --- What cannot be told --------------------------------------------------------------------------------------------


def failing(monkeypatch):
    def decide(self, request):
        return Decision(outcome=DENY, policies=(), policy_version=self.version, failure="the engine broke")

    monkeypatch.setattr(PolicySet, "decide", decide)


def test_an_engine_that_fails_ends_nothing_at_once_and_somebody_is_told(house, monkeypatch, caplog):
    issued = [house.issue(house.open_task()) for _ in range(3)]
    with_policies(house, more_cedar=OPEN)
    with monkeypatch.context() as patched:
        failing(patched)
        done = house.broker.redeciding.run()
        assert (done.ended, done.undecided) == (0, 3)
        house.clock.forward(seconds=10)
        house.broker.redeciding.run()
    assert all(house.is_active(each) for each in issued)
    [event] = events(house, "redecision.undecided")  # once a run, not once a try
    assert (event.reason, event.data["grants"]) == ("the engine broke", 3)
    assert any("could not be asked" in record.message for record in caplog.records)
    with house.broker.database.read() as db:
        owed = db.execute(sa.text("SELECT count(*) FROM alerts WHERE event_id = :id"), {"id": event.id}).scalar_one()
    assert owed == 1
    # It works again: what is asked again is answered, and nobody lost anything.
    house.clock.forward(seconds=10)
    done = house.broker.redeciding.run()
    assert (done.ended, done.undecided) == (0, 0)
    assert events(house, "redecision.finished")


def test_what_cannot_be_told_for_five_minutes_is_a_no(house, monkeypatch):
    """INV-13."""
    issued = house.issue(house.open_task(deadline_s=7200), ttl=timedelta(seconds=600))
    version = with_policies(house, more_cedar=OPEN)
    failing(monkeypatch)
    house.broker.redeciding.run()
    house.clock.forward(seconds=299)
    house.broker.redeciding.run()
    assert house.is_active(issued)
    house.clock.forward(seconds=10)
    house.broker.redeciding.run()
    assert grant_of(house, issued).reason == f"configuration version {version}: policy could not be asked about it"


def test_what_is_undecided_is_not_renewed_meanwhile(house, monkeypatch):
    issued = house.issue(house.open_task())
    with_policies(house, more_cedar=OPEN)
    failing(monkeypatch)
    house.broker.redeciding.run()
    with pytest.raises(PolicyDenied):
        house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=None)


# --- The run --------------------------------------------------------------------------------------------------------


def test_every_share_is_done_however_many_there_are_and_nothing_is_left_of_them(house, monkeypatch):
    monkeypatch.setattr(redeciding, "_SHARE", 2)
    monkeypatch.setattr(redeciding, "_SHARES_A_PASS", 2)
    issued = [house.issue(house.open_task()) for _ in range(7)]
    with_policies(house, no_cedar='@id("no") forbid (principal, action, resource);')
    ended = [house.broker.redeciding.run().ended for _ in range(3)]
    assert ended == [4, 3, 0]
    assert not any(house.is_active(each) for each in issued)
    [finished] = events(house, "redecision.finished")
    assert (finished.data["grants"], finished.data["ended"]) == (7, 7)
    with house.broker.database.read() as db:
        assert db.execute(sa.select(sa.func.count()).select_from(RedecisionShare)).scalar_one() == 0
        assert db.execute(sa.select(Redecision.finished_at)).scalars().all() == [house.clock()]


def test_what_was_issued_after_the_new_version_is_not_decided_again(house):
    with_policies(house, more_cedar=OPEN)
    house.issue(house.open_task())
    assert house.broker.redeciding.run().looked_at == 0


def test_a_newer_version_takes_over_what_an_older_one_ordered(house):
    issued = house.issue(house.open_task())
    with_policies(house, no_cedar='@id("no") forbid (principal, action, resource);')
    with_policies(house)  # taken back before anybody came to it
    done = house.broker.redeciding.run()
    assert (done.looked_at, done.ended) == (1, 0)
    assert house.is_active(issued)
    assert [event.data["cause"] for event in events(house, "redecision.finished")] == ["configuration version 3"]


def test_a_share_whose_broker_died_is_taken_up_by_another(house, second_house, monkeypatch):
    """INV-07: and the one that was only slow changes nothing any more."""
    issued = house.issue(house.open_task())
    with_policies(house, no_cedar='@id("no") forbid (principal, action, resource);')

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(house.broker.redeciding, "_follow", dies)
        house.broker.redeciding.run()
    assert second_house.broker.redeciding.run().looked_at == 0  # it may be at it still
    house.clock.forward(seconds=60)
    assert second_house.broker.redeciding.run().ended == 1
    assert not house.is_active(issued)


def test_a_broker_that_was_superseded_changes_nothing(house, second_house, monkeypatch):
    """INV-07."""
    house.issue(house.open_task())
    with_policies(house, no_cedar='@id("no") forbid (principal, action, resource);')
    asked = house.broker.redeciding._asked_by_kind
    late = []

    def slowly(*arguments, **more):
        found = asked(*arguments, **more)
        if not late:
            house.clock.forward(seconds=60)
            late.append(second_house.broker.redeciding.run())
        return found

    monkeypatch.setattr(house.broker.redeciding, "_asked_by_kind", slowly)
    done = house.broker.redeciding.run()
    assert (late[0].ended, done.ended) == (1, 0)
    assert len(events(house, "grant.revoked")) == 1
    assert len(events(house, "redecision.finished")) == 1


def test_a_broker_whose_share_was_taken_over_leaves_it_to_whoever_has_it(house, second_house, monkeypatch):
    """INV-07: also where that one has changed nothing yet."""
    issued = house.issue(house.open_task())
    with_policies(house, no_cedar='@id("no") forbid (principal, action, resource);')
    asked, took = house.broker.redeciding._asked_by_kind, []

    def slowly(*arguments, **more):
        found = asked(*arguments, **more)
        now = house.clock.forward(seconds=60)
        with second_house.broker.database.begin() as db:
            took.append(redecisions.claim(db, now=now, again_at=now + timedelta(seconds=60)))
        return found

    monkeypatch.setattr(house.broker.redeciding, "_asked_by_kind", slowly)
    assert house.broker.redeciding.run().ended == 0
    assert took[0] is not None and house.is_active(issued)
    second_house.broker.redeciding._follow(took[0])
    assert not house.is_active(issued)


def test_an_idle_pass_only_looks(house, monkeypatch):
    monkeypatch.setattr(house.broker.database, "begin", None)
    assert house.broker.redeciding.run().looked_at == 0


def test_the_first_version_orders_nothing(house):
    with house.broker.database.read() as db:
        assert db.execute(sa.select(sa.func.count()).select_from(Redecision)).scalar_one() == 0


def test_a_grant_from_before_terms_were_kept_is_decided_again_by_what_is_known(house):
    issued = house.issue(house.open_task())
    with house.broker.database.begin() as db:
        db.execute(sa.update(Grant).values(terms=None))
    apply(house, resources=resources(house, CRM, max_ttl_s=120))
    house.broker.redeciding.run()
    assert grant_of(house, issued).expires_at == house.clock() + timedelta(seconds=120)


def test_identical_questions_are_put_to_the_engine_once(house, monkeypatch):
    for _ in range(5):
        house.issue(house.open_task())
    with_policies(house, more_cedar='@id("more") permit (principal == Agent::"scribe", action, resource);')
    asked = []
    decide = PolicySet.decide
    monkeypatch.setattr(PolicySet, "decide", lambda self, request: asked.append(request) or decide(self, request))
    assert house.broker.redeciding.run().looked_at == 5
    assert len(asked) == 1


def test_every_fact_that_a_policy_may_look_at_tells_questions_apart():
    """A fact that were missing here would let two requests that differ in it share one decision."""
    assert set(reasking._TELLS) == set(redecisions._WHERE_READ) == set(engine._LEAVES)


def test_a_fact_that_is_not_known_yet_makes_each_request_one_of_its_own(house, monkeypatch):
    for _ in range(3):
        house.issue(house.open_task())
    monkeypatch.delitem(reasking._TELLS, ("ttl_s",))
    monkeypatch.delitem(redecisions._WHERE_READ, ("ttl_s",))
    with_policies(house, more_cedar='@id("more") permit (principal == Agent::"scribe", action, resource);')
    asked = []
    decide = PolicySet.decide
    monkeypatch.setattr(PolicySet, "decide", lambda self, request: asked.append(request) or decide(self, request))
    house.broker.redeciding.run()
    assert len(asked) == 3


def of_grant(**values):
    return lambda db, grant: db.execute(sa.update(Grant).where(Grant.id == grant.id).values(values))


def of_task(**values):
    return lambda db, grant: db.execute(sa.update(Task).where(Task.id == grant.task_id).values(values))


def of_terms(**values):
    """Of what was decided, as it is recorded."""

    def change(db, grant):
        terms = db.execute(sa.select(Grant.terms).where(Grant.id == grant.id)).scalar_one()
        of_grant(terms=terms | values)(db, grant)

    return change


def decided(moved):
    """As long a life, decided at another time."""

    def change(db, grant):
        before = db.execute(sa.select(Grant.terms, Grant.expires_at).where(Grant.id == grant.id)).one()
        of_terms(decided_at=before.terms["decided_at"] + int(moved.total_seconds()))(db, grant)
        of_grant(expires_at=before.expires_at + moved)(db, grant)

    return change


def quorum(db, grant):
    decision = db.execute(sa.select(Grant.decision).where(Grant.id == grant.id)).scalar_one()
    of_grant(decision=decision | {"approvals": [{"group": "security", "quorum": 2}]})(db, grant)


LATER = timedelta(minutes=1)
READ = [
    (("task", "id"), lambda db, grant: None),
    (("task", "purpose"), of_task(purpose="another")),
    (("task", "purpose"), of_task(implicit=True)),
    (("task", "age_s"), of_task(created_at=datetime(2020, 1, 1, tzinfo=UTC))),
    (("task", "age_s"), decided(LATER)),
    (("task", "orchestrator"), of_grant(orchestrator="another")),
    (("task", "labels"), of_task(labels={"team": "x"})),
    (("intent",), of_grant(intent="another")),
    (("delegation_depth",), of_terms(delegation_depth=3)),
    (("delegation_chain",), of_grant(chain=" a b ")),
    (("delegation_root",), of_grant(chain=" a b ")),
    (("user_attributes",), of_terms(user_attributes={"team": ["x"]})),
    (("approvals", "count"), of_terms(approved={"by": ["ada"]})),
    (("approvals", "by"), of_terms(approved={"by": ["ada"]})),
    (("approvals", "groups"), of_terms(approved={"by": ["ada"]})),
    (("agent", "live_grants"), of_terms(live_grants=7)),
    (("agent", "recent_denials"), of_terms(recent_denials=7)),
    (("time", "hour"), decided(timedelta(hours=1))),
    (("time", "weekday"), decided(timedelta(days=1))),
    (("local", "hour"), decided(LATER)),
    (("local", "minute"), decided(LATER)),
    (("local", "weekday"), decided(timedelta(days=1))),
    (("claimed",), of_grant(claimed={"ticket": "x"})),
]
ALWAYS_READ = [
    of_grant(agent="scribe"),
    of_grant(issuer="another"),
    of_grant(subject="another"),
    of_grant(on_behalf_of="idp:ann"),
    of_grant(resource=LEDGER),
    of_grant(scopes=["contacts:write"]),
    of_grant(provider="another"),
    of_grant(state="approved"),
    of_grant(policies=" another "),
    of_grant(policy_version=7),
    of_grant(ttl_s=7),
    of_grant(break_glass="declared"),
    of_grant(jkt="x" * 43),
    of_grant(expires_at=datetime(2100, 1, 1, tzinfo=UTC)),
    of_terms(ttl_s=7),
    of_terms(risk="high"),
    of_terms(decided_at=None),
    quorum,
]


def kinds_of(house, *facts):
    """How many grants of each kind there are."""
    broker = house.broker
    order = {"era": 1 << 40, "version": 1, "by": "ada", "cause": "drill"}
    with broker.database.begin() as db:
        redeciding.order_redecision(db, now=house.clock(), **order)
        redecisions.plan(db, now=house.clock(), size=1000)
        share = redecisions.claim(db, now=house.clock(), again_at=house.clock())
        return sorted(len(ids.split()) for _, ids in redecisions.kinds(db, share, now=house.clock(), facts=facts))


@pytest.mark.parametrize(("fact", "change"), READ, ids=[".".join(fact) for fact, _ in READ])
def test_two_that_differ_in_a_fact_that_is_read_are_of_two_kinds(house, fact, change):
    """And of one kind where nobody reads it, so that a hundred thousand are not asked about one by one."""
    for _ in range(2):
        other = house.issue(house.open_task())
    with house.broker.database.begin() as db:
        change(db, other.grant)
    assert kinds_of(house) == [2]
    assert kinds_of(house, fact) == [1, 1]
    assert kinds_of(house, ("unheard", "of")) == [1, 1]


@pytest.mark.parametrize("change", ALWAYS_READ)
def test_two_that_differ_in_what_is_always_read_are_of_two_kinds(house, change):
    task = house.open_task()
    for _ in range(2):
        other = house.issue(task)
    assert kinds_of(house) == [2]
    with house.broker.database.begin() as db:
        change(db, other.grant)
    assert kinds_of(house) == [1, 1]


def test_two_that_do_not_say_when_they_were_decided_are_of_two_kinds(house):
    """How long they live is not known, and unknown is never alike."""
    task = house.open_task()
    for _ in range(2):
        issued = house.issue(task)
        with house.broker.database.begin() as db:
            of_terms(decided_at=None)(db, issued.grant)
    assert kinds_of(house) == [1, 1]


def test_what_hangs_on_when_it_was_decided_is_asked_of_each(house):
    """Alike in all that policies read, and one is over by the new ceiling while the other is shortened."""
    task = house.open_task()
    early = house.issue(task, ttl=timedelta(seconds=500))
    house.clock.forward(seconds=100)
    late = house.issue(task, ttl=timedelta(seconds=500))
    apply(house, resources=resources(house, CRM, max_ttl_s=90))
    done = house.broker.redeciding.run()
    assert (done.looked_at, done.ended, done.shortened) == (2, 1, 1)
    assert not house.is_active(early)
    assert grant_of(house, late).expires_at == house.clock() + timedelta(seconds=90)


def test_a_stale_configuration_orders_nothing(house):
    catalogue = house.broker.standing.now().catalogue
    with_policies(house, more_cedar=OPEN)
    house.broker.redeciding.run()
    with pytest.raises(Conflict):
        house.broker.administration.apply(catalogue, by="somebody late")
    with house.broker.database.read() as db:
        assert db.execute(sa.select(sa.func.count()).select_from(Redecision)).scalar_one() == 1


# --- Shown before it is done ----------------------------------------------------------------------------------------


def test_what_a_draft_would_end_is_shown_by_agent_and_policy_and_nothing_is_done(house):
    house.issue(house.open_task())
    house.issue(house.open_task())
    house.issue(house.open_task("scribe"), by="scribe")
    catalogue = house.broker.standing.now().catalogue
    policies = {**POLICIES, "no.cedar": '@id("no-crm") forbid (principal == Agent::"summarizer", action, resource);'}
    before = len(events(house, "grant.revoked"))
    seen = house.broker.redeciding.foresee(replace(catalogue, policies=policies))
    assert (seen.looked_at, seen.ended, seen.shortened, seen.undecided, seen.complete) == (3, 2, 0, 0, True)
    assert seen.by_agent == {"summarizer": 2}
    assert seen.by_policy == {"no-crm": 2}
    assert seen.by_reason == {"policy 'no-crm' forbids it": 2}
    assert {sample.outcome for sample in seen.samples} == {"ended"}
    assert len(events(house, "grant.revoked")) == before
    assert house.broker.redeciding.run().looked_at == 0


def test_what_nothing_allows_any_more_is_shown_by_the_policy_that_did(house):
    house.issue(house.open_task())
    catalogue = house.broker.standing.now().catalogue
    seen = house.broker.redeciding.foresee(
        replace(catalogue, policies={"scribe.cedar": OPEN.replace("principal,", 'principal == Agent::"scribe",')})
    )
    assert (seen.ended, seen.by_policy) == (1, {"crm-read": 1})


def test_a_draft_is_foreseen_as_it_then_comes(house):
    """The preview and the deed ask one question."""
    for ttl in (30, 120, 600):
        house.issue(house.open_task(), ttl=timedelta(seconds=ttl))
    house.issue(house.open_task("scribe"), by="scribe")
    changed = {
        "resources": (*resources(house, LEDGER, sensitivity="public")[1:], *resources(house, CRM, max_ttl_s=60)[:1])
    }
    seen = house.broker.redeciding.foresee(replace(house.broker.standing.now().catalogue, **changed))
    apply(house, **changed)
    done = house.broker.redeciding.run()
    assert (seen.looked_at, seen.ended, seen.shortened) == (done.looked_at, done.ended, done.shortened) == (4, 0, 3)
