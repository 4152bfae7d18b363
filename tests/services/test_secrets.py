"""The issue protocol: whatever happens between two steps, nothing is handed out that ended, and nothing lives on."""

from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import pytest

from broker.domain.errors import (
    BrokerError,
    Conflict,
    IdempotencyConflict,
    Invalid,
    InvalidTarget,
    LimitExceeded,
    ProviderRefused,
    ProviderUnavailable,
    Unavailable,
)
from broker.domain.grant import IdempotencyClaim
from broker.domain.lifecycle import GrantState, LeaseState, TaskState
from broker.services.secrets import ISSUE_WITHIN, Secrets
from broker.store import models
from tests.fakes.outside import AGENTS, LONGEST, ORDERS, PASSWORD, house_on_outside
from tests.house import CRM
from tests.leases import require_consistent, states


@pytest.fixture
def house(store_url, tmp_path):
    with house_on_outside(store_url, tmp_path) as made:
        yield made
        require_consistent(made.broker.database)


def ask(house, task=None, **more):
    wanted = {"resource": ORDERS, "scope": "select", "takes_secrets": True} | more
    return house.issue(task or house.open_task(), **wanted)


def settle(house):
    """Let everything that is owed come to its end, however long that takes."""
    for _ in range(12):
        house.clock.forward(seconds=181)
        house.broker.debts.recover()
        house.broker.sweeper.sweep()
        house.broker.debts.pay()
        house.broker.reconciliation.run()


def at(house, step, do):
    """Let something happen while the provider is asked, once: before it does what it is asked for, or when it did."""
    method, when = step
    original = getattr(house.outside, method)

    def interrupted(*arguments, **more):
        setattr(house.outside, method, original)
        if when == "before":
            do()
        answer = original(*arguments, **more)
        if when == "after":
            do()
        return answer

    setattr(house.outside, method, interrupted)


STEPS = [("prepare", "before"), ("prepare", "after"), ("issue", "before"), ("issue", "after")]


def complete(house, task):
    house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED)


def revoke_agent(house, task):
    house.broker.revocation.revoke_along(house.caller("ada"), "agent", "summarizer", reason="incident")


def lock_resource(house, task):
    house.broker.revocation.set_lockdown(house.caller("ada"), "resource", ORDERS, reason="incident")


def revoke_its_grant(house, task):
    page = house.broker.verification.page_of_grants(house.caller("ada"), {}, before=None, limit=1)
    house.broker.revocation.revoke_grant(house.caller("ada"), page[0][0].id)


def let_time_pass(house, task):
    house.clock.forward(seconds=901)


def let_time_pass_and_sweep(house, task):
    house.clock.forward(seconds=901)
    house.broker.sweeper.sweep()


def take_the_issuer_for_dead(house, task):
    house.clock.at += ISSUE_WITHIN
    assert house.broker.debts.recover() == 1


def take_it_for_dead_and_pay(house, task):
    take_the_issuer_for_dead(house, task)
    house.broker.debts.pay()


def apply_another_configuration(house, task):
    catalogue = house.broker.standing.now().catalogue
    house.broker.administration.apply(replace(catalogue, policies={}), by="tests")


MEANWHILE = [
    complete,
    revoke_agent,
    lock_resource,
    revoke_its_grant,
    let_time_pass,
    let_time_pass_and_sweep,
    take_the_issuer_for_dead,
    take_it_for_dead_and_pay,
    apply_another_configuration,
]


@pytest.mark.parametrize("meanwhile", MEANWHILE, ids=lambda verb: verb.__name__)
@pytest.mark.parametrize("step", STEPS, ids=" ".join)
def test_what_ended_while_it_was_made_is_not_handed_out_and_dies(house, step, meanwhile):
    task = house.open_task()
    at(house, step, lambda: meanwhile(house, task))
    with pytest.raises(BrokerError):
        ask(house, task)
    require_consistent(house.broker.database)
    settle(house)
    assert house.outside.alive == {}
    assert {lease for _, lease in states(house.broker.database)} == {"released"}


@pytest.mark.parametrize("step", STEPS, ids=" ".join)
def test_an_issuer_that_dies_leaves_an_intent_that_is_taken_up_when_its_time_is_over(house, step):
    def die():
        raise SystemExit

    at(house, step, die)
    with pytest.raises(SystemExit):
        ask(house)
    assert states(house.broker.database) == [("approved", "intended")]
    house.clock.at += ISSUE_WITHIN - timedelta(seconds=1)
    assert house.broker.debts.recover() == 0
    house.clock.forward(seconds=1)
    assert house.broker.debts.recover() == 1
    assert states(house.broker.database) == [("failed", "revoking")]
    settle(house)
    assert house.outside.alive == {}
    assert states(house.broker.database) == [("failed", "released")]


