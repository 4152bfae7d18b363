"""Activities: what was done with a grant, as told by somebody who was there.

They are evidence by a reporter, and never the broker's own word: who told is kept with what was told, and nothing is
decided by it. Text is somebody else's (INV-31). What opens something has no place here: a member that is called like a
secret is refused, and text that looks like one is taken out (INV-30).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import pairwise
from typing import Protocol
from urllib.parse import urlsplit, urlunsplit

from broker.domain.clock import LEEWAY
from broker.domain.errors import Invalid

# Told later than this, it is history that somebody writes anew.
TOLD_WITHIN = timedelta(days=1)
TOLD_AGAIN_WITHIN = timedelta(minutes=5)  # by who says no time of its own
MAX_TOGETHER = 2048  # of one request; an exporter of spans sends 512 unless told otherwise
MAX_ATTRIBUTES = 16


class Kind(StrEnum):
    """A tool that was called, a secret that was used, something that was asked of a resource."""

    TOOL = "tool"
    SECRET_USE = "secret_use"  # noqa: S105 - a kind
    REQUEST = "request"


class Outcome(StrEnum):
    OK = "ok"
    ERROR = "error"
    DENIED = "denied"
    UNKNOWN = "unknown"


class Beyond(StrEnum):
    """In what way an activity is outside of what was granted."""

    RESOURCE = "resource"
    SCOPE = "scope"
    BEFORE_ISSUE = "before_issue"
    AFTER_END = "after_end"


class Granted(Protocol):
    """What of a grant an activity is held against."""

    @property
    def resource(self) -> str: ...
    @property
    def provider(self) -> str: ...
    @property
    def scopes(self) -> Sequence[str]: ...
    @property
    def issued_at(self) -> datetime | None: ...
    @property
    def expires_at(self) -> datetime: ...
    @property
    def revoked_at(self) -> datetime | None: ...


@dataclass(frozen=True, kw_only=True)
class Report:
    """One activity as it is told. `id` is the reporter's own, so that telling it again is the same activity.

    Tied to a grant by `grant_id`, or by the trace in which the grant was issued. What is `loose` is only known to be of
    a program that works with the grant, and may be something else that it does; `inbound` is what it was asked for,
    `of_secret` what needs a secret from outside and not a token.
    """

    id: str
    kind: Kind
    action: str
    at: datetime
    grant_id: str | None = None
    trace_id: str | None = None
    resource: str | None = None
    scope: str | None = None
    outcome: Outcome = Outcome.OK
    attributes: Mapping[str, str] = field(default_factory=dict)
    loose: bool = False
    inbound: bool = False
    of_secret: bool = False

    def may_be_of(self, grant: Granted, role: str) -> bool:
        """Whether it is of this grant, as far as can be told: what is not is a program's own affair."""
        if not self.loose or self.kind is Kind.TOOL:
            return True
        if self.of_secret:
            return grant.provider != "jwt"
        if self.resource is not None:
            return covers(grant.resource, self.resource)
        # Whoever verifies is asked, whoever holds the grant asks: the other direction is about something else.
        return self.inbound and role == "verifier"


