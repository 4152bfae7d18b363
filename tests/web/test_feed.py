"""The feed by `broker serve`: a few streams, polls beside them, and who is refused; the same on both stores."""

import json
import threading
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import pytest

from broker.domain.feed import end_of_task
from broker.services import broadcast
from broker.services.broadcast import Broadcast, Places
from broker.store import feed as rows
from broker.web import feed
from tests.feeds import Follower, Parser
from tests.house import ISSUER

STREAM, POLL = "/v1/revocations/feed", "/v1/revocations"


class Reader:
    """One stream over the test client, read block by block; what it says is put together as a verifier does."""

    def __init__(self, web, by="crm-api", last_id=None, headers=None):
        headers = {**web.as_(by), **({"Last-Event-ID": last_id} if last_id else {}), **(headers or {})}
        self.answer = web.client.get(STREAM, headers=headers, buffered=False)
        self.parser = Parser()
        self.heard = Follower(dict(web.house.broker.verification.jwks()), ISSUER)
        self.names = []
        self._parts = iter(self.answer.response) if self.answer.status_code == 200 else iter(())

    def read(self):
        """The next bytes; False when the stream has ended."""
        part = next(self._parts, None)
        for name, data in [] if part is None else self.parser.feed(part):
            self.names.append(name)
            self.heard.hear(name, data)
        return part is not None

    def until(self, done):
        while not done():
            assert self.read(), "the stream ended"

    def close(self):
        self.answer.close()


@pytest.fixture
def open_stream(web_on_both):
    readers = []

    def make(**more):
        readers.append(Reader(web_on_both, **more))
        return readers[-1]

    yield make
    for each in readers:
        each.close()


@pytest.fixture
def web(web_on_both):
    return web_on_both


def announce(web, *names):
    with web.house.broker.database.begin() as db:
        rows.announce(db, web.house.clock(), [end_of_task(name) for name in names])


def poll(web, by="crm-api", **query):
    answer = web.client.get(POLL, headers=web.as_(by), query_string=query)
    assert answer.status_code == 200, answer.json
    return answer.json


# --- Streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_begins_with_a_reset_and_a_statement_and_goes_on_with_what_ends(web, open_stream):
    reader = open_stream()
    assert reader.answer.mimetype == "text/event-stream"
    assert reader.answer.headers["Cache-Control"] == "no-store, no-transform"
    assert reader.answer.headers["X-Accel-Buffering"] == "no"
    reader.until(lambda: reader.heard.statements)
    assert reader.names == ["reset", "statement"]
    task = web.open_task()
    web.post(f"/v1/tasks/{task['id']}/complete", "pipeline")
    reader.until(lambda: reader.heard.events)
    assert reader.heard.events[0]["task_id"] == task["id"]
    assert reader.parser.last_id == reader.heard.position
    reader.until(lambda: reader.heard.statements == 2)
    assert reader.heard.statement["seq"] == 1


def test_a_stream_that_broke_goes_on_where_it_was(web, open_stream):
    first = open_stream()
    first.until(lambda: first.heard.statements)
    announce(web, "task_1", "task_2")
    first.until(lambda: first.heard.seq == 2)
    first.close()
    announce(web, "task_3", "task_4")
    second = open_stream(last_id=first.parser.last_id)
    second.heard = first.heard
    second.until(lambda: second.heard.seq == 4)
    assert "reset" not in second.names
    assert [event["task_id"] for event in second.heard.events] == ["task_1", "task_2", "task_3", "task_4"]
    statements = second.heard.statements
    second.until(lambda: second.heard.statements > statements)


@pytest.mark.parametrize("last_id", ["another:3", "garbage", "a:b:c", ":", "x" * 900, "another:-1"])
def test_a_place_of_another_feed_is_a_reset(open_stream, last_id):
    reader = open_stream(last_id=last_id)
    reader.until(lambda: reader.heard.statements)
    assert reader.names == ["reset", "statement"]


def test_a_place_that_is_not_there_yet_is_a_reset(web, open_stream):
    announce(web, "task_1")
    feed_id = web.house.broker.feed.look().seen.feed_id
    reader = open_stream(last_id=f"{feed_id}:2")
    reader.until(lambda: reader.heard.seq == 1)
    assert reader.names[0] == "reset"


