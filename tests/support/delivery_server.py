"""DeliveryService as the controller runs it, over real gRPC on loopback, with variants and packs in memory.

Agents name themselves in the metadata of their calls: certificates are tested elsewhere.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio

from controller.api.delivery_grpc import DeliveryServicer, add_delivery_to_server
from controller.transfer.fairness import Admission, FairSender, SendLimits
from controller.transfer.model import Codec, Encoded, Sizes
from controller.transfer.service import Transfers
from core.clock import SystemClock
from core.delta import compress, encode_difference
from core.digest import Digest, hex_of
from core.errors import NotFound
from core.grpc_transport import CHANNEL_OPTIONS, SERVER_OPTIONS, TransportCredentials
from core.ids import AgentId
from core.manifest import Manifest
from edge_agent.sync.calls import DeliveryCallsOverGrpc
from edge_agent.sync.controller_source import ControllerSource, SourceLimits
from edge_agent.sync.delivery import Delivery, DeliveryLimits
from edge_agent.sync.store import ContentStore
from protos.artifacts.v1.artifacts_pb2_grpc import add_DeliveryServiceServicer_to_server
from tests.support.delivery_shelf import DeliveryShelf, DeliveryShelfServicer, chunk_contents
from tests.support.variants import MadeVariant

AGENT_HEADER = "x-agent"


@dataclass
class MemoryPacks:
    """Encodes on the spot; `poison` changes what is sent for a chunk."""

    variants: dict[Digest, MadeVariant]
    prepared: list[tuple[Digest, tuple[Digest, ...]]] = field(default_factory=list)
    poison: Callable[[int, Encoded], Encoded] = lambda _index, encoded: encoded
    failure: Exception | None = None
    # By what the difference would be to; and what it is not worth it to.
    failures: dict[Digest, Exception] = field(default_factory=dict)
    useless: set[Digest] = field(default_factory=set)

    async def prepare(self, to: Manifest, held: Collection[Manifest]) -> None:
        for failure in (self.failure, *(self.failures.get(each.digest()) for each in held)):
            if failure is not None:
                raise failure
        self.prepared.append((to.digest(), tuple(each.digest() for each in held)))

    async def encoded(self, to: Digest, index: int, held: Sequence[Digest]) -> Encoded:
        if to not in {digest for digest, _ in self.prepared}:
            raise NotFound(f"{to}: not prepared")
        content = chunk_contents(self.variants[to])[index]
        forms = [Encoded(Codec.RAW, content, is_delta=bool(held)), Encoded(Codec.ZSTD, compress(content))]
        for digest in held:
            source = chunk_contents(self.variants[digest])
            at = min(index, len(source) - 1)
            difference = encode_difference(source[at], content, width=1)
            forms.append(Encoded(Codec.DIFFERENCE, difference, digest, at, is_delta=True))
        return self.poison(index, min(forms, key=lambda form: len(form.data)))

    async def sizes(self, to: Digest, held: Sequence[Digest]) -> Sizes:
        plain_bytes = self.variants[to].manifest.size_bytes
        return Sizes(plain_bytes, plain_bytes, plain_bytes, has_delta=bool(self._worth(to, held)))

    def _worth(self, to: Digest, held: Sequence[Digest]) -> list[Digest]:
        prepared = {digest for target, sources in self.prepared if target == to for digest in sources}
        return [digest for digest in held if digest in prepared - self.useless]


class MemoryDesired:
    def __init__(self) -> None:
        self.wanted: dict[AgentId, set[Digest]] = {}
        self.former: dict[AgentId, set[Digest]] = {}

    async def wanted_by(self, agent_id: AgentId) -> Collection[Digest]:
        return self.wanted.get(agent_id, set())

    async def entitled_to(self, agent_id: AgentId) -> Collection[Digest]:
        return self.wanted.get(agent_id, set()) | self.former.get(agent_id, set())


class Depot:
    """The controller's side: blobs in a folder, packs in memory, desired states as the test sets them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.variants: dict[Digest, MadeVariant] = {}
        self.packs = MemoryPacks(self.variants)
        self.desired = MemoryDesired()
        self.max_transfers, self.pause_s = 64, 0.01
        self.sender = FairSender(SendLimits(), clock=SystemClock())
        self.port = 0

    def path(self, digest: Digest) -> Path:
        return self._folder / hex_of(digest)

    def publish(self, variant: MadeVariant, *agents: str) -> None:
        """Hold a variant, and let it be what `agents` shall run."""
        self.variants[variant.digest] = variant
        for digest, content in variant.blobs.items():
            self.path(digest).write_bytes(content)
        for agent in agents:
            self.desired.wanted.setdefault(AgentId(agent), set()).add(variant.digest)

    def transfers(self, disk: ThreadPoolExecutor, *, prepare_wait_s: float = 8.0) -> Transfers:
        clock = SystemClock()
        admission = Admission(max_transfers=self.max_transfers, clock=clock, pause_s=self.pause_s)
        return Transfers(
            self.desired,
            self,
            self.packs,
            sender=self.sender,
            admission=admission,
            disk=disk,
            clock=clock,
            prepare_wait_s=prepare_wait_s,
        )


