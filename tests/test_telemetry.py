"""What is measured of the systems outside: from rows, so that every broker on the database says the same."""

import pytest
from prometheus_client import REGISTRY

from broker.domain.errors import BrokerError
from broker.domain.grant import GrantRequest
from broker.scheduler import jobs
from tests.fakes.outside import ORDERS, house_on_outside


@pytest.fixture
def house(store_url, tmp_path):
    with house_on_outside(store_url, tmp_path) as house:
        yield house


def issue(house, task):
    request = GrantRequest(
        caller=house.caller("summarizer"),
        task_id=task.id,
        resource=ORDERS,
        scopes=frozenset({"select"}),
        takes_secrets=True,
    )
    return house.broker.issuance.issue(request)


def run(house, name):
    next(job for known, job, _ in jobs(house.broker) if known == name)()


def value(name, **labels):
    return REGISTRY.get_sample_value(name, {"provider": "vault", **labels})


def test_leases_are_counted_by_state_and_the_oldest_debt_has_an_age(house):
    task = house.open_task()
    issue(house, task)
    first = issue(house, task)
    run(house, "measure")
    assert (value("broker_leases", state="held"), value("broker_oldest_debt_seconds")) == (2, 0)
    house.outside.down = True
    house.broker.revocation.revoke_grant(house.caller("summarizer"), first.grant.id)
    house.clock.forward(seconds=90)
    run(house, "measure")
    assert (value("broker_leases", state="held"), value("broker_leases", state="revoking")) == (1, 1)
    assert value("broker_oldest_debt_seconds") == 90
    house.pay(times=5)
    run(house, "measure")
    assert (value("broker_leases", state="revoking"), value("broker_leases", state="stuck")) == (0, 1)
    house.broker.leases.abandon(house.caller("ada"), first.lease.id, reason="scrapped")
    run(house, "measure")
    assert (value("broker_leases", state="stuck"), value("broker_oldest_debt_seconds")) == (1, 0)
    house.outside.down = False
    house.clock.forward(seconds=3600)
    house.broker.debts.pay()
    run(house, "measure")
    assert value("broker_leases", state="stuck") == 0


def test_the_time_from_the_end_of_authority_to_confirmed_death_is_measured(house):
    task = house.open_task()
    issued = issue(house, task)
    house.outside.down = True
    house.broker.revocation.revoke_grant(house.caller("summarizer"), issued.grant.id)
    house.outside.down = False
    before = {name: value(f"broker_confirmed_dead_seconds_{name}") or 0 for name in ("count", "sum")}
    house.pay()
    assert value("broker_confirmed_dead_seconds_count") - before["count"] == 1
    assert value("broker_confirmed_dead_seconds_sum") - before["sum"] == 61


def test_a_provider_is_reachable_when_the_last_look_at_it_was_complete(house):
    run(house, "measure")
    looked_at = house.clock()
    assert value("broker_provider_reachable") == 1
    assert value("broker_last_look_timestamp_seconds") == looked_at.timestamp()
    house.outside.down = True
    house.clock.forward(seconds=60)
    with pytest.raises(BrokerError):
        run(house, "reconcile")
    run(house, "measure")
    assert value("broker_provider_reachable") == 0
    assert value("broker_last_look_timestamp_seconds") == looked_at.timestamp()
    house.outside.down = False
    house.clock.forward(seconds=1)
    run(house, "reconcile")
    run(house, "measure")
    assert value("broker_provider_reachable") == 1


def test_a_provider_nobody_has_looked_at_is_not_called_reachable(store_url, tmp_path):
    with house_on_outside(store_url, tmp_path, looked=False) as house:
        run(house, "measure")
        assert (value("broker_provider_reachable"), value("broker_last_look_timestamp_seconds")) == (0, 0)


def test_what_is_found_outside_and_belongs_to_nobody_is_counted(house):
    name, labels = "broker_events_total", {"type": "lease.found", "outcome": "orphan"}
    before = REGISTRY.get_sample_value(name, labels) or 0
    house.outside.alive["database/creds/stranger"] = "nobody"
    house.clock.forward(seconds=60)
    run(house, "reconcile")
    assert REGISTRY.get_sample_value(name, labels) - before == 1
