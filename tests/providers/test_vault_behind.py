"""A node of Vault that is behind: what it has not heard of is not dead, nor what it does not list (INV-04)."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from broker.domain.errors import ProviderUnavailable
from broker.providers.vault import ending
from broker.providers.vault.connection import Answer, Connection
from tests.fakes.vault import FakeVault
from tests.providers.contract import TTL, OnFake

MANY = ending._FEW + 4
LIST = "LIST sys/leases/lookup"
REVOKE_LEASE = "PUT sys/leases/revoke"


@pytest.fixture
def stand(tmp_path):
    fake = FakeVault()
    made = OnFake(fake, tmp_path)
    yield made
    made.close()
    fake.close()


def made(stand, count):
    issued = [stand.issue() for _ in range(count)]
    return [(handle, secret.reference) for _, handle, secret in issued]


def asked(stand, what):
    return [path for method, path, _ in stand.fake.seen if f"{method} {path}".startswith(what)]


def refusals(said):
    return [type(problem) for problem in said]


def test_a_lease_that_a_node_has_not_heard_of_is_not_called_dead(stand, monkeypatch):
    """It was read when the node had heard of its token and of nothing since, and its target does not let it go."""
    stand.fake.target_works = False
    stand.fake.falls_behind()
    [(handle, reference)] = made(stand, 1)
    stand.fake.hears_of_tokens()
    monkeypatch.setattr(stand.provider._calls, "is_token_dead", lambda *_of: True)
    with pytest.raises(ProviderUnavailable):
        stand.provider.revoke(handle, reference)
    assert len(stand.fake.alive) == 1


def test_a_token_that_a_node_has_not_heard_of_is_not_called_dead(stand, monkeypatch):
    """Its lease was ended by way of the active node, which says how far it was."""
    stand.fake.falls_behind()
    [(handle, reference)] = made(stand, 1)
    monkeypatch.setattr(stand.provider._calls, "lease", lambda *_of: None)
    with pytest.raises(ProviderUnavailable):
        stand.provider.revoke(handle, reference)
    assert handle.value in {token.accessor for token in stand.fake.tokens.values()}


def test_of_several_a_token_that_a_node_has_not_heard_of_is_not_called_dead(stand):
    [first] = made(stand, 1)
    stand.fake.falls_behind()
    alone = stand.provider.prepare(stand.request(), TTL)
    stand.provider._calls._made_at = None  # as where another broker made it
    said = stand.provider.revoke_many([first, (alone, None)])
    assert type(said[1]) is ProviderUnavailable
    assert alone.value in {token.accessor for token in stand.fake.tokens.values()}
    stand.fake.catches_up()
    assert refusals(stand.provider.revoke_many([first, (alone, None)])) == [type(None)] * 2


def test_a_node_that_catches_up_while_it_is_asked_confirms(stand):
    [(handle, reference)] = made(stand, 1)
    stand.fake.falls_behind()

    def pause(_seconds):
        stand.fake.work()
        stand.fake.catches_up()

    stand.provider._ending._pause = pause
    stand.provider.revoke(handle, reference)
    assert not stand.fake.alive


def test_none_of_many_is_called_dead_by_a_list_that_is_older_than_it(stand, monkeypatch):
    """The node lists the one that it knows, and leaves out all that were made since."""
    stand.fake.target_works = False
    made(stand, 1)
    stand.fake.falls_behind()
    owed = made(stand, MANY)
    stand.fake.hears_of_tokens()
    with monkeypatch.context() as sure:
        sure.setattr(stand.provider._calls, "is_token_dead", lambda *_of: True)
        assert refusals(stand.provider.revoke_many(owed)) == [ProviderUnavailable] * MANY
    assert len(stand.fake.alive) == MANY + 1
    stand.fake.catches_up()
    stand.fake.target_works = True
    assert refusals(stand.provider.revoke_many(owed)) == [type(None)] * MANY
    assert len(stand.fake.alive) == 1


@pytest.mark.parametrize(("status", "errors"), [(412, ["required index state not present"]), (429, [])])
@pytest.mark.parametrize("look", ["POST auth/token/lookup-accessor", "PUT sys/leases/lookup"])
def test_a_node_that_does_not_answer_yet_is_asked_again(stand, status, errors, look):
    [(handle, reference)] = made(stand, 1)
    stand.fake.answers(look, status, {"errors": errors})
    stand.provider.revoke(handle, reference)
    assert not stand.fake.alive


def test_a_vault_that_is_asked_too_much_is_not_asked_again_at_once(stand):
    [(handle, reference)] = made(stand, 1)
    stand.fake.answers("PUT sys/leases/lookup", 429, {"errors": ["rate limit quota exceeded"]})
    with pytest.raises(ProviderUnavailable):
        stand.provider.revoke(handle, reference)
    assert len(asked(stand, "PUT sys/leases/lookup")) == 1


@pytest.mark.parametrize("count", [1, 2, MANY])
@pytest.mark.parametrize("ours", [True, False], ids=["made by us", "made by another broker"])
def test_what_was_made_a_moment_ago_is_not_called_dead_by_a_node_that_knows_none_of_it(stand, count, ours):
    """It knows no token, so that none tells how far Vault is; what ended the leases does, or what made them."""
    stand.fake.falls_behind()
    owed = made(stand, count)
    if not ours:
        stand.provider._calls._made_at = None
    said = stand.provider.revoke_many(owed)
    assert refusals(said) == [ProviderUnavailable] * count
    assert {handle.value for handle, _ in owed} <= {token.accessor for token in stand.fake.tokens.values()}
    stand.fake.catches_up()
    assert refusals(stand.provider.revoke_many(owed)) == [type(None)] * count


@pytest.mark.parametrize("alone", [True, False], ids=["a token alone", "with its lease"])
def test_what_we_made_is_not_called_dead_where_every_step_failed_at_a_node_that_is_behind(stand, alone):
    """Its end told nothing of how far Vault is; that it was made did."""
    stand.fake.target_works = False
    stand.fake.falls_behind()
    handle, reference = (stand.provider.prepare(stand.request(), TTL), None) if alone else made(stand, 1)[0]
    with pytest.raises(ProviderUnavailable):
        stand.provider.revoke(handle, reference)
    assert handle.value in {token.accessor for token in stand.fake.tokens.values()}


def test_a_lease_that_we_read_is_not_called_dead_where_it_could_not_be_revoked_at_a_node_that_is_behind(stand):
    """Which knows of its token, and so is as far as that was."""
    stand.fake.target_works = False
    request = stand.request()
    handle = stand.provider.prepare(request, TTL)
    stand.fake.falls_behind()
    reference = stand.provider.issue(handle, request, TTL).reference
    with pytest.raises(ProviderUnavailable):
        stand.provider.revoke(None, reference)
    assert len(stand.fake.alive) == 1


def test_an_index_is_kept_until_there_is_another_and_taken_from_no_refusal(stand):
    calls = stand.provider._calls
    for index in ("an-index", None):
        calls.made(Answer(status=200, body={}, vaults=True, index=index))
    assert calls.made_at == "an-index"
    stand.fake.answers(REVOKE_LEASE, 400, {"errors": ["invalid lease"]}, X_Vault_Index="1")
    assert calls.revoke_lease("database/creds/jit-orders-ro/abcdefgh") is None


def test_leases_alone_are_not_called_dead_by_a_list_that_is_older_than_they(stand):
    """The queue is at them, which says that they are done; and what is listed is somebody else's."""
    made(stand, 1)
    stand.fake.falls_behind()
    owed = [(None, reference) for _, reference in made(stand, 2)]
    stand.provider._calls._made_at = None
    stand.fake.queue_works = False
    for _, reference in owed:
        stand.fake.leases[reference].queued = True
    assert refusals(stand.provider.revoke_many(owed)) == [ProviderUnavailable] * 2
    assert len(stand.fake.alive) == 3


