"""Escalations for later: kept with the address of their asker, asked one at a time when the heavy tier is back.

Implements `cascade.deferral.Deferrals`. The body of a row is a tag-length pair of the address and the request:
4 bytes big-endian, the length of the address; the address; a ModelInferRequest of the Open Inference Protocol.

At least once: a power cut between the verdict's delivery and the row's removal delivers it again.
"""

from collections.abc import Sequence
from typing import Protocol

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from core.clock import Clock
from core.deadline import Deadline
from core.errors import InternalError, InvalidRequest, NanofleetError
from core.open_inference import protobuf_body
from core.open_inference.messages import DEFAULT_LIMITS, BodyLimits, InferRequest, InferResponse
from edge_agent.cascade.deferral import VerdictSink
from edge_agent.outbox.rows import Kind, Row
from protos.inference.v2 import open_inference_pb2 as pb

# Chosen: nobody waits, so a busy heavy tier may take its time.
ASK_TIMEOUT_S = 30.0
_LENGTH_BYTES = 4
# What one request can do to the heavy tier, in contrast to the tier's being away.
_BREAKAGES = frozenset({grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN})
_KEPT_AT_HOME = frozenset({"device", "site"})


class Kept(Protocol):
    """What is used of `outbox.Outbox`."""

    def put(self, kind: Kind, body: bytes, *, dedupe_id: str) -> bool: ...


class Asked(Protocol):
    """What is used of `cascade.offload.Offload`."""

    async def ask(
        self, request: InferRequest, *, deadline: Deadline | None = None, traceparent: str | None = None
    ) -> InferResponse: ...


class OutboxDeferrals:
    def __init__(self, outbox: Kept) -> None:
        self._outbox = outbox

    def take(self, request: InferRequest, *, dedupe_id: str, reply_to: bytes) -> bool:
        """Keep `request`; False: there is no room, or it says itself that it must not leave (nobody should ask)."""
        if request.parameters.get("privacy") in _KEPT_AT_HOME:
            return False
        content = protobuf_body.encode_request(request).SerializeToString()
        body = len(reply_to).to_bytes(_LENGTH_BYTES, "big") + reply_to + content
        return self._outbox.put(Kind.ESCALATION, body, dedupe_id=dedupe_id)


class DeferredReceiver:
    """The heavy tier, and the face that has the askers; one escalation a call."""

    def __init__(self, heavy: Asked, sink: VerdictSink, *, clock: Clock, limits: BodyLimits = DEFAULT_LIMITS) -> None:
        self._heavy = heavy
        self._sink = sink
        self._clock = clock
        self._limits = limits

    async def send(self, rows: Sequence[Row]) -> Sequence[int]:
        [row] = rows
        reply_to, request = self._opened(row.body)
        try:
            response = await self._heavy.ask(request, deadline=Deadline(self._clock.monotonic_s() + ASK_TIMEOUT_S))
        except NanofleetError as error:
            raise _sorted(error) from error
        self._sink.deliver(reply_to, response)
        return ()

    def _opened(self, body: bytes) -> tuple[bytes, InferRequest]:
        end = _LENGTH_BYTES + int.from_bytes(body[:_LENGTH_BYTES], "big")
        if len(body) < end:
            raise InvalidRequest(f"outbox: expected an escalation of at least {end} bytes, got {len(body)}")
        try:
            message = pb.ModelInferRequest.FromString(body[end:])
        except DecodeError as error:
            raise InvalidRequest("outbox: expected a ModelInferRequest, got other bytes") from error
        return body[_LENGTH_BYTES:end], protobuf_body.decode_request(message, limits=self._limits)


def _sorted(error: NanofleetError) -> NanofleetError:
    """Tell a request that breaks the heavy tier from a tier that is away."""
    cause = error.__cause__
    if isinstance(cause, grpc.aio.AioRpcError) and cause.code() in _BREAKAGES:
        return InternalError(str(error))
    return error
