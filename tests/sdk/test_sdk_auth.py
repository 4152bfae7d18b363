"""Credentials on a program's own requests, by httpx and by requests, at servers that refuse."""

import asyncio
import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import jwt
import pytest
import requests

from broker import sdk
from broker.gateway.app import Gateway
from broker.gateway.settings import read_settings
from broker.sdk import DpopKey
from tests.gateway.conftest import Place, Work, live_broker  # noqa: F401 - a fixture
from tests.sdk.conftest import Scripted

CRM, READ = "https://crm.example/api", ["contacts:read"]


@pytest.fixture
def resource(time):
    """A server with things in it, that answers what a test tells it to."""
    scripted = Scripted(time)
    yield scripted
    scripted.close()


@pytest.fixture
def session():
    with requests.Session() as session:
        session.trust_env = False
        yield session


class ByHttpx:
    def __init__(self, client, resource):
        self.source = client.credential("task_1", resource.url, READ, dpop=self.dpop)
        self.auth = self.source.auth()

    dpop = None

    def send(self, method, url, **more):
        with httpx.Client(trust_env=False, follow_redirects=True) as http:
            answer = http.request(method, url, auth=self.auth, **more)
            return answer.status_code

    def close(self):
        pass


class ByRequests(ByHttpx):
    def __init__(self, client, resource):
        super().__init__(client, resource)
        self.auth = self.source.requests_auth()

    def send(self, method, url, content=None):
        with requests.Session() as session:
            session.trust_env = False
            return session.request(method, url, auth=self.auth, data=content).status_code


@pytest.fixture(params=[ByHttpx, ByRequests], ids=["httpx", "requests"])
def program(request, client, resource):
    return request.param(client, resource)


def shown(server):
    return [seen.headers.get("Authorization") for seen in server.seen]


def said(server):
    return [f"{seen.method} {seen.path}" for seen in server.seen]


def test_a_401_is_answered_with_another_credential_once(program, server, resource, a):
    server.answers((201, a.issued("first.secret.token")), (200, a.issued("second.secret.token")))
    resource.answers((401, {}), {})
    assert program.send("POST", resource.url, content=b"{}") == 200
    assert shown(resource) == ["Bearer first.secret.token", "Bearer second.secret.token"]
    assert [seen.body for seen in resource.seen] == [b"{}", b"{}"]
    assert said(server) == ["POST /v1/grants", "POST /v1/grants/grt_1/renew"]


def test_a_server_that_takes_none_is_tried_twice_and_does_not_make_the_broker_work(program, server, resource, a, time):
    server.answers(*[(201, a.issued(f"{number}.secret.token")) for number in range(9)])
    resource.answers(*[(401, {})] * 9)
    assert [program.send("GET", resource.url) for _ in range(3)] == [401] * 3
    assert len(resource.seen) == 4 and len(server.seen) == 2
    time.move(10)
    assert program.send("GET", resource.url) == 401
    assert len(resource.seen) == 6 and len(server.seen) == 3


def test_other_refusals_are_the_programs_to_read(program, server, resource, a):
    server.answers((201, a.issued()))
    resource.answers((403, {}))
    assert program.send("GET", resource.url) == 403
    assert len(server.seen) == 1


def test_where_the_broker_cannot_be_asked_the_servers_answer_is_what_there_is(program, server, resource, a):
    server.answers((201, a.issued()), *[(503, {})] * 20)
    resource.answers((401, {}))
    assert program.send("GET", resource.url) == 401
    assert len(resource.seen) == 1


def test_where_the_broker_says_no_that_is_why(program, server, resource, a):
    server.answers((201, a.issued()), (409, a.problem(409, "grant_not_active", "its task has ended")))
    resource.answers((401, {}))
    with pytest.raises(sdk.Conflict, match="its task has ended"):
        program.send("GET", resource.url)


def test_a_body_that_can_be_sent_once_is_sent_once(program, server, resource, a):
    server.answers((201, a.issued()))
    resource.answers((401, {}))
    body = io.BytesIO(b"rows") if isinstance(program, ByRequests) else iter([b"rows"])
    assert program.send("POST", resource.url, content=body) == 401
    assert len(resource.seen) == 1


def test_a_redirect_elsewhere_takes_nothing_along(program, server, resource, a, time):
    other = Scripted(time)
    try:
        server.answers((201, a.issued()))
        resource.answers((302, {}, {"Location": f"{other.url}/away"}))
        other.answers((401, {}))
        assert program.send("GET", resource.url) == 401
        [seen] = other.seen
        assert "Authorization" not in seen.headers and "DPoP" not in seen.headers
        assert len(server.seen) == 1
    finally:
        other.close()


def test_a_redirect_at_the_same_place_is_followed_with_it(program, server, resource, a):
    server.answers((201, a.issued()))
    resource.answers((302, {}, {"Location": "/b"}), lambda seen: {} if "Authorization" in seen.headers else (401, {}))
    resource.answers({})
    assert program.send("GET", f"{resource.url}/a") == 200
    assert resource.seen[-1].path == "/b" and shown(resource)[-1] == "Bearer first.secret.token"
    assert len(server.seen) == 1


def test_elsewhere_it_is_not_shown_at_all(program, server, resource, a, time):
    other = Scripted(time)
    try:
        other.answers((401, {}))
        assert program.send("GET", other.url) == 401
        assert shown(other) == [None] and server.seen == []
    finally:
        other.close()


