"""SamplesService over real gRPC: the agent's own calls, and peers that keep to nothing."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from controller.api.samples_grpc import SamplesServicer
from core.digest import digest_of
from core.errors import NotFound, Overloaded, Unavailable
from core.ids import AgentId
from core.samples import MAX_CHUNK_BYTES, SampleName, SampleOffer, encode_name
from edge_agent.samples.uploader import SampleCallsOverGrpc
from protos.samples.v1 import samples_pb2 as pb
from protos.samples.v1.samples_pb2_grpc import SamplesServiceStub, add_SamplesServiceServicer_to_server
from tests.support.fleet_values import CAM, made_hello
from tests.unit.control.test_fleet_service import World
from tests.unit.control.test_sample_pulls import Side

# Of several chunks.
CONTENT = bytes(range(256)) * 4096
NAME = SampleName(digest_of(CONTENT), len(CONTENT))


class Wire:
    def __init__(self, side: Side, channel: grpc.aio.Channel) -> None:
        self.side = side
        self.calls = SampleCallsOverGrpc(channel)
        self._stub = SamplesServiceStub(channel)

    async def pull(self) -> str:
        return (await self.side.pull()).pull.pull_id

    async def wanted(self) -> str:
        """Return the id of a pull for which the sample is wanted."""
        pull_id = await self.pull()
        assert await self.calls.offer(SampleOffer(pull_id, (NAME,))) == (NAME.digest,)
        return pull_id

    async def upload(self, *parts: pb.UploadRequest) -> grpc.StatusCode:
        """Send these parts; return how it ended."""
        call = self._stub.Upload(iter(parts), timeout=10)
        return await call.code()

    def is_kept(self, pull_id: str) -> bool:
        return NAME.digest in self.side.pulls.pull(pull_id).deliveries[CAM].samples


@pytest.fixture
async def wire(tmp_path: Path) -> AsyncIterator[Wire]:
    world = World()
    await world.visit(made_hello())
    await world.deploy()
    side = Side(world, tmp_path / "samples")
    await side.pulls.prepare()
    server = grpc.aio.server()
    servicer = SamplesServicer(side.pulls, agent_of=lambda _: AgentId(CAM), upload_timeout_s=0.5)
    add_SamplesServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Wire(side, channel)
    await server.stop(None)
    side.pulls.close()


def header(pull_id: str, name: SampleName = NAME) -> pb.UploadRequest:
    return pb.UploadRequest(header=pb.UploadHeader(pull_id=pull_id, sample=encode_name(name)))


async def test_a_sample_of_several_chunks_arrives_whole(wire: Wire) -> None:
    pull_id = await wire.wanted()
    await wire.calls.upload(pull_id, NAME, CONTENT)
    assert await wire.side.pulls.content(pull_id, CAM, NAME.digest) == CONTENT
    assert await wire.calls.offer(SampleOffer(pull_id, (NAME,))) == ()


async def test_a_refusal_is_what_it_was_on_the_other_side(wire: Wire) -> None:
    with pytest.raises(NotFound, match="nobody asks this agent"):
        await wire.calls.offer(SampleOffer("f" * 32))
    with pytest.raises(Unavailable, match="offer it first"):
        await wire.calls.upload(await wire.pull(), NAME, CONTENT)


async def test_an_upload_that_breaks_off_keeps_nothing_and_can_be_done_again(wire: Wire) -> None:
    pull_id = await wire.wanted()

    async def broken() -> AsyncIterator[pb.UploadRequest]:
        yield header(pull_id)
        yield pb.UploadRequest(chunk=CONTENT[:1000])
        await asyncio.Event().wait()

    call = wire._stub.Upload(broken(), timeout=10)
    await asyncio.sleep(0.05)
    call.cancel()
    await asyncio.wait([asyncio.ensure_future(call.code())])
    assert not wire.is_kept(pull_id)
    async with asyncio.timeout(10):
        while not wire.is_kept(pull_id):
            try:
                await wire.calls.upload(pull_id, NAME, CONTENT)
            except Overloaded:
                # The controller has not noticed yet that the other one is gone.
                await asyncio.sleep(0.01)


async def test_one_that_sends_too_slowly_is_ended(wire: Wire) -> None:
    pull_id = await wire.wanted()

    async def slow() -> AsyncIterator[pb.UploadRequest]:
        yield header(pull_id)
        await asyncio.sleep(20)

    assert await wire._stub.Upload(slow(), timeout=10).code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_what_is_no_upload_is_refused_and_keeps_nothing(wire: Wire) -> None:
    pull_id = await wire.wanted()
    chunk = pb.UploadRequest(chunk=CONTENT[:100])
    for parts in (
        (),
        (chunk,),
        (header("../x"), chunk),
        (header(pull_id, NAME._replace(size_bytes=1 << 40)), chunk),
        (header(pull_id), header(pull_id)),
        (header(pull_id), pb.UploadRequest(chunk=bytes(MAX_CHUNK_BYTES + 1))),
        (header(pull_id), pb.UploadRequest()),
        (header(pull_id), pb.UploadRequest(chunk=b"")),
        (header(pull_id), *[pb.UploadRequest(chunk=bytes(MAX_CHUNK_BYTES))] * 6),
    ):
        assert await wire.upload(*parts) is grpc.StatusCode.INVALID_ARGUMENT, parts
    assert not wire.is_kept(pull_id)
