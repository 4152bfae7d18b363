"""Spans over OTLP/HTTP: in binary and in JSON, whole and broken, packed and packed without end."""

import gzip
import json
import zlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service
from opentelemetry.proto.trace.v1 import trace_pb2 as trace

from broker.web.otlp import JSON, MAX_FIELDS, MAX_SENT_BYTES, MAX_SPANS, MAX_UNPACKED_BYTES, MAX_VALUES, PROTOBUF
from tests.conftest import NOW
from tests.house import CRM

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
NOW_NS = int(NOW.timestamp()) * 10**9
TOOL = {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "search_contacts"}


def request(*spans, around=()):
    """`spans` are (number, attributes) or (number, attributes, more)."""
    made = service.ExportTraceServiceRequest()
    of_resource = made.resource_spans.add()
    _put(of_resource.resource.attributes, dict(around))
    of_scope = of_resource.scope_spans.add()
    for number, attributes, *more in spans:
        span = of_scope.spans.add(
            trace_id=bytes.fromhex(TRACE),
            span_id=number.to_bytes(8, "big"),
            name="work",
            start_time_unix_nano=NOW_NS + 5,
            **(more[0] if more else {}),
        )
        _put(span.attributes, attributes)
    return made


def _put(attributes, values):
    for key, value in values.items():
        kind = {str: "string_value", bool: "bool_value", int: "int_value", float: "double_value"}[type(value)]
        setattr(attributes.add(key=key).value, kind, value)


def as_json(*spans, around=()):
    def attributes(values):
        return [{"key": key, "value": {"stringValue": value}} for key, value in dict(values).items()]

    return {
        "resourceSpans": [
            {
                "resource": {"attributes": attributes(around)},
                "scopeSpans": [
                    {
                        "scope": {"name": "x"},
                        "spans": [
                            {
                                "traceId": TRACE.upper(),
                                "spanId": f"{number:016x}",
                                "name": "work",
                                "kind": 3,
                                "startTimeUnixNano": str(NOW_NS),
                                "attributes": attributes(values),
                                "links": [{"traceId": "zz"}],
                                "somethingNew": 1,
                                **(more[0] if more else {}),
                            }
                            for number, values, *more in spans
                        ],
                    }
                ],
            }
        ]
    }


def post(web, body, content_type=PROTOBUF, by="summarizer", **headers):
    raw = body if isinstance(body, bytes) else body.SerializeToString()
    return web.client.post("/v1/traces", data=raw, content_type=content_type, headers=web.as_(by, **headers))


def post_json(web, document, by="summarizer", **headers):
    return post(web, json.dumps(document).encode(), JSON, by, **headers)


def partial(answer):
    assert answer.status_code == 200, answer.data
    assert answer.mimetype == PROTOBUF
    found = service.ExportTraceServiceResponse.FromString(answer.data).partial_success
    return found.rejected_spans, found.error_message


def lines(web, task):
    return web.get(f"/v1/tasks/{task['id']}/timeline?source=report", "pipeline").json["items"]


@pytest.fixture
def task(web):
    return web.open_task()


@pytest.fixture
def grant(web, task):
    body = {"task_id": task["id"], "resource": CRM, "scopes": ["contacts:read"]}
    headers = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
    return web.post("/v1/grants", "summarizer", json=body, headers=headers).json["grant"]


def test_a_span_of_a_tool_is_tied_by_its_trace(web, task, grant):
    assert partial(post(web, request((1, {**TOOL, "broker.scope": "contacts:read"})))) == (0, "")
    [line] = lines(web, task)
    assert (line["grant_id"], line["what"], line["action"]) == (grant["id"], "activity.tool", "search_contacts")
    assert (line["at"], line["scopes"], line["trace_id"]) == ("2026-03-01T12:00:00Z", ["contacts:read"], TRACE)


def test_the_same_in_json(web, task, grant):
    answer = post_json(web, as_json((1, TOOL), around={"service.name": "crew"}))
    assert (answer.status_code, answer.mimetype, answer.json) == (200, JSON, {})
    [line] = lines(web, task)
    assert (line["action"], line["attributes"]) == ("search_contacts", {"service.name": "crew"})


