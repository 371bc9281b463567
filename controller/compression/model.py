"""The values that go into the workshop and come back; all of them cross a process border as JSON."""

from dataclasses import dataclass
from pathlib import Path

from core.manifest import ScoreKind
from core.tensors import TensorSpec

RECIPES = ("int8-static", "int8-dynamic", "fp16")


@dataclass(frozen=True, slots=True)
class ModelBundle:
    """A model as files in a folder: the entry, and what belongs to it by relative path: external data, a tokenizer …"""

    folder: Path
    entry: str
    extra_files: tuple[str, ...] = ()

    @property
    def entry_path(self) -> Path:
        return self.folder / self.entry


@dataclass(frozen=True, slots=True)
class Dataset:
    """An .npz file with `inputs` (N, …) and `labels` (N,) int64, without pickles."""

    path: Path


@dataclass(frozen=True, slots=True)
class Inspected:
    """What a checked model takes and gives, a variable dimension being -1, and where its external data lies."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    external_files: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class ScoreRule:
    """Which output holds the scores, what they are, and what share of wrong answers may be kept."""

    score_output: str
    score_kind: ScoreKind
    max_error_ratio: float


@dataclass(frozen=True, slots=True)
class GoldenOrder:
    """Where to write golden inputs and outputs, how many samples may share a run, and where samples come from."""

    path: Path
    max_batch: int
    dataset: Dataset | None = None


@dataclass(frozen=True, slots=True)
class Golden:
    """How golden outputs are compared on another machine: |got - want| <= atol + rtol * |want|."""

    samples: int
    rtol: float
    atol: float


@dataclass(frozen=True, slots=True)
class EvaluationTask:
    bundle: ModelBundle
    dataset: Dataset | None = None
    rule: ScoreRule | None = None
    golden: GoldenOrder | None = None


@dataclass(frozen=True, slots=True)
class CascadeFit:
    """Temperature and threshold, and what they keep of the data they were fitted on."""

    temperature: float
    threshold: float
    kept_ratio: float
    kept_error_ratio: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Latency of one request at a time on one thread; the rest is None where no data or no rule was given."""

    latency_p50_us: float
    latency_p90_us: float
    accuracy_ratio: float | None = None
    samples: int | None = None
    fit: CascadeFit | None = None
    golden: Golden | None = None
