"""What is alive outside against what our rows account for, and what may be issued before that was compared."""

from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import sqlalchemy as sa

from broker.domain.errors import ProviderRefused, ProviderUnavailable, Unavailable
from broker.domain.identity import new_id
from broker.domain.lifecycle import GrantState, LeaseState
from broker.providers.base import LiveSecret
from broker.services.reconciliation import EVERY, OLD_ENOUGH
from broker.store import leases
from tests.fakes.outside import LONGEST, Target, house_on_outside
from tests.leases import require_consistent, states
from tests.services.test_secrets import ask, at


@pytest.fixture
def house(store_url, tmp_path):
    with house_on_outside(store_url, tmp_path) as made:
        yield made
        require_consistent(made.broker.database)


def events(house, type_):
    page = house.broker.audit_trail.page(house.caller("audrey"), {"type": type_}, before=None, limit=100)
    return list(page)


def alive_outside(house, reference, age, grant_id=None):
    """Something that exists there and that no row knows of, made so long ago."""
    issued_at = house.clock() - age
    house.outside.alive[reference] = "unknown"
    original = house.outside.list_live

    def list_live(known=()):
        return [
            replace(secret, issued_at=issued_at, grant_id=grant_id) if secret.reference == reference else secret
            for secret in original(known)
        ]

    house.outside.list_live = list_live


def look(house):
    return house.broker.reconciliation.look("vault")


class TestWhatNobodyOwns:
    """INV-03."""

    def test_it_is_found_and_killed_and_told(self, house):
        alive_outside(house, "database/creds/jit/stray", OLD_ENOUGH)
        assert look(house) == (1, 0)
        assert states(house.broker.database) == [(None, "revoking")]
        house.broker.debts.pay()
        assert house.outside.alive == {}
        assert states(house.broker.database) == [(None, "released")]
        (event,) = events(house, "lease.found")
        assert event.data["reference"] == "database/creds/jit/stray"

    def test_one_that_may_just_be_being_committed_is_left_alone(self, house):
        alive_outside(house, "database/creds/jit/young", OLD_ENOUGH - timedelta(seconds=1))
        assert look(house) == (0, 0)
        house.broker.debts.pay()
        assert list(house.outside.alive) == ["database/creds/jit/young"]

    def test_one_whose_age_is_not_told_is_not_left_alone(self, house):
        house.outside.alive["database/creds/jit/ageless"] = "unknown"
        assert look(house) == (1, 0)

    def test_it_is_owed_once_however_often_it_is_found(self, house):
        alive_outside(house, "database/creds/jit/stray", OLD_ENOUGH)
        house.outside.revoke = lambda handle, reference: (_ for _ in ()).throw(ProviderUnavailable("no answer"))
        assert look(house) == (1, 0)
        house.broker.debts.pay()
        assert look(house) == (0, 0)
        assert states(house.broker.database) == [(None, "revoking")]

    def test_what_a_released_lease_once_named_and_lives_again_is_found(self, house):
        """A provider that was restored from before it died."""
        issued = ask(house)
        house.broker.revocation.revoke_grant(house.caller("ada"), issued.grant.id)
        lease = house.broker.verification.find_grant(house.caller("ada"), issued.grant.id)[2]
        assert lease.state is LeaseState.RELEASED
        alive_outside(house, lease.reference, OLD_ENOUGH, grant_id=issued.grant.id)
        assert look(house) == (1, 0)
        house.broker.debts.pay()
        assert house.outside.alive == {}
        assert states(house.broker.database) == [("revoked", "released"), ("revoked", "released")]

    def test_what_is_confirmed_while_the_list_is_read_is_nobody_s_orphan(self, house):
        original = house.outside.list_live

        def list_live(known=()):
            issued = ask(house)
            assert issued.grant.state is GrantState.ACTIVE
            return [replace(secret, issued_at=house.clock() - OLD_ENOUGH) for secret in original(known)]

        house.outside.list_live = list_live
        assert look(house) == (0, 0)
        assert states(house.broker.database) == [("active", "held")]


