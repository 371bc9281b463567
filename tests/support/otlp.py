"""OTLP requests made up for tests, and an exporter that keeps what the SDK would send."""

from collections.abc import Sequence
from itertools import count

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

_numbers = count(1)


class CollectingExporter(SpanExporter):
    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.requests.append(encode_spans(spans))
        return SpanExportResult.SUCCESS


def text(key: str, value: str) -> KeyValue:
    return KeyValue(key=key, value=AnyValue(string_value=value))


def made_otlp_span(
    *,
    name: str = "compute",
    trace_id: bytes = b"\x01" * 16,
    span_id: bytes | None = None,
    parent_span_id: bytes = b"",
    start_ns: int = 1_000,
    end_ns: int = 2_000,
    status: Status | None = None,
    attributes: Sequence[KeyValue] = (),
) -> Span:
    """Return a span with an id of its own, unless told otherwise."""
    return Span(
        trace_id=trace_id,
        span_id=next(_numbers).to_bytes(8, "big") if span_id is None else span_id,
        parent_span_id=parent_span_id,
        name=name,
        start_time_unix_nano=start_ns,
        end_time_unix_nano=end_ns,
        status=status,
        attributes=attributes,
    )


def made_request(*spans: Span, resource: Sequence[KeyValue] = ()) -> ExportTraceServiceRequest:
    scope = ScopeSpans(spans=spans)
    return ExportTraceServiceRequest(
        resource_spans=[ResourceSpans(resource=Resource(attributes=resource), scope_spans=[scope])]
    )
