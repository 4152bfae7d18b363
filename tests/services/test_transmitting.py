"""What ends reaches its receivers: over real HTTP, at least once, in order, and nobody hears what is not theirs."""

import threading
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import Engine, event

from broker.domain.clock import epoch
from broker.domain.errors import Conflict, Forbidden, LimitExceeded, NotFound
from broker.domain.identity import User
from broker.domain.lifecycle import StreamState, TaskState
from broker.domain.secret import Secret
from broker.services.transmitting import Asked
from broker.store import feed, streams
from tests.house import CRM, ISSUER, LEDGER
from tests.ssf import Receiver, event_of, polled, pushed_to, quick_keys, refusing, ssf_house, verified

__all__ = ["quick_keys"]


@pytest.fixture
def house(store_url, tmp_path):
    built = ssf_house(store_url, tmp_path, most_waiting=10)
    yield built
    built.broker.close()


@pytest.fixture
def receiver():
    made = Receiver()
    yield made
    made.close()


def stream_for(house, receiver, *, by="crm-api", **more):
    return house.broker.streams.create(house.caller(by), pushed_to(receiver.url, **more))


def end_one(house, **more):
    """Revoke one grant; answers its id."""
    issued = house.issue(more.pop("task", None) or house.open_task(), **more)
    house.broker.revocation.revoke_grant(house.caller("ada"), issued.grant.id)
    return issued.grant.id


def deliver(house, *, times=1):
    for _ in range(times):
        house.broker.transmitting.tell()
        house.broker.transmitting.push(patience_s=20)


def poll(house, stream, *, by="crm-api", **asked):
    return house.broker.transmitting.poll(house.caller(by), stream.id, Asked(at_once=True, **asked))


def read(house, token, *, by="crm-api"):
    return verified(token, house.broker.standing.now().keys.jwks(), issuer=ISSUER, audience=by)


def told_on(house, stream, *, by="crm-api", **asked):
    """(event, subject) of each SET that waits, in their order."""
    claims = [read(house, token, by=by) for token in poll(house, stream, by=by, **asked).sets.values()]
    return [(event_of(one)[0], one["sub_id"]) for one in claims]


def overseen(house, stream):
    return house.broker.streams.show(house.caller("ada"), stream.id)


def session(grant_id):
    return {"format": "complex", "session": {"format": "opaque", "id": grant_id}}


# --- what is told ----------------------------------------------------------------------------------------------------


def test_what_ends_is_told_in_the_words_of_tokens(house):
    stream = house.broker.streams.create(house.caller("crm-api"), polled())
    admin, revocation = house.caller("ada"), house.broker.revocation
    task = house.open_task()
    grant_id = end_one(house, task=task)
    for axis, value in (("agent", "summarizer"), ("resource", CRM), ("orchestrator", "pipeline"), ("all", "all")):
        house.issue(house.open_task())
        revocation.revoke_along(admin, axis, value, reason="drill")
    told = told_on(house, stream)
    everything = {"format": "complex", "tenant": {"format": "opaque", "id": ISSUER}}
    assert told == [
        ("session-revoked", session(grant_id)),
        ("session-revoked", {"format": "iss_sub", "iss": ISSUER, "sub": "summarizer"}),
        ("session-revoked", {"format": "complex", "application": {"format": "uri", "uri": CRM}}),
        # Who opened a task does not stand in a token.
        ("session-revoked", everything),
        ("session-revoked", everything),
    ]


def test_a_task_that_ends_is_one_group_of_sessions(house):
    stream = house.broker.streams.create(house.caller("crm-api"), polled())
    task = house.open_task()
    house.issue(task)
    house.issue(task)
    house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED)
    subject = {"format": "complex", "group": {"format": "opaque", "id": task.id}}
    assert told_on(house, stream) == [("session-revoked", subject)]


def test_a_key_that_leaked_is_a_credential_that_changed(house):
    stream = house.broker.streams.create(house.caller("crm-api"), polled())
    house.issue(house.open_task())
    kid = house.broker.standing.now().keys.attesting("ES256").kid
    house.broker.revocation.compromise_key(house.caller("ada"), kid, reason="it leaked")
    tokens = list(poll(house, stream).sets.values())
    name, event = event_of(read(house, tokens[0]))
    assert name == "credential-change"
    assert event["credential_type"] == "jwk"
    assert event["change_type"] == "revoke"
    assert event["friendly_name"] == kid
    assert event["reason_admin"]["en"]
    # And what was signed with it before is to be asked about.
    assert event_of(read(house, tokens[1]))[0] == "session-revoked"