class TestWhatIsOwedAfterAFailure:
    def fails(self, house, step, problem):
        def fail():
            raise problem

        at(house, step, fail)
        with pytest.raises(type(problem) if isinstance(problem, BrokerError) else Unavailable):
            ask(house)

    def lease(self, house):
        (lease,) = (lease for lease, _ in house.broker.leases.page(house.caller("ada"), {}))
        return lease

    def test_before_there_is_a_handle_nothing_is_owed(self, house):
        self.fails(house, ("prepare", "before"), ProviderUnavailable("no answer"))
        house.broker.debts.pay()
        assert states(house.broker.database) == [("failed", "released")]

    def test_what_was_refused_was_not_made_and_its_token_is_all_that_is_owed(self, house):
        self.fails(house, ("issue", "before"), ProviderRefused("no"))
        lease = self.lease(house)
        assert (lease.state, lease.unknown, lease.handle) == (LeaseState.REVOKING, False, "accessor-1")
        house.broker.debts.pay()
        assert self.lease(house).state is LeaseState.RELEASED

    @pytest.mark.parametrize("problem", [ProviderUnavailable("no answer"), RuntimeError("a fault of its own")])
    def test_what_nobody_heard_of_counts_as_made_until_it_can_no_longer_appear(self, house, problem):
        """INV-04, INV-05: its token dies at once, and the debt is open until the secret would have ended by itself."""
        self.fails(house, ("issue", "after"), problem)
        lease = self.lease(house)
        assert (lease.state, lease.unknown, lease.reference) == (LeaseState.REVOKING, True, None)
        house.broker.debts.pay()
        assert house.outside.alive == {}
        while house.clock() < lease.expires_at:
            assert self.lease(house).state is LeaseState.REVOKING
            house.clock.forward(seconds=30)
            house.broker.reconciliation.run()
            house.broker.debts.pay()
        settle(house)
        released = self.lease(house)
        assert released.state is LeaseState.RELEASED and released.dead_at >= lease.expires_at

    def test_what_nobody_heard_of_is_not_released_before_everything_alive_was_looked_at_again(self, house):
        self.fails(house, ("issue", "after"), ProviderUnavailable("no answer"))
        for _ in range(20):
            house.clock.forward(seconds=61)
            house.broker.debts.pay()
        assert self.lease(house).state is LeaseState.REVOKING
        house.broker.reconciliation.run()
        house.clock.forward(seconds=61)
        house.broker.debts.pay()
        assert self.lease(house).state is LeaseState.RELEASED

    def test_a_secret_that_must_not_be_used_is_known_by_its_reference(self, house):
        made = {}
        original = house.outside.issue

        def issue(*arguments):
            made["secret"] = original(*arguments)
            raise ProviderUnavailable("it must not be used", reference=made["secret"].reference)

        house.outside.issue = issue
        with pytest.raises(ProviderUnavailable):
            ask(house)
        lease = self.lease(house)
        assert (lease.reference, lease.unknown) == (made["secret"].reference, False)
        house.broker.debts.pay()
        assert house.outside.alive == {} and self.lease(house).state is LeaseState.RELEASED

    def test_one_nobody_heard_of_is_not_called_dead_while_the_longest_life_of_its_role_is_not_over(self, house):
        """INV-04: a database user is let in until its own VALID UNTIL, if the outside forgot it, whatever was asked."""
        began = house.clock()

        def lost(*_arguments):
            raise ProviderUnavailable("it did not answer", reason="the connection broke")

        at(house, ("issue", "after"), lost)
        with pytest.raises(ProviderUnavailable):
            ask(house, ttl=timedelta(seconds=60))
        while states(house.broker.database) != [("failed", "released")]:
            house.clock.forward(seconds=30)
            house.broker.debts.pay()
            house.broker.reconciliation.run()
            assert house.clock() < began + 2 * LONGEST
        assert house.clock() >= began + LONGEST + house.outside.settles_after

    def test_what_arrives_after_its_lease_was_released_is_a_debt_of_its_own(self, house):
        def end_and_forget():
            revoke_its_grant(house, None)
            settle(house)
            assert states(house.broker.database) == [("revoked", "released")]

        task = house.open_task(deadline_s=7200)
        at(house, ("issue", "before"), end_and_forget)
        with pytest.raises(BrokerError):
            ask(house, task)
        assert states(house.broker.database) == [("revoked", "released"), ("revoked", "revoking")]
        assert len(house.outside.alive) == 1
        house.broker.debts.pay()
        assert house.outside.alive == {}


