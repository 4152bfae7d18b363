import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import jwt
import pytest

from broker import sdk
from broker.sdk import DpopKey

RESOURCE = "https://crm.example/api"
TOKEN = "first.secret.token"


def source_of(client, resource=RESOURCE, **more):
    return client.credential("task_1", resource, ["contacts:read"], **more)


def paths(server):
    return [seen.path.removeprefix("/v1/grants") for seen in server.seen]


def test_nothing_is_asked_for_before_the_first_use(client, server, a):
    source = source_of(client)
    assert server.seen == []
    server.answers((201, a.issued()))
    assert [source.token() for _ in range(3)] == [TOKEN] * 3
    assert paths(server) == [""]


def test_a_token_is_renewed_after_two_thirds_of_its_life(client, server, a, time):
    source = source_of(client, ttl_s=300)
    server.answers((201, a.issued()))
    source.token()
    time.move(199)
    assert source.token() == TOKEN
    time.move(1)
    server.answers(a.issued("second.token"))
    assert source.token() == "second.token"
    assert paths(server) == ["", "/grt_1/renew"]
    assert server.seen[1].json() == {"ttl_s": 300}
    time.move(199)
    assert source.token() == "second.token"


def test_jitter_renews_earlier_and_never_later(client, server, a, time):
    time.chance = 1.0
    source = source_of(client)
    server.answers((201, a.issued()), a.issued("second.token"))
    source.token()
    time.move(179)
    assert source.token() == TOKEN
    time.move(1)
    assert source.token() == "second.token"


@pytest.mark.parametrize("off_by_s", [-4000, 4000])
def test_a_clock_of_ours_that_is_wrong_changes_nothing(client, server, a, time, off_by_s):
    server.date_is_off_by_s = off_by_s
    life = {"ttl_s": off_by_s + 300, "renewable_until": None}
    server.answers((201, a.issued(**life)), a.issued("second.token", **life))
    source = source_of(client)
    assert source.token() == source.token() == TOKEN
    time.move(200)
    assert source.token() == "second.token"


def test_a_token_that_is_about_to_die_is_not_handed_out(client, server, a, time):
    server.answers((201, a.issued(renewable_until=a.at(300))))
    source = source_of(client)
    source.token()
    time.move(297)
    assert source.token() == TOKEN
    # It cannot be renewed beyond this, so nobody tried.
    assert len(server.seen) == 1


def test_a_grant_at_its_maximum_is_followed_by_a_new_one_under_a_new_key(client, server, a, time):
    server.answers(
        (201, a.issued(renewable_until=a.at(300))),
        lambda _: (201, a.issued("second.token", id="grt_2")),
        a.receipt("revoked"),
    )
    with source_of(client) as source:
        source.token()
        time.move(298)
        assert source.token() == "second.token"
        assert source.grant.id == "grt_2"
    assert paths(server) == ["", "", "/grt_2/revoke"]
    assert len({seen.headers["Idempotency-Key"] for seen in server.seen[:2]}) == 2


def test_a_source_that_was_not_used_for_long_asks_for_a_new_grant(client, server, a, time):
    server.answers((201, a.issued()), lambda _: (201, a.issued("second.token", id="grt_2")))
    source = source_of(client)
    source.token()
    time.move(900)
    assert source.token() == "second.token"
    assert paths(server) == ["", ""]


@pytest.mark.parametrize(("status", "code"), [(403, "policy_denied"), (404, "not_found"), (409, "task_not_active")])
def test_when_the_broker_says_no_to_the_next_grant_that_is_the_end(client, server, a, time, status, code):
    server.answers((201, a.issued()), (status, a.problem(status, code)))
    source = source_of(client)
    source.token()
    time.move(300)
    for _ in range(3):
        with pytest.raises(sdk.BrokerError) as error:
            source.token()
        assert error.value.code == code
    assert paths(server) == ["", ""]


def test_while_the_token_lives_a_broker_that_does_not_answer_is_nobodys_trouble(client, server, a, time):
    server.answers((201, a.issued()), *[(500, {})] * 3, a.issued("second.token"))
    source = source_of(client)
    source.token()
    time.move(200)
    assert source.token() == source.token() == TOKEN
    assert len(server.seen) == 2
    time.move(50)
    assert source.token() == TOKEN
    assert len(server.seen) == 3
    time.move(49)
    with pytest.raises(sdk.BrokerError):
        source.token()
    assert source.token() == "second.token"