def test_a_set_says_when_and_until_when_and_one_transaction_for_all_who_hear(house):
    first = house.broker.streams.create(house.caller("crm-api"), polled())
    second = house.broker.streams.create(house.caller("audrey"), polled())
    house.issue(house.open_task())
    house.clock.forward(seconds=7)
    house.broker.revocation.revoke_along(house.caller("ada"), "agent", "summarizer", reason="drill")
    [mine] = [read(house, token) for token in poll(house, first).sets.values()]
    [theirs] = [read(house, token, by="audrey") for token in poll(house, second, by="audrey").sets.values()]
    now = epoch(house.clock())
    assert (mine["iat"], event_of(mine)[1]["event_timestamp"]) == (now, now)
    assert event_of(mine)[1]["issued_before"] >= now
    assert mine["txn"] == theirs["txn"]
    assert mine["jti"] != theirs["jti"]


def test_a_stream_begins_with_what_ends_after_it(house):
    end_one(house)
    stream = house.broker.streams.create(house.caller("crm-api"), polled())
    assert poll(house, stream).sets == {}


def test_only_the_events_that_were_asked_for_are_told(house):
    wish = polled(events_requested=("https://schemas.openid.net/secevent/caep/event-type/credential-change",))
    stream = house.broker.streams.create(house.caller("crm-api"), wish)
    end_one(house)
    assert poll(house, stream).sets == {}


# --- who hears it (INV-26) -------------------------------------------------------------------------------------------


def test_a_receiver_hears_only_of_what_concerns_its_audiences(house):
    crm = house.broker.streams.create(house.caller("crm-api"), polled())
    ledger = house.broker.streams.create(house.caller("ledger-api"), polled())
    auditor = house.broker.streams.create(house.caller("audrey"), polled())
    task = house.open_task()
    grant_id = end_one(house, task=task)
    house.issue(task)
    house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED)
    house.issue(house.open_task())
    for axis, value in (("agent", "summarizer"), ("resource", CRM), ("resource", LEDGER), ("agent", "scribe")):
        house.broker.revocation.revoke_along(house.caller("ada"), axis, value, reason="drill")
    heard = [subject for _, subject in told_on(house, crm)]
    assert [subject["format"] for subject in heard] == ["complex", "complex", "iss_sub", "complex"]
    assert heard[0] == session(grant_id)
    # An agent that never held anything for it is none of its business, nor is another's resource.
    assert [subject for _, subject in told_on(house, ledger, by="ledger-api")] == [
        {"format": "complex", "application": {"format": "uri", "uri": LEDGER}}
    ]
    assert len(told_on(house, auditor, by="audrey")) == 6


def test_a_user_is_told_of_to_those_whose_tokens_name_them(house):
    crm = house.broker.streams.create(house.caller("crm-api"), polled())
    ledger = house.broker.streams.create(house.caller("ledger-api"), polled())
    zoe = User(name="people:zoe", expires_at=house.clock() + timedelta(hours=1))
    house.issue(house.open_task(), user=zoe)
    for name in ("people:zoe", "people:bob"):
        house.broker.revocation.revoke_along(house.caller("ada"), "user", name, reason="drill")
    assert told_on(house, crm) == [("session-revoked", {"format": "iss_sub", "iss": ISSUER, "sub": "people:zoe"})]
    assert told_on(house, ledger, by="ledger-api") == []


def test_who_is_taken_out_of_the_configuration_hears_nothing_more(house, receiver):
    stream_for(house, receiver)
    end_one(house)
    house.broker.transmitting.tell()
    catalogue = house.broker.settings.catalogue
    without = replace(catalogue, principals=tuple(one for one in catalogue.principals if one.name != "crm-api"),
                      resources=tuple(replace(one, verifiers=()) for one in catalogue.resources))  # fmt: skip
    house.broker.administration.apply(without, by="tests")
    end_one(house)
    deliver(house)
    assert receiver.received == []


