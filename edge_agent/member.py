"""This agent as a member of its fleet: who it is there, what it was told to run, and how that gets here.

    controller ─▶ Link ─▶ Session ─▶ TrustDesk (verify) ─▶ Reconciler ─▶ Delivery, SelfTester, ModelPool
                             ▲                                 └─▶ Board ─▶ reports
                             └── hello: who, what is applied, what is held

Made by the composition root around the parts that serve requests, so that those never wait for a fleet.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from core.clock import Clock
from core.digest import Digest
from core.errors import Conflict
from core.fleet_state import AgentHello, AgentVitals, Energy, PushResult, SignedAssignment, Usage
from core.fleet_wire import MAX_HELD_MANIFESTS
from core.grpc_transport import TlsIdentity
from core.ids import AgentId, SiteId
from core.samples import SampleCounts, SampleOrder
from core.telemetry import Tracing
from edge_agent.activation.journal import Journal
from edge_agent.activation.probation import ProbationTerms
from edge_agent.activation.rebuild import rebuild_if_lost
from edge_agent.activation.self_test import SelfTester
from edge_agent.health.machine import machine_health
from edge_agent.health.state_folder import StateFolder
from edge_agent.health.status_file import AgentIdentity, PeerView
from edge_agent.identity.channel import RotatingChannel
from edge_agent.identity.child import ask_child
from edge_agent.identity.folder import Identity, IdentityFolder
from edge_agent.identity.renewal import Renewal
from edge_agent.link.reconnect import Link, ReconnectPolicy
from edge_agent.link.session import Session, SessionLimits, SessionState
from edge_agent.reconcile.attempts import RetryPolicy
from edge_agent.reconcile.board import Board
from edge_agent.reconcile.executor import Reconciler
from edge_agent.reconcile.trials import TrialSettings
from edge_agent.reconcile.workplace import Workplace
from edge_agent.runtime.pool import ModelPool
from edge_agent.settings import AgentSettings
from edge_agent.sync.calls import DeliveryCallsOverGrpc
from edge_agent.sync.controller_source import ControllerSource, SourceLimits
from edge_agent.sync.delivery import Delivery, DeliveryLimits
from edge_agent.sync.source import Codec
from edge_agent.sync.store import ContentStore
from edge_agent.trust.desk import TrustDesk
from edge_agent.trust.gate import TrustGate
from edge_agent.trust.question import CatalogueSource
from edge_agent.trust.terms import AdmittedManifests
from protos.fleet.v1.fleet_pb2_grpc import FleetServiceStub


class KeptSamples(Protocol):
    """The hard examples that this agent keeps."""

    def counts(self) -> SampleCounts: ...

    def order(self, order: SampleOrder) -> None: ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a member is made among: its folder and settings, the pool that runs its models, who tries them, its disk."""

    settings: AgentSettings
    folder: StateFolder
    enrolled: Identity
    process: AgentIdentity
    tags: tuple[str, ...]
    channel: RotatingChannel
    pool: ModelPool
    tester: SelfTester
    tracing: Tracing
    disk: Executor
    clock: Clock
    # What became of the requests so far.
    usage: Callable[[], Usage]
    samples: KeptSamples
    # What its work took so far, if that is known.
    energy: Callable[[], Energy | None]
    # Hears of every identity that replaces the one before, besides the channel and the tracing.
    on_identity: Callable[[TlsIdentity], None]


