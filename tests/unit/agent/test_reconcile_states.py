"""Any sequence of pushes, faults, rollbacks and crashes converges, and what serves does so until its successor does.

A hypothesis state machine over the real reconciler, store, journal and delivery; a shelf stands for the controller, and
the host and the self-test do as they are told. After each rule the agent comes to rest, so that invariants can be
judged between them.
"""

import asyncio
import tempfile
from collections.abc import Coroutine, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.digest import Digest
from core.errors import InvalidModel
from core.fleet_state import PushResult
from core.ids import ModelName
from edge_agent.activation.record import MAX_CRASHES
from edge_agent.reconcile.executor import Reconciler
from tests.support.device import FAULTY, SOUND, Device, desired
from tests.support.variants import MadeVariant, made_variant

VARIANTS = [made_variant(model=model, version=version) for model in ("digits", "faces") for version in (1, 2, 3)]
# More than any of it takes; without it a reconciler that goes round for ever is found by nobody.
WAIT_TIMEOUT_S = 20.0
BY_DIGEST = {variant.digest: variant for variant in VARIANTS}
# None: the model is not wanted.
wanted = st.tuples(st.none() | st.sampled_from(VARIANTS[:3]), st.none() | st.sampled_from(VARIANTS[3:]))


class Agent(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(prefix="agent-")
        self.loop = asyncio.new_event_loop()
        self.device = Device(Path(self.folder.name), *VARIANTS)
        self.generation = 0
        self.target: tuple[MadeVariant, ...] = ()

    def wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, WAIT_TIMEOUT_S))

    @initialize()
    def start(self) -> None:
        self.process: AbstractAsyncContextManager[Reconciler] = self.device.running()
        self.reconciler: Reconciler = self.wait(self.process.__aenter__())
        self.wait(self.reconciler.restored.wait())

    def stop(self) -> None:
        self.wait(self.process.__aexit__(None, None, None))

    def teardown(self) -> None:
        self.stop()
        self.loop.close()
        self.folder.cleanup()

    @rule(variants=wanted)
    def push(self, variants: tuple[MadeVariant | None, ...]) -> None:
        served = dict(self.device.host.running())
        self.generation += 1
        self.target = tuple(variant for variant in variants if variant is not None)
        result: PushResult = self.wait(self._submit())
        running = dict(self.device.host.running())
        for variant in self.target:
            model = ModelName(variant.manifest.model)
            if running.get(model) != variant.digest:
                assert result.problem is not None, "applied, but another variant runs"
                fallen_back = self.fallback_of(variant)
                assert running.get(model) in (served.get(model), fallen_back), "a slot that failed keeps what ran"
        if result.problem is None:
            assert set(running.values()) == {variant.digest for variant in self.target}

    def fallback_of(self, variant: MadeVariant) -> Digest | None:
        entry = self.device.journal().record.quarantined(variant.digest)
        return None if entry is None or entry.fallback is None else entry.fallback.manifest_digest

    async def _submit(self) -> PushResult:
        return await self.reconciler.submit(desired(*self.target, generation=self.generation))

    @rule(first=wanted, second=wanted)
    def push_twice_at_once(self, first: tuple[MadeVariant | None, ...], second: tuple[MadeVariant | None, ...]) -> None:
        async def both() -> PushResult:
            overtaken = self._submit_now(first)
            newest = self._submit_now(second)
            assert (await overtaken).position != (await newest).position
            return await newest

        assert self.wait(both()).position.generation == self.generation

    def _submit_now(self, variants: tuple[MadeVariant | None, ...]) -> "asyncio.Future[PushResult]":
        self.generation += 1
        self.target = tuple(variant for variant in variants if variant is not None)
        return self.reconciler.submit(desired(*self.target, generation=self.generation))

    @rule(variant=st.sampled_from(VARIANTS), is_sound=st.booleans())
    def change_the_self_test(self, variant: MadeVariant, is_sound: bool) -> None:
        key = variant.manifest.model, variant.manifest.version
        if is_sound:
            self.device.tester.failures.pop(key, None)
        else:
            self.device.tester.failures[key] = "failed its self-test"

    @rule(variant=st.sampled_from(VARIANTS), is_sound=st.booleans())
    def change_loading(self, variant: MadeVariant, is_sound: bool) -> None:
        if is_sound:
            self.device.host.failures.pop(variant.digest, None)
        else:
            self.device.host.failures[variant.digest] = InvalidModel("does not load")

    @precondition(lambda self: self.device.journal().record.trials)
    @rule(is_sound=st.booleans())
    def end_probation(self, is_sound: bool) -> None:
        self.device.see(SOUND if is_sound else FAULTY)
        self.wait(at_rest(self.device))

    @rule(is_crash=st.booleans())
    def restart(self, is_crash: bool) -> None:
        served, record = dict(self.device.host.running()), self.device.journal().record
        doomed = {trial.slot.model for trial in record.trials if is_crash and trial.crashes + 1 >= MAX_CRASHES}
        self.device.is_crashing = is_crash
        self.stop()
        self.start()
        in_force = {slot.model for slot in (record.current.slots if record.current else ())}
        for model in in_force & served.keys() - doomed:
            assert self.device.host.running().get(model) == served[model], "a restart brings back what served"

    @invariant()
    def what_runs_is_not_in_quarantine_at_rest(self) -> None:
        if not hasattr(self, "reconciler"):
            return
        record = self.device.journal().record
        for digest in self.device.host.running().values():
            assert record.quarantined(digest) is None

    @invariant()
    def what_a_restart_needs_is_whole(self) -> None:
        record = self.device.journal().record
        needed: set[Digest] = set(record.in_use()) | set(self.device.host.running().values())
        folder = self.device.root / "store" / "blobs"
        for digest in needed:
            for content in BY_DIGEST[digest].blobs:
                assert (folder / content.removeprefix("sha256:")).exists()


async def at_rest(device: Device) -> None:
    """Return when every variant that serves is committed, and what was rolled back serves no longer."""

    def is_at_rest() -> bool:
        record, running = device.journal().record, set(device.host.running().values())
        return not any(trial.slot.manifest_digest in running for trial in record.trials) and not any(
            record.quarantined(digest) for digest in running
        )

    async with asyncio.timeout(10):
        while not is_at_rest():
            await asyncio.sleep(0.001)


TestAgent = Agent.TestCase
TestAgent.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)


@pytest.fixture
def agent() -> Iterator[Agent]:
    agent = Agent()
    agent.start()
    yield agent
    agent.teardown()


def test_what_is_in_quarantine_stops_when_what_shall_replace_it_does_not_load(agent: Agent) -> None:
    replacement, faulty = VARIANTS[:2]
    agent.push((faulty, None))
    agent.change_loading(replacement, is_sound=False)
    agent.push((replacement, None))
    agent.end_probation(is_sound=False)
    assert not agent.device.host.running()


def test_what_a_variant_in_quarantine_falls_back_on_is_fetched_again_once(agent: Agent) -> None:
    before, faulty = VARIANTS[:2]
    agent.push((before, None))
    agent.end_probation(is_sound=True)
    agent.push((faulty, None))
    agent.end_probation(is_sound=False)
    # Nobody wants the model any more, so nothing of it is kept.
    agent.push((None, None))
    agent.push((faulty, None))
    assert agent.device.host.running() == {ModelName(before.manifest.model): before.digest}