def test_more_than_is_remembered_is_read_from_the_store(web, open_stream, monkeypatch):
    monkeypatch.setattr(broadcast, "_REMEMBERED", 3)
    reader = open_stream()
    reader.until(lambda: reader.heard.statements)
    announce(web, *(f"task_{number}" for number in range(2_500)))
    reader.until(lambda: reader.heard.seq == 2_500)
    late = open_stream(last_id=f"{reader.heard.feed}:0")
    late.heard = replace(reader.heard, seq=0, head=reader.heard.heads[0], events=[])
    late.until(lambda: late.heard.seq == 2_500)


@pytest.mark.parametrize("by", ["summarizer", "pipeline", "gus"])
@pytest.mark.parametrize("path", [STREAM, POLL])
def test_whoever_is_no_verifier_is_refused(web, by, path):
    answer = web.get(path, by)
    assert (answer.status_code, answer.json["code"]) == (403, "role_missing")


@pytest.mark.parametrize("path", [STREAM, POLL])
def test_whoever_is_nobody_is_refused(web, path):
    assert web.get(path).status_code == 401
    assert web.client.get(path, headers={"Authorization": "Bearer eyJ"}).status_code == 401


def test_a_query_that_nobody_knows_is_refused(web):
    answer = web.client.get(STREAM, headers=web.as_("crm-api"), query_string={"after": "x:1"})
    assert (answer.status_code, answer.json["member"]) == (400, "after")


def test_a_stream_ends_with_its_callers_token(web, open_stream):
    reader = open_stream()
    reader.until(lambda: reader.heard.statements)
    web.house.clock.at = web.house.caller("crm-api").proof_expires_at - timedelta(seconds=1)
    assert reader.read()
    web.house.clock.forward(seconds=1)
    while reader.read():
        pass


def test_a_stream_ends_after_its_longest_time(web, open_stream):
    settings = replace(
        web.house.broker.settings, feed=replace(web.house.broker.settings.feed, longest_stream=timedelta(seconds=10))
    )
    object.__setattr__(web.house.broker, "settings", settings)
    reader = open_stream()
    reader.until(lambda: reader.heard.statements)
    web.house.clock.forward(seconds=10)
    while reader.read():
        pass


def test_a_stream_ends_when_its_caller_is_no_verifier_any_more(web, open_stream):
    reader, other = open_stream(by="ledger-api"), open_stream(by="ada")
    for each in (reader, other):
        each.until(lambda each=each: each.heard.statements)
    house = web.house
    catalogue = house.broker.standing.now().catalogue
    without = tuple(rule for rule in catalogue.principals if rule.name != "ledger-api")
    resources = tuple(replace(one, verifiers=("crm-api",)) for one in catalogue.resources)
    house.broker.administration.apply(replace(catalogue, principals=without, resources=resources), by="ada")
    while reader.read():
        pass
    assert other.read()


def test_a_stream_ends_when_the_feed_begins_anew(web, open_stream):
    reader = open_stream()
    reader.until(lambda: reader.heard.statements)
    web.house.broker.feed.renew("restored")
    while reader.read():
        pass
    again = open_stream(last_id=reader.heard.position)
    again.until(lambda: again.heard.events)
    assert (again.names[0], again.heard.events[0]["kind"]) == ("reset", "lists")


def test_one_stream_more_than_may_be_is_told_to_come_again(web, open_stream):
    object.__setattr__(web.house.broker, "feed_places", Places(2, of_one_caller=1))
    first, second = open_stream(), open_stream(by="ada")
    third = web.get(STREAM, "audrey")
    assert (third.status_code, third.json["code"], third.headers["Retry-After"]) == (503, "unavailable", "2")
    assert poll(web, by="audrey")["reset"] is not None  # who polls is not in the way
    second.close()
    mine = open_stream()
    assert mine.answer.status_code == 503  # one caller leaves room for others
    first.close()
    assert open_stream().answer.status_code == 200


def test_who_asks_for_the_head_alone_holds_no_place(web):
    for _ in range(40):
        answer = web.client.head(STREAM, headers=web.as_("crm-api"))
        answer.close()
        assert answer.status_code == 200


