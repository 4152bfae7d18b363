"""Reading requests strictly: one way to say a thing, and a sentence for every other (RFC 8259, RFC 6749 appendix B).

A member twice, a parameter twice, an unknown name, a wrong type: refused with the name and the remedy. What a lenient
reader would pick for us, somebody else's reader picks otherwise.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from pydantic import BaseModel, ValidationError
from werkzeug.wsgi import get_input_stream

from broker.domain import strict_json
from broker.domain.errors import Invalid
from broker.domain.grant import IdempotencyClaim
from broker.domain.identity import Caller
from broker.web.context import bodies, current
from broker.web.plain import NOT_PLAIN

MAX_BODY_BYTES = 65_536
LONGEST_WAIT_S = 20
_MAX_PARAMETERS = 64
_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
# Version 00 has four fields and no more; of a later version we read the four it has in common with that.
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}((?<!^00.{53})-.*)?"
)
_WAIT = re.compile(r"wait[ \t]*=[ \t]*([0-9]{1,9})(?:[ \t]*;.*)?", re.ASCII | re.IGNORECASE)
_NOT_PLAIN = re.compile(f"[{NOT_PLAIN}]")

Body = TypeVar("Body", bound=BaseModel)


class UnsupportedMediaType(Exception):
    """The body is of another content type than the one this endpoint reads."""

    def __init__(self, wanted: str) -> None:
        super().__init__(wanted)
        self.wanted = wanted


class TooLarge(Exception):
    """The body is longer than is read."""


def raw_body(caller: Caller | None, *, ends: bool = False, max_bytes: int = MAX_BODY_BYTES) -> bytes:
    """The whole body; refused before it can fill memory, and never cut off: half a request is another request.

    `caller` and `ends` say in which lane it is waited for (`broker.web.bodies`).
    """
    call = current()
    length = call.content_length
    if length is not None and length > max_bytes:
        raise TooLarge
    if not length and call.header("Transfer-Encoding") is None:
        return b""
    # One more, because a body without a length is cut off there without a word, and we must see that there was more.
    stream = get_input_stream(call.environ, max_content_length=max_bytes + 1)

    def read() -> bytes:
        raw = bytearray()
        # One read may give less than there is, where a body comes in chunks and says no length.
        while len(raw) <= max_bytes and (part := stream.read(max_bytes + 1 - len(raw))):
            raw += part
        return bytes(raw)

    raw = bodies().read(read, caller, ends=ends)
    call.body_was_read = True
    if len(raw) > max_bytes:
        raise TooLarge
    if length is not None and len(raw) != length:
        raise Invalid(f"the body ended after {len(raw)} of {length} bytes: send all that Content-Length says")
    return raw


def json_body(model: type[Body], raw: bytes, *, optional: bool) -> Body:
    """The body as `model`; an empty one counts as `{}` where every member is optional."""
    if not raw and optional:
        return model()
    if current().mimetype != "application/json":
        raise UnsupportedMediaType("application/json")
    value = strict_json.loads(raw, max_bytes=MAX_BODY_BYTES)
    if not isinstance(value, dict):
        raise Invalid(f"the body is {_json_type(value)}: send a JSON object")
    try:
        return model.model_validate(value)
    except ValidationError as problems:
        raise invalid(problems) from None


def query(model: type[Body]) -> Body:
    """The query string as `model`."""
    given = _once(_pairs(current().query_string, "the query is not well-formed text in UTF-8"))
    try:
        return model.model_validate(given)
    except ValidationError as problems:
        raise invalid(problems) from None


def text_query() -> dict[str, str]:
    """The query string where names that nobody knows are ignored."""
    return _once(_pairs(current().query_string, "the query is not well-formed text in UTF-8"))


def form(raw: bytes) -> dict[str, str]:
    """The parameters of an OAuth request. Unknown ones are ignored, as RFC 6749 section 3.2 asks."""
    call = current()
    if call.query_string:
        raise Invalid("parameters belong into the body: a query string ends up in logs")
    if call.mimetype != "application/x-www-form-urlencoded":
        raise Invalid("send the parameters as application/x-www-form-urlencoded")
    values = _once(_pairs(raw, "the body is not well-formed application/x-www-form-urlencoded text in UTF-8"))
    for name, value in values.items():
        # The first half says the same of what nearly every value is, and a token is looked through in no time.
        if not (value.isascii() and value.isprintable()) and _NOT_PLAIN.search(value):
            raise Invalid(f"{printable(name)} holds a control or format character", member=printable(name))
    # RFC 6749 section 3.1: a parameter without a value counts as absent.
    return {name: value for name, value in values.items() if value}


def _pairs(raw: bytes, otherwise: str) -> list[tuple[str, str]]:
    """Names and values, in their order; a lenient reader would repair what is refused here, each in its own way."""
    try:
        return parse_qsl(
            raw.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=bool(raw),
            errors="strict",
            max_num_fields=_MAX_PARAMETERS,
        )
    except ValueError:
        raise Invalid(otherwise) from None


def _once(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    values: dict[str, str] = {}
    for name, value in pairs:
        if name in values:
            raise Invalid(f"{printable(name)} is given more than once", member=printable(name))
        values[name] = value
    return values


def idempotency() -> IdempotencyClaim | None:
    """The Idempotency-Key with what it stands for: this path and this body."""
    call = current()
    key = call.header("Idempotency-Key")
    if key is None:
        return None
    if not _IDEMPOTENCY_KEY.fullmatch(key):
        raise Invalid(
            "Idempotency-Key is one to 255 printable ASCII characters without a blank", member="Idempotency-Key"
        )
    whole = f"{call.path}\n".encode() + call.raw_body
    return IdempotencyClaim(
        key_sha256=hashlib.sha256(key.encode()).hexdigest(), request_sha256=hashlib.sha256(whole).hexdigest()
    )


def preferred_wait_s() -> int:
    """How long the caller would rather wait than hear nothing new (RFC 7240), at most `LONGEST_WAIT_S`; 0 for not.

    What is no preference of this kind is ignored, as the standard asks.
    """
    for preference in (current().header("Prefer") or "").split(","):
        found = _WAIT.fullmatch(preference.strip(" \t"))
        if found is not None:
            return min(int(found[1]), LONGEST_WAIT_S)
    return 0


def trace_id_of(traceparent: str) -> str | None:
    """The trace id of a valid `traceparent` (W3C Trace Context); an invalid one is ignored, as the standard asks."""
    found = _TRACEPARENT.fullmatch(traceparent)
    return None if found is None else found[1]


def invalid(problems: ValidationError) -> Invalid:
    """The first problem as ours: which member, what was wrong, what to do; never the value of a secret."""
    first = problems.errors(include_url=False, include_context=False, include_input=False)[0]
    member = ".".join(str(part) for part in first["loc"]) or "body"
    sentence = {
        "extra_forbidden": "is not a member of this request: leave it out",
        "missing": "is missing",
    }.get(first["type"], first["msg"][:1].lower() + first["msg"][1:])
    return Invalid(f"{printable(member)}: {sentence}", member=printable(member))


def printable(text: str, longest: int = 200) -> str:
    """Somebody else's text as it may stand in an answer or a log line (INV-31)."""
    return _NOT_PLAIN.sub("?", text.encode(errors="replace").decode())[:longest]


def is_plain(text: str) -> bool:
    """Whether it may stand in an answer or a log line as it is."""
    return not _NOT_PLAIN.search(text)


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
