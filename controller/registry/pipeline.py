"""What one publication does, from uploaded blobs to a version that is ready to be recorded.

    check ──▶ original: measure ──▶ per recipe: quantise, check, measure ──▶ record: manifests into the blob store

Everything that opens a file somebody uploaded happens in the `Workshop` (`controller.compression`), which means in a
child process with bounds; here are only paths, digests and the values that came back. Files live in a scratch folder,
as copies of their blobs, until the version is built.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Protocol

from pydantic import TypeAdapter, ValidationError

from controller.compression.model import (
    RECIPES,
    CascadeFit,
    Dataset,
    Evaluated,
    EvaluationTask,
    Golden,
    GoldenOrder,
    Inspected,
    ModelBundle,
    ScoreRule,
)
from controller.registry.blobs import BlobStore
from controller.registry.cutting import Cutter
from controller.registry.model import (
    ORIGINAL,
    BundleFile,
    CascadeRequest,
    Measured,
    ModelVersion,
    PublishRequest,
    Variant,
)
from controller.registry.publications import Progress
from controller.registry.store import RegistryStore
from core.clock import Clock
from core.digest import Digest
from core.errors import InvalidModel, InvalidRequest, TooLarge
from core.ids import ModelName, VariantName, checked_name
from core.manifest import Batching, Cascade, File, FilePath, Lineage, Manifest, SelfTest, Signature
from core.tensors import TensorSpec

MAX_FILES = 4096
MAX_BATCH = 1024
_FILE_PATH = TypeAdapter(FilePath)
# Chosen: a board of the size of a hand is ten times slower than a server, twice more when it is busy; and no bound so
# tight that a scheduler's turn breaks it.
_SLOWER_AT_MOST = 20
_MIN_LATENCY_BOUND_MS = 50.0


class Workshop(Protocol):
    """Opens untrusted files somewhere safe."""

    async def inspect(self, bundle: ModelBundle) -> Inspected:
        """Check a model and read its signature.

        Raises:
            InvalidModel: it is refused, with the reason.
        """
        ...

    async def quantise(self, recipe: str, bundle: ModelBundle, target: Path, calibration: Dataset | None) -> None:
        """Write the model that `recipe` makes of `bundle` to `target`.

        Raises:
            InvalidModel: the recipe does not fit the model.
            InvalidRequest: the calibration data is missing or does not fit.
        """
        ...

    async def evaluate(self, task: EvaluationTask) -> Evaluated:
        """Measure latency and, with data, accuracy; with a rule, also fit temperature and threshold.

        Raises:
            InvalidModel: the model does not run.
            InvalidRequest: the data does not fit the model.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Draft:
    """A variant before it has a version number."""

    variant: VariantName
    entry: str
    files: tuple[File, ...]
    inspected: Inspected
    evaluated: Evaluated
    self_test: SelfTest | None = None


def check_request(request: PublishRequest) -> None:
    """Raise InvalidRequest for what needs no file to be seen wrong: paths, recipes, bounds."""
    files = (request.file, *request.extra_files)
    for file in files:
        _check_path(file.path)
    if len(files) > MAX_FILES or len({file.path for file in files}) != len(files):
        raise InvalidRequest(f"publish: expected at most {MAX_FILES} files and every path once")
    unknown = sorted(set(request.recipes) - set(RECIPES))
    if unknown or len(set(request.recipes)) != len(request.recipes):
        raise InvalidRequest(f"publish: expected recipes among {', '.join(RECIPES)}, each once, got {request.recipes}")
    if "int8-static" in request.recipes and request.calibration is None:
        raise InvalidRequest("publish: recipe int8-static needs calibration data; give the digest of an .npz data set")
    if not 1 <= request.max_batch <= MAX_BATCH:
        raise InvalidRequest(f"publish: expected max_batch of 1 to {MAX_BATCH}, got {request.max_batch}")
    if request.cascade is not None:
        _check_cascade(request.cascade, request.evaluation)


def _check_path(path: str) -> None:
    try:
        _FILE_PATH.validate_python(path)
    except ValidationError as error:
        raise InvalidRequest(
            f"publish: expected a relative file path of letters, digits, '.', '_', '-' and '/', got {path[:80]!r}"
        ) from error


def _check_cascade(cascade: CascadeRequest, evaluation: Digest | None) -> None:
    checked_name(cascade.escalate_to, kind="escalate_to")
    if evaluation is None:
        raise InvalidRequest("publish: a cascade is fitted on evaluation data; give the digest of an .npz data set")
    if not 0 <= cascade.max_error_ratio < 1:
        raise InvalidRequest(f"publish: expected max_error_ratio of 0 up to 1, got {cascade.max_error_ratio}")


