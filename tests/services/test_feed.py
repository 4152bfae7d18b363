"""The feed: what was committed is told once, in order, and nothing else; and it vouches only for what it knows."""

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import jwt
import pytest
import sqlalchemy as sa

from broker.domain.clock import epoch
from broker.domain.errors import RoleMissing, Unavailable
from broker.domain.feed import FOR_EVER, LISTS, Position, end_along, end_of_task, first_head
from broker.domain.grant import IdempotencyClaim
from broker.domain.lifecycle import TaskState
from broker.domain.refusal import AXES, Refusal
from broker.services import endings
from broker.services.feed import BOUND, STATEMENT_TYPE
from broker.store import feed as rows
from broker.store.models import Feed as FeedRow
from broker.store.models import FeedEvent, FeedOutbox, ShortenedGrant
from tests.fakes.outside import ORDERS, house_on_outside
from tests.feeds import decoded, head_after, kinds, read, refuses, told, written
from tests.house import CRM, ISSUER, LEDGER, POLICIES
from tests.services.test_delegation import AGENTS, with_everybody
from tests.services.test_redeciding import apply, resources, with_policies
from tests.services.test_verification import status_of

STRICTER = POLICIES["crm.cedar"].replace("<= 600", "<= 60")


def count(house, model):
    with house.broker.database.read() as db:
        return db.execute(sa.select(sa.func.count()).select_from(model)).scalar_one()


def announce(house, *ended):
    with house.broker.database.begin() as db:
        rows.announce(db, house.clock(), ended)


def revoke(house, axis, value, **more):
    return house.broker.revocation.revoke_along(house.caller("ada"), axis, value, reason="drill", **more)


def events_of(house, type_):
    return house.broker.audit_trail.page(house.caller("audrey"), {"type": type_}, before=None, limit=1000)


# --- What is told ---------------------------------------------------------------------------------------------------


def test_a_task_that_ends_is_one_event_and_none_for_each_grant(house):
    task = house.open_task()
    for _ in range(3):
        house.issue(task)
    assert told(house) == []
    house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED)
    [event] = told(house)
    assert event == {"seq": 1, "at": "2026-03-01T12:00:00Z", "kind": "task", "task_id": task.id}
    house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED)
    assert len(told(house)) == 1


def test_each_part_of_a_task_that_ends_is_an_event_because_tokens_name_only_their_own(house):
    task = house.open_task()
    part = house.open_task(parent_task_id=task.id)
    house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.CANCELLED)
    assert {event["task_id"] for event in told(house)} == {task.id, part.id}


def test_a_grant_that_is_revoked_is_told_with_what_came_from_it(house):
    with_everybody(house)
    task = house.open_task(*AGENTS)
    parent = house.issue(task, hand_to=("scribe",))
    child = house.issue(task, by="scribe", parent_grant_id=parent.grant.id)
    other = house.issue(task)
    house.broker.revocation.revoke_grant(house.caller("pipeline"), parent.grant.id)
    assert [event["grant_id"] for event in told(house)] == [parent.grant.id, child.grant.id]
    house.broker.revocation.revoke_grant(house.caller("pipeline"), parent.grant.id)
    assert len(told(house)) == 2
    assert house.is_active(other)


def test_issuing_and_renewing_write_nothing(house):
    task = house.open_task()
    issued = house.issue(task)
    house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=None)
    assert (count(house, FeedOutbox), told(house)) == (0, [])


def test_what_time_alone_ends_is_told_by_nobody_because_tokens_say_it(house):
    house.issue(house.open_task(deadline_s=60))
    house.issue(house.open_task())
    house.clock.forward(hours=2)
    swept = house.broker.sweeper.sweep()
    assert (swept.tasks_expired, swept.grants_expired) == (2, 0)
    assert told(house) == []


def test_a_lost_heartbeat_is_told_because_no_token_says_it(house):
    task = house.open_task(heartbeat=timedelta(seconds=30))
    house.clock.forward(seconds=31)
    house.broker.sweeper.sweep()
    assert [event["task_id"] for event in told(house)] == [task.id]


def test_what_was_never_shown_to_a_verifier_is_not_told(store_url, tmp_path):
    """A secret from outside is no token."""
    with house_on_outside(store_url, tmp_path) as house:
        issued = house.issue(house.open_task(), resource=ORDERS, scope="select", takes_secrets=True)
        house.broker.revocation.revoke_grant(house.caller("ada"), issued.grant.id)
        assert told(house) == []


