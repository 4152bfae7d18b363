"""The words of Shared Signals (OpenID SSF 1.0, CAEP 1.0, RISC 1.0): event types, subjects (RFC 9493), streams.

What a feed event is in these words, which subject covers which, and what a receiver may ask of a stream. A subject
names what stands in a token and nothing else; why and by whom something ended is told to nobody.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from broker.domain.audit import canonical_json
from broker.domain.catalogue import TrustedIssuer
from broker.domain.clock import epoch
from broker.domain.errors import Invalid
from broker.domain.lifecycle import StreamState

SET_TYPE = "secevent+jwt"
MEDIA_TYPE = f"application/{SET_TYPE}"
SPEC_VERSION = "1_0"

_SSF = "https://schemas.openid.net/secevent/ssf/event-type"
_CAEP = "https://schemas.openid.net/secevent/caep/event-type"
_RISC = "https://schemas.openid.net/secevent/risc/event-type"
VERIFICATION = f"{_SSF}/verification"
STREAM_UPDATED = f"{_SSF}/stream-updated"
SESSION_REVOKED = f"{_CAEP}/session-revoked"
CREDENTIAL_CHANGE = f"{_CAEP}/credential-change"
RISK_LEVEL_CHANGE = f"{_CAEP}/risk-level-change"
ACCOUNT_DISABLED = f"{_RISC}/account-disabled"
CREDENTIAL_COMPROMISE = f"{_RISC}/credential-compromise"

# What the broker tells of, and what it acts on when others tell it, by the name configuration gives it.
TOLD = (SESSION_REVOKED, CREDENTIAL_CHANGE)
HEARD: Mapping[str, str] = {
    name.rpartition("/")[2]: name
    for name in (SESSION_REVOKED, ACCOUNT_DISABLED, CREDENTIAL_COMPROMISE, RISK_LEVEL_CHANGE)
}
REVOKING = ("session-revoked", "account-disabled", "credential-compromise")
# Members of the complex subjects we send: who cannot read one must not take the subject for a wider one.
CRITICAL_MEMBERS = ("application", "group", "session", "tenant")

Subject = Mapping[str, Any]
Claims = Mapping[str, Any]


class Delivery(StrEnum):
    """How a stream is delivered; `uri` is what the standards call it."""

    PUSH = "push"
    POLL = "poll"

    @property
    def uri(self) -> str:
        return {"push": "urn:ietf:rfc:8935", "poll": "urn:ietf:rfc:8936"}[self]


# --- what is told ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Told:
    """One event of a SET. `axis` and `value` say whom it concerns; the axis is None where it concerns everybody."""

    type: str
    subject: Subject
    event: Mapping[str, Any]
    axis: str | None = None
    value: str = ""


_GRANT = "The broker ended this grant."
_TASK = "The task ended, and every grant under it."
_TOKENS = {
    "agent": "Everything the broker issued to this agent until then was revoked.",
    "user": "Everything the broker issued on behalf of this user until then was revoked.",
    "resource": "Everything the broker issued for this resource until then was revoked.",
    "all": "Everything the broker issued until then was revoked.",
}
_LISTS = "Some of what the broker issued was revoked; which, only status lists and introspection say."
_LOST = "Events before this one are not kept any more; what is live, status lists and introspection say."
_KEY = "A signing key of the broker is no longer trusted, nor is anything it signed."


def told_of(issuer: str, at: datetime, event: Mapping[str, Any]) -> Told:
    """What a feed event is in the words of CAEP. Of a kind we do not know, everybody is sent to ask.

    `issuer` is the broker: a user and an agent are called what its tokens call them, as subjects of its own.
    """
    when = {"event_timestamp": epoch(at)}
    match event:
        case {"kind": "grant", "grant_id": str(grant_id)}:
            return _revoked(_complex(session=_opaque(grant_id)), _GRANT, when, "grant", grant_id)
        case {"kind": "task", "task_id": str(task_id)}:
            return _revoked(_complex(group=_opaque(task_id)), _TASK, when, "task", task_id)
        case {"kind": "tokens", "key": str(kid)}:
            change = {"credential_type": "jwk", "change_type": "revoke", "friendly_name": kid, **_because(_KEY), **when}
            return Told(type=CREDENTIAL_CHANGE, subject=everything_of(issuer), event=change)
        case {"kind": "tokens", "issued_before": int(before), "all": True}:
            return _revoked(everything_of(issuer), _TOKENS["all"], {**when, "issued_before": before})
        case {"kind": "tokens", "issued_before": int(before), "resource": str(resource)}:
            application = _complex(application={"format": "uri", "uri": resource})
            members = {**when, "issued_before": before}
            return _revoked(application, _TOKENS["resource"], members, "resource", resource)
        case {"kind": "tokens", "issued_before": int(before)} if "agent" in event or "user" in event:
            axis = "agent" if "agent" in event else "user"
            named = str(event[axis])
            subject = {"format": "iss_sub", "iss": issuer, "sub": named}
            return _revoked(subject, _TOKENS[axis], {**when, "issued_before": before}, axis, named)
    return lost(issuer, at, reason=_LISTS)


def lost(issuer: str, at: datetime, *, reason: str = _LOST) -> Told:
    """Where nobody can say what ended: whoever cannot ask has to take all of it for ended."""
    return _revoked(everything_of(issuer), reason, {"event_timestamp": epoch(at), "issued_before": epoch(at) + 1})


def everything_of(issuer: str) -> Subject:
    return _complex(tenant=_opaque(issuer))


def stream_subject(stream_id: str) -> Subject:
    return _opaque(stream_id)


def _revoked(
    subject: Subject, reason: str, members: Mapping[str, Any], axis: str | None = None, value: str = ""
) -> Told:
    event = {**_because(reason), **members}
    return Told(type=SESSION_REVOKED, subject=subject, event=event, axis=axis, value=value)


def _because(reason: str) -> Mapping[str, Any]:
    return {"reason_admin": {"en": reason}}


def _opaque(id_: str) -> Subject:
    return {"format": "opaque", "id": id_}


def _complex(**members: Subject) -> Subject:
    return {"format": "complex", **members}


def transaction_of(feed_id: str, seq: int) -> str:
    """The `txn` of a feed event: the same for every receiver, and it does not count for them what they are not told."""
    return hashlib.sha256(f"{feed_id}:{seq}".encode()).hexdigest()[:32]


# --- subjects --------------------------------------------------------------------------------------------------------

_MEMBERS: Mapping[str, tuple[str, ...]] = {
    "account": ("uri",),
    "did": ("url",),
    "email": ("email",),
    "iss_sub": ("iss", "sub"),
    "jwt_id": ("iss", "jti"),
    "opaque": ("id",),
    "phone_number": ("phone_number",),
    "saml_assertion_id": ("issuer", "assertion_id"),
    "uri": ("uri",),
}
_MOST_SUBJECT_BYTES = 4096
_MOST_MEMBERS = 20


def subject_of(value: Any, *, nested: bool = False) -> Subject:
    """A subject identifier as RFC 9493 and SSF have it; Invalid for what breaks the rules of its own format.

    A format we do not know is nothing we could say anything of, and not wrong.
    """
    if not isinstance(value, Mapping) or not isinstance(value.get("format"), str) or not value["format"]:
        raise Invalid("subject is an object with a format (RFC 9493)", member="subject")
    format_, members = value["format"], {name: member for name, member in value.items() if name != "format"}
    if len(members) > _MOST_MEMBERS or len(_canonical(value)) > _MOST_SUBJECT_BYTES:
        raise Invalid(f"subject has more than {_MOST_SUBJECT_BYTES} bytes or {_MOST_MEMBERS} members", member="subject")
    if format_ == "complex" and not nested:
        if not members:
            raise Invalid("a complex subject names at least one member", member="subject")
        for member in members.values():
            subject_of(member, nested=True)
    elif format_ == "aliases" and not nested:
        identifiers = members.get("identifiers")
        if set(members) != {"identifiers"} or not isinstance(identifiers, list) or not identifiers:
            raise Invalid("aliases has a list of identifiers, and nothing else", member="subject")
        for identifier in identifiers:
            subject_of(identifier, nested=True)
    elif format_ in _MEMBERS:
        wanted = _MEMBERS[format_]
        if set(members) != set(wanted) or not all(isinstance(members[name], str) and members[name] for name in wanted):
            raise Invalid(f"{format_} has {' and '.join(wanted)}, and nothing else", member="subject")
    elif format_ in ("complex", "aliases"):
        raise Invalid(f"{format_} does not stand within another subject", member="subject")
    return value


def _canonical(value: Any) -> bytes:
    try:
        return canonical_json(value)
    except (TypeError, ValueError):
        raise Invalid("subject holds a number that is not whole", member="subject") from None


def key_of(subject: Subject) -> str:
    """The same for subjects that are exactly identical, and for no others."""
    return hashlib.sha256(_canonical(subject)).hexdigest()


def could_be_told_of(subject: Subject) -> bool:
    """Whether an event of ours could be about exactly this, so that its removal is worth remembering."""
    if subject.get("format") == "complex":
        return len(subject) == 2 and set(subject) - {"format"} <= set(CRITICAL_MEMBERS)
    return subject.get("format") == "iss_sub"


# --- streams ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One receiver's stream. Events of the feed up to `seq` of `feed_id` are told on it, or wait to be."""

    id: str
    receiver: str
    state: StreamState
    reason: str | None
    set_by: str
    method: Delivery
    endpoint_url: str | None
    events_requested: tuple[str, ...] | None
    description: str | None
    feed_id: str
    seq: int
    failures: int
    trouble: str | None
    created_at: datetime
    active_at: datetime
    progress_at: datetime
    verified_at: datetime | None
    sealed_authorization: bytes | None = field(default=None, repr=False)

    @property
    def pushed_to(self) -> str | None:
        """The host alone: for some receivers the whole address is all that is needed to write there."""
        return None if self.endpoint_url is None else urlsplit(self.endpoint_url).hostname

    @property
    def delivered(self) -> tuple[str, ...]:
        """The event types told on it, in our order; all of them where the receiver did not choose."""
        return TOLD if self.events_requested is None else tuple(name for name in TOLD if name in self.events_requested)


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a receiver wants its stream to be; `authorization` opens the receiver, and is sealed at once."""

    method: Delivery
    endpoint_url: str | None
    authorization: Any = field(default=None, repr=False)  # a Secret
    events_requested: tuple[str, ...] | None = None
    description: str | None = None


@dataclass(frozen=True, kw_only=True)
class StreamBounds:
    """What one broker allows of every stream."""

    most_waiting: int = 1000
    min_verification_interval: timedelta = timedelta(seconds=10)
    inactivity_timeout: timedelta = timedelta(days=7)


def set_claims(
    *,
    issuer: str,
    audience: str,
    jti: str,
    at: datetime,
    type_: str,
    subject: Subject,
    event: Mapping[str, Any],
    transaction: str | None = None,
) -> Claims:
    """The claims of a SET (RFC 8417) as SSF profiles it: one event, no `sub`, no `exp`."""
    claims: dict[str, Any] = {"iss": issuer, "aud": audience, "iat": epoch(at), "jti": jti}
    if transaction is not None:
        claims["txn"] = transaction
    return {**claims, "sub_id": subject, "events": {type_: event}}


# --- what is heard ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Transmitter:
    """Somebody whose SETs we believe, of what and about whom. `speaks_of` are names of issuers.

    `keys` says where its keys come from, in the words of a trusted issuer.
    """

    name: str
    keys: TrustedIssuer
    audience: str
    events: frozenset[str]
    speaks_of: tuple[str, ...]
    max_age: timedelta = timedelta(days=1)
    lockdown_on: frozenset[str] = frozenset()
    risk_lasts: timedelta = timedelta(hours=1)
    poll_url: str | None = None
    poll_token_file: str | None = None

    @property
    def issuer(self) -> str:
        return self.keys.issuer

    @property
    def actor(self) -> str:
        """Who acts when it is believed. No principal's name has a colon."""
        return f"transmitter:{self.name}"