def test_a_span_that_comes_in_both_encodings_is_one(web, task, grant):
    post(web, request((1, TOOL)))
    assert partial(post(web, request((1, TOOL)))) == (0, "")
    post_json(web, as_json((1, TOOL)))
    assert len(lines(web, task)) == 1


def test_a_span_names_its_grant(web, task):
    grant = web.grant(task).json["grant"]
    post(web, request((1, {**TOOL, "broker.grant_id": grant["id"]})))
    post(web, request((2, TOOL), around={"broker.grant_id": grant["id"]}))
    assert [line["grant_id"] for line in lines(web, task)] == [grant["id"]] * 2


def test_spans_of_a_programs_own_affairs_are_taken_and_not_kept(web, task, grant):
    own = (
        (1, {}),
        (2, {"gen_ai.operation.name": "chat", "gen_ai.request.model": "m"}),
        (3, {"http.request.method": "POST", "url.full": "https://llm.example/v1/chat"}),
        (4, {"http.request.method": "GET", "http.route": "/inbox"}, {"kind": trace.Span.SPAN_KIND_SERVER}),
        (5, {"db.system.name": "postgresql", "db.operation.name": "SELECT"}),
    )
    assert partial(post(web, request(*own))) == (0, "")
    assert lines(web, task) == []
    assert partial(post(web, request((6, {"http.request.method": "GET", "url.full": f"{CRM}/contacts"})))) == (0, "")
    assert [line["action"] for line in lines(web, task)] == ["GET /api/contacts"]


def test_a_verifier_sends_the_spans_in_which_it_was_asked(web, task, grant):
    asked = {"http.request.method": "GET", "http.route": "/contacts", "http.response.status_code": 403}
    inbound = {"kind": trace.Span.SPAN_KIND_SERVER}
    assert partial(post(web, request((1, asked, inbound)), by="crm-api")) == (0, "")
    assert lines(web, task) == [], "its trace is chosen by whoever asked it"
    partial(post(web, request((2, {**asked, "broker.grant_id": grant["id"]}, inbound)), by="crm-api"))
    [line] = lines(web, task)
    assert (line["who"], line["role"], line["outcome"]) == ("crm-api", "verifier", "denied")


def test_spans_about_a_grant_of_others_are_rejected_and_the_rest_is_taken(web, task, grant):
    other = {**TOOL, "broker.grant_id": "grt_0000000000000000000000000a"}
    rejected, why = partial(post(web, request((1, TOOL), (2, other))))
    assert (rejected, "there is no grant" in why) == (1, True)
    assert len(lines(web, task)) == 1
    theirs = partial(post(web, request((3, {**TOOL, "broker.grant_id": grant["id"]})), by="scribe"))
    assert theirs[0] == 1
    assert theirs[1].replace(grant["id"], "") == why.replace("grt_0000000000000000000000000a", "")


def test_a_span_without_an_id_is_rejected(web, task, grant):
    whole = request((1, TOOL), (2, TOOL))
    whole.resource_spans[0].scope_spans[0].spans[0].span_id = b"\0" * 8
    assert partial(post(web, whole))[0] == 1
    answer = post_json(web, as_json((3, TOOL, {"traceId": "x" * 32}), (4, TOOL, {"spanId": None})))
    assert answer.json["partialSuccess"]["rejectedSpans"] == "2"
    assert len(lines(web, task)) == 1


def test_a_failed_span_is_an_error(web, task, grant):
    post(web, request((1, TOOL, {"status": trace.Status(code=trace.Status.STATUS_CODE_ERROR)})))
    post_json(web, as_json((2, TOOL, {"status": {"code": 2}})))
    assert [line["outcome"] for line in lines(web, task)] == ["error", "error"]


