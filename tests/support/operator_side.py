"""The controller as the operator sees it: real registry, fleet, traces and HTTP faces, without gRPC and Ray.

Databases are SQLite files, models are opened by a workshop that only pretends, agents are played by `ScriptedAgent`.
Identity and signing have tests of their own; their endpoints are there and must not be asked.
`operator_side` lives in the caller's loop; `running_controller` serves it on a real port from a thread of its own, for
clients that block.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

from starlette.types import ASGIApp

from controller.access.model import OperatorRole
from controller.access.service import Access
from controller.api.audited import AccessWitness
from controller.api.http_app import TrustFaces, create_app
from controller.api.http_server import HttpServer
from controller.api.identity_rest import Destination
from controller.audit.service import Audit, Bounds
from controller.cli.credential import Credential, write_credential
from controller.compression.model import CascadeFit, Dataset, Evaluated, EvaluationTask, Inspected, ModelBundle
from controller.dashboard.pages import Dashboard
from controller.dashboard.sources import Sources
from controller.fleet.service import Fleet
from controller.identity.model import AgentIdentity
from controller.identity.service import Identity
from controller.records.model import Kept
from controller.records.service import Records
from controller.registry.blobs import BlobStore
from controller.registry.service import Registry
from controller.samples.service import SamplePulls
from controller.samples.spool import Spool
from controller.signing.model import SigningStatus
from controller.signing.service import Catalogue
from controller.storage.access import SqlAccessStore
from controller.storage.audit import SqlAuditStore
from controller.storage.database import Database
from controller.storage.fleet import SqlFleetStore
from controller.storage.records import SqlRecordStore
from controller.storage.registry import SqlRegistryStore
from controller.storage.traces import SqlTraceStore
from controller.traces.service import Traces
from controller.traces.statistics import Statistics
from controller.transfer.cuts import TensorCutter
from core.addresses import Address
from core.clock import Clock, SystemClock
from core.digest import Digest
from core.errors import InvalidModel, UnknownAgent
from core.fleet_state import (
    NOWHERE,
    AgentHello,
    AgentVitals,
    DesiredState,
    Problem,
    PushResult,
    ReportedState,
    Slot,
    SlotPhase,
    SlotReport,
)
from core.ids import AgentId, SiteId
from core.tensors import Datatype, TensorSpec
from tests.support.echo_plane import EchoPlane
from tests.support.releases import OpenCatalogue

T = TypeVar("T")

ADMIN = "test-admin"
MAX_MODEL_BYTES = 4 << 20
MAX_AUDIT_ENTRIES = 1000
HOSTILE = b"hostile"
STOP_TIMEOUT_S = 10.0


class PretendingWorkshop:
    """Takes any bytes for a model with input `x` and output `scores`, except those that start with HOSTILE."""

    async def inspect(self, bundle: ModelBundle) -> Inspected:
        if bundle.entry_path.read_bytes().startswith(HOSTILE):
            raise InvalidModel("model: expected an ONNX model, got something else; export it again")
        return Inspected((TensorSpec("x", Datatype.FP32, (-1, 4)),), (TensorSpec("scores", Datatype.FP32, (-1, 2)),))

    async def quantise(self, recipe: str, bundle: ModelBundle, target: Path, calibration: Dataset | None) -> None:
        target.write_bytes(recipe.encode() + bundle.entry_path.read_bytes()[: 1 << 10])

    async def evaluate(self, task: EvaluationTask) -> Evaluated:
        fit = None if task.rule is None else CascadeFit(1.25, 0.875, 0.8, task.rule.max_error_ratio)
        if task.dataset is None:
            return Evaluated(120.0, 150.0)
        return Evaluated(120.0, 150.0, accuracy_ratio=0.9625, samples=80, fit=fit)


@dataclass(frozen=True, slots=True)
class OperatorSide:
    app: ASGIApp
    access: Access
    # An admin's.
    secret: str
    trust: TrustFaces
    plane: EchoPlane
    registry: Registry
    fleet: Fleet
    traces: Traces
    records: Records
    sources: Sources
    pulls: SamplePulls


@asynccontextmanager
async def operator_side(folder: Path, *, version: str = "0.1.0") -> AsyncIterator[OperatorSide]:
    clock, plane = SystemClock(), EchoPlane()
    async with AsyncExitStack() as stack:
        database = Database(f"sqlite:///{folder / 'controller.sqlite'}")
        stack.push_async_callback(database.close)
        await database.migrate()
        blobs = BlobStore(folder / "blobs")
        stack.push_async_callback(blobs.close)
        registry = Registry(
            SqlRegistryStore(database),
            blobs,
            PretendingWorkshop(),
            releases=OpenCatalogue(),
            cutter=TensorCutter(),
            clock=clock,
            max_model_bytes=MAX_MODEL_BYTES,
            max_queued_publications=2,
        )
        await registry.prepare()
        fleet = Fleet(SqlFleetStore(database), registry, releases=OpenCatalogue(), clock=clock, max_sessions=8)
        pulls = SamplePulls(Spool(folder / "samples"), fleet, fleet.samples, clock=clock)
        stack.callback(pulls.close)
        await pulls.prepare()
        traces = Traces(SqlTraceStore(database), max_spans=1000)
        records = Records(SqlRecordStore(database), clock=clock, kept=Kept(100, 1000, timedelta(days=400)))
        access = Access(SqlAccessStore(database), clock=clock)
        secret = (await access.create(ADMIN, OperatorRole.ADMIN)).secret
        audit = await audit_over(database, clock)
        access.watched_by(AccessWitness(audit))
        trust = faces_of(access, audit)
        statistics = Statistics(traces, max_rows=1000)
        stack.push_async_callback(statistics.close)
        sources = Sources(fleet, registry, traces, statistics, NoIdentities(), NoSigning(), clock)
        dashboard = Dashboard(sources, access, version="0.1.0")
        app = create_app(
            plane=plane,
            trust=trust,
            pages=dashboard.router(),
            registry=registry,
            fleet=fleet,
            traces=traces,
            records=records,
            pulls=pulls,
            clock=clock,
            server_name="nanofleet",
            server_version=version,
        )
        for loop in (registry.run, fleet.run, traces.run, dashboard.run):
            stack.push_async_callback(_cancelled, asyncio.create_task(loop()))
        yield OperatorSide(app, access, secret, trust, plane, registry, fleet, traces, records, sources, pulls)


class NoIdentities:
    """Nobody was ever enrolled."""

    async def identities(self) -> Sequence[AgentIdentity]:
        return ()

    async def identity(self, agent: AgentId) -> AgentIdentity:
        raise UnknownAgent(f"agent {agent}: never enrolled here")


class NoSigning:
    """A catalogue that lists nothing."""

    def is_released(self, _manifest_digest: Digest) -> bool:
        return False

    async def status(self) -> SigningStatus:
        return SigningStatus((), (), ())


async def audit_over(database: Database, clock: Clock) -> Audit:
    audit = Audit(SqlAuditStore(database), clock=clock, bounds=Bounds(MAX_AUDIT_ENTRIES, timedelta(days=1)))
    await audit.prepare()
    return audit


def faces_of(access: Access, audit: Audit) -> TrustFaces:
    identity, catalogue, destination = cast("Identity", None), cast("Catalogue", None), cast("Destination", None)
    return TrustFaces(access, audit, identity, catalogue, destination)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


class RunningController:
    """An operator side on a real port."""

    def __init__(self, side: OperatorSide, url: str, loop: asyncio.AbstractEventLoop, *, credential_path: Path) -> None:
        self.side = side
        self.url = url
        # For `nanofleet --credential`.
        self.credential_path = credential_path
        self._loop = loop

    def call(self, use: Callable[[OperatorSide], Awaitable[T]]) -> T:
        """Run `use` in the controller's loop and return what it gives."""

        async def call() -> T:
            return await use(self.side)

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(STOP_TIMEOUT_S)


