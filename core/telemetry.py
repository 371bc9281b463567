"""OpenTelemetry in every process: one tracer per service, W3C context, spans out over OTLP/gRPC.

Sampling is decided first: `Tracing.is_sampled` costs one string look-up, and an unsampled request never touches the
tracer's API (an unrecorded span still costs about 20 us in Python, more than running a small model). Of those, some
are kept all the same (`core.keeping`).
"""

import math
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import grpc
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SynchronousMultiSpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, TraceFlags, Tracer

from core.addresses import Address
from core.grpc_transport import TlsIdentity
from core.keeping import KEEP_NOTHING, Keeper, KeepRule
from core.span_export import OtlpSpanExporter
from core.span_log import SpanLog
from core.token_bucket import Rate, TokenBucket

TRACEPARENT = "traceparent"
# Head sampling of requests that arrive without a decision of their own.
DEFAULT_SAMPLE_RATIO = 0.05
# Chosen: enough to see a busy process by. An agent with 6,000 requests a second would else send 900 spans a second,
# some 270 kB, and fill by itself in a minute what its controller keeps of the whole fleet (derived).
DEFAULT_SAMPLED_PER_S = 20.0
# W3C Trace Context, section 3.2: version, 32 and 16 lower-case hexadecimal digits, flags. Version ff is invalid; a
# later version than 00 may have more behind a dash, which is to be left alone (section 4.3).
_PATTERN = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_LATER_PATTERN = re.compile(r"(?!00|ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.{0,200})?")
_SCOPE = "nanofleet"
# Where the lowest digit of the flags stands; its lowest bit is "sampled".
_FLAGS_DIGIT = 54


@dataclass(frozen=True, slots=True)
class TracingSettings:
    """`endpoint` None: spans are made and propagated, but leave the process nowhere.

    `sampled_per_s` bounds the traces that `sample_ratio` begins; at 1, which wants every request, it does not. `keep`
    says what is traced beyond them; nothing, by default.
    """

    endpoint: Address | None = None
    sample_ratio: float = DEFAULT_SAMPLE_RATIO
    sampled_per_s: float = DEFAULT_SAMPLED_PER_S
    keep: KeepRule = KEEP_NOTHING


class Tracing:
    """The tracer of one process, and the sampling decision for its requests."""

    def __init__(
        self,
        service: str,
        settings: TracingSettings,
        *,
        attributes: Mapping[str, str] | None = None,
        credentials: grpc.ChannelCredentials | TlsIdentity | None = None,
        exporter: SpanExporter | None = None,
        uniform: Callable[[], float] = random.random,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`exporter` takes the place of OTLP to `settings.endpoint`, for a process that receives spans itself."""
        resource = Resource.create({"service.name": service, **(attributes or {})})
        # Sampling is decided by `is_sampled`; whoever calls the tracer wants the span.
        processors = SynchronousMultiSpanProcessor()  # type: ignore[no-untyped-call]  # without annotations
        self._provider = TracerProvider(resource=resource, sampler=ALWAYS_ON, active_span_processor=processors)
        self._sample_ratio = settings.sample_ratio
        self.keeper = Keeper(settings.keep)
        self._uniform = uniform
        self._now_s = now_s
        rate = Rate(settings.sampled_per_s, math.ceil(settings.sampled_per_s))
        self._sampled = TokenBucket(rate, now_s=now_s()) if settings.sample_ratio < 1 else None
        self._otlp: OtlpSpanExporter | None = None
        if exporter is None and settings.endpoint is not None:
            exporter = self._otlp = OtlpSpanExporter(settings.endpoint, credentials=credentials)
        self._follows = self._otlp is not None and isinstance(credentials, TlsIdentity)
        if exporter is not None:
            self._provider.add_span_processor(
                BatchSpanProcessor(
                    exporter, max_queue_size=8192, schedule_delay_millis=1000, export_timeout_millis=5000
                )
            )
        self.tracer: Tracer = self._provider.get_tracer(_SCOPE)
        self.log = SpanLog(resource, processors, scope=_SCOPE)

    def is_sampled(self, traceparent: str | None) -> bool:
        """Say whether this request is recorded: as its caller decided, otherwise by ratio and rate of head sampling."""
        if traceparent is not None and len(traceparent) > _FLAGS_DIGIT:
            if traceparent[_FLAGS_DIGIT] in "02468ace":
                return False
            if parse_traceparent(traceparent) is not None:
                return True
        if self._uniform() >= self._sample_ratio:
            return False
        return self._sampled is None or self._sampled.take(self._now_s())

    def follow(self, credentials: TlsIdentity) -> None:
        """Send spans with `credentials` from now on; nothing happens where they left without a TlsIdentity."""
        if self._otlp is not None and self._follows:
            self._otlp.replace(credentials)

    def keep_undelivered(self, keep: Callable[[bytes], None]) -> None:
        """Have `keep` given each batch of spans that its receiver may take later; see `OtlpSpanExporter`."""
        if self._otlp is not None:
            self._otlp.keep_undelivered(keep)

    def shutdown(self) -> None:
        """Export what is left and stop; blocks for a few seconds at most."""
        self._provider.shutdown()


def parent_context(traceparent: str | None) -> Context:
    """Return the context of a remote parent; a missing or malformed value starts a new trace (W3C, section 4.3)."""
    return _context_of(None if traceparent is None else parse_traceparent(traceparent))


def ancestry_of(traceparent: str | None) -> tuple[Context, Sequence[Link]]:
    """Return `parent_of` with its first part as a context."""
    parent, links = parent_of(traceparent)
    return _context_of(parent), links


def parent_of(traceparent: str | None) -> tuple[SpanContext | None, Sequence[Link]]:
    """Return the span under which a request's first span here stands, and what it links to.

    A caller that says "not sampled" has recorded nothing that a span could stand under, and the decision is its own
    (W3C Trace Context, section 3.2.3.3.1): a request that is kept all the same gets a trace of its own, with a link.
    """
    caller = parse_traceparent(traceparent) if traceparent is not None else None
    if caller is None or caller.trace_flags.sampled:
        return caller, ()
    return None, (Link(caller),)


def _context_of(parent: SpanContext | None) -> Context:
    return Context() if parent is None else trace.set_span_in_context(NonRecordingSpan(parent), Context())


def parse_traceparent(value: str) -> SpanContext | None:
    """Return the remote span that `value` names; None: it is malformed."""
    match = _PATTERN.fullmatch(value) or _LATER_PATTERN.fullmatch(value)
    if match is None:
        return None
    trace_id, span_id, flags = (int(digits, 16) for digits in match.groups())
    context = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags))
    return context if context.is_valid else None


def traceparent_of(span: Span | SpanContext) -> str:
    context = span if isinstance(span, SpanContext) else span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
