"""Key sets from files, and from a real HTTP server that behaves well, badly, or not at all."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice

import pytest
from cryptography.hazmat.primitives.asymmetric import x25519

from broker.domain.catalogue import TrustedIssuer
from broker.domain.errors import Invalid, Unauthenticated
from broker.providers import key_sets
from broker.providers.jose import base64url
from broker.providers.key_sets import KeySets, is_loopback
from tests.workloads import NOW, IssuerKey, issuer_key, key_set, rsa_key, trusted_issuer, unauthenticated, write_key_set

ONE, TWO = issuer_key("one"), issuer_key("two")
SECOND, MINUTE = timedelta(seconds=1), timedelta(minutes=1)


def wait_until(true, within=5):
    """Whether it became true in time."""
    deadline = time.monotonic() + within
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


class KeyServer:
    """`answers` maps a path to (status, headers, body); what is asked of it is in `asked`."""

    def __init__(self):
        self.answers = {}
        self.asked = []
        self.arrived = threading.Semaphore(0)
        self.open = threading.Event()  # cleared: it accepts, and answers nothing
        self.open.set()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.asked.append(self.path)
                server.arrived.release()
                server.open.wait(10)
                status, headers, body = server.answers.get(self.path, (404, {}, b""))
                with suppress(OSError):
                    self.send_response(status)
                    for name, value in ({"Content-Length": str(len(body))} | headers).items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.handle_error = lambda *_: None
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def publish(self, *keys, path="/jwks", status=200, headers=(), body=None, **members):
        body = key_set(*keys, **members) if body is None else body
        self.answers[path] = (status, dict(headers), body)

    def close(self):
        self.open.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server():
    server = KeyServer()
    server.publish(ONE)
    yield server
    server.close()


@pytest.fixture
def keys():
    return KeySets(deadline=timedelta(seconds=0.5))


def by_uri(server, path="/jwks", **changed):
    return TrustedIssuer(
        **{"name": "corp", "issuer": "https://idp.example", "key_source": "jwks_uri", "location": f"{server.url}{path}"}
        | changed
    )


def thumbprints(keys, issuer, *kids, now=NOW, algorithm="ES256"):
    return [keys.key_for(issuer, kid, algorithm, now).kid for kid in kids]


# --- reading a set ---------------------------------------------------------------------------------------------


def found_in(tmp_path, document, kid="one", algorithm="ES256", **issuer):
    path = tmp_path / "jwks.json"
    path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
    return KeySets().key_for(trusted_issuer(path, **issuer), kid, algorithm, NOW)


def test_a_key_is_found_by_its_kid(tmp_path):
    found = found_in(tmp_path, key_set(TWO, ONE))
    assert found.key.public_numbers() == ONE.public.public_numbers()


def test_keys_that_are_not_for_signatures_are_ignored(tmp_path):
    bytes_of_x25519 = base64url(x25519.X25519PrivateKey.generate().public_key().public_bytes_raw())
    others = [
        TWO.jwk | {"kid": "one", "use": "enc"},
        TWO.jwk | {"kid": "one", "alg": "ECDH-ES"},
        TWO.jwk | {"kid": "one", "alg": "ES384"},
        TWO.jwk | {"kid": "one", "alg": None},
        TWO.jwk | {"kid": "one", "key_ops": ["deriveKey"]},
        TWO.jwk | {"kid": "one", "key_ops": "verify"},
        TWO.jwk | {"kid": "one", "use": "jwt-svid"},
        TWO.jwk | {"kid": 1},
        {"kty": "OKP", "crv": "X25519", "x": bytes_of_x25519, "kid": "one"},
        {"kty": "oct", "kid": "one"},
        {"kty": "AKP", "kid": "one", "alg": "ML-DSA-44", "pub": "AA"},
        {"kid": "one"},
        "one",
        None,
    ]
    assert found_in(tmp_path, {"keys": [*others, ONE.jwk | {"use": "sig", "key_ops": ["verify"], "alg": "ES256"}]})


def test_an_hmac_key_or_a_private_key_in_a_set_is_not_used(tmp_path):
    hostile = {"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "one"}, ONE.jwk | {"d": "AA"}, TWO.jwk]}
    with unauthenticated("no key 'one'"):
        found_in(tmp_path, hostile)
    assert found_in(tmp_path, hostile, "two")


def test_a_weak_rsa_key_is_not_used(tmp_path):
    weak = IssuerKey(algorithm="RS256", kid="weak", private=rsa_key(1024))
    with unauthenticated("no key"):
        found_in(tmp_path, key_set(weak), "weak", "RS256")


def test_two_keys_of_one_name_are_both_refused(tmp_path):
    other = issuer_key("one")
    for document in (key_set(ONE, other), key_set(other, ONE, other, TWO)):
        with unauthenticated("several keys are called 'one'"):
            found_in(tmp_path, document)


def test_a_key_is_refused_for_an_algorithm_it_does_not_state(tmp_path):
    rsa = issuer_key("rsa", "RS256")
    assert found_in(tmp_path, key_set(rsa, alg="RS256"), "rsa", "RS256")
    with unauthenticated("not for PS256"):
        found_in(tmp_path, key_set(rsa, alg="RS256"), "rsa", "PS256")
    with unauthenticated("not for RS256"):
        found_in(tmp_path, key_set(ONE), "one", "RS256")


def test_a_token_without_kid_is_verified_only_by_the_only_key_of_its_algorithm(tmp_path):
    rsa = issuer_key(None, "RS256")
    assert found_in(tmp_path, key_set(ONE, rsa), None).kid == "one"
    assert found_in(tmp_path, key_set(ONE, TWO, rsa), None, "RS256").kid is None
    with unauthenticated("2 keys could"):
        found_in(tmp_path, key_set(ONE, TWO), None)


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b"\xff",
        b'{"keys":{}}',
        b'{"keys":[],"keys":[]}',
        b'{"keys":' + b"[" * 40,
        json.dumps({"keys": [ONE.jwk] * 101}).encode(),
        b'{"keys":[]}' + b" " * key_sets.MAX_BODY,
    ],
)
def test_a_document_that_is_no_key_set_gives_no_keys(tmp_path, document):
    with unauthenticated("were obtained yet"):
        found_in(tmp_path, document)


# --- SPIFFE ----------------------------------------------------------------------------------------------------


def spiffe_issuer(path, **changed):
    return TrustedIssuer(
        **{"name": "prod", "issuer": "spiffe://prod.example", "key_source": "spiffe_bundle_file", "location": str(path)}
        | changed
    )


def test_of_a_spiffe_bundle_only_the_keys_for_jwt_svids_are_used(tmp_path):
    certificate = {"x5c": ["MIIB"], "use": "x509-svid"}
    bundle = {"keys": [TWO.jwk | certificate, ONE.jwk | {"use": "jwt-svid"}], "spiffe_sequence": 3}
    (tmp_path / "bundle.json").write_text(json.dumps(bundle))
    issuer, keys = spiffe_issuer(tmp_path / "bundle.json"), KeySets()
    assert keys.key_for(issuer, "one", "ES256", NOW)
    with unauthenticated("no key 'two'"):
        keys.key_for(issuer, "two", "ES256", NOW)
    with unauthenticated("without kid"):
        keys.key_for(issuer, None, "ES256", NOW)


def test_a_spiffe_key_without_use_or_kid_is_not_used(tmp_path):
    for document in (key_set(ONE), key_set(ONE, use="sig"), key_set(issuer_key(None), use="jwt-svid")):
        (tmp_path / "bundle.json").write_bytes(document)
        with unauthenticated("no key"):
            KeySets().key_for(spiffe_issuer(tmp_path / "bundle.json"), "one", "ES256", NOW)


def test_a_spiffe_bundle_may_come_from_a_url_and_an_empty_one_revokes_all(server, keys):
    server.publish(ONE, use="jwt-svid")
    issuer = spiffe_issuer(None, key_source="spiffe_bundle_url", location=f"{server.url}/jwks")
    assert keys.key_for(issuer, "one", "ES256", NOW)
    server.publish()
    keys.refresh([issuer], NOW + MINUTE)
    with unauthenticated("no key 'one'"):
        keys.key_for(issuer, "one", "ES256", NOW + MINUTE)


# --- files -----------------------------------------------------------------------------------------------------


def test_a_key_file_is_read_again_when_it_changes(tmp_path):
    keys, path = KeySets(), write_key_set(tmp_path / "jwks.json", ONE)
    issuer = trusted_issuer(path)
    first = keys.key_for(issuer, "one", "ES256", NOW)
    assert keys.generation(issuer, NOW) == first.generation
    write_key_set(path, TWO)
    assert keys.key_for(issuer, "two", "ES256", NOW).generation > first.generation
    with unauthenticated("no key 'one'"):
        keys.key_for(issuer, "one", "ES256", NOW)


def test_a_key_file_that_is_written_anew_with_the_same_content_changes_nothing(tmp_path):
    keys, path = KeySets(), write_key_set(tmp_path / "jwks.json", ONE)
    issuer = trusted_issuer(path)
    before = keys.generation(issuer, NOW)
    write_key_set(path, ONE)
    assert keys.generation(issuer, NOW) == before > 0


def test_a_broken_or_missing_key_file_leaves_the_old_keys_for_a_day(tmp_path):
    keys, path = KeySets(), write_key_set(tmp_path / "jwks.json", ONE)
    issuer = trusted_issuer(path)
    keys.key_for(issuer, "one", "ES256", NOW)
    for breaking in (lambda: path.write_bytes(b"half a fi"), path.unlink):
        breaking()
        assert keys.key_for(issuer, "one", "ES256", NOW + timedelta(hours=23))
    with unauthenticated("too old"):
        keys.key_for(issuer, "one", "ES256", NOW + timedelta(hours=24))
    assert keys.generation(issuer, NOW + timedelta(hours=24)) == 0
    write_key_set(path, ONE)
    assert keys.key_for(issuer, "one", "ES256", NOW + timedelta(hours=25))


def test_many_who_come_first_all_find_the_keys_of_a_file(tmp_path):
    issuer = trusted_issuer(write_key_set(tmp_path / "jwks.json", *(issuer_key(str(n)) for n in range(50)), ONE))
    for _ in range(5):
        keys, barrier = KeySets(), threading.Barrier(16)

        def ask(_, keys=keys, barrier=barrier):
            barrier.wait()
            return keys.key_for(issuer, "one", "ES256", NOW).kid

        with ThreadPoolExecutor(16) as pool:
            assert set(pool.map(ask, range(16))) == {"one"}


def test_an_unchanged_key_file_never_grows_old(tmp_path):
    keys, issuer = KeySets(), trusted_issuer(write_key_set(tmp_path / "jwks.json", ONE))
    for day in range(3):
        assert keys.key_for(issuer, "one", "ES256", NOW + timedelta(days=day))


@pytest.mark.parametrize("location", ["missing.json", ".", "a\0b", "/dev/zero"])
def test_a_key_file_that_is_not_a_file_gives_no_keys(tmp_path, location):
    with unauthenticated("no keys of corp were obtained yet"):
        KeySets().key_for(trusted_issuer(tmp_path / location), "one", "ES256", NOW)


# --- fetching --------------------------------------------------------------------------------------------------


def test_keys_are_fetched_once_and_kept(server, keys):
    issuer = by_uri(server)
    for second in range(200):
        assert keys.key_for(issuer, "one", "ES256", NOW + second * SECOND)
    assert server.asked == ["/jwks"]


def test_keys_are_fetched_again_in_passing_and_a_removed_one_is_refused(server, keys):
    issuer = by_uri(server)
    first = keys.key_for(issuer, "one", "ES256", NOW)
    server.publish(TWO)
    later = NOW + key_sets.REFRESH_EVERY
    keys.generation(issuer, later)  # starts the refresh and does not wait; the next line joins it
    assert keys.key_for(issuer, "two", "ES256", later).generation != first.generation
    assert server.asked == ["/jwks", "/jwks"]
    with unauthenticated("no key 'one'"):
        keys.key_for(issuer, "one", "ES256", later)


def test_an_unknown_kid_fetches_again_but_not_twice_in_half_a_minute(server, keys):
    issuer = by_uri(server)
    keys.key_for(issuer, "one", "ES256", NOW)
    server.publish(ONE, TWO)
    with unauthenticated("no key 'two'"):
        keys.key_for(issuer, "two", "ES256", NOW + 29 * SECOND)
    assert keys.key_for(issuer, "two", "ES256", NOW + 30 * SECOND)
    assert len(server.asked) == 2


def test_a_flood_of_unknown_kids_causes_one_fetch_in_half_a_minute(server, keys):
    """INV-35."""
    issuer = by_uri(server)
    for number in range(300):
        with unauthenticated("no key"):
            keys.key_for(issuer, f"random-{number}", "ES256", NOW + number / 5 * SECOND)
    assert len(server.asked) == 2
    assert keys.key_for(issuer, "one", "ES256", NOW + MINUTE)


def test_a_clock_that_was_set_back_does_not_stop_the_refreshing(server, keys):
    issuer = by_uri(server)
    keys.key_for(issuer, "one", "ES256", NOW + timedelta(days=1))
    server.publish(TWO)
    assert keys.key_for(issuer, "two", "ES256", NOW)


def test_many_who_need_the_same_unknown_key_share_one_fetch(server, keys):
    issuer = by_uri(server)
    server.open.clear()
    with ThreadPoolExecutor(key_sets.MOST_WAITING) as pool:
        waiting = [pool.submit(keys.key_for, issuer, "one", "ES256", NOW) for _ in range(key_sets.MOST_WAITING)]
        assert server.arrived.acquire(timeout=5)
        server.open.set()
        assert {found.result().kid for found in waiting} == {"one"}
    assert server.asked == ["/jwks"]


def test_nobody_whose_key_is_known_waits_for_a_slow_issuer_and_few_others_do(server):
    keys, issuer = KeySets(), by_uri(server)
    keys.key_for(issuer, "one", "ES256", NOW)
    server.open.clear()
    later = NOW + MINUTE

    def ask(number):
        with pytest.raises(Unauthenticated) as refused:
            keys.key_for(issuer, f"random-{number}", "ES256", later)
        return refused.value.reason

    with ThreadPoolExecutor(key_sets.MOST_WAITING + 4) as pool:
        asking = [pool.submit(ask, number) for number in range(key_sets.MOST_WAITING + 4)]
        too_many = list(islice(as_completed(asking, timeout=5), 4))
        started = time.perf_counter()
        for _ in range(100):
            assert keys.key_for(issuer, "one", "ES256", later + key_sets.REFRESH_EVERY)
            assert keys.generation(issuer, later)
        assert time.perf_counter() - started < 0.2
        assert all("enough wait for keys already" in each.result() for each in too_many)
        server.open.set()
        assert sum("has no key" in each.result() for each in asking) == key_sets.MOST_WAITING
    assert len(server.asked) == 2


def test_of_all_silent_issuers_together_no_more_wait_than_of_one(server):
    keys = KeySets()
    server.open.clear()
    silent = [by_uri(server, issuer=f"https://{number}.example") for number in range(4)]

    def ask(number):
        with pytest.raises(Unauthenticated) as refused:
            keys.key_for(silent[number % 4], "nobody", "ES256", NOW)
        return refused.value.reason

    with ThreadPoolExecutor(4 * key_sets.MOST_WAITING) as pool:
        asking = [pool.submit(ask, number) for number in range(4 * key_sets.MOST_WAITING)]
        too_many = list(islice(as_completed(asking, timeout=5), 3 * key_sets.MOST_WAITING))
        server.open.set()
        assert all("enough wait for keys already" in each.result() for each in too_many)


def test_a_clock_that_was_set_back_does_not_stop_the_refreshing_of_known_keys(server, keys):
    issuer = by_uri(server)
    keys.key_for(issuer, "one", "ES256", NOW + timedelta(days=1))
    server.publish(TWO)
    assert keys.key_for(issuer, "one", "ES256", NOW)
    assert wait_until(lambda: len(server.asked) == 2)


def test_a_resolver_that_hangs_keeps_nobody_beyond_the_deadline_and_one_thread(monkeypatch):
    answering, asked = threading.Event(), []

    def hanging(*_, **__):
        asked.append(threading.current_thread())
        answering.wait(10)
        raise socket.gaierror("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", hanging)
    keys = KeySets(deadline=timedelta(seconds=0.3))
    issuer = jwks_at("https://keys.issuer.example/jwks")
    try:
        for later in (0, 6, 12):
            started = time.perf_counter()
            with unauthenticated("were obtained yet"):
                keys.key_for(issuer, "one", "ES256", NOW + later * SECOND)
            assert time.perf_counter() - started < 0.9
        assert len(asked) == 1
    finally:
        answering.set()
    assert wait_until(lambda: not any(thread.name == "key-set" for thread in threading.enumerate()))
    with unauthenticated("were obtained yet"):
        keys.key_for(issuer, "one", "ES256", NOW + 18 * SECOND)
    assert len(asked) == 2


def test_an_issuer_that_is_down_keeps_its_keys_for_a_day(server, keys):
    issuer = by_uri(server)
    keys.key_for(issuer, "one", "ES256", NOW)
    server.publish(status=503)
    for hours in (1, 12, 23):
        keys.refresh([issuer], NOW + timedelta(hours=hours))
        assert keys.key_for(issuer, "one", "ES256", NOW + timedelta(hours=hours))
    with unauthenticated("too old"):
        keys.key_for(issuer, "one", "ES256", NOW + timedelta(hours=24))
    assert keys.generation(issuer, NOW + timedelta(hours=24)) == 0
    server.publish(ONE)
    assert keys.key_for(issuer, "one", "ES256", NOW + timedelta(hours=25))


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"error":"busy"}', b'{"keys":[{"kty":"EC"},{"kty":"EC"}'])
def test_an_answer_that_is_no_key_set_does_not_erase_good_keys(server, keys, body):
    issuer = by_uri(server)
    keys.key_for(issuer, "one", "ES256", NOW)
    server.publish(body=body)
    keys.refresh([issuer], NOW + MINUTE)
    assert keys.key_for(issuer, "one", "ES256", NOW + MINUTE)
    assert len(server.asked) == 2


def test_an_issuer_that_was_never_reached_is_asked_again_soon(server, keys):
    issuer = by_uri(server)
    server.publish(status=500)
    for second in range(5):
        with unauthenticated("no keys of corp were obtained yet"):
            keys.key_for(issuer, "one", "ES256", NOW + second * SECOND)
    server.publish(ONE)
    assert keys.key_for(issuer, "one", "ES256", NOW + 5 * SECOND)
    assert len(server.asked) == 2


def test_a_redirect_is_not_followed(server, keys):
    server.publish(TWO, path="/elsewhere")
    for status in (301, 302, 303, 307, 308):
        server.publish(status=status, headers=[("Location", f"{server.url}/elsewhere")])
        with unauthenticated("were obtained yet"):
            keys.key_for(by_uri(server, issuer=f"https://{status}.example"), "two", "ES256", NOW)
    assert set(server.asked) == {"/jwks"}


def test_an_enormous_answer_is_cut_off(server, keys):
    server.publish(body=key_set(ONE) + b" " * key_sets.MAX_BODY)
    with unauthenticated("were obtained yet"):
        keys.key_for(by_uri(server), "one", "ES256", NOW)


def test_an_endless_answer_is_cut_off():
    with dripping(b"HTTP/1.1 200 OK\r\n\r\n", b" " * 65536, pause=0) as url:
        started = time.perf_counter()
        with unauthenticated("were obtained yet"):
            KeySets().key_for(jwks_at(url), "one", "ES256", NOW)
        assert time.perf_counter() - started < 2


def test_a_compressed_answer_is_refused(server, keys):
    server.publish(ONE, headers=[("Content-Encoding", "gzip")])
    with unauthenticated("were obtained yet"):
        keys.key_for(by_uri(server), "one", "ES256", NOW)


@contextmanager
def dripping(beginning, drop, pause):
    """The address of a server that sends `drop` again and again, for ever: no single read ever takes long."""
    stop = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def handle(self):
            self.rfile.readline()
            with suppress(OSError):
                self.wfile.write(beginning)
                while not stop.wait(pause):
                    self.wfile.write(drop)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        stop.set()
        server.shutdown()
        server.server_close()
        thread.join()


def jwks_at(url):
    return TrustedIssuer(name="corp", issuer="https://idp.example", key_source="jwks_uri", location=url)


@pytest.mark.parametrize("beginning", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_server_that_drips_is_left_at_the_deadline(beginning):
    with dripping(beginning, b" ", pause=0.02) as url:
        started = time.perf_counter()
        with unauthenticated("were obtained yet"):
            KeySets(deadline=timedelta(seconds=0.2)).key_for(jwks_at(url), "one", "ES256", NOW)
        assert time.perf_counter() - started < 0.7


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://idp.example/jwks", "https only"),
        ("http://127.0.0.1.evil.test/jwks", "https only"),
        ("http://localhost.evil.test/jwks", "https only"),
        ("http://169.254.169.254/latest/meta-data", "https only"),
        ("file:///etc/passwd", "https only"),
        ("ftp://127.0.0.1/jwks", "https only"),
        ("//127.0.0.1/jwks", "https only"),
        ("", "https only"),
        (None, "https only"),
        ("https://user:password@127.0.0.1/jwks", "user name"),
        ("https://[::1", "Invalid IPv6"),
    ],
)
def test_keys_come_by_https_or_from_loopback_and_no_other_way(keys, location, reason, server, caplog):
    with unauthenticated("were obtained yet"):
        keys.key_for(by_uri(server, location=location), "one", "ES256", NOW)
    assert reason in caplog.text
    assert "password" not in caplog.text


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:80", True),
        ("http://[::1]:8080", True),
        ("http://localhost", True),
        ("http://dev.localhost:1", True),
        ("http://127.0.0.1@evil.test", False),
        ("http://10.0.0.1", False),
        ("http://[::ffff:10.0.0.1]", False),
        ("http://[::1", False),
        ("", False),
    ],
)
def test_loopback_is_recognised_by_its_name(url, expected):
    assert is_loopback(url) is expected


# --- discovery -------------------------------------------------------------------------------------------------

WELL_KNOWN = "/.well-known/openid-configuration"


def discovering(server, document, **changed):
    server.publish(path=WELL_KNOWN, body=json.dumps(document).encode())
    return TrustedIssuer(**{"name": "corp", "issuer": server.url, "key_source": "discovery"} | changed)


def test_discovery_leads_to_the_keys(server, keys):
    issuer = discovering(server, {"issuer": server.url, "jwks_uri": f"{server.url}/jwks"})
    assert keys.key_for(issuer, "one", "ES256", NOW)
    assert server.asked == [WELL_KNOWN, "/jwks"]


def test_an_issuer_with_a_path_and_a_slash_is_discovered_below_it(server, keys):
    issuer = f"{server.url}/tenant/"
    server.publish(
        path="/tenant" + WELL_KNOWN, body=json.dumps({"issuer": issuer, "jwks_uri": f"{server.url}/jwks"}).encode()
    )
    assert keys.key_for(TrustedIssuer(name="corp", issuer=issuer, key_source="discovery"), "one", "ES256", NOW)


@pytest.mark.parametrize(
    "change",
    [
        {"issuer": "https://idp.example"},
        {"issuer": None},
        {"jwks_uri": None},
        {"jwks_uri": ["/jwks"]},
        {"jwks_uri": "/jwks"},
        {"jwks_uri": "http://idp.example/jwks"},
        {"jwks_uri": "file:///etc/passwd"},
    ],
)
def test_a_discovery_document_of_another_issuer_or_to_another_world_is_refused(server, keys, change):
    document = {"issuer": server.url, "jwks_uri": f"{server.url}/jwks"} | change
    with unauthenticated("were obtained yet"):
        keys.key_for(discovering(server, document), "one", "ES256", NOW)
    assert server.asked == [WELL_KNOWN]


def test_a_public_issuer_cannot_point_at_services_of_this_machine():
    issuer = TrustedIssuer(name="corp", issuer="https://idp.example", key_source="discovery")

    def leads_to(uri):
        return key_sets.discovered_uri(json.dumps({"issuer": issuer.issuer, "jwks_uri": uri}).encode(), issuer)

    assert leads_to("https://keys.example/jwks") == "https://keys.example/jwks"
    for uri in ("http://127.0.0.1:8200/v1/secret", "http://localhost/jwks", "file:///etc/passwd"):
        with pytest.raises(Invalid, match="not https"):
            leads_to(uri)


def test_an_issuer_with_a_slash_more_is_another_issuer(server, keys):
    document = {"issuer": f"{server.url}/", "jwks_uri": f"{server.url}/jwks"}
    with unauthenticated("were obtained yet"):
        keys.key_for(discovering(server, document), "one", "ES256", NOW)


def test_keys_of_one_issuer_are_never_another_ones(server, keys, tmp_path):
    server.publish(TWO, path="/other")
    one = by_uri(server)
    other = by_uri(server, path="/other", name="other", issuer="https://other.example")
    assert keys.key_for(one, "one", "ES256", NOW)
    with unauthenticated("no key 'one'"):
        keys.key_for(other, "one", "ES256", NOW)


def test_a_new_version_of_the_configuration_keeps_the_keys(server, keys):
    keys.key_for(by_uri(server), "one", "ES256", NOW)
    assert keys.key_for(by_uri(server, max_lifetime_s=60, name="renamed"), "one", "ES256", NOW)
    assert len(server.asked) == 1
