"""Whatever an agent with a certificate sends, it is understood or refused with a typed error, within its bounds."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from controller.api.catalogue_grpc import CatalogueServicer
from controller.api.delivery_grpc import MAX_RANGES, DeliveryServicer
from controller.transfer.model import Codec
from controller.transfer.service import MAX_HELD, ChunkOrder, Grant
from core import fleet_wire
from core.digest import digest_of
from core.errors import NanofleetError
from core.fleet_state import (
    AgentHello,
    MetadataFile,
    Position,
    Problem,
    PushResult,
    SignedAssignment,
    SlotPhase,
    SlotReport,
)
from core.fleet_state import ReportedState as Reported
from core.fleet_wire import MAX_HELD_MANIFESTS, MAX_METADATA_BYTES, MAX_METADATA_FILES, MAX_TAGS, MAX_TEXT_CHARS
from core.ids import AgentId
from core.samples import SampleCount, SampleCounts, decode_counts, encode_counts
from protos.artifacts.v1 import artifacts_pb2
from protos.catalogue.v1 import catalogue_pb2
from protos.fleet.v1 import fleet_pb2 as pb
from tests.support.catalogues import METER, SignedWorld, made_release
from tests.support.fleet_values import made_hello, made_slot
from tests.support.fuzzed import Aborted, OneCall, nearly
from tests.support.open_inference_strategies import PATIENT

DIGEST = digest_of(b"")
REFUSED = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
FIRST = Position(1, 1)
MESSAGES = (
    pb.AgentMessage(hello=fleet_wire.encode_hello(made_hello())),
    pb.AgentMessage(result=fleet_wire.encode_push_result(PushResult(FIRST, Problem("disk_full", "full")))),
    pb.AgentMessage(
        reported=fleet_wire.encode_reported(Reported(FIRST, (SlotReport(made_slot(), SlotPhase.READY, 1, 2),)))
    ),
    pb.AgentMessage(samples=encode_counts(SampleCounts((SampleCount("meter", 7, "tied", 3),), 1, 900))),
)
ASSIGNMENTS = (
    fleet_wire.encode_assignment(
        SignedAssignment(b"payload", b"signature", "key", (MetadataFile("1.root.json", b"{}"),))
    ),
)
ORDERS = (
    artifacts_pb2.FetchChunksRequest(
        manifest_digest=DIGEST,
        ranges=[artifacts_pb2.ChunkRange(first=0, count=3)],
        held_manifests=[DIGEST],
        delta_only=True,
    ),
)
NAMES = ("timestamp.json", "1.root.json", "1.snapshot.json", "1.targets.json", "1.family-meter.json")


@PATIENT
@given(nearly(MESSAGES))
def test_bytes_of_an_agents_message_are_understood_or_refused(content: bytes) -> None:
    try:
        message = pb.AgentMessage.FromString(content)
    except DecodeError:
        return  # gRPC's own business.
    with suppress(NanofleetError):
        match message.WhichOneof("message"):
            case "hello":
                _require_bounded(fleet_wire.decode_hello(message.hello))
            case "result":
                fleet_wire.decode_push_result(message.result)
            case "reported":
                fleet_wire.decode_reported(message.reported)
            case "samples":
                decode_counts(message.samples)


def _require_bounded(hello: AgentHello) -> None:
    assert len(hello.tags) <= MAX_TAGS
    assert len(hello.held_manifests) <= MAX_HELD_MANIFESTS
    assert all(len(text) <= MAX_TEXT_CHARS for text in (hello.software_version, hello.boot_id, *hello.tags))


@PATIENT
@given(nearly(ASSIGNMENTS))
def test_bytes_of_an_assignment_with_metadata_are_understood_or_refused(content: bytes) -> None:
    try:
        signed = fleet_wire.decode_assignment(pb.SignedAssignment.FromString(content))
    except (DecodeError, NanofleetError):
        return
    assert len(signed.catalogue) <= MAX_METADATA_FILES
    assert sum(len(file.content) for file in signed.catalogue) <= MAX_METADATA_BYTES
    assert all(len(file.name) <= MAX_TEXT_CHARS for file in signed.catalogue)


@PATIENT
@given(nearly((catalogue_pb2.MetadataFile(name="1.root.json", content=b"{}"),)))
def test_bytes_of_a_metadata_file_are_understood_or_refused(content: bytes) -> None:
    try:
        file = catalogue_pb2.MetadataFile.FromString(content)
    except DecodeError:
        return
    signed = fleet_wire.decode_assignment(pb.SignedAssignment(catalogue=[file]))
    assert signed.catalogue[0].content == file.content


class Orders:
    """Stands where `Transfers` would be: keeps the order, and lends nothing."""

    def __init__(self) -> None:
        self.order: ChunkOrder | None = None

    @asynccontextmanager
    async def transfer(
        self, _agent_id: AgentId, order: ChunkOrder
    ) -> AsyncIterator[tuple[Grant, AsyncIterator[Codec]]]:
        self.order = order
        yield Grant(1), _nothing()


async def _nothing() -> AsyncIterator[Codec]:
    nothing: tuple[Codec, ...] = ()
    for codec in nothing:
        yield codec


@PATIENT
@given(nearly(ORDERS))
def test_bytes_of_an_order_are_understood_or_refused(content: bytes) -> None:
    try:
        request = artifacts_pb2.FetchChunksRequest.FromString(content)
    except DecodeError:
        return
    orders, context = Orders(), OneCall()
    servicer = DeliveryServicer(orders, caller_of=lambda _context: lambda: AgentId("cam-1"))  # type: ignore[arg-type]  # a fake

    async def fetch() -> None:
        try:
            await servicer.FetchChunks(request, context)  # type: ignore[arg-type]  # a fake
        except Aborted:
            return

    asyncio.run(fetch())

    assert context.code in REFUSED | {grpc.StatusCode.OK}, context.details
    assert (orders.order is None) is (context.code is not grpc.StatusCode.OK)
    if orders.order is not None:
        assert len(orders.order.ranges) <= MAX_RANGES
        assert len(orders.order.held_manifests) <= MAX_HELD


class Shelf:
    def __init__(self, world: SignedWorld, runner: asyncio.Runner) -> None:
        self._servicer = CatalogueServicer(world.catalogue)
        self._runner = runner

    def ask(self, name: str) -> tuple[OneCall, bytes | None]:
        context = OneCall()

        async def asking() -> bytes | None:
            try:
                request = catalogue_pb2.GetMetadataRequest(name=name)
                return (await self._servicer.GetMetadata(request, context)).content  # type: ignore[arg-type]  # a fake
            except Aborted:
                return None

        return context, self._runner.run(asking())


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    world = SignedWorld(tmp_path_factory.mktemp("catalogue"))

    async def prepare() -> None:
        await world.catalogue.prepare()
        await world.catalogue.release([made_release(METER, 1)])

    with asyncio.Runner() as runner:
        runner.run(prepare())
        yield Shelf(world, runner)


@PATIENT
@given(
    name=st.text(st.characters(codec="utf-8"), max_size=80)
    | st.sampled_from(NAMES)
    | st.builds("{}.{}.json".format, st.integers(), st.sampled_from(["root", "snapshot", "targets", "family-meter"]))
    | st.builds("{}{}{}".format, st.sampled_from(["../", "/", "0", "%00", ""]), st.sampled_from(NAMES), st.text("./\n"))
)
def test_a_name_of_metadata_is_answered_or_not_found(shelf: Shelf, name: str) -> None:
    context, content = shelf.ask(name)

    assert context.code in {grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND}, context.details
    # What is found is a signed file of ours, and of no other name than those.
    assert (content is None) or content.startswith(b"{")
    assert len(context.details) < 1000
