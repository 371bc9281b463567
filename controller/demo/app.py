"""`nanofleet demo`: the story from start to end.

    train ─▶ start broker, controller, Ray ─▶ publish, quantize ─▶ enrol agents, deploy ─▶ cameras ask ─▶ update ─▶ kill

Everybody proves who they are, and nothing runs on an agent that the catalogue has not signed. The held-out pictures are
asked three times: by cameras whose pictures may not leave the site (what the nano model is worth alone), of the gateway
directly (what the large model is worth), and by cameras whose pictures may go anywhere (what both are worth together).
At the end an agent is killed while it is asked, and its neighbour answers its cameras.
"""

import importlib.util
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from controller.demo import failover
from controller.demo.broker import Broker, BrokerChoice, start_broker
from controller.demo.digits import LARGE, NANO, SCORES, Digits, prepare_digits
from controller.demo.operator import Operator
from controller.demo.processes import Part, Parts
from controller.demo.report import Outcome, outcome_of, traced_escalations
from controller.demo.scenes import Camera, Playing, Scene, cameras_of, finish, start
from controller.demo.stack import Agent, Controller
from core import folder_lock
from core.errors import Conflict, InvalidRequest, Unavailable

AGENTS = (("berlin", "gate-1"), ("berlin", "gate-2"), ("lisbon", "dock-1"))
# Whom the cameras of a site ask while accuracy is measured: each picture is to be answered once.
ASKED = (("berlin", "gate-1"), ("lisbon", "dock-1"))
# Where an agent has a neighbour.
CROWDED_SITE = "berlin"
VARIANT = "int8-static"
MAX_BATCH = 32
# Wrong answers that the edge may keep, as a share of those it keeps, judged on the calibration pictures.
MAX_ERROR_RATIO = 0.005
SERVICES = frozenset({"nanofleet-device", "nanofleet-agent", "nanofleet-controller", "nanofleet-heavy"})
# Tells a folder that a demo may empty from one that it must not touch.
MARKER = ".nanofleet-demo"
NEEDED = ("sklearn", "skl2onnx", "onnxruntime", "paho.mqtt", "ray", "amqtt")


@dataclass(frozen=True, slots=True)
class Stage:
    """What stands while the cameras play."""

    folder: Path
    digits: Digits
    broker: Broker
    controller: Controller
    operator: Operator
    agents: tuple[Agent, ...]
    agent_parts: Mapping[str, Part]
    # What the cameras prove themselves with when they send spans.
    camera_tls: Path


def run_demo(*, keep: bool, output: Path, broker: BrokerChoice) -> None:
    """Run the demo, print its figures and write them to `output`; every process it starts is gone afterwards.

    Raises:
        Unavailable: a part did not start or ended, or the figures do not keep what nanofleet promises.
        InvalidRequest: the demo's libraries are not installed.
        Conflict: another demo runs in the same folder, or the folder holds something that is not a demo's.
    """
    require_libraries()
    console = Console()
    folder = output.resolve().with_suffix("")
    with ended_by_signals(), alone_in(folder), Parts(folder / "logs") as parts:
        started_s = time.monotonic()
        stage = set_up(folder, parts, console, broker)
        figures, promises = measure(stage, parts, console)
        figures["update"] = update(stage)
        promises["an update smaller than the model"] = figures["update"]["saved_bytes"] > 0
        figures["failover"] = fail_over(stage, parts, console)
        promises["no picture lost when an agent is killed"] = is_survived(figures["failover"])
        figures["seconds"] = round(time.monotonic() - started_s, 1)
        output.write_text(json.dumps(figures, indent=2) + "\n")
        show(figures, console)
        console.print(f"figures: [bold]{output}[/]  logs: {folder / 'logs'}", highlight=False)
        if keep:
            start_again(stage, parts, figures["failover"]["killed"])
            keep_running(figures["endpoints"], console)
    broken = [promise for promise, is_kept in promises.items() if not is_kept]
    if broken:
        raise Unavailable(f"expected {'; '.join(broken)}; see {output}")


def set_up(folder: Path, parts: Parts, console: Console, choice: BrokerChoice) -> Stage:
    with console.status("training two models on half of the digits"):
        digits = prepare_digits(folder / "digits")
    with console.status("starting the broker and the controller"):
        broker = start_broker(parts, folder / "broker", choice)
        controller = Controller.planned(folder / "controller")
        controller.initialise(parts)
        controller_part = controller.start(parts)
    if not broker.speaks_v5:
        console.print("[yellow]using the embedded broker, which speaks MQTT 3.1.1 only; so does everything else now[/]")
    operator = Operator(controller, console)
    operator.run("models", "publish", LARGE, str(digits.large), "--max-batch", str(MAX_BATCH))
    publish_nano(operator, digits, digits.nano)
    agents = tuple(Agent.planned(folder / agent_id, agent_id=agent_id, site=site) for site, agent_id in AGENTS)
    for agent in agents:
        agent.enrol(parts, token=operator.token(site=agent.site, agent=agent.agent_id))
    with console.status("starting three agents"):
        agent_parts = {agent.agent_id: agent.start(parts, broker=broker) for agent in agents}
    deploy_nano(operator)
    with console.status("waiting for Ray"):
        controller.wait_for_heavy(controller_part)
    camera_tls = folder / "cameras"
    operator.run("authority", "certify", "cameras", "--folder", str(camera_tls))
    return Stage(folder, digits, broker, controller, operator, agents, agent_parts, camera_tls)


