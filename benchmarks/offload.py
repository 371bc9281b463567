"""What the gateway adds to an offloaded request: agent → gateway → Ray Serve → back, against Serve's ingress itself.

    python -m benchmarks.offload --json

One real controller with its embedded heavy tier runs as a process of its own; a model is published to it. This process
then asks one request at a time, in turns, both ways, the second as an application with a certificate:

    direct    HeavyClient ──HTTP──▶ Serve ─▶ replica
    gateway   the agent's Offload ──gRPC, mutual TLS──▶ controller: gateway, the same HeavyClient ──▶ Serve ─▶ replica

Both carry the same tensors with the same deadline, unsampled. The ways alternate in short blocks, so that whatever
else the machine does falls on both. Figures: the median over the rounds of each round's percentile.
"""

import argparse
import itertools
import json
import os
import platform
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median, quantiles

import numpy as np
import uvloop
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from controller.demo.operator import Operator
from controller.demo.processes import Parts
from controller.demo.stack import Controller
from controller.heavy.client import HeavyClient
from core.clock import SystemClock
from core.deadline import Deadline
from core.digest import Digest
from core.grpc_transport import open_channel
from core.open_inference.messages import InferRequest
from core.tensors import Datatype, Tensor
from core.tls_files import read_tls_identity
from edge_agent.cascade.offload import Offload
from edge_agent.settings import OffloadSettings

MODEL = "large"
REQUEST_TIMEOUT_S = 10.0
# A trace context that says "not recorded", as most requests carry.
UNSAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
WARM_UP = 200
BLOCK = 20

Ask = Callable[[], Awaitable[object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=300, help="requests per way and round")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nanofleet-bench-") as name, Parts(Path(name) / "logs") as parts:
        folder = Path(name)
        controller = Controller.planned(folder / "controller")
        digest = set_up(controller, parts, folder)
        measuring = measure(controller, folder, digest, rounds=arguments.rounds, requests=arguments.requests)
        figures = uvloop.run(measuring)
    print(json.dumps(figures) if arguments.json else json.dumps(figures, indent=2))


async def measure(
    controller: Controller, tls: Path, digest: Digest, *, rounds: int, requests: int
) -> dict[str, str | int | float]:
    clock = SystemClock()
    request = digit_request()
    channel = open_channel(controller.grpc, read_tls_identity(tls))
    offload = Offload(channel, OffloadSettings(), clock=clock)
    async with HeavyClient(f"http://{controller.heavy_http}", clock=clock) as heavy:

        def deadline() -> Deadline:
            return Deadline.after(REQUEST_TIMEOUT_S, now_s=clock.monotonic_s())

        async def direct() -> object:
            return await heavy.infer(request, digest=digest, deadline=deadline(), traceparent=UNSAMPLED)

        async def gateway() -> object:
            return await offload.ask(request, deadline=deadline(), traceparent=UNSAMPLED)

        await take_times(direct, WARM_UP)
        await take_times(gateway, WARM_UP)
        measured = [await measure_round(direct, gateway, requests) for _ in range(rounds)]
    await channel.close()
    return summary(measured, requests)


async def measure_round(direct: Ask, gateway: Ask, requests: int) -> tuple[list[float], list[float]]:
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(max(1, requests // BLOCK)):
        times[0].extend(await take_times(direct, BLOCK))
        times[1].extend(await take_times(gateway, BLOCK))
    return times


async def take_times(ask: Ask, count: int) -> list[float]:
    """Return the milliseconds that each of `count` requests took, one after the other."""
    times_ms = []
    for _ in range(count):
        started_s = time.perf_counter()
        await ask()
        times_ms.append((time.perf_counter() - started_s) * 1000)
    return times_ms


def summary(measured: list[tuple[list[float], list[float]]], requests: int) -> dict[str, str | int | float]:
    def over_rounds(way: int, percentile: int) -> float:
        return median(quantiles(times[way], n=100)[percentile - 1] for times in measured)

    direct, gateway = over_rounds(0, 50), over_rounds(1, 50)
    return {
        "benchmark": "offload",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "rounds": len(measured),
        "requests": requests,
        "direct_p50_ms": round(direct, 3),
        "direct_p99_ms": round(over_rounds(0, 99), 3),
        "gateway_p50_ms": round(gateway, 3),
        "gateway_p99_ms": round(over_rounds(1, 99), 3),
        "added_p50_ms": round(gateway - direct, 3),
        "p50_ratio": round(median(median(times[1]) / median(times[0]) for times in measured), 3),
    }


# ---- the system under test ------------------------------------------------------------------------------------------


def set_up(controller: Controller, parts: Parts, folder: Path) -> Digest:
    """Start a controller with its heavy tier, publish the model and certify us below `folder`; return its digest."""
    controller.initialise(parts)
    part = controller.start(parts)
    operator = Operator(controller, Console(stderr=True))
    operator.run("authority", "certify", "benchmark", "--folder", str(folder))
    file = folder / "large.onnx"
    file.write_bytes(large_onnx())
    (variant,) = operator.run("models", "publish", MODEL, str(file), "--max-batch", "8")["variants"]
    controller.wait_for_heavy(part)
    return Digest(variant["manifest_digest"])


def large_onnx() -> bytes:
    """Return a classifier of 8x8 images, 64-512-512-10 with random weights: the demo's large model in size and cost."""
    random, sizes = np.random.default_rng(0), (64, 512, 512, 10)
    nodes, weights, value = [], [], "x"
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        matrix = random.standard_normal((fan_in, fan_out)).astype(np.float32) / fan_in
        weights.append(numpy_helper.from_array(matrix, f"w{index}"))
        nodes.append(helper.make_node("MatMul", [value, f"w{index}"], [f"h{index}"]))
        nodes.append(helper.make_node("Relu", [f"h{index}"], [f"a{index}"]))
        value = f"a{index}"
    nodes.append(helper.make_node("Softmax", [value], ["probabilities"]))
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 10])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def digit_request() -> InferRequest:
    image = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 64)
    return InferRequest(MODEL, (Tensor("x", Datatype.FP32, image),), model_version="1", binary_output=True)


if __name__ == "__main__":
    main()
