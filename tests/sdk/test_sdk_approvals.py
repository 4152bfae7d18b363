"""Waiting for people with the SDK, and being one of them."""

import asyncio

import pytest

from broker import sdk


def approval(a, **members):
    return {
        "id": "apr_1",
        "state": "open",
        "opens": {"resource": "https://crm.example/api", "sensitivity": "internal", "scopes": ["contacts:write"]},
        "requested_by": "summarizer",
        "grant_id": "grt_1",
        "quorum": 1,
        "votes": [],
        "left": {"scopes": ["contacts:write"], "ttl_s": 60},
        "request_hash": "0" * 64,
        "expires_at": a.at(3600),
        "unverified": {"intent": "tidy up", "claims": {}, "purpose": None},
    } | members


def pending(a, **members):
    return (
        202,
        {"grant": a.grant(state="pending", live=False), "approval": approval(a, **members)},
        {"Retry-After": "5"},
    )


def seen(server):
    return [(request.method, request.path, request.headers.get("Prefer")) for request in server.seen]


def slow(time, reply, seconds=20):
    """The broker takes its time."""

    def answer(_request):
        time.move(seconds)
        return reply

    return answer


def test_waiting_asks_until_people_decided_and_collects(client, server, a, time):
    undecided, approved = a.grant(state="pending", live=False), a.grant(state="approved", live=False)
    server.answers(slow(time, undecided), slow(time, approved, 3), (200, a.issued()))
    _, credential = client.await_grant("grt_1", 60)
    assert credential.reveal() == "first.secret.token"
    assert seen(server) == [
        ("GET", "/v1/grants/grt_1", "wait=20"),
        ("GET", "/v1/grants/grt_1", "wait=20"),
        ("POST", "/v1/grants/grt_1/credential", None),
    ]
    assert time.slept == []


def test_a_broker_at_which_too_many_wait_is_not_asked_without_a_pause(client, server, a, time):
    undecided = a.grant(state="pending", live=False)
    server.answers(undecided, undecided, a.grant(state="approved"), (200, a.issued()))
    client.await_grant("grt_1", 60)
    assert time.slept == [2.0, 2.0]


def test_when_the_time_is_over_it_says_so_and_nothing_is_lost(client, server, a, time):
    undecided = a.grant(state="pending", live=False)
    server.answers(slow(time, undecided, 5))
    with pytest.raises(sdk.ApprovalPending, match="nobody has decided") as error:
        client.await_grant("grt_1", 5)
    assert error.value.grant_id == "grt_1"
    assert len(server.seen) == 1


def test_a_no_is_a_refusal_with_its_reason(client, server, a):
    server.answers(a.grant(state="denied", live=False), (403, a.problem(403, "forbidden", decision=None)))
    with pytest.raises(sdk.Refused, match="this is why"):
        client.await_grant("grt_1", 60)


def test_the_async_client_waits_alike(async_client, server, a, time):
    undecided = a.grant(state="pending", live=False)
    server.answers(undecided, a.grant(state="approved"), (200, a.issued()))

    async def run():
        async with async_client as broker:
            return await broker.await_grant("grt_1", 60, parameters={"csr": "pem"})

    _, credential = asyncio.run(run())
    assert credential.reveal() == "first.secret.token"
    assert time.slept == [2.0]
    assert server.seen[-1].json() == {"parameters": {"csr": "pem"}}


def test_what_an_approver_says_is_sent_and_what_is_left_out_is_not(client, server, a):
    server.answers(
        approval(a), approval(a, state="approved"), approval(a, state="denied"), approval(a, state="withdrawn")
    )
    assert client.approval("apr_1").opens["sensitivity"] == "internal"
    assert client.approve("apr_1", ["contacts:write"], 60).state == "approved"
    assert client.deny("apr_1", "not now").state == "denied"
    assert client.withdraw("apr_1").state == "withdrawn"
    assert [request.json() for request in server.seen[1:]] == [
        {"scopes": ["contacts:write"], "ttl_s": 60},
        {"reason": "not now"},
        {},
    ]


def test_approvals_are_listed(client, server, a):
    server.answers(
        {"items": [approval(a)], "next_cursor": "abc"}, {"items": [approval(a, id="apr_2")], "next_cursor": None}
    )
    assert [found.id for found in client.approvals(state="open")] == ["apr_1", "apr_2"]
    assert server.seen[0].path == "/v1/approvals?state=open"


@pytest.mark.parametrize("lacking", ["opens", "left", "quorum", "request_hash"])
def test_what_a_person_decides_by_is_not_guessed(client, server, a, lacking):
    answer = approval(a)
    del answer[lacking]
    server.answers(answer)
    with pytest.raises(sdk.NotTheBroker):
        client.approval("apr_1")


def test_an_id_that_is_none_is_not_sent(client, server):
    with pytest.raises(sdk.Invalid):
        client.approve("../lockdowns")
    with pytest.raises(sdk.Invalid, match="scopes is one string"):
        client.approve("apr_1", "contacts:write")
    assert server.seen == []


def test_a_source_says_that_it_waits_and_collects_when_people_have_said_yes(client, server, a):
    server.answers(pending(a), pending(a, state="approved"), (200, a.issued()))
    with client.credential("task_1", "https://crm.example/api", ["contacts:write"]) as source:
        with pytest.raises(sdk.ApprovalPending):
            source.token()
        assert source.token() == "first.secret.token"
        assert seen(server)[-1][1] == "/v1/grants/grt_1/credential"
        server.answers(a.receipt())


def test_an_async_source_collects_too(async_client, server, a):
    server.answers(pending(a, state="approved"), (200, a.issued()))

    async def run():
        async with async_client as broker:
            source = broker.credential("task_1", "https://crm.example/api", ["contacts:write"])
            return await source.token()

    assert asyncio.run(run()) == "first.secret.token"