def publish_nano(operator: Operator, digits: Digits, model: Path) -> None:
    data = ["--calibration", str(digits.calibration), "--evaluation", str(digits.calibration)]
    cascade = ["--escalate-to", LARGE, "--score-output", SCORES, "--max-error-ratio", str(MAX_ERROR_RATIO)]
    words = [str(model), "--recipe", VARIANT, "--max-batch", str(MAX_BATCH), *data, *cascade]
    operator.run("models", "publish", NANO, *words)


def deploy_nano(operator: Operator) -> None:
    for site in dict.fromkeys(site for site, _ in AGENTS):
        operator.run("deploy", NANO, "--variant", VARIANT, "--site", site)


def update(stage: Stage) -> dict[str, Any]:
    """Train the nano model a little further, bring it to the agents, and return what that cost on the wire."""
    publish_nano(stage.operator, stage.digits, stage.digits.nano_next)
    deploy_nano(stage.operator)
    transfers = {}
    for agent in stage.agents:
        [slot] = stage.operator.run("devices", "show", agent.agent_id)["slots"]
        transfers[agent.agent_id] = slot["transfer"]
    brought, received = (sum(each[key] for each in transfers.values()) for key in ("brought_bytes", "wire_bytes"))
    return {
        "brought_bytes": brought,
        "wire_bytes": received,
        "saved_bytes": brought - received,
        "saved_ratio": round(1 - received / brought, 4),
        "agents": transfers,
    }


def measure(stage: Stage, parts: Parts, console: Console) -> tuple[dict[str, Any], dict[str, bool]]:
    """Let the cameras play; return the figures, and what was promised of them."""
    labels = stage.digits.labels
    cameras = cameras_of(ASKED, stage.broker)
    outcomes: dict[str, Outcome] = {}
    for scene in (Scene("edge", privacy="site"), Scene("cascade", privacy="any")):
        with console.status(f"{len(cameras)} cameras ask about {len(labels)} pictures: {scene.name}"):
            rows, totals = finish(start_cameras(scene, cameras, stage, parts))
        outcomes[scene.name] = outcome_of(rows, totals, labels)
    with console.status("asking the large model directly"), np.load(stage.digits.held_out) as held_out:
        heavy_labels = stage.operator.ask_directly(LARGE, held_out["inputs"])
    heavy_accuracy = float(np.mean(heavy_labels == labels))
    trace_id, spans = stage.operator.whole_trace(traced_escalations(rows), SERVICES)
    edge, cascade = outcomes["edge"], outcomes["cascade"]
    figures = {
        "dataset": stage.digits.dataset,
        "n": len(labels),
        "accuracy": rounded({"edge": edge.accuracy, "heavy": heavy_accuracy, "cascade": cascade.accuracy}),
        "escalated_ratio": round(cascade.escalated_ratio, 4),
        "latency_ms": cascade.latency_ms,
        "answered": cascade.answered,
        "variants": variants(stage.operator),
        **{key: sum(getattr(each, key) for each in outcomes.values()) for key in COUNTS},
        "trace": {
            "id": trace_id,
            "spans": len(spans),
            "services": sorted({span["service"] for span in spans}),
        },
        "broker": {"name": stage.broker.name, "protocols": sorted({camera.protocol for camera in cameras})},
        "endpoints": endpoints(stage),
    }
    promises = {
        "no picture lost": figures["lost"] == 0,
        "no picture answered twice": figures["duplicates"] == 0,
        "cascade accuracy of at least heavy accuracy - 0.5 points": cascade.accuracy >= heavy_accuracy - 0.005,
        "at most a quarter escalated": cascade.escalated_ratio <= 0.25,
    }
    return figures, promises


def start_cameras(scene: Scene, cameras: Sequence[Camera], stage: Stage, parts: Parts) -> list[Playing]:
    return start(
        scene,
        cameras,
        stage.digits,
        parts=parts,
        broker=stage.broker,
        otlp=stage.controller.grpc,
        tls=stage.camera_tls,
        folder=stage.folder,
    )


def fail_over(stage: Stage, parts: Parts, console: Console) -> dict[str, Any]:
    """Kill an agent while its cameras ask the nearest, and return what became of their pictures."""
    cameras = cameras_of([(CROWDED_SITE, None)], stage.broker, pairs=2)
    with console.status(f"{len(cameras)} cameras ask their nearest agent, which is killed"):
        return failover.kill_the_nearest(start_cameras(failover.SCENE, cameras, stage, parts), stage.agent_parts)


