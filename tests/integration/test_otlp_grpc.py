"""Spans over OTLP/gRPC: taken in, or refused in part."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import grpc.aio
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    TraceServiceStub,
    add_TraceServiceServicer_to_server,
)

from controller.api.otlp_grpc import OtlpServicer
from controller.traces.intake import Intake
from controller.traces.model import TraceFilter
from controller.traces.service import Traces
from core.addresses import Address
from core.grpc_transport import SERVER_OPTIONS, TransportCredentials, open_channel
from core.telemetry import Tracing, TracingSettings
from tests.support.otlp import made_otlp_span, made_request
from tests.support.trace_store import MemoryTraceStore


async def serve(servicer: TraceServiceServicer, port: int = 0) -> tuple[grpc.aio.Server, Address]:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    add_TraceServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]  # a stub without annotations
    bound = server.add_secure_port(f"127.0.0.1:{port}", TransportCredentials.local().server)
    await server.start()
    return server, Address("127.0.0.1", bound)


@dataclass
class Receiver:
    traces: Traces
    address: Address
    channel: grpc.aio.Channel

    async def export(self, request: ExportTraceServiceRequest) -> ExportTraceServiceResponse:
        stub = TraceServiceStub(self.channel)  # type: ignore[no-untyped-call]  # a stub without annotations
        response = await stub.Export(request, timeout=10)
        assert isinstance(response, ExportTraceServiceResponse)
        return response


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    traces = Traces(MemoryTraceStore(), max_spans=100, max_queued_spans=5)
    intake = Intake(traces, None)
    server, address = await serve(OtlpServicer(intake))
    channel = open_channel(address, TransportCredentials.local())
    yield Receiver(traces, address, channel)
    await channel.close()
    await server.stop(None)
    await intake.close()


async def test_an_export_is_taken_in_whole(receiver: Receiver) -> None:
    response = await receiver.export(made_request(made_otlp_span(name="process meter"), made_otlp_span()))
    await receiver.traces.flush()

    (summary,) = await receiver.traces.recent(TraceFilter(model="meter"))
    assert summary.span_count == 2
    assert response == ExportTraceServiceResponse()


async def test_spans_without_room_are_answered_as_partial_success(receiver: Receiver) -> None:
    response = await receiver.export(made_request(*[made_otlp_span() for _ in range(8)]))

    assert response.partial_success.rejected_spans == 3
    assert response.partial_success.error_message


async def test_the_exporter_of_every_process_is_understood(receiver: Receiver) -> None:
    tracing = Tracing("nanofleet-agent", TracingSettings(endpoint=receiver.address))
    with tracing.tracer.start_as_current_span("process meter"):
        pass
    await asyncio.to_thread(tracing.shutdown)
    await receiver.traces.flush()

    (summary,) = await receiver.traces.recent(TraceFilter())
    assert (summary.root_name, summary.services) == ("process meter", ("nanofleet-agent",))
