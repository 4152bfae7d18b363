"""The feed without a network: what is proven, what is taken back, and what stays refused."""

import hashlib
import json

import pytest

from broker.conformance.fake_broker import AUDIENCE
from broker.sdk.verifier import jose
from broker.sdk.verifier.feed import Broken, Feed, Refusal, Refusals, statement_of
from broker.sdk.verifier.jose import NotReadable
from broker.sdk.verifier.moments import BrokerTime
from broker.sdk.verifier.tokens import Token
from tests.verifier.conftest import NOW

EPOCH = int(NOW.timestamp())
FEED = "feed-one"


def token(**more):
    values = {
        "digest": b"d",
        "ath": "a",
        "kid": "k1",
        "key": None,
        "payload": b"{}",
        "subject": "summarizer",
        "client_id": "summarizer",
        "actors": (),
        "task_id": "task_1",
        "grant_id": "grt_1",
        "scopes": frozenset(),
        "issued_at": EPOCH,
        "not_before": EPOCH,
        "expires_at": EPOCH + 300,
        "bound_to": None,
        "list_uri": "",
        "index": 0,
        "marks": (("all", ""), ("resource", AUDIENCE), ("key", "k1"), ("agent", "summarizer"), ("user", "ada")),
    }
    return Token(**values | more)


class Source:
    """The broker's side of the chain, and a `Feed` that is told of it."""

    def __init__(self, clocks, **limits):
        self.clocks = clocks
        self.time = BrokerTime(clocks.timing())
        self.feed = Feed(self.time, longest_life_s=3600, most_refusals=limits.pop("most_refusals", 1000))
        self.heads = [hashlib.sha256(FEED.encode()).digest()]
        self.events = []

    def append(self, kind="grant", **members):
        data = json.dumps({"seq": len(self.events) + 1, "at": "2026-03-01T12:00:00Z", "kind": kind, **members})
        self.events.append(data)
        self.heads.append(hashlib.sha256(self.heads[-1] + data.encode()).digest())
        return data

    def reset(self, seq=None):
        seq = len(self.events) if seq is None else seq
        self.feed.reset({"feed": FEED, "seq": seq, "head": jose.base64url(self.heads[seq])})

    def claims(self, seq=None, **other):
        seq = len(self.events) if seq is None else seq
        now = int(self.clocks.wall.timestamp())
        head = jose.base64url(self.heads[seq])
        return {"iat": now, "exp": now + 15, "feed": FEED, "seq": seq, "head": head} | other

    def state(self, seq=None, bound_s=15, **other):
        return self.feed.statement(statement_of(self.claims(seq, **other), self.time, bound_s=bound_s))

    @property
    def fresh(self):
        return self.feed.is_fresh(self.time.now())


@pytest.fixture
def source(clocks):
    made = Source(clocks)
    made.reset()
    return made


def test_nothing_is_fresh_before_a_statement_and_for_the_bound_after_it(source, clocks):
    assert not source.fresh
    assert source.state()
    assert source.fresh
    clocks.forward(15.1)
    assert not source.fresh


def test_a_shorter_bound_and_a_shorter_statement_both_count(source, clocks):
    source.state(bound_s=4)
    clocks.forward(4.1)
    assert not source.fresh
    source.state(exp=int(clocks.wall.timestamp()) + 2)
    clocks.forward(2.1)
    assert not source.fresh


def test_an_event_refuses_at_once_and_for_as_long_as_a_token_can_live(source, clocks):
    source.feed.event(source.append(grant_id="grt_1"))
    assert source.feed.refuses(token())
    assert not source.feed.refuses(token(grant_id="grt_2"))
    source.state()
    clocks.forward(3600)
    source.state()
    assert source.feed.refuses(token())
    clocks.forward(200)
    source.state()
    assert not source.feed.refuses(token())
    assert len(source.feed) == 0


@pytest.mark.parametrize(
    "members",
    [
        {"kind": "task", "task_id": "task_1"},
        {"kind": "tokens", "agent": "summarizer", "issued_before": EPOCH},
        {"kind": "tokens", "user": "ada", "issued_before": EPOCH},
        {"kind": "tokens", "resource": AUDIENCE, "issued_before": EPOCH},
        {"kind": "tokens", "key": "k1", "issued_before": EPOCH},
        {"kind": "tokens", "all": True, "issued_before": EPOCH},
    ],
)
def test_every_kind_refuses_what_it_names_and_was_issued_until_then(source, members):
    since = source.feed.since
    source.feed.event(source.append(**members))
    assert source.feed.refuses(token())
    later = token(issued_at=EPOCH + 1)
    assert source.feed.refuses(later) == (members["kind"] == "task")
    assert not source.feed.refuses(token(task_id="task_2", marks=(("agent", "scribe"),)))
    assert source.feed.since == since


