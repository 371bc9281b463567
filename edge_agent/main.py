"""The composition root: what an agent consists of, how it starts and how it stops.

Start: lock the state folder, load what was active (no network needed), open the local face, then the broker and the
controller. Stop, on SIGTERM or SIGINT: requests under way finish within `drain_timeout_s`, the broker hears that this
agent is offline, models and connections are closed, the last spans leave.
"""

import asyncio
import logging
import os
import platform
import signal
import uuid
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import asdict
from importlib.metadata import version

import orjson
import uvloop

from core.addresses import Address, parse_address
from core.atomic_files import write_atomically
from core.clock import SystemClock
from core.errors import Conflict, NanofleetError
from core.fleet_state import AgentHello
from core.grpc_transport import TransportCredentials, open_channel
from core.ids import AgentId, SiteId
from core.logs import configure_logging
from core.tasks import supervise
from core.telemetry import Tracing, TracingSettings
from edge_agent.activation.journal import Journal
from edge_agent.activation.probation import ProbationTerms
from edge_agent.activation.self_test import SelfTester, SelfTestLimits
from edge_agent.cascade.offload import Offload
from edge_agent.data_plane import EdgeDataPlane
from edge_agent.front.grpc import GrpcFront
from edge_agent.front.mqtt.broker import BrokerState
from edge_agent.front.mqtt.front import MqttFront
from edge_agent.health.state_folder import StateFolder
from edge_agent.health.status_file import AgentIdentity, AgentStatus, PeerView, Since, StatusWriter
from edge_agent.link.reconnect import Link, ReconnectPolicy
from edge_agent.link.session import Session, SessionLimits, SessionState
from edge_agent.reconcile.attempts import RetryPolicy
from edge_agent.reconcile.executor import Reconciler
from edge_agent.reconcile.trials import TrialSettings
from edge_agent.reconcile.workplace import Workplace
from edge_agent.runtime.pool import ModelPool
from edge_agent.settings import AgentSettings
from edge_agent.sync.fetch import Fetch, FetchLimits
from edge_agent.sync.store import ContentStore
from protos.artifacts.v1.artifacts_pb2_grpc import ArtifactServiceStub
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
        self._identity = _identity(settings)
        self._credentials = TransportCredentials.local()
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="disk")
        closing.callback(self._disk.shutdown)
        self._tracing = _tracing(settings, self._credentials)
        closing.push_async_callback(_flush, self._tracing)
        channel = open_channel(parse_address(settings.controller), self._credentials)
        closing.push_async_callback(channel.close)
        self._pool = ModelPool(settings.runtime, clock=clock)
        closing.push_async_callback(self._pool.close)
        self._offload = Offload(channel, settings.offload, clock=clock)
        self._plane = EdgeDataPlane(self._pool, self._offload, tracing=self._tracing, clock=clock)
        closing.push_async_callback(self._plane.close)
        store = ContentStore(folder.store)
        self._journal = _own(Journal(folder.journal, clock=clock), settings)
        self._journal.note_start(software_version=self._identity.software_version)
        sync = settings.sync
        limits = FetchLimits(chunk_timeout_s=sync.chunk_timeout_s, reserve_bytes=sync.reserve_bytes)
        source = Fetch(ArtifactServiceStub(channel), store, disk=self._disk, limits=limits, clock=clock)
        self._reconciler = Reconciler(
            AgentId(settings.agent_id),
            Workplace(store, self._journal, source, self._tester(), self._pool, self._disk),
            policy=RetryPolicy(sync.max_attempts, sync.retry_base_s, sync.retry_cap_s),
            trials=TrialSettings(ProbationTerms()),
            software_version=self._identity.software_version,
            clock=clock,
        )
        self._fleet = FleetServiceStub(channel)
        pace = ReconnectPolicy(
            settings.link.reconnect_base_s, settings.link.reconnect_cap_s, settings.link.first_delay_s
        )
        self._link = Link(self._connect, policy=pace, clock=clock)
        self._front: MqttFront | None = None
        self._broker_since = Since(clock)
        self._status = StatusWriter(folder.status, self._look, disk=self._disk, clock=clock)

    async def run(self, stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as group:
            loops = {"reconciler": self._reconciler.run, "status": self._status.run}
            tasks = _start(group, loops)
            await _first_of(self._reconciler.restored.wait, stop.wait, timeout_s=RESTORE_TIMEOUT_S)
            faces = await self._open_local_face()
            self._front = self._make_front(faces)
            if self._front is not None:
                tasks += _start(group, {"mqtt": self._front.run})
            tasks += _start(group, {"link": self._link.run})
            self._announce(faces)
            await stop.wait()
            _log.info("stopping")
            await self._drain()
            for task in tasks:
                task.cancel()
        # On the disk's thread: the last word of a cancelled step may still be under way there.
        await asyncio.get_running_loop().run_in_executor(self._disk, self._journal.note_clean_stop)
        await self._status.write_if_changed()

    def _tester(self) -> SelfTester:
        return SelfTester(SelfTestLimits(intra_op_threads=self._settings.runtime.intra_op_threads))

    def _connect(self, on_state: Callable[[SessionState], None]) -> Session:
        identity, link = self._identity, self._settings.link
        hello = AgentHello(
            AgentId(identity.agent_id),
            SiteId(identity.site),
            identity.software_version,
            identity.boot_id,
            self._reconciler.applied,
            (f"arch:{platform.machine()}", *self._settings.tags),
        )
        limits = SessionLimits(link.handshake_timeout_s, link.write_timeout_s)
        return Session(self._fleet, self._reconciler, hello=hello, limits=limits, on_state=on_state)

    async def _open_local_face(self) -> dict[str, str]:
        if self._settings.grpc_bind is None:
            return {}
        face = GrpcFront(
            self._plane,
            bind=parse_address(self._settings.grpc_bind),
            credentials=self._credentials,
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
            site=SiteId(self._settings.site),
            agent=AgentId(self._settings.agent_id),
            plane=self._plane,
            pool=self._pool,
            clock=self._clock,
            faces=faces,
        )

    def _announce(self, faces: dict[str, str]) -> None:
        write_atomically(self._folder.endpoints, orjson.dumps(faces))
        self._closing.callback(self._folder.endpoints.unlink, missing_ok=True)
        _log.info("agent is up", extra={"agent": self._settings.agent_id, "site": self._settings.site, **faces})

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
            heavy_breaker=self._offload.state.value,
            counters={} if self._front is None else asdict(self._front.counters),
            now=self._clock.now(),
        )

    def _controller_view(self) -> PeerView:
        status = self._link.status
        return PeerView(
            address=self._settings.controller,
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


def _identity(settings: AgentSettings) -> AgentIdentity:
    return AgentIdentity(
        agent_id=settings.agent_id,
        site=settings.site,
        software_version=version("nanofleet"),
        boot_id=uuid.uuid4().hex,
        pid=os.getpid(),
        started_at=SystemClock().now(),
    )


def _tracing(settings: AgentSettings, credentials: TransportCredentials) -> Tracing:
    telemetry = settings.telemetry
    endpoint = parse_address(telemetry.endpoint or settings.controller) if telemetry.export else None
    return Tracing(
        "nanofleet-agent",
        TracingSettings(endpoint, telemetry.sample_ratio),
        attributes={"service.instance.id": settings.agent_id, "nanofleet.site": settings.site},
        # Another collector is asked in the clear, as collectors on loopback expect.
        credentials=credentials.channel if telemetry.endpoint is None else None,
    )


def _own(journal: Journal, settings: AgentSettings) -> Journal:
    active = journal.record.current
    if active is not None and active.agent_id != settings.agent_id:
        raise Conflict(
            f"{settings.state_dir}: expected the state of agent {settings.agent_id}, got that of {active.agent_id}; "
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
