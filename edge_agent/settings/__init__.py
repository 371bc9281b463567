"""Everything that can be set about an agent, in one frozen object built at start and handed down in parts.

Values come from a TOML file and from environment variables, which win: `[mqtt] port = 1883` is the same setting as
`NANOFLEET_AGENT_MQTT__PORT=1883`. A key that nobody knows is an error in both. Durations are in seconds (`_s`), sizes
in bytes (`_bytes`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from core.addresses import is_loopback, parse_address
from core.ids import Name
from core.settings import ProcessSettings, Seconds, load
from edge_agent.settings.faces import FacesSettings, MqttSettings, MqttTlsSettings
from edge_agent.settings.fleet import ActivationSettings, LinkSettings, SyncSettings
from edge_agent.settings.kinds import OptionalBindAddress, OptionalDialledAddress
from edge_agent.settings.records import (
    EnergySettings,
    LogSettings,
    OutboxKindSettings,
    OutboxSettings,
    SamplesSettings,
    TelemetrySettings,
)
from edge_agent.settings.serving import (
    ModelSettings,
    OffloadSettings,
    PrivacySettings,
    ResidencySettings,
    RuntimeSettings,
)

__all__ = [
    "ActivationSettings",
    "AgentSettings",
    "EnergySettings",
    "FacesSettings",
    "LinkSettings",
    "LogSettings",
    "ModelSettings",
    "MqttSettings",
    "MqttTlsSettings",
    "OffloadSettings",
    "OutboxKindSettings",
    "OutboxSettings",
    "PrivacySettings",
    "ResidencySettings",
    "RuntimeSettings",
    "SamplesSettings",
    "SyncSettings",
    "TelemetrySettings",
    "load_settings",
]


class AgentSettings(ProcessSettings):
    model_config = SettingsConfigDict(env_prefix="NANOFLEET_AGENT_")

    state_dir: Path = Path("nanofleet-agent")
    """Folder of identity, models, status and endpoints; used by one agent at a time."""
    controller: OptionalDialledAddress = None
    """The controller's gRPC address, where it is another than the one said at enrolment."""
    enrolment: OptionalDialledAddress = None
    """The controller's enrolment address, where it is another than the one said at enrolment."""
    metered: bool = False
    """True: the link costs money; whole chunks are fetched only with a person's word, differences always."""
    grpc_bind: OptionalBindAddress = "127.0.0.1:7181"
    """Where the local gRPC face listens; port 0 lets the system choose (see endpoints.json); `""` for none."""
    http_bind: OptionalBindAddress = None
    """Where the local HTTP face listens, such as 127.0.0.1:7180, with `/metrics` and `/healthz`; unset: none."""
    faces: FacesSettings = FacesSettings()
    """The agent's own faces, for programs beside it."""
    tags: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=128)], ...], Field(max_length=32)] = ()
    """What this machine is, for example `rack:7`; its architecture is added by itself."""
    drain_timeout_s: Seconds = 5.0
    """Seconds that requests under way get to finish when the agent is told to stop."""
    mqtt: MqttSettings = MqttSettings()
    """The broker through which devices reach this agent."""
    link: LinkSettings = LinkSettings()
    """The stream to the controller."""
    sync: SyncSettings = SyncSettings()
    """Fetching models from the controller."""
    activation: ActivationSettings = ActivationSettings()
    """Between a model's first request and the word that it stays."""
    runtime: RuntimeSettings = RuntimeSettings()
    """How models run."""
    residency: ResidencySettings = ResidencySettings()
    """Which of the models that this agent runs are in memory."""
    models: Mapping[Name, ModelSettings] = Field(default_factory=dict)
    """By name of the model, such as `[models.digits]`: what this agent makes of it."""
    samples: SamplesSettings = SamplesSettings()
    """Hard examples, kept for whoever retrains the models."""
    privacy: PrivacySettings = PrivacySettings()
    """How far data from devices may go."""
    offload: OffloadSettings = OffloadSettings()
    """Asking the heavy tier when the local answer is not sure enough."""
    energy: EnergySettings = EnergySettings()
    """What the agent's work takes: measured where the machine tells, else by these figures, and always so labelled."""
    telemetry: TelemetrySettings = TelemetrySettings()
    """Traces."""
    outbox: OutboxSettings = OutboxSettings()
    """What is kept on disk while the controller or the heavy tier is away."""
    logs: LogSettings = LogSettings()
    """What the process writes to standard error."""

    @model_validator(mode="after")
    def _plain_faces_on_loopback_only(self) -> Self:
        for name, bind in (("grpc_bind", self.grpc_bind), ("http_bind", self.http_bind)):
            if bind is not None and not self.faces.tls and not is_loopback(parse_address(bind).host):
                raise ValueError(
                    f"{name}: expected a loopback address such as 127.0.0.1:7180 without TLS, got {bind!r}; "
                    "set [faces] tls = true"
                )
        return self


def load_settings(path: Path | None) -> AgentSettings:
    """Return the settings of the TOML file `path` (None: no file) under those of the environment.

    Raises:
        InvalidRequest: see `core.settings.load`.
    """
    return load(AgentSettings, path)
