"""Agents on a real stream: what the controller says, takes and refuses."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest

from controller.api.agents_grpc import MAX_AGENT_MESSAGE_BYTES, FleetServicer
from controller.fleet.model import WHOLE_FLEET, AgentView
from controller.fleet.service import Fleet
from controller.fleet.store import FleetRecords
from controller.storage.database import Database
from controller.storage.fleet import SqlFleetStore
from core.addresses import Address
from core.clock import SystemClock
from core.fleet_state import NOWHERE, AgentHello, Position, Problem, PushResult
from core.grpc_transport import MAX_MESSAGE_BYTES, SERVER_OPTIONS, TransportCredentials
from core.ids import AgentId, ModelName
from protos.fleet.v1 import fleet_pb2 as pb
from protos.fleet.v1.fleet_pb2_grpc import add_FleetServiceServicer_to_server
from tests.support.fake_agent import Dialler
from tests.support.fleet_store import MemoryFleetStore
from tests.support.fleet_values import (
    CAM,
    INT8,
    METER,
    FakeCatalogue,
    made_deployment,
    made_hello,
    made_report,
    made_slot,
)
from tests.support.releases import OpenCatalogue, UnsigningDirector

FIRST = Position(1, 1)
# Short enough for a test, long enough for a busy machine.
HELLO_TIMEOUT_S = 0.5
PUSH_TIMEOUT_S = 0.5
BUNDLE = b"the fleet's authorities"


def any_name(_hello: AgentHello, _context: object) -> None:
    """Believe every Hello: whose name it may say is the subject of `tests.faults.test_identity`."""


class Controller:
    """The fleet behind its gRPC face, on a port of its own, with the store in memory."""

    def __init__(self) -> None:
        self.store = MemoryFleetStore()
        self.fleet = Fleet(self.store, FakeCatalogue(), releases=OpenCatalogue(), clock=SystemClock(), max_sessions=500)
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        servicer = FleetServicer(
            self.fleet,
            UnsigningDirector(),
            check_hello=any_name,
            trust_bundle=lambda: BUNDLE,
            hello_timeout_s=HELLO_TIMEOUT_S,
            push_timeout_s=PUSH_TIMEOUT_S,
        )
        add_FleetServiceServicer_to_server(servicer, self.server)
        port = self.server.add_secure_port("127.0.0.1:0", TransportCredentials.local().server)
        self.address = Address("127.0.0.1", port)

    async def deploy(self, version: int = 1) -> None:
        await self.fleet.deploy(WHOLE_FLEET, model=METER, version=version, variant=INT8)

    async def until(self, claim: Callable[[AgentView], bool], agent_id: AgentId = CAM) -> AgentView:
        """Wait until `claim` is true of an agent."""
        async with asyncio.timeout(10):
            while True:
                seen = self.fleet.revision
                if claim(view := await self.fleet.agent(agent_id)):
                    return view
                await self.fleet.next_change(seen, timeout_s=10)


@pytest.fixture
async def controller() -> AsyncIterator[Controller]:
    controller = Controller()
    await controller.server.start()
    yield controller
    await controller.server.stop(None)


@pytest.fixture
async def dialler(controller: Controller) -> AsyncIterator[Dialler]:
    dialler = Dialler(controller.address, TransportCredentials.local())
    yield dialler
    await dialler.close()


# ---- pushes ---------------------------------------------------------------------------------------------------


async def test_a_deployment_is_pushed_the_moment_it_is_made(controller: Controller, dialler: Dialler) -> None:
    async with dialler.dial() as agent:
        assert await agent.hello(made_hello()) == NOWHERE
        await controller.deploy()

        desired = await agent.desired()

    assert (desired.agent_id, desired.position, desired.slots) == (CAM, FIRST, (made_slot(METER, 1),))


async def test_an_agent_in_sync_hears_nothing_after_welcome(controller: Controller, dialler: Dialler) -> None:
    await controller.deploy()
    async with dialler.dial() as agent:
        await agent.hello(made_hello())
        await agent.answer(PushResult((await agent.desired()).position))

    async with dialler.dial() as agent:
        assert await agent.hello(made_hello(applied=FIRST)) == FIRST
        # The next thing said is the next thing heard: nothing was in between.
        await controller.deploy(version=2)
        assert (await agent.desired()).position == Position(1, 2)


async def test_a_push_lost_with_the_link_comes_with_the_next_session(controller: Controller, dialler: Dialler) -> None:
    async with dialler.dial() as agent:
        await agent.hello(made_hello())
        await controller.deploy()
    await controller.until(lambda view: not view.is_online)

    async with dialler.dial() as agent:
        assert await agent.hello(made_hello()) == FIRST
        assert (await agent.desired()).position == FIRST


async def test_a_refused_push_is_kept_and_shown(controller: Controller, dialler: Dialler) -> None:
    problem = Problem("disk_full", "need 10 bytes more")
    async with dialler.dial() as agent:
        await agent.hello(made_hello())
        await controller.deploy()
        await agent.answer(PushResult((await agent.desired()).position, problem))
        view = await controller.until(lambda view: view.agent.rejection is not None)

    assert (view.agent.rejection, view.agent.reported.applied) == (problem, NOWHERE)


async def test_a_report_is_shown(controller: Controller, dialler: Dialler) -> None:
    async with dialler.dial() as agent:
        await agent.hello(made_hello())
        await controller.deploy()
        await agent.desired()
        await agent.report(made_report(FIRST, made_slot()))
        view = await controller.until(lambda view: view.agent.is_in_sync)

    assert view.agent.reported == made_report(FIRST, made_slot())


async def test_an_agent_that_half_closes_is_offline_and_its_stream_ends_well(
    controller: Controller, dialler: Dialler
) -> None:
    async with dialler.dial() as agent:
        await agent.hello(made_hello())
        await agent.leave()
        assert (await agent.end())[0] is grpc.StatusCode.OK

    await controller.until(lambda view: not view.is_online)


async def test_a_message_of_a_newer_agent_is_passed_over(controller: Controller, dialler: Dialler) -> None:
    async with dialler.dial() as agent:
        await agent.hello(made_hello())
        await agent.say(pb.AgentMessage())
        await controller.deploy()

        assert (await agent.desired()).position == FIRST


# ---- refusals -------------------------------------------------------------------------------------------------


async def test_silence_instead_of_hello_is_cut_off(dialler: Dialler) -> None:
    async with dialler.dial() as agent:
        code, details = await agent.end()

    assert (code, "Hello within" in details) == (grpc.StatusCode.DEADLINE_EXCEEDED, True)


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(pb.AgentMessage(reported=pb.ReportedState()), id="something else first"),
        pytest.param(pb.AgentMessage(), id="nothing known"),
        pytest.param(pb.AgentMessage(hello=pb.Hello()), id="no names"),
        pytest.param(pb.AgentMessage(hello=pb.Hello(agent_id="../etc", site="north")), id="hostile id"),
        pytest.param(pb.AgentMessage(hello=pb.Hello(agent_id="cam-1", site="+/#")), id="hostile site"),
        pytest.param(pb.AgentMessage(hello=pb.Hello(agent_id="any", site="north")), id="reserved id"),
        pytest.param(pb.AgentMessage(hello=pb.Hello(agent_id="a", site="b", tags=["t"] * 65)), id="too many tags"),
        pytest.param(
            pb.AgentMessage(
                hello=pb.Hello(agent_id="a", site="b", applied=pb.Position(epoch=1, generation=(1 << 64) - 1))
            ),
            id="impossible position",
        ),
    ],
)
async def test_a_malformed_hello_is_refused(controller: Controller, dialler: Dialler, message: pb.AgentMessage) -> None:
    async with dialler.dial() as agent:
        await agent.say(message)
        code, _ = await agent.end()

    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert list(await controller.fleet.agents()) == []


async def test_a_second_hello_is_refused(dialler: Dialler) -> None:
    async with dialler.dial() as agent:
        await agent.hello(made_hello())
        await agent.say(pb.AgentMessage(hello=pb.Hello(agent_id=CAM, site="north")))

        assert (await agent.end())[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_malformed_report_ends_the_session(controller: Controller, dialler: Dialler) -> None:
    async with dialler.dial() as agent:
        await agent.hello(made_hello())
        await agent.say(pb.AgentMessage(reported=pb.ReportedState(slots=[pb.SlotReport()])))

        assert (await agent.end())[0] is grpc.StatusCode.INVALID_ARGUMENT

    await controller.until(lambda view: not view.is_online)


async def test_a_message_over_the_bound_is_refused(dialler: Dialler) -> None:
    async with dialler.dial() as agent:
        await agent.hello(made_hello())
        await agent.say(pb.AgentMessage(hello=pb.Hello(agent_id="x" * MAX_AGENT_MESSAGE_BYTES, site="north")))

        assert (await agent.end())[0] is grpc.StatusCode.OUT_OF_RANGE


async def test_a_message_over_the_bound_of_the_transport_never_arrives(controller: Controller) -> None:
    async with grpc.aio.secure_channel(
        str(controller.address), TransportCredentials.local().channel, [("grpc.max_send_message_length", -1)]
    ) as channel:
        call = channel.stream_stream(
            "/nanofleet.fleet.v1.FleetService/Session",
            pb.AgentMessage.SerializeToString,
            pb.ControllerMessage.FromString,
        )()
        await call.write(pb.AgentMessage(hello=pb.Hello(agent_id="x" * (MAX_MESSAGE_BYTES + 1))))

        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_an_agent_that_never_reads_is_cut_off(controller: Controller, dialler: Dialler) -> None:
    """I11: what it does not read is replaced, not queued, and one push that it does not take ends its stream."""

    def fill(records: FleetRecords) -> None:
        """Make a push some 30 KB, so that a few of them fill the transport's window."""
        for number in range(200):
            records.save_deployment(made_deployment(WHOLE_FLEET, made_slot(ModelName(f"model-{number}"))))

    await controller.store.run(fill)
    async with dialler.dial() as agent:
        await agent.hello(made_hello())
        async with asyncio.timeout(60):
            while controller.fleet.session_count:
                await controller.deploy(version=1)
                await controller.deploy(version=2)
                # Nothing else here waits, and the streams need their turn.
                await asyncio.sleep(0)

    assert controller.fleet.session_count == 0


