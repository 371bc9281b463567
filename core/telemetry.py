"""OpenTelemetry in every process: one tracer per service, W3C context, spans out over OTLP/gRPC.

Sampling is decided first: `Tracing.is_sampled` costs one string look-up, and an unsampled request never touches the
tracer's API (an unrecorded span still costs about 20 us in Python, more than running a small model).
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass

import grpc
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, TraceFlags, Tracer

from core.addresses import Address

TRACEPARENT = "traceparent"
# Head sampling of requests that arrive without a decision of their own.
DEFAULT_SAMPLE_RATIO = 0.05
# W3C Trace Context, section 3.2: version 00, 32 + 16 hexadecimal digits, flags.
_TRACEPARENT_LENGTH = 55


@dataclass(frozen=True, slots=True)
class TracingSettings:
    """`endpoint` None: spans are made and propagated, but leave the process nowhere."""

    endpoint: Address | None = None
    sample_ratio: float = DEFAULT_SAMPLE_RATIO


class Tracing:
    """The tracer of one process, and the sampling decision for its requests."""

    def __init__(
        self,
        service: str,
        settings: TracingSettings,
        *,
        attributes: Mapping[str, str] | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        resource = Resource.create({"service.name": service, **(attributes or {})})
        # Sampling is decided by `is_sampled`; whoever calls the tracer wants the span.
        self._provider = TracerProvider(resource=resource, sampler=ALWAYS_ON)
        self._sample_ratio = settings.sample_ratio
        if settings.endpoint is not None:
            exporter = OTLPSpanExporter(
                endpoint=f"http://{settings.endpoint}", credentials=credentials, insecure=credentials is None, timeout=5
            )
            self._provider.add_span_processor(
                BatchSpanProcessor(
                    exporter, max_queue_size=8192, schedule_delay_millis=1000, export_timeout_millis=5000
                )
            )
        self.tracer: Tracer = self._provider.get_tracer("nanofleet")

    def is_sampled(self, traceparent: str | None) -> bool:
        """Say whether this request is recorded: as its caller decided, otherwise by the head-sampling ratio."""
        if traceparent is None or len(traceparent) != _TRACEPARENT_LENGTH:
            return self._sample_ratio > 0 and random.random() < self._sample_ratio
        return traceparent[-1] in "13579bdf"

    def shutdown(self) -> None:
        """Export what is left and stop; blocks for a few seconds at most."""
        self._provider.shutdown()


def parent_context(traceparent: str | None) -> Context:
    """Return the context of a remote parent; a missing or malformed value starts a new trace (W3C, section 4.3)."""
    context = parse_traceparent(traceparent) if traceparent is not None else None
    return Context() if context is None else trace.set_span_in_context(NonRecordingSpan(context), Context())


def parse_traceparent(value: str) -> SpanContext | None:
    version, _, rest = value.partition("-")
    parts = rest.split("-")
    if len(value) != _TRACEPARENT_LENGTH or version != "00" or [len(part) for part in parts] != [32, 16, 2]:
        return None
    try:
        trace_id, span_id, flags = (int(part, 16) for part in parts)
    except ValueError:
        return None
    context = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags))
    return context if context.is_valid else None


def traceparent_of(span: Span) -> str:
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
