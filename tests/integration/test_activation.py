"""Activation with everything real but the controller: self-test in a child, ONNX Runtime, live requests, rollback."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np

from core.clock import SystemClock
from core.fleet_state import Position, PushResult, SlotPhase
from core.open_inference.messages import InferRequest
from core.tensors import Datatype, Tensor
from edge_agent.activation.journal import Journal
from edge_agent.activation.probation import ProbationTerms
from edge_agent.activation.self_test import SelfTester, SelfTestLimits
from edge_agent.data_plane import EdgeDataPlane
from edge_agent.reconcile.attempts import RetryPolicy
from edge_agent.reconcile.executor import Reconciler
from edge_agent.reconcile.trials import TrialSettings
from edge_agent.reconcile.workplace import Workplace
from edge_agent.runtime.pool import ModelPool
from edge_agent.settings import RuntimeSettings
from edge_agent.sync.controller_source import ControllerSource, SourceLimits
from edge_agent.sync.delivery import Delivery, DeliveryLimits
from edge_agent.sync.store import ContentStore
from tests.support.delivery_shelf import DeliveryShelf, ShelfCalls
from tests.support.device import AGENT, desired, until
from tests.support.edge_models import make_echo, published
from tests.support.edge_plane import plane_with
from tests.support.variants import MadeVariant

MIN_RUNS = 20


@asynccontextmanager
async def agent(root: Path, *variants: MadeVariant) -> AsyncIterator[tuple[Reconciler, ModelPool]]:
    clock, pool = SystemClock(), ModelPool(RuntimeSettings(), clock=SystemClock())
    with ThreadPoolExecutor(1) as disk:
        store = ContentStore(root / "store")
        source = ControllerSource(ShelfCalls(DeliveryShelf(*variants)), limits=SourceLimits(), clock=clock)
        delivery = Delivery(source, store, disk=disk, limits=DeliveryLimits(reserve_bytes=0), clock=clock)
        journal = Journal(root / "journal", clock=clock)
        reconciler = Reconciler(
            AGENT,
            Workplace(store, journal, delivery, SelfTester(SelfTestLimits()), pool, disk),
            policy=RetryPolicy(),
            trials=TrialSettings(ProbationTerms(min_runs=MIN_RUNS), look_interval_s=0.01),
            software_version="1.0",
            clock=clock,
        )
        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            task = tasks.create_task(reconciler.run())
            yield reconciler, pool
            task.cancel()
        await pool.close()


async def ask(plane: EdgeDataPlane, value: float) -> float:
    tensor = Tensor("x", Datatype.FP32, np.full((1, 4), value, np.float32))
    answer = await plane.answer(InferRequest("echo", (tensor,)))
    return float(answer.response.outputs[0].array[0, 0])


async def test_a_model_that_gives_no_numbers_to_live_requests_is_rolled_back(tmp_path: Path) -> None:
    good = published(make_echo(tmp_path / "1", version=1))
    # Sound on the zeros of the self-test, not on what devices send.
    bad = published(make_echo(tmp_path / "2", version=2, operator="Log"))
    async with agent(tmp_path, good, bad) as (reconciler, pool):
        assert await reconciler.submit(desired(good, generation=1)) == PushResult(Position(1, 1))
        assert await reconciler.submit(desired(bad, generation=2)) == PushResult(Position(1, 2))
        plane = await plane_with(*pool.models())
        assert np.isnan([await ask(plane, -1.0) for _ in range(MIN_RUNS)]).all()
        await until(reconciler, lambda: pool.running() == {"echo": good.digest})
        (report,) = reconciler.board.reported().slots
        assert (report.slot.version, report.phase) == (2, SlotPhase.FAILED)
        assert report.problem is not None
        assert "expected finite numbers" in report.problem.message
        assert report.problem.message.endswith("; version 1 (original) runs")
        assert await ask(await plane_with(*pool.models()), -1.0) == -1.0
