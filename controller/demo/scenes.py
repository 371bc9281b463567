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
    agent: str
    protocol: str


@dataclass(frozen=True, slots=True)
class Scene:
    """All cameras at once. `privacy` says how far a picture may go: `site` keeps every answer at the edge."""

    name: str
    privacy: str


def cameras_of(sites: Sequence[tuple[str, str]], broker: Broker) -> list[Camera]:
    """Return two cameras for each (site, agent): a modern one and an old one, where the broker can tell them apart."""
    protocols = ("5", "3.1.1") if broker.speaks_v5 else ("3.1.1", "3.1.1")
    return [
        Camera(f"camera-{site}-{number}", site, agent, protocol)
        for site, agent in sites
        for number, protocol in enumerate(protocols, start=1)
    ]


def play(
    scene: Scene,
    cameras: Sequence[Camera],
    digits: Digits,
    *,
    parts: Parts,
    broker: Broker,
    otlp: Address,
    tls: Path,
    folder: Path,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Run the scene to its end and return one row per picture, in order, and the totals of all cameras."""
    running: list[tuple[Part, Path]] = []
    for kth, camera in enumerate(cameras, start=1):
        report = folder / f"{scene.name}-{camera.name}.jsonl"
        arguments = {
            "--broker": str(broker.address),
            "--protocol": camera.protocol,
            "--site": camera.site,
            "--client": camera.name,
            "--agent": camera.agent,
            "--model": NANO,
            "--input-name": INPUT,
            "--pictures": str(digits.held_out),
            "--take": f"{kth}/{len(cameras)}",
            "--deadline-ms": str(DEADLINE_MS),
            "--privacy": scene.privacy,
            "--otlp": str(otlp),
            "--tls": str(tls),
            "--report": str(report),
        }
        words = [word for pair in arguments.items() for word in pair]
        running.append((parts.start_python(f"{scene.name}-{camera.name}", "edge_agent.client", *words), report))
    for part, _ in running:
        part.finish(timeout_s=SCENE_TIMEOUT_S)
    return collect([report for _, report in running])


def collect(reports: Sequence[Path]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    rows: list[dict[str, Any]] = []
    totals: dict[str, int] = {}
    for report in reports:
        for line in report.read_text().splitlines():
            row = json.loads(line)
            if "totals" not in row:
                rows.append(row)
                continue
            for key, count in row["totals"].items():
                totals[key] = totals.get(key, 0) + count
    return sorted(rows, key=lambda row: row["index"]), totals