class Member:
    """Keep `loops` running, `reconciling` first: what was active needs no network."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._began_s = around.clock.monotonic_s()
        folder, clock, enrolled = around.folder, around.clock, around.enrolled
        self._renewal = Renewal(
            IdentityFolder(folder.identity),
            around.channel,
            disk=around.disk,
            child=ask_child,
            clock=clock,
            on_change=self._follow,
        )
        self._store = ContentStore(folder.store)
        self._journal = _own(Journal(folder.journal, clock=clock), around)
        rebuild_if_lost(self._journal, self._store, agent_id=enrolled.agent_id, clock=clock)
        self._journal.note_start(software_version=around.process.software_version)
        self._delivery = _delivery(around, self._store)
        self._admissions = AdmittedManifests(in_force=self._in_force())
        self._reconciler = self._make_reconciler()
        self._gate = TrustGate(folder.trust, source=self._catalogue_source)
        self._desk = TrustDesk(
            self._gate,
            self._reconciler,
            self._admissions,
            agent_id=enrolled.agent_id,
            tags=around.tags,
            in_force=self._in_force,
        )
        self._fleet = FleetServiceStub(around.channel)
        link = around.settings.link
        pace = ReconnectPolicy(link.reconnect_base_s, link.reconnect_cap_s, link.first_delay_s)
        self._link = Link(self._connect, policy=pace, clock=clock)

    def _make_reconciler(self) -> Reconciler:
        around = self._around
        sync, activation = around.settings.sync, around.settings.activation
        terms = ProbationTerms(
            activation.probation_s, activation.probation_requests, max_failure_ratio=activation.max_error_ratio
        )
        return Reconciler(
            around.enrolled.agent_id,
            Workplace(self._store, self._journal, self._delivery, around.tester, around.pool, around.disk),
            policy=RetryPolicy(sync.max_attempts, sync.retry_base_s, sync.retry_cap_s),
            trials=TrialSettings(terms),
            software_version=around.process.software_version,
            clock=around.clock,
            terms=self._admissions.require,
        )

    # ---- for the composition root ------------------------------------------------------------------------------

    async def reconciling(self) -> None:
        await self._reconciler.run()

    @property
    def outward(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        """The loops that need the controller, by name."""
        return {"link": self._link.run, "verification": self._desk.run, "identity": self._renewal.run}

    async def restored(self) -> None:
        """Return once every variant that was whole on disk at start is loaded, or has failed to."""
        await self._reconciler.restored.wait()

    async def note_clean_stop(self) -> None:
        """Say that this process did not crash; after its loops have ended."""
        # On the disk's thread: the last word of a cancelled step may still be under way there.
        await asyncio.get_running_loop().run_in_executor(self._around.disk, self._journal.note_clean_stop)

    # ---- how it is ---------------------------------------------------------------------------------------------

    @property
    def board(self) -> Board:
        return self._reconciler.board

    @property
    def renewal(self) -> Renewal:
        return self._renewal

    @property
    def is_link_open(self) -> bool:
        return self._link.status.state is SessionState.OPEN

    @property
    def clock_problem(self) -> str:
        return self._gate.clock_problem

    def fetched_bytes(self) -> Mapping[Codec, int]:
        """Return the encoded bytes that came from the controller since the process began."""
        return self._delivery.fetched_bytes

    def store_sizes(self) -> tuple[int, int]:
        """Return the bytes in store and those free on its disk; to be called on the disk's thread."""
        return self._store.size_bytes(), self._store.free_bytes()

    def controller_view(self) -> PeerView:
        status = self._link.status
        return PeerView(
            address=str(self._around.enrolled.controller),
            state=status.state.value,
            is_connected=self.is_link_open,
            since=status.since,
            last_error=status.last_error,
            retry_at=status.retry_at,
        )

    # ---- what the controller says (`link.session.Intake`) -------------------------------------------------------

    async def push(self, signed: SignedAssignment) -> PushResult | None:
        return await self._desk.push(signed)

    async def trust_bundle(self, pem: bytes) -> None:
        self._renewal.apply_trust_bundle(pem)

    async def permit_transfer(self, manifest_digest: Digest) -> None:
        self._delivery.allow(manifest_digest)
        self._reconciler.retry_failed()

    def order_samples(self, order: SampleOrder) -> None:
        self._around.samples.order(order)

    # ---- inside ------------------------------------------------------------------------------------------------

    def _follow(self, tls: TlsIdentity) -> None:
        self._around.tracing.follow(tls)
        self._around.on_identity(tls)
        # The identity before may have been what kept it waiting.
        self._link.retry_now()

    def _in_force(self) -> frozenset[Digest]:
        """Return the manifests that were verified when they came: what runs or may run again needs no new word."""
        return self._journal.record.in_use()

    def _catalogue_source(self) -> CatalogueSource:
        return CatalogueSource(self._around.enrolled.controller, self._renewal.identity.tls)

    def _connect(self, on_state: Callable[[SessionState], None]) -> "_Connection":
        return _Connection(partial(self._session, on_state))

    async def _session(self, on_state: Callable[[SessionState], None]) -> Session:
        link = self._around.settings.link
        # The store belongs to the disk's thread.
        hello = await asyncio.get_running_loop().run_in_executor(self._around.disk, self._hello)
        limits = SessionLimits(link.handshake_timeout_s, link.write_timeout_s)
        return Session(
            self._fleet,
            self._reconciler,
            self,
            hello=hello,
            limits=limits,
            on_state=on_state,
            vitals=self._vitals,
            samples=self._around.samples.counts,
        )

    def _vitals(self) -> AgentVitals:
        uptime_s = self._around.clock.monotonic_s() - self._began_s
        return AgentVitals(self._around.usage(), uptime_s, machine_health(), self._around.energy())

    def _hello(self) -> AgentHello:
        process = self._around.process
        return AgentHello(
            AgentId(process.agent_id),
            SiteId(process.site),
            process.software_version,
            process.boot_id,
            self._reconciler.applied,
            self._around.tags,
            self._gate.versions(),
            self._store.complete_variants()[:MAX_HELD_MANIFESTS],
            self._around.settings.metered,
            hashlib.sha256(self._renewal.identity.tls.trust_bundle).digest(),
        )


@dataclass(frozen=True, slots=True)
class _Connection:
    """One session, whose hello is written when it begins."""

    session: Callable[[], Awaitable[Session]]

    async def run(self) -> None:
        session = await self.session()
        await session.run()


def _own(journal: Journal, around: Surroundings) -> Journal:
    active = journal.record.current
    if active is not None and active.agent_id != around.enrolled.agent_id:
        raise Conflict(
            f"{around.settings.state_dir}: expected the state of agent {around.enrolled.agent_id}, got that of "
            f"{active.agent_id}; choose another state_dir"
        )
    return journal


def _delivery(around: Surroundings, store: ContentStore) -> Delivery:
    sync = around.settings.sync
    source = ControllerSource(
        DeliveryCallsOverGrpc(around.channel), limits=SourceLimits(sync.chunk_timeout_s), clock=around.clock
    )
    return Delivery(
        source,
        store,
        disk=around.disk,
        limits=DeliveryLimits(sync.reserve_bytes),
        clock=around.clock,
        is_metered=around.settings.metered,
    )
