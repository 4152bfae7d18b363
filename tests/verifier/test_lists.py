"""Status lists that are good, and those that are not, where they are all there is."""

import tracemalloc
import zlib

import pytest

from broker.conformance.fake_broker import SigningKey, base64url
from broker.sdk.verifier.jose import NotReadable
from broker.sdk.verifier.lists import MAX_UNPACKED_BYTES, unpacked
from tests.processes import until
from tests.verifier.conftest import why


@pytest.fixture
def verifier(broker, verifier_of):
    return verifier_of(token_source=None)


def lst(raw, **entry):
    return {"status_list": {"bits": 2, "lst": base64url(raw)} | entry}


BOMB = zlib.compress(bytes(64 << 20), 9)
BAD = {
    "foreign key": lambda broker, claims: SigningKey().sign(claims, typ="statuslist+jwt"),
    "other type": lambda broker, claims: broker.keys[0].sign(claims, typ="JWT"),
    "other issuer": lambda broker, claims: broker.signed_list(claims | {"iss": "https://broker.example"}),
    "other list": lambda broker, claims: broker.signed_list(claims | {"sub": claims["sub"] + "0"}),
    "no sub": lambda broker, claims: broker.signed_list({n: v for n, v in claims.items() if n != "sub"}),
    "stale": lambda broker, claims: broker.signed_list(claims | {"iat": claims["iat"] - 60, "exp": claims["exp"] - 60}),
    "old and long": lambda broker, claims: broker.signed_list(
        claims | {"iat": claims["iat"] - 60, "exp": claims["exp"] + 9999, "ttl": 9999}
    ),
    "no ttl": lambda broker, claims: broker.signed_list(claims | {"ttl": None}),
    "ttl of nothing": lambda broker, claims: broker.signed_list(claims | {"ttl": 0}),
    "other width": lambda broker, claims: broker.signed_list(claims | lst(zlib.compress(bytes(99)), bits=3)),
    "width true": lambda broker, claims: broker.signed_list(claims | lst(zlib.compress(bytes(99)), bits=True)),
    "bomb": lambda broker, claims: broker.signed_list(claims | lst(BOMB)),
    "cut": lambda broker, claims: broker.signed_list(claims | lst(zlib.compress(bytes(9999))[:-4])),
    "more behind": lambda broker, claims: broker.signed_list(claims | lst(zlib.compress(bytes(9999)) + b"x")),
    "not zlib": lambda broker, claims: broker.signed_list(claims | lst(b"not zlib at all")),
    "not a string": lambda broker, claims: broker.signed_list(claims | {"status_list": {"bits": 2, "lst": 5}}),
    "nothing in it": lambda broker, claims: broker.signed_list(claims | {"status_list": None}),
    "huge": lambda broker, claims: "x" * (1 << 19),
    "empty": lambda broker, claims: "",
    "not ascii": lambda broker, claims: "é.é.é",
}


@pytest.mark.parametrize("bad", BAD)
def test_a_list_that_proves_nothing_says_yes_to_nobody(broker, verifier, bad):
    broker.tamper_list = lambda claims: BAD[bad](broker, claims)
    issued = broker.issue()
    assert why(verifier, issued) == "not_fresh"
    assert "status list" in verifier.state().problem
    broker.heal()
    until(lambda: why(verifier, issued) is None, what="a yes")


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_statuses_of_every_width_are_read(broker, verifier, width):
    broker.tamper_list = lambda claims: broker.signed_list(claims | lst(zlib.compress(b"\x01\0"), bits=width))
    first, second = broker.issue(), broker.issue()
    assert why(verifier, second) is None
    assert why(verifier, first) == "revoked"


def test_what_is_suspended_is_refused_and_may_come_back(broker, verifier):
    status = [b"\x02"]
    broker.tamper_list = lambda claims: broker.signed_list(claims | {"ttl": 2} | lst(zlib.compress(status[0])))
    issued = broker.issue()
    assert why(verifier, issued) == "suspended"
    status[0] = b"\x00"
    until(lambda: why(verifier, issued) is None, what="a yes")


def test_a_place_beyond_the_list_is_refused(broker, verifier):
    broker.tamper_list = lambda claims: broker.signed_list(claims | lst(zlib.compress(b"\0")))
    issued = [broker.issue() for _ in range(5)]
    assert why(verifier, issued[3]) is None
    assert why(verifier, issued[4]) == "no_such_place"


def test_an_older_list_is_refused_and_a_revoked_token_stays_so(broker, verifier):
    older = []

    def with_ttl(claims):
        token = broker.signed_list(claims | {"ttl": 1})
        older.append(token)
        return token

    broker.tamper_list = with_ttl
    issued, other = broker.issue(), broker.issue()
    until(lambda: why(verifier, issued) is None, what="a yes")
    broker.revoke_quietly(issued)
    until(lambda: why(verifier, issued) == "revoked", what="the refusal")
    broker.tamper_list = lambda claims: older[0]
    until(
        lambda: why(verifier, other) == "not_fresh" and "older" in (verifier.state().problem or ""), what="its refusal"
    )
    assert why(verifier, issued) == "revoked"


def test_a_crowd_costs_one_fetch_and_a_list_that_cannot_be_had_one_a_second(broker, verifier):
    from concurrent.futures import ThreadPoolExecutor

    issued = [broker.issue() for _ in range(64)]
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda each: why(verifier, each), issued)) == {None}
    assert broker.asked.count("/status-lists/1") == 1
    broker.serves -= {"lists"}
    elsewhere = [broker.issue(status_list="2") for _ in range(64)]
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda each: why(verifier, each), elsewhere)) == {"not_fresh"}
    assert broker.asked.count("/status-lists/2") <= 3


def test_a_bomb_is_not_unpacked():
    tracemalloc.start()
    with pytest.raises(NotReadable):
        unpacked(base64url(BOMB))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 8 * MAX_UNPACKED_BYTES


def test_redirects_and_compressed_answers_are_not_followed(broker, verifier, monkeypatch):
    from http.server import BaseHTTPRequestHandler

    handler = broker._server.RequestHandlerClass
    genuine = handler._answer
    issued = broker.issue()
    moved = []

    def redirect(self, status, body):
        if "status-lists" not in self.path:
            return genuine(self, status, body)
        moved.append(self.path)
        BaseHTTPRequestHandler.send_response(self, 302)
        self.send_header("Location", "/oauth2/jwks")
        self.send_header("Content-Length", "0")
        return self.end_headers()

    def packed(self, status, body):
        if "status-lists" not in self.path:
            return genuine(self, status, body)
        raw = zlib.compress(body)
        BaseHTTPRequestHandler.send_response(self, 200)
        self.send_header("Content-Encoding", "deflate")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        return self.wfile.write(raw)

    monkeypatch.setattr(handler, "_answer", redirect)
    assert why(verifier, issued) == "not_fresh"
    assert moved == ["/status-lists/1"]
    assert "302" in verifier.state().problem
    monkeypatch.setattr(handler, "_answer", packed)
    until(lambda: why(verifier, issued) == "not_fresh" and "compressed" in verifier.state().problem, what="compressed")
