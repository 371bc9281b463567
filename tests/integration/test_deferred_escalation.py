"""Alone and back: a device that can wait gets the edge's answer now, and the heavy tier's after outage and restart."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import pytest

from controller.demo.ports import free_port
from core.addresses import Address
from core.clock import SystemClock
from core.fleet_state import Position, PushResult
from core.open_inference.grpc_face import OpenInferenceServicer, add_open_inference
from tests.support.catalogue_side import released
from tests.support.delivery_shelf import DeliveryShelf
from tests.support.echo_plane import EchoPlane
from tests.support.edge_front import body_of, device
from tests.support.edge_models import cascade_to, make_echo, published
from tests.support.enrolled import Realm
from tests.support.fake_controller import running_controller
from tests.support.local_agent import AgentProcess
from tests.support.mosquitto import Mosquitto, running_mosquitto

HASTE = {
    "NANOFLEET_AGENT_OUTBOX__SPREAD_S": "0",
    "NANOFLEET_AGENT_OUTBOX__PROBE_FIRST_S": "0.2",
    "NANOFLEET_AGENT_OUTBOX__MIN_FREE_BYTES": "0",
}
UNSURE = (0.0, 0.1, 0.0, 0.0)
REQUESTS = "nf/v1/berlin/infer/gate-1/echo"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with running_mosquitto(tmp_path_factory.mktemp("broker")) as running:
        yield running


async def until_durable(state_dir: Path) -> None:
    """Wait until the escalation, with its asker's name, stands in the log of the outbox."""
    async with asyncio.timeout(10):
        while b"camera-1" not in (state_dir / "outbox.sqlite-wal").read_bytes():
            await asyncio.sleep(0.01)


async def test_a_deferred_escalation_is_answered_after_an_outage_and_a_power_cut(
    broker: Mosquitto, tmp_path: Path
) -> None:
    realm, heavy, port = Realm(), EchoPlane(), free_port()
    model = released(published(make_echo(tmp_path / "model", cascade=cascade_to("echo"))), release_counter=1)
    realm.release(model)

    def serve(server: grpc.aio.Server) -> None:
        add_open_inference(
            OpenInferenceServicer(heavy, server_name="n", server_version="1", clock=SystemClock()), server
        )

    agent = AgentProcess(
        tmp_path,
        realm=realm,
        controller=Address("127.0.0.1", port),
        broker_port=broker.port,
        environment=HASTE,
    )
    try:
        async with running_controller(realm, DeliveryShelf(model), port=port) as controller:
            await agent.start()
            await controller.fleet.push(model, generation=1)
            await controller.fleet.until(lambda: PushResult(Position(1, 1)) in controller.fleet.results)
        # Nobody is there now.
        async with device(broker) as camera:
            camera.send(body_of(UNSURE), topic=REQUESTS, deferrable="1")
            first = await camera.reply()
            assert (first.words["final"], first.words["tier"]) == ("0", "edge")
            await until_durable(agent.state_dir)
            await agent.kill()
            await agent.start()
            async with running_controller(realm, DeliveryShelf(model), port=port, serve=serve):
                late = await camera.reply(timeout_s=20)
    finally:
        await agent.kill()
    assert (late.words["final"], late.words["tier"], late.words["status"]) == ("1", "heavy", "200")
    assert late.correlation == first.correlation
    assert [request.model_name for request in heavy.requests] == ["echo"]
