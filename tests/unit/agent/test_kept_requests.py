"""Requests that were not sampled and leave a trace all the same: escalated, failed, slow."""

import asyncio
from collections.abc import Mapping

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from core.errors import HeavyUnavailable, Overloaded
from core.keeping import KEEP_BURST, KeepRule
from core.open_inference.service import Call
from core.telemetry import Tracing, TracingSettings, parse_traceparent
from edge_agent.cascade.policy import Tier
from edge_agent.data_plane import EdgeDataPlane
from edge_agent.settings import RuntimeSettings
from tests.support.clocks import HeldClock
from tests.support.edge_plane import SURE, UNSURE, FakeHeavy, away, cascade_of, echo_model, plane_with, request_of

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
UNSAMPLED = f"00-{TRACE}-{SPAN}-00"
NOT_FINITE = (float("nan"), 1.0, 0.0)
SLOW_S = 0.5


class World:
    """An edge plane that samples nothing by itself and keeps what is worth it, and its spans."""

    def __init__(self, *, heavy: FakeHeavy | None = None, per_s: float = 1.0) -> None:
        self.heavy = heavy or FakeHeavy()
        self.clock = HeldClock(monotonic_s=100.0)
        rule = KeepRule(SLOW_S, per_s)
        self.tracing = Tracing("test", TracingSettings(sample_ratio=0.0, keep=rule))
        self._exporter = InMemorySpanExporter()
        self.tracing._provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    async def plane(self, settings: RuntimeSettings | None = None) -> EdgeDataPlane:
        model = echo_model(cascade=cascade_of(), clock=self.clock, settings=settings)
        return await plane_with(model, heavy=self.heavy, tracing=self.tracing, clock=self.clock)

    def spans(self) -> Mapping[str, ReadableSpan]:
        return {span.name: span for span in self._exporter.get_finished_spans()}

    def roots(self) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.name == "infer digits"]


def keep_of(span: ReadableSpan) -> object:
    assert span.attributes is not None
    return span.attributes["nanofleet.keep"]


async def test_an_unremarkable_request_leaves_nothing() -> None:
    world = World()
    answer = await (await world.plane()).answer(request_of(SURE))
    assert answer.traceparent is None
    assert world.spans() == {}


async def test_an_escalation_is_traced_from_before_the_heavy_tier_was_asked() -> None:
    world = World()
    answer = await (await world.plane()).answer(request_of(UNSURE))
    spans = world.spans()
    assert set(spans) == {"infer digits", "queue", "compute", "offload"}
    root, offload = spans["infer digits"], spans["offload"]
    assert keep_of(root) == "escalated"
    (handed_on,) = world.heavy.traceparents
    assert handed_on is not None
    asked_in = parse_traceparent(handed_on)
    assert asked_in is not None
    assert (asked_in.trace_id, asked_in.span_id) == (root.context.trace_id, offload.context.span_id)
    assert asked_in.trace_flags.sampled
    assert answer.traceparent is not None
    assert answer.traceparent.split("-")[2] == f"{root.context.span_id:016x}"


async def test_an_escalation_whose_caller_said_not_sampled_has_a_trace_of_its_own_that_links_to_the_caller() -> None:
    world = World()
    await (await world.plane()).answer(request_of(UNSURE), Call(traceparent=UNSAMPLED))
    root = world.spans()["infer digits"]
    assert root.parent is None
    assert f"{root.context.trace_id:032x}" != TRACE
    (link,) = root.links
    assert (f"{link.context.trace_id:032x}", f"{link.context.span_id:016x}") == (TRACE, SPAN)


async def test_an_outage_that_escalates_everything_is_traced_in_part_only() -> None:
    world = World(heavy=away())
    plane = await world.plane()
    for _ in range(5 * KEEP_BURST):
        assert (await plane.answer(request_of(UNSURE), Call(traceparent=UNSAMPLED))).tier is Tier.EDGE
    assert len(world.roots()) == KEEP_BURST
    assert world.heavy.traceparents[KEEP_BURST:] == [UNSAMPLED] * (4 * KEEP_BURST)


async def test_a_request_that_fails_in_the_run_is_written_down_with_its_times_and_error() -> None:
    world = World(heavy=away())
    plane = await world.plane()
    # Escalations have spent their share: what fails is kept for its own reason.
    for _ in range(KEEP_BURST):
        await plane.answer(request_of(UNSURE))
    with pytest.raises(HeavyUnavailable):
        await plane.answer(request_of(NOT_FINITE))
    root = world.roots()[-1]
    assert keep_of(root) == "error"
    assert root.attributes is not None
    assert root.attributes["error.type"] == "unavailable"
    children = [span for span in world._exporter.get_finished_spans() if span.parent and span.parent == root.context]
    assert {span.name for span in children} == {"queue", "compute"}


async def test_a_request_that_finds_the_queue_full_is_kept_as_an_error() -> None:
    world = World()
    plane = await world.plane(RuntimeSettings(max_queue=1))
    first = plane.ask(request_of(SURE))
    with pytest.raises(Overloaded):
        await plane.ask(request_of(SURE))
    await first
    (root,) = world.roots()
    assert keep_of(root) == "error"


async def test_a_slow_request_is_written_down_when_it_is_over() -> None:
    world = World()
    plane = await world.plane()
    answer = plane.ask(request_of(SURE))
    world.clock.pass_s(SLOW_S)
    assert (await answer).traceparent is not None
    spans = world.spans()
    assert keep_of(spans["infer digits"]) == "slow"
    queue = spans["queue"]
    assert queue.start_time is not None
    assert queue.end_time is not None
    assert (queue.end_time - queue.start_time) / 1e9 == pytest.approx(SLOW_S, abs=1e-3)


async def test_a_caller_who_leaves_is_no_error() -> None:
    class Endless(FakeHeavy):
        started = asyncio.Event()

        async def ask(self, *_: object, **__: object) -> object:  # type: ignore[override]  # never returns
            self.started.set()
            return await asyncio.Event().wait()

    world = World(heavy=Endless(), per_s=1.0)
    plane = await world.plane()
    answer = plane.ask(request_of(UNSURE))
    async with asyncio.timeout(5):
        await Endless.started.wait()
    answer.cancel()
    await plane.close()
    assert [keep_of(root) for root in world.roots()] == ["escalated"]


async def test_with_a_rate_of_zero_nothing_is_kept() -> None:
    world = World(per_s=0.0)
    plane = await world.plane()
    answer = plane.ask(request_of(UNSURE))
    world.clock.pass_s(10 * SLOW_S)
    await answer
    assert world.spans() == {}
