"""Notices as they arrive: over real HTTP and SMTP on loopback, in each format, with hostile words in them."""

import base64
import email
import email.policy
import hashlib
import hmac
import json
import re
import socketserver
import threading
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from broker.domain.errors import ProviderUnavailable
from broker.domain.secret import Secret
from broker.providers.notices import ChannelSettings, Mail, Notice, channel, mail_of, signed_json, slack, teams
from tests.providers.test_alerts import KEY, SECRET, Hook

AT = datetime(2026, 3, 1, 12, tzinfo=UTC)
LINK = "https://broker.example/v1/approvals/apr_01kk5r3k00e00800476mt57fq0"
NOTICE = Notice(
    id="apr_01kk5r3k00e00800476mt57fq0",
    at=AT,
    summary="ledger-clerk asks for entries:post on https://ledger.example/api: 2 of security decide",
    link=LINK,
    command="broker approval show apr_01kk5r3k00e00800476mt57fq0",
    expires_at=AT,
    facts={"resource": "https://ledger.example/api", "sensitivity": "restricted, production", "ttl": "60 s"},
    words={"the agent says": "post the accruals", "the task says": "the close of May"},
)
WORDS = (
    "fine\r\nBcc: everybody@evil.test\r\n\r\nsensitivity: public",
    "<https://evil.test|Look at it> <!channel> *approved*",
    "[Look at it](https://evil.test) **approved**",
    "\x1b[2J\u202eylno daer",
    "`code` & <b>html</b>",
    "x" * 5000,
)
HOSTILE = replace(NOTICE, words={f"claims {number}\n": words for number, words in enumerate(WORDS)})


@pytest.fixture
def hook():
    made = Hook()
    yield made
    made.close()


class MailServer:
    """As much of SMTP (RFC 5321) as one message takes; `refuses` is what it answers to the sender."""

    def __init__(self):
        self.received, self.refuses = [], None
        outer = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                said = lambda line: self.wfile.write(line.encode() + b"\r\n")  # noqa: E731
                said("220 mail.example")
                recipients = []
                while line := self.rfile.readline().decode().strip():
                    verb = line.upper()
                    if verb.startswith("MAIL") and outer.refuses:
                        said(outer.refuses)
                    elif verb.startswith("RCPT"):
                        recipients.append(line)
                        said("250 ok")
                    elif verb == "DATA":
                        said("354 go on")
                        content = b""
                        while (part := self.rfile.readline()) != b".\r\n":
                            content += part
                        outer.received.append((recipients, content))
                        said("250 taken")
                    elif verb == "QUIT":
                        said("221 bye")
                        return
                    else:
                        said("250 ok")

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


@pytest.fixture
def server():
    made = MailServer()
    yield made
    made.close()


def mail(port, **more):
    given = {
        "host": "127.0.0.1",
        "port": port,
        "tls": "none",
        "sender": "broker@example.org",
        "recipients": ("sam@example.org",),
    }
    return Mail(**given | more)


def settings(format_, **more):
    return ChannelSettings(name="them", groups=frozenset(), format=format_, **more)


def test_our_own_is_signed_and_says_what_is_dangerous_before_their_words(hook):
    channel(settings("json", url=Secret(hook.url), secret=Secret(SECRET)), clock=lambda: AT).send(NOTICE)
    [(_, headers, body)] = hook.received
    signed = b".".join((headers["webhook-id"].encode(), headers["webhook-timestamp"].encode(), body))
    mac = hmac.new(KEY, signed, hashlib.sha256).digest()
    assert headers["webhook-signature"] == f"v1,{base64.b64encode(mac).decode()}"
    assert headers["webhook-id"] == NOTICE.id
    message = json.loads(body)
    assert (message["type"], message["link"]) == ("approval.opened", LINK)
    assert list(message["data"]) == ["resource", "sensitivity", "ttl", "expires_at", "unverified"]
    assert message["data"]["unverified"]["the agent says"] == "post the accruals"


@pytest.mark.parametrize("format_", ["json", "slack", "teams"])
def test_a_hook_that_does_not_take_it_says_so_without_its_address(hook, format_):
    hook.answer = (503, {})
    with pytest.raises(ProviderUnavailable, match="a notice was not delivered") as failure:
        channel(settings(format_, url=Secret(hook.url)), clock=lambda: AT).send(NOTICE)
    assert "503" in failure.value.reason and "hunter2" not in failure.value.reason


