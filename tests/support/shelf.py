"""The controller's artifacts, in memory: blobs served as ArtifactService would, and wrongly where a test asks for it.

`ShelfStub` takes the place of the generated stub, without a socket; tests.support.fake_controller serves the same
shelf over real gRPC.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

import grpc
import grpc.aio

from core.digest import Digest, digest_of
from core.errors import NanofleetError, NotFound, TooLarge
from core.status import STATUS
from protos.artifacts.v1 import artifacts_pb2 as pb
from tests.support.variants import MadeVariant


class Silence:
    """The server says nothing any more."""


Sent = pb.Piece | NanofleetError | Silence
# Turns what one request should get into what it gets.
Fault = Callable[[list[pb.Piece]], Sequence[Sent]]


class Asked(NamedTuple):
    digest: str
    offset: int


class Shelf:
    def __init__(self, *variants: MadeVariant, chunk_bytes: int = 1 << 20) -> None:
        self.blobs: dict[str, bytes] = {}
        self.asked: list[Asked] = []
        # One per request to come, first come first served.
        self.faults: deque[Fault] = deque()
        self.open_streams = 0
        self._chunk_bytes = chunk_bytes
        for variant in variants:
            self.hold(variant)

    def hold(self, variant: MadeVariant) -> None:
        for content in variant.blobs.values():
            self.put(content)

    def put(self, content: bytes) -> Digest:
        digest = digest_of(content)
        self.blobs[digest] = content
        return digest

    def asked_for(self, digest: Digest) -> list[int]:
        """Return the offsets at which `digest` was asked for."""
        return [asked.offset for asked in self.asked if asked.digest == digest]

    async def stream(self, request: pb.FetchRequest) -> AsyncIterator[pb.Piece]:
        self.asked.append(Asked(request.digest, request.offset))
        self.open_streams += 1
        try:
            chunks = self._chunks(request)
            for sent in self.faults.popleft()(chunks) if self.faults else chunks:
                if isinstance(sent, NanofleetError):
                    raise sent
                if isinstance(sent, Silence):
                    await asyncio.Event().wait()
                else:
                    yield sent
        finally:
            self.open_streams -= 1

    def _chunks(self, request: pb.FetchRequest) -> list[pb.Piece]:
        content = self.blobs.get(request.digest)
        if content is None:
            raise NotFound(f"no blob {request.digest}")
        if request.offset > len(content):
            raise TooLarge(f"expected an offset of at most {len(content)}, got {request.offset}")
        return [
            pb.Piece(offset=at, data=content[at : at + self._chunk_bytes], total_bytes=len(content))
            for at in range(request.offset, max(len(content), request.offset + 1), self._chunk_bytes)
        ]


class ShelfCall:
    """One call over the stub: what it gives, and whether it was cancelled at the end."""

    def __init__(self, chunks: AsyncIterator[pb.Piece]) -> None:
        self._chunks = chunks
        self.is_cancelled = False

    async def __aiter__(self) -> AsyncIterator[pb.Piece]:
        try:
            async for chunk in self._chunks:
                yield chunk
        except NanofleetError as error:
            raise rpc_error(error) from error

    def cancel(self) -> bool:
        self.is_cancelled = True
        return True


class ShelfStub:
    def __init__(self, shelf: Shelf) -> None:
        self.calls: list[ShelfCall] = []
        self._shelf = shelf

    def Fetch(self, request: pb.FetchRequest) -> ShelfCall:  # noqa: N802 (named by the protocol)
        call = ShelfCall(self._shelf.stream(request))
        self.calls.append(call)
        return call


def rpc_error(error: NanofleetError, *trailing: tuple[str, str]) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        STATUS[error.code].grpc, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details=str(error)
    )
