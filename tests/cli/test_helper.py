"""Credential helpers, each called by the program it is for."""

import base64
import json
import os
import ssl
import subprocess
import sys
import threading
from datetime import timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

import botocore.session
import jwt
import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from broker.cli import main
from broker.domain.clock import from_epoch, rfc3339, system_clock
from broker.sdk import Client
from tests.cli.conftest import CLEAN, CRM, READ, command
from tests.sdk.conftest import FakeTime, Scripted

PROGRAMS = Path(sys.executable).parent


@pytest.fixture
def env(live_broker, task):
    return {
        **CLEAN,
        "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
        "BROKER_URL": live_broker.url,
        "BROKER_TOKEN": live_broker.token("summarizer"),
        "BROKER_TASK": task,
    }


@pytest.fixture
def serving():
    """Serve by a handler, on loopback."""
    servers = []

    def serve(handler, tls=None):
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return f"http{'' if tls is None else 's'}://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def is_live(live_broker):
    """What a server of the resource asks: does this token open something now?"""
    with Client(live_broker.url, token=live_broker.token("crm-api")) as verifier:
        yield lambda token: verifier.introspect(token).active


# --- Git -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def git_server(tmp_path, serving, is_live):
    """A real repository behind a server that wants a live token as password; and what it was shown."""
    work, bare = tmp_path / "work", tmp_path / "served" / "leads.git"
    as_nobody = {"GIT_CONFIG_GLOBAL": "/dev/null", "PATH": os.environ["PATH"]}
    who = ("-c", "user.name=n", "-c", "user.email=n@example.org")
    for words in (
        ("init", "--quiet", work),
        (*who, "-C", work, "commit", "--quiet", "--allow-empty", "-m", "the leads of May"),
        ("clone", "--quiet", "--bare", work, bare),
        ("-C", bare, "update-server-info"),
    ):
        subprocess.run(["git", *map(str, words)], check=True, env=as_nobody)
    shown = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            given = base64.b64decode(self.headers.get("Authorization", "").removeprefix("Basic ")).decode()
            if given:
                shown.append(given)
            user, _, password = given.partition(":")
            if user == "x-access-token" and is_live(password):
                return super().do_GET()
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="leads"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None

        def log_message(self, *_):
            pass

    return serving(partial(Handler, directory=str(bare.parent))), shown


