"""Twenty models under a budget that holds seven of them: what users wait for, and whether the budget holds.

    python -m benchmarks.residency --json

Models of 5 to 25 MB are measured by the agent's own self-test process, then asked through its data plane by Poisson
arrivals of Zipf popularity. Checked all the while: what the pool accounts for (at each change), the resident memory of
this process over what it has without models (every few milliseconds), every answer against what the model gives when it
is asked alone. The hit ratio is ours beside a plain LRU that holds the number of models that fit on average (budget /
mean size, rounded down), replayed on the same sequence of requests; that one pays nothing for the moment of loading,
in which a model takes twice its size.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path

import numpy as np
import uvloop

from core.clock import SystemClock
from core.errors import NanofleetError
from core.open_inference.messages import InferRequest
from core.process_metrics import resident_bytes
from core.telemetry import Tracing, TracingSettings
from core.tensors import Array, Datatype, Tensor
from edge_agent.activation.self_test import SelfTester, SelfTestLimits
from edge_agent.data_plane import EdgeDataPlane
from edge_agent.runtime.berth import LoadCounts
from edge_agent.runtime.footprint import Footprints
from edge_agent.runtime.hosting import Hosting
from edge_agent.runtime.memory import keep_malloc_tight, release_freed
from edge_agent.runtime.pool import ModelPool
from edge_agent.runtime.residency import ResidencyTerms
from edge_agent.settings import RuntimeSettings
from tests.support.edge_models import BuiltModel, make_mlp
from tests.support.edge_plane import away

MODELS = 20
MIN_BYTES, MAX_BYTES = 5_000_000, 25_000_000
BUDGET_BYTES = 100_000_000
MAX_BATCH = 8
SAMPLE_INTERVAL_S = 0.005


@dataclass(slots=True)
class Outcome:
    """What became of the requests."""

    sequence: list[str] = field(default_factory=list)
    failed: int = 0
    wrong: int = 0
    errors: set[str] = field(default_factory=set)
    hit_ms: list[float] = field(default_factory=list)
    cold_ms: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Peak:
    rss_bytes: int = 0
    accounted_bytes: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--rate", type=float, default=6.0, help="requests a second")
    parser.add_argument("--zipf", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=5)
    arguments = parser.parse_args()
    keep_malloc_tight()
    with tempfile.TemporaryDirectory(prefix="nanofleet-bench-") as name:
        figures = uvloop.run(
            measure(
                Path(name),
                arguments.seconds,
                rate=arguments.rate,
                zipf=arguments.zipf,
                chance=random.Random(arguments.seed),
            )
        )
    print(json.dumps(figures) if arguments.json else json.dumps(figures, indent=2))


async def measure(
    folder: Path, seconds: float, *, rate: float, zipf: float, chance: random.Random
) -> dict[str, str | int | float]:
    models = [build(folder / str(number), number, chance.uniform(MIN_BYTES, MAX_BYTES)) for number in range(MODELS)]
    footprints = Footprints()
    pool = ModelPool(
        RuntimeSettings(max_batch=MAX_BATCH),
        clock=SystemClock(),
        hosting=Hosting(
            ResidencyTerms(BUDGET_BYTES), footprints, SelfTester(SelfTestLimits(max_batch=MAX_BATCH), footprints)
        ),
    )
    row = np.linspace(-1, 1, 64, dtype=np.float32)[np.newaxis]
    plane = plane_of(pool)
    wanted = await load_all(pool, plane, models, row)
    popularity = [1 / (rank + 1) ** zipf for rank in range(MODELS)]
    chance.shuffle(popularity)
    names = [model.manifest.model for model in models]
    loaded_before = pool.load_counts.loads
    with sampled(pool) as peak:
        outcome = await ask_for(seconds, plane, pool, names, popularity, wanted, row, rate=rate, chance=chance)
    counts = replace(pool.load_counts, loads=pool.load_counts.loads - loaded_before)
    base_bytes = await bare_bytes(pool)
    sizes = [found.resident_bytes for model in models if (found := footprints.get(model.digest)) is not None]
    await plane.close()
    await pool.close()
    return summary(counts, outcome, peak, sizes, base_bytes)


def build(folder: Path, number: int, size_bytes: float) -> BuiltModel:
    # 64 x w + w x w + 10 x w weights of four bytes.
    wide = round(sqrt(size_bytes / 4 + 37**2) - 37)
    return make_mlp(folder, name=f"m{number}", sizes=(64, wide, wide, 10), seed=number, max_batch=MAX_BATCH)


async def load_all(pool: ModelPool, plane: EdgeDataPlane, models: Sequence[BuiltModel], row: Array) -> dict[str, Array]:
    """Load every model once and return what each answers when it is asked alone."""
    wanted = {}
    for model in models:
        await pool.load(model.manifest, model.digest, model.folder)
        wanted[model.manifest.model] = await asked(plane, model.manifest.model, row)
    return wanted


async def bare_bytes(pool: ModelPool) -> int:
    """Return what this process takes with every model out of memory."""
    for hosted in pool.models():
        await pool.park(hosted.manifest.model)
    release_freed()
    return resident_bytes()


def plane_of(pool: ModelPool) -> EdgeDataPlane:
    return EdgeDataPlane(pool, away(), tracing=Tracing("benchmark", TracingSettings(None, 0.0)), clock=SystemClock())


async def asked(plane: EdgeDataPlane, name: str, row: Array) -> Array:
    answer = await plane.ask(InferRequest(name, (Tensor("x", Datatype.FP32, row),)))
    return answer.response.outputs[0].array


async def ask_for(
    seconds: float,
    plane: EdgeDataPlane,
    pool: ModelPool,
    names: Sequence[str],
    popularity: Sequence[float],
    wanted: dict[str, Array],
    row: Array,
    *,
    rate: float,
    chance: random.Random,
) -> Outcome:
    """Ask by Poisson arrivals for `seconds`; late arrivals are made up for."""
    outcome = Outcome()
    started_s = due_s = time.perf_counter()

    async def one(name: str) -> None:
        before = pool.load_counts.cold_requests
        asked_s = time.perf_counter()
        try:
            request = plane.ask(InferRequest(name, (Tensor("x", Datatype.FP32, row),)))
            is_cold = pool.load_counts.cold_requests > before
            answer = await request
        except NanofleetError as error:
            outcome.failed += 1
            outcome.errors.add(str(error)[:200])
            return
        (outcome.cold_ms if is_cold else outcome.hit_ms).append((time.perf_counter() - asked_s) * 1e3)
        if not np.allclose(answer.response.outputs[0].array, wanted[name], rtol=1e-3, atol=1e-4):
            outcome.wrong += 1

    async with asyncio.TaskGroup() as tasks:
        while (due_s := due_s + chance.expovariate(rate)) < started_s + seconds:
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            (name,) = chance.choices(names, popularity)
            outcome.sequence.append(name)
            tasks.create_task(one(name), name=f"request {len(outcome.sequence)}")
    return outcome


@contextmanager
def sampled(pool: ModelPool) -> Iterator[Peak]:
    """Watch resident memory and what the pool accounts for, from a thread of its own."""
    peak, stop = Peak(), threading.Event()

    def watch() -> None:
        while not stop.wait(SAMPLE_INTERVAL_S):
            peak.rss_bytes = max(peak.rss_bytes, resident_bytes())
            peak.accounted_bytes = max(peak.accounted_bytes, pool.taken_bytes)

    thread = threading.Thread(target=watch, name="sampler")
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def lru_hits(sequence: Sequence[str], capacity: int) -> int:
    held: OrderedDict[str, None] = OrderedDict()
    hits = 0
    for name in sequence:
        hits += name in held
        held[name] = None
        held.move_to_end(name)
        if len(held) > capacity:
            held.popitem(last=False)
    return hits


def summary(
    counts: LoadCounts, outcome: Outcome, peak: Peak, sizes: Sequence[int], base_bytes: int
) -> dict[str, str | int | float]:
    requests = len(outcome.sequence)
    capacity = BUDGET_BYTES // (sum(sizes) // len(sizes))
    return {
        "benchmark": "residency",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "models": MODELS,
        "models_mb": round(sum(sizes) / 1e6, 1),
        "budget_mb": BUDGET_BYTES / 1e6,
        "requests": requests,
        "failed": outcome.failed,
        "wrong": outcome.wrong,
        "errors": "; ".join(sorted(outcome.errors)[:3]),
        "accounted_peak_mb": round(peak.accounted_bytes / 1e6, 1),
        "rss_peak_over_base_mb": round((peak.rss_bytes - base_bytes) / 1e6, 1),
        "hit_ratio": round(len(outcome.hit_ms) / requests, 3),
        # Requests that made no load: what waits behind a load that is under way anyway is no hit, but costs none.
        "without_load_ratio": round(1 - counts.loads / requests, 3),
        "lru_count": capacity,
        "lru_hit_ratio": round(lru_hits(outcome.sequence, capacity) / requests, 3),
        "loads": counts.loads,
        "evictions": counts.evictions,
        "load_mean_ms": round(counts.load_s / max(1, counts.loads + MODELS) * 1e3, 1),
        "hit_p50_ms": percentile(outcome.hit_ms, 0.5),
        "hit_p99_ms": percentile(outcome.hit_ms, 0.99),
        "cold_p50_ms": percentile(outcome.cold_ms, 0.5),
        "cold_p99_ms": percentile(outcome.cold_ms, 0.99),
    }


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return round(ordered[int(share * (len(ordered) - 1))], 2) if ordered else 0.0


if __name__ == "__main__":
    main()