def test_what_was_rolled_back_is_told_by_nobody(house):
    rung = []
    house.broker.broadcast.ring = lambda: rung.append(True)
    with pytest.raises(KeyError), house.broker.database.begin() as db:
        rows.announce(db, house.clock(), [end_of_task("task_1")])
        raise KeyError
    assert (told(house), rung) == ([], [])


def test_a_bulk_revocation_is_one_event_however_many_it_ends(house):
    task = house.open_task()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: house.issue(task), range(60)))
    assert revoke(house, "agent", "summarizer", lockdown=True).total == 60
    house.broker.sweeper.sweep()
    [event] = told(house)
    assert (event["kind"], event["agent"]) == ("tokens", "summarizer")
    house.broker.revocation.lift_lockdown(
        house.caller("ada"), house.broker.revocation.lockdowns(house.caller("ada"))[0].id
    )
    assert len(told(house)) == 1


def test_the_same_order_with_its_idempotency_key_is_told_once(house):
    claim = IdempotencyClaim(key_sha256="a" * 64, request_sha256="b" * 64)
    for _ in range(2):
        revoke(house, "agent", "summarizer", idempotency=claim)
    assert kinds(told(house)) == ["tokens"]
    revoke(house, "agent", "summarizer", dry_run=True)
    assert len(told(house)) == 1


def test_an_event_refuses_exactly_what_its_revocation_covers(house):
    """Held against the refusal itself, for a chain of agents, and one level of it at a time."""
    with_everybody(house)
    task = house.open_task(*AGENTS)
    root = house.issue(task, hand_to=("scribe",))
    child = house.issue(task, by="scribe", parent_grant_id=root.grant.id, hand_to=("clerk",))
    below = house.issue(task, by="clerk", parent_grant_id=child.grant.id)
    lone = house.issue(task, by="intern", resource=LEDGER, scope="entries:read")
    house.clock.forward(seconds=10)
    for axis, value in (
        *(("agent", name) for name in AGENTS),
        ("resource", CRM),
        ("resource", LEDGER),
        ("user", "dev:ada"),
        ("all", "all"),
    ):
        ended = end_along(axis, value, house.clock())
        event = {"kind": ended.kind, **ended.members}
        for issued in (root, child, below, lone):
            covered = Refusal(id="", axis=axis, value=value, reason="").covers(issued.grant)
            assert refuses(event, *read(issued.credential.token.reveal())) is covered, (axis, value)


@pytest.mark.parametrize("axis", [axis for axis in AXES if axis not in ("agent", "user", "resource", "all")])
def test_what_no_token_says_sends_verifiers_to_the_lists(house, axis):
    assert end_along(axis, "x", house.clock()) == LISTS


def test_around_the_second_of_a_revocation_only_a_list_can_tell(house):
    """Brokers agree on the time to within less than a second, and a token says whole ones."""
    task = house.open_task()
    tokens = {}
    at = house.clock() + timedelta(seconds=5)
    for offset in range(-4, 4):
        house.clock.at = at + timedelta(seconds=offset)
        tokens[offset] = read(house.issue(task).credential.token.reveal())
    event = {"kind": "tokens", **end_along("agent", "summarizer", at).members}
    assert {offset: refuses(event, *token) for offset, token in tokens.items()} == {
        -4: True, -3: True, -2: True, -1: None, 0: None, 1: None, 2: False, 3: False,
    }  # fmt: skip


def test_a_key_that_leaked_is_told_for_ever_and_its_grants_are_told_by_lists(house):
    issued = house.issue(house.open_task())
    claims, kid = read(issued.credential.token.reveal())
    house.broker.revocation.compromise_key(house.caller("ada"), kid, reason="found in a log")
    key, lists = told(house)
    assert (key["key"], key["issued_before"], lists["kind"]) == (kid, FOR_EVER, "lists")
    assert refuses(key, {**claims, "iat": epoch(house.clock()) + 10**9}, kid) is True
    house.broker.keys.compromise(kid, actor="ada", reason="again", now=house.clock())
    assert len(told(house)) == 2


def test_a_new_configuration_that_ends_few_grants_names_them_and_of_many_says_lists(house, monkeypatch):
    issued = [house.issue(house.open_task()) for _ in range(3)]
    with_policies(house, crm_cedar=STRICTER)
    house.broker.redeciding.run()
    assert {event["grant_id"] for event in told(house)} == {one.grant.id for one in issued}
    with_policies(house)
    monkeypatch.setattr(endings, "_TOLD_ONE_BY_ONE", 2)
    for _ in range(3):
        house.issue(house.open_task())
    with_policies(house, crm_cedar=STRICTER)
    house.broker.redeciding.run()
    assert kinds(told(house, after=3)) == ["lists"]


