"""One real broker, configured by its TOML file alone for every kind of workload that comes with a token of its own.

The issuers are a loopback HTTP server; their tokens have the structure that each platform documents.
"""

import json
import shutil
import threading
import uuid
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType

import pytest

from broker.domain.clock import epoch, system_clock
from tests.docs.documents import ROOT, blocks
from tests.processes import Deployment, free_port
from tests.workloads import IssuerKey, issuer_key, key_set, rsa_key


def rsa(kid, bits):
    """Keys of different sizes are different keys, and each is made once."""
    return IssuerKey(algorithm="RS256", kid=kid, private=rsa_key(bits))


KUBERNETES, GITHUB, GITLAB, CLIENT = rsa("k8s-1", 2048), rsa("gh-1", 2056), rsa("gl-1", 2064), rsa("client-1", 2072)
PRESS = "https://press.example"
SPIRE, REPORTER = issuer_key("svid-1"), issuer_key("reporter-1")
CLIENT_ID = "https://client.example"
NEWS = "https://news.example/api"
RESEARCHER = "spiffe://prod.example/ns/research/sa/researcher"
NOTES_SERVER = "spiffe://prod.example/ns/notes/sa/server"
HOW_TO = ROOT / "docs" / "how-to" / "use-existing-clients.md"

_MORE = """
[[issuers]]
name = "kubernetes"
issuer = "https://kubernetes.default.svc.cluster.local"
jwks_file = "kubernetes.json"
algorithms = ["RS256"]
max_lifetime_s = 3607

[[issuers]]
name = "github"
issuer = "https://token.actions.githubusercontent.com"
jwks_uri = "{provider}/github/jwks"
algorithms = ["RS256"]
max_lifetime_s = 600

[[issuers]]
name = "gitlab"
issuer = "{provider}"
discovery = true
algorithms = ["RS256"]

[[issuers]]
name = "prod"
issuer = "spiffe://prod.example"
spiffe_bundle_url = "{provider}/spiffe/bundle"
algorithms = ["ES256"]
max_lifetime_s = 600

[[issuers]]
name = "client"
issuer = "https://client.example"
jwks_file = "client.json"
algorithms = ["RS256"]

[[principals]]
name = "pod"
kind = "agent"
issuer = "kubernetes"
subject = "system:serviceaccount:agents:summarizer"
claims = {{ "kubernetes.io.namespace" = "agents", "kubernetes.io.serviceaccount.name" = "summarizer" }}
roles = ["agent"]
implicit_tasks = true

[[principals]]
name = "workflow"
kind = "agent"
issuer = "github"
subject = "repo:octo-org/octo-repo:environment:prod"
claims = {{ repository_id = "74", job_workflow_ref = "octo-org/auto/.github/workflows/oidc.yml@refs/heads/main" }}
roles = ["agent"]
implicit_tasks = true

[[principals]]
name = "pipeline-job"
kind = "agent"
issuer = "gitlab"
subject = "project_path:my-group/my-project:ref_type:branch:ref:main"
claims = {{ project_id = "22", ref_protected = "true" }}
roles = ["agent"]
implicit_tasks = true

[[principals]]
name = "svid"
kind = "agent"
issuer = "prod"
subject_prefix = "spiffe://prod.example/ns/agents/"
roles = ["agent"]
implicit_tasks = true

[[principals]]
name = "oauth-client"
kind = "agent"
issuer = "client"
subject = "https://client.example"
roles = ["agent"]
implicit_tasks = true

[[principals]]
name = "editor"
kind = "person"
issuer = "dev"
subject = "dev:editor"
roles = ["approver"]
groups = ["editors"]

[[resources]]
identifier = "https://press.example"
scopes = ["press:publish"]

[[resources]]
identifier = "{news}"
scopes = ["news:read"]
verifiers = ["crm-api"]

[[resources]]
identifier = "https://plain.example"
scopes = ["news:read"]
signing_algorithm = "RS256"
token_typ = "JWT"

[[resources]]
identifier = "https://edwards.example"
scopes = ["news:read"]
signing_algorithm = "EdDSA"
"""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """The blocks of the how-to, under the addresses at which its broker and its MCP server are in this run."""

    broker: str
    notes: str

    def blocks(self, language):
        addresses = {"https://broker.example": self.broker, "https://notes.example/mcp": self.notes}
        texts = [block.text for block in blocks(HOW_TO, language)]
        for written, used in addresses.items():
            texts = [text.replace(written, used) for text in texts]
        return texts

    def program(self, having):
        """The one Python block that defines `having`, as a module."""
        [text] = [text for text in self.blocks("python") if f"\ndef {having}(" in text]
        module = ModuleType("shown")
        exec(compile(text, "shown", "exec"), module.__dict__)
        return module