@pytest.mark.parametrize(("status", "code"), [(403, "policy_denied"), (404, "not_found"), (409, "task_not_active")])
def test_when_the_broker_says_no_that_is_the_end_and_no_new_grant_is_asked_for(client, server, a, time, status, code):
    server.answers((201, a.issued()), (status, a.problem(status, code)))
    source = source_of(client)
    source.token()
    time.move(200)
    for _ in range(3):
        with pytest.raises(sdk.BrokerError) as error:
            source.token()
        assert error.value.code == code
    assert paths(server) == ["", "/grt_1/renew"]


def test_a_first_grant_whose_answer_was_lost_is_found_again_by_its_key(client, server, a):
    server.answers(*[server.CUT] * 10, (201, a.issued()))
    source = source_of(client)
    with pytest.raises(sdk.Unreachable):
        source.token()
    assert source.token() == TOKEN
    assert len({seen.headers["Idempotency-Key"] for seen in server.seen}) == 1


def test_a_first_grant_that_was_refused_is_asked_for_under_a_new_key(client, server, a):
    server.answers((403, a.problem(403, "policy_denied")), (201, a.issued()))
    source = source_of(client)
    with pytest.raises(sdk.Refused):
        source.token()
    assert source.token() == TOKEN
    assert len({seen.headers["Idempotency-Key"] for seen in server.seen}) == 2


def test_many_threads_that_need_a_token_ask_once(client, server, a):
    barrier = threading.Barrier(8)

    def use(source):
        barrier.wait()
        return source.token()

    server.answers((201, a.issued()))
    source = source_of(client)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(use, [source] * 8)) == {TOKEN}
    assert len(server.seen) == 1


def test_while_one_thread_renews_the_others_go_on_with_the_old_token(client, server, a, time):
    asked, go_on = threading.Event(), threading.Event()

    def slowly(_):
        asked.set()
        assert go_on.wait(5)
        return 200, a.issued("second.token")

    server.answers((201, a.issued()), slowly)
    source = source_of(client)
    source.token()
    time.move(200)
    with ThreadPoolExecutor(1) as pool:
        renewing = pool.submit(source.token)
        assert asked.wait(5)
        assert source.token() == TOKEN
        go_on.set()
        assert renewing.result(5) == "second.token"
    assert len(server.seen) == 2


def test_closing_hands_the_grant_back_once(client, server, a):
    server.answers((201, a.issued()), a.receipt("revoked"))
    with source_of(client) as source:
        source.token()
    assert source.close() is None
    assert paths(server) == ["", "/grt_1/revoke"]
    with pytest.raises(sdk.Conflict, match="handed back"):
        source.token()


def test_a_grant_whose_answer_was_lost_is_found_and_handed_back(client, server, a):
    server.answers(*[server.CUT] * 10, (201, a.issued()), a.receipt("revoked"))
    with pytest.raises(sdk.Unreachable), source_of(client) as source:
        source.token()
    assert paths(server) == [""] * 11 + ["/grt_1/revoke"]
    assert len({seen.headers["Idempotency-Key"] for seen in server.seen[:11]}) == 1


def test_the_next_grant_is_found_and_handed_back_too(client, server, a, time):
    server.answers((201, a.issued()), *[server.CUT] * 10, (201, a.issued(id="grt_2")), a.receipt("revoked"))
    source = source_of(client)
    source.token()
    time.move(300)
    with pytest.raises(sdk.Unreachable):
        source.token()
    assert source.close() is not None
    assert paths(server)[-2:] == ["", "/grt_2/revoke"]


@pytest.mark.parametrize(("status", "code"), [(403, "policy_denied"), (409, "conflict"), (400, "invalid_request")])
def test_where_nothing_was_made_there_is_nothing_to_hand_back(client, server, a, status, code):
    server.answers(*[server.CUT] * 10, (status, a.problem(status, code)))
    source = source_of(client)
    with pytest.raises(sdk.Unreachable):
        source.token()
    assert source.close() is None
    assert len(server.seen) == 11


def test_a_refusal_is_an_answer_and_is_not_asked_for_again_on_closing(client, server, a):
    for status, code in ((403, "policy_denied"), (429, "limit_exceeded")):
        server.answers(*[(status, a.problem(status, code), {"Retry-After": "60"})])
        with pytest.raises(sdk.BrokerError), source_of(client) as source:
            source.token()
    assert len(server.seen) == 2


