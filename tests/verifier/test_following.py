"""A feed that lies, stutters, stops and comes back, over real HTTP."""

import json
import logging
import threading
import time

import pytest

from broker.conformance.fake_broker import AUDIENCE, FakeBroker, Frame, SigningKey
from broker.sdk.verifier import Refused
from tests.processes import until
from tests.verifier.conftest import URL, Wrong, bearer, why


@pytest.fixture
def verifier(verifier_of):
    return verifier_of(bound_s=4)


@pytest.fixture
def live(broker, verifier):
    """A token that is accepted by the stream and by nothing else."""
    issued = broker.issue()
    by_stream(verifier, issued)
    broker.serves -= {"lists", "poll"}
    return issued


def by_stream(verifier, issued):
    """Until a kept list is complete and the stream is followed, so that no list is fetched any more."""

    def settled():
        with verifier._lock:
            found, since = verifier._lists.get(issued.claims["status"]["status_list"]["uri"]), verifier._feed.since
        complete = since.complete_from is not None and found is not None and found.issued_at >= since.complete_from
        return verifier.state().channel == "stream" and complete

    until(lambda: why(verifier, issued) is None and settled(), what="a yes by the stream")


def refused(verifier, issued, code="revoked"):
    until(lambda: why(verifier, issued) == code, within_s=10, what=f"{code}")


def proven(verifier, seq):
    until(lambda: verifier.state().seq == seq, what=f"a proof of event {seq}")


def test_with_the_stream_alone_a_revocation_is_known_at_once_and_nothing_else_is_asked(broker, verifier, live):
    asked = len(broker.asked)
    assert why(verifier, live) is None
    broker.revoke("grant", grant_id=live.grant_id)
    refused(verifier, live)
    assert not [path for path in broker.asked[asked:] if "status-lists" in path]
    state = verifier.state()
    assert (state.channel, state.ready, state.problem) == ("stream", True, None)
    assert 0 < state.fresh_for_s <= 4


def test_a_stream_that_is_cut_goes_on_where_it_was(broker, verifier, live):
    broker.revoke("grant", grant_id="grt_of_somebody")
    proven(verifier, 1)
    broker.cut()
    broker.revoke("grant", grant_id=live.grant_id)
    refused(verifier, live)
    assert verifier.state().seq == 2


def test_a_broker_that_is_away_for_less_than_the_bound_is_not_missed(broker, verifier, live):
    broker.stop()
    assert why(verifier, live) is None
    broker.start()
    until(lambda: verifier.state().problem is None, what="the stream")
    assert why(verifier, live) is None


def test_events_that_come_twice_and_comments_and_unknown_events_do_no_harm(broker, verifier, live):
    def twice(frame):
        return [b": hello\n\n", bytes(frame), bytes(frame), b"event: weather\ndata: {}\n\n", b"id: x\n\n"]

    broker.mangle = twice
    broker.revoke("grant", grant_id=live.grant_id)
    refused(verifier, live)
    proven(verifier, 1)
    assert verifier.state().problem is None


def test_a_slow_feed_that_sends_a_byte_at_a_time_is_followed(broker, verifier, live):
    def slowly(frame):
        whole = bytes(frame)
        return [whole[at : at + 7] for at in range(0, len(whole), 7)]

    broker.mangle = slowly
    broker.revoke("grant", grant_id=live.grant_id)
    refused(verifier, live)


def test_line_ends_of_every_kind_are_read(broker, verifier, live):
    broker.mangle = lambda frame: [bytes(frame).replace(b"\n", b"\r\n")]
    broker.revoke("grant", grant_id=live.grant_id)
    refused(verifier, live)
    proven(verifier, 1)


def reordered():
    held = []

    def swap(frame):
        if frame.event != "revocation":
            return [bytes(frame)]
        held.append(frame)
        return [bytes(each) for each in (held.pop(), held.pop())] if len(held) == 2 else []

    return swap


def altered(frame):
    return [bytes(Frame(frame.event, frame.data.replace("grt_", "grt-"), frame.id))]


def missing(frame):
    return [] if frame.event == "revocation" and '"seq": 1,' in frame.data else [bytes(frame)]


