"""Cancelled, interrupted, left alone by the broker: what was asked for is handed back all the same, and in time."""

import asyncio
import signal
import subprocess
import sys
import threading

import pytest

from broker import sdk
from tests.sdk.test_sdk_approvals import approval, pending

CRM = "https://crm.example/api"


def source_of(client):
    return client.credential("task_1", CRM, ["contacts:read"])


def said(server):
    return [f"{seen.method} {seen.path}" for seen in server.seen]


class Held:
    """An answer that waits until the test lets it go, and says when it was asked for."""

    def __init__(self, reply):
        self.reply = reply
        self.asked, self.go = threading.Event(), threading.Event()

    def __call__(self, _seen):
        self.asked.set()
        assert self.go.wait(10)
        return self.reply


async def until_asked(held):
    assert await asyncio.to_thread(held.asked.wait, 10)


def cancelled_while(async_client, held, work):
    """Run `work(client)`, and cancel it while the broker holds its answer."""

    async def main():
        async with async_client as client:
            working = asyncio.ensure_future(work(client))
            await until_asked(held)
            working.cancel()
            await asyncio.sleep(0)
            held.go.set()
            with pytest.raises(asyncio.CancelledError):
                await working

    asyncio.run(main())


def test_cancelled_while_it_is_issued_the_grant_is_found_by_its_key_and_handed_back(async_client, server, a):
    """INV-06 is what makes the second request the same."""
    held = Held((201, a.issued()))
    server.answers(held, (201, a.issued()), a.receipt())

    async def work(client):
        async with source_of(client) as source:
            await source.token()

    cancelled_while(async_client, held, work)
    assert said(server) == ["POST /v1/grants", "POST /v1/grants", "POST /v1/grants/grt_1/revoke"]
    assert server.seen[0].headers["Idempotency-Key"] == server.seen[1].headers["Idempotency-Key"]


def test_cancelled_while_it_is_renewed_the_grant_is_handed_back(async_client, server, a, time):
    held = Held((200, a.issued("second.secret.token")))
    server.answers((201, a.issued()), held, a.receipt())

    async def work(client):
        async with source_of(client) as source:
            await source.token()
            time.move(201)
            await source.token()

    cancelled_while(async_client, held, work)
    assert said(server)[1:] == ["POST /v1/grants/grt_1/renew", "POST /v1/grants/grt_1/revoke"]


def test_cancelled_while_it_is_handed_back_that_is_done_first(async_client, server, a):
    held = Held((200, a.receipt()))
    server.answers((201, a.issued()), held)
    answered = []

    async def work(client):
        try:
            async with source_of(client) as source:
                await source.token()
        except asyncio.CancelledError:
            answered.append(held.go.is_set())
            raise

    cancelled_while(async_client, held, work)
    assert said(server) == ["POST /v1/grants", "POST /v1/grants/grt_1/revoke"]
    assert answered == [True]


def test_a_handing_back_that_failed_while_it_was_cancelled_is_told(async_client, server, a, time):
    held = Held((500, {}))
    server.answers((201, a.issued()), held)

    async def work(client):
        try:
            async with source_of(client) as source:
                await source.token()
        except asyncio.CancelledError as error:
            assert "what was to be done at the end failed" in error.__notes__[0]
            raise

    cancelled_while(async_client, held, work)


def test_a_task_is_ended_though_its_block_is_cancelled_while_it_ends(async_client, server, a):
    held = Held((200, a.receipt()))
    server.answers((201, a.task()), held)
    receipts = []

    async def work(client):
        running = client.run_task("summarize leads", ["summarizer"], 3600)
        async with running as task:
            receipts.append(task)

    cancelled_while(async_client, held, work)
    assert said(server) == ["POST /v1/tasks", "POST /v1/tasks/task_1/complete"]
    assert receipts[0].receipt.outcome == "completed"


def test_an_interrupt_while_it_is_issued_hands_it_back(client, server, a):
    gone = threading.Event()

    def answer(_seen):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        # Nobody reads it: the interrupt comes first.
        gone.wait(2)
        return (201, a.issued())

    server.answers(answer, (201, a.issued()), a.receipt())
    with pytest.raises(KeyboardInterrupt), source_of(client) as source:
        try:
            source.token()
        finally:
            gone.set()
    assert said(server) == ["POST /v1/grants", "POST /v1/grants", "POST /v1/grants/grt_1/revoke"]
    assert server.seen[0].headers["Idempotency-Key"] == server.seen[1].headers["Idempotency-Key"]


