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
from core.telemetry import TRACEPARENT
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
        metadata = () if traceparent is None else ((TRACEPARENT, traceparent),)
        call = self._stub.ModelInfer(protobuf_body.encode_request(request), timeout=timeout_s, metadata=metadata)
        try:
            message = await call
            response = protobuf_body.decode_response(message, limits=self._limits)
        except asyncio.CancelledError:
            call.cancel()
            self._breaker.abandoned()
            raise
        except grpc.aio.AioRpcError as error:
            raise self._failure(error) from error
        except NanofleetError as error:
            self._breaker.failed(self._clock.monotonic_s())
            raise HeavyUnavailable(f"heavy tier: sent an answer that does not parse: {error}") from error
        self._breaker.succeeded()
        return response

    def _failure(self, error: grpc.aio.AioRpcError) -> NanofleetError:
        details = error.details() or error.code().name
        if error.code() in _TIER_FAULTS:
            self._breaker.failed(self._clock.monotonic_s())
            return HeavyUnavailable(f"heavy tier: {details[:200]}")
        self._breaker.succeeded()
        refusal = error_from_grpc(error.code(), f"heavy tier: {details[:200]}")
        return HeavyUnavailable(str(refusal)) if isinstance(refusal, Unavailable) else refusal