@contextmanager
def store_fails(house, transaction, *, committed):
    """The store does not say whether the issuing transaction of this number was committed; it was, or was not."""
    database, count = house.broker.database, 0
    original = database.begin_issuing

    @contextmanager
    def begin_issuing():
        nonlocal count
        count += 1
        number = count
        with original() as db:
            yield db
            if number == transaction and not committed:
                raise Unavailable("the store did not answer")
        if number == transaction:
            raise Unavailable("the store did not answer")

    database.begin_issuing = begin_issuing
    yield
    database.begin_issuing = original


@pytest.mark.parametrize("committed", [True, False], ids=["committed", "not committed"])
@pytest.mark.parametrize("transaction", [1, 2, 3], ids=["TX 1", "TX 2", "TX 3"])
def test_an_unknown_commit_hands_nothing_out_and_is_cleaned_up_as_if_it_was(house, transaction, committed):
    """INV-05."""
    task = house.open_task()
    with store_fails(house, transaction, committed=committed), pytest.raises(Unavailable):
        ask(house, task)
    settle(house)
    assert house.outside.alive == {}
    assert {lease for _, lease in states(house.broker.database)} <= {"released"}
    grants = house.broker.verification.page_of_grants(house.caller("ada"), {}, before=None, limit=10)
    assert not any(live for _, live, _ in grants)


def test_while_the_store_is_down_the_intent_waits_for_recovery(house):
    database, original = house.broker.database, house.broker.database.begin

    @contextmanager
    def down():
        raise Unavailable("the store did not answer")
        yield

    def fail():
        database.begin = down
        raise ProviderUnavailable("no answer")

    at(house, ("issue", "after"), fail)
    try:
        with pytest.raises(ProviderUnavailable):
            ask(house)
    finally:
        database.begin = original
    assert states(house.broker.database) == [("approved", "intended")]
    settle(house)
    assert house.outside.alive == {} and states(house.broker.database) == [("failed", "released")]


class TestTheSameRequestAgain:
    """INV-06."""

    claim = IdempotencyClaim(key_sha256="a" * 64, request_sha256="b" * 64)

    def test_a_secret_that_may_have_been_lost_is_replaced_and_the_first_dies(self, house):
        task = house.open_task()
        first = ask(house, task, idempotency=self.claim)
        second = ask(house, task, idempotency=self.claim)
        assert second.grant.id != first.grant.id
        found, live, lease = house.broker.verification.find_grant(house.caller("ada"), first.grant.id)
        assert (found.state, live, lease.state) == (GrantState.REVOKED, False, LeaseState.REVOKING)
        house.broker.debts.pay()
        assert len(house.outside.alive) == 1
        third = ask(house, task, idempotency=self.claim)
        assert third.grant.id not in (first.grant.id, second.grant.id)

    def test_after_a_failure_it_is_tried_anew(self, house):
        task = house.open_task()
        house.outside.down = True
        with pytest.raises(ProviderUnavailable):
            ask(house, task, idempotency=self.claim)
        house.outside.down = False
        assert ask(house, task, idempotency=self.claim).grant.state is GrantState.ACTIVE

    def test_while_the_first_is_being_answered_it_waits(self, house):
        task = house.open_task()
        answers = []

        def again():
            with pytest.raises(Unavailable, match="just being answered"):
                ask(house, task, idempotency=self.claim)
            answers.append("refused")

        at(house, ("issue", "before"), again)
        ask(house, task, idempotency=self.claim)
        assert answers == ["refused"] and len(house.outside.alive) == 1

    def test_with_another_body_it_is_refused(self, house):
        task = house.open_task()
        ask(house, task, idempotency=self.claim)
        with pytest.raises(IdempotencyConflict):
            ask(house, task, idempotency=replace(self.claim, request_sha256="c" * 64))

    def test_after_it_was_handed_back_it_is_over(self, house):
        task = house.open_task()
        first = ask(house, task, idempotency=self.claim)
        house.broker.revocation.revoke_grant(house.caller("summarizer"), first.grant.id)
        with pytest.raises(Conflict):
            ask(house, task, idempotency=self.claim)

    def test_the_limit_is_not_reached_by_what_it_replaces(self, store_url, tmp_path):
        with house_on_outside(store_url, tmp_path, max_live_per_agent=1) as house:
            task = house.open_task()
            ask(house, task, idempotency=self.claim)
            ask(house, task, idempotency=self.claim)
            with pytest.raises(LimitExceeded):
                ask(house, task)


