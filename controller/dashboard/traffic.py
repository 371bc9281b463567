"""How much is asked, how much is escalated, how fast it is answered: what the overview says of requests.

Agents count every request themselves and say so now and then (`Counted`). How long requests took, and how it was over
the last hour, is known of traced ones only (`Traffic`): one in twenty, and those that asked for it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from controller.dashboard.device_list import Device
from controller.dashboard.latency import StageRow, stage_rows
from controller.traces.columns import SpanColumns, Which
from controller.traces.stages import WHOLE, Stage, TierName

WINDOW_S = 300
# The line over the last hour: a point a minute.
LINE_S = 3_600
LINE_POINTS = 60

_AT_EDGE = Stage(TierName.EDGE, WHOLE)


@dataclass(frozen=True, slots=True)
class Counted:
    """What the agents that are online counted in the last minute; `escalated_ratio` None: nothing was answered."""

    requests_per_s: float
    escalated_ratio: float | None


def counted_of(devices: Iterable[Device]) -> Counted | None:
    """Return what the devices counted together; None: none of them reports it."""
    reports = [device.view.vitals for device in devices if device.view.is_online and device.view.vitals is not None]
    if not reports:
        return None
    answering = [(each.requests_per_s, each.escalated_ratio) for each in reports if each.escalated_ratio is not None]
    answered_per_s = sum(rate for rate, _ in answering)
    escalated_per_s = sum(rate * ratio for rate, ratio in answering)
    return Counted(
        sum(each.requests_per_s for each in reports), escalated_per_s / answered_per_s if answered_per_s else None
    )


@dataclass(frozen=True, slots=True)
class Traffic:
    """Of the last WINDOW_S; `line` are requests a second over the last LINE_S, oldest first."""

    requests: int
    requests_per_s: float
    # Of the requests whose answer is known; None: there were none.
    escalated_ratio: float | None
    error_ratio: float | None
    tiers: tuple[StageRow, ...]
    line: tuple[float, ...]


def traffic_of(columns: SpanColumns, now_us: int) -> Traffic:
    recent = columns.select(Which(now_us - WINDOW_S * 1_000_000, now_us + 1))
    at_edge = recent.of(_AT_EDGE)
    count = len(at_edge.start_us)
    known = at_edge.escalated[at_edge.escalated >= 0]
    return Traffic(
        requests=count,
        requests_per_s=count / WINDOW_S,
        escalated_ratio=float(known.mean()) if len(known) else None,
        error_ratio=float(at_edge.is_error.mean()) if count else None,
        tiers=tuple(row for row in stage_rows(recent) if row.stage.name == WHOLE),
        line=_line(columns, now_us),
    )


def _line(columns: SpanColumns, now_us: int) -> tuple[float, ...]:
    from_us = now_us - LINE_S * 1_000_000
    started = columns.select(Which(from_us, now_us + 1, stage=_AT_EDGE)).start_us
    counts, _ = np.histogram(started, bins=LINE_POINTS, range=(from_us, now_us))
    return tuple((counts / (LINE_S / LINE_POINTS)).tolist())
