"""Telling what was done in the background: nothing waits for it, nothing fails by it, and what is lost is counted."""

import asyncio
import logging
import os
import threading

import pytest

from broker.sdk import Activity, AsyncClient, Client, Invalid, NotAuthenticated
from broker.sdk import reporting as room
from broker.sdk.reporting import Reporter
from broker.sdk.values import Introspection
from tests.sdk.conftest import TOKEN

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def taken(seen):
    """What a broker answers that takes all of it."""
    return {"recorded": len(seen.json()["activities"]), "repeated": 0, "refused": []}


def told(server):
    return [activity for seen in server.seen for activity in seen.json()["activities"]]


@pytest.fixture
def reporting(client):
    yield client
    client.close()


@pytest.fixture
def quick(monkeypatch):
    """Nothing is waited for in the background."""
    monkeypatch.setattr(room, "GATHER_S", 0)
    monkeypatch.setattr(room, "_PAUSE_S", 0)


def test_what_was_done_is_told_in_one_batch(server, reporting):
    server.answers(taken)
    reporting.report("grt_1", "search_contacts", scope="contacts:read", attributes={"batch": "seven"})
    reporting.report("grt_1", "GET /contacts", kind="request", outcome="denied", resource="https://crm.example/x")
    assert reporting.reports.flush()
    first, second = told(server)
    assert len(first.pop("id")) == 32
    assert first == {
        "kind": "tool", "action": "search_contacts", "at": "2026-03-01T12:00:00Z", "grant_id": "grt_1",
        "scope": "contacts:read", "outcome": "ok", "attributes": {"batch": "seven"},
    }  # fmt: skip
    assert (second["kind"], second["outcome"], second["resource"]) == ("request", "denied", "https://crm.example/x")
    assert server.seen[0].path == "/v1/activities"
    assert reporting.reports.counts() == {"told": 2, "waiting": 0, "refused": 0, "dropped": 0}


@pytest.mark.parametrize("grant", ["grt_1", {"grant_id": "grt_1", "sub": "x"}, Introspection(active=True, raw={"grant_id": "grt_1"})])  # fmt: skip  # noqa: E501
def test_a_grant_is_known_by_its_id_its_claims_or_what_introspection_said(server, reporting, grant):
    server.answers(taken)
    reporting.report(grant, "GET /contacts", kind="request")
    reporting.reports.flush()
    assert told(server)[0]["grant_id"] == "grt_1"


def test_without_a_grant_it_is_that_of_the_trace(server, reporting):
    server.answers(taken)
    reporting.with_trace(TRACEPARENT).report(None, "search")
    reporting.reports.flush()
    assert (told(server)[0]["traceparent"], "grant_id" in told(server)[0]) == (TRACEPARENT, False)


def test_a_client_of_another_trace_lets_go_of_nothing_that_is_shared(server, reporting):
    server.answers(taken)
    with reporting.with_trace(TRACEPARENT) as other:
        other.report(None, "one")
    reporting.report("grt_1", "two")
    assert reporting.reports.flush()
    assert len(told(server)) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"grant": None}, {"grant": {}}, {"grant": {"grant_id": 7}}, {"grant": object()}, {"kind": "read"},
        {"outcome": "fine"}, {"action": ""}, {"at": "yesterday"}, {"attributes": 7},
        {"attributes": {"a" * 255 + str(n): "😀" * 255 for n in range(16)}, "action": "x", "resource": "😀" * 1000},
    ],
)  # fmt: skip
def test_what_is_wrong_is_counted_and_never_raised(reporting, wrong):
    given = {"grant": "grt_1", "action": "x"} | wrong
    reporting.report(given.pop("grant"), given.pop("action"), **given)
    assert reporting.reports.refused + reporting.reports.waiting == 1
    if "resource" not in wrong:
        assert isinstance(reporting.reports.last_problem, Invalid)


