"""Spans that are written down are those that the SDK would have made, down to the bytes that leave the process."""

from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, set_span_in_context

from core.span_log import SpanLog

RESOURCE = Resource({"service.name": "test"})
CALLER = SpanContext(1 << 100, 2, is_remote=True)


def by_the_sdk() -> Sequence[ReadableSpan]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(resource=RESOURCE)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("nanofleet")
    root = tracer.start_span(
        "process m",
        kind=SpanKind.CONSUMER,
        links=[Link(CALLER)],
        attributes={"text": "a", "number": 1, "ratio": 0.5, "flag": True},
        start_time=10,
    )
    tracer.start_span("queue", context=set_span_in_context(root), start_time=10).end(20)
    root.add_event("provisional answer", timestamp=25)
    root.set_status(Status(StatusCode.ERROR))
    root.end(30)
    return exporter.get_finished_spans()


def written(like: Sequence[ReadableSpan]) -> Sequence[ReadableSpan]:
    exporter = InMemorySpanExporter()
    log = SpanLog(RESOURCE, SimpleSpanProcessor(exporter), scope="nanofleet")
    child, root = (span.get_span_context() for span in like)
    assert child is not None
    assert root is not None
    log.write("queue", child, parent=root, start_ns=10, end_ns=20)
    log.write(
        "process m",
        root,
        parent=None,
        start_ns=10,
        end_ns=30,
        kind=SpanKind.CONSUMER,
        attributes={"text": "a", "number": 1, "ratio": 0.5, "flag": True},
        links=[Link(CALLER)],
        events=[Event("provisional answer", timestamp=25)],
        status=Status(StatusCode.ERROR),
    )
    return exporter.get_finished_spans()


def test_they_leave_as_the_same_bytes() -> None:
    made = by_the_sdk()
    assert encode_spans(written(made)).SerializeToString() == encode_spans(made).SerializeToString()


def test_a_new_context_continues_the_trace_of_its_parent_or_begins_one() -> None:
    log = SpanLog(RESOURCE, SimpleSpanProcessor(InMemorySpanExporter()), scope="nanofleet")
    first = log.new_context(None)
    second = log.new_context(first)
    assert (second.trace_id, second.trace_flags.sampled, second.is_remote) == (first.trace_id, True, False)
    assert second.span_id != first.span_id
    assert log.new_context(None).trace_id != first.trace_id
