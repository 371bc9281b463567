"""What an agent keeps and tells of its work: hard examples, energy, traces, what waits to be sent, logs."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from core.logs import LogFormat
from core.settings import Count, Ratio, Seconds, Section
from core.telemetry import DEFAULT_SAMPLE_RATIO, DEFAULT_SAMPLED_PER_S
from edge_agent.settings.kinds import Bytes, OptionalAddress, SecondsOrZero


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
    sampled_per_s: SecondsOrZero = DEFAULT_SAMPLED_PER_S
    """Traces a second that `sample_ratio` begins at most; a ratio of 1 means every request, however many."""
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
