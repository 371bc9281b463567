"""Everything that can be set about an agent, in one frozen object built at start and handed down in parts.

Values come from a TOML file and from environment variables, which win: `[mqtt] port = 1883` is the same setting as
`NANOFLEET_AGENT_MQTT__PORT=1883`. A key that nobody knows is an error in both. Durations are in seconds (`_s`), sizes
in bytes (`_bytes`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_settings import SettingsConfigDict

from core.addresses import BindAddress, LoopbackAddress, is_loopback, parse_address
from core.errors import InvalidRequest
from core.ids import Name
from core.logs import LogFormat
from core.privacy import PrivacyClass
from core.settings import Count, Port, ProcessSettings, Ratio, Seconds, Section, load
from core.telemetry import DEFAULT_SAMPLE_RATIO


def _dialled(text: str | None) -> str | None:
    if text is not None:
        try:
            parse_address(text)
        except InvalidRequest as error:
            raise ValueError(str(error)) from error
    return text


def _none_when_empty(value: object) -> object:
    """Neither TOML nor an environment variable can say None."""
    return None if value == "" else value


OptionalAddress = Annotated[LoopbackAddress | None, BeforeValidator(_none_when_empty)]
OptionalBindAddress = Annotated[BindAddress | None, BeforeValidator(_none_when_empty)]
OptionalDialledAddress = Annotated[str | None, BeforeValidator(_none_when_empty), AfterValidator(_dialled)]
SecondsOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=1)]
OptionalPath = Annotated[Path | None, BeforeValidator(_none_when_empty)]
OptionalName = Annotated[str | None, BeforeValidator(_none_when_empty)]


class MqttTlsSettings(Section):
    """How this agent and its broker prove to each other who they are."""

    enabled: bool = False
    """True: TLS with the agent's own certificate; needed on every host but loopback."""
    ca_file: OptionalPath = None
    """Authorities that may vouch for the broker, in PEM; those of the fleet when it is not set."""
    server_name: OptionalName = None
    """The name or address that the broker's certificate must be for; `host` when it is not set."""


class MqttSettings(Section):
    """The broker through which devices reach this agent."""

    enabled: bool = True
    """False: no broker; requests come over the local gRPC face only."""
    host: Annotated[str, Field(min_length=1, max_length=253)] = "127.0.0.1"
    """Where the broker listens; without TLS on loopback only."""
    port: Port = 1883
    """Port of the broker; 8883 is the usual one for TLS."""
    tls: MqttTlsSettings = MqttTlsSettings()
    """How this agent and its broker prove to each other who they are."""
    require_client_topic: Annotated[bool | None, BeforeValidator(_none_when_empty)] = None
    """True: only requests whose topic names the client that asks, which the broker's access list vouches for.

    When it is not set: with TLS yes, without it no. Set it where devices reach the same broker over TLS.
    """
    share_group: Name = "nf"
    """Under which name the agents of a site share requests to `any`; the same for all of them.

    Whoever joins the group takes requests from the others, though a broker with our access list lets nobody else read
    them: where devices are not trusted, make it a word that they do not know.
    """
    protocol: Literal[5, 4] = 5
    """MQTT version towards the broker: 5, or 4 for a broker that speaks 3.1.1 only."""
    keepalive_s: Annotated[int, Field(ge=5, le=3600)] = 30
    """Seconds of silence after which either end takes the connection for dead (times 1.5)."""
    reconnect_base_s: Seconds = 0.5
    """Base of the full-jitter delay between attempts to reach the broker."""
    reconnect_cap_s: Seconds = 15.0
    """Longest delay between attempts to reach the broker."""
    max_in_flight: Count = 512
    """Requests from devices under way at one time; more are refused with status 429."""
    max_body_bytes: Bytes = 4 << 20
    """Largest request body; larger ones are refused with status 413."""
    remembered_replies: Count = 4096
    """Replies kept until their request expires, to answer redeliveries without running the model again."""
    remembered_bytes: Bytes = 16 << 20
    """Memory that the remembered replies may take."""
    verdict_expiry_s: Seconds = 3600.0
    """How long the broker keeps the reply to a deferred escalation for a client that is away when it comes."""

    @model_validator(mode="after")
    def _tls_beyond_loopback(self) -> Self:
        if not self.tls.enabled and not is_loopback(self.host):
            raise ValueError(
                f"host: expected a loopback host such as 127.0.0.1 without TLS, got {self.host!r}; "
                "set [mqtt.tls] enabled = true"
            )
        return self

    @property
    def requires_client(self) -> bool:
        """Whether a request must name its client in its topic."""
        return self.tls.enabled if self.require_client_topic is None else self.require_client_topic


