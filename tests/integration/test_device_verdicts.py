"""The device client and a real agent's front: an answer in two parts, and a verdict long after the answer."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from core.open_inference.messages import InferResponse
from core.tensors import Datatype, Tensor
from edge_agent.client import DeviceClient, Protocol, Reply
from tests.support.edge_front import SITE, serving
from tests.support.edge_plane import UNSURE, FakeDeferrals, away, cascade_of, echo_model
from tests.support.mosquitto import Mosquitto, running_mosquitto

REQUEST = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": list(UNSURE)}]}
VERDICT = InferResponse("large", "7", (Tensor("scores", Datatype.FP32, np.array([[1, 1, 1]], dtype=np.float32)),), "")
PROTOCOLS = pytest.mark.parametrize("protocol", Protocol)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with running_mosquitto(tmp_path) as running:
        yield running


@PROTOCOLS
async def test_the_edges_answer_is_given_at_once_and_the_heavy_tiers_is_returned(
    broker: Mosquitto, protocol: Protocol
) -> None:
    provisional: list[Reply] = []

    def ask() -> tuple[Reply, int]:
        address = (broker.host, broker.port)
        with DeviceClient("camera", site=SITE, broker=address, protocol=protocol) as device:
            return device.ask("digits", REQUEST, on_provisional=provisional.append), device.counters.duplicates

    async with serving(broker, echo_model(cascade=cascade_of())):
        final, duplicates = await asyncio.to_thread(ask)
    assert [(reply.tier, reply.is_final) for reply in provisional] == [("edge", False)]
    assert (final.tier, final.is_final, duplicates) == ("heavy", True, 0)


@PROTOCOLS
async def test_a_deferred_request_is_answered_at_the_edge_and_its_verdict_comes_later(
    broker: Mosquitto, protocol: Protocol
) -> None:
    loop, verdict, deferrals = asyncio.get_running_loop(), asyncio.Queue[Reply](), FakeDeferrals()

    def note(reply: Reply) -> None:
        loop.call_soon_threadsafe(verdict.put_nowait, reply)

    device = DeviceClient(
        "camera",
        site=SITE,
        broker=(broker.host, broker.port),
        protocol=protocol,
        on_verdict=note,
    )
    model = echo_model(cascade=cascade_of())
    async with serving(broker, model, heavy=away(), deferrals=deferrals) as front:
        await asyncio.to_thread(device.connect)
        try:
            words = {"deferrable": "1"}
            first = await asyncio.to_thread(device.ask, "digits", REQUEST, properties=words)
            assert (first.tier, first.is_final, first.reason) == ("edge", False, "heavy_unavailable")
            [(_, _, reply_to)] = deferrals.taken
            front.deliver(reply_to, VERDICT)
            async with asyncio.timeout(10):
                last = await verdict.get()
        finally:
            await asyncio.to_thread(device.close)
    assert (last.tier, last.is_final, last.correlation) == ("heavy", True, first.correlation)
