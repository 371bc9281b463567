"""Spans to an OTLP receiver that is away: nothing waits for it, and it is said once."""

import asyncio
import time
from pathlib import Path

import grpc
import grpc.aio
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from controller.demo.ports import free_port
from core.addresses import Address
from core.errors import Unavailable
from core.span_export import OtlpSpanExporter
from edge_agent.outbox.rows import Kind
from edge_agent.outbox.telemetry import SpanKeeper, SpanReceiver
from tests.support.clocks import HeldClock
from tests.support.otlp_collector import Collector, collecting
from tests.support.outbox_values import open_outbox, until_rows


@pytest.fixture
def provider() -> TracerProvider:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(OtlpSpanExporter(Address("127.0.0.1", free_port()))))
    return provider


def test_a_receiver_that_is_away_is_logged_once(provider: TracerProvider, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        provider.get_tracer("test").start_span("lost").end()
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert [record.message for record in warnings] == ["spans could not be delivered and are dropped"]


def test_a_receiver_that_is_away_does_not_hold_up_the_end(provider: TracerProvider) -> None:
    provider.get_tracer("test").start_span("lost").end()
    started_s = time.monotonic()
    provider.shutdown()
    assert time.monotonic() - started_s < 1


async def test_spans_that_could_not_be_exported_arrive_once_the_receiver_is_back(tmp_path: Path) -> None:
    port = free_port()
    exporter = OtlpSpanExporter(Address("127.0.0.1", port))
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with open_outbox(tmp_path, HeldClock()) as outbox:
        exporter.keep_undelivered(SpanKeeper(outbox))
        await asyncio.to_thread(provider.get_tracer("test").start_span("kept").end)
        await until_rows(outbox, Kind.TELEMETRY, 1)
        [row] = await outbox.oldest(Kind.TELEMETRY, limit=1, max_bytes=1)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            receiver = SpanReceiver(channel)
            with pytest.raises(Unavailable):
                await receiver.send([row])
            collector = Collector()
            async with collecting(collector, port=port):
                await channel.channel_ready()
                assert await receiver.send([row]) == ()
    assert collector.names == ["kept"]
    provider.shutdown()


@pytest.mark.parametrize("refusal", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED])
async def test_spans_that_their_receiver_refuses_for_good_are_not_kept(refusal: grpc.StatusCode) -> None:
    kept: list[bytes] = []
    collector = Collector()
    collector.status = refusal
    async with collecting(collector) as address:
        exporter = OtlpSpanExporter(address)
        exporter.keep_undelivered(kept.append)
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        await asyncio.to_thread(provider.get_tracer("test").start_span("refused").end)
        provider.shutdown()
    assert kept == []