def test_a_store_that_goes_away_ends_no_stream_and_vouches_for_nothing(web, open_stream, monkeypatch):
    from broker.domain.errors import Unavailable

    reader = open_stream()
    reader.until(lambda: reader.heard.statements)
    advance = web.house.broker.feed.advance

    def unavailable():
        raise Unavailable("the store did not answer")

    monkeypatch.setattr(web.house.broker.feed, "advance", unavailable)
    monkeypatch.setattr(feed, "_LOOK_AGAIN_S", 0.05)
    before = reader.heard.statements
    for _ in range(40):
        assert reader.read()  # comments: somebody is there, and says nothing
    assert reader.heard.statements <= before + 1
    monkeypatch.setattr(web.house.broker.feed, "advance", advance)
    reader.until(lambda: reader.heard.statements > before + 1)


# --- Polls ------------------------------------------------------------------------------------------------------------


def test_a_poll_without_a_place_is_a_reset_and_the_next_one_goes_on(web):
    first = poll(web)
    assert first["items"] == []
    heard = Follower(dict(web.house.broker.verification.jwks()), ISSUER)
    heard.hear("reset", json.dumps(first["reset"]))
    assert first["next_after"] == heard.position
    heard.state(first["statement"])
    announce(web, "task_1", "task_2")
    second = poll(web, after=first["next_after"])
    assert second["reset"] is None
    for item in second["items"]:
        heard.hear("revocation", item["data"])
    assert [event["task_id"] for event in heard.events] == ["task_1", "task_2"]
    assert second["next_after"] == heard.position
    heard.state(second["statement"])
    assert poll(web, after=second["next_after"])["items"] == []


def test_a_poll_gives_a_thousand_at_most_and_says_how_to_go_on(web):
    after = poll(web)["next_after"]
    announce(web, *(f"task_{number}" for number in range(2_300)))
    counts = []
    for _ in range(4):
        answer = poll(web, after=after)
        counts.append(len(answer["items"]))
        after = answer["next_after"]
    assert counts == [1000, 1000, 300, 0]


def test_a_poll_whose_events_are_not_kept_any_more_is_a_reset(web, monkeypatch):
    """They were when it was asked where it goes on."""
    monkeypatch.setattr(broadcast, "_REMEMBERED", 3)
    after = poll(web)["next_after"]
    announce(web, *(f"task_{number}" for number in range(10)))
    assert len(poll(web, after=after)["items"]) == 10
    service = web.house.broker.feed
    replay = service.replay

    def forgotten(last, upto, **more):
        with web.house.broker.database.begin() as db:
            rows.forget(db, numbered_before=web.house.clock() + timedelta(seconds=1), limit=6)
        return replay(last, upto, **more)

    monkeypatch.setattr(service, "replay", forgotten)
    answer = poll(web, after=after)
    assert (answer["items"], answer["reset"]["feed"]) == ([], after.split(":")[0])
    assert answer["next_after"] == f"{answer['reset']['feed']}:{answer['reset']['seq']}"


def test_a_poll_whose_feed_begins_anew_while_it_is_answered_is_a_reset_to_the_new_one(web, monkeypatch):
    """Its numbers are those of the new one too, and its events would be taken for what they are not."""
    monkeypatch.setattr(broadcast, "_REMEMBERED", 3)
    after = poll(web)["next_after"]
    announce(web, *(f"task_{number}" for number in range(10)))
    assert len(poll(web, after=after)["items"]) == 10
    service = web.house.broker.feed
    replay = service.replay

    def renewed(last, upto, **more):
        service.renew("restored")
        service.advance()
        return replay(last, upto, **more)

    monkeypatch.setattr(service, "replay", renewed)
    answer = poll(web, after=after)
    assert answer["items"] == []
    assert answer["reset"]["feed"] == service.look().seen.feed_id != after.split(":")[0]


def test_a_poll_of_another_feed_is_a_reset(web):
    answer = poll(web, after="another:12", wait=30)
    assert (answer["items"], answer["reset"]["seq"]) == ([], 0)


