"""Reconciler: every push ends as applied or rejected, and what ran goes on running until its successor does."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from core.clock import SystemClock
from core.digest import hex_of
from core.errors import Conflict, Forbidden, InvalidModel, ModelNotReady, PermissionRequired, Unavailable
from core.fleet_state import NOWHERE, DesiredState, Position, Problem, PushResult, SlotPhase, SlotReport
from core.ids import AgentId
from edge_agent.activation.journal import Journal
from edge_agent.activation.probation import ProbationTerms
from edge_agent.reconcile.attempts import RetryPolicy
from edge_agent.reconcile.executor import Reconciler
from edge_agent.reconcile.trials import TrialSettings
from edge_agent.reconcile.workplace import Workplace
from edge_agent.sync.controller_source import ControllerSource, SourceLimits
from edge_agent.sync.delivery import Delivery, DeliveryLimits
from edge_agent.sync.store import ContentStore
from protos.artifacts.v1 import artifacts_pb2 as pb
from tests.support.delivery_shelf import DeliveryShelf, Sent, ShelfCalls, Silence
from tests.support.device import Device
from tests.support.model_host import FakeHost, FakeTester
from tests.support.variants import MadeVariant, made_variant

AGENT = AgentId("gate-1")
OLD = made_variant(version=1)
NEW = made_variant(version=2)
OTHER = made_variant(model="faces")


def desired(*variants: MadeVariant, generation: int, agent: AgentId = AGENT) -> DesiredState:
    slots = tuple(variant.slot for variant in variants)
    return DesiredState(agent, Position(1, generation), datetime(2026, 1, 2, tzinfo=UTC), slots)


class Agent:
    """A reconciler with a shelf instead of a controller and a host that runs nothing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.shelf = DeliveryShelf(OLD, NEW, OTHER)
        self.host = FakeHost()
        self.tester = FakeTester()
        self.trials = TrialSettings(ProbationTerms(duration_s=0.0), look_interval_s=0.001)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Reconciler]:
        """Run a reconciler on what is on disk, as a start of the process does."""
        self.host = FakeHost() if self.host.loads else self.host
        with ThreadPoolExecutor(1) as disk:
            store = ContentStore(self.root)
            clock = SystemClock()
            source = ControllerSource(ShelfCalls(self.shelf), limits=SourceLimits(chunk_timeout_s=5), clock=clock)
            delivery = Delivery(source, store, disk=disk, limits=DeliveryLimits(reserve_bytes=0), clock=clock)
            place = Workplace(store, self.journal(), delivery, self.tester, self.host, disk)
            reconciler = Reconciler(
                AGENT,
                place,
                policy=RetryPolicy(max_attempts=3),
                trials=self.trials,
                software_version="1.0",
                clock=clock,
                uniform=lambda: 0.0,
            )
            async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
                task = tasks.create_task(reconciler.run())
                yield reconciler
                task.cancel()

    def journal(self) -> Journal:
        return Journal(self.root / "journal", clock=SystemClock())

    def active(self) -> DesiredState | None:
        return self.journal().record.current

    async def apply(self, state: DesiredState) -> None:
        async with self.running() as reconciler:
            assert await reconciler.submit(state) == PushResult(state.position)


@pytest.fixture
def agent(tmp_path: Path) -> Agent:
    return Agent(tmp_path)


def report_of(reconciler: Reconciler, variant: MadeVariant) -> SlotReport:
    return next(found for found in reconciler.board.reported().slots if found.slot == variant.slot)


async def until(reconciler: Reconciler, claim: Callable[[], bool]) -> None:
    while not claim():
        await reconciler.board.wait_beyond(reconciler.board.version)


async def test_a_push_is_fetched_loaded_and_applied(agent: Agent) -> None:
    async with agent.running() as reconciler:
        result = await reconciler.submit(desired(OLD, OTHER, generation=1))
        assert result == PushResult(Position(1, 1))
        assert agent.host.running() == {"digits": OLD.digest, "faces": OTHER.digest}
        assert reconciler.applied == Position(1, 1)


async def test_a_ready_slot_is_reported_with_all_its_bytes(agent: Agent) -> None:
    async with agent.running() as reconciler:
        await reconciler.submit(desired(OLD, generation=1))
        await until(reconciler, lambda: is_ready(reconciler, OLD))
        size_bytes = OLD.manifest.size_bytes
        report = report_of(reconciler, OLD)
        assert replace(report, transfer=None) == SlotReport(OLD.slot, SlotPhase.READY, size_bytes, size_bytes)
        assert report.transfer is not None
        assert report.transfer.wire_bytes == size_bytes
        assert reconciler.board.reported().applied == Position(1, 1)


