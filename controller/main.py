"""The controller's composition root: every part is made here, from settings, and handed to those who need it.

foundation ─▶ ports ─▶ registry, fleet, transfers, traces ─▶ heavy tier ─▶ gateway ─▶ faces ─▶ ready
end:    faces first (calls may finish), then loops and children, then what is still to be stored
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path

import uvloop
from starlette.types import ASGIApp

from controller import foundation as foundations
from controller.api import open_files
from controller.api.agents_grpc import FleetServicer
from controller.api.artifacts_grpc import ArtifactServicer
from controller.api.catalogue_grpc import CatalogueServicer
from controller.api.delivery_grpc import DeliveryServicer
from controller.api.enrolment_grpc import EnrolmentServicer
from controller.api.http_app import TrustFaces, create_app
from controller.api.http_tls import ServerCertificate
from controller.api.identity_rest import Destination
from controller.api.otlp_grpc import OtlpServicer
from controller.api.policy import admitted_agent, agent_of, require_own_name
from controller.api.records_grpc import RecordServicer
from controller.api.samples_grpc import SamplesServicer
from controller.compression.workshop import ChildWorkshop
from controller.dashboard.pages import Dashboard
from controller.dashboard.sources import Sources
from controller.fleet.service import Fleet
from controller.foundation import Foundation
from controller.gateway.dispatch import Gateway
from controller.gateway.gateway_metrics import GatewayMetrics
from controller.heavy.client import HeavyClient
from controller.heavy.local import LocalHeavy
from controller.identity.service import Identity
from controller.metrics import Watched, register_controller, register_records
from controller.ports import Ports, announced, open_ports
from controller.records.model import Kept
from controller.records.service import Records
from controller.registry.blobs import BlobStore
from controller.registry.service import Registry
from controller.samples.service import PullBounds, SamplePulls
from controller.samples.spool import Spool
from controller.settings import Settings, TransferSettings
from controller.sight import open_sight
from controller.signing.director import Director
from controller.signing.service import Catalogue
from controller.storage.database import Database
from controller.storage.fleet import SqlFleetStore
from controller.storage.records import SqlRecordStore
from controller.storage.registry import SqlRegistryStore
from controller.traces.intake import Intake
from controller.traces.service import Traces
from controller.transfer.builder import ChildBuilder
from controller.transfer.cuts import TensorCutter
from controller.transfer.fairness import Admission, FairSender, SendLimits
from controller.transfer.service import Transfers
from controller.transfer.shelf import PackShelf
from core.clock import Clock, SystemClock
from core.logs import configure_logging
from core.metrics import Registry as Metrics
from core.open_inference.grpc_face import OpenInferenceServicer
from core.process_metrics import register_process
from core.rpc_metrics import MeasuredCalls
from core.service_notices import READY, STOPPING, ServiceNotices
from core.signals import stop_on_signals
from core.spiffe import Role
from core.tasks import supervise
from core.telemetry import Tracing
from core.tls_files import write_tls_identity

_log = logging.getLogger(__name__)

SERVER_NAME = "nanofleet"
# The replicas of a heavy tier on this machine, as their certificate calls them.
HEAVY_NAME = "local"
# Chosen: certificates are made anew days before the old ones end.
CERTIFICATE_LOOK_S = 60.0


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
    # It counts, at every release, the signatures that are not needed yet.
    logging.getLogger("tuf").setLevel(logging.WARNING)
    open_files.allow_many()
    uvloop.run(run(settings))


async def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; a second signal ends the process at once."""
    with stop_on_signals() as stopping:
        await serve(settings, stopping)


async def serve(settings: Settings, stopping: asyncio.Event) -> None:
    """Serve until `stopping` is set; afterwards every child, thread and connection is gone."""
    clock = SystemClock()
    notices = ServiceNotices.taken_from(os.environ, pid=os.getpid())
    async with AsyncExitStack() as stack:
        foundation = await foundations.lay(settings, stack, clock=clock)
        await _warn_without_operators(foundation)
        metrics = Metrics()
        register_process(metrics, version=version(SERVER_NAME))
        ports = open_ports(settings, foundation.identity, stack, MeasuredCalls(metrics, clock=clock))
        parts = await _make_parts(settings, foundation, ports, stack, clock=clock, metrics=metrics)
        await _start_faces(foundation, ports, parts, clock=clock)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(supervise(name, loop), name=name) for name, loop in parts.loops.items()]
            running.append(tasks.create_task(notices.keep_alive(), name="watchdog"))
            serving = tasks.create_task(ports.http.run(parts.app), name="http")
            with announced(settings.data_dir, ports, heavy=settings.heavy.address):
                notices.say(READY)
                await stopping.wait()
            notices.say(STOPPING)
            parts.fleet.end_sessions()
            parts.dashboard.end()
            ports.http.stop()
            await asyncio.gather(ports.grpc.stop(), ports.enrolment.stop(), serving)
            for task in running:
                task.cancel()
    _log.info("controller has stopped")


