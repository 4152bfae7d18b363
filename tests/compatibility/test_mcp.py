"""The `mcp` SDK, its client and its server unmodified, with the programs that the how-to shows.

The client knows the MCP server and the issuer; everything else it finds (RFC 9728, RFC 8414).
"""

import asyncio
import threading

import httpx
import jwt
import pytest
import uvicorn
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from mcp.client.auth import OAuthFlowError, OAuthTokenError
from mcp.client.auth.extensions.client_credentials import (
    PrivateKeyJWTOAuthProvider,
    SignedJWTParameters,
    static_assertion_provider,
)
from mcp.server.auth.middleware.auth_context import get_access_token

from broker.domain.clock import system_clock
from tests.compatibility.conftest import NOTES_SERVER, REPORTER, RESEARCHER
from tests.processes import until
from tests.workloads import dpop_proof, issuer_key


@pytest.fixture(scope="module")
def token_file(tokens, tmp_path_factory):
    directory = tmp_path_factory.mktemp("workload")

    def of(subject):
        path = directory / subject.rpartition("/")[2]
        path.write_text(tokens["spiffe"](sub=subject))
        return path

    return of


@pytest.fixture(scope="module")
def notes(broker, shown, token_file):
    """The address of a real MCP server: streamable HTTP, in a thread of its own."""
    made = shown.program("server").server(shown.broker, shown.notes, token_file(NOTES_SERVER))

    @made.tool()
    def who_asks() -> dict[str, str]:
        """What the server was told about the token that this call came with."""
        token = get_access_token()
        return {"agent": token.client_id, "task": token.claims["task_id"], "token": token.token}

    port = httpx.URL(shown.notes).port
    server = uvicorn.Server(
        uvicorn.Config(made.streamable_http_app(), host="127.0.0.1", port=port, log_config=None, ws="none")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started, what="the MCP server")
        yield shown.notes
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def client(shown):
    return shown.program("authentication")


def answer_of(notes, token):
    """What the server says to a request that is none: 400 where it gets as far as reading it, 401 where not."""
    accept = "application/json, text/event-stream"
    return httpx.post(notes, headers={"Authorization": f"Bearer {token}", "Accept": accept}, json={}, trust_env=False)


def signed_by(key, issuer):
    """The SDK signs for itself; it says no `kid`."""
    pem = key.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    return SignedJWTParameters(
        issuer=issuer, subject=issuer, signing_key=pem, signing_algorithm=key.algorithm
    ).create_assertion_provider()


def test_a_client_with_its_platforms_token_finds_its_way_and_calls_a_tool(broker, notes, client, token_file):
    storage = client.InMemory()
    auth = client.authentication(notes, broker.deployment.issuer, token_file(RESEARCHER), storage)
    told = asyncio.run(client.call(notes, auth, "who_asks"))
    assert told["token"] == storage.token.access_token
    claims = jwt.decode(told["token"], options={"verify_signature": False})
    assert (claims["iss"], claims["aud"]) == (broker.deployment.issuer, notes)
    assert (told["agent"], claims["sub"], claims["scope"]) == ("researcher", "researcher", "notes:read")
    assert told["task"] == claims["task_id"]
    assert broker.get(f"/v1/tasks/{told['task']}", "ada").json()["agents"] == ["researcher"]


def test_when_its_task_has_ended_the_token_is_refused_and_the_client_asks_for_another(
    broker, notes, client, token_file
):
    storage = client.InMemory()
    auth = client.authentication(notes, broker.deployment.issuer, token_file(RESEARCHER), storage)
    first = asyncio.run(client.call(notes, auth, "who_asks"))
    assert answer_of(notes, first["token"]).status_code == 400
    assert broker.post(f"/v1/tasks/{first['task']}/complete", "ada").status_code == 200
    refused = answer_of(notes, first["token"])
    assert (refused.status_code, refused.json()["error"]) == (401, "invalid_token")
    second = asyncio.run(client.call(notes, auth, "who_asks"))
    assert second["agent"] == "researcher"
    assert second["task"] != first["task"]
    assert second["token"] != first["token"]


