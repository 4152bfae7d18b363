"""`POST /v1/traces`: OTLP/HTTP (OpenTelemetry Protocol 1.x), so that an exporter of spans is all that a program needs.

In binary or in JSON, compressed or not; the answer is of the kind of the request. Spans of a program's own affairs are
taken and not kept. Nothing is read before it is known that its sender may tell, and nothing is unpacked or parsed
without end (INV-35): a few bytes spell a million spans, so what a body holds is counted before it is parsed.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from flask import Blueprint, Response
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service
from opentelemetry.proto.common.v1 import common_pb2 as common
from opentelemetry.proto.trace.v1 import trace_pb2 as trace

from broker.domain import strict_json
from broker.domain.activity import MAX_TOGETHER
from broker.domain.clock import from_epoch
from broker.domain.errors import BrokerError, Invalid
from broker.domain.span import READ, SCOPE, Span, report_of
from broker.services.activities import Told
from broker.web import auth, envelope
from broker.web.context import broker, current
from broker.web.reading import TooLarge, UnsupportedMediaType, printable, raw_body

otlp = Blueprint("otlp", __name__)

_Level: TypeAlias = Mapping[int, "_Level"]

PATH = "/v1/traces"
PROTOBUF, JSON = "application/x-protobuf", "application/json"
MAX_SENT_BYTES = 1_048_576
MAX_UNPACKED_BYTES: Mapping[str, int] = {
    PROTOBUF: 1_048_576,
    JSON: 4_194_304,
}  # in JSON the same is several times as long
MAX_SPANS = MAX_TOGETHER
MAX_FIELDS = 32_768  # of protobuf, in spans and around them
MAX_VALUES = 65_536  # of JSON
_WINDOW = {"gzip": 31, "deflate": 15}  # what zlib calls the two
_SCOPE_TOKEN = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]{1,200}")
_INBOUND = (trace.Span.SPAN_KIND_SERVER, trace.Span.SPAN_KIND_CONSUMER)
_TRACE_ID, _SPAN_ID = re.compile(r"(?!0{32})[0-9a-f]{32}"), re.compile(r"(?!0{16})[0-9a-f]{16}")
_LONGEST = 1000
_REASONS_SHOWN = 3
# google.rpc.Code, in which OTLP wants a refusal said.
_CODES: Mapping[int, int] = {400: 3, 401: 16, 403: 7, 404: 5, 409: 10, 413: 3, 415: 3, 429: 8, 503: 14}
_INTERNAL = 13


@otlp.post(PATH)
def take_spans() -> Response:
    in_json = current().mimetype != PROTOBUF
    try:
        answer = _take()
    except Exception as problem:
        return _refusal(problem, in_json=in_json)
    if in_json:
        return Response(json_format.MessageToJson(answer, indent=None), mimetype=JSON)
    return Response(answer.SerializeToString(), mimetype=PROTOBUF)


def _take() -> service.ExportTraceServiceResponse:
    caller = auth.caller()
    broker().activities.require_reporter(caller)
    if current().query_string:
        raise Invalid("this request takes no query")
    kind, encoding = current().mimetype, current().header("Content-Encoding")
    if kind not in MAX_UNPACKED_BYTES:
        raise UnsupportedMediaType(f"{PROTOBUF} or {JSON}")
    raw = raw_body(caller, max_bytes=MAX_SENT_BYTES)
    taken = broker().activities.take_read(caller, lambda: _told_in(raw, encoding, kind))
    answer = service.ExportTraceServiceResponse()
    rejected = len(taken.refused) + taken.malformed
    if rejected:
        why = list(dict.fromkeys(refused.why.detail for refused in taken.refused))[:_REASONS_SHOWN]
        if taken.malformed:
            why.append("a span has an id of 8 bytes, and one of 16 for its trace")
        answer.partial_success.rejected_spans = rejected
        answer.partial_success.error_message = "; ".join(why)
    return answer


def _told_in(raw: bytes, encoding: str | None, kind: str) -> Told:
    unpacked = _unpacked(raw, encoding, max_bytes=MAX_UNPACKED_BYTES[kind])
    spans = list(_in_json(unpacked) if kind == JSON else _in_protobuf(unpacked))
    whole = [span for span in spans if span is not None]
    reports = [report for span in whole if (report := report_of(span)) is not None]
    return Told(reports=reports, passed_over=len(whole) - len(reports), malformed=len(spans) - len(whole))


def _unpacked(raw: bytes, encoding: str | None, *, max_bytes: int) -> bytes:
    """The body as it was before it was packed, up to a bound: of a few bytes somebody can make gigabytes."""
    name = (encoding or "identity").strip().lower()
    if name == "identity":
        return raw
    if name not in _WINDOW:
        raise UnsupportedMediaType("gzip, deflate, or not compressed")
    unpacking = zlib.decompressobj(wbits=_WINDOW[name])
    try:
        unpacked = unpacking.decompress(raw, max_bytes + 1)
    except zlib.error:
        raise Invalid(f"the body is not {name}, which Content-Encoding says it is") from None
    if len(unpacked) > max_bytes:
        raise TooLarge
    if not unpacking.eof or unpacking.unused_data:
        raise Invalid(f"the body is not one whole {name} stream")
    return unpacked


def _in_protobuf(raw: bytes) -> Iterator[Span | None]:
    """Each span; None for one without an id."""
    _require_few(raw)
    try:
        request = service.ExportTraceServiceRequest.FromString(raw)
    except DecodeError:
        raise Invalid(_NOT_PROTOBUF) from None
    for of_resource in request.resource_spans:
        around = _told(_looked_at(of_resource.resource.attributes))
        for span in (span for of_scope in of_resource.scope_spans for span in of_scope.spans):
            yield _span(
                span.trace_id.hex(),
                span.span_id.hex(),
                name=span.name,
                started_ns=span.start_time_unix_nano,
                failed=span.status.code == trace.Status.STATUS_CODE_ERROR,
                inbound=span.kind in _INBOUND,
                attributes=_told(_looked_at(span.attributes)),
                around=around,
            )


# What is walked through: by the number of a field, what lies in it. What is in an attribute, an event or a link is left
# to the parser, which makes no more of it than some multiple of its bytes.
_SPAN: _Level = {}
_REQUEST: _Level = {1: {1: {}, 2: {2: _SPAN}}}
_FIXED_LENGTH = {1: 8, 5: 4}  # in bytes, by the type on the wire
_NOT_PROTOBUF = "the body is not an ExportTraceServiceRequest in protobuf, or is nested too deep"


def _require_few(raw: bytes) -> None:
    """Refuse too many spans or fields by the bytes on the wire: parsed, an empty span of two bytes takes a hundred."""
    spans = fields = 0
    left: list[tuple[int, int, _Level]] = [(0, len(raw), _REQUEST)]
    while left:
        at, end, level = left.pop()
        while at < end:
            fields += 1
            if fields > MAX_FIELDS:
                raise Invalid(f"more than {MAX_FIELDS} fields: send fewer spans at once")
            tag, at = _varint_at(raw, at, end)
            wire = tag & 7
            if wire == 0:
                _, at = _varint_at(raw, at, end)
                continue
            if wire == 2:
                length, at = _varint_at(raw, at, end)
                inner = level.get(tag >> 3)
                if inner is not None:
                    spans += inner is _SPAN
                    if spans > MAX_SPANS:
                        raise Invalid(f"more than {MAX_SPANS} spans: send fewer at once")
                    left.append((at, at + length, inner))
            elif wire in _FIXED_LENGTH:
                length = _FIXED_LENGTH[wire]
            else:
                raise Invalid(_NOT_PROTOBUF)
            at += length
            if at > end:
                raise Invalid(_NOT_PROTOBUF)


def _varint_at(raw: bytes, at: int, end: int) -> tuple[int, int]:
    """The number that begins there, and where the next thing does."""
    value = shift = 0
    for place in range(at, min(at + 10, end)):
        value |= (raw[place] & 0x7F) << shift
        if raw[place] < 0x80:
            return value, place + 1
        shift += 7
    raise Invalid(_NOT_PROTOBUF)


def _looked_at(attributes: Iterable[common.KeyValue]) -> Iterator[tuple[str, str | None]]:
    return ((each.key, _text(each.value)) for each in attributes if each.key in READ)


def _text(value: common.AnyValue) -> str | None:
    kind = value.WhichOneof("value")
    if kind == "bool_value":
        return "true" if value.bool_value else "false"
    return str(getattr(value, kind)) if kind in ("string_value", "int_value", "double_value") else None


def _in_json(raw: bytes) -> Iterator[Span | None]:
    """The same of OTLP's JSON: ids in hexadecimal, 64-bit numbers as text or as numbers, unknown members ignored."""
    # A value stands first in something that opens, or after a comma: there are no more of them than of these marks.
    if _count(raw, b"{[,") > MAX_VALUES or _count(raw, b'"]}') > 4 * MAX_VALUES:
        raise Invalid(f"more than {MAX_VALUES} values: send fewer spans at once")
    document = strict_json.loads(raw, max_bytes=MAX_UNPACKED_BYTES[JSON])
    spans = 0
    for of_resource in _listed(_object(document), "resourceSpans"):
        around = _attributes(_object(of_resource.get("resource", {})))
        for span in (span for of_scope in _listed(of_resource, "scopeSpans") for span in _listed(of_scope, "spans")):
            spans += 1
            if spans > MAX_SPANS:
                raise Invalid(f"more than {MAX_SPANS} spans: send fewer at once")
            yield _span(
                str(span.get("traceId")).lower(),
                str(span.get("spanId")).lower(),
                name=str(span.get("name", "")),
                started_ns=_number(span.get("startTimeUnixNano", 0)),
                failed=_object(span.get("status", {})).get("code") == trace.Status.STATUS_CODE_ERROR,
                inbound=span.get("kind") in _INBOUND,
                attributes=_attributes(span),
                around=around,
            )


