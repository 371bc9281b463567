"""What came back, counted: accuracy, share escalated, latency per tier, losses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = Sequence[Mapping[str, Any]]
TIERS = ("edge", "heavy")


@dataclass(frozen=True, slots=True)
class Outcome:
    """The counts of one scene over pictures with known labels."""

    accuracy: float
    escalated_ratio: float
    latency_ms: Mapping[str, Mapping[str, float]]
    answered: Mapping[str, int]
    lost: int
    refused: int
    duplicates: int
    late: int


def outcome_of(rows: Rows, totals: Mapping[str, int], labels: npt.NDArray[np.int64]) -> Outcome:
    """Judge one row per picture; a lost or refused picture counts as wrong."""
    answered = [row for row in rows if not row["lost"] and row["status"] == 200]
    right = sum(row["outputs"]["label"][0] == labels[row["index"]] for row in answered)
    by_tier = {tier: [row["latency_ms"] for row in answered if row["tier"] == tier] for tier in TIERS}
    lost = sum(row["lost"] for row in rows)
    return Outcome(
        accuracy=float(right) / len(labels),
        escalated_ratio=len(by_tier["heavy"]) / len(labels),
        latency_ms={tier: percentiles(values) for tier, values in by_tier.items() if values},
        answered={tier: len(values) for tier, values in by_tier.items()},
        lost=lost + len(labels) - len(rows),
        refused=len(rows) - lost - len(answered),
        duplicates=totals["duplicates"],
        late=totals["late"],
    )


def percentiles(values_ms: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.percentile(values_ms, (50, 99))
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3)}


def traced_escalations(rows: Rows) -> list[str]:
    """Return the ids of the traces of escalated requests, the newest first."""
    return [
        row["traceparent"].split("-")[1]
        for row in reversed(rows)
        if "traceparent" in row and not row["lost"] and row["tier"] == "heavy"
    ]