# --- A broker that is away -------------------------------------------------------------------------------------------


def test_a_broker_that_is_away_at_the_end_is_waited_for_no_longer_than_seconds(client, server, a, time):
    time.chance = 0.99
    server.answers((201, a.issued()), *[(503, {})] * 20)
    with pytest.raises(ValueError, match="mine") as error, source_of(client) as source:
        source.token()
        raise ValueError("mine")
    assert "could not be handed back and lives until it expires" in error.value.__notes__[0]
    assert 0 < sum(time.slept) <= 5


def test_it_is_an_error_where_there_is_no_other(client, server, a):
    server.answers((201, a.issued()), *[server.CUT] * 20)
    with pytest.raises(sdk.Unreachable), source_of(client) as source:
        source.token()


def test_for_asyncio_it_is_as_bounded(async_client, server, a, time):
    time.chance = 0.99
    server.answers((201, a.issued()), *[(503, {})] * 20)

    async def main():
        async with async_client as client:
            with pytest.raises(ValueError, match="mine"):
                async with source_of(client) as source:
                    await source.token()
                    raise ValueError("mine")

    asyncio.run(main())
    assert 0 < sum(time.slept) <= 5


# --- In time ---------------------------------------------------------------------------------------------------------


def test_it_says_when_it_has_something_to_do_and_does_it_then_and_not_before(client, server, a, time):
    server.answers((201, a.issued(ttl_s=300)), (200, a.issued("second.secret.token", ttl_s=300)))
    source = source_of(client)
    assert source.due_in_s() == 0
    source.token()
    assert source.due_in_s() == 200
    time.move(199.999)
    assert source.token() == "first.secret.token"
    assert source.due_in_s() == pytest.approx(0.001)
    time.move(0.001)
    assert source.due_in_s() == 0
    assert source.token() == "second.secret.token"
    assert len(server.seen) == 2


def test_what_is_to_be_handed_back_is_something_to_do(client, server, a, time):
    server.answers((201, a.secret("first")), (201, a.secret("second", id="grt_2")), a.receipt())
    source = source_of(client)
    source.data()
    time.move(200)
    source.data()
    assert source.due_in_s() == pytest.approx(49, abs=1)
    time.move(source.due_in_s())
    source.data()
    assert said(server)[-1] == "POST /v1/grants/grt_1/revoke"


# --- People ----------------------------------------------------------------------------------------------------------


def test_people_are_waited_for_and_progress_is_told(client, server, a, time):
    server.answers(
        pending(a),
        approval(a),
        lambda _seen: (time.move(1000), a.grant(state="pending", live=False))[1],
        approval(a, votes=[{"by": "ada"}]),
        a.grant(state="approved", live=False),
        lambda _seen: (200, a.issued()),
        a.receipt(),
    )
    told = []
    with source_of(client) as source:
        assert source.wait(3600, told.append).reveal() == "first.secret.token"
        # Its life counts from when it was collected, not from when people were asked.
        assert source.token() == "first.secret.token"
    assert [len(found.raw["votes"]) for found in told] == [0, 1]
    assert said(server)[-2:] == ["POST /v1/grants/grt_1/credential", "POST /v1/grants/grt_1/revoke"]


def test_where_nobody_is_asked_nobody_is_waited_for(client, server, a):
    server.answers((201, a.issued()))
    assert source_of(client).wait(3600).reveal() == "first.secret.token"


def test_when_the_time_is_over_the_request_goes_on_waiting(client, server, a, time):
    server.answers(pending(a), lambda _seen: (time.move(5), a.grant(state="pending", live=False))[1])
    with pytest.raises(sdk.ApprovalPending), source_of(client) as source:
        source.wait(5)
    assert said(server) == ["POST /v1/grants", "GET /v1/grants/grt_1"]


def test_a_no_is_the_end(client, server, a):
    no = (403, a.problem(403, "forbidden", decision=None))
    server.answers(pending(a), a.grant(state="denied", live=False), no)
    with pytest.raises(sdk.Refused), source_of(client) as source:
        source.wait(5)
    assert said(server)[-1] == "POST /v1/grants/grt_1/credential"


