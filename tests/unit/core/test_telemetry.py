"""Trace contexts and the sampling decision; spans themselves are the library's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from core.telemetry import Tracing, TracingSettings, parent_context, parse_traceparent, traceparent_of
from tests.support.open_inference_strategies import PATIENT

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"
SAMPLED = f"00-{TRACE}-{SPAN}-01"
UNSAMPLED = f"00-{TRACE}-{SPAN}-00"
MALFORMED = (
    "", "00", f"00-{TRACE}-{SPAN}", f"00-{TRACE}-{SPAN}-1", f"00-{TRACE}-{SPAN}-01-extra", f"ff-{TRACE}-{SPAN}-01",
    f"00-{TRACE.upper()}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", f"0x-{TRACE}-{SPAN}-01",
    f"00-0x{TRACE[2:]}-{SPAN}-01", f"00-+{TRACE[1:]}-{SPAN}-01", f"00-{TRACE[:-2]}_1-{SPAN}-01",
    f"00-{TRACE}-{SPAN}-01\n", "é" * 55, "1" * 55, f"01-{TRACE}-{SPAN}-01x",
)  # fmt: skip


def tracing(ratio: float, *, draw: float = 0.5) -> Tracing:
    return Tracing("nanofleet-test", TracingSettings(sample_ratio=ratio), uniform=lambda: draw)


@PATIENT
@given(st.integers(1, (1 << 128) - 1), st.integers(1, (1 << 64) - 1), st.integers(0, 255))
def test_every_well_formed_context_is_read(trace_id: int, span_id: int, flags: int) -> None:
    context = parse_traceparent(f"00-{trace_id:032x}-{span_id:016x}-{flags:02x}")
    assert context is not None
    assert (context.trace_id, context.span_id, context.trace_flags, context.is_remote) == (
        trace_id, span_id, flags, True,
    )  # fmt: skip


@PATIENT
@given(st.text(max_size=80) | st.text("0123456789abcdefABCDEF-_+x", min_size=50, max_size=60))
def test_any_text_is_read_back_the_same_or_refused(text: str) -> None:
    context = parse_traceparent(text)
    if context is not None:
        assert f"{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}" == text[3:55]


@pytest.mark.parametrize("value", MALFORMED)
def test_a_malformed_context_starts_a_new_trace(value: str) -> None:
    assert parse_traceparent(value) is None
    assert not trace.get_current_span(parent_context(value)).get_span_context().is_valid


def test_a_later_version_is_read_as_far_as_we_know_it() -> None:
    context = parse_traceparent(f"01-{TRACE}-{SPAN}-01-what-comes-later")
    assert context is not None
    assert f"{context.trace_id:032x}" == TRACE


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_the_callers_decision_holds_whatever_the_ratio(ratio: float) -> None:
    assert tracing(ratio).is_sampled(SAMPLED)
    assert not tracing(ratio).is_sampled(UNSAMPLED)


@pytest.mark.parametrize("traceparent", [None, *(value for value in MALFORMED if value[54:55] not in ("0", "2"))])
def test_without_a_decision_the_ratio_decides(traceparent: str | None) -> None:
    assert tracing(0.3, draw=0.29).is_sampled(traceparent)
    assert not tracing(0.3, draw=0.3).is_sampled(traceparent)
    assert not tracing(0.0, draw=0.0).is_sampled(traceparent)
    assert tracing(1.0, draw=0.999).is_sampled(traceparent)


def test_a_busy_process_begins_no_more_traces_a_second_than_it_is_allowed() -> None:
    now_s = 100.0
    settings = TracingSettings(sample_ratio=0.5, sampled_per_s=2.5)
    process = Tracing("nanofleet-test", settings, uniform=lambda: 0.0, now_s=lambda: now_s)

    def begun(requests: int) -> int:
        return sum(process.is_sampled(None) for _ in range(requests))

    assert begun(1000) == 3
    now_s += 0.4
    assert begun(1000) == 1
    assert process.is_sampled(SAMPLED), "the caller's decision does not count"
    now_s += 3600
    assert begun(1000) == 3


def test_the_rate_bounds_what_is_drawn_and_neither_none_nor_all() -> None:
    nothing = Tracing("t", TracingSettings(sample_ratio=0.5, sampled_per_s=0.0), uniform=lambda: 0.0)
    assert not nothing.is_sampled(None)
    everything = Tracing("t", TracingSettings(sample_ratio=1.0, sampled_per_s=1.0), uniform=lambda: 0.999)
    assert all(everything.is_sampled(None) for _ in range(1000))


def test_a_span_continues_the_trace_of_its_remote_parent() -> None:
    exporter = InMemorySpanExporter()
    process = Tracing("nanofleet-test", TracingSettings(), exporter=exporter, attributes={"nanofleet.site": "north"})
    with process.tracer.start_as_current_span("process digits", context=parent_context(SAMPLED)) as span:
        handed_on = traceparent_of(span)
    process.shutdown()
    (exported,) = exporter.get_finished_spans()
    assert exported.parent is not None
    assert f"{exported.parent.span_id:016x}" == SPAN
    assert exported.resource.attributes["service.name"] == "nanofleet-test"
    assert exported.resource.attributes["nanofleet.site"] == "north"
    assert handed_on.startswith(f"00-{TRACE}-")
    assert handed_on.endswith("-01")
