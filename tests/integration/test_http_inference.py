"""Inference over the agent's HTTP face, from the socket to its data plane and back."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import orjson
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from core.addresses import Address
from core.clock import SystemClock
from core.telemetry import Tracing, TracingSettings
from edge_agent.data_plane import EdgeDataPlane
from edge_agent.front.http.inference import OpenInferenceRoutes
from edge_agent.front.http.routes import Tasks, routing
from edge_agent.front.http.server import HttpFront
from tests.support.edge_plane import UNSURE, SlowModel, away, cascade_of, echo_model, plane_with

TIMEOUT_S = 10.0
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@asynccontextmanager
async def serving(plane: EdgeDataPlane) -> AsyncIterator[Address]:
    async with opened(plane) as (_, address):
        yield address


@asynccontextmanager
async def opened(plane: EdgeDataPlane) -> AsyncIterator[tuple[HttpFront, Address]]:
    tasks = Tasks()
    routes = OpenInferenceRoutes(plane, server_name="agent", server_version="1", extensions=(), tasks=tasks)
    front = HttpFront(Address("127.0.0.1", 0), routing(routes.find, fixed={}), clock=SystemClock())
    try:
        yield front, await front.start()
    finally:
        await front.stop()
        await tasks.close()
        await plane.close()


def message(
    values: tuple[float, ...] = (0, 9, 0), *, headers: str = "", parameters: Mapping[str, object] | None = None
) -> bytes:
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": values}
    body = orjson.dumps({"id": "7", "inputs": [tensor], "parameters": parameters or {}})
    head = f"POST /v2/models/digits/infer HTTP/1.1\r\nHost: localhost\r\n{headers}Connection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def ask(address: Address, request: bytes) -> tuple[int, Mapping[str, object]]:
    async with asyncio.timeout(TIMEOUT_S):
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(request)
        reply = await reader.read()
        writer.transport.abort()
    return int(reply.split(b" ", 2)[1]), orjson.loads(reply.partition(b"\r\n\r\n")[2])


async def test_the_answer_says_where_it_came_from() -> None:
    model = echo_model(cascade=cascade_of(0.9))
    async with serving(await plane_with(model)) as address:
        status, sure = await ask(address, message())
    async with serving(await plane_with(model, heavy=away())) as address:
        _, unsure = await ask(address, message(UNSURE))

    assert (status, sure["id"]) == (200, "7")
    assert sure["parameters"]["tier"] == "edge"  # type: ignore[index]  # an object
    assert unsure["parameters"]["reason"] == "heavy_unavailable"  # type: ignore[index]  # an object


@pytest.mark.parametrize(
    ("parameters", "status"),
    [({"timeout": 1}, 504), ({"timeout": -1}, 400), ({"priority": 1000}, 400), ({"privacy": "nobody"}, 403)],
)
async def test_words_beside_a_request_are_obeyed_or_refused(parameters: Mapping[str, object], status: int) -> None:
    async with serving(await plane_with(echo_model())) as address:
        found, body = await ask(address, message(parameters=parameters))

    assert (found, set(body)) == (status, {"error"})


async def test_a_traced_request_has_a_server_span_with_the_route() -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing("test", TracingSettings(endpoint=None, sample_ratio=0.0), exporter=exporter)
    async with serving(await plane_with(echo_model(), tracing=tracing)) as address:
        await ask(address, message(headers=f"traceparent: {TRACEPARENT}\r\n"))
    tracing.shutdown()

    (span,) = [each for each in exporter.get_finished_spans() if each.name == "infer digits"]
    assert span.attributes is not None
    assert span.attributes["http.route"] == "/v2/models/{model}/infer"
    assert span.kind.name == "SERVER"
    assert f"{span.context.trace_id:032x}" == TRACEPARENT.split("-")[1]


async def test_a_client_that_leaves_frees_its_place_in_the_queue() -> None:
    slow = SlowModel()
    model = slow.loaded()
    async with opened(await plane_with(model)) as (front, address), asyncio.timeout(TIMEOUT_S):
        first = asyncio.ensure_future(ask(address, message()))
        await slow.is_running.wait()
        _, leaving = await asyncio.open_connection(address.host, address.port)
        leaving.write(message())
        while model.batcher.queued != 1:
            await asyncio.sleep(0)
        leaving.transport.abort()
        while front.connections != 1:
            await asyncio.sleep(0)
        slow.release()
        assert (await first)[0] == 200
        assert (await ask(address, message()))[0] == 200

    assert slow.runs == 2