@pytest.mark.parametrize(
    "members",
    [
        {"kind": "lists"},
        {"kind": "galaxy"},
        {"kind": "grant"},
        {"kind": "grant", "grant_id": 7},
        {"kind": "tokens", "issued_before": EPOCH},
        {"kind": "tokens", "agent": "a", "user": "b", "issued_before": EPOCH},
        {"kind": "tokens", "agent": "a"},
        {"kind": "tokens", "agent": "a", "issued_before": "now"},
        {"kind": "tokens", "all": False, "issued_before": EPOCH},
    ],
)
def test_an_event_that_does_not_say_whom_it_concerns_makes_every_status_list_too_old(source, clocks, members):
    source.state()
    assert source.feed.since.complete_from is not None
    clocks.forward(3)
    source.feed.event(source.append(**members))
    assert source.feed.since.asked_after == clocks.monotonic
    assert source.feed.since.complete_from is None
    source.state()
    assert source.feed.since.complete_from == EPOCH + 4


def test_what_may_have_been_issued_after_a_revocation_is_left_to_a_newer_list(source, clocks):
    source.state()
    clocks.forward(2)
    more = {"agent": "summarizer", "issued_before": EPOCH, "unsure_after": EPOCH - 5}
    source.feed.event(source.append("tokens", **more))
    assert source.feed.refuses(token(issued_at=EPOCH - 5))
    assert not source.feed.refuses(token(issued_at=EPOCH - 4))
    assert source.feed.since.asked_after == clocks.monotonic


@pytest.mark.parametrize("unsure_after", [EPOCH, EPOCH + 1, -1, True, "0", None])
def test_an_unsure_time_that_is_none_makes_nothing_less_refused(source, unsure_after):
    more = {"agent": "summarizer", "issued_before": EPOCH, "unsure_after": unsure_after}
    source.feed.event(source.append("tokens", **more))
    assert source.feed.refuses(token())


def test_a_key_that_leaked_is_refused_whatever_time_its_tokens_say(source):
    source.feed.event(source.append("tokens", key="k1", issued_before=253402300799))
    assert source.feed.refuses(token(issued_at=253402300000))


def test_a_key_that_leaked_is_never_forgotten_and_a_forged_event_silences_none(source, clocks):
    source.feed.event(source.append("tokens", key="k1", issued_before=253402300799))
    assert not source.feed.refuses_key("k1", EPOCH)
    source.state()
    assert source.feed.refuses_key("k1", EPOCH)
    assert not source.feed.refuses_key("k2", EPOCH)
    clocks.forward(86_400)
    source.state()
    assert source.feed.refuses(token(issued_at=EPOCH + 86_400))
    source.append("tokens", key="k3", issued_before=253402300799)
    source.feed.event('{"seq":2,"kind":"tokens","key":"k2","issued_before":253402300799}')
    assert source.feed.refuses(token(marks=(("key", "k2"),)))
    with pytest.raises(Broken, match="chain"):
        source.state()
    source.feed.distrust(start_over=False)
    assert not source.feed.refuses_key("k2", EPOCH)


def test_a_key_that_leaked_is_never_forgotten_after_a_reset_that_came_before_a_statement(source, clocks):
    """Whoever has the key and sits in between would send one, and then statements of his own."""
    source.feed.event(source.append("tokens", key="k1", issued_before=253402300799))
    source.reset()
    assert source.feed.refuses_key("k1", EPOCH)
    clocks.forward(86_400)
    source.state()
    assert source.feed.refuses(token(issued_at=EPOCH + 86_400))
    assert source.feed.refuses_key("k1", EPOCH + 86_400)


@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(kind="grant", name="grt_1"),
        Refusal(kind="task", name="task_1"),
        Refusal(kind="key", name="k1", issued_before=EPOCH),
    ],
)
def test_a_refusal_that_is_said_again_is_forgotten_no_sooner(refusal):
    refusals = Refusals(10)
    assert refusals.add(refusal, float("inf"))
    assert refusals.add(refusal, 5.0)
    refusals.forget(6.0)
    assert refusals.over(token())


def test_a_statement_from_before_an_event_does_not_say_which_lists_are_complete(source):
    before = statement_of(source.claims(), source.time, bound_s=15)
    source.feed.event(source.append("lists"))
    assert source.feed.statement(before)
    assert source.feed.since.complete_from is None


def test_a_missing_event_breaks_the_feed(source):
    source.append(grant_id="grt_1")
    with pytest.raises(Broken, match="after event 0 came event 2"):
        source.feed.event(source.append(grant_id="grt_2"))


def test_events_that_are_withheld_leave_nothing_fresh_until_they_come(source, clocks):
    source.state()
    first = source.append(grant_id="grt_1")
    clocks.forward(10)
    assert not source.state()
    clocks.forward(6)
    assert not source.fresh
    clocks.forward(-6)
    source.feed.event(first)
    assert source.fresh


