"""Somebody else's collector: a real OTLP/gRPC server that keeps what comes, or refuses it as it is told."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

from core.addresses import Address
from core.grpc_transport import SERVER_OPTIONS, TransportCredentials


class Collector(TraceServiceServicer):
    """`status` refuses everything while it is set, with a RetryInfo of `retry_after_s` if that is set too."""

    def __init__(self) -> None:
        self.received: list[ExportTraceServiceRequest] = []
        self.headers: list[dict[str, str | bytes]] = []
        self.status: grpc.StatusCode | None = None
        self.retry_after_s: float | None = None
        self.rejected_spans = 0
        self._changed = asyncio.Condition()

    async def Export(  # noqa: N802 (the name of the RPC)
        self, request: ExportTraceServiceRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> ExportTraceServiceResponse:
        self.headers.append(dict(context.invocation_metadata() or ()))
        try:
            if self.status is not None:
                await self._refuse(context, self.status)
            self.received.append(request)
        finally:
            await self._note_call()
        return ExportTraceServiceResponse(partial_success=ExportTracePartialSuccess(rejected_spans=self.rejected_spans))

    @property
    def names(self) -> list[str]:
        """Return the names of the spans that came, in order."""
        spans = [
            span
            for request in self.received
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        return [span.name for span in spans]

    async def has_received(self, requests: int) -> None:
        async with asyncio.timeout(20), self._changed:
            await self._changed.wait_for(lambda: len(self.received) >= requests)

    async def has_named(self, name: str) -> None:
        """Return when a span of that name has come."""
        async with asyncio.timeout(30), self._changed:
            await self._changed.wait_for(lambda: name in self.names)

    async def _refuse(self, context: grpc.aio.ServicerContext[object, object], status: grpc.StatusCode) -> None:
        if self.retry_after_s is not None:
            detail = Any()
            seconds, rest = divmod(self.retry_after_s, 1)
            detail.Pack(RetryInfo(retry_delay=Duration(seconds=int(seconds), nanos=round(rest * 1e9))))
            whole = Status(code=status.value[0], message="not now", details=[detail])
            context.set_trailing_metadata((("grpc-status-details-bin", whole.SerializeToString()),))
        await context.abort(status, "not now")

    async def _note_call(self) -> None:
        async with self._changed:
            self._changed.notify_all()


@asynccontextmanager
async def collecting(
    collector: Collector, *, port: int = 0, credentials: grpc.ServerCredentials | None = None
) -> AsyncIterator[Address]:
    """Yield where `collector` listens, in the clear unless it has credentials; it is gone at once afterwards."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]  # generated
    shown = TransportCredentials.local().server if credentials is None else credentials
    bound = server.add_secure_port(f"127.0.0.1:{port}", shown)
    await server.start()
    try:
        yield Address("127.0.0.1", bound)
    finally:
        await server.stop(None)
