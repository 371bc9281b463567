"""Everything that can be set about the controller, in one frozen object built at start and handed down in parts.

Values come from a TOML file and from environment variables, which win: `[heavy] port = 8000` is the same setting as
`NANOFLEET_HEAVY__PORT=8000`. A key that nobody knows is an error in both, named together with where it stands.
`NANOFLEET_AGENT_*` (the agent's settings), `NANOFLEET_CONTROLLER` and `NANOFLEET_CREDENTIAL` (where the CLI finds us
and who it is) and `NANOFLEET_SIGNING_KEY_*` (keys of the catalogue) are left alone.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_settings import SettingsConfigDict

from core.addresses import Address, is_loopback, parse_address
from core.errors import InvalidRequest
from core.logs import LogFormat
from core.settings import Count, Port, ProcessSettings, Ratio, Seconds, Section, load
from core.telemetry import DEFAULT_SAMPLE_RATIO, DEFAULT_SAMPLED_PER_S

_FOREIGN = ("NANOFLEET_AGENT_", "NANOFLEET_CONTROLLER", "NANOFLEET_CREDENTIAL", "NANOFLEET_SIGNING_KEY_")
_GIB = 1 << 30
_POSTGRESQL = "postgresql+psycopg"


def _address(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return parse_address(value)
    except InvalidRequest as error:
        raise ValueError(str(error)) from error


def _address_text(text: str) -> str:
    _address(text)
    return text


def _database_url(text: str) -> str:
    # Nothing of it is repeated: it may hold a password by mistake.
    if not text.startswith(("sqlite:///", f"{_POSTGRESQL}://")):
        raise ValueError(f"expected {_POSTGRESQL}://user@host:5432/name or sqlite:///path")
    parts = urlsplit(text)
    if parts.password is not None or "password" in parse_qs(parts.query):
        raise ValueError("expected no password in it; put it into a file and name that in database_password_file")
    return text


def _database_file(fields: dict[str, Any]) -> str:
    # Without a data_dir that is one, that is what is said to be wrong.
    return f"sqlite:///{fields.get('data_dir', Path()) / 'controller.sqlite'}"


AddressField = Annotated[Address, BeforeValidator(_address)]
BindAddress = Annotated[str, AfterValidator(_address_text)]


class HeavySettings(Section):
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

    @property
    def address(self) -> str:
        """Where the tier's HTTP face is, whoever runs it."""
        return self.url or f"http://127.0.0.1:{self.port}"

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.mode == "url" and self.url is None:
            raise ValueError("mode 'url' needs heavy.url, the address of the tier")
        if self.mode == "embedded" and self.url is not None:
            raise ValueError("heavy.url is set, but mode is 'embedded'; set heavy.mode to 'url' or remove heavy.url")
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"expected max_replicas of at least min_replicas {self.min_replicas}")
        return self


class TelemetrySettings(Section):
    """Traces: how many are recorded, how many are kept, where they go."""

    sample_ratio: Ratio = DEFAULT_SAMPLE_RATIO
    """Share of requests recorded among those that arrive without a sampling decision of their own."""
    sampled_per_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = DEFAULT_SAMPLED_PER_S
    """Traces a second that `sample_ratio` begins at most; a ratio of 1 means every request, however many."""
    slow_s: Seconds = 2.0
    """Seconds from which on a request to the gateway is traced whatever the sampling said; as long as agents wait."""
    keep_per_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0
    """Traces a second beyond the sampled ones, for each reason (slow, each kind of error); 0 for none."""
    max_spans: Annotated[int, Field(ge=100)] = 50_000
    """Spans kept for `GET /api/traces`; the oldest go first."""
    forward_to: AddressField | None = None
    """`host:port` of an OTLP/gRPC collector that gets every span as well; in the clear on loopback only, else TLS."""
    forward_authority: Path | None = None
    """PEM certificates of who vouches for the collector; the machine's trusted authorities when it is not set."""
    forward_certificate: Path | None = None
    """PEM chain that the collector is shown, with `forward_key`."""
    forward_key: Path | None = None
    """PEM key of `forward_certificate`."""
    forward_headers: Path | None = None
    """File of `name: value` lines that go with every request, such as credentials; read again when it changes."""
    forward_spool_bytes: Annotated[int, Field(ge=1 << 20, le=1 << 36)] = 256 << 20
    """Disk space for spans that the collector has not taken; the oldest go first. Some 300 bytes a span."""
    forward_max_age_s: Seconds = 86_400.0
    """Seconds that spans wait for the collector before they are given up."""

    @model_validator(mode="after")
    def _forwards_consistently(self) -> Self:
        if (self.forward_certificate is None) is not (self.forward_key is None):
            raise ValueError("expected forward_certificate and forward_key together, got one of them")
        named = (self.forward_authority, self.forward_certificate, self.forward_headers)
        if self.forward_to is None and any(path is not None for path in named):
            raise ValueError("forward_to is not set, and the files are for whom it names; set it or remove them")
        return self


