"""A controller for agents, over real gRPC: FleetService and ArtifactService on a free loopback port.

The test is the operator: it pushes desired states and looks at what agents answer and report.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import grpc
import grpc.aio

from core.addresses import Address
from core.errors import NanofleetError
from core.fleet_state import AgentHello, DesiredState, Position, PushResult, ReportedState
from core.fleet_wire import decode_hello, decode_push_result, decode_reported, encode_desired, encode_position
from core.grpc_transport import SERVER_OPTIONS, TransportCredentials
from core.ids import AgentId
from core.status import STATUS
from protos.artifacts.v1 import artifacts_pb2 as artifacts
from protos.artifacts.v1.artifacts_pb2_grpc import ArtifactServiceServicer, add_ArtifactServiceServicer_to_server
from protos.fleet.v1 import fleet_pb2 as pb
from protos.fleet.v1.fleet_pb2_grpc import FleetServiceServicer, add_FleetServiceServicer_to_server
from tests.support.shelf import Shelf
from tests.support.variants import MadeVariant

HOST = "127.0.0.1"


class FakeFleet(FleetServiceServicer):
    """Holds one desired state, sends it to whoever connects and is not there yet, and remembers what is said."""

    def __init__(self) -> None:
        self.hellos: list[AgentHello] = []
        self.results: list[PushResult] = []
        self.reported: list[ReportedState] = []
        self._desired: DesiredState | None = None
        self._changed = asyncio.Condition()

    async def push(self, *variants: MadeVariant, generation: int, agent_id: str = "gate-1") -> DesiredState:
        """Make `variants` the desired state of the agent."""
        state = DesiredState(
            AgentId(agent_id),
            Position(1, generation),
            datetime.now(UTC),
            tuple(variant.slot for variant in variants),
        )
        async with self._changed:
            self._desired = state
            self._changed.notify_all()
        return state

    async def until(self, claim: Callable[[], bool], *, timeout_s: float = 20.0) -> None:
        """Wait until what agents said makes `claim` true."""
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(claim)

    async def Session(  # type: ignore[override]  # noqa: N802  # typed for both APIs; named by the protocol
        self,
        request_iterator: AsyncIterator[pb.AgentMessage],
        context: "grpc.aio.ServicerContext[pb.AgentMessage, pb.ControllerMessage]",
    ) -> None:
        hello = decode_hello((await anext(request_iterator)).hello)
        await self._note(self.hellos, hello)
        at = hello.applied if self._desired is None else self._desired.position
        await context.write(pb.ControllerMessage(welcome=pb.Welcome(desired=encode_position(at))))
        async with asyncio.TaskGroup() as tasks:
            pushing = tasks.create_task(self._push(hello.applied, context))
            async for message in request_iterator:
                await self._hear(message)
            pushing.cancel()

    async def _push(
        self, sent: Position, context: "grpc.aio.ServicerContext[pb.AgentMessage, pb.ControllerMessage]"
    ) -> None:
        while True:
            desired = await self._newer_than(sent)
            await context.write(pb.ControllerMessage(desired=encode_desired(desired)))
            sent = desired.position

    async def _newer_than(self, sent: Position) -> DesiredState:
        async with self._changed:
            while self._desired is None or self._desired.position <= sent:
                await self._changed.wait()
            return self._desired

    async def _hear(self, message: pb.AgentMessage) -> None:
        if message.WhichOneof("message") == "result":
            await self._note(self.results, decode_push_result(message.result))
        else:
            await self._note(self.reported, decode_reported(message.reported))

    async def _note(self, kept: list, said: object) -> None:  # type: ignore[type-arg]  # a list of what `said` is
        async with self._changed:
            kept.append(said)
            self._changed.notify_all()


class ShelfServicer(ArtifactServiceServicer):
    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    async def Fetch(  # type: ignore[override]  # noqa: N802  # typed for both APIs; named by the protocol
        self,
        request: artifacts.FetchRequest,
        context: "grpc.aio.ServicerContext[artifacts.FetchRequest, artifacts.Piece]",
    ) -> None:
        try:
            async for chunk in self._shelf.stream(request):
                await context.write(chunk)
        except NanofleetError as error:
            await context.abort(STATUS[error.code].grpc, str(error))


class FakeController:
    def __init__(self, shelf: Shelf, address: Address) -> None:
        self.shelf = shelf
        self.fleet = FakeFleet()
        self.address = address


@asynccontextmanager
async def running_controller(shelf: Shelf, *, port: int = 0) -> AsyncIterator[FakeController]:
    """Yield a running controller; what is under way when it goes is broken off, as by a crash."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    bound = server.add_secure_port(f"{HOST}:{port}", TransportCredentials.local().server)
    controller = FakeController(shelf, Address(HOST, bound))
    add_FleetServiceServicer_to_server(controller.fleet, server)
    add_ArtifactServiceServicer_to_server(ShelfServicer(shelf), server)
    await server.start()
    try:
        yield controller
    finally:
        await server.stop(None)
