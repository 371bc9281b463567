"""Publishing as a job: queued, run one at a time, recorded or failed, and cut short by a stop."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from controller.compression.model import Inspected
from controller.registry.model import (
    ORIGINAL,
    BundleFile,
    CascadeRequest,
    Publication,
    PublicationState,
    PublishRequest,
)
from controller.registry.publications import MAX_UNSTORED
from core.digest import Digest, digest_of
from core.errors import (
    InvalidModel,
    InvalidName,
    InvalidRequest,
    NanofleetError,
    NotFound,
    Overloaded,
    Unavailable,
    UnknownModel,
)
from core.ids import ModelName, VariantName
from core.manifest import ScoreKind, parse_manifest
from core.tensors import Datatype, TensorSpec
from tests.support.fake_workshop import INSPECTED, FakeWorkshop
from tests.support.registries import RunningRegistry, running_registry
from tests.support.registry_store import MemoryRegistryStore
from tests.support.registry_values import made_publication

METER = ModelName("meter")


@pytest.fixture
def workshop() -> FakeWorkshop:
    return FakeWorkshop()


@pytest.fixture
async def running(tmp_path: Path, workshop: FakeWorkshop) -> AsyncIterator[RunningRegistry]:
    async with running_registry(tmp_path, workshop) as running:
        yield running


async def blob(running: RunningRegistry, digest: Digest) -> bytes:
    return b"".join([block async for block in running.registry.read_blob(digest)])


async def test_a_publication_ends_with_a_version(running: RunningRegistry) -> None:
    registry = running.registry
    started = await registry.start_publication(METER, await running.request())

    finished = await running.finished(started)

    assert (started.state, started.stage) == (PublicationState.RUNNING, "queued")
    assert (finished.state, finished.version, finished.done_ratio) == (PublicationState.DONE, 1, 1.0)
    assert [model.name for model in await registry.models()] == [METER]
    assert (await registry.latest(METER)).version == 1
    assert await registry.publication(started.id) == finished


async def test_the_manifest_is_a_blob_under_its_digest(running: RunningRegistry) -> None:
    await running.finished(await running.registry.start_publication(METER, await running.request()))

    variant = await running.registry.variant(METER, None, ORIGINAL)

    assert parse_manifest(await blob(running, variant.manifest_digest)) == variant.manifest
    assert await blob(running, Digest(variant.manifest.files[0].digest)) == b"a model"


async def test_recipes_make_variants_with_the_original_as_parent(
    running: RunningRegistry, workshop: FakeWorkshop
) -> None:
    data = await running.upload(b"data")
    request = replace(await running.request(), recipes=("int8-static", "fp16"), calibration=data, max_batch=8)

    await running.finished(await running.registry.start_publication(METER, request))

    version = await running.registry.latest(METER)
    original, *derived = version.variants
    assert [variant.variant for variant in version.variants] == [ORIGINAL, "fp16", "int8-static"]
    assert original.manifest.lineage.parent is None
    assert {variant.manifest.lineage.parent for variant in derived} == {original.manifest_digest}
    assert {variant.manifest.batching.max_batch for variant in version.variants} == {8}
    assert await blob(running, Digest(derived[0].manifest.files[0].digest)) == b"fp16a "
    assert workshop.steps == [
        *("inspect original", "evaluate original"),
        *("quantise int8-static", "inspect int8-static", "evaluate int8-static"),
        *("quantise fp16", "inspect fp16", "evaluate fp16"),
    ]


class RecordingStore(MemoryRegistryStore):
    """Notes every state that a publication passes through."""

    def __init__(self) -> None:
        super().__init__()
        self.passed: list[tuple[str, float]] = []

    async def update_publication(self, publication: Publication) -> None:
        self.passed.append((publication.stage, publication.done_ratio))
        await super().update_publication(publication)


async def test_every_stage_is_noted_in_order(tmp_path: Path) -> None:
    store = RecordingStore()
    async with running_registry(tmp_path, store=store) as running:
        request = replace(await running.request(), recipes=("fp16",))
        await running.finished(await running.registry.start_publication(METER, request))

    assert store.passed == [
        ("check", 0.0),
        ("original", 0.2),
        ("fp16: quantise", 0.4),
        ("fp16: evaluate", 0.6),
        ("record", 0.8),
        ("done", 1.0),
    ]


async def test_a_waiter_sees_the_next_stage(running: RunningRegistry, workshop: FakeWorkshop) -> None:
    workshop.is_held = True
    started = await running.registry.start_publication(METER, await running.request())

    assert (await running.registry.next_change(started, timeout_s=10)).stage == "check"


async def test_waiting_for_a_change_that_does_not_come_ends(running: RunningRegistry, workshop: FakeWorkshop) -> None:
    workshop.is_held = True
    started = await running.registry.start_publication(METER, await running.request())
    checking = await running.registry.next_change(started, timeout_s=10)

    assert await running.registry.next_change(checking, timeout_s=0.01) == checking


async def test_the_same_content_again_is_a_new_version_of_the_same_files(running: RunningRegistry) -> None:
    request = await running.request()
    for _ in range(2):
        await running.finished(await running.registry.start_publication(METER, request))

    second, first = await running.registry.versions(METER)
    assert (first.version, second.version) == (1, 2)
    assert first.variants[0].manifest.files == second.variants[0].manifest.files
    assert first.variants[0].manifest_digest != second.variants[0].manifest_digest


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InvalidModel("not ONNX"), "invalid_request", "not ONNX"),
        (ValueError("secret detail"), "internal", "publish: a defect of ours; the controller's log says more"),
    ],
)
async def test_a_failure_is_recorded_and_the_next_publication_runs(
    running: RunningRegistry, workshop: FakeWorkshop, error: Exception, code: str, message: str
) -> None:
    workshop.refusal = error
    request = await running.request()

    failed = await running.finished(await running.registry.start_publication(METER, request))
    workshop.refusal = None
    done = await running.finished(await running.registry.start_publication(METER, request))

    assert failed.problem is not None
    assert (failed.state, failed.stage) == (PublicationState.FAILED, "check")
    assert (failed.problem.code, failed.problem.message) == (code, message)
    assert (done.state, done.version) == (PublicationState.DONE, 1)


class FullStore(MemoryRegistryStore):
    """Takes new publications and then nothing more, as on a disk that is full."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    async def update_publication(self, publication: Publication) -> None:
        raise self._error


