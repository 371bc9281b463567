"""The bodies of the operator's REST, as the client and the server both know them.

Only shapes: `operator_mapping` makes them from the values of the features. Kept light on purpose, because the command
line imports it: nothing here may bring in the web framework, numpy or a database.
"""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from core.ids import Name, Tag
from core.privacy import PrivacyClass

DigestText = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
TargetKindText = Literal["fleet", "site", "agent"]
PhaseText = Literal["fetching", "waiting", "self_test", "loading", "probation", "ready", "failed"]
ScoreKindText = Literal["logits", "probabilities"]


class _Body(BaseModel):
    """What a client sends: a key that nobody knows is an error, not a silent misunderstanding."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class _View(BaseModel):
    """What a client gets: a newer server may say more than an older client knows."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


# ---- health and errors --------------------------------------------------------------------------------------------


class HealthView(_View):
    status: Literal["ok"] = "ok"
    version: str
    is_restored_unconfirmed: bool = False
    """Its state came from a backup and nobody has confirmed that: it pushes nothing."""


class ProblemView(_View):
    """Problem details of RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    """What was expected, what came, what to do."""
    code: str
    """The stable word for programs."""


class ReasonView(_View):
    """Why something failed, away from this request."""

    code: str
    message: str


# ---- models -------------------------------------------------------------------------------------------------------


class BlobView(_View):
    digest: DigestText
    size_bytes: int


class FileBody(_Body):
    path: Annotated[str, Field(max_length=255)]
    """Relative path by which the model's files refer to each other."""
    digest: DigestText
    """An uploaded blob."""


class CascadeBody(_Body):
    escalate_to: Name
    """The model that answers what this one is not sure of."""
    score_output: Annotated[str, Field(min_length=1, max_length=256)]
    """The output with one score per class."""
    score_kind: ScoreKindText
    max_error_ratio: Annotated[float, Field(ge=0, lt=1)]
    """Share of wrong answers accepted among those that the edge keeps, on the evaluation data."""


class PublishBody(_Body):
    file: FileBody
    """The ONNX model."""
    extra_files: Annotated[tuple[FileBody, ...], Field(max_length=4095)] = ()
    """External data of the model, and what else belongs to it: a tokenizer, a configuration."""
    calibration: DigestText | None = None
    """An .npz data set with `inputs` for static quantization."""
    evaluation: DigestText | None = None
    """An .npz data set with `inputs` and `labels` (int64) to measure accuracy on and fit thresholds with."""
    recipes: Annotated[tuple[str, ...], Field(max_length=16)] = ()
    """Variants to make: `int8-static`, `int8-dynamic`, `fp16`."""
    max_batch: Annotated[int, Field(ge=1, le=1024)] = 1
    """Rows that may share one run; 1 where the model's first dimension is no batch."""
    cascade: CascadeBody | None = None
    requires: Annotated[tuple[Tag, ...], Field(max_length=32)] = ()
    """Tags that an agent must have, such as `arch:x86_64`; others refuse to install it."""
    privacy: PrivacyClass | None = None
    """How far the data of requests to it may go; agents let nobody loosen it. Without: as the requests say."""


class PublicationView(_View):
    id: str
    model: str
    state: Literal["running", "done", "failed"]
    stage: str
    done_ratio: float
    created_at: datetime
    updated_at: datetime
    version: int | None = None
    """Set when done."""
    problem: ReasonView | None = None
    """Set when failed."""


class ModelView(_View):
    name: str
    created_at: datetime
    latest_version: int


class ModelsView(_View):
    models: tuple[ModelView, ...]


class TensorView(_View):
    name: str
    datatype: str
    shape: tuple[int, ...]


class CascadeView(_View):
    escalate_to: str
    score_output: str
    score_kind: str
    temperature: float
    threshold: float


class VariantView(_View):
    """One variant and what was measured of it at publish."""

    variant: str
    manifest_digest: DigestText
    parent_digest: DigestText | None
    recipe: str
    size_bytes: int
    latency_p50_us: float
    latency_p90_us: float
    accuracy_ratio: float | None
    evaluated_samples: int | None
    max_batch: int
    inputs: tuple[TensorView, ...]
    outputs: tuple[TensorView, ...]
    cascade: CascadeView | None


class VersionView(_View):
    version: int
    created_at: datetime
    variants: tuple[VariantView, ...]


class ModelDetailView(_View):
    name: str
    versions: tuple[VersionView, ...]
    """Newest first."""


# ---- fleet --------------------------------------------------------------------------------------------------------


class PositionView(_View):
    """A place in the history of one agent's desired state; compared epoch first."""

    epoch: int
    generation: int