# --- Grants that end before their tokens say so -----------------------------------------------------------------------


def shortened(house):
    issued = house.issue(house.open_task(), ttl=timedelta(seconds=600))
    apply(house, resources=resources(house, CRM, max_ttl_s=60))
    assert house.broker.redeciding.run().shortened == 1
    return issued


def test_a_shortened_grant_is_told_when_its_new_end_comes_and_not_before(house):
    issued = shortened(house)
    house.clock.forward(seconds=59)
    assert told(house) == []
    assert house.is_active(issued)
    house.clock.forward(seconds=1)
    assert not house.is_active(issued)
    assert [event["grant_id"] for event in told(house)] == [issued.grant.id]
    assert count(house, ShortenedGrant) == 0
    house.clock.forward(hours=1)
    assert len(told(house)) == 1


def test_a_shortened_grant_that_was_renewed_is_told_when_that_ends(house):
    issued = shortened(house)
    house.clock.forward(seconds=50)
    house.broker.renewal.renew(house.caller("summarizer"), issued.grant.id, ttl=None)
    house.clock.forward(seconds=10)
    assert told(house) == []
    assert house.is_active(issued)
    house.clock.forward(seconds=50)
    assert not house.is_active(issued)
    assert [event["grant_id"] for event in told(house)] == [issued.grant.id]


def test_a_shortened_grant_whose_token_ended_by_itself_is_not_told(house):
    shortened(house)
    house.clock.forward(seconds=601)
    assert (told(house), count(house, ShortenedGrant)) == ([], 0)


def test_what_comes_from_a_shortened_grant_is_told_too(house):
    with_everybody(house)
    task = house.open_task(*AGENTS)
    parent = house.issue(task, hand_to=("scribe",), ttl=timedelta(seconds=600))
    child = house.issue(task, by="scribe", parent_grant_id=parent.grant.id, ttl=timedelta(seconds=500))
    apply(house, resources=resources(house, CRM, max_ttl_s=60))
    house.broker.redeciding.run()
    house.clock.forward(seconds=60)
    assert {event["grant_id"] for event in told(house)} == {parent.grant.id, child.grant.id}


# --- Numbers and the chain --------------------------------------------------------------------------------------------


def test_the_chain_is_what_anybody_computes_who_has_the_texts(house):
    announce(house, *(end_of_task(f"task_{number}") for number in range(5)))
    seen = house.broker.feed.look().seen
    head = hashlib.sha256(seen.feed_id.encode()).digest()
    assert written(head) == first_head(seen.feed_id)
    for _, text in house.broker.feed.replay(replace(seen.position, seq=0), seen.seq):
        assert "\n" not in text and text.isascii()
        head = head_after(head, text)
    assert (seen.seq, seen.head) == (5, written(head))
    assert decoded(seen.head) == head


def test_more_than_fits_into_one_transaction_is_numbered_all_the_same(house):
    announce(house, *(end_of_task(f"task_{number}") for number in range(2_500)))
    assert [event["task_id"] for event in told(house)] == [f"task_{number}" for number in range(2_500)]


def test_two_that_number_at_once_and_many_that_commit_skip_nobody(house, second_house):
    """Every committer's events keep their order, and each is told once."""
    names = [[f"task_{committer}_{number}" for number in range(40)] for committer in range(4)]
    over = threading.Event()

    def commit(mine):
        for name in mine:
            announce(house, end_of_task(name))

    def number(which):
        while not over.is_set():
            which.broker.feed.advance()

    with ThreadPoolExecutor(6) as pool:
        numbering = [pool.submit(number, which) for which in (house, second_house)]
        for done in [pool.submit(commit, mine) for mine in names]:
            done.result()
        over.set()
        for done in numbering:
            done.result()
    found = [event["task_id"] for event in told(house)]
    assert sorted(found) == sorted(name for mine in names for name in mine)
    for mine in names:
        assert [name for name in found if name in set(mine)] == mine


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
def test_who_commits_late_is_told_late_and_not_skipped(house):
    """Its place in the outbox is before that of one whose number was given out already. SQLite has one writer."""
    slow = house.broker.database.engine.connect()
    with slow.begin():
        slow.execute(sa.insert(FeedOutbox), {"at": house.clock(), "kind": "task", "members": {"task_id": "slow"}})
        announce(house, end_of_task("quick"))
        assert [event["task_id"] for event in told(house)] == ["quick"]
    slow.close()
    assert [event["task_id"] for event in told(house)] == ["quick", "slow"]