@pytest.fixture(scope="session")
def provider():
    """Where the issuers publish their keys: plain HTTP, which is allowed on loopback alone."""
    documents = {
        "/github/jwks": key_set(GITHUB, use="sig", alg="RS256"),
        "/gitlab/jwks": key_set(GITLAB, use="sig"),
        # A bundle holds the authorities for X.509 too (SPIFFE Trust Domain and Bundle).
        "/spiffe/bundle": json.dumps(
            {"keys": [SPIRE.jwk | {"use": "jwt-svid"}, {"kty": "EC", "use": "x509-svid", "x5c": ["AA=="]}],
             "spiffe_sequence": 12, "spiffe_refresh_hint": 300}
        ).encode(),
    }  # fmt: skip

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            body = documents.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    url = f"http://127.0.0.1:{server.server_port}"
    discovery = {"issuer": url, "jwks_uri": f"{url}/gitlab/jwks", "id_token_signing_alg_values_supported": ["RS256"]}
    documents["/.well-known/openid-configuration"] = json.dumps(discovery).encode()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield url
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="session")
def deployment(provider, migrated_file, tmp_path_factory):
    directory = tmp_path_factory.mktemp("compatible")
    deployment = Deployment.create(directory, f"sqlite:///{directory / 'broker.db'}")
    shutil.copyfile(migrated_file, directory / "broker.db")
    (directory / "kubernetes.json").write_bytes(key_set(KUBERNETES, use="sig", alg="RS256"))
    (directory / "client.json").write_bytes(key_set(CLIENT))
    (directory / "reporter.jwks.json").write_bytes(key_set(REPORTER, use="sig", alg="ES256"))
    (directory / "policies" / "news.cedar").write_text(
        '@id("news-read")\npermit (principal, action == Action::"news:read", resource);\n'
        '@id("press-asks") @approval("editors")\npermit (principal, action == Action::"press:publish", resource);\n'
    )
    return deployment


@pytest.fixture(scope="session")
def shown(deployment):
    """What the how-to shows, with the addresses of this run."""
    return Shown(broker=deployment.issuer, notes=f"http://127.0.0.1:{free_port()}/mcp")


@pytest.fixture(scope="session")
def broker(provider, deployment, shown):
    [configuration], [policy] = shown.blocks("toml"), shown.blocks("cedar")
    text = deployment.configuration.read_text() + _MORE.format(provider=provider, news=NEWS) + configuration
    deployment.configuration.write_text(text)
    (deployment.directory / "policies" / "shown.cedar").write_text(policy)
    with deployment.broker("--no-scheduler") as process:
        yield process


