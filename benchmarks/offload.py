"""What the gateway adds to an offloaded request: agent → gateway → Ray Serve → back, against Serve's ingress itself.

    python -m benchmarks.offload --json

One real controller with its embedded heavy tier runs as a process of its own; a model is published to it. This process
then asks one request at a time, in turns, both ways:

    direct    HeavyClient ──HTTP──▶ Serve ─▶ replica
    gateway   the agent's Offload ──gRPC──▶ controller: gateway, the same HeavyClient ──HTTP──▶ Serve ─▶ replica

Both carry the same tensors with the same deadline, unsampled. The ways alternate in short blocks, so that whatever
else the machine does falls on both. Figures: the median over the rounds of each round's percentile.
"""

import argparse
import itertools
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles

import numpy as np
import uvloop
from onnx import TensorProto, helper, numpy_helper

from controller.api import operator_views as views
from controller.cli.client import ControllerClient
from controller.heavy.client import HeavyClient
from core.addresses import Address
from core.clock import SystemClock
from core.deadline import Deadline
from core.digest import Digest, digest_of_file
from core.grpc_transport import TransportCredentials, open_channel
from core.open_inference.messages import InferRequest
from core.tensors import Datatype, Tensor
from edge_agent.cascade.offload import Offload
from edge_agent.settings import OffloadSettings

MODEL = "large"
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 40.0
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
    with tempfile.TemporaryDirectory(prefix="nanofleet-bench-") as folder, controller(Path(folder)) as endpoints:
        digest = publish(endpoints["controller_http"], Path(folder) / "large.onnx")
        figures = uvloop.run(measure(endpoints, digest, rounds=arguments.rounds, requests=arguments.requests))
    print(json.dumps(figures) if arguments.json else json.dumps(figures, indent=2))


async def measure(
    endpoints: dict[str, str], digest: Digest, *, rounds: int, requests: int
) -> dict[str, str | int | float]:
    clock = SystemClock()
    host, _, port = endpoints["controller_grpc"].rpartition(":")
    request = digit_request()
    channel = open_channel(Address(host, int(port)), TransportCredentials.local())
    offload = Offload(channel, OffloadSettings(), clock=clock)
    async with HeavyClient(endpoints["heavy_http"], clock=clock) as heavy:

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


@contextmanager
def controller(folder: Path) -> Iterator[dict[str, str]]:
    """Run a controller with its embedded heavy tier; yield its addresses once the tier is ready."""
    config, data_dir = folder / "controller.toml", folder / "data"
    ports = free_ports(3)
    config.write_text(
        f'data_dir = "{data_dir}"\ngrpc_bind = "127.0.0.1:{ports[0]}"\nhttp_bind = "127.0.0.1:{ports[1]}"\n'
        f'[heavy]\nport = {ports[2]}\nmax_replicas = 1\n[logs]\nlevel = "warning"\n'
    )
    command = [sys.executable, "-m", "controller.cli.app", "controller", "run", "--config", str(config)]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        wait_until_ready(process, f"http://127.0.0.1:{ports[1]}")
        yield json.loads((data_dir / "endpoints.json").read_text())
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_TIMEOUT_S)


def wait_until_ready(process: "subprocess.Popen[bytes]", url: str) -> None:
    import httpx

    until_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until_s:
        if process.poll() is not None:
            raise RuntimeError(f"expected the controller to run, it ended with exit code {process.returncode}")
        try:
            if httpx.get(f"{url}/v2/health/ready", timeout=2, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.25)
    raise TimeoutError(f"expected the heavy tier to be ready within {START_TIMEOUT_S:g} s")


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def publish(url: str, file: Path) -> Digest:
    """Publish the model; return the digest of its original variant."""
    file.write_bytes(large_onnx())
    file_digest = digest_of_file(file)
    with ControllerClient(url) as client:
        client.put_blob(file_digest, file, on_sent=lambda _: None)
        body = views.PublishBody(file=views.FileBody(path="model.onnx", digest=file_digest), max_batch=8)
        publication = client.publish(MODEL, body)
        while publication.state == "running":
            publication = client.publication(publication.id, seen_at=publication.updated_at)
        if publication.state == "failed":
            raise RuntimeError(f"publishing failed: {publication.problem}")
        (variant,) = client.model(MODEL).versions[0].variants
    return Digest(variant.manifest_digest)


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