def test_a_broker_that_is_still_away_is_asked_once_on_closing_and_the_failure_told(client, server):
    server.answers(*[server.CUT] * 11)
    with pytest.raises(sdk.Unreachable) as error, source_of(client) as source:
        source.token()
    assert len(server.seen) == 11
    assert "could not be handed back" in error.value.__notes__[0]


def test_a_source_that_was_not_used_has_nothing_to_hand_back(client, server):
    with source_of(client):
        pass
    assert server.seen == []


def test_a_failing_block_keeps_its_own_error(client, server, a):
    server.answers((201, a.issued()), (500, {}), (201, a.issued()), (500, {}))
    with pytest.raises(KeyError) as error, source_of(client) as source:
        source.token()
        raise KeyError("mine")
    assert "could not be handed back" in error.value.__notes__[0]
    with pytest.raises(sdk.BrokerError), source_of(client) as source:
        source.token()


def test_a_source_shows_no_token(client, server, a):
    server.answers((201, a.issued()))
    source = source_of(client)
    source.token()
    assert repr(source) == "CredentialSource('https://crm.example/api', grant='grt_1')"


# On requests


class Crm:
    """The resource: it notes what it was sent."""

    def __init__(self, *answers):
        self.seen = []
        self.answers = list(answers)

    def __call__(self, request):
        # A copy: httpx sends the same request again, with other headers.
        self.seen.append(httpx.Request(request.method, request.url, headers=request.headers.copy()))
        return self.answers.pop(0) if self.answers else httpx.Response(200)

    def http(self, auth):
        return httpx.Client(transport=httpx.MockTransport(self), auth=auth)


def test_the_credential_goes_to_the_resources_origin_alone(client, server, a):
    server.answers((201, a.issued()))
    crm = Crm()
    with crm.http(source_of(client).auth()) as http:
        for url in (
            "https://evil.test/api",
            "http://crm.example/api",
            "https://crm.example:444/api",
            "https://crm.example.evil.test/",
        ):
            http.get(url)
            assert "Authorization" not in crm.seen[-1].headers
        assert server.seen == []
        http.get("https://crm.example:443/api/contacts")
    assert crm.seen[-1].headers["Authorization"] == f"Bearer {TOKEN}"


def test_a_redirect_elsewhere_does_not_take_the_credential_along(client, server, a):
    server.answers((201, a.issued()))
    crm = Crm(httpx.Response(302, headers={"Location": "https://evil.test/"}))
    with crm.http(source_of(client).auth()) as http:
        http.get(RESOURCE, follow_redirects=True)
    assert crm.seen[0].headers["Authorization"] == f"Bearer {TOKEN}"
    assert (crm.seen[1].url.host, crm.seen[1].headers.get("Authorization")) == ("evil.test", None)


def test_a_credential_for_a_resource_without_address_goes_where_it_is_told_and_nowhere_else(client, server, a):
    server.answers((201, a.issued()))
    source = source_of(client, "urn:crm")
    crm = Crm()
    with crm.http(None) as http:
        http.get("https://other.example/", auth=source.auth("https://crm.example"))
        http.get("https://crm.example/", auth=source.auth("https://crm.example"))
    assert ["Authorization" in request.headers for request in crm.seen] == [False, True]
    with pytest.raises(sdk.Invalid):
        source.auth("crm.example")
    with pytest.raises(sdk.Invalid, match=r"urn:crm is not an address: say where"):
        source.auth()


def claims_of(request):
    return jwt.decode(request.headers["DPoP"], options={"verify_signature": False})


def test_a_bound_credential_comes_with_a_proof_for_each_request(client, server, a):
    server.answers((201, a.issued(token_type="DPoP")))
    crm = Crm(
        httpx.Response(401, headers={"WWW-Authenticate": 'DPoP error="use_dpop_nonce"', "DPoP-Nonce": "n-1"}),
    )
    with crm.http(source_of(client, dpop=DpopKey.generate()).auth()) as http:
        assert http.post(RESOURCE + "?q=1", content=b"x").status_code == 200
        http.get(RESOURCE)
    first, again, other = (claims_of(request) for request in crm.seen)
    assert all(request.headers["Authorization"] == f"DPoP {TOKEN}" for request in crm.seen)
    assert (first["htm"], first["htu"], "nonce" in first) == ("POST", RESOURCE, False)
    assert (again["nonce"], other["htm"]) == ("n-1", "GET")
    assert len({first["jti"], again["jti"], other["jti"]}) == 3
    assert first["ath"] == other["ath"]
    assert claims_of(server.seen[0])["htu"] == f"{server.url}/v1/grants"