@pytest.mark.parametrize("mangle", [reordered(), altered, missing], ids=["reordered", "altered", "missing"])
def test_a_chain_that_is_broken_refuses_until_it_is_whole_again(broker, verifier, live, mangle, caplog):
    other = broker.issue()
    assert why(verifier, other) is None
    broker.mangle = mangle
    with caplog.at_level(logging.WARNING, "broker.sdk.verifier"):
        broker.revoke("grant", grant_id=live.grant_id)
        broker.revoke("grant", grant_id="grt_of_somebody")
        refused(verifier, other, "not_fresh")
        until(lambda: any("not believed" in record.message for record in caplog.records), what="a warning")
    broker.heal()
    until(lambda: why(verifier, other) is None, what="a yes")
    assert why(verifier, live) == "revoked"


def test_a_forged_event_refuses_nobody_for_longer_than_it_is_believed(broker, verifier, live):
    def forge(frame):
        data = json.dumps({"seq": 1, "kind": "tokens", "all": True, "issued_before": 2**36})
        return [bytes(Frame("revocation", data)), bytes(frame)] if frame.event == "statement" else [bytes(frame)]

    broker.mangle = forge
    refused(verifier, live)
    broker.heal()
    until(lambda: why(verifier, live) is None, what="a yes")


@pytest.mark.parametrize("silence", ["nothing", "comments", "slow drip", "old statements", "forged statements"])
def test_without_a_new_proof_there_is_no_yes_after_the_bound(broker, verifier, live, silence):
    kept = Frame("statement", json.dumps({"statement": broker.statement()}))
    broker.mangle = {
        "nothing": lambda _: [],
        "comments": lambda _: [b":\n\n"],
        "slow drip": lambda _: [b":"],
        "old statements": lambda frame: [bytes(kept if frame.event == "statement" else frame)],
        "forged statements": lambda frame: [
            bytes(
                Frame("statement", json.dumps({"statement": SigningKey().sign({}, typ="feed-statement+jwt")}))
                if frame.event == "statement"
                else frame
            )
        ],
    }[silence]
    started = time.monotonic()
    refused(verifier, live, "not_fresh")
    assert time.monotonic() - started < 5.5
    assert verifier.state().channel == "none"
    broker.heal()
    until(lambda: why(verifier, live) is None, what="a yes")


@pytest.mark.parametrize(
    "junk",
    [
        b"data: " + b"x" * 200_000 + b"\n\n",
        b"x" * 200_000,
        b"data: x\n" * 30_000 + b"\n",
        b"event: statement\ndata: {\n\n",
        b'event: statement\ndata: {"statement": 5}\n\n',
        b'event: statement\ndata: {"statement": "a.b.c"}\n\n',
        b"event: reset\ndata: {}\n\n",
        b"event: revocation\ndata: {}\n\n",
        b"event: revocation\ndata: \xff\n\n",
        b"\x00\xff\xfe\n\n",
    ],
    ids=range(10),
)
def test_junk_ends_the_connection_and_the_next_one_may_be_better(broker, verifier, live, junk):
    sent = threading.Event()

    def once(frame):
        if sent.is_set():
            return [bytes(frame)]
        sent.set()
        return [junk]

    broker.mangle = once
    assert sent.wait(5)
    broker.serves |= {"lists"}
    broker.revoke("grant", grant_id=live.grant_id)
    refused(verifier, live)
    until(lambda: verifier.state().channel == "stream" and verifier.state().seq == 1, what="the stream")


def test_where_events_are_no_longer_kept_the_feed_resets_and_lists_are_fetched_anew(broker, verifier, live):
    broker.revoke("grant", grant_id="grt_of_somebody")
    proven(verifier, 1)
    broker.serves = set()
    broker.cut()
    broker.revoke("grant", grant_id=live.grant_id)
    broker.forget_before(2)
    broker.serves = {"jwks", "stream"}
    until(lambda: verifier.state().seq == 2, what="the reset")
    assert why(verifier, live) == "not_fresh"  # no event will ever tell, and the list is of before
    broker.heal()
    refused(verifier, live)


def test_a_feed_that_begins_anew_is_followed_and_nothing_is_forgotten(broker, verifier, live):
    other = broker.issue()
    broker.revoke("grant", grant_id=live.grant_id)
    refused(verifier, live)
    before = verifier.state().feed
    broker.begin_feed()
    broker.serves |= {"lists"}
    until(lambda: verifier.state().feed not in (None, before), what="the new feed")
    until(lambda: why(verifier, other) is None, what="a yes")
    assert why(verifier, live) == "revoked"