@contextmanager
def running_controller(folder: Path, *, port: int = 0, version: str = "0.1.0") -> Iterator[RunningController]:
    started = threading.Event()
    running: list[RunningController] = []
    stops: list[Callable[[], object]] = []

    async def serve() -> None:
        server, loop = HttpServer(Address("127.0.0.1", port)), asyncio.get_running_loop()
        async with operator_side(folder, version=version) as side:
            serving = asyncio.create_task(server.run(side.app))
            credential_path = folder / "credential.json"
            write_credential(credential_path, Credential(controller=server.url, name=ADMIN, secret=side.secret))
            running.append(RunningController(side, server.url, loop, credential_path=credential_path))
            stops.append(lambda: loop.call_soon_threadsafe(server.stop))
            started.set()
            await serving
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="controller")
    thread.start()
    try:
        assert started.wait(STOP_TIMEOUT_S)
        yield running[0]
    finally:
        stops[0]()
        thread.join(STOP_TIMEOUT_S)
        assert not thread.is_alive()


class ScriptedAgent:
    """An agent that takes every desired state it is given and reports how it goes, as told."""

    def __init__(
        self,
        agent_id: str,
        site: str,
        *,
        fails_with: Problem | None = None,
        refuses_with: Problem | None = None,
        vitals: AgentVitals | None = None,
    ) -> None:
        self.agent_id = AgentId(agent_id)
        self._hello = AgentHello(self.agent_id, SiteId(site), "0.1.0", f"boot-{agent_id}", NOWHERE, ("arch:x86_64",))
        self._fails_with = fails_with
        self._refuses_with = refuses_with
        self._vitals = vitals
        self._task: asyncio.Task[None] | None = None

    async def connect(self, side: OperatorSide) -> None:
        """Say hello and stay until `disconnect`."""
        is_online = asyncio.Event()
        self._task = asyncio.create_task(self._live(side.fleet, is_online))
        await is_online.wait()

    async def disconnect(self, _side: OperatorSide) -> None:
        assert self._task is not None
        await _cancelled(self._task)

    async def _live(self, fleet: Fleet, is_online: asyncio.Event) -> None:
        async with fleet.session(self._hello) as (session, _):
            if self._vitals is not None:
                fleet.vitals(session, self._vitals)
            is_online.set()
            while isinstance(desired := await session.take(), DesiredState):
                fleet.push_result(session, PushResult(desired.position, self._refuses_with))
                if self._refuses_with is None:
                    for reported in self._reports(desired):
                        fleet.reported(session, reported)
                        await asyncio.sleep(0)

    def _reports(self, desired: DesiredState) -> Iterator[ReportedState]:
        end = SlotPhase.READY if self._fails_with is None else SlotPhase.FAILED
        for phase, stored_bytes in ((SlotPhase.FETCHING, 50), (SlotPhase.LOADING, 100), (end, 100)):
            slots = tuple(self._report(slot, phase, stored_bytes) for slot in desired.slots)
            yield ReportedState(desired.position, slots)

    def _report(self, slot: Slot, phase: SlotPhase, stored_bytes: int) -> SlotReport:
        problem = self._fails_with if phase is SlotPhase.FAILED else None
        return SlotReport(slot, phase, stored_bytes, 100, problem)
