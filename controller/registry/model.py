"""The values of the registry: a model has versions, a version has variants, and a publication makes a version.

A variant is identified by the digest of its manifest (`core.manifest`), which names every one of its files. Versions
are numbered 1, 2, 3 … for each model and never change. Publishing the same bytes again makes a new version: the number
is part of the manifest, so it is another identity; files are content addressed, so only manifests are stored twice.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from core.digest import Digest
from core.fleet_state import Problem
from core.ids import ModelName, VariantName
from core.manifest import Manifest, ScoreKind
from core.privacy import PrivacyClass

ORIGINAL = VariantName("original")


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured when the variant was published, on the machine that published it."""

    size_bytes: int
    # One request at a time, one thread, after warm-up.
    latency_p50_us: float
    latency_p90_us: float
    # Share of right answers among `evaluated_samples`; both None when no evaluation data was given.
    accuracy_ratio: float | None = None
    evaluated_samples: int | None = None


@dataclass(frozen=True, slots=True)
class Variant:
    model: ModelName
    version: int
    variant: VariantName
    manifest_digest: Digest
    manifest: Manifest
    measured: Measured


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One version with all of its variants: `original` first, then the others by name."""

    model: ModelName
    version: int
    created_at: datetime
    variants: tuple[Variant, ...]


@dataclass(frozen=True, slots=True)
class Model:
    name: ModelName
    created_at: datetime
    latest_version: int


@dataclass(frozen=True, slots=True)
class BundleFile:
    """A file of a model as its publisher names it: a relative path and an uploaded blob."""

    path: str
    digest: Digest


@dataclass(frozen=True, slots=True)
class CascadeRequest:
    """When this model shall hand over to `escalate_to`; temperature and threshold are fitted at publish."""

    escalate_to: ModelName
    score_output: str
    score_kind: ScoreKind
    # Share of wrong answers that is accepted among those that the edge keeps.
    max_error_ratio: float


@dataclass(frozen=True, slots=True)
class PublishRequest:
    """What an operator asks for; every digest names a blob that was uploaded before.

    `file` is the ONNX model, `extra_files` its external data, and what else belongs to it (a tokenizer, a
    configuration). `requires` are tags that an agent must have. `privacy` says how far the data of requests to the
    model may go; None: as far as others say. `calibration` and `evaluation` are .npz data sets with `inputs` (N, …)
    and `labels` (N,) int64.
    """

    file: BundleFile
    extra_files: tuple[BundleFile, ...] = ()
    calibration: Digest | None = None
    evaluation: Digest | None = None
    recipes: tuple[str, ...] = ()
    max_batch: int = 1
    cascade: CascadeRequest | None = None
    requires: tuple[str, ...] = ()
    privacy: PrivacyClass | None = None


class PublicationState(StrEnum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Publication:
    """A publish, from the moment it was accepted; `version` is set when DONE, `problem` when FAILED."""

    id: str
    model: ModelName
    state: PublicationState
    # `queued`, `check`, `original`, `{recipe}: quantise`, `{recipe}: evaluate`, `record` or `done`.
    stage: str
    done_ratio: float
    created_at: datetime
    updated_at: datetime
    version: int | None = None
    problem: Problem | None = None

    @property
    def is_over(self) -> bool:
        return self.state is not PublicationState.RUNNING