def test_a_subject_that_was_removed_is_not_told_of_until_it_is_added(house):
    caller = house.caller("crm-api")
    stream = house.broker.streams.create(caller, polled())
    summarizer = {"format": "iss_sub", "iss": ISSUER, "sub": "summarizer"}

    def revoke():
        house.issue(house.open_task())
        house.broker.revocation.revoke_along(house.caller("ada"), "agent", "summarizer", reason="drill")

    house.broker.streams.remove_subject(caller, stream.id, summarizer)
    revoke()
    grant_id = end_one(house)
    # What is about a session is told, whoever's it was: it is another subject.
    assert told_on(house, stream) == [("session-revoked", session(grant_id))]
    house.broker.streams.add_subject(caller, stream.id, summarizer)
    revoke()
    assert told_on(house, stream)[-1] == ("session-revoked", summarizer)


def test_the_stream_itself_cannot_be_removed(house):
    caller = house.caller("crm-api")
    stream = house.broker.streams.create(caller, polled())
    house.broker.streams.remove_subject(caller, stream.id, {"format": "opaque", "id": stream.id})
    house.broker.streams.verify(caller, stream.id, "still here")
    assert told_on(house, stream) == [("verification", {"format": "opaque", "id": stream.id})]


# --- push ------------------------------------------------------------------------------------------------------------


def test_it_is_pushed_as_rfc_8935_has_it(house, receiver):
    stream_for(house, receiver, authorization=Secret("Bearer hunter2"))
    grant_id = end_one(house)
    deliver(house)
    [(path, headers, token)] = receiver.received
    assert path == "/events"
    assert headers["Content-Type"] == "application/secevent+jwt"
    assert headers["Accept"] == "application/json"
    assert headers["Authorization"] == "Bearer hunter2"
    assert read(house, token)["sub_id"] == session(grant_id)
    deliver(house, times=3)
    assert len(receiver.received) == 1


def test_what_was_not_taken_is_pushed_again_as_the_same_set_and_in_order(house, receiver):
    receiver.answers = [500, (302, b"", {"Location": "http://127.0.0.1:1/inside"}), 200, 404, 202]
    stream = stream_for(house, receiver)
    ended = [end_one(house) for _ in range(3)]
    for _ in range(4):
        deliver(house)
        # Backing off: nothing is sent before its time.
        before = len(receiver.received)
        deliver(house)
        assert len(receiver.received) == before
        house.clock.forward(seconds=61)
    deliver(house)
    told = [claims["sub_id"]["session"]["id"] for claims in receiver.claims]
    assert told == [ended[0]] * 4 + ended
    assert len({claims["jti"] for claims in receiver.claims}) == 3
    assert len(set(receiver.tokens)) == 3
    assert overseen(house, stream).waiting == 0
    assert overseen(house, stream).stream.failures == 0


def test_why_it_was_not_taken_is_shown_without_the_address(house, receiver):
    receiver.answers = [503]
    stream = stream_for(house, receiver)
    end_one(house)
    deliver(house)
    found = overseen(house, stream).stream
    assert (found.failures, found.trouble) == (1, "127.0.0.1: it answered 503")


def test_a_set_that_its_receiver_cannot_take_does_not_hold_up_the_others(house, receiver):
    receiver.answers = [refusing("invalid_request"), (400, b"not json", {}), 202]
    stream_for(house, receiver)
    ended = [end_one(house) for _ in range(3)]
    deliver(house)
    assert [claims["sub_id"]["session"]["id"] for claims in receiver.claims] == ended
    events = house.broker.audit_trail.page(house.caller("audrey"), {}, before=None, limit=100)
    reasons = [event.reason for event in events if event.type == "stream.refused"]
    assert sorted(reasons) == ["the receiver answered invalid_request", "the receiver answered none"]


@pytest.mark.parametrize("code", ["authentication_failed", "access_denied", "invalid_key"])
def test_what_may_be_mended_is_not_given_up(house, receiver, code):
    receiver.answers = [refusing(code), 202]
    stream_for(house, receiver)
    end_one(house)
    deliver(house)
    house.clock.forward(seconds=61)
    deliver(house)
    assert len(set(receiver.tokens)) == 1
    assert len(receiver.received) == 2


