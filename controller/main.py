"""The controller's composition root: every part is made here, from settings, and handed to those who need it.

ports ─▶ databases ─▶ registry, traces, fleet ─▶ heavy tier ─▶ gateway ─▶ faces ─▶ ready
end:    faces first (calls may finish), then loops and children, then what is still to be stored
"""

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import orjson
import uvloop
from starlette.types import ASGIApp

from controller.api.agents_grpc import FleetServicer
from controller.api.artifacts_grpc import ArtifactServicer
from controller.api.grpc_server import GrpcServer
from controller.api.http_app import create_app
from controller.api.http_server import HttpServer
from controller.api.otlp_grpc import CollectorClient, OtlpServicer
from controller.compression.workshop import ChildWorkshop
from controller.fleet.service import Fleet
from controller.gateway.dispatch import Gateway
from controller.heavy.client import HeavyClient
from controller.heavy.local import LocalHeavy
from controller.registry.blobs import BlobStore
from controller.registry.service import Registry
from controller.settings import Settings
from controller.storage.database import Database
from controller.storage.fleet import SqlFleetStore
from controller.storage.registry import SqlRegistryStore
from controller.storage.traces import SqlTraceStore
from controller.traces.exporter import InProcessExporter
from controller.traces.forward import Forwarder
from controller.traces.intake import Intake
from controller.traces.service import Traces
from core import folder_lock
from core.addresses import Address, is_loopback, parse_address
from core.atomic_files import write_atomically
from core.clock import SystemClock
from core.errors import InvalidRequest
from core.grpc_transport import TransportCredentials, open_channel
from core.logs import configure_logging
from core.open_inference.grpc_face import OpenInferenceServicer
from core.signals import stop_on_signals
from core.tasks import supervise
from core.telemetry import Tracing, TracingSettings

_log = logging.getLogger(__name__)

SERVER_NAME = "nanofleet"
ENDPOINTS_FILE = "endpoints.json"


def main(settings: Settings) -> None:
    """Run the controller until it is told to stop; the entry point of `nanofleet controller run`.

    Raises:
        Unavailable: a port is in use, or the database cannot be opened.
        Conflict: another controller runs on the same data_dir.
        InvalidRequest: settings that contradict each other.
    """
    configure_logging(level=settings.logs.level, log_format=settings.logs.format)
    # It says at every start what it would do if there were something to do.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    uvloop.run(run(settings))


