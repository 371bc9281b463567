"""Spans that could not be exported: deflated into the outbox, and sent as they are once their receiver is back."""

import uuid
import zlib
from collections.abc import Sequence

import grpc
import grpc.aio

from core.errors import InvalidRequest, NanofleetError, Unavailable
from core.logs import peer_text
from core.status import error_from_grpc
from edge_agent.outbox.outbox import Outbox
from edge_agent.outbox.rows import Kind, Row

_METHOD = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
SEND_TIMEOUT_S = 20.0
# Chosen: spans shrink to a fifth at the cheapest level, in a millisecond for some hundred.
_LEVEL = 1
# Derived: 512 spans of some kilobytes each; whoever writes to our disk must not fill our memory.
MAX_EXPORT_BYTES = 8 << 20


class SpanKeeper:
    """Takes what the exporter could not deliver, on the exporter's thread."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    def __call__(self, export: bytes) -> None:
        self._outbox.put_from_thread(Kind.TELEMETRY, zlib.compress(export, _LEVEL), dedupe_id=uuid.uuid4().hex)


class SpanReceiver:
    """The OTLP receiver behind a borrowed channel; one export a call."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._export = channel.unary_unary(_METHOD, request_serializer=bytes, response_deserializer=bytes)

    async def send(self, rows: Sequence[Row]) -> Sequence[int]:
        [row] = rows
        try:
            await self._export(_inflated(row.body), timeout=SEND_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise _failure(error) from error
        return ()


def _inflated(body: bytes) -> bytes:
    inflater = zlib.decompressobj()
    try:
        export = inflater.decompress(body, MAX_EXPORT_BYTES)
    except zlib.error as error:
        raise InvalidRequest(f"outbox: expected deflated spans, got something else: {error}") from error
    if not inflater.eof:
        raise InvalidRequest(f"outbox: expected at most {MAX_EXPORT_BYTES} bytes of spans, or their end is missing")
    return export


def _failure(error: grpc.aio.AioRpcError) -> NanofleetError:
    text = f"spans: {peer_text(error.details() or error.code().name)}"
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return Unavailable(text)
    return error_from_grpc(error.code(), text)
