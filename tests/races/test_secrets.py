"""A secret from outside against everything that ends it, by two brokers on one database, forced at every step."""

from dataclasses import replace
from datetime import timedelta

import pytest

from broker.domain.errors import BrokerError, LimitExceeded, LockedDown, Unavailable
from broker.domain.grant import IdempotencyClaim
from broker.domain.lifecycle import TaskState
from broker.providers.vault import VaultProvider
from broker.services import debts, reconciliation, secrets
from broker.services.secrets import ISSUE_WITHIN, Secrets
from broker.store import leases
from tests.leases import require_consistent, states
from tests.races.conftest import Race
from tests.vault_house import fake_vault, house_on_vault

CREDS = "GET database/creds/"


@pytest.fixture
def race(store_url, tmp_path, monkeypatch, threads):
    with (
        fake_vault() as fake,
        house_on_vault(fake, store_url, tmp_path, max_live_per_agent=20) as one,
        house_on_vault(fake, store_url, tmp_path, max_live_per_agent=20) as other,
    ):
        built = Race(one, other, threads, monkeypatch)
        yield built
        built.looking.dispose()
        require_consistent(one.broker.database)


def complete(race, task, grant_id):
    race.other.broker.tasks.end(race.other.caller("pipeline"), task.id, TaskState.COMPLETED)


def revoke(race, task, grant_id):
    race.other.broker.revocation.revoke_grant(race.other.caller("ada"), grant_id)


def revoke_agent(race, task, grant_id):
    race.other.broker.revocation.revoke_along(race.other.caller("ada"), "agent", "summarizer", reason="incident")


def lock_down(race, task, grant_id):
    race.other.broker.revocation.set_lockdown(race.other.caller("ada"), "task", task.id, reason="incident")


def expire(race, task, grant_id):
    race.other.clock.forward(seconds=301)
    race.other.broker.sweeper.sweep()


def take_for_dead(race, task, grant_id):
    race.other.clock.at += ISSUE_WITHIN
    race.other.broker.debts.recover()


def change_the_configuration(race, task, grant_id):
    catalogue = race.other.broker.standing.now().catalogue
    race.other.broker.administration.apply(replace(catalogue, policies={}), by="tests")