def _count(raw: bytes, marks: bytes) -> int:
    return len(raw) - len(raw.translate(None, marks))


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Invalid("the body is not an ExportTraceServiceRequest in OTLP's JSON")
    return value


def _listed(value: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = value.get(name, [])
    if not isinstance(found, list):
        raise Invalid(f"{name} is no list: the body is not an ExportTraceServiceRequest in OTLP's JSON")
    return list(map(_object, found))


def _number(value: Any) -> int:
    if isinstance(value, str) and len(value) <= 20 and value.isascii() and value.isdigit():
        value = int(value)
    if type(value) is not int or not 0 <= value < 2**64:
        raise Invalid("startTimeUnixNano is no number of nanoseconds")
    return value


def _attributes(of: dict[str, Any]) -> dict[str, str]:
    return _told((each.get("key"), _json_text(_object(each.get("value", {})))) for each in _listed(of, "attributes"))


def _json_text(value: dict[str, Any]) -> str | None:
    if isinstance(found := value.get("boolValue"), bool):
        return "true" if found else "false"
    found = next((value[name] for name in ("stringValue", "intValue", "doubleValue") if name in value), None)
    return str(found) if isinstance(found, str | int | float) else None


def _told(attributes: Iterable[tuple[Any, str | None]]) -> dict[str, str]:
    """What is looked at, as text; of what came twice, the first."""
    found: dict[str, str] = {}
    for name, text in attributes:
        if (
            text
            and isinstance(name, str)
            and name in READ
            and name not in found
            and (name != SCOPE or _SCOPE_TOKEN.fullmatch(text))
        ):
            found[name] = printable(text, _LONGEST)
    return found


def _span(trace_id: str, span_id: str, *, name: str, started_ns: int, **more: Any) -> Span | None:
    if not (_TRACE_ID.fullmatch(trace_id) and _SPAN_ID.fullmatch(span_id)):
        return None
    return Span(
        trace_id=trace_id,
        span_id=span_id,
        name=printable(name, _LONGEST),
        started_at=from_epoch(started_ns // 1_000_000_000),
        **more,
    )


def _refusal(problem: Exception, *, in_json: bool) -> Response:
    """The same status and headers as everywhere, and as the body a google.rpc.Status."""
    known = envelope.refusal(problem)
    status = known.status
    if isinstance(problem, BrokerError):
        sentence = problem.detail
    elif isinstance(problem, TooLarge):
        unpacked = MAX_UNPACKED_BYTES[JSON if in_json else PROTOBUF]
        sentence = f"a body has at most {MAX_SENT_BYTES} bytes, and {unpacked} unpacked: send fewer spans"
    else:
        sentence = str(json.loads(known.body)["detail"])
    code = _CODES.get(status, _INTERNAL)
    body = json.dumps({"code": code, "message": sentence}).encode() if in_json else _status(code, sentence.encode())
    response = Response(body, status, mimetype=JSON if in_json else PROTOBUF)
    for name, value in known.headers:
        if name not in ("Content-Type", "Content-Length"):
            response.headers[name] = value
    return response


def _status(code: int, message: bytes) -> bytes:
    """`google.rpc.Status` in protobuf: its two members are not worth a package of every message of that name."""
    return b"\x08" + _varint(code) + b"\x12" + _varint(len(message)) + message


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)
