"""Publishing into the signed catalogue, and the crashes that may come between a version's record and its release."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from controller.registry.blobs import BlobStore
from controller.registry.model import ORIGINAL, BundleFile, Publication, PublicationState, PublishRequest
from controller.registry.publications import Releases
from controller.registry.service import Registry
from controller.signing.model import KeyRole, Releasable
from core.digest import Digest, digest_of
from core.errors import Conflict, Unavailable
from core.ids import ModelName
from core.tasks import supervise
from tests.support.catalogues import SignedWorld
from tests.support.fake_workshop import FakeWorkshop
from tests.support.registry_store import MemoryRegistryStore
from tests.support.releases import PlainCutter

METER = ModelName("meter")
CAT = ModelName("cat")
PATIENCE_S = 30


class Killed(BaseException):
    """What a power cut looks like from inside."""


class BrokenReleases:
    """Fails as told before it passes releases on; `passed` is set by the first one that succeeds."""

    def __init__(self, world: SignedWorld, *failures: BaseException) -> None:
        self._world = world
        self._failures = list(failures)
        self.passed = asyncio.Event()

    async def release(self, variants: Sequence[Releasable]) -> None:
        if variants and self._failures:
            raise self._failures.pop(0)
        await self._world.catalogue.release(variants)
        if variants:
            self.passed.set()

    async def until_passed(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self.passed.wait()


class Publishing:
    """A registry over what survives a crash: its store and its blobs."""

    def __init__(self, folder: Path, world: SignedWorld) -> None:
        self._folder = folder
        self._store = MemoryRegistryStore()
        self.world = world

    @asynccontextmanager
    async def running(self, releases: Releases) -> AsyncIterator[Registry]:
        blobs = BlobStore(self._folder / "blobs")
        registry = Registry(
            self._store,
            blobs,
            FakeWorkshop(),
            releases=releases,
            cutter=PlainCutter(),
            clock=self.world.clock,
            max_model_bytes=1 << 20,
            max_queued_publications=4,
        )
        await registry.prepare()
        task = asyncio.create_task(_until_killed(registry.run))
        try:
            yield registry
        finally:
            task.cancel()
            await asyncio.wait([task])
            await blobs.close()

    async def publish(self, registry: Registry, model: ModelName = METER) -> Publication:
        digest = await _uploaded(registry, f"a model {model}".encode())
        publication = await registry.start_publication(model, PublishRequest(BundleFile("model.onnx", digest)))
        async with asyncio.timeout(PATIENCE_S):
            while not publication.is_over:
                publication = await registry.next_change(publication, timeout_s=PATIENCE_S)
        return publication

    async def is_released(self, registry: Registry, model: ModelName = METER) -> bool:
        variant = await registry.variant(model, None, ORIGINAL)
        return self.world.catalogue.is_released(variant.manifest_digest)


async def _until_killed(run: Callable[[], Awaitable[None]]) -> None:
    try:
        await supervise("registry", run)
    except Killed:
        return


async def _uploaded(registry: Registry, content: bytes) -> Digest:
    async def blocks() -> AsyncIterator[bytes]:
        yield content

    digest = digest_of(content)
    await registry.put_blob(digest, blocks())
    return digest


@pytest.fixture
async def publishing(tmp_path: Path) -> Publishing:
    world = SignedWorld(tmp_path / "keys")
    await world.catalogue.prepare()
    return Publishing(tmp_path, world)


async def test_a_published_version_is_released_when_it_is_done(publishing: Publishing) -> None:
    async with publishing.running(publishing.world.catalogue) as registry:
        done = await publishing.publish(registry)

        assert done.state is PublicationState.DONE
        assert await publishing.is_released(registry)


async def test_the_release_counter_is_the_version(publishing: Publishing) -> None:
    async with publishing.running(publishing.world.catalogue) as registry:
        await publishing.publish(registry)
        await publishing.publish(registry)

        assert (await registry.variant(METER, 2, ORIGINAL)).manifest.release_counter == 2


async def test_a_crash_between_record_and_release_is_healed_at_the_next_start(publishing: Publishing) -> None:
    async with publishing.running(BrokenReleases(publishing.world, Killed())) as registry:
        await publishing.publish(registry)
        assert not await publishing.is_released(registry)

    healing = BrokenReleases(publishing.world)
    async with publishing.running(healing) as registry:
        await healing.until_passed()
        assert await publishing.is_released(registry)


async def test_a_release_that_fails_for_now_is_tried_again(publishing: Publishing) -> None:
    releases = BrokenReleases(publishing.world, Unavailable("no keys"))
    async with publishing.running(releases) as registry:
        done = await publishing.publish(registry)

        assert done.state is PublicationState.DONE
        await releases.until_passed()
        assert await publishing.is_released(registry)


async def test_a_version_that_can_never_be_released_does_not_stop_the_others(publishing: Publishing) -> None:
    async with publishing.running(BrokenReleases(publishing.world, Conflict("too many models"))) as registry:
        await publishing.publish(registry)
        await publishing.publish(registry, CAT)

        assert await publishing.is_released(registry, CAT)


async def test_a_version_whose_keys_are_elsewhere_is_published_and_staged(publishing: Publishing) -> None:
    publishing.world.move_keys(KeyRole.ROOT, KeyRole.TARGETS)

    async with publishing.running(publishing.world.catalogue) as registry:
        done = await publishing.publish(registry)

    assert done.state is PublicationState.DONE
    assert set(publishing.world.catalogue.bundle().staged) == {"targets", "family-meter"}
