"""Bring one variant into the store: its manifest, then every chunk that is missing, from wherever it is cheapest.

    manifest ─▶ what is here ─▶ room ─▶ same chunks, copied ─▶ the rest, from the source ─▶ whole files, published

Nothing that arrives is believed: every chunk is decoded within the bounds of its size, hashed, and only then written
where it belongs. The next one is received meanwhile only where the write cannot be lost any more (see
`chunk_writer`): whenever this process is killed, at most one chunk has come for nothing.

A difference that cannot be used, because its source changed on this disk or because it is malformed, costs that chunk
in full, no more. On a metered link even that needs a person's word (`allow`): the transfer ends in PermissionRequired,
and what arrived stays.

Whether and when to try again after an error is not decided here (see reconcile.executor).
"""

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar, assert_never

from core.chunks import ChunkRef, chunk_digest
from core.clock import Clock
from core.digest import Digest
from core.errors import DiskFull, IntegrityError, InvalidManifest, Overloaded, PermissionRequired
from core.manifest import Manifest
from edge_agent.sync.held import HeldChunks
from edge_agent.sync.landing import Landing
from edge_agent.sync.meter import Meter, ProgressListener, Throttle
from edge_agent.sync.source import Arrived, ChunkSource, Codec, ComeBackLater
from edge_agent.sync.store import ContentStore
from edge_agent.sync.worklist import Worklist

# artifacts.proto, FetchChunksRequest.
MAX_HELD = 16
# Chosen: with pauses of some seconds, many minutes of queueing at a busy controller.
_MAX_PAUSES = 200
# Chosen: as many permissions as a state has slots; a person who gives more than that has forgotten the first.
MAX_ALLOWED = 256
# Chosen: variants whose costs are remembered from one attempt to the next.
_MAX_METERS = 64

_log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DeliveryLimits:
    # Disk space that a fetch must leave free.
    reserve_bytes: int = 64 << 20