def test_text_of_a_span_stays_text(web, task, grant):
    """INV-31, INV-30."""
    secret = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl"
    hostile = {"gen_ai.tool.name": "a\r\nb\0c\u202ed" + "x" * 5000, "broker.scope": "a b", "gen_ai.agent.name": secret}
    assert partial(post(web, request((1, hostile))))[0] == 0
    [line] = lines(web, task)
    assert line["action"].startswith("a??b?c?d")
    assert len(line["action"]) == 255
    assert (line["scopes"], line["attributes"]) == ([], {"gen_ai.agent.name": "[secret]"})


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("GZIP", gzip.compress)]
)
def test_a_body_may_be_packed(web, task, grant, encoding, pack):
    raw = pack(request((1, TOOL)).SerializeToString())
    assert partial(post(web, raw, **{"Content-Encoding": encoding})) == (0, "")
    assert len(lines(web, task)) == 1


def refused(answer, status, code, kind=PROTOBUF):
    assert answer.status_code == status, answer.data
    assert answer.mimetype == kind
    assert answer.headers["Cache-Control"] == "no-store"
    if kind == JSON:
        said, message = answer.json["code"], answer.json["message"]
    else:
        said, message = _status(answer.data)
    assert said == code
    assert message
    return message


def _status(raw):
    """google.rpc.Status, read by a message of ours that has the same two members at the same places."""
    file = descriptor_pb2.FileDescriptorProto(name="status_of_tests.proto", package="tests")
    message = file.message_type.add(name="Status")
    message.field.add(name="code", number=1, type=5, label=1)
    message.field.add(name="message", number=2, type=9, label=1)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = message_factory.GetMessageClass(pool.FindMessageTypeByName("tests.Status")).FromString(raw)
    return found.code, found.message


def test_a_bomb_is_not_unpacked(web):
    """INV-35: a megabyte that would be a gigabyte."""
    packer = zlib.compressobj(9, wbits=31)
    bomb = b"".join(packer.compress(b"\0" * 2**20) for _ in range(900)) + packer.flush()
    assert len(bomb) < MAX_SENT_BYTES
    message = refused(post(web, bomb, **{"Content-Encoding": "gzip"}), 413, 3)
    assert f"{MAX_UNPACKED_BYTES[PROTOBUF]} unpacked" in message


def _must_not_run(*_args, **_more):
    raise AssertionError("it came as far as this")


def _field(tag, inner):
    return tag + _length(len(inner)) + inner


@pytest.mark.parametrize("size", [MAX_SPANS + 1, 500_000])
def test_too_many_spans_are_refused_before_they_are_parsed(web, monkeypatch, size):
    """INV-35: of empty spans a million are two kilobytes, packed, and were 180 MB."""
    parsed = service.ExportTraceServiceRequest
    monkeypatch.setattr("broker.web.otlp.service.ExportTraceServiceRequest", _must_not_run)
    raw = _field(b"\x0a", _field(b"\x12", b"\x12\0" * size))
    headers = {"Content-Encoding": "deflate"}
    assert f"{MAX_SPANS} spans" in refused(post(web, zlib.compress(raw), **headers), 400, 3)
    apart = b"".join(_field(b"\x0a", _field(b"\x12", b"\x12\0" * 2)) for _ in range(MAX_SPANS))
    assert f"{MAX_SPANS} spans" in refused(post(web, zlib.compress(apart), **headers), 400, 3)
    monkeypatch.setattr("broker.web.otlp.service.ExportTraceServiceRequest", parsed)
    most = _field(b"\x0a", _field(b"\x12", b"\x12\0" * MAX_SPANS))
    assert partial(post(web, most))[0] == MAX_SPANS


@pytest.mark.parametrize(
    "around",
    [
        lambda many: many,
        lambda many: _field(b"\x0a", many),
        lambda many: _field(b"\x0a", _field(b"\x0a", many)),
        lambda many: _field(b"\x0a", _field(b"\x12", many.replace(b"\x12", b"\x1a"))),
        lambda many: _field(b"\x0a", _field(b"\x12", _field(b"\x12", many.replace(b"\x12", b"\x4a")))),
    ],
    ids=["request", "of resources", "resource", "of scopes", "span"],
)
def test_too_many_fields_are_refused_before_they_are_parsed(web, monkeypatch, around):
    """INV-35: wherever they stand."""
    monkeypatch.setattr("broker.web.otlp.service.ExportTraceServiceRequest", _must_not_run)
    assert f"{MAX_FIELDS} fields" in refused(post(web, around(b"\x12\0" * (MAX_FIELDS + 1))), 400, 3)


