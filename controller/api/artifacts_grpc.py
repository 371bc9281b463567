"""ArtifactService: content-addressed bytes to agents and heavy-tier replicas; they verify what they receive."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

import grpc.aio

from core.digest import Digest, parse_digest
from core.errors import DeadlineExceeded, NanofleetError, TooLarge
from core.status import STATUS
from protos.artifacts.v1 import artifacts_pb2 as pb
from protos.artifacts.v1.artifacts_pb2_grpc import ArtifactServiceServicer

# Chosen: 1 MiB in two minutes is 9 kB/s; slower receivers resume at their offset instead of holding a stream.
SEND_TIMEOUT_S = 120.0

Context = grpc.aio.ServicerContext[pb.FetchRequest, pb.Piece]


class Blobs(Protocol):
    async def size(self, digest: Digest) -> int:
        """Return the bytes of a blob. Raises NotFound."""
        ...

    def open_range(self, digest: Digest, offset: int = 0) -> AsyncGenerator[bytes, None]:
        """Yield a blob from `offset` on, in blocks of at most 1 MiB, reading on threads."""
        ...


class ArtifactServicer(ArtifactServiceServicer):
    def __init__(self, blobs: Blobs, *, send_timeout_s: float = SEND_TIMEOUT_S) -> None:
        self._blobs = blobs
        self._send_timeout_s = send_timeout_s

    async def Fetch(self, request: pb.FetchRequest, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        """Stream a blob; ends, file closed, when the client leaves, because gRPC then cancels this task."""
        try:
            await self._send(parse_digest(request.digest), request.offset, context)
        except NanofleetError as error:
            await context.abort(STATUS[error.code].grpc, str(error))

    async def _send(self, digest: Digest, offset: int, context: Context) -> None:
        total_bytes = await self._blobs.size(digest)
        if offset > total_bytes:
            raise TooLarge(f"blob {digest}: expected an offset of at most {total_bytes}, got {offset}")
        if offset == total_bytes:
            await self._write(pb.Piece(offset=offset, total_bytes=total_bytes), context)
        async with aclosing(self._blobs.open_range(digest, offset)) as blocks:
            async for block in blocks:
                await self._write(pb.Piece(offset=offset, data=block, total_bytes=total_bytes), context)
                offset += len(block)

    async def _write(self, chunk: pb.Piece, context: Context) -> None:
        try:
            async with asyncio.timeout(self._send_timeout_s):
                await context.write(chunk)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"expected the receiver to take a chunk within {self._send_timeout_s:g} s; resume at {chunk.offset}"
            ) from error
