"""The whole system with one part killed under a stream of requests, each part in turn.

Every request has one outcome by construction (`tests.support.asking`): an answer, a refusal, or its device saw the
deadline pass. What is tested is that none is answered twice or late, and that everything recovers by itself, an update
that was under way included.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from rich.console import Console

from controller.cli.deploy import SERVING
from controller.demo.app import publish_nano
from controller.demo.broker import Broker
from controller.demo.digits import FEATURES, INPUT, LARGE, NANO, prepare_digits
from controller.demo.operator import Operator
from controller.demo.processes import Part, Parts, kill_group
from controller.demo.stack import Agent, Controller
from core.addresses import Address
from core.manifest import MAX_CHUNK_BYTES
from edge_agent.client import DeviceClient, Protocol
from tests.support.asking import Stream, asking
from tests.support.bulky import bulky_onnx
from tests.support.mosquitto import Mosquitto, running_mosquitto

SITE, AGENT, DEVICES, DEADLINE_S = "berlin", "gate-1", 3, 3.0
# Ray needs ten seconds to start on two idle cores, and these are not idle.
RECOVERY_S = 120.0
POLL_S = 0.05
# A model of some large chunks, of which an update leaves a third, and a controller that sends two a second.
BULKY, BULKY_TENSORS, KEPT_TENSORS, SEND_BYTES_PER_S = "bulky", 12, 4, 2 * MAX_CHUNK_BYTES
MODERN = Protocol.MQTT_5
PROTOCOLS = (MODERN, Protocol.MQTT_311, MODERN)


class System:
    """Broker, controller with Ray, and one agent, each to be killed and started again."""

    def __init__(self, folder: Path, broker: Mosquitto, parts: Parts) -> None:
        self.broker = broker
        self._parts = parts
        self._address = Broker("mosquitto", Address(broker.host, broker.port), speaks_v5=True)
        self.controller = Controller.planned(folder / "controller")
        self.controller.initialise(parts)
        with self.controller.configuration.open("a") as configuration:
            configuration.write(f"\n[transfer]\nbytes_per_s = {SEND_BYTES_PER_S}\n")
        self.start_controller()
        self.operator = Operator(self.controller, Console(stderr=True))
        self.agent = Agent.planned(folder / AGENT, agent_id=AGENT, site=SITE)
        self.agent.enrol(parts, token=self.operator.token(site=SITE, agent=AGENT))
        self.start_agent()

    def start_controller(self) -> None:
        self.controller_part = self.controller.start(self._parts)

    def start_agent(self) -> None:
        self.agent_part = self.agent.start(self._parts, broker=self._address)

    def slot(self, model: str) -> dict[str, Any] | None:
        """Return what the agent last told of a model, as the operator sees it; a command of its own is too slow."""
        secret = json.loads(self.controller.credential.read_bytes())["secret"]
        url = f"{self.controller.url}/api/agents/{AGENT}"
        agent = httpx.get(url, headers={"authorization": f"Bearer {secret}"}).raise_for_status().json()
        return next((slot for slot in agent["slots"] if slot["slot"]["model"] == model), None)

    def wait_for_slot(self, model: str, is_wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        give_up_s = time.monotonic() + RECOVERY_S
        while (slot := self.slot(model)) is None or not is_wanted(slot):
            assert time.monotonic() < give_up_s, slot
            time.sleep(POLL_S)
        return slot


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Requests of real digits, of which the agent keeps some and escalates some."""
    digits = prepare_digits(tmp_path_factory.mktemp("digits"))
    with np.load(digits.held_out) as held_out:
        inputs = held_out["inputs"][:200]
    return [
        {"inputs": [{"name": INPUT, "shape": [1, FEATURES], "datatype": "FP32", "data": picture.ravel().tolist()}]}
        for picture in inputs
    ]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("system")
    with running_mosquitto(folder) as broker, Parts(folder / "logs") as parts:
        system = System(folder, broker, parts)
        digits = prepare_digits(folder / "digits")
        system.operator.run("models", "publish", LARGE, str(digits.large))
        publish_nano(system.operator, digits, digits.nano)
        system.operator.run("deploy", NANO, "--variant", "int8-static", "--site", SITE)
        system.controller.wait_for_heavy(system.controller_part)
        yield system


@pytest.fixture
def devices(system: System) -> Iterator[list[DeviceClient]]:
    with ExitStack() as stack:
        address = (system.broker.host, system.broker.port)
        yield [
            stack.enter_context(DeviceClient(f"camera-{number}", site=SITE, broker=address, protocol=protocol))
            for number, protocol in enumerate(PROTOCOLS)
        ]


