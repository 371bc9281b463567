"""Mixed load for many minutes while controller, Ray and broker go away and come back: what is lost, and what grows?

    python -m benchmarks.soak --minutes 20 --out benchmarks/results/soak.json

The real processes: mosquitto, a controller with its Ray, two agents of one site with the demo's models. Devices speak
MQTT 5 at both QoS and 3.1.1, ask one agent or `any`, want provisional answers or let escalations wait, send requests
again, send NaN, are slow or hostile; programs ask over the agents' local gRPC and HTTP. By the plan below, Ray is
killed, the controller is killed and stays away, the broker is killed; agents run through. Prints one JSON object.

    lost                  no final answer within the deadline although broker and agent were there
    duplicate_executions  executions beyond one per request: of requests that were sent again, by the spans that their
                          replies name; over all, agents' own counts beyond what was asked
    late                  answers after the device's deadline, by its clock (MQTT 5 and calls)
    rss_slope_percent     growth of the agents' memory in ten minutes, after warm-up, the larger one
"""

import argparse
import asyncio
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from rich.console import Console

from benchmarks.soak_calls import Calls
from benchmarks.soak_devices import Device, Habits, Hostile, Place
from benchmarks.soak_plot import plot
from benchmarks.soak_record import GRACE_S, Record, slope_per_10_min
from controller.demo.app import publish_nano
from controller.demo.digits import FEATURES, INPUT, LARGE, NANO, prepare_digits
from controller.demo.operator import Operator
from controller.demo.processes import Part, Parts, kill_group
from controller.demo.stack import START_TIMEOUT_S, Agent, Controller, answers_ok, free_address, write_toml
from core.addresses import Address
from core.open_inference import binary_body
from core.open_inference.messages import InferRequest
from core.tensors import Datatype, Tensor
from tests.support.exposed import numbers
from tests.support.mosquitto import Mosquitto, running_mosquitto

