"""Spans over mutual TLS: they go to the fleet's controller only, and follow a renewal."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.trace import SpanContext

from core.addresses import Address
from core.span_export import OtlpSpanExporter
from core.telemetry import Tracing, TracingSettings
from tests.support.enrolment import FakeAuthority, FakeEnrolment
from tests.support.mutual_tls import Context, certificate_of, mutual_port

AUTHORITY = FakeAuthority()
FIRST, SECOND = (FakeEnrolment(AUTHORITY).identity(Address("127.0.0.1", 1)).tls for _ in range(2))
SPAN = ReadableSpan("asked", context=SpanContext(1, 2, is_remote=False))
SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"


class Receiver:
    """Remembers whose spans came."""

    def __init__(self) -> None:
        self.callers: list[bytes] = []

    def handler(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            SERVICE, {"Export": grpc.unary_unary_rpc_method_handler(self._export)}
        )

    async def _export(self, request: bytes, context: Context) -> bytes:
        self.callers.append(certificate_of(context))
        return b""


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture
async def address(receiver: Receiver) -> AsyncIterator[Address]:
    async with mutual_port(AUTHORITY.controller(), receiver.handler()) as address:
        yield address


async def export(exporter: OtlpSpanExporter) -> SpanExportResult:
    return await asyncio.to_thread(exporter.export, [SPAN])


async def test_spans_follow_a_renewal(receiver: Receiver, address: Address) -> None:
    exporter = OtlpSpanExporter(address, credentials=FIRST)
    assert await export(exporter) is SpanExportResult.SUCCESS
    exporter.replace(SECOND)
    assert await export(exporter) is SpanExportResult.SUCCESS
    assert receiver.callers == [FIRST.certificate_chain, SECOND.certificate_chain]
    await asyncio.to_thread(exporter.shutdown)


async def test_spans_do_not_go_to_another_authority(receiver: Receiver) -> None:
    async with mutual_port(FakeAuthority("another").controller(), receiver.handler()) as elsewhere:
        exporter = OtlpSpanExporter(elsewhere, credentials=FIRST)
        assert await export(exporter) is SpanExportResult.FAILURE
        await asyncio.to_thread(exporter.shutdown)
    assert receiver.callers == []


@pytest.mark.parametrize("is_fleet", [True, False])
async def test_the_spans_of_a_process_follow_only_where_they_left_as_one_of_the_fleet(
    receiver: Receiver, address: Address, is_fleet: bool
) -> None:
    unknown = grpc.ssl_channel_credentials(AUTHORITY.pem)
    tracing = Tracing("test", TracingSettings(address), credentials=FIRST if is_fleet else unknown)
    tracing.follow(SECOND)
    tracing.tracer.start_span("asked").end()
    await asyncio.to_thread(tracing.shutdown)
    assert receiver.callers == ([SECOND.certificate_chain] if is_fleet else [])