def test_a_receiver_that_hangs_holds_up_nobody_else(store_url, tmp_path):
    house = ssf_house(store_url, tmp_path)
    house.broker.transmitting._deadline = timedelta(seconds=0.5)
    hanging, quick = Receiver(), Receiver()
    try:
        hanging.released.clear()
        slow = stream_for(house, hanging)
        stream_for(house, quick, by="audrey")
        end_one(house)
        house.broker.transmitting.tell()
        house.broker.transmitting.push(patience_s=0)
        assert quick.arrived.acquire(timeout=10)
        house.broker.transmitting.close()
        assert overseen(house, slow).stream.trouble == "127.0.0.1: no answer within 0.5 s"
        assert overseen(house, slow).waiting == 1
    finally:
        hanging.close()
        quick.close()
        house.broker.close()


def test_nothing_is_pushed_to_where_a_name_leads_inside(house, receiver):
    """The name is fine when it is given; what counts is where it leads when something is sent."""
    house.broker.transmitting._may_reach = lambda _address: False
    stream = stream_for(house, receiver)
    end_one(house)
    deliver(house)
    assert receiver.received == []
    assert "inside" in overseen(house, stream).stream.trouble


def test_a_stream_that_is_gone_leaves_nothing_behind_and_all_share_one_context(house, receiver):
    transmitting = house.broker.transmitting
    for _ in range(3):
        stream = stream_for(house, receiver)
        house.broker.streams.verify(house.caller("crm-api"), stream.id, None)
        deliver(house)
        house.broker.streams.delete(house.caller("crm-api"), stream.id)
    stays = stream_for(house, receiver, by="audrey")
    last = stream_for(house, receiver)
    end_one(house)
    deliver(house)
    assert len(receiver.received) == 5
    assert transmitting._posters.keys() == {stays.id, last.id}
    assert {poster._tls for poster in transmitting._posters.values()} == {transmitting._tls}


def test_of_two_brokers_one_pushes(house, store_url, tmp_path, receiver):
    second = ssf_house(store_url, tmp_path, clock=house.clock)
    try:
        stream_for(house, receiver)
        end_one(house)
        receiver.released.clear()
        house.broker.transmitting.tell()
        second.broker.transmitting.tell()
        house.broker.transmitting.push(patience_s=0)
        assert receiver.arrived.acquire(timeout=10)
        assert second.broker.transmitting.push(patience_s=0) == 0
        receiver.released.set()
        house.broker.transmitting.close()
        deliver(second)
        assert len(receiver.received) == 1
    finally:
        second.broker.close()


def test_a_pusher_that_was_superseded_changes_nothing(house, receiver):
    """INV-07: the first claim ran out, a second one is under way, and then the first comes back with a failure."""
    stream = stream_for(house, receiver)
    end_one(house)
    house.broker.transmitting.tell()
    now = house.clock()
    with house.broker.database.begin() as db:
        [(_, first)] = streams.claim_due(db, now=now, until=now + timedelta(seconds=30), limit=8)
    house.clock.forward(seconds=31)
    now = house.clock()
    with house.broker.database.begin() as db:
        [(_, second)] = streams.claim_due(db, now=now, until=now + timedelta(seconds=30), limit=8)
    with house.broker.database.begin() as db:
        assert streams.held(db, stream.id, first) is None
        assert not streams.pushed(db, stream.id, first, failures=9, trouble="late", next_attempt_at=now)
        assert streams.pushed(db, stream.id, second, failures=0, trouble=None, next_attempt_at=now)
    house.broker.transmitting._push(stream.id, first)
    assert receiver.received == []


def test_what_was_delivered_and_not_marked_is_delivered_again_as_the_same_set(house, receiver, monkeypatch):
    stream = stream_for(house, receiver)
    end_one(house)
    real = streams.taken

    def lost(*_):
        raise RuntimeError("the process died here")

    monkeypatch.setattr("broker.services.transmitting.streams.taken", lost)
    deliver(house)
    monkeypatch.setattr("broker.services.transmitting.streams.taken", real)
    assert len(receiver.received) == 1
    house.clock.forward(seconds=31)
    deliver(house)
    assert len(receiver.received) == 2
    assert len(set(receiver.tokens)) == 1
    assert overseen(house, stream).waiting == 0