class LinkSettings(Section):
    """The stream to the controller."""

    reconnect_base_s: Seconds = 1.0
    """Base of the full-jitter delay between connection attempts."""
    reconnect_cap_s: Seconds = 120.0
    """Longest delay between connection attempts."""
    first_delay_s: SecondsOrZero = 1.0
    """Upper bound of the random delay before the first connection, so that a power cut's end makes no stampede."""
    handshake_timeout_s: Seconds = 10.0
    """Seconds that the controller may take to answer the hello."""
    write_timeout_s: Seconds = 20.0
    """Seconds that the controller may take to accept one message."""


class SyncSettings(Section):
    """Fetching models from the controller."""

    chunk_timeout_s: Seconds = 120.0
    """Seconds without a word after which a transfer is given up, to be resumed later.

    A chunk of up to 1 MiB counts once it is here as a whole: within the default a link of 70 kbit/s brings it. Less
    notices sooner that a controller is stuck; a link that is down is noticed by pings.
    """
    reserve_bytes: Annotated[int, Field(ge=0)] = 64 << 20
    """Disk space that a fetch must leave free."""
    max_attempts: Count = 5
    """Attempts on a slot whose failures may pass before the push is answered with the problem; they go on after it."""
    retry_base_s: Seconds = 0.5
    """Base of the full-jitter delay between those attempts."""
    retry_cap_s: Seconds = 30.0
    """Longest delay between those attempts, and the pace of those after them."""


class FacesSettings(Section):
    """The agent's own faces, for programs beside it: Open Inference over HTTP (`http_bind`) and gRPC (`grpc_bind`)."""

    tls: bool = False
    """True: both speak TLS only, with the agent's certificate, to devices and applications that show one of the fleet.

    Needed to bind them beyond loopback.
    """


class ActivationSettings(Section):
    """Between a model's first request and the word that it stays."""

    probation_s: SecondsOrZero = 600.0
    """Seconds that a new model serves while the one before it is kept at hand."""
    probation_requests: Count = 1000
    """Requests that end the probation earlier."""
    max_error_ratio: Ratio = 0.05
    """Share of failed requests above which a model on probation is rolled back."""
    self_test_timeout_s: Seconds = 60.0
    """Seconds that the self-test of a variant may take."""


class RuntimeSettings(Section):
    """How models run."""

    intra_op_threads: Annotated[int, Field(ge=1, le=256)] = 1
    """Threads inside one run; small models are fastest with one.

    More are shared by all models, and so many fewer run at one time. They keep their cores busy for about 5 ms after a
    run, which ONNX Runtime does not let us switch off: not for a battery.
    """
    max_batch: Annotated[int, Field(ge=1, le=1024)] = 32
    """Most requests in one run, for models that allow batching; a model's own limit may be lower."""
    max_batch_wait_s: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.005
    """Longest wait in seconds for others to share a run, where the average answer comes sooner for it.

    Measured run times and the rate of requests decide that; 0 takes only what waits already.
    """
    max_queue: Count = 256
    """Requests that may wait per model; beyond it the client with the most gives way (status 429)."""
    reply_reserve_s: SecondsOrZero = 0.02
    """Part of a request's deadline that is kept back for the way to and from the device; at most a quarter of it."""
    drain_timeout_s: Seconds = 10.0
    """Seconds that a replaced model gets to finish its requests."""


