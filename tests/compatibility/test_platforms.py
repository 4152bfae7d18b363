"""Tokens of Kubernetes, GitHub Actions, GitLab CI and SPIFFE are taken by configuration alone, whole or not at all."""

from dataclasses import replace

import jwt
import pytest

from broker.config import load
from tests.compatibility.conftest import GITHUB, GITLAB, KUBERNETES, NEWS, SPIRE
from tests.processes import JWT_BEARER
from tests.workloads import issuer_key

SPIFFE_ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe"
PRINCIPALS = {"kubernetes": "pod", "github": "workflow", "gitlab": "pipeline-job", "spiffe": "svid"}
PLATFORMS = sorted(PRINCIPALS)


def issued(answer):
    assert answer.status_code == 200, answer.text
    return jwt.decode(answer.json()["access_token"], options={"verify_signature": False})


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_token_of_the_platform_is_a_bearer_at_the_api(broker, tokens, platform):
    headers = {"Authorization": f"Bearer {tokens[platform]()}"}
    body = {"resource": NEWS, "scopes": ["news:read"]}
    answer = broker.client.post("/v1/grants", headers=headers, json=body)
    assert answer.status_code == 201, answer.text
    assert answer.json()["grant"]["agent"] == PRINCIPALS[platform]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_it_is_a_client_assertion(broker, tokens, platform):
    form = {
        "grant_type": "client_credentials",
        "client_assertion_type": SPIFFE_ASSERTION if platform == "spiffe" else JWT_BEARER,
        "client_assertion": tokens[platform](),
        "resource": NEWS,
        "scope": "news:read",
    }
    assert issued(broker.client.post("/oauth2/token", data=form))["client_id"] == PRINCIPALS[platform]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_it_is_the_grant_of_a_client_that_cannot_authenticate(broker, tokens, platform):
    """RFC 7523 section 2.1."""
    form = {"grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer", "assertion": tokens[platform]()}
    answer = broker.client.post("/oauth2/token", data={**form, "resource": NEWS, "scope": "news:read"})
    assert issued(answer)["client_id"] == PRINCIPALS[platform]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_it_is_exchanged_as_cloud_sdks_exchange_it(broker, tokens, platform):
    """Their external-account credentials send audience and requested_token_type, and members only their cloud knows."""
    form = {
        "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
        "audience": NEWS,
        "scope": "news:read",
        "requested_token_type": "urn:ietf:params:oauth:token-type:access_token",
        "subject_token": tokens[platform](),
        "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
        "options": "%7B%22userProject%22%3A%20%22x%22%7D",
    }
    answer = broker.client.post("/oauth2/token", data=form)
    assert issued(answer)["aud"] == NEWS
    assert answer.json()["issued_token_type"] == "urn:ietf:params:oauth:token-type:access_token"


OFF = [
    ("kubernetes", {"sub": "system:serviceaccount:agents:other"}),
    ("kubernetes", {"sub": "system:serviceaccount:agents:summarizer "}),
    ("kubernetes", {"bound": {"namespace": "agents-evil"}}),
    ("kubernetes", {"bound": {"serviceaccount": {"name": "other", "uid": "x"}}}),
    ("kubernetes", {"bound": {"serviceaccount": "summarizer"}}),
    ("kubernetes", {"kubernetes.io": None}),
    ("kubernetes", {"kubernetes.io.namespace": "agents", "kubernetes.io": None}),
    ("kubernetes", {"iss": "https://kubernetes.default.svc"}),
    ("kubernetes", {"iss": "kubernetes/serviceaccount", "exp": None}),
    ("kubernetes", {"aud": ["https://kubernetes.default.svc.cluster.local"]}),
    ("kubernetes", {"aud": None}),
    ("kubernetes", {"headers": {"kid": "gh-1"}}),
    ("kubernetes", {"key": replace(GITHUB, kid="k8s-1")}),
    ("github", {"repository_id": "75"}),
    ("github", {"repository_id": 74}),
    ("github", {"sub": "repo:octo-org/octo-repo:ref:refs/heads/main"}),
    ("github", {"sub": "repo:octo-org/octo-repo:environment:prod2"}),
    ("github", {"job_workflow_ref": "octo-org/auto/.github/workflows/oidc.yml@refs/heads/evil"}),
    ("github", {"iss": "https://token.actions.githubusercontent.com/octo-enterprise"}),
    ("github", {"aud": "https://github.com/octo-org"}),
    ("github", {"key": KUBERNETES}),
    ("github", {"key": replace(GITLAB, kid="gh-1")}),
    ("gitlab", {"project_id": "23"}),
    ("gitlab", {"ref_protected": "false"}),
    ("gitlab", {"ref_protected": True}),
    ("gitlab", {"sub": "project_path:my-group/my-project:ref_type:tag:ref:main"}),
    ("gitlab", {"iss": "https://gitlab.com"}),
    ("gitlab", {"key": KUBERNETES}),
    ("gitlab", {"key": replace(KUBERNETES, kid="gl-1")}),
    ("spiffe", {"key": replace(issuer_key(), kid=SPIRE.kid)}),
    ("spiffe", {"sub": "spiffe://prod.example/ns/agents-evil/sa/summarizer"}),
    ("spiffe", {"sub": "spiffe://prod.example/ns/agents/"}),
    ("spiffe", {"sub": "spiffe://prod.example/ns/agents/../admin/sa/root"}),
    ("spiffe", {"sub": "spiffe://evil.example/ns/agents/sa/summarizer"}),
    ("spiffe", {"sub": "system:serviceaccount:agents:summarizer"}),
    ("spiffe", {"aud": ["spiffe://prod.example/broker"]}),
    ("spiffe", {"exp": None}),
    ("spiffe", {"headers": {"typ": "at+jwt"}}),
    ("spiffe", {"headers": {"x5t": "x"}}),
    ("spiffe", {"headers": {"kid": None}}),
]


@pytest.mark.parametrize(("platform", "off"), OFF, ids=lambda value: str(value)[:70])
def test_one_claim_off_is_nobody(broker, tokens, platform, off):
    answer = broker.client.get("/v1/grants", headers={"Authorization": f"Bearer {tokens[platform](**off)}"})
    assert answer.status_code == 401, answer.text
    assert answer.json()["detail"] == "the workload token was not accepted"


@pytest.mark.parametrize("typ", ["JWT", "JOSE", None])
@pytest.mark.parametrize("issuer", [None, "https://spire.prod.example", "spiffe://prod.example"])
def test_a_jwt_svid_may_have_a_type_and_an_issuer_or_not(broker, tokens, typ, issuer):
    """JWT-SVID sections 2.3 and 3: iss is not read, and typ is JWT or JOSE where it is there."""
    token = tokens["spiffe"](headers={"typ": typ}, iss=issuer)
    answer = broker.client.get("/v1/grants", headers={"Authorization": f"Bearer {token}"})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_token_may_be_presented_many_times_unless_its_issuer_is_single_use(broker, tokens, platform):
    headers = {"Authorization": f"Bearer {tokens[platform]()}"}
    assert [broker.client.get("/v1/grants", headers=headers).status_code for _ in range(3)] == [200] * 3


def test_the_configuration_says_all_of_it(broker):
    catalogue = load(broker.deployment.configuration).catalogue
    assert {issuer.key_source for issuer in catalogue.issuers} >= {
        "discovery", "jwks_uri", "jwks_file", "spiffe_bundle_url",
    }  # fmt: skip
    assert set(PRINCIPALS.values()) <= catalogue.principal_names