async def test_the_state_is_on_disk_before_it_is_called_applied(agent: Agent) -> None:
    async with agent.running() as reconciler:
        state = desired(OLD, generation=1)
        await reconciler.submit(state)
        assert agent.active() == state


async def test_after_a_restart_the_model_loads_without_asking_anybody(agent: Agent) -> None:
    await agent.apply(desired(OLD, generation=1))
    agent.shelf.asked.clear()
    agent.shelf.asked_manifests.clear()
    async with agent.running() as reconciler:
        await reconciler.restored.wait()
        assert agent.host.running() == {"digits": OLD.digest}
        assert agent.shelf.asked == []
        assert agent.shelf.asked_manifests == []
        assert reconciler.applied == Position(1, 1)


async def test_an_agent_without_a_state_has_nothing_to_restore(agent: Agent) -> None:
    async with agent.running() as reconciler:
        await reconciler.restored.wait()
        assert reconciler.applied == NOWHERE


async def test_the_old_version_runs_until_the_new_one_is_loaded(agent: Agent) -> None:
    async with agent.running() as reconciler:
        await reconciler.submit(desired(OLD, generation=1))
        agent.host.gate = asyncio.Event()
        agent.host.entered.clear()
        answer = reconciler.submit(desired(NEW, generation=2))
        await agent.host.entered.wait()
        assert agent.host.running() == {"digits": OLD.digest}
        assert agent.host.unloads == []
        agent.host.gate.set()
        await answer
        assert agent.host.running() == {"digits": NEW.digest}


async def test_a_model_in_no_slot_is_unloaded(agent: Agent) -> None:
    async with agent.running() as reconciler:
        await reconciler.submit(desired(OLD, OTHER, generation=1))
        await reconciler.submit(desired(OTHER, generation=2))
        assert agent.host.running() == {"faces": OTHER.digest}


async def test_a_bad_slot_is_rejected_and_does_not_block_the_others(agent: Agent) -> None:
    agent.host.failures[OLD.digest] = InvalidModel("opset 99 is not supported")
    async with agent.running() as reconciler:
        result = await reconciler.submit(desired(OLD, OTHER, generation=1))
        assert result.problem is not None
        assert result.problem.code == "invalid_request"
        assert result.problem.message == "digits: opset 99 is not supported"
        assert agent.host.running() == {"faces": OTHER.digest}
        assert report_of(reconciler, OLD).phase is SlotPhase.FAILED
        await until(reconciler, lambda: is_ready(reconciler, OTHER))
        assert reconciler.applied == NOWHERE


async def test_a_failed_update_leaves_the_old_version_running_also_after_a_restart(agent: Agent) -> None:
    await agent.apply(desired(OLD, generation=1))
    async with agent.running() as reconciler:
        agent.host.failures[NEW.digest] = InvalidModel("broken")
        result = await reconciler.submit(desired(NEW, OTHER, generation=2))
        assert result.problem is not None
        assert agent.host.running() == {"digits": OLD.digest, "faces": OTHER.digest}
    async with agent.running() as reconciler:
        await reconciler.restored.wait()
        assert agent.host.running() == {"digits": OLD.digest, "faces": OTHER.digest}
        assert reconciler.applied == Position(1, 1)


async def test_a_failure_that_may_pass_is_tried_again(agent: Agent) -> None:
    agent.shelf.faults.extend([lambda _: [Unavailable("away")], lambda _: [Unavailable("away")]])
    async with agent.running() as reconciler:
        assert await reconciler.submit(desired(OLD, generation=1)) == PushResult(Position(1, 1))


async def test_a_failure_that_does_not_pass_is_answered_after_the_attempts(agent: Agent) -> None:
    agent.host.failures[OLD.digest] = ModelNotReady("out of memory")
    async with agent.running() as reconciler:
        result = await reconciler.submit(desired(OLD, generation=1))
        assert result.problem is not None
        assert agent.host.loads == [OLD.digest] * 3


async def test_a_failure_that_was_answered_is_tried_on_and_shown_until_it_passes(tmp_path: Path) -> None:
    device = Device(tmp_path, OLD)
    device.retries = RetryPolicy(max_attempts=2, cap_s=0.01)
    async with device.running() as reconciler:
        device.host.failures[OLD.digest] = ModelNotReady("out of memory")
        result = await reconciler.submit(desired(OLD, generation=1))
        assert result.problem is not None
        while len(device.host.loads) < 5:
            await asyncio.sleep(0.001)
        report = report_of(reconciler, OLD)
        assert (report.phase, report.problem) == (SlotPhase.LOADING, Problem("unavailable", "out of memory"))
        device.host.failures.clear()
        await until(reconciler, lambda: reconciler.applied == Position(1, 1))
        assert report_of(reconciler, OLD).problem is None