def texts(value):
    """Every text in a body, as (name of its member, text)."""
    if isinstance(value, dict):
        for name, below in value.items():
            yield from [(name, below)] if isinstance(below, str) else texts(below)
    elif isinstance(value, list):
        for below in value:
            yield from texts(below)


@pytest.mark.parametrize("make", [signed_json, slack, teams])
def test_hostile_words_stay_words_and_short(make):
    """INV-31: no line of theirs can look like one of ours, and no link but ours is one."""
    body = make(HOSTILE)
    everything = json.dumps(body, ensure_ascii=False)
    assert "\x1b" not in everything and "\u202e" not in everything and "x" * 700 not in everything
    assert [text for name, text in texts(body) if name in ("url", "link")] == [LINK]
    for _, text in texts(body):
        assert not any(line.startswith(("sensitivity: public", "Bcc:")) for line in text.splitlines())


def test_slack_shows_their_words_as_plain_text_alone():
    body = slack(HOSTILE)
    kinds = {block["text"]["type"] for block in body["blocks"] if "text" in block}
    assert kinds == {"plain_text"}
    assert "evil" not in body["text"]
    [button] = [element for block in body["blocks"] if block["type"] == "actions" for element in block["elements"]]
    # A button with an address opens it; one with a value would send something back.
    assert button.keys() == {"type", "text", "url"}
    assert all(len(block["text"]["text"]) <= 3000 for block in body["blocks"] if "text" in block)


def test_the_fallback_of_slack_holds_no_markup():
    body = slack(replace(NOTICE, summary="<!channel> a & b"))
    assert body["text"].startswith("&lt;!channel&gt; a &amp; b ")


def test_teams_shows_their_words_as_text_runs_alone():
    card = teams(HOSTILE)["attachments"][0]["content"]
    assert {block["type"] for block in card["body"]} == {"RichTextBlock"}
    assert {run["type"] for block in card["body"] for run in block["inlines"]} == {"TextRun"}
    assert [action["type"] for action in card["actions"]] == ["Action.OpenUrl"]


def test_a_mail_arrives_once_with_one_subject_and_their_words_in_its_body(server):
    sent = settings("email", mail=mail(server.port, recipients=("sam@example.org", "sue@example.org")))
    channel(sent, clock=lambda: AT).send(HOSTILE)
    [(recipients, content)] = server.received
    assert [re.search(r"<(.+)>", line)[1] for line in recipients] == ["sam@example.org", "sue@example.org"]
    message = email.message_from_bytes(content, policy=email.policy.default)
    assert message["Subject"].startswith("ledger-clerk asks for entries:post")
    assert message["Bcc"] is None
    assert message["Message-ID"] == "<apr_01kk5r3k00e00800476mt57fq0@broker.example>"
    text = message.get_content()
    assert text.index("restricted") < text.index("In their own words") < text.index(LINK)
    assert not any(line.startswith(("sensitivity: public", "Bcc:")) for line in text.splitlines())
    assert "\x1b" not in text and "\u202e" not in text


@pytest.mark.parametrize("summary", ["a\r\nBcc: evil@evil.test", "\u202ex", "é" * 400])
def test_no_summary_adds_a_header(summary):
    message = mail_of(replace(NOTICE, summary=summary), mail(25), AT)
    parsed = email.message_from_bytes(message.as_bytes(), policy=email.policy.default)
    assert parsed["Bcc"] is None
    assert len(parsed.get_all("Subject")) == 1


def test_a_mail_server_that_says_no_is_asked_again_later_and_not_quoted(server):
    server.refuses = "550 broker@example.org hunter2 is not welcome"
    with pytest.raises(ProviderUnavailable) as failure:
        channel(settings("email", mail=mail(server.port))).send(NOTICE)
    assert "127.0.0.1" in failure.value.reason and "hunter2" not in failure.value.reason


def test_no_password_goes_to_a_server_without_tls(server):
    wanted = mail(server.port, tls="starttls", user="broker", password=Secret("hunter2"))
    with pytest.raises(ProviderUnavailable):
        channel(settings("email", mail=wanted)).send(NOTICE)
    assert server.received == []


def test_a_mail_server_that_is_away_is_a_failure_like_any_other(server):
    server.close()
    with pytest.raises(ProviderUnavailable):
        channel(settings("email", mail=mail(server.port))).send(NOTICE)
