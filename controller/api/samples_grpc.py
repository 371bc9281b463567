"""SamplesService: hard examples from agents, each for itself; see `controller.samples.service` for the rules."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio

from controller.samples.service import SamplePulls
from core.errors import DeadlineExceeded, InvalidRequest, NanofleetError
from core.ids import AgentId, checked_pull_id
from core.samples import MAX_CHUNK_BYTES, SampleName, decode_name, decode_offer
from core.status import STATUS
from protos.samples.v1 import samples_pb2 as pb
from protos.samples.v1.samples_pb2_grpc import SamplesServiceServicer

# Chosen: 16 MiB within it is 1 Mbit/s; whoever sends slower keeps memory of others.
UPLOAD_TIMEOUT_S = 120.0

Context = grpc.aio.ServicerContext[Any, Any]


class SamplesServicer(SamplesServiceServicer):
    """`agent_of` says which agent calls."""

    def __init__(
        self,
        pulls: SamplePulls,
        *,
        agent_of: Callable[[Context], AgentId],
        upload_timeout_s: float = UPLOAD_TIMEOUT_S,
    ) -> None:
        self._pulls = pulls
        self._agent_of = agent_of
        self._upload_timeout_s = upload_timeout_s

    async def Offer(  # noqa: N802  # named by the protocol
        self, request: pb.OfferRequest, context: Context
    ) -> pb.OfferReply:
        try:
            wanted = await self._pulls.offer(self._agent_of(context), decode_offer(request))
        except NanofleetError as error:
            await context.abort(STATUS[error.code].grpc, str(error))
        return pb.OfferReply(wanted=wanted)

    async def Upload(  # noqa: N802
        self, request_iterator: object, context: Context
    ) -> pb.UploadReply:
        try:
            await self._take(context)
        except NanofleetError as error:
            await context.abort(STATUS[error.code].grpc, str(error))
        return pb.UploadReply()

    async def _take(self, context: Context) -> None:
        try:
            async with asyncio.timeout(self._upload_timeout_s):
                pull_id, name = await _header(context)
                await self._pulls.receive(self._agent_of(context), pull_id, name, _chunks(context))
        except TimeoutError as error:
            raise DeadlineExceeded(f"expected a sample within {self._upload_timeout_s:g} s; send it again") from error


async def _header(context: Context) -> tuple[str, SampleName]:
    message: object = await context.read()
    if not isinstance(message, pb.UploadRequest) or message.WhichOneof("part") != "header":
        raise InvalidRequest("upload: expected a header first")
    return checked_pull_id(message.header.pull_id), decode_name(message.header.sample)


async def _chunks(context: Context) -> AsyncIterator[bytes]:
    # At the end of the stream comes a marker that the annotations do not know.
    while isinstance(message := await context.read(), pb.UploadRequest):
        if message.WhichOneof("part") != "chunk" or not 0 < len(message.chunk) <= MAX_CHUNK_BYTES:
            raise InvalidRequest(f"upload: expected a chunk of 1 to {MAX_CHUNK_BYTES} bytes behind the header")
        yield message.chunk
