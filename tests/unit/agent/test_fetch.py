"""Fetch: nothing that the server sends is believed, and nothing that arrived is asked for twice."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from core.clock import SystemClock
from core.digest import Digest, digest_of
from core.errors import (
    ErrorCode,
    IntegrityError,
    InternalError,
    InvalidManifest,
    NanofleetError,
    NotFound,
    TooLarge,
    Unavailable,
)
from core.manifest import MAX_MANIFEST_BYTES, File
from edge_agent.sync.fetch import Fetch, FetchLimits
from edge_agent.sync.store import ContentStore
from protos.artifacts.v1 import artifacts_pb2 as pb
from tests.support.shelf import Fault, Sent, Shelf, ShelfStub, Silence
from tests.support.variants import MadeVariant, made_variant

WEIGHTS = bytes(range(100))
VARIANT = made_variant({"model.onnx": b"graph", "w.bin": WEIGHTS})
WEIGHTS_DIGEST = digest_of(WEIGHTS)


class Bench:
    """A store, a shelf and a Fetch between them."""

    def __init__(self, root: Path, disk: ThreadPoolExecutor, *, free_bytes: int = 1 << 30) -> None:
        self.shelf = Shelf(VARIANT, chunk_bytes=10)
        self.stub = ShelfStub(self.shelf)
        self.store = ContentStore(root, free_bytes=lambda _: free_bytes)
        self.progress: list[tuple[int, int]] = []
        limits = FetchLimits(chunk_timeout_s=0.05, reserve_bytes=1000)
        self._fetch = Fetch(self.stub, self.store, disk=disk, limits=limits, clock=SystemClock())

    async def variant(self, variant: MadeVariant = VARIANT) -> None:
        await self._fetch.variant(variant.digest, lambda stored, total, _: self.progress.append((stored, total)))

    def break_weights(self, fault: Fault) -> None:
        """Let the transfer of the weights, the third blob, go wrong."""
        self.shelf.faults.extend([list, list, fault])


@pytest.fixture
def disk() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture
def bench(tmp_path: Path, disk: ThreadPoolExecutor) -> Bench:
    return Bench(tmp_path, disk)


def cut_after(count: int, then: Sent | None = None) -> Fault:
    return lambda chunks: [*chunks[:count], *([then] if then is not None else [])]


def changed(change: Callable[[pb.Piece], None], *, at: int) -> Fault:
    def apply(chunks: list[pb.Piece]) -> Sequence[Sent]:
        change(chunks[at])
        return chunks

    return apply


async def test_manifest_and_every_file_arrive(bench: Bench) -> None:
    await bench.variant()
    assert bench.store.is_complete(VARIANT.digest)


async def test_every_call_is_cancelled_when_it_is_over(bench: Bench) -> None:
    await bench.variant()
    assert [call.is_cancelled for call in bench.stub.calls] == [True, True, True]


async def test_what_is_here_is_not_asked_for_again(bench: Bench) -> None:
    await bench.variant()
    asked = len(bench.shelf.asked)
    await bench.variant()
    assert len(bench.shelf.asked) == asked


async def test_files_shared_with_another_variant_are_not_asked_for_again(bench: Bench) -> None:
    await bench.variant()
    sibling = made_variant({"model.onnx": b"other graph", "w.bin": WEIGHTS}, version=2)
    bench.shelf.hold(sibling)
    await bench.variant(sibling)
    assert bench.shelf.asked_for(WEIGHTS_DIGEST) == [0]


async def test_a_broken_transfer_goes_on_where_it_stopped(bench: Bench) -> None:
    bench.break_weights(cut_after(3, Unavailable("connection reset")))
    with pytest.raises(Unavailable):
        await bench.variant()
    await bench.variant()
    assert bench.shelf.asked_for(WEIGHTS_DIGEST) == [0, 30]
    assert bench.store.is_complete(VARIANT.digest)


async def test_an_early_end_is_noticed_and_resumed(bench: Bench) -> None:
    bench.break_weights(cut_after(9))
    with pytest.raises(Unavailable, match="ended at 90 of 100 bytes"):
        await bench.variant()
    await bench.variant()
    assert bench.shelf.asked_for(WEIGHTS_DIGEST) == [0, 90]


async def test_a_silent_server_is_left(bench: Bench) -> None:
    bench.break_weights(cut_after(2, Silence()))
    with pytest.raises(Unavailable, match=r"expected a chunk within 0\.05 s"):
        await bench.variant()
    assert bench.stub.calls[-1].is_cancelled
    assert bench.store.partial_bytes(WEIGHTS_DIGEST) == 20


async def test_corrupt_bytes_are_refused_and_fetched_afresh(bench: Bench) -> None:
    bench.break_weights(changed(lambda chunk: setattr(chunk, "data", b"x" * 10), at=4))
    with pytest.raises(IntegrityError, match=f"expected {WEIGHTS_DIGEST}"):
        await bench.variant()
    await bench.variant()
    assert bench.shelf.asked_for(WEIGHTS_DIGEST) == [0, 0]


async def test_a_gap_is_refused(bench: Bench) -> None:
    bench.break_weights(lambda chunks: [*chunks[:2], *chunks[3:]])
    with pytest.raises(IntegrityError, match="expected the chunk at offset 20, got 30"):
        await bench.variant()


async def test_an_overlap_is_refused(bench: Bench) -> None:
    bench.break_weights(lambda chunks: [*chunks[:2], *chunks[1:]])
    with pytest.raises(IntegrityError, match="expected the chunk at offset 20, got 10"):
        await bench.variant()


async def test_another_total_than_the_manifest_says_is_refused(bench: Bench) -> None:
    bench.break_weights(changed(lambda chunk: setattr(chunk, "total_bytes", 1 << 40), at=0))
    with pytest.raises(IntegrityError, match="expected a total of 100 bytes, got 1099511627776"):
        await bench.variant()


async def test_a_chunk_beyond_the_end_is_refused_before_it_is_kept(bench: Bench) -> None:
    bench.break_weights(changed(lambda chunk: setattr(chunk, "data", b"x" * 200), at=9))
    with pytest.raises(IntegrityError, match="at most 10 bytes, got 200"):
        await bench.variant()
    assert bench.store.partial_bytes(WEIGHTS_DIGEST) == 90


async def test_empty_chunks_do_not_keep_a_transfer_alive(bench: Bench) -> None:
    bench.break_weights(changed(lambda chunk: setattr(chunk, "data", b""), at=2))
    with pytest.raises(IntegrityError, match="bytes in every chunk"):
        await bench.variant()


async def test_a_server_that_sends_more_after_the_end_is_cut_off(bench: Bench) -> None:
    bench.break_weights(lambda chunks: [*chunks, *chunks, Silence()])
    await bench.variant()
    assert bench.store.is_complete(VARIANT.digest)


async def test_a_partial_longer_than_the_file_is_discarded(bench: Bench) -> None:
    bench.store.append(WEIGHTS_DIGEST, b"x" * 500, offset=0)
    await bench.variant()
    assert bench.shelf.asked_for(WEIGHTS_DIGEST) == [0]


async def test_a_whole_partial_is_verified_without_asking(bench: Bench) -> None:
    bench.store.append(WEIGHTS_DIGEST, WEIGHTS, offset=0)
    await bench.variant()
    assert bench.shelf.asked_for(WEIGHTS_DIGEST) == []


async def test_an_offset_past_the_end_makes_it_start_afresh(bench: Bench) -> None:
    bench.store.append(VARIANT.digest, b"x" * 5000, offset=0)
    with pytest.raises(IntegrityError, match="fetched anew"):
        await bench.variant()
    await bench.variant()
    assert bench.shelf.asked_for(VARIANT.digest) == [5000, 0]


async def test_a_manifest_larger_than_any_may_be_is_refused(bench: Bench) -> None:
    bench.shelf.faults.append(changed(lambda chunk: setattr(chunk, "total_bytes", MAX_MANIFEST_BYTES + 1), at=0))
    with pytest.raises(IntegrityError, match=f"at most {MAX_MANIFEST_BYTES} bytes"):
        await bench.variant()


async def test_bytes_that_are_no_manifest_are_refused_for_good(bench: Bench) -> None:
    digest = bench.shelf.put(b"not a manifest")
    with pytest.raises(InvalidManifest):
        await bench._fetch.variant(digest, lambda *_: None)


async def test_a_manifest_that_contradicts_itself_is_refused(bench: Bench) -> None:
    files = (
        File(path="a", digest=digest_of(b"same"), size_bytes=4),
        File(path="b", digest=digest_of(b"same"), size_bytes=5),
    )
    manifest = VARIANT.manifest.model_copy(update={"files": files, "entry": "a"})
    digest = bench.shelf.put(manifest.to_bytes())
    bench.shelf.put(b"same")
    with pytest.raises(InvalidManifest, match="expected 9 bytes of files, its blobs have 4"):
        await bench._fetch.variant(digest, lambda *_: None)


async def test_a_blob_that_the_controller_lacks_is_not_found(bench: Bench) -> None:
    del bench.shelf.blobs[WEIGHTS_DIGEST]
    with pytest.raises(NotFound):
        await bench.variant()


async def test_too_little_room_is_refused_before_anything_is_fetched(tmp_path: Path, disk: ThreadPoolExecutor) -> None:
    bench = Bench(tmp_path, disk, free_bytes=1050)
    with pytest.raises(TooLarge, match="needs 105 bytes and 1000 in reserve, 1050 are free; free 55 more"):
        await bench.variant()
    assert bench.shelf.asked_for(WEIGHTS_DIGEST) == []


async def test_what_is_here_needs_no_room(tmp_path: Path, disk: ThreadPoolExecutor) -> None:
    bench = Bench(tmp_path, disk, free_bytes=1050)
    bench.store.append(WEIGHTS_DIGEST, WEIGHTS[:60], offset=0)
    await bench.variant()
    assert bench.store.is_complete(VARIANT.digest)


async def test_progress_ends_with_everything(bench: Bench) -> None:
    await bench.variant()
    assert bench.progress[-1] == (105, 105)
    assert all(stored <= 105 for stored, _ in bench.progress)


async def test_progress_is_throttled(bench: Bench) -> None:
    await bench.variant()
    # Eleven chunks in far less than the interval: the first, and the end.
    assert len(bench.progress) == 2


@pytest.mark.parametrize("error", [InternalError("stream reset"), Unavailable("away")])
async def test_failures_of_the_transport_may_be_tried_again(bench: Bench, error: NanofleetError) -> None:
    bench.shelf.faults.append(lambda _: [error])
    with pytest.raises(NanofleetError) as caught:
        await bench.variant()
    assert caught.value.code is ErrorCode.UNAVAILABLE


async def test_a_cancelled_fetch_leaves_no_stream_open(bench: Bench) -> None:
    bench.break_weights(cut_after(2, Silence()))
    fetching = asyncio.create_task(bench.variant())
    while bench.store.partial_bytes(WEIGHTS_DIGEST) < 20:
        await asyncio.sleep(0)
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert bench.stub.calls[-1].is_cancelled


async def test_a_file_of_no_bytes_is_fetched(bench: Bench) -> None:
    variant = made_variant({"model.onnx": b"graph", "empty.bin": b""}, version=3)
    bench.shelf.hold(variant)
    await bench.variant(variant)
    assert bench.store.has(Digest(digest_of(b"")))
    assert bench.store.is_complete(variant.digest)
