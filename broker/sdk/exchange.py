"""One call from request to result, without any I/O: a generator says what to do next, a driver does it.

The driver (`broker.sdk.client`, `broker.sdk.aio`) answers `Identify` with the workload token, `Send` with an `Answer`
or with `Lost`, and `Wait` by waiting. Everything decided is decided here: what is sent, what an answer means, what is
tried again. Never repeated: a refusal, and a call whose repetition could make a second thing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlencode, urlsplit

from broker import __version__
from broker.sdk.clock import Timing
from broker.sdk.dpop import DpopKey
from broker.sdk.errors import (
    ApprovalPending,
    BrokerError,
    Conflict,
    Invalid,
    Limited,
    NotAuthenticated,
    NotFound,
    Refused,
    Unreachable,
    invalid,
    no_token,
    not_the_broker,
    printable,
)
from broker.sdk.secret import Secret

T = TypeVar("T")

_ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
_PASSING = frozenset({429, 502, 503, 504})
# A 503 too, and yet an answer: the system outside said no, and says so again within the seconds a repetition waits.
_SETTLED = frozenset({"provider_refused"})
_MAX_TRIES = 10
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 5.0
_VISIBLE_ASCII = re.compile(r"[\x21-\x7e]+")
_ID = re.compile(r"[A-Za-z0-9_-]{1,255}")
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST = re.compile(rf"(?=.{{1,254}}\Z){_LABEL}(?:\.{_LABEL})*\.?")
_SENT_DATE = re.compile(
    r"[A-Z][a-z]{2}, (?P<day>\d\d) (?P<month>[A-Z][a-z]{2}) (?P<year>\d{4}) "
    r"(?P<hour>\d\d):(?P<minute>\d\d):(?P<second>\d\d) GMT",
    re.ASCII,
)
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_PORTS = {"http": 80, "https": 443}
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """`headers` are by lower-case name."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    content: bytes = field(repr=False)
    received_at: datetime

    def at(self) -> datetime:
        """When it was answered, by the broker's clock where it says so: ours may be off by more than a token's life."""
        return http_date(self.headers.get("date")) or self.received_at

    def json(self) -> Any:
        try:
            return json.loads(self.content)
        except (ValueError, RecursionError):
            raise not_the_broker(
                f"the answer ({self.status}) is not JSON: is a proxy or another server at this address?", self.status
            ) from None


@dataclass(frozen=True, kw_only=True)
class Lost:
    """No answer. `why` is a kind of failure, in words."""

    why: str


@dataclass(frozen=True)
class Identify:
    """Hand me the workload token as it is now."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """All of it but what the transport itself needs to say."""

    method: str
    url: str
    headers: Mapping[str, str] = field(repr=False)
    content: bytes | None = field(repr=False)
    timeout_s: float


@dataclass(frozen=True)
class Send:
    request: Request


@dataclass(frozen=True)
class Wait:
    seconds: float


Step = Identify | Send | Wait
Outcome = Secret | Answer | Lost | None


@dataclass(frozen=True, kw_only=True)
class Call(Generic[T]):
    """One verb, ready to be sent as often as need be: the idempotency key is part of it, so that each try has the same.

    `body` and `form` may hold tokens; `secrets` says which, so that no message repeats
    them. `asserted` puts the workload token into the form as `client_assertion`.
    """

    method: str
    path: str
    read: Callable[[Answer], T] = field(repr=False)
    query: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] | None = field(default=None, repr=False)
    form: Mapping[str, str] | None = field(default=None, repr=False)
    asserted: bool = False
    secrets: tuple[Secret, ...] = ()
    idempotency_key: str | None = None
    dpop: DpopKey | None = None
    wait_s: int | None = None  # that the broker may take to answer (RFC 7240)
    repeatable: bool = False
    within_s: float | None = None  # instead of the endpoint's patience, for all tries together


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where the broker is, and how patiently it is asked."""

    origin: str
    timeout_s: float
    retry_deadline_s: float
    timing: Timing
    traceparent: str | None = None


def exchange(call: Call[T], endpoint: Endpoint) -> Generator[Step, Outcome, T]:
    """Send, and again where that is safe, until there is a result or an error."""
    timing = endpoint.timing
    started = timing.monotonic()
    deadline_s = endpoint.retry_deadline_s if call.within_s is None else call.within_s
    longest_s = endpoint.timeout_s if call.within_s is None else min(endpoint.timeout_s, call.within_s)
    nonce: str | None = None
    for tried in range(1, _MAX_TRIES + 1):
        # Asked for on each try: it may have been rotated while we waited.
        token = yield Identify()
        if not isinstance(token, Secret):
            raise TypeError("the driver answered Identify with something else than a token")
        left_s = deadline_s - (timing.monotonic() - started)
        # The first try gets the caller's whole time-out: the deadline is there to bound repetition.
        patience_s = longest_s if tried == 1 else max(0.1, min(longest_s, left_s))
        outcome = yield Send(_request(call, endpoint, token, nonce, patience_s + (call.wait_s or 0)))
        if isinstance(outcome, Answer) and outcome.status in (200, 201, 204):
            return _result(call, outcome)
        if not isinstance(outcome, Answer | Lost):
            raise TypeError("the driver answered Send with something else than an answer")
        error = _error_of(outcome, endpoint, (token, *call.secrets))
        if error.code == "use_dpop_nonce" and call.dpop is not None and nonce is None and isinstance(outcome, Answer):
            # RFC 9449 section 8: refused before any effect, so it is safe to send any call once more.
            nonce = outcome.headers.get("dpop-nonce")
            if nonce is not None and _VISIBLE_ASCII.fullmatch(nonce):
                continue
        left_s = deadline_s - (timing.monotonic() - started)
        pause_s = pause_before_next(call, outcome, tried=tried, left_s=left_s, chance=timing.chance())
        if pause_s is None or error.code in _SETTLED:
            raise error
        yield Wait(pause_s)
    raise error


