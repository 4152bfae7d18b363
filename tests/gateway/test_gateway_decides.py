"""What the gateway says to a proxy: yes only to what is proven at this moment, and nothing to anybody else."""

import asyncio
import base64
import json
import logging
import threading
from datetime import timedelta

import pytest

from broker.gateway.app import Gateway
from broker.gateway.settings import Wrong, read_settings
from broker.sdk import DpopKey
from tests.gateway.conftest import KEY, ORIGIN, PROXY_SECRET, ask, call, like_ours
from tests.sdk.conftest import FakeTime, Scripted

SECRET_LINE = 'proxy_secret_file = "proxy.secret"\n'
DPOP = {"x_original_method": "POST", "x_original_uri": "/api/contacts?page=2"}


def bearer(token):
    return {"authorization": f"Bearer {token}"}


def shown(key, token, *, method="POST", url=f"{ORIGIN}/api/contacts", **more):
    proof = key.proof(method, url, access_token=token)
    return {"authorization": f"DPoP {token}", "dpop": proof, **DPOP, **more}


# --- A yes -----------------------------------------------------------------------------------------------------------


def test_a_live_token_passes_with_the_upstreams_own_credential(place, work):
    grant, token = work.grant()
    status, headers = ask(place.gateway(), **bearer(token))
    assert status == 200
    assert headers == {
        "Authorization": f"Bearer {KEY}",
        "X-Broker-Agent": "summarizer",
        "X-Broker-Task": work.task.id,
        "X-Broker-Grant": grant.id,
    }


def test_a_task_that_ends_ends_it_with_the_next_request(place, work):
    """INV-25: no answer is kept."""
    gateway, (_, token) = place.gateway(), work.grant()
    assert ask(gateway, **bearer(token))[0] == 200
    work.orchestrator.complete_task(work.task.id)
    assert ask(gateway, **bearer(token)) == (401, {"WWW-Authenticate": 'Bearer error="invalid_token"'})


@pytest.mark.parametrize(
    ("scheme", "written", "expected"),
    [
        ("bearer", "abc", "Bearer abc"),
        ("basic", "jit:pass word", f"Basic {base64.b64encode(b'jit:pass word').decode()}"),
        ("raw", "Token token=abc", "Token token=abc"),
    ],
)
def test_a_credential_is_written_as_the_upstream_wants_it(place, work, scheme, written, expected):
    place.write("crm.key", written)
    more = f'scheme = "{scheme}"\nheader = "X-Api-Key"\n'
    headers = ask(place.gateway(more=more), **bearer(work.grant()[1]))[1]
    assert headers["X-Api-Key"] == expected
    # The token of who calls is taken off: it is not the upstream's to have.
    assert headers["Authorization"] == ""


def test_a_credential_that_is_replaced_is_used_with_the_next_request(place, work):
    gateway, (_, token) = place.gateway(), work.grant()
    place.write("crm.key", "another")
    assert ask(gateway, **bearer(token))[1]["Authorization"] == "Bearer another"


@pytest.mark.parametrize(
    ("proxy", "said"),
    [
        ("nginx", {}),
        ("envoy", {}),
        (
            "traefik",
            {
                "x_original_method": "DELETE",
                "x_forwarded_method": "GET",
                "x_forwarded_uri": "/api/contacts",
            },
        ),
    ],
)
def test_each_proxy_says_in_its_own_way_what_it_holds(place, work, proxy, said):
    gateway, (_, token) = place.gateway(proxy=proxy), work.grant()
    assert ask(gateway, "/authorize/crm/api/contacts", **bearer(token), **said)[0] == 200


# --- A no ------------------------------------------------------------------------------------------------------------


NO_TOKEN = [None, "", "Bearer", "Bearer ", "Basic abc", "Bearer a b", "Bearer a,Bearer b", "Bearer a\n", "bearer é"]
NO_TOKEN += ["Bearer " + "a" * 9000, "DPoP a", "Bearer not-a-token"]


@pytest.mark.parametrize("authorization", NO_TOKEN)
def test_what_is_no_live_token_is_401(place, authorization):
    status, headers = ask(place.gateway(), authorization=authorization)
    assert status == 401
    assert headers["WWW-Authenticate"].startswith(("Bearer", "DPoP"))
    assert "Authorization" not in headers


