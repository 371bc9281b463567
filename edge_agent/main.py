"""The composition root: what an agent consists of, how it starts and how it stops.

Start: lock the state folder, load what was active (no network needed), open the local face, then the broker and the
controller. Stop, on SIGTERM or SIGINT: requests under way finish within `drain_timeout_s`, the broker hears that this
agent is offline, models and connections are closed, the last spans leave.
"""

import asyncio
import logging
import os
import platform
import uuid
from concurrent.futures import Executor
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from importlib.metadata import version

import orjson
import uvloop

from core.addresses import Address, parse_address
from core.atomic_files import write_atomically
from core.clock import SystemClock
from core.errors import NanofleetError
from core.grpc_transport import TlsIdentity
from core.ids import AgentId, SiteId
from core.keeping import KeepRule
from core.logs import configure_logging
from core.metrics import Registry
from core.process_metrics import register_process
from core.service_notices import READY, STOPPING, ServiceNotices
from core.telemetry import Tracing, TracingSettings
from edge_agent.activation.self_test import SelfTester, SelfTestLimits
from edge_agent.agent_metrics import (
    register_broker,
    register_cache,
    register_energy,
    register_member,
    register_post,
    register_serving,
)
from edge_agent.cached_answers import CachedAnswers
from edge_agent.cascade.offload import Offload
from edge_agent.cascade.privacy import PrivacyRules
from edge_agent.data_plane import EdgeDataPlane
from edge_agent.energy.meter import EnergyMeter
from edge_agent.front.local import LocalFaces
from edge_agent.front.mqtt.broker import BrokerState
from edge_agent.front.mqtt.front import MqttFront
from edge_agent.front.mqtt.tls import BrokerTls
from edge_agent.front.tls import FacesTls
from edge_agent.health import code_pages
from edge_agent.health.handover import require_root_of
from edge_agent.health.state_folder import StateFolder
from edge_agent.health.status_file import (
    AgentIdentity,
    AgentStatus,
    CertificateView,
    MemoryView,
    PeerView,
    Since,
    StatusWriter,
)
from edge_agent.identity.channel import RotatingChannel
from edge_agent.identity.folder import Identity, IdentityFolder
from edge_agent.lifetime import first_of, flush, keep_collected, prefer_the_loop, start, stop_on_signal, thread
from edge_agent.member import Member, Surroundings
from edge_agent.post import Correspondents, PostOffice, Sources
from edge_agent.request_metrics import RequestMetrics
from edge_agent.runtime.footprint import Footprints
from edge_agent.runtime.hosting import hosting_by
from edge_agent.runtime.memory import keep_malloc_tight
from edge_agent.runtime.pool import ModelPool
from edge_agent.samples.service import Samples
from edge_agent.settings import AgentSettings

# Chosen: a model that takes longer to load must not keep the others from answering.
RESTORE_TIMEOUT_S = 30.0

_log = logging.getLogger(__name__)


