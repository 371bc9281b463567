"""`Registry`: what the gateway, the fleet and the operator's API may ask of models and their bytes.

Reading goes to the store once per version: versions never change, so what was read or recorded is kept in memory, and
the hot path (`variant`, `latest`) costs a dictionary look-up. This process is the only one that records versions, which
keeps the memory of the newest true.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from uuid import uuid4

from controller.registry.blobs import BlobStore
from controller.registry.cutting import Cutter
from controller.registry.model import Model, ModelVersion, Publication, PublishRequest, Variant
from controller.registry.pipeline import PublishPipeline, Workshop, check_request
from controller.registry.publications import Publications, Releases
from controller.registry.store import RegistryStore
from core.clock import Clock
from core.digest import Digest
from core.errors import UnknownModel
from core.ids import ModelName, VariantName, checked_name


def _new_id() -> str:
    return str(uuid4())


class Registry:
    """Call `prepare` before use, and keep `run` running in a task of the owner: it does the publishing."""

    def __init__(
        self,
        store: RegistryStore,
        blobs: BlobStore,
        workshop: Workshop,
        *,
        releases: Releases,
        cutter: Cutter,
        clock: Clock,
        max_model_bytes: int,
        max_queued_publications: int,
        new_id: Callable[[], str] = _new_id,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._max_model_bytes = max_model_bytes
        self._latest: dict[ModelName, ModelVersion] = {}
        self._versions: dict[tuple[ModelName, int], ModelVersion] = {}
        self._publications = Publications(
            store,
            PublishPipeline(
                store,
                blobs,
                workshop,
                cutter=cutter,
                clock=clock,
                max_model_bytes=max_model_bytes,
            ),
            clock=clock,
            new_id=new_id,
            max_queued=max_queued_publications,
            on_recorded=self._remember_latest,
            releases=releases,
        )

    async def prepare(self) -> None:
        """Clean up after the last process: half-written blobs go, interrupted publications become FAILED."""
        await self._blobs.prepare()
        await self._publications.prepare()

    async def run(self) -> None:
        """Work through publications, for ever; cancelling it kills the child process of the running one."""
        await self._publications.run()

    # ---- models ----------------------------------------------------------------------------------------------

    async def models(self) -> Sequence[Model]:
        return await self._store.models()

    async def versions(self, model: ModelName) -> Sequence[ModelVersion]:
        """Return every version, newest first.

        Raises:
            UnknownModel: there is no such model.
        """
        return await self._store.versions(model)

    async def latest(self, model: ModelName) -> ModelVersion:
        """Return the newest version.

        Raises:
            UnknownModel: there is no such model.
        """
        if (known := self._latest.get(model)) is None:
            known = await self._store.version(model, None)
            # A publication may have been recorded while we waited; its newer version stays.
            known = self._latest.setdefault(model, known)
        return known

    async def version(self, model: ModelName, version: int | None) -> ModelVersion:
        """Return one version; None stands for the newest.

        Raises:
            UnknownModel: no such model or version.
        """
        if version is None:
            return await self.latest(model)
        if (known := self._versions.get((model, version))) is None:
            known = self._versions[model, version] = await self._store.version(model, version)
        return known

    async def variant(self, model: ModelName, version: int | None, variant: VariantName) -> Variant:
        """Return one variant with its manifest.

        Raises:
            UnknownModel: no such model, version or variant.
        """
        of_version = await self.version(model, version)
        for candidate in of_version.variants:
            if candidate.variant == variant:
                return candidate
        names = ", ".join(candidate.variant for candidate in of_version.variants)
        raise UnknownModel(f"model {model} version {of_version.version}: no variant {variant!r}; it has {names}")

    # ---- publishing ------------------------------------------------------------------------------------------

    async def start_publication(self, model: ModelName, request: PublishRequest) -> Publication:
        """Check what can be checked at once, queue the rest, and return without waiting for it.

        Raises:
            InvalidRequest: a name, path, recipe or bound in the request does not fit.
            NotFound: a blob that the request names was not uploaded.
            Overloaded: too many publications are waiting.
        """
        checked_name(model, kind="model")
        check_request(request)
        for digest in _digests(request):
            await self._blobs.size(digest)
        return await self._publications.start(model, request)

    async def publication(self, publication_id: str) -> Publication:
        """Return how a publication stands.

        Raises:
            NotFound: there is none of that id.
        """
        return await self._publications.get(publication_id)

    async def next_change(self, seen: Publication, *, timeout_s: float) -> Publication:
        """Wait until a publication is no longer as `seen`, or for `timeout_s`; return how it is then."""
        return await self._publications.next_change(seen, timeout_s=timeout_s)

    # ---- bytes -----------------------------------------------------------------------------------------------

    async def has_blob(self, digest: Digest) -> bool:
        return await self._blobs.has(digest)

    async def blob_size(self, digest: Digest) -> int:
        """Return the bytes of a blob.

        Raises:
            NotFound: there is no such blob.
        """
        return await self._blobs.size(digest)

    async def put_blob(self, digest: Digest, blocks: AsyncIterator[bytes]) -> bool:
        """Store an upload; return whether the blob is new.

        Raises:
            TooLarge: more than `max_model_bytes` came.
            IntegrityError: the bytes have another digest.
        """
        return await self._blobs.put_stream(digest, blocks, max_bytes=self._max_model_bytes)

    def read_blob(self, digest: Digest, offset: int = 0) -> AsyncIterator[bytes]:
        """Yield a blob from `offset` on in blocks of at most 1 MiB; raises NotFound at the first one."""
        return self._blobs.open_range(digest, offset)

    def _remember_latest(self, version: ModelVersion) -> None:
        self._latest[version.model] = version


def _digests(request: PublishRequest) -> list[Digest]:
    files = [request.file.digest, *(file.digest for file in request.extra_files)]
    return files + [digest for digest in (request.calibration, request.evaluation) if digest is not None]