def test_a_token_for_another_audience_opens_nothing_here(place, work):
    """It is live, and this gateway may introspect it: it is the audience that decides."""
    _, token = work.grant("mail:draft", "https://mail.example/api")
    assert ask(place.gateway(), **bearer(token))[0] == 401


@pytest.mark.parametrize("method", ["POST", "DELETE", "TRACE", "get", "GET ", None, ""])
def test_a_method_needs_its_own_scope_and_one_that_is_not_named_is_refused(place, work, method):
    _, token = work.grant()
    status, headers = ask(place.gateway(), **bearer(token), x_original_method=method)
    assert status == 403
    told = 'Bearer error="insufficient_scope", scope="contacts:write"' if method == "POST" else None
    assert headers.get("WWW-Authenticate") == told


@pytest.mark.parametrize("target", [None, "", "contacts", "/a b", "/a\r\nX: y", "/" + "a" * 9000])
def test_a_target_that_the_proxy_did_not_say_is_refused(place, work, target):
    assert ask(place.gateway(), **bearer(work.grant()[1]), x_original_uri=target)[0] == 403


@pytest.mark.parametrize("name", ["authorization", "dpop", "x_original_method", "x_original_uri", "x_gateway_secret"])
def test_a_header_that_comes_twice_is_refused(place, work, name):
    place.write("proxy.secret", PROXY_SECRET)
    gateway, (key, token) = place.gateway(top=SECRET_LINE), work.bound()
    sent = shown(key, token, x_gateway_secret=PROXY_SECRET)
    assert ask(gateway, **sent | {name: [sent[name], sent[name]]})[0] == 403
    assert ask(gateway, **sent)[0] == 200


@pytest.mark.parametrize("named", ["authorization", "close, X-Api-Key", "x-original-method", "dpop"])
def test_a_caller_that_has_headers_taken_off_on_the_way_is_refused(place, work, named):
    _, token = work.grant()
    assert ask(place.gateway(), **bearer(token), connection=named)[0] == 403
    assert ask(place.gateway(), **bearer(token), connection="keep-alive, TE")[0] == 200


def test_an_upstream_that_is_not_there_is_404(place, work):
    gateway, (_, token) = place.gateway(), work.grant()
    for path in ("/authorize/other", "/authorize/", "/authorize", "/", "/crm", "/authorize/CRM"):
        assert ask(gateway, path, **bearer(token))[0] == 404


def test_a_broker_that_is_away_or_refuses_us_is_503_and_never_a_yes(place, work):
    _, token = work.grant()
    gateway = place.gateway()
    place.write("verifier.token", "not.a.token")
    status, headers = ask(gateway, **bearer(token))
    assert (status, headers["Retry-After"]) == (503, "1")
    assert "Authorization" not in headers
    place.write("verifier.token", "")
    assert ask(gateway, **bearer(token))[0] == 503


NOT_OURS = {
    "no parts": lambda url: "opaque",
    "two parts": lambda url: ".".join(like_ours(url).split(".")[:2]),
    "four parts": lambda url: like_ours(url) + ".x",
    "another issuer": lambda url: like_ours("https://broker.other"),
    "no issuer": lambda url: like_ours(None),
    "an issuer that is no text": lambda url: like_ours([url]),
    "another type": lambda url: like_ours(url, typ="dpop+jwt"),
    "no type": lambda url: like_ours(url, typ=None),
    "no JSON": lambda url: "a.b.c",
    "padded": lambda url: like_ours(url) + "=",
}


@pytest.mark.parametrize("made", NOT_OURS.values(), ids=NOT_OURS)
def test_what_cannot_be_a_token_of_the_brokers_is_refused_without_asking_it(place, made):
    """INV-35"""
    server = Scripted(FakeTime())
    try:
        place.broker = server
        gateway = place.gateway()
        yes = {"active": True, "aud": "https://crm.example/api", "scope": "contacts:read"}
        server.answers(yes, yes)
        assert ask(gateway, **bearer(made(server.url))) == (401, {"WWW-Authenticate": 'Bearer error="invalid_token"'})
        assert server.seen == []
        for typ in ("at+jwt", "JWT"):
            assert ask(gateway, **bearer(like_ours(server.url, typ=typ)))[0] == 200
        assert len(server.seen) == 2
    finally:
        server.close()


