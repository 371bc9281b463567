"""Delivery: nothing that comes is believed, nothing that is here is asked for, and nothing that came is lost."""

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from core.clock import SystemClock
from core.digest import Digest, digest_of, hex_of
from core.errors import (
    DiskFull,
    ErrorCode,
    IntegrityError,
    InternalError,
    InvalidManifest,
    NanofleetError,
    NotFound,
    PermissionRequired,
    Unavailable,
)
from core.fleet_state import Transfer
from core.manifest import MAX_MANIFEST_BYTES, File
from edge_agent.sync.controller_source import ControllerSource, SourceLimits
from edge_agent.sync.delivery import MAX_ALLOWED, Delivery, DeliveryLimits
from edge_agent.sync.store import ContentStore
from protos.artifacts.v1 import artifacts_pb2 as pb
from tests.support.delivery_shelf import DeliveryShelf, Fault, Sent, ShelfCalls, Silence
from tests.support.variants import MadeVariant, made_variant

WEIGHTS = bytes(range(100))
# Chunks: 0 is the graph, 1 to 10 the weights.
VARIANT = made_variant({"model.onnx": b"graph", "w.bin": WEIGHTS}, chunk_bytes=10)
ALL = list(range(11))
# Two chunks, large enough for a difference to be worth it, and what became of them: one byte in each.
LARGE = made_variant({"model.onnx": random.Random(1).randbytes(1000)}, chunk_bytes=500)
NUDGED = made_variant(
    {"model.onnx": bytes(byte ^ (at in (7, 700)) for at, byte in enumerate(random.Random(1).randbytes(1000)))},
    version=2,
    chunk_bytes=500,
)


def successor(weights: bytes, *, graph: bytes = b"newer") -> MadeVariant:
    return made_variant({"model.onnx": graph, "w.bin": weights}, version=2, chunk_bytes=10)


class Bench:
    """A store, a shelf and a Delivery between them."""

    def __init__(
        self,
        root: Path,
        disk: ThreadPoolExecutor,
        *,
        free_bytes: int = 1 << 30,
        is_metered: bool = False,
        codec: "pb.Codec.ValueType" = pb.CODEC_RAW,
    ) -> None:
        self.root = root
        self.shelf = DeliveryShelf(VARIANT, codec=codec)
        self.calls = ShelfCalls(self.shelf)
        self.store = ContentStore(root, free_bytes=lambda _: free_bytes)
        self.progress: list[tuple[int, int, Transfer]] = []
        source = ControllerSource(self.calls, limits=SourceLimits(chunk_timeout_s=0.05), clock=SystemClock())
        limits = DeliveryLimits(reserve_bytes=1000)
        self.delivery = Delivery(
            source, self.store, disk=disk, limits=limits, clock=SystemClock(), is_metered=is_metered
        )

    async def variant(self, variant: MadeVariant = VARIANT) -> None:
        await self.delivery.variant(variant.digest, lambda *told: self.progress.append(told))

    async def running(self, variant: MadeVariant = VARIANT) -> None:
        """Bring in a variant in full and make a folder of it, as if it had been loaded."""
        self.shelf.hold(variant)
        self.delivery.allow(variant.digest)
        await self.variant(variant)
        self.store.materialise(variant.manifest, variant.digest)

    @property
    def transfer(self) -> Transfer:
        return self.progress[-1][2]

    def break_next(self, fault: Fault) -> None:
        self.shelf.faults.append(fault)


@pytest.fixture
def disk() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture
def bench(tmp_path: Path, disk: ThreadPoolExecutor) -> Bench:
    return Bench(tmp_path, disk)


def cut_after(chunks: int, then: Sent | None = None) -> Fault:
    """Send the grant and some chunks, and then nothing, or something else."""
    return lambda replies: [*replies[: chunks + 1], *([then] if then is not None else [])]


def changed(change: Callable[[pb.EncodedChunk], None], *, at: int) -> Fault:
    def apply(replies: list[pb.FetchChunksReply]) -> Sequence[Sent]:
        change(replies[at + 1].chunk)
        return replies

    return apply


def with_bytes(content: bytes) -> Callable[[pb.EncodedChunk], None]:
    return lambda chunk: setattr(chunk, "data", content)


async def test_manifest_and_every_file_arrive(bench: Bench) -> None:
    await bench.variant()
    assert bench.store.is_complete(VARIANT.digest)
    assert bench.store.blob_path(digest_of(WEIGHTS)).read_bytes() == WEIGHTS


async def test_every_stream_is_cancelled_when_it_is_over(bench: Bench) -> None:
    await bench.variant()
    assert [call.is_cancelled for call in bench.calls.calls] == [True]