def test_a_number_that_was_not_committed_is_given_again(house, monkeypatch):
    announce(house, end_of_task("task_1"))

    class Killed(BaseException):
        pass

    def dies(*_, **__):
        raise Killed

    monkeypatch.setattr(rows, "insert_rows", dies)
    with pytest.raises(Killed):
        house.broker.feed.advance()
    monkeypatch.undo()
    assert [event["seq"] for event in told(house)] == [1]


# --- Statements -------------------------------------------------------------------------------------------------------


def stated(house):
    return house.broker.feed.statement(house.broker.feed.look())


def test_a_statement_says_what_the_feed_is_under_the_brokers_key(house):
    announce(house, end_of_task("task_1"))
    token = stated(house)
    header = jwt.get_unverified_header(token)
    key = jwt.PyJWKSet.from_dict(house.broker.verification.jwks())[header["kid"]]
    said = jwt.decode(
        token, key, algorithms=["ES256"], issuer=ISSUER, options={"verify_exp": False, "verify_iat": False}
    )
    seen = house.broker.feed.look().seen
    assert (header["typ"], header["alg"]) == (STATEMENT_TYPE, "ES256")
    assert said == {
        "iss": ISSUER,
        "iat": epoch(house.clock()),
        "exp": epoch(house.clock() + BOUND),
        "feed": seen.feed_id,
        "seq": 1,
        "head": seen.head,
    }


def test_who_hears_no_more_refuses_within_the_bound_what_was_committed_late(house):
    """A revocation's time is read in its transaction: a statement from before its commit knows nothing of it."""
    issued = house.issue(house.open_task())
    ended_at = house.clock()
    house.clock.forward(seconds=3)
    said = jwt.decode(stated(house), options={"verify_signature": False})
    house.clock.at = ended_at
    [line] = house.broker.revocation.revoke_grant(house.caller("ada"), issued.grant.id).receipt.lines
    assert said["exp"] <= epoch(line.exposed_until) == epoch(ended_at + timedelta(seconds=15))


def test_nobody_vouches_for_a_feed_while_a_lost_heartbeat_is_not_told(house):
    house.open_task(heartbeat=timedelta(seconds=30))
    house.clock.forward(seconds=32)
    assert stated(house) is not None
    house.clock.forward(seconds=1)  # 12 s from now on it would be more than 15 s
    assert stated(house) is None
    house.broker.sweeper.sweep()
    assert stated(house) is not None


def test_nobody_vouches_for_a_feed_that_had_its_numbers_before_a_lost_heartbeat_was_told(house, monkeypatch):
    """The sweeper comes by between the numbers and the look: the task is over then, and its event not in the look."""
    house.open_task(heartbeat=timedelta(seconds=30))
    house.broker.feed.look()
    house.clock.forward(seconds=33)
    seen = house.broker.feed._seen

    def seen_late():
        house.broker.sweeper.sweep()
        return seen()

    monkeypatch.setattr(house.broker.feed, "_seen", seen_late)
    looked = house.broker.feed.look()
    assert (looked.seen.seq, looked.vouched) == (0, False)
    looked = house.broker.feed.look()
    assert (looked.seen.seq, looked.vouched) == (1, True)


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
def test_nobody_vouches_for_a_feed_while_somebody_stalls_who_is_to_tell_of_a_shortened_grant(house):
    """Nobody waits for its row, and so nobody else tells of it. SQLite has one writer."""
    issued = shortened(house)
    stalled = house.broker.database.engine.connect()
    with stalled.begin():
        stalled.execute(sa.select(ShortenedGrant).with_for_update()).one()
        house.clock.forward(seconds=61)
        assert stated(house) is not None
        house.clock.forward(seconds=1)
        assert stated(house) is None
    stalled.close()
    assert stated(house) is not None
    assert [event["grant_id"] for event in told(house)] == [issued.grant.id]


def test_nobody_vouches_where_no_key_can_sign(house, monkeypatch):
    looked = house.broker.feed.look()
    ring = house.broker.standing.last_known().keys
    newest = replace(house.broker.standing.last_known(), keys=replace(ring, signing={}))
    monkeypatch.setattr(house.broker.standing, "_newest", newest)
    assert house.broker.feed.statement(looked) is None


