"""An agent's reconciling on a folder: real store, journal and delivery; shelf and host are fakes.

    device = Device(folder, OLD, NEW)
    async with device.running() as reconciler:
        await reconciler.submit(desired(OLD, generation=1))

Every `running` is a start of the process: what is not in the folder is forgotten. Leaving it is a clean stop, unless it
was `crashing`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

from core.clock import SystemClock
from core.fleet_state import DesiredState, Position, SlotPhase, SlotReport
from core.ids import AgentId, ModelName
from edge_agent.activation.journal import Journal
from edge_agent.activation.probation import ProbationTerms
from edge_agent.activation.rebuild import rebuild_if_lost
from edge_agent.reconcile.attempts import RetryPolicy
from edge_agent.reconcile.executor import Reconciler
from edge_agent.reconcile.ports import Terms
from edge_agent.reconcile.trials import TrialSettings
from edge_agent.reconcile.workplace import Workplace
from edge_agent.runtime.vitals import Vitals
from edge_agent.sync.controller_source import ControllerSource, SourceLimits
from edge_agent.sync.delivery import Delivery, DeliveryLimits
from edge_agent.sync.store import ContentStore
from tests.support.delivery_shelf import DeliveryShelf, ShelfCalls
from tests.support.model_host import FakeHost, FakeTester
from tests.support.variants import MadeVariant

AGENT = AgentId("gate-1")
LOOK_S = 0.002
FAULTY = Vitals(runs=100, failed_runs=100)
SOUND = Vitals(runs=1000)
# Nothing ends a probation by itself: a test says what was seen (`FAULTY`, `SOUND`).
TERMS = ProbationTerms(duration_s=3600, runs=1000, stall_s=3600)


def desired(*variants: MadeVariant, generation: int) -> DesiredState:
    slots = tuple(variant.slot for variant in variants)
    return DesiredState(AGENT, Position(1, generation), datetime(2026, 1, 2, tzinfo=UTC), slots)


class Device:
    def __init__(self, root: Path, *variants: MadeVariant, terms: ProbationTerms = TERMS) -> None:
        self.root = root
        self.shelf = DeliveryShelf(*variants)
        self.calls = ShelfCalls(self.shelf)
        self.host = FakeHost()
        self.tester = FakeTester()
        self.settings = TrialSettings(terms, look_interval_s=LOOK_S)
        self.software_version = "1.0"
        self.retries = RetryPolicy(max_attempts=2)
        self.allows: Terms | None = None
        # Whether the process that runs now ends by a crash.
        self.is_crashing = False

    def journal(self) -> Journal:
        return Journal(self.root / "journal", clock=SystemClock())

    @asynccontextmanager
    async def running(self, *, crashing: bool = False) -> AsyncIterator[Reconciler]:
        self.host, self.is_crashing = FakeHost(), crashing
        with ThreadPoolExecutor(1) as disk:
            clock = SystemClock()
            store, journal = ContentStore(self.root / "store"), self.journal()
            rebuild_if_lost(journal, store, agent_id=AGENT, clock=clock)
            journal.note_start(software_version=self.software_version)
            source = ControllerSource(self.calls, limits=SourceLimits(chunk_timeout_s=5), clock=clock)
            delivery = Delivery(source, store, disk=disk, limits=DeliveryLimits(reserve_bytes=0), clock=clock)
            reconciler = Reconciler(
                AGENT,
                Workplace(store, journal, delivery, self.tester, self.host, disk),
                policy=self.retries,
                trials=self.settings,
                software_version=self.software_version,
                clock=clock,
                terms=self.allows,
                uniform=lambda: 0.0,
            )
            async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
                task = tasks.create_task(reconciler.run())
                yield reconciler
                task.cancel()
            if not self.is_crashing:
                disk.submit(journal.note_clean_stop).result()

    async def apply(self, state: DesiredState) -> None:
        """Start, bring `state` into force, commit all of it and stop."""
        async with self.running() as reconciler:
            assert (await reconciler.submit(state)).problem is None
            self.see(SOUND)
            await until(reconciler, lambda: phases(reconciler) == {SlotPhase.READY})

    def see(self, vitals: Vitals) -> None:
        """Let every variant that is watched now have shown `vitals`."""
        for watch in self.host.watches.values():
            watch.seen = vitals

    def runs(self, *variants: MadeVariant) -> bool:
        return dict(self.host.running()) == {ModelName(made.manifest.model): made.digest for made in variants}


async def until(reconciler: Reconciler, claim: Callable[[], bool]) -> None:
    """Return as soon as `claim` holds; it is asked whenever the report changes."""
    while not claim():
        await reconciler.board.wait_beyond(reconciler.board.version)


def phases(reconciler: Reconciler) -> set[SlotPhase]:
    return {report.phase for report in reconciler.board.reported().slots}


def stored_bytes(reconciler: Reconciler, variant: MadeVariant) -> int:
    return sum(found.stored_bytes for found in reconciler.board.reported().slots if found.slot == variant.slot)


def report_of(reconciler: Reconciler, variant: MadeVariant) -> SlotReport:
    return next(found for found in reconciler.board.reported().slots if found.slot == variant.slot)
