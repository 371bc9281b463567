"""A ModelHost that runs nothing, and remembers what it was asked to."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

from core.digest import Digest
from core.ids import ModelName
from core.manifest import Manifest


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
        self._running: dict[ModelName, Digest] = {}

    async def load(self, manifest: Manifest, digest: Digest, folder: Path) -> None:
        self.loads.append(digest)
        self.folders.append(folder)
        self.entered.set()
        if self.gate is not None:
            await self.gate.wait()
        if digest in self.failures:
            raise self.failures[digest]
        self._running[ModelName(manifest.model)] = digest

    async def unload(self, model: ModelName) -> None:
        self.unloads.append(model)
        self._running.pop(model, None)

    def running(self) -> Mapping[ModelName, Digest]:
        return self._running
