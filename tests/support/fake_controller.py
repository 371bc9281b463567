"""A controller for agents over real mutual TLS on a free loopback port: fleet, delivery and catalogue services.

The test is the operator: it pushes signed assignments and looks at what agents answer and report.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import grpc
import grpc.aio

from core.addresses import Address
from core.fleet_state import (
    AgentHello,
    AgentVitals,
    DesiredState,
    Position,
    PushResult,
    ReportedState,
    SignedAssignment,
)
from core.fleet_wire import (
    decode_hello,
    decode_push_result,
    decode_reported,
    decode_vitals,
    encode_assignment,
    encode_position,
)
from core.grpc_transport import SERVER_OPTIONS
from core.ids import AgentId
from core.samples import SampleCounts, decode_counts
from protos.artifacts.v1.artifacts_pb2_grpc import add_DeliveryServiceServicer_to_server
from protos.fleet.v1 import fleet_pb2 as pb
from protos.fleet.v1.fleet_pb2_grpc import FleetServiceServicer, add_FleetServiceServicer_to_server
from tests.support.catalogue_port import CataloguePort
from tests.support.catalogue_side import DirectorKey
from tests.support.delivery_shelf import DeliveryShelf, DeliveryShelfServicer
from tests.support.enrolled import Realm
from tests.support.variants import MadeVariant

HOST = "127.0.0.1"
ASSIGNMENT_LIFE = timedelta(days=1)


class FakeFleet(FleetServiceServicer):
    """Holds one assignment, sends it to whoever connects and is not there yet, and remembers what is said."""

    def __init__(self, realm: Realm) -> None:
        self.hellos: list[AgentHello] = []
        self.results: list[PushResult] = []
        self.reported: list[ReportedState] = []
        self.vitals: list[AgentVitals] = []
        self.samples: list[SampleCounts] = []
        self._realm = realm
        self._assigned: tuple[Position, SignedAssignment] | None = None
        self._changed = asyncio.Condition()

    async def push(
        self, *variants: MadeVariant, generation: int, agent_id: str = "gate-1", by: DirectorKey | None = None
    ) -> DesiredState:
        """Make `variants` the desired state of the agent, signed by the fleet's director or whoever stands in."""
        now = datetime.now(UTC)
        state = DesiredState(
            AgentId(agent_id),
            Position(1, generation),
            now,
            tuple(variant.slot for variant in variants),
            now + ASSIGNMENT_LIFE,
        )
        async with self._changed:
            self._assigned = state.position, self._realm.side.assignment(state, by=by)
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
        at = hello.applied if self._assigned is None else self._assigned[0]
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
            sent, signed = await self._newer_than(sent)
            await context.write(pb.ControllerMessage(assignment=encode_assignment(signed)))

    async def _newer_than(self, sent: Position) -> tuple[Position, SignedAssignment]:
        async with self._changed:
            while self._assigned is None or self._assigned[0] <= sent:
                await self._changed.wait()
            return self._assigned

    async def _hear(self, message: pb.AgentMessage) -> None:
        match message.WhichOneof("message"):
            case "result":
                await self._note(self.results, decode_push_result(message.result))
            case "vitals":
                await self._note(self.vitals, decode_vitals(message.vitals))
            case "samples":
                await self._note(self.samples, decode_counts(message.samples))
            case _:
                await self._note(self.reported, decode_reported(message.reported))

    async def _note(self, kept: list, said: object) -> None:  # type: ignore[type-arg]  # a list of what `said` is
        async with self._changed:
            kept.append(said)
            self._changed.notify_all()


class FakeController:
    def __init__(self, realm: Realm, shelf: DeliveryShelf, address: Address) -> None:
        self.shelf = shelf
        self.fleet = FakeFleet(realm)
        self.address = address


@asynccontextmanager
async def running_controller(
    realm: Realm,
    shelf: DeliveryShelf,
    *,
    port: int = 0,
    serve: Callable[[grpc.aio.Server], None] = lambda _: None,
) -> AsyncIterator[FakeController]:
    """Yield a running controller of `realm`; what is under way when it goes is broken off, as by a crash.

    `serve` adds whatever else shall be served.
    """
    server = grpc.aio.server(options=SERVER_OPTIONS)
    shown = realm.authority.controller()
    credentials = grpc.ssl_server_credentials(
        [(shown.private_key, shown.certificate_chain)], shown.trust_bundle, require_client_auth=True
    )
    bound = server.add_secure_port(f"{HOST}:{port}", credentials)
    controller = FakeController(realm, shelf, Address(HOST, bound))
    server.add_generic_rpc_handlers((CataloguePort(realm.side.files).handler(),))
    add_FleetServiceServicer_to_server(controller.fleet, server)
    add_DeliveryServiceServicer_to_server(DeliveryShelfServicer(shelf), server)
    serve(server)
    await server.start()
    try:
        yield controller
    finally:
        await server.stop(None)
