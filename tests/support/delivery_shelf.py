"""The controller's side of delivery, in memory: variants served by chunks, and wrongly where a test asks for it.

`ShelfCalls` takes the place of the generated stub, without a socket; `DeliveryShelfServicer` serves the same shelf over
real gRPC.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

import grpc
import grpc.aio

from core.chunks import chunks_of
from core.delta import compress, encode_difference
from core.digest import Digest
from core.errors import NanofleetError, NotFound, PermissionRequired
from core.status import STATUS
from protos.artifacts.v1 import artifacts_pb2 as pb
from protos.artifacts.v1.artifacts_pb2_grpc import DeliveryServiceServicer
from tests.support.variants import MadeVariant


class Silence:
    """The server says nothing any more."""


Sent = pb.FetchChunksReply | NanofleetError | Silence
# Turns what one request should get, the grant first, into what it gets.
Fault = Callable[[list[pb.FetchChunksReply]], Sequence[Sent]]


class Asked(NamedTuple):
    manifest: str
    chunks: list[int]
    held: list[str]
    is_delta_only: bool


class DeliveryShelf:
    """`codec` is how chunks go when they do not go as differences to the first variant that the agent holds."""

    def __init__(self, *variants: MadeVariant, codec: "pb.Codec.ValueType" = pb.CODEC_RAW) -> None:
        self.asked: list[Asked] = []
        self.asked_manifests: list[str] = []
        # One per request for chunks to come, first come first served; a NotFound for manifests stands in `missing`.
        self.faults: deque[Fault] = deque()
        self.open_streams = 0
        self._codec = codec
        self._variants: dict[str, MadeVariant] = {}
        for variant in variants:
            self.hold(variant)

    def hold(self, variant: MadeVariant) -> None:
        self._variants[variant.digest] = variant

    def drop(self, variant: MadeVariant) -> None:
        del self._variants[variant.digest]

    @property
    def asked_chunks(self) -> list[list[int]]:
        return [asked.chunks for asked in self.asked]

    def manifest(self, request: pb.FetchManifestRequest) -> pb.FetchManifestReply:
        self.asked_manifests.append(request.digest)
        variant = self._variant(request.digest)
        return pb.FetchManifestReply(content=variant.blobs[variant.digest])

    async def stream(self, request: pb.FetchChunksRequest) -> AsyncIterator[pb.FetchChunksReply]:
        indexes = [each.first + at for each in request.ranges for at in range(each.count)]
        self.asked.append(Asked(request.manifest_digest, indexes, list(request.held_manifests), request.delta_only))
        self.open_streams += 1
        try:
            replies = self._replies(request, indexes)
            for sent in self.faults.popleft()(replies) if self.faults else replies:
                if isinstance(sent, NanofleetError):
                    raise sent
                if isinstance(sent, Silence):
                    await asyncio.Event().wait()
                else:
                    yield sent
        finally:
            self.open_streams -= 1

    def _replies(self, request: pb.FetchChunksRequest, indexes: list[int]) -> list[pb.FetchChunksReply]:
        contents = chunk_contents(self._variant(request.manifest_digest))
        source = next((self._variants[held] for held in request.held_manifests if held in self._variants), None)
        if source is None and request.delta_only:
            raise PermissionRequired(f"whole chunks would take {sum(len(contents[at]) for at in indexes)} bytes")
        grant = pb.FetchChunksReply(grant=pb.Grant())
        return [grant, *(pb.FetchChunksReply(chunk=self._chunk(at, contents[at], source)) for at in indexes)]

    def _chunk(self, index: int, content: bytes, source: MadeVariant | None) -> pb.EncodedChunk:
        if source is not None:
            sources = chunk_contents(source)
            at = min(index, len(sources) - 1)
            data = encode_difference(sources[at], content, width=1)
            if len(data) <= len(content):
                return pb.EncodedChunk(
                    index=index,
                    codec=pb.CODEC_DIFFERENCE,
                    data=data,
                    source_manifest=source.digest,
                    source_index=at,
                )
        packed = compress(content)
        if self._codec == pb.CODEC_ZSTD and len(packed) <= len(content):
            return pb.EncodedChunk(index=index, codec=pb.CODEC_ZSTD, data=packed)
        return pb.EncodedChunk(index=index, codec=pb.CODEC_RAW, data=content)

    def _variant(self, digest: str) -> MadeVariant:
        if digest not in self._variants:
            raise NotFound(f"no variant {digest}")
        return self._variants[digest]


def chunk_contents(variant: MadeVariant) -> list[bytes]:
    """Return the bytes of every chunk of a variant."""
    return [
        variant.blobs[Digest(ref.file.digest)][ref.offset : ref.offset + ref.size_bytes]
        for ref in chunks_of(variant.manifest)
    ]


class ShelfCall:
    """One call over the stub: what it gives, and whether it was cancelled at the end."""

    def __init__(self, replies: AsyncIterator[pb.FetchChunksReply]) -> None:
        self._replies = replies
        self.is_cancelled = False

    async def __aiter__(self) -> AsyncIterator[pb.FetchChunksReply]:
        try:
            async for reply in self._replies:
                yield reply
        except NanofleetError as error:
            raise rpc_error(error) from error

    def cancel(self) -> bool:
        self.is_cancelled = True
        return True


class ShelfCalls:
    def __init__(self, shelf: DeliveryShelf) -> None:
        self.calls: list[ShelfCall] = []
        self._shelf = shelf

    async def FetchManifest(self, request: pb.FetchManifestRequest) -> pb.FetchManifestReply:  # noqa: N802 (the protocol's)
        try:
            return self._shelf.manifest(request)
        except NanofleetError as error:
            raise rpc_error(error) from error

    def FetchChunks(self, request: pb.FetchChunksRequest) -> ShelfCall:  # noqa: N802 (the protocol's)
        call = ShelfCall(self._shelf.stream(request))
        self.calls.append(call)
        return call


class DeliveryShelfServicer(DeliveryServiceServicer):
    def __init__(self, shelf: DeliveryShelf) -> None:
        self._shelf = shelf

    async def FetchManifest(  # noqa: N802 (the protocol's)
        self, request: pb.FetchManifestRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.FetchManifestReply:
        try:
            return self._shelf.manifest(request)
        except NanofleetError as error:
            await context.abort(status_of(error), str(error))

    async def FetchChunks(  # type: ignore[override]  # noqa: N802  # typed for both APIs; named by the protocol
        self, request: pb.FetchChunksRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> None:
        try:
            async for reply in self._shelf.stream(request):
                await context.write(reply)
        except NanofleetError as error:
            await context.abort(status_of(error), str(error))


def status_of(error: NanofleetError) -> grpc.StatusCode:
    return grpc.StatusCode.FAILED_PRECONDITION if isinstance(error, PermissionRequired) else STATUS[error.code].grpc


def rpc_error(error: NanofleetError, *trailing: tuple[str, str]) -> grpc.aio.AioRpcError:
    metadata = grpc.aio.Metadata(*trailing)
    return grpc.aio.AioRpcError(status_of(error), grpc.aio.Metadata(), metadata, details=str(error))