def test_renewing_a_bound_grant_proves_the_same_key(client, server, a, time):
    key = DpopKey.generate()
    server.answers((201, a.issued(token_type="DPoP")), a.issued("second.token", token_type="DPoP"))
    source = source_of(client, dpop=key)
    source.token()
    time.move(200)
    assert source.token() == "second.token"
    assert jwt.get_unverified_header(server.seen[1].headers["DPoP"])["jwk"] == key.public_jwk()


# asyncio


def test_the_async_source_does_the_same(async_client, server, a, time):
    server.answers((201, a.issued()), a.issued("second.token"), a.receipt("revoked"))
    crm = Crm()

    async def main():
        async with async_client as client:
            async with client.credential("task_1", RESOURCE, ["contacts:read"]) as source:
                assert await asyncio.gather(*[source.token() for _ in range(8)]) == [TOKEN] * 8
                time.move(200)
                assert "second.token" in await asyncio.gather(*[source.token() for _ in range(8)])
                async with httpx.AsyncClient(transport=httpx.MockTransport(crm), auth=source.auth()) as http:
                    await http.get(RESOURCE)
                    await http.get("https://evil.test")
            with pytest.raises(sdk.Conflict):
                await source.token()

    asyncio.run(main())
    assert paths(server) == ["", "/grt_1/renew", "/grt_1/revoke"]
    assert [request.headers.get("Authorization") for request in crm.seen] == ["Bearer second.token", None]


def test_the_async_source_hands_back_a_grant_whose_answer_was_lost(async_client, server, a):
    server.answers(*[server.CUT] * 10, (201, a.issued()), a.receipt("revoked"))

    async def main():
        async with async_client as client:
            with pytest.raises(sdk.Unreachable):
                async with client.credential("task_1", RESOURCE, ["contacts:read"]) as source:
                    await source.token()

    asyncio.run(main())
    assert paths(server) == [""] * 11 + ["/grt_1/revoke"]


def test_a_source_of_the_wrong_kind_says_so(client, async_client):
    async def main():
        async with async_client, httpx.AsyncClient(auth=source_of(client).auth()) as http:
            with pytest.raises(TypeError, match="AsyncClient"):
                await http.get(RESOURCE)

    asyncio.run(main())
    with httpx.Client(auth=source_of(async_client).auth()) as http, pytest.raises(TypeError, match="asyncio"):
        http.get(RESOURCE)


# A secret from outside, which is not renewed


def passwords(server, a, *names):
    """One grant each, and a receipt for each time one is handed back."""
    for number, name in enumerate(names, 1):
        server.answers(lambda _, name=name, number=number: (201, a.secret(name, id=f"grt_{number}")))


def test_a_secret_is_replaced_in_time_and_the_old_one_handed_back_after_an_overlap(client, server, a, time):
    passwords(server, a, "first", "second")
    server.answers(a.receipt("revoked"), a.receipt("revoked"))
    with source_of(client, "urn:db", ttl_s=300, parameters={"csr": "x"}) as source:
        assert source.data() == {"username": "jit-1", "password": "first"}
        time.move(199)
        assert source.data()["password"] == "first"
        time.move(1)
        assert source.data()["password"] == "second"
        assert source.grant.id == "grt_2"
        # Who got the first one just now still gets in with it.
        time.move(48)
        assert source.data()["password"] == "second"
        assert paths(server) == ["", ""]
        time.move(2)
        assert source.data()["password"] == source.data()["password"] == "second"
        assert paths(server) == ["", "", "/grt_1/revoke"]
    assert paths(server) == ["", "", "/grt_1/revoke", "/grt_2/revoke"]
    first, second = server.seen[:2]
    assert first.json() == second.json()
    assert first.json()["parameters"] == {"csr": "x"}
    assert first.headers["Idempotency-Key"] != second.headers["Idempotency-Key"]


def test_closing_hands_both_back_while_both_live(client, server, a, time):
    passwords(server, a, "first", "second")
    server.answers(a.receipt("revoked"), a.receipt("revoked"))
    with source_of(client, "urn:db") as source:
        source.data()
        time.move(200)
        source.data()
    assert paths(server) == ["", "", "/grt_1/revoke", "/grt_2/revoke"]


