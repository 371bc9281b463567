"""The stream to a controller, without a socket: a test plays the controller on the other end of it."""

import asyncio
from collections.abc import AsyncIterator

import grpc

from core.errors import NanofleetError
from core.fleet_state import Position, SignedAssignment
from core.fleet_wire import encode_assignment, encode_position
from protos.fleet.v1 import fleet_pb2 as pb
from tests.support.delivery_shelf import rpc_error


class FleetCall:
    """What the agent writes comes out of `heard`; what is put by the methods comes to the agent."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[pb.AgentMessage] = asyncio.Queue()
        self.is_cancelled = False
        # Writing waits while it is cleared, as with a controller that does not read.
        self.reads = asyncio.Event()
        self.reads.set()
        self._said: asyncio.Queue[pb.ControllerMessage | BaseException | None] = asyncio.Queue()

    def Session(self) -> "FleetCall":  # noqa: N802 (named by the protocol)
        return self

    def welcome(self, position: Position = Position(0, 0)) -> None:  # noqa: B008 (a constant)
        self._said.put_nowait(pb.ControllerMessage(welcome=pb.Welcome(desired=encode_position(position))))

    def push(self, signed: SignedAssignment) -> None:
        self.say(pb.ControllerMessage(assignment=encode_assignment(signed)))

    def say(self, message: pb.ControllerMessage) -> None:
        self._said.put_nowait(message)

    def replace(self) -> None:
        """End the call as the owner of its channel does."""
        self._said.put_nowait(asyncio.CancelledError())

    def end(self, error: NanofleetError | None = None, *trailing: tuple[str, str]) -> None:
        self._said.put_nowait(None if error is None else rpc_error(error, *trailing))

    async def __aiter__(self) -> AsyncIterator[pb.ControllerMessage]:
        while (said := await self._said.get()) is not None:
            if isinstance(said, BaseException):
                raise said
            yield said

    async def write(self, request: pb.AgentMessage, /) -> None:
        await self.reads.wait()
        self.heard.put_nowait(request)

    async def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    async def details(self) -> str:
        return "the stream is over"

    def cancel(self) -> bool:
        self.is_cancelled = True
        return True
