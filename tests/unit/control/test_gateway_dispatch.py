import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from controller.gateway.dispatch import Gateway
from controller.gateway.gateway_metrics import GatewayMetrics
from controller.registry.model import ORIGINAL, Model, ModelVersion, Variant
from core.deadline import Deadline
from core.digest import Digest
from core.errors import Forbidden, HeavyUnavailable, InvalidTensor, UnknownModel
from core.exposition import written
from core.ids import ModelName, VariantName
from core.keeping import KEEP_BURST, KEEP_NOTHING, KeepRule
from core.metrics import Registry
from core.open_inference.messages import InferRequest, InferResponse, RequestedOutput
from core.open_inference.service import Call
from core.telemetry import Tracing, TracingSettings
from core.tensors import Array, Datatype, Tensor
from tests.support.clocks import HeldClock
from tests.support.exposed import numbers
from tests.support.registry_values import NOON, made_version

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SAMPLED = f"00-{TRACE_ID}-b7ad6b7169203331-01"
UNSAMPLED = f"00-{TRACE_ID}-b7ad6b7169203331-00"
LARGE = ModelName("large")


class Models:
    """A registry of one model with two versions."""

    def __init__(self) -> None:
        self.of_model = {version: made_version(LARGE, version) for version in (1, 2)}

    async def models(self) -> Sequence[Model]:
        return [Model(LARGE, NOON, 2)]

    async def versions(self, model: ModelName) -> Sequence[ModelVersion]:
        return [self.of_model[2], self.of_model[1]]

    async def variant(self, model: ModelName, version: int | None, variant: VariantName) -> Variant:
        known = self.of_model.get(version or 2)
        if model != LARGE or known is None or variant != ORIGINAL:
            raise UnknownModel(f"no model {model} version {version}")
        return known.variants[0]


@dataclass
class Asked:
    request: InferRequest
    digest: Digest
    deadline: Deadline
    traceparent: str | None


@dataclass
class Heavy:
    """A tier that answers `y` of zeros, and remembers what it was asked."""

    clock: HeldClock
    is_ready: bool = True
    takes_s: float = 0.0
    refuse_with: BaseException | None = None
    outputs: tuple[str, ...] = ("y",)
    asked: list[Asked] = field(default_factory=list)

    async def infer(
        self, request: InferRequest, *, digest: Digest, deadline: Deadline, traceparent: str | None
    ) -> InferResponse:
        self.asked.append(Asked(request, digest, deadline, traceparent))
        self.clock.pass_s(self.takes_s)
        if self.refuse_with is not None:
            raise self.refuse_with
        zeros = np.zeros((1, 2), np.float32)
        outputs = tuple(Tensor(name, Datatype.FP32, zeros) for name in self.outputs)
        return InferResponse(request.model_name, request.model_version, outputs, id=request.id)


class World:
    """A gateway between a registry and a tier, at second 100, with its spans."""

    def __init__(self, *, sample_ratio: float = 0.0, keep: KeepRule = KEEP_NOTHING) -> None:
        self.clock = HeldClock(monotonic_s=100.0)
        self.models, self.heavy, self.exporter = Models(), Heavy(self.clock), InMemorySpanExporter()
        settings = TracingSettings(sample_ratio=sample_ratio, keep=keep)
        self.tracing = Tracing("test", settings, exporter=self.exporter)
        self.registry = Registry()
        self.gateway = Gateway(
            self.models,
            self.heavy,
            tracing=self.tracing,
            clock=self.clock,
            default_timeout_s=30.0,
            metrics=GatewayMetrics(self.registry, clock=self.clock),
        )

    def exposition(self) -> bytes:
        return written(self.registry.families(), is_open_metrics=True)

    def spans(self) -> dict[str, ReadableSpan]:
        self.tracing.shutdown()
        return {span.name: span for span in self.exporter.get_finished_spans()}


def request(
    x: Array | None = None, *, model: str = "large", version: str = "", outputs: tuple[str, ...] = ()
) -> InferRequest:
    array = np.ones((1, 4), np.float32) if x is None else x
    asked = tuple(RequestedOutput(name) for name in outputs)
    return InferRequest(model, (Tensor("x", Datatype.FP32, array),), model_version=version, id="7", outputs=asked)


# ---- dispatch -------------------------------------------------------------------------------------------------------


async def test_the_latest_version_is_resolved_once_and_sent_by_number_and_digest() -> None:
    world = World()
    response = await world.gateway.infer(request(), Call())
    (asked,) = world.heavy.asked
    assert asked.request.model_version == "2"
    assert asked.digest == world.models.of_model[2].variants[0].manifest_digest
    assert (response.model_version, response.id) == ("2", "7")


async def test_a_version_can_be_named() -> None:
    world = World()
    await world.gateway.infer(request(version="1"), Call())
    assert world.heavy.asked[0].request.model_version == "1"


@pytest.mark.parametrize("version", ["3", "one", "-1", "1" * 40, "²"])
async def test_an_unknown_version_is_an_unknown_model(version: str) -> None:
    with pytest.raises(UnknownModel):
        await World().gateway.infer(request(version=version), Call())


