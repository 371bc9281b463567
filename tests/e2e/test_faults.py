"""The whole system with one part killed under a stream of requests, each part in turn.

Every request has one outcome by construction (`tests.support.asking`): an answer, a refusal, or its device saw the
deadline pass. What is tested is that none is answered twice or late, and that everything recovers by itself.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from rich.console import Console

from controller.demo.app import publish
from controller.demo.broker import Broker
from controller.demo.digits import FEATURES, INPUT, NANO, prepare_digits
from controller.demo.operator import Operator
from controller.demo.processes import Part, Parts, kill_group
from controller.demo.stack import Agent, Controller
from core.addresses import Address
from edge_agent.client.device import DeviceClient, Protocol
from tests.support.asking import Stream, asking
from tests.support.mosquitto import Mosquitto, running_mosquitto

SITE, AGENT, DEVICES, DEADLINE_S = "berlin", "gate-1", 3, 3.0
# Ray needs ten seconds to start on two idle cores, and these are not idle.
RECOVERY_S = 120.0


class System:
    """Broker, controller with Ray, and one agent, each to be killed and started again."""

    def __init__(self, folder: Path, broker: Mosquitto, parts: Parts) -> None:
        self.broker = broker
        self._parts = parts
        self._address = Broker("mosquitto", Address(broker.host, broker.port), speaks_v5=True)
        self.controller = Controller.planned(folder / "controller")
        self.agent = Agent.planned(folder / AGENT, agent_id=AGENT, site=SITE)
        self.start_controller()
        self.start_agent()

    def start_controller(self) -> None:
        self.controller_part = self.controller.start(self._parts)

    def start_agent(self) -> None:
        self.agent_part = self.agent.start(self._parts, broker=self._address, controller=self.controller.grpc)


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
        operator = Operator(system.controller.url, Console(stderr=True))
        publish(operator, prepare_digits(folder / "digits"))
        operator.run("deploy", NANO, "--variant", "int8-static", "--site", SITE)
        system.controller.wait_for_heavy(system.controller_part)
        yield system


@pytest.fixture
def devices(system: System) -> Iterator[list[DeviceClient]]:
    with ExitStack() as stack:
        address = (system.broker.host, system.broker.port)
        protocols = [Protocol.MQTT_5, Protocol.MQTT_311, Protocol.MQTT_5]
        yield [
            stack.enter_context(DeviceClient(f"camera-{number}", site=SITE, broker=address, protocol=protocol))
            for number, protocol in enumerate(protocols)
        ]


@pytest.fixture
def stream(system: System, devices: list[DeviceClient], pictures: list[dict[str, Any]]) -> Iterator[Stream]:
    """A stream in which both tiers answer; at its end, no device had a second or a late reply."""
    with asking(devices, NANO, pictures, agent=AGENT, deadline_s=DEADLINE_S) as stream:
        stream.wait_for("heavy", timeout_s=RECOVERY_S)
        stream.wait_for("edge/")
        yield stream
    # What a broker or an agent still held would arrive now.
    time.sleep(0.5)
    assert [(device.counters.duplicates, device.counters.late) for device in devices] == [(0, 0)] * len(devices)


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