def pause_before_next(
    call: Call[Any], outcome: Answer | Lost, *, tried: int, left_s: float, chance: float
) -> float | None:
    """How long to wait before the next try; None where there is none."""
    if not call.repeatable or tried >= _MAX_TRIES:
        return None
    asked_s = 0.0
    if isinstance(outcome, Answer):
        if outcome.status not in _PASSING:
            return None
        asked_s = retry_after_s(outcome) or 0
    # Full jitter: clients that failed together must not come back together.
    pause_s = asked_s + chance * min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (tried - 1))
    return pause_s if pause_s < left_s else None


def retry_after_s(answer: Answer) -> int | None:
    """Retry-After in seconds (RFC 9110 section 10.2.3), whichever of its two forms was sent."""
    value = answer.headers.get("retry-after", "")
    if re.fullmatch(r"[0-9]{1,9}", value):
        return int(value)
    at = http_date(value)
    return None if at is None else max(0, int((at - answer.at()).total_seconds()))


def origin_of(url: str) -> str:
    """The broker's address as its origin: https, or plain http on loopback, and nothing after the host."""
    try:
        # What `urlsplit` would take out or read in its own way is refused before: all that reads it must read the same.
        parts = urlsplit(url if _VISIBLE_ASCII.fullmatch(url) else "")
        host, port = parts.hostname or "", parts.port
    except (ValueError, TypeError):
        host = ""
    named = f"[{host}]" if ":" in host else host
    if not _HOST.fullmatch(host) and not _is_ipv6(host):
        raise invalid("the broker's URL is not a URL: give one like https://broker.example", member="url")
    if parts.username is not None or parts.path not in ("", "/") or "?" in url or "#" in url:
        raise invalid("the broker's URL is scheme and host only: leave out user, path, query, fragment", member="url")
    if not is_private(parts.scheme, host):
        shown = printable(f"{parts.scheme}://{host}")
        raise invalid(f"{shown} would send tokens in the clear: use https (http is for loopback only)", member="url")
    if parts.netloc.lower() not in (named, f"{named}:{port}"):
        raise invalid("the broker's URL is not a URL: give one like https://broker.example", member="url")
    return f"{parts.scheme}://{named}" + ("" if port in (None, _PORTS[parts.scheme]) else f":{port}")


def is_private(scheme: str, host: str) -> bool:
    """Whether nobody on the way can read what is sent there."""
    if not host:
        return False
    if scheme == "https":
        return True
    return scheme == "http" and (host in _LOOPBACK or _is_loopback(host))


def _is_loopback(host: str) -> bool:
    import ipaddress  # most that are here are in no need of it

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_ipv6(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).version == 6 and "%" not in host
    except ValueError:
        return False


def workload_token(text: str, source: str) -> Secret:
    """One token and nothing else; a line end after it is forgiven, because every tool that writes files leaves one."""
    stripped = text.strip()
    if not stripped:
        raise no_token(f"{source} is empty: put one workload token there")
    if len(stripped.splitlines()) > 1:
        raise no_token(f"{source} holds more than one line: put one workload token there and nothing else")
    if not _VISIBLE_ASCII.fullmatch(stripped):
        raise no_token(f"{source} holds blanks or characters that no token has: put one workload token there")
    return Secret(stripped)


def token_from_file(path: Path) -> Secret:
    source = f"the token file {printable(str(path))}"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise no_token(f"{source} does not exist: is the volume with the workload token mounted?") from None
    except UnicodeDecodeError:
        # Outside of the handler this error would hold the bytes.
        text = ""
    except OSError as problem:
        raise no_token(f"{source} cannot be read: {problem.strerror}") from None
    else:
        return workload_token(text, source)
    raise no_token(f"{source} is not text: put one workload token there")


def require_traceparent(value: str | None) -> str | None:
    if value is not None and not _TRACEPARENT.fullmatch(value):
        raise invalid("traceparent is not one of W3C Trace Context: 00-<32 hex>-<16 hex>-<2 hex>", member="traceparent")
    return value


def require_id(value: str, member: str) -> str:
    # An id becomes a path segment: "../lockdowns" must not become another route.
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise invalid(f"{member} is not an id of the broker", member=member)
    return value