def test_the_queue_has_an_end_and_says_so_once(server, time, http, caplog):
    client = Client(server.url, token=TOKEN, timing=time.timing(), http=http)
    client.reports = Reporter(client.send, client.timing, most_waiting=3)
    held = threading.Event()
    server.answers(lambda seen: (held.wait(20), taken(seen))[1], taken, taken)
    client.report("grt_1", "first")
    client.reports.flush(timeout_s=0)
    with caplog.at_level(logging.WARNING, "broker.sdk"):
        for _ in range(20):
            client.report("grt_1", "more")
    assert client.reports.dropped >= 16
    assert len([record for record in caplog.records if record.name == "broker.sdk"]) == 1
    held.set()
    assert client.reports.flush()
    assert client.reports.told + client.reports.dropped == 21
    client.close()


def test_a_batch_is_bounded_by_count_and_by_size(server, reporting):
    server.answers(*[taken] * 20)
    for number in range(250):
        reporting.report("grt_1", f"a{number}")
    for _ in range(20):
        reporting.report("grt_1", "x", attributes={f"n{number}": "y" * 255 for number in range(16)})
    assert reporting.reports.flush()
    sizes = [(len(seen.json()["activities"]), len(seen.body)) for seen in server.seen]
    assert max(count for count, _ in sizes) <= 100
    assert max(size for _, size in sizes) <= 65_536
    assert [activity["action"] for activity in told(server)][:250] == [f"a{number}" for number in range(250)]


def test_what_the_broker_refuses_is_counted_with_why(server, reporting):
    refusal = {"id": "x", "code": "not_found", "detail": "there is no such grant", "member": "grant_id"}
    server.answers({"recorded": 0, "repeated": 1, "refused": [refusal]})
    reporting.report("grt_1", "one")
    reporting.report("grt_2", "two")
    reporting.reports.flush()
    assert reporting.reports.counts() == {"told": 1, "waiting": 0, "refused": 1, "dropped": 0}
    assert reporting.reports.last_problem.code == "not_found"


def test_one_that_is_not_understood_costs_its_neighbours_nothing(server, a, reporting):
    def picky(seen):
        activities = seen.json()["activities"]
        if any(activity["action"] == "wrong" for activity in activities):
            return a.problem(400, "invalid_request") and (400, a.problem(400, "invalid_request"))
        return taken(seen)

    server.answers(*[picky] * 20)
    for number in range(8):
        reporting.report("grt_1", "wrong" if number == 5 else f"a{number}")
    assert reporting.reports.flush()
    assert reporting.reports.counts() == {"told": 7, "waiting": 0, "refused": 1, "dropped": 0}


def test_while_the_broker_is_away_it_waits_and_is_told_later_as_the_same(server, reporting, quick):
    server.answers(*[(503, {})] * 15, taken)
    reporting.report("grt_1", "one")
    assert reporting.reports.flush(10)
    assert len({activity["id"] for activity in told(server)}) == 1
    assert reporting.reports.counts() == {"told": 1, "waiting": 0, "refused": 0, "dropped": 0}


def test_a_client_that_is_closed_does_not_wait_for_a_broker_that_is_away(server, time, http, caplog):
    client = Client("http://127.0.0.1:9", token=TOKEN, timing=time.timing(), http=http)
    client.report("grt_1", "one")
    with caplog.at_level(logging.WARNING, "broker.sdk"):
        client.reports.close(timeout_s=0)
    assert client.reports.waiting <= 1
    client.report("grt_1", "two")
    assert client.reports.dropped >= 1
    client.close()


def test_without_a_token_nothing_is_lost_until_there_is_one(server, time, http, quick):
    tokens = iter([None, None, TOKEN])
    client = Client(server.url, token=lambda: next(tokens, TOKEN) or "", timing=time.timing(), http=http)
    server.answers(taken)
    client.report("grt_1", "one")
    assert client.reports.flush(10)
    assert isinstance(client.reports.last_problem, NotAuthenticated)
    assert client.reports.told == 1
    client.close()


