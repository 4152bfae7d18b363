"""One-time things and limits, asked for by many at once over two brokers."""

from dataclasses import replace
from datetime import timedelta

import pytest
import sqlalchemy as sa

from broker.domain.errors import IdempotencyConflict, InvalidProof, LimitExceeded, Unauthenticated
from broker.domain.grant import IdempotencyClaim
from broker.services import idempotency, issuance, proofs, status_indexes
from broker.services.proofs import ASSERTION, joined
from broker.store.standing import STATUS_LIST_SIZE
from tests.house import ISSUER, build_house, catalogue_for
from tests.workloads import dpop_proof, issuer_key

MANY = 50
TOKEN_URL = f"{ISSUER}/oauth2/token"


def held_back(race, first, verbs, pause):
    """`first` stopped before its commit, all the others in front of it; then all to the end."""
    running = race.start(first)
    pause.until_reached(running)
    others = [race.start(verb) for verb in verbs]
    # No more than a pool of connections can stand in front of the database itself; the others queue before it.
    race.until_they_wait(*others, waiting=min(len(others), 8))
    pause.go_on()
    return [running, *others]


def split(futures):
    """(answers, refusals)."""
    refusals = [future.exception() for future in futures]
    return [future.result() for future, refusal in zip(futures, refusals, strict=True) if refusal is None], [
        refusal for refusal in refusals if refusal is not None
    ]


def test_of_fifty_uses_of_one_dpop_proof_at_once_one_wins(race):
    """INV-20: the others wait for the first one's commit, and are refused by it."""
    proof = dpop_proof(issuer_key(), url=TOKEN_URL, now=race.one.clock())

    def use(house):
        return lambda: house.broker.proofs.verify_dpop(proof, method="POST", url=TOKEN_URL, now=house.clock())

    pause = race.stop(proofs, "consume", after=True)
    houses = (race.one, race.other)
    uses = held_back(race, use(race.one), [use(houses[number % 2]) for number in range(1, MANY)], pause)
    won, lost = split(uses)
    assert len(won) == 1
    assert len(lost) == MANY - 1
    assert {type(refusal) for refusal in lost} == {InvalidProof}


def test_of_fifty_uses_of_one_single_use_token_at_once_one_wins(race):
    """INV-20."""
    single = replace(race.one.issuer.trusted(), single_use=True)
    race.one.broker.administration.apply(catalogue_for(race.one.issuer, issuers=(single,)), by="tests")
    token = race.one.token("summarizer")

    def present(house):
        catalogue = house.broker.standing.now().catalogue
        return lambda: house.broker.authenticator.authenticate(token, catalogue, now=house.clock()).name

    pause = race.stop(proofs, "consume", after=True)
    houses = (race.one, race.other)
    uses = held_back(race, present(race.one), [present(houses[number % 2]) for number in range(1, MANY)], pause)
    won, lost = split(uses)
    assert won == ["summarizer"]
    assert {type(refusal) for refusal in lost} == {Unauthenticated}
    assert len(lost) == MANY - 1


def test_a_proof_whose_use_came_to_nothing_can_still_be_used_once(postgres_race):
    """A broker that dies between using a proof and committing it has not used it."""
    race = postgres_race
    later = race.one.clock() + timedelta(minutes=5)
    with race.one.broker.database.engine.connect() as dying, dying.begin() as transaction:
        assert proofs.consume(dying, ASSERTION, joined("a", "b"), forget_at=later, now=race.one.clock())
        uses = [
            race.start(house.broker.proofs.consume, ASSERTION, joined("a", "b"), forget_at=later, now=race.one.clock())
            for house in (race.one, race.other)
            for _ in range(4)
        ]
        assert race.until_they_wait(*uses) == len(uses)
        transaction.rollback()
    assert [use.result() for use in uses].count(True) == 1