ENDS = [complete, revoke, revoke_agent, lock_down, expire, take_for_dead, change_the_configuration]
# Of each step the moment before it, and of the transactions also one inside, with their locks held.
STEPS = {
    "before the token": (VaultProvider, "prepare", {}),
    "before TX 2": (Secrets, "_commit_handle", {}),
    "in TX 2": (leases, "note", {"after": True}),
    "before the secret": (VaultProvider, "issue", {}),
    "before TX 3": (Secrets, "_confirm", {}),
    "in TX 3, its grant moved": (secrets, "move", {"after": True}),
    "in TX 3, its lease moved": (secrets, "move", {"after": True, "passing": 1}),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_whatever_ends_it_at_whatever_step_ends_it_and_fails_for_nobody(race, step, end):
    """INV-01, INV-03, INV-11, INV-12, INV-27."""
    owner, name, how = STEPS[step]
    task = race.one.open_task()
    pause = race.stop(owner, name, **how)
    issuing = race.start(race.one.ask, task)
    pause.until_reached(issuing)
    (grant_id,) = [row.id for row in race.rows("SELECT id FROM grants")]
    ending = race.start(end, race, task, grant_id)
    race.until_they_wait(ending)
    pause.go_on()
    # It waits at most for the one transaction that holds what it wants, and never fails because of it.
    assert ending.exception(timeout=30) is None
    refusal = issuing.exception(timeout=30)
    assert refusal is None or isinstance(refusal, BrokerError)
    if step.startswith("before"):
        assert refusal is not None
    race.one.settle()
    assert race.one.fake.alive == set()
    assert {lease for _, lease in states(race.one.broker.database)} == {"released"}
    assert race.live_under_ended_tasks() == []


def test_a_revocation_whose_rows_have_not_followed_yet_lets_nothing_out(race):
    """INV-11: its broker died behind the one commit that is the revocation."""
    pause = race.stop(Secrets, "_confirm")
    issuing = race.start(race.one.ask)
    pause.until_reached(issuing)
    race.monkeypatch.setattr(race.other.broker.revocation, "follow", lambda *_, **__: 0)
    revoke_agent(race, None, None)
    assert states(race.one.broker.database) == [("approved", "intended")]
    pause.go_on()
    assert isinstance(issuing.exception(timeout=30), LockedDown)
    race.one.settle()
    assert race.one.fake.alive == set()


def test_what_is_learned_while_a_debt_is_being_paid_is_paid_at_once(race):
    """The payer had asked about the token alone, and would wait until nothing more can appear under it."""
    task = race.one.open_task()
    learned = race.stop(Secrets, "_confirm")
    issuing = race.start(race.one.ask, task)
    learned.until_reached(issuing)
    paying = race.stop(VaultProvider, "revoke", after=True)
    ending = race.start(complete, race, task, None)
    paying.until_reached(ending)
    learned.go_on()
    assert isinstance(issuing.exception(timeout=30), BrokerError)
    paying.go_on()
    assert ending.exception(timeout=30) is None
    race.one.broker.debts.pay()
    # By us, or by the one that was stopped and claimed it once more.
    race.until(lambda: states(race.one.broker.database) == [("revoked", "released")])
    assert race.one.fake.alive == set()


def test_a_token_that_is_learned_of_while_its_debt_is_being_paid_is_not_released_with_it(race):
    """The task ends between the token and TX 2: who pays finds nothing to ask for, and would be done."""
    task = race.one.open_task()
    before = race.stop(Secrets, "_commit_handle")
    issuing = race.start(race.one.ask, task)
    before.until_reached(issuing)
    paying = race.stop(debts.Debts, "_release")
    ending = race.start(complete, race, task, None)
    paying.until_reached(ending)
    before.go_on()
    assert isinstance(issuing.exception(timeout=30), BrokerError)
    paying.go_on()
    assert ending.exception(timeout=30) is None
    race.one.broker.debts.pay()
    race.until(lambda: {lease for _, lease in states(race.one.broker.database)} == {"released"})
    assert [token for token in race.one.fake.tokens.values() if "jit-secrets" in token.policies] == []


def test_two_payers_of_one_debt_release_it_once_and_only_by_the_last_to_claim_it(race):
    """INV-07."""
    race.monkeypatch.setattr(debts, "_CLAIMED_AGAIN_S", 60)
    # One worker each, or another of the first one's claims it as soon as its claim is over.
    race.monkeypatch.setattr(debts, "_WORKERS", 1)
    race.monkeypatch.setattr(debts, "_URGENT_WORKERS", 0)
    issued = race.one.ask()
    race.monkeypatch.setattr(race.one.broker.debts, "pay_now", lambda _grants: None)
    race.one.broker.revocation.revoke_grant(race.one.caller("ada"), issued.grant.id)
    pause = race.stop(VaultProvider, "revoke", after=True)
    first = race.start(race.one.broker.debts.pay)
    pause.until_reached(first)
    race.one.clock.forward(seconds=21)
    assert race.other.broker.debts.pay() == 1
    pause.go_on()
    assert first.result(timeout=30) == 0
    assert len(race.one.events("lease.released")) == 1


def test_who_is_slow_with_a_debt_keeps_it_as_long_as_it_lives(race):
    """Otherwise a slow Vault is asked by one after the other, and none may say what came of it."""
    race.monkeypatch.setattr(debts, "_CLAIMED_AGAIN_S", 0.05)
    issued = race.one.ask()
    race.monkeypatch.setattr(race.one.broker.debts, "pay_now", lambda _grants: None)
    race.one.broker.revocation.revoke_grant(race.one.caller("ada"), issued.grant.id)
    pause = race.stop(VaultProvider, "revoke", after=True)
    first = race.start(race.one.broker.debts.pay)
    pause.until_reached(first)
    for _ in range(5):
        claimed_until = race.rows("SELECT next_attempt_at FROM leases")[0].next_attempt_at
        race.one.clock.forward(seconds=12)
        race.until(lambda before=claimed_until: race.rows("SELECT next_attempt_at FROM leases")[0][0] > before)
        assert race.other.broker.debts.pay() == 0
    pause.go_on()
    assert first.result(timeout=30) == 1


def test_two_that_look_at_once_owe_an_orphan_once(race):
    """INV-03, and one alert for it."""
    race.one.ask()
    race.one.clock.forward(seconds=200)
    database = race.one.broker.database
    with database.begin() as db:
        for statement in ("DELETE FROM leases", "DELETE FROM grants"):
            db.exec_driver_sql(statement)
    pause = race.stop(reconciliation.leases, "open_references", after=True)
    first, second = race.run_into(
        lambda: race.one.broker.reconciliation.look("vault"),
        pause,
        lambda: race.other.broker.reconciliation.look("vault"),
    )
    assert sorted([first.answer, second.answer]) == [(0, 0), (1, 0)]
    assert len(race.one.events("lease.found")) == 1
    race.one.broker.debts.pay()
    assert race.one.fake.alive == set()


def test_a_secret_that_is_found_gone_while_an_admin_revokes_it_is_ended_by_both(race):
    issued = race.one.ask()
    race.one.fake.leases.clear()
    pause = race.stop(reconciliation, "end_grants", after=True)
    looking, revoking = race.run_into(
        lambda: race.one.broker.reconciliation.look("vault"),
        pause,
        lambda: race.other.broker.revocation.revoke_grant(race.other.caller("ada"), issued.grant.id),
    )
    assert (looking.refusal, revoking.refusal) == (None, None)
    assert looking.answer == (0, 1)
    assert len(race.one.events("grant.revoked")) == 1


def test_a_look_does_not_kill_what_is_being_confirmed(race):
    """Vault lists it, and our rows do not know its name yet."""
    pause = race.stop(Secrets, "_confirm")
    issuing = race.start(race.one.ask)
    pause.until_reached(issuing)
    assert race.other.broker.reconciliation.look("vault") == (0, 0)
    pause.go_on()
    assert issuing.result(timeout=30).credential.data.reveal()["username"] in race.one.fake.alive
    assert race.other.broker.reconciliation.look("vault") == (0, 0)
    assert states(race.one.broker.database) == [("active", "held")]


def test_limits_count_what_is_being_made(race):
    """INV-34: approved ones count, on both brokers."""
    task = race.one.open_task()
    houses = [race.one, race.other] * 15
    asking = [race.start(house.ask, task) for house in houses]
    refusals = [future.exception(timeout=60) for future in asking]
    given = [future.result().credential.data.reveal()["username"] for future in asking if future.exception() is None]
    assert len(given) <= 20 and set(given) <= race.one.fake.alive
    assert all(isinstance(refusal, LimitExceeded | Unavailable | None) for refusal in refusals)
    assert sum(isinstance(refusal, LimitExceeded) for refusal in refusals) >= 1
    assert len(race.rows("SELECT id FROM grants WHERE state IN ('approved', 'active')")) == len(given)


def test_one_idempotency_key_at_both_brokers_gives_one_secret_that_lives(race):
    """INV-06."""
    task = race.one.open_task()
    claim = IdempotencyClaim(key_sha256="a" * 64, request_sha256="b" * 64)
    asking = [race.start(house.ask, task, idempotency=claim) for house in (race.one, race.other) * 4]
    refusals = [future.exception(timeout=60) for future in asking]
    assert any(refusal is None for refusal in refusals)
    assert all(isinstance(refusal, Unavailable | None) for refusal in refusals)
    race.one.broker.debts.pay()
    assert len(race.one.fake.alive) == 1
    live = race.rows("SELECT id FROM grants WHERE state IN ('active', 'approved')")
    assert len(live) == 1


def test_an_issuer_that_was_only_slow_finds_that_it_was_taken_for_dead(race):
    """INV-07: recovery is stopped with its transaction open, and the confirmation runs into it."""
    before = race.stop(Secrets, "_confirm")
    issuing = race.start(race.one.ask)
    before.until_reached(issuing)
    race.other.clock.at += ISSUE_WITHIN
    pause = race.stop(debts, "end_grants", after=True)
    recovering = race.start(race.other.broker.debts.recover)
    pause.until_reached(recovering)
    before.go_on()
    race.until_they_wait(issuing)
    pause.go_on()
    assert recovering.result(timeout=30) == 1
    assert isinstance(issuing.exception(timeout=30), BrokerError)
    race.one.settle()
    assert race.one.fake.alive == set()


def test_a_confirmation_that_is_under_way_is_not_taken_for_dead(race):
    pause = race.stop(secrets, "move", after=True, passing=1)
    issuing = race.start(race.one.ask)
    pause.until_reached(issuing)
    race.other.clock.at += ISSUE_WITHIN + timedelta(seconds=1)
    recovering = race.start(race.other.broker.debts.recover)
    race.until_they_wait(recovering)
    pause.go_on()
    assert recovering.result(timeout=30) == 0
    assert issuing.exception(timeout=30) is None
    assert states(race.one.broker.database) == [("active", "held")]
