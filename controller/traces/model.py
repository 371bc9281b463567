"""Spans and traces as values. Times are microseconds since the epoch, durations microseconds."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

AttributeValue = bool | int | float | str


class SpanKind(StrEnum):
    INTERNAL = "internal"
    SERVER = "server"
    CLIENT = "client"
    PRODUCER = "producer"
    CONSUMER = "consumer"


@dataclass(frozen=True, slots=True)
class SpanRecord:
    """One finished span. Ids are lower-case hexadecimal, 32 and 16 digits.

    `service` and `instance` are the resource's service.name and service.instance.id; `attributes` holds the span's own
    and the resource's `nanofleet.*`.
    """

    trace_id: str
    span_id: str
    parent_span_id: str | None
    name: str
    kind: SpanKind
    service: str
    instance: str
    start_us: int
    duration_us: int
    is_error: bool
    attributes: Mapping[str, AttributeValue]


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """One line of the list of traces. `root_name` is the earliest span without a known parent."""

    trace_id: str
    root_name: str
    start_us: int
    # From the first start to the last end of any span that is here.
    duration_us: int
    services: tuple[str, ...]
    span_count: int
    has_error: bool


@dataclass(frozen=True, slots=True)
class TraceFilter:
    """Which traces: those with a span of `service`, and with a span about `model`; None takes all."""

    limit: int = 20
    service: str | None = None
    model: str | None = None


@dataclass(frozen=True, slots=True)
class SpanLine:
    """What statistics need of one stored span; `row` grows with every span that is stored."""

    row: int
    trace_id: str
    service: str
    name: str
    start_us: int
    duration_us: int
    is_error: bool
    # None: the span does not say.
    site: str | None = None
    is_escalated: bool | None = None


def span_names_about(model: str) -> tuple[str, ...]:
    """Return the names of the spans that carry a request for `model`: device, agent, and gateway or replica."""
    return f"ask {model}", f"process {model}", f"infer {model}"