class PublishPipeline:
    """Builds versions; see `Pipeline` in `publications`."""

    def __init__(
        self,
        store: RegistryStore,
        blobs: BlobStore,
        workshop: Workshop,
        *,
        cutter: Cutter,
        clock: Clock,
        max_model_bytes: int,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._workshop = workshop
        self._cutter = cutter
        self._clock = clock
        self._max_model_bytes = max_model_bytes

    async def build(self, model: ModelName, request: PublishRequest, progress: Progress) -> ModelVersion:
        """Check, compress and measure; return the version, its blobs stored, ready to be recorded.

        Raises:
            NanofleetError: the model or the data sets are refused, with the reason.
        """
        async with self._blobs.scratch() as folder:
            job = _Build(self._blobs, self._workshop, request, folder, progress)
            drafts = [await self._cut(draft) for draft in await job.run(self._max_model_bytes)]
        number = await self._store.next_version(model)
        variants = _variants(model, number, drafts, request)
        for variant in variants:
            await self._blobs.put_bytes(variant.manifest.to_bytes())
        return ModelVersion(model, number, self._clock.now(), variants)

    async def _cut(self, draft: _Draft) -> _Draft:
        chunks = await self._cutter.cut({file.path: self._blobs.path(Digest(file.digest)) for file in draft.files})
        return replace(
            draft, files=tuple(file.model_copy(update={"chunks": chunks[file.path]}) for file in draft.files)
        )


class _Build:
    """One publication's folder and its way through the stages."""

    def __init__(
        self, blobs: BlobStore, workshop: Workshop, request: PublishRequest, folder: Path, progress: Progress
    ) -> None:
        self._blobs = blobs
        self._workshop = workshop
        self._request = request
        self._folder = folder
        self._progress = progress
        self._stages_done = 0

    async def run(self, max_model_bytes: int) -> list[_Draft]:
        await self._begin("check")
        files = await self._files()
        size_bytes = sum(file.size_bytes for file in files)
        if size_bytes > max_model_bytes:
            raise TooLarge(f"model: expected at most {max_model_bytes} bytes in all files, got {size_bytes}")
        bundle = await self._bundle()
        inspected = await self._workshop.inspect(bundle)
        _require_batchable(inspected, self._request.max_batch)
        await self._begin("original")
        evaluated = await self._evaluate(ORIGINAL, bundle)
        drafts = [await self._draft(ORIGINAL, bundle.entry, files, inspected, evaluated)]
        # A tokenizer or a configuration belongs to every variant; external data is part of the model that it is of.
        companions = tuple(file for file in files[1:] if file.path not in inspected.external_files)
        drafts += [await self._compress(recipe, bundle, inspected, companions) for recipe in self._request.recipes]
        await self._begin("record")
        return drafts

    async def _compress(
        self, recipe: str, bundle: ModelBundle, original: Inspected, companions: Sequence[File]
    ) -> _Draft:
        await self._begin(f"{recipe}: quantise")
        folder = self._folder / recipe
        # As the original's: no companion has that name.
        target = folder / bundle.entry
        target.parent.mkdir(parents=True)
        await self._workshop.quantise(recipe, bundle, target, await self._dataset(self._request.calibration))
        made = ModelBundle(folder, bundle.entry)
        inspected = await self._workshop.inspect(made)
        _require_same_signature(recipe, inspected, original)
        await self._begin(f"{recipe}: evaluate")
        evaluated = await self._evaluate(VariantName(recipe), made)
        size_bytes = target.stat().st_size
        file = File(path=bundle.entry, digest=await self._blobs.put_file(target), size_bytes=size_bytes)
        return await self._draft(VariantName(recipe), bundle.entry, (file, *companions), inspected, evaluated)

    async def _draft(
        self, variant: VariantName, entry: str, files: tuple[File, ...], inspected: Inspected, evaluated: Evaluated
    ) -> _Draft:
        """Return the variant with the golden inputs that it answered as one more file."""
        if evaluated.golden is None:
            return _Draft(variant, entry, files, inspected, evaluated)
        path = self._golden(variant)
        size_bytes = path.stat().st_size
        file = File(path=_unused_path(files), digest=await self._blobs.put_file(path), size_bytes=size_bytes)
        self_test = _self_test(file.path, evaluated, evaluated.golden)
        return _Draft(variant, entry, (*files, file), inspected, evaluated, self_test)

    def _golden(self, variant: VariantName) -> Path:
        return self._folder / f"{variant}.golden"

    async def _files(self) -> tuple[File, ...]:
        return tuple(
            [
                File(path=file.path, digest=file.digest, size_bytes=await self._blobs.size(file.digest))
                for file in (self._request.file, *self._request.extra_files)
            ]
        )

    async def _bundle(self) -> ModelBundle:
        folder = self._folder / ORIGINAL
        for file in (self._request.file, *self._request.extra_files):
            await self._blobs.copy(file.digest, folder / file.path)
        return ModelBundle(folder, self._request.file.path, _paths(self._request.extra_files))

    async def _dataset(self, digest: Digest | None) -> Dataset | None:
        if digest is None:
            return None
        await self._blobs.size(digest)
        return Dataset(self._blobs.path(digest))

    async def _evaluate(self, variant: VariantName, bundle: ModelBundle) -> Evaluated:
        request = self._request
        dataset = await self._dataset(request.evaluation)
        samples = await self._dataset(request.evaluation or request.calibration)
        golden = GoldenOrder(self._golden(variant), request.max_batch, samples)
        return await self._workshop.evaluate(EvaluationTask(bundle, dataset, _rule(request.cascade), golden))

    async def _begin(self, stage: str) -> None:
        # check, original and record, and two for each recipe.
        await self._progress(stage, self._stages_done / (3 + 2 * len(self._request.recipes)))
        self._stages_done += 1


def _rule(cascade: CascadeRequest | None) -> ScoreRule | None:
    return None if cascade is None else ScoreRule(cascade.score_output, cascade.score_kind, cascade.max_error_ratio)


def _self_test(path: str, evaluated: Evaluated, golden: Golden) -> SelfTest:
    run_ms = evaluated.latency_p90_us / 1000 * golden.samples
    return SelfTest(
        file=path,
        rtol=golden.rtol,
        atol=golden.atol,
        max_latency_p95_ms=max(_MIN_LATENCY_BOUND_MS, _SLOWER_AT_MOST * run_ms),
    )


def _unused_path(files: Sequence[File]) -> str:
    taken = {file.path for file in files}
    return next(path for number in range(len(taken) + 1) if (path := f"golden{number or ''}.npz") not in taken)


def _paths(files: Sequence[BundleFile]) -> tuple[str, ...]:
    return tuple(file.path for file in files)


def _require_batchable(inspected: Inspected, max_batch: int) -> None:
    if max_batch == 1:
        return
    for spec in (*inspected.inputs, *inspected.outputs):
        if spec.shape[:1] != (-1,):
            raise InvalidModel(
                f"max_batch {max_batch}: expected {spec.name!r} to have a variable first dimension, got shape "
                f"{list(spec.shape)}; export the model with a dynamic batch, or publish it with max_batch 1"
            )


def _require_same_signature(recipe: str, made: Inspected, original: Inspected) -> None:
    if (made.inputs, made.outputs) != (original.inputs, original.outputs):
        raise InvalidModel(f"recipe {recipe}: its model has other inputs or outputs than the original; leave it out")


def _variants(model: ModelName, number: int, drafts: Sequence[_Draft], request: PublishRequest) -> tuple[Variant, ...]:
    original = _variant(model, number, drafts[0], request, parent=None)
    parent = original.manifest_digest
    derived = [_variant(model, number, draft, request, parent=parent) for draft in drafts[1:]]
    return original, *sorted(derived, key=attrgetter("variant"))


def _variant(
    model: ModelName, number: int, draft: _Draft, request: PublishRequest, *, parent: Digest | None
) -> Variant:
    manifest = Manifest(
        model=model,
        version=number,
        variant=draft.variant,
        entry=draft.entry,
        files=draft.files,
        inputs=_signatures(draft.inspected.inputs),
        outputs=_signatures(draft.inspected.outputs),
        batching=Batching(max_batch=request.max_batch),
        cascade=_cascade(request.cascade, draft.evaluated.fit),
        lineage=Lineage(recipe=draft.variant, parent=parent),
        self_test=draft.self_test,
        accuracy_ratio=draft.evaluated.accuracy_ratio,
        release_counter=number,
        requires=request.requires,
        privacy=request.privacy,
    )
    measured = Measured(
        size_bytes=manifest.size_bytes,
        latency_p50_us=draft.evaluated.latency_p50_us,
        latency_p90_us=draft.evaluated.latency_p90_us,
        accuracy_ratio=draft.evaluated.accuracy_ratio,
        evaluated_samples=draft.evaluated.samples,
    )
    return Variant(model, number, draft.variant, manifest.digest(), manifest, measured)


def _signatures(specs: Sequence[TensorSpec]) -> tuple[Signature, ...]:
    return tuple(Signature(name=spec.name, datatype=spec.datatype, shape=spec.shape) for spec in specs)


def _cascade(request: CascadeRequest | None, fit: CascadeFit | None) -> Cascade | None:
    if request is None or fit is None:
        return None
    return Cascade(
        escalate_to=request.escalate_to,
        score_output=request.score_output,
        score_kind=request.score_kind,
        temperature=fit.temperature,
        threshold=fit.threshold,
    )
