"""Spans over OTLP/gRPC: taken in, refused in part, and passed on to a collector."""

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

from controller.api.otlp_grpc import CollectorClient, OtlpServicer
from controller.traces.forward import Forwarder
from controller.traces.intake import Intake
from controller.traces.model import TraceFilter
from controller.traces.service import Traces
from core.addresses import Address
from core.backoff import BackoffPolicy
from core.grpc_transport import SERVER_OPTIONS, TransportCredentials, open_channel
from core.telemetry import Tracing, TracingSettings
from tests.support.otlp import made_otlp_span, made_request
from tests.support.trace_store import MemoryTraceStore

FAST = BackoffPolicy(base_s=0.01, cap_s=0.02)


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


class Collector(TraceServiceServicer):
    """Somebody else's collector: keeps what comes, or refuses it with `status`."""

    def __init__(self) -> None:
        self.received: list[ExportTraceServiceRequest] = []
        self.status: grpc.StatusCode | None = None
        self.calls = asyncio.Semaphore(0)

    async def Export(  # noqa: N802 (the name of the RPC)
        self, request: ExportTraceServiceRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> ExportTraceServiceResponse:
        self.calls.release()
        if self.status is not None:
            await context.abort(self.status, "not now")
        self.received.append(request)
        return ExportTraceServiceResponse()

    async def called(self) -> None:
        async with asyncio.timeout(10):
            await self.calls.acquire()


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


async def test_requests_are_passed_on_as_they_came() -> None:
    collector = Collector()
    server, address = await serve(collector)
    channel = open_channel(address, TransportCredentials.local())
    forwarder = Forwarder(CollectorClient(channel), backoff=FAST)
    intake = Intake(Traces(MemoryTraceStore(), max_spans=100), forwarder)
    running = asyncio.create_task(forwarder.run())
    request = made_request(made_otlp_span(), made_otlp_span(span_id=b"bad"))

    await intake.take_in(request)
    await collector.called()
    await end(running)

    assert collector.received == [request]
    await channel.close()
    await server.stop(None)
    await intake.close()


async def test_a_collector_that_was_away_gets_the_spans_later() -> None:
    collector = Collector()
    collector.status = grpc.StatusCode.UNAVAILABLE
    server, address = await serve(collector)
    channel = open_channel(address, TransportCredentials.local())
    forwarder = Forwarder(CollectorClient(channel), backoff=FAST)
    running = asyncio.create_task(forwarder.run())
    request = made_request(made_otlp_span())
    forwarder.offer(request)

    await collector.called()
    await collector.called()
    collector.status = None
    while not collector.received:
        await collector.called()
    await end(running)

    assert collector.received == [request]
    assert forwarder.dropped_count == 0
    await channel.close()
    await server.stop(None)


async def test_what_the_collector_never_takes_is_dropped_and_counted() -> None:
    collector = Collector()
    collector.status = grpc.StatusCode.INVALID_ARGUMENT
    server, address = await serve(collector)
    channel = open_channel(address, TransportCredentials.local())
    forwarder = Forwarder(CollectorClient(channel), backoff=FAST)
    running = asyncio.create_task(forwarder.run())

    forwarder.offer(made_request(made_otlp_span(), made_otlp_span()))
    forwarder.offer(made_request(made_otlp_span()))
    await collector.called()
    await collector.called()
    forwarder.offer(made_request(made_otlp_span()))
    await collector.called()
    await end(running)

    assert forwarder.dropped_count >= 3
    await channel.close()
    await server.stop(None)


async def test_a_full_queue_drops_the_newest_counts_them_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    channel = open_channel(Address("127.0.0.1", 9), TransportCredentials.local())
    forwarder = Forwarder(CollectorClient(channel), max_queued_requests=2)
    for _ in range(5):
        forwarder.offer(made_request(made_otlp_span(), made_otlp_span()))

    assert forwarder.dropped_count == 6
    assert [record.levelname for record in caplog.records if "forwarded" in record.message] == ["WARNING"]
    await channel.close()


async def end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
