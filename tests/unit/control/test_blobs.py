"""The blob store: a name that exists is whole and true."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from controller.registry.blobs import BLOCK_BYTES, BlobStore
from core.digest import Digest, digest_of
from core.errors import IntegrityError, InvalidRequest, NotFound, TooLarge, Unavailable

CONTENT = bytes(range(256)) * 5000


@pytest.fixture
async def blobs(tmp_path: Path) -> AsyncIterator[BlobStore]:
    store = BlobStore(tmp_path / "blobs")
    await store.prepare()
    yield store
    await store.close()


async def stream(content: bytes, *, block_bytes: int = 65536) -> AsyncIterator[bytes]:
    for start in range(0, len(content), block_bytes):
        yield content[start : start + block_bytes]


async def read(blobs: BlobStore, digest: Digest, offset: int = 0) -> bytes:
    async with aclosing(blobs.open_range(digest, offset)) as blocks:
        return b"".join([block async for block in blocks])


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


async def test_a_stream_is_stored_under_its_digest(blobs: BlobStore, tmp_path: Path) -> None:
    digest = digest_of(CONTENT)

    assert await blobs.put_stream(digest, stream(CONTENT), max_bytes=len(CONTENT))

    name = digest.removeprefix("sha256:")
    assert files(tmp_path) == [tmp_path / "blobs" / "sha256" / name[:2] / name]
    assert (await blobs.size(digest), await read(blobs, digest)) == (len(CONTENT), CONTENT)


async def test_storing_it_again_says_that_it_is_not_new(blobs: BlobStore) -> None:
    digest = await blobs.put_bytes(b"x")

    assert not await blobs.put_stream(digest, stream(b"x"), max_bytes=1)


async def test_concurrent_uploads_of_one_digest_all_succeed(blobs: BlobStore, tmp_path: Path) -> None:
    digest = digest_of(CONTENT)

    await asyncio.gather(
        *(blobs.put_stream(digest, stream(CONTENT, block_bytes=size), max_bytes=1 << 30) for size in (999, 5000, 65536))
    )

    assert await read(blobs, digest) == CONTENT
    assert len(files(tmp_path)) == 1


async def test_other_bytes_than_announced_leave_nothing(blobs: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError):
        await blobs.put_stream(digest_of(b"other"), stream(CONTENT), max_bytes=1 << 30)

    assert files(tmp_path) == []


async def test_more_bytes_than_allowed_leave_nothing(blobs: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(TooLarge):
        await blobs.put_stream(digest_of(CONTENT), stream(CONTENT), max_bytes=len(CONTENT) - 1)

    assert files(tmp_path) == []


async def test_a_cancelled_upload_leaves_nothing(blobs: BlobStore, tmp_path: Path) -> None:
    started = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield CONTENT
        started.set()
        await asyncio.Event().wait()

    upload = asyncio.create_task(blobs.put_stream(digest_of(CONTENT), endless(), max_bytes=1 << 30))
    await started.wait()
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload

    assert files(tmp_path) == []


async def test_preparing_removes_what_was_left_half_written(blobs: BlobStore, tmp_path: Path) -> None:
    digest = await blobs.put_bytes(b"whole")
    (tmp_path / "blobs" / "tmp" / "half").mkdir()
    (tmp_path / "blobs" / "tmp" / "half" / "upload").write_bytes(b"hal")

    await blobs.prepare()

    assert files(tmp_path) == [blobs.path(digest)]


@pytest.mark.parametrize("offset", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, len(CONTENT)])
async def test_reading_starts_at_the_offset(blobs: BlobStore, offset: int) -> None:
    digest = await blobs.put_bytes(CONTENT)

    assert await read(blobs, digest, offset) == CONTENT[offset:]


async def test_blocks_are_at_most_a_mebibyte(blobs: BlobStore) -> None:
    digest = await blobs.put_bytes(CONTENT)

    assert [len(block) async for block in blobs.open_range(digest)] == [BLOCK_BYTES, len(CONTENT) - BLOCK_BYTES]


async def test_a_file_of_a_scratch_folder_is_taken_over(blobs: BlobStore) -> None:
    async with blobs.scratch() as folder:
        (folder / "made").write_bytes(b"made")
        digest = await blobs.put_file(folder / "made")

    assert (digest, await read(blobs, digest)) == (digest_of(b"made"), b"made")
    assert not folder.exists()


async def test_a_copy_shares_nothing_with_its_blob(blobs: BlobStore) -> None:
    digest = await blobs.put_bytes(b"model")

    async with blobs.scratch() as folder:
        await blobs.copy(digest, folder / "deep" / "model.onnx")
        (folder / "deep" / "model.onnx").write_bytes(b"other")

    assert await read(blobs, digest) == b"model"


async def test_what_is_not_there_is_not_found(blobs: BlobStore, tmp_path: Path) -> None:
    digest = digest_of(b"missing")

    assert not await blobs.has(digest)
    with pytest.raises(NotFound):
        await blobs.size(digest)
    with pytest.raises(NotFound):
        await read(blobs, digest)
    with pytest.raises(NotFound):
        await blobs.copy(digest, tmp_path / "target")


@pytest.mark.parametrize("digest", ["sha256:../../etc/passwd", "sha256:" + "A" * 64, "../" * 30, ""])
async def test_no_digest_leads_out_of_the_store(blobs: BlobStore, digest: str) -> None:
    with pytest.raises(InvalidRequest):
        blobs.path(Digest(digest))


async def test_a_full_disk_is_unavailable_and_says_what_to_do(blobs: BlobStore) -> None:
    digest = await blobs.put_bytes(CONTENT)

    with pytest.raises(Unavailable, match="disk: No space left on device; free some space and try again"):
        await blobs.copy(digest, Path("/dev/full"))


async def test_a_broken_folder_is_unavailable(blobs: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "blobs" / "tmp").rmdir()
    (tmp_path / "blobs" / "tmp").write_bytes(b"")

    with pytest.raises(Unavailable, match="disk: Not a directory"):
        await blobs.put_stream(digest_of(CONTENT), stream(CONTENT), max_bytes=len(CONTENT))
