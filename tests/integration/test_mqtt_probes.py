"""An agent's answers to probes, and its status while its load changes, on a real broker."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.edge_front import AGENT, CLIENT, REPLIES, SITE, body_of, device, serving
from tests.support.edge_plane import SlowModel, echo_model
from tests.support.mosquitto import Mosquitto, running_mosquitto

STATUS = f"nf/v1/{SITE}/agents/{AGENT}/status"
NOWHERE = f"nf/v1/{SITE}/infer/{AGENT}/no-such-model"


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with running_mosquitto(tmp_path) as running:
        yield running


async def test_a_probe_is_answered_with_the_load_and_runs_no_model(broker: Mosquitto) -> None:
    async with serving(broker, echo_model()) as front, device(broker) as camera:
        # Whichever model it names: none is looked for.
        camera.send(b"not even a body", topic=NOWHERE, probe="1", qos=0)
        reply = await camera.reply()
    assert (reply.words["status"], reply.words["agent"], reply.qos) == ("200", AGENT, 0)
    assert reply.body == {"load": {"in_flight": 0, "queued": 0, "room": 512}}
    assert (front.counters.probes, front.counters.refused) == (1, 0)


async def test_a_device_of_mqtt_311_probes_with_a_parameter(broker: Mosquitto) -> None:
    async with serving(broker, echo_model()), device(broker, topic=f"{REPLIES}/+", is_v5=False) as camera:
        camera.send(body_of(probe=1), topic=f"{NOWHERE}/{CLIENT}/p1", qos=0)
        reply = await camera.reply()
    assert reply.topic == f"{REPLIES}/p1"
    assert reply.body["load"]["room"] == 512
    assert reply.body["parameters"]["status"] == 200


async def test_a_malformed_probe_is_refused(broker: Mosquitto) -> None:
    async with serving(broker, echo_model()), device(broker) as camera:
        camera.send(body_of(), probe="perhaps")
        assert (await camera.reply()).words["status"] == "400"


async def test_a_probe_costs_no_place_among_the_requests_under_way(broker: Mosquitto) -> None:
    model = SlowModel()
    async with serving(broker, model.loaded(), settings={"max_in_flight": 1}), device(broker) as camera:
        camera.send(body_of(), correlation=b"slow")
        await model.is_running.wait()
        camera.send(body_of(), correlation=b"probe", probe="1")
        probed = await camera.reply()
        assert (probed.correlation, probed.body["load"]["room"]) == (b"probe", 0)
        model.release()
        assert (await camera.reply()).correlation == b"slow"


async def test_a_stopping_agent_refuses_probes(broker: Mosquitto) -> None:
    async with serving(broker, echo_model()) as front, device(broker) as camera:
        await front.drain()
        camera.send(body_of(), probe="1")
        assert (await camera.reply()).words["status"] == "503"


async def test_the_status_follows_the_load_and_an_idle_agent_stays_silent(broker: Mosquitto) -> None:
    model = SlowModel()
    async with (
        serving(broker, model.loaded(), settings={"max_in_flight": 1}),
        device(broker) as camera,
        device(broker, topic=STATUS) as watcher,
    ):
        assert (await watcher.reply()).body["load"]["room"] == 1
        camera.send(body_of())
        await model.is_running.wait()
        assert (await watcher.reply()).body["load"]["room"] == 0
        model.release()
        assert (await watcher.reply()).body["load"]["room"] == 1
        assert await watcher.hears_nothing()
