"""Telling the people who are asked: a signed webhook, hooks of the kinds that Slack and Teams have, and e-mail.

A notice says what would be opened in the broker's words, then what the requester says, as text that no chat takes for
markup (INV-31). It links to the approval. Nothing in it decides: whoever follows the link only sees. At least once,
like alerts.
"""

from __future__ import annotations

import json
import smtplib
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from email.message import EmailMessage
from email.utils import format_datetime
from typing import Any, Protocol
from urllib.parse import urlsplit

from broker.domain.approval import in_quotes
from broker.domain.clock import Clock, rfc3339, system_clock
from broker.domain.errors import ProviderUnavailable
from broker.domain.secret import Secret
from broker.providers.alerts import DEADLINE, Webhook

FORMATS = ("json", "slack", "teams", "email")
TLS = ("starttls", "tls", "none")
_LONGEST = 300  # characters of one value
_MOST = 20
_THEIRS = "In their own words, which nobody has checked:"


@dataclass(frozen=True, kw_only=True)
class Notice:
    """`facts` are the broker's, the dangerous ones first; `words` are what others wrote.

    `kind` is the audit event it tells of; `expires_at` until when something can be decided, if something can.
    """

    id: str
    at: datetime
    summary: str
    link: str
    command: str
    expires_at: datetime | None
    facts: Mapping[str, str]
    words: Mapping[str, str]
    kind: str = "approval.opened"


@dataclass(frozen=True, kw_only=True)
class Mail:
    """A server that takes mail (SMTP), and who is written to. `tls` is `none` on loopback only."""

    host: str
    port: int
    tls: str
    sender: str
    recipients: tuple[str, ...]
    user: str | None = None
    password: Secret | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class ChannelSettings:
    """One way to tell people. Without `groups` it is for everything that is asked."""

    name: str
    groups: frozenset[str]
    format: str
    url: Secret | None = field(default=None, repr=False)
    secret: Secret | None = field(default=None, repr=False)
    mail: Mail | None = None


class Channel(Protocol):
    def send(self, notice: Notice) -> None:
        """Deliver it, or raise ProviderUnavailable: then it may or may not have arrived, and is sent again."""


def channel(settings: ChannelSettings, clock: Clock = system_clock) -> Channel:
    if settings.mail is not None:
        return MailChannel(settings.mail, clock=clock)
    if settings.url is None:
        raise ValueError(f"{settings.name} has neither an address nor a mail server")
    return HookChannel(settings.format, Webhook(settings.url, settings.secret, clock=clock))


class HookChannel:
    def __init__(self, format_: str, hook: Webhook) -> None:
        self._body = {"json": signed_json, "slack": slack, "teams": teams}[format_]
        self._hook = hook

    def send(self, notice: Notice) -> None:
        body = json.dumps(self._body(notice), separators=(",", ":")).encode()
        self._hook.post(notice.id, body, what="a notice")


def signed_json(notice: Notice) -> dict[str, Any]:
    """Our own: the members of Standard Webhooks."""
    until = {} if notice.expires_at is None else {"expires_at": rfc3339(notice.expires_at)}
    return {
        "id": notice.id,
        "type": notice.kind,
        "timestamp": rfc3339(notice.at),
        "summary": _plain(notice.summary),
        "link": notice.link,
        "data": {**_shown(notice.facts), **until, "unverified": _shown(notice.words)},
    }


def slack(notice: Notice) -> dict[str, Any]:
    """For an incoming hook of Slack, Mattermost or the like. Text of the kind `plain_text` has no markup."""
    blocks = [_slack_text(notice.summary, kind="header", longest=150), _slack_text(_lines(notice.facts))]
    if notice.words:
        blocks.append(_slack_text(f"{_THEIRS}\n{_lines(notice.words, quoted=True)}"))
    button = {"type": "button", "text": {"type": "plain_text", "text": "Look at it"}, "url": notice.link}
    blocks += [{"type": "actions", "elements": [button]}, _slack_text(notice.command)]
    # What a phone shows, and who knows no blocks; there "&", "<" and ">" are what markup is made of.
    text = _plain(notice.summary).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return {"text": f"{text} {notice.link}", "blocks": blocks}