def test_after_two_streams_long_polls_are_used_and_the_stream_again_later(broker, verifier_of):
    broker.serves -= {"stream"}
    verifier = verifier_of(bound_s=4)
    issued, other = broker.issue(), broker.issue()
    until(lambda: verifier.state().channel == "poll" or why(verifier, issued) == "x", what="polling")
    assert why(verifier, issued) is None
    broker.revoke("grant", grant_id=issued.grant_id)
    refused(verifier, issued)
    assert why(verifier, other) is None
    broker.serves |= {"stream"}
    broker.serves -= {"poll"}
    until(lambda: verifier.state().channel == "stream", what="the stream")


def test_a_long_backlog_comes_in_pages(broker, verifier_of):
    verifier = verifier_of(bound_s=4)
    issued = broker.issue()
    by_stream(verifier, issued)
    broker.serves = {"jwks", "lists"}
    broker.cut()
    for number in range(2500):
        broker.revoke("grant", grant_id=f"grt_{number}")
    broker.revoke("grant", grant_id=issued.grant_id)
    broker.serves = {"jwks", "lists", "poll"}
    proven(verifier, 2501)
    assert verifier.state().refusals == 2501
    assert why(verifier, issued) == "revoked"


@pytest.mark.parametrize(
    "page",
    [
        [],
        {"items": 5},
        {"items": [5], "statement": "x", "reset": None},
        {"items": [{"data": 5}], "statement": "x", "reset": None},
        {"items": [], "statement": None, "reset": None},
        {"items": [], "statement": "a.b.c", "reset": 5},
        {"items": [{}] * 1001, "statement": "a.b.c", "reset": None},
    ],
    ids=range(7),
)
def test_what_is_no_page_proves_nothing_and_ends_nothing(broker, verifier_of, page, monkeypatch):
    genuine = broker.page
    monkeypatch.setattr(broker, "page", lambda after, wait_s: page)
    broker.serves -= {"stream"}
    verifier = verifier_of(bound_s=4)
    issued = broker.issue()
    verifier.start()
    until(lambda: "/v1/revocations?wait=0" in broker.asked, what="a poll")
    until(lambda: why(verifier, issued) is None and verifier.state().channel == "lists", what="a yes by the list")
    monkeypatch.setattr(broker, "page", genuine)
    until(lambda: verifier.state().channel == "poll", what="polling")


@pytest.mark.parametrize("off_s", [-600, 600], ids=["behind", "ahead"])
def test_a_clock_that_is_ten_minutes_off_refuses_and_says_so(broker, verifier_of, off_s):
    verifier = verifier_of(timing=Wrong(off_s).timing())
    now = broker.now()
    issued = broker.issue(exp=now + 3000)
    expired = broker.issue(iat=now - 300, exp=now - 10)
    until(lambda: why(verifier, issued) == "clock", what="the clock noticed")
    assert why(verifier, expired) in ("clock", "expired")
    with pytest.raises(Refused, match=f"{'behind' if off_s < 0 else 'ahead'}"):
        verifier.check(bearer(issued), "GET", URL)
    assert not verifier.state().ready


def test_keys_that_rotate_are_known_at_once_and_unknown_names_do_not_make_us_ask(broker, verifier, live):
    asked = broker.asked.count("/oauth2/jwks")
    for _ in range(20):
        assert why(verifier, broker.issue(key=SigningKey())) == "unknown_key"
    assert broker.asked.count("/oauth2/jwks") <= asked + 2
    coming = SigningKey()
    broker.keys.append(coming)
    until(lambda: why(verifier, broker.issue(key=coming)) is None, what="the new key known")
    broker.keys.insert(0, broker.keys.pop())
    assert why(verifier, live) is None
    broker.revoke("grant", grant_id=live.grant_id)
    refused(verifier, live)


def test_a_key_that_leaked_proves_nothing_while_it_is_still_published(broker, verifier, live):
    """Whoever has it could go on saying that nothing was revoked."""
    other = broker.issue(key=broker.coming)
    assert why(verifier, other) is None
    broker.revoke("tokens", key=broker.keys[0].kid, issued_before=253402300799)
    refused(verifier, live)
    broker.heal()
    until(lambda: why(verifier, other) == "not_fresh", within_s=10, what="the end of what the key proved")
    assert "revoked" in verifier.state().problem
    broker.rotate()
    until(lambda: why(verifier, other) is None, what="a yes by the next key")
    assert why(verifier, live) == "revoked"


def test_a_token_function_that_fails_is_a_problem_and_no_end(broker, verifier_of):
    def failing():
        raise RuntimeError("the-workload-token-itself")

    verifier = verifier_of(token_source=failing, introspect=True)
    assert why(verifier, broker.issue()) == "not_fresh"
    until(lambda: "RuntimeError" in (verifier.state().problem or ""), what="the problem said")
    assert "itself" not in verifier.state().problem


