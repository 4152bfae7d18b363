"""Paying what is owed outside: nothing is called dead before it is, nobody who is afraid waits for a mass expiry."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
import sqlalchemy as sa

from broker.domain.errors import Conflict, NotFound, ProviderUnavailable, RoleMissing, Unavailable
from broker.domain.identity import new_id
from broker.domain.lease import STUCK_AFTER, Urgency, next_attempt
from broker.domain.lifecycle import LeaseState, TaskState
from broker.services import debts
from broker.store.database import in_transaction
from broker.store.leases import insert_leases
from tests.conftest import NOW
from tests.fakes.outside import AGENTS, HOSTS, LONGEST, Outside, house_on_outside
from tests.leases import require_consistent, states
from tests.services.test_secrets import ask
from tests.web.test_leases import certificate_request

SSH_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIO0bM1g6xJvYVYVxhPG4pmyqCkn8wR1z0eIuv0y1wKzY"


@pytest.fixture
def house(store_url, tmp_path):
    with house_on_outside(store_url, tmp_path, max_live_per_agent=10_000) as made:
        yield made
        require_consistent(made.broker.database)


def lease_of(house, issued):
    return house.broker.verification.find_grant(house.caller("ada"), issued.grant.id)[2]


def row(house, issued, **values):
    """Change what a row says, as nothing in the broker does."""
    with house.broker.database.begin() as db:
        names = ", ".join(f"{name} = :{name}" for name in values)
        db.execute(sa.text(f"UPDATE leases SET {names} WHERE grant_id = :id"), {**values, "id": issued.grant.id})


def revoke(house, issued, by="ada"):
    return house.broker.revocation.revoke_grant(house.caller(by), issued.grant.id).receipt


def certificate(house, task=None):
    return ask(house, task, resource=AGENTS, scope="connect", parameters={"csr": certificate_request()})


class TestBackOff:
    def test_it_doubles_from_a_second_to_a_minute_and_goes_on_for_ever(self):
        longest = [(next_attempt(n, now=NOW, chance=1.0) - NOW).total_seconds() for n in (1, 2, 5, 6, 7, 10_000)]
        assert longest == [2, 4, 32, 60, 60, 60]

    def test_it_is_spread_over_the_whole_of_it_and_never_at_once(self):
        assert next_attempt(6, now=NOW, chance=0.0) == NOW + timedelta(seconds=1)
        assert next_attempt(6, now=NOW, chance=0.5) == NOW + timedelta(seconds=30)
        assert len({next_attempt(6, now=NOW) for _ in range(50)}) > 10

    def test_what_failed_is_not_tried_before_its_time(self, house):
        issued = ask(house)
        house.outside.down = True
        revoke(house, issued)
        lease = lease_of(house, issued)
        assert lease.attempts == 1 and lease.next_attempt_at > house.clock()
        house.broker.debts.pay()
        assert lease_of(house, issued).attempts == 1


class TestStuck:
    def stuck(self, house):
        issued = ask(house)
        house.outside.down = True
        revoke(house, issued)
        house.pay(times=STUCK_AFTER - 1)
        return issued

    def test_after_six_failures_it_is_stuck_and_still_tried(self, house):
        issued = ask(house)
        house.outside.down = True
        revoke(house, issued)
        house.pay(times=STUCK_AFTER - 2)
        assert lease_of(house, issued).state is LeaseState.REVOKING
        house.pay()
        lease = lease_of(house, issued)
        assert (lease.state, lease.attempts) == (LeaseState.STUCK, STUCK_AFTER)
        house.pay(times=3)
        assert lease_of(house, issued).attempts == STUCK_AFTER + 3
        house.outside.down = False
        house.pay()
        assert lease_of(house, issued).state is LeaseState.RELEASED
        assert house.outside.alive == {}

    def test_an_admin_may_abandon_it_and_it_stays_open(self, house):
        issued = self.stuck(house)
        lease_id = lease_of(house, issued).id
        abandoned = house.broker.leases.abandon(house.caller("ada"), lease_id, reason="the cluster is gone")
        again = house.broker.leases.abandon(house.caller("ada"), lease_id, reason="another reason")
        assert again[0].abandoned_reason == abandoned[0].abandoned_reason == "the cluster is gone"
        receipt = house.broker.tasks.receipt_for(issued.grant.task_id).receipt.as_json()
        assert receipt["totals"]["outstanding"] == 1 and receipt["grants"][0]["confirmed_dead_at"] is None
        house.outside.down = False
        house.clock.forward(hours=2)
        house.broker.debts.pay()
        assert lease_of(house, issued).state is LeaseState.RELEASED

    def test_an_abandoned_one_is_tried_now_and_then_and_not_each_minute(self, house):
        issued = self.stuck(house)
        house.broker.leases.abandon(house.caller("ada"), lease_of(house, issued).id, reason="gone")
        house.pay(times=10)
        assert lease_of(house, issued).attempts == STUCK_AFTER + 1

    def test_only_a_stuck_one_and_only_by_an_admin(self, house):
        issued = ask(house)
        lease = lease_of(house, issued)
        with pytest.raises(Conflict, match="only one that is stuck"):
            house.broker.leases.abandon(house.caller("ada"), lease.id, reason="no")
        for name in ("audrey", "summarizer", "pipeline"):
            with pytest.raises(RoleMissing):
                house.broker.leases.abandon(house.caller(name), lease.id, reason="no")
        with pytest.raises(NotFound):
            house.broker.leases.abandon(house.caller("ada"), "lea_../../x", reason="no")


class TestNotDeadYet:
    """INV-04."""

    def test_a_provider_that_answers_without_confirming_releases_nothing(self, house):
        issued = ask(house)

        def queues(handle, reference):
            raise ProviderUnavailable("it has not confirmed that the lease died", reason="204 and still listed")

        house.outside.revoke = queues
        (line,) = revoke(house, issued).lines
        # Until its database lets it in no more, and not until its token would have ended it.
        assert line.confirmed_dead_at is None and line.exposed_until == issued.grant.issued_at + LONGEST
        assert lease_of(house, issued).state is LeaseState.REVOKING

    def test_a_bounded_one_is_dead_when_its_bound_has_passed(self, house):
        issued = certificate(house)
        (line,) = revoke(house, issued).lines
        assert (line.revocation_class, line.confirmed_dead_at) == ("bounded", None)
        assert line.exposed_until == house.clock() + timedelta(seconds=60)
        house.clock.forward(seconds=59)
        house.broker.debts.pay()
        assert lease_of(house, issued).state is LeaseState.REVOKING
        house.clock.forward(seconds=1)
        house.broker.debts.pay()
        lease = lease_of(house, issued)
        assert (lease.state, lease.dead_at) == (LeaseState.RELEASED, house.clock())

    def test_one_that_nothing_can_end_is_dead_at_its_own_expiry(self, house):
        issued = ask(house, resource=HOSTS, scope="login", parameters={"public_key": SSH_KEY})
        (line,) = revoke(house, issued).lines
        assert (line.revocation_class, line.confirmed_dead_at) == ("ttl_only", None)
        assert line.exposed_until == issued.credential.expires_at
        house.clock.at = issued.credential.expires_at - timedelta(seconds=1)
        house.broker.debts.pay()
        assert lease_of(house, issued).state is LeaseState.REVOKING
        house.clock.forward(seconds=1)
        house.broker.debts.pay()
        assert lease_of(house, issued).dead_at == issued.credential.expires_at

    def test_past_its_expiry_and_unconfirmed_nobody_knows_until_when_it_is_exposed(self, house):
        issued = ask(house)
        house.outside.down = True
        revoke(house, issued)
        house.clock.forward(hours=1)
        (line,) = house.broker.tasks.receipt_for(issued.grant.task_id).receipt.lines
        assert (line.confirmed_dead_at, line.exposed_until) == (None, None)

    def test_what_arrived_while_it_was_being_paid_is_not_released_with_it(self, house):
        issued = ask(house)
        original = house.outside.revoke

        def late(handle, reference):
            original(handle, reference)
            row(house, issued, reference="database/creds/another")

        house.outside.revoke = late
        revoke(house, issued)
        assert lease_of(house, issued).state is LeaseState.REVOKING


class TestOthersTrouble:
    def test_a_handle_that_cannot_be_read_is_that_debt_s_trouble_alone(self, house):
        task = house.open_task()
        bad, good = ask(house, task), ask(house, task)
        original = house.outside.revoke

        def revoke_(handle, reference):
            if handle is not None and handle.value == "../sys/seal":
                raise ValueError("not a handle that Vault gave")
            original(handle, reference)

        house.outside.revoke = revoke_
        row(house, bad, handle="../sys/seal")
        house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED)
        assert lease_of(house, good).state is LeaseState.RELEASED
        assert lease_of(house, bad).attempts == 1 and "ValueError" in lease_of(house, bad).last_error

    def test_a_class_that_cannot_be_read_is_that_debt_s_trouble_alone(self, house):
        task = house.open_task()
        bad, good = ask(house, task), ask(house, task)
        row(house, bad, revocation_class="soft")
        house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED)
        assert lease_of(house, good).state is LeaseState.RELEASED
        assert lease_of(house, bad).state is LeaseState.REVOKING

    def test_a_provider_that_is_configured_no_more_is_owed_and_said_so(self, house):
        issued = ask(house)
        row(house, issued, provider="other")
        revoke(house, issued)
        lease = lease_of(house, issued)
        assert lease.state is LeaseState.REVOKING and "other" in lease.last_error

    @pytest.mark.parametrize("answers", [RuntimeError("a fault of its own"), [None]], ids=["raises", "leaves one out"])
    def test_a_provider_with_a_fault_in_killing_several_kills_each(self, house, answers):
        task = house.open_task()
        both = [ask(house, task) for _ in range(2)]

        def revoke_many(owed, _at_once):
            if isinstance(answers, Exception):
                raise answers
            return answers

        house.outside.revoke_many = revoke_many
        house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED)
        assert {lease_of(house, issued).state for issued in both} == {LeaseState.RELEASED}
        assert house.outside.alive == {}


def test_a_worker_that_was_superseded_changes_nothing(house):
    """INV-07: it comes back with an answer when another has claimed the debt."""
    issued = ask(house)
    original = house.outside.revoke

    def slow(handle, reference):
        original(handle, reference)
        row(house, issued, fence=99)

    house.outside.revoke = slow
    revoke(house, issued)
    assert lease_of(house, issued).state is LeaseState.REVOKING

    def slow_and_failing(handle, reference):
        row(house, issued, fence=999)
        raise ProviderUnavailable("no answer")

    house.outside.revoke = slow_and_failing
    house.pay()
    assert lease_of(house, issued).attempts == 0
    house.outside.revoke = original
    house.pay()
    assert lease_of(house, issued).state is LeaseState.RELEASED


class TestUrgency:
    def test_who_ended_it_says_how_urgent_it_is(self, house):
        task = house.open_task()
        handed_back, revoked, bulk, expired = (ask(house, task) for _ in range(4))
        house.outside.down = True
        revoke(house, handed_back, by="summarizer")
        revoke(house, revoked)
        row(house, bulk, urgency=2)
        assert lease_of(house, handed_back).urgency == Urgency.ENDED
        assert lease_of(house, revoked).urgency == Urgency.URGENT
        house.clock.at = expired.grant.expires_at
        house.broker.sweeper.sweep()
        assert lease_of(house, expired).urgency == Urgency.EXPIRED

    def test_the_most_urgent_are_paid_first(self, house, monkeypatch):
        monkeypatch.setattr(debts, "_TOGETHER", 1)
        task = house.open_task()
        issued = [ask(house, task) for _ in range(6)]
        asked = []
        original = house.outside.revoke

        def noted(handle, reference):
            asked.append(handle.value)
            original(handle, reference)

        house.outside.revoke = noted
        for each, urgency in zip(issued, (2, 1, 0, 2, 1, 0), strict=True):
            row(
                house,
                each,
                state="revoking",
                urgency=urgency,
                next_attempt_at=0 if house.broker.database.is_sqlite else NOW,
            )
            with house.broker.database.begin() as db:
                ended = sa.text("UPDATE grants SET state = 'expired' WHERE id = :id")
                db.execute(ended, {"id": each.grant.id})
        house.broker.debts._pay_until_none("vault", together=1)
        assert [int(name.rsplit("-", 1)[1]) for name in asked] == [3, 6, 2, 5, 1, 4]

    def test_while_the_others_hang_an_urgent_one_is_paid(self, house, monkeypatch):
        """A mass expiry at a provider that hangs; what somebody is afraid of is paid by those who do nothing else."""
        monkeypatch.setattr(debts, "_TOGETHER", 1)
        task = house.open_task()
        many = [ask(house, task) for _ in range(20)]
        afraid = ask(house, house.open_task(), ttl=timedelta(seconds=600))
        go_on, original = threading.Event(), house.outside.revoke
        urgent_handle = lease_of(house, afraid).handle
        paid = threading.Event()

        def hangs(handle, reference):
            if handle.value != urgent_handle:
                assert go_on.wait(20)
            original(handle, reference)
            if handle.value == urgent_handle:
                paid.set()

        house.outside.revoke = hangs
        house.clock.at = many[0].grant.expires_at
        house.broker.sweeper.sweep()
        monkeypatch.setattr(house.broker.debts, "pay_now", lambda _ids: None)
        paying = threading.Thread(target=house.broker.debts.pay)
        paying.start()
        try:
            revoke(house, afraid)
            assert paid.wait(10)
            assert len(house.outside.alive) == 20
        finally:
            go_on.set()
            paying.join()
        assert house.outside.alive == {}

    def test_those_who_pay_what_is_urgent_outlive_a_store_that_did_not_answer(self, house, monkeypatch):
        """The others are at a backlog meanwhile, and nobody comes instead of them until that is done."""
        monkeypatch.setattr(debts, "_TOGETHER", 1)
        task = house.open_task()
        many = [ask(house, task) for _ in range(debts._WORKERS)]
        afraid = ask(house, house.open_task(), ttl=timedelta(seconds=600))
        urgent, go_on, paid = lease_of(house, afraid).handle, threading.Event(), threading.Event()
        failed, both_failed = [], threading.Event()
        original, claim = house.outside.revoke, debts.leases.claim_owed

        def hangs(handle, reference):
            if handle.value != urgent:
                assert go_on.wait(20)
            original(handle, reference)
            if handle.value == urgent:
                paid.set()

        def claim_owed(db, provider, **how):
            if how["at_most_urgency"] == Urgency.URGENT and len(failed) < debts._URGENT_WORKERS:
                failed.append(how)
                if len(failed) == debts._URGENT_WORKERS:
                    both_failed.set()
                raise Unavailable("the store did not answer")
            return claim(db, provider, **how)

        house.outside.revoke = hangs
        monkeypatch.setattr(debts.leases, "claim_owed", claim_owed)
        house.clock.at = many[0].grant.expires_at
        house.broker.sweeper.sweep()
        monkeypatch.setattr(house.broker.debts, "pay_now", lambda _ids: None)
        paying = threading.Thread(target=house.broker.debts.pay)
        paying.start()
        try:
            assert both_failed.wait(10)
            revoke(house, afraid)
            assert paid.wait(10)
        finally:
            go_on.set()
            paying.join()
        assert house.outside.alive == {}

    def test_a_mass_expiry_of_thousands_is_not_before_it(self, house, monkeypatch):
        """INV-27: at most what each worker has claimed already is paid before it."""
        expired = ask(house)
        afraid = ask(house, house.open_task(), ttl=timedelta(seconds=600))
        house.clock.at = expired.grant.expires_at
        house.broker.sweeper.sweep()
        owed = lease_of(house, expired)
        backlog = [
            replace(owed, id=new_id("lea", NOW), grant_id=None, handle=f"backlog-{number}") for number in range(2000)
        ]
        with house.broker.database.begin() as db:
            insert_leases(db, backlog)
        monkeypatch.setattr(house.broker.debts, "pay_now", lambda _ids: None)
        asked, begun = [], threading.Event()
        original = house.outside.revoke
        urgent = lease_of(house, afraid).handle

        def noted(handle, reference):
            asked.append(handle.value)
            if len(asked) >= 100:
                begun.set()
            original(handle, reference)

        house.outside.revoke = noted
        paying = threading.Thread(target=house.broker.debts.pay)
        paying.start()
        try:
            assert begun.wait(20)
            revoke(house, afraid)
            before = len(asked)
        finally:
            paying.join()
        assert len(asked) == 2002
        at_most = debts._WORKERS * debts._TOGETHER
        # Those that are claimed already, and those that come while the urgent one is claimed.
        assert asked.index(urgent) - before <= 2 * at_most


def test_a_provider_that_hangs_keeps_nobody_waiting_for_another(house, monkeypatch):
    """Each has workers of its own: in its turn, and for who waits."""
    monkeypatch.setattr(debts, "_TOGETHER", 1)
    monkeypatch.setattr(debts, "_CLOSED_TOGETHER", (1, 1))
    monkeypatch.setattr(house.broker.debts, "_providers", {"vault": house.outside, "other": Outside(house.clock)})
    task, others = house.open_task(), [ask(house, house.open_task()) for _ in range(2)]
    of_one = [ask(house, task) for _ in range(debts._CLOSERS + debts._WORKERS)]
    for each in others:
        row(house, each, provider="other")
    go_on, hanging, original = threading.Event(), threading.Semaphore(0), house.outside.revoke

    def hangs(handle, reference):
        hanging.release()
        assert go_on.wait(20)
        original(handle, reference)

    house.outside.revoke = hangs
    try:
        house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED)
        first = house.broker.debts.begin_to_pay()
        for _ in range(debts._CLOSERS + debts._WORKERS - debts._URGENT_WORKERS):
            assert hanging.acquire(timeout=10)
        revoke(house, others[0])
        assert lease_of(house, others[0]).state is LeaseState.RELEASED
        with monkeypatch.context() as only_in_turn:
            only_in_turn.setattr(house.broker.debts, "pay_now", lambda _ids: None)
            revoke(house, others[1])
        assert house.broker.debts.pay() == 1
        assert lease_of(house, others[1]).state is LeaseState.RELEASED
        assert lease_of(house, of_one[0]).state is LeaseState.REVOKING
        assert not any(paying.done() for paying in first)
    finally:
        go_on.set()
    assert sum(paying.result(20) for paying in first) == debts._WORKERS


def test_a_task_with_many_secrets_is_paid_before_its_receipt(house):
    task = house.open_task()
    for _ in range(20):
        ask(house, task)
    receipt = house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED).receipt.as_json()
    assert receipt["totals"] == {"ended": 20, "confirmed_dead": 20, "outstanding": 0}
    assert set(states(house.broker.database)) == {("revoked", "released")}


@pytest.mark.parametrize(
    ("grants", "together", "closers"), [(1, 8, 1), (8, 8, 1), (9, 8, 2), (100, 25, 4), (200, 50, 4), (5000, 50, 4)]
)
def test_what_is_closed_is_claimed_by_four_in_equal_parts_unless_it_is_little_or_very_much(
    house, monkeypatch, grants, together, closers
):
    claimed = []

    def claims(_db, _provider, **how):
        claimed.append(how["limit"])
        return []

    monkeypatch.setattr(debts.leases, "providers_owed_for", lambda *_about: ["vault"])
    monkeypatch.setattr(debts.leases, "claim_owed", claims)
    house.broker.debts.pay_now([f"grt_{number}" for number in range(grants)])
    assert claimed == [together] * closers


def test_of_what_is_closed_several_are_asked_about_at_once_and_no_more_than_it_is_said(house, monkeypatch):
    """Whatever the provider can: bounded for all closings together."""
    monkeypatch.setattr(debts, "_CLOSING_CALLS", 5)
    monkeypatch.setattr(debts, "_CLOSERS", 2)
    guard, under_way, most, original = threading.Lock(), [0], [0], house.outside.revoke

    def counted(handle, reference):
        with guard:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        threading.Event().wait(0.02)
        original(handle, reference)
        with guard:
            under_way[0] -= 1

    house.outside.revoke = counted
    task = house.open_task()
    for _ in range(20):
        ask(house, task)
    receipt = house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED).receipt.as_json()
    assert receipt["totals"]["confirmed_dead"] == 20
    assert most == [5 + 2]
    house.broker.debts.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("calls", "closings"))]


@pytest.mark.parametrize("secrets", [1, 3])
def test_who_closes_gets_on_though_all_who_help_hang(house, monkeypatch, secrets):
    """However much is being closed at a provider, the next is not last in a queue (INV-27)."""
    monkeypatch.setattr(debts, "_CLOSING_CALLS", 2)
    monkeypatch.setattr(debts, "_CLOSING_S", 5.0)
    go_on, hanging, original = threading.Event(), threading.Semaphore(0), house.outside.revoke
    large, small = house.open_task(), house.open_task()
    of_large = {ask(house, large).grant.id for _ in range(8)}
    of_small = [ask(house, small) for _ in range(secrets)]
    owed = {lease_of(house, issued).handle: issued for issued in of_small}

    def hangs(handle, reference):
        if handle.value not in owed:
            hanging.release()
            assert go_on.wait(20)
        original(handle, reference)

    house.outside.revoke = hangs
    with ThreadPoolExecutor(1) as aside:
        try:
            ending = aside.submit(house.broker.tasks.end, house.caller("pipeline"), large.id, TaskState.COMPLETED)
            for _ in range(3):
                assert hanging.acquire(timeout=10)
            house.broker.tasks.end(house.caller("pipeline"), small.id, TaskState.COMPLETED)
            assert {lease_of(house, issued).state for issued in of_small} == {LeaseState.RELEASED}
        finally:
            go_on.set()
        ending.result(20)
    assert len(of_large) == 8


def test_a_provider_that_is_called_in_a_transaction_is_found_out_by_whom_it_has_help(house):
    task = house.open_task()
    for _ in range(3):
        ask(house, task)
    lane, found = debts._Lane("vault"), []
    try:
        with house.broker.database.begin():
            found = list(lane.at_once(lambda _item: in_transaction(), range(8)))
    finally:
        lane.close()
    assert found == [True] * 8


def test_what_nobody_has_begun_with_is_left_when_a_step_breaks(monkeypatch):
    """Whoever asks goes on by another way, and is not to find it done twice."""
    monkeypatch.setattr(debts, "_CLOSING_CALLS", 1)
    lane, go_on, begun, taken = debts._Lane("vault"), threading.Event(), threading.Event(), []

    def step(item):
        if item == 0:
            begun.set()
            assert go_on.wait(20)
        if item == 4:
            assert begun.wait(20)
            raise RuntimeError("a fault")
        taken.append(item)

    try:
        with pytest.raises(RuntimeError):
            list(lane.at_once(step, range(5)))
    finally:
        go_on.set()
        lane.close()
    assert taken == [0]


def test_a_provider_that_hangs_delays_a_receipt_by_two_seconds_and_no_more(house, monkeypatch):
    monkeypatch.setattr(debts, "_CLOSING_S", 0.2)
    task = house.open_task()
    issued = ask(house, task)
    go_on = threading.Event()
    original = house.outside.revoke

    def hangs(handle, reference):
        assert go_on.wait(20)
        original(handle, reference)

    house.outside.revoke = hangs
    receipt = house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED).receipt.as_json()
    assert receipt["totals"] == {"ended": 1, "confirmed_dead": 0, "outstanding": 1}
    assert receipt["grants"][0]["authority_ended_at"] is not None
    assert not house.broker.verification.find_grant(house.caller("ada"), issued.grant.id)[1]
    go_on.set()


def test_debts_that_could_not_be_paid_are_said_though_nobody_waits_for_them(house, monkeypatch, caplog):
    issued = ask(house)
    monkeypatch.setattr(house.broker.debts, "pay_now", lambda _ids: None)
    revoke(house, issued)

    def away(*_about, **_how):
        raise Unavailable("the store did not answer")

    monkeypatch.setattr(debts.leases, "claim_owed", away)
    [paying] = house.broker.debts.begin_to_pay()
    with pytest.raises(Unavailable):
        paying.result(20)
    monkeypatch.undo()
    assert "debts were not paid" in [record.message for record in caplog.records]
    assert house.broker.debts.pay() == 1


@pytest.mark.parametrize("look", ["any_owed", "providers_owed_for"])
def test_who_looked_before_it_was_closed_sets_nobody_to_work_any_more(house, monkeypatch, look):
    """The workers are gone, or about to be."""
    issued = ask(house)
    with monkeypatch.context() as not_now:
        not_now.setattr(house.broker.debts, "pay_now", lambda _ids: None)
        revoke(house, issued)
    found = getattr(debts.leases, look)

    def looks_late(*about, **how):
        house.broker.debts.close()
        return found(*about, **how)

    monkeypatch.setattr(debts.leases, look, looks_late)
    if look == "any_owed":
        assert house.broker.debts.begin_to_pay() == []
    else:
        house.broker.debts.pay_now([issued.grant.id])
    assert lease_of(house, issued).state is LeaseState.REVOKING


def test_a_broker_that_is_told_to_stop_does_not_pay_a_whole_backlog_first(house):
    expired = ask(house)
    house.clock.at = expired.grant.expires_at
    house.broker.sweeper.sweep()
    owed = lease_of(house, expired)
    many = [replace(owed, id=new_id("lea", NOW), grant_id=None, handle=f"backlog-{number}") for number in range(2000)]
    with house.broker.database.begin() as db:
        insert_leases(db, many)
    asked, begun = [], threading.Event()

    def noted(handle, reference):
        asked.append(handle.value)
        if len(asked) >= 50:
            begun.set()

    house.outside.revoke = noted
    paying = threading.Thread(target=house.broker.debts.pay)
    paying.start()
    assert begun.wait(20)
    house.broker.debts.close()
    before = len(asked)
    paying.join(20)
    assert not paying.is_alive()
    # What was claimed already is paid.
    assert len(asked) - before <= 2 * debts._WORKERS * debts._TOGETHER
    assert house.broker.debts.pay() == 0
    house.broker.debts.pay_now([expired.grant.id])


def test_what_an_agent_sees_of_a_failure_says_nothing_of_the_set_up(house):
    issued = ask(house)

    def fails(handle, reference):
        raise ProviderUnavailable("Vault did not answer", reason="sys/leases/revoke/database: 403: policy jit-broker")

    house.outside.revoke = fails
    revoke(house, issued)
    assert "jit-broker" in lease_of(house, issued).last_error
    _, _, seen = house.broker.verification.find_grant(house.caller("summarizer"), issued.grant.id)
    assert "jit-broker" not in seen.last_error and "policy" not in seen.last_error
    assert replace(seen, last_error=None) == replace(lease_of(house, issued), last_error=None)
