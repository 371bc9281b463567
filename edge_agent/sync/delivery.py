"""Bring one variant into the store: its manifest, then every chunk that is missing, from wherever it is cheapest.

    manifest ─▶ what is here ─▶ room ─▶ same chunks, copied ─▶ the rest, from the source ─▶ whole files, published

Nothing that arrives is believed: every chunk is decoded within the bounds of its size, written where it belongs and
counted once its hash is that of the manifest. The next one is received while it is hashed, but not before it is
written: whenever this process dies, at most one chunk has come for nothing.

A difference that cannot be used, because its source changed on this disk or because it is malformed, costs that chunk
in full, no more. On a metered link even that needs a person's word (`allow`): the transfer ends in PermissionRequired,
and what arrived stays.

Whether and when to try again after an error is not decided here (see reconcile.executor).
"""

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, Self, TypeVar, assert_never

from core.chunks import ChunkRef
from core.clock import Clock
from core.digest import Digest
from core.errors import DiskFull, IntegrityError, InvalidManifest, Overloaded, PermissionRequired
from core.manifest import Manifest
from edge_agent.sync.held import HeldChunks
from edge_agent.sync.meter import Meter, ProgressListener, Throttle
from edge_agent.sync.source import Arrived, ChunkSource, Codec, ComeBackLater
from edge_agent.sync.store import ContentStore
from edge_agent.sync.worklist import Worklist

# artifacts.proto, FetchChunksRequest.
MAX_HELD = 16
# Chosen: with pauses of some seconds, many minutes of queueing at a busy controller.
_MAX_PAUSES = 200
# Chosen: what hashing may lag behind, in chunks of at most 1 MiB; on a busy machine threads wait for each other.
_MAX_UNCHECKED = 3
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
    """Brings one variant at a time; `disk` is the one thread that works on the store.

    `hashing` is a thread that checks one chunk while `disk` writes the next; without it `disk` does both in turn.
    """

    def __init__(
        self,
        source: ChunkSource,
        store: ContentStore,
        *,
        disk: Executor,
        hashing: Executor | None = None,
        limits: DeliveryLimits,
        clock: Clock,
        is_metered: bool = False,
    ) -> None:
        self._source = source
        self._store = store
        self._disk = disk
        self._hashing = hashing or disk
        self._limits = limits
        self._clock = clock
        self._is_metered = is_metered
        self._allowed: deque[Digest] = deque(maxlen=MAX_ALLOWED)
        self._meters: OrderedDict[Digest, Meter] = OrderedDict()

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
        with self._store.pinned((digest, *held)):
            await self._reserve(work)
            await self._collect(round_, held)
            for file_digest in work.assemblies:
                await self._on_disk(self._store.publish, file_digest)
        stored_bytes = await self._on_disk(self._store.stored_bytes, manifest)
        if stored_bytes != manifest.size_bytes:
            raise InvalidManifest(
                f"{digest}: expected {manifest.size_bytes} bytes of files, its blobs have {stored_bytes}"
            )
        _tell(work, meter, on_progress)
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
            if chunks.may_have(ref) and (content := await self._on_disk(chunks.same, ref)) is not None:
                await self._on_disk(work.write, ref, content)
                await self._on_disk(work.accept, ref, content)
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
        checking = _Checking(round_, self._hashing)
        arriving = self._source.chunks(
            round_.digest, wanted, held=sources, is_delta_only=self._is_held_back(round_.digest)
        )
        async with aclosing(arriving), checking:
            async for arrived in arriving:
                round_.meter.received(arrived.codec, len(arrived.data))
                # Not before it is written is the next one received: see above. Those before are hashed meanwhile.
                content = await self._on_disk(_written, round_.work, arrived, held)
                await checking.add(arrived, content)
        return checking.failed

    async def _on_disk(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, partial(work, *args, **kwargs))


@dataclass(frozen=True, slots=True)
class _Round:
    """One attempt on one variant."""

    digest: Digest
    work: Worklist
    meter: Meter
    throttle: Throttle


class _Checking:
    """Chunks that are being hashed while the next ones arrive, and the differences that proved useless."""

    def __init__(self, round_: _Round, hashing: Executor) -> None:
        self.failed: list[ChunkRef] = []
        self._round = round_
        self._hashing = hashing
        self._pending: deque[tuple[Arrived, Future[bool]]] = deque()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Settle the rest; after an error, only see it end and count what is good of it."""
        if kind is None:
            await self._settle(0)
        elif self._pending:
            settled = {asyncio.wrap_future(accepted): arrived for arrived, accepted in self._pending}
            await asyncio.wait(settled)
            for accepted, arrived in settled.items():
                if not accepted.cancelled() and accepted.exception() is None and accepted.result():
                    self._round.meter.brought(arrived.ref.size_bytes)
            self._round.throttle.tell()

    async def add(self, arrived: Arrived, content: bytes | memoryview | None) -> None:
        """Have a chunk hashed that was written; None stands for a difference that could not be used.

        Raises:
            IntegrityError: one before came in full and is another.
        """
        if content is None:
            self.failed.append(arrived.ref)
            return
        accepted = self._hashing.submit(self._round.work.accept, arrived.ref, content)
        self._pending.append((arrived, accepted))
        await self._settle(_MAX_UNCHECKED)

    async def _settle(self, left: int) -> None:
        while self._pending and (len(self._pending) > left or self._pending[0][1].done()):
            arrived, accepted = self._pending[0]
            # Mostly done by now: waking this loop for every chunk would cost more than looking.
            if accepted.result() if accepted.done() else await asyncio.wrap_future(accepted):
                self._round.meter.brought(arrived.ref.size_bytes)
                self._round.throttle.report()
            elif arrived.codec is Codec.DIFFERENCE:
                self.failed.append(arrived.ref)
            else:
                raise IntegrityError(
                    f"chunk {arrived.ref.index}: got other bytes than the manifest names; fetch it again"
                )
            self._pending.popleft()


def _written(work: Worklist, arrived: Arrived, held: HeldChunks) -> bytes | memoryview | None:
    """Write the bytes of a chunk where it belongs and return them; None when its difference cannot be used."""
    try:
        content = _decoded(arrived, held)
    except IntegrityError as error:
        if arrived.codec is not Codec.DIFFERENCE:
            raise
        _log.warning("difference is useless", extra={"chunk": arrived.ref.index, "reason": str(error)})
        return None
    work.write(arrived.ref, content)
    return content


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
    chunks = HeldChunks(store, {ref.sha256 for ref in wanted})
    for digest, manifest in held.items():
        chunks.add(digest, manifest)
    return chunks


def _tell(work: Worklist, meter: Meter, listener: ProgressListener) -> None:
    listener(work.stored_bytes, work.manifest.size_bytes, meter.transfer())
