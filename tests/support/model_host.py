"""A ModelHost that runs nothing, and remembers what it was asked to; a SelfTester that tries nothing."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

from core.digest import Digest, digest_of_file
from core.fleet_state import Problem
from core.ids import ModelName
from core.manifest import Manifest
from edge_agent.activation.self_test import SelfTestResult
from edge_agent.runtime.vitals import Vitals


class FakeWatch:
    def __init__(self) -> None:
        self.seen = Vitals()
        self.is_stopped = False

    def vitals(self) -> Vitals:
        return self.seen

    def stop(self) -> None:
        self.is_stopped = True


class FakeTester:
    def __init__(self) -> None:
        self.tested: list[str] = []
        # Why the variant of this model and version fails, as often as it is tried.
        self.failures: dict[tuple[str, int], str] = {}
        # Testing waits for it while it is set.
        self.gate: asyncio.Event | None = None
        self.entered = asyncio.Event()

    async def test(self, manifest: Manifest, folder: Path) -> SelfTestResult:
        assert (folder / manifest.entry).exists()
        self.tested.append(f"{manifest.model} {manifest.version}")
        self.entered.set()
        if self.gate is not None:
            await self.gate.wait()
        why = self.failures.get((manifest.model, manifest.version))
        return SelfTestResult(None if why is None else Problem("forbidden", why))


class FakeHost:
    def __init__(self) -> None:
        self.loads: list[Digest] = []
        self.unloads: list[ModelName] = []
        # What loading this variant raises, as often as it is tried.
        self.failures: dict[Digest, Exception] = {}
        # Loading waits for it while it is set.
        self.gate: asyncio.Event | None = None
        self.entered = asyncio.Event()
        self.folders: list[Path] = []
        # The newest watch over each variant; tests say what it saw.
        self.watches: dict[Digest, FakeWatch] = {}
        self._running: dict[ModelName, Digest] = {}
        self._changed = asyncio.Event()

    async def load(self, manifest: Manifest, digest: Digest, folder: Path) -> None:
        self.loads.append(digest)
        self.folders.append(folder)
        self.entered.set()
        if self.gate is not None:
            await self.gate.wait()
        if digest in self.failures:
            raise self.failures[digest]
        for file in manifest.files:
            assert digest_of_file(folder / file.path) == file.digest, "loaded although it is not whole"
        self._running[ModelName(manifest.model)] = digest
        self._changed.set()

    async def unload(self, model: ModelName) -> None:
        self.unloads.append(model)
        self._running.pop(model, None)
        self._changed.set()

    async def until(self, claim: Callable[[], bool]) -> None:
        """Return as soon as `claim` holds; it is asked whenever a model came or went."""
        while not claim():
            self._changed.clear()
            await self._changed.wait()

    def running(self) -> Mapping[ModelName, Digest]:
        return self._running

    def watch(self, model: ModelName) -> FakeWatch:
        watch = self.watches[self._running[model]] = FakeWatch()
        return watch