@pytest.fixture(scope="session")
def tokens(provider, broker):
    """Makes a token of a platform; claims are changed by name, None leaves one out, headers by `headers`."""
    audience = broker.deployment.issuer

    def make(key, header, claims, life_s, changed, headers):
        now = epoch(system_clock())
        claims = {"iat": now, "nbf": now, "exp": now + life_s, "aud": audience} | claims | changed
        header = {"alg": key.algorithm, "kid": key.kid} | header | (headers or {})
        kept = [{name: value for name, value in part.items() if value is not None} for part in (header, claims)]
        return key.sign(*kept)

    def kubernetes(*, key=KUBERNETES, headers=None, **changed):
        """A projected service account token, as the API server makes it since 1.30."""
        bound = {
            "namespace": "agents",
            "node": {"name": "node-1", "uid": str(uuid.uuid4())},
            "pod": {"name": "summarizer-5d4f", "uid": str(uuid.uuid4())},
            "serviceaccount": {"name": "summarizer", "uid": str(uuid.uuid4())},
            "warnafter": epoch(system_clock()) + 3607,
        }
        claims = {
            "aud": [audience],
            "iss": "https://kubernetes.default.svc.cluster.local",
            "jti": str(uuid.uuid4()),
            "kubernetes.io": bound | changed.pop("bound", {}),
            "sub": "system:serviceaccount:agents:summarizer",
        }
        return make(key, {}, claims, 3607, changed, headers)

    def github(*, key=GITHUB, headers=None, **changed):
        """What `ACTIONS_ID_TOKEN_REQUEST_URL` answers with the broker as its audience."""
        claims = {
            "jti": str(uuid.uuid4()),
            "sub": "repo:octo-org/octo-repo:environment:prod",
            "environment": "prod",
            "ref": "refs/heads/main",
            "sha": "d" * 40,
            "repository": "octo-org/octo-repo",
            "repository_owner": "octo-org",
            "actor_id": "12",
            "repository_visibility": "private",
            "repository_id": "74",
            "repository_owner_id": "65",
            "run_id": "30433642",
            "run_number": "10",
            "run_attempt": "2",
            "runner_environment": "github-hosted",
            "actor": "octocat",
            "workflow": "example-workflow",
            "head_ref": "",
            "base_ref": "",
            "event_name": "workflow_dispatch",
            "enterprise": "octo-enterprise",
            "ref_type": "branch",
            "ref_protected": "true",
            "check_run_id": "1",
            "job_workflow_ref": "octo-org/auto/.github/workflows/oidc.yml@refs/heads/main",
            "job_workflow_sha": "e" * 40,
            "iss": "https://token.actions.githubusercontent.com",
        }
        return make(key, {"typ": "JWT", "x5t": "fnJ8gO9MJ9BVzHqcSR9xxsa9vJM"}, claims, 300, changed, headers)

    def gitlab(*, key=GITLAB, headers=None, **changed):
        """What `id_tokens:` of a job gives."""
        claims = {
            "namespace_id": "72",
            "namespace_path": "my-group",
            "project_id": "22",
            "project_path": "my-group/my-project",
            "user_id": "1",
            "user_login": "sample-user",
            "user_access_level": "developer",
            "user_identities": [],
            "pipeline_id": "574",
            "pipeline_source": "push",
            "job_id": "302",
            "ref": "main",
            "ref_type": "branch",
            "ref_path": "refs/heads/main",
            "ref_protected": "true",
            "groups_direct": ["my-group"],
            "environment": "production",
            "environment_protected": "true",
            "runner_id": 1,
            "runner_environment": "self-hosted",
            "sha": "f" * 40,
            "project_visibility": "private",
            "ci_config_ref_uri": "gitlab.example/my-group/my-project//.gitlab-ci.yml@refs/heads/main",
            "ci_config_sha": "f" * 40,
            "jti": str(uuid.uuid4()),
            "iss": provider,
            "sub": "project_path:my-group/my-project:ref_type:branch:ref:main",
        }
        return make(key, {"typ": "JWT"}, claims, 3600, changed, headers)

    def svid(*, key=SPIRE, headers=None, **changed):
        """A JWT-SVID, as SPIRE makes it: an audience list, no iss unless configured."""
        claims = {"aud": [audience], "sub": "spiffe://prod.example/ns/agents/sa/summarizer", "nbf": None}
        return make(key, {"typ": "JWT"}, claims, 300, changed, headers)

    return {"kubernetes": kubernetes, "github": github, "gitlab": gitlab, "spiffe": svid}
