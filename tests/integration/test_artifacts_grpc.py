"""Fetching blobs over a real connection: whole, from an offset, refused, left early."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import pytest

from controller.api.artifacts_grpc import ArtifactServicer
from controller.registry.blobs import BlobStore
from core.addresses import Address
from core.digest import Digest, digest_of
from core.grpc_transport import SERVER_OPTIONS, TransportCredentials, open_channel
from protos.artifacts.v1 import artifacts_pb2 as pb
from protos.artifacts.v1.artifacts_pb2_grpc import ArtifactServiceStub, add_ArtifactServiceServicer_to_server

MIB = 1 << 20
# Short enough for a test, long enough for a busy machine.
SEND_TIMEOUT_S = 0.5


class CountingBlobs:
    """A blob store that knows how many of its files are being read."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self.open_files = 0
        self.all_closed = asyncio.Event()

    async def size(self, digest: Digest) -> int:
        return await self._blobs.size(digest)

    async def open_range(self, digest: Digest, offset: int = 0) -> AsyncGenerator[bytes, None]:
        self.open_files += 1
        try:
            async for block in self._blobs.open_range(digest, offset):
                yield block
        finally:
            self.open_files -= 1
            self.all_closed.set()


@dataclass
class Source:
    store: BlobStore
    counting: CountingBlobs
    channel: grpc.aio.Channel

    async def fetch(self, digest: str, offset: int = 0) -> list[pb.Piece]:
        call = ArtifactServiceStub(self.channel).Fetch(pb.FetchRequest(digest=digest, offset=offset), timeout=20)
        return [chunk async for chunk in call]


@pytest.fixture
async def source(tmp_path: Path) -> AsyncIterator[Source]:
    store = BlobStore(tmp_path)
    await store.prepare()
    counting = CountingBlobs(store)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    add_ArtifactServiceServicer_to_server(ArtifactServicer(counting, send_timeout_s=SEND_TIMEOUT_S), server)
    port = server.add_secure_port("127.0.0.1:0", TransportCredentials.local().server)
    await server.start()
    channel = open_channel(Address("127.0.0.1", port), TransportCredentials.local())
    yield Source(store, counting, channel)
    await channel.close()
    await server.stop(None)
    await store.close()


def blob_of(size_bytes: int) -> bytes:
    return bytes(index * 7 % 251 for index in range(1000)) * (size_bytes // 1000 + 1)


async def test_a_blob_comes_in_chunks_of_at_most_one_mebibyte(source: Source) -> None:
    content = blob_of(5 * MIB // 2)[: 5 * MIB // 2]
    digest = await source.store.put_bytes(content)

    chunks = await source.fetch(digest)

    assert b"".join(chunk.data for chunk in chunks) == content
    assert [len(chunk.data) for chunk in chunks] == [MIB, MIB, MIB // 2]
    assert [chunk.offset for chunk in chunks] == [0, MIB, 2 * MIB]
    assert {chunk.total_bytes for chunk in chunks} == {len(content)}


@pytest.mark.parametrize("offset", [1, 999, MIB, MIB + 1, 2 * MIB - 1])
async def test_a_fetch_resumes_at_its_offset(source: Source, offset: int) -> None:
    content = blob_of(2 * MIB)[: 2 * MIB]
    digest = await source.store.put_bytes(content)

    chunks = await source.fetch(digest, offset)

    assert b"".join(chunk.data for chunk in chunks) == content[offset:]
    assert chunks[0].offset == offset


@pytest.mark.parametrize("content", [b"", b"abc"])
async def test_an_offset_at_the_end_gives_one_empty_chunk_with_the_size(source: Source, content: bytes) -> None:
    digest = await source.store.put_bytes(content)

    chunks = await source.fetch(digest, len(content))

    assert chunks == [pb.Piece(offset=len(content), total_bytes=len(content))]


@pytest.mark.parametrize(
    ("digest", "offset", "status"),
    [
        (digest_of(b"never uploaded"), 0, grpc.StatusCode.NOT_FOUND),
        (digest_of(b"abc"), 4, grpc.StatusCode.OUT_OF_RANGE),
        (digest_of(b"abc"), (1 << 64) - 1, grpc.StatusCode.OUT_OF_RANGE),
        ("sha256:../../etc/passwd", 0, grpc.StatusCode.INVALID_ARGUMENT),
        ("", 0, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_what_cannot_be_sent_is_refused(
    source: Source, digest: str, offset: int, status: grpc.StatusCode
) -> None:
    await source.store.put_bytes(b"abc")

    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await source.fetch(digest, offset)

    assert refused.value.code() is status


async def test_a_client_that_leaves_early_frees_the_file(source: Source) -> None:
    digest = await source.store.put_bytes(blob_of(40 * MIB))
    call = ArtifactServiceStub(source.channel).Fetch(pb.FetchRequest(digest=digest), timeout=20)
    await call.read()
    call.cancel()

    async with asyncio.timeout(10):
        await source.counting.all_closed.wait()

    assert source.counting.open_files == 0


async def test_a_client_that_stops_reading_is_cut_off(source: Source) -> None:
    """I11: a stream that nobody reads must not hold a file for ever."""
    digest = await source.store.put_bytes(blob_of(40 * MIB))
    call = ArtifactServiceStub(source.channel).Fetch(pb.FetchRequest(digest=digest), timeout=20)
    await call.read()

    async with asyncio.timeout(10):
        await source.counting.all_closed.wait()

    assert source.counting.open_files == 0
    call.cancel()
