"""Receivers of security events, and transmitters of them: real HTTP on loopback, real signatures."""

from __future__ import annotations

import itertools
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_network
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from broker.config.settings import SsfSettings
from broker.domain.catalogue import TrustedIssuer
from broker.domain.clock import epoch
from broker.domain.shared_signals import Delivery, StreamBounds, Transmitter, Wish
from broker.providers.dev_issuer import DevIssuer
from broker.wiring import build
from tests.house import House, TestClock, catalogue_for, settings_for
from tests.workloads import issuer_key, write_key_set

PUSH, POLL = "urn:ietf:rfc:8935", "urn:ietf:rfc:8936"
CAEP = "https://schemas.openid.net/secevent/caep/event-type"
RISC = "https://schemas.openid.net/secevent/risc/event-type"
SSF = "https://schemas.openid.net/secevent/ssf/event-type"
IDP = "https://idp.example/tenant"
LOOPBACK = (ip_network("127.0.0.0/8"),)


_KEYS: list[rsa.RSAPrivateKey] = []
_TURN = itertools.count()


@pytest.fixture(autouse=True)
def quick_keys(monkeypatch):
    """RSA keys out of a few that were made once: finding primes is most of what these tests would take."""

    def next_key(**_):
        while len(_KEYS) < 8:
            _KEYS.append(rsa.generate_private_key(public_exponent=65537, key_size=2048))
        return _KEYS[next(_TURN) % len(_KEYS)]

    monkeypatch.setattr("broker.providers.jwt.generate_rsa_key", next_key)


def ssf_house(store_url, directory, *, clock=None, inside=LOOPBACK, transmitters=(), catalogue=None, **bounds):
    """A whole broker that may push to this machine, and believes these transmitters."""
    clock = clock or TestClock()
    issuer = DevIssuer.create_or_load(directory)
    settings = replace(
        settings_for(store_url, directory, catalogue or catalogue_for(issuer)),
        ssf=SsfSettings(bounds=StreamBounds(**bounds), push_networks=inside),
        transmitters=tuple(transmitters),
    )
    broker = build(settings, clock=clock)
    broker.apply(by="tests")
    return House(broker=broker, clock=clock, issuer=issuer)


class Receiver:
    """Takes what is pushed. `answers` are given one by one, the last one for ever; while not `released` it hangs."""

    def __init__(self, *answers, port=0):
        self.answers = list(answers) or [202]
        self.received = []
        self.arrived = threading.Semaphore(0)
        self.released = threading.Event()
        self.released.set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.received.append((self.path, dict(self.headers), body.decode()))
                receiver.arrived.release()
                receiver.released.wait(30)
                answer = receiver.answers.pop(0) if len(receiver.answers) > 1 else receiver.answers[0]
                status, said, headers = answer if isinstance(answer, tuple) else (answer, b"", {})
                self.send_response(status)
                for name, value in {"Content-Length": str(len(said)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(said)

            do_GET = do_POST

            def log_message(self, *args):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/events"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def tokens(self):
        return [token for _, _, token in self.received]

    @property
    def claims(self):
        return [unverified(token) for token in self.tokens]

    def close(self):
        self.released.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(10)


def refusing(code, description="no"):
    """An answer as RFC 8935 section 2.3 has it."""
    said = json.dumps({"err": code, "description": description}).encode()
    return 400, said, {"Content-Type": "application/json"}


def unverified(token):
    return jwt.decode(token, options={"verify_signature": False})


def verified(token, jwks, *, issuer, audience):
    """The claims of a SET, as a receiver that follows the standards reads it."""
    header = jwt.get_unverified_header(token)
    assert header["typ"] == "secevent+jwt"
    assert header["alg"] == "RS256"
    keys = {key["kid"]: key for key in jwks["keys"]}
    key = jwt.PyJWK(keys[header["kid"]])
    claims = jwt.decode(
        token, key, algorithms=["RS256"], audience=audience, issuer=issuer, options={"verify_iat": False}
    )
    assert not {"sub", "exp"} & claims.keys()
    assert len(claims["events"]) == 1
    return claims


def event_of(claims):
    [(type_, event)] = claims["events"].items()
    return type_.rpartition("/")[2], event


def pushed_to(url, *, authorization=None, **more):
    return Wish(method=Delivery.PUSH, endpoint_url=url, authorization=authorization, **more)


def polled(**more):
    return Wish(method=Delivery.POLL, endpoint_url=None, **more)


class Other:
    """A transmitter that is believed, and what it signs."""

    def __init__(self, directory: Path, *, name="corp-idp", issuer=IDP, speaks_of=("people",), **settings):
        self.key = issuer_key("idp-1", "RS256")
        self.issuer = issuer
        self.file = write_key_set(directory / f"{name}.jwks", self.key)
        self.settings = Transmitter(
            **{
                "name": name,
                "keys": TrustedIssuer(
                    name=name,
                    issuer=issuer,
                    key_source="jwks_file",
                    location=str(self.file),
                    algorithms=("RS256",),
                ),
                "audience": "http://127.0.0.1:8080",
                "events": frozenset(
                    {"session-revoked", "account-disabled", "credential-compromise", "risk-level-change"}
                ),
                "speaks_of": speaks_of,
                **settings,
            }
        )

    def claims(self, now, type_, event=None, *, sub_id=None, jti="jti-1", **changed):
        made = {
            "iss": self.issuer,
            "aud": self.settings.audience,
            "iat": epoch(now),
            "jti": jti,
            "sub_id": sub_id,
            "events": {type_: event or {}},
        }
        return {name: value for name, value in (made | changed).items() if value is not None}

    def signed(self, claims, *, key=None, **header):
        key = key or self.key
        made = {"alg": key.algorithm, "typ": "secevent+jwt", "kid": key.kid} | header
        return key.sign({name: value for name, value in made.items() if value is not None}, claims)