# --- Starting, replay, resets -----------------------------------------------------------------------------------------


def start(house, wanted):
    return house.broker.feed.start(wanted, house.broker.feed.look())


@pytest.fixture
def twelve(house):
    """Twelve events, one a second, and the place of a reader that has all of them."""
    for number in range(12):
        announce(house, end_of_task(f"task_{number}"))
        house.broker.feed.advance()
        house.clock.forward(seconds=1)
    return house.broker.feed.look().seen.position


def test_a_reader_goes_on_where_it_was(house, twelve):
    for seq in (0, 3, 12):
        wanted = Position(feed_id=twelve.feed_id, seq=seq)
        assert start(house, wanted) == type(start(house, wanted))(position=wanted)
    assert [seq for seq, _ in house.broker.feed.replay(replace(twelve, seq=3), 12)] == list(range(4, 13))


def test_a_reader_that_is_new_or_comes_from_elsewhere_starts_a_few_seconds_back(house, twelve):
    """A list that a broker keeps for two seconds, and the events from there on, miss nothing together."""
    for wanted in (None, Position(feed_id="another", seq=3), replace(twelve, seq=13)):
        found = start(house, wanted)
        assert found.position == replace(twelve, seq=7)
        assert found.reset.position == found.position
        texts = [text for _, text in house.broker.feed.replay(replace(twelve, seq=0), 7)]
        head = decoded(first_head(twelve.feed_id))
        for text in texts:
            head = head_after(head, text)
        assert decoded(found.reset.head) == head


def test_the_first_reader_of_a_new_feed_starts_at_its_beginning(house):
    announce(house, end_of_task("task_1"))
    found = start(house, None)
    assert (found.position.seq, found.reset.head) == (0, first_head(found.position.feed_id))


def test_who_was_away_longer_than_events_are_kept_starts_anew(house, twelve):
    house.clock.forward(hours=24)
    announce(house, end_of_task("task_12"))
    house.broker.feed.advance()
    house.broker.sweeper.sweep()
    assert count(house, FeedEvent) == 2  # the newest of the old ones is where others start
    assert start(house, replace(twelve, seq=11)).reset is None
    assert start(house, replace(twelve, seq=10)).reset is not None


def test_a_replay_of_another_feed_or_with_a_gap_is_none(house, twelve):
    last = replace(twelve, seq=3)
    assert house.broker.feed.replay(replace(last, feed_id="another"), 12) == ()
    with house.broker.database.begin() as db:
        db.execute(sa.delete(FeedEvent).where(FeedEvent.seq == 6))
    assert house.broker.feed.replay(last, 12) == ()
    with house.broker.database.begin() as db:
        db.execute(sa.delete(FeedEvent).where(FeedEvent.seq <= 6))
    assert house.broker.feed.replay(last, 12) == ()
    assert [seq for seq, _ in house.broker.feed.replay(replace(twelve, seq=6), 12)] == list(range(7, 13))


def test_forgetting_goes_in_bounded_steps_from_the_oldest_on(house, twelve):
    with house.broker.database.begin() as db:
        assert rows.forget(db, numbered_before=house.clock(), limit=5) == 4
    assert [event["seq"] for event in told(house, after=4)] == list(range(5, 13))
    with house.broker.database.begin() as db:
        assert rows.forget(db, numbered_before=house.clock() - timedelta(hours=1), limit=5) == 0


# --- A database that went back in time --------------------------------------------------------------------------------


def restored(house, seq):
    """As a restore leaves it: an older number, and none of the events after it."""
    with house.broker.database.begin() as db:
        head = db.execute(sa.select(FeedEvent.head).where(FeedEvent.seq == seq)).scalar_one()
        db.execute(sa.delete(FeedEvent).where(FeedEvent.seq > seq))
        db.execute(sa.update(FeedRow).values(seq=seq, head=head))


def test_a_restore_under_a_running_broker_begins_another_feed(house, twelve):
    restored(house, 8)
    looked = house.broker.feed.look()
    assert looked.seen.feed_id != twelve.feed_id
    [event] = told(house)
    assert (event["seq"], event["kind"]) == (1, "lists")
    assert start(house, twelve).reset is not None
    [audited] = events_of(house, "feed.renewed")
    assert audited.actor == "broker"