def test_what_is_asked_for_is_the_moment_at_which_the_token_died(stand, monkeypatch):
    """Whatever is said later: a step that had nothing left to do may be answered by a node that is behind."""
    [(handle, reference)] = made(stand, 1)
    since, look = [], stand.provider._calls.lease

    def noted(reference, index):
        since.append(index)
        return look(reference, index)

    monkeypatch.setattr(stand.provider._calls, "lease", noted)
    stand.fake.answers(REVOKE_LEASE, 204, X_Vault_Index="1")
    before = stand.fake.index
    stand.provider.revoke(handle, reference)
    assert set(since) == {str(before + 1)}


def test_each_look_and_all_of_a_list_say_since_when(stand, monkeypatch):
    told = []

    def call(_method, path, *, token, body, since):
        told.append((path, since))
        keys = ["role/"] if path.endswith("creds/") else ["abcdefgh"]
        return Answer(status=200, body={"data": {"keys": keys, "id": "a/b", "accessor": "abcdefgh"}}, vaults=True)

    calls = stand.provider._calls
    monkeypatch.setattr(stand.provider._connection, "call", call)
    monkeypatch.setattr(stand.provider._login, "speak", lambda ask: ask(None))
    assert list(calls.leases_under("database/creds/", "index")) == ["database/creds/role/abcdefgh"]
    assert calls.lease("a/b", "index") and not calls.is_token_dead("abcdefgh", "index")
    assert len(told) == 4 and {since for _, since in told} == {"index"}


def test_that_a_node_knew_of_no_such_token_says_nothing_of_how_far_vault_was(stand):
    """It says how far it was itself, and a look since then would ask of it no more than it has."""
    stand.fake.falls_behind()
    [(handle, _)] = made(stand, 1)
    assert stand.provider._calls.revoke_accessor(handle.value) is None
    stand.fake.catches_up()
    assert stand.provider._calls.revoke_accessor(handle.value) is not None


