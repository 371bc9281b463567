"""A request is gone with its reply: no cycle keeps it until the collector comes, which overload would outrun."""

import asyncio
import gc
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest

from core.addresses import Address
from core.clock import SystemClock
from core.errors import Overloaded
from core.grpc_transport import TransportCredentials, open_channel
from core.metrics import Registry
from core.open_inference import protobuf_body
from edge_agent.front.grpc import GrpcFront
from edge_agent.runtime.job import Job
from protos.inference.v2 import open_inference_pb2_grpc as pb_grpc
from tests.integration.test_http_inference import ask, message
from tests.integration.test_http_inference import serving as serving_http
from tests.support.edge_front import body_of, device, serving
from tests.support.edge_plane import SlowModel, plane_with, request_of
from tests.support.mosquitto import running_mosquitto

REQUESTS = 20
# Of the model below, to whom a request with half a second comes too late while another runs.
RUN_S = 5.0
TIMEOUT_US = 500_000


@contextmanager
def nothing_left(of: type) -> Iterator[None]:
    """Assert that what the block made of a kind was given back without the collector."""
    gc.collect()
    before = {id(found): found for found in gc.get_objects() if isinstance(found, of)}
    gc.disable()
    try:
        yield
        assert not [found for found in gc.get_objects() if isinstance(found, of) and id(found) not in before]
    finally:
        gc.enable()


async def test_over_mqtt(tmp_path_factory: pytest.TempPathFactory) -> None:
    slow = SlowModel()
    with running_mosquitto(tmp_path_factory.mktemp("broker")) as broker:
        async with serving(broker, slow.loaded(expected_s=RUN_S)) as front, device(broker) as camera:
            camera.send(body_of(), correlation=b"first", expiry_s=60)
            await asyncio.wait_for(slow.is_running.wait(), 10)
            with nothing_left(Overloaded):
                for number in range(REQUESTS):
                    camera.send(body_of(), correlation=b"%d" % number, deadline_ms="500")
                replies = [await camera.reply() for _ in range(REQUESTS)]
                assert {reply.words["status"] for reply in replies} == {"429"}
            slow.release()
            assert (await camera.reply()).correlation == b"first"
    assert front.counters.refused == REQUESTS


async def test_over_http() -> None:
    slow = SlowModel()
    plane = await plane_with(slow.loaded(expected_s=RUN_S))
    first = plane.ask(request_of())
    await asyncio.wait_for(slow.is_running.wait(), 10)
    async with serving_http(plane) as address:
        with nothing_left(Overloaded):
            for _ in range(REQUESTS):
                assert (await ask(address, message(parameters={"timeout": TIMEOUT_US})))[0] == 429
        slow.release()
        await first


async def test_over_grpc() -> None:
    slow = SlowModel()
    plane = await plane_with(slow.loaded(expected_s=RUN_S))
    first = plane.ask(request_of())
    await asyncio.wait_for(slow.is_running.wait(), 10)
    credentials = TransportCredentials.local()
    front = GrpcFront(
        plane,
        bind=Address("127.0.0.1", 0),
        credentials=credentials.server,
        clock=SystemClock(),
        version="1",
        metrics=Registry(),
    )
    channel = open_channel(await front.start(), credentials)
    stub: pb_grpc.GRPCInferenceServiceAsyncStub = pb_grpc.GRPCInferenceServiceStub(channel)
    with nothing_left(Overloaded):
        for _ in range(REQUESTS):
            with pytest.raises(grpc.RpcError) as refused:
                await stub.ModelInfer(protobuf_body.encode_request(request_of(timeout=TIMEOUT_US)))
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    slow.release()
    await first
    await channel.close()
    await front.stop(0)


async def test_a_run_on_a_thread() -> None:
    model = SlowModel()
    model.release()
    plane = await plane_with(model.loaded())
    with nothing_left(Job):
        for _ in range(REQUESTS):
            await plane.answer(request_of())
        await asyncio.sleep(0)
