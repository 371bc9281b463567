"""Taking spans in: bounded, never waiting, nothing accepted is lost."""

import asyncio
import logging

import pytest

from controller.traces.exporter import InProcessExporter
from controller.traces.intake import Intake
from controller.traces.model import TraceFilter
from controller.traces.service import Traces
from core.errors import NotFound, Unavailable
from core.telemetry import Tracing, TracingSettings
from tests.support.otlp import made_otlp_span, made_request
from tests.support.trace_store import MemoryTraceStore, made_span


@pytest.fixture
def store() -> MemoryTraceStore:
    return MemoryTraceStore()


async def test_what_was_taken_in_can_be_read_after_a_flush(store: MemoryTraceStore) -> None:
    traces = Traces(store, max_spans=100)
    span = made_span(1)
    traces.take_in([span])

    await traces.flush()

    assert list(await traces.trace(span.trace_id)) == [span]


async def test_an_unknown_trace_is_not_found(store: MemoryTraceStore) -> None:
    with pytest.raises(NotFound):
        await Traces(store, max_spans=100).trace("0" * 32)


async def test_a_burst_beyond_the_queue_is_refused_and_counted(store: MemoryTraceStore) -> None:
    traces = Traces(store, max_spans=100, max_queued_spans=3)

    refused = [traces.take_in([made_span(1), made_span(1)]) for _ in range(3)]

    assert refused == [0, 1, 2]
    assert traces.refused_count == 3


async def test_refusing_is_logged_as_a_warning_once(store: MemoryTraceStore, caplog: pytest.LogCaptureFixture) -> None:
    traces = Traces(store, max_spans=100, max_queued_spans=0)

    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            traces.take_in([made_span(1)])

    assert len(caplog.records) == 1


async def test_what_could_not_be_stored_stays_queued(store: MemoryTraceStore) -> None:
    traces = Traces(store, max_spans=100)
    traces.take_in([made_span(1)])
    store.fail_next = Unavailable("the disk is full")

    with pytest.raises(Unavailable):
        await traces.flush()
    await traces.flush()

    assert len(await traces.recent(TraceFilter())) == 1


async def test_a_long_queue_is_stored_in_batches(store: MemoryTraceStore) -> None:
    traces = Traces(store, max_spans=10_000)
    traces.take_in([made_span(number) for number in range(5_000)])

    await traces.flush()

    assert len(await traces.recent(TraceFilter(limit=10_000))) == 5_000


async def test_the_loop_stores_what_is_taken_in(store: MemoryTraceStore) -> None:
    traces = Traces(store, max_spans=100)
    running = asyncio.create_task(traces.run())
    await asyncio.sleep(0)
    traces.take_in([made_span(1)])
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait([running])

    assert len(await traces.recent(TraceFilter())) == 1


async def test_intake_counts_malformed_spans_and_those_without_room(store: MemoryTraceStore) -> None:
    intake = Intake(Traces(store, max_spans=100, max_queued_spans=2), None)
    request = made_request(made_otlp_span(span_id=b"bad"), *[made_otlp_span() for _ in range(3)])

    refused = await intake.take_in(request)
    await intake.close()

    assert refused == 2


async def test_spans_of_this_process_arrive_without_a_connection(store: MemoryTraceStore) -> None:
    traces = Traces(store, max_spans=100)
    intake = Intake(traces, None)
    tracing = Tracing(
        "nanofleet-controller",
        TracingSettings(),
        exporter=InProcessExporter(intake, asyncio.get_running_loop()),
    )
    with tracing.tracer.start_as_current_span("infer meter"):
        pass

    await asyncio.to_thread(tracing.shutdown)
    await traces.flush()
    await intake.close()

    (summary,) = await traces.recent(TraceFilter(model="meter"))
    assert summary.services == ("nanofleet-controller",)