@pytest.fixture
def stream(system: System, devices: list[DeviceClient], pictures: list[dict[str, Any]]) -> Iterator[Stream]:
    """A stream in which both tiers answer; at its end, no device had a late reply, or a second one without its doing.

    What a device sends again after an outage may be answered again, since nobody knows which of the two was lost.

    A request of MQTT 3.1.1 says how long it may take, not since when: what it waits in a socket of a machine that is
    short of time, nobody counts.
    """
    with asking(devices, NANO, pictures, agent=AGENT, deadline_s=DEADLINE_S) as stream:
        stream.wait_for("heavy", timeout_s=RECOVERY_S)
        stream.wait_for("edge/")
        yield stream
    # What a broker or an agent still held would arrive now.
    time.sleep(0.5)
    assert all(device.counters.duplicates <= device.counters.repeats for device in devices)
    assert [
        device.counters.late for device, protocol in zip(devices, PROTOCOLS, strict=True) if protocol is MODERN
    ] == [0, 0]


def kill(part: Part) -> None:
    """End the part at once with all of its group, as a power cut would."""
    kill_group(part.process.pid)
    part.process.wait(10)


def heavy_processes(system: System) -> list[psutil.Process]:
    return psutil.Process(system.controller_part.process.pid).children(recursive=True)


def test_without_ray_the_edge_answers_and_ray_comes_back(system: System, stream: Stream) -> None:
    start = stream.position()
    for process in heavy_processes(system):
        process.kill()
    stream.wait_for("edge/heavy_unavailable", after=start)
    stream.wait_for("heavy", timeout_s=RECOVERY_S)
    assert stream.count("no reply", after=start) == 0
    assert stream.count("refused", after=start) == 0


def test_without_the_controller_the_edge_answers_and_it_comes_back(system: System, stream: Stream) -> None:
    start = stream.position()
    kill(system.controller_part)
    stream.wait_for("edge/heavy_unavailable", after=start)
    system.start_controller()
    stream.wait_for("heavy", timeout_s=RECOVERY_S)
    assert stream.count("no reply", after=start) == 0
    assert stream.count("refused", after=start) == 0


def test_without_the_broker_devices_see_their_deadline_and_all_find_it_again(system: System, stream: Stream) -> None:
    start = stream.position()
    system.broker.kill()
    stream.wait_for("no reply", after=start, count=DEVICES)
    system.broker.start()
    stream.wait_for("edge/", timeout_s=RECOVERY_S)
    stream.wait_for("heavy", timeout_s=RECOVERY_S)


def test_without_the_agent_devices_see_their_deadline_and_it_comes_back_with_its_models(
    system: System, stream: Stream
) -> None:
    start = stream.position()
    kill(system.agent_part)
    stream.wait_for("no reply", after=start, count=DEVICES)
    system.start_agent()
    stream.wait_for("edge/", timeout_s=RECOVERY_S)
    stream.wait_for("heavy", timeout_s=RECOVERY_S)


def test_an_agent_that_restarts_without_its_controller_goes_on_answering(system: System, stream: Stream) -> None:
    kill(system.controller_part)
    kill(system.agent_part)
    system.start_agent()
    stream.wait_for("edge/", count=20, timeout_s=RECOVERY_S)
    system.start_controller()
    stream.wait_for("heavy", timeout_s=RECOVERY_S)


def test_an_update_goes_on_where_it_was_when_its_controller_was_killed(
    system: System, stream: Stream, tmp_path: Path
) -> None:
    publish_bulky(system.operator, tmp_path, seed=1)
    system.operator.run("deploy", BULKY, "--variant", "original", "--site", SITE)
    first = system.wait_for_slot(BULKY, is_serving(version=1))["transfer"]
    publish_bulky(system.operator, tmp_path, seed=2)
    system.operator.run("deploy", BULKY, "--variant", "original", "--site", SITE, "--no-wait")
    before = system.wait_for_slot(BULKY, is_on_its_way)["transfer"]
    start = stream.position()
    kill(system.controller_part)
    stream.wait_for("edge/heavy_unavailable", after=start)
    system.start_controller()
    slot = system.wait_for_slot(BULKY, is_serving(version=2))
    cost = slot["transfer"]
    assert cost["brought_bytes"] == slot["total_bytes"]
    assert cost["same_chunks"] == before["same_chunks"] >= KEPT_TENSORS
    # Both versions are cut alike, and of the first nothing was there.
    assert fetched_chunks(before) < fetched_chunks(cost) <= fetched_chunks(first) - cost["same_chunks"] + 1


def publish_bulky(operator: Operator, folder: Path, *, seed: int) -> None:
    model = folder / f"{seed}.onnx"
    model.write_bytes(bulky_onnx(tensors=BULKY_TENSORS, kept=KEPT_TENSORS, seed=seed))
    operator.run("models", "publish", BULKY, str(model))


def is_on_its_way(slot: dict[str, Any]) -> bool:
    """Say whether the second version is between two of its chunks."""
    is_fetching: bool = slot["slot"]["version"] == 2 and slot["phase"] == "fetching" and slot["transfer"] is not None
    return is_fetching and fetched_chunks(slot["transfer"]) > 0


def is_serving(*, version: int) -> Callable[[dict[str, Any]], bool]:
    return lambda slot: slot["slot"]["version"] == version and slot["phase"] in SERVING


def fetched_chunks(transfer: dict[str, int]) -> int:
    return transfer["raw_chunks"] + transfer["zstd_chunks"] + transfer["difference_chunks"]
