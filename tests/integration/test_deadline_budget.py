"""One deadline through every tier: MQTT → the edge's queue and run → gRPC → gateway → the heavy tier's HTTP."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from controller.gateway.dispatch import Gateway
from controller.heavy.client import HeavyClient
from controller.registry.model import Model, ModelVersion, Variant
from core.addresses import Address
from core.clock import SystemClock
from core.grpc_transport import TransportCredentials, open_channel
from core.ids import ModelName, VariantName
from core.manifest import Signature
from core.open_inference.messages import InferRequest, InferResponse
from core.open_inference.service import Call
from core.telemetry import Tracing
from core.tensors import Array, Datatype
from edge_agent.cascade.offload import Offload
from edge_agent.front.grpc import GrpcFront
from edge_agent.runtime.pool import LoadedModel
from edge_agent.runtime.session import RunTime
from edge_agent.settings import OffloadSettings, RuntimeSettings
from tests.support.edge_front import body_of, device, serving
from tests.support.edge_plane import UNSAMPLED, cascade_of, echo_manifest
from tests.support.fake_heavy import FakeHeavy
from tests.support.mosquitto import Mosquitto, running_mosquitto
from tests.support.registry_values import NOON, made_version

CLOCK = SystemClock()
LARGE = ModelName("large")
RUN_S = 0.1
UNSURE = (0.0, 0.5, 0.4, 0.0)


class Models:
    """A registry of one model."""

    async def models(self) -> Sequence[Model]:
        return [Model(LARGE, NOON, 1)]

    async def versions(self, model: ModelName) -> Sequence[ModelVersion]:
        return [made_version(LARGE, 1)]

    async def variant(self, model: ModelName, version: int | None, variant: VariantName) -> Variant:
        return made_version(LARGE, 1).variants[0]


@dataclass
class Tiers:
    """The controller's side, which notes what is left of a request's time when it comes."""

    heavy: FakeHeavy
    gateway: Gateway
    offload: Offload
    remaining_s: list[float] = field(default_factory=list)


class WatchedGateway(Gateway):
    tiers: Tiers

    async def infer(self, request: InferRequest, call: Call) -> InferResponse:
        assert call.deadline is not None
        self.tiers.remaining_s.append(call.deadline.remaining_s(CLOCK.monotonic_s()))
        return await super().infer(request, call)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with running_mosquitto(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture
async def tiers() -> AsyncIterator[Tiers]:
    async with FakeHeavy() as heavy, HeavyClient(heavy.url, clock=CLOCK) as client:
        gateway = WatchedGateway(Models(), client, tracing=Tracing("test", UNSAMPLED), clock=CLOCK)
        credentials = TransportCredentials.local()
        front = GrpcFront(
            gateway, bind=Address("127.0.0.1", 0), credentials=credentials.server, clock=CLOCK, version="1"
        )
        channel = open_channel(await front.start(), credentials)
        gateway.tiers = Tiers(heavy, gateway, Offload(channel, OffloadSettings(), clock=CLOCK))
        yield gateway.tiers
        await channel.close()
        await front.stop(0)


def slow_edge_model() -> LoadedModel:
    """A model that echoes its four scores after `RUN_S`."""
    wide = {"datatype": Datatype.FP32, "shape": (-1, 4)}
    manifest = echo_manifest(cascade=cascade_of()).model_copy(
        update={"inputs": (Signature(name="x", **wide),), "outputs": (Signature(name="scores", **wide),)}
    )

    def run(inputs: Sequence[Array]) -> Sequence[Array]:
        time.sleep(RUN_S)
        return inputs

    return LoadedModel(
        manifest,
        manifest.digest(),
        run,
        run_time=RunTime(RUN_S, RUN_S),
        settings=RuntimeSettings(),
        clock=CLOCK,
    )


async def test_what_is_left_of_the_deadline_shrinks_from_tier_to_tier(broker: Mosquitto, tiers: Tiers) -> None:
    async with serving(broker, slow_edge_model(), heavy=tiers.offload), device(broker) as camera:
        camera.send(body_of(UNSURE), deadline_ms="2000", expiry_s=2)
        reply = await camera.reply()
    assert (reply.words["status"], reply.words["tier"]) == ("200", "heavy")
    [at_gateway_s], [headers] = tiers.remaining_s, tiers.heavy.asked
    at_heavy_s = float(headers["x-deadline-ms"]) / 1000
    serve_timeout_s = float(headers["x-request-timeout-seconds"])
    # The run at the edge and what is kept back for the reply are gone by then.
    assert 1.0 < at_gateway_s <= 2.0 - RUN_S - OffloadSettings().reply_reserve_s
    assert 1.0 < at_heavy_s <= at_gateway_s
    assert serve_timeout_s == pytest.approx(at_heavy_s, abs=2e-3)


async def test_when_the_last_tier_is_late_the_edges_answer_is_still_in_time(broker: Mosquitto, tiers: Tiers) -> None:
    tiers.heavy.infer = tiers.heavy.never
    async with serving(broker, slow_edge_model(), heavy=tiers.offload) as front, device(broker) as camera:
        asked_s = CLOCK.monotonic_s()
        camera.send(body_of(UNSURE), deadline_ms="500", expiry_s=1)
        reply = await camera.reply()
        assert CLOCK.monotonic_s() - asked_s < 0.5
        assert front.counters.late == 0
    assert (reply.words["tier"], reply.words["reason"], reply.words["final"]) == ("edge", "deadline", "1")
    async with asyncio.timeout(5):
        await tiers.heavy.abandoned.wait()


async def test_after_a_late_tier_nobody_with_as_little_time_asks_it(broker: Mosquitto, tiers: Tiers) -> None:
    tiers.heavy.infer = tiers.heavy.never
    async with serving(broker, slow_edge_model(), heavy=tiers.offload), device(broker) as camera:
        for correlation in (b"first", b"second"):
            camera.send(body_of(UNSURE), deadline_ms="400", expiry_s=1, correlation=correlation)
            assert (await camera.reply()).words["reason"] == "deadline"
    assert len(tiers.heavy.asked) == 1
