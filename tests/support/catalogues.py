"""A signed catalogue in memory, variants to release in it, and a client of python-tuf's own that verifies it."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient import FetcherInterface, Updater

from controller.signing.keys import KeyFiles, KeyRing
from controller.signing.model import KeyRole, RoleFile, StagedFile
from controller.signing.service import Catalogue
from controller.signing.store import KEPT_VERSIONS, CatalogueStore
from core.catalogue import target_path
from core.digest import Digest, digest_of
from core.errors import Conflict, NotFound
from core.fleet_state import Slot
from core.ids import ModelName, VariantName
from core.manifest import File, Lineage, Manifest, Signature
from core.tensors import Datatype

# Later than the build time below which agents believe no clock.
START = datetime(2030, 3, 1, 12, tzinfo=UTC)
METER = ModelName("meter")
CAT = ModelName("cat")
ORIGINAL = VariantName("original")
FETCH_TIMEOUT_S = 10.0


class MovedClock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self._now = START

    def now(self) -> datetime:
        return self._now

    def monotonic_s(self) -> float:
        return (self._now - START).total_seconds()

    def advance(self, **of_time: float) -> None:
        self._now += timedelta(**of_time)


class MemoryCatalogueStore:
    """`fail_next` breaks one publish before it; `lose_next` breaks one after it was kept."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, int], RoleFile] = {}
        self._staged: dict[str, StagedFile] = {}
        self.fail_next: Exception | None = None
        self.lose_next: Exception | None = None

    async def newest(self) -> Sequence[RoleFile]:
        newest = {role: self._files[role, version] for role, version in sorted(self._files)}
        return list(newest.values())

    async def file(self, role: str, version: int) -> RoleFile:
        if (role, version) not in self._files:
            raise NotFound(f"catalogue: no version {version} of {role}")
        return self._files[role, version]

    async def staged(self) -> Sequence[StagedFile]:
        return [self._staged[role] for role in sorted(self._staged)]

    async def publish(self, files: Sequence[RoleFile], *, staged: Sequence[StagedFile]) -> None:
        if (error := self.fail_next) is not None:
            self.fail_next = None
            raise error
        newest = {file.role: file.version for file in await self.newest()}
        for file in files:
            if file.version != newest.get(file.role, 0) + 1:
                raise Conflict(f"catalogue: expected another version of {file.role} than {file.version}")
        for file in files:
            self._add(file)
        self._staged = {file.role: file for file in staged}
        if (error := self.lose_next) is not None:
            self.lose_next = None
            raise error

    def _add(self, file: RoleFile) -> None:
        self._files[file.role, file.version] = file
        kept = {"root": file.version, "timestamp": 1}.get(file.role, KEPT_VERSIONS)
        for role, version in list(self._files):
            if role == file.role and version <= file.version - kept:
                del self._files[role, version]


@dataclass(frozen=True, slots=True)
class Release:
    """A variant as the registry would hand it over."""

    model: ModelName
    version: int
    variant: VariantName
    manifest: Manifest

    @property
    def manifest_digest(self) -> Digest:
        return self.manifest.digest()

    @property
    def path(self) -> str:
        return target_path(self.model, self.version, self.variant)

    @property
    def slot(self) -> Slot:
        return Slot(self.model, self.version, self.variant, self.manifest_digest)


def made_release(
    model: ModelName = METER, version: int = 1, *, content: bytes = b"x", is_counted: bool = True
) -> Release:
    manifest = Manifest(
        model=model,
        version=version,
        variant=ORIGINAL,
        entry="model.onnx",
        files=(File(path="model.onnx", digest=digest_of(content), size_bytes=len(content)),),
        inputs=(Signature(name="x", datatype=Datatype.FP32, shape=(-1, 4)),),
        outputs=(Signature(name="y", datatype=Datatype.FP32, shape=(-1, 2)),),
        lineage=Lineage(recipe=ORIGINAL),
        release_counter=version if is_counted else None,
    )
    return Release(model, version, ORIGINAL, manifest)


class SignedWorld:
    """A catalogue with its store, keys and clock. `restarted` is another process on the same disk."""

    def __init__(self, folder: Path, *, store: CatalogueStore | None = None) -> None:
        self.folder = folder
        self.clock = MovedClock()
        self.memory = MemoryCatalogueStore()
        self.store = store or self.memory
        self.keys = KeyRing(KeyFiles(folder / "keys"))
        self.catalogue = self.restarted()

    def restarted(self) -> Catalogue:
        return Catalogue(self.store, self.keys, clock=self.clock)

    def move_keys(self, *roles: KeyRole) -> Path:
        """Carry the keys of roles off the machine; return the folder where they are then."""
        elsewhere = self.folder / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        for role in roles:
            (self.folder / "keys" / role).rename(elsewhere / role)
        return elsewhere


class TufClient:
    """What python-tuf, a client that knows nothing of us, believes. Every call is a refresh of a new client."""

    def __init__(self, world: SignedWorld, folder: Path) -> None:
        self._world = world
        self._folder = folder
        self._root: bytes | None = world.catalogue.export_root()
        folder.mkdir()

    async def finds(self, release: Release) -> bool:
        """Say whether the catalogue lists exactly this manifest. Raises RepositoryError when it does not verify."""
        catalogue, loop = self._world.catalogue, asyncio.get_running_loop()
        return await asyncio.to_thread(self._finds, catalogue, loop, release)

    def _finds(self, catalogue: Catalogue, loop: asyncio.AbstractEventLoop, release: Release) -> bool:
        fetcher = _CatalogueFetcher(catalogue, loop)
        updater = Updater(str(self._folder), "https://catalogue/", fetcher=fetcher, bootstrap=self._root)
        self._root = None
        # It takes the time when it is made, and lets nobody else say what time it is.
        updater._trusted_set.reference_time = self._world.clock.now()
        updater.refresh()
        target = updater.get_targetinfo(release.path)
        return target is not None and f"sha256:{target.hashes['sha256']}" == release.manifest_digest


class _CatalogueFetcher(FetcherInterface):
    def __init__(self, catalogue: Catalogue, loop: asyncio.AbstractEventLoop) -> None:
        self._catalogue = catalogue
        self._loop = loop

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.removeprefix("https://catalogue/")
        try:
            found = asyncio.run_coroutine_threadsafe(self._catalogue.metadata(name), self._loop)
            return iter([found.result(FETCH_TIMEOUT_S)])
        except NotFound as error:
            raise DownloadHTTPError(str(error), 404) from error