def test_too_much_json_is_refused_before_it_is_parsed(web, monkeypatch):
    """INV-35."""
    spans = as_json(*((number, {}) for number in range(MAX_SPANS + 1)))
    assert f"{MAX_SPANS} spans" in refused(post_json(web, spans), 400, 3, JSON)
    monkeypatch.setattr("broker.web.otlp.strict_json", SimpleNamespace(loads=_must_not_run))
    most = MAX_UNPACKED_BYTES[JSON]
    for raw in (b"{}," * MAX_VALUES, b"1," * (MAX_VALUES + 1), b"[" * most, b"]" * most, b'"' * most):
        answer = post(web, gzip.compress(raw), JSON, **{"Content-Encoding": "gzip"})
        assert f"{MAX_VALUES} values" in refused(answer, 400, 3, JSON)


def test_nothing_is_unpacked_for_whoever_may_tell_of_nothing(web, monkeypatch):
    """INV-35."""
    monkeypatch.setattr("broker.web.otlp.raw_body", _must_not_run)
    refused(post(web, b"\xff" * 100, by="pipeline", **{"Content-Encoding": "gzip"}), 403, 7)


def test_so_many_unpack_at_once(web, monkeypatch):
    """INV-27, INV-35."""
    monkeypatch.setattr("broker.services.activities._PATIENCE_S", 0.01)
    monkeypatch.setattr("broker.web.otlp._unpacked", _must_not_run)
    with web.house.broker.activities._turn(), web.house.broker.activities._turn():
        refused(post(web, request((1, TOOL))), 503, 14)


@pytest.mark.parametrize("malformed", [False, True])
def test_spans_that_come_to_nothing_count_for_the_minute_of_their_reporter(web, malformed):
    """INV-35: reading them costs the same."""
    activities = web.house.broker.activities
    activities._limits = replace(activities._limits, max_activities_per_minute=3)
    own = request((1, {}), (2, {}), (3, {}))
    if malformed:
        for span in own.resource_spans[0].scope_spans[0].spans:
            span.span_id = b""
    assert partial(post(web, own))[0] == (3 if malformed else 0)
    refused(post(web, request((4, {}))), 429, 8)


def test_a_body_that_is_too_long_is_refused(web):
    refused(post(web, b"\0" * (MAX_SENT_BYTES + 1)), 413, 3)
    refused(post(web, b" " * (MAX_SENT_BYTES + 1), JSON), 413, 3, JSON)