def git(env, tmp_path, *words, host):
    asks = " ".join(("!broker", "helper", "git", "--host", host, *READ))
    told = ("-c", "credential.helper=", "-c", f"credential.helper={asks}")
    quiet = {**env, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_TERMINAL_PROMPT": "0"}
    return subprocess.run(
        ["git", *told, *map(str, words)], env=quiet, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )


def test_git_clones_with_a_token_it_was_given(env, git_server, tmp_path):
    url, shown = git_server
    cloned = git(env, tmp_path, "clone", f"{url}/leads.git", "here", host=url)
    assert cloned.returncode == 0, cloned.stderr
    said = subprocess.run(["git", "-C", tmp_path / "here", "log", "--format=%s"], capture_output=True, text=True)
    assert said.stdout == "the leads of May\n"
    [token] = {given.partition(":")[2] for given in shown}
    assert token not in cloned.stderr + (tmp_path / "here" / ".git" / "config").read_text()


def test_git_gets_nothing_for_another_host(env, git_server, tmp_path, run, task):
    url, shown = git_server
    refused = git(env, tmp_path, "clone", f"{url}/leads.git", "here", host="https://git.example")
    assert refused.returncode != 0 and shown == []
    listed = json.loads(run("grant", "list", "--task", task, "--json", by="summarizer").stdout)
    assert listed["items"] == []


def test_git_is_told_why_not_and_asks_nobody(env, git_server, tmp_path, run, task):
    url, _ = git_server
    run("task", "complete", task)
    refused = git(env, tmp_path, "clone", f"{url}/leads.git", "here", host=url)
    assert refused.returncode != 0
    assert "error:" in refused.stderr and "told us to quit" in refused.stderr


def ask_git(env, operation, text, host="https://git.example", **more):
    arguments = ("helper", "git", "--host", host, *READ, operation)
    return CliRunner().invoke(main, arguments, input=text, env=env, **more)


def test_the_answer_to_git_says_until_when(env):
    answer = ask_git(env, "get", "protocol=https\nhost=GIT.example\npath=a.git\nwwwauth[]=Basic\n\n")
    said = dict(line.split("=", 1) for line in answer.stdout.splitlines())
    claims = jwt.decode(said["password"], options={"verify_signature": False, "verify_aud": False})
    assert said == {
        "username": "x-access-token",
        "password": said["password"],
        "password_expiry_utc": str(claims["exp"]),
    }


@pytest.mark.parametrize(
    ("operation", "question"),
    [
        ("get", "protocol=http\nhost=git.example\n\n"),
        ("get", "protocol=https\nhost=git.example:444\n\n"),
        ("get", "protocol=https\nhost=git.example.evil.test\n\n"),
        ("get", "protocol=https\nhost=evil.test\n\nhost=git.example\n"),
        ("get", "protocol=https\nhost=git.example\nusername=somebody\n\n"),
        ("get", ""),
        ("store", "protocol=https\nhost=git.example\nusername=x\npassword=y\n\n"),
        ("erase", "protocol=https\nhost=git.example\n\n"),
    ],
)
def test_whatever_else_git_asks_is_answered_with_nothing(env, operation, question, run, task):
    answer = ask_git(env, operation, question)
    assert (answer.exit_code, answer.output) == (0, "")
    assert json.loads(run("grant", "list", "--task", task, "--json", by="summarizer").stdout)["items"] == []


@pytest.mark.parametrize(
    "host", ["http://git.example", "git.example", "https://u@git.example", "https://git.example/a", "ftp://a", "::"]
)
def test_a_host_to_which_a_password_must_not_go_is_wrong_usage(env, host):
    answer = ask_git(env, "get", "protocol=https\nhost=git.example\n\n", host=host)
    assert answer.exit_code == 2 and "sent nowhere in the clear" in answer.stderr


# --- Kubernetes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A file with a certificate for loopback, which is its own authority, and its key. No kubectl shows a token
    where anybody could read it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "cluster")]), system_clock()
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "cluster.pem"
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file.write_bytes(made.public_bytes(Encoding.PEM) + pem)
    return file


def kubeconfig(path, server, authority, *, version="client.authentication.k8s.io/v1"):
    asks = {
        "apiVersion": version,
        "command": "broker",
        "args": ["helper", "kubernetes", *READ],
        "interactiveMode": "Never",
    }
    path.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": {"server": server, "certificate-authority": str(authority)}}],
                "users": [{"name": "agent", "user": {"exec": asks}}],
                "contexts": [{"name": "x", "context": {"cluster": "c", "user": "agent"}}],
                "current-context": "x",
            }
        )
    )


