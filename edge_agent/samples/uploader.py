"""Bringing samples to a controller that a person asked to pull them.

    order ─▶ matching samples ─▶ Offer ─▶ wanted? ─▶ Upload, one after the other ─▶ Offer ─▶ … ─▶ nothing wanted: done

At least once: the controller names what it lacks, so a transfer that broke off goes on where it was. Only samples of
privacy class `any` are offered, and the bytes of each are asked once more before they leave. What was uploaded stays
here until it is too old or makes room: another person may pull it again.

The controller repeats its orders when a session opens; what fails here for good is dropped, and comes back that way.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import grpc
import grpc.aio

from core.backoff import Backoff, BackoffPolicy
from core.clock import Clock
from core.digest import Digest
from core.errors import IntegrityError, NanofleetError, NotFound, Unavailable
from core.logs import peer_text
from core.samples import MAX_CHUNK_BYTES, SampleName, SampleOffer, SampleOrder, encode_name, encode_offer
from core.status import error_from_grpc
from edge_agent.cascade.policy import Privacy
from edge_agent.samples.store import KeptSample, SampleStore, description_of
from protos.samples.v1 import samples_pb2 as pb

# Chosen: more people than pull at one time; the oldest order goes, and comes back with the next session.
MAX_ORDERS = 16
# Chosen: 16 MiB in two minutes is a link of 1 Mbit/s; a slower one is told so and needs smaller samples.
CALL_TIMEOUT_S = 120.0
# Chosen: with the pauses below some minutes of trying; after that it waits for the next session.
MAX_ATTEMPTS = 6
PAUSES = BackoffPolicy(base_s=2.0, cap_s=60.0)
METERED, OFF = "metered", "off"

T = TypeVar("T")

_log = logging.getLogger(__name__)


class SampleCalls(Protocol):
    """What is called of SamplesService; raises NanofleetError."""

    async def offer(self, offer: SampleOffer) -> Sequence[Digest]:
        """Return the digests that are wanted."""
        ...

    async def upload(self, pull_id: str, name: SampleName, content: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class UploadTerms:
    """Of which models samples may leave this agent, on what link, and how fast."""

    allows: Callable[[str], bool]
    is_metered: bool = False
    # None: as fast as they are taken.
    bytes_per_s: float | None = None


class SampleUploader:
    """Keep `run` running."""

    def __init__(
        self,
        calls: SampleCalls,
        store: SampleStore,
        terms: UploadTerms,
        *,
        disk: Executor,
        clock: Clock,
        pause: Callable[[float], "asyncio.Future[None]"] | None = None,
    ) -> None:
        """`pause` waits for so many seconds; None: as asyncio does."""
        self._calls = calls
        self._store = store
        self._disk = disk
        self._clock = clock
        self._terms = terms
        self._pause = pause or (lambda seconds: asyncio.ensure_future(asyncio.sleep(seconds)))
        self._orders: dict[str, SampleOrder] = {}
        self._has_orders = asyncio.Event()
        self.uploaded = 0
        self.uploaded_bytes = 0

    def order(self, order: SampleOrder) -> None:
        """Take an order; one that is here already counts once, with its newest words."""
        self._orders[order.pull_id] = order
        if len(self._orders) > MAX_ORDERS:
            del self._orders[next(iter(self._orders))]
        self._has_orders.set()

    async def run(self) -> None:
        """Deliver what is ordered, one order after the other; for ever."""
        while True:
            await self._has_orders.wait()
            while self._orders:
                order = next(iter(self._orders.values()))
                await self._serve(order)
                # Unless it was given anew meanwhile, with other words.
                if self._orders.get(order.pull_id) is order:
                    del self._orders[order.pull_id]
            self._has_orders.clear()

    async def _serve(self, order: SampleOrder) -> None:
        backoff, attempts = Backoff(PAUSES), 0
        while attempts < MAX_ATTEMPTS and order.expires_at > self._clock.now():
            uploaded = self.uploaded
            try:
                await self._deliver(order)
            except NanofleetError as error:
                _log.log(
                    logging.DEBUG if error.retryable else logging.WARNING,
                    "samples could not be delivered",
                    extra={"pull": order.pull_id, "reason": peer_text(str(error))},
                )
                if not error.retryable:
                    return
                if self.uploaded > uploaded:
                    backoff.reset()
                    attempts = 0
                attempts += 1
                await self._pause(backoff.next_delay_s())
            else:
                return

    async def _deliver(self, order: SampleOrder) -> None:
        if obstacle := self._obstacle(order):
            await self._calls.offer(SampleOffer(order.pull_id, declined=obstacle))
            return
        matching = await self._on_disk(partial(self._store.matching, order.model, since=order.since))
        offered = {each.digest: each for each in matching if each.privacy == Privacy.ANY.value}
        offered = dict([*offered.items()][: order.limit])
        while True:
            names = tuple(SampleName(each.digest, each.size_bytes) for each in offered.values())
            wanted = [
                offered[digest]
                for digest in await self._calls.offer(SampleOffer(order.pull_id, names))
                if digest in offered
            ]
            if not wanted:
                return
            for kept in wanted:
                if not await self._upload(order, kept):
                    del offered[kept.digest]

    def _obstacle(self, order: SampleOrder) -> str:
        """Return why nothing may leave for an order; empty: it may."""
        if not self._terms.allows(order.model):
            return OFF
        return METERED if self._terms.is_metered and not order.permits_metered else ""

    async def _upload(self, order: SampleOrder, kept: KeptSample) -> bool:
        """Upload one sample; False: it is not here any more."""
        try:
            content = await self._on_disk(partial(_sendable, self._store, kept))
        except (NotFound, IntegrityError) as error:
            _log.info("a sample is left out", extra={"reason": str(error)})
            return False
        await self._calls.upload(order.pull_id, SampleName(kept.digest, len(content)), content)
        self.uploaded += 1
        self.uploaded_bytes += len(content)
        if self._terms.bytes_per_s is not None:
            # The link is there for requests first.
            await self._pause(len(content) / self._terms.bytes_per_s)
        return True

    async def _on_disk(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work)


def _sendable(store: SampleStore, kept: KeptSample) -> bytes:
    """Return the bytes of a sample that may leave the site.

    Raises:
        NotFound: it is gone.
        IntegrityError: it is damaged, or not what its name says; that also a file that somebody renamed is.
    """
    content = store.read(kept)
    if description_of(content, kept).privacy != Privacy.ANY.value:
        raise IntegrityError(f"sample {kept.digest}: expected privacy any, which may leave the site")
    return content


class SampleCallsOverGrpc:
    """What an agent calls of SamplesService, over a channel that it borrows."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    async def offer(self, offer: SampleOffer) -> Sequence[Digest]:
        from protos.samples.v1.samples_pb2_grpc import SamplesServiceStub

        try:
            reply = await SamplesServiceStub(self._channel).Offer(encode_offer(offer), timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise _refusal(error) from error
        return tuple(Digest(digest) for digest in reply.wanted)

    async def upload(self, pull_id: str, name: SampleName, content: bytes) -> None:
        from protos.samples.v1.samples_pb2_grpc import SamplesServiceStub

        parts = _parts(pull_id, name, content)
        try:
            await SamplesServiceStub(self._channel).Upload(parts, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise _refusal(error) from error


async def _parts(pull_id: str, name: SampleName, content: bytes) -> AsyncIterator[pb.UploadRequest]:
    yield pb.UploadRequest(header=pb.UploadHeader(pull_id=pull_id, sample=encode_name(name)))
    for at in range(0, len(content), MAX_CHUNK_BYTES):
        yield pb.UploadRequest(chunk=content[at : at + MAX_CHUNK_BYTES])


def _refusal(error: grpc.aio.AioRpcError) -> NanofleetError:
    code, text = error.code(), peer_text(error.details() or error.code().name)
    # One call was too slow; the order's own time is not over.
    return Unavailable(text) if code is grpc.StatusCode.DEADLINE_EXCEEDED else error_from_grpc(code, text)
