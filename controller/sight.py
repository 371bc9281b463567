"""How the controller sees: spans come in, are kept, counted over, sent on to a collector, and made here too."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

from controller import foundation as foundations
from controller.api.collector_client import CollectorClient, CollectorSettings
from controller.settings import Settings, TelemetrySettings
from controller.storage.database import Database
from controller.storage.traces import SqlTraceStore
from controller.traces.exporter import InProcessExporter
from controller.traces.forward import Forwarder
from controller.traces.intake import Intake
from controller.traces.service import Traces
from controller.traces.spool import Spool, SpoolBounds
from controller.traces.statistics import Statistics
from core.addresses import Address, is_loopback
from core.clock import Clock
from core.errors import InvalidRequest
from core.keeping import KeepRule
from core.telemetry import Tracing, TracingSettings


@dataclass(frozen=True, slots=True)
class Sight:
    database: Database
    traces: Traces
    statistics: Statistics
    intake: Intake
    # None: no collector is set.
    forwarder: Forwarder | None
    tracing: Tracing

    @property
    def loops(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        """Return what must run meanwhile."""
        loops = {"traces": self.traces.run, "trace-statistics": self.statistics.run}
        return loops if self.forwarder is None else {**loops, "trace-forwarder": self.forwarder.run}


async def open_sight(settings: Settings, own_grpc: Address, stack: AsyncExitStack, *, clock: Clock) -> Sight:
    """Make all of it; `own_grpc` is where this controller takes spans, which no collector is.

    Raises:
        InvalidRequest: the collector is this controller, or cannot be used as it is set.
    """
    telemetry = settings.telemetry
    # Spans have a file of their own, so that a burst of them never delays the fleet.
    database = await foundations.opened(f"sqlite:///{settings.data_dir / 'traces.sqlite'}", stack)
    forwarder = _forwarder(settings, own_grpc, stack, clock=clock)
    traces = Traces(SqlTraceStore(database), max_spans=telemetry.max_spans)
    intake = Intake(traces, forwarder)
    stack.push_async_callback(intake.close)
    statistics = Statistics(traces, max_rows=telemetry.max_spans)
    stack.push_async_callback(statistics.close)
    return Sight(database, traces, statistics, intake, forwarder, _tracing(telemetry, intake))


def _forwarder(settings: Settings, own_grpc: Address, stack: AsyncExitStack, *, clock: Clock) -> Forwarder | None:
    telemetry = settings.telemetry
    collector = CollectorSettings.of(telemetry)
    if collector is None:
        return None
    if is_loopback(collector.address.host) and collector.address.port == own_grpc.port:
        raise InvalidRequest(f"telemetry.forward_to: {collector.address} is this controller itself; name a collector")
    client = CollectorClient(collector)
    stack.push_async_callback(client.close)
    bounds = SpoolBounds(telemetry.forward_spool_bytes, telemetry.forward_max_age_s)
    spool = partial(Spool, settings.trace_spool_dir, bounds)
    forwarder = Forwarder(client, spool, clock=clock, max_age_s=bounds.max_age_s)
    stack.push_async_callback(forwarder.close)
    return forwarder


def _tracing(telemetry: TelemetrySettings, intake: Intake) -> Tracing:
    keep = KeepRule(telemetry.slow_s, telemetry.keep_per_s)
    return Tracing(
        "nanofleet-controller",
        TracingSettings(sample_ratio=telemetry.sample_ratio, sampled_per_s=telemetry.sampled_per_s, keep=keep),
        attributes={"service.instance.id": socket.gethostname()},
        exporter=InProcessExporter(intake, asyncio.get_running_loop()),
    )