def test_a_restore_after_which_as_many_came_is_noticed_by_the_chain(house, twelve):
    restored(house, 8)
    with house.broker.database.begin() as db:
        rows.announce(db, house.clock(), [end_of_task(f"other_{number}") for number in range(4)])
        assert rows.number(db, now=house.clock(), at_most=10) == 4
    assert house.broker.feed.look().seen.feed_id != twelve.feed_id


def test_events_that_do_not_continue_what_was_seen_begin_another_feed(house, twelve):
    """Its newest event may be a later one by now: what is in between tells."""
    seen = house.broker.feed.look().seen
    with pytest.raises(Unavailable, match="begins anew"):
        house.broker.feed.since(replace(seen, seq=8, head=first_head("another")), seen)
    assert house.broker.feed.look().seen.feed_id != twelve.feed_id


def test_two_brokers_that_notice_a_restore_begin_one_feed(house, second_house, twelve):
    second_house.broker.feed.look()
    restored(house, 8)
    first = house.broker.feed.look().seen.feed_id
    assert second_house.broker.feed.look().seen.feed_id == first
    assert not second_house.broker.feed.renew("late", instead_of=twelve.feed_id)
    assert len(events_of(house, "feed.renewed")) == 1


def test_an_administrator_begins_it_anew_after_a_restore(house, twelve):
    announce(house, end_of_task("not numbered yet"))
    assert house.broker.feed.renew("restored from backup", by="cli:root")
    assert [event.get("task_id", event["kind"]) for event in told(house)] == ["not numbered yet", "lists"]
    assert start(house, twelve).reset is not None
    assert events_of(house, "feed.renewed")[0].reason == "restored from backup"


# --- Who reads, and what lists say meanwhile --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["crm-api", "ada", "audrey"])
def test_verifiers_admins_and_auditors_read_the_feed(house, name):
    house.broker.feed.admit(house.caller(name))


@pytest.mark.parametrize("name", ["summarizer", "pipeline", "gus"])
def test_nobody_else_does_and_that_is_on_record(house, name):
    with pytest.raises(RoleMissing, match="no verifier, auditor or admin"):
        house.broker.feed.admit(house.caller(name))
    [event] = events_of(house, "feed.refused")
    assert (event.actor, event.outcome) == (name, "role_missing")


def test_a_caller_reads_on_until_its_token_ends_or_it_is_nobody_any_more(house):
    caller = house.caller("crm-api")
    assert house.broker.feed.still_reads(caller)
    catalogue = house.broker.standing.now().catalogue
    without = tuple(rule for rule in catalogue.principals if rule.name != "crm-api")
    verifier = next(rule for rule in catalogue.principals if rule.name == "crm-api")
    apply(house, principals=without, resources=resources(house, CRM, verifiers=()))
    house.broker.standing.now()
    assert not house.broker.feed.still_reads(caller)
    apply(house, principals=(*without, replace(verifier, roles=("agent",))))
    house.broker.standing.now()
    assert not house.broker.feed.still_reads(caller)
    ada = house.caller("ada")
    house.clock.at = ada.proof_expires_at
    assert not house.broker.feed.still_reads(ada)


def test_a_list_that_is_fetched_when_the_feed_says_lists_tells_the_truth(house, second_house, monkeypatch):
    """A list is kept for two seconds, and a verifier comes within milliseconds."""
    monkeypatch.setattr(endings, "_TOLD_ONE_BY_ONE", 0)
    issued, other = house.issue(house.open_task()), house.issue(house.open_task())
    assert (status_of(house, issued), status_of(second_house, issued)) == (0, 0)
    for which, ended in ((house, issued), (second_house, other)):
        which.broker.revocation.revoke_grant(house.caller("ada"), ended.grant.id)
        for broker in (house, second_house):
            assert status_of(broker, ended) == 1  # committed, and not numbered yet
        assert kinds(told(house))[-1] == "lists"
        for broker in (house, second_house):
            assert status_of(broker, ended) == 1


def test_a_list_is_built_once_for_a_crowd_when_nothing_has_changed(house, monkeypatch):
    issued = house.issue(house.open_task())
    revoke(house, "policy", "crm-read")
    told(house)
    built = []
    build = house.broker.verification._build
    monkeypatch.setattr(house.broker.verification, "_build", lambda list_id: built.append(list_id) or build(list_id))
    for _ in range(5):
        assert status_of(house, issued) == 1
    assert len(built) == 1
