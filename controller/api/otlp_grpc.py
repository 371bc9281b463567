"""OTLP over gRPC: the TraceService that every process exports to."""

import grpc.aio
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import TraceServiceServicer

from controller.traces.intake import Intake
from core.errors import NanofleetError
from core.status import STATUS


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