async def test_what_is_here_is_not_asked_for_again(bench: Bench) -> None:
    await bench.variant()
    await bench.variant()
    assert bench.shelf.asked_chunks == [ALL]
    assert len(bench.shelf.asked_manifests) == 1


async def test_a_manifest_is_brought_alone_before_anything_else(bench: Bench) -> None:
    assert await bench.delivery.manifest(VARIANT.digest) == VARIANT.manifest
    assert bench.shelf.asked == []


async def test_a_file_that_another_variant_has_too_is_not_asked_for(bench: Bench) -> None:
    await bench.variant()
    sibling = successor(WEIGHTS)
    bench.shelf.hold(sibling)
    await bench.variant(sibling)
    assert bench.shelf.asked_chunks == [ALL, [0]]


async def test_chunks_that_a_running_variant_has_too_are_copied(bench: Bench) -> None:
    await bench.running()
    newer = successor(WEIGHTS[:50] + b"0123456789" + WEIGHTS[60:])
    bench.shelf.hold(newer)
    await bench.variant(newer)
    assert bench.shelf.asked[-1].chunks == [0, 6]
    assert bench.transfer.same_chunks == 9


async def test_bytes_that_stand_at_two_places_are_asked_for_once(bench: Bench) -> None:
    repeating = successor(b"0123456789" * 3)
    bench.shelf.hold(repeating)
    await bench.variant(repeating)
    assert bench.shelf.asked_chunks == [[0, 1]]
    assert bench.store.blob_path(digest_of(b"0123456789" * 3)).read_bytes() == b"0123456789" * 3


async def test_one_file_under_two_names_is_fetched_once(bench: Bench) -> None:
    twice = made_variant({"a.onnx": WEIGHTS, "b.bin": WEIGHTS}, chunk_bytes=10)
    bench.shelf.hold(twice)
    await bench.variant(twice)
    assert bench.shelf.asked_chunks == [list(range(10))]
    assert bench.store.is_complete(twice.digest)


async def test_differences_to_a_running_variant_are_applied(bench: Bench) -> None:
    await bench.running(LARGE)
    bench.shelf.hold(NUDGED)
    await bench.variant(NUDGED)
    assert bench.shelf.asked[-1].held == [LARGE.digest]
    assert bench.transfer.difference_chunks == 2
    assert bench.transfer.wire_bytes < 100 < bench.transfer.brought_bytes
    assert bench.store.is_complete(NUDGED.digest)


async def test_compressed_chunks_are_applied(tmp_path: Path, disk: ThreadPoolExecutor) -> None:
    bench = Bench(tmp_path, disk, codec=pb.CODEC_ZSTD)
    zeros = made_variant({"model.onnx": bytes(5000) + b"end"})
    bench.shelf.hold(zeros)
    await bench.variant(zeros)
    assert bench.transfer.zstd_chunks == 1
    assert bench.transfer.wire_bytes < 100
    assert bench.transfer.brought_bytes == 5003


async def test_a_broken_transfer_goes_on_where_it_stopped(bench: Bench) -> None:
    bench.break_next(cut_after(3, Unavailable("connection reset")))
    with pytest.raises(Unavailable):
        await bench.variant()
    await bench.variant()
    assert bench.shelf.asked_chunks == [ALL, ALL[3:]]
    assert bench.store.is_complete(VARIANT.digest)


async def test_a_transfer_goes_on_after_a_restart(bench: Bench, disk: ThreadPoolExecutor) -> None:
    bench.break_next(cut_after(6))
    with pytest.raises(Unavailable):
        await bench.variant()
    after = Bench(bench.root, disk)
    await after.variant()
    assert after.shelf.asked_chunks == [ALL[6:]]


async def test_a_chunk_that_rotted_between_two_starts_is_fetched_again(bench: Bench, disk: ThreadPoolExecutor) -> None:
    bench.break_next(cut_after(6))
    with pytest.raises(Unavailable):
        await bench.variant()
    partial = bench.root / "partial" / hex_of(digest_of(WEIGHTS))
    partial.write_bytes(b"x" + partial.read_bytes()[1:])
    after = Bench(bench.root, disk)
    await after.variant()
    assert after.shelf.asked_chunks == [[1, *ALL[6:]]]
    assert after.store.is_complete(VARIANT.digest)


async def test_an_early_end_is_noticed(bench: Bench) -> None:
    bench.break_next(cut_after(9))
    with pytest.raises(Unavailable, match="the stream ended before chunk 9"):
        await bench.variant()