def test_more_than_can_wait_are_told_to_come_again_and_we_are_there_meanwhile(place):
    """INV-35: one is at the broker, one waits, and the third does not."""
    server, arrived, go_on = Scripted(FakeTime()), threading.Event(), threading.Event()
    yes = {"active": True, "aud": "https://crm.example/api", "scope": "contacts:read"}

    def slowly(_seen):
        arrived.set()
        assert go_on.wait(30)
        return yes

    async def crowd(gateway):
        asked = {**bearer(like_ours(server.url)), "x_original_method": "GET", "x_original_uri": "/"}
        first = asyncio.create_task(call(gateway, "/authorize/crm", **asked))
        assert await asyncio.to_thread(arrived.wait, 30)
        second = asyncio.create_task(call(gateway, "/authorize/crm", **asked))
        await asyncio.sleep(0)  # it has its place now
        third = await call(gateway, "/authorize/crm", **asked)
        assert (await call(gateway, "/healthz"))[0] == 200
        # One who goes away makes no room for another: the work is still to be done.
        second.cancel()
        await asyncio.wait([second])
        fourth = await call(gateway, "/authorize/crm", **asked)
        go_on.set()
        passed = await first
        return third, fourth, passed

    try:
        place.broker = server
        more = "timeout_s = 30\n"
        gateway = place.gateway(bounds={"threads": 1, "queued": 1}, top=more)
        server.answers(slowly, yes, yes, yes)
        third, fourth, passed = asyncio.run(crowd(gateway))
        for status, headers in (third, fourth):
            assert (status, headers["Retry-After"]) == (503, "1") and "Authorization" not in headers
        assert passed[0] == 200
        gateway._threads.submit(int).result(30)  # what was left behind is done
        asked = {**bearer(like_ours(server.url)), "x_original_method": "GET", "x_original_uri": "/"}

        async def both():
            return await asyncio.gather(*[call(gateway, "/authorize/crm", **asked) for _ in range(2)])

        # Both places are free again.
        assert [status for status, _ in asyncio.run(both())] == [200, 200]
    finally:
        go_on.set()
        server.close()


@pytest.mark.parametrize("answer", [{}, {"active": "true"}, {"active": 1}, [], (500, {}), b"<html>", Scripted.CUT])
def test_an_answer_that_is_no_explicit_yes_is_none(place, answer):
    """INV-24"""
    server = Scripted(FakeTime())
    try:
        place.broker, real = server, place.broker
        place.time = server.time
        gateway = place.gateway()
        place.broker = real
        server.answers(*[answer] * 12)
        status, headers = ask(gateway, **bearer(like_ours(server.url)))
        assert status in (401, 503) and "Authorization" not in headers
        server.script[:] = [{"active": True, "aud": "https://crm.example/api", "scope": "contacts:read"}]
        assert ask(gateway, **bearer(like_ours(server.url)))[0] == 200
        for changed in ({"aud": ["https://crm.example/api"]}, {"scope": None}, {"cnf": {}}, {"cnf": "x"}):
            server.script[:] = [{"active": True, "aud": "https://crm.example/api", "scope": "contacts:read"} | changed]
            assert ask(gateway, **bearer(like_ours(server.url)))[0] in (401, 403)
    finally:
        server.close()


@pytest.mark.parametrize("written", ["", "two\nlines", "a\rb", "caf\xe9", "a\0b", " a", "x" * 20_000])
def test_a_credential_that_is_no_header_is_503(place, work, written):
    """INV-31"""
    gateway, (_, token) = place.gateway(), work.grant()
    place.write("crm.key", written)
    status, headers = ask(gateway, **bearer(token))
    assert status == 503 and "Authorization" not in headers


def test_a_credential_that_others_can_read_or_is_gone_is_503(place, work):
    gateway, (_, token) = place.gateway(), work.grant()
    place.write("crm.key", KEY, mode=0o640)
    assert ask(gateway, **bearer(token))[0] == 503
    (place.directory / "crm.key").unlink()
    assert ask(gateway, **bearer(token))[0] == 503


def test_claims_that_are_no_header_are_left_out(place):
    """INV-31"""
    server = Scripted(FakeTime())
    try:
        place.broker = server
        gateway = place.gateway()
        claims = {"active": True, "aud": "https://crm.example/api", "scope": "contacts:read"}
        server.answers(claims | {"client_id": "a\r\nX-Admin: yes", "task_id": 7, "grant_id": "x" * 600})
        status, headers = ask(gateway, **bearer(like_ours(server.url)))
        assert status == 200 and not any(name.startswith("X-Broker") for name in headers)
    finally:
        server.close()


