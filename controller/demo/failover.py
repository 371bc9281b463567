"""The last scene: an agent is killed while its cameras ask, and its neighbour answers them.

The cameras are told of no agent: each asks the nearest. The one that most of them ask is killed, as by a power cut.
"""

import json
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from controller.demo.processes import Part, kill_group
from controller.demo.report import Rows
from controller.demo.scenes import SCENE_TIMEOUT_S, Playing, Scene, finish
from core.errors import Unavailable

SCENE = Scene("failover", privacy="site", pause_ms=10)
# Of each camera, before the kill: enough to see whom it asks.
ANSWERS_BEFORE = 25
_POLL_S = 0.05
_KILL_TIMEOUT_S = 10.0


def kill_the_nearest(playing: Sequence[Playing], agents: Mapping[str, Part]) -> dict[str, Any]:
    """Let the cameras ask, kill the agent that most of them ask, and return what became of their pictures.

    Raises:
        Unavailable: a camera ended, or asked nobody within the time of a scene.
    """
    victim = asked_most(wait_for_answers(playing))
    killed_at_s = time.time()
    kill_group(agents[victim].process.pid)
    agents[victim].process.wait(_KILL_TIMEOUT_S)
    rows, totals = finish(playing)
    return failover_of(rows, totals, victim=victim, killed_at_s=killed_at_s)


def wait_for_answers(playing: Sequence[Playing]) -> Rows:
    """Return the rows so far, once each camera has some."""
    give_up_s = time.monotonic() + SCENE_TIMEOUT_S
    while time.monotonic() < give_up_s:
        rows = [rows_so_far(each) for each in playing]
        if all(len(each) >= ANSWERS_BEFORE for each in rows):
            return [row for each in rows for row in each]
        time.sleep(_POLL_S)
    raise Unavailable(f"expected {ANSWERS_BEFORE} answers to each camera within {SCENE_TIMEOUT_S:g} s")


def rows_so_far(playing: Playing) -> list[dict[str, Any]]:
    """Return the rows that a camera has written so far; it must not be done yet."""
    if not playing.report.exists():
        playing.part.require_running()
        return []
    # The last line may be half written.
    whole, _, _ = playing.report.read_text().rpartition("\n")
    rows = [json.loads(line) for line in whole.splitlines()]
    if rows and "totals" in rows[-1]:
        raise Unavailable(f"{playing.camera.name}: expected pictures to be left when the agent is killed")
    return rows


def asked_most(rows: Rows) -> str:
    [(agent, _)] = Counter(row["agent"] for row in rows if not row["lost"]).most_common(1)
    return str(agent)


def failover_of(rows: Rows, totals: Mapping[str, int], *, victim: str, killed_at_s: float) -> dict[str, Any]:
    """Return what became of the cameras that asked `victim` last before it was killed."""
    switches_ms: dict[str, float] = {}
    neighbours: set[str] = set()
    for camera in {row["camera"] for row in rows}:
        answered = sorted((row for row in rows if row["camera"] == camera and not row["lost"]), key=at_s)
        before = [row for row in answered if at_s(row) <= killed_at_s]
        after = [row for row in answered if at_s(row) > killed_at_s and row["agent"] != victim]
        if before and before[-1]["agent"] == victim and after:
            switches_ms[camera] = (at_s(after[0]) - killed_at_s) * 1000
            neighbours.add(after[0]["agent"])
    lost = sum(row["lost"] for row in rows)
    return {
        "killed": victim,
        "answered_by": sorted(neighbours),
        "cameras": len(switches_ms),
        "switch_ms": {
            "median": round(statistics.median(switches_ms.values()), 1) if switches_ms else None,
            "max": round(max(switches_ms.values()), 1) if switches_ms else None,
        },
        "n": len(rows),
        "after": sum(at_s(row) > killed_at_s for row in rows),
        "lost": lost,
        "refused": sum(not row["lost"] and row["status"] != 200 for row in rows),
        "duplicates": totals["duplicates"],
        "late": totals["late"],
    }


def at_s(row: Mapping[str, Any]) -> float:
    """Return when the answer came, by the clock that all parts of the demo share."""
    return float(row["at_s"])
