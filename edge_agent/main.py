"""The composition root: what an agent consists of, how it starts and how it stops.

Start: lock the state folder, load what was active (no network needed), open the local face, then the broker and the
controller. Stop, on SIGTERM or SIGINT: requests under way finish within `drain_timeout_s`, the broker hears that this
agent is offline, models and connections are closed, the last spans leave.
"""

import asyncio
import hashlib
import logging
import os
import platform
import signal
import uuid
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version

import orjson
import uvloop

from core.addresses import Address, parse_address
from core.atomic_files import write_atomically
from core.clock import SystemClock
from core.digest import Digest
from core.errors import Conflict, NanofleetError
from core.fleet_state import AgentHello, PushResult, SignedAssignment
from core.fleet_wire import MAX_HELD_MANIFESTS
from core.grpc_transport import TlsIdentity, TransportCredentials
from core.ids import AgentId, SiteId
from core.logs import configure_logging
from core.tasks import supervise
from core.telemetry import Tracing, TracingSettings
from edge_agent.activation.journal import Journal
from edge_agent.activation.probation import ProbationTerms
from edge_agent.activation.rebuild import rebuild_if_lost
from edge_agent.activation.self_test import SelfTester, SelfTestLimits
from edge_agent.cascade.offload import Offload
from edge_agent.data_plane import EdgeDataPlane
from edge_agent.front.grpc import GrpcFront
from edge_agent.front.mqtt.broker import BrokerState
from edge_agent.front.mqtt.front import MqttFront
from edge_agent.health.handover import require_root_of
from edge_agent.health.state_folder import StateFolder
from edge_agent.health.status_file import (
    AgentIdentity,
    AgentStatus,
    CertificateView,
    PeerView,
    Since,
    StatusWriter,
)
from edge_agent.identity.channel import RotatingChannel
from edge_agent.identity.child import ask_child
from edge_agent.identity.folder import Identity, IdentityFolder
from edge_agent.identity.renewal import Renewal
from edge_agent.link.reconnect import Link, ReconnectPolicy
from edge_agent.link.session import Session, SessionLimits, SessionState
from edge_agent.reconcile.attempts import RetryPolicy
from edge_agent.reconcile.executor import Reconciler
from edge_agent.reconcile.trials import TrialSettings
from edge_agent.reconcile.workplace import Workplace
from edge_agent.runtime.pool import ModelPool
from edge_agent.settings import AgentSettings
from edge_agent.sync.calls import DeliveryCallsOverGrpc
from edge_agent.sync.controller_source import ControllerSource, SourceLimits
from edge_agent.sync.delivery import Delivery, DeliveryLimits
from edge_agent.sync.store import ContentStore
from edge_agent.trust.desk import TrustDesk
from edge_agent.trust.gate import TrustGate
from edge_agent.trust.question import CatalogueSource
from edge_agent.trust.terms import AdmittedManifests
from protos.fleet.v1.fleet_pb2_grpc import FleetServiceStub

# Chosen: a model that takes longer to load must not keep the others from answering.
RESTORE_TIMEOUT_S = 30.0
# Derived: the exporter's own timeout, and some.
FLUSH_TIMEOUT_S = 8.0

_log = logging.getLogger(__name__)


def run_agent(settings: AgentSettings) -> None:
    """Run until a signal says stop."""
    configure_logging(level=settings.logs.level, log_format=settings.logs.format)
    uvloop.run(serve(settings))


async def serve(settings: AgentSettings) -> None:
    """Run the agent of `settings` until a signal says stop.

    Raises:
        NanofleetError: it cannot run like this; the message says why.
    """
    folder = StateFolder(settings.state_dir)
    with folder.locked():
        try:
            async with AsyncExitStack() as closing:
                await _Agent(settings, folder, closing).run(_stop_on_signal())
        except ExceptionGroup as group:
            refusals, defects = group.split(NanofleetError)
            if refusals is None or defects is not None:
                raise
            raise refusals.exceptions[0] from None