def test_keys_are_kept_while_they_cannot_be_fetched(broker, verifier, live):
    broker.serves -= {"jwks"}
    verifier._keys.refresh(at_most_every_s=0)
    assert "503" in verifier._keys.problem
    assert why(verifier, live) is None


def test_a_verifier_without_keys_says_that_and_not_that_the_token_is_bad(broker, verifier_of):
    broker.serves = set()
    verifier = verifier_of()
    assert why(verifier, broker.issue()) == "no_keys"
    broker.heal()
    until(lambda: why(verifier, broker.issue()) is None, what="a yes")


def test_without_a_token_of_its_own_status_lists_are_all_there_is(broker, verifier_of):
    verifier = verifier_of(token_source=None, bound_s=4)
    assert verifier.wait_ready().channel == "lists"
    issued = broker.issue()
    assert why(verifier, issued) is None
    broker.revoke("grant", grant_id=issued.grant_id)
    refused(verifier, issued)
    assert not [path for path in broker.asked if path.startswith("/v1/")]


def test_introspection_knows_what_no_event_has_told_and_its_silence_is_no_yes(broker, verifier_of):
    verifier = verifier_of(introspect=True)
    issued, other = broker.issue(), broker.issue()
    assert why(verifier, issued) is None
    broker.revoke_quietly(issued)
    assert why(verifier, issued) == "revoked"
    assert why(verifier, other) is None
    broker.serves -= {"introspection"}
    assert why(verifier, other) == "not_fresh"


def test_a_workload_token_that_cannot_be_had_is_said_and_not_fatal(broker, verifier_of, tmp_path):
    file = tmp_path / "token"
    verifier = verifier_of(token_source=file, bound_s=4)
    until(lambda: "workload token" in (verifier.start() or verifier.state().problem or ""), what="the problem said")
    file.write_text("a-workload-token\n")
    until(lambda: verifier.state().channel == "stream", what="the stream")


def test_ready_is_said_when_a_yes_is_possible_and_its_absence_with_the_reason(broker, verifier_of):
    assert verifier_of().wait_ready().ready
    broker.serves = {"jwks"}
    with pytest.raises(TimeoutError, match="503"):
        verifier_of().wait_ready(timeout_s=1)


def test_a_closed_verifier_refuses_everything_and_leaves_no_thread(broker, verifier, live):
    before = threading.active_count()
    verifier.close()
    verifier.close()
    assert why(verifier, live) == "not_fresh"
    assert verifier.state().channel == "none"
    assert not [each for each in threading.enumerate() if each.name == "broker-verifier"]
    assert threading.active_count() <= before


def test_nothing_that_is_logged_holds_a_token(broker, verifier_of, caplog):
    with caplog.at_level(logging.DEBUG, "broker.sdk.verifier"):
        verifier = verifier_of(bound_s=4, token_source="the-workload-token-itself")
        issued = broker.issue()
        by_stream(verifier, issued)
        broker.serves -= {"stream"}
        broker.cut()
        until(lambda: verifier.state().channel == "poll", what="polling")
        broker.stop()
        refused(verifier, issued, "not_fresh")
    assert caplog.records
    assert issued.token not in caplog.text
    assert "the-workload-token-itself" not in caplog.text
    assert "the-workload-token-itself" not in repr(vars(verifier))


def test_two_brokers_tokens_are_two_things(broker, verifier):
    other = FakeBroker(every_s=0.1)
    try:
        assert why(verifier, other.issue(iss=broker.url)) == "unknown_key"
        assert why(verifier, other.issue()) == "unknown_key"
    finally:
        other.close()


@pytest.mark.parametrize("bound_s", [0, 3, 16])
def test_a_bound_that_is_too_short_or_longer_than_the_published_one_is_refused(broker, verifier_of, bound_s):
    with pytest.raises(ValueError, match="bound_s"):
        verifier_of(bound_s=bound_s)


def test_a_broker_that_would_be_asked_in_the_clear_is_refused(verifier_of):
    from broker.sdk import BrokerError
    from broker.sdk.verifier import Verifier

    with pytest.raises(BrokerError, match="in the clear"):
        Verifier("http://broker.example", AUDIENCE)
    with pytest.raises(ValueError, match="token_source"):
        verifier_of(token_source=None, introspect=True)
