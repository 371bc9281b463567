"""How gRPC calls are measured: by their method and by how they end, whatever ends them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from core.clock import SystemClock
from core.exposition import written
from core.metrics import Registry
from core.rpc_metrics import MeasuredCalls
from tests.support.exposed import numbers

SERVICE = "test.Service"
TIMEOUT_S = 10.0
Context = Any


async def answer(_request: bytes, _context: Context) -> bytes:
    return b"yes"


async def abort(_request: bytes, context: Context) -> bytes:
    await context.abort(grpc.StatusCode.PERMISSION_DENIED, "no")
    return b""


async def stumble(_request: bytes, _context: Context) -> bytes:
    raise RuntimeError("a defect")


async def hang(_request: bytes, _context: Context) -> bytes:
    await asyncio.sleep(3600)
    return b""


async def count(_request: bytes, _context: Context) -> AsyncIterator[bytes]:
    yield b"1"
    yield b"2"


async def write(_request: bytes, context: Context) -> None:
    await context.write(b"1")


HANDLERS: "dict[str, grpc.RpcMethodHandler[bytes, bytes]]" = {
    "Answer": grpc.unary_unary_rpc_method_handler(answer),
    "Abort": grpc.unary_unary_rpc_method_handler(abort),
    "Stumble": grpc.unary_unary_rpc_method_handler(stumble),
    "Hang": grpc.unary_unary_rpc_method_handler(hang),
    "Count": grpc.unary_stream_rpc_method_handler(count),
    "Write": grpc.unary_stream_rpc_method_handler(write),
}


class Line:
    def __init__(self, registry: Registry, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self._registry = registry

    async def unary(self, method: str, *, timeout_s: float = TIMEOUT_S) -> grpc.StatusCode:
        asked: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary(f"/{SERVICE}/{method}")
        try:
            await asked(b"", timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    async def stream(self, method: str) -> list[bytes]:
        asked: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = self.channel.unary_stream(f"/{SERVICE}/{method}")
        return [message async for message in asked(b"", timeout=TIMEOUT_S)]

    async def counted(self, method: str, code: str) -> float:
        """Wait until a call was measured: its server may end after its client."""
        labels = {"rpc_system_name": "grpc", "rpc_method": f"{SERVICE}/{method}", "rpc_response_status_code": code}
        series = "rpc_server_call_duration_seconds_count", frozenset(labels.items())
        async with asyncio.timeout(TIMEOUT_S):
            while not (found := numbers(self.exposition())).get(series):
                await asyncio.sleep(0.01)
        return found[series]

    def exposition(self) -> bytes:
        return written(self._registry.families(), is_open_metrics=True)


@asynccontextmanager
async def line() -> AsyncIterator[Line]:
    registry = Registry()
    server = grpc.aio.server(interceptors=[MeasuredCalls(registry, clock=SystemClock())])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, HANDLERS),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Line(registry, channel)
    await server.stop(None)


@pytest.mark.parametrize(("method", "code"), [("Answer", "OK"), ("Abort", "PERMISSION_DENIED"), ("Stumble", "UNKNOWN")])
async def test_a_call_is_measured_by_how_it_ends(method: str, code: str) -> None:
    async with line() as peer:
        assert (await peer.unary(method)).name == code
        assert await peer.counted(method, code) == 1


async def test_a_call_whose_caller_leaves_is_measured_as_cancelled() -> None:
    async with line() as peer:
        assert await peer.unary("Hang", timeout_s=0.2) is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await peer.counted("Hang", "CANCELLED") == 1


@pytest.mark.parametrize(("method", "messages"), [("Count", [b"1", b"2"]), ("Write", [b"1"])])
async def test_both_kinds_of_streams_are_measured_and_pass_unchanged(method: str, messages: list[bytes]) -> None:
    async with line() as peer:
        assert await peer.stream(method) == messages
        assert await peer.counted(method, "OK") == 1


async def test_a_method_that_nobody_serves_becomes_no_label() -> None:
    async with line() as peer:
        assert await peer.unary("MadeUp") is grpc.StatusCode.UNIMPLEMENTED
        assert b"MadeUp" not in peer.exposition()
