"""`Intake`: one OTLP request in; its spans go to the recent ones and the request itself on to the collector."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from controller.traces.forward import Forwarder
from controller.traces.otlp import Decoded, decode
from controller.traces.service import Traces
from core.errors import Overloaded

# Chosen: at 512 spans each, more than the queue of Traces takes; it bounds the memory of requests that wait.
MAX_DECODING = 32


class Intake:
    """Decodes on a thread of its own: a request of 512 spans is some 10 ms of work that would stall every stream."""

    def __init__(self, traces: Traces, forwarder: Forwarder | None) -> None:
        self._traces = traces
        self._forwarder = forwarder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="otlp-decoder")
        self._decoding = 0

    async def take_in(self, request: ExportTraceServiceRequest) -> int:
        """Take in one request; return how many of its spans were refused.

        Raises:
            Overloaded: too many requests are being decoded; the exporter may send it again.
        """
        if self._decoding >= MAX_DECODING:
            raise Overloaded(f"expected at most {MAX_DECODING} trace requests at a time; send it again later")
        self._decoding += 1
        try:
            decoded = await asyncio.get_running_loop().run_in_executor(self._thread, decode, request)
        finally:
            self._decoding -= 1
        return self.accept(decoded, request)

    def accept(self, decoded: Decoded, request: ExportTraceServiceRequest) -> int:
        """Take in a request that is decoded already; return how many of its spans were refused."""
        if self._forwarder is not None:
            self._forwarder.offer(request)
        return decoded.refused_count + self._traces.take_in(decoded.spans)

    async def close(self) -> None:
        await asyncio.to_thread(self._thread.shutdown)