async def test_a_silent_controller_is_left(bench: Bench) -> None:
    bench.break_next(cut_after(2, Silence()))
    with pytest.raises(Unavailable, match=r"expected a word within 0\.05 s"):
        await bench.variant()
    assert bench.calls.calls[-1].is_cancelled


def waiting(words: int) -> Fault:
    """Say before every chunk that it waits for its turn."""
    still_here = [pb.FetchChunksReply()] * words
    return lambda replies: [each for reply in replies for each in (*still_here, reply)]


async def test_a_word_that_a_chunk_waits_is_no_chunk_and_no_silence(bench: Bench) -> None:
    bench.break_next(waiting(3))
    await bench.variant()
    assert bench.shelf.asked_chunks == [ALL]
    assert bench.store.is_complete(VARIANT.digest)


async def test_a_controller_that_only_says_to_wait_is_left(bench: Bench) -> None:
    bench.break_next(waiting(1000))
    with pytest.raises(Unavailable, match="told 240 times to wait"):
        await bench.variant()


async def test_silence_is_borne_for_as_long_as_the_granted_rate_may_take(bench: Bench) -> None:
    def late(replies: list[pb.FetchChunksReply]) -> Sequence[Sent]:
        replies[0].grant.bytes_per_s = 20 << 20
        return [replies[0], Silence()]

    bench.break_next(late)
    with pytest.raises(Unavailable, match=r"expected a word within 0\.2 s"):
        await bench.variant()


async def test_corrupt_bytes_are_refused_and_fetched_again(bench: Bench) -> None:
    bench.break_next(changed(with_bytes(b"x" * 10), at=4))
    with pytest.raises(IntegrityError, match="chunk 4: got other bytes"):
        await bench.variant()
    await bench.variant()
    assert bench.shelf.asked[-1].chunks[0] == 4
    assert bench.store.is_complete(VARIANT.digest)


async def test_a_gap_is_refused(bench: Bench) -> None:
    bench.break_next(lambda replies: [*replies[:2], *replies[3:]])
    with pytest.raises(IntegrityError, match="expected chunk 1, got chunk 2"):
        await bench.variant()


async def test_a_stream_without_a_grant_is_refused(bench: Bench) -> None:
    bench.break_next(lambda replies: replies[1:])
    with pytest.raises(IntegrityError, match="expected a grant first, got chunk"):
        await bench.variant()


async def test_a_chunk_larger_than_it_may_be_is_refused(bench: Bench) -> None:
    bench.break_next(changed(with_bytes(b"x" * 11), at=3))
    with pytest.raises(IntegrityError, match="expected 1 to 10 bytes, got 11"):
        await bench.variant()


async def test_an_empty_chunk_is_refused(bench: Bench) -> None:
    bench.break_next(changed(with_bytes(b""), at=3))
    with pytest.raises(IntegrityError, match="expected 1 to 10 bytes, got 0"):
        await bench.variant()


async def test_an_unknown_codec_is_refused(bench: Bench) -> None:
    bench.break_next(changed(lambda chunk: setattr(chunk, "codec", 77), at=3))
    with pytest.raises(IntegrityError, match="expected a codec that was asked for, got 77"):
        await bench.variant()


async def test_a_compressed_chunk_that_is_none_is_refused(bench: Bench) -> None:
    bench.break_next(changed(lambda chunk: setattr(chunk, "codec", pb.CODEC_ZSTD), at=3))
    with pytest.raises(IntegrityError):
        await bench.variant()


async def test_a_controller_that_sends_more_after_the_end_is_cut_off(bench: Bench) -> None:
    bench.break_next(lambda replies: [*replies, *replies, Silence()])
    await bench.variant()
    assert bench.store.is_complete(VARIANT.digest)


async def test_an_agent_that_is_told_to_come_back_comes_back(bench: Bench) -> None:
    def wait(replies: list[pb.FetchChunksReply]) -> list[pb.FetchChunksReply]:
        replies[0].grant.not_before.GetCurrentTime()
        return replies[:1]

    bench.shelf.faults.extend([wait, wait])
    await bench.variant()
    assert bench.shelf.asked_chunks == [ALL, ALL, ALL]


def recalled_after(chunks: int) -> Fault:
    """End the stream for the sake of others."""

    def apply(replies: list[pb.FetchChunksReply]) -> list[pb.FetchChunksReply]:
        recall = pb.FetchChunksReply(grant=pb.Grant())
        recall.grant.not_before.GetCurrentTime()
        return [*replies[: chunks + 1], recall]

    return apply


async def test_an_agent_that_is_told_to_make_room_comes_back_for_the_rest(bench: Bench) -> None:
    bench.shelf.faults.extend([recalled_after(3), recalled_after(2)])
    await bench.variant()
    assert bench.shelf.asked_chunks == [ALL, ALL[3:], ALL[5:]]
    assert bench.transfer.brought_bytes == 105