class SlotView(_View):
    model: str
    version: int
    variant: str
    manifest_digest: DigestText


class TransferView(_View):
    """What bringing a variant to an agent cost."""

    wire_bytes: int
    """Encoded bytes that the agent received."""
    brought_bytes: int
    """Bytes of the chunks they stand for, those that the agent had already included."""
    saved_bytes: int
    """What chunks in store, differences and compression saved."""
    rate_bytes_per_s: int
    same_chunks: int
    raw_chunks: int
    zstd_chunks: int
    difference_chunks: int


class SlotReportView(_View):
    slot: SlotView
    phase: PhaseText
    """`probation` serves already; `waiting` needs a person's word to send whole chunks over a metered link."""
    stored_bytes: int
    total_bytes: int
    problem: ReasonView | None = None
    transfer: TransferView | None = None


class UsageView(_View):
    """What became of an agent's requests since its process began."""

    answered_edge: int
    """By the agent's own model."""
    answered_heavy: int
    """By the heavy tier, because the agent was not sure."""
    refused: int
    """Those that came too late included."""
    failed: int
    """By a defect."""
    since: datetime
    requests_per_s: float
    """Over the last minute."""
    escalated_ratio: float | None
    """Share of the answers of the last minute that the heavy tier gave; null without any."""


class AgentHealthView(_View):
    """How an agent's machine is."""

    rss_bytes: int
    """Memory of the agent's process."""
    available_bytes: int
    """Memory that the machine has left."""
    temperature_c: float | None
    """Of its warmest sensor; null where there is none."""
    load: float
    """Processes that run or want to, averaged over a minute."""
    reported_at: datetime


class EnergyView(_View):
    """The agent's part of what its machine took, by its share of the processor time."""

    method: Literal["rapl", "battery", "model"]
    """How it is known; `model` is an assumption that was set, and figures of different methods do not compare."""
    joules: float
    """Since the agent's process began."""
    answers: int
    """Given meanwhile."""
    watts: float
    """Over the last minute."""
    joules_per_answer: float | None
    """Since the agent's process began; null without answers."""
    recent_joules_per_answer: float | None
    """Over the last minute; null without answers."""


class AgentView(_View):
    id: str
    site: str
    is_online: bool
    is_in_sync: bool
    """It has applied all that it was asked for."""
    software_version: str
    tags: tuple[str, ...]
    first_seen_at: datetime
    last_seen_at: datetime
    desired: PositionView
    desired_slots: tuple[SlotView, ...]
    applied: PositionView
    slots: tuple[SlotReportView, ...]
    """What the agent says it runs or is about to."""
    rejection: ReasonView | None = None
    """Why it refused what it was asked last; it keeps running what it had."""
    usage: UsageView | None = None
    """null: the agent has not said since the controller started, or is too old to."""
    health: AgentHealthView | None = None
    """As `usage`."""
    energy: EnergyView | None = None
    """As `usage`; null too where nothing is known."""


class AgentsView(_View):
    revision: int
    """Grows with every change; ask again with `after` and `wait_s` to wait for the next one."""
    agents: tuple[AgentView, ...]


class TransferBody(_Body):
    model: Name


class DeploymentBody(_Body):
    target_kind: TargetKindText
    target: Annotated[str, Field(max_length=64)] = ""
    """Name of the site or agent; empty for the fleet."""
    model: Name
    version: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    """None: the latest, as it is now."""
    variant: Name


class DeploymentView(_View):
    target_kind: TargetKindText
    target: str
    slot: SlotView
    created_at: datetime


class DeploymentsView(_View):
    deployments: tuple[DeploymentView, ...]


class AffectedAgentView(_View):
    id: str
    position: PositionView


class DeployedView(_View):
    deployment: DeploymentView
    agents: tuple[AffectedAgentView, ...]
    """Every agent that is to run the model because of it, and the position at which it does."""


# ---- traces -------------------------------------------------------------------------------------------------------


class TraceSummaryView(_View):
    trace_id: str
    root_name: str
    start_us: int
    """Microseconds since the epoch, UTC."""
    duration_us: int
    services: tuple[str, ...]
    span_count: int
    has_error: bool


class TracesView(_View):
    traces: tuple[TraceSummaryView, ...]
    """The one that started last first."""


class SpanView(_View):
    span_id: str
    parent_span_id: str | None
    name: str
    kind: str
    service: str
    instance: str
    start_us: int
    duration_us: int
    is_error: bool
    attributes: dict[str, bool | int | float | str]


class TraceView(_View):
    trace_id: str
    spans: tuple[SpanView, ...]
    """By start."""
