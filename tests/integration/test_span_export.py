"""Spans to an OTLP receiver that is away: nothing waits for it, and it is said once."""

import time

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from controller.demo.ports import free_port
from core.addresses import Address
from core.span_export import OtlpSpanExporter


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