async def test_a_fetch_that_fails_for_hours_stays_a_fetch_and_goes_on(tmp_path: Path) -> None:
    device = Device(tmp_path, OLD)
    device.retries = RetryPolicy(max_attempts=2, cap_s=0.01)
    device.shelf.faults.extend([lambda _: [Unavailable("away")]] * 6)
    async with device.running() as reconciler:
        result = await reconciler.submit(desired(OLD, generation=1))
        assert result.problem is not None
        assert report_of(reconciler, OLD).phase is SlotPhase.FETCHING
        assert "away" in str(report_of(reconciler, OLD).problem)
        await until(reconciler, lambda: reconciler.applied == Position(1, 1))
        assert len(device.shelf.asked) == 7


async def test_a_fetch_that_gets_further_each_time_has_attempts_left(tmp_path: Path) -> None:
    large = made_variant({"model.onnx": bytes(range(64))}, chunk_bytes=16)
    device = Device(tmp_path, large)
    device.shelf.faults.extend([lambda replies: [*replies[:2], Unavailable("away")]] * 3)
    async with device.running() as reconciler:
        assert await reconciler.submit(desired(large, generation=1)) == PushResult(Position(1, 1))


async def test_what_cannot_be_found_is_asked_for_once(agent: Agent) -> None:
    agent.shelf.drop(OLD)
    async with agent.running() as reconciler:
        result = await reconciler.submit(desired(OLD, generation=1))
        assert result.problem is not None
        assert result.problem.code == "not_found"
        assert agent.shelf.asked_manifests == [OLD.digest]


async def test_a_defect_in_loading_is_rejected_as_internal(agent: Agent, caplog: pytest.LogCaptureFixture) -> None:
    agent.host.failures[OLD.digest] = ZeroDivisionError("oops")
    async with agent.running() as reconciler:
        result = await reconciler.submit(desired(OLD, generation=1))
        assert result.problem is not None
        assert result.problem.code == "internal"
        assert "step failed unexpectedly" in caplog.text


async def test_a_manifest_of_another_model_is_rejected(agent: Agent) -> None:
    crossed = DesiredState(
        AGENT,
        Position(1, 1),
        datetime(2026, 1, 2, tzinfo=UTC),
        (type(OLD.slot)(OTHER.slot.model, 1, OLD.slot.variant, OLD.digest),),
    )
    async with agent.running() as reconciler:
        result = await reconciler.submit(crossed)
        assert result.problem is not None
        assert "expected the manifest of" in result.problem.message
        assert agent.host.loads == []


async def test_a_slot_given_up_is_tried_again_when_there_is_hope(agent: Agent) -> None:
    agent.host.failures[OLD.digest] = InvalidModel("broken")
    async with agent.running() as reconciler:
        await reconciler.submit(desired(OLD, generation=1))
        agent.host.failures.clear()
        reconciler.retry_failed()
        await until(reconciler, lambda: reconciler.applied == Position(1, 1))
        assert agent.host.running() == {"digits": OLD.digest}


async def test_what_rotted_on_disk_is_fetched_again(agent: Agent) -> None:
    await agent.apply(desired(OLD, generation=1))
    blob = agent.root / "blobs" / entry_hex(OLD)
    blob.write_bytes(b"x" * OLD.manifest.size_bytes)
    async with agent.running() as reconciler:
        await until(reconciler, lambda: is_ready(reconciler, OLD))
        assert agent.host.running() == {"digits": OLD.digest}


async def test_a_newer_state_overtakes_a_fetch_that_it_does_not_want(agent: Agent) -> None:
    asked = asyncio.Event()

    def nothing_but_a_grant(replies: list[pb.FetchChunksReply]) -> Sequence[Sent]:
        asked.set()
        return [replies[0], Silence()]

    agent.shelf.faults.append(nothing_but_a_grant)
    async with agent.running() as reconciler:
        slow = reconciler.submit(desired(OLD, generation=1))
        await asked.wait()
        quick = await reconciler.submit(desired(OTHER, generation=2))
        assert quick == PushResult(Position(1, 2))
        overtaken = await slow
        assert overtaken.position == Position(1, 1)
        assert overtaken.problem is not None
        assert overtaken.problem.message == "overtaken by generation 2"
        assert agent.host.running() == {"faces": OTHER.digest}