SITE, AGENTS, VARIANT = "soak", ("gate-1", "gate-2"), "int8-static"
SAMPLE_S = 1.0
# Chosen: what is loaded at first use has been loaded, pools and caches are full.
WARM_UP_SHARE, WARM_UP_LEAST_S = 0.15, 30.0
RECOVERY_S = 180.0
# Of deferred verdicts, once everything is back.
SETTLE_S = 90.0
# Parts of the whole time: when something goes away, and for how long.
PLAN = (
    (0.12, "ray", 0.0),
    (0.25, "controller", 0.04),
    (0.42, "broker", 0.01),
    (0.52, "ray", 0.0),
    (0.65, "controller", 0.08),
    (0.85, "broker", 0.003),
)
HABITS = (
    Habits("v5-qos0", 12, qos=0),
    Habits("v5-qos1", 12),
    Habits("v5-site", 8, words=(("privacy", "site"),)),
    Habits("v5-device", 4, words=(("privacy", "device"), ("priority", "1"))),
    Habits("v5-provisional", 8, words=(("accept-provisional", "1"),)),
    Habits("v5-deferrable", 4, words=(("deferrable", "1"),)),
    Habits("v311-qos0", 8, qos=0, is_v5=False),
    Habits("v311-qos1", 8, is_v5=False),
    Habits("slow", 4, pause_s=0.5),
)
HOSTILE_PER_S, NAN_PER_S, CALLS_PER_S = 5.0, 1.0, 6.0
GOALS = {"lost": 0, "duplicate_executions": 0, "late": 0, "rss_slope_percent": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--out", type=Path, help="also write the figures here, and a plot beside them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nanofleet-soak-") as folder:
        soak = run(Path(folder), minutes=arguments.minutes)
    text = json.dumps(soak.figures, indent=2)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")
        arguments.out.with_suffix(".svg").write_text(plot(soak.rss_mb, soak.events))
    print(text)


@dataclass(frozen=True, slots=True)
class Soaked:
    figures: dict[str, Any]
    # By agent: seconds since the load began, and megabytes.
    rss_mb: dict[str, list[tuple[float, float]]]
    # What went away, from when to when.
    events: list[tuple[str, float, float]]


def run(folder: Path, *, minutes: float) -> Soaked:
    with running_mosquitto(folder) as broker, Parts(folder / "logs") as parts:
        system = System(folder, broker, parts)
        return asyncio.run(Soak(system, seconds=minutes * 60).run())


class System:
    """Broker, controller with Ray, and two agents."""

    def __init__(self, folder: Path, broker: Mosquitto, parts: Parts) -> None:
        self.broker = broker
        self.errors: list[str] = []
        self._parts = parts
        self.controller = Controller.planned(folder / "controller")
        self.controller.initialise(parts)
        self.controller_part = self.controller.start(parts)
        operator = Operator(self.controller, Console(stderr=True))
        self.digits = prepare_digits(folder / "digits")
        operator.run("models", "publish", LARGE, str(self.digits.large))
        publish_nano(operator, self.digits, self.digits.nano)
        self.agents = [Agent.planned(folder / name, agent_id=name, site=SITE) for name in AGENTS]
        self.http = [free_address() for _ in self.agents]
        for agent in self.agents:
            agent.enrol(parts, token=operator.token(site=SITE, agent=agent.agent_id))
        self.agent_parts = [self._start(agent, http) for agent, http in zip(self.agents, self.http, strict=True)]
        operator.run("deploy", NANO, "--variant", VARIANT, "--site", SITE)
        self.controller.wait_for_heavy(self.controller_part)

    def _start(self, agent: Agent, http: Address) -> Part:
        top = {"state_dir": str(agent.folder), "grpc_bind": str(agent.grpc), "http_bind": str(http)}
        mqtt = {"host": self.broker.host, "port": self.broker.port}
        link = {"first_delay_s": 0.0, "reconnect_cap_s": 2.0}
        # A fleet spreads what it sends after an absence over half a minute and more.
        outbox = {"spread_s": 2.0, "retry_cap_s": 10.0, "probe_cap_s": 10.0}
        configuration = write_toml(agent.folder / "agent.toml", top, mqtt=mqtt, link=link, outbox=outbox)
        part = self._parts.start_python(agent.agent_id, "edge_agent", "run", "--config", str(configuration))
        part.wait_for("its HTTP face", lambda: answers_ok(f"http://{http}/healthz"), timeout_s=START_TIMEOUT_S)
        return part

    def kill_ray(self) -> None:
        """End what the controller has started; it starts that again."""
        for process in psutil.Process(self.controller_part.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def kill_controller(self) -> None:
        self._note_errors(self.controller_part)
        kill_group(self.controller_part.process.pid)
        self.controller_part.process.wait(10)

    def start_controller(self) -> None:
        self.controller_part = self.controller.start(self._parts)

    def note_errors(self) -> None:
        for part in (self.controller_part, *self.agent_parts):
            self._note_errors(part)

    def _note_errors(self, part: Part) -> None:
        lines = part.log.read_text(errors="replace").splitlines()
        self.errors += [f"{part.name}: {line[:200]}" for line in lines if " ERROR " in line or '"ERROR"' in line]

    def agent_numbers(self) -> list[dict[str, float]]:
        """Return what each agent has counted, by name of the metric, summed over its labels."""
        return [_summed(httpx.get(f"http://{http}/metrics", headers=_OPEN_METRICS).content) for http in self.http]


_COUNTED = ("nanofleet_requests_total", "nanofleet_mqtt_messages_total")
_OPEN_METRICS = {"accept": "application/openmetrics-text"}


def _summed(exposition: bytes) -> dict[str, float]:
    sums: dict[str, float] = {}
    for (name, labels), number in numbers(exposition).items():
        said = dict(labels)
        key = (
            f"{name}:{said['outcome']}" if "outcome" in said else f"{name}:{said['state']}" if "state" in said else name
        )
        sums[key] = sums.get(key, 0.0) + number
    return sums


class Soak:
    def __init__(self, system: System, *, seconds: float) -> None:
        self._system = system
        self._seconds = seconds
        self._record = Record()
        self._rss_mb: dict[str, list[tuple[float, float]]] = {agent: [] for agent in AGENTS}
        self._events: list[tuple[str, float, float]] = []
        self._began_s = 0.0

    async def run(self) -> Soaked:
        before = self._system.agent_numbers()
        devices, load = self._load()
        links = [asyncio.create_task(device.link.run(), name="link") for device in devices]
        await self._connected(devices)
        self._began_s = time.monotonic()
        tasks = [asyncio.create_task(coroutine, name="load") for coroutine in load]
        watching = asyncio.create_task(self._watch(), name="watch")
        await self._follow_plan(devices)
        await asyncio.sleep(max(0.0, self._began_s + self._seconds - time.monotonic()))
        await _cancel(tasks)
        await self._settle()
        await _cancel([watching, *links])
        self._record.judge(time.monotonic(), is_end=True)
        self._system.note_errors()
        return Soaked(self._figures(before, self._system.agent_numbers()), self._rss_mb, self._events)

    def _load(self) -> tuple[list[Device | Hostile], list[Any]]:
        bodies, (nan_body, nan_header) = pictures(self._system), nan_request()
        nan_words = (("inference-header-content-length", str(nan_header)),)
        nan = Habits("nan", NAN_PER_S, words=nan_words, content_type="application/octet-stream")
        place = Place(self._system.broker.port, SITE, NANO, (*AGENTS, "any"))
        devices = [
            Device(number, habits, place, bodies=[nan_body] if habits is nan else bodies, record=self._record)
            for habits in (*HABITS, nan)
            for number in range(2 if habits.per_s >= 8 else 1)
        ]
        hostile = Hostile(place, record=self._record)
        calls = [
            Calls(NANO, agent.grpc, http, bodies, record=self._record)
            for agent, http in zip(self._system.agents, self._system.http, strict=True)
        ]
        load = [device.run() for device in devices]
        return [*devices, hostile], [*load, hostile.run(HOSTILE_PER_S), *(call.run(CALLS_PER_S) for call in calls)]

    async def _connected(self, devices: Sequence[Device | Hostile]) -> None:
        """Wait until every device and both agents are at the broker."""
        give_up_s = time.monotonic() + RECOVERY_S
        # A hostile one is hung up on.
        while not all(device.link.is_up for device in devices if isinstance(device, Device)):
            await _patience(give_up_s, "the devices at the broker")
        while any(not each["nanofleet_broker_state:online"] for each in self._system.agent_numbers()):
            await _patience(give_up_s, "the agents at the broker")

    async def _watch(self) -> None:
        processes = {part.name: psutil.Process(part.process.pid) for part in self._system.agent_parts}
        while True:
            now_s = time.monotonic()
            for name, process in processes.items():
                self._rss_mb[name].append((now_s - self._began_s, process.memory_info().rss / 1e6))
            self._record.judge(now_s)
            await asyncio.sleep(SAMPLE_S)

    async def _follow_plan(self, devices: Sequence[Device | Hostile]) -> None:
        for at, what, for_share in PLAN:
            await asyncio.sleep(max(0.0, self._began_s + at * self._seconds - time.monotonic()))
            began_s = time.monotonic()
            print(f"{what} goes away after {began_s - self._began_s:.0f} s", file=sys.stderr)
            for_s = max(3.0, for_share * self._seconds)
            if what == "broker":
                await self._break_broker(devices, for_s=for_s)
            elif what == "controller":
                await asyncio.to_thread(self._system.kill_controller)
                await asyncio.sleep(for_s)
                await asyncio.to_thread(self._system.start_controller)
            else:
                await asyncio.to_thread(self._system.kill_ray)
            self._events.append((what, began_s - self._began_s, time.monotonic() - self._began_s))

    async def _break_broker(self, devices: Sequence[Device | Hostile], *, for_s: float) -> None:
        self._record.begin_outage(time.monotonic())
        self._system.broker.kill()
        await asyncio.sleep(for_s)
        await asyncio.to_thread(self._system.broker.start)
        await self._connected(devices)
        self._record.end_outage(time.monotonic())

    async def _settle(self) -> None:
        """Let the last requests end, and what waited for the heavy tier come."""
        await asyncio.sleep(min(GRACE_S, 10.0))
        controller = self._system.controller
        await asyncio.to_thread(controller.wait_for_heavy, self._system.controller_part)
        give_up_s = time.monotonic() + SETTLE_S
        with suppress(TimeoutError):
            while self._record.waiting_for_verdicts:
                await _patience(give_up_s, "the deferred verdicts")

    def _figures(self, before: list[dict[str, float]], after: list[dict[str, float]]) -> dict[str, Any]:
        grown = _grown(before, after)
        counts, record = self._record.counts, self._record
        executed = round(grown["nanofleet_requests_total:answered"])
        second = counts["second_executions_traced"] + max(0, executed - counts["sent"])
        slopes = {name: slope_per_10_min(self._warm(samples)) * 100 for name, samples in self._rss_mb.items()}
        figures = {
            "lost": counts["lost"],
            "duplicate_executions": second,
            "late": counts["late"],
            "rss_slope_percent": round(max(slopes.values()), 2),
        }
        return {
            "benchmark": "soak",
            "minutes": round(self._seconds / 60, 2),
            **figures,
            "met": {name: figures[name] <= goal for name, goal in GOALS.items()},
            "sent": counts["sent"],
            "per_s": round(counts["sent"] / self._seconds, 1),
            "answered": counts["answered"],
            "excused_by_broker_outage": counts["excused"],
            "executed": executed,
            "sent_again": counts["copies"],
            "sent_again_and_traced": counts["traced_copies"],
            "late_v311": counts["late_untimed"],
            "deferred": counts["deferred"],
            "verdicts": counts["verdicts"],
            "verdicts_missing": counts["verdicts_missing"],
            "outbox": {name: each for name, each in _outbox(after).items() if each},
            "hostile": counts["hostile"],
            "by_kind": dict(sorted(record.by_kind.items())),
            "statuses": dict(sorted(record.statuses.items())),
            "agents": {name.rpartition("_total:")[2]: round(number) for name, number in sorted(grown.items())},
            "rss_mb": {name: _rss(self._warm(samples), slopes[name]) for name, samples in self._rss_mb.items()},
            "away": [{"what": what, "from_s": round(a), "to_s": round(b)} for what, a, b in self._events],
            "log_errors": len(self._system.errors),
            "log_errors_first": self._system.errors[:5],
            "lost_first": record.lost[:5],
            "late_first": record.late[:5],
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        }

    def _warm(self, samples: list[tuple[float, float]]) -> list[tuple[float, float]]:
        since_s = max(WARM_UP_LEAST_S, WARM_UP_SHARE * self._seconds)
        return [sample for sample in samples if sample[0] >= since_s] or samples


def _grown(before: list[dict[str, float]], after: list[dict[str, float]]) -> dict[str, float]:
    """Return by how much the counts of requests and messages have grown, of all agents together."""
    names = {name for each in after for name in each if name.startswith(_COUNTED)}
    return {
        name: sum(each.get(name, 0.0) for each in after) - sum(each.get(name, 0.0) for each in before) for name in names
    }


def _outbox(after: list[dict[str, float]]) -> dict[str, float]:
    """Return what the agents say of their outboxes at the end."""
    names = {name for each in after for name in each if name.startswith("nanofleet_outbox")}
    return {name: sum(each.get(name, 0.0) for each in after) for name in sorted(names)}


def _rss(samples: Sequence[tuple[float, float]], slope_percent: float) -> dict[str, float]:
    values = [value for _, value in samples]
    return {
        "first": round(values[0], 1),
        "last": round(values[-1], 1),
        "most": round(max(values), 1),
        "slope_percent_per_10_min": round(slope_percent, 2),
    }


def pictures(system: System) -> list[bytes]:
    """Return requests of real digits, of which an agent keeps some and escalates some."""
    with np.load(system.digits.held_out) as held_out:
        inputs = held_out["inputs"][:300]
    tensor = {"name": INPUT, "shape": [1, FEATURES], "datatype": "FP32"}
    return [json.dumps({"inputs": [{**tensor, "data": picture.ravel().tolist()}]}).encode() for picture in inputs]


def nan_request() -> tuple[bytes, int]:
    """Return a binary body of a picture that is not one, and the length of its header."""
    pixels = np.full((1, FEATURES), np.nan, dtype=np.float32)
    return binary_body.encode_request(InferRequest(NANO, (Tensor(INPUT, Datatype.FP32, pixels),)))


async def _patience(give_up_s: float, what: str) -> None:
    if time.monotonic() > give_up_s:
        raise TimeoutError(f"expected {what} within {RECOVERY_S:g} s")
    await asyncio.sleep(0.05)


async def _cancel(tasks: Sequence["asyncio.Task[Any]"]) -> None:
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome


if __name__ == "__main__":
    random.seed(0)
    main()
