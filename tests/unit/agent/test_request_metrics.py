"""What is counted of requests: by what became of them, and by stage."""

import asyncio

import pytest

from core.clock import SystemClock
from core.deadline import Deadline
from core.errors import DeadlineExceeded, InvalidTensor, NanofleetError, Overloaded, UnknownModel
from core.exposition import written
from core.fleet_state import Usage
from core.metrics import OTHER, Registry
from core.open_inference.messages import InferRequest
from core.open_inference.service import Call
from core.open_inference.statistics import Duration, ModelStatistics
from core.telemetry import Tracing, TracingSettings
from edge_agent.cascade.policy import Reason, Tier
from edge_agent.data_plane import EdgeDataPlane
from edge_agent.request_metrics import MAX_MODELS, RequestMetrics
from edge_agent.runtime.pool import LoadedModel, ModelPool
from edge_agent.settings import RuntimeSettings
from tests.support.clocks import HeldClock
from tests.support.edge_plane import (
    SURE,
    UNSAMPLED,
    UNSURE,
    FakeHeavy,
    away,
    cascade_of,
    echo_model,
    request_of,
)
from tests.support.exposed import numbers

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SAMPLED = f"00-{TRACE_ID}-b7ad6b7169203331-01"


class Counted:
    """A data plane, and what its registry shows."""

    def __init__(self, heavy: FakeHeavy | None = None, tracing: Tracing | None = None) -> None:
        clock = SystemClock()
        self.registry = Registry()
        self.metrics = RequestMetrics(self.registry, clock=clock)
        self.pool = ModelPool(RuntimeSettings(), clock=clock)
        tracing = tracing or Tracing("test", UNSAMPLED)
        self.plane = EdgeDataPlane(self.pool, heavy or FakeHeavy(), tracing=tracing, clock=clock, metrics=self.metrics)

    async def with_model(self, model: LoadedModel) -> "Counted":
        await self.pool.host(model)
        return self

    def count(self, name: str, **labels: str) -> float:
        return numbers(self.exposition())[name, frozenset(labels.items())]

    def exposition(self) -> bytes:
        return written(self.registry.families(), is_open_metrics=True)


async def test_an_answer_of_the_edge_is_counted_with_its_stages() -> None:
    counted = await Counted().with_model(echo_model(cascade=cascade_of()))
    await counted.plane.answer(request_of(SURE))

    assert counted.count(
        "nanofleet_requests_total", model="digits", outcome="answered", tier="edge", reason="confident"
    )
    for stage in ("queue", "compute", "total"):
        assert counted.count("nanofleet_stage_duration_seconds_count", model="digits", stage=stage, tier="edge") == 1
    assert counted.metrics.usage() == Usage(answered_edge=1)


async def test_an_answer_of_the_heavy_tier_is_counted_with_what_asking_it_took() -> None:
    counted = await Counted().with_model(echo_model(cascade=cascade_of()))
    await counted.plane.answer(request_of(UNSURE))

    answered = {"model": "digits", "outcome": "answered", "tier": "heavy", "reason": "low_confidence"}
    assert counted.count("nanofleet_requests_total", **answered) == 1
    for stage in ("offload", "total"):
        assert counted.count("nanofleet_stage_duration_seconds_count", model="digits", stage=stage, tier="heavy") == 1
    assert counted.metrics.usage() == Usage(answered_heavy=1)


async def test_an_answer_that_the_heavy_tier_did_not_give_says_why() -> None:
    counted = await Counted(away()).with_model(echo_model(cascade=cascade_of()))
    await counted.plane.answer(request_of(UNSURE))

    answered = {"model": "digits", "outcome": "answered", "tier": "edge", "reason": "heavy_unavailable"}
    assert counted.count("nanofleet_requests_total", **answered) == 1
    assert counted.count("nanofleet_stage_duration_seconds_count", model="digits", stage="offload", tier="heavy") == 1


@pytest.mark.parametrize(
    ("request_", "error", "model"),
    [
        (request_of(model="somebody-made-this-up"), UnknownModel, ""),
        (InferRequest("digits", ()), InvalidTensor, "digits"),
    ],
)
async def test_a_refusal_names_only_models_that_run_here(
    request_: InferRequest, error: type[NanofleetError], model: str
) -> None:
    counted = await Counted().with_model(echo_model())
    with pytest.raises(error):
        await counted.plane.answer(request_)

    refused = {"outcome": "refused", "tier": "none", "reason": error.code.value}
    assert counted.count("nanofleet_requests_total", model=model, **refused) == 1
    assert b"somebody" not in counted.exposition()
    assert counted.metrics.usage() == Usage(refused=1)


async def test_a_request_that_comes_too_late_is_counted_as_expired() -> None:
    counted = await Counted().with_model(echo_model())
    with pytest.raises(DeadlineExceeded):
        await counted.plane.answer(request_of(), Call(Deadline(0.0)))

    expired = {"model": "", "outcome": "expired", "tier": "none", "reason": "deadline_exceeded"}
    assert counted.count("nanofleet_requests_total", **expired) == 1


async def test_who_leaves_is_not_counted_as_answered() -> None:
    counted = await Counted().with_model(echo_model())
    counted.plane.ask(request_of()).cancel()
    await asyncio.sleep(0)

    assert counted.metrics.usage() == Usage()


async def test_a_traced_request_leaves_its_trace_at_the_bucket_that_it_fell_into() -> None:
    counted = await Counted(tracing=Tracing("test", TracingSettings())).with_model(echo_model())
    await counted.plane.answer(request_of(), Call(traceparent=SAMPLED))

    lines = [line for line in counted.exposition().decode().splitlines() if TRACE_ID in line]
    assert len(lines) == 1
    assert 'stage="total"' in lines[0]


def test_models_beyond_the_bound_are_counted_together() -> None:
    registry = Registry()
    metrics = RequestMetrics(registry, clock=SystemClock())
    for number in range(MAX_MODELS + 3):
        times = {"queued_s": 0.0, "started_s": 0.0, "finished_s": 0.0}
        metrics.answered(f"m{number}", Tier.EDGE, Reason.CONFIDENT, traceparent=None, **times)

    found = numbers(written(registry.families(), is_open_metrics=True))
    others = frozenset({"model": OTHER, "stage": "total", "tier": "edge"}.items())
    assert found["nanofleet_stage_duration_seconds_count", others] == 3
    assert metrics.usage() == Usage(answered_edge=MAX_MODELS + 3)


# ---- the "statistics" extension -----------------------------------------------------------------------------------


def test_statistics_of_a_model_are_what_was_counted_of_it_alone() -> None:
    metrics = RequestMetrics(Registry(), clock=HeldClock(monotonic_s=10.0))
    for tier in (Tier.EDGE, Tier.HEAVY):
        metrics.answered(
            "digits", tier, Reason.CONFIDENT, queued_s=9.0, started_s=9.25, finished_s=9.75, traceparent=None
        )
    metrics.failed("digits", Overloaded("later"))
    metrics.failed("other", Overloaded("later"))

    found = metrics.statistics("digits", "3")

    assert found == ModelStatistics(
        "digits",
        "3",
        success=Duration(2, 2_000_000_000),
        fail=Duration(1),
        queue=Duration(2, 500_000_000),
        compute_infer=Duration(2, 1_000_000_000),
    )
    assert metrics.statistics("idle", "1") == ModelStatistics("idle", "1")
