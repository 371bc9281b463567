"""Which answers are given again, and to whom."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from core.clock import SystemClock
from core.deadline import Deadline
from core.errors import DeadlineExceeded, Forbidden
from core.manifest import Cascade
from core.open_inference.messages import InferRequest, RequestedOutput
from core.open_inference.service import Call
from core.telemetry import Tracing, TracingSettings
from core.tensors import Array
from edge_agent.answer import Answer
from edge_agent.cached_answers import CachedAnswers
from edge_agent.cascade.policy import Reason, Tier
from edge_agent.data_plane import EdgeDataPlane
from edge_agent.runtime.pool import LoadedModel, ModelPool
from edge_agent.runtime.session import RunTime
from edge_agent.settings import RuntimeSettings
from tests.support.edge_plane import (
    SURE,
    UNSAMPLED,
    UNSURE,
    FakeHeavy,
    away,
    cascade_of,
    echo_manifest,
    request_of,
)

SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Counting:
    """A plane over models that count their runs; `digits` has a cache, unless `budget_bytes` is 0."""

    def __init__(
        self, *, budget_bytes: int = 1 << 20, heavy: FakeHeavy | None = None, tracing: Tracing | None = None
    ) -> None:
        self.runs = 0
        self.clock = SystemClock()
        self.heavy = heavy or FakeHeavy()
        self.cached = CachedAnswers({"digits": budget_bytes} if budget_bytes else {})
        self.pool = ModelPool(RuntimeSettings(), clock=self.clock)
        self.plane = EdgeDataPlane(
            self.pool,
            self.heavy,
            tracing=tracing or Tracing("test", UNSAMPLED),
            clock=self.clock,
            cached=self.cached,
        )

    async def with_model(self, name: str = "digits", *, version: int = 3, cascade: Cascade | None = None) -> "Counting":
        manifest = echo_manifest(name, version=version, cascade=cascade)

        def run(inputs: Sequence[Array]) -> Sequence[Array]:
            self.runs += 1
            return inputs

        await self.pool.host(
            LoadedModel(
                manifest,
                manifest.digest(),
                run,
                run_time=RunTime(0.0, 0.0),
                settings=RuntimeSettings(),
                clock=self.clock,
            )
        )
        return self

    async def ask(self, request: InferRequest | None = None, *, privacy: str = "any") -> Answer:
        return await self.plane.answer(request or request_of(SURE, privacy=privacy), Call(None))


async def test_an_equal_request_is_answered_again_without_a_run() -> None:
    asked = await Counting().with_model(cascade=cascade_of())
    first = await asked.ask(request_of(SURE, request_id="a"))
    second = await asked.ask(request_of(SURE, request_id="b"))
    assert asked.runs == 1
    assert (first.is_cached, second.is_cached) == (False, True)
    assert (second.tier, second.reason, second.confidence) == (Tier.EDGE, Reason.CONFIDENT, first.confidence)
    assert second.response.id == "b"
    assert np.array_equal(second.response.outputs[0].array, first.response.outputs[0].array)


async def test_a_model_is_not_cached_unless_it_is_said() -> None:
    asked = await Counting(budget_bytes=0).with_model()
    await asked.ask()
    assert not (await asked.ask()).is_cached
    assert asked.runs == 2


async def test_another_input_or_wanted_output_is_another_request() -> None:
    asked = await Counting().with_model()
    await asked.ask(request_of((1, 2, 3)))
    await asked.ask(request_of((1, 2, 4)))
    await asked.ask(replace(request_of((1, 2, 3)), outputs=(RequestedOutput("scores"),)))
    assert asked.runs == 3


async def test_a_model_without_a_cascade_is_cached_as_such() -> None:
    asked = await Counting().with_model()
    await asked.ask()
    assert ((await asked.ask()).reason, asked.runs) == (Reason.NO_CASCADE, 1)


async def test_what_the_heavy_tier_answered_is_asked_anew() -> None:
    asked = await Counting().with_model(cascade=cascade_of())
    for _ in range(2):
        assert (await asked.ask(request_of(UNSURE))).tier is Tier.HEAVY
    assert (asked.runs, len(asked.heavy.asked)) == (2, 2)


async def test_what_should_have_escalated_and_could_not_is_tried_anew() -> None:
    asked = await Counting(heavy=away()).with_model(cascade=cascade_of())
    for _ in range(2):
        assert (await asked.ask(request_of(UNSURE))).reason is Reason.HEAVY_UNAVAILABLE
    assert asked.runs == 2


async def test_what_is_not_finite_is_not_kept_even_of_a_model_that_nobody_judges() -> None:
    asked = await Counting().with_model()
    for _ in range(2):
        await asked.ask(request_of((math.nan, 1, 2)))
    assert asked.runs == 2


async def test_a_request_of_class_device_neither_finds_nor_leaves_an_answer() -> None:
    asked = await Counting().with_model()
    await asked.ask()
    assert not (await asked.ask(privacy="device")).is_cached
    await asked.ask(request_of((1, 2, 3), privacy="device"))
    assert not (await asked.ask(request_of((1, 2, 3)))).is_cached


async def test_nobody_learns_what_a_stricter_class_has_asked() -> None:
    asked = await Counting().with_model()
    await asked.ask(privacy="site")
    assert not (await asked.ask(privacy="any")).is_cached
    assert (await asked.ask(privacy="site")).is_cached


async def test_a_cached_answer_is_refused_to_whom_the_rules_refuse_it() -> None:
    asked = await Counting().with_model()
    await asked.ask()
    with pytest.raises(Forbidden):
        await asked.ask(privacy="public")
    with pytest.raises(DeadlineExceeded):
        await asked.plane.answer(request_of(SURE), Call(Deadline(asked.clock.monotonic_s() - 1)))


async def test_a_new_variant_starts_with_nothing_and_the_old_one_s_answers_are_freed() -> None:
    asked = await Counting().with_model(version=3)
    await asked.ask()
    await asked.with_model(version=4)
    assert asked.cached.caches()["digits"].size_bytes == 0
    answer = await asked.ask()
    assert (answer.is_cached, answer.response.model_version) == (False, "4")


async def test_an_answer_of_the_variant_that_was_replaced_meanwhile_is_not_kept() -> None:
    asked = await Counting().with_model(version=3)
    under_way = asked.plane.ask(request_of(SURE))
    await asked.with_model(version=4)
    assert (await under_way).response.model_version == "3"
    await asyncio.sleep(0)
    assert len(asked.cached.caches()["digits"]) == 0


async def test_a_kept_answer_does_not_hold_the_batch_that_it_came_from_and_cannot_be_changed() -> None:
    asked = await Counting().with_model()
    await asyncio.gather(*(asked.plane.ask(request_of((number, 1, 2))) for number in range(4)))
    array = (await asked.ask(request_of((0, 1, 2)))).response.outputs[0].array
    assert (array.base, array.flags.writeable) == (None, False)


async def test_a_sampled_hit_leaves_a_span_that_says_so() -> None:
    tracing = Tracing("test", TracingSettings(endpoint=None, sample_ratio=0.0))
    spans = InMemorySpanExporter()
    tracing._provider.add_span_processor(SimpleSpanProcessor(spans))
    asked = await Counting(tracing=tracing).with_model()
    await asked.ask()
    answer = await asked.plane.answer(request_of(SURE), Call(None, SAMPLED))
    [span] = spans.get_finished_spans()
    assert span.attributes is not None
    assert (span.attributes["nanofleet.cache"], span.name) == ("hit", "infer digits")
    assert answer.traceparent is not None


async def test_hits_count_as_answers_and_leave_the_model_s_stages_alone() -> None:
    asked = await Counting().with_model()
    for _ in range(3):
        await asked.ask()
    cache = asked.cached.caches()["digits"]
    assert (cache.hits, cache.misses) == (2, 1)
    assert asked.plane.metrics.usage().answered_edge == 3


async def test_the_statistics_of_a_model_tell_hits_and_misses() -> None:
    asked = await Counting().with_model()
    for _ in range(3):
        await asked.ask()
    await asked.with_model("letters")
    digits, letters = await asked.plane.statistics("", "")
    assert (digits.success.count, digits.cache_hit.count, digits.cache_miss.count) == (3, 2, 1)
    assert (letters.cache_hit.count, letters.cache_miss.count) == (0, 0)
