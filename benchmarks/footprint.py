"""What an idle agent costs: memory with one small model, traffic, and the time from its start to its first answer.

    python -m benchmarks.footprint --json

Each round starts a real agent on a state folder that holds one model, from an environment that has the agent extra and
nothing else (made under build/venvs/ at the first run), beside a real mosquitto. A device asks over MQTT until the
first reply comes; then the agent is left alone for a while, and the kernel is asked what it holds. The figures are
medians over the rounds.

Once, a real controller is there too. The agent enrols, gets its model from the controller, starts again, answers a
device and is left alone; then every byte of TCP payload counts that it and its controller send each other, in both
directions and on all connections: control session, telemetry and records (`benchmarks.idle_traffic`).
"""

import argparse
import asyncio
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.idle_traffic import measure_idle
from controller.demo.ports import free_port
from core.addresses import Address
from core.telemetry import TRACEPARENT
from edge_agent.client import DeviceClient, NoReply
from tests.support.agent_environment import agent_environment
from tests.support.edge_models import INPUT, BuiltModel, make_mlp
from tests.support.enrolled import enrolled
from tests.support.mosquitto import Mosquitto, running_mosquitto
from tests.support.offline_agent import put_models

SITE, AGENT, MODEL = "bench", "agent", "small"
INPUTS = 64
# A request that comes before the agent subscribes is lost: the next follows soon, which bounds the error of the figure.
ASK_INTERVAL_S = 0.05
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
# A common multiple of both sides' keepalive (60 and 90 s), so that every ping is counted for its whole share.
IDLE_S = 180.0
MIB = 1 << 20
# Of any trace, to be recorded (W3C Trace Context, 3.2).
TRACED = f"00-{'1' * 32}-{'2' * 16}-01"


@dataclass(frozen=True, slots=True)
class Footprint:
    rss_mb: float
    pss_mb: float
    start_to_first_answer_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--idle-s", type=float, default=3.0, help="seconds left alone before memory is read")
    parser.add_argument("--idle-seconds", type=float, default=IDLE_S, help="seconds for which traffic is counted")
    arguments = parser.parse_args()
    command = agent_environment() / "nanofleet-agent"
    with tempfile.TemporaryDirectory(prefix="nanofleet-bench-") as folder:
        figures = measure(Path(folder), command, rounds=arguments.rounds, idle_s=arguments.idle_s)
        figures |= measure_traffic(Path(folder), command, idle_s=arguments.idle_seconds)
    print(json.dumps(figures) if arguments.json else json.dumps(figures, indent=2))


def measure(folder: Path, command: Path, *, rounds: int, idle_s: float) -> dict[str, Any]:
    model = make_mlp(folder / "model", name=MODEL, sizes=(INPUTS, 16, 10))
    with running_mosquitto(folder) as broker:
        found = [asdict(one_round(folder / f"round-{turn}", command, model, broker, idle_s)) for turn in range(rounds)]
    medians = {name: round(median(turn[name] for turn in found), 3) for name in found[0]}
    return {
        "benchmark": "footprint",
        **medians,
        "goals": {"rss_mb": 90, "idle_bytes_per_s": 31},
        "rounds": rounds,
        "idle_s": idle_s,
        "model_bytes": model.manifest.size_bytes,
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()},
    }


def measure_traffic(folder: Path, command: Path, *, idle_s: float) -> dict[str, Any]:
    with running_mosquitto(folder) as broker:

        def ask_once() -> None:
            with DeviceClient("device", site=SITE, broker=(broker.host, broker.port)) as device:
                give_up_s = time.perf_counter() + START_TIMEOUT_S
                ask_until_answered(device, give_up_s=give_up_s, properties={TRACEPARENT: TRACED})

        running = partial(running_agent, command, broker=broker)
        idle = measure_idle(folder, command, running, agent_id=AGENT, ask_once=ask_once, idle_s=idle_s)
        return asyncio.run(idle)


def one_round(state_dir: Path, command: Path, model: BuiltModel, broker: Mosquitto, idle_s: float) -> Footprint:
    put_models(state_dir, AGENT, [model])
    # Nobody listens there: an agent must do without.
    enrolled(state_dir, controller=Address("127.0.0.1", free_port()), agent_id=AGENT, site=SITE)
    with DeviceClient("device", site=SITE, broker=(broker.host, broker.port)) as device:
        started_s = time.perf_counter()
        with running_agent(command, state_dir, broker=broker) as process:
            ask_until_answered(device, give_up_s=started_s + START_TIMEOUT_S)
            answered_s = time.perf_counter() - started_s
            time.sleep(idle_s)
            memory = psutil.Process(process.pid).memory_full_info()
    return Footprint(memory.rss / MIB, memory.pss / MIB, answered_s)


def ask_until_answered(device: DeviceClient, *, give_up_s: float, properties: Mapping[str, str] | None = None) -> None:
    request = {
        "inputs": [{"name": INPUT, "shape": [1, INPUTS], "datatype": "FP32", "data": [0.5] * INPUTS}],
    }
    while time.perf_counter() < give_up_s:
        try:
            reply = device.ask(MODEL, request, agent=AGENT, deadline_s=ASK_INTERVAL_S, qos=0, properties=properties)
        except NoReply:
            continue
        if reply.status != 200:
            raise RuntimeError(f"expected status 200, got {reply.status}: {dict(reply.body)}")
        return
    raise RuntimeError(f"expected an answer within {START_TIMEOUT_S:g} s of the start, got none")


@contextmanager
def running_agent(
    command: Path, state_dir: Path, controller: Address | None = None, *, broker: Mosquitto
) -> Iterator[subprocess.Popen[bytes]]:
    """Yield an agent that was just started, with the defaults of every setting that is not about a place.

    `controller` None: where its identity says.
    """
    settings = {
        "STATE_DIR": str(state_dir),
        "GRPC_BIND": "127.0.0.1:0",
        "MQTT__PORT": str(broker.port),
        "LOGS__LEVEL": "error",
        **({} if controller is None else {"CONTROLLER": str(controller)}),
    }
    process = subprocess.Popen(
        [command, "run"],
        cwd=state_dir,
        env={**os.environ, **{f"NANOFLEET_AGENT_{key}": value for key, value in settings.items()}},
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
