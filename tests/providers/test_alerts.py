"""Alerts over a real HTTP server: what arrives, who signed it, and what counts as delivered."""

import base64
import hashlib
import hmac
import json
import logging
import socket
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from broker.domain.errors import Invalid, ProviderUnavailable
from broker.domain.secret import Secret
from broker.providers.alerts import MAX_TEXT, Alert, NoAlerts, WebhookAlerts, webhook_key, webhook_url
from broker.telemetry import JsonLines

AT = datetime(2026, 3, 1, 12, tzinfo=UTC)
SENT_AT = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
KEY = bytes(range(32))
SECRET = f"whsec_{base64.b64encode(KEY).decode()}"
ALERT = Alert(
    id="evt_01kk5r3k00e00800476mt57fq0",
    at=AT,
    kind="lease.stuck",
    summary="A secret could not be revoked after 6 attempts.",
    data={"lease_id": "lea_01kk5r3k00e00800476mt57fq0", "attempts": 6, "last_error": None},
    claimed={"reason": "cleanup"},
)


class Hook:
    """A receiver that answers what a test says."""

    def __init__(self):
        self.received = []
        self.answer = (200, {})
        self.released = threading.Event()
        self.released.set()
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.received.append((self.path, self.headers, body))
                hook.released.wait(30)
                status, headers = hook.answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *args):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/services/hunter2?token=hunter2"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self):
        self.released.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(10)


@pytest.fixture
def hook():
    made = Hook()
    yield made
    made.close()


def alerts(url, secret=SECRET, **more):
    return WebhookAlerts(Secret(url), Secret(secret) if secret else None, clock=lambda: SENT_AT, **more)


def undelivered(send, alert=ALERT):
    with pytest.raises(ProviderUnavailable) as raised:
        send(alert)
    problem = raised.value
    # The request would hold the address, which is all that is needed to write there (INV-30).
    assert problem.__context__ is problem.__cause__ is None
    assert "hunter2" not in f"{problem} {problem.reason}"
    return problem.reason


# --- what arrives ----------------------------------------------------------------------------------------------------


def test_it_arrives_with_everything_it_says(hook):
    alerts(hook.url).send(ALERT)
    ((path, headers, body),) = hook.received
    assert path == "/services/hunter2?token=hunter2"
    assert headers["Content-Type"] == "application/json"
    assert json.loads(body) == {
        "id": ALERT.id,
        "type": "lease.stuck",
        "timestamp": "2026-03-01T12:00:00Z",
        "summary": "A secret could not be revoked after 6 attempts.",
        "text": "[lease.stuck] A secret could not be revoked after 6 attempts.\n"
        "lease_id: lea_01kk5r3k00e00800476mt57fq0\nattempts: 6\nlast_error: –\n"
        "reason, as somebody else wrote it: `cleanup`",
        "data": {
            "lease_id": "lea_01kk5r3k00e00800476mt57fq0",
            "attempts": 6,
            "last_error": None,
            "claimed": {"reason": "cleanup"},
        },
    }


def test_it_is_signed_as_standard_webhooks_has_it(hook):
    """Over the id, when it was sent, and the very bytes that arrived."""
    alerts(hook.url).send(ALERT)
    ((_, headers, body),) = hook.received
    assert headers["webhook-id"] == ALERT.id
    assert headers["webhook-timestamp"] == str(int(SENT_AT.timestamp()))
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.{body.decode()}".encode()
    expected = base64.b64encode(hmac.digest(KEY, signed, hashlib.sha256)).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"


