"""Packs, built by the real child process from real files and read back."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from controller.transfer.builder import ChildBuilder
from controller.transfer.model import Codec, Encoded, Packs
from controller.transfer.packs import PackId
from controller.transfer.shelf import PackShelf
from core.chunks import chunks_of
from core.delta import decode_difference, decompress
from core.digest import digest_of
from core.errors import IntegrityError, InvalidManifest, NotFound, Unavailable
from core.manifest import Manifest
from tests.support.delivered_variants import FolderBlobs, Made, make_variant, model_of, weights

TEXT = b"one vocabulary for all versions\n" * 2000


@pytest.fixture
def blobs(tmp_path: Path) -> FolderBlobs:
    return FolderBlobs(tmp_path / "blobs")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "packs"


@pytest.fixture
async def shelf(root: Path, blobs: FolderBlobs) -> AsyncIterator[PackShelf]:
    shelf = PackShelf(root, ChildBuilder(root, blobs))
    await shelf.clean()
    yield shelf
    await shelf.close()


def made(blobs: FolderBlobs, version: int, changed: int = 0) -> Made:
    contents = {"model.onnx": model_of(weights(changed), weights(name="frozen")), "vocabulary.txt": TEXT}
    return make_variant(blobs, contents, version=version)


def decoded(encoded: Encoded, size_bytes: int, source: Made | None = None) -> bytes:
    match encoded.codec:
        case Codec.RAW:
            return bytes(encoded.data)
        case Codec.ZSTD:
            return decompress(bytes(encoded.data), size_bytes=size_bytes)
        case Codec.DIFFERENCE:
            assert source is not None
            assert encoded.source_manifest == source.digest
            return decode_difference(source.chunk(encoded.source_index), bytes(encoded.data), size_bytes=size_bytes)


async def test_every_chunk_comes_back_from_the_full_pack(shelf: PackShelf, blobs: FolderBlobs) -> None:
    variant = made(blobs, 1)
    await shelf.prepare(variant.manifest, [])
    packs: Packs = shelf
    for ref in chunks_of(variant.manifest):
        encoded = await packs.encoded(variant.digest, ref.index, [])
        assert not encoded.is_delta
        assert decoded(encoded, ref.size_bytes) == variant.chunk(ref.index)


async def test_every_chunk_comes_back_from_a_delta(shelf: PackShelf, blobs: FolderBlobs) -> None:
    before, after = made(blobs, 1), made(blobs, 2, changed=500)
    await shelf.prepare(after.manifest, [before.manifest])
    codecs = set()
    for ref in chunks_of(after.manifest):
        encoded = await shelf.encoded(after.digest, ref.index, [before.digest])
        codecs.add(encoded.codec)
        assert decoded(encoded, ref.size_bytes, before) == after.chunk(ref.index)
    assert Codec.DIFFERENCE in codecs


async def test_a_delta_sends_what_changed_and_nothing_else(shelf: PackShelf, blobs: FolderBlobs) -> None:
    before, after = made(blobs, 1), made(blobs, 2, changed=500)
    await shelf.prepare(after.manifest, [before.manifest])
    sizes = await shelf.sizes(after.digest, [before.digest])
    assert sizes.has_delta
    assert sizes.wire_bytes < 1000
    assert sizes.plain_bytes == after.manifest.size_bytes
    assert sizes.full_bytes > 100 * sizes.wire_bytes
    assert (await shelf.sizes(after.digest, [])).wire_bytes == sizes.full_bytes


async def test_a_delta_to_a_variant_that_the_agent_does_not_hold_is_not_used(
    shelf: PackShelf, blobs: FolderBlobs
) -> None:
    before, after = made(blobs, 1), made(blobs, 2, changed=500)
    await shelf.prepare(after.manifest, [before.manifest])
    encoded = [await shelf.encoded(after.digest, ref.index, []) for ref in chunks_of(after.manifest)]
    assert Codec.DIFFERENCE not in {each.codec for each in encoded}


async def test_the_smallest_of_several_deltas_is_sent(shelf: PackShelf, blobs: FolderBlobs) -> None:
    far, near, after = made(blobs, 1), made(blobs, 2, changed=9_000), made(blobs, 3, changed=9_100)
    await shelf.prepare(after.manifest, [far.manifest, near.manifest])
    encoded = [
        await shelf.encoded(after.digest, ref.index, [far.digest, near.digest]) for ref in chunks_of(after.manifest)
    ]
    assert {each.source_manifest for each in encoded if each.codec is Codec.DIFFERENCE} == {near.digest}


async def test_a_delta_that_saves_too_little_is_remembered_as_useless(
    shelf: PackShelf, blobs: FolderBlobs, root: Path
) -> None:
    before = make_variant(blobs, {"model.onnx": os.urandom(200_000)}, version=1)
    after = make_variant(blobs, {"model.onnx": os.urandom(200_000)}, version=2)
    await shelf.prepare(after.manifest, [before.manifest])
    assert not (await shelf.sizes(after.digest, [before.digest])).has_delta
    assert PackId(after.digest, before.digest).path(root).stat().st_size < 200


async def test_an_empty_file_is_no_trouble(shelf: PackShelf, blobs: FolderBlobs) -> None:
    variant = make_variant(blobs, {"model.onnx": model_of(weights()), "empty": b""})
    await shelf.prepare(variant.manifest, [])
    assert (await shelf.sizes(variant.digest, [])).plain_bytes == variant.manifest.size_bytes


async def test_what_is_not_prepared_is_not_found(shelf: PackShelf, blobs: FolderBlobs) -> None:
    variant = made(blobs, 1)
    with pytest.raises(NotFound, match="not prepared"):
        await shelf.encoded(variant.digest, 0, [])
    await shelf.prepare(variant.manifest, [])
    with pytest.raises(NotFound, match="expected one of"):
        await shelf.encoded(variant.digest, 1000, [])


async def test_a_variant_without_chunks_is_not_prepared(shelf: PackShelf, blobs: FolderBlobs) -> None:
    manifest = made(blobs, 1).manifest
    files = tuple(file.model_copy(update={"chunks": ()}) for file in manifest.files)
    with pytest.raises(InvalidManifest, match="expected chunks"):
        await shelf.prepare(manifest.model_copy(update={"files": files}), [])


async def test_a_missing_blob_is_not_found(shelf: PackShelf, blobs: FolderBlobs) -> None:
    variant = made(blobs, 1)
    blobs.path(digest_of(TEXT)).unlink()
    with pytest.raises(NotFound, match="vocabulary"):
        await shelf.prepare(variant.manifest, [])


async def test_a_damaged_blob_is_not_packed(shelf: PackShelf, blobs: FolderBlobs, root: Path) -> None:
    variant = made(blobs, 1)
    blobs.path(digest_of(TEXT)).write_bytes(TEXT[::-1])
    with pytest.raises(Unavailable, match="damaged in the blob store"):
        await shelf.prepare(variant.manifest, [])
    assert not PackId(variant.digest).path(root).exists()
    assert list((root / "tmp").iterdir()) == []


@pytest.mark.parametrize("keep_bytes", [0, 50, 200, -1])
async def test_a_pack_that_was_cut_off_is_dropped_and_built_again(
    shelf: PackShelf, blobs: FolderBlobs, root: Path, keep_bytes: int
) -> None:
    variant = made(blobs, 1)
    await shelf.prepare(variant.manifest, [])
    path = PackId(variant.digest).path(root)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:keep_bytes])
    fresh = PackShelf(root, ChildBuilder(root, blobs))
    with pytest.raises(IntegrityError, match="damaged"):
        await fresh.encoded(variant.digest, 0, [])
    await fresh.prepare(variant.manifest, [])
    assert decoded(await fresh.encoded(variant.digest, 0, []), len(variant.chunk(0))) == variant.chunk(0)
    await fresh.close()


async def test_a_changed_index_is_noticed(shelf: PackShelf, blobs: FolderBlobs, root: Path) -> None:
    variant = made(blobs, 1)
    await shelf.prepare(variant.manifest, [])
    path = PackId(variant.digest).path(root)
    content = bytearray(path.read_bytes())
    content[90] ^= 1
    path.write_bytes(content)
    fresh = PackShelf(root, ChildBuilder(root, blobs))
    with pytest.raises(IntegrityError, match="digest differ"):
        await fresh.sizes(variant.digest, [])
    await fresh.close()


async def test_half_written_packs_are_gone_after_a_start(root: Path, blobs: FolderBlobs) -> None:
    (root / "tmp" / "old").mkdir(parents=True)
    (root / "tmp" / "old" / "pack").write_bytes(b"half")
    shelf = PackShelf(root, ChildBuilder(root, blobs))
    await shelf.clean()
    assert list((root / "tmp").iterdir()) == []
    await shelf.close()


class CountingBuilder:
    """Counts what is built, by the real builder."""

    def __init__(self, builder: ChildBuilder) -> None:
        self._builder = builder
        self.built: list[tuple[int, int | None]] = []

    async def build(self, variant: Manifest, source: Manifest | None = None) -> None:
        self.built.append((variant.version, None if source is None else source.version))
        await self._builder.build(variant, source)


async def test_a_pack_is_built_once_for_all_who_ask(root: Path, blobs: FolderBlobs) -> None:
    builder = CountingBuilder(ChildBuilder(root, blobs))
    shelf = PackShelf(root, builder)
    await shelf.clean()
    before, after = made(blobs, 1), made(blobs, 2, changed=500)
    await asyncio.gather(*(shelf.prepare(after.manifest, [before.manifest]) for _ in range(3)))
    assert builder.built == [(2, None), (2, 1)]
    await shelf.close()


async def test_packs_that_were_not_used_for_longest_make_room(root: Path, blobs: FolderBlobs) -> None:
    shelf = PackShelf(root, ChildBuilder(root, blobs), max_bytes=1)
    await shelf.clean()
    old, new = made(blobs, 1), made(blobs, 2)
    await shelf.prepare(old.manifest, [])
    await shelf.prepare(new.manifest, [old.manifest])
    assert not PackId(old.digest).path(root).exists()
    assert PackId(new.digest).path(root).exists()
    assert PackId(new.digest, old.digest).path(root).exists()
    await shelf.close()


async def test_cancelling_a_preparation_ends_its_process_and_leaves_nothing(root: Path, blobs: FolderBlobs) -> None:
    shelf = PackShelf(root, ChildBuilder(root, blobs))
    await shelf.clean()
    variant = made(blobs, 1)
    task = asyncio.create_task(shelf.prepare(variant.manifest, []))
    async with asyncio.timeout(10):
        while not any((root / "tmp").iterdir()):
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list((root / "tmp").iterdir()) == []
    assert not PackId(variant.digest).path(root).exists()
    await shelf.prepare(variant.manifest, [])
    await shelf.close()


async def test_a_build_over_its_memory_bound_ends_and_says_so(root: Path, blobs: FolderBlobs) -> None:
    shelf = PackShelf(root, ChildBuilder(root, blobs, memory_bytes=1 << 20))
    await shelf.clean()
    with pytest.raises(Unavailable, match="ended with"):
        await shelf.prepare(made(blobs, 1).manifest, [])
    await shelf.close()
