"""Bring the bytes of one variant into the store: its manifest first, then every file that is missing.

Nothing that the controller sends is believed: a blob may not grow beyond its declared size, chunks must follow each
other without gap or overlap, and only bytes with the right digest are published. What arrived stays in the store when
a transfer breaks, and the next one asks for the rest. A server that falls silent is left after `chunk_timeout_s`.

Whether and when to try again is not decided here (see reconcile.executor); errors only say if it may help.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, Protocol, TypeVar

import grpc
import grpc.aio

from core.clock import Clock
from core.digest import Digest
from core.errors import (
    DeadlineExceeded,
    IntegrityError,
    InternalError,
    InvalidManifest,
    NanofleetError,
    TooLarge,
    Unavailable,
)
from core.fleet_state import Transfer
from core.logs import peer_text
from core.manifest import MAX_MANIFEST_BYTES, Manifest
from core.status import error_from_grpc
from edge_agent.sync.store import ContentStore
from protos.artifacts.v1 import artifacts_pb2 as pb

# The server's promise in artifacts.proto.
MAX_CHUNK_BYTES = 1 << 20
# Chosen: often enough for a progress bar, seldom enough to cost nothing.
PROGRESS_INTERVAL_S = 0.25

ProgressListener = Callable[[int, int, Transfer], None]
"""Called with the bytes of the variant's files now stored, their sum, and what it cost (not measured here)."""

P = ParamSpec("P")
T = TypeVar("T")


class Chunks(Protocol):
    """One transfer under way; whoever is done with it cancels it."""

    def __aiter__(self) -> AsyncIterator[pb.Piece]: ...

    def cancel(self) -> bool: ...


class Artifacts(Protocol):
    """What is used of the generated ArtifactServiceStub."""

    def Fetch(self, request: pb.FetchRequest, /) -> Chunks: ...  # noqa: N802 (named by the protocol)


@dataclass(frozen=True, slots=True)
class FetchLimits:
    chunk_timeout_s: float = 20.0
    reserve_bytes: int = 64 << 20


class Fetch:
    """Fetches one variant at a time; `disk` is the one thread that works on the store."""

    def __init__(
        self,
        stub: Artifacts,
        store: ContentStore,
        *,
        disk: Executor,
        limits: FetchLimits,
        clock: Clock,
    ) -> None:
        self._stub = stub
        self._store = store
        self._disk = disk
        self._limits = limits
        self._clock = clock

    async def manifest(self, digest: Digest) -> Manifest:
        """Return the manifest `digest` once it is in the store."""
        if not await self._on_disk(self._store.has, digest):
            await self._blob(digest, None, _ignore)
        return await self._on_disk(self._store.manifest, digest)

    async def variant(self, digest: Digest, on_progress: ProgressListener) -> Manifest:
        """Return the manifest `digest` once it and all of its files are in the store.

        Raises:
            TooLarge: the disk has too little room.
            IntegrityError: the bytes that came are not those asked for.
            InvalidManifest: the manifest does not parse, or declares sizes that its files do not have.
            NanofleetError: what the controller answered, or Unavailable when it did not.
        """
        manifest = await self.manifest(digest)
        await self._require_room(manifest)
        await self._files(manifest, _Throttle(on_progress, manifest.size_bytes, self._clock))
        stored_bytes = await self._on_disk(self._store.stored_bytes, manifest)
        if stored_bytes != manifest.size_bytes:
            raise InvalidManifest(
                f"{digest}: expected {manifest.size_bytes} bytes of files, its blobs have {stored_bytes}"
            )
        on_progress(stored_bytes, manifest.size_bytes, Transfer())
        return manifest

    async def _files(self, manifest: Manifest, progress: "_Throttle") -> None:
        for file in manifest.files:
            digest = Digest(file.digest)
            if await self._on_disk(self._store.has, digest):
                continue
            held_bytes = await self._on_disk(self._store.partial_bytes, digest)
            elsewhere_bytes = await self._on_disk(self._store.stored_bytes, manifest) - held_bytes
            await self._blob(digest, file.size_bytes, partial(progress.report, elsewhere_bytes))

    async def _require_room(self, manifest: Manifest) -> None:
        missing_bytes = manifest.size_bytes - await self._on_disk(self._store.stored_bytes, manifest)
        free_bytes = await self._on_disk(self._store.free_bytes)
        needed_bytes = missing_bytes + self._limits.reserve_bytes
        if missing_bytes and needed_bytes > free_bytes:
            raise TooLarge(
                f"disk full: {manifest.model} {manifest.version} {manifest.variant} needs {missing_bytes} bytes and "
                f"{self._limits.reserve_bytes} in reserve, {free_bytes} are free; free {needed_bytes - free_bytes} more"
            )

    async def _blob(self, digest: Digest, size_bytes: int | None, on_bytes: Callable[[int], None]) -> None:
        """Fetch one blob; `size_bytes` None means a manifest, whose size nobody has declared yet."""
        held_bytes = await self._on_disk(self._store.partial_bytes, digest)
        if held_bytes > (MAX_MANIFEST_BYTES if size_bytes is None else size_bytes):
            await self._on_disk(self._store.discard_partial, digest)
            held_bytes = 0
        if held_bytes != size_bytes:
            await self._transfer(digest, held_bytes, size_bytes, on_bytes)
        await self._on_disk(self._store.finish, digest)

    async def _transfer(
        self, digest: Digest, held_bytes: int, size_bytes: int | None, on_bytes: Callable[[int], None]
    ) -> None:
        incoming = _Incoming(digest, held_bytes, size_bytes)
        call = self._stub.Fetch(pb.FetchRequest(digest=digest, offset=held_bytes))
        try:
            chunks = aiter(call)
            # A server that would send more than the blob is cut off, not listened to.
            while not incoming.is_whole and (chunk := await self._next_chunk(chunks, digest)) is not None:
                offset = incoming.position
                incoming.accept(chunk)
                await self._on_disk(partial(self._store.append, digest, chunk.data, offset=offset))
                on_bytes(incoming.position)
            incoming.require_end()
        except TooLarge as error:
            # The blob ends before our offset, so what is here belongs to something else.
            await self._on_disk(self._store.discard_partial, digest)
            raise IntegrityError(f"blob {digest}: expected more than {held_bytes} bytes; it is fetched anew") from error
        finally:
            call.cancel()

    async def _next_chunk(self, chunks: AsyncIterator[pb.Piece], digest: Digest) -> pb.Piece | None:
        try:
            async with asyncio.timeout(self._limits.chunk_timeout_s):
                return await anext(chunks, None)
        except TimeoutError:
            waited_s = self._limits.chunk_timeout_s
            raise Unavailable(f"blob {digest}: expected a chunk within {waited_s:g} s, got none") from None
        except grpc.aio.AioRpcError as error:
            raise _error_of(error, digest) from error

    async def _on_disk(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, partial(work, *args, **kwargs))


