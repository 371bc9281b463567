"""What the cameras do: each is a process of its own that sends its share of the held-out pictures over MQTT."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controller.demo.broker import Broker
from controller.demo.digits import INPUT, NANO, Digits
from controller.demo.processes import Part, Parts
from core.addresses import Address

# 900 pictures by four cameras take a few seconds; the bound only has to end a demo that hangs.
SCENE_TIMEOUT_S = 180.0
DEADLINE_MS = 5000


@dataclass(frozen=True, slots=True)
class Camera:
    name: str
    site: str
    # None: the nearest, as the camera finds it.
    agent: str | None
    protocol: str


@dataclass(frozen=True, slots=True)
class Scene:
    """All cameras at once. `privacy` says how far a picture may go: `site` keeps every answer at the edge."""

    name: str
    privacy: str
    # Between two pictures of one camera.
    pause_ms: int = 0


@dataclass(frozen=True, slots=True)
class Playing:
    """One camera at work."""

    camera: Camera
    part: Part
    report: Path


def cameras_of(sites: Sequence[tuple[str, str | None]], broker: Broker, *, pairs: int = 1) -> list[Camera]:
    """Return `pairs` of cameras for each (site, agent): a modern one and an old one, where the broker knows both."""
    protocols = ("5", "3.1.1") if broker.speaks_v5 else ("3.1.1", "3.1.1")
    return [
        Camera(f"camera-{site}-{number}", site, agent, protocol)
        for site, agent in sites
        for number, protocol in enumerate(protocols * pairs, start=1)
    ]


def start(
    scene: Scene,
    cameras: Sequence[Camera],
    digits: Digits,
    *,
    parts: Parts,
    broker: Broker,
    otlp: Address,
    tls: Path,
    folder: Path,
) -> list[Playing]:
    """Start the scene's cameras; each writes its report line by line."""
    playing = []
    for kth, camera in enumerate(cameras, start=1):
        name = f"{scene.name}-{camera.name}"
        report = folder / f"{name}.jsonl"
        arguments = {
            "--broker": str(broker.address),
            "--protocol": camera.protocol,
            "--site": camera.site,
            "--client": camera.name,
            "--model": NANO,
            "--input-name": INPUT,
            "--pictures": str(digits.held_out),
            "--take": f"{kth}/{len(cameras)}",
            "--pause-ms": str(scene.pause_ms),
            "--deadline-ms": str(DEADLINE_MS),
            "--privacy": scene.privacy,
            "--otlp": str(otlp),
            "--tls": str(tls),
            "--report": str(report),
            **({} if camera.agent is None else {"--agent": camera.agent}),
        }
        words = [word for pair in arguments.items() for word in pair]
        playing.append(Playing(camera, parts.start_python(name, "edge_agent.client", *words), report))
    return playing


def finish(playing: Sequence[Playing]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Wait for the scene's end and return one row per picture, in order, and the totals of all cameras."""
    for each in playing:
        each.part.finish(timeout_s=SCENE_TIMEOUT_S)
    return collect([each.report for each in playing])


def collect(reports: Sequence[Path]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    rows: list[dict[str, Any]] = []
    totals: dict[str, int] = {}
    for report in reports:
        for line in report.read_text().splitlines():
            row = json.loads(line)
            if "totals" not in row:
                rows.append({**row, "camera": report.stem})
                continue
            for key, count in row["totals"].items():
                totals[key] = totals.get(key, 0) + count
    return sorted(rows, key=lambda row: row["index"]), totals