class _Agent:
    """Every part, made once and in the order of their needs; `closing` takes them apart in reverse."""

    def __init__(self, settings: AgentSettings, folder: StateFolder, closing: AsyncExitStack) -> None:
        self._settings, self._folder, self._closing = settings, folder, closing
        self._clock = clock = SystemClock()
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="disk")
        closing.callback(self._disk.shutdown)
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="hashing")
        closing.callback(self._hashing.shutdown)
        enrolled = _enrolled(IdentityFolder(folder.identity), settings)
        require_root_of(enrolled, folder.root)
        self._identity = _identity(enrolled)
        self._controller = enrolled.controller
        self._tags = (f"arch:{platform.machine()}", *settings.tags)
        self._tracing = _tracing(settings, enrolled)
        closing.push_async_callback(_flush, self._tracing)
        channel = RotatingChannel(enrolled.controller, enrolled.tls)
        closing.push_async_callback(channel.close)
        self._renewal = self._make_renewal(channel)
        self._pool = ModelPool(settings.runtime, clock=clock)
        closing.push_async_callback(self._pool.close)
        self._offload = Offload(channel, settings.offload, clock=clock)
        self._plane = EdgeDataPlane(self._pool, self._offload, tracing=self._tracing, clock=clock)
        closing.push_async_callback(self._plane.close)
        self._store = ContentStore(folder.store)
        self._journal = _own(Journal(folder.journal, clock=clock), enrolled.agent_id, settings)
        rebuild_if_lost(self._journal, self._store, agent_id=enrolled.agent_id, clock=clock)
        self._journal.note_start(software_version=self._identity.software_version)
        self._delivery = self._make_delivery(channel)
        self._admissions = AdmittedManifests(in_force=self._in_force())
        self._reconciler = self._make_reconciler()
        self._gate = TrustGate(folder.trust, source=self._catalogue_source)
        self._desk = TrustDesk(
            self._gate,
            self._reconciler,
            self._admissions,
            agent_id=enrolled.agent_id,
            tags=self._tags,
            in_force=self._in_force,
        )
        self._fleet = FleetServiceStub(channel)
        link = settings.link
        pace = ReconnectPolicy(link.reconnect_base_s, link.reconnect_cap_s, link.first_delay_s)
        self._link = Link(self._connect, policy=pace, clock=clock)
        self._front: MqttFront | None = None
        self._broker_since = Since(clock)
        self._status = StatusWriter(folder.status, self._look, disk=self._disk, clock=clock)

    def _make_renewal(self, channel: RotatingChannel) -> Renewal:
        return Renewal(
            IdentityFolder(self._folder.identity),
            channel,
            disk=self._disk,
            child=ask_child,
            clock=self._clock,
            on_change=self._follow,
        )

    def _follow(self, tls: TlsIdentity) -> None:
        self._tracing.follow(tls)
        # The identity before may have been what kept it waiting.
        self._link.retry_now()

    def _make_delivery(self, channel: RotatingChannel) -> Delivery:
        sync = self._settings.sync
        source = ControllerSource(
            DeliveryCallsOverGrpc(channel), limits=SourceLimits(sync.chunk_timeout_s), clock=self._clock
        )
        return Delivery(
            source,
            self._store,
            disk=self._disk,
            hashing=self._hashing,
            limits=DeliveryLimits(sync.reserve_bytes),
            clock=self._clock,
            is_metered=self._settings.metered,
        )

    def _make_reconciler(self) -> Reconciler:
        sync, activation = self._settings.sync, self._settings.activation
        tester = SelfTester(
            SelfTestLimits(activation.self_test_timeout_s, intra_op_threads=self._settings.runtime.intra_op_threads)
        )
        terms = ProbationTerms(
            activation.probation_s, activation.probation_requests, max_failure_ratio=activation.max_error_ratio
        )
        return Reconciler(
            AgentId(self._identity.agent_id),
            Workplace(self._store, self._journal, self._delivery, tester, self._pool, self._disk),
            policy=RetryPolicy(sync.max_attempts, sync.retry_base_s, sync.retry_cap_s),
            trials=TrialSettings(terms),
            software_version=self._identity.software_version,
            clock=self._clock,
            terms=self._admissions.require,
        )

    def _in_force(self) -> frozenset[Digest]:
        """Return the manifests that were verified when they came: what runs or may run again needs no new word."""
        return self._journal.record.in_use()

    def _catalogue_source(self) -> CatalogueSource:
        return CatalogueSource(self._controller, self._renewal.identity.tls)

    async def run(self, stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as group:
            loops = {"reconciler": self._reconciler.run, "status": self._status.run}
            tasks = _start(group, loops)
            await _first_of(self._reconciler.restored.wait, stop.wait, timeout_s=RESTORE_TIMEOUT_S)
            faces = await self._open_local_face()
            self._front = self._make_front(faces)
            if self._front is not None:
                tasks += _start(group, {"mqtt": self._front.run})
            outward = {"link": self._link.run, "verification": self._desk.run, "identity": self._renewal.run}
            tasks += _start(group, outward)
            self._announce(faces)
            await stop.wait()
            _log.info("stopping")
            await self._drain()
            for task in tasks:
                task.cancel()
        # On the disk's thread: the last word of a cancelled step may still be under way there.
        await asyncio.get_running_loop().run_in_executor(self._disk, self._journal.note_clean_stop)
        await self._status.write_if_changed()

    def _connect(self, on_state: Callable[[SessionState], None]) -> "_Connection":
        return _Connection(partial(self._session, on_state))

    async def _session(self, on_state: Callable[[SessionState], None]) -> Session:
        link = self._settings.link
        # The store belongs to the disk's thread.
        hello = await asyncio.get_running_loop().run_in_executor(self._disk, self._hello)
        limits = SessionLimits(link.handshake_timeout_s, link.write_timeout_s)
        return Session(self._fleet, self._reconciler, self, hello=hello, limits=limits, on_state=on_state)

    def _hello(self) -> AgentHello:
        identity = self._identity
        return AgentHello(
            AgentId(identity.agent_id),
            SiteId(identity.site),
            identity.software_version,
            identity.boot_id,
            self._reconciler.applied,
            self._tags,
            self._gate.versions(),
            self._store.complete_variants()[:MAX_HELD_MANIFESTS],
            self._settings.metered,
            hashlib.sha256(self._renewal.identity.tls.trust_bundle).digest(),
        )

    async def push(self, signed: SignedAssignment) -> PushResult | None:
        return await self._desk.push(signed)

    async def trust_bundle(self, pem: bytes) -> None:
        self._renewal.apply_trust_bundle(pem)

    async def permit_transfer(self, manifest_digest: Digest) -> None:
        self._delivery.allow(manifest_digest)
        self._reconciler.retry_failed()

    async def _open_local_face(self) -> dict[str, str]:
        if self._settings.grpc_bind is None:
            return {}
        face = GrpcFront(
            self._plane,
            bind=parse_address(self._settings.grpc_bind),
            credentials=TransportCredentials.local(),
            clock=self._clock,
            version=self._identity.software_version,
        )
        address: Address = await face.start()
        self._closing.push_async_callback(face.stop, self._settings.drain_timeout_s)
        return {"grpc": str(address)}

    def _make_front(self, faces: dict[str, str]) -> MqttFront | None:
        if not self._settings.mqtt.enabled:
            return None
        return MqttFront(
            self._settings.mqtt,
            site=SiteId(self._identity.site),
            agent=AgentId(self._identity.agent_id),
            plane=self._plane,
            pool=self._pool,
            clock=self._clock,
            faces=faces,
        )

    def _announce(self, faces: dict[str, str]) -> None:
        write_atomically(self._folder.endpoints, orjson.dumps(faces))
        self._closing.callback(self._folder.endpoints.unlink, missing_ok=True)
        _log.info("agent is up", extra={"agent": self._identity.agent_id, "site": self._identity.site, **faces})

    async def _drain(self) -> None:
        if self._front is None:
            return
        try:
            async with asyncio.timeout(self._settings.drain_timeout_s):
                await self._front.drain()
        except TimeoutError:
            _log.warning("requests were still under way at the end", extra={"requests": self._front.in_flight})

    def _look(self) -> AgentStatus:
        return AgentStatus.of(
            self._identity,
            self._reconciler.board.reported(),
            controller=self._controller_view(),
            broker=self._broker_view(),
            certificate=CertificateView.of(self._renewal.status()),
            heavy_breaker=self._offload.state.value,
            clock_problem=self._gate.clock_problem,
            counters={} if self._front is None else asdict(self._front.counters),
            now=self._clock.now(),
        )

    def _controller_view(self) -> PeerView:
        status = self._link.status
        return PeerView(
            address=str(self._controller),
            state=status.state.value,
            is_connected=status.state is SessionState.OPEN,
            since=status.since,
            last_error=status.last_error,
            retry_at=status.retry_at,
        )

    def _broker_view(self) -> PeerView | None:
        mqtt, front = self._settings.mqtt, self._front
        if not mqtt.enabled:
            return None
        state = BrokerState.STOPPED if front is None else front.state
        is_connected = state is BrokerState.ONLINE
        return PeerView(
            address=str(Address(mqtt.host, mqtt.port)),
            state=state.value,
            is_connected=is_connected,
            since=self._broker_since.of(is_connected),
            last_error="" if front is None else front.last_error or "",
        )


@dataclass(frozen=True, slots=True)
class _Connection:
    """One session, whose hello is written when it begins."""

    session: Callable[[], Awaitable[Session]]

    async def run(self) -> None:
        session = await self.session()
        await session.run()


def _enrolled(folder: IdentityFolder, settings: AgentSettings) -> Identity:
    """Return who this agent is, at the addresses that the settings say instead of those of its enrolment, if any.

    Raises:
        NotEnrolled: nobody yet.
    """
    known = folder.load()
    located = replace(
        known,
        controller=known.controller if settings.controller is None else parse_address(settings.controller),
        enrolment=known.enrolment if settings.enrolment is None else parse_address(settings.enrolment),
    )
    if located != known:
        folder.replace(located)
    return located


def _identity(enrolled: Identity) -> AgentIdentity:
    return AgentIdentity(
        agent_id=enrolled.agent_id,
        site=enrolled.site,
        software_version=version("nanofleet"),
        boot_id=uuid.uuid4().hex,
        pid=os.getpid(),
        started_at=SystemClock().now(),
    )


def _tracing(settings: AgentSettings, enrolled: Identity) -> Tracing:
    telemetry = settings.telemetry
    receiver = enrolled.controller if telemetry.endpoint is None else parse_address(telemetry.endpoint)
    return Tracing(
        "nanofleet-agent",
        TracingSettings(receiver if telemetry.export else None, telemetry.sample_ratio),
        attributes={"service.instance.id": enrolled.agent_id, "nanofleet.site": enrolled.site},
        # Another collector is asked in the clear, as collectors on loopback expect.
        credentials=enrolled.tls if telemetry.endpoint is None else None,
    )


def _own(journal: Journal, agent_id: AgentId, settings: AgentSettings) -> Journal:
    active = journal.record.current
    if active is not None and active.agent_id != agent_id:
        raise Conflict(
            f"{settings.state_dir}: expected the state of agent {agent_id}, got that of {active.agent_id}; "
            "choose another state_dir"
        )
    return journal


def _start(group: asyncio.TaskGroup, loops: Mapping[str, Callable[[], Awaitable[None]]]) -> list[asyncio.Task[None]]:
    return [group.create_task(supervise(name, run), name=name) for name, run in loops.items()]


def _stop_on_signal() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


async def _first_of(*waits: Callable[[], Awaitable[object]], timeout_s: float) -> None:
    """Return when one of them does, or after `timeout_s`."""
    tasks = [asyncio.ensure_future(wait()) for wait in waits]
    await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


async def _flush(tracing: Tracing) -> None:
    """Send the last spans, off the loop and within a bound: the receiver may be away."""
    flushing = asyncio.get_running_loop().run_in_executor(None, tracing.shutdown)
    done, _ = await asyncio.wait([flushing], timeout=FLUSH_TIMEOUT_S)
    if not done:
        _log.warning("the last spans could not be sent in time")