def test_a_set_is_signed_by_a_key_that_is_published_when_it_is_sent(house, receiver):
    receiver.answers = [503, 202]
    stream_for(house, receiver)
    end_one(house)
    deliver(house)
    first = house.broker.standing.now().keys.attesting("RS256").kid
    house.broker.keys.rotate("RS256", actor="tests", now=house.clock())
    house.clock.forward(hours=3)
    house.broker.keys.rotate_due(house.clock())
    deliver(house)
    claims = read(house, receiver.tokens[-1])
    assert claims["jti"] == receiver.claims[0]["jti"]
    assert house.broker.standing.now().keys.attesting("RS256").kid != first


def broken_for(monkeypatch, owner, name, stream):
    real = getattr(owner, name)

    def breaks(*args, **more):
        if stream.id in args:
            raise RuntimeError("this stream is broken")
        return real(*args, **more)

    monkeypatch.setattr(owner, name, breaks)


def test_a_stream_that_fails_stops_no_other(house, receiver, monkeypatch):
    broken, sound = stream_for(house, receiver), stream_for(house, receiver, by="audrey")
    assert broken.id < sound.id
    broken_for(monkeypatch, house.broker.transmitting, "_tell_all", broken)
    end_one(house)
    deliver(house)
    assert [claims["aud"] for claims in receiver.claims] == ["audrey"]


def test_an_idle_stream_that_cannot_be_paused_stops_no_other(house, receiver, monkeypatch):
    idle = house.broker.streams.create(house.caller("crm-api"), polled())
    stream_for(house, receiver, by="audrey")
    house.clock.forward(days=8)
    broken_for(monkeypatch, house.broker.transmitting, "_stop_idle", idle)
    end_one(house)
    deliver(house)
    assert [claims["aud"] for claims in receiver.claims] == ["audrey"]


def test_what_waits_is_pushed_though_nothing_can_be_told(house, receiver, monkeypatch):
    stream_for(house, receiver)
    end_one(house)
    house.broker.transmitting.tell()

    def fails():
        raise RuntimeError("the feed is broken")

    monkeypatch.setattr(house.broker.transmitting, "tell", fails)
    with pytest.raises(RuntimeError, match="feed is broken"):
        house.broker.transmitting.run()
    assert receiver.arrived.acquire(timeout=10)


def test_what_opens_a_receiver_is_not_sent_to_the_one_before_it(house, receiver):
    """A PATCH that read the stream before a PUT named another receiver with another secret."""
    caller, later = house.caller("crm-api"), Receiver()
    try:
        stale = pushed_to(receiver.url, description="patched")
        stream = stream_for(house, receiver, authorization=Secret("Bearer of-the-first"))
        anew = pushed_to(later.url, authorization=Secret("Bearer of-the-second"))
        house.broker.streams.update(caller, stream.id, anew, keeps_authorization=False)
        patched = house.broker.streams.update(caller, stream.id, stale, keeps_authorization=True)
        assert (patched.endpoint_url, patched.description) == (later.url, "patched")
        end_one(house)
        deliver(house)
        assert receiver.received == []
        assert [headers["Authorization"] for _, headers, _ in later.received] == ["Bearer of-the-second"]
    finally:
        later.close()


# --- holding ---------------------------------------------------------------------------------------------------------


def set_state(house, stream, to):
    house.broker.streams.set_state(house.caller("crm-api"), stream.id, to, reason=None)


def test_what_ends_while_a_stream_is_paused_is_held(house, receiver):
    stream = stream_for(house, receiver)
    set_state(house, stream, StreamState.PAUSED)
    ended = [end_one(house) for _ in range(3)]
    deliver(house, times=2)
    assert receiver.received == []
    set_state(house, stream, StreamState.ENABLED)
    deliver(house)
    assert [claims["sub_id"]["session"]["id"] for claims in receiver.claims] == ended


def test_what_was_not_taken_yet_is_held_too(house):
    stream = house.broker.streams.create(house.caller("crm-api"), polled())
    grant_id = end_one(house)
    house.broker.transmitting.tell()
    set_state(house, stream, StreamState.PAUSED)
    assert poll(house, stream).sets == {}
    set_state(house, stream, StreamState.ENABLED)
    assert told_on(house, stream) == [("session-revoked", session(grant_id))]


