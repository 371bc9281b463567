"""Chunk streams that run when their agent is banned."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any, NoReturn, cast

import grpc
import pytest

from controller.api.delivery_grpc import DeliveryServicer
from controller.transfer.model import Codec, Encoded
from controller.transfer.service import Grant, Sent, Transfers
from core.digest import digest_of
from core.errors import Forbidden
from core.ids import AgentId
from protos.artifacts.v1 import artifacts_pb2 as pb

CAM = AgentId("cam-1")
REQUEST = pb.FetchChunksRequest(manifest_digest=digest_of(b"manifest"))


class TenChunks:
    """Lends ten chunks to whoever asks."""

    is_crowded = False

    @asynccontextmanager
    async def transfer(self, _agent: AgentId, _order: object) -> AsyncIterator[tuple[Grant, AsyncIterator[Sent]]]:
        yield Grant(), self._chunks()

    def turn(self, _agent: AgentId, _sent: Sent, *, on_wait: object) -> nullcontext[None]:
        return nullcontext()

    def note_sent(self, _sent: Sent) -> None:
        """Count nothing."""

    async def _chunks(self) -> AsyncIterator[Sent]:
        for index in range(10):
            yield Sent(index, Encoded(Codec.RAW, b"chunk"))


class Aborted(Exception):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code


class BannedAfter:
    """The call of an agent that is banned when it has got `count` chunks."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.written: list[object] = []

    async def write(self, message: object) -> None:
        self.written.append(message)

    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        raise Aborted(code, details)

    @property
    def chunks(self) -> int:
        return sum(1 for message in self.written if isinstance(message, Sent))

    def agent(self) -> AgentId:
        if self.chunks >= self._count:
            raise Forbidden(f"agent {CAM}: banned: stolen")
        return CAM


async def test_a_ban_ends_a_stream_of_chunks_before_the_next_one() -> None:
    call: Any = BannedAfter(3)
    servicer = DeliveryServicer(cast("Transfers", TenChunks()), caller_of=lambda _context: call.agent)

    with pytest.raises(Aborted, match="stolen") as ended:
        await servicer.FetchChunks(REQUEST, call)

    assert (call.chunks, ended.value.code) == (3, grpc.StatusCode.PERMISSION_DENIED)
