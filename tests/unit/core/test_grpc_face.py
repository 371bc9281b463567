"""The gRPC face over a fake plane and context: what reaches the plane, and what becomes of every error."""

import logging
from collections.abc import Mapping
from typing import Any, NoReturn

import grpc
import numpy as np
import pytest

from core.clock import Clock
from core.deadline import Deadline
from core.errors import InternalError, NanofleetError, Overloaded, UnknownModel
from core.open_inference.grpc_face import OpenInferenceServicer
from core.open_inference.messages import BodyLimits
from core.open_inference.service import EXTENSIONS, Call
from protos.inference.v2 import open_inference_pb2 as pb
from tests.support.clocks import HeldClock
from tests.support.echo_plane import EchoPlane


class Aborted(Exception):
    """What the real context raises to end the call."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing: Mapping[str, str]) -> None:
        super().__init__(code, details, trailing)
        self.code = code
        self.details = details
        self.trailing = trailing


class FakeContext:
    def __init__(
        self, *, metadata: Mapping[str, str | bytes] | None = None, time_remaining_s: float | None = None
    ) -> None:
        self._metadata = metadata
        self._time_remaining_s = time_remaining_s

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...] | None:
        return None if self._metadata is None else tuple(self._metadata.items())

    def time_remaining(self) -> float | None:
        return self._time_remaining_s

    async def abort(
        self, code: grpc.StatusCode, details: str, trailing_metadata: tuple[tuple[str, str], ...] = ()
    ) -> NoReturn:
        raise Aborted(code, details, dict(trailing_metadata))

    def set_code(self, code: grpc.StatusCode) -> None:
        self._code = code

    def set_details(self, details: str) -> None:
        self._details = details

    def set_trailing_metadata(self, trailing_metadata: tuple[tuple[str, str], ...]) -> NoReturn:
        """End the call: it is the last that the face says of a refusal."""
        raise Aborted(self._code, self._details, dict(trailing_metadata))


class DefectivePlane(EchoPlane):
    async def metadata(self, name: str, version: str) -> Any:
        raise LookupError("password=hunter2")


def servicer(plane: EchoPlane, *, clock: Clock | None = None, limits: BodyLimits | None = None) -> Any:
    """The generated stubs want a context of their own class; the fake has what the face uses."""
    return OpenInferenceServicer(
        plane, server_name="edge", server_version="1", clock=clock or HeldClock(), limits=limits or BodyLimits()
    )


def infer_message(**more: Any) -> pb.ModelInferRequest:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 2])
    raw = np.array([1, 2], np.float32).tobytes()
    return pb.ModelInferRequest(model_name="echo", inputs=[tensor], raw_input_contents=[raw], **more)


async def refusal(plane: EchoPlane, message: pb.ModelInferRequest, context: FakeContext | None = None) -> Aborted:
    with pytest.raises(Aborted) as caught:
        await servicer(plane).ModelInfer(message.SerializeToString(), context or FakeContext())
    return caught.value


async def call_of(context: FakeContext, **more: Any) -> Call:
    plane = EchoPlane()
    await servicer(plane, clock=HeldClock(monotonic_s=100.0)).ModelInfer(
        infer_message(**more).SerializeToString(), context
    )
    return plane.calls[0]


async def test_a_raw_request_is_answered_raw() -> None:
    body = await servicer(EchoPlane()).ModelInfer(infer_message(id="7").SerializeToString(), FakeContext())
    response = pb.ModelInferResponse.FromString(body)
    assert (response.id, response.outputs[0].name, list(response.outputs[0].shape)) == ("7", "x", [1, 2])
    assert response.raw_output_contents == [np.array([1, 2], np.float32).tobytes()]


async def test_a_typed_request_is_answered_typed() -> None:
    message = infer_message()
    del message.raw_input_contents[:]
    message.inputs[0].contents.fp32_contents.extend([1, 2])
    body = await servicer(EchoPlane()).ModelInfer(message.SerializeToString(), FakeContext())
    response = pb.ModelInferResponse.FromString(body)
    assert list(response.outputs[0].contents.fp32_contents) == [1, 2]
    assert not response.raw_output_contents


async def test_the_trace_context_of_the_metadata_reaches_the_plane() -> None:
    call = await call_of(FakeContext(metadata={"traceparent": "00-a-b-01", "tracestate": "k=v", "other": "x"}))
    assert (call.traceparent, call.tracestate) == ("00-a-b-01", "k=v")


async def test_an_oversized_tracestate_is_left_out() -> None:
    assert (await call_of(FakeContext(metadata={"tracestate": "k" * 513}))).tracestate is None


@pytest.mark.parametrize(
    ("time_remaining_s", "timeout_us", "at_s"),
    [(5.0, 0, 105.0), (None, 2_000_000, 102.0), (5.0, 2_000_000, 102.0), (1.0, 2_000_000, 101.0)],
)
async def test_the_deadline_is_the_nearest_of_context_and_timeout(
    time_remaining_s: float | None, timeout_us: int, at_s: float
) -> None:
    parameters = {"timeout": pb.InferParameter(int64_param=timeout_us)}
    call = await call_of(FakeContext(time_remaining_s=time_remaining_s), parameters=parameters)
    assert call.deadline == Deadline(at_s)


async def test_without_a_deadline_there_is_none() -> None:
    assert (await call_of(FakeContext())).deadline is None


async def test_a_request_whose_time_is_over_never_reaches_the_plane() -> None:
    plane = EchoPlane()
    assert (await refusal(plane, infer_message(), FakeContext(time_remaining_s=0.0))).code is (
        grpc.StatusCode.DEADLINE_EXCEEDED
    )
    assert not plane.requests


@pytest.mark.parametrize(
    ("error", "code"),
    [(UnknownModel("no such"), grpc.StatusCode.NOT_FOUND), (Overloaded("full"), grpc.StatusCode.RESOURCE_EXHAUSTED)],
)
async def test_an_error_of_the_tree_becomes_its_status(error: NanofleetError, code: grpc.StatusCode) -> None:
    plane = EchoPlane()
    plane.refuse_with = error
    refused = await refusal(plane, infer_message())
    assert (refused.code, refused.details) == (code, str(error))


async def test_a_malformed_tensor_is_an_invalid_argument() -> None:
    message = infer_message()
    message.inputs[0].shape[:] = [3]
    assert (await refusal(EchoPlane(), message)).code is grpc.StatusCode.INVALID_ARGUMENT


async def test_bytes_that_are_no_message_are_an_invalid_argument() -> None:
    with pytest.raises(Aborted) as caught:
        await servicer(EchoPlane()).ModelInfer(b"\xff\xff", FakeContext())
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_defect_is_hidden_from_the_public_and_logged_with_its_traceback_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plane = EchoPlane()
    plane.refuse_with = LookupError("password=hunter2")
    face = servicer(plane)
    with caplog.at_level(logging.DEBUG):
        for _ in range(2):
            with pytest.raises(Aborted) as caught:
                await face.ModelInfer(infer_message().SerializeToString(), FakeContext())
            assert caught.value.code is grpc.StatusCode.INTERNAL
            assert "hunter2" not in caught.value.details
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.DEBUG]
    assert all(record.exc_info for record in caplog.records)


async def test_an_internal_error_of_ours_is_told_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    plane = EchoPlane()
    plane.refuse_with = InternalError("output 'y' is not finite")
    assert (await refusal(plane, infer_message())).details == "output 'y' is not finite"
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


async def test_a_defect_in_another_rpc_does_not_leak_either() -> None:
    with pytest.raises(Aborted) as caught:
        await servicer(DefectivePlane()).ModelMetadata(pb.ModelMetadataRequest(name="echo"), FakeContext())
    assert caught.value.code is grpc.StatusCode.INTERNAL


async def test_a_long_message_is_cut_to_fit_the_trailers() -> None:
    plane = EchoPlane()
    plane.refuse_with = UnknownModel("x" * 10_000)
    assert len((await refusal(plane, infer_message())).details) <= 1000


async def test_health_and_metadata_come_from_the_plane() -> None:
    plane = EchoPlane()
    face, context = servicer(plane), FakeContext()
    plane.ready = False
    assert (await face.ServerLive(pb.ServerLiveRequest(), context)).live
    assert not (await face.ServerReady(pb.ServerReadyRequest(), context)).ready
    assert (await face.ModelReady(pb.ModelReadyRequest(name="echo"), context)).ready
    server = await face.ServerMetadata(pb.ServerMetadataRequest(), context)
    assert (server.name, server.version, tuple(server.extensions)) == ("edge", "1", EXTENSIONS)
    model = await face.ModelMetadata(pb.ModelMetadataRequest(name="echo"), context)
    assert (list(model.versions), model.inputs[0].datatype) == (["1", "2"], "FP32")


async def test_the_index_can_be_narrowed_to_what_is_ready() -> None:
    face = servicer(EchoPlane())
    everything = await face.RepositoryIndex(pb.RepositoryIndexRequest(), FakeContext())
    ready = await face.RepositoryIndex(pb.RepositoryIndexRequest(ready=True), FakeContext())
    assert [model.name for model in everything.models] == ["echo", "echo", "sleeping"]
    assert [model.name for model in ready.models] == ["echo", "echo"]


@pytest.mark.parametrize("names", [{"model_name": "echo"}, {"repository_name": "echo"}])
async def test_a_model_is_loaded_and_unloaded_by_the_numbers_of_triton_and_of_kserve(names: dict[str, str]) -> None:
    plane = EchoPlane()
    await servicer(plane).RepositoryModelLoad(pb.RepositoryModelLoadRequest(**names), FakeContext())
    await servicer(plane).RepositoryModelUnload(pb.RepositoryModelUnloadRequest(**names), FakeContext())
    assert (plane.loads, plane.unloads) == (["echo"], ["echo"])


async def test_an_unknown_model_is_not_found_by_every_rpc_that_names_one() -> None:
    face = servicer(EchoPlane())
    for answer in (
        face.ModelReady(pb.ModelReadyRequest(name="none"), FakeContext()),
        face.ModelMetadata(pb.ModelMetadataRequest(name="none"), FakeContext()),
        face.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="none"), FakeContext()),
        face.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="none"), FakeContext()),
    ):
        with pytest.raises(Aborted) as caught:
            await answer
        assert caught.value.code is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("error", "trailing"),
    [
        (Overloaded("full").after(0.0121), {"retry-after-ms": "13"}),
        (Overloaded("full"), {}),
        (UnknownModel("no such").after(1.0), {}),
    ],
    ids=["known", "not known", "never"],
)
async def test_a_refusal_says_when_the_same_call_may_succeed(error: NanofleetError, trailing: dict[str, str]) -> None:
    plane = EchoPlane()
    plane.refuse_with = error
    assert (await refusal(plane, infer_message())).trailing == trailing
