"""What the Serve application and the cluster around it are told, as values that travel: JSON in, validated here.

`ApplicationArguments` is also what `serve run controller.heavy.application:build key=value …` takes on the command
line, so every field has a default and a plain type.
"""

from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from core.addresses import LoopbackAddress, parse_address
from core.errors import InvalidRequest


def _address(text: str) -> str:
    try:
        parse_address(text)
    except InvalidRequest as error:
        raise ValueError(str(error)) from error
    return text


AddressText = Annotated[str, AfterValidator(_address)]


class _Arguments(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ApplicationArguments(_Arguments):
    """One Serve application: where its models come from and what its replicas may use."""

    controller: AddressText = "127.0.0.1:7443"
    """gRPC address of the controller: ArtifactService for the models, OTLP for the spans."""

    tls_dir: Path = Path("/etc/nanofleet/heavy")
    """Folder on every node with `identity.pem` (key and certificate of role heavy) and `trust.pem`."""

    cache_dir: Path = Path("/tmp/nanofleet-heavy")  # noqa: S108 (a default for clusters; the controller names its own)
    """Folder on every node for fetched models, content-addressed; replicas of one node share it."""

    cache_budget_bytes: Annotated[int, Field(ge=1 << 20)] = 16 << 30
    """The cache's size in bytes; the longest unused models go first."""

    min_replicas: Annotated[int, Field(ge=1, le=1024)] = 1
    """Replicas that are always up."""

    max_replicas: Annotated[int, Field(ge=1, le=1024)] = 1
    """Replicas that autoscaling may reach."""

    max_replicas_per_node: Annotated[int, Field(ge=1, le=100)] | None = None
    """Spread over nodes; None leaves the placement to Ray."""

    target_ongoing_requests: Annotated[float, Field(gt=0)] = 8.0
    """Requests in progress per replica that autoscaling aims at."""

    max_ongoing_requests: Annotated[int, Field(ge=1, le=4096)] = 64
    """Requests in progress on one replica; more wait at the proxy."""

    max_queued_requests: Annotated[int, Field(ge=1, le=65536)] = 256
    """Requests that may wait at a proxy; more are answered 429 at once."""

    cpus_per_replica: Annotated[float, Field(gt=0)] = 0.5
    """Logical CPUs that Ray reserves for a replica; a fraction lets several share a core."""

    threads: Annotated[int, Field(ge=1, le=256)] = 1
    """Intra-op threads of each ONNX Runtime session."""

    concurrent_runs: Annotated[int, Field(ge=1, le=64)] = 2
    """Runs that a replica makes at the same time, over all of its models."""

    max_models: Annotated[int, Field(ge=1, le=1024)] = 8
    """Models that a replica keeps in memory; the longest unused goes first."""

    max_batch: Annotated[int, Field(ge=1, le=1024)] = 32
    """Requests that may be looked at together; how many rows share a run is the manifest's word."""

    batch_wait_ms: Annotated[float, Field(ge=0, le=1000)] = 2.0
    """How long a request waits for companions, while others are in progress; alone it never waits."""

    export_spans: bool = True
    """Send spans of sampled requests to the controller."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"expected max_replicas of at least {self.min_replicas}, got {self.max_replicas}")
        return self


class ClusterArguments(_Arguments):
    """The local Ray of a single machine, and the application on it."""

    state_dir: Path
    """Folder of its own for the token, models and the log; made when missing."""

    bind: LoopbackAddress = "127.0.0.1:8000"
    """Where Serve's HTTP ingress listens."""

    cpus: Annotated[int, Field(ge=1, le=1024)] = 2
    """Logical CPUs of the local Ray; stated, not detected, so that a small machine can still place every actor."""

    application: ApplicationArguments = ApplicationArguments()
