"""Manifests and chunks from the controller, over DeliveryService.

Nothing it sends is believed: the first word must be the grant, every chunk must be the next one asked for and no larger
than it may be, and a controller that falls silent is left after `chunk_timeout_s`, or four times what a chunk takes at
the rate that it granted. A reply without content says that the next chunk waits for its turn: silence begins anew.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import grpc
import grpc.aio

from core.chunks import ChunkRef
from core.clock import Clock
from core.digest import Digest, digest_of
from core.errors import (
    DeadlineExceeded,
    IntegrityError,
    InternalError,
    NanofleetError,
    PermissionRequired,
    Unavailable,
)
from core.logs import peer_text
from core.manifest import MAX_CHUNK_BYTES, MAX_MANIFEST_BYTES
from core.status import error_from_grpc
from edge_agent.sync.calls import CarriedChunk, Reply
from edge_agent.sync.source import Arrived, Codec, ComeBackLater
from protos.artifacts.v1 import artifacts_pb2 as pb

# Chosen: a controller whose clock is ahead, or that lies, must not stop deliveries for longer.
MAX_PAUSE_S = 600.0
_MIN_PAUSE_S = 0.1
# Chosen: 20 minutes of them at the pace of our controller; one that says nothing else is as good as silent.
_MAX_WAITS = 240

T = TypeVar("T")

_CODECS = {pb.CODEC_RAW: Codec.RAW, pb.CODEC_ZSTD: Codec.ZSTD, pb.CODEC_DIFFERENCE: Codec.DIFFERENCE}


class ReplyStream(Protocol):
    """One transfer under way; whoever is done with it cancels it."""

    def __aiter__(self) -> AsyncIterator[Reply]: ...

    def cancel(self) -> bool: ...


class DeliveryCalls(Protocol):
    """What is used of DeliveryService; see `edge_agent.sync.calls`."""

    def FetchManifest(  # noqa: N802 (named by the protocol)
        self, request: pb.FetchManifestRequest, /
    ) -> Awaitable[pb.FetchManifestReply]: ...

    def FetchChunks(self, request: pb.FetchChunksRequest, /) -> ReplyStream: ...  # noqa: N802 (named by the protocol)


@dataclass(frozen=True, slots=True)
class SourceLimits:
    # Longest silence, of a controller that is asked or sends; a chunk of 1 MiB must arrive within it.
    chunk_timeout_s: float = 120.0


class ControllerSource:
    def __init__(self, stub: DeliveryCalls, *, limits: SourceLimits, clock: Clock) -> None:
        self._stub = stub
        self._limits = limits
        self._clock = clock

    async def manifest(self, digest: Digest) -> bytes:
        what = f"manifest {digest}"
        asked = self._stub.FetchManifest(pb.FetchManifestRequest(digest=digest))
        reply = await self._heard(asked, what, self._limits.chunk_timeout_s)
        if len(reply.content) > MAX_MANIFEST_BYTES:
            raise IntegrityError(f"{what}: expected at most {MAX_MANIFEST_BYTES} bytes, got {len(reply.content)}")
        if (found := digest_of(reply.content)) != digest:
            raise IntegrityError(f"{what}: got {found} over {len(reply.content)} bytes; fetch it again")
        return reply.content

    async def chunks(
        self, manifest_digest: Digest, wanted: Sequence[ChunkRef], *, held: Sequence[Digest], is_delta_only: bool
    ) -> AsyncGenerator[Arrived, None]:
        what = f"chunks of {manifest_digest}"
        call = self._stub.FetchChunks(
            pb.FetchChunksRequest(
                manifest_digest=manifest_digest,
                ranges=_ranges(wanted),
                held_manifests=held,
                delta_only=is_delta_only,
            )
        )
        try:
            replies = aiter(call)
            timeout_s = self._granted(await self._next(replies, what, self._limits.chunk_timeout_s), what)
            for ref in wanted:
                reply = await self._next(replies, what, timeout_s)
                if reply is None:
                    raise Unavailable(f"{what}: the stream ended before chunk {ref.index}")
                yield _arrived(reply, ref, held)
            # Whatever else it would say is not listened to.
        finally:
            call.cancel()

    def _granted(self, reply: Reply | None, what: str) -> float:
        """Return how long to bear silence."""
        if not isinstance(reply, pb.FetchChunksReply) or reply.WhichOneof("reply") != "grant":
            raise IntegrityError(f"{what}: expected a grant first, got {reply and _kind(reply)}")
        if not reply.grant.bytes_per_s:
            return self._limits.chunk_timeout_s
        shared_s = min(4 * MAX_CHUNK_BYTES / reply.grant.bytes_per_s, MAX_PAUSE_S)
        return max(self._limits.chunk_timeout_s, shared_s)

    async def _next(self, replies: AsyncIterator[Reply], what: str, timeout_s: float) -> Reply | None:
        for _ in range(_MAX_WAITS):
            reply = await self._heard(anext(replies, None), what, timeout_s)
            if reply is None or _kind(reply) is not None:
                self._require_served(reply, what)
                return reply
        raise Unavailable(f"{what}: told {_MAX_WAITS} times to wait for one chunk; the controller is busy")

    def _require_served(self, reply: Reply | None, what: str) -> None:
        """Raise ComeBackLater when others are served first, from the beginning or from now on."""
        if isinstance(reply, pb.FetchChunksReply) and reply.grant.HasField("not_before"):
            not_before_s = reply.grant.not_before.seconds + reply.grant.not_before.nanos / 1e9
            pause_s = min(max(not_before_s - self._clock.now().timestamp(), _MIN_PAUSE_S), MAX_PAUSE_S)
            raise ComeBackLater(f"{what}: the controller serves others first; {pause_s:.1f} s", delay_s=pause_s)

    async def _heard(self, word: Awaitable[T], what: str, timeout_s: float) -> T:
        try:
            async with asyncio.timeout(timeout_s):
                return await word
        except TimeoutError:
            raise Unavailable(f"{what}: expected a word within {timeout_s:g} s, got none") from None
        except grpc.aio.AioRpcError as error:
            raise _error_of(error, what) from error


def _ranges(wanted: Sequence[ChunkRef]) -> Iterator[pb.ChunkRange]:
    first = count = 0
    for ref in wanted:
        if count and ref.index == first + count:
            count += 1
            continue
        if count:
            yield pb.ChunkRange(first=first, count=count)
        first, count = ref.index, 1
    if count:
        yield pb.ChunkRange(first=first, count=count)


def _kind(reply: Reply) -> str | None:
    return "chunk" if isinstance(reply, CarriedChunk) else reply.WhichOneof("reply")


def _arrived(reply: Reply, ref: ChunkRef, held: Sequence[Digest]) -> Arrived:
    """Return what came for chunk `ref`; raise IntegrityError when it does not belong here."""
    chunk, data = (reply.header, reply.data) if isinstance(reply, CarriedChunk) else (reply.chunk, reply.chunk.data)
    if (kind := _kind(reply)) != "chunk" or chunk.index != ref.index:
        raise IntegrityError(f"expected chunk {ref.index}, got {kind} {chunk.index}")
    if not 0 < len(data) <= ref.size_bytes:
        raise IntegrityError(f"chunk {ref.index}: expected 1 to {ref.size_bytes} bytes, got {len(data)}")
    codec = _CODECS.get(chunk.codec)
    if codec is None:
        raise IntegrityError(f"chunk {ref.index}: expected a codec that was asked for, got {chunk.codec}")
    if codec is not Codec.DIFFERENCE:
        return Arrived(ref, codec, data)
    source = Digest(chunk.source_manifest) if chunk.source_manifest in held else None
    return Arrived(ref, codec, data, source, chunk.source_index)


def _error_of(error: grpc.aio.AioRpcError, what: str) -> NanofleetError:
    message = f"{what}: {peer_text(error.details() or error.code().name)}"
    if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
        return PermissionRequired(message)
    found = error_from_grpc(error.code(), message)
    # Nobody set a deadline, and gRPC itself ends about one stream in a hundred with INTERNAL when many start at once:
    # both pass.
    return Unavailable(str(found)) if isinstance(found, InternalError | DeadlineExceeded) else found
