"""An agent's end of the fleet stream, under the test's control, over a real connection."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

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
    decode_assignment,
    decode_desired,
    decode_position,
    encode_hello,
    encode_push_result,
    encode_reported,
    encode_vitals,
)
from core.grpc_transport import TlsIdentity, TransportCredentials, open_channel
from protos.fleet.v1 import fleet_pb2 as pb
from protos.fleet.v1.fleet_pb2_grpc import FleetServiceStub

TIMEOUT_S = 10.0


class FakeAgent:
    """One stream; every wait has a deadline."""

    def __init__(self, call: grpc.aio.StreamStreamCall[pb.AgentMessage, pb.ControllerMessage]) -> None:
        self._call = call

    async def say(self, message: pb.AgentMessage) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await self._call.write(message)

    async def hello(self, hello: AgentHello) -> Position:
        """Introduce the agent; return the position in Welcome."""
        await self.say(pb.AgentMessage(hello=encode_hello(hello)))
        message = await self.hear()
        assert message.WhichOneof("message") == "welcome"
        return decode_position(message.welcome.desired)

    async def hear(self) -> pb.ControllerMessage:
        async with asyncio.timeout(TIMEOUT_S):
            message = await self._call.read()
        assert isinstance(message, pb.ControllerMessage), f"the stream ended: {await self._call.details()}"
        return message

    async def assignment(self) -> SignedAssignment:
        message = await self.hear()
        assert message.WhichOneof("message") == "assignment"
        return decode_assignment(message.assignment)

    async def desired(self) -> DesiredState:
        """Return what the next assignment says, whoever signed it."""
        return decode_desired(pb.DesiredState.FromString((await self.assignment()).payload))

    async def answer(self, result: PushResult) -> None:
        await self.say(pb.AgentMessage(result=encode_push_result(result)))

    async def report(self, reported: ReportedState) -> None:
        await self.say(pb.AgentMessage(reported=encode_reported(reported)))

    async def say_vitals(self, vitals: AgentVitals) -> None:
        await self.say(pb.AgentMessage(vitals=encode_vitals(vitals)))

    async def leave(self) -> None:
        """Half-close, as an agent that stops does, and wait for the end."""
        await self._call.done_writing()
        await self.end()

    async def end(self) -> tuple[grpc.StatusCode, str]:
        """Wait until the controller ends the stream; return how."""
        async with asyncio.timeout(TIMEOUT_S):
            while isinstance(await self._read_quietly(), pb.ControllerMessage):
                pass
            return await self._call.code(), await self._call.details()

    async def _read_quietly(self) -> object:
        try:
            return await self._call.read()
        except grpc.aio.AioRpcError:
            return None


class Dialler:
    """The one channel of a machine with agents."""

    def __init__(self, address: Address, credentials: TransportCredentials | TlsIdentity) -> None:
        self._channel = open_channel(address, credentials)
        self._stub = FleetServiceStub(self._channel)

    @asynccontextmanager
    async def dial(self) -> AsyncIterator[FakeAgent]:
        """Open a stream; leaving the block cuts it, as a lost link does."""
        call = self._stub.Session()
        try:
            yield FakeAgent(call)
        finally:
            # A dropped call without it leaks in grpc.aio (grpc#43462).
            call.cancel()

    async def close(self) -> None:
        await self._channel.close()
