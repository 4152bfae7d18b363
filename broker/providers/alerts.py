"""Alerts: what a person has to know of now, sent to a webhook of theirs.

One JSON object by POST, signed as Standard Webhooks has it (standardwebhooks.com) where there is a secret. It has a
`text` too, so that a hook of Slack, Mattermost or the like shows it as it is. At least once: whoever sends it keeps it
until it was delivered, and sends it again under the same id.

No alert holds what opens something. What an agent or a caller wrote is under `claimed`, and never among our own words.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Protocol
from urllib.parse import urlsplit

import httpx

from broker.domain.clock import Clock, epoch, rfc3339, system_clock
from broker.domain.errors import Invalid, ProviderUnavailable
from broker.domain.secret import Secret
from broker.providers.key_sets import is_loopback
from broker.providers.posting import Poster

DEADLINE = timedelta(seconds=5)
MAX_TEXT = 300  # characters of one value
MAX_MEMBERS = 20

_log = logging.getLogger(__name__)

# It goes into a header and, with dots between, into what is signed.
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_URL = re.compile(r"https?://[A-Za-z0-9\-._~:/?\[\]!$&'()*+,;=%]+")
_KEY = re.compile(r"whsec_([A-Za-z0-9+/]+={0,2})")
_KEY_BYTES = range(24, 65)

Value = str | int | None


@dataclass(frozen=True, kw_only=True)
class Alert:
    """`kind` is the name of an audit event or metric, `summary` our own sentence, `data` ids and configured names.

    `claimed` is what others wrote: the purpose of a task, a reason.
    """

    id: str
    at: datetime
    kind: str
    summary: str
    data: Mapping[str, Value] = field(default_factory=dict)
    claimed: Mapping[str, Value] = field(default_factory=dict)


class Alerts(Protocol):
    def send(self, alert: Alert) -> None:
        """Deliver it, or raise ProviderUnavailable: then it may or may not have arrived, and is sent again."""


class NoAlerts:
    """Where nobody is to be told: a line in the log, for whoever reads that."""

    def send(self, alert: Alert) -> None:
        fields = {
            "alert_id": alert.id,
            "kind": alert.kind,
            "raised_at": rfc3339(alert.at),
            "summary": _plain(alert.summary),
            "data": _values(alert.data),
            "claimed": _values(alert.claimed),
        }
        _log.warning("alert", extra={"fields": fields})


class Webhook:
    """Where messages are posted. Its address is a secret: for many it is all that is needed to write there."""

    def __init__(
        self, url: Secret, secret: Secret | None = None, *, clock: Clock = system_clock, deadline: timedelta = DEADLINE
    ) -> None:
        self._url = Secret(webhook_url(url.reveal()))
        self._name = urlsplit(url.reveal()).hostname
        if secret is not None:
            webhook_key(secret.reveal())
        self._secret = secret
        self._clock = clock
        self._poster = Poster(deadline=deadline)

    def post(self, message_id: str, body: bytes, *, what: str = "an alert") -> None:
        """Deliver a JSON document, or raise ProviderUnavailable; `message_id` is the same at each try."""
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "agent-credential-broker",
            "Accept-Encoding": "identity",
            **self._signed(message_id, body),
        }
        problem = self._posted(body, headers)
        if problem is not None:
            raise ProviderUnavailable(f"{what} was not delivered", reason=f"{self._name}: {problem}")

    def _signed(self, message_id: str, body: bytes) -> dict[str, str]:
        if not _ID.fullmatch(message_id):
            raise ValueError("not an id that an alert may have")
        # Of the attempt and not of the alert: receivers refuse what is old.
        sent_at = str(epoch(self._clock()))
        headers = {"webhook-id": message_id, "webhook-timestamp": sent_at}
        if self._secret is not None:
            key = webhook_key(self._secret.reveal())
            mac = hmac.new(key, b".".join((message_id.encode(), sent_at.encode(), body)), hashlib.sha256)
            headers["webhook-signature"] = f"v1,{base64.b64encode(mac.digest()).decode()}"
        return headers

    def _posted(self, body: bytes, headers: Mapping[str, str]) -> str | None:
        """None when it was delivered, else why not."""
        try:
            status = self._poster.post(self._url.reveal(), body, headers).status
        except ProviderUnavailable as problem:
            return problem.reason
        if 300 <= status < 400:
            return f"it answered {status}, a redirect, which is not followed; configure where it leads"
        return None if 200 <= status < 300 else f"it answered {status}"


class WebhookAlerts:
    """Alerts as messages to one webhook."""

    def __init__(
        self, url: Secret, secret: Secret | None = None, *, clock: Clock = system_clock, deadline: timedelta = DEADLINE
    ) -> None:
        self._hook = Webhook(url, secret, clock=clock, deadline=deadline)

    def send(self, alert: Alert) -> None:
        self._hook.post(alert.id, body_of(alert))


def body_of(alert: Alert) -> bytes:
    """What is sent: the members of Standard Webhooks, and the same as one text for people."""
    message = {
        "id": alert.id,
        "type": alert.kind,
        "timestamp": rfc3339(alert.at),
        "summary": _plain(alert.summary),
        "text": _text(alert),
        "data": {**_values(alert.data), "claimed": _values(alert.claimed)},
    }
    return json.dumps(message, separators=(",", ":")).encode()


def _text(alert: Alert) -> str:
    lines = [f"[{_escaped(alert.kind)}] {_escaped(alert.summary)}"]
    lines += [f"{_escaped(name)}: {_escaped(value)}" for name, value in _values(alert.data).items()]
    # As code, in which a chat sees no link, no mention and no markup (INV-31).
    lines += [
        f"{_escaped(name)}, as somebody else wrote it: `{_escaped(value).replace('`', chr(39))}`"
        for name, value in _values(alert.claimed).items()
    ]
    return "\n".join(lines)


def _escaped(value: Value) -> str:
    """One line in which Slack reads no control sequence."""
    return _plain("–" if value is None else str(value)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _values(given: Mapping[str, Value]) -> dict[str, Value]:
    return {
        _plain(name): value if value is None or isinstance(value, int) else _plain(str(value))
        for name, value in list(given.items())[:MAX_MEMBERS]
    }


def _plain(text: str) -> str:
    """One line, without what cannot be seen or turns the direction of what is read, and short."""
    seen = "".join(letter if letter.isprintable() else " " for letter in text[: MAX_TEXT + 1])
    return seen if len(seen) <= MAX_TEXT else f"{seen[:MAX_TEXT]}…"


def webhook_url(text: str) -> str:
    """Where alerts are sent; `Invalid` says what is wrong without showing it.

    >>> webhook_url("https://hooks.example/services/one")
    'https://hooks.example/services/one'
    """
    try:
        parts = urlsplit(text)
        _ = parts.port
        known = _URL.fullmatch(text) is not None and parts.hostname is not None
        httpx.URL(text)
    except (ValueError, httpx.InvalidURL):
        known = False
    if not known:
        raise Invalid("it is not an absolute https URL without user, password and fragment alone")
    if parts.scheme != "https" and not is_loopback(text):
        raise Invalid("it is plain http off loopback, where everybody on the way reads it; use https")
    return text


def webhook_key(text: str) -> bytes:
    """The key of a secret of Standard Webhooks; `Invalid` says what is wrong without showing it."""
    found = _KEY.fullmatch(text)
    try:
        key = base64.b64decode(found[1], validate=True) if found is not None else b""
    except binascii.Error:
        key = b""
    if len(key) not in _KEY_BYTES:
        raise Invalid(
            "it is not whsec_ and 24 to 64 random bytes in Base64; make it with "
            "printf 'whsec_%s' \"$(head -c 32 /dev/urandom | base64)\""
        )
    return key
