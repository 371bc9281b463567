"""The spans of one request that is traced: what the agent did with it, and when.

    process {model}  CONSUMER (or SERVER on the local face)
    ├── queue        from admission until the batch was taken
    ├── compute      the run that it shared
    └── offload      CLIENT: the large model was asked

A provisional answer is an event on the first span, which ends with the final one.

An unsampled request has none of this: `Tracing.is_sampled` is asked first, and the tracer is never touched. `queue` and
`compute` are written down afterwards from the times that the batcher took anyway; so is all of an unsampled request
that failed or was slow, while one that escalates gets its trace before the heavy tier is asked (`core.keeping`).
"""

import time
from collections.abc import Mapping
from typing import Protocol

from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context

from core.clock import Clock
from core.errors import NanofleetError
from core.keeping import KEEP_ATTRIBUTE, Keep
from core.manifest import Manifest
from core.telemetry import ancestry_of, traceparent_of

Attribute = str | bool | int | float
# What tells of a request whose data stay on the device. The topic of a 3.1.1 request ends in the client and its id.
_TELLING = frozenset({"messaging.client.id", "messaging.destination.name", "messaging.message.body.size"})


class Origin(Protocol):
    """The face that a request came through, as its span tells it."""

    @property
    def operation(self) -> str: ...
    @property
    def span_kind(self) -> SpanKind: ...
    def span_attributes(self) -> Mapping[str, Attribute]: ...


class RequestTrace:
    def __init__(
        self,
        tracer: Tracer,
        clock: Clock,
        *,
        manifest: Manifest,
        digest: str,
        origin: Origin,
        parent: str | None,
        queued_s: float,
        keep: Keep,
        is_private: bool = False,
    ) -> None:
        """`is_private`: who asked, under which topic and with how much stays here."""
        # Spans want wall-clock nanoseconds, the batcher measures on the monotonic clock.
        self._wall_offset_ns = time.time_ns() - round(clock.monotonic_s() * 1e9)
        self._tracer = tracer
        self._queued_s = queued_s
        context, links = ancestry_of(parent)
        self._span = tracer.start_span(
            f"{origin.operation} {manifest.model}",
            context=context,
            kind=origin.span_kind,
            links=links,
            attributes={
                **(_anonymous(origin.span_attributes()) if is_private else origin.span_attributes()),
                "nanofleet.model.digest": digest,
                "nanofleet.variant": manifest.variant,
                KEEP_ATTRIBUTE: keep.value,
            },
            start_time=self._wall_ns(queued_s),
        )
        self.traceparent = traceparent_of(self._span)

    def ran(self, *, started_s: float, finished_s: float, batch_rows: int) -> None:
        self._child("queue", started_s=self._queued_s).end(self._wall_ns(started_s))
        compute = self._child("compute", started_s=started_s)
        compute.set_attribute("nanofleet.batch.rows", batch_rows)
        compute.end(self._wall_ns(finished_s))

    def answered_provisionally(self, *, at_s: float) -> None:
        self._span.add_event("provisional answer", timestamp=self._wall_ns(at_s))

    def offload(self, *, started_s: float) -> "OffloadSpan":
        return OffloadSpan(self._child("offload", started_s=started_s, kind=SpanKind.CLIENT))

    def answered(self, attributes: Mapping[str, Attribute]) -> None:
        self._span.set_attributes(attributes)
        self._span.end()

    def failed(self, error: BaseException) -> None:
        _record(self._span, error)
        self._span.end()

    def _child(self, name: str, *, started_s: float, kind: SpanKind = SpanKind.INTERNAL) -> Span:
        context = set_span_in_context(self._span)
        return self._tracer.start_span(name, context=context, kind=kind, start_time=self._wall_ns(started_s))

    def _wall_ns(self, monotonic_s: float) -> int:
        return self._wall_offset_ns + round(monotonic_s * 1e9)


class OffloadSpan:
    def __init__(self, span: Span) -> None:
        self._span = span
        self.traceparent = traceparent_of(span)

    def end(self, error: BaseException | None = None) -> None:
        if error is not None:
            _record(self._span, error)
        self._span.end()


def _anonymous(attributes: Mapping[str, Attribute]) -> Mapping[str, Attribute]:
    return {name: value for name, value in attributes.items() if name not in _TELLING}


def error_type_of(error: BaseException) -> str:
    """Return the word for `error`: messages may quote what a peer sent, and payloads never stand on a span."""
    return error.code.value if isinstance(error, NanofleetError) else type(error).__name__


def _record(span: Span, error: BaseException) -> None:
    span.set_attribute("error.type", error_type_of(error))
    span.set_status(Status(StatusCode.ERROR))
