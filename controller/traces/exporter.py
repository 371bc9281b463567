"""The controller's own spans take the way of everybody else's, without dialling itself."""

import asyncio
from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from controller.traces.intake import Intake
from controller.traces.otlp import Decoded, decode


class InProcessExporter(SpanExporter):
    """Called on the batch processor's thread; encoding and decoding happen there, the hand-over on `loop`."""

    def __init__(self, intake: Intake, loop: asyncio.AbstractEventLoop) -> None:
        self._intake = intake
        self._loop = loop

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        request: ExportTraceServiceRequest = encode_spans(spans)
        decoded: Decoded = decode(request)
        try:
            self._loop.call_soon_threadsafe(self._intake.accept, decoded, request)
        except RuntimeError:  # The loop is closed: the process ends, and nobody is left to look.
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """There is nothing to close."""