def test_a_static_assertion_is_enough(broker, notes, client, token_file):
    assertion = static_assertion_provider(token_file(RESEARCHER).read_text())
    auth = PrivateKeyJWTOAuthProvider(
        notes, client.InMemory(), "researcher", assertion, issuer=broker.deployment.issuer
    )
    assert asyncio.run(client.call(notes, auth, "who_asks"))["agent"] == "researcher"


def test_a_client_that_starts_with_a_token_for_a_task_ends_with_that_task(broker, notes, client, shown):
    """INV-12: what the SDK signs for itself gets nothing without a task, and it cannot name one."""
    task = broker.open_task("reporter")
    sign = signed_by(REPORTER, "https://reporter.example")
    form = {
        "grant_type": "client_credentials",
        "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
        "client_assertion": asyncio.run(sign(broker.deployment.issuer)),
        "resource": notes,
        "scope": "notes:read",
        "task_id": task,
    }
    answer = broker.client.post("/oauth2/token", data=form).json()
    storage = shown.program("storage_for").storage_for(client.InMemory, answer["access_token"], answer["expires_in"])
    auth = PrivateKeyJWTOAuthProvider(notes, storage, "reporter", sign, issuer=broker.deployment.issuer)
    told = asyncio.run(client.call(notes, auth, "who_asks"))
    assert told == {"agent": "reporter", "task": task, "token": answer["access_token"]}
    broker.complete(task)
    assert answer_of(notes, answer["access_token"]).status_code == 401
    with pytest.RaisesGroup(pytest.RaisesExc(OAuthTokenError, match="task_id is missing"), flatten_subgroups=True):
        asyncio.run(client.call(notes, auth, "who_asks"))


def test_a_client_whose_key_is_not_the_one_is_told_so(broker, notes, client):
    sign = signed_by(issuer_key(), "https://reporter.example")
    auth = PrivateKeyJWTOAuthProvider(notes, client.InMemory(), "reporter", sign, issuer=broker.deployment.issuer)
    with pytest.RaisesGroup(pytest.RaisesExc(OAuthTokenError, match="invalid_client"), flatten_subgroups=True):
        asyncio.run(client.call(notes, auth, "who_asks"))


def test_a_workload_token_goes_to_no_other_issuer(notes, client):
    """The SDK's own rule, which our metadata must let it keep: the issuer is compared exactly."""
    asked = []

    async def assertion(audience):
        asked.append(audience)

    auth = PrivateKeyJWTOAuthProvider(notes, client.InMemory(), "researcher", assertion, issuer="https://other.example")
    with pytest.RaisesGroup(pytest.RaisesExc(OAuthFlowError, match="issuer mismatch"), flatten_subgroups=True):
        asyncio.run(client.call(notes, auth, "who_asks"))
    assert asked == []


def test_a_token_for_another_resource_and_one_that_is_bound_to_a_key_are_refused(broker, notes, tokens):
    """INV-21: the SDK hands its server a token without the request that it came with, so nobody proves the key."""

    def ask(resource, scope, **headers):
        form = {"grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer", "resource": resource, "scope": scope}
        form["assertion"] = tokens["spiffe"](sub=RESEARCHER)
        return broker.client.post("/oauth2/token", data=form, headers=headers).json()["access_token"]

    proof = dpop_proof(issuer_key(), url=f"{broker.deployment.issuer}/oauth2/token", now=system_clock())
    assert answer_of(notes, ask(notes, "notes:read")).status_code == 400
    assert answer_of(notes, ask("https://vault.example", "orders:read")).status_code == 401
    assert answer_of(notes, ask(notes, "notes:read", DPoP=proof)).status_code == 401
