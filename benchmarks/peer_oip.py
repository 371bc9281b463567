"""Local faces against a peer: one ONNX model through the agent's Open Inference HTTP and gRPC, and through MLServer.

    python -m benchmarks.peer_oip --json

MLServer runs in an environment of its own, with the least runtime that runs an ONNX model (`peers/mlserver_runtime`)
and the settings that its documentation recommends: no debugging, and whichever of no or one inference worker is faster
here. The agent runs as installed, with metrics on and tracing at its default sampling. Each has one core, the load
generator (`oip_load`) the other; it sends the same bytes to each, in turns, so that whatever else the machine does
falls on both. Figures: medians over the rounds; ratios: medians of each round's ratio, agent / MLServer.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.hot_path import span_receiver
from controller.demo.ports import free_port
from tests.support.edge_models import BuiltModel, cascade_to, make_mlp
from tests.support.locked_environment import locked_environment
from tests.support.offline_agent import offline_agent

SMALL = (64, 16, 10)
MODEL = "small"
IN_FLIGHT = 16
AGENT, PEER = "agent", "mlserver"
RUNTIME = Path(__file__).parent / "peers/mlserver_runtime"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
# By name: what the load generator is told besides the address, and which of a server's addresses it asks.
FORMS: Mapping[str, tuple[str, Sequence[str]]] = {"grpc": ("grpc", ()), "http": ("http", ())}
# MLServer reads no raw tensors over HTTP: of the agent alone, for comparison.
BINARY = ("http", ("--binary",))


@dataclass(frozen=True, slots=True)
class Server:
    name: str
    http: str
    grpc: str


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one measurement")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nanofleet-bench-") as folder:
        found = measure(Path(folder), rounds=arguments.rounds, seconds=arguments.seconds)
    print(json.dumps(found) if arguments.json else json.dumps(found, indent=2))


def measure(folder: Path, *, rounds: int, seconds: float) -> dict[str, object]:
    model = make_mlp(folder / "small", name=MODEL, sizes=SMALL, max_batch=64, cascade=cascade_to(threshold=0.0))
    with ExitStack() as stack:
        receiver = stack.enter_context(span_receiver())
        agent = stack.enter_context(running_agent(folder / "agent", model, spans_to=receiver.address))
        workers = [
            stack.enter_context(running_mlserver(folder / f"mlserver-{count}", model, count)) for count in (0, 1)
        ]
        peer, chosen = better_of(workers, seconds)
        raw = [measure_round(agent, peer, seconds, is_ours_first=turn % 2 == 0) for turn in range(rounds)]
        binary = ask(agent, *BINARY, in_flight=IN_FLIGHT, seconds=seconds)
    return {**summary(raw), "agent_rps_http_binary": binary["rps"], **circumstances(rounds, seconds, chosen)}


Round = dict[str, dict[str, float]]


def better_of(peers: Sequence[Server], seconds: float) -> tuple[Server, int]:
    """Return the peer that answers more over both protocols together, and its number of workers."""
    rates = [
        sum(ask(peer, *form, in_flight=IN_FLIGHT, seconds=seconds)["rps"] for form in FORMS.values()) for peer in peers
    ]
    best = rates.index(max(rates))
    return peers[best], best


def measure_round(agent: Server, peer: Server, seconds: float, *, is_ours_first: bool) -> Round:
    figures: Round = {}
    servers = (agent, peer) if is_ours_first else (peer, agent)
    for name, form in FORMS.items():
        for what, in_flight in (("p50", 1), ("rps", IN_FLIGHT)):
            for server in servers:
                figures[f"{what}_{name}_{server.name}"] = ask(server, *form, in_flight=in_flight, seconds=seconds)
    return figures


def ask(server: Server, face: str, options: Sequence[str], *, in_flight: int, seconds: float) -> dict[str, float]:
    """Return what the load generator measured."""
    command = [sys.executable, "-m", "benchmarks.oip_load", f"--{face}", getattr(server, face), "--model", MODEL]
    command += ["--in-flight", str(in_flight), "--seconds", str(seconds), *options]
    done = subprocess.run(on_core(command, 1), check=True, stdout=subprocess.PIPE, timeout=60 + 2 * seconds)
    return dict(json.loads(done.stdout))


def summary(raw: Sequence[Round]) -> dict[str, object]:
    """Return the ratios per protocol and the worse of them, and the medians that they come from."""
    ratios: dict[str, float] = {}
    figures: dict[str, float] = {}
    for name in FORMS:
        for what, unit in (("rps", "rps"), ("p50", "p50_ms")):
            pairs = [(turn[f"{what}_{name}_{AGENT}"][unit], turn[f"{what}_{name}_{PEER}"][unit]) for turn in raw]
            ratios[f"{what}_ratio_{name}"] = round(median(ours / theirs for ours, theirs in pairs), 3)
            figures[f"agent_{unit}_{name}"] = round(median(ours for ours, _ in pairs), 3)
            figures[f"mlserver_{unit}_{name}"] = round(median(theirs for _, theirs in pairs), 3)
    worst = {
        "rps_ratio": min(ratios[f"rps_ratio_{name}"] for name in FORMS),
        "p50_ratio": max(ratios[f"p50_ratio_{name}"] for name in FORMS),
    }
    return {"benchmark": "peer_oip", **worst, **ratios, **figures}


def circumstances(rounds: int, seconds: float, workers: int) -> dict[str, object]:
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "rounds": rounds,
        "seconds": seconds,
        "in_flight": IN_FLIGHT,
        "mlserver_parallel_workers": workers,
    }


# ---- what runs beside --------------------------------------------------------------------------------------------


def on_core(command: Sequence[str], core: int) -> list[str]:
    return ["taskset", "--cpu-list", str(core % (os.cpu_count() or 1)), *command]


@contextmanager
def running_agent(folder: Path, model: BuiltModel, *, spans_to: str) -> Iterator[Server]:
    environment = {"HTTP_BIND": "127.0.0.1:0", "TELEMETRY__ENDPOINT": spans_to}
    with offline_agent(folder, models=[model], broker=None, environment=environment) as agent:
        subprocess.run(
            ["taskset", "--all-tasks", "--cpu-list", "--pid", "0", str(agent.process.pid)],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        faces = agent.faces()
        yield Server(AGENT, faces["http"], faces["grpc"])


@contextmanager
def running_mlserver(folder: Path, model: BuiltModel, workers: int) -> Iterator[Server]:
    ports = {name: free_port() for name in ("http_port", "grpc_port", "metrics_port")}
    settings = {
        "debug": False,
        "host": "127.0.0.1",
        "parallel_workers": workers,
        "metrics_dir": str(folder / "metrics"),
    }
    implementation = {
        "name": MODEL,
        "implementation": "onnx_runtime.OnnxModel",
        "parameters": {"uri": str(model.folder / model.manifest.entry), "version": "1"},
    }
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({**settings, **ports}))
    (folder / "model-settings.json").write_text(json.dumps(implementation))
    command = on_core([str(locked_environment("mlserver") / "mlserver"), "start", str(folder)], 0)
    environment = {**os.environ, "PYTHONPATH": str(RUNTIME), "ORT_DISABLE_TELEMETRY": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        _await_ready(process, ports["http_port"], folder / "log")
        yield Server(PEER, f"127.0.0.1:{ports['http_port']}", f"127.0.0.1:{ports['grpc_port']}")
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    give_up_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < give_up_s and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/models/{MODEL}/ready", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"MLServer was not ready within {START_TIMEOUT_S:g} s: {log.read_text()[-2000:]}")


if __name__ == "__main__":
    main()
