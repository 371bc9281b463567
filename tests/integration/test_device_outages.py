"""Devices with the real client and agents with the real front, while the broker goes away: nothing is lost."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from core.clock import SystemClock
from core.tensors import Array
from edge_agent.client import DeviceClient, NoReply, Protocol
from edge_agent.front.mqtt.front import MqttFront
from edge_agent.runtime.pool import LoadedModel
from edge_agent.runtime.session import RunTime
from edge_agent.settings import RuntimeSettings
from tests.support.edge_front import SITE, serving
from tests.support.edge_plane import echo_manifest
from tests.support.mosquitto import Mosquitto, running_mosquitto

DEADLINE_S = 30.0
PAUSE_S = 0.01
# What a run takes, so that at every moment some request is under way.
WORK_S = 0.03
TIMEOUT_S = 60.0


class Tally:
    """An echo model that counts how often each request was run; each has a number of its own as its first value."""

    def __init__(self) -> None:
        self.runs: Counter[float] = Counter()

    def loaded(self) -> LoadedModel:
        manifest = echo_manifest()
        run_time = RunTime(WORK_S, WORK_S)
        clock = SystemClock()
        return LoadedModel(
            manifest, manifest.digest(), self._run, run_time=run_time, settings=RuntimeSettings(), clock=clock
        )

    def _run(self, inputs: Sequence[Array]) -> Sequence[Array]:
        time.sleep(WORK_S)
        self.runs.update(float(row[0]) for row in inputs[0])
        return inputs


class Asking:
    """Threads that ask one numbered request after another; what came back is compared with what was asked."""

    def __init__(self, devices: Sequence[DeviceClient], *, qos: int) -> None:
        self.asked = 0
        self.lost = 0
        self.wrong = 0
        self.answers: list[tuple[float, str]] = []
        self._qos = qos
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._ask_on, args=(device,)) for device in devices]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()

    async def has_answers(self, count: int) -> None:
        """Wait for `count` further answers."""
        wanted = len(self.answers) + count
        async with asyncio.timeout(TIMEOUT_S):
            while len(self.answers) < wanted:
                await asyncio.sleep(0.01)

    def _ask_on(self, device: DeviceClient) -> None:
        while not self._done.wait(PAUSE_S):
            with self._lock:
                self.asked += 1
                number = float(self.asked)
            self._ask(device, number)

    def _ask(self, device: DeviceClient, number: float) -> None:
        tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [number, 0.0, 0.0]}
        try:
            reply = device.ask("digits", {"inputs": [tensor]}, qos=self._qos, deadline_s=DEADLINE_S)
        except NoReply:
            self.lost += 1
            return
        if reply.status != 200 or reply.body["outputs"][0]["data"][0] != number:
            self.wrong += 1
        self.answers.append((time.monotonic(), reply.agent))


class Site:
    """Agents, each with a Tally, and devices that ask them."""

    def __init__(
        self, broker: Mosquitto, agents: Sequence[str], protocols: Sequence[Protocol], *, qos: int = 1
    ) -> None:
        self.tallies = {agent: Tally() for agent in agents}
        self.fronts: dict[str, MqttFront] = {}
        self.devices = [
            DeviceClient(f"camera-{number}", site=SITE, broker=(broker.host, broker.port), protocol=protocol)
            for number, protocol in enumerate(protocols)
        ]
        self.asking = Asking(self.devices, qos=qos)
        self._broker = broker
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> "Site":
        for agent, tally in self.tallies.items():
            front = await self._stack.enter_async_context(serving(self._broker, tally.loaded(), agent=agent))
            self.fronts[agent] = front
        for device in self.devices:
            await asyncio.to_thread(device.connect)
        self.asking.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.asking.stop)
        for device in self.devices:
            await asyncio.to_thread(device.close)
        await self._stack.aclose()

    def runs(self) -> Counter[tuple[str, float]]:
        return Counter(
            {
                (agent, number): count
                for agent, tally in self.tallies.items()
                for number, count in tally.runs.items()
                if number
            }
        )


@pytest.mark.parametrize("is_persistent", [True, False])
async def test_a_broker_restart_loses_no_request_that_has_time(tmp_path: Path, is_persistent: bool) -> None:
    with running_mosquitto(tmp_path, persistent=is_persistent) as broker:
        async with Site(broker, ["gate-1", "gate-2"], [Protocol.MQTT_5] * 4 + [Protocol.MQTT_311] * 2) as site:
            for _ in range(2):
                await site.asking.has_answers(50)
                await asyncio.to_thread(broker.stop if is_persistent else broker.kill)
                await asyncio.sleep(0.3)
                await asyncio.to_thread(broker.start)
            await site.asking.has_answers(50)
    assert (site.asking.lost, site.asking.wrong) == (0, 0)
    assert len(site.asking.answers) == site.asking.asked
    assert sum(device.counters.late for device in site.devices) == 0
    assert all(device.counters.duplicates <= device.counters.repeats for device in site.devices)


@pytest.mark.parametrize("qos", [0, 1])
@pytest.mark.parametrize("protocol", Protocol)
async def test_a_broker_restart_makes_no_agent_run_a_request_twice(
    tmp_path: Path, protocol: Protocol, qos: int
) -> None:
    with running_mosquitto(tmp_path) as broker:
        async with Site(broker, ["gate-1", "gate-2"], [protocol] * 4, qos=qos) as site:
            for _ in range(3):
                await site.asking.has_answers(50)
                await asyncio.to_thread(broker.kill)
                await asyncio.to_thread(broker.start)
            await site.asking.has_answers(50)
    assert site.asking.lost == 0
    assert max(site.runs().values()) == 1
    assert sum(front.counters.duplicates for front in site.fronts.values()) > 0
