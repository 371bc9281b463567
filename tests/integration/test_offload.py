"""Asking the heavy tier over a real channel: deadline, trace, breaker, cancellation; and the local gRPC face."""

import asyncio
from collections.abc import AsyncIterator

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from controller.demo.ports import free_port
from core.addresses import Address
from core.breaker import BreakerPolicy, BreakerState
from core.clock import SystemClock
from core.deadline import Deadline
from core.errors import (
    DeadlineExceeded,
    HeavyUnavailable,
    InvalidTensor,
    ModelNotReady,
    NotFound,
    Overloaded,
    UnknownModel,
)
from core.grpc_transport import TransportCredentials, open_channel
from core.open_inference import protobuf_body
from core.open_inference.messages import InferRequest, InferResponse
from core.open_inference.service import Call
from edge_agent.cascade.offload import Offload
from edge_agent.cascade.policy import MIN_OFFLOAD_S, Reason
from edge_agent.front.grpc import GrpcFront
from edge_agent.settings import OffloadSettings
from protos.inference.v2 import open_inference_pb2_grpc as services
from tests.support.clocks import HeldClock
from tests.support.echo_plane import EchoPlane
from tests.support.edge_plane import SURE, cascade_of, echo_model, plane_with, request_of

CLOCK = SystemClock()
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
REQUEST = request_of(SURE, model="echo", request_id="7")


