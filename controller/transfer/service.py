"""Delivery to agents: who may fetch what, in which form each chunk travels, and in what order agents are served.

    manifest(agent, digest)     the manifest of a variant that the agent shall run
    transfer(agent, order)      a Grant, and every chunk that was ordered, in order
    run(), run_ahead()          prepare chunks for the orders that come, and before; owned by the composition root

An agent gets what stands in its desired state and nothing else: not even differences to what never stood there, which
could be undone. A chunk goes in the smallest form that the agent can decode, as the packs hold it
(`controller.transfer.packs`); without packs it goes as it is, out of the blob store. A metered agent is refused whole
chunks, and told what they would cost, until it says that it may take them.

Nothing here knows gRPC (`controller.api.delivery_grpc`).
"""

import asyncio
import logging
import os
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import ParamSpec, Protocol, TypeVar

from controller.transfer.fairness import Admission, FairSender
from controller.transfer.model import BlobPaths, Codec, Encoded, Packs, Variant
from controller.transfer.preparation import Preparations, Readiness
from core.chunks import ChunkRef, chunks_of
from core.clock import Clock
from core.digest import Digest
from core.errors import (
    Forbidden,
    IntegrityError,
    InvalidManifest,
    InvalidRequest,
    NotFound,
    PermissionRequired,
    Unavailable,
)
from core.ids import AgentId
from core.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest

P = ParamSpec("P")
T = TypeVar("T")

# artifacts.proto, FetchChunksRequest.
MAX_HELD = 16
# Chosen: below the silence that an agent bears, so that it hears of a longer wait in time.
PREPARE_WAIT_S = 8.0
# Chosen: a manifest of 4 MiB is some 20 MiB when parsed; ordinary ones are far smaller.
_CACHED_MANIFESTS = 16
# Chosen: what most agents hold when a version is deployed; each takes seconds per 100 MB, before anybody else's turn.
_MAX_AHEAD = 4
# Chosen: deployments made while one manifest is read.
_MAX_AHEAD_WAITING = 64

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChunkOrder:
    """What an agent asks for: `(first, count)` ranges of chunk positions, ascending and apart."""

    manifest_digest: Digest
    ranges: tuple[tuple[int, int], ...]
    held_manifests: tuple[Digest, ...] = ()
    is_delta_only: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """How fast chunks will come; with `not_before`, none come until the agent asks again then."""

    bytes_per_s: int = 0
    not_before: datetime | None = None


@dataclass(frozen=True, slots=True)
class Sent:
    """One chunk on its way."""

    index: int
    encoded: Encoded


class DesiredVariants(Protocol):
    async def wanted_by(self, agent_id: AgentId) -> Collection[Digest]:
        """Return the manifests in the desired state of `agent_id`; none for an agent that nobody knows."""
        ...

    async def entitled_to(self, agent_id: AgentId) -> Collection[Digest]:
        """Return those manifests, and the ones that stood there once."""
        ...