def _slack_text(text: str, *, kind: str = "section", longest: int = 2900) -> dict[str, Any]:
    return {"type": kind, "text": {"type": "plain_text", "text": text[:longest], "emoji": False}}


def teams(notice: Notice) -> dict[str, Any]:
    """For an incoming hook of Teams: an adaptive card. A text run has no markup, as a text block would."""
    body = [_runs(notice.summary, weight="Bolder"), _runs(_lines(notice.facts))]
    if notice.words:
        body.append(_runs(f"{_THEIRS}\n{_lines(notice.words, quoted=True)}"))
    body.append(_runs(notice.command))
    card = {
        "$schema": "http://adaptivecards.io/schemas/adaptive-card.json",
        "type": "AdaptiveCard",
        "version": "1.4",
        "body": body,
        "actions": [{"type": "Action.OpenUrl", "title": "Look at it", "url": notice.link}],
    }
    attachment = {"contentType": "application/vnd.microsoft.card.adaptive", "content": card}
    return {"type": "message", "attachments": [attachment]}


def _runs(text: str, **more: str) -> dict[str, Any]:
    return {"type": "RichTextBlock", "inlines": [{"type": "TextRun", "text": text, **more}]}


class MailChannel:
    def __init__(self, mail: Mail, *, clock: Clock = system_clock, deadline: timedelta = DEADLINE) -> None:
        self._mail = mail
        self._clock = clock
        self._deadline_s = deadline.total_seconds()
        self._tls = ssl.create_default_context()

    def send(self, notice: Notice) -> None:
        problem: str | None = None
        try:
            self._sent(mail_of(notice, self._mail, self._clock()))
        except (smtplib.SMTPException, OSError) as failure:
            # By its kind alone: what a server answers may quote what it was told (INV-30).
            code = getattr(failure, "smtp_code", None)
            problem = type(failure).__name__ + (f" {code}" if isinstance(code, int) else "")
        if problem is not None:
            raise ProviderUnavailable("a notice was not delivered", reason=f"{self._mail.host}: {problem}")

    def _sent(self, message: EmailMessage) -> None:
        mail = self._mail
        with self._connected() as server:
            if mail.tls == "starttls":
                server.starttls(context=self._tls)
            if mail.user is not None and mail.password is not None:
                server.login(mail.user, mail.password.reveal())
            server.send_message(message, from_addr=mail.sender, to_addrs=list(mail.recipients))

    def _connected(self) -> smtplib.SMTP:
        mail, name = self._mail, socket.gethostname()
        if mail.tls == "tls":
            return smtplib.SMTP_SSL(
                mail.host, mail.port, local_hostname=name, timeout=self._deadline_s, context=self._tls
            )
        return smtplib.SMTP(mail.host, mail.port, local_hostname=name, timeout=self._deadline_s)


def mail_of(notice: Notice, mail: Mail, now: datetime) -> EmailMessage:
    """Plain text: a mail program shows it as it is."""
    message = EmailMessage()
    message["Subject"] = _plain(notice.summary)[:150]
    message["From"] = mail.sender
    message["To"] = ", ".join(mail.recipients)
    message["Date"] = format_datetime(now)
    # The same at each try, so that a second one is seen to be the first.
    message["Message-ID"] = f"<{notice.id}@{urlsplit(notice.link).hostname or 'broker'}>"
    message["Auto-Submitted"] = "auto-generated"
    lines = [_plain(notice.summary), "", _lines(notice.facts), ""]
    if notice.words:
        lines += [_THEIRS, _lines(notice.words, quoted=True), ""]
    lines += [f"Look at it: {notice.link}", notice.command, "", "Nothing is decided by following the link."]
    message.set_content("\n".join(lines))
    return message


def _lines(values: Mapping[str, str], *, quoted: bool = False) -> str:
    shown = _shown(values)
    return "\n".join(f"{name}: “{text}”" if quoted else f"{name}: {text}" for name, text in shown.items())


def _shown(values: Mapping[str, str]) -> dict[str, str]:
    return {_plain(name): _plain(text) for name, text in list(values.items())[:_MOST]}


def _plain(text: str) -> str:
    return in_quotes(text, _LONGEST)