class TestWhatIsGone:
    def test_a_held_secret_that_is_gone_ends_its_grant_and_is_owed_until_it_would_have_ended(self, house):
        """That the provider forgot it is not its death (INV-04)."""
        issued = ask(house)
        house.outside.alive.clear()
        assert look(house) == (0, 1)
        grant, live, lease = house.broker.verification.find_grant(house.caller("ada"), issued.grant.id)
        assert (grant.state, live, lease.state) == (GrantState.REVOKED, False, LeaseState.REVOKING)
        (event,) = events(house, "lease.gone")
        assert event.grant_id == issued.grant.id
        house.broker.debts.pay()
        assert states(house.broker.database) == [("revoked", "revoking")]
        for _ in range(20):
            house.clock.forward(seconds=61)
            look(house)
            house.broker.debts.pay()
        assert states(house.broker.database) == [("revoked", "released")]
        lease = house.broker.verification.find_grant(house.caller("ada"), issued.grant.id)[2]
        # Not the end of its token, with which it would have died: nobody ends it there, and a database lets it in.
        assert lease.dead_at >= issued.grant.issued_at + LONGEST > issued.credential.expires_at

    def test_one_that_ended_by_itself_just_now_is_the_sweeps(self, house):
        ask(house, ttl=timedelta(seconds=60))
        house.clock.forward(seconds=60)
        house.outside.alive.clear()
        assert look(house) == (0, 0)
        assert events(house, "lease.gone") == []

    def test_one_that_ended_while_the_list_was_read_is_as_it_ended(self, house):
        issued = ask(house)
        original = house.outside.list_live

        def list_live(known=()):
            house.broker.revocation.revoke_grant(house.caller("summarizer"), issued.grant.id)
            return original(known)

        house.outside.list_live = list_live
        assert look(house) == (0, 0)
        assert events(house, "lease.gone") == []


