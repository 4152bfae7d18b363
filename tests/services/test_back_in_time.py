"""A Vault or a database that was restored from before: nothing is issued until both were compared (INV-37)."""

import copy
from datetime import timedelta

import pytest

from broker.domain.errors import ProviderUnavailable, Unavailable
from broker.domain.lifecycle import GrantState, LeaseState
from broker.services.reconciliation import OLD_ENOUGH, Reconciliation
from tests.fakes.outside import Outside
from tests.leases import require_consistent, states
from tests.providers.contract import csr
from tests.vault_house import AGENTS, CLOUD, fake_vault, house_on_vault


@pytest.fixture
def fake():
    with fake_vault() as made:
        yield made


@pytest.fixture
def house(fake, store_url, tmp_path):
    with house_on_vault(fake, store_url, tmp_path) as made:
        yield made
        require_consistent(made.broker.database)


def snapshot(fake):
    """What Vault has on its disk. What lives at the target is not of it."""
    return copy.deepcopy((fake.tokens, fake.leases))


def restore(fake, taken):
    fake.tokens, fake.leases = copy.deepcopy(taken)


def end(house, issued):
    house.broker.revocation.revoke_grant(house.caller("ada"), issued.grant.id)


def lose_rows(house):
    """The database as it was before anything of this was in it, and after one look."""
    with house.broker.database.begin() as db:
        for table in ("leases", "grants"):
            db.exec_driver_sql(f"DELETE FROM {table}")
        db.exec_driver_sql("UPDATE provider_looks SET number = 1")


class TestVault:
    def test_one_that_forgot_the_broker_is_looked_at_before_more_is_issued(self, fake, house):
        before_the_broker_came = ({}, {})
        issued = house.ask()
        house.clock.forward(seconds=10)
        restore(fake, before_the_broker_came)
        with pytest.raises(Unavailable, match="not yet compared"):
            house.ask()
        # That it forgot us showed only when it was asked; from now on it is not asked.
        asked = len(fake.seen)
        with pytest.raises(Unavailable, match="not yet compared"):
            house.ask()
        assert len(fake.seen) == asked
        house.tick(1)
        assert house.ask().grant.state is GrantState.ACTIVE
        # What it forgot is over for us, and not called dead before it is over by itself (INV-04).
        found, live, lease = house.broker.verification.find_grant(house.caller("ada"), issued.grant.id)
        assert (found.state, live, lease.state) == (GrantState.REVOKED, False, LeaseState.REVOKING)
        house.clock.at = lease.expires_at - timedelta(seconds=1)
        house.tick(0)
        house.broker.debts.pay()
        assert house.lease_of(issued.grant.id).state is LeaseState.REVOKING

    def test_a_look_that_began_within_the_same_second_is_not_trusted(self, house):
        house.broker.reconciliation.run()
        house.broker.reconciliation.distrust("vault")
        with pytest.raises(Unavailable, match="not yet compared"):
            house.ask()
        house.tick(1)
        assert house.ask().grant.state is GrantState.ACTIVE

    def test_what_died_since_and_what_was_made_since_are_both_put_right_by_one_look(self, fake, house):
        died = house.ask()
        taken = snapshot(fake)
        house.clock.forward(seconds=10)
        end(house, died)
        made = house.ask()
        restore(fake, taken)
        house.clock.forward(seconds=200)
        house.tick()
        house.broker.debts.pay()
        assert [event.grant_id for event in house.events("lease.gone")] == [made.grant.id]
        assert len(house.events("lease.found")) == 1
        assert fake.leases == {}
        assert house.broker.verification.find_grant(house.caller("ada"), made.grant.id)[1] is False


class TestDatabase:
    def test_one_that_went_back_while_the_broker_runs_is_noticed_and_what_it_lost_is_killed(self, fake, house):
        for _ in range(2):
            house.tick()
        house.ask()
        assert len(fake.alive) == 1
        house.clock.forward(seconds=1)
        lose_rows(house)
        made = len(fake.seen)
        with pytest.raises(Unavailable, match="not yet compared"):
            house.ask()
        assert len(fake.seen) == made
        house.tick(1)
        # Too young: it may be of an issuer that is just committing it.
        assert len(fake.alive) == 1
        house.clock.forward(seconds=OLD_ENOUGH.seconds)
        house.tick()
        house.broker.debts.pay()
        assert fake.alive == set()
        assert house.ask().grant.state is GrantState.ACTIVE

    def test_a_broker_that_starts_on_an_older_database_looks_first(self, fake, house, store_url, tmp_path):
        house.ask()
        house.clock.forward(seconds=200)
        lose_rows(house)
        with house_on_vault(fake, store_url, tmp_path, looked=False) as restarted:
            restarted.broker.look_again()
            with pytest.raises(Unavailable, match="not yet compared"):
                restarted.ask()
            restarted.broker.reconciliation.run()
            restarted.broker.debts.pay()
            assert fake.alive == set()
            assert restarted.ask().grant.state is GrantState.ACTIVE

    def test_what_it_lost_is_dead_when_its_kind_is_and_not_when_it_was_revoked(self, fake, house):
        """INV-04: the rows that told its class are gone; the prefix it was found under still tells it."""
        certificate = house.ask(resource=AGENTS, parameters={"csr": csr()}, ttl=timedelta(seconds=1800))
        login = house.ask(resource=CLOUD, ttl=timedelta(seconds=1800))
        hard = house.ask(ttl=timedelta(seconds=1800))
        house.clock.forward(seconds=200)
        lose_rows(house)
        house.tick(1)
        assert len(house.events("lease.found")) == 3
        house.broker.debts.pay()
        now = house.clock()
        by_class = {lease.revocation_class: lease for lease in house.leases()}
        assert by_class["hard"].state is LeaseState.RELEASED
        assert now <= hard.credential.expires_at
        assert by_class["bounded"].state is LeaseState.REVOKING
        assert by_class["bounded"].dead_at == now + timedelta(seconds=60)
        assert by_class["ttl_only"].state is LeaseState.REVOKING
        assert by_class["ttl_only"].dead_at >= login.credential.expires_at
        house.settle()
        assert certificate.credential.expires_at <= house.clock()


def test_a_provider_that_does_not_answer_keeps_no_other_shut(house):
    silent, well = Outside(house.clock), Outside(house.clock)
    silent.down = True
    database = house.broker.database
    looking = Reconciliation(
        database=database, providers={"silent": silent, "well": well}, targets={}, clock=house.clock
    )
    with pytest.raises(ProviderUnavailable):
        looking.run()
    with database.begin() as db:
        looking.require_reconciled(db, "well", house.clock())
        with pytest.raises(Unavailable, match="not yet compared what silent"):
            looking.require_reconciled(db, "silent", house.clock())
    assert states(database) == []