# --- Only the proxy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, "", "guess", PROXY_SECRET.upper(), f"{PROXY_SECRET},{PROXY_SECRET}", "é"])
def test_who_does_not_know_the_proxys_secret_learns_nothing(place, work, given):
    place.write("proxy.secret", PROXY_SECRET)
    gateway, (_, token) = place.gateway(top=SECRET_LINE), work.grant()
    for path in ("/authorize/crm", "/authorize/other"):
        refused = ask(gateway, path, **bearer(token), x_gateway_secret=given)
        assert refused == (403, {})
    assert ask(gateway, **bearer(token), x_gateway_secret=PROXY_SECRET)[0] == 200


# --- Bound tokens ----------------------------------------------------------------------------------------------------


def test_a_bound_token_passes_with_a_proof_for_this_request_once(place, work):
    gateway, (key, token) = place.gateway(), work.bound()
    first = shown(key, token)
    assert ask(gateway, **first)[0] == 200
    status, headers = ask(gateway, **first)
    assert (status, headers["WWW-Authenticate"]) == (401, 'DPoP error="invalid_dpop_proof", algs="ES256"')
    assert ask(gateway, **shown(key, token))[0] == 200


def test_a_bound_token_is_never_a_bearer_one(place, work):
    """INV-21"""
    gateway, (key, token) = place.gateway(), work.bound()
    assert ask(gateway, **{**shown(key, token), **bearer(token)})[0] == 401
    assert ask(gateway, **shown(key, token, dpop=None))[0] == 401


def test_an_unbound_token_is_refused_where_a_bound_one_is_wanted(place, work):
    gateway, (_, token) = place.gateway(more="require_dpop = true\n"), work.grant()
    status, headers = ask(gateway, **bearer(token))
    assert (status, headers["WWW-Authenticate"]) == (401, 'DPoP error="invalid_token", algs="ES256"')
    key, bound = work.bound()
    assert ask(gateway, **shown(key, bound))[0] == 200


def test_a_proof_for_anything_else_is_refused(place, work, live_broker):
    gateway, (key, token) = place.gateway(), work.bound()
    _, other = work.bound()
    wrong = [
        shown(key, token, method="GET"),
        shown(key, token, url=f"{ORIGIN}/api/contact"),
        shown(key, token, url=f"{ORIGIN}/api%2Fcontacts"),
        shown(key, token, url="https://crm.example.evil.test/api/contacts"),
        shown(key, token, url="http://crm.example/api/contacts"),
        shown(key, token, url="https://crm.example:444/api/contacts"),
        shown(DpopKey.generate(), token),
        {**shown(key, token), "dpop": key.proof("POST", f"{ORIGIN}/api/contacts")},
        {**shown(key, token), "dpop": key.proof("POST", f"{ORIGIN}/api/contacts", access_token=other)},
        {**shown(key, token), "dpop": ",".join([shown(key, token)["dpop"]] * 2)},
        {**shown(key, token), "dpop": "a.b.c"},
    ]
    for number, asked in enumerate(wrong):
        assert ask(gateway, **asked)[0] == 401, number
    assert (
        ask(gateway, **shown(key, token, url=f"{ORIGIN.upper().replace('HTTPS', 'https')}:443/api/contacts"))[0] == 200
    )


# --- A credential that the broker makes ------------------------------------------------------------------------------


def test_a_brokered_credential_is_asked_for_renewed_and_handed_back(place):
    server = Scripted(FakeTime())
    try:
        place.broker, place.time = server, server.time
        text = place.configure().read_text()
        brokered = 'credential = { resource = "urn:crm:login", scopes = ["use"], ttl_s = 300 }\nscheme = "basic"'
        place.write("gateway.toml", text.replace('credential_file = "crm.key"', brokered))
        gateway = Gateway(read_settings(place.directory / "gateway.toml"), timing=server.time.timing())
        yes = {"active": True, "aud": "https://crm.example/api", "scope": "contacts:read", "grant_id": "grt_9"}
        server.answers(yes, login(server.time, "first"), yes, yes, login(server.time, "second", 2))
        wanted = {name: "Basic " + base64.b64encode(f"jit:{name}".encode()).decode() for name in ("first", "second")}
        assert ask(gateway, **bearer(like_ours(server.url)))[1]["Authorization"] == wanted["first"]
        assert ask(gateway, **bearer(like_ours(server.url)))[1]["Authorization"] == wanted["first"]
        server.time.move(201)
        assert ask(gateway, **bearer(like_ours(server.url)))[1]["Authorization"] == wanted["second"]
        assert json.loads(server.seen[1].body)["resource"] == "urn:crm:login"
        handed_back = []
        server.answers(*[lambda seen: handed_back.append(seen.path) or (404, {})] * 2)
        gateway.close()
        assert handed_back == ["/v1/grants/grt_1/revoke", "/v1/grants/grt_2/revoke"]
    finally:
        server.close()


