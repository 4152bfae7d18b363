"""OpenTelemetry's own exporter, set up by the environment as its documentation says, against a real broker."""

import os
import subprocess
import sys
import uuid
from datetime import UTC, datetime
from urllib.parse import quote

import pytest

_PROGRAM = """
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

provider = TracerProvider()
provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
tracer = provider.get_tracer("agent")
context = trace.set_span_in_context(trace.NonRecordingSpan(trace.SpanContext(
    {trace_id}, 0xb7ad6b7169203331, is_remote=True, trace_flags=trace.TraceFlags(1)
)))
with tracer.start_as_current_span("invoke_agent", context=context):
    with tracer.start_as_current_span("execute_tool search_contacts") as span:
        span.set_attribute("gen_ai.operation.name", "execute_tool")
        span.set_attribute("gen_ai.tool.name", "search_contacts")
        span.set_attribute("broker.scope", "contacts:read")
assert provider.force_flush()
provider.shutdown()
"""


@pytest.mark.parametrize("compression", ["none", "gzip", "deflate"])
@pytest.mark.parametrize("endpoint", ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"])
def test_an_exporter_that_is_set_up_by_its_environment_just_works(broker, compression, endpoint):
    trace_id = uuid.uuid4().hex  # of two grants in one trace, a span is told of one
    task = broker.open_task(deadline_s=600)
    traceparent = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
    answer = broker.ask(task, **traceparent)
    assert answer.status_code == 201, answer.text
    at = broker.url + ("/v1/traces" if "TRACES" in endpoint else "")
    program = subprocess.run(
        [sys.executable, "-W", "error", "-c", _PROGRAM.format(trace_id=int(trace_id, 16))],
        env={
            "PATH": os.environ["PATH"],
            endpoint: at,
            "OTEL_EXPORTER_OTLP_HEADERS": f"Authorization={quote('Bearer ' + broker.deployment.token('summarizer'))}",
            "OTEL_EXPORTER_OTLP_COMPRESSION": compression,
            "OTEL_SERVICE_NAME": "crew",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (program.returncode, program.stderr) == (0, "")
    found = broker.get(f"/v1/tasks/{task}/timeline?source=report", "pipeline").json()["items"]
    [line] = found
    assert (line["what"], line["action"], line["scopes"]) == ("activity.tool", "search_contacts", ["contacts:read"])
    assert line["attributes"] == {"service.name": "crew"}
    assert abs((datetime.now(UTC) - datetime.fromisoformat(line["at"])).total_seconds()) < 60