STORE_ERRORS = [Unavailable("database: full; try again later"), RuntimeError("a defect")]


@pytest.mark.parametrize("error", STORE_ERRORS)
async def test_an_end_that_cannot_be_stored_is_remembered(tmp_path: Path, error: Exception) -> None:
    async with running_registry(tmp_path, store=FullStore(error), max_queued=0) as running:
        for _ in range(2):  # the first must not hold the only place for ever
            started = await running.registry.start_publication(METER, await running.request())
            failed = await running.finished(started)
            assert failed.state is PublicationState.FAILED
            assert await running.registry.publication(started.id) == failed


async def test_ends_that_cannot_be_stored_are_bounded_and_the_oldest_goes(tmp_path: Path) -> None:
    async with running_registry(tmp_path, store=FullStore(STORE_ERRORS[0]), max_queued=0) as running:
        request = await running.request()
        ids = []
        for _ in range(MAX_UNSTORED + 1):
            ended = await running.finished(await running.registry.start_publication(METER, request))
            ids.append(ended.id)
        oldest, *_, newest = [await running.registry.publication(ended_id) for ended_id in ids]

    assert (oldest.state, newest.state) == (PublicationState.RUNNING, PublicationState.FAILED)


async def test_a_row_left_running_is_waited_for_and_not_polled(tmp_path: Path) -> None:
    store = MemoryRegistryStore()
    async with running_registry(tmp_path, store=store) as running:
        left = made_publication("left-behind", METER)
        await store.add_publication(left)
        waiter = asyncio.create_task(running.registry.next_change(left, timeout_s=60))
        done, _ = await asyncio.wait([waiter], timeout=0.05)
        waiter.cancel()
        await asyncio.wait([waiter])

    assert not done


async def test_no_more_than_allowed_may_wait(running: RunningRegistry, workshop: FakeWorkshop) -> None:
    workshop.is_held = True
    request = await running.request()
    # One runs and four wait.
    for _ in range(5):
        await running.registry.start_publication(METER, request)

    with pytest.raises(Overloaded, match="4 publications are waiting"):
        await running.registry.start_publication(METER, request)


async def test_a_stop_interrupts_the_step_and_the_next_start_says_so(tmp_path: Path) -> None:
    workshop, store = FakeWorkshop(is_held=True), MemoryRegistryStore()
    async with running_registry(tmp_path, workshop, store=store) as running:
        started = await running.registry.start_publication(METER, await running.request())
        await workshop.entered.wait()
        await running.stop()

    async with running_registry(tmp_path, store=store) as again:
        found = await again.registry.publication(started.id)

    assert workshop.was_cancelled
    assert found.state is PublicationState.FAILED
    assert found.problem is not None
    assert found.problem.message == "interrupted by a restart; publish again"


