"""Spans out over OTLP/gRPC (opentelemetry-proto, collector/trace/v1): one unary call per batch, from the batch thread.

In place of the exporter of `opentelemetry-exporter-otlp-proto-grpc`, with that package's encoder: its exporter brings
the whole metrics SDK (2.2 MB of an agent's memory, measured), tries again for seconds when a process wants to end, and
logs every attempt. A batch that cannot be delivered is handed to whoever wants to try later (`keep_undelivered`), or
dropped; the first of an outage is logged. A receiver that refuses a batch for good is not asked again (OTLP 1.9,
"OTLP/gRPC Failures": the retryable codes).
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence

import grpc
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import TraceServiceStub
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from core.addresses import Address
from core.grpc_transport import MUTUAL_TLS_OPTIONS, TlsIdentity
from core.logs import peer_text

EXPORT_TIMEOUT_S = 5.0
# Encoding takes some 25 us a span, all of it under the interpreter's lock: 512 at once kept an event loop waiting for
# 20 ms (99th percentile of an agent at half its load, measured; a few at a time with pauses 4 to 5 ms).
_SPANS_AT_ONCE = 4
_PAUSE_S = 1e-3
# A batch that comes sooner after the last one has others behind it. Chosen: far below the time that spans gather.
_BACKLOG_S = 0.02
# Those that OTLP calls retryable.
_LATER = frozenset(
    {
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)

_log = logging.getLogger(__name__)


class OtlpSpanExporter(SpanExporter):
    """Owned and called by one BatchSpanProcessor.

    `credentials` None speaks in the clear; with a TlsIdentity the peer must be the fleet's controller.
    """

    def __init__(self, endpoint: Address, *, credentials: grpc.ChannelCredentials | TlsIdentity | None = None) -> None:
        self._endpoint = str(endpoint)
        self._lock = threading.Lock()
        self._replacement: TlsIdentity | None = None
        self._is_failing = False
        self._finished_s = -math.inf
        self._keep: Callable[[bytes], None] | None = None
        self._open(credentials)

    def keep_undelivered(self, keep: Callable[[bytes], None]) -> None:
        """Have `keep` given, on the batch thread, each serialized ExportTraceServiceRequest that may be sent later."""
        self._keep = keep

    def replace(self, credentials: TlsIdentity) -> None:
        """Send from the next batch on with `credentials`; may be called from any thread."""
        with self._lock:
            self._replacement = credentials

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            return self._export(spans)
        finally:
            self._finished_s = time.monotonic()

    def _export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._follow()
        request = self._encoded(spans)
        try:
            self._stub.Export(request, timeout=EXPORT_TIMEOUT_S)
        except grpc.RpcError as error:
            is_kept = self._keep is not None and error.code() in _LATER
            self._note_failure(len(spans), str(error), is_kept=is_kept)
            if self._keep is None or not is_kept:
                return SpanExportResult.FAILURE
            self._keep(request.SerializeToString())
            return SpanExportResult.SUCCESS
        if self._is_failing:
            self._is_failing = False
            _log.info("spans are delivered again", extra={"endpoint": self._endpoint})
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self._channel.close()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Nothing is kept here: the processor flushes by calling `export`."""
        return True

    def _encoded(self, spans: Sequence[ReadableSpan]) -> ExportTraceServiceRequest:
        """Encode without hurry while others want the interpreter, unless spans come faster than they go."""
        pause_s = _PAUSE_S if time.monotonic() - self._finished_s > _BACKLOG_S else 0.0
        request = ExportTraceServiceRequest()
        for first in range(0, len(spans), _SPANS_AT_ONCE):
            request.MergeFrom(encode_spans(spans[first : first + _SPANS_AT_ONCE]))
            time.sleep(pause_s)
        return request

    def _follow(self) -> None:
        """Take over what `replace` left, between two batches, so that none is lost with its connection."""
        with self._lock:
            credentials, self._replacement = self._replacement, None
        if credentials is not None:
            self._channel.close()
            self._open(credentials)

    def _open(self, credentials: grpc.ChannelCredentials | TlsIdentity | None) -> None:
        match credentials:
            case None:
                self._channel = grpc.insecure_channel(self._endpoint)
            case TlsIdentity():
                proven = credentials.channel_credentials()
                self._channel = grpc.secure_channel(self._endpoint, proven, options=MUTUAL_TLS_OPTIONS)
            case _:
                self._channel = grpc.secure_channel(self._endpoint, credentials)
        self._stub = TraceServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated without annotations

    def _note_failure(self, spans: int, reason: str, *, is_kept: bool) -> None:
        level = logging.DEBUG if self._is_failing else logging.WARNING
        self._is_failing = True
        extra = {"endpoint": self._endpoint, "spans": spans, "reason": peer_text(reason)}
        message = "spans could not be delivered and are dropped"
        if is_kept:
            message = "spans could not be delivered and are kept for later"
        _log.log(level, message, extra=extra)