def test_fifty_requests_with_one_idempotency_key_make_one_grant(race):
    """INV-06: whoever comes second waits for the first, and gets what it made."""
    task = race.one.open_task()
    key = IdempotencyClaim(key_sha256="a" * 64, request_sha256="b" * 64)

    def ask(house):
        return lambda: house.issue(task, idempotency=key).grant.id

    pause = race.stop(idempotency, "claim_key", after=True)
    running = race.start(ask(race.one))
    pause.until_reached(running)
    others = [race.start(ask(race.other)) for _ in range(1, MANY)]
    # All of them are one transaction's, or queue behind it.
    race.until_they_wait(*others, waiting=1)
    pause.go_on()
    made, refused = split([running, *others])
    assert refused == []
    assert len(made) == MANY
    assert len(set(made)) == 1
    assert len(race.rows("SELECT id FROM grants")) == 1


def test_the_same_key_with_another_body_is_refused_also_while_the_first_is_on_its_way(race):
    """INV-06."""
    task = race.one.open_task()
    key = IdempotencyClaim(key_sha256="a" * 64, request_sha256="b" * 64)
    other_body = IdempotencyClaim(key_sha256="a" * 64, request_sha256="c" * 64)
    pause = race.stop(idempotency, "claim_key", after=True)
    first, second = race.run_into(
        lambda: race.one.issue(task, idempotency=key),
        pause,
        lambda: race.other.issue(task, idempotency=other_body),
    )
    assert second.waited
    assert first.refusal is None
    assert isinstance(second.refusal, IdempotencyConflict)


def test_two_that_open_a_task_with_one_key_get_one_task(race):
    """INV-06."""
    key = IdempotencyClaim(key_sha256="d" * 64, request_sha256="e" * 64)
    pause = race.stop(idempotency, "claim_key", after=True)
    first, second = race.run_into(
        lambda: race.one.open_task(idempotency=key), pause, lambda: race.other.open_task(idempotency=key)
    )
    assert second.waited
    assert first.answer.id == second.answer.id
    assert len(race.rows("SELECT id FROM tasks")) == 1


def test_the_limit_of_live_grants_counts_what_another_broker_is_about_to_commit(race, store_url, tmp_path):
    """INV-34."""
    one, other = (build_house(store_url, tmp_path, clock=race.one.clock, max_live_per_agent=3) for _ in range(2))
    task = one.open_task()
    two = [one.issue(task) for _ in range(2)]
    pause = race.stop(issuance, "count_live", after=True)
    third, beyond = race.run_into(lambda: one.issue(task), pause, lambda: other.issue(task))
    assert beyond.waited
    assert third.refusal is None
    assert isinstance(beyond.refusal, LimitExceeded)
    assert len(race.rows("SELECT id FROM grants WHERE state = 'active'")) == len(two) + 1
    for house in (one, other):
        house.broker.close()


def test_no_status_index_is_reserved_by_two_brokers(race):
    """An index points to one token for as long as that token could be presented."""
    pause = race.stop(status_indexes, "reserve_indexes", after=True)
    task = race.one.open_task()
    mine, theirs = race.run_into(lambda: race.one.issue(task), pause, lambda: race.other.issue(task))
    assert theirs.waited
    places = [(issued.answer.grant.status_list, issued.answer.grant.status_index) for issued in (mine, theirs)]
    assert len(set(places)) == 2
    reserved = race.rows("SELECT sum(next_index) AS total FROM status_lists")[0].total
    assert reserved == 2 * status_indexes._CHUNK


@pytest.mark.parametrize("first_list", ["new", "full"])
def test_two_brokers_that_need_a_new_status_list_at_once_share_one(race, first_list):
    if first_list == "full":
        with race.one.broker.database.engine.begin() as db:
            statement = "INSERT INTO status_lists (id, next_index, last_expiry_at) VALUES (1, :full, :at)"
            at = int(race.one.clock().timestamp()) if race.on_sqlite else race.one.clock()
            db.execute(sa.text(statement), {"full": STATUS_LIST_SIZE - 1, "at": at})
    pause = race.stop(status_indexes, "reserve_indexes", after=True)
    task = race.one.open_task()
    mine, theirs = race.run_into(lambda: race.one.issue(task), pause, lambda: race.other.issue(task))
    assert (mine.refusal, theirs.refusal) == (None, None)
    lists = {mine.answer.grant.status_list, theirs.answer.grant.status_list}
    assert lists == {1 if first_list == "new" else 2}