class TestNothingIsIssuedBeforeItWasCompared:
    """INV-37."""

    def test_a_broker_that_begins_looks_first(self, store_url, tmp_path):
        with house_on_outside(store_url, tmp_path, looked=False) as house:
            with pytest.raises(Unavailable, match="not yet compared"):
                ask(house)
            house.broker.reconciliation.run()
            assert ask(house).grant.state is GrantState.ACTIVE

    def test_a_look_of_before_it_began_is_not_trusted(self, store_url, tmp_path):
        with house_on_outside(store_url, tmp_path) as house:
            later = house.clock
            with house_on_outside(store_url, tmp_path, looked=False) as restarted:
                restarted.clock.at = later.at + timedelta(seconds=1)
                restarted.broker.look_again()
                with pytest.raises(Unavailable, match="not yet compared"):
                    ask(restarted)

    def test_a_database_that_went_back_in_time_is_noticed_while_the_broker_runs(self, house):
        ask(house)
        for _ in range(2):
            house.clock.at += EVERY
            house.broker.reconciliation.run()
        ask(house)
        house.clock.forward(seconds=1)
        with house.broker.database.begin() as db:
            db.execute(sa.text("UPDATE provider_looks SET number = 1"))
        with pytest.raises(Unavailable, match="not yet compared"):
            ask(house)
        # What is wanted is not waited a minute for.
        assert house.broker.reconciliation.run().looks == 1
        assert ask(house).grant.state is GrantState.ACTIVE

    def test_a_newer_look_that_another_request_saw_first_is_no_database_that_went_back(self, house, monkeypatch):
        house.clock.forward(seconds=1)
        looking, original, reads = house.broker.reconciliation, leases.last_look, []

        def last_look(db, provider):
            found = original(db, provider)
            reads.append(found)
            if len(reads) == 1:
                # Between this answer and what is made of it.
                looking.require_reconciled(db, provider, house.clock())
            elif len(reads) == 2:
                return SimpleNamespace(number=found.number + 1, began_at=found.began_at)
            return found

        with house.broker.database.begin() as db:
            looking.require_reconciled(db, "vault", house.clock())
            monkeypatch.setattr(leases, "last_look", last_look)
            looking.require_reconciled(db, "vault", house.clock())
            # It is remembered all the same: now the number did go back.
            with pytest.raises(Unavailable, match="not yet compared"):
                looking.require_reconciled(db, "vault", house.clock())

    def test_a_clock_that_was_set_back_shuts_nothing_and_delays_no_look(self, house):
        house.clock.at -= timedelta(hours=1)
        assert house.broker.reconciliation.run().looks == 1
        assert ask(house).grant.state is GrantState.ACTIVE
        house.clock.at += EVERY
        assert house.broker.reconciliation.run().looks == 1

    def test_a_look_of_a_clock_that_was_ahead_is_not_one_since_the_broker_began(self, house, store_url, tmp_path):
        with house_on_outside(store_url, tmp_path, looked=False) as restarted:
            restarted.clock.at = house.clock.at - timedelta(hours=1)
            restarted.broker.look_again()
            with pytest.raises(Unavailable, match="not yet compared"):
                ask(restarted)
            assert restarted.broker.reconciliation.run().looks == 1
            assert ask(restarted).grant.state is GrantState.ACTIVE

    def test_a_provider_that_does_not_know_us_any_more_is_looked_at_first(self, house):
        house.clock.forward(seconds=1)
        house.broker.reconciliation.distrust("vault")
        with pytest.raises(Unavailable, match="not yet compared"):
            ask(house)

    def test_that_it_forgot_us_while_it_was_asked_hands_nothing_out(self, house):
        house.clock.forward(seconds=1)
        at(house, ("prepare", "before"), lambda: house.broker.reconciliation.distrust("vault"))
        with pytest.raises(Unavailable, match="not yet compared"):
            ask(house)
        house.broker.debts.pay()
        assert house.outside.alive == {}

    def test_tokens_of_our_own_are_issued_all_the_same(self, store_url, tmp_path):
        with house_on_outside(store_url, tmp_path, looked=False) as house:
            assert house.issue(house.open_task()).grant.state is GrantState.ACTIVE

    def test_while_the_provider_does_not_answer_it_stays_shut(self, store_url, tmp_path):
        with house_on_outside(store_url, tmp_path, looked=False) as house:
            house.outside.down = True
            with pytest.raises(ProviderUnavailable):
                house.broker.reconciliation.run()
            house.outside.down = False
            with pytest.raises(Unavailable, match="not yet compared"):
                ask(house)


def test_it_is_looked_at_once_a_minute(house):
    assert house.broker.reconciliation.run().looks == 0
    house.clock.at += EVERY
    assert house.broker.reconciliation.run().looks == 1
    assert house.broker.reconciliation.run().looks == 0


def test_what_it_lists_may_have_trouble_of_its_own(house):
    house.outside.list_live = lambda known=(): [
        LiveSecret(reference="database/creds/jit/stuck", issued_at=house.clock() - OLD_ENOUGH, trouble="no database")
    ]
    assert look(house) == (1, 0)
    (event,) = events(house, "lease.found")
    assert event.data["trouble"] == "no database"