class Delivery:
    """Brings one variant at a time; `disk` is the one thread that works on the store."""

    def __init__(
        self,
        source: ChunkSource,
        store: ContentStore,
        *,
        disk: Executor,
        limits: DeliveryLimits,
        clock: Clock,
        is_metered: bool = False,
    ) -> None:
        self._source = source
        self._store = store
        self._disk = disk
        self._limits = limits
        self._clock = clock
        self._is_metered = is_metered
        self._allowed: deque[Digest] = deque(maxlen=MAX_ALLOWED)
        self._meters: OrderedDict[Digest, Meter] = OrderedDict()
        # Encoded bytes that came, of all variants.
        self.fetched_bytes = dict.fromkeys(Codec, 0)

    def allow(self, manifest_digest: Digest) -> None:
        """Take a person's word that this variant may cost whole chunks on a metered link."""
        if manifest_digest not in self._allowed:
            self._allowed.append(manifest_digest)

    async def manifest(self, digest: Digest) -> Manifest:
        """Bring the manifest alone into the store, unless it is there.

        Raises:
            InvalidManifest: it does not parse, or contradicts itself.
            NanofleetError: as `ChunkSource.manifest`.
        """
        if not await self._on_disk(self._store.has, digest):
            content = await self._source.manifest(digest)
            await self._on_disk(self._store.put, digest, content)
        return await self._on_disk(self._store.manifest, digest)

    async def variant(self, digest: Digest, on_progress: ProgressListener) -> Manifest:
        """Return the manifest `digest` once it and all of its files are in the store; may be cancelled at any time.

        Raises:
            DiskFull: there is too little room; nothing was fetched.
            PermissionRequired: whole chunks are needed on a metered link, and nobody has allowed them.
            IntegrityError: what came is not what was asked for.
            InvalidManifest: it does not parse, contradicts itself, or is of a variant that is not made for agents.
            NanofleetError: what the controller answered, or Unavailable when it did not.
        """
        manifest = await self.manifest(digest)
        work = await self._on_disk(Worklist, manifest, self._store)
        meter = self._meter(digest)
        round_ = _Round(digest, work, meter, Throttle(partial(_tell, work, meter, on_progress), self._clock))
        held = await self._on_disk(self._held_variants, digest)
        with self._store.pinned((digest, *held)), round_.throttle:
            await self._reserve(work)
            try:
                await self._collect(round_, held)
            finally:
                # Behind whatever is still being written.
                self._disk.submit(work.close)
            for file_digest in work.assemblies:
                await self._on_disk(self._store.publish, file_digest)
            stored_bytes = await self._on_disk(self._store.stored_bytes, manifest)
            if stored_bytes != manifest.size_bytes:
                raise InvalidManifest(
                    f"{digest}: expected {manifest.size_bytes} bytes of files, its blobs have {stored_bytes}"
                )
            round_.throttle.tell()
        return manifest

    def _meter(self, digest: Digest) -> Meter:
        meter = self._meters.setdefault(digest, Meter(self._clock))
        self._meters.move_to_end(digest)
        if len(self._meters) > _MAX_METERS:
            self._meters.popitem(last=False)
        meter.begin()
        return meter

    def _held_variants(self, wanted: Digest) -> dict[Digest, Manifest]:
        return {digest: self._store.manifest(digest) for digest in self._store.complete_variants() if digest != wanted}

    async def _reserve(self, work: Worklist) -> None:
        """Take the room for everything before anything is fetched."""
        needed_bytes = await self._on_disk(lambda: work.unallocated_bytes)
        free_bytes = await self._on_disk(self._store.free_bytes)
        if needed_bytes and needed_bytes + self._limits.reserve_bytes > free_bytes:
            missing_bytes = needed_bytes + self._limits.reserve_bytes - free_bytes
            what = f"{work.manifest.model} {work.manifest.version} {work.manifest.variant}"
            raise DiskFull(
                f"disk full: {what} needs {needed_bytes} bytes and {self._limits.reserve_bytes} in reserve, "
                f"{free_bytes} are free; free {missing_bytes} more"
            )
        for assembly in work.assemblies.values():
            await self._on_disk(assembly.allocate)

    # Chunks

    async def _collect(self, round_: "_Round", held: Mapping[Digest, Manifest]) -> None:
        work = round_.work
        # One hop to the disk per chunk, here and below: in between, a cancellation gets through.
        for ref in work.doubtful():
            await self._on_disk(work.recheck, ref)
        wanted = work.missing()
        chunks = await self._on_disk(_held_chunks, self._store, wanted, held)
        for ref in wanted:
            if not chunks.may_have(ref) or (content := await self._on_disk(chunks.same, ref)) is None:
                continue
            await self._on_disk(work.put, ref, content)
            round_.meter.copied(ref.size_bytes)
            round_.throttle.report()
        sources = [digest for digest, manifest in held.items() if manifest.model == work.manifest.model]
        failed = await self._fetch(round_, chunks, sources[-MAX_HELD:])
        if failed:
            self._require_allowed(round_, failed)
            if failed := await self._fetch(round_, chunks, ()):
                raise IntegrityError(f"chunk {failed[0].index}: expected it in full, got a difference")

    def _require_allowed(self, round_: "_Round", failed: Sequence[ChunkRef]) -> None:
        if self._is_held_back(round_.digest):
            size_bytes = sum(ref.size_bytes for ref in failed)
            raise PermissionRequired(
                f"metered link: {len(failed)} differences cannot be used, their chunks take up to {size_bytes} bytes; "
                "allow whole chunks or bring the agent an unmetered link"
            )

    def _is_held_back(self, digest: Digest) -> bool:
        return self._is_metered and digest not in self._allowed

    async def _fetch(self, round_: "_Round", held: HeldChunks, sources: Sequence[Digest]) -> list[ChunkRef]:
        """Fetch what is missing, waiting as often as the source says; return the chunks whose difference failed."""
        pauses = 0
        while wanted := round_.work.missing():
            try:
                return await self._stream(round_, wanted, held, sources)
            except ComeBackLater as error:
                # What it brought until then was worth coming.
                pauses = 0 if len(round_.work.missing()) < len(wanted) else pauses + 1
                if pauses == _MAX_PAUSES:
                    raise Overloaded(f"{round_.digest}: told {pauses} times to come back later, in vain") from error
                await asyncio.sleep(error.delay_s)
        return []

    async def _stream(
        self, round_: "_Round", wanted: Sequence[ChunkRef], held: HeldChunks, sources: Sequence[Digest]
    ) -> list[ChunkRef]:
        failed: list[ChunkRef] = []
        arriving = self._source.chunks(
            round_.digest, wanted, held=sources, is_delta_only=self._is_held_back(round_.digest)
        )
        try:
            async with aclosing(arriving), Landing(self._disk, round_.work) as landing:
                async for arrived in arriving:
                    await self._take_in(arrived, round_, landing, held, failed)
        finally:
            # What was written last counts from here on.
            round_.throttle.report()
        return failed

    async def _take_in(
        self, arrived: Arrived, round_: "_Round", landing: Landing, held: HeldChunks, failed: list[ChunkRef]
    ) -> None:
        round_.meter.received(arrived.codec, len(arrived.data))
        self.fetched_bytes[arrived.codec] += len(arrived.data)
        content = await self._verified(arrived, held)
        if content is None:
            failed.append(arrived.ref)
            return
        await landing.put(arrived.ref, content)
        round_.meter.brought(arrived.ref.size_bytes)
        round_.throttle.report()

    async def _verified(self, arrived: Arrived, held: HeldChunks) -> bytes | memoryview | None:
        """Return the bytes of a chunk; None for a difference that cannot be used.

        What came as it is, is hashed at once: 0.1 ms for 1 MiB, less than a hop to a thread and back (measured).
        """
        if arrived.codec is Codec.RAW:
            return _verified(arrived, held)
        return await self._on_disk(_verified, arrived, held)

    async def _on_disk(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, partial(work, *args, **kwargs))


