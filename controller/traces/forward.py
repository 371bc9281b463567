"""Spans go on to a collector as they came, if one is configured.

The queue is bounded in requests and in bytes; while the collector is away the newest are dropped, counted, and the
first drop of an outage is logged. Nothing here ever delays or fails whoever sent the spans.
"""

import asyncio
import logging
from collections import deque

import grpc
import grpc.aio
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import TraceServiceStub

from controller.traces.otlp import span_count
from core.backoff import Backoff, BackoffPolicy

_log = logging.getLogger(__name__)

MAX_QUEUED_REQUESTS = 1024
MAX_QUEUED_BYTES = 32 << 20
EXPORT_TIMEOUT_S = 10.0
# OTLP specification, "Failures": only these may be tried again.
_RETRYABLE = frozenset(
    {
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)


class Forwarder:
    """Keep `run` running in a task of the owner, who also owns the channel."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        backoff: BackoffPolicy = BackoffPolicy(base_s=0.5, cap_s=30.0),  # noqa: B008 (frozen)
        max_queued_requests: int = MAX_QUEUED_REQUESTS,
    ) -> None:
        self._stub = TraceServiceStub(channel)  # type: ignore[no-untyped-call]  # generated without annotations
        self._backoff = Backoff(backoff)
        self._max_queued_requests = max_queued_requests
        self._queue: deque[ExportTraceServiceRequest] = deque()
        self._queued_bytes = 0
        self._has_work = asyncio.Event()
        self._is_dropping = False
        self.dropped_count = 0
        self.forwarded_count = 0

    def offer(self, request: ExportTraceServiceRequest) -> None:
        """Queue `request` for the collector, or drop it when the queue is full."""
        size_bytes = request.ByteSize()
        if len(self._queue) >= self._max_queued_requests or self._queued_bytes + size_bytes > MAX_QUEUED_BYTES:
            self._drop(request, "the queue is full")
            return
        self._queue.append(request)
        self._queued_bytes += size_bytes
        self._has_work.set()

    async def run(self) -> None:
        """Send what is queued, in order; for ever."""
        while True:
            while self._queue:
                await self._send_first()
            self._has_work.clear()
            await self._has_work.wait()

    async def _send_first(self) -> None:
        """Send the oldest request; it leaves the queue when it is sent or can never be."""
        request = self._queue[0]
        try:
            await self._stub.Export(request, timeout=EXPORT_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() in _RETRYABLE:
                await asyncio.sleep(self._backoff.next_delay_s())
                return
            self._drop(request, f"the collector refused them: {error.code().name}")
        else:
            self.forwarded_count += span_count(request)
            self._is_dropping = False
            self._backoff.reset()
        self._queue.popleft()
        self._queued_bytes -= request.ByteSize()

    def _drop(self, request: ExportTraceServiceRequest, reason: str) -> None:
        self.dropped_count += span_count(request)
        _log.log(
            logging.DEBUG if self._is_dropping else logging.WARNING,
            "spans are not forwarded to the collector",
            extra={"reason": reason, "dropped": self.dropped_count},
        )
        self._is_dropping = True
