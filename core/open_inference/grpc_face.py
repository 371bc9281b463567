"""The gRPC face: `inference.GRPCInferenceService` over any DataPlane; controller and agent both serve it.

Every call goes: decode → plane → encode. An error of our tree becomes its status of `core.status`; anything else is a
defect of ours, logged here with its traceback and answered as INTERNAL without a word of its inside.

Register it with `add_open_inference`: the bytes of ModelInfer are to be bounded before anything parses them.
"""

# ruff: noqa: N802 (the methods are named by the protocol)
import logging
import math
from collections.abc import Awaitable
from typing import Any, TypeAlias, TypeVar

import grpc.aio

from core.clock import Clock
from core.deadline import Deadline
from core.errors import DeadlineExceeded, InternalError, NanofleetError
from core.logs import withheld
from core.open_inference import protobuf_body
from core.open_inference.messages import DEFAULT_LIMITS, BodyLimits, InferRequest, timeout_s
from core.open_inference.service import EXTENSIONS, Call, DataPlane
from core.status import STATUS
from core.telemetry import TRACEPARENT
from protos.inference.v2 import open_inference_pb2 as pb
from protos.inference.v2 import open_inference_pb2_grpc as pb_grpc

_log = logging.getLogger(__name__)

# Of a refused call, in its trailing metadata; the word that MQTT and the OpenAI API use.
RETRY_AFTER = "retry-after-ms"
_SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_TRACESTATE = "tracestate"
# W3C Trace Context, section 3.3.1.5: at least 512 characters are to be handed on; more need not be.
_MAX_TRACESTATE_CHARS = 512
# A status message travels in HTTP/2 trailers, percent-encoded, of which gRPC takes 8 KiB by default.
_MAX_DETAILS_CHARS = 600

_Result = TypeVar("_Result")
# Not generic at run time.
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class OpenInferenceServicer(pb_grpc.GRPCInferenceServiceServicer):
    def __init__(
        self,
        plane: DataPlane,
        *,
        server_name: str,
        server_version: str,
        clock: Clock,
        limits: BodyLimits = DEFAULT_LIMITS,
    ) -> None:
        self._plane = plane
        self._server_name = server_name
        self._server_version = server_version
        self._clock = clock
        self._limits = limits
        self._defects = _Defects()

    async def ServerLive(self, request: pb.ServerLiveRequest, context: _Context) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: _Context) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=await self._answer(context, self._plane.is_ready()))

    async def ModelReady(self, request: pb.ModelReadyRequest, context: _Context) -> pb.ModelReadyResponse:
        is_ready = await self._answer(context, self._plane.is_model_ready(request.name, request.version))
        return pb.ModelReadyResponse(ready=is_ready)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: _Context) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name=self._server_name, version=self._server_version, extensions=EXTENSIONS)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: _Context) -> pb.ModelMetadataResponse:
        return await self._answer(context, self._metadata(request))

    # Bytes, where the stubs say a message: see add_open_inference.
    async def ModelInfer(  # type: ignore[override]
        self, request: bytes, context: _Context
    ) -> pb.ModelInferResponse:
        return await self._answer(context, self._infer(request, context))

    async def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, context: _Context
    ) -> pb.RepositoryIndexResponse:
        return await self._answer(context, self._index(request))

    async def _metadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        return protobuf_body.encode_metadata(await self._plane.metadata(request.name, request.version))

    async def _index(self, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        entries = await self._plane.index()
        return pb.RepositoryIndexResponse(
            models=[
                pb.RepositoryIndexResponse.ModelIndex(
                    name=entry.name, version=entry.version, state=entry.state, reason=entry.reason
                )
                for entry in entries
                if entry.state == "READY" or not request.ready
            ]
        )

    async def _infer(self, body: bytes, context: _Context) -> pb.ModelInferResponse:
        message = protobuf_body.parse_received_request(body, limits=self._limits)
        request = protobuf_body.decode_request(message, limits=self._limits)
        response = await self._plane.infer(request, self._call(request, context))
        return protobuf_body.encode_response(response, raw=request.binary_output)

    def _call(self, request: InferRequest, context: _Context) -> Call:
        traceparent = tracestate = None
        for key, value in context.invocation_metadata() or ():
            if key == TRACEPARENT and isinstance(value, str):
                traceparent = value
            elif key == _TRACESTATE and isinstance(value, str) and len(value) <= _MAX_TRACESTATE_CHARS:
                tracestate = value
        return Call(self._deadline(request, context), traceparent, tracestate)

    def _deadline(self, request: InferRequest, context: _Context) -> Deadline | None:
        # The stubs say float; without a deadline it is None (grpc.aio documentation).
        allowed: tuple[float | None, ...] = (context.time_remaining(), timeout_s(request))
        seconds = min((limit for limit in allowed if limit is not None), default=None)
        if seconds is None:
            return None
        if seconds <= 0:
            raise DeadlineExceeded("expected time left to answer, got a request whose deadline has passed")
        return Deadline.after(seconds, now_s=self._clock.monotonic_s())

    async def _answer(self, context: _Context, work: Awaitable[_Result]) -> _Result:
        try:
            return await work
        except InternalError as error:
            self._defects.record(error)
            refusal: NanofleetError = error
        except NanofleetError as error:
            refusal = error
        except Exception as error:
            self._defects.record(error)
            refusal = InternalError("internal error; the server's log has the cause")
        return await context.abort(STATUS[refusal.code].grpc, str(refusal)[:_MAX_DETAILS_CHARS], _when_again(refusal))


def _when_again(refusal: NanofleetError) -> tuple[tuple[str, str], ...]:
    """Return trailing metadata that say when the same call may succeed, where that is known."""
    if not refusal.retryable or refusal.retry_after_s is None:
        return ()
    return ((RETRY_AFTER, str(math.ceil(refusal.retry_after_s * 1000))),)


def add_open_inference(servicer: OpenInferenceServicer, server: grpc.aio.Server) -> None:
    """Register `servicer` so that ModelInfer gets the bytes that came; every other RPC as the stubs have it."""
    infer: grpc.RpcMethodHandler[bytes, pb.ModelInferResponse] = grpc.unary_unary_rpc_method_handler(
        servicer.ModelInfer, response_serializer=pb.ModelInferResponse.SerializeToString
    )
    pb_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    # Registered methods come before the generic handlers of the stubs, and the last of a name counts.
    server.add_registered_method_handlers(_SERVICE, {"ModelInfer": infer})


class _Defects:
    """Logs what should not have happened, with its traceback; repeats of a kind at DEBUG."""

    def __init__(self) -> None:
        self._seen: set[type[Exception]] = set()

    def record(self, error: Exception) -> None:
        kind = type(error)
        level = logging.DEBUG if kind in self._seen else logging.ERROR
        self._seen.add(kind)
        _log.log(level, "request failed by a defect", extra={"error_type": kind.__qualname__}, exc_info=withheld(error))