@pytest.mark.parametrize("version", ["client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1"])
def test_kubectl_presents_the_token_that_its_plugin_gave(env, serving, is_live, certificate, tmp_path, version):
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)

    class Cluster(BaseHTTPRequestHandler):
        def do_GET(self):
            live = is_live(self.headers.get("Authorization", "").removeprefix("Bearer "))
            body = json.dumps({"answer": "pods"} if live else {"kind": "Status", "status": "Failure"}).encode()
            self.send_response(200 if live else 401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    kubeconfig(tmp_path / "config", serving(Cluster, tls), certificate, version=version)
    asked = subprocess.run(
        [PROGRAMS / "kubectl", "--kubeconfig", tmp_path / "config", "get", "--raw", "/api/v1/pods"],
        env={**env, "HOME": str(tmp_path)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout) == {"answer": "pods"}


def test_the_plugins_answer_is_in_the_version_that_was_asked_for_and_says_until_when(env):
    answer = json.loads(command("helper", "kubernetes", *READ, env=env).stdout)
    assert (answer["apiVersion"], answer["kind"]) == ("client.authentication.k8s.io/v1", "ExecCredential")
    token = answer["status"]["token"]
    claims = jwt.decode(token, options={"verify_signature": False}, audience=CRM)
    assert answer["status"]["expirationTimestamp"] == rfc3339(from_epoch(claims["exp"]))


@pytest.mark.parametrize("info", ["{", "[]", '{"apiVersion": "client.authentication.k8s.io/v2"}', "{}"])
def test_a_version_that_nobody_knows_is_not_answered(env, info):
    refused = command("helper", "kubernetes", *READ, env={**env, "KUBERNETES_EXEC_INFO": info}, ends=1)
    assert "KUBERNETES_EXEC_INFO" in refused.stderr and refused.stdout == ""


# --- AWS -------------------------------------------------------------------------------------------------------------


class Now(FakeTime):
    def __init__(self):
        super().__init__(at=system_clock())


@pytest.fixture
def scripted():
    """A broker that hands out what an AWS engine makes, which no engine here can."""
    server = Scripted(Now())
    yield server
    server.close()


def sts(number, at, **members):
    data = {"access_key": f"AKIA{number}", "secret_key": "s", "security_token": f"session-{number}"} | members
    expires = rfc3339(from_epoch(int(at.timestamp()) + 3600))
    grant = {
        "id": f"grt_{number}",
        "task_id": "task_1",
        "agent": "summarizer",
        "resource": "urn:aws:reports",
        "scopes": ["read"],
        "state": "active",
        "live": True,
        "expires_at": expires,
    }
    return {"grant": grant, "credential": {"type": "generic", "data": data, "expires_at": expires}}


ASKS_AWS = ("helper", "aws", "--resource", "urn:aws:reports", "--scope", "read", "--ttl", "1h")


def test_an_aws_sdk_gets_its_credentials_and_knows_until_when(env, scripted, tmp_path, monkeypatch):
    scripted.answers((201, sts(1, scripted.time.at)))
    (tmp_path / "config").write_text(f"[profile reports]\ncredential_process = {' '.join(('broker', *ASKS_AWS))}\n")
    for name, value in {**env, "BROKER_URL": scripted.url, "AWS_CONFIG_FILE": str(tmp_path / "config")}.items():
        monkeypatch.setenv(name, value)
    found = botocore.session.Session(profile="reports").get_credentials()
    frozen = found.get_frozen_credentials()
    assert (frozen.access_key, frozen.secret_key, frozen.token) == ("AKIA1", "s", "session-1")
    assert found.method == "custom-process"
    assert not found.refresh_needed(900)  # it would ask again 15 minutes before the end
    assert found.refresh_needed(3700)
    assert scripted.seen[0].json()["ttl_s"] == 3600


def test_either_name_of_the_session_token_is_known(env, scripted):
    answer = sts(1, scripted.time.at, session_token="newer")
    scripted.answers((201, answer))
    told = json.loads(command(*ASKS_AWS, env={**env, "BROKER_URL": scripted.url}).stdout)
    assert told == {
        "Version": 1,
        "AccessKeyId": "AKIA1",
        "SecretAccessKey": "s",
        "SessionToken": "newer",
        "Expiration": answer["credential"]["expires_at"],
    }


def test_what_is_no_aws_credential_is_none(env, scripted):
    refused = command("helper", "aws", *READ, env=env, ends=1)
    assert "has no member 'access_key'; it has: token" in refused.stderr
    assert refused.stdout == ""
    scripted.answers((201, sts(1, scripted.time.at, access_key="AKIA\nx")))
    refused = command(*ASKS_AWS, env={**env, "BROKER_URL": scripted.url}, ends=1)
    assert "cannot carry" in refused.stderr and refused.stdout == ""
