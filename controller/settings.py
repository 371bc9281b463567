"""Everything that can be set about the controller, in one frozen object built at start and handed down in parts.

Values come from a TOML file and from environment variables, which win: `[heavy] port = 8000` is the same setting as
`NANOFLEET_HEAVY__PORT=8000`. A key that nobody knows is an error in both, named together with where it stands.
`NANOFLEET_AGENT_*` (the agent's settings) and `NANOFLEET_CONTROLLER` (where the CLI finds us) are left alone.
"""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from core.addresses import Address, LoopbackAddress, parse_address
from core.errors import InvalidRequest
from core.logs import LogFormat
from core.telemetry import DEFAULT_SAMPLE_RATIO

ENVIRONMENT_PREFIX = "NANOFLEET_"
_AGENT_PREFIX = "NANOFLEET_AGENT_"
_CLI_VARIABLE = "NANOFLEET_CONTROLLER"
_GIB = 1 << 30


def _address(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return parse_address(value)
    except InvalidRequest as error:
        raise ValueError(str(error)) from error


AddressField = Annotated[Address, BeforeValidator(_address)]
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Ratio = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class HeavySettings(_Section):
    """The tier that runs the large models."""

    mode: Literal["embedded", "url"] = "embedded"
    """`embedded`: the controller starts a local Ray and its own application; `url`: somebody else runs the tier."""
    url: Annotated[str, Field(pattern=r"^https?://[^/?#\s]+(/[^?#\s]*)?$")] | None = None
    """Base address of any Open Inference server, such as `http://127.0.0.1:8000`; needed by mode `url` only."""
    port: Port = 8000
    """Loopback port of the embedded tier's HTTP ingress."""
    min_replicas: Count = 1
    """Replicas kept when idle; at least one, because it answers the controller's probe."""
    max_replicas: Count = 2
    """Most replicas that autoscaling may start."""
    cpus_per_replica: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """CPU cores that Ray reserves for one replica; may be a fraction."""
    max_models_per_replica: Count = 4
    """Models that one replica holds in memory; the least recently used one goes first."""
    max_batch: Annotated[int, Field(ge=1, le=1024)] = 8
    """Requests that may share one run, for models that allow batching."""
    batch_wait_s: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.002
    """Seconds that a request waits for others to share its run while others are in progress; alone it never waits."""
    request_timeout_s: Seconds = 30.0
    """Seconds that a request without a deadline of its own may take, loading the model included."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.mode == "url" and self.url is None:
            raise ValueError("mode 'url' needs heavy.url, the address of the tier")
        if self.mode == "embedded" and self.url is not None:
            raise ValueError("heavy.url is set, but mode is 'embedded'; set heavy.mode to 'url' or remove heavy.url")
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"expected max_replicas of at least min_replicas {self.min_replicas}")
        return self


class TelemetrySettings(_Section):
    """Traces: how many are recorded, how many are kept, where they go."""

    sample_ratio: Ratio = DEFAULT_SAMPLE_RATIO
    """Share of requests recorded among those that arrive without a sampling decision of their own."""
    max_spans: Annotated[int, Field(ge=100)] = 50_000
    """Spans kept for `GET /api/traces`; the oldest go first."""
    forward_to: AddressField | None = None
    """`host:port` of an OTLP/gRPC collector that gets every span as well."""


class RegistrySettings(_Section):
    """Bounds on publishing: what may be uploaded, and what checking and compressing it may cost."""

    max_model_bytes: Annotated[int, Field(ge=1)] = 2 * _GIB
    """Largest blob that may be uploaded, and largest sum of one model's files."""
    publish_timeout_s: Seconds = 600.0
    """Seconds for one step of a publication (checking, one recipe, one evaluation) before it is stopped."""
    publish_memory_bytes: Annotated[int, Field(ge=_GIB // 2)] = 4 * _GIB
    """Memory that the child process of one step may take."""
    max_queued_publications: Count = 16
    """Publications that may wait; one runs at a time, more are refused."""


class FleetSettings(_Section):
    """Agents and their sessions."""

    max_sessions: Count = 10_000
    """Agents connected at one time; more are refused and try again later."""
    keepalive_s: Seconds = 60.0
    """Seconds between the keepalive pings of an idle session."""


class LogSettings(_Section):
    """What the process says on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe records that are written."""
    format: LogFormat = "text"
    """`text` for a terminal, `json` for machines."""


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        env_prefix=ENVIRONMENT_PREFIX,
        env_nested_delimiter="__",
    )

    data_dir: Path = Path("nanofleet-data")
    """Folder of the database and the blobs; made when missing."""
    grpc_bind: LoopbackAddress = "127.0.0.1:7443"
    """Where agents, gRPC inference clients and OTLP exporters connect."""
    http_bind: LoopbackAddress = "127.0.0.1:7080"
    """Where operators and HTTP inference clients connect."""
    heavy: HeavySettings = HeavySettings()
    """The tier that runs the large models."""
    telemetry: TelemetrySettings = TelemetrySettings()
    """Traces: how many are recorded, how many are kept, where they go."""
    registry: RegistrySettings = RegistrySettings()
    """Bounds on publishing."""
    fleet: FleetSettings = FleetSettings()
    """Agents and their sessions."""
    logs: LogSettings = LogSettings()
    """What the process says on standard error."""

    @property
    def database_url(self) -> str:
        return f"sqlite:///{self.data_dir / 'controller.sqlite'}"

    @property
    def blobs_dir(self) -> Path:
        return self.data_dir / "blobs"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let the environment win over what `load_settings` read from the file."""
        return env_settings, init_settings


def load_settings(path: Path | None) -> Settings:
    """Return the settings of the TOML file `path` (None: no file) under those of the environment.

    Raises:
        InvalidRequest: the file cannot be read, or a key is unknown, or a value does not fit; the message names the
            key and the file or variable it stands in.
    """
    from_file = {} if path is None else _read(path)
    _refuse_unknown_variables(os.environ)
    try:
        return Settings(**from_file)
    except ValidationError as error:
        raise InvalidRequest("settings: " + "; ".join(_explain(error, path, os.environ))) from error
    except SettingsError as error:
        raise InvalidRequest(f"settings: environment: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"settings: {path}: {error.strerror}; give the path of a TOML file") from error
    except ValueError as error:
        raise InvalidRequest(f"settings: {path}: expected TOML, got an error: {error}") from error


def _refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    """Raise for variables with our prefix that name no setting; the library only looks for those that it knows."""
    for variable in sorted(environment):
        name = variable.upper()
        if not name.startswith(ENVIRONMENT_PREFIX) or name.startswith(_AGENT_PREFIX) or name == _CLI_VARIABLE:
            continue
        section = name.removeprefix(ENVIRONMENT_PREFIX).split("__")[0].lower()
        if section not in Settings.model_fields:
            known = ", ".join(Settings.model_fields)
            raise InvalidRequest(f"settings: environment variable {variable}: no such setting; known are {known}")


def _explain(error: ValidationError, path: Path | None, environment: Mapping[str, str]) -> list[str]:
    return [
        f"{_source(problem['loc'], path, environment)}: {'.'.join(map(str, problem['loc']))}: "
        + ("unknown key" if problem["type"] == "extra_forbidden" else problem["msg"])
        for problem in error.errors(include_url=False, include_context=False)
    ]


def _source(location: tuple[int | str, ...], path: Path | None, environment: Mapping[str, str]) -> str:
    """Say where the value at `location` came from; the environment wins over the file, so it is asked first."""
    present = {variable.upper(): variable for variable in environment}
    for depth in range(len(location), 0, -1):
        variable = ENVIRONMENT_PREFIX + "__".join(map(str, location[:depth])).upper()
        if variable in present:
            return f"environment variable {present[variable]}"
    return "environment" if path is None else str(path)