class ResidencySettings(Section):
    """Which of the models that this agent runs are in memory."""

    budget_bytes: Annotated[int | None, Field(ge=1), BeforeValidator(_none_when_empty)] = None
    """Memory that models may take together; unset: what is available at start, less `reserve_bytes`.

    Available is what the kernel says, and what the limits of the cgroups above leave. What a model takes is measured.
    """
    reserve_bytes: Annotated[int, Field(ge=0)] = 64 << 20
    """Memory that a load must leave available on this machine, whatever the budget says."""
    protect_s: SecondsOrZero = 0.1
    """Seconds after its load that a model stays; only one that has waited for as long comes in its place."""
    protect_loads: SecondsOrZero = 1.0
    """The same in times what its load took, where that is longer; 1: no place loads for over half of the time."""
    max_wait_s: Seconds = 30.0
    """Seconds that a model waits for room, after which its requests are refused."""


# A name of a client, or a pattern of the shell for several.
ClientPattern = Annotated[str, Field(min_length=1, max_length=128)]


class PrivacySettings(Section):
    """How far data from devices may go, whatever their requests say; the strictest word counts."""

    default: PrivacyClass = "any"
    """For devices that `devices` does not name, and for requests that name no client."""
    devices: Annotated[Mapping[ClientPattern, PrivacyClass], Field(max_length=1000)] = Field(default_factory=dict)
    """By the client's name as in its topics, or a shell pattern such as `"ward-*"`."""


class ModelSettings(Section):
    """What this agent makes of one model, beyond what the model's manifest says."""

    privacy: PrivacyClass = "any"
    """Where the data of requests to this model may go, whatever else they say; the strictest word counts."""
    pinned: bool = False
    """True: once loaded, it never leaves memory."""
    prewarm: bool = False
    """True: after a start it stays in memory before models that nobody asked for, as if it was asked once just now."""
    cache_bytes: Annotated[int, Field(ge=0)] = 0
    """Memory for answers to be given again to equal requests; 0: none are kept."""
    samples: bool | None = None
    """True: hard examples of this model are kept, False: not; when it is not set, as `[samples] enabled` says."""


class SamplesSettings(Section):
    """Hard examples: requests that a model was not sure of, kept on this disk for whoever retrains it."""

    enabled: bool = False
    """True: those of every model are kept, unless `[models.NAME] samples` says no. They hold what devices sent."""
    keep_site: bool = False
    """True: also of requests that may not leave the site; such samples are exported on this machine only."""
    max_below: Ratio = 1.0
    """How far below the cascade's threshold a confidence may be; 1.0 for any. Flawed answers have none and count."""
    max_above: Ratio = 0.0
    """How far above it: answers that the model was barely sure of, which nobody else looked at; 0 for none."""
    max_per_class_per_hour: Count = 10
    """Samples of one predicted class that a model keeps of an hour, drawn evenly from all there were."""
    max_per_hour: Count = 100
    """Samples that a model keeps of an hour."""
    max_samples: Annotated[int, Field(ge=1, le=100_000)] = 2000
    """Samples on disk; the oldest go first."""
    max_bytes: Bytes = 64 << 20
    """Bytes on disk; the oldest go first."""
    max_age_s: Seconds = 14 * 86_400.0
    """Seconds for which a sample is kept."""
    reserve_bytes: Annotated[int, Field(ge=0)] = 64 << 20
    """Disk space that samples must leave free."""
    upload_bytes_per_s: Annotated[int, Field(ge=0)] = 1 << 20
    """Bytes a second that samples may take of the link when somebody pulls them; 0: as fast as they are taken."""


class OffloadSettings(Section):
    """Asking the heavy tier when the local answer is not sure enough."""

    default_timeout_s: Seconds = 2.0
    """Seconds that the heavy tier may take for a request without a deadline of its own."""
    reply_reserve_s: SecondsOrZero = 0.02
    """Part of a request's deadline that is kept back for sending the reply."""
    max_in_flight: Count = 64
    """Escalations under way at one time; beyond it the edge answers."""


