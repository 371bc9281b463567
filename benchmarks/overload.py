"""Three times more than it can do: what is left of the answers, of nanofleet's agent and of a 25-line script.

    python -m benchmarks.overload --json

A real broker, a real agent and `peers/paho_responder.py` on the same ONNX file, each in a process of its own. A run of
the model takes some milliseconds, so that a few hundred requests a second are all that it can do, while broker and load
generator could do ten times as many: what is measured is the responder. Each round finds out what a responder can do
(closed loop, without regard to deadlines), then offers it three times as many requests with 200 ms each to be answered,
for half a minute. An answer counts when the device has it in time; the agent refuses what it cannot do and is silent
about nothing. Ratios are medians over the rounds, memory is the agent's during the first.
"""

import argparse
import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import psutil

from benchmarks.hot_path import AGENT, PEER, SITE, START_S, ask, costs, offer, running_script
from tests.support.edge_models import BuiltModel, cascade_to, make_mlp
from tests.support.mosquitto import Mosquitto, running_mosquitto
from tests.support.offline_agent import offline_agent

# About 2 ms a run on the machine of the README, most of it reading 67 MB of weights.
SIZES = (64, 4096, 4096, 10)
MODEL = "heavy"
TIMES_CAPACITY = 3.0
DEADLINE_MS = 200
# More than one, so that the responder never waits for the device.
IN_FLIGHT = 8
START_ATTEMPTS = 5
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30.0, help="length of each overload")
    parser.add_argument("--qos", type=int, choices=(0, 1), default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nanofleet-bench-") as folder:
        figures = measure(Path(folder), rounds=arguments.rounds, seconds=arguments.seconds, qos=arguments.qos)
    print(json.dumps(figures) if arguments.json else json.dumps(figures, indent=2))


def measure(folder: Path, *, rounds: int, seconds: float, qos: int) -> dict[str, Any]:
    model = make_mlp(folder / MODEL, name=MODEL, sizes=SIZES, max_batch=1, cascade=cascade_to(threshold=0.0))
    with ExitStack() as stack:
        broker = stack.enter_context(running_mosquitto(folder))
        agent = stack.enter_context(
            offline_agent(
                folder / "agent",
                models=[model],
                broker=broker,
                agent_id=AGENT,
                site=SITE,
                environment={"TELEMETRY__EXPORT": "false"},
            )
        )
        found: dict[str, list[dict[str, float]]] = {AGENT: [], PEER: []}
        memory: dict[str, float] = {}
        for _turn in range(rounds):
            with resident_memory(agent.process.pid) as watched:
                found[AGENT].append(one_overload(broker, AGENT, qos, seconds))
            memory = memory or watched
            # A new one each time: what it has not answered yet would be answered into the next measurement.
            with running_script(model, broker):
                await_answers(broker, PEER, qos)
                found[PEER].append(one_overload(broker, PEER, qos, seconds))
    return {"benchmark": "overload", **summary(found), **memory, **circumstances(model, rounds, seconds, qos)}


def await_answers(broker: Mosquitto, who: str, qos: int) -> None:
    """Return when `who` answers; what is asked before it has subscribed is lost, and given up after a while."""
    for _ in range(START_ATTEMPTS):
        time.sleep(START_S)
        try:
            ask(broker, who, MODEL, 1, qos, 0.2)
        except subprocess.CalledProcessError:
            continue
        return
    raise RuntimeError(f"{who} does not answer")


def one_overload(broker: Mosquitto, who: str, qos: int, seconds: float) -> dict[str, float]:
    capacity_per_s = ask(broker, who, MODEL, IN_FLIGHT, qos, max(3.0, seconds / 6))["rps"]
    outcome = offer(broker, who, MODEL, TIMES_CAPACITY * capacity_per_s, qos, seconds, deadline_ms=DEADLINE_MS)
    return {**outcome, "capacity_per_s": capacity_per_s, "goodput_ratio": outcome["in_time_per_s"] / capacity_per_s}


def summary(found: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    figures: dict[str, float] = {
        "goodput_ratio": round(median(turn["goodput_ratio"] for turn in found[AGENT]), 3),
        "late": sum(turn["late"] for turn in found[AGENT]),
        "script_goodput_ratio": round(median(turn["goodput_ratio"] for turn in found[PEER]), 3),
        "script_late": sum(turn["late"] for turn in found[PEER]),
    }
    for who, turns in found.items():
        for name in ("capacity_per_s", "offered_per_s", "in_time_per_s", "p50_ms", "p99_ms", "max_ms", "worst_lag_ms"):
            figures[f"{who}_{name}"] = round(median(turn[name] for turn in turns), 1)
        for name in ("sent", "in_time", "refused", "unanswered"):
            figures[f"{who}_{name}"] = sum(turn[name] for turn in turns)
    return figures


@contextmanager
def resident_memory(pid: int) -> Iterator[dict[str, float]]:
    """Watch what a process holds; the figures are there when the block ends."""
    figures: dict[str, float] = {}
    samples: list[tuple[float, float]] = []
    is_over = threading.Event()
    process = psutil.Process(pid)

    def watch() -> None:
        while not is_over.wait(0.25):
            samples.append((time.monotonic(), process.memory_info().rss / MIB))

    watching = threading.Thread(target=watch, name="memory")
    watching.start()
    try:
        yield figures
    finally:
        is_over.set()
        watching.join()
    # The first half warms up: the capacity is measured, and what the queue takes at its fullest is taken.
    settled = samples[len(samples) // 2 :]
    slope = linear_regression([at_s for at_s, _ in settled], [mb for _, mb in settled]).slope
    figures["rss_mb"] = round(settled[-1][1], 1)
    figures["rss_slope_percent_per_10_min"] = round(100 * 600 * slope / settled[-1][1], 2)


def circumstances(model: BuiltModel, rounds: int, seconds: float, qos: int) -> dict[str, Any]:
    return {
        "goals": {"goodput_ratio": 0.9, "late": 0},
        "rounds": rounds,
        "seconds": seconds,
        "qos": qos,
        "deadline_ms": DEADLINE_MS,
        "times_capacity": TIMES_CAPACITY,
        "model": costs(model),
    }


if __name__ == "__main__":
    main()
