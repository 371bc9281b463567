"""What the decoder makes of OTLP requests, honest and hostile ones."""

import math

from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue, KeyValueList
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import SpanKind as OtelKind

from controller.traces import otlp
from controller.traces.model import SpanKind
from controller.traces.otlp import decode
from tests.support.otlp import CollectingExporter, made_otlp_span, made_request, text


def decoded_attributes(*pairs: KeyValue) -> object:
    (span,) = decode(made_request(made_otlp_span(attributes=pairs))).spans
    return dict(span.attributes)


def test_a_span_of_the_sdk_arrives_with_all_that_it_says() -> None:
    exporter = CollectingExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    with (
        tracer.start_as_current_span("ask meter", kind=OtelKind.PRODUCER) as parent,
        tracer.start_as_current_span("process meter", kind=OtelKind.CONSUMER, attributes={"nanofleet.tier": "edge"}),
    ):
        pass
    provider.shutdown()

    (child,) = decode(exporter.requests[0]).spans

    context = parent.get_span_context()
    assert (child.trace_id, child.parent_span_id) == (f"{context.trace_id:032x}", f"{context.span_id:016x}")
    assert (child.name, child.kind, child.is_error) == ("process meter", SpanKind.CONSUMER, False)
    assert child.attributes == {"nanofleet.tier": "edge"}


def test_service_and_instance_come_from_the_resource_with_our_own_attributes() -> None:
    resource = [
        text("service.name", "nanofleet-agent"),
        text("service.instance.id", "cam-1"),
        text("nanofleet.site", "north"),
        text("telemetry.sdk.name", "opentelemetry"),
    ]

    (span,) = decode(made_request(made_otlp_span(), resource=resource)).spans

    assert (span.service, span.instance, span.attributes) == ("nanofleet-agent", "cam-1", {"nanofleet.site": "north"})


def test_times_are_microseconds_and_never_run_backwards() -> None:
    request = made_request(made_otlp_span(start_ns=5_000_999, end_ns=9_001_000), made_otlp_span(start_ns=9, end_ns=1))

    first, second = decode(request).spans

    assert (first.start_us, first.duration_us, second.duration_us) == (5000, 4001, 0)


def test_an_error_status_marks_the_span() -> None:
    (span,) = decode(made_request(made_otlp_span(status=Status(code=Status.STATUS_CODE_ERROR)))).spans

    assert span.is_error


def test_scalars_keep_their_types_and_arrays_become_text() -> None:
    array = AnyValue(array_value=ArrayValue(values=[AnyValue(int_value=1), AnyValue(string_value="b")]))

    attributes = decoded_attributes(
        KeyValue(key="flag", value=AnyValue(bool_value=True)),
        KeyValue(key="count", value=AnyValue(int_value=-3)),
        KeyValue(key="ratio", value=AnyValue(double_value=0.5)),
        KeyValue(key="list", value=array),
    )

    assert attributes == {"flag": True, "count": -3, "ratio": 0.5, "list": "1, b"}


def test_numbers_that_json_does_not_know_become_text() -> None:
    assert decoded_attributes(KeyValue(key="ratio", value=AnyValue(double_value=math.nan))) == {"ratio": "nan"}


def test_maps_bytes_and_nested_arrays_are_left_out() -> None:
    nested = AnyValue(array_value=ArrayValue(values=[AnyValue(array_value=ArrayValue())]))

    attributes = decoded_attributes(
        KeyValue(key="map", value=AnyValue(kvlist_value=KeyValueList(values=[text("a", "b")]))),
        KeyValue(key="raw", value=AnyValue(bytes_value=b"x")),
        KeyValue(key="none", value=AnyValue()),
        KeyValue(key="nested", value=nested),
    )

    assert attributes == {"nested": ""}


def test_attributes_are_bounded_in_number_and_size() -> None:
    pairs = [text(f"{number:04}" * 100, "x" * 5000) for number in range(500)]

    (span,) = decode(made_request(made_otlp_span(name="n" * 5000, attributes=pairs))).spans

    assert len(span.attributes) == otlp.MAX_ATTRIBUTES
    assert {len(key) for key in span.attributes} == {otlp.MAX_KEY_CHARS}
    assert {len(str(value)) for value in span.attributes.values()} == {otlp.MAX_TEXT_CHARS}
    assert len(span.name) == otlp.MAX_NAME_CHARS


def test_spans_without_proper_ids_are_refused_and_counted() -> None:
    bad = [
        made_otlp_span(trace_id=b""),
        made_otlp_span(trace_id=b"\x00" * 16),
        made_otlp_span(span_id=b"\x01" * 7),
        made_otlp_span(span_id=b"\x00" * 8),
        made_otlp_span(parent_span_id=b"\x01"),
    ]

    decoded = decode(made_request(*bad, made_otlp_span()))

    assert (len(decoded.spans), decoded.refused_count) == (1, len(bad))


def test_a_request_of_very_many_spans_is_cut() -> None:
    decoded = decode(made_request(*[made_otlp_span()] * (otlp.MAX_SPANS_PER_REQUEST + 5)))

    assert (len(decoded.spans), decoded.refused_count) == (otlp.MAX_SPANS_PER_REQUEST, 5)


values = st.recursive(
    st.one_of(
        st.builds(AnyValue, string_value=st.text(max_size=20)),
        st.builds(AnyValue, double_value=st.floats()),
        st.builds(AnyValue, int_value=st.integers(-(1 << 63), (1 << 63) - 1)),
        st.builds(AnyValue, bytes_value=st.binary(max_size=5)),
        st.just(AnyValue()),
    ),
    lambda inner: st.lists(inner, max_size=4).map(lambda items: AnyValue(array_value=ArrayValue(values=items))),
)
spans = st.builds(
    Span,
    trace_id=st.binary(max_size=17),
    span_id=st.sampled_from([b"", b"\x01" * 8, b"\xff" * 8]),
    parent_span_id=st.binary(max_size=9),
    name=st.text(max_size=300),
    kind=st.integers(0, 9),
    start_time_unix_nano=st.integers(0, (1 << 64) - 1),
    end_time_unix_nano=st.integers(0, (1 << 64) - 1),
    attributes=st.lists(st.builds(KeyValue, key=st.text(max_size=5), value=values), max_size=5),
)


@given(st.lists(spans, max_size=5))
def test_whatever_comes_is_decoded_or_counted_and_fits_the_store(hostile: list[Span]) -> None:
    request = ExportTraceServiceRequest(
        resource_spans=[ResourceSpans(resource=Resource(), scope_spans=[ScopeSpans(spans=hostile)])]
    )

    decoded = decode(request)

    assert len(decoded.spans) + decoded.refused_count == len(hostile)
    for span in decoded.spans:
        assert 0 <= span.start_us + span.duration_us < 1 << 63
        assert all(math.isfinite(value) for value in span.attributes.values() if isinstance(value, float))