@pytest.mark.parametrize(
    "raw",
    [b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x0f", b"{}", b"\x0a\x05\x0a\x03\x0a\x01", b"GET / HTTP/1.1"],
)
def test_what_is_no_protobuf_is_refused(web, raw):
    refused(post(web, raw), 400, 3)


def test_what_is_nested_too_deep_is_refused(web):
    span = trace.Span(trace_id=bytes.fromhex(TRACE), span_id=b"1" * 8)
    value = span.attributes.add(key="x").value
    for _ in range(20):
        value = value.array_value.values.add()
    inner = span.attributes[0].value.SerializeToString()
    for _ in range(200):
        inner = b"\x2a" + _length(len(inner) + 1 + len(_length(len(inner)))) + b"\x0a" + _length(len(inner)) + inner
    key_value = b"\x0a\x01x\x12" + _length(len(inner)) + inner
    raw_span = b"\x4a" + _length(len(key_value)) + key_value
    for field in (b"\x12", b"\x12", b"\x0a"):
        raw_span = field + _length(len(raw_span)) + raw_span
    refused(post(web, raw_span), 400, 3)
    deep = '{"resourceSpans":' + "[" * 100 + "]" * 100 + "}"
    assert "deeper" in refused(post(web, deep.encode(), JSON), 400, 3, JSON)


def _length(number):
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


@pytest.mark.parametrize(
    "document",
    [
        [], None, 1, "x", {"resourceSpans": {}}, {"resourceSpans": [1]}, {"resourceSpans": [{"scopeSpans": 1}]},
        {"resourceSpans": [{"scopeSpans": [{"spans": {}}]}]}, {"resourceSpans": [{"resource": []}]},
        {"resourceSpans": [{"resource": {"attributes": {}}}]}, as_json((1, TOOL, {"attributes": [1]})),
        as_json((1, TOOL, {"attributes": [{"key": "gen_ai.tool.name", "value": 1}]})),
        as_json((1, TOOL, {"status": 2})), as_json((1, TOOL, {"startTimeUnixNano": "x"})),
        as_json((1, TOOL, {"startTimeUnixNano": -1})), as_json((1, TOOL, {"startTimeUnixNano": 1.5})),
        as_json((1, TOOL, {"startTimeUnixNano": "9" * 20})), as_json((1, TOOL, {"startTimeUnixNano": True})),
    ],
)  # fmt: skip
def test_json_that_is_not_otlp_is_refused(web, document):
    refused(post_json(web, document), 400, 3, JSON)


@pytest.mark.parametrize(
    "more",
    [
        {"kind": []}, {"kind": {}}, {"name": 7}, {"attributes": [{"key": [], "value": {"stringValue": "x"}}]},
        {"attributes": [{"key": "gen_ai.tool.name", "value": {"stringValue": []}}]}, {"attributes": [{}]},
        {"attributes": [{"key": "gen_ai.tool.name", "value": {"arrayValue": {"values": []}}}]},
        {"startTimeUnixNano": 2**64 - 1}, {"startTimeUnixNano": 0}, {"status": {"code": []}},
    ],
)  # fmt: skip
def test_json_that_is_odd_breaks_nothing(web, grant, more):
    assert post_json(web, as_json((1, TOOL, more))).status_code in (200, 400)


@pytest.mark.parametrize(
    "raw", [b'{"resourceSpans": [], "resourceSpans": []}', b"{", b"", b'{"a": NaN}', b"\xff\xfe{}"]
)
def test_json_that_is_none_is_refused(web, raw):
    refused(post(web, raw, JSON), 400, 3, JSON)


def test_other_ways_to_write_are_refused(web):
    refused(post(web, b"", "application/x-www-form-urlencoded"), 415, 3, JSON)
    refused(post(web, request((1, TOOL)), **{"Content-Encoding": "br"}), 415, 3)
    refused(post(web, request((1, TOOL)), **{"Content-Encoding": "gzip, gzip"}), 415, 3)
    refused(post(web, request((1, TOOL)), **{"Content-Encoding": "gzip"}), 400, 3)
    cut = gzip.compress(request((1, TOOL)).SerializeToString())[:-4]
    refused(post(web, cut, **{"Content-Encoding": "gzip"}), 400, 3)
    twice = gzip.compress(b"") * 2
    refused(post(web, twice, **{"Content-Encoding": "gzip"}), 400, 3)


def test_an_empty_request_is_one(web):
    assert partial(post(web, b"")) == (0, "")


def test_whoever_is_not_known_or_has_not_the_role_is_told_in_the_words_of_otlp(web):
    answer = web.client.post("/v1/traces", data=b"", content_type=PROTOBUF)
    refused(answer, 401, 16)
    assert "WWW-Authenticate" in answer.headers
    refused(post(web, b"", by="pipeline"), 403, 7)
    refused(post(web, b"{}", JSON, by="pipeline"), 403, 7, JSON)


def test_a_limit_says_when_to_come_again(web, grant):
    activities = web.house.broker.activities
    activities._limits = replace(activities._limits, max_activities_per_minute=1)
    answer = post(web, request((1, TOOL), (2, TOOL)))
    refused(answer, 429, 8)
    assert answer.headers["Retry-After"] == "60"


def test_more_activities_than_one_request_may_tell_of_are_refused(web, grant):
    refused(post(web, request(*((number, TOOL) for number in range(1, 2050)))), 400, 3)