async def test_an_unknown_model_is_refused_without_asking_the_tier() -> None:
    world = World()
    with pytest.raises(UnknownModel):
        await world.gateway.infer(request(model="other"), Call())
    assert world.heavy.asked == []


async def test_the_callers_deadline_is_handed_on() -> None:
    world = World()
    await world.gateway.infer(request(), Call(deadline=Deadline(100.25)))
    assert world.heavy.asked[0].deadline == Deadline(100.25)


async def test_a_request_without_a_deadline_gets_the_default() -> None:
    world = World()
    await world.gateway.infer(request(), Call())
    assert world.heavy.asked[0].deadline == Deadline(130.0)


# ---- checks ---------------------------------------------------------------------------------------------------------


async def test_a_wrong_shape_is_refused_naming_expected_and_got() -> None:
    with pytest.raises(InvalidTensor, match=r"'x': expected shape \[-1, 4\], got \[1, 3\]"):
        await World().gateway.infer(request(np.ones((1, 3), np.float32)), Call())


async def test_a_missing_input_is_refused_naming_expected_and_got() -> None:
    with pytest.raises(InvalidTensor, match=r"expected the inputs \['x'\], each once, got \[\]"):
        await World().gateway.infer(InferRequest("large", ()), Call())


async def test_an_unknown_input_is_refused() -> None:
    z = Tensor("z", Datatype.FP32, np.ones((1, 4), np.float32))
    with pytest.raises(InvalidTensor, match=r"got \['x', 'z'\]"):
        await World().gateway.infer(InferRequest("large", (*request().inputs, z)), Call())


async def test_an_input_given_twice_is_refused() -> None:
    (x,) = request().inputs
    with pytest.raises(InvalidTensor, match="each once"):
        await World().gateway.infer(InferRequest("large", (x, x)), Call())


async def test_an_unknown_requested_output_is_refused() -> None:
    with pytest.raises(InvalidTensor, match=r"expected outputs out of \['y'\], got \['logits'\]"):
        await World().gateway.infer(request(outputs=("logits",)), Call())


async def test_outputs_that_were_not_asked_for_are_left_out() -> None:
    world = World()
    world.heavy.outputs = ("extra", "y")
    response = await world.gateway.infer(request(), Call())
    assert [tensor.name for tensor in response.outputs] == ["y"]


async def test_a_tier_that_leaves_out_an_output_is_not_believed() -> None:
    world = World()
    world.heavy.outputs = ()
    with pytest.raises(HeavyUnavailable, match="did not come"):
        await world.gateway.infer(request(), Call())


# ---- about models ---------------------------------------------------------------------------------------------------


async def test_metadata_names_versions_tensors_and_digest() -> None:
    world = World()
    metadata = await world.gateway.metadata("large", "")
    assert metadata.versions == ("2", "1")
    assert [spec.name for spec in metadata.inputs] == ["x"]
    assert metadata.properties == {"digest": world.models.of_model[2].variants[0].manifest_digest}


@pytest.mark.parametrize(("is_ready", "state"), [(True, "READY"), (False, "UNAVAILABLE")])
async def test_readiness_is_the_tiers(is_ready: bool, state: str) -> None:
    world = World()
    world.heavy.is_ready = is_ready
    assert await world.gateway.is_ready() is is_ready
    assert await world.gateway.is_model_ready("large", "") is is_ready
    assert [entry.state for entry in await world.gateway.index()] == [state]


async def test_nobody_loads_or_unloads_by_hand_what_is_deployed() -> None:
    world = World()
    with pytest.raises(Forbidden, match="deploy models"):
        await world.gateway.load("large")
    with pytest.raises(Forbidden, match="deploy models"):
        await world.gateway.unload("large")


# ---- tracing --------------------------------------------------------------------------------------------------------


async def test_a_sampled_request_has_a_server_span_with_a_client_child_that_the_tier_continues() -> None:
    world = World()
    await world.gateway.infer(request(), Call(traceparent=SAMPLED))
    spans = world.spans()
    server, client = spans["infer large"], spans["heavy"]
    assert (server.kind, client.kind) == (SpanKind.SERVER, SpanKind.CLIENT)
    assert server.parent is not None
    assert f"{server.parent.span_id:016x}" == "b7ad6b7169203331"
    assert client.parent == server.context
    assert client.context is not None
    assert world.heavy.asked[0].traceparent == f"00-{TRACE_ID}-{client.context.span_id:016x}-01"
    assert server.attributes is not None
    assert server.attributes["nanofleet.keep"] == "sampled"


async def test_an_unsampled_request_hands_its_context_on_and_makes_no_span() -> None:
    world = World(sample_ratio=1.0)
    await world.gateway.infer(request(), Call(traceparent=UNSAMPLED))
    assert world.spans() == {}
    assert world.heavy.asked[0].traceparent == UNSAMPLED


@pytest.mark.parametrize("malformed", ["", "hello", f"{UNSAMPLED}\r\nx-more: 1", f"00-{'0' * 32}-{'0' * 16}-00"])
async def test_a_malformed_context_does_not_go_on_to_the_tier(malformed: str) -> None:
    world = World()
    await world.gateway.infer(request(), Call(traceparent=malformed))
    assert world.heavy.asked[0].traceparent is None


