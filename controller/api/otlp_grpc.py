"""OTLP over gRPC: the TraceService that every process exports to, and the client of a further collector."""

import grpc
import grpc.aio
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import TraceServiceServicer, TraceServiceStub

from controller.traces.intake import Intake
from core.errors import InvalidRequest, NanofleetError, Unavailable
from core.status import STATUS

EXPORT_TIMEOUT_S = 10.0
# OTLP specification 1.x, "Failures": only these may be tried again.
_RETRYABLE = frozenset(
    {
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)


class OtlpServicer(TraceServiceServicer):
    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    async def Export(  # noqa: N802 (the name of the RPC)
        self, request: ExportTraceServiceRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> ExportTraceServiceResponse:
        """Take in spans; those that were refused are counted in `partial_success` and must not be sent again."""
        try:
            refused = await self._intake.take_in(request)
        except NanofleetError as error:
            await context.abort(STATUS[error.code].grpc, str(error))
        if not refused:
            return ExportTraceServiceResponse()
        partial = ExportTracePartialSuccess(
            rejected_spans=refused, error_message="malformed, or more than fit the queue"
        )
        return ExportTraceServiceResponse(partial_success=partial)


class CollectorClient:
    """A collector at the other end of `channel`, which the owner closes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = TraceServiceStub(channel)  # type: ignore[no-untyped-call]  # generated without annotations

    async def export(self, request: ExportTraceServiceRequest) -> None:
        """Hand over one request.

        Raises:
            Unavailable: the collector is away or busy.
            InvalidRequest: it will never take this one.
        """
        try:
            await self._stub.Export(request, timeout=EXPORT_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            kind = Unavailable if error.code() in _RETRYABLE else InvalidRequest
            raise kind(f"collector: {error.code().name}: {error.details()}") from error