class TestAtTheDatabaseItself:
    """What a provider that died half-way made and does not know of."""

    @pytest.fixture
    def target(self):
        return Target()

    @pytest.fixture
    def house(self, store_url, tmp_path, target):
        with house_on_outside(store_url, tmp_path, target=target) as made:
            yield made
            require_consistent(made.broker.database)

    def test_a_login_no_lease_accounts_for_is_ended_and_told(self, house, target):
        grant_id = new_id("grt", house.clock())
        target.logins.add(grant_id)
        house.clock.at += EVERY
        assert house.broker.reconciliation.run().logins == 1
        assert target.logins == set()
        (event,) = events(house, "login.found")
        assert (event.grant_id, event.data["target"], event.data["sessions"]) == (grant_id, "orders", 1)

    def test_a_login_that_is_held_or_being_made_is_left_alone(self, house, target):
        target.logins.add(ask(house).grant.id)
        assert house.broker.reconciliation.look_at_target("orders") == 0
        looked = []

        def look_meanwhile():
            page = house.broker.verification.page_of_grants(house.caller("ada"), {}, before=None, limit=1)
            target.logins.add(page[0][0].id)
            looked.append(house.broker.reconciliation.look_at_target("orders"))

        at(house, ("issue", "after"), look_meanwhile)
        ask(house)
        assert looked == [0] and len(target.logins) == 2

    def test_one_whose_grant_ended_and_was_paid_is_ended(self, house, target):
        issued = ask(house)
        target.logins.add(issued.grant.id)
        house.broker.revocation.revoke_grant(house.caller("ada"), issued.grant.id)
        assert house.broker.reconciliation.look_at_target("orders") == 1
        assert target.logins == set()

    def test_one_that_cannot_be_ended_keeps_no_other_alive_and_is_told_once(self, house, target):
        stuck, other = (new_id("grt", house.clock()) for _ in range(2))
        target.logins |= {stuck, other}
        end = target.end

        def refuse(login):
            if login.grant_id == stuck:
                raise ProviderRefused("the database refused to end a login")
            end(login)

        target.end = refuse
        for _ in range(3):
            with pytest.raises(ProviderRefused):
                house.broker.reconciliation.look_at_target("orders")
        assert target.logins == {stuck}
        assert sorted(event.grant_id for event in events(house, "login.found")) == sorted([stuck, other])
        target.end = end
        assert house.broker.reconciliation.look_at_target("orders") == 1
        assert target.logins == set()

    def test_one_that_ended_while_we_looked_is_nobody_s_news(self, house, target):
        target.logins.add(new_id("grt", house.clock()))
        listed = target.list_logins

        def once():
            found = listed()
            target.logins.clear()
            return found

        target.list_logins = once
        assert house.broker.reconciliation.look_at_target("orders") == 0
        assert events(house, "login.found") == []

    def test_a_database_that_does_not_answer_is_said_and_keeps_issuing_open(self, house, target):
        target.down = True
        house.clock.at += EVERY
        with pytest.raises(ProviderUnavailable):
            house.broker.reconciliation.run()
        assert ask(house).grant.state is GrantState.ACTIVE

    def test_while_the_provider_does_not_answer_its_logins_are_looked_at_once_a_minute(self, house, target):
        """It may have died half-way through making one."""
        listed, looks = target.list_logins, []
        target.list_logins = lambda: looks.append(house.clock()) or listed()
        house.outside.down = True
        target.logins.add(new_id("grt", house.clock()))
        for _ in range(3):
            house.clock.at += EVERY
            for _ in range(2):
                with pytest.raises(ProviderUnavailable):
                    house.broker.reconciliation.run()
        assert target.logins == set()
        assert sorted(set(looks)) == [house.clock() - 2 * EVERY, house.clock() - EVERY, house.clock()]
        # Once more where there was something to end.
        assert len(looks) == 4

    def test_what_nobody_heard_of_is_dead_when_the_database_shows_it_and_not_only_at_its_expiry(self, house, target):
        def made_and_lost():
            page = house.broker.verification.page_of_grants(house.caller("ada"), {}, before=None, limit=1)
            target.logins.add(page[0][0].id)
            house.outside.alive.clear()
            raise ProviderUnavailable("no answer")

        at(house, ("issue", "after"), made_and_lost)
        with pytest.raises(ProviderUnavailable):
            ask(house, house.open_task(deadline_s=3600), ttl=timedelta(seconds=900))
        house.broker.debts.pay()
        house.clock.forward(seconds=120)
        house.broker.debts.pay()
        assert target.logins != set() and states(house.broker.database) == [("failed", "revoking")]
        house.clock.at += OLD_ENOUGH
        look(house)
        house.clock.forward(seconds=10)
        house.broker.debts.pay()
        assert target.logins == set() and states(house.broker.database) == [("failed", "released")]
