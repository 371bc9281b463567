"""The hot path: device → mosquitto → responder → ONNX Runtime → reply, nanofleet's agent against a 25-line script.

    python -m benchmarks.hot_path --json

A real broker, a real agent (tracing at its default sampling, spans exported to a receiver of this benchmark) and
`peers/paho_responder.py` on the same ONNX file run side by side, each in a process of its own; one load generator asks
them in turns, so that whatever else the machine does falls on both. Two models: `small` takes about 13 us a run,
`wide` gains from batching. Figures: medians over the rounds; ratios: medians of each round's ratio, agent / script.

At last the tail: how much longer than usual the agent takes now and then while it is offered half of what it can do,
and beside it a server that takes the same time for every request and could do as many (`peers/steady_responder.py`):
what is more than that is the agent's, the rest is chance and the machine. With responders, and all that asks them, on
cores of their own (`apart`), and, as `shared_…`, wherever the kernel puts them.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import product
from pathlib import Path
from statistics import median

import grpc
import numpy as np
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from benchmarks.apart import apart
from core.telemetry import DEFAULT_SAMPLE_RATIO
from edge_agent.runtime.session import OnnxModel
from tests.support.edge_models import INPUT, BuiltModel, cascade_to, make_mlp
from tests.support.mosquitto import Mosquitto, running_mosquitto
from tests.support.offline_agent import OfflineAgent, offline_agent

IN_FLIGHT = 64
MAX_BATCH = 64
SMALL = (64, 16, 10)
WIDE = (64, 2048, 2048, 10)
SITE = "bench"
AGENT = "agent"
PEER = "script"
STEADY = "steady"
# What the others call their model in every reply.
PEER_MODEL = "peer"
# What each ratio of a tail is made from, apart and shared.
TAILS = {
    "p99_over_p50_half_load": f"half_{AGENT}",
    "p99_over_p50_half_load_batched": f"half_batched_{AGENT}",
    "steady_p99_over_p50_half_load": f"half_{STEADY}",
}
# Where responders and what asks them run, as the names of their figures begin.
APART, SHARED = "", "shared_"
START_S = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one measurement")
    parser.add_argument("--qos", type=int, choices=(0, 1), help="only this one (default: both)")
    parser.add_argument(
        "--apart",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure the tail also on cores of their own; needs two cores and CAP_SYS_NICE",
    )
    arguments = parser.parse_args()
    levels = (0, 1) if arguments.qos is None else (arguments.qos,)
    with tempfile.TemporaryDirectory(prefix="nanofleet-bench-") as folder:
        figures = measure(
            Path(folder),
            rounds=arguments.rounds,
            seconds=arguments.seconds,
            levels=levels,
            placements=(APART, SHARED) if arguments.apart else (SHARED,),
        )
    print(json.dumps(figures) if arguments.json else json.dumps(figures, indent=2))


def measure(
    folder: Path, *, rounds: int, seconds: float, levels: Sequence[int], placements: Sequence[str]
) -> dict[str, object]:
    # Part of every answer is its confidence; the threshold lets all of them stay at the edge.
    cascade = cascade_to(threshold=0.0)
    small = make_mlp(folder / "small", name="small", sizes=SMALL, max_batch=MAX_BATCH, cascade=cascade)
    wide = make_mlp(folder / "wide", name="wide", sizes=WIDE, max_batch=MAX_BATCH, cascade=cascade)
    with ExitStack() as stack:
        broker = stack.enter_context(running_mosquitto(folder))
        receiver = stack.enter_context(span_receiver())
        environment = {"TELEMETRY__ENDPOINT": receiver.address}
        agent = stack.enter_context(
            offline_agent(
                folder / "agent",
                models=[small, wide],
                broker=broker,
                agent_id=AGENT,
                site=SITE,
                environment=environment,
            )
        )
        for model in (small, wide):
            stack.enter_context(running_script(model, broker))
        time.sleep(START_S)
        raw = []
        for turn in range(rounds):
            figures = measure_round(broker, seconds, levels, first=(AGENT, PEER)[turn % 2])
            for qos, placement in product(levels, placements):
                figures |= measure_tails(broker, agent, placement, seconds, qos, is_agent_first=turn % 2 == 0)
            raw.append(figures)
        spans = receiver.spans
    return {
        **summary(raw, levels, placements),
        **circumstances(rounds, seconds, spans),
        "models": [costs(small), costs(wide)],
    }


Round = dict[str, dict[str, float]]


def measure_round(broker: Mosquitto, seconds: float, levels: Sequence[int], *, first: str) -> Round:
    """Return the figures of one turn, by `{what}_{who}_qos{n}`; `first` is asked first each time."""
    figures: Round = {}
    for qos in levels:
        for what, model, in_flight in (
            ("p50", "small", 1),
            ("rps", "small", IN_FLIGHT),
            ("batched", "wide", IN_FLIGHT),
        ):
            for who in (first, PEER if first == AGENT else AGENT):
                figures[f"{what}_{who}_qos{qos}"] = ask(broker, who, model, in_flight, qos, seconds)
    return figures


def measure_tails(
    broker: Mosquitto, agent: OfflineAgent, placement: str, seconds: float, qos: int, *, is_agent_first: bool
) -> Round:
    """Return how long answers take at half of what the agent can do, of the agent and of a steady server as fast."""
    half = {}
    with ExitStack() as stack:
        place = stack.enter_context(apart([broker.pid, os.getpid()])) if placement == APART else nullcontext
        stack.enter_context(place(agent.process.pid))
        rates_per_s = {model: ask(broker, AGENT, model, IN_FLIGHT, qos, seconds)["rps"] for model in ("small", "wide")}
        steady = stack.enter_context(running_steady(broker, qos, takes_s=1 / rates_per_s["small"]))
        stack.enter_context(place(steady.pid))
        for who in (AGENT, STEADY) if is_agent_first else (STEADY, AGENT):
            half[f"half_{who}"] = offer(broker, who, "small", rates_per_s["small"] / 2, qos, seconds)
        half[f"half_batched_{AGENT}"] = offer(broker, AGENT, "wide", rates_per_s["wide"] / 2, qos, seconds)
    return {f"{placement}{kind}_qos{qos}": figures for kind, figures in half.items()}


def ask(
    broker: Mosquitto, who: str, model: str, in_flight: int, qos: int, seconds: float, *, answered_by: str = ""
) -> dict[str, float]:
    """Return what the load generator measured; `answered_by` is the model in every reply, if not as usual."""
    answered_by = answered_by or (model if who == AGENT else PEER_MODEL)
    more = ["--in-flight", str(in_flight), "--answered-by", answered_by]
    return _generated("mqtt_load", broker, who, model, qos, seconds, more)


def offer(
    broker: Mosquitto, who: str, model: str, rate_per_s: float, qos: int, seconds: float, *, deadline_ms: int = 10_000
) -> dict[str, float]:
    """Return what became of requests that came at a rate, whatever became of them."""
    answered_by = model if who == AGENT else PEER_MODEL
    more = ["--rate", str(rate_per_s), "--deadline-ms", str(deadline_ms), "--answered-by", answered_by]
    return _generated("mqtt_open_load", broker, who, model, qos, seconds, more)


def _generated(
    generator: str, broker: Mosquitto, who: str, model: str, qos: int, seconds: float, more: Sequence[str]
) -> dict[str, float]:
    topic = f"nf/v1/{SITE}/infer/{who}/{model}"
    command = [sys.executable, "-m", f"benchmarks.{generator}", "--port", str(broker.port), "--topic", topic]
    command += ["--qos", str(qos), "--seconds", str(seconds), *more]
    done = subprocess.run(command, check=True, capture_output=True, timeout=60 + 2 * seconds)
    return dict(json.loads(done.stdout))


def summary(raw: Sequence[Round], levels: Sequence[int], placements: Sequence[str]) -> dict[str, object]:
    """Return the ratios per QoS and the worse of them, and the medians that they come from."""
    ratios: dict[str, float] = {}
    figures: dict[str, float] = {}
    kinds = (("p50", "p50_ms", "p50", max), ("rps", "rps", "rps", min), ("batched", "rps", "rps", min))
    for what, unit, name, worse in kinds:
        suffix = "_batched" if what == "batched" else ""
        for qos in levels:
            pairs = [(turn[f"{what}_{AGENT}_qos{qos}"][unit], turn[f"{what}_{PEER}_qos{qos}"][unit]) for turn in raw]
            ratio = round(median(ours / theirs for ours, theirs in pairs), 3)
            ratios[f"{name}_ratio{suffix}_qos{qos}"] = ratio
            figures[f"agent_{unit}{suffix}_qos{qos}"] = round(median(ours for ours, _ in pairs), 3)
            figures[f"script_{unit}{suffix}_qos{qos}"] = round(median(theirs for _, theirs in pairs), 3)
        ratios[f"{name}_ratio{suffix}"] = worse(ratios[f"{name}_ratio{suffix}_qos{qos}"] for qos in levels)
    for placement, (name, kind) in product(placements, TAILS.items()):
        for qos in levels:
            halves = [turn[f"{placement}{kind}_qos{qos}"] for turn in raw]
            ratios[f"{placement}{name}_qos{qos}"] = round(median(each["p99_ms"] / each["p50_ms"] for each in halves), 3)
            for unit in ("p50_ms", "p99_ms", "offered_per_s"):
                figures[f"{placement}{kind}_{unit}_qos{qos}"] = round(median(each[unit] for each in halves), 3)
        ratios[placement + name] = max(ratios[f"{placement}{name}_qos{qos}"] for qos in levels)
    return {"benchmark": "hot_path", **ratios, **figures}


def circumstances(rounds: int, seconds: float, spans: int) -> dict[str, object]:
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "rounds": rounds,
        "seconds": seconds,
        "in_flight": IN_FLIGHT,
        "sample_ratio": DEFAULT_SAMPLE_RATIO,
        "spans_received": spans,
    }


def costs(built: BuiltModel) -> dict[str, object]:
    """Return what one run of a model takes here, alone and per item of a batch."""
    model = OnnxModel(built.manifest, built.folder)
    per_item_us = {}
    for rows in (1, 16, MAX_BATCH):
        inputs = [np.zeros((rows, SMALL[0]), dtype=np.float32)]
        times_s = []
        for _ in range(30):
            started_s = time.perf_counter()
            model.run(inputs)
            times_s.append(time.perf_counter() - started_s)
        per_item_us[str(rows)] = round(median(times_s) / rows * 1e6, 1)
    return {"name": built.manifest.model, "input": INPUT, "us_per_item_by_batch": per_item_us}


# ---- what runs beside --------------------------------------------------------------------------------------------


@contextmanager
def running_script(model: BuiltModel, broker: Mosquitto) -> Iterator[None]:
    topic = f"nf/v1/{SITE}/infer/{PEER}/{model.manifest.model}"
    script = Path(__file__).with_name("peers") / "paho_responder.py"
    arguments = [str(broker.port), topic, str(model.folder / model.manifest.entry)]
    with running([str(script), *arguments]):
        yield


@contextmanager
def running_steady(broker: Mosquitto, qos: int, *, takes_s: float) -> Iterator[subprocess.Popen[bytes]]:
    topic = f"nf/v1/{SITE}/infer/{STEADY}/small"
    arguments = ["-m", "benchmarks.peers.steady_responder", str(broker.port), topic, str(qos), str(takes_s)]
    with running(arguments) as process:
        time.sleep(START_S)
        yield process


@contextmanager
def running(arguments: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, *arguments])
    try:
        yield process
    finally:
        # It keeps nothing that an orderly end would save.
        process.kill()
        process.wait(10)


class SpanReceiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans over OTLP and only counts them."""

    def __init__(self) -> None:
        self.address = ""
        self.spans = 0

    def Export(  # noqa: N802  (named by the protocol)
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self.spans += sum(len(scope.spans) for resource in request.resource_spans for scope in resource.scope_spans)
        return trace_service_pb2.ExportTraceServiceResponse()


@contextmanager
def span_receiver() -> Iterator[SpanReceiver]:
    receiver = SpanReceiver()
    server = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)  # type: ignore[no-untyped-call]  # generated
    receiver.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield receiver
    finally:
        server.stop(None).wait()


if __name__ == "__main__":
    main()
