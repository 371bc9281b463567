"""Asking the large model: one `ModelInfer` over the process's one channel to the gateway.

Every call has a deadline, is bounded in number, and is cancelled when its caller leaves (a grpc.aio call that is merely
dropped leaks on both ends, grpc#43462). A breaker turns an absent heavy tier into an immediate refusal, so that only a
few callers spend their time finding out.
"""

import asyncio

import grpc
import grpc.aio

from core.breaker import Breaker, BreakerPolicy, BreakerState
from core.clock import Clock
from core.deadline import Deadline
from core.errors import HeavyUnavailable, NanofleetError, Unavailable
from core.open_inference import protobuf_body
from core.open_inference.messages import DEFAULT_LIMITS, BodyLimits, InferRequest, InferResponse
from core.status import error_from_grpc
from core.telemetry import TRACEPARENT, parse_traceparent
from edge_agent.settings import OffloadSettings
from protos.inference.v2 import open_inference_pb2_grpc as services

# What says that the tier is away or broken, in contrast to a fault of this one request.
_TIER_FAULTS = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)


class Offload:
    """The way to the large models; borrows `channel` and never closes it."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        settings: OffloadSettings,
        *,
        clock: Clock,
        breaker: BreakerPolicy | None = None,
        limits: BodyLimits = DEFAULT_LIMITS,
    ) -> None:
        self._stub = services.GRPCInferenceServiceStub(channel)
        self._clock = clock
        self._settings = settings
        self._limits = limits
        self._breaker = Breaker(breaker or BreakerPolicy())
        self._in_flight = 0

    @property
    def state(self) -> BreakerState:
        return self._breaker.state

    async def ask(
        self, request: InferRequest, *, deadline: Deadline | None = None, traceparent: str | None = None
    ) -> InferResponse:
        """Return the heavy tier's answer.

        Raises:
            HeavyUnavailable: away, too slow for the deadline, or refused by the breaker or the bound.
            NanofleetError: the heavy tier refused this request; the narrowest class of its status.
        """
        timeout_s = self._timeout_s(deadline)
        self._admit(timeout_s)
        self._in_flight += 1
        try:
            return await self._call(request, timeout_s=timeout_s, traceparent=traceparent)
        finally:
            self._in_flight -= 1

    def _admit(self, timeout_s: float) -> None:
        if timeout_s <= 0:
            raise HeavyUnavailable("heavy tier: too little time is left to ask it; allow more")
        if self._in_flight >= self._settings.max_in_flight:
            raise HeavyUnavailable(f"expected at most {self._settings.max_in_flight} escalations at once; try again")
        if not self._breaker.permits(self._clock.monotonic_s()):
            raise HeavyUnavailable("heavy tier: failed repeatedly and is left alone for a moment; try again")

    def _timeout_s(self, deadline: Deadline | None) -> float:
        if deadline is None:
            return self._settings.default_timeout_s
        # Kept back, so that the edge answer is still in time when the heavy tier is not.
        return deadline.remaining_s(self._clock.monotonic_s()) - self._settings.reply_reserve_s

    async def _call(self, request: InferRequest, *, timeout_s: float, traceparent: str | None) -> InferResponse:
        """Make the call and tell the breaker, exactly once, what it says of the tier."""
        try:
            response = await self._exchange(request, timeout_s=timeout_s, traceparent=traceparent)
        except grpc.aio.AioRpcError as error:
            raise self._failure(error) from error
        except HeavyUnavailable:
            self._breaker.failed(self._clock.monotonic_s())
            raise
        except BaseException:
            # The caller left, or a fault on this side: no news of the tier, but a probe has ended.
            self._breaker.abandoned()
            raise
        self._breaker.succeeded()
        return response

    async def _exchange(self, request: InferRequest, *, timeout_s: float, traceparent: str | None) -> InferResponse:
        message = protobuf_body.encode_request(request)
        call = self._stub.ModelInfer(message, timeout=timeout_s, metadata=_metadata(traceparent))
        try:
            answer = await call
        except asyncio.CancelledError:
            call.cancel()
            raise
        try:
            return protobuf_body.decode_response(answer, limits=self._limits)
        except NanofleetError as error:
            raise HeavyUnavailable(f"heavy tier: sent an answer that does not parse: {error}") from error

    def _failure(self, error: grpc.aio.AioRpcError) -> NanofleetError:
        details = error.details() or error.code().name
        if error.code() in _TIER_FAULTS:
            self._breaker.failed(self._clock.monotonic_s())
            return HeavyUnavailable(f"heavy tier: {details[:200]}")
        self._breaker.succeeded()
        refusal = error_from_grpc(error.code(), f"heavy tier: {details[:200]}")
        return HeavyUnavailable(str(refusal)) if isinstance(refusal, Unavailable) else refusal


def _metadata(traceparent: str | None) -> tuple[tuple[str, str], ...]:
    # It came from a device: a malformed one links nothing, and gRPC fails on metadata that is not printable ASCII,
    # which the free end that later versions of the format may have need not be.
    if traceparent is None or parse_traceparent(traceparent) is None:
        return ()
    return ((TRACEPARENT, traceparent),) if traceparent.isascii() and traceparent.isprintable() else ()
