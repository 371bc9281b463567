"""Spans go on to a collector as they came, if one is configured.

The queue is bounded in requests and in bytes; while the collector is away the newest are dropped, counted, and the
first drop of an outage is logged. Nothing here ever delays or fails whoever sent the spans.
"""

import asyncio
import logging
from collections import deque
from typing import Protocol

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from controller.traces.otlp import span_count
from core.backoff import Backoff, BackoffPolicy
from core.errors import NanofleetError
from core.logs import peer_text

_log = logging.getLogger(__name__)

MAX_QUEUED_REQUESTS = 1024
MAX_QUEUED_BYTES = 32 << 20
_BACKOFF = BackoffPolicy(base_s=0.5, cap_s=30.0)


class Collector(Protocol):
    """Where spans go; `controller.api.otlp_grpc.CollectorClient` is the real one."""

    async def export(self, request: ExportTraceServiceRequest) -> None:
        """Hand over one request. A retryable NanofleetError says that it may be tried again, any other that not."""
        ...


class Forwarder:
    """Keep `run` running in a task of the owner."""

    def __init__(
        self,
        collector: Collector,
        *,
        backoff: BackoffPolicy = _BACKOFF,
        max_queued_requests: int = MAX_QUEUED_REQUESTS,
    ) -> None:
        self._collector = collector
        self._backoff = Backoff(backoff)
        self._max_queued_requests = max_queued_requests
        self._queue: deque[ExportTraceServiceRequest] = deque()
        self._queued_bytes = 0
        self._has_work = asyncio.Event()
        self._is_dropping = False
        self.dropped_count = 0

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
            await self._collector.export(request)
        except NanofleetError as error:
            if error.retryable:
                await asyncio.sleep(self._backoff.next_delay_s())
                return
            self._drop(request, peer_text(str(error)))
        else:
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