class EnergySettings(Section):
    """What the agent's work takes: measured where the machine tells, else by these figures, and always so labelled."""

    enabled: bool = True
    """False: nothing is read or said of energy."""
    idle_watts: Annotated[float, Field(ge=0, le=100_000, allow_inf_nan=False)] = 2.0
    """Power of the whole machine at rest, for method `model` only; the default suits a single-board computer."""
    max_watts: Annotated[float, Field(ge=0, le=100_000, allow_inf_nan=False)] = 7.0
    """Power of the whole machine with every processor busy, for method `model` only."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max_watts < self.idle_watts:
            raise ValueError(f"max_watts: expected at least idle_watts, {self.idle_watts:g}, got {self.max_watts:g}")
        return self


class TelemetrySettings(Section):
    """Traces."""

    export: bool = True
    """False: spans are propagated, but not sent anywhere."""
    endpoint: OptionalAddress = None
    """OTLP/gRPC receiver as host:port; the controller when it is not set."""
    sample_ratio: Ratio = DEFAULT_SAMPLE_RATIO
    """Share of requests that are recorded when the device has not decided."""
    slow_s: Seconds = 0.5
    """Seconds from which on a request is traced whatever the sampling said; small models take milliseconds."""
    keep_per_s: SecondsOrZero = 0.5
    """Traces a second beyond the sampled ones, for each reason (escalated, slow, each kind of error); 0 for none.

    Ten at once are always kept. By default 2,000 agents in one outage send no more than their controller can store.
    """


class OutboxKindSettings(Section):
    """How much of one kind is kept; the oldest go first, and are counted."""

    max_rows: Count
    """Most rows."""
    max_bytes: Annotated[int, Field(ge=1 << 14)]
    """Most bytes, with what the database adds to each row."""
    max_age_s: Seconds
    """Seconds after which a row is of no use any more."""


_DAY_S = 86_400.0


class OutboxSettings(Section):
    """What is kept on disk while the controller or the heavy tier is away, and how it leaves afterwards."""

    max_bytes: Annotated[int, Field(ge=1 << 16)] = 40 << 20
    """Most bytes of all kinds together; telemetry goes first, then escalations, audit and usage."""
    min_free_bytes: Annotated[int, Field(ge=0)] = 16 << 20
    """Disk space that the outbox leaves free: with less it keeps few rows, in memory only."""
    escalation: OutboxKindSettings = OutboxKindSettings(max_rows=20_000, max_bytes=32 << 20, max_age_s=7 * _DAY_S)
    """Escalations that their devices marked as deferrable."""
    audit: OutboxKindSettings = OutboxKindSettings(max_rows=5_000, max_bytes=2 << 20, max_age_s=90 * _DAY_S)
    """What the agent did that an operator wants to know."""
    usage: OutboxKindSettings = OutboxKindSettings(max_rows=10_000, max_bytes=4 << 20, max_age_s=90 * _DAY_S)
    """What became of requests, by hour and model; three models make 2,160 rows in thirty days."""
    telemetry: OutboxKindSettings = OutboxKindSettings(max_rows=4_000, max_bytes=8 << 20, max_age_s=3 * _DAY_S)
    """Spans that could not be exported."""
    spread_s: SecondsOrZero = 30.0
    """After an absence the first delivery comes within so many seconds, at random: a fleet comes back at once."""
    interval_s: Seconds = 1.0
    """Least time between two deliveries of one kind."""
    retry_base_s: Seconds = 2.0
    """Base of the full-jitter delay after a delivery that failed."""
    retry_cap_s: Seconds = 300.0
    """Longest delay after a delivery that failed."""
    probe_first_s: Seconds = 5.0
    """Seconds between the first probes of a heavy tier that is away; the intervals grow from there."""
    probe_cap_s: Seconds = 60.0
    """Longest interval between probes."""


class LogSettings(Section):
    """What the process writes to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe records that are written."""
    format: LogFormat = "text"
    """`text` for a terminal, `json` for machines."""


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