def test_what_ends_while_a_stream_is_disabled_is_not_held(house):
    stream = house.broker.streams.create(house.caller("crm-api"), polled())
    end_one(house)
    house.broker.transmitting.tell()
    set_state(house, stream, StreamState.DISABLED)
    end_one(house)
    assert poll(house, stream).sets == {}
    house.broker.transmitting.tell()
    set_state(house, stream, StreamState.ENABLED)
    grant_id = end_one(house)
    assert told_on(house, stream) == [("session-revoked", session(grant_id))]


def test_a_stream_on_which_nothing_is_taken_is_paused_and_says_why(house, receiver):
    receiver.answers = [503]
    stream = stream_for(house, receiver)
    task = house.open_task()
    ended = [end_one(house, task=task) for _ in range(12)]
    deliver(house)
    assert (overseen(house, stream).waiting, overseen(house, stream).stream.state) == (10, StreamState.ENABLED)
    house.clock.forward(seconds=61)
    deliver(house)
    found = overseen(house, stream)
    assert (found.stream.state, found.stream.set_by) == (StreamState.PAUSED, "broker")
    assert "none was taken" in found.stream.reason
    assert found.waiting == 11
    receiver.answers = [202]
    house.clock.forward(seconds=61)
    receiver.received.clear()
    deliver(house)
    # What says that it is paused goes out all the same, and nothing else does.
    assert [event_of(claims)[0] for claims in receiver.claims] == ["stream-updated"]
    assert event_of(receiver.claims[0])[1]["status"] == "paused"
    set_state(house, stream, StreamState.ENABLED)
    receiver.received.clear()
    deliver(house, times=3)
    assert [claims["sub_id"]["session"]["id"] for claims in receiver.claims] == ended
    assert overseen(house, stream).waiting == 0


def test_a_stream_that_nobody_polls_is_paused_after_its_timeout(house):
    stream = house.broker.streams.create(house.caller("crm-api"), polled())
    house.clock.forward(days=6)
    poll(house, stream)
    house.clock.forward(days=6)
    house.broker.transmitting.tell()
    assert overseen(house, stream).stream.state is StreamState.ENABLED
    house.clock.forward(days=1)
    house.broker.transmitting.tell()
    assert overseen(house, stream).stream.state is StreamState.PAUSED
    assert [name for name, _ in told_on(house, stream)] == ["stream-updated"]


def test_who_missed_what_is_not_kept_any_more_is_told_that(house):
    stream = house.broker.streams.create(house.caller("crm-api"), polled())
    set_state(house, stream, StreamState.PAUSED)
    for _ in range(3):
        end_one(house)
    house.broker.feed.advance()
    house.clock.forward(days=2)
    house.broker.sweeper.sweep()
    end_one(house)
    house.broker.feed.advance()
    house.broker.sweeper.sweep()
    set_state(house, stream, StreamState.ENABLED)
    told = told_on(house, stream)
    assert told[0] == ("session-revoked", {"format": "complex", "tenant": {"format": "opaque", "id": ISSUER}})
    with house.broker.database.read() as db:
        assert streams.find_stream(db, streams.with_id(stream.id)).seq == feed.look(db).seq


def test_after_another_feed_begins_everybody_is_sent_to_ask(house):
    stream = house.broker.streams.create(house.caller("crm-api"), polled())
    end_one(house)
    house.broker.feed.renew("the database was restored")
    told = told_on(house, stream)
    assert told[0] == ("session-revoked", {"format": "complex", "tenant": {"format": "opaque", "id": ISSUER}})
    grant_id = end_one(house)
    assert told_on(house, stream)[-1] == ("session-revoked", session(grant_id))


def test_who_was_stopped_by_an_admin_does_not_begin_anew(house):
    caller, admin = house.caller("crm-api"), house.caller("ada")
    stream = house.broker.streams.create(caller, polled())
    house.broker.streams.pause(admin, stream.id, reason="an incident")
    with pytest.raises(Forbidden):
        house.broker.streams.delete(caller, stream.id)
    assert overseen(house, stream).stream.state is StreamState.PAUSED
    [denied] = [
        event
        for event in house.broker.audit_trail.page(house.caller("audrey"), {}, before=None, limit=100)
        if event.type == "stream.denied"
    ]
    assert denied.actor == "crm-api"
    house.broker.streams.resume(admin, stream.id)
    set_state(house, stream, StreamState.PAUSED)
    house.broker.streams.delete(caller, stream.id)


