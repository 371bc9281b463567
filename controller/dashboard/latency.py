"""The page about latency: what is asked in its address, percentiles per stage, and the figures of its charts.

Heat maps have bars of equal width in time and of equal ratio in duration (eight to a decade), and show the occupied
part only. Percentiles are exact: every span that is kept counts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from urllib.parse import urlencode

import numpy as np
import numpy.typing as npt

from controller.traces.columns import Selected, SpanColumns, Which
from controller.traces.stages import STAGES, WHOLE, Stage, TierName
from core.errors import InvalidRequest

PERCENTILES = (50, 90, 99)
# Seconds, by the word in the address.
RANGES = {"15m": 900, "1h": 3_600, "6h": 21_600, "24h": 86_400, "7d": 604_800}
DEFAULT_RANGE = "1h"
DEFAULT_STAGE = Stage(TierName.EDGE, WHOLE)
# Chosen: bars of 7 to 12 pixels on an ordinary screen, 60 s each in an hour.
TIME_BARS = 60
BARS_PER_DECADE = 8
# A map begins with its first span, so that a system that just started shows more than one bar; a second each then.
MIN_SHOWN_US = TIME_BARS * 1_000_000
_MIN_EXPONENT, _MAX_EXPONENT = 0, 9


@dataclass(frozen=True, slots=True)
class LatencyView:
    """What the address of the page asks for."""

    range: str = DEFAULT_RANGE
    stage: Stage = DEFAULT_STAGE
    tier: TierName | None = None
    model: str | None = None
    site: str | None = None

    @classmethod
    def parsed(cls, *, range_: str, stage: str, tier: str, model: str, site: str) -> "LatencyView":
        """Return the view; an empty word takes the default.

        Raises:
            InvalidRequest: a word that none of the page's own links has.
        """
        if range_ and range_ not in RANGES:
            raise InvalidRequest(f"range: expected one of {', '.join(RANGES)}, got {range_[:40]!r}")
        chosen_tier = parsed_tier(tier)
        chosen = parsed_stage(stage) or DEFAULT_STAGE
        if chosen_tier is not None and chosen.tier is not chosen_tier:
            chosen = Stage(chosen_tier, WHOLE)
        return cls(range_ or DEFAULT_RANGE, chosen, chosen_tier, model or None, site or None)

    def which(self, now_us: int) -> Which:
        return Which(now_us - RANGES[self.range] * 1_000_000, now_us + 1, self.model, self.site, self.tier)

    @property
    def query(self) -> dict[str, str]:
        words = {"range": self.range, "stage": stage_word(self.stage), "tier": self.tier or ""}
        words |= {"model": self.model or "", "site": self.site or ""}
        return {key: word for key, word in words.items() if word}

    def link(self, **changed: str) -> str:
        return f"/latency?{urlencode({**self.query, **changed})}"


def stage_word(stage: Stage) -> str:
    return f"{stage.tier.value}.{stage.name}"


def parsed_stage(word: str) -> Stage | None:
    """Return the stage of a word such as `edge.compute`; None: the word is empty. Raises InvalidRequest."""
    if not word:
        return None
    for stage in STAGES:
        if stage_word(stage) == word:
            return stage
    raise InvalidRequest(f"stage: expected one of {', '.join(map(stage_word, STAGES))}, got {word[:40]!r}")


def parsed_tier(word: str) -> TierName | None:
    """Return the tier of a word; None: the word is empty. Raises InvalidRequest."""
    if not word:
        return None
    try:
        return TierName(word)
    except ValueError as error:
        raise InvalidRequest(f"tier: expected one of {', '.join(TierName)}, got {word[:40]!r}") from error


@dataclass(frozen=True, slots=True)
class StageRow:
    """Percentiles of one stage, in microseconds."""

    stage: Stage
    count: int
    p50_us: float
    p90_us: float
    p99_us: float
    max_us: int
    error_ratio: float


@dataclass(frozen=True, slots=True)
class LatencyReport:
    """What the page shows beside its charts; `models` and `sites` are those to choose from."""

    rows: tuple[StageRow, ...]
    models: tuple[str, ...]
    sites: tuple[str, ...]
    # Whether there is any span at all, in whatever range.
    has_spans: bool


def report_of(columns: SpanColumns, which: Which) -> LatencyReport:
    rows = stage_rows(columns.select(which))
    return LatencyReport(rows, tuple(columns.models), tuple(columns.sites), len(columns) > 0)


def stage_rows(selected: Selected) -> tuple[StageRow, ...]:
    """Return a row for every stage that has a span, along the way of a request."""
    rows = []
    for stage in STAGES:
        of_stage = selected.of(stage)
        if len(of_stage.duration_us) == 0:
            continue
        p50, p90, p99 = np.percentile(of_stage.duration_us, PERCENTILES).tolist()
        rows.append(
            StageRow(
                stage, len(of_stage.duration_us), p50, p90, p99, int(of_stage.duration_us.max()),
                float(of_stage.is_error.mean()),
            )
        )  # fmt: skip
    return tuple(rows)


def figures_of(columns: SpanColumns, which: Which, stage: Stage) -> dict[str, Any]:
    """Return what the charts of one stage draw, as JSON knows it. Times and durations in microseconds.

    `time_edges` (n + 1) and `duration_edges` (m + 1) bound the bars of `counts` (m, n); `percentiles` has a value per
    bar of time, null where nothing was.
    """
    selected = columns.select(which).of(stage)
    edges_us = _time_edges(selected.start_us, which)
    if len(selected.duration_us) == 0:
        return {"count": 0, "time_edges": edges_us.tolist(), "duration_edges": [], "counts": [], "percentiles": {}}
    durations = _duration_edges(selected.duration_us)
    counts, _, _ = np.histogram2d(selected.duration_us, selected.start_us, bins=(durations, edges_us.astype(float)))
    return {
        "count": len(selected.duration_us),
        "time_edges": edges_us.tolist(),
        "duration_edges": [round(edge, 3) for edge in durations.tolist()],
        "counts": counts.astype(int).tolist(),
        "percentiles": _series(selected, edges_us),
    }


def _time_edges(start_us: npt.NDArray[np.int64], which: Which) -> npt.NDArray[np.int64]:
    """Return the edges of bars from the first span, but at least MIN_SHOWN_US, to the end of what was asked for."""
    first_us = int(start_us.min()) if len(start_us) else which.from_us
    from_us = max(which.from_us, min(first_us, which.until_us - MIN_SHOWN_US))
    return np.linspace(from_us, which.until_us, TIME_BARS + 1).astype(np.int64)


def _duration_edges(duration_us: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the edges of bars from the shortest to the longest; what took no microsecond counts as one."""
    lowest = np.log10(max(1, int(duration_us.min())))
    highest = np.log10(max(1, int(duration_us.max())))
    first = int(np.floor(lowest * BARS_PER_DECADE))
    last = int(np.floor(highest * BARS_PER_DECADE)) + 1
    edges = 10 ** (
        np.arange(max(first, _MIN_EXPONENT), min(last, _MAX_EXPONENT * BARS_PER_DECADE) + 1) / BARS_PER_DECADE
    )
    if first == 0:
        edges[0] = 0
    return np.asarray(edges, np.float64)


def _series(selected: Selected, edges_us: npt.NDArray[np.int64]) -> dict[str, list[float | None]]:
    order = np.argsort(selected.start_us, kind="stable")
    durations = selected.duration_us[order]
    cuts = np.searchsorted(selected.start_us[order], edges_us)
    values = list(_percentiles(durations, cuts))
    return {
        f"p{percentile}": [None if bar is None else round(bar[k], 1) for bar in values]
        for k, percentile in enumerate(PERCENTILES)
    }


def _percentiles(durations: npt.NDArray[np.int64], cuts: npt.NDArray[np.int64]) -> Iterator[Sequence[float] | None]:
    for start, stop in pairwise(cuts.tolist()):
        yield np.percentile(durations[start:stop], PERCENTILES).tolist() if stop > start else None