@pytest.mark.parametrize(
    "forged", ['{"seq":1,"kind":"grant","grant_id":"grt_2"}', '{"seq":1,"kind":"grant","grant_id":"grt_1"} ']
)
def test_a_forged_or_changed_event_is_noticed_and_taken_back(source, forged):
    source.state()
    genuine = source.append(grant_id="grt_1")
    source.feed.event(forged)
    with pytest.raises(Broken, match="chain"):
        source.state()
    source.feed.distrust(start_over=False)
    assert not source.fresh
    assert not source.feed.refuses(token(grant_id="grt_2"))
    assert source.feed.position.seq == 0
    source.feed.event(genuine)
    assert source.state()
    assert source.feed.refuses(token())


def test_what_was_proven_stays_refused_whatever_is_taken_back_or_reset(source):
    source.feed.event(source.append(grant_id="grt_1"))
    source.state()
    source.feed.distrust(start_over=True)
    assert source.feed.position is None
    assert source.feed.refuses(token())
    source.reset()
    assert source.feed.refuses(token())


def test_a_reset_keeps_what_no_statement_has_spoken_of_yet(source):
    source.feed.event(source.append(grant_id="grt_1"))
    source.reset()
    assert source.feed.refuses(token())
    assert not source.fresh


def test_an_event_that_comes_again_is_passed_over_and_another_in_its_place_is_not(source):
    data = source.append(grant_id="grt_1")
    source.feed.event(data)
    source.feed.event(data)
    assert source.state()
    with pytest.raises(Broken, match="another one"):
        source.feed.event(data.replace("grt_1", "grt_9"))


def test_a_feed_that_was_set_back_without_another_name_is_broken(source, clocks):
    source.feed.event(source.append(grant_id="grt_1"))
    source.state()
    assert source.state(0)  # of the same second: two threads of the broker may speak at once
    clocks.forward(1)
    with pytest.raises(Broken, match="set back"):
        source.state(0)


def test_another_feed_is_broken_until_it_is_reset(source):
    with pytest.raises(Broken, match="another feed"):
        source.state(feed="feed-two")


@pytest.mark.parametrize(
    "data", ["", "[]", '{"kind":"grant"}', '{"seq":0}', '{"seq":"1"}', '{"seq":true}', "x" * 70_000]
)
def test_what_is_no_event_breaks_the_feed(source, data):
    with pytest.raises(Broken):
        source.feed.event(data)


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"feed": "a b", "seq": 1, "head": "A" * 43},
        {"feed": FEED, "seq": -1, "head": "A" * 43},
        {"feed": FEED, "seq": 1, "head": "AA"},
        {"feed": FEED, "seq": 0, "head": "A" * 43},
        {"feed": "line\r\nfeed", "seq": 1, "head": "A" * 43},
    ],
)
def test_what_is_no_reset_breaks_the_feed(source, members):
    with pytest.raises(Broken):
        source.feed.reset(members)


def test_events_and_statements_before_the_feed_said_where_it_begins_break_it(clocks):
    source = Source(clocks)
    with pytest.raises(Broken):
        source.feed.event(source.append(grant_id="grt_1"))
    with pytest.raises(Broken):
        source.state()


@pytest.mark.parametrize(
    "other",
    [
        {"iat": EPOCH - 16, "exp": EPOCH - 1},
        {"iat": EPOCH - 20, "exp": EPOCH + 30},
        {"iat": EPOCH + 60, "exp": EPOCH + 75},
        {"exp": EPOCH + 3600},
        {"exp": EPOCH},
        {"iat": None},
        {"seq": -1},
        {"head": "AA"},
        {"head": None},
        {"feed": None},
    ],
)
def test_a_statement_that_is_stale_from_the_future_or_unclear_proves_nothing(source, other):
    with pytest.raises(NotReadable):
        source.state(**other)
    assert not source.fresh


def test_more_revocations_than_can_be_remembered_are_left_to_status_lists(clocks):
    source = Source(clocks, most_refusals=2)
    source.reset()
    source.state()
    for number in range(2):
        source.feed.event(source.append(grant_id=f"grt_{number}"))
    source.state()
    clocks.forward(1)
    source.feed.event(source.append(grant_id="grt_of_too_many"))
    source.state()
    assert source.feed.since.asked_after == clocks.monotonic
    assert len(source.feed) == 2


def test_a_time_that_is_far_ahead_makes_no_list_too_old_for_ever(source, clocks):
    source.append("lists")
    data = json.dumps({"seq": 1, "at": "2999-01-01T00:00:00Z", "kind": "lists"})
    source.feed.event(data)
    assert source.feed.since.issued_from <= EPOCH + 5


def test_an_event_that_no_statement_ever_speaks_of_is_forged(source):
    source.state()
    source.feed.event('{"seq":1,"kind":"tokens","all":true,"issued_before":2000000000}')
    assert source.feed.refuses(token())
    source.state(0)
    source.state(0)
    with pytest.raises(Broken, match="does not speak"):
        source.state(0)
    source.feed.distrust(start_over=False)
    assert not source.feed.refuses(token())