async def test_a_failed_request_is_an_error_on_both_spans() -> None:
    world = World()
    world.heavy.refuse_with = HeavyUnavailable("away")
    with pytest.raises(HeavyUnavailable):
        await world.gateway.infer(request(), Call(traceparent=SAMPLED))
    for span in world.spans().values():
        assert span.status.status_code is StatusCode.ERROR
        assert span.attributes is not None
        assert span.attributes["error.type"] == "unavailable"


# ---- kept although not sampled --------------------------------------------------------------------------------------

KEEPING = KeepRule(slow_s=2.0, per_s=1.0)


async def test_an_unsampled_request_that_fails_is_written_down_and_links_to_its_caller() -> None:
    world = World(keep=KEEPING)
    world.heavy.takes_s = 0.25
    world.heavy.refuse_with = HeavyUnavailable("away")
    with pytest.raises(HeavyUnavailable):
        await world.gateway.infer(request(), Call(traceparent=UNSAMPLED))
    spans = world.spans()
    server, client = spans["infer large"], spans["heavy"]
    assert server.attributes is not None
    assert server.attributes["nanofleet.keep"] == "error"
    assert server.attributes["error.type"] == "unavailable"
    assert server.attributes["nanofleet.variant"] == ORIGINAL
    assert server.parent is None
    assert [f"{link.context.trace_id:032x}" for link in server.links] == [TRACE_ID]
    assert client.parent == server.context
    # The tier was told what the caller said.
    assert world.heavy.asked[0].traceparent == UNSAMPLED


async def test_an_unsampled_request_that_was_refused_before_the_tier_was_asked_has_no_client_span() -> None:
    world = World(keep=KEEPING)
    with pytest.raises(UnknownModel):
        await world.gateway.infer(request(model="other"), Call())
    assert set(world.spans()) == {"infer other"}


@pytest.mark.parametrize(("takes_s", "names"), [(1.9, set()), (2.0, {"infer large", "heavy"})])
async def test_an_unsampled_request_is_written_down_when_it_was_slow(takes_s: float, names: set[str]) -> None:
    world = World(keep=KEEPING)
    world.heavy.takes_s = takes_s
    await world.gateway.infer(request(), Call())
    spans = world.spans()
    assert set(spans) == names
    for span in spans.values():
        assert span.start_time is not None
        assert span.end_time is not None


@pytest.mark.parametrize(("takes_s", "names"), [(0.1, set()), (2.5, {"infer large", "heavy"})])
async def test_a_caller_who_leaves_is_kept_only_if_that_took_long(takes_s: float, names: set[str]) -> None:
    world = World(keep=KEEPING)
    world.heavy.takes_s = takes_s
    world.heavy.refuse_with = asyncio.CancelledError()
    with pytest.raises(asyncio.CancelledError):
        await world.gateway.infer(request(), Call())
    spans = world.spans()
    assert set(spans) == names
    assert all(span.status.status_code is not StatusCode.ERROR for span in spans.values())


async def test_errors_beyond_the_rate_are_not_kept() -> None:
    world = World(keep=KEEPING)
    world.heavy.refuse_with = HeavyUnavailable("away")
    for _ in range(50):
        with pytest.raises(HeavyUnavailable):
            await world.gateway.infer(request(), Call())
    world.tracing.shutdown()
    assert len(world.exporter.get_finished_spans()) == 2 * KEEP_BURST


# ---- metrics --------------------------------------------------------------------------------------------------------


def requests_of(world: World, **labels: str) -> float:
    return numbers(world.exposition())["nanofleet_gateway_requests_total", frozenset(labels.items())]


async def test_an_answer_is_counted_with_what_the_tier_took() -> None:
    world = World()
    await world.gateway.infer(request(), Call())

    assert requests_of(world, model=LARGE, status="ok") == 1
    stage = {"model": str(LARGE), "stage": "heavy", "tier": "heavy"}
    shown = numbers(world.exposition())
    assert shown["nanofleet_stage_duration_seconds_count", frozenset(stage.items())] == 1


async def test_a_refusal_is_counted_by_its_code() -> None:
    world = World()
    world.heavy.refuse_with = HeavyUnavailable("away")
    with pytest.raises(HeavyUnavailable):
        await world.gateway.infer(request(), Call())

    assert requests_of(world, model=LARGE, status="unavailable") == 1


async def test_a_name_that_a_caller_made_up_becomes_no_label() -> None:
    world = World()
    with pytest.raises(UnknownModel):
        await world.gateway.infer(request(model="other"), Call())

    assert requests_of(world, model="", status="not_found") == 1


@pytest.mark.parametrize(("traceparent", "expected"), [(SAMPLED, True), (UNSAMPLED, False), (None, False)])
async def test_only_a_recorded_trace_stands_at_its_bucket(traceparent: str | None, expected: bool) -> None:
    world = World()
    await world.gateway.infer(request(), Call(traceparent=traceparent))

    assert (TRACE_ID.encode() in world.exposition()) is expected