async def _warn_without_operators(foundation: Foundation) -> None:
    if not await foundation.access.operators():
        _log.warning("nobody may operate this controller yet: stop it and run `nanofleet controller init`")


@dataclass(frozen=True, slots=True)
class _Parts:
    """What the faces call, and the loops that must run meanwhile."""

    blobs: BlobStore
    fleet: Fleet
    transfers: Transfers
    pulls: SamplePulls
    director: Director
    gateway: Gateway
    intake: Intake
    records: Records
    dashboard: Dashboard
    app: ASGIApp
    loops: Mapping[str, Callable[[], Awaitable[None]]]


async def _keep_certificates(identity: Identity, http: ServerCertificate | None, heavy_dir: Path) -> None:
    """Hand on what is certified anew: to the HTTP port, and to the replicas of a heavy tier on this machine."""
    shown = identity.server_identity()
    while True:
        await asyncio.sleep(CERTIFICATE_LOOK_S)
        if (own := identity.server_identity()) is shown:
            continue
        shown = own
        if http is not None:
            http.replace(own.certificate_chain, own.private_key)
        await asyncio.to_thread(write_tls_identity, heavy_dir, identity.issue_local(Role.HEAVY, HEAVY_NAME))


async def _make_parts(
    settings: Settings,
    foundation: Foundation,
    ports: Ports,
    stack: AsyncExitStack,
    *,
    clock: Clock,
    metrics: Metrics,
) -> _Parts:
    identity, catalogue, database = foundation.identity, foundation.catalogue, foundation.database
    blobs = BlobStore(settings.blobs_dir)
    stack.push_async_callback(blobs.close)
    registry = _registry(settings, SqlRegistryStore(database), blobs, catalogue, clock)
    await registry.prepare()
    bound = settings.fleet.max_sessions
    fleet = Fleet(SqlFleetStore(database), registry, releases=catalogue, clock=clock, max_sessions=bound)
    await fleet.prepare()
    identity.on_revoked(fleet.expel)
    foundations.record_decisions(foundation, fleet, stack)
    director = Director(catalogue, clock=clock)
    transfers = await _transfers(settings.transfer, settings.packs_dir, fleet, blobs, stack, clock=clock)
    fleet.on_deployed(transfers.prepare_ahead)
    pulls = await _sample_pulls(settings, fleet, stack, clock=clock)

    sight = await open_sight(settings, ports.grpc.address, stack, clock=clock)
    stack.push_async_callback(_store_the_rest, sight.tracing, sight.traces, fleet)

    records = _records(settings, database, clock)
    register_records(metrics, records)
    heavy = await stack.enter_async_context(HeavyClient(settings.heavy.address, clock=clock))
    timeout_s = settings.heavy.request_timeout_s
    counted = GatewayMetrics(metrics, clock=clock)
    gateway = Gateway(registry, heavy, tracing=sight.tracing, clock=clock, default_timeout_s=timeout_s, metrics=counted)
    databases = {"fleet": database, "traces": sight.database}
    watched = Watched(fleet, transfers, sight.traces, sight.forwarder, heavy, catalogue, databases)
    register_controller(metrics, watched, clock=clock)
    sources = Sources(fleet, registry, sight.traces, sight.statistics, identity, catalogue, clock)
    dashboard = Dashboard(sources, foundation.access, version=version(SERVER_NAME))
    app = create_app(
        plane=gateway,
        registry=registry,
        fleet=fleet,
        traces=sight.traces,
        records=records,
        pulls=pulls,
        trust=_trust_faces(settings, foundation, ports),
        pages=dashboard.router(),
        clock=clock,
        server_name=SERVER_NAME,
        server_version=version(SERVER_NAME),
        metrics=metrics,
    )
    loops: dict[str, Callable[[], Awaitable[None]]] = {
        "registry": registry.run,
        "fleet": fleet.run,
        **sight.loops,
        "dashboard": dashboard.run,
        "heavy-probe": heavy.run,
        "identity": identity.run,
        "certificates": partial(_keep_certificates, identity, ports.certificate, settings.heavy_tls_dir),
        "catalogue": catalogue.run,
        "access": foundation.access.run,
        "audit": foundation.audit.run,
        "records": records.run,
        "transfers": transfers.run,
        "samples": pulls.run,
        "transfers-ahead": transfers.run_ahead,
        "director": partial(director.run, fleet.reissue),
    }
    if ports.certificate_files is not None:
        loops["http-certificate"] = ports.certificate_files.run
    if settings.heavy.mode == "embedded":
        loops["heavy"] = _local_heavy(settings, identity, ports, heavy, clock=clock).run
    return _Parts(blobs, fleet, transfers, pulls, director, gateway, sight.intake, records, dashboard, app, loops)