def login(time, password, number=1):
    def at(seconds):
        return (time.at + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")

    def answer(_seen):
        grant = {
            "id": f"grt_{number}", "task_id": "task_1", "agent": "crm-api", "resource": "urn:crm:login",
            "scopes": ["use"], "state": "active", "live": True, "expires_at": at(300),
        }  # fmt: skip
        data = {"username": "jit", "password": password}
        return 201, {"grant": grant, "credential": {"type": "database", "data": data, "expires_at": at(300)}}

    return answer


# --- What is said ----------------------------------------------------------------------------------------------------


def test_no_log_line_holds_a_token_or_a_credential(place, work, caplog):
    """INV-30"""
    caplog.set_level(logging.DEBUG)
    gateway, (grant, token) = place.gateway(), work.grant()
    ask(gateway, **bearer(token))
    ask(gateway, **bearer(f"{token}x"))
    place.write("crm.key", "two\nlines")
    ask(gateway, **bearer(token))
    lines = [(record.getMessage(), getattr(record, "fields", {})) for record in caplog.records]
    assert ("passed", {"upstream": "crm", "grant_id": grant.id}) in lines
    assert {fields.get("status") for message, fields in lines if message == "refused"} == {401, 503}
    for secret in (token, KEY, "two"):
        assert secret not in str(lines)


# --- Its configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('proxy = "nginx"', 'proxy = "apache"', "proxy:"),
        ('proxy = "nginx"', 'proxy = "nginx"\nports = 1', "ports: no key of this name is known"),
        ('token_file = "verifier.token"\n', "", "token_file: it is missing"),
        ('listen = "unix:gateway.sock"', 'listen = "127.0.0.1:8180"', "set proxy_secret_file"),
        ('listen = "unix:gateway.sock"', 'listen = "8180"\nproxy_secret_file = "crm.key"', "host:port"),
        ('origin = "https://crm.example"', 'origin = "http://crm.example"', "in the clear"),
        ('origin = "https://crm.example"', 'origin = "https://crm.example/api"', "scheme and host only"),
        ('name = "crm"', 'name = "../crm"', "small letters"),
        ('"POST" = ["contacts:write"]', '"POST" = []', "with a scope for each"),
        ('"POST" = ["contacts:write"]', '"post" = ["a"]', "methods is like"),
        ('credential_file = "crm.key"', "", "exactly one of"),
        ('credential_file = "crm.key"', 'credential_file = "absent"', "cannot be read"),
        ('credential_file = "crm.key"', 'credential_file = "crm.key"\nheader = "Host"', "header"),
        ('credential_file = "crm.key"', 'credential_file = "crm.key"\nheader = "X-Broker-Task"', "header"),
        ('credential_file = "crm.key"', 'credential_file = "crm.key"\nheader = "A: b"', "header"),
        ("[[upstreams]]", "[[upstreams", "is not TOML"),
    ],
)
def test_what_is_wrong_with_a_configuration_is_said(place, old, new, why):
    text = place.configure().read_text()
    assert old in text
    place.write("gateway.toml", text.replace(old, new))
    with pytest.raises(Wrong, match=why):
        read_settings(place.directory / "gateway.toml")


def test_everything_that_is_wrong_is_said_at_once_and_nothing_of_a_secret(place):
    place.write("crm.key", "two\nlines")
    place.write("verifier.token", "secret-token")
    text = place.configure().read_text().replace('proxy = "nginx"', 'proxy = "x"').replace('name = "crm"', 'name = "A"')
    place.write("gateway.toml", text)
    with pytest.raises(Wrong) as wrong:
        read_settings(place.directory / "gateway.toml")
    assert len(wrong.value.problems) == 2
    place.configure()
    with pytest.raises(Wrong, match="not one line") as wrong:
        read_settings(place.directory / "gateway.toml")
    assert "two" not in str(wrong.value)
