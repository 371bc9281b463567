"""OTLP trace requests -> span records, with a bound on everything that a peer can make large.

Source: OpenTelemetry protocol 1.x, `opentelemetry/proto/trace/v1/trace.proto`.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, Span, Status

from controller.traces.model import AttributeValue, SpanKind, SpanRecord

# Chosen: exporters send 512 at a time by default.
MAX_SPANS_PER_REQUEST = 10_000
# As many as the SDKs keep by default (OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT is 128), and half of that is generous here.
MAX_ATTRIBUTES = 64
MAX_KEY_CHARS = 128
MAX_TEXT_CHARS = 1024
MAX_NAME_CHARS = 256
MAX_ARRAY_ITEMS = 32

_OWN_PREFIX = "nanofleet."
_UNKNOWN_SERVICE = "unknown_service"
_KINDS = {
    Span.SPAN_KIND_SERVER: SpanKind.SERVER,
    Span.SPAN_KIND_CLIENT: SpanKind.CLIENT,
    Span.SPAN_KIND_PRODUCER: SpanKind.PRODUCER,
    Span.SPAN_KIND_CONSUMER: SpanKind.CONSUMER,
}


@dataclass(frozen=True, slots=True)
class Decoded:
    spans: tuple[SpanRecord, ...]
    # Spans without proper ids, and those beyond MAX_SPANS_PER_REQUEST.
    refused_count: int


def span_count(request: ExportTraceServiceRequest) -> int:
    return sum(len(scope.spans) for resource in request.resource_spans for scope in resource.scope_spans)


def decode(request: ExportTraceServiceRequest) -> Decoded:
    """Return the spans of `request`; about 20 us each, so a large one belongs on a thread."""
    spans: list[SpanRecord] = []
    for record in _records(request):
        spans.append(record)
        if len(spans) == MAX_SPANS_PER_REQUEST:
            break
    return Decoded(tuple(spans), span_count(request) - len(spans))


def _records(request: ExportTraceServiceRequest) -> Iterator[SpanRecord]:
    for resource in request.resource_spans:
        of_resource = _Resource.of(resource)
        for scope in resource.scope_spans:
            for span in scope.spans:
                if _is_well_formed(span):
                    yield _record(span, of_resource)


@dataclass(frozen=True, slots=True)
class _Resource:
    service: str
    instance: str
    attributes: dict[str, AttributeValue]

    @classmethod
    def of(cls, message: ResourceSpans) -> "_Resource":
        attributes = _attributes(message.resource.attributes)
        return cls(
            str(attributes.get("service.name", _UNKNOWN_SERVICE))[:MAX_NAME_CHARS],
            str(attributes.get("service.instance.id", ""))[:MAX_NAME_CHARS],
            {key: value for key, value in attributes.items() if key.startswith(_OWN_PREFIX)},
        )


def _is_well_formed(span: Span) -> bool:
    """Say whether the ids are as the protocol wants them: 16 and 8 bytes, not all zero; a parent of 8 or none."""
    return (
        len(span.trace_id) == 16
        and any(span.trace_id)
        and len(span.span_id) == 8
        and any(span.span_id)
        and len(span.parent_span_id) in {0, 8}
    )


def _record(span: Span, resource: _Resource) -> SpanRecord:
    start_us = span.start_time_unix_nano // 1000
    return SpanRecord(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_span_id=span.parent_span_id.hex() or None,
        name=span.name[:MAX_NAME_CHARS],
        kind=_KINDS.get(span.kind, SpanKind.INTERNAL),
        service=resource.service,
        instance=resource.instance,
        start_us=start_us,
        # A clock set back during the span must not make time run backwards here.
        duration_us=max(0, span.end_time_unix_nano // 1000 - start_us),
        is_error=span.status.code == Status.STATUS_CODE_ERROR,
        attributes={**resource.attributes, **_attributes(span.attributes)},
    )


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {}
    for pair in pairs:
        if len(attributes) == MAX_ATTRIBUTES:
            break
        if (value := _value(pair.value)) is not None:
            attributes[pair.key[:MAX_KEY_CHARS]] = value
    return attributes


def _value(value: AnyValue) -> AttributeValue | None:
    """Return a scalar, or an array as text; bytes and maps are nothing to look at and are left out."""
    match value.WhichOneof("value"):
        case "string_value":
            return value.string_value[:MAX_TEXT_CHARS]
        case "bool_value":
            return value.bool_value
        case "int_value":
            return value.int_value
        case "double_value":
            # JSON knows no NaN and no infinity.
            return value.double_value if math.isfinite(value.double_value) else str(value.double_value)
        case "array_value":
            items = [
                _value(item) for item in value.array_value.values[:MAX_ARRAY_ITEMS] if not item.HasField("array_value")
            ]
            return ", ".join(str(item) for item in items if item is not None)[:MAX_TEXT_CHARS]
        case _:
            return None