class SlowPlane(EchoPlane):
    """Never answers; says when it was asked and when its caller left."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = asyncio.Event()
        self.left = asyncio.Event()

    async def infer(self, request: InferRequest, call: Call) -> InferResponse:
        self.asked.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.left.set()
            raise
        raise AssertionError


async def serve(plane: EchoPlane) -> tuple[GrpcFront, Address]:
    front = GrpcFront(
        plane, bind=Address("127.0.0.1", 0), credentials=TransportCredentials.local().server, clock=CLOCK, version="1"
    )
    return front, await front.start()


@pytest.fixture
async def plane() -> EchoPlane:
    return EchoPlane()


@pytest.fixture
async def offload(plane: EchoPlane) -> AsyncIterator[Offload]:
    front, address = await serve(plane)
    channel = open_channel(address, TransportCredentials.local())
    yield Offload(channel, OffloadSettings(), clock=CLOCK)
    await channel.close()
    await front.stop(0)


def within(seconds: float) -> Deadline:
    return Deadline.after(seconds, now_s=CLOCK.monotonic_s())


async def test_the_answer_comes_back_and_the_trace_goes_along(plane: EchoPlane, offload: Offload) -> None:
    response = await offload.ask(REQUEST, deadline=within(5), traceparent=TRACEPARENT)
    assert response.id == "7"
    assert response.outputs[0].array.tolist() == [list(SURE)]
    assert plane.calls[0].traceparent == TRACEPARENT


async def test_the_heavy_tier_gets_the_remaining_time_without_what_the_reply_needs(
    plane: EchoPlane, offload: Offload
) -> None:
    await offload.ask(REQUEST, deadline=within(5))
    deadline = plane.calls[0].deadline
    assert deadline is not None
    assert 4 < deadline.remaining_s(CLOCK.monotonic_s()) < 4.98 + 0.05


@pytest.mark.parametrize("beyond_reserve_s", [-0.01, MIN_OFFLOAD_S / 2])
async def test_with_too_little_time_left_it_is_not_asked(
    plane: EchoPlane, offload: Offload, beyond_reserve_s: float
) -> None:
    with pytest.raises(DeadlineExceeded, match="too little time"):
        await offload.ask(REQUEST, deadline=within(OffloadSettings().reply_reserve_s + beyond_reserve_s))
    assert plane.requests == []


@pytest.mark.parametrize("error", [UnknownModel("no such"), InvalidTensor("wrong shape")])
async def test_a_refusal_of_the_request_is_told_and_does_not_open_the_breaker(
    plane: EchoPlane, offload: Offload, error: Exception
) -> None:
    plane.refuse_with = error
    for _ in range(5):
        with pytest.raises(type(error).__mro__[1], match=str(error)):
            await offload.ask(REQUEST, deadline=within(5))
    assert offload.state is BreakerState.CLOSED


async def test_a_refusal_is_told_to_the_operator_once_per_model_and_code(
    plane: EchoPlane, offload: Offload, caplog: pytest.LogCaptureFixture
) -> None:
    for error in (UnknownModel("no such"), InvalidTensor("wrong shape"), UnknownModel("no such"), Overloaded("busy")):
        plane.refuse_with = error
        with pytest.raises(type(error).__mro__[1]):
            await offload.ask(REQUEST, deadline=within(5))
    warnings = [record for record in caplog.records if record.name == "edge_agent.cascade.offload"]
    assert [(record.levelname, vars(record)["model"], vars(record)["code"]) for record in warnings] == [
        ("WARNING", "echo", "NOT_FOUND"),
        ("WARNING", "echo", "INVALID_ARGUMENT"),
    ]


async def test_a_model_that_is_not_ready_there_is_the_heavy_tier_being_unavailable(
    plane: EchoPlane, offload: Offload
) -> None:
    plane.refuse_with = ModelNotReady("loading")
    with pytest.raises(HeavyUnavailable, match="loading"):
        await offload.ask(REQUEST, deadline=within(5))


async def test_with_the_tier_away_the_breaker_opens_and_lets_it_be() -> None:
    channel = open_channel(Address("127.0.0.1", free_port()), TransportCredentials.local())
    policy = BreakerPolicy(failures_to_open=2, open_s=60)
    offload = Offload(channel, OffloadSettings(), clock=CLOCK, breaker=policy)
    for _ in range(2):
        with pytest.raises(HeavyUnavailable):
            await offload.ask(REQUEST, deadline=within(5))
    assert offload.state is BreakerState.OPEN
    with pytest.raises(HeavyUnavailable, match="left alone"):
        await offload.ask(REQUEST, deadline=within(5))
    await channel.close()


async def test_a_tier_that_does_not_answer_in_time_is_given_up_before_the_deadline() -> None:
    front, address = await serve(SlowPlane())
    channel = open_channel(address, TransportCredentials.local())
    deadline = within(0.2)
    with pytest.raises(DeadlineExceeded):
        await Offload(channel, OffloadSettings(), clock=CLOCK).ask(REQUEST, deadline=deadline)
    assert deadline.remaining_s(CLOCK.monotonic_s()) > 0
    await channel.close()
    await front.stop(0)


@pytest.mark.parametrize("end", ["-\N{SNOWMAN}", "-\r", "\n", "0"])
async def test_a_trace_that_grpc_or_its_format_refuses_is_left_out(
    plane: EchoPlane, offload: Offload, end: str
) -> None:
    response = await offload.ask(REQUEST, deadline=within(5), traceparent="cc" + TRACEPARENT[2:] + end)
    assert response.id == "7"
    assert plane.calls[0].traceparent is None


async def test_a_fault_on_this_side_gives_back_the_slot_and_the_probe(plane: EchoPlane) -> None:
    front, address = await serve(plane)
    channel = open_channel(address, TransportCredentials.local())
    policy = BreakerPolicy(failures_to_open=1, open_s=0)
    offload = Offload(channel, OffloadSettings(max_in_flight=1), clock=CLOCK, breaker=policy)
    plane.refuse_with = ModelNotReady("loading")
    with pytest.raises(HeavyUnavailable, match="loading"):
        await offload.ask(REQUEST, deadline=within(5))
    plane.refuse_with = None
    with pytest.raises(UnicodeEncodeError):
        await offload.ask(request_of(SURE, model="echo", request_id="\ud800"), deadline=within(5))
    assert offload.state is BreakerState.HALF_OPEN
    assert (await offload.ask(REQUEST, deadline=within(5))).id == "7"
    await channel.close()
    await front.stop(0)


@pytest.mark.parametrize(
    ("seconds", "state", "error"),
    [(0.1, BreakerState.CLOSED, DeadlineExceeded), (None, BreakerState.OPEN, HeavyUnavailable)],
    ids=["impatient", "fair"],
)
async def test_only_a_call_with_a_fair_time_opens_the_breaker_by_being_late(
    seconds: float | None, state: BreakerState, error: type[Exception]
) -> None:
    front, address = await serve(SlowPlane())
    channel = open_channel(address, TransportCredentials.local())
    settings, policy = OffloadSettings(default_timeout_s=0.2), BreakerPolicy(failures_to_open=2, open_s=60)
    offload = Offload(channel, settings, clock=CLOCK, breaker=policy)
    for _ in range(2):
        with pytest.raises(error):
            await offload.ask(REQUEST, deadline=None if seconds is None else within(seconds))
    assert offload.state is state
    await channel.close()
    await front.stop(0)


async def test_a_caller_who_leaves_cancels_the_call_on_the_other_end() -> None:
    plane = SlowPlane()
    front, address = await serve(plane)
    channel = open_channel(address, TransportCredentials.local())
    offload = Offload(channel, OffloadSettings(), clock=CLOCK)
    asking = asyncio.create_task(offload.ask(REQUEST, deadline=within(60)))
    async with asyncio.timeout(5):
        await plane.asked.wait()
        asking.cancel()
        await plane.left.wait()
    assert offload.state is BreakerState.CLOSED
    await channel.close()
    await front.stop(0)


async def test_more_escalations_than_allowed_are_not_made() -> None:
    plane = SlowPlane()
    front, address = await serve(plane)
    channel = open_channel(address, TransportCredentials.local())
    offload = Offload(channel, OffloadSettings(max_in_flight=1), clock=CLOCK)
    asking = asyncio.create_task(offload.ask(REQUEST, deadline=within(60)))
    await plane.asked.wait()
    with pytest.raises(HeavyUnavailable, match="at most 1"):
        await offload.ask(REQUEST, deadline=within(60))
    asking.cancel()
    await channel.close()
    await front.stop(0)


async def test_a_round_trip_that_is_longer_than_what_is_left_is_an_obstacle(offload: Offload) -> None:
    assert offload.obstacle("echo", remaining_s=0.05) is None
    offload._forecasts["echo"].observe(0.5, now_s=CLOCK.monotonic_s())
    assert offload.obstacle("echo", remaining_s=0.5 + OffloadSettings().reply_reserve_s - 0.001) is Reason.DEADLINE
    assert offload.obstacle("echo", remaining_s=0.6) is None
    assert offload.obstacle("echo", remaining_s=None) is None
    assert offload.obstacle("another", remaining_s=0.05) is None


async def test_answers_and_timeouts_make_the_forecast_and_refusals_do_not(plane: EchoPlane, offload: Offload) -> None:
    plane.refuse_with = UnknownModel("no such")
    with pytest.raises(NotFound):
        await offload.ask(REQUEST, deadline=within(5))
    assert offload.expected_s() == {}
    plane.refuse_with = None
    await offload.ask(REQUEST, deadline=within(5))
    assert 0 < offload.expected_s()["echo"] < 5


async def test_a_timeout_counts_as_a_round_trip_of_at_least_that_length() -> None:
    front, address = await serve(SlowPlane())
    channel = open_channel(address, TransportCredentials.local())
    offload = Offload(channel, OffloadSettings(), clock=CLOCK)
    with pytest.raises(DeadlineExceeded):
        await offload.ask(REQUEST, deadline=within(0.2))
    assert offload.expected_s()["echo"] == pytest.approx(0.198, abs=0.02)
    assert offload.obstacle("echo", remaining_s=0.15) is Reason.DEADLINE
    await channel.close()
    await front.stop(0)


async def test_an_open_breaker_is_an_obstacle_until_its_probe_is_due() -> None:
    channel = open_channel(Address("127.0.0.1", free_port()), TransportCredentials.local())
    clock = HeldClock()
    policy = BreakerPolicy(failures_to_open=1, open_s=10)
    offload = Offload(channel, OffloadSettings(), clock=clock, breaker=policy)
    with pytest.raises(HeavyUnavailable):
        await offload.ask(REQUEST)
    assert offload.obstacle("echo", remaining_s=5.0) is Reason.HEAVY_UNAVAILABLE
    clock.pass_s(10)
    assert offload.obstacle("echo", remaining_s=5.0) is None
    await channel.close()


async def test_as_many_escalations_as_there_may_be_are_an_obstacle() -> None:
    plane = SlowPlane()
    front, address = await serve(plane)
    channel = open_channel(address, TransportCredentials.local())
    offload = Offload(channel, OffloadSettings(max_in_flight=1), clock=CLOCK)
    asking = asyncio.create_task(offload.ask(REQUEST, deadline=within(60)))
    await plane.asked.wait()
    assert offload.obstacle("echo", remaining_s=5.0) is Reason.HEAVY_UNAVAILABLE
    asking.cancel()
    await channel.close()
    await front.stop(0)


async def test_programs_on_the_same_machine_are_served_over_grpc() -> None:
    plane = await plane_with(echo_model(cascade=cascade_of()))
    front = GrpcFront(
        plane, bind=Address("127.0.0.1", 0), credentials=TransportCredentials.local().server, clock=CLOCK, version="1"
    )
    address = await front.start()
    channel = open_channel(address, TransportCredentials.local())
    stub = services.GRPCInferenceServiceStub(channel)
    response = protobuf_body.decode_response(await stub.ModelInfer(protobuf_body.encode_request(request_of(SURE))))
    assert response.outputs[0].array.tolist() == [list(SURE)]
    assert response.parameters["tier"] == "edge"
    health = health_pb2_grpc.HealthStub(channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(protobuf_body.encode_request(request_of(SURE, model="letters")))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    await channel.close()
    await front.stop(0)