def test_what_breaks_on_the_way_breaks_nothing_else(server, time, http):
    def broken():
        raise KeyError("a token that nobody may see")

    client = Client(server.url, token=broken, timing=time.timing(), http=http)
    client.report("grt_1", "one")
    assert client.reports.flush(10)
    assert client.reports.refused == 1
    assert "nobody may see" not in str(client.reports.last_problem)
    client.close()


def test_a_process_that_forked_tells_for_itself(server, reporting, monkeypatch):
    server.answers(taken, taken)
    reporting.report("grt_1", "one")
    assert reporting.reports.flush()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    reporting.report("grt_1", "two")
    assert reporting.reports.flush()
    assert len(told(server)) == 2
    monkeypatch.undo()


def test_credentials_and_tasks_tell_too(server, a, client):
    server.answers((201, a.issued()), taken, a.receipt())
    with client.credential("task_1", "https://crm.example/api", ["contacts:read"]) as source:
        source.report("too early")
        source.token()
        source.report("search", scope="contacts:read")
        assert client.reports.flush()
    assert server.seen[1].json()["activities"][0]["grant_id"] == "grt_1"
    server.answers((201, a.task()), taken, a.receipt())
    with client.run_task("x", ["summarizer"], 60) as run:
        run.report("grt_1", "search")
        assert client.reports.flush()
    client.close()


def test_the_same_for_asyncio(server, async_client):
    server.answers((503, {}), taken, taken)

    async def work():
        async with async_client as client:
            client.report("grt_1", "one")
            client.report({}, "wrong")
            assert await client.reports.flush()
            client.report("grt_1", "two")
        return client.reports

    reports = asyncio.run(work())
    assert reports.counts() == {"told": 2, "waiting": 0, "refused": 1, "dropped": 0}
    assert {activity["action"] for activity in told(server)} == {"one", "two"}


def test_what_is_told_outside_of_a_loop_waits_for_one(server, async_client):
    server.answers(taken)
    async_client.report("grt_1", "one")

    async def work():
        async with async_client:
            pass

    asyncio.run(work())
    assert len(told(server)) == 1


def test_an_async_client_that_is_closed_does_not_wait_either(time):
    async def work():
        client = AsyncClient("http://127.0.0.1:9", token=TOKEN, timing=time.timing())
        client.report("grt_1", "one")
        await client.reports.close(timeout_s=0)
        await client.close()
        return client.reports

    reports = asyncio.run(work())
    assert (reports.waiting, reports.dropped) == (0, 1)


def test_verbs_are_there_for_who_wants_to_hear_the_answer(server, client, time):
    activity = Activity(kind="tool", action="search", at=time.at, grant_id="grt_1")
    server.answers({"recorded": 1, "repeated": 0, "refused": []})
    answer = client.tell([activity])
    assert (answer.recorded, answer.repeated, answer.refused) == (1, 0, ())
    line = {
        "id": "act_1", "at": "2026-03-01T12:00:00Z", "source": "report", "what": "activity.tool", "who": "summarizer",
        "role": "agent", "task_id": "task_1", "grant_id": "grt_1", "agent": "summarizer", "resource": "r",
        "scopes": ["a"], "action": "search", "outcome": "ok", "reason": None, "beyond": ["scope"], "attributes": {},
        "trace_id": None, "received_at": "2026-03-01T12:00:00Z",
    }  # fmt: skip
    server.answers({"items": [line], "next_cursor": "c"}, {"items": [], "next_cursor": None})
    [found] = client.timeline("task_1", source="report")
    assert (found.what, found.beyond, found.raw) == ("activity.tool", ("scope",), line)
    assert "source=report" in server.seen[-1].path
    drift = {
        "task_id": "task_1", "drifted": False, "grants": [], "unused": [], "outside": [], "narrower": [],
        "dropped": 0, "complete": True,
    }  # fmt: skip
    server.answers(drift)
    assert not client.drift("task_1").drifted
    client.close()
