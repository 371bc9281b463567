"""The gRPC face: `inference.GRPCInferenceService` over any DataPlane; controller and agent both serve it.

Every call goes: decode → plane → encode. An error of our tree becomes its status of `core.status`; anything else is a
defect of ours, logged here with its traceback and answered as INTERNAL without a word of its inside.

Register it with `add_open_inference`: the bytes of ModelInfer are to be bounded before anything parses them.
"""

# ruff: noqa: N802 (the methods are named by the protocol)
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import grpc.aio

from core.clock import Clock
from core.deadline import Deadline
from core.errors import DeadlineExceeded, InternalError, NanofleetError
from core.logs import withheld
from core.open_inference import protobuf_body
from core.open_inference.messages import DEFAULT_LIMITS, BodyLimits, InferRequest, timeout_s
from core.open_inference.protobuf_wire import raw_response_bytes
from core.open_inference.service import EXTENSIONS, Call, DataPlane, Statistics
from core.rpc_metrics import CapturedHandlers
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
        extensions: Sequence[str] = EXTENSIONS,
        statistics: Statistics | None = None,
        client_of: Callable[[_Context], str] | None = None,
        limits: BodyLimits = DEFAULT_LIMITS,
    ) -> None:
        """Serve `plane`.

        Args:
            statistics: None: this plane counts nothing that it would tell here.
            client_of: who calls, for faces whose callers show certificates.
        """
        self._plane = plane
        self._extensions = extensions
        self._statistics = statistics
        self._client_of = client_of
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
        return pb.ServerMetadataResponse(
            name=self._server_name, version=self._server_version, extensions=self._extensions
        )

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: _Context) -> pb.ModelMetadataResponse:
        return await self._answer(context, self._metadata(request))

    # Bytes, where the stubs say messages: see add_open_inference.
    async def ModelInfer(self, request: bytes, context: _Context) -> bytes:  # type: ignore[override]
        try:
            return await self._infer(request, context)
        except Exception as error:
            code, details, trailing = _told(self._refusal(error))
        # Not aborted: that raises an error which the call keeps, as the error keeps the call: under overload the
        # collector would not keep up. Clients look at no message where the status is not OK.
        context.set_code(code)
        context.set_details(details)
        context.set_trailing_metadata(trailing)
        return b""

    async def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, context: _Context
    ) -> pb.ModelStatisticsResponse:
        if self._statistics is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "statistics: not served here")
        return await self._answer(context, self._statistics_of(self._statistics, request))

    async def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, context: _Context
    ) -> pb.RepositoryIndexResponse:
        return await self._answer(context, self._index(request))

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: _Context
    ) -> pb.RepositoryModelLoadResponse:
        await self._answer(context, self._plane.load(_model_of(request)))
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: _Context
    ) -> pb.RepositoryModelUnloadResponse:
        await self._answer(context, self._plane.unload(_model_of(request)))
        return pb.RepositoryModelUnloadResponse()

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

    async def _statistics_of(
        self, counted: Statistics, request: pb.ModelStatisticsRequest
    ) -> pb.ModelStatisticsResponse:
        return protobuf_body.encode_statistics(await counted.statistics(request.name, request.version))

    async def _infer(self, body: bytes, context: _Context) -> bytes:
        message = protobuf_body.parse_received_request(body, limits=self._limits)
        request = protobuf_body.decode_request(message, limits=self._limits)
        response = await self._plane.infer(request, self._call(request, context))
        if request.binary_output:
            return raw_response_bytes(response)
        return protobuf_body.encode_response(response, raw=False).SerializeToString()

    def _call(self, request: InferRequest, context: _Context) -> Call:
        traceparent = tracestate = None
        for key, value in context.invocation_metadata() or ():
            if key == TRACEPARENT and isinstance(value, str):
                traceparent = value
            elif key == _TRACESTATE and isinstance(value, str) and len(value) <= _MAX_TRACESTATE_CHARS:
                tracestate = value
        client = "" if self._client_of is None else self._client_of(context)
        return Call(self._deadline(request, context), traceparent, tracestate, client)

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
        except Exception as error:
            refusal = self._refusal(error)
        return await context.abort(*_told(refusal))

    def _refusal(self, error: Exception) -> NanofleetError:
        if isinstance(error, NanofleetError):
            if isinstance(error, InternalError):
                self._defects.record(error)
            # Without the traceback, which leads back to who holds the refusal.
            return error.with_traceback(None)
        self._defects.record(error)
        return InternalError("internal error; the server's log has the cause")


def _told(refusal: NanofleetError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """Return status, details and trailing metadata."""
    return STATUS[refusal.code].grpc, str(refusal)[:_MAX_DETAILS_CHARS], _when_again(refusal)


def _when_again(refusal: NanofleetError) -> tuple[tuple[str, str], ...]:
    """Return trailing metadata that say when the same call may succeed, where that is known."""
    if not refusal.retryable or refusal.retry_after_s is None:
        return ()
    return ((RETRY_AFTER, str(math.ceil(refusal.retry_after_s * 1000))),)


def _model_of(request: pb.RepositoryModelLoadRequest | pb.RepositoryModelUnloadRequest) -> str:
    # KServe numbers the fields differently: the model's name comes where Triton has the repository's.
    return request.model_name or request.repository_name


def add_open_inference(servicer: OpenInferenceServicer, server: grpc.aio.Server | CapturedHandlers) -> None:
    """Register `servicer` so that ModelInfer gets and gives bytes; every other RPC as the stubs have it."""
    captured = CapturedHandlers()
    pb_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, captured)  # type: ignore[arg-type]  # see there
    infer: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(servicer.ModelInfer)
    captured.services[_SERVICE]["ModelInfer"] = infer
    if isinstance(server, CapturedHandlers):
        server.services.update(captured.services)
    else:
        captured.register(server)


class _Defects:
    """Logs what should not have happened, with its traceback; repeats of a kind at DEBUG."""

    def __init__(self) -> None:
        self._seen: set[type[Exception]] = set()

    def record(self, error: Exception) -> None:
        kind = type(error)
        level = logging.DEBUG if kind in self._seen else logging.ERROR
        self._seen.add(kind)
        _log.log(level, "request failed by a defect", extra={"error_type": kind.__qualname__}, exc_info=withheld(error))
