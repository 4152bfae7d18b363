"""What the README and the how-tos show is run, block by block, against a real broker."""

import re
import sys
import time
import zlib
from types import ModuleType

import httpx
import jwt
import pytest

from broker.domain.clock import system_clock
from broker.providers.dev_issuer import DevIssuer
from broker.sdk import Client, DpopKey
from tests.docs.documents import HOW_TOS, ROOT, blocks, name_of

VERIFIER = ROOT / "docs" / "how-to" / "verifier.md"
# They need a Vault, and have tests of their own: `test_how_to_vault`, and those of `tests/compatibility`.
ELSEWHERE = ("vault.md", "use-existing-clients.md")
WITH_A_SHELL = [path for path in [ROOT / "README.md", *HOW_TOS] if blocks(path, "sh") and path.name not in ELSEWHERE]
CRM = "https://crm.example/api"
_EXITS = re.compile(r"\s+# exits (\d+)$")


def as_script(text: str) -> str:
    """Where a line says `# exits N`, it must; every other command must succeed."""
    lines = []
    for line in text.replace("\\\n", " ").splitlines():
        expected = _EXITS.search(line)
        if expected is None:
            lines.append(line)
        else:
            command = _EXITS.sub("", line)
            lines.append(f'rc=0; {command} || rc=$?; [ "$rc" -eq {expected[1]} ] || exit 99')
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("path", WITH_A_SHELL, ids=name_of)
def test_what_a_document_shows_runs(path, laptop, tmp_path):
    shell = "\n".join(block.text for block in blocks(path, "sh"))
    ran = laptop.run(["sh", "-euv"], as_script(shell), cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    python = "\n".join(block.text for block in blocks(path, "python"))
    if python:
        ran = laptop.run([sys.executable, "-W", "error", "-"], python, cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr[-3000:]


def test_a_line_that_should_be_refused_and_is_not_is_noticed(laptop, tmp_path):
    assert laptop.run(["sh", "-eu"], as_script("true   # exits 1"), cwd=tmp_path).returncode == 99
    assert laptop.run(["sh", "-eu"], as_script("false   # exits 1"), cwd=tmp_path).returncode == 0


class Clock:
    def __init__(self):
        self.ahead_s = 0.0

    def __call__(self):
        return time.time() + self.ahead_s


class Work:
    """A task, the agent's hand, and the verifier of the document."""

    def __init__(self, laptop):
        def client(name):
            issuer = DevIssuer.create_or_load(laptop.directory)
            return Client(laptop.url, token=issuer.token(f"dev:{name}", laptop.url, system_clock()))

        self.url = laptop.url
        self.orchestrator, self.agent = client("crm-pipeline"), client("summarizer")
        self.task = self.orchestrator.open_task(
            "summarise the leads of May", ["summarizer"], deadline_s=3600, labels={"team": "crm"}
        )
        offline, bound = (executed(block.text) for block in blocks(VERIFIER, "python"))
        self.clock = Clock()
        self.refused, self.not_proven = offline.Refused, bound.NotProven
        self.verifier = offline.Verifier(laptop.url, CRM, now=self.clock)
        self.check_proof = bound.check_proof

    def credential(self, scope="contacts:read", **more):
        return self.agent.request_grant(self.task.id, CRM, [scope], **more)

    def close(self):
        self.verifier._http.close()
        self.orchestrator.close()
        self.agent.close()


def executed(text):
    module = ModuleType("shown")
    exec(compile(text, "shown", "exec"), module.__dict__)
    return module


@pytest.fixture
def work(laptop):
    made = Work(laptop)
    yield made
    made.close()


def test_the_verifier_that_is_shown_accepts_a_live_token_and_refuses_it_after_the_bound(work):
    grant, credential = work.credential()
    token = credential.reveal()
    assert work.verifier.check(token, "contacts:read")["grant_id"] == grant.id
    work.orchestrator.complete_task(work.task.id)
    # Its list is old now, so it fetches; what the broker answers may be 2 s old, by the broker's own clock.
    work.clock.ahead_s = 10
    deadline = time.monotonic() + 8
    with pytest.raises(work.refused, match="revoked"):
        while time.monotonic() < deadline:
            work.verifier.check(token, "contacts:read")
            time.sleep(0.2)


def test_the_verifier_that_is_shown_refuses_what_is_not_for_it(work):
    _, credential = work.credential()
    token = credential.reveal()
    with pytest.raises(work.refused, match="scope"):
        work.verifier.check(token, "contacts:write")
    with pytest.raises(work.refused):
        work.verifier.check(token[:-6] + "AAAAAA", "contacts:read")
    with pytest.raises(work.refused):
        work.verifier.check(jwt.encode({"iss": work.url}, "x" * 32, algorithm="HS256"), "contacts:read")
    work.verifier._audience = "https://mail.example/api"
    with pytest.raises(work.refused, match=r"[Aa]udience"):
        work.verifier.check(token, "contacts:read")


def test_the_verifier_that_is_shown_refuses_when_nobody_tells_it_the_status(work):
    _, credential = work.credential()
    token = credential.reveal()
    work.verifier.check(token, "contacts:read")
    work.clock.ahead_s = 10

    class Silent:
        def get(self, uri):
            raise httpx.ConnectError("nobody there")

    http, work.verifier._http = work.verifier._http, Silent()
    try:
        with pytest.raises(work.refused, match="nobody says"):
            work.verifier.check(token, "contacts:read")
    finally:
        work.verifier._http = http


def test_the_verifier_that_is_shown_never_unpacks_more_than_a_list_can_be(work):
    [limit] = re.findall(r"^LONGEST_LIST = (2\*\*\d+)", blocks(VERIFIER, "python")[0].text, re.MULTILINE)
    bomb = zlib.compress(b"\0" * 2**24)
    assert len(zlib.decompressobj().decompress(bomb, 2 ** int(limit[3:]))) == 2 ** int(limit[3:])


def test_the_proof_check_that_is_shown_accepts_one_request_once(work):
    key, seen = DpopKey.generate(), set()

    def first_use(name):
        return name not in seen and not seen.add(name)

    _, credential = work.credential("contacts:write", dpop=key)
    token = credential.reveal()
    claims = work.verifier.check(token, "contacts:write")
    url = f"{CRM}/contacts"
    proof = key.proof("GET", url, access_token=token)
    work.check_proof(proof, claims, token, method="GET", url=f"{url}?page=2", first_use=first_use)
    refused = {
        "used before": (proof, {}),
        "another request": (key.proof("POST", url, access_token=token), {}),
        "another token": (key.proof("GET", url, access_token="other"), {}),
        "another key": (DpopKey.generate().proof("GET", url, access_token=token), {}),
        "too old": (key.proof("GET", url, access_token=token), {"now": lambda: work.clock() + 61}),
    }
    for why, (made, more) in refused.items():
        with pytest.raises(work.not_proven, match=why):
            work.check_proof(made, claims, token, method="GET", url=url, first_use=first_use, **more)


def test_the_receipt_that_the_how_to_keeps_is_signed_by_a_published_key(work):
    receipt = work.orchestrator.complete_task(work.task.id)
    key = jwt.PyJWKClient(f"{work.url}/oauth2/jwks").get_signing_key_from_jwt(receipt.jws)
    claims = jwt.decode(receipt.jws, key, algorithms=["ES256"], options={"verify_aud": False})
    assert claims["receipt"]["task_id"] == work.task.id