def identifiers_in(subject: Subject) -> Iterator[Subject]:
    """The identifiers of whoever a subject is about: of a complex one its user, or else its application.

    A session, a device or a tenant of theirs is nothing we know: what narrows a subject for others does not for us.
    """
    if subject.get("format") == "complex":
        chosen = subject.get("user", subject.get("application"))
        if not isinstance(chosen, Mapping):
            return
        subject = chosen
    if subject.get("format") == "aliases":
        yield from (one for one in subject["identifiers"] if isinstance(one, Mapping))
    else:
        yield subject


LEVELS: Mapping[str, str] = {"LOW": "low", "MEDIUM": "medium", "HIGH": "high"}

# RFC 8935 section 2.4.
ERRORS = (
    "invalid_request",
    "invalid_key",
    "invalid_issuer",
    "invalid_audience",
    "authentication_failed",
    "access_denied",
)
# What is wrong there may be mended on either side, and the SET be taken then; the rest is about the SET itself.
WORTH_REPEATING = ("invalid_key", "authentication_failed", "access_denied")
_CODE = re.compile(r"[A-Za-z0-9_-]{1,64}")


def error_code(value: Any) -> str:
    """The `err` of a receiver as it may stand in a log: theirs where it looks like one."""
    return value if isinstance(value, str) and _CODE.fullmatch(value) else "none"


def strings(value: Any, member: str, *, most: int, longest: int) -> Sequence[str]:
    """A list of so many different strings at most, of so many characters; Invalid for anything else."""
    listed = isinstance(value, list) and all(isinstance(one, str) and 0 < len(one) <= longest for one in value)
    if not listed or len(value) > most:
        raise Invalid(f"{member} is a list of at most {most} strings of 1 to {longest} characters", member=member)
    return tuple(dict.fromkeys(value))