def run_agent(settings: AgentSettings) -> None:
    """Run until a signal says stop."""
    configure_logging(level=settings.logs.level, log_format=settings.logs.format)
    # Before anything large is freed, from which on malloc would keep it.
    keep_malloc_tight()
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
                await _Agent(settings, folder, closing).run(stop_on_signal())
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
        self._notices = ServiceNotices.taken_from(os.environ, pid=os.getpid())
        self._disk = thread("disk", closing)
        enrolled = _enrolled(IdentityFolder(folder.identity), settings)
        require_root_of(enrolled, folder.root)
        self._identity = _identity(enrolled)
        self._tracing = _tracing(settings, enrolled)
        channel = RotatingChannel(enrolled.controller, enrolled.tls)
        closing.push_async_callback(channel.close)
        footprints = Footprints.under(folder.footprints, settings.runtime, disk=self._disk)
        tester = SelfTester(SelfTestLimits.of(settings), footprints)
        hosting = hosting_by(settings.residency, settings.models, footprints, tester)
        self._pool = ModelPool(settings.runtime, clock=clock, hosting=hosting)
        closing.push_async_callback(self._pool.close)
        self._offload = Offload(channel, settings.offload, clock=clock)
        self._metrics = Registry()
        counted = RequestMetrics(self._metrics, clock=clock)
        self._samples = Samples(settings, folder.samples, channel, clock=clock)
        closing.callback(self._samples.close)
        others = Correspondents(channel, self._offload, lambda: self._member.is_link_open)
        sources = Sources(counted, self._tracing, self._identity.boot_id)
        self._post = PostOffice(folder.outbox, settings, others, sources, clock=clock)
        closing.push_async_callback(self._post.close)
        # Before it, since the last spans may end up there.
        closing.push_async_callback(flush, self._tracing)
        cached = CachedAnswers.of(settings.models)
        register_cache(self._metrics, cached)
        self._plane = self._make_plane(counted, cached)
        closing.push_async_callback(self._plane.close)
        self._energy = EnergyMeter(
            settings.energy, usage=counted.usage, tell=self._plane.note_energy, disk=self._disk, clock=clock
        )
        tls = _faces_tls(settings, enrolled, IdentityFolder(folder.identity), self._disk)
        self._faces = LocalFaces(
            settings,
            self._plane,
            metrics=self._metrics,
            version=self._identity.software_version,
            clock=clock,
            tls=tls,
        )
        self._member = self._make_member(enrolled, channel, tester, counted, tls)
        self._front: MqttFront | None = None
        self._broker_since = Since(clock)
        self._status = StatusWriter(
            folder.status, self._look, disk=self._disk, clock=clock, refresh=self._energy.refresh
        )
        self._register()

    async def run(self, stop: asyncio.Event) -> None:
        await self._post.open()
        async with asyncio.TaskGroup() as group:
            tasks = start(group, self._post.keeping)
            tasks += start(group, {"reconciler": self._member.reconciling, "status": self._status.run})
            tasks += start(group, {"watchdog": self._notices.keep_alive, **self._samples.loops})
            await first_of(self._member.restored, stop.wait, timeout_s=RESTORE_TIMEOUT_S)
            faces = await self._faces.open(self._closing)
            self._front = self._make_front(faces)
            if self._front is not None:
                tasks += start(group, {"mqtt": self._front.run})
            prefer_the_loop()
            code_pages.release()
            tasks += start(group, {"code pages": self._keep_code_released, "collector": self._keep_collected})
            tasks += start(group, self._member.outward)
            tasks += start(group, self._post.outward(self._member.board, self._front))
            self._announce(faces)
            self._notices.say(READY)
            await stop.wait()
            _log.info("stopping")
            self._notices.say(STOPPING)
            await self._drain()
            for task in tasks:
                task.cancel()
        await self._member.note_clean_stop()
        await self._status.write_if_changed()

    async def _keep_code_released(self) -> None:
        await code_pages.keep_released(self._is_idle)

    async def _keep_collected(self) -> None:
        await keep_collected(self._is_idle)

    def _is_idle(self) -> bool:
        return not self._pool.queued and (self._front is None or not self._front.in_flight)

    def _make_plane(self, counted: RequestMetrics, cached: CachedAnswers | None) -> EdgeDataPlane:
        return EdgeDataPlane(
            self._pool,
            self._offload,
            tracing=self._tracing,
            clock=self._clock,
            metrics=counted,
            examples=self._samples.collector,
            deferrals=self._post.deferrals,
            is_reachable=self._post.reachability.is_reachable,
            privacy=PrivacyRules.of(self._settings),
            cached=cached,
        )

    def _make_member(
        self,
        enrolled: Identity,
        channel: RotatingChannel,
        tester: SelfTester,
        counted: RequestMetrics,
        tls: FacesTls | None,
    ) -> Member:
        return Member(
            Surroundings(
                self._settings,
                self._folder,
                enrolled,
                self._identity,
                (f"arch:{platform.machine()}", *self._settings.tags),
                channel,
                self._pool,
                tester,
                self._tracing,
                self._disk,
                self._clock,
                counted.usage,
                self._samples,
                lambda: self._energy.energy,
                _ignore if tls is None else tls.follow,
            )
        )

    def _register(self) -> None:
        register_process(self._metrics, version=self._identity.software_version)
        register_serving(self._metrics, pool=self._pool, offload=self._offload)
        register_energy(self._metrics, self._energy)
        register_broker(self._metrics, lambda: self._front)
        register_member(self._metrics, self._member, disk=self._disk)
        self._samples.register(self._metrics)
        register_post(self._metrics, self._post)

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
            tls=self._broker_tls(),
            metrics=self._metrics,
        )

    def _broker_tls(self) -> BrokerTls | None:
        mqtt = self._settings.mqtt
        if not mqtt.tls.enabled:
            return None
        folder = IdentityFolder(self._folder.identity)
        return BrokerTls(folder, mqtt.tls.server_name or mqtt.host, ca_file=mqtt.tls.ca_file, disk=self._disk)

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
            self._member.board.reported(),
            controller=self._member.controller_view(),
            broker=self._broker_view(),
            certificate=CertificateView.of(self._member.renewal.status()),
            heavy_breaker=self._offload.state.value,
            clock_problem=self._member.clock_problem,
            memory=MemoryView.of(self._pool),
            outbox=self._post.view(),
            counters={
                **({} if self._front is None else asdict(self._front.counters)),
                **self._pool.load_counts.totals(),
                **self._samples.counters(),
            },
            energy=self._energy.energy,
            now=self._clock.now(),
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


def _faces_tls(settings: AgentSettings, enrolled: Identity, folder: IdentityFolder, disk: Executor) -> FacesTls | None:
    if not settings.faces.tls:
        return None
    return FacesTls(folder, enrolled.tls, trust_domain=enrolled.trust_domain, disk=disk)


def _ignore(_identity: TlsIdentity) -> None:
    return


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
        TracingSettings(
            receiver if telemetry.export else None,
            sample_ratio=telemetry.sample_ratio,
            sampled_per_s=telemetry.sampled_per_s,
            # A trace that leaves nowhere is not worth its making.
            keep=KeepRule(telemetry.slow_s, telemetry.keep_per_s if telemetry.export else 0.0),
        ),
        attributes={"service.instance.id": enrolled.agent_id, "nanofleet.site": enrolled.site},
        # Another collector is asked in the clear, as collectors on loopback expect.
        credentials=enrolled.tls if telemetry.endpoint is None else None,
    )