@pytest.mark.parametrize(
    "query",
    [
        {"after": "12"}, {"after": ""}, {"after": "a:b"}, {"after": "a:01"}, {"after": "a:-1"}, {"after": "a:1:2"},
        {"after": "a" * 65 + ":1"}, {"after": "a:" + "9" * 19}, {"after": "a:1\n"}, {"after": "ä:1"},
        {"wait": "31"}, {"wait": "-1"}, {"wait": "1.0"}, {"wait": ""}, {"wait": "01"}, {"wait": "1e1"}, {"wait": "٣"},
        {"more": "1"},
    ],
)  # fmt: skip
def test_a_place_or_a_wait_that_is_none_is_refused(web, query):
    answer = web.client.get(POLL, headers=web.as_("crm-api"), query_string=query)
    assert (answer.status_code, answer.json["member"]) == (400, next(iter(query)))


@contextmanager
def in_a_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    yield found
    thread.join(30)
    assert found


def test_a_poll_waits_for_what_ends_and_is_answered_at_once_then(web):
    after = poll(web)["next_after"]
    with in_a_thread(lambda: poll(web, after=after, wait=30)) as found:
        while not web.house.broker.broadcast._readers:
            assert not found
        task = web.open_task()
        web.post(f"/v1/tasks/{task['id']}/complete", "pipeline")
    assert json.loads(found[0]["items"][0]["data"])["task_id"] == task["id"]


def test_a_poll_for_which_nothing_came_is_answered_with_nothing_and_a_statement(web):
    after = poll(web)["next_after"]
    answer = poll(web, after=after, wait=1)
    assert (answer["items"], answer["next_after"]) == ([], after)
    assert answer["statement"]


def test_where_too_many_wait_a_poll_is_answered_at_once(web):
    object.__setattr__(web.house.broker, "feed_waiting", Places(0))
    after = poll(web)["next_after"]
    assert poll(web, after=after, wait=30)["items"] == []


def test_a_broker_that_stops_lets_everybody_go(web, open_stream):
    reader = open_stream()
    reader.until(lambda: reader.heard.statements)
    after = poll(web)["next_after"]
    with in_a_thread(lambda: poll(web, after=after, wait=30)):
        while web.house.broker.broadcast._readers < 2:
            pass
        web.house.broker.stop()
    while reader.read():
        pass


# --- What one process reads for all ---------------------------------------------------------------------------------


class Counted:
    """The feed, and how often it was looked at; a look goes on when it is let."""

    def __init__(self, feed_):
        self._feed = feed_
        self.looks = 0
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def __getattr__(self, name):
        return getattr(self._feed, name)

    def look(self):
        self.looks += 1
        assert self.may_go_on.wait(30)
        return self._feed.look()


def test_nobody_looks_while_nobody_reads(web):
    counted = Counted(web.house.broker.feed)
    made = Broadcast(counted, listen=lambda _ring: lambda: None)
    made.ring()
    assert made._thread is None
    with made.reading():
        edition = made.newest()
        made.wait(edition, at_most_s=30)
    seen = counted.looks
    made.ring()
    made._thread.join(0.2)
    assert counted.looks <= seen + 1  # one may have been on its way
    made.stop()


def test_one_look_is_enough_for_a_crowd(web):
    counted = Counted(web.house.broker.feed)
    made = Broadcast(counted, listen=lambda _ring: lambda: None)
    counted.may_go_on.clear()
    found = []
    crowd = [threading.Thread(target=lambda: found.append(made.newest())) for _ in range(20)]
    for each in crowd:
        each.start()
    counted.may_go_on.set()
    for each in crowd:
        each.join(30)
    assert len(found) == 20
    assert counted.looks < 20
    made.stop()


def test_a_statement_is_said_again_before_two_seconds_are_over(web):
    now = [0.0]
    made = Broadcast(web.house.broker.feed, listen=lambda _ring: lambda: None, monotonic=lambda: now[0])
    first = made.look()
    now[0] = 1.0
    assert made.look() is first  # nothing new, and said a moment ago
    announce(web, "task_1")
    second = made.look()
    assert (second.stated, second.seq) == (first.stated, first.seq + 1)
    now[0] = broadcast.STATED_EVERY_S
    assert made.look().stated == first.stated + 1
    assert broadcast.STATED_EVERY_S < 2
    made.stop()