@dataclass(frozen=True, kw_only=True)
class Activity:
    """One activity as it is kept. `role` is in which role `reporter` told it: as an agent, or as a verifier."""

    id: str
    task_id: str
    grant_id: str
    reporter: str
    role: str
    report_sha256: str
    kind: str
    action: str
    resource: str
    scope: str | None
    outcome: str
    trace_id: str | None
    attributes: Mapping[str, str]
    at: datetime
    received_at: datetime

    def says_the_same_as(self, other: Activity) -> bool:
        """Whether it is the other one, told once more: who tells it again may have read the clock again."""
        if abs(self.at - other.at) > TOLD_AGAIN_WITHIN:
            return False
        told = ("grant_id", "kind", "action", "resource", "scope", "outcome", "trace_id", "attributes")
        return all(getattr(self, name) == getattr(other, name) for name in told)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A place in a line of time: after all of an earlier second, and of this one after what was `made` before."""

    at: datetime
    made: str


def beyond(activity: Activity, grant: Granted) -> Iterator[Beyond]:
    """In which ways it is outside of the grant. The store counts by the same rule; a test holds the two together."""
    if not covers(grant.resource, activity.resource):
        yield Beyond.RESOURCE
    if activity.scope is not None and activity.scope not in grant.scopes:
        yield Beyond.SCOPE
    # A credential that does not exist yet cannot be used: within the leeway that is only the reporter's clock. After
    # the end it can be tried, and a second too late is what somebody looks for.
    if grant.issued_at is not None and activity.at < grant.issued_at - LEEWAY:
        yield Beyond.BEFORE_ISSUE
    if activity.at > (grant.revoked_at or grant.expires_at):
        yield Beyond.AFTER_END


def covers(resource: str, used: str) -> bool:
    """Whether what was used is the resource, or lies below it where that is a URL.

    >>> covers("https://crm.example/api", "https://crm.example/api/contacts/7")
    True
    >>> covers("https://crm.example/api", "https://crm.example/api-admin")
    False
    """
    if used == resource:
        return True
    if not resource.startswith(("https://", "http://")) or not used.startswith(resource.rstrip("/") + "/"):
        return False
    # Whoever answers may resolve these, and then it is somewhere else.
    below = used[len(resource.rstrip("/")) :].lower().replace("%2e", ".").replace("%2f", "/").replace("\\", "/")
    return not {"..", "."} & set(below.split("/"))


_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_OPENS = frozenset(
    {
        "auth", "authorization", "bearer", "cookie", "credential", "jwt", "otp", "passphrase", "passwd", "password",
        "pwd", "secret", "signature", "token", "apikey", "accesskey", "encryptionkey", "privatekey", "signingkey",
        "sshkey",
    }
)  # fmt: skip


def is_called_like_a_secret(name: str) -> bool:
    """Whether what has this name is probably something that opens something.

    >>> [is_called_like_a_secret(name) for name in ("apiKey", "db.password", "X-Auth-Token", "usage.input_tokens")]
    [True, True, True, False]
    """
    words = [word.lower() for word in _WORDS.findall(name)]
    return not _OPENS.isdisjoint([*words, *map("".join, pairwise(words))])


# Each begins with what nothing harmless begins with, and has no two ways to match: a long text costs no more than
# reading it.
_SECRET = re.compile(
    r"eyJ[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*"  # a JWT
    r"|\bhv[sbr]\.[A-Za-z0-9_-]{16,}"  # a token of Vault
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_[A-Za-z0-9_]{20,}"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|\bxox[abeprs]-[A-Za-z0-9-]{10,}"
    r"|\bsk-[A-Za-z0-9_-]{20,}"
    r"|(?i:\b(?:bearer|basic|dpop)\s{1,4}(?=[A-Za-z._~+/-]{0,200}[0-9=])[A-Za-z0-9._~+/=-]{8,})"
    r"|-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*"
    r"|(?<=://)[^/\s@]{1,200}@"  # who logs in, in a URL
    r"|(?i:\b(?:password|passwd|pwd|secret|token|api_?key)=)[^\s&;,]+",
    re.DOTALL,
)


def without_secrets(text: str) -> str:
    """The text with what looks like a secret taken out; no promise that nothing is left, which nobody could give.

    >>> without_secrets("GET https://ada:s3cret@crm.example/ with Bearer abcdefgh12345678")
    'GET https://[secret]crm.example/ with [secret]'
    """
    return _SECRET.sub("[secret]", text)


def place_of(resource: str) -> str:
    """A resource without what a URL may carry besides its place: who logs in, a query, a fragment.

    >>> place_of("https://ada:pw@crm.example/api/contacts?token=abc#top")
    'https://crm.example/api/contacts'
    """
    if "://" not in resource:
        return without_secrets(resource)
    try:
        parts = urlsplit(resource)
    except ValueError:
        return without_secrets(re.split(r"[?#]", resource, maxsplit=1)[0])
    return without_secrets(urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")))


def require_in_time(at: datetime, now: datetime) -> None:
    """Refuse a moment that is still to come, or so long ago that nobody should tell of it any more."""
    if at > now + LEEWAY:
        raise Invalid(f"at is {_apart(at - now)} ahead of the broker's clock: set the clock", member="at")
    if at < now - TOLD_WITHIN:
        raise Invalid(f"at is {_apart(now - at)} ago: what was done is told within a day", member="at")


def require_no_secret(attributes: Mapping[str, str]) -> None:
    named = next((name for name in attributes if is_called_like_a_secret(name)), None)
    if named is not None:
        raise Invalid(
            f"attributes: {named[:100]!r} is called like a secret, and none belongs here: leave it out",
            member="attributes",
        )


def _apart(duration: timedelta) -> str:
    return f"{int(duration.total_seconds())} s"