def test_cancelled_while_people_are_waited_for_the_request_is_taken_back(async_client, server, a):
    held = Held((200, a.grant(state="pending", live=False)))
    server.answers(pending(a), held, a.receipt())

    async def work(client):
        async with source_of(client) as source:
            await source.wait(3600)

    cancelled_while(async_client, held, work)
    assert said(server)[-1] == "POST /v1/grants/grt_1/revoke"


def test_cancelled_while_it_is_collected_it_is_handed_back(async_client, server, a):
    held = Held((200, a.issued()))
    server.answers(pending(a), a.grant(state="approved", live=False), held, a.receipt())

    async def work(client):
        async with source_of(client) as source:
            await source.wait(3600)

    cancelled_while(async_client, held, work)
    assert said(server)[-2:] == ["POST /v1/grants/grt_1/credential", "POST /v1/grants/grt_1/revoke"]


def test_cancelled_while_people_are_first_asked_the_request_is_found_and_taken_back(async_client, server, a):
    held = Held(pending(a))
    server.answers(held, pending(a), a.receipt())

    async def work(client):
        async with source_of(client) as source:
            await source.token()

    cancelled_while(async_client, held, work)
    assert said(server) == ["POST /v1/grants", "POST /v1/grants", "POST /v1/grants/grt_1/revoke"]


# --- With its task ---------------------------------------------------------------------------------------------------


def test_a_credential_of_a_task_ends_with_its_block(client, server, a):
    server.answers((201, a.task()), (201, a.issued()), a.receipt())
    with client.run_task("summarize leads", ["summarizer"], 3600) as task:
        source = task.credential(CRM, ["contacts:read"], ttl_s=60)
        assert source.token() == "first.secret.token"
    assert server.seen[1].json()["task_id"] == "task_1"
    assert server.seen[1].json()["ttl_s"] == 60
    with pytest.raises(sdk.Conflict, match="handed back"):
        source.token()
    # The end of the task is the end of all of it.
    assert said(server) == ["POST /v1/tasks", "POST /v1/grants", "POST /v1/tasks/task_1/complete"]


def test_a_credential_of_a_task_ends_with_its_block_however_it_ends(client, server, a):
    server.answers((201, a.task()), (201, a.issued()), (500, {}))
    with pytest.raises(ValueError, match="mine"), client.run_task("p", ["summarizer"], 3600) as task:
        source = task.credential(CRM, ["contacts:read"])
        source.token()
        raise ValueError("mine")
    with pytest.raises(sdk.Conflict):
        source.token()


def test_another_may_be_the_agent_of_the_task(client, server, a, time, http):
    agent = sdk.Client(server.url, token="another.workload.token", timing=time.timing(), http=http)
    server.answers((201, a.task()), (201, a.issued()), a.receipt())
    with client.run_task("summarize leads", ["summarizer"], 3600) as task:
        task.credential(CRM, ["contacts:read"], agent=agent).token()
    assert server.seen[1].headers["Authorization"] == "Bearer another.workload.token"


def test_for_asyncio_too(async_client, server, a):
    server.answers((201, a.task()), (201, a.issued()), a.receipt("cancelled"))

    async def main():
        async with async_client as client:
            with pytest.raises(KeyboardInterrupt):
                async with client.run_task("summarize leads", ["summarizer"], 3600) as task:
                    source = task.credential(CRM, ["contacts:read"])
                    assert await source.token() == "first.secret.token"
                    raise KeyboardInterrupt
            with pytest.raises(sdk.Conflict):
                await source.token()

    asyncio.run(main())
    assert said(server)[-1] == "POST /v1/tasks/task_1/cancel"


# --- Loaded when wanted ----------------------------------------------------------------------------------------------


def test_a_program_waits_for_no_more_than_it_wants():
    text = """
import sys, broker.sdk
late = ["asyncio", "httpx", *(f"broker.sdk.{name}" for name in ("oversight", "receipts", "activities"))]
def loaded(): print(*(name for name in late if name in sys.modules))
loaded()
broker.sdk.Approval
loaded()
broker.sdk.AsyncClient
loaded()
"""
    ran = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == [
        "",
        "broker.sdk.oversight broker.sdk.receipts",
        "asyncio broker.sdk.oversight broker.sdk.receipts",
    ]


def test_what_is_loaded_later_is_there_by_its_name():
    for name in sdk.__all__:
        assert getattr(sdk, name).__name__ == name
    with pytest.raises(AttributeError):
        sdk.Nothing  # noqa: B018