class RegistrySettings(Section):
    """Bounds on publishing: what may be uploaded, and what checking and compressing it may cost."""

    max_model_bytes: Annotated[int, Field(ge=1)] = 2 * _GIB
    """Largest blob that may be uploaded, and largest sum of one model's files."""
    publish_timeout_s: Seconds = 600.0
    """Seconds for one step of a publication (checking, one recipe, one evaluation) before it is stopped."""
    publish_memory_bytes: Annotated[int, Field(ge=_GIB // 2)] = 4 * _GIB
    """Memory that the child process of one step may take."""
    max_queued_publications: Count = 16
    """Publications that may wait; one runs at a time, more are refused."""


class FleetSettings(Section):
    """Agents and their sessions."""

    max_sessions: Count = 10_000
    """Agents connected at one time; more are refused and try again later."""
    keepalive_s: Seconds = 60.0
    """Seconds between the keepalive pings of an idle session."""


class TransferSettings(Section):
    """Sending variants to agents."""

    max_transfers: Count = 64
    """Transfers under way at one time; further agents are told when to come back."""
    bytes_per_s: Annotated[int, Field(ge=0)] = 0
    """Bytes a second for all transfers together; 0: as fast as they are taken."""


class SamplesSettings(Section):
    """Hard examples that wait to be fetched by whoever pulled them."""

    pull_bytes: Annotated[int, Field(ge=1 << 20)] = 256 << 20
    """Bytes that one pull may bring."""
    spool_bytes: Annotated[int, Field(ge=1 << 20)] = 1 << 30
    """Disk space for all of them together."""


class AuditSettings(Section):
    """The record of who changed what."""

    max_entries: Annotated[int, Field(ge=1000)] = 100_000
    """Entries kept; the oldest go first."""
    kept_days: Annotated[int, Field(ge=1, le=36_500)] = 400
    """Days for which an entry is kept."""


class RecordSettings(Section):
    """What agents write down: usage by the hour, and what happened to them."""

    kept_days: Annotated[int, Field(ge=1, le=36_500)] = 400
    """Days for which it is kept."""
    max_events: Annotated[int, Field(ge=100)] = 10_000
    """Events kept of each agent; the oldest go first."""
    max_hours: Annotated[int, Field(ge=1000)] = 50_000
    """Hours of usage kept of each agent, one for each model and process; the oldest go first."""


class LogSettings(Section):
    """What the process says on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe records that are written."""
    format: LogFormat = "text"
    """`text` for a terminal, `json` for machines."""


class Settings(ProcessSettings):
    model_config = SettingsConfigDict(env_prefix="NANOFLEET_")

    data_dir: Annotated[Path, AfterValidator(Path.absolute)] = Field(
        default=Path("nanofleet-data"), validate_default=True
    )
    """Folder of the database and the blobs; made when missing."""
    database_url: Annotated[str, AfterValidator(_database_url)] = Field(default_factory=_database_file)
    """Where the records are: the file `controller.sqlite` in `data_dir`, or `postgresql+psycopg://user@host:5432/name`,
    a database of this controller alone. What libpq knows may follow after a `?`, such as `sslrootcert=/path`. On every
    host but loopback the server must prove itself (`sslmode=verify-full`), unless another `sslmode` stands there."""
    database_password_file: Path | None = None
    """File with the password for a PostgreSQL, read at every connection."""
    grpc_bind: BindAddress = "127.0.0.1:7443"
    """Where agents, gRPC inference clients and OTLP exporters connect; mutual TLS."""
    enrolment_bind: BindAddress = "127.0.0.1:7444"
    """Where agents get and renew their certificates; TLS that shows the controller's certificate only."""
    http_bind: BindAddress = "127.0.0.1:7080"
    """Where operators and HTTP inference clients connect; HTTPS on every address but loopback."""
    http_certificate: Path | None = None
    """PEM chain for HTTPS, with `http_key`; without one the controller shows a certificate of the fleet's authority."""
    http_key: Path | None = None
    """PEM key of `http_certificate`."""
    advertised_host: str | None = None
    """Host name or address by which agents reach this machine; needed where they connect to 0.0.0.0 or [::]."""
    trust_domain: Annotated[str, Field(pattern=r"^[a-z0-9._-]{1,255}$")] = "nanofleet.local"
    """SPIFFE trust domain: the name of the fleet in every certificate. It cannot be changed later."""
    heavy: HeavySettings = HeavySettings()
    """The tier that runs the large models."""
    telemetry: TelemetrySettings = TelemetrySettings()
    """Traces: how many are recorded, how many are kept, where they go."""
    registry: RegistrySettings = RegistrySettings()
    """Bounds on publishing."""
    fleet: FleetSettings = FleetSettings()
    """Agents and their sessions."""
    transfer: TransferSettings = TransferSettings()
    """Sending variants to agents."""
    records: RecordSettings = RecordSettings()
    """What agents write down."""
    samples: SamplesSettings = SamplesSettings()
    """Hard examples that wait to be fetched."""
    audit: AuditSettings = AuditSettings()
    """The record of who changed what."""
    logs: LogSettings = LogSettings()
    """What the process says on standard error."""

    @property
    def blobs_dir(self) -> Path:
        return self.data_dir / "blobs"

    @property
    def keys_dir(self) -> Path:
        return self.data_dir / "keys"

    @property
    def trace_spool_dir(self) -> Path:
        return self.data_dir / "trace-spool"

    @property
    def packs_dir(self) -> Path:
        return self.data_dir / "packs"

    @property
    def samples_dir(self) -> Path:
        return self.data_dir / "samples"

    @property
    def heavy_tls_dir(self) -> Path:
        return self.data_dir / "heavy" / "tls"

    @property
    def http_speaks_tls(self) -> bool:
        return self.http_certificate is not None or not is_loopback(parse_address(self.http_bind).host)

    def advertised(self, bound: Address) -> Address:
        """Return where agents reach a port that is bound here.

        Raises:
            InvalidRequest: it is bound to every address, and none is said to be the one.
        """
        if self.advertised_host is not None:
            return Address(self.advertised_host, bound.port)
        if bound.host in {"0.0.0.0", "::"}:  # noqa: S104 (recognised, not bound)
            raise InvalidRequest(
                f"advertised_host: expected the name by which agents reach this machine, because {bound} is every "
                "address; set advertised_host"
            )
        return bound

    @model_validator(mode="after")
    def _can_be_reached(self) -> Self:
        # Tokens name these two; nothing shall be made before it is known what they say.
        for bind in (self.grpc_bind, self.enrolment_bind):
            try:
                self.advertised(parse_address(bind))
            except InvalidRequest as error:
                raise ValueError(str(error)) from error
        return self

    @model_validator(mode="after")
    def _has_a_password_for_somebody(self) -> Self:
        if self.database_password_file is not None and not self.database_url.startswith(_POSTGRESQL):
            raise ValueError("database_password_file is set, but the database is a file; set database_url or remove it")
        return self

    @model_validator(mode="after")
    def _has_both_halves(self) -> Self:
        if (self.http_certificate is None) is not (self.http_key is None):
            raise ValueError("expected http_certificate and http_key together, got one of them")
        return self


def load_settings(path: Path | None) -> Settings:
    """Return the settings of the TOML file `path` (None: no file) under those of the environment.

    Raises:
        InvalidRequest: see `core.settings.load`.
    """
    return load(Settings, path, foreign=_FOREIGN)
