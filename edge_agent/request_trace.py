"""The spans of one request that is traced: what the agent did with it, and when.

    process {model}  CONSUMER (or SERVER on the local face)
    ├── queue        from admission until the batch was taken
    ├── compute      the run that it shared
    └── offload      CLIENT: the large model was asked

A provisional answer is an event on the first span, which ends with the final one.

An unsampled request has none of this: `Tracing.is_sampled` is asked first, and the tracer is never touched. All of
it is written down afterwards (`core.span_log`), from the times that the batcher took anyway; an unsampled request that
failed or was slow gets its trace late, one that escalates before the heavy tier is asked (`core.keeping`).
"""

import time
from collections.abc import Mapping
from typing import Protocol

from opentelemetry.sdk.trace import Event
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode

from core.clock import Clock
from core.errors import NanofleetError
from core.keeping import KEEP_ATTRIBUTE, Keep
from core.manifest import Manifest
from core.span_log import Attribute, SpanLog
from core.telemetry import parent_of, traceparent_of

ERROR_TYPE = "error.type"
_WENT_WELL = Status(StatusCode.UNSET)
_FAILED = Status(StatusCode.ERROR)
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
        log: SpanLog,
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
        self._log = log
        self._queued_s = queued_s
        self._parent, self._links = parent_of(parent)
        self._name = f"{origin.operation} {manifest.model}"
        self._kind = origin.span_kind
        told = origin.span_attributes()
        self._attributes = {
            **(_anonymous(told) if is_private else told),
            "nanofleet.model.digest": digest,
            "nanofleet.variant": manifest.variant,
            KEEP_ATTRIBUTE: keep.value,
        }
        self._events: list[Event] = []
        self._context = log.new_context(self._parent)
        self.traceparent = traceparent_of(self._context)

    def ran(self, *, started_s: float, finished_s: float, batch_rows: int) -> None:
        started_ns = self._wall_ns(started_s)
        self._write_child("queue", start_ns=self._wall_ns(self._queued_s), end_ns=started_ns)
        rows = {"nanofleet.batch.rows": batch_rows}
        self._write_child("compute", start_ns=started_ns, end_ns=self._wall_ns(finished_s), attributes=rows)

    def answered_provisionally(self, *, at_s: float) -> None:
        self._events.append(Event("provisional answer", timestamp=self._wall_ns(at_s)))

    def offload(self, *, started_s: float) -> "OffloadSpan":
        return OffloadSpan(self._log, self._context, start_ns=self._wall_ns(started_s))

    def answered(self, attributes: Mapping[str, Attribute]) -> None:
        self._attributes.update(attributes)
        self._end(_WENT_WELL)

    def failed(self, error: BaseException) -> None:
        self._attributes[ERROR_TYPE] = error_type_of(error)
        self._end(_FAILED)

    def _end(self, status: Status) -> None:
        self._log.write(
            self._name,
            self._context,
            parent=self._parent,
            start_ns=self._wall_ns(self._queued_s),
            end_ns=time.time_ns(),
            kind=self._kind,
            attributes=self._attributes,
            links=self._links,
            events=self._events,
            status=status,
        )

    def _write_child(
        self, name: str, *, start_ns: int, end_ns: int, attributes: Mapping[str, Attribute] | None = None
    ) -> None:
        context = self._log.new_context(self._context)
        self._log.write(name, context, parent=self._context, start_ns=start_ns, end_ns=end_ns, attributes=attributes)

    def _wall_ns(self, monotonic_s: float) -> int:
        return self._wall_offset_ns + round(monotonic_s * 1e9)


class OffloadSpan:
    def __init__(self, log: SpanLog, parent: SpanContext, *, start_ns: int) -> None:
        self._log = log
        self._parent = parent
        self._start_ns = start_ns
        self._context = log.new_context(parent)
        self.traceparent = traceparent_of(self._context)

    def end(self, error: BaseException | None = None) -> None:
        self._log.write(
            "offload",
            self._context,
            parent=self._parent,
            start_ns=self._start_ns,
            end_ns=time.time_ns(),
            kind=SpanKind.CLIENT,
            attributes=None if error is None else {ERROR_TYPE: error_type_of(error)},
            status=_WENT_WELL if error is None else _FAILED,
        )


def _anonymous(attributes: Mapping[str, Attribute]) -> Mapping[str, Attribute]:
    return {name: value for name, value in attributes.items() if name not in _TELLING}


def error_type_of(error: BaseException) -> str:
    """Return the word for `error`: messages may quote what a peer sent, and payloads never stand on a span."""
    return error.code.value if isinstance(error, NanofleetError) else type(error).__name__