@pytest.mark.parametrize("chunks", range(1, 6))
async def test_what_came_before_a_stream_broke_is_counted_and_told(bench: Bench, chunks: int) -> None:
    bench.break_next(cut_after(chunks, Unavailable("connection reset")))
    with pytest.raises(Unavailable):
        await bench.variant()
    came_bytes = 5 + 10 * (chunks - 1)
    assert bench.progress[-1][:2] == (came_bytes, 105)
    assert bench.transfer.brought_bytes == bench.transfer.wire_bytes == came_bytes


async def test_a_manifest_larger_than_any_may_be_is_refused(bench: Bench) -> None:
    content = b" " * (MAX_MANIFEST_BYTES + 1)
    digest = digest_of(content)
    bench.shelf.hold(MadeVariant(VARIANT.manifest, digest, {digest: content}))
    with pytest.raises(IntegrityError, match=f"at most {MAX_MANIFEST_BYTES} bytes"):
        await bench.delivery.manifest(digest)


async def test_a_manifest_with_another_digest_is_refused(bench: Bench) -> None:
    bench.shelf.hold(MadeVariant(VARIANT.manifest, VARIANT.digest, {VARIANT.digest: b"{}"}))
    with pytest.raises(IntegrityError, match="fetch it again"):
        await bench.delivery.manifest(VARIANT.digest)


async def test_bytes_that_are_no_manifest_are_refused_for_good(bench: Bench) -> None:
    content = b"not a manifest"
    digest = digest_of(content)
    bench.shelf.hold(MadeVariant(VARIANT.manifest, digest, {digest: content}))
    with pytest.raises(InvalidManifest):
        await bench.variant(MadeVariant(VARIANT.manifest, digest, {}))


def lying(**update: object) -> MadeVariant:
    """Return a variant whose manifest says something wrong about its files."""
    files = tuple(file.model_copy(update=update) if file.path == "w.bin" else file for file in VARIANT.manifest.files)
    manifest = VARIANT.manifest.model_copy(update={"files": files})
    return MadeVariant(manifest, manifest.digest(), {**VARIANT.blobs, manifest.digest(): manifest.to_bytes()})


async def test_a_file_whose_chunks_make_another_is_refused_for_good(bench: Bench) -> None:
    liar = lying(digest=digest_of(b"another"))
    liar.blobs[digest_of(b"another")] = WEIGHTS
    bench.shelf.hold(liar)
    await bench.variant(liar)
    with pytest.raises(InvalidManifest, match="its chunks make"):
        bench.store.materialise(liar.manifest, liar.digest)
    assert not bench.store.has(digest_of(b"another"))
    assert list((bench.root / "partial").iterdir()) == []


async def test_an_empty_file_under_the_digest_of_another_is_refused_for_good(bench: Bench) -> None:
    files = (VARIANT.manifest.files[0].model_copy(update={"size_bytes": 0, "chunks": ()}), VARIANT.manifest.files[1])
    manifest = VARIANT.manifest.model_copy(update={"files": files})
    liar = MadeVariant(manifest, manifest.digest(), {**VARIANT.blobs, manifest.digest(): manifest.to_bytes()})
    bench.shelf.hold(liar)
    await bench.variant(liar)
    with pytest.raises(InvalidManifest, match="its chunks make"):
        bench.store.materialise(manifest, liar.digest)


async def test_a_file_that_claims_another_files_digest_is_refused_for_good(bench: Bench) -> None:
    files = (
        VARIANT.manifest.files[0],
        File(path="b", digest=digest_of(b"graph"), size_bytes=100, chunks=VARIANT.manifest.files[1].chunks),
    )
    manifest = VARIANT.manifest.model_copy(update={"files": files})
    liar = MadeVariant(manifest, manifest.digest(), {**VARIANT.blobs, manifest.digest(): manifest.to_bytes()})
    bench.shelf.hold(liar)
    with pytest.raises(InvalidManifest, match="expected 105 bytes of files, its blobs have 5"):
        await bench.variant(liar)


async def test_a_variant_without_chunks_is_not_made_for_agents(bench: Bench) -> None:
    liar = lying(chunks=())
    bench.shelf.hold(liar)
    with pytest.raises(InvalidManifest, match="expected chunks"):
        await bench.variant(liar)


async def test_a_variant_that_the_controller_lacks_is_not_found(bench: Bench) -> None:
    bench.shelf.drop(VARIANT)
    with pytest.raises(NotFound):
        await bench.variant()


