"""The sample API is what a verifier has to be: whatever is not proven, it refuses."""

import base64
import json
import threading
import time
import tracemalloc
import zlib

import jwt
import pytest
from flask import Flask, Response, request
from werkzeug.serving import make_server

from broker.sdk import Client
from demo.sample_api import RESOURCE, Refused, Verifier, create_app, unpacked
from tests.workloads import issuer_key, key_set

KEY = issuer_key()
LIST_BYTES = 64


def lst(packed):
    return base64.urlsafe_b64encode(zlib.compress(packed)).rstrip(b"=").decode()


class FakeBroker:
    """Signs with a key of its own, and says of tokens what a test wants it to say."""

    def __init__(self):
        self.statuses = bytearray(LIST_BYTES)
        self.list_header, self.list_claims, self.list_signer = {}, {}, KEY
        self.list_body, self.list_status = None, 200
        self.introspection = {}
        self.introspection_status = 200
        self.keys = key_set(KEY)
        self.asked = []
        app = Flask("fake broker")
        app.before_request(lambda: self.asked.append(request.path))
        app.add_url_rule("/oauth2/jwks", "jwks", lambda: Response(self.keys))
        app.add_url_rule("/status-lists/1", "list", lambda: Response(self.list_body or self.list(), self.list_status))
        app.add_url_rule("/oauth2/introspect", "introspect", self.introspect, methods=["POST"])
        self.server = make_server("127.0.0.1", 0, app, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def token(self, *, signer=KEY, header=(), without=(), **changed):
        now = int(time.time())
        claims = {
            "iss": self.url,
            "aud": RESOURCE,
            "sub": "summarizer",
            "client_id": "summarizer",
            "iat": now,
            "nbf": now,
            "exp": now + 300,
            "jti": "jti-1",
            "scope": "contacts:read",
            "task_id": "task_1",
            "grant_id": "grt_1",
            "status": {"status_list": {"idx": 5, "uri": f"{self.url}/status-lists/1"}},
        } | changed
        head = {"alg": "ES256", "kid": "key-1", "typ": "at+jwt"} | dict(header)
        return signer.sign(head, {name: value for name, value in claims.items() if name not in without})

    def list(self):
        now = int(time.time())
        claims = {
            "iss": self.url,
            "sub": f"{self.url}/status-lists/1",
            "iat": now,
            "exp": now + 15,
            "ttl": 10,
            "status_list": {"bits": 2, "lst": lst(self.statuses)},
        } | self.list_claims
        head = {"alg": "ES256", "kid": "key-1", "typ": "statuslist+jwt"} | self.list_header
        return self.list_signer.sign(head, {name: value for name, value in claims.items() if value is not None})

    def introspect(self):
        claims = jwt.decode(request.form["token"], options={"verify_signature": False})
        return Response(
            json.dumps({"active": True, **claims} | self.introspection),
            self.introspection_status,
            mimetype="application/json",
        )


@pytest.fixture
def broker(monkeypatch):
    # PyJWT's client of keys would ask the environment for a proxy.
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    fake = FakeBroker()
    serving = threading.Thread(target=fake.server.serve_forever, kwargs={"poll_interval": 0.01})
    serving.start()
    yield fake
    fake.server.shutdown()
    serving.join()
    fake.server.server_close()


class Clock:
    def __init__(self):
        self.ahead_s = 0

    def __call__(self):
        return time.time() + self.ahead_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def api(broker, clock):
    with Client(broker.url, token="a.workload.token", timeout=2.0, retry_deadline_s=0.0) as asks:
        verifier = Verifier(issuer=broker.url, audience=RESOURCE, broker=asks, clock=clock)
        yield create_app(verifier).test_client()
        verifier.close()


@pytest.fixture
def call(api):
    """One call of the API with a token; its answer."""
    return lambda token: api.get("/contacts", headers={"Authorization": f"Bearer {token}"})


def refusal(answer):
    return answer.status_code, answer.json["error"]


INVALID = (401, "invalid_token")
UNPROVABLE = (503, "temporarily_unavailable")


def test_a_good_credential_opens_it_and_the_answer_says_what_each_witness_said(broker, call):
    answer = call(broker.token())
    assert answer.status_code == 200
    assert answer.json["contacts"]
    checked = answer.json["checked"]
    assert (checked["token"], checked["introspection"]) == ("valid", "active")
    assert checked["status_list"].startswith("valid, as of ")


@pytest.mark.parametrize(
    "changed",
    [
        {"aud": "https://mail.example/api"},
        {"aud": [RESOURCE, "https://mail.example/api"]},
        {"aud": [RESOURCE]},
        {"iss": "https://broker.example"},
        {"exp": 1},
        {"nbf": 4_000_000_000},
        {"header": {"typ": "JWT"}},
        {"header": {"typ": "statuslist+jwt"}},
        {"header": {"alg": "ES384"}},
        {"header": {"kid": "key-2"}},
        {"signer": issuer_key()},
        {"cnf": {"jkt": "a-key"}},
        {"status": None},
        *(
            {"without": (name,)}
            for name in ("iss", "aud", "exp", "iat", "jti", "scope", "status", "task_id", "grant_id")
        ),
    ],
    ids=str,
)
def test_a_token_that_is_not_for_it_now_is_refused_before_anybody_else_is_asked(broker, call, changed):
    answer = call(broker.token(**changed))
    assert refusal(answer) == INVALID
    assert answer.json["checked"].keys() <= {"token"}
    assert set(broker.asked) <= {"/oauth2/jwks"}
    assert answer.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'


def test_exp_is_exclusive(broker, call):
    assert refusal(call(broker.token(exp=int(time.time())))) == INVALID


def test_a_token_of_unusual_length_is_not_even_read(broker, call):
    assert refusal(call(broker.token(jti="x" * 8192))) == INVALID
    assert broker.asked == []


def test_alg_none_is_refused(broker, call):
    unsigned = jwt.encode(jwt.decode(broker.token(), options={"verify_signature": False}), None, algorithm="none")
    head = base64.urlsafe_b64encode(json.dumps({"alg": "none", "typ": "at+jwt", "kid": "key-1"}).encode()).rstrip(b"=")
    payload = unsigned.split(".")[1]
    answer = call(f"{head.decode()}.{payload}.")
    assert refusal(answer) == INVALID
    assert "ES256" in answer.json["error_description"]
    assert broker.asked == []


def test_an_hmac_over_the_public_key_is_refused(broker, call):
    claims = jwt.decode(broker.token(), options={"verify_signature": False})
    secret = KEY.jwk["x"] + KEY.jwk["y"]
    answer = call(jwt.encode(claims, secret, algorithm="HS256", headers={"typ": "at+jwt", "kid": "key-1"}))
    assert refusal(answer) == INVALID
    assert "ES256" in answer.json["error_description"]


@pytest.mark.parametrize(
    "token",
    ["x", "a.b.c", "..", "e30.e30.", "ey" * 5000, base64.urlsafe_b64encode(b"[" * 5000).decode() + ".e30.AA"],
    ids=["a letter", "three letters", "dots", "empty objects", "too long", "deep"],
)
def test_what_is_no_token_is_refused(call, token):
    assert refusal(call(token)) == INVALID


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer "}, {"Authorization": "Basic YTpi"}], ids=str)
def test_no_token_is_refused(api, headers):
    assert refusal(api.get("/contacts", headers=headers)) == INVALID


@pytest.mark.parametrize("scope", ["contacts:write", "contacts:read2 xcontacts:read", "", 7, ["contacts:read"]])
def test_a_token_without_the_scope_is_refused(broker, call, scope):
    assert refusal(call(broker.token(scope=scope))) == (403, "insufficient_scope")


@pytest.mark.parametrize("status", [1, 2, 3])
def test_any_status_but_valid_is_refused(broker, call, status):
    broker.statuses[1] = status << 2  # the place of index 5
    answer = call(broker.token())
    assert refusal(answer) == INVALID
    assert not answer.json["checked"]["status_list"].startswith("valid")
    assert "/oauth2/introspect" not in broker.asked


@pytest.mark.parametrize("index", [-1, LIST_BYTES * 4, 2**70, True, 5.0, "5", None])
def test_an_index_that_is_no_place_in_the_list_is_refused(broker, call, index):
    entry = {"idx": index, "uri": f"{broker.url}/status-lists/1"}
    assert refusal(call(broker.token(status={"status_list": entry}))) == INVALID


@pytest.mark.parametrize(
    "place",
    ["https://evil.example/status-lists/1", "{}/status-lists/1/../../oauth2/jwks", "{}.evil.example/1", 7, None],
)
def test_a_list_that_is_not_the_brokers_is_never_fetched(broker, call, place):
    uri = place.format(broker.url) if isinstance(place, str) else place
    assert refusal(call(broker.token(status={"status_list": {"idx": 5, "uri": uri}}))) == INVALID
    assert broker.asked == ["/oauth2/jwks"]


def ago(seconds):
    return int(time.time()) - seconds


@pytest.mark.parametrize(
    "claims",
    [
        lambda: {"iat": ago(60), "exp": ago(45)},
        # One that was kept back, with an expiry that is too generous.
        lambda: {"iat": ago(60), "exp": ago(-3600)},
        lambda: {"iat": ago(-60), "exp": ago(-75)},
        lambda: {"ttl": 0},
        lambda: {"ttl": -5},
        lambda: {"ttl": 3600},
        lambda: {"ttl": True},
        lambda: {"ttl": "10"},
        lambda: {"ttl": None},
        lambda: {"exp": None},
        lambda: {"sub": "https://broker.example/status-lists/1"},
        lambda: {"iss": "https://broker.example"},
        lambda: {"status_list": {"bits": 3, "lst": lst(bytes(LIST_BYTES))}},
        lambda: {"status_list": {"bits": True, "lst": lst(bytes(LIST_BYTES))}},
        lambda: {"status_list": {"bits": 2, "lst": "not base64!"}},
        lambda: {"status_list": {"bits": 2, "lst": lst(bytes(LIST_BYTES))[:-8]}},
        lambda: {"status_list": {"bits": 2}},
        lambda: {"status_list": "none"},
    ],
)
def test_a_status_list_that_does_not_prove_to_be_fresh_and_whole_is_never_valid(broker, call, claims):
    broker.list_claims = claims()
    assert refusal(call(broker.token())) == UNPROVABLE
    assert "/oauth2/introspect" not in broker.asked


def test_a_status_list_of_another_signer_or_type_is_never_valid(broker, call):
    broker.list_signer = issuer_key()
    assert refusal(call(broker.token())) == UNPROVABLE
    broker.list_signer, broker.list_header = KEY, {"typ": "at+jwt"}
    assert refusal(call(broker.token())) == UNPROVABLE
    broker.list_header = {}
    assert call(broker.token()).status_code == 200


@pytest.mark.parametrize("status", [302, 404, 500])
def test_a_status_list_that_cannot_be_had_is_never_valid(broker, call, status):
    broker.list_status = status
    assert refusal(call(broker.token())) == UNPROVABLE


def test_a_status_list_without_end_is_not_read_to_its_end(broker, call):
    broker.list_body = "x" * (1 << 21)
    answer = call(broker.token())
    assert refusal(answer) == UNPROVABLE
    assert "too long" in answer.json["error_description"]


def test_a_decompression_bomb_is_refused_within_bounds(broker, call):
    bomb = lst(bytes(1 << 26))
    broker.list_claims = {"status_list": {"bits": 2, "lst": bomb}}
    assert refusal(call(broker.token())) == UNPROVABLE
    tracemalloc.start()
    with pytest.raises(Refused):
        unpacked(bomb, max_bytes=1 << 16)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert len(unpacked(bomb, max_bytes=1 << 26)) == 1 << 26


def test_a_list_is_kept_for_its_ttl_and_no_longer(broker, call, clock):
    def fetched():
        return broker.asked.count("/status-lists/1")

    assert call(broker.token()).status_code == 200
    broker.statuses[1] = 1 << 2
    clock.ahead_s = 9
    assert call(broker.token()).status_code == 200
    assert fetched() == 1
    clock.ahead_s = 10
    assert refusal(call(broker.token())) == INVALID
    assert fetched() == 2


def test_a_clock_that_was_set_back_makes_no_list_younger(broker, call, clock):
    assert call(broker.token()).status_code == 200
    clock.ahead_s = -3600
    broker.statuses[1] = 1 << 2
    assert refusal(call(broker.token())) == INVALID


def test_a_list_that_went_stale_does_not_answer_while_the_broker_has_none(broker, call, clock):
    assert call(broker.token()).status_code == 200
    broker.list_status = 503
    clock.ahead_s = 11
    assert refusal(call(broker.token())) == UNPROVABLE
    # Nor does the old one come back with the clock.
    clock.ahead_s = 0
    assert refusal(call(broker.token())) == UNPROVABLE


def test_what_introspection_does_not_call_active_is_refused(broker, call):
    for said in ({"active": False}, {"active": "true"}, {"active": None}, {"jti": "another"}, {"aud": "another"}):
        broker.introspection = said
        answer = call(broker.token())
        assert refusal(answer) == INVALID, said
        assert answer.json["checked"]["status_list"].startswith("valid")
    broker.introspection = {}
    assert call(broker.token()).status_code == 200


def test_it_refuses_while_the_broker_cannot_be_asked(broker, call):
    for status in (401, 429, 500, 503):
        broker.introspection_status = status
        answer = call(broker.token())
        assert refusal(answer) == UNPROVABLE, status
        assert answer.headers["Retry-After"] == "1"


def test_it_refuses_while_the_brokers_keys_cannot_be_had(broker, call):
    for nonsense in (b"not json", b"[]", b"{}"):
        broker.keys = nonsense
        assert call(broker.token()).status_code in (401, 503), nonsense
    broker.keys = key_set(KEY)
    assert call(broker.token()).status_code == 200


def test_it_refuses_where_there_is_no_broker(broker):
    token = broker.token()
    nobody = "http://127.0.0.1:9"
    with Client(nobody, token="a.workload.token", retry_deadline_s=0.0) as asks:
        verifier = Verifier(issuer=nobody, audience=RESOURCE, broker=asks)
        answer = create_app(verifier).test_client().get("/contacts", headers={"Authorization": f"Bearer {token}"})
        verifier.close()
    assert refusal(answer) == UNPROVABLE