def test_what_is_being_made_counts_toward_the_limit(store_url, tmp_path):
    """INV-34: else as many as there are threads could be made beyond it."""
    with house_on_outside(store_url, tmp_path, max_live_per_agent=1) as house:
        task = house.open_task()
        refused = []

        def another():
            with pytest.raises(LimitExceeded) as problem:
                ask(house, task)
            refused.append(problem.value)

        at(house, ("issue", "before"), another)
        ask(house, task)
        assert len(refused) == 1


class TestWhatMakesNoSense:
    def test_a_token_endpoint_cannot_carry_a_secret(self, house):
        with pytest.raises(InvalidTarget, match="POST /v1/grants"):
            ask(house, takes_secrets=False)
        assert states(house.broker.database) == []

    def test_a_proof_of_possession_is_refused_and_not_ignored(self, house):
        with pytest.raises(Invalid) as refused:
            ask(house, jkt="x" * 43)
        assert refused.value.member == "DPoP"

    def test_parameters_for_a_token_are_refused(self, house):
        with pytest.raises(Invalid) as refused:
            house.issue(house.open_task(), parameters={"csr": "x"}, resource=CRM)
        assert refused.value.member == "parameters"

    def test_a_secret_is_not_renewed(self, house):
        issued = ask(house)
        with pytest.raises(Invalid, match="is not renewed"):
            house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=None)

    def test_parameters_that_cannot_be_read_begin_nothing(self, house):
        with pytest.raises(Invalid):
            house.issue(
                house.open_task(), scope="connect", resource=AGENTS, takes_secrets=True, parameters={"csr": "no"}
            )
        assert states(house.broker.database) == []

    def test_a_provider_that_fails_at_it_fails_no_other_request(self, house, monkeypatch):
        monkeypatch.setattr(house.outside, "foresee", lambda _request, _ttl: {}["missing"])
        with pytest.raises(Unavailable, match="try again"):
            ask(house)
        assert states(house.broker.database) == []


def test_the_secret_itself_is_in_no_row(house):
    """INV-30."""
    issued = ask(house)
    assert issued.credential.data.reveal()["password"] == PASSWORD
    with house.broker.database.engine.connect() as db:
        for table in ("grants", "leases", "events", "idempotency_keys", "configuration_versions"):
            assert PASSWORD not in repr(db.exec_driver_sql(f"SELECT * FROM {table}").fetchall())
    assert PASSWORD not in repr(issued)


def test_a_ceiling_that_shrank_while_the_provider_was_asked_stays_shrunk(house):
    """INV-10: the row says when it ends, and not what was intended."""
    until = house.clock() + timedelta(seconds=30)
    task = house.open_task()

    def shrink():
        table = models.table_of(models.Grant)
        with house.broker.database.begin() as db:
            db.execute(table.update().where(table.c.task_id == task.id).values(expires_at=until))

    at(house, ("issue", "after"), shrink)
    issued = ask(house, task)
    assert issued.grant.expires_at == until
    assert house.broker.verification.find_grant(house.caller("ada"), issued.grant.id)[0].expires_at == until


def test_a_grant_ends_with_its_secret_where_that_ends_earlier(house):
    """INV-08."""
    until = house.clock() + timedelta(seconds=30)
    ends(house, until)
    issued = ask(house)
    assert issued.grant.expires_at == issued.credential.expires_at == until
    assert house.broker.verification.find_grant(house.caller("ada"), issued.grant.id)[0].expires_at == until


def test_a_secret_that_is_over_before_it_is_confirmed_is_not_handed_out(house):
    ends(house, house.clock())
    with pytest.raises(Unavailable, match="longer than it would have lived"):
        ask(house)
    assert states(house.broker.database) == [(GrantState.FAILED, LeaseState.REVOKING)]
    house.broker.debts.pay()
    assert house.outside.alive == {}


def ends(house, moment):
    """The next secret ends then, whatever was asked for."""
    issue = house.outside.issue
    house.outside.issue = lambda *arguments: replace(issue(*arguments), expires_at=moment)


def test_what_was_handed_down_of_a_secret_whose_confirmation_nobody_heard_ends_with_it(house, monkeypatch):
    """INV-05, INV-11: it counts as made, so a part of it may be out."""
    task, parts = house.open_task(), []
    confirm = Secrets._confirm

    def unheard(self, intent, *arguments):
        issued = confirm(self, intent, *arguments)
        monkeypatch.setattr(Secrets, "_confirm", confirm)
        parts.append(ask(house, task, parent_grant_id=issued.grant.id))
        raise Unavailable("the connection broke")

    monkeypatch.setattr(Secrets, "_confirm", unheard)
    with pytest.raises(BrokerError):
        ask(house, task)
    grant = house.broker.verification.find_grant(house.caller("ada"), parts[0].grant.id)[0]
    assert grant.parent_grant_id is not None and grant.state is GrantState.REVOKED
