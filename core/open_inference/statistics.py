"""What a plane has counted per model, in the shape of Triton's extension "statistics".

Only what a plane really counts is told: durations that it does not measure, such as copying inputs, stay zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Duration:
    """How often something happened, and how long that took in all."""

    count: int = 0
    ns: int = 0

    @classmethod
    def of(cls, count: int, seconds: float = 0.0) -> Self:
        return cls(count, round(seconds * 1e9))


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    """Since the start of the process; every part of a joint run counts on its own in `queue` and `compute_infer`."""

    name: str
    version: str
    success: Duration = Duration()
    fail: Duration = Duration()
    queue: Duration = Duration()
    compute_infer: Duration = Duration()
    cache_hit: Duration = Duration()
    cache_miss: Duration = Duration()
    # Milliseconds of Unix time; 0: none yet.
    last_inference_ms: int = 0
    executions: int = 0


def statistics_body(found: Sequence[ModelStatistics]) -> Mapping[str, object]:
    """Return the JSON object of the answer."""
    return {"model_stats": [_model_body(each) for each in found]}


def _model_body(found: ModelStatistics) -> Mapping[str, object]:
    none = Duration()
    durations = {
        "success": found.success,
        "fail": found.fail,
        "queue": found.queue,
        "compute_input": none,
        "compute_infer": found.compute_infer,
        "compute_output": none,
        "cache_hit": found.cache_hit,
        "cache_miss": found.cache_miss,
    }
    return {
        "name": found.name,
        "version": found.version,
        "last_inference": found.last_inference_ms,
        "inference_count": found.success.count,
        "execution_count": found.executions,
        "inference_stats": {name: asdict(each) for name, each in durations.items()},
        "batch_stats": [],
    }