def test_threads_that_are_refused_together_ask_for_one(client, server, resource, a):
    server.answers((201, a.issued("first.secret.token")), (200, a.issued("second.secret.token")))
    resource.answers(*[lambda seen: {} if "second" in seen.headers["Authorization"] else (401, {})] * 20)
    source = client.credential("task_1", resource.url, READ)
    source.token()
    auth, together, answers = source.auth(), threading.Barrier(5), []

    def work():
        with httpx.Client(trust_env=False) as http:
            together.wait(10)
            answers.append(http.get(resource.url, auth=auth).status_code)

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert answers == [200] * 5
    assert said(server) == ["POST /v1/grants", "POST /v1/grants/grt_1/renew"]


def test_the_async_one_does_the_same(async_client, server, resource, a):
    server.answers((201, a.issued("first.secret.token")), (200, a.issued("second.secret.token")), *[(503, {})] * 20)
    resource.answers((401, {}), {}, (401, {}))

    async def main():
        async with async_client as client, httpx.AsyncClient(trust_env=False) as http:
            source = client.credential("task_1", resource.url, READ)
            assert (await http.get(resource.url, auth=source.auth())).status_code == 200
            assert (await http.get(resource.url, auth=source.auth())).status_code == 401

    asyncio.run(main())
    assert shown(resource)[:2] == ["Bearer first.secret.token", "Bearer second.secret.token"]


# --- A real broker, and a server that checks what it is shown --------------------------------------------------------


@pytest.fixture
def protected(live_broker, tmp_path):  # noqa: F811
    """Opens to live, bound tokens with a proof that has the nonce of the hour; and not to those it distrusts."""
    distrusted, asked = set(), []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            sent = [(name.encode(), value.encode()) for name, value in self.headers.items()]
            sent += [(b"x-original-method", b"POST"), (b"x-original-uri", self.path.encode())]
            token = self.headers.get("Authorization", "").partition(" ")[2]
            asked.append(token)
            status, headers = (401, []) if token in distrusted else self.server.gateway.answer("/authorize/crm", sent)
            if status == 200 and _claims(self.headers["DPoP"]).get("nonce") != "of-the-hour":
                status, headers = 401, [("WWW-Authenticate", 'DPoP error="use_dpop_nonce"')]
            self.send_response(status)
            for name, value in [*headers, ("DPoP-Nonce", "of-the-hour"), ("Content-Length", "0")]:
                if name != "Authorization":
                    self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    place = Place(tmp_path, live_broker)
    place.write("verifier.token", live_broker.token("crm-api"))
    place.write("crm.key", "unused")
    url = f"http://127.0.0.1:{server.server_port}"
    server.gateway = Gateway(read_settings(place.configure(origin=url)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield url, distrusted, asked
    server.shutdown()
    server.server_close()
    server.gateway.close()


def _claims(proof):
    return jwt.decode(proof, options={"verify_signature": False})


class RealHttpx:
    def post(self, source, url):
        return httpx.post(url, auth=self.auth(source, url), content=b"x").status_code

    def auth(self, source, url):
        self.made = getattr(self, "made", None) or source.auth(url.partition("/contacts")[0])
        return self.made


class RealRequests(RealHttpx):
    def post(self, source, url):
        return requests.post(url, auth=self.auth(source, url), data=b"x").status_code

    def auth(self, source, url):
        self.made = getattr(self, "made", None) or source.requests_auth(url.partition("/contacts")[0])
        return self.made


@pytest.mark.parametrize("kind", [RealHttpx, RealRequests])
def test_a_real_server_is_given_proofs_its_nonce_and_another_token_where_it_distrusts_one(
    protected,
    live_broker,  # noqa: F811
    kind,
):
    url, distrusted, asked = protected
    work, program = Work(live_broker), kind()
    try:
        with work.agent.credential(work.task.id, CRM, ["contacts:write"], dpop=DpopKey.generate()) as source:
            assert program.post(source, f"{url}/contacts?a=1") == 200
            assert len(asked) == 2  # the first had no nonce, and from then on it is known
            assert program.post(source, f"{url}/contacts") == 200
            assert len(asked) == 3 and len(set(asked)) == 1
            distrusted.add(source.token())
            assert program.post(source, f"{url}/contacts") == 200
            assert len(asked) == 5 and len(set(asked)) == 2
            work.orchestrator.complete_task(work.task.id)
            assert program.post(source, f"{url}/contacts") == 401
    finally:
        work.close()


def test_a_real_server_takes_those_of_asyncio(protected, live_broker):  # noqa: F811
    url, distrusted, asked = protected
    work = Work(live_broker)

    async def main():
        async with (
            sdk.AsyncClient(live_broker.url, token=live_broker.token("summarizer")) as agent,
            agent.credential(work.task.id, CRM, ["contacts:write"], dpop=DpopKey.generate()) as source,
            httpx.AsyncClient(trust_env=False, auth=source.auth(url)) as http,
        ):
            assert (await http.post(f"{url}/contacts?a=1")).status_code == 200
            distrusted.add(await source.token())
            assert (await http.post(f"{url}/contacts")).status_code == 200

    try:
        asyncio.run(main())
    finally:
        work.close()
    assert len(asked) == 4 and len(set(asked)) == 2