async def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; a second signal ends the process at once."""
    with stop_on_signals() as stopping:
        await serve(settings, stopping)


async def serve(settings: Settings, stopping: asyncio.Event) -> None:
    """Serve until `stopping` is set; afterwards every child, thread and connection is gone."""
    async with AsyncExitStack() as stack:
        ports = _open_ports(settings, TransportCredentials.local(), stack)
        parts = await _make_parts(settings, ports, stack)
        await _start_faces(ports, parts)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(supervise(name, loop), name=name) for name, loop in parts.loops.items()]
            serving = tasks.create_task(ports.http.run(parts.app), name="http")
            with _announced(settings.data_dir, ports, heavy=settings.heavy.address):
                await stopping.wait()
            parts.fleet.end_sessions()
            ports.http.stop()
            await asyncio.gather(ports.grpc.stop(), serving)
            for task in running:
                task.cancel()
    _log.info("controller has stopped")


@dataclass(frozen=True, slots=True)
class _Ports:
    """Bound, not yet answering: a port in use is found out before anything is opened."""

    grpc: GrpcServer
    http: HttpServer
    credentials: TransportCredentials


@dataclass(frozen=True, slots=True)
class _Parts:
    """What the faces call, and the loops that must run meanwhile."""

    blobs: BlobStore
    fleet: Fleet
    gateway: Gateway
    intake: Intake
    app: ASGIApp
    loops: Mapping[str, Callable[[], Awaitable[None]]]


def _open_ports(settings: Settings, credentials: TransportCredentials, stack: AsyncExitStack) -> _Ports:
    grpc_server = GrpcServer(
        parse_address(settings.grpc_bind),
        credentials,
        max_sessions=settings.fleet.max_sessions,
        keepalive_s=settings.fleet.keepalive_s,
    )
    stack.push_async_callback(grpc_server.stop)
    http_server = HttpServer(parse_address(settings.http_bind))
    stack.callback(http_server.close)
    return _Ports(grpc_server, http_server, credentials)


async def _make_parts(settings: Settings, ports: _Ports, stack: AsyncExitStack) -> _Parts:
    clock = SystemClock()
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    stack.enter_context(folder_lock.held(settings.data_dir / "controller.lock", what="controller"))
    database = await _opened(settings.database_url, stack)
    # Spans have a file of their own, so that a burst of them never delays the fleet.
    trace_database = await _opened(f"sqlite:///{settings.data_dir / 'traces.sqlite'}", stack)
    blobs = BlobStore(settings.blobs_dir)
    stack.push_async_callback(blobs.close)
    registry = _registry(settings, SqlRegistryStore(database), blobs, clock)
    await registry.prepare()
    fleet = Fleet(SqlFleetStore(database), registry, clock=clock, max_sessions=settings.fleet.max_sessions)

    forwarder = _forwarder(settings.telemetry.forward_to, ports, stack)
    traces = Traces(SqlTraceStore(trace_database), max_spans=settings.telemetry.max_spans)
    intake = Intake(traces, forwarder)
    stack.push_async_callback(intake.close)
    tracing = _tracing(settings.telemetry.sample_ratio, intake)
    stack.push_async_callback(_store_the_rest, tracing, traces, fleet)

    heavy = await stack.enter_async_context(HeavyClient(settings.heavy.address, clock=clock))
    timeout_s = settings.heavy.request_timeout_s
    gateway = Gateway(registry, heavy, tracing=tracing, clock=clock, default_timeout_s=timeout_s)
    app = create_app(
        plane=gateway,
        registry=registry,
        fleet=fleet,
        traces=traces,
        clock=clock,
        server_name=SERVER_NAME,
        server_version=version(SERVER_NAME),
    )
    loops = {"registry": registry.run, "fleet": fleet.run, "traces": traces.run, "heavy-probe": heavy.run}
    if forwarder is not None:
        loops["trace-forwarder"] = forwarder.run
    if settings.heavy.mode == "embedded":
        here, place = ports.grpc.address, settings.data_dir
        local = LocalHeavy(settings.heavy, data_dir=place, controller=here, readiness=heavy, clock=clock)
        loops["heavy"] = local.run
    return _Parts(blobs, fleet, gateway, intake, app, loops)


async def _start_faces(ports: _Ports, parts: _Parts) -> None:
    inference = OpenInferenceServicer(
        parts.gateway, server_name=SERVER_NAME, server_version=version(SERVER_NAME), clock=SystemClock()
    )
    await ports.grpc.start(
        fleet=FleetServicer(parts.fleet),
        artifacts=ArtifactServicer(parts.blobs),
        inference=inference,
        otlp=OtlpServicer(parts.intake),
    )


async def _opened(url: str, stack: AsyncExitStack) -> Database:
    database = Database(url)
    stack.push_async_callback(database.close)
    await database.migrate()
    return database


def _registry(settings: Settings, store: SqlRegistryStore, blobs: BlobStore, clock: SystemClock) -> Registry:
    bounds = settings.registry
    workshop = ChildWorkshop(
        timeout_s=bounds.publish_timeout_s,
        memory_bytes=bounds.publish_memory_bytes,
        max_file_bytes=bounds.max_model_bytes,
    )
    return Registry(
        store,
        blobs,
        workshop,
        clock=clock,
        max_model_bytes=bounds.max_model_bytes,
        max_queued_publications=bounds.max_queued_publications,
    )


def _forwarder(collector: Address | None, ports: _Ports, stack: AsyncExitStack) -> Forwarder | None:
    if collector is None:
        return None
    if not is_loopback(collector.host):
        raise InvalidRequest(
            f"telemetry.forward_to: expected a collector on this machine, got {collector}; run one here that passes "
            "the spans on: the controller has no credentials for other machines yet"
        )
    if collector.port == ports.grpc.address.port:
        raise InvalidRequest(f"telemetry.forward_to: {collector} is this controller itself; name a collector")
    channel = open_channel(collector, ports.credentials)
    stack.push_async_callback(channel.close)
    return Forwarder(CollectorClient(channel))


def _tracing(sample_ratio: float, intake: Intake) -> Tracing:
    return Tracing(
        "nanofleet-controller",
        TracingSettings(sample_ratio=sample_ratio),
        attributes={"service.instance.id": socket.gethostname()},
        exporter=InProcessExporter(intake, asyncio.get_running_loop()),
    )


async def _store_the_rest(tracing: Tracing, traces: Traces, fleet: Fleet) -> None:
    """Store what is still in memory."""
    await asyncio.to_thread(tracing.shutdown)
    await traces.flush()
    await fleet.flush()


@contextmanager
def _announced(data_dir: Path, ports: _Ports, *, heavy: str) -> Iterator[None]:
    """Say where we listen, in the log and in `data_dir/endpoints.json`, as long as it is true."""
    path = data_dir / ENDPOINTS_FILE
    endpoints = {
        "controller_grpc": str(ports.grpc.address),
        "controller_http": f"http://{ports.http.address}",
        "heavy_http": heavy,
    }
    write_atomically(path, orjson.dumps({**endpoints, "pid": os.getpid()}))
    _log.info("controller is ready", extra=endpoints)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