@dataclass(frozen=True, slots=True)
class _Round:
    """One attempt on one variant."""

    digest: Digest
    work: Worklist
    meter: Meter
    throttle: Throttle


def _verified(arrived: Arrived, held: HeldChunks) -> bytes | memoryview | None:
    """Return the bytes of a chunk; None for a difference that cannot be used.

    Raises:
        IntegrityError: it came in full and is another.
    """
    try:
        content = _decoded(arrived, held)
        _require_digest(content, arrived.ref)
    except IntegrityError as error:
        if arrived.codec is not Codec.DIFFERENCE:
            raise
        _log.warning("difference is useless", extra={"chunk": arrived.ref.index, "reason": str(error)})
        return None
    return content


def _require_digest(content: bytes | memoryview, ref: ChunkRef) -> None:
    if chunk_digest(content) != ref.digest:
        raise IntegrityError(f"chunk {ref.index}: got other bytes than the manifest names; fetch it again")


def _decoded(arrived: Arrived, held: HeldChunks) -> bytes | memoryview:
    # Loaded by the first chunk that needs it: 1.5 MB (measured) of an agent that has about 1 MB to spare when idle.
    from core.delta import decode_difference, decompress

    ref = arrived.ref
    match arrived.codec:
        case Codec.RAW:
            if len(arrived.data) != ref.size_bytes:
                raise IntegrityError(f"chunk {ref.index}: expected {ref.size_bytes} bytes, got {len(arrived.data)}")
            return arrived.data
        case Codec.ZSTD:
            return decompress(arrived.data, size_bytes=ref.size_bytes)
        case Codec.DIFFERENCE:
            source = held.source(arrived.source_manifest, arrived.source_index)
            if source is None:
                raise IntegrityError(f"chunk {ref.index}: its source is not here, or no longer what it was")
            return decode_difference(source, arrived.data, size_bytes=ref.size_bytes)
        case _:
            assert_never(arrived.codec)


def _held_chunks(store: ContentStore, wanted: Sequence[ChunkRef], held: Mapping[Digest, Manifest]) -> HeldChunks:
    chunks = HeldChunks(store, {ref.digest for ref in wanted})
    for digest, manifest in held.items():
        chunks.add(digest, manifest)
    return chunks


def _tell(work: Worklist, meter: Meter, listener: ProgressListener) -> None:
    listener(work.stored_bytes, work.manifest.size_bytes, meter.transfer())