class Transfers:
    """`disk` is where chunks without packs are read."""

    def __init__(
        self,
        desired: DesiredVariants,
        blobs: BlobPaths,
        packs: Packs,
        *,
        sender: FairSender,
        admission: Admission,
        disk: Executor,
        clock: Clock,
        bytes_per_s: int | None = None,
        prepare_wait_s: float = PREPARE_WAIT_S,
    ) -> None:
        self._desired = desired
        self._blobs = blobs
        self._packs = packs
        self._preparations = Preparations(packs, clock=clock)
        self._sender = sender
        self._admission = admission
        self._disk = disk
        self._bytes_per_s = bytes_per_s or 0
        self._prepare_wait_s = prepare_wait_s
        # Encoded bytes that agents took.
        self.sent_bytes = dict.fromkeys(Codec, 0)
        self._manifests: OrderedDict[Digest, Manifest] = OrderedDict()
        self._ahead: asyncio.Queue[tuple[Digest, Sequence[Digest]]] = asyncio.Queue(_MAX_AHEAD_WAITING)

    async def run(self) -> None:
        await self._preparations.run()

    def prepare_ahead(self, to: Digest, held: Sequence[Digest]) -> None:
        """Have differences to the first few of `held` made, which `to` takes the place of, before agents ask for them.

        Never waits, and never fails: what is not made by then is made when an agent asks.
        """
        if held and not self._ahead.full():
            self._ahead.put_nowait((to, held[:_MAX_AHEAD]))

    async def run_ahead(self) -> None:
        """Do what `prepare_ahead` was told, for ever."""
        while True:
            digest, held = await self._ahead.get()
            try:
                manifest = await self._manifest(digest)
                self._preparations.begin(Variant(digest, manifest), await self._sources(manifest, held))
            except (NotFound, InvalidManifest, Unavailable) as error:
                _log.warning("differences are not prepared ahead", extra={"manifest": digest, "reason": str(error)})

    async def manifest(self, agent_id: AgentId, digest: Digest) -> bytes:
        """Return the bytes of a manifest.

        Raises:
            Forbidden: it is not in the desired state of this agent.
            NotFound: it is, but its bytes are gone.
        """
        await self._require_wanted(agent_id, digest)
        return await self._on_disk(self._read_manifest, digest)

    @asynccontextmanager
    async def transfer(self, agent_id: AgentId, order: ChunkOrder) -> AsyncIterator[tuple[Grant, AsyncIterator[Sent]]]:
        """Lend the chunks of `order`, each until the next is asked for; sending one happens in `turn`.

        Raises:
            Forbidden: the variant is not in the desired state of this agent.
            InvalidRequest: ranges that are not in the variant, not ascending or not apart.
            PermissionRequired: differences alone were asked for, and there are none.
            Unavailable: differences alone were asked for, and preparing them failed; that may pass.
            NotFound: the variant's bytes are gone.
            Overloaded: this agent has as many transfers as it may have.
        """
        await self._require_wanted(agent_id, order.manifest_digest)
        manifest = await self._manifest(order.manifest_digest)
        wanted = _chosen(chunks_of(manifest), order.ranges)
        with self._admission.transfer(agent_id) as may_run:
            readiness = Readiness.PENDING
            if may_run:
                held = await self._held(agent_id, manifest, order.held_manifests)
                to = Variant(order.manifest_digest, manifest)
                readiness = await self._preparations.ready(to, held, wait_s=self._prepare_wait_s)
            if readiness is Readiness.PENDING:
                yield self.recall(), _nothing()
                return
            forms = _Forms(order, [each.digest for each in held], readiness)
            if order.is_delta_only:
                await self._require_delta(manifest, forms)
            async with aclosing(self._chunks(wanted, forms)) as chunks:
                yield Grant(self._bytes_per_s // self._admission.active), chunks

    @property
    def is_crowded(self) -> bool:
        """Say whether other agents wait for a transfer to end."""
        return self._admission.is_crowded

    def recall(self) -> Grant:
        """Return what an agent is told whose transfer ends for the sake of others."""
        return Grant(not_before=self._admission.later())

    @asynccontextmanager
    async def turn(
        self, agent_id: AgentId, sent: Sent, *, on_wait: Callable[[], Awaitable[None]]
    ) -> AsyncIterator[None]:
        """Wait for the turn of a chunk among those of all agents, calling `on_wait` now and then; send it inside."""
        size_bytes = len(sent.encoded.data)
        async with self._sender.turn(agent_id, size_bytes, on_wait=on_wait):
            yield
        self.sent_bytes[sent.encoded.codec] += size_bytes

    async def _chunks(self, wanted: Sequence[ChunkRef], forms: "_Forms") -> AsyncGenerator[Sent, None]:
        # One for all: new memory for every chunk costs more than reading it (measured: 0.4 ms of processor time for 1
        # MiB, against 0.1 ms).
        room = memoryview(bytearray(max((ref.size_bytes for ref in wanted), default=0)))
        for ref in wanted:
            yield Sent(ref.index, await self._encoded(ref, forms, room))

    async def _encoded(self, ref: ChunkRef, forms: "_Forms", room: memoryview) -> Encoded:
        if forms.is_packed:
            try:
                encoded = await self._packs.encoded(forms.order.manifest_digest, ref.index, forms.held)
            except (IntegrityError, NotFound) as error:
                self._preparations.forget(forms.order.manifest_digest)
                if forms.order.is_delta_only:
                    raise Unavailable(f"{error}; it is prepared again, come back for chunk {ref.index}") from error
            else:
                if forms.order.is_delta_only and not encoded.is_delta:
                    raise PermissionRequired(
                        f"metered link: chunk {ref.index} has no difference, {len(encoded.data)} bytes would travel; "
                        "allow whole chunks"
                    )
                return encoded
        # What is in memory is copied at once: a hop to a thread and back costs more than the copy (measured: 0.3 to 0.5
        # ms of processor time for 1 MiB on two busy cores). The first of a file goes by the thread: opening may wait.
        content = self._cached_chunk(ref, room) if ref.offset else None
        if content is None:
            content = await self._on_disk(self._read_chunk, ref, room)
        return Encoded(Codec.RAW, content)

    async def _require_delta(self, manifest: Manifest, forms: "_Forms") -> None:
        full_bytes = manifest.size_bytes
        if forms.is_packed:
            sizes = await self._packs.sizes(forms.order.manifest_digest, forms.held)
            if sizes.has_delta:
                return
            full_bytes = sizes.full_bytes
        if forms.held and forms.readiness is not Readiness.READY:
            raise Unavailable(
                f"{manifest.model} {manifest.version} {manifest.variant}: its differences could not be prepared yet; "
                "come back later"
            )
        raise _metered(manifest, full_bytes)

    async def _require_wanted(self, agent_id: AgentId, digest: Digest) -> None:
        if digest not in await self._desired.wanted_by(agent_id):
            raise Forbidden(f"agent {agent_id}: {digest} is not in its desired state; deploy it there first")

    async def _held(self, agent_id: AgentId, to: Manifest, digests: Sequence[Digest]) -> list[Variant]:
        """Return those of the manifests that an agent says it holds which differences may be taken from.

        Only what it was given once: a difference and the one variant are as good as the other.
        """
        entitled = await self._desired.entitled_to(agent_id) if digests else ()
        return await self._sources(to, [digest for digest in digests if digest in entitled])

    async def _sources(self, to: Manifest, digests: Sequence[Digest]) -> list[Variant]:
        found = []
        for digest in digests:
            try:
                manifest = await self._manifest(digest)
            except (NotFound, InvalidManifest):
                continue  # Another controller's, or gone: the agent may well hold what we do not.
            if manifest.model == to.model and any(file.chunks for file in manifest.files):
                found.append(Variant(digest, manifest))
        return found

    async def _manifest(self, digest: Digest) -> Manifest:
        known = self._manifests.get(digest)
        if known is None:
            known = await self._on_disk(self._parse_manifest, digest)
            self._manifests[digest] = known
        self._manifests.move_to_end(digest)
        if len(self._manifests) > _CACHED_MANIFESTS:
            self._manifests.popitem(last=False)
        return known

    def _parse_manifest(self, digest: Digest) -> Manifest:
        return parse_manifest(self._read_manifest(digest))

    def _read_manifest(self, digest: Digest) -> bytes:
        path = self._blobs.path(digest)
        try:
            with path.open("rb") as file:
                # More than this is none.
                return file.read(MAX_MANIFEST_BYTES + 1)
        except FileNotFoundError:
            raise NotFound(f"manifest {digest}: not here; publish the model again") from None

    def _cached_chunk(self, ref: ChunkRef, room: memoryview) -> memoryview | None:
        """Return a chunk without waiting for the disk; None when some of it is not in memory."""
        try:
            content = self._read_chunk(ref, room, os.RWF_NOWAIT)
        except OSError:
            # BlockingIOError, or a file system that cannot tell; what is wrong with the disk, the thread finds too.
            return None
        return content if len(content) == ref.size_bytes else None

    def _read_chunk(self, ref: ChunkRef, room: memoryview, flags: int = 0) -> memoryview:
        with self._opened(ref) as descriptor:
            return room[: os.preadv(descriptor, [room[: ref.size_bytes]], ref.offset, flags)]

    @contextmanager
    def _opened(self, ref: ChunkRef) -> Iterator[int]:
        digest = Digest(ref.file.digest)
        try:
            descriptor = os.open(self._blobs.path(digest), os.O_RDONLY)
        except FileNotFoundError:
            raise NotFound(f"blob {digest}: not here; publish the model again") from None
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    async def _on_disk(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._disk, partial(work, *args, **kwargs))
        except OSError as error:
            raise Unavailable(f"disk: {error.strerror or error}; try again") from error


@dataclass(frozen=True, slots=True)
class _Forms:
    """In which forms the chunks of an order may travel."""

    order: ChunkOrder
    held: list[Digest]
    readiness: Readiness

    @property
    def is_packed(self) -> bool:
        return self.readiness in {Readiness.READY, Readiness.PARTLY}


async def _nothing() -> AsyncIterator[Sent]:
    chunks: tuple[Sent, ...] = ()
    for sent in chunks:
        yield sent


def _chosen(chunks: Sequence[ChunkRef], ranges: Sequence[tuple[int, int]]) -> list[ChunkRef]:
    chosen: list[ChunkRef] = []
    end = 0
    for first, count in ranges:
        if first < end or not count or first + count > len(chunks):
            raise InvalidRequest(
                f"ranges: expected them ascending, apart, of at least one and within {len(chunks)} chunks, "
                f"got {count} from {first} on"
            )
        end = first + count
        chosen += chunks[first:end]
    return chosen


def _metered(manifest: Manifest, full_bytes: int) -> PermissionRequired:
    return PermissionRequired(
        f"metered link: {manifest.model} {manifest.version} {manifest.variant} has no differences to what this agent "
        f"holds, whole chunks take {full_bytes} bytes; allow them or bring the agent an unmetered link"
    )
