"""The gRPC face over a real socket: deadlines, trace context, statuses and sizes as grpc itself hands them over."""

from collections.abc import AsyncIterator

import grpc
import grpc.aio
import numpy as np
import pytest

from core.addresses import Address
from core.clock import SystemClock
from core.errors import InternalError, Overloaded, UnknownModel
from core.grpc_transport import SERVER_OPTIONS, TransportCredentials, open_channel
from core.open_inference import protobuf_body
from core.open_inference.grpc_face import OpenInferenceServicer, add_open_inference
from core.open_inference.messages import InferRequest
from core.tensors import Datatype, Tensor
from protos.inference.v2 import open_inference_pb2 as pb
from protos.inference.v2 import open_inference_pb2_grpc as pb_grpc
from tests.support.echo_plane import EchoPlane


@pytest.fixture
def plane() -> EchoPlane:
    return EchoPlane()


@pytest.fixture
async def stub(plane: EchoPlane) -> AsyncIterator["pb_grpc.GRPCInferenceServiceAsyncStub"]:
    credentials = TransportCredentials.local()
    server = grpc.aio.server(options=SERVER_OPTIONS)
    face = OpenInferenceServicer(plane, server_name="test", server_version="1", clock=SystemClock())
    add_open_inference(face, server)
    port = server.add_secure_port("127.0.0.1:0", credentials.server)
    await server.start()
    channel = open_channel(Address("127.0.0.1", port), credentials)
    yield pb_grpc.GRPCInferenceServiceStub(channel)
    await channel.close()
    await server.stop(None)


def request_of(elements: int) -> pb.ModelInferRequest:
    tensor = Tensor("x", Datatype.FP32, np.zeros((1, elements), np.float32))
    return protobuf_body.encode_request(InferRequest("echo", (tensor,), id="7"))


async def test_a_call_without_deadline_and_context_arrives_as_such(
    plane: EchoPlane, stub: "pb_grpc.GRPCInferenceServiceAsyncStub"
) -> None:
    response = await stub.ModelInfer(request_of(2))
    assert (response.id, plane.calls[0].deadline, plane.calls[0].traceparent) == ("7", None, None)


async def test_deadline_and_trace_context_arrive(
    plane: EchoPlane, stub: "pb_grpc.GRPCInferenceServiceAsyncStub"
) -> None:
    await stub.ModelInfer(request_of(2), timeout=30.0, metadata=(("traceparent", "00-a-b-01"),))
    deadline = plane.calls[0].deadline
    assert deadline is not None
    # gRPC rounds the timeout that it sends up to three digits.
    assert 0 < deadline.remaining_s(SystemClock().monotonic_s()) <= 30.5
    assert plane.calls[0].traceparent == "00-a-b-01"


@pytest.mark.parametrize(
    ("error", "code", "details"),
    [
        (UnknownModel("model 'ö' is unknown"), grpc.StatusCode.NOT_FOUND, "model 'ö' is unknown"),
        (InternalError("ö" * 10_000), grpc.StatusCode.INTERNAL, "ö"),
        (LookupError("secret"), grpc.StatusCode.INTERNAL, "internal error"),
    ],
)
async def test_refusals_arrive_with_status_and_text(
    plane: EchoPlane,
    stub: "pb_grpc.GRPCInferenceServiceAsyncStub",
    error: Exception,
    code: grpc.StatusCode,
    details: str,
) -> None:
    plane.refuse_with = error
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(request_of(2))
    assert caught.value.code() is code
    assert (caught.value.details() or "").startswith(details)


async def test_a_body_of_empty_tensors_is_refused_by_their_number(
    plane: EchoPlane, stub: "pb_grpc.GRPCInferenceServiceAsyncStub"
) -> None:
    message = pb.ModelInferRequest(model_name="echo", inputs=[pb.ModelInferRequest.InferInputTensor()] * 65)
    with pytest.raises(grpc.aio.AioRpcError, match="inputs: expected at most 64, got 65"):
        await stub.ModelInfer(message)
    assert not plane.requests


async def test_a_body_over_four_mebibytes_passes_and_one_over_the_limit_is_refused(
    stub: "pb_grpc.GRPCInferenceServiceAsyncStub",
) -> None:
    response = await stub.ModelInfer(request_of(4 << 20))
    assert len(response.raw_output_contents[0]) == 16 << 20
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(request_of((4 << 20) + 1))
    assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE


async def test_when_to_come_again_arrives_in_the_trailing_metadata(
    plane: EchoPlane, stub: "pb_grpc.GRPCInferenceServiceAsyncStub"
) -> None:
    plane.refuse_with = Overloaded("full").after(0.25)
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await stub.ModelInfer(request_of(2))
    assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(refusal.value.trailing_metadata())["retry-after-ms"] == "250"