async def test_a_scratch_folder_is_gone_after_a_failure(
    running: RunningRegistry, workshop: FakeWorkshop, tmp_path: Path
) -> None:
    workshop.refusal = InvalidModel("no")

    await running.finished(await running.registry.start_publication(METER, await running.request()))

    assert list((tmp_path / "blobs" / "tmp").iterdir()) == []


async def test_files_over_the_bound_together_are_refused(tmp_path: Path) -> None:
    async with running_registry(tmp_path, max_model_bytes=10) as running:
        request = await running.request(b"123456")
        request = replace(request, extra_files=(BundleFile("weights.bin", await running.upload(b"654321")),))

        failed = await running.finished(await running.registry.start_publication(METER, request))

    assert failed.problem is not None
    assert (failed.problem.code, failed.problem.message) == (
        "too_large",
        "model: expected at most 10 bytes in all files, got 12",
    )


async def test_batching_needs_a_variable_first_dimension(running: RunningRegistry, workshop: FakeWorkshop) -> None:
    workshop.inspected = Inspected(INSPECTED.inputs, (TensorSpec("y", Datatype.FP32, (1, 2)),))
    request = replace(await running.request(), max_batch=4)

    failed = await running.finished(await running.registry.start_publication(METER, request))

    assert failed.problem is not None
    assert "expected 'y' to have a variable first dimension, got shape [1, 2]" in failed.problem.message


# ---- refused at once ------------------------------------------------------------------------------------------

SOME = digest_of(b"a model")
CASCADE = CascadeRequest(ModelName("large"), "y", ScoreKind.LOGITS, 0.05)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"file": BundleFile("../model.onnx", SOME)}, InvalidRequest, "relative file path"),
        ({"file": BundleFile("/model.onnx", SOME)}, InvalidRequest, "relative file path"),
        ({"extra_files": (BundleFile("model.onnx", SOME),)}, InvalidRequest, "every path once"),
        ({"extra_files": (BundleFile("w", digest_of(b"missing")),)}, NotFound, "upload it first"),
        ({"recipes": ("int4",)}, InvalidRequest, "expected recipes among int8-static"),
        ({"recipes": ("fp16", "fp16")}, InvalidRequest, "each once"),
        ({"recipes": ("int8-static",)}, InvalidRequest, "needs calibration data"),
        ({"max_batch": 0}, InvalidRequest, "max_batch of 1 to 1024"),
        ({"max_batch": 1025}, InvalidRequest, "max_batch of 1 to 1024"),
        ({"cascade": CASCADE}, InvalidRequest, "fitted on evaluation data"),
        ({"cascade": replace(CASCADE, max_error_ratio=1.0), "evaluation": SOME}, InvalidRequest, "max_error_ratio"),
        ({"cascade": replace(CASCADE, escalate_to=ModelName("a b")), "evaluation": SOME}, InvalidName, "escalate_to"),
        ({"evaluation": digest_of(b"missing")}, NotFound, "upload it first"),
    ],
)
async def test_a_request_that_cannot_work_is_refused_at_once(
    running: RunningRegistry, changes: dict[str, object], error: type[NanofleetError], message: str
) -> None:
    request: PublishRequest = replace(await running.request(), **changes)  # type: ignore[arg-type]  # changed by name

    with pytest.raises(error, match=message):
        await running.registry.start_publication(METER, request)


async def test_a_bad_model_name_is_refused(running: RunningRegistry) -> None:
    with pytest.raises(InvalidName, match="model: "):
        await running.registry.start_publication(ModelName("a/b"), await running.request())


# ---- reading --------------------------------------------------------------------------------------------------


async def test_an_unknown_variant_is_refused_with_those_there_are(running: RunningRegistry) -> None:
    await running.finished(await running.registry.start_publication(METER, await running.request()))

    with pytest.raises(UnknownModel, match="no variant 'int8'; it has original"):
        await running.registry.variant(METER, None, VariantName("int8"))


async def test_the_latest_is_the_newest_also_when_it_was_read_before(running: RunningRegistry) -> None:
    request = await running.request()
    await running.finished(await running.registry.start_publication(METER, request))
    before = await running.registry.latest(METER)
    await running.finished(await running.registry.start_publication(METER, request))

    assert (before.version, (await running.registry.latest(METER)).version) == (1, 2)
    assert (await running.registry.version(METER, 1)).version == 1


async def test_an_unknown_publication_is_not_found(running: RunningRegistry) -> None:
    with pytest.raises(NotFound):
        await running.registry.publication("nobody")