def test_a_node_that_is_behind_is_asked_for_a_list_again_soon(stand):
    owed = made(stand, MANY)
    made(stand, 1)
    stand.fake.answers(LIST, 429, {"errors": []})
    assert refusals(stand.provider.revoke_many(owed)) == [type(None)] * MANY
    assert len(asked(stand, LIST)) > 1 and not stand.provider._ending._long


def test_what_vault_s_queue_ends_of_many_is_not_asked_for_once_more(stand):
    owed = made(stand, MANY)
    made(stand, 1)
    assert refusals(stand.provider.revoke_many(owed)) == [type(None)] * MANY
    assert not asked(stand, REVOKE_LEASE)
    assert len(stand.fake.alive) == 1


def test_each_lease_is_revoked_at_once_where_vault_does_not_say_how_far_it_is(stand):
    stand.fake.tells_its_index = False
    owed = made(stand, MANY)
    made(stand, 1)
    assert refusals(stand.provider.revoke_many(owed)) == [type(None)] * MANY
    assert len(asked(stand, REVOKE_LEASE)) == MANY


def test_each_lease_is_revoked_at_once_where_the_queue_does_not_get_on(stand, monkeypatch):
    monkeypatch.setattr(ending, "CONFIRM_PAUSES_S", ())
    owed = made(stand, MANY)
    stand.fake.queue_works = False
    assert refusals(stand.provider.revoke_many(owed)) == [ProviderUnavailable] * MANY
    assert len(asked(stand, REVOKE_LEASE)) == MANY
    # Those in vain, and the one after each was revoked.
    assert len(asked(stand, LIST)) == ending.QUEUE_FRUITLESS + 1


def test_each_lease_is_revoked_at_once_where_a_list_takes_too_long(stand):
    owed = made(stand, MANY)
    made(stand, 1)
    stand.provider._ending._long["database/creds/jit-orders-ro"] = float("inf")
    assert refusals(stand.provider.revoke_many(owed)) == [type(None)] * MANY
    assert len(asked(stand, REVOKE_LEASE)) == MANY and not asked(stand, LIST)


def test_who_is_alone_under_a_prefix_is_asked_about_when_a_list_has_no_name_any_more(stand):
    owed = made(stand, MANY)
    assert refusals(stand.provider.revoke_many(owed)) == [type(None)] * MANY
    assert len(asked(stand, REVOKE_LEASE)) == len(asked(stand, "PUT sys/leases/lookup")) == MANY
    # While all were there, when none was, and once more when each was revoked.
    assert len(asked(stand, LIST)) == 3


def test_the_queue_is_waited_for_as_long_as_there_is_time(stand, monkeypatch):
    """It gets on by one at a look, and each look takes a second."""
    owed = made(stand, MANY)
    made(stand, 1)
    clock, listed = [0.0], stand.provider._ending._listed

    def slow(*of):
        clock[0] += 1.0
        lease = next(iter(lease for lease in stand.fake.leases.values() if lease.queued))
        stand.fake._revoke(lease)
        return listed(*of)

    monkeypatch.setattr(stand.provider._ending, "_listed", slow)
    monkeypatch.setattr(ending.time, "monotonic", lambda: clock[0])
    stand.provider._ending._pause = lambda _seconds: None
    stand.provider.revoke_many(owed)
    until_leases = ending.MANY_S * 3 / 4
    assert until_leases < clock[0] <= until_leases + 1


def test_where_no_index_is_told_and_there_is_no_time_to_look_at_tokens_they_are_looked_at_in_the_end(
    stand, monkeypatch
):
    stand.fake.tells_its_index = False
    owed = made(stand, 3)
    clock, revoke = [0.0], stand.provider._calls.revoke_lease

    def slow(reference):
        clock[0] += 8.0
        return revoke(reference)

    monkeypatch.setattr(stand.provider._calls, "revoke_lease", slow)
    monkeypatch.setattr(ending.time, "monotonic", lambda: clock[0])
    assert refusals(stand.provider.revoke_many(owed)) == [type(None)] * 3
    assert clock == [8.0] and not stand.fake.alive


def test_steps_are_taken_by_whoever_the_caller_says(stand):
    owed = made(stand, MANY)
    taken = []

    def at_once(step, items):
        items = list(items)
        taken.append(len(items))
        with ThreadPoolExecutor(4) as pool:
            yield from pool.map(step, items)

    assert refusals(stand.provider.revoke_many(owed, at_once)) == [type(None)] * MANY
    assert not stand.fake.alive and set(taken) == {MANY}


@pytest.mark.parametrize(
    ("said", "kept"), [("eyJ2IjoiNjUifQ==", True), ("x" * 512, True), ("x" * 513, False), ("a b", False), ("", False)]
)
def test_an_index_is_taken_from_vault_if_it_can_be_one(stand, said, kept):
    stand.fake.answers("GET sys/anything", 200, {"data": {}}, X_Vault_Index=said)
    connection = Connection(stand.fake.address)
    try:
        answer = connection.call("get", "sys/anything", token=None)
    finally:
        connection.close()
    assert answer.index == (said if kept else None)