def is_survived(figures: Mapping[str, Any]) -> bool:
    is_whole = not figures["lost"] and not figures["refused"] and not figures["late"]
    return is_whole and figures["cameras"] > 0 and figures["killed"] not in figures["answered_by"]


def start_again(stage: Stage, parts: Parts, agent_id: str) -> None:
    """Bring back the agent that was killed."""
    [agent] = [agent for agent in stage.agents if agent.agent_id == agent_id]
    agent.start(parts, broker=stage.broker)


COUNTS = ("lost", "refused", "duplicates", "late")


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in values.items()}


def variants(operator: Operator) -> dict[str, Any]:
    """Return size, accuracy and latency of every variant of both models, as recorded at publish."""
    keys = ("size_bytes", "accuracy_ratio", "latency_p50_us")
    found = {}
    for model in (NANO, LARGE):
        latest = operator.run("models", "show", model)["versions"][0]
        found[model] = {variant["variant"]: {key: variant[key] for key in keys} for variant in latest["variants"]}
    return found


def endpoints(stage: Stage) -> dict[str, Any]:
    return {
        "mqtt": str(stage.broker.address),
        "controller_http": stage.controller.url,
        "credential": str(stage.controller.credential),
        "controller_grpc": str(stage.controller.grpc),
        "heavy_http": f"http://{stage.controller.heavy_http}",
        "agents": {
            agent.agent_id: {"site": agent.site, "models": [NANO], "faces": {"grpc": str(agent.grpc)}}
            for agent in stage.agents
        },
    }


def show(figures: Mapping[str, Any], console: Console) -> None:
    accuracy, latency = figures["accuracy"], figures["latency_ms"]
    table = Table("answered by", "accuracy", "share", "p50", "p99", title=f"{figures['n']} pictures never seen before")
    share = {"edge": 1 - figures["escalated_ratio"], "heavy": figures["escalated_ratio"]}
    for tier, name in (("edge", f"{NANO} {VARIANT}, at the edge"), ("heavy", f"{LARGE}, on Ray")):
        times = [f"{latency[tier][key]:.1f} ms" if tier in latency else "-" for key in ("p50", "p99")]
        table.add_row(name, f"{accuracy[tier]:.2%}", f"{share[tier]:.1%}", *times)
    table.add_row("[bold]both, as a cascade[/]", f"[bold]{accuracy['cascade']:.2%}[/]", "100.0%", "", "")
    console.print(table)
    sizes = figures["variants"][NANO]
    measured = ", ".join(f"{name} {variant['size_bytes']:,} bytes" for name, variant in sizes.items())
    trace = figures["trace"]
    console.print(f"{NANO}: {measured}", highlight=False)
    console.print(", ".join(f"{figures[key]} {key}" for key in COUNTS), highlight=False)
    changed = figures["update"]
    console.print(
        f"update of {NANO}: {changed['wire_bytes']:,} of {changed['brought_bytes']:,} bytes sent, "
        f"{changed['saved_bytes']:,} saved by the delta ({changed['saved_ratio']:.0%})",
        highlight=False,
    )
    console.print(told(figures["failover"]), highlight=False)
    console.print(f"one trace of {trace['spans']} spans across {', '.join(trace['services'])}", highlight=False)


def told(figures: Mapping[str, Any]) -> str:
    """Return what became of the agent that was killed, as a sentence."""
    switch = figures["switch_ms"]
    return (
        f"{figures['killed']} was killed: its {figures['cameras']} cameras were answered by "
        f"{', '.join(figures['answered_by'])} after {switch['median']} ms (at most {switch['max']} ms); "
        f"{figures['lost']} of {figures['n']} pictures lost"
    )


def keep_running(addresses: Mapping[str, Any], console: Console) -> None:
    """Print where everything is and wait for Ctrl-C."""
    console.print_json(data=addresses)
    console.print("running until Ctrl-C; try:")
    console.print(f"  nanofleet --credential {addresses['credential']} traces list", highlight=False)
    try:
        signal.pause()
    except KeyboardInterrupt:
        console.print("stopping")


def require_libraries() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name.partition(".")[0]) is None]
    if missing:
        raise InvalidRequest(f"the demo needs {', '.join(missing)}; pip install 'nanofleet[demo]'")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Empty the folder of an earlier demo, or make it, and hold it for this one alone."""
    with folder_lock.held(folder.with_suffix(".lock"), what="demo"):
        marker = folder / MARKER
        if folder.exists() and not marker.exists() and any(folder.iterdir()):
            raise Conflict(f"{folder}: expected a folder of an earlier demo; move it away or choose another --output")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        marker.touch()
        yield


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and a closed terminal unwind the stack as Ctrl-C does, so that every part is stopped."""

    def leave(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
