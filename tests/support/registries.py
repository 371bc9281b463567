"""A registry in memory and a temporary folder, with its publishing loop running."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from controller.registry.blobs import BlobStore
from controller.registry.model import BundleFile, Publication, PublishRequest
from controller.registry.pipeline import Workshop
from controller.registry.service import Registry
from controller.registry.store import RegistryStore
from core.clock import SystemClock
from core.digest import Digest
from tests.support.fake_workshop import FakeWorkshop
from tests.support.registry_store import MemoryRegistryStore
from tests.support.releases import OpenCatalogue, PlainCutter

# Generous: a test that needs it has failed.
PATIENCE_S = 120


@dataclass(frozen=True, slots=True)
class RunningRegistry:
    registry: Registry
    store: RegistryStore
    blobs: BlobStore
    running: asyncio.Task[None]

    async def upload(self, content: bytes) -> Digest:
        return await self.blobs.put_bytes(content)

    async def request(self, content: bytes = b"a model") -> PublishRequest:
        """Upload `content` and return the smallest request to publish it."""
        return PublishRequest(BundleFile("model.onnx", await self.upload(content)))

    async def finished(self, publication: Publication) -> Publication:
        async with asyncio.timeout(PATIENCE_S):
            while not publication.is_over:
                publication = await self.registry.next_change(publication, timeout_s=PATIENCE_S)
        return publication

    async def stop(self) -> None:
        self.running.cancel()
        await asyncio.wait([self.running])


@asynccontextmanager
async def running_registry(
    folder: Path,
    workshop: Workshop | None = None,
    *,
    store: RegistryStore | None = None,
    max_queued: int = 4,
    max_model_bytes: int = 1 << 24,
) -> AsyncIterator[RunningRegistry]:
    blobs = BlobStore(folder / "blobs")
    store = store or MemoryRegistryStore()
    registry = Registry(
        store,
        blobs,
        workshop or FakeWorkshop(),
        releases=OpenCatalogue(),
        cutter=PlainCutter(),
        clock=SystemClock(),
        max_model_bytes=max_model_bytes,
        max_queued_publications=max_queued,
    )
    await registry.prepare()
    running = RunningRegistry(registry, store, blobs, asyncio.create_task(registry.run(), name="registry"))
    try:
        yield running
    finally:
        await running.stop()
        await blobs.close()