def test_the_key_of_the_published_example_gives_its_signature():
    """The vector of the reference libraries of Standard Webhooks."""
    key = webhook_key("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    body = b'{"test": 2432232314}'
    mac = hmac.digest(key, b"msg_p5jXN8AQM9LWM0D4loKWxJek.1614265330." + body, hashlib.sha256)
    assert base64.b64encode(mac).decode() == "g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_without_a_secret_it_is_not_signed(hook):
    alerts(hook.url, secret=None).send(ALERT)
    ((_, headers, _),) = hook.received
    assert headers["webhook-id"] == ALERT.id
    assert headers["webhook-signature"] is None


def test_the_same_alert_sent_again_has_the_same_id(hook):
    hook.answer = (503, {})
    sender = alerts(hook.url)
    undelivered(sender.send)
    hook.answer = (204, {})
    sender.send(ALERT)
    first, second = hook.received
    assert first[1]["webhook-id"] == second[1]["webhook-id"] == ALERT.id
    assert first[2] == second[2]


HOSTILE = "<!channel> <https://evil.test|click> `` & [x](https://evil.test)\r\nlease_id: forged\u202e\x00\x1b[2J"


def test_what_others_wrote_is_said_to_be_theirs_and_changes_nothing(hook):
    """INV-31."""
    alert = Alert(
        id=ALERT.id, at=AT, kind="lease.stuck", summary="Ours.", data={"name": HOSTILE}, claimed={"reason": HOSTILE}
    )
    alerts(hook.url).send(alert)
    ((_, _, body),) = hook.received
    message = json.loads(body)
    first, data, claimed = message["text"].split("\n")
    assert first == "[lease.stuck] Ours."
    assert data.startswith("name: &lt;!channel&gt; &lt;https://evil.test|click&gt;")
    assert claimed.startswith("reason, as somebody else wrote it: `&lt;!channel&gt;")
    assert claimed.endswith("`")
    assert claimed.count("`") == 2
    assert message["text"].replace("\n", "").isprintable()
    assert list(message["data"]) == ["name", "claimed"]
    assert message["data"]["claimed"]["reason"].isprintable()


def test_what_others_wrote_is_cut(hook):
    alert = Alert(
        id=ALERT.id,
        at=AT,
        kind="lease.stuck",
        summary="x" * 10_000,
        data={f"n{i}": "x" * 10_000 for i in range(100)},
        claimed={f"n{i}": "\U0001f916" * 10_000 for i in range(100)},
    )
    alerts(hook.url).send(alert)
    ((_, _, body),) = hook.received
    assert len(body) < 200_000
    assert len(json.loads(body)["summary"]) == MAX_TEXT + 1


def test_what_is_neither_text_nor_number_is_told_as_text(hook):
    alert = Alert(id=ALERT.id, at=AT, kind="x", summary="x", data={"sure": True, "many": ["a\nb", 2]})
    alerts(hook.url).send(alert)
    ((_, _, body),) = hook.received
    assert json.loads(body)["data"] == {"sure": True, "many": "['a\\nb', 2]", "claimed": {}}


@pytest.mark.parametrize("id_", ["", "a.b", "a b", "a\r\nX-Injected: 1", "x" * 129, "é"], ids=ascii)
def test_an_id_that_could_change_a_header_is_not_sent(hook, id_):
    with pytest.raises(ValueError, match="not an id"):
        alerts(hook.url).send(Alert(id=id_, at=AT, kind="x", summary="x"))
    assert hook.received == []


# --- what is no delivery ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 201, 202, 204])
def test_any_success_is_a_delivery(hook, status):
    hook.answer = (status, {})
    alerts(hook.url).send(ALERT)
    assert len(hook.received) == 1


@pytest.mark.parametrize("status", [400, 401, 404, 410, 429, 500, 502, 503])
def test_a_refusal_is_no_delivery(hook, status):
    hook.answer = (status, {})
    assert undelivered(alerts(hook.url).send) == f"127.0.0.1: it answered {status}"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(hook, status):
    hook.answer = (status, {"Location": "/elsewhere"})
    assert "a redirect, which is not followed" in undelivered(alerts(hook.url).send)
    assert [path for path, _, _ in hook.received] == ["/services/hunter2?token=hunter2"]


def test_who_takes_too_long_is_left_at_the_deadline(hook):
    hook.released.clear()
    sender = alerts(hook.url, deadline=timedelta(seconds=0.3))
    assert undelivered(sender.send) == "127.0.0.1: no answer within 0.3 s"
    hook.released.set()
    sender.send(ALERT)


def test_who_answers_one_byte_at_a_time_is_left_at_the_deadline():
    """Each single read is quick; only one end for all of it ends."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def dribble():
            client, _ = server.accept()
            with client:
                client.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                while not stop.wait(0.05):
                    try:
                        client.sendall(b"x")
                    except OSError:
                        return

        thread = threading.Thread(target=dribble, daemon=True)
        thread.start()
        sender = alerts(f"http://127.0.0.1:{server.getsockname()[1]}/", deadline=timedelta(seconds=0.5))
        assert undelivered(sender.send) == "127.0.0.1: no answer within 0.5 s"
        stop.set()
        thread.join(10)


def test_who_is_not_there_is_told(hook):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert undelivered(alerts(f"http://127.0.0.1:{port}/hunter2").send) == "127.0.0.1: ConnectError"


def test_a_receiver_that_speaks_no_tls_is_told(hook):
    url = hook.url.replace("http:", "https:")
    assert undelivered(alerts(url).send) == "127.0.0.1: ConnectError"
    assert hook.received == []


def test_a_resolver_that_hangs_keeps_one_thread_and_not_one_an_alert(monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: released.wait(30) and [])
    sender = alerts("https://hooks.example/hunter2", deadline=timedelta(seconds=0.2))
    try:
        assert undelivered(sender.send) == "hooks.example: no answer within 0.2 s"
        assert "still waits for its name" in undelivered(sender.send)
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "post"]
    finally:
        released.set()
    thread.join(10)


# --- where it is sent ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hunter2",
        "/services/hunter2",
        "http://hooks.example/hunter2",
        "http://127.0.0.1.evil.test/hunter2",
        "ftp://hooks.example/hunter2",
        "https://user:hunter2@hooks.example/",
        "https://hooks.example/#hunter2",
        "https://hooks.example/ hunter2",
        "https://hooks.example/hunter2\nhttps://evil.test",
        "https:///hunter2",
        "https://hooks.example:99999/hunter2",
        "https://[::1/hunter2",
    ],
    ids=ascii,
)
def test_an_address_that_is_not_safe_is_refused_without_showing_it(url):
    with pytest.raises(Invalid) as refused:
        alerts(url)
    assert "hunter2" not in refused.value.detail


@pytest.mark.parametrize(
    "url", ["https://hooks.example/services/T0/B0/x-_~", "http://localhost:8080/", "http://[::1]:8080/x?y=%20z"]
)
def test_an_address_that_is_safe_is_taken(url):
    assert webhook_url(url) == url


@pytest.mark.parametrize(
    "secret",
    [
        "",
        "hunter2",
        base64.b64encode(KEY).decode(),
        "whsec_",
        "whsec_hunter2",
        f"whsec_{base64.b64encode(KEY[:23]).decode()}",
        f"whsec_{base64.b64encode(KEY * 3).decode()}",
        f"{SECRET}\n",
        f"{SECRET}=",
    ],
    ids=ascii,
)
def test_a_secret_that_signs_nothing_is_refused_without_showing_it(hook, secret):
    with pytest.raises(Invalid, match="whsec_ and 24 to 64 random bytes") as refused:
        WebhookAlerts(Secret(hook.url), Secret(secret))
    assert "hunter2" not in refused.value.detail


def test_nothing_of_it_shows_where_it_sends(hook):
    assert "hunter2" not in repr(vars(alerts(hook.url)))


# --- where nobody is to be told --------------------------------------------------------------------------------------


def test_without_a_webhook_an_alert_is_one_line_of_the_log(caplog):
    with caplog.at_level(logging.WARNING):
        NoAlerts().send(Alert(id=ALERT.id, at=AT, kind="lease.stuck", summary="Ours.", claimed={"reason": HOSTILE}))
    (record,) = caplog.records
    line = JsonLines().format(record)
    assert "\n" not in line
    said = json.loads(line)
    assert (said["level"], said["event"], said["kind"], said["summary"]) == (
        "warning",
        "alert",
        "lease.stuck",
        "Ours.",
    )
    assert said["alert_id"] == ALERT.id
    assert said["claimed"]["reason"].startswith("<!channel>")
