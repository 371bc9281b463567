"""The spans of one request at the gateway: `infer {model}` (SERVER), and `heavy` (CLIENT) while the tier is asked.

A sampled request has them from its start. One that was not sampled and failed or was slow is written down afterwards
(`core.keeping`), from the two times that its way took anyway.
"""

import asyncio
import time
from dataclasses import dataclass

from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context

from controller.registry.model import Variant
from core.clock import Clock
from core.errors import NanofleetError
from core.keeping import KEEP_ATTRIBUTE, Keep
from core.telemetry import Tracing, ancestry_of, traceparent_of

_MAX_NAME_CHARS = 64


@dataclass(slots=True)
class Passage:
    """Where a request is: filled in by the gateway as it goes. Instants of the monotonic clock, in seconds."""

    model: str
    traceparent: str | None
    started_s: float
    asked_s: float | None = None
    variant: Variant | None = None


class RequestSpans:
    """The spans of a request under way; `traceparent` of the client span goes on to the tier."""

    def __init__(self, tracing: Tracing, passage: Passage, keep: Keep, *, clock: Clock) -> None:
        self._tracer = tracing.tracer
        self._passage = passage
        # Spans want wall-clock nanoseconds.
        self._wall_offset_ns = time.time_ns() - round(clock.monotonic_s() * 1e9)
        context, links = ancestry_of(passage.traceparent)
        self._server = self._tracer.start_span(
            f"infer {passage.model[:_MAX_NAME_CHARS]}",
            context=context,
            kind=SpanKind.SERVER,
            links=links,
            attributes={"nanofleet.tier": "heavy", KEEP_ATTRIBUTE: keep.value},
            start_time=self._wall_ns(passage.started_s),
        )
        self._client: Span | None = None

    def ask(self) -> str:
        """Begin the client span at the time that the passage says; return its context."""
        assert self._passage.asked_s is not None
        self._client = self._tracer.start_span(
            "heavy",
            context=set_span_in_context(self._server),
            kind=SpanKind.CLIENT,
            start_time=self._wall_ns(self._passage.asked_s),
        )
        return traceparent_of(self._client)

    def end(self, error: BaseException | None = None) -> None:
        if (variant := self._passage.variant) is not None:
            self._server.set_attribute("nanofleet.model.digest", variant.manifest_digest)
            self._server.set_attribute("nanofleet.variant", variant.variant)
        for span in (self._client, self._server):
            if span is not None:
                _note(span, error)
                span.end()

    def _wall_ns(self, monotonic_s: float) -> int:
        return self._wall_offset_ns + round(monotonic_s * 1e9)


def keep_unsampled(tracing: Tracing, passage: Passage, error: BaseException | None, *, clock: Clock) -> None:
    """Write down a request that was not sampled and is over, if it failed or was slow and the rate permits it."""
    now_s = clock.monotonic_s()
    # Who leaves has waited for too long, or not: that is no error of this process.
    if error is not None and not isinstance(error, asyncio.CancelledError):
        keep, error_type = Keep.ERROR, _error_type(error)
    elif now_s - passage.started_s >= tracing.keeper.slow_s:
        keep, error_type = Keep.SLOW, ""
    else:
        return
    if not tracing.keeper.permits(keep, now_s=now_s, error_type=error_type):
        return
    spans = RequestSpans(tracing, passage, keep, clock=clock)
    if passage.asked_s is not None:
        spans.ask()
    spans.end(error)


def _error_type(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    return error.code.value if isinstance(error, NanofleetError) else type(error).__name__


def _note(span: Span, error: BaseException | None) -> None:
    if error is None:
        return
    span.set_attribute("error.type", _error_type(error))
    if not isinstance(error, asyncio.CancelledError):
        span.set_status(StatusCode.ERROR, str(error) if isinstance(error, NanofleetError) else "")