async def test_a_fetch_that_the_newer_state_wants_too_goes_on(agent: Agent) -> None:
    asked = asyncio.Event()

    def noted(replies: list[pb.FetchChunksReply]) -> Sequence[Sent]:
        asked.set()
        return replies

    agent.shelf.faults.append(noted)
    async with agent.running() as reconciler:
        first = reconciler.submit(desired(OLD, generation=1))
        await asked.wait()
        second = reconciler.submit(desired(OLD, OTHER, generation=2))
        assert (await first).problem is not None
        assert (await second).problem is None
        assert [each.manifest for each in agent.shelf.asked] == [OLD.digest, OTHER.digest]


async def test_the_same_push_again_shares_the_answer(agent: Agent) -> None:
    async with agent.running() as reconciler:
        state = desired(OLD, generation=1)
        first, second = reconciler.submit(state), reconciler.submit(state)
        assert first is second
        await first
        assert agent.host.loads == [OLD.digest]


async def test_a_rejected_push_may_come_again(agent: Agent) -> None:
    agent.host.failures[OLD.digest] = InvalidModel("broken")
    async with agent.running() as reconciler:
        state = desired(OLD, generation=1)
        assert (await reconciler.submit(state)).problem is not None
        agent.host.failures.clear()
        assert (await reconciler.submit(state)).problem is None


@pytest.mark.parametrize("generation", [1, 2])
async def test_a_state_that_is_not_newer_than_the_applied_one_is_refused(agent: Agent, generation: int) -> None:
    await agent.apply(desired(OLD, generation=2))
    async with agent.running() as reconciler:
        with pytest.raises(
            Conflict,
            match=rf"expected a position after \(epoch 1, generation 2\), got \(epoch 1, generation {generation}\)",
        ):
            reconciler.submit(desired(NEW, generation=generation))


async def test_a_state_older_than_the_one_worked_on_is_refused(agent: Agent) -> None:
    agent.host.gate = asyncio.Event()
    async with agent.running() as reconciler:
        reconciler.submit(desired(OLD, generation=3))
        with pytest.raises(Conflict, match="generation 3"):
            reconciler.submit(desired(NEW, generation=2))
        agent.host.gate.set()


async def test_another_agents_state_is_refused(agent: Agent) -> None:
    async with agent.running() as reconciler:
        with pytest.raises(Forbidden, match="expected agent gate-1, got gate-2"):
            reconciler.submit(desired(OLD, generation=1, agent=AgentId("gate-2")))


async def test_a_push_that_comes_during_the_restart_finds_the_old_version_to_fall_back_on(agent: Agent) -> None:
    await agent.apply(desired(OLD, generation=1))
    async with agent.running() as reconciler:
        agent.host.failures[NEW.digest] = InvalidModel("broken")
        assert (await reconciler.submit(desired(NEW, generation=2))).problem is not None
        assert agent.host.running() == {"digits": OLD.digest}


async def test_a_variant_that_needs_a_persons_word_waits_for_it(tmp_path: Path) -> None:
    device = Device(tmp_path, OLD)
    device.shelf.faults.append(lambda _: [PermissionRequired("metered link: 1 MiB in whole chunks")])
    async with device.running() as reconciler:
        result = await reconciler.submit(desired(OLD, generation=1))
        assert result.problem is not None
        assert "metered link" in result.problem.message
        assert report_of(reconciler, OLD).phase is SlotPhase.WAITING
        reconciler.retry_failed()
        await device.host.until(lambda: device.runs(OLD))


async def test_what_a_transfer_cost_stays_known_when_the_plan_is_made_anew(tmp_path: Path) -> None:
    device = Device(tmp_path, OLD, OTHER)
    async with device.running() as reconciler:
        await reconciler.submit(desired(OLD, generation=1))
        before = report_of(reconciler, OLD).transfer
        assert before is not None
        assert before.wire_bytes > 0
        await reconciler.submit(desired(OLD, OTHER, generation=2))
        assert report_of(reconciler, OLD).transfer == before


async def test_versions_before_the_previous_one_are_removed(agent: Agent) -> None:
    third = made_variant(version=3)
    agent.shelf.hold(third)
    async with agent.running() as reconciler:
        for generation, variant in enumerate([OLD, NEW, third], start=1):
            await reconciler.submit(desired(variant, generation=generation))
    store = ContentStore(agent.root)
    assert [store.is_complete(variant.digest) for variant in (OLD, NEW, third)] == [False, True, True]


def entry_hex(variant: MadeVariant) -> str:
    return hex_of(variant.manifest.files[0].digest)  # type: ignore[arg-type]  # the manifest keeps digests as text


def is_ready(reconciler: Reconciler, variant: MadeVariant) -> bool:
    reported = reconciler.board.reported().slots
    return any(found.slot == variant.slot and found.phase is SlotPhase.READY for found in reported)
