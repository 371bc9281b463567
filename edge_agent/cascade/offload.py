"""Asking the large model: one `ModelInfer` over the process's one channel to the gateway.

Every call has a deadline, is bounded in number, and is cancelled when its caller leaves (a grpc.aio call that is merely
dropped leaks on both ends, grpc#43462). A breaker turns an absent heavy tier into an immediate refusal, so that only a
few callers spend their time finding out; a forecast for each large model (`cascade.forecast`) does the same for one
that would not answer in time.

The time of a request shrinks from tier to tier: of what its deadline leaves, a part is kept back for the reply, and the
rest is the timeout of the call.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Mapping
from functools import partial

import grpc
import grpc.aio

from core.breaker import Breaker, BreakerPolicy, BreakerState
from core.clock import Clock
from core.deadline import Deadline
from core.errors import DeadlineExceeded, HeavyUnavailable, NanofleetError, Overloaded, Unavailable
from core.open_inference import protobuf_body
from core.open_inference.messages import DEFAULT_LIMITS, BodyLimits, InferRequest, InferResponse
from core.status import error_from_grpc
from core.telemetry import TRACEPARENT, parse_traceparent
from edge_agent.cascade.forecast import Forecast, ForecastPolicy
from edge_agent.cascade.policy import MIN_OFFLOAD_S, Reason
from edge_agent.settings import OffloadSettings
from protos.inference.v2 import open_inference_pb2_grpc as services

_log = logging.getLogger(__name__)

# Chosen: a large model that needs longer than this is of no use to most callers. A call that was given less and came
# too late says how impatient its caller is; counted, a few such devices would open the breaker for all.
_FAIR_S = 1.0
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
        forecast: ForecastPolicy | None = None,
        limits: BodyLimits = DEFAULT_LIMITS,
    ) -> None:
        self._stub = services.GRPCInferenceServiceStub(channel)
        self._clock = clock
        self._settings = settings
        self._limits = limits
        self._breaker = Breaker(breaker or BreakerPolicy())
        self._in_flight = 0
        # Bounded by the cascades of the models that ran here.
        self._forecasts: defaultdict[str, Forecast] = defaultdict(partial(Forecast, forecast or ForecastPolicy()))
        # Bounded by the cascades of the models that ran here, times the codes of gRPC.
        self._warned: set[tuple[str, grpc.StatusCode]] = set()

    @property
    def state(self) -> BreakerState:
        return self._breaker.state

    @property
    def breaker_openings(self) -> int:
        """How often the breaker opened since the process began."""
        return self._breaker.openings

    @property
    def in_flight(self) -> int:
        return self._in_flight

    def expected_s(self) -> Mapping[str, float]:
        """Return how long each large model takes in nine of ten cases, of those that were asked lately."""
        now_s = self._clock.monotonic_s()
        expected = {model: forecast.expected_s(now_s) for model, forecast in self._forecasts.items()}
        return {model: seconds for model, seconds in expected.items() if seconds is not None}

    def obstacle(self, model: str, *, remaining_s: float | None) -> Reason | None:
        """Return why `model` is not worth asking with `remaining_s` left (None: no deadline); None: it is."""
        now_s = self._clock.monotonic_s()
        if self._in_flight >= self._settings.max_in_flight or self._breaker.refuses(now_s):
            return Reason.HEAVY_UNAVAILABLE
        if remaining_s is None:
            return None
        budget_s = remaining_s - self._settings.reply_reserve_s
        if budget_s < MIN_OFFLOAD_S or not self._forecasts[model].permits(budget_s, now_s=now_s):
            return Reason.DEADLINE
        return None

    async def ask(
        self, request: InferRequest, *, deadline: Deadline | None = None, traceparent: str | None = None
    ) -> InferResponse:
        """Return the heavy tier's answer.

        Raises:
            DeadlineExceeded: too little time is left to ask, or its caller had too little patience for the answer.
            HeavyUnavailable: away, or refused by the breaker or the bound.
            NanofleetError: the heavy tier refused this request; the narrowest class of its status.
        """
        timeout_s = self._timeout_s(deadline)
        self._admit()
        self._in_flight += 1
        try:
            return await self._call(request, timeout_s=timeout_s, traceparent=traceparent)
        finally:
            self._in_flight -= 1

    def _admit(self) -> None:
        if self._in_flight >= self._settings.max_in_flight:
            raise HeavyUnavailable(f"expected at most {self._settings.max_in_flight} escalations at once; try again")
        if not self._breaker.permits(self._clock.monotonic_s()):
            raise HeavyUnavailable("heavy tier: failed repeatedly and is left alone for a moment; try again")

    def _timeout_s(self, deadline: Deadline | None) -> float:
        if deadline is None:
            return self._settings.default_timeout_s
        # Kept back, so that the edge answer is still in time when the heavy tier is not.
        timeout_s = deadline.remaining_s(self._clock.monotonic_s()) - self._settings.reply_reserve_s
        if timeout_s < MIN_OFFLOAD_S:
            raise DeadlineExceeded("heavy tier: too little time is left to ask it; allow more")
        return timeout_s

    async def _call(self, request: InferRequest, *, timeout_s: float, traceparent: str | None) -> InferResponse:
        """Make the call and tell the breaker, exactly once, what it says of the tier."""
        asked_s = self._clock.monotonic_s()
        try:
            response = await self._exchange(request, timeout_s=timeout_s, traceparent=traceparent)
        except grpc.aio.AioRpcError as error:
            raise self._failure(error, model=request.model_name, timeout_s=timeout_s) from error
        except HeavyUnavailable:
            self._breaker.failed(self._clock.monotonic_s())
            raise
        except BaseException:
            # The caller left, or a fault on this side: no news of the tier, but a probe has ended.
            self._breaker.abandoned()
            raise
        self._breaker.succeeded()
        now_s = self._clock.monotonic_s()
        self._forecasts[request.model_name].observe(now_s - asked_s, now_s=now_s)
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

    def _failure(self, error: grpc.aio.AioRpcError, *, model: str, timeout_s: float) -> NanofleetError:
        code, text = error.code(), f"heavy tier: {(error.details() or error.code().name)[:200]}"
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            self._forecasts[model].observe_timeout(timeout_s, now_s=self._clock.monotonic_s())
            if timeout_s < min(_FAIR_S, self._settings.default_timeout_s):
                self._breaker.abandoned()
                return DeadlineExceeded(text)
        if code in _TIER_FAULTS:
            self._breaker.failed(self._clock.monotonic_s())
            return HeavyUnavailable(text)
        self._breaker.succeeded()
        refusal = error_from_grpc(code, text)
        if isinstance(refusal, Unavailable):
            return HeavyUnavailable(str(refusal))
        if not isinstance(refusal, Overloaded):
            self._warn_once(model, code, text)
        return refusal

    def _warn_once(self, model: str, code: grpc.StatusCode, text: str) -> None:
        # The edge answers in its place, so that a misconfigured cascade would go unnoticed.
        if (model, code) in self._warned:
            return
        self._warned.add((model, code))
        _log.warning(
            "the heavy tier refuses what is escalated to it; check the cascade's escalate_to and its inputs",
            extra={"model": model, "code": code.name, "error": text},
        )


def _metadata(traceparent: str | None) -> tuple[tuple[str, str], ...]:
    # It came from a device: a malformed one links nothing, and gRPC fails on metadata that is not printable ASCII,
    # which the free end that later versions of the format may have need not be.
    if traceparent is None or parse_traceparent(traceparent) is None:
        return ()
    return ((TRACEPARENT, traceparent),) if traceparent.isascii() and traceparent.isprintable() else ()
