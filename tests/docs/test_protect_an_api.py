"""Each example of `how-to/protect-an-api.md`, made and asked with good and bad tokens; and the reference beside it."""

import asyncio
import dataclasses
from types import ModuleType

import grpc
import httpx
import pytest

from broker.conformance.fake_broker import AUDIENCE, FakeBroker
from broker.sdk.verifier import REASONS, State
from tests.docs.documents import ROOT, blocks

EXAMPLES = {
    name: block.text
    for name, block in zip(
        ("flask", "fastapi", "wsgi", "grpc", "mcp", "else"),
        blocks(ROOT / "docs" / "how-to" / "protect-an-api.md", "python"),
        strict=True,
    )
}
REFERENCE = (ROOT / "docs" / "reference" / "verifier.md").read_text()


@pytest.fixture
def broker():
    made = FakeBroker(every_s=0.1)
    yield made
    made.close()


@pytest.fixture
def shown(broker, tmp_path):
    """What an example makes."""
    made = []

    def make(name):
        token = tmp_path / "crm-api.token"
        token.write_text("a-workload-token\n")
        module = ModuleType("shown")
        text = EXAMPLES[name].replace("https://broker.example", broker.url).replace("crm-api.token", str(token))
        exec(compile(text, name, "exec"), module.__dict__)
        made.append(module.verifier)
        return module

    yield make
    for each in made:
        each.close()


def asked(app, token, *, asynchronous=False):
    headers = {"Authorization": f"Bearer {token}"}
    if not asynchronous:
        with httpx.Client(transport=httpx.WSGITransport(app=app), base_url="https://crm.example") as client:
            return client.get("/contacts", headers=headers)

    async def ask():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="https://crm.example") as client:
            return await client.get("/contacts", headers=headers)

    return asyncio.run(ask())


@pytest.mark.parametrize("name", ["flask", "fastapi", "wsgi"])
def test_an_api_that_is_shown_answers_whom_it_should(broker, shown, name):
    app, issued = shown(name).app, broker.issue()
    answer = asked(app, issued.token, asynchronous=name == "fastapi")
    assert answer.json() == {"agent": "summarizer", "task": issued.task_id}
    for bad, status in ((broker.issue(scope="nothing"), 403), (broker.issue(aud="https://mail.example/api"), 401)):
        assert asked(app, bad.token, asynchronous=name == "fastapi").status_code == status


def test_the_grpc_server_that_is_shown_lets_in_whom_it_should(broker, shown):
    module = shown("grpc")
    method = grpc.unary_unary_rpc_method_handler(lambda request, context: module.verified().agent.encode())
    module.server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("crm.Contacts", {"List": method})])
    port = module.server.add_insecure_port("127.0.0.1:0")
    module.server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/crm.Contacts/List")
            metadata = [("authorization", f"Bearer {broker.issue().token}")]
            assert call(b"", metadata=metadata) == b"summarizer"
            with pytest.raises(grpc.RpcError):
                call(b"", metadata=[("authorization", f"Bearer {broker.issue(scope='nothing').token}")])
    finally:
        module.server.stop(None).wait()


def test_the_mcp_server_that_is_shown_checks_tokens(broker, shown):
    module = shown("mcp")
    check = module.server._token_verifier.verify_token
    assert asyncio.run(check(broker.issue().token)).resource == AUDIENCE
    assert asyncio.run(check("a.b.c")) is None


def test_the_function_that_is_shown_answers_and_challenges(broker, shown):
    answer = shown("else").answer
    url = f"{AUDIENCE}/contacts"
    assert answer(f"Bearer {broker.issue().token}", None, "GET", url)[0] == 200
    status, headers, body = answer(None, None, "GET", url)
    assert (status, headers["WWW-Authenticate"]) == (401, 'Bearer scope="contacts:read"')
    assert body["error"] == "unauthorized"


def test_the_reference_has_every_refusal_and_no_other():
    rows = [line for line in REFERENCE.splitlines() if line.startswith("| `") and line.count("|") == 5]
    expected = [
        f"| `{code}` | {reason.status} | {f'`{reason.error}`' if reason.error else '–'} | {reason.sentence} |"
        for code, reason in REASONS.items()
    ]
    assert rows == expected


def test_the_reference_has_every_member_of_the_state():
    members = {field.name for field in dataclasses.fields(State)} | {"ready"}
    assert all(f"`{member}`" in REFERENCE for member in members)