def test_a_secret_that_cannot_be_replaced_yet_is_used_on(client, server, a, time):
    passwords(server, a, "first")
    server.answers((429, a.problem(429, "limit_exceeded"), {"Retry-After": "60"}))
    source = source_of(client, "urn:db")
    source.data()
    time.move(200)
    assert source.data() == source.data() == {"username": "jit-1", "password": "first"}
    assert len(server.seen) == 2
    time.move(50)
    server.answers((201, a.secret("second", id="grt_2")))
    assert source.data()["password"] == "second"
    assert len({seen.headers["Idempotency-Key"] for seen in server.seen[1:]}) == 1


def test_a_secret_whose_replacement_is_refused_is_at_its_end(client, server, a, time):
    passwords(server, a, "first")
    server.answers((409, a.problem(409, "task_not_active")))
    source = source_of(client, "urn:db")
    source.data()
    time.move(200)
    for _ in range(2):
        with pytest.raises(sdk.Conflict):
            source.data()
    assert len(server.seen) == 2


def test_a_secret_that_died_unused_is_followed_by_another_and_nothing_is_handed_back_for_it(client, server, a, time):
    passwords(server, a, "first", "second")
    server.answers(a.receipt("revoked"))
    with source_of(client, "urn:db") as source:
        source.data()
        time.move(400)
        assert source.data()["password"] == "second"
    assert paths(server) == ["", "", "/grt_2/revoke"]


def test_an_old_secret_that_cannot_be_handed_back_is_nobodys_trouble_and_is_tried_again(client, server, a, time):
    passwords(server, a, "first", "second")
    server.answers((503, a.problem(503, "unavailable")), (200, a.receipt("revoked")))
    source = source_of(client, "urn:db")
    source.data()
    time.move(200)
    source.data()
    time.move(50)
    assert source.data()["password"] == "second"
    assert source.data()["password"] == "second"
    time.move(6)
    assert source.data()["password"] == "second"
    assert paths(server) == ["", "", "/grt_1/revoke", "/grt_1/revoke"]
    time.move(20)
    source.data()
    assert len(server.seen) == 4


def test_on_closing_one_that_cannot_be_handed_back_keeps_no_other_from_it(client, server, a, time):
    passwords(server, a, "first", "second")
    server.answers((403, a.problem(403, "forbidden")), a.receipt("revoked"))
    source = source_of(client, "urn:db")
    source.data()
    time.move(200)
    source.data()
    with pytest.raises(sdk.Refused):
        source.close()
    assert paths(server) == ["", "", "/grt_1/revoke", "/grt_2/revoke"]


def test_a_replacement_whose_answer_was_lost_is_handed_back_with_the_one_it_replaces(client, server, a, time):
    passwords(server, a, "first")
    server.answers(
        *[server.CUT] * 10, (201, a.secret("second", id="grt_2")), a.receipt("revoked"), a.receipt("revoked")
    )
    source = source_of(client, "urn:db", ttl_s=300)
    source.data()
    time.move(200)
    assert source.data()["password"] == "first"
    assert source.close() is not None
    assert paths(server)[-3:] == ["", "/grt_1/revoke", "/grt_2/revoke"]


def test_a_secret_is_no_token_and_says_so(client, server, a):
    passwords(server, a, "first")
    source = source_of(client, "urn:db")
    with pytest.raises(TypeError, match="reveal_data"):
        source.token()
    assert "first" not in repr(source) + repr(source.credential())


def test_the_same_for_asyncio(async_client, server, a, time):
    passwords(server, a, "first", "second")
    server.answers((503, a.problem(503, "unavailable")), *[a.receipt("revoked")] * 2)

    async def work():
        async with async_client, source_of(async_client, "urn:db", parameters={"csr": "x"}) as source:
            seen = [(await source.data())["password"]]
            for seconds in (200, 50, 6):
                time.move(seconds)
                seen.append((await source.data())["password"])
            return seen

    assert asyncio.run(work()) == ["first", "second", "second", "second"]
    assert paths(server) == ["", "", "/grt_1/revoke", "/grt_1/revoke", "/grt_2/revoke"]
    assert server.seen[1].json()["parameters"] == {"csr": "x"}
