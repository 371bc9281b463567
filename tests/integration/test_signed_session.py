"""Signed assignments and catalogue metadata on real sockets, verified as an agent would."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from controller.api.agents_grpc import FleetServicer
from controller.api.catalogue_grpc import CatalogueServicer
from controller.fleet.model import WHOLE_FLEET
from controller.fleet.service import Fleet
from controller.signing.director import Director
from controller.signing.model import KeyRole
from core.addresses import Address
from core.clock import SystemClock
from core.errors import Conflict, Untrusted
from core.fleet_state import AgentHello, DesiredState, Position, PushResult, SignedAssignment
from core.fleet_wire import decode_desired
from core.grpc_transport import SERVER_OPTIONS, TransportCredentials, open_channel
from core.ids import ModelName, VariantName
from protos.catalogue.v1 import catalogue_pb2, catalogue_pb2_grpc
from protos.fleet.v1 import fleet_pb2 as pb
from protos.fleet.v1.fleet_pb2_grpc import add_FleetServiceServicer_to_server
from tests.support.catalogues import METER, ORIGINAL, Release, SignedWorld, made_release
from tests.support.fake_agent import Dialler, FakeAgent
from tests.support.fleet_store import MemoryFleetStore
from tests.support.fleet_values import made_hello

FIRST = Position(1, 1)
TIMEOUT_S = 10.0


class Published:
    """A registry of `meter` in two versions."""

    async def variant(self, model: ModelName, version: int | None, variant: VariantName) -> Release:
        return made_release(model, version or 2)


class WatchedDirector(Director):
    """Tells when it could not sign."""

    def __init__(self, world: SignedWorld) -> None:
        super().__init__(world.catalogue, clock=world.clock)
        self.refused = asyncio.Event()

    async def signed(self, desired: DesiredState, hello: AgentHello) -> SignedAssignment:
        try:
            return await super().signed(desired, hello)
        except Untrusted:
            self.refused.set()
            raise


class Controller:
    def __init__(self, world: SignedWorld) -> None:
        self.catalogue = world.catalogue
        self.director = WatchedDirector(world)
        self.fleet = Fleet(
            MemoryFleetStore(), Published(), clock=SystemClock(), max_sessions=10, releases=world.catalogue
        )
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        servicer = FleetServicer(
            self.fleet,
            self.director,
            check_hello=lambda _hello, _context: None,
            trust_bundle=lambda: b"",
            unsigned_pause_s=0.1,
        )
        add_FleetServiceServicer_to_server(servicer, self.server)
        catalogue_pb2_grpc.add_CatalogueServiceServicer_to_server(CatalogueServicer(world.catalogue), self.server)
        port = self.server.add_secure_port("127.0.0.1:0", TransportCredentials.local().server)
        self.address = Address("127.0.0.1", port)

    async def deploy(self, version: int) -> None:
        await self.fleet.deploy(WHOLE_FLEET, model=METER, version=version, variant=ORIGINAL)


@pytest.fixture
async def world(tmp_path: Path) -> SignedWorld:
    world = SignedWorld(tmp_path)
    await world.catalogue.prepare()
    await world.catalogue.release([made_release(METER, 1)])
    return world


@pytest.fixture
async def controller(world: SignedWorld) -> AsyncIterator[Controller]:
    controller = Controller(world)
    await controller.server.start()
    reissuing = asyncio.create_task(controller.director.run(controller.fleet.reissue))
    yield controller
    reissuing.cancel()
    await controller.server.stop(None)


@pytest.fixture
async def agent(controller: Controller) -> AsyncIterator[FakeAgent]:
    dialler = Dialler(controller.address, TransportCredentials.local())
    async with dialler.dial() as agent:
        await agent.hello(made_hello())
        yield agent
    await dialler.close()


def position_of(signed: SignedAssignment) -> Position:
    return decode_desired(pb.DesiredState.FromString(signed.payload)).position


async def test_a_deployment_is_pushed_signed_with_the_catalogue_beside_it(
    controller: Controller, agent: FakeAgent
) -> None:
    await controller.deploy(1)

    signed = await agent.assignment()

    assert position_of(signed) == FIRST
    assert controller.catalogue.lists_director(signed.key_id)
    assert signed.catalogue[-1].name == "1.family-meter.json"


async def test_a_version_that_is_not_in_the_catalogue_is_not_deployed(controller: Controller) -> None:
    with pytest.raises(Conflict, match="not in the catalogue"):
        await controller.deploy(2)


async def test_a_revocation_reaches_live_sessions_at_the_same_position(
    controller: Controller, agent: FakeAgent
) -> None:
    await controller.deploy(1)
    await agent.assignment()

    await controller.catalogue.revoke(METER, versions=[1])

    signed = await agent.assignment()
    assert position_of(signed) == FIRST
    assert signed.catalogue[-1].name == "2.family-meter.json"


async def test_without_a_director_key_the_session_stays_and_the_operator_is_told_once(
    controller: Controller, agent: FakeAgent, world: SignedWorld, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = world.move_keys(KeyRole.DIRECTOR)
    await controller.deploy(1)
    await controller.director.refused.wait()
    await agent.answer(PushResult(FIRST))

    controller.director.refused.clear()
    await controller.director.refused.wait()
    (elsewhere / "director").rename(world.folder / "keys" / "director")

    assert position_of(await agent.assignment()) == FIRST
    (alarm,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert "rotate director" in getattr(alarm, "reason", "")


async def test_what_no_key_signed_goes_out_when_the_catalogue_lists_another(
    controller: Controller, agent: FakeAgent, world: SignedWorld
) -> None:
    world.move_keys(KeyRole.DIRECTOR)
    await controller.deploy(1)
    await controller.director.refused.wait()

    rotation = await controller.catalogue.rotate(KeyRole.DIRECTOR)

    assert (await agent.assignment()).key_id == rotation.added


@pytest.fixture
async def stub(controller: Controller) -> AsyncIterator["catalogue_pb2_grpc.CatalogueServiceAsyncStub"]:
    channel = open_channel(controller.address, TransportCredentials.local())
    yield catalogue_pb2_grpc.CatalogueServiceStub(channel)
    await channel.close()


async def test_metadata_is_served_by_name(
    controller: Controller, stub: "catalogue_pb2_grpc.CatalogueServiceAsyncStub"
) -> None:
    request = catalogue_pb2.GetMetadataRequest(name="timestamp.json")

    answer = await stub.GetMetadata(request, timeout=TIMEOUT_S)

    assert answer.content == await controller.catalogue.metadata("timestamp.json")


@pytest.mark.parametrize("name", ["", "2.root.json", "x" * 5000])
async def test_a_name_of_nothing_is_not_found(stub: "catalogue_pb2_grpc.CatalogueServiceAsyncStub", name: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.GetMetadata(catalogue_pb2.GetMetadataRequest(name=name), timeout=TIMEOUT_S)

    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