# ---- several streams ------------------------------------------------------------------------------------------


async def test_a_restarted_agent_replaces_its_old_stream(controller: Controller, dialler: Dialler) -> None:
    async with dialler.dial() as old, dialler.dial() as new:
        await old.hello(made_hello())
        await new.hello(made_hello(boot_id="boot-2"))

        code, details = await old.end()

        assert (code, "unique" in details) == (grpc.StatusCode.ABORTED, True)
        await controller.deploy()
        assert (await new.desired()).position == FIRST
        assert (await controller.fleet.agent(CAM)).is_online


async def test_stopping_ends_every_stream_soon(controller: Controller, dialler: Dialler) -> None:
    async with dialler.dial() as agent:
        await agent.hello(made_hello())
        controller.fleet.end_sessions()
        async with asyncio.timeout(2):
            await controller.server.stop(10)

        assert (await agent.end())[0] is grpc.StatusCode.UNAVAILABLE


async def test_two_hundred_sessions_leave_nothing_behind(controller: Controller, dialler: Dialler) -> None:
    async def visit(hello: AgentHello, *, politely: bool) -> None:
        async with dialler.dial() as agent:
            await agent.hello(hello)
            if politely:
                await agent.leave()

    await visit(made_hello(), politely=True)
    await settled(controller)
    before = len(asyncio.all_tasks())

    for round_number in range(10):
        hellos = [made_hello(AgentId(f"agent-{number}"), boot_id=f"boot-{round_number}") for number in range(20)]
        await asyncio.gather(*[visit(hello, politely=index % 2 == 0) for index, hello in enumerate(hellos)])
    await settled(controller)

    async with asyncio.timeout(5):
        while len(asyncio.all_tasks()) > before:
            await asyncio.sleep(0.01)
    gc.collect()


async def settled(controller: Controller) -> None:
    async with asyncio.timeout(10):
        while controller.fleet.session_count:
            await controller.fleet.next_change(controller.fleet.revision, timeout_s=0.1)


# ---- with the database ----------------------------------------------------------------------------------------


async def test_desired_state_and_reports_survive_a_restart_of_the_controller(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    await database.migrate()
    first = Fleet(
        SqlFleetStore(database), FakeCatalogue(), releases=OpenCatalogue(), clock=SystemClock(), max_sessions=5
    )
    async with first.session(made_hello()) as (session, _):
        first.reported(session, made_report(NOWHERE, made_slot()))
    await first.flush()
    before = await first.agent(CAM)

    second = Fleet(
        SqlFleetStore(database), FakeCatalogue(), releases=OpenCatalogue(), clock=SystemClock(), max_sessions=5
    )

    assert await second.agent(CAM) == before
    await database.close()