async def test_too_little_room_is_refused_before_anything_is_fetched(tmp_path: Path, disk: ThreadPoolExecutor) -> None:
    bench = Bench(tmp_path, disk, free_bytes=1050)
    with pytest.raises(DiskFull, match="needs 105 bytes and 1000 in reserve, 1050 are free; free 55 more"):
        await bench.variant()
    assert bench.shelf.asked == []


async def test_room_that_was_taken_is_not_taken_again(tmp_path: Path, disk: ThreadPoolExecutor) -> None:
    roomy = Bench(tmp_path, disk)
    roomy.break_next(cut_after(2))
    with pytest.raises(Unavailable):
        await roomy.variant()
    tight = Bench(tmp_path, disk, free_bytes=1001)
    await tight.variant()
    assert tight.store.is_complete(VARIANT.digest)


async def test_progress_ends_with_everything_and_is_throttled(bench: Bench) -> None:
    await bench.variant()
    # Eleven chunks in far less than the interval: the first, and the end.
    assert len(bench.progress) == 2
    assert bench.progress[-1][:2] == (105, 105)
    assert bench.transfer.raw_chunks == 11
    assert bench.transfer.wire_bytes == bench.transfer.brought_bytes == 105


async def test_the_cost_of_a_variant_adds_up_over_attempts(bench: Bench) -> None:
    bench.break_next(cut_after(3))
    with pytest.raises(Unavailable):
        await bench.variant()
    await bench.variant()
    assert bench.transfer.raw_chunks == 11


@pytest.mark.parametrize("error", [InternalError("stream reset"), Unavailable("away")])
async def test_failures_of_the_transport_may_be_tried_again(bench: Bench, error: NanofleetError) -> None:
    bench.break_next(lambda _: [error])
    with pytest.raises(NanofleetError) as caught:
        await bench.variant()
    assert caught.value.code is ErrorCode.UNAVAILABLE


async def test_a_cancelled_delivery_leaves_no_stream_open(bench: Bench) -> None:
    arrived = asyncio.Event()

    def stall(replies: list[pb.FetchChunksReply]) -> list[Sent]:
        arrived.set()
        return [*replies[:3], Silence()]

    bench.break_next(stall)
    fetching = asyncio.create_task(bench.variant())
    await arrived.wait()
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert bench.calls.calls[-1].is_cancelled


async def test_a_file_of_no_bytes_is_delivered(bench: Bench) -> None:
    variant = made_variant({"model.onnx": b"graph", "empty.bin": b""}, version=3)
    bench.shelf.hold(variant)
    await bench.variant(variant)
    assert bench.store.has(Digest(digest_of(b"")))
    assert bench.store.is_complete(variant.digest)


async def test_a_metered_agent_asks_before_it_takes_whole_chunks(tmp_path: Path, disk: ThreadPoolExecutor) -> None:
    bench = Bench(tmp_path, disk, is_metered=True)
    with pytest.raises(PermissionRequired, match="whole chunks would take 105 bytes"):
        await bench.variant()
    bench.delivery.allow(VARIANT.digest)
    await bench.variant()
    assert [asked.is_delta_only for asked in bench.shelf.asked] == [True, False]


async def test_permissions_are_bounded_and_the_newest_count(tmp_path: Path, disk: ThreadPoolExecutor) -> None:
    bench = Bench(tmp_path, disk, is_metered=True)
    bench.delivery.allow(VARIANT.digest)
    for number in range(MAX_ALLOWED):
        bench.delivery.allow(digest_of(str(number).encode()))
    with pytest.raises(PermissionRequired):
        await bench.variant()


async def test_a_metered_agent_takes_differences_without_asking(tmp_path: Path, disk: ThreadPoolExecutor) -> None:
    bench = Bench(tmp_path, disk, is_metered=True)
    await bench.running(LARGE)
    bench.shelf.hold(NUDGED)
    await bench.variant(NUDGED)
    assert bench.store.is_complete(NUDGED.digest)


async def test_a_metered_agent_asks_before_it_replaces_a_useless_difference(
    tmp_path: Path, disk: ThreadPoolExecutor
) -> None:
    bench = Bench(tmp_path, disk, is_metered=True)
    await bench.running(LARGE)
    bench.shelf.hold(NUDGED)
    bench.break_next(changed(with_bytes(b"poison"), at=0))
    with pytest.raises(PermissionRequired, match="1 differences cannot be used, their chunks take up to 500 bytes"):
        await bench.variant(NUDGED)
    bench.delivery.allow(NUDGED.digest)
    await bench.variant(NUDGED)
    assert bench.store.is_complete(NUDGED.digest)