def require_idempotency_key(value: str) -> str:
    if len(value) > 255 or not _VISIBLE_ASCII.fullmatch(value):
        raise invalid("an idempotency key is 1 to 255 visible ASCII characters", member="Idempotency-Key")
    return value


def user_agent() -> str:
    return f"agent-credential-broker-sdk/{__version__}"


def _request(call: Call[Any], endpoint: Endpoint, token: Secret, nonce: str | None, timeout_s: float) -> Request:
    url = endpoint.origin + call.path + (f"?{urlencode(call.query)}" if call.query else "")
    headers = {"Accept": "application/json", "User-Agent": user_agent()}
    content: bytes | None = None
    if call.form is not None:
        form = dict(call.form)
        if call.asserted:
            form |= {"client_assertion_type": _ASSERTION_TYPE, "client_assertion": token.reveal()}
        headers["Content-Type"] = "application/x-www-form-urlencoded"
        content = urlencode(form).encode()
    else:
        headers["Authorization"] = f"Bearer {token.reveal()}"
        if call.body is not None:
            headers["Content-Type"] = "application/json"
            content = _encoded(call.body)
    if call.idempotency_key is not None:
        headers["Idempotency-Key"] = call.idempotency_key
    if call.wait_s is not None:
        headers["Prefer"] = f"wait={call.wait_s}"
    if call.dpop is not None:
        headers["DPoP"] = call.dpop.proof(call.method, url, nonce=nonce)
    if endpoint.traceparent is not None:
        headers["traceparent"] = endpoint.traceparent
    return Request(method=call.method, url=url, headers=headers, content=content, timeout_s=timeout_s)


def _encoded(body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(body, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        problem = invalid("the request holds something that JSON has no word for", member="body")
    # Outside of the handler: the error that json raised may quote the value.
    raise problem


def _result(call: Call[T], answer: Answer) -> T:
    try:
        return call.read(answer)
    except BrokerError as problem:
        error = problem
    # Without its frames: they hold the answer in parts, and an answer may hold a credential (INV-30).
    error.__context__ = None
    raise error.with_traceback(None)


_ERRORS: Mapping[int, type[BrokerError]] = {
    400: Invalid,
    401: NotAuthenticated,
    403: Refused,
    404: NotFound,
    405: Invalid,
    409: Conflict,
    413: Invalid,
    415: Invalid,
    422: Invalid,
    502: Unreachable,
    503: Unreachable,
    504: Unreachable,
}
_OAUTH_REFUSALS = frozenset({"access_denied", "unauthorized_client"})


def _error_of(outcome: Answer | Lost, endpoint: Endpoint, sent: tuple[Secret, ...]) -> BrokerError:
    if isinstance(outcome, Lost):
        return Unreachable("unreachable", f"No answer from {endpoint.origin}", outcome.why)
    status = outcome.status
    if 300 <= status < 400:
        return not_the_broker(
            f"{endpoint.origin} answers with a redirect ({status}), and a token is never taken elsewhere: "
            "give the broker's own address",
            status,
        )
    problem = _problem(outcome, sent)
    code = _member(problem, "code") or _member(problem, "error") or f"http_{status}"
    title = _member(problem, "title") or f"The broker answered {status}"
    detail = _member(problem, "detail") or _member(problem, "error_description") or ""
    if status == 202:
        detail = "people are asked first: collect the grant's credential once they have said yes"
        if isinstance(approval := problem.get("approval"), dict) and approval.get("state") == "approved":
            detail = "people have said yes: collect the grant's credential"
        return ApprovalPending(
            "approval_pending", "Approval is needed", detail, status, problem, retry_after_s(outcome)
        )
    if status == 429:
        return Limited(code, title, detail, status, problem, retry_after_s(outcome))
    if status < 400:
        return not_the_broker(f"status {status} is no answer the protocol knows", status)
    if code in _OAUTH_REFUSALS:
        return Refused(code, title, detail, status, problem)
    return _ERRORS.get(status, BrokerError)(code, title, detail, status, problem)


def _problem(answer: Answer, sent: tuple[Secret, ...]) -> Mapping[str, Any]:
    """The problem document, or nothing where something else answered; a token that was echoed is taken out of it."""
    clean = answer.content
    for secret in sent:
        clean = clean.replace(secret.reveal().encode(), b"[secret]")
    try:
        found = json.loads(clean)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _member(problem: Mapping[str, Any], name: str) -> str | None:
    value = problem.get(name)
    return printable(value) if isinstance(value, str) and value else None


def http_date(value: str | None) -> datetime | None:
    """A date of HTTP (RFC 9110 section 5.6.7): in the form that is sent, or in one of those that may still be met."""
    if not value:
        return None
    sent = _SENT_DATE.fullmatch(value)
    try:
        if sent and sent["month"] in _MONTHS:
            year, day, hour, minute, second = (int(sent[name]) for name in ("year", "day", "hour", "minute", "second"))
            return datetime(year, 1 + _MONTHS.index(sent["month"]), day, hour, minute, second, tzinfo=UTC)
        # Loaded for what is hardly ever met: it takes half as long as all else here.
        from email.utils import parsedate_to_datetime

        at = parsedate_to_datetime(value)
        return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