def test_a_stream_is_not_filled_with_verifications(house):
    caller = house.caller("crm-api")
    stream = house.broker.streams.create(caller, polled())
    set_state(house, stream, StreamState.PAUSED)
    for _ in range(10):
        house.broker.streams.verify(caller, stream.id, None)
        house.clock.forward(minutes=5)
    with pytest.raises(LimitExceeded) as refused:
        house.broker.streams.verify(caller, stream.id, None)
    assert (refused.value.limit, refused.value.value) == ("most_waiting", 10)
    assert overseen(house, stream).waiting == 10


# --- poll ------------------------------------------------------------------------------------------------------------


def test_so_many_are_polled_as_are_asked_for_and_the_rest_is_announced(house):
    stream = house.broker.streams.create(house.caller("crm-api"), polled())
    task = house.open_task()
    ended = [end_one(house, task=task) for _ in range(5)]
    told = []
    taken = ()
    for more in (True, True, False):
        answer = poll(house, stream, most=2, taken=taken)
        assert answer.more is more
        taken = tuple(answer.sets)
        told += [read(house, token)["sub_id"]["session"]["id"] for token in answer.sets.values()]
    assert told == ended
    assert poll(house, stream, taken=taken).sets == {}


def test_nobody_acknowledges_what_is_anothers(house):
    mine = house.broker.streams.create(house.caller("crm-api"), polled())
    theirs = house.broker.streams.create(house.caller("audrey"), polled())
    end_one(house)
    [jti] = poll(house, mine).sets
    poll(house, theirs, by="audrey", taken=(jti,), refused={jti: "invalid_request"})
    assert list(poll(house, mine).sets) == [jti]
    with pytest.raises(NotFound):
        poll(house, mine, by="audrey", taken=(jti,))


def statements_of(house, act):
    said = []

    def heard(_connection, _cursor, statement, *_):
        said.append(" ".join(statement.split()))

    event.listen(Engine, "before_cursor_execute", heard)
    try:
        act()
    finally:
        event.remove(Engine, "before_cursor_execute", heard)
    return said


@pytest.mark.parametrize("how", ["polled", "refused", "pushed", "not taken by push"])
def test_who_takes_holds_the_stream_before_what_waits_on_it(house, receiver, how):
    """As whoever stops or deletes the stream: in another order the two wait for each other."""
    caller = house.caller("crm-api")
    wish = pushed_to(receiver.url) if "push" in how else polled()
    receiver.answers = [refusing("invalid_request") if how == "not taken by push" else 202]
    stream = house.broker.streams.create(caller, wish)
    end_one(house)
    house.broker.transmitting.tell()
    if "push" in how:
        said = statements_of(house, lambda: house.broker.transmitting.push(patience_s=20))
    else:
        [jti] = poll(house, stream).sets
        asked = {"taken": (jti,)} if how == "polled" else {"refused": {jti: "invalid_request"}}
        said = statements_of(house, lambda: poll(house, stream, **asked))
    [at] = [index for index, one in enumerate(said) if one.startswith("DELETE FROM event_deliveries")]
    assert "FROM event_streams" in said[at - 1]
    assert ("FOR UPDATE" in said[at - 1]) == (house.broker.database.engine.dialect.name == "postgresql")
    assert overseen(house, stream).waiting == 0


def test_of_two_who_tell_at_once_each_event_is_told_once(house, store_url, tmp_path):
    second = ssf_house(store_url, tmp_path, clock=house.clock)
    try:
        stream = house.broker.streams.create(house.caller("crm-api"), polled())
        task = house.open_task()
        ended = [end_one(house, task=task) for _ in range(8)]
        threads = [threading.Thread(target=one.broker.transmitting.tell) for one in (house, second) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        told = [subject["session"]["id"] for _, subject in told_on(house, stream)]
        assert told == ended
    finally:
        second.broker.close()


def test_of_two_who_create_at_once_one_does(house):
    house.broker.streams.create(house.caller("crm-api"), polled())
    with pytest.raises(Conflict):
        house.broker.streams.create(house.caller("crm-api"), polled())