class _Incoming:
    """What one transfer has brought so far, and the rules for what may come next."""

    def __init__(self, digest: Digest, position: int, size_bytes: int | None) -> None:
        self.position = position
        self._digest = digest
        self._size_bytes = size_bytes

    @property
    def is_whole(self) -> bool:
        return self.position == self._size_bytes

    def accept(self, chunk: pb.Piece) -> None:
        """Advance over `chunk`; raise IntegrityError, before any byte is kept, when it does not belong here."""
        if self._size_bytes is None and chunk.total_bytes <= MAX_MANIFEST_BYTES:
            self._size_bytes = chunk.total_bytes
        if chunk.total_bytes != self._size_bytes:
            raise self._refusal(
                f"a total of {self._size_bytes or f'at most {MAX_MANIFEST_BYTES}'} bytes", chunk.total_bytes
            )
        if chunk.offset != self.position:
            raise self._refusal(f"the chunk at offset {self.position}", chunk.offset)
        room_bytes = self._size_bytes - self.position
        if len(chunk.data) > min(MAX_CHUNK_BYTES, room_bytes):
            raise self._refusal(f"a chunk of at most {min(MAX_CHUNK_BYTES, room_bytes)} bytes", len(chunk.data))
        if not chunk.data and room_bytes:
            raise self._refusal("bytes in every chunk", 0)
        self.position += len(chunk.data)

    def require_end(self) -> None:
        if not self.is_whole:
            raise Unavailable(f"blob {self._digest}: the stream ended at {self.position} of {self._size_bytes} bytes")

    def _refusal(self, expected: str, got: int) -> IntegrityError:
        return IntegrityError(f"blob {self._digest}: expected {expected}, got {got}")


class _Throttle:
    """Passes progress on at most once per PROGRESS_INTERVAL_S."""

    def __init__(self, listener: ProgressListener, total_bytes: int, clock: Clock) -> None:
        self._listener = listener
        self._total_bytes = total_bytes
        self._clock = clock
        self._last_s = -PROGRESS_INTERVAL_S

    def report(self, elsewhere_bytes: int, position: int) -> None:
        """Tell of `position` bytes of the file under way and `elsewhere_bytes` of all others."""
        now_s = self._clock.monotonic_s()
        if now_s - self._last_s >= PROGRESS_INTERVAL_S:
            self._last_s = now_s
            self._listener(elsewhere_bytes + position, self._total_bytes, Transfer())


def _error_of(error: grpc.aio.AioRpcError, digest: Digest) -> NanofleetError:
    found = error_from_grpc(error.code(), f"blob {digest}: {peer_text(error.details() or error.code().name)}")
    # Nobody set a deadline, and gRPC itself ends about one stream in a hundred with INTERNAL when many start at once:
    # both pass.
    return Unavailable(str(found)) if isinstance(found, InternalError | DeadlineExceeded) else found


def _ignore(_position: int) -> None:
    """Take no note of the progress of a manifest: its size says nothing about the model's."""