async def _transfers(
    bounds: TransferSettings, packs_dir: Path, fleet: Fleet, blobs: BlobStore, stack: AsyncExitStack, *, clock: Clock
) -> Transfers:
    shelf = PackShelf(packs_dir, ChildBuilder(packs_dir, blobs))
    await shelf.clean()
    stack.push_async_callback(shelf.close)
    reader = ThreadPoolExecutor(4, thread_name_prefix="chunks")
    stack.callback(reader.shutdown)
    rate = bounds.bytes_per_s or None
    return Transfers(
        fleet,
        blobs,
        shelf,
        sender=FairSender(SendLimits(bytes_per_s=rate), clock=clock),
        admission=Admission(max_transfers=bounds.max_transfers, bytes_per_s=rate, clock=clock),
        disk=reader,
        clock=clock,
        bytes_per_s=rate,
    )


async def _sample_pulls(settings: Settings, fleet: Fleet, stack: AsyncExitStack, *, clock: Clock) -> SamplePulls:
    bounds = PullBounds(settings.samples.pull_bytes, settings.samples.spool_bytes)
    pulls = SamplePulls(Spool(settings.samples_dir), fleet, fleet.samples, clock=clock, bounds=bounds)
    stack.callback(pulls.close)
    await pulls.prepare()
    return pulls


def _local_heavy(
    settings: Settings, identity: Identity, ports: Ports, readiness: HeavyClient, *, clock: Clock
) -> LocalHeavy:
    """Return the heavy tier of this machine; its replicas show the certificate that is written here."""
    write_tls_identity(settings.heavy_tls_dir, identity.issue_local(Role.HEAVY, HEAVY_NAME))
    return LocalHeavy(
        settings.heavy,
        data_dir=settings.data_dir,
        controller=ports.grpc.address,
        tls_dir=settings.heavy_tls_dir,
        readiness=readiness,
        clock=clock,
    )


def _trust_faces(settings: Settings, foundation: Foundation, ports: Ports) -> TrustFaces:
    destination = Destination(
        settings.advertised(ports.grpc.address), settings.advertised(ports.enrolment.address), foundation
    )
    return TrustFaces(foundation.access, foundation.audit, foundation.identity, foundation.catalogue, destination)


async def _start_faces(foundation: Foundation, ports: Ports, parts: _Parts, *, clock: Clock) -> None:
    identity = foundation.identity
    inference = OpenInferenceServicer(
        parts.gateway, server_name=SERVER_NAME, server_version=version(SERVER_NAME), clock=clock
    )
    await ports.enrolment.start(EnrolmentServicer(identity, foundation, clock=clock))
    await ports.grpc.start(
        fleet=FleetServicer(
            parts.fleet,
            parts.director,
            check_hello=require_own_name(identity),
            trust_bundle=identity.trust_bundle,
        ),
        artifacts=ArtifactServicer(parts.blobs),
        delivery=DeliveryServicer(parts.transfers, caller_of=admitted_agent(identity)),
        catalogue=CatalogueServicer(foundation.catalogue),
        inference=inference,
        records=RecordServicer(parts.records, agent_of=agent_of),
        otlp=OtlpServicer(parts.intake),
        samples=SamplesServicer(parts.pulls, agent_of=agent_of),
    )


def _registry(
    settings: Settings, store: SqlRegistryStore, blobs: BlobStore, catalogue: Catalogue, clock: Clock
) -> Registry:
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
        releases=catalogue,
        cutter=TensorCutter(),
        clock=clock,
        max_model_bytes=bounds.max_model_bytes,
        max_queued_publications=bounds.max_queued_publications,
    )


def _records(settings: Settings, database: Database, clock: Clock) -> Records:
    bounds = settings.records
    kept = Kept(bounds.max_events, bounds.max_hours, timedelta(days=bounds.kept_days))
    return Records(SqlRecordStore(database), clock=clock, kept=kept)


async def _store_the_rest(tracing: Tracing, traces: Traces, fleet: Fleet) -> None:
    """Store what is still in memory."""
    await asyncio.to_thread(tracing.shutdown)
    await traces.flush()
    await fleet.flush()