@asynccontextmanager
async def serving(depot: Depot, **servicer: Any) -> AsyncIterator[Depot]:
    with ThreadPoolExecutor(2) as disk:
        transfers = depot.transfers(disk)
        preparing = asyncio.create_task(transfers.run(), name="preparations")
        server = grpc.aio.server(options=SERVER_OPTIONS)
        add_delivery_to_server(DeliveryServicer(transfers, caller_of=_caller_of, **servicer), server)
        depot.port = server.add_secure_port("127.0.0.1:0", TransportCredentials.local().server)
        await server.start()
        try:
            yield depot
        finally:
            await server.stop(None)
            preparing.cancel()
            await asyncio.wait([preparing])


@asynccontextmanager
async def serving_shelf(shelf: DeliveryShelf, *, port: int = 0) -> AsyncIterator[int]:
    """Serve a shelf, which does wrong where a test asks for it; yields the port."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    add_DeliveryServiceServicer_to_server(DeliveryShelfServicer(shelf), server)
    bound = server.add_secure_port(f"127.0.0.1:{port}", TransportCredentials.local().server)
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(None)


class NamingCalls:
    """The calls of an agent, with its name in every one."""

    def __init__(self, channel: grpc.aio.Channel, agent: str) -> None:
        self._calls = DeliveryCallsOverGrpc(channel)
        self._metadata = ((AGENT_HEADER, agent),)

    def FetchManifest(self, request: Any) -> Any:  # noqa: N802 (the protocol's)
        return self._calls.FetchManifest(request, metadata=self._metadata)

    def FetchChunks(self, request: Any) -> Any:  # noqa: N802 (the protocol's)
        return self._calls.FetchChunks(request, metadata=self._metadata)


@dataclass
class Device:
    """The agent's side: a store, and a Delivery that works on it."""

    store: ContentStore
    source: ControllerSource
    delivery: Delivery

    async def bring(self, variant: MadeVariant) -> None:
        await self.delivery.variant(variant.digest, lambda *_: None)

    async def run(self, variant: MadeVariant) -> None:
        """Bring a variant in and make a folder of it, as if it had been loaded."""
        await self.bring(variant)
        self.store.materialise(variant.manifest, variant.digest)


@asynccontextmanager
async def device(
    root: Path, port: int, *, agent: str = "gate-1", is_metered: bool = False, timeout_s: float = 5.0, **store: Any
) -> AsyncIterator[Device]:
    credentials = TransportCredentials.local().channel
    with ThreadPoolExecutor(1) as disk:
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=CHANNEL_OPTIONS) as channel:
            content = ContentStore(root, **store)
            clock = SystemClock()
            source = ControllerSource(NamingCalls(channel, agent), limits=SourceLimits(timeout_s), clock=clock)
            limits = DeliveryLimits(reserve_bytes=0)
            delivery = Delivery(source, content, disk=disk, limits=limits, clock=clock, is_metered=is_metered)
            yield Device(content, source, delivery)


def _caller_of(context: "grpc.aio.ServicerContext[Any, Any]") -> Callable[[], AgentId]:
    agent_id = AgentId(str(dict(context.invocation_metadata() or ())[AGENT_HEADER]))
    return lambda: agent_id
