"""The doors for frameworks: what gets through, what the refusal looks like, and who the application sees."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import grpc
import grpc.aio
import httpx
import pytest
from fastapi import Depends, FastAPI, WebSocket
from fastapi.testclient import TestClient
from flask import Flask
from mcp.server import MCPServer
from mcp.server.auth.settings import AuthSettings
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.websockets import WebSocketDisconnect

from broker.conformance.fake_broker import AUDIENCE, SCOPE
from broker.sdk import DpopKey
from broker.sdk.verifier import Verified, asgi, wsgi
from broker.sdk.verifier import flask as for_flask
from broker.sdk.verifier.grpc import AsyncVerifierInterceptor, VerifierInterceptor, verified
from broker.sdk.verifier.mcp import McpTokenVerifier
from broker.sdk.verifier.starlette import requires

HOST = "https://crm.example"


def flask_app(verifier):
    app = Flask("crm")

    @app.get("/healthz")
    def healthz():
        return {"status": "ok"}

    @app.get("/contacts")
    def contacts():
        return {"for": for_flask.verified().agent}

    for_flask.guard(app, verifier, scopes=SCOPE, public=["healthz"])
    return app


def decorated_app(verifier):
    app = Flask("crm")

    @app.get("/healthz")
    def healthz():
        return {"status": "ok"}

    @app.get("/contacts")
    @for_flask.requires(verifier, SCOPE)
    def contacts():
        return {"for": for_flask.verified().agent}

    return app


def plain_wsgi(verifier):
    def app(environ, start_response):
        caller = environ.get(wsgi.VERIFIED)
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps({"for": caller and caller.agent}).encode()]

    return wsgi.VerifierMiddleware(app, verifier, scopes=SCOPE, public=["/healthz"])


async def answering(scope, receive, send):
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": scope[asgi.VERIFIED].agent})
        await send({"type": "websocket.close"})
        return
    caller = scope.get(asgi.VERIFIED)
    await JSONResponse({"for": caller and caller.agent})(scope, receive, send)


def plain_asgi(verifier):
    return asgi.VerifierMiddleware(answering, verifier, scopes=SCOPE, public=["/healthz"])


def fastapi_app(verifier):
    app, need = FastAPI(), Depends(requires(verifier, SCOPE))

    @app.get("/healthz")
    async def healthz():
        return {"status": "ok"}

    @app.get("/contacts")
    async def contacts(caller: Verified = need):
        return {"for": caller.agent}

    @app.websocket("/live")
    async def live(socket: WebSocket, caller: Verified = need):
        await socket.accept()
        await socket.send_text(caller.agent)
        await socket.close()

    return app


def starlette_app(verifier):
    need = requires(verifier, SCOPE)

    async def contacts(request):
        return JSONResponse({"for": (await need(request)).agent})

    async def healthz(request):
        return JSONResponse({"status": "ok"})

    return Starlette(routes=[Route("/contacts", contacts), Route("/healthz", healthz)])


SYNC = {"flask guard": flask_app, "flask decorator": decorated_app, "wsgi": plain_wsgi}
ASYNC = {"asgi": plain_asgi, "fastapi": fastapi_app, "starlette": starlette_app}


def joined(headers):
    """As the servers of WSGI hand over a header that came more than once."""
    found = {}
    for name, value in headers.items() if isinstance(headers, dict) else headers:
        found[name] = f"{found[name]},{value}" if name in found else value
    return found


@pytest.fixture(params=[*SYNC, *ASYNC])
def ask(request, verifier):
    """One request to the app behind the door."""
    if request.param in SYNC:
        with httpx.Client(transport=httpx.WSGITransport(app=SYNC[request.param](verifier)), base_url=HOST) as client:
            yield lambda path, headers: client.get(path, headers=joined(headers))
        return
    transport = httpx.ASGITransport(app=ASYNC[request.param](verifier))

    async def asked(path, headers):
        async with httpx.AsyncClient(transport=transport, base_url=HOST) as client:
            return await client.get(path, headers=headers)

    yield lambda path, headers: asyncio.run(asked(path, headers))


def test_a_good_token_gets_through_and_the_application_sees_who_it_is(broker, ask):
    answer = ask("/contacts", {"Authorization": f"Bearer {broker.issue().token}"})
    assert (answer.status_code, answer.json()) == (200, {"for": "summarizer"})


def test_refusals_have_the_status_and_the_challenge_of_the_standards(broker, ask):
    anonymous = ask("/contacts", {})
    assert (anonymous.status_code, anonymous.headers["www-authenticate"]) == (401, f'Bearer scope="{SCOPE}"')
    bad = ask("/contacts", {"Authorization": "Bearer a.b.c"})
    assert bad.status_code == 401
    assert 'error="invalid_token"' in bad.headers["www-authenticate"]
    assert bad.headers["cache-control"] == "no-store"
    other = ask("/contacts", {"Authorization": f"Bearer {broker.issue(scope='nothing').token}"})
    assert other.status_code == 403
    assert 'error="insufficient_scope"' in other.headers["www-authenticate"]
    broker.serves = {"jwks"}
    unknown = ask("/contacts", {"Authorization": f"Bearer {broker.issue(status_list='2').token}"})
    assert (unknown.status_code, unknown.headers["retry-after"]) == (503, "1")
    assert "www-authenticate" not in unknown.headers


def test_what_is_public_stays_so(ask):
    assert ask("/healthz", {}).status_code == 200
    assert ask("/healthz/", {}).status_code != 200


def test_a_bound_token_gets_through_with_its_proof_for_this_address(broker, ask):
    key = DpopKey.generate()
    issued = broker.issue(bound_to=key)

    def headers(url):
        return {"Authorization": f"DPoP {issued.token}", "DPoP": key.proof("GET", url, access_token=issued.token)}

    assert ask("/contacts?page=2", headers(f"{HOST}/contacts")).status_code == 200
    elsewhere = ask("/contacts", headers("https://evil.example/contacts"))
    assert elsewhere.status_code == 401
    assert 'error="invalid_dpop_proof"' in elsewhere.headers["www-authenticate"]
    assert ask("/contacts", {"Authorization": f"Bearer {issued.token}"}).status_code == 401


def test_two_credentials_are_one_too_many(broker, ask):
    one, two = broker.issue().token, broker.issue().token
    answer = ask("/contacts", [("Authorization", f"Bearer {one}"), ("Authorization", f"Bearer {two}")])
    assert answer.status_code in (400, 401)


def test_two_proofs_are_one_too_many(broker, ask):
    key = DpopKey.generate()
    issued = broker.issue(bound_to=key)
    proofs = [("DPoP", key.proof("GET", f"{HOST}/contacts", access_token=issued.token)) for _ in range(2)]
    assert ask("/contacts", [("Authorization", f"DPoP {issued.token}"), *proofs]).status_code == 401


def test_in_flask_nobody_is_seen_where_nobody_checked(verifier):
    app = decorated_app(verifier)
    with app.test_request_context("/healthz"), pytest.raises(RuntimeError, match="not verified"):
        for_flask.verified()


@pytest.mark.parametrize("make", [plain_asgi, fastapi_app])
def test_a_websocket_is_verified_as_it_is_opened(broker, verifier, make):
    client = TestClient(make(verifier), base_url=HOST)
    headers = {"Authorization": f"Bearer {broker.issue().token}"}
    with client.websocket_connect("/live", headers=headers) as socket:
        assert socket.receive_text() == "summarizer"
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/live"):
        pass


def test_a_websocket_of_a_server_that_cannot_refuse_by_http_is_closed(verifier):
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/live", "headers": [], "scheme": "wss"}
    asyncio.run(plain_asgi(verifier)(scope, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008, "reason": "missing_token"}]


def test_the_lifespan_of_an_application_is_none_of_the_doors_business(verifier):
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    door = asgi.VerifierMiddleware(app, verifier)
    asyncio.run(door({"type": "lifespan"}, None, None))
    assert seen == ["lifespan"]


# -- gRPC --------------------------------------------------------------------------------------------------------------

KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def handlers(asynchronous):
    def one(request, context):
        return verified().agent.encode()

    def many(request, context):
        yield verified().agent.encode()
        yield verified().grant_id.encode()

    async def one_async(request, context):
        return one(request, context)

    async def many_async(request, context):
        for each in many(request, context):
            yield each

    once, often = (one_async, many_async) if asynchronous else (one, many)
    made = {
        kind: getattr(grpc, f"{kind}_rpc_method_handler")(often if kind.endswith("stream") else once) for kind in KINDS
    }
    made["open"] = grpc.unary_unary_rpc_method_handler(lambda request, context: b"anybody")
    return grpc.method_handlers_generic_handler("crm.Contacts", made)


def doors():
    return {"scopes": {f"/crm.Contacts/{kind}": [SCOPE] for kind in KINDS}, "public": ["/crm.Contacts/open"]}


def call(channel, kind, *metadata):
    request = b"x" if kind.startswith("unary") else iter([b"x"])
    answer = getattr(channel, kind)(f"/crm.Contacts/{kind}")(request, metadata=metadata)
    return list(answer) if kind.endswith("stream") else [answer]


@pytest.fixture(params=["sync", "aio"])
def channel(request, verifier_of):
    verifier = verifier_of(origin="https://crm.example")
    if request.param == "sync":
        server = grpc.server(ThreadPoolExecutor(4), interceptors=[VerifierInterceptor(verifier, **doors())])
        server.add_generic_rpc_handlers([handlers(False)])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as made:
            yield made
        server.stop(None).wait()
        return
    loop = asyncio.new_event_loop()

    async def start():
        server = grpc.aio.server(interceptors=[AsyncVerifierInterceptor(verifier, **doors())])
        server.add_generic_rpc_handlers([handlers(True)])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    server, port = loop.run_until_complete(start())
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(loop.run_forever)
        with grpc.insecure_channel(f"127.0.0.1:{port}") as made:
            yield made
        asyncio.run_coroutine_threadsafe(server.stop(None), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        running.result(10)
    loop.close()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_call_is_verified(broker, channel, kind):
    issued = broker.issue()
    answered = call(channel, kind, ("authorization", f"Bearer {issued.token}"))
    expected = [b"summarizer", issued.grant_id.encode()] if kind.endswith("stream") else [b"summarizer"]
    assert answered == expected
    with pytest.raises(grpc.RpcError) as refused:
        call(channel, kind)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_grpc_says_why_by_its_own_codes(broker, channel):
    with pytest.raises(grpc.RpcError) as refused:
        call(channel, "unary_unary", ("authorization", f"Bearer {broker.issue(scope='nothing').token}"))
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "insufficient_scope" in dict(refused.value.trailing_metadata())["www-authenticate"]
    two = [("authorization", f"Bearer {broker.issue().token}")] * 2
    with pytest.raises(grpc.RpcError) as refused:
        call(channel, "unary_unary", *two)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    broker.serves = {"jwks"}
    with pytest.raises(grpc.RpcError) as refused:
        call(channel, "unary_unary", ("authorization", f"Bearer {broker.issue(status_list='2').token}"))
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_bound_token_is_proven_by_metadata(broker, channel):
    key = DpopKey.generate()
    issued = broker.issue(bound_to=key)
    url = "https://crm.example/crm.Contacts/unary_unary"
    proof = key.proof("POST", url, access_token=issued.token)
    shown = ("authorization", f"DPoP {issued.token}"), ("dpop", proof)
    assert call(channel, "unary_unary", *shown) == [b"summarizer"]
    with pytest.raises(grpc.RpcError):
        call(channel, "unary_unary", *shown)


# -- MCP ---------------------------------------------------------------------------------------------------------------


def test_an_mcp_server_takes_the_brokers_tokens(broker, verifier):
    settings = AuthSettings(
        issuer_url=broker.url,
        resource_server_url=AUDIENCE,
        required_scopes=[SCOPE],
        validate_token_resource=True,
    )
    server = MCPServer("crm", auth=settings, token_verifier=McpTokenVerifier(verifier))

    @server.tool()
    def contacts() -> str:
        return "Example Bakery"

    body = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "initialize",
        "params": {
            "protocolVersion": "2025-06-18",
            "capabilities": {},
            "clientInfo": {"name": "tests", "version": "1"},
        },
    }
    bound = broker.issue(bound_to=DpopKey.generate())
    revoked = broker.issue()
    broker.revoke("grant", grant_id=revoked.grant_id)
    with TestClient(server.streamable_http_app(), base_url="http://localhost:8000") as client:

        def asked(token):
            headers = {"Accept": "application/json, text/event-stream", "Authorization": f"Bearer {token}"}
            return client.post("/mcp", json=body, headers=headers).status_code

        assert asked(broker.issue().token) == 200
        assert asked(broker.issue(scope="nothing").token) == 403
        assert asked("a.b.c") == 401
        assert asked(bound.token) == 401
        assert asked(revoked.token) == 401


def test_an_mcp_server_knows_who_acts_for_whom(broker, verifier):
    issued = broker.issue(sub="ada", act={"sub": "summarizer"})
    found = asyncio.run(McpTokenVerifier(verifier).verify_token(issued.token))
    assert (found.client_id, found.subject, found.resource) == ("summarizer", "ada", AUDIENCE)
    assert found.scopes == [SCOPE]
    assert found.expires_at == issued.claims["exp"]
    assert found.claims["grant_id"] == issued.grant_id
