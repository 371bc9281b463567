"""The one way of a request through the agent; every face calls it.

    admit → queue → run → judge → answer at the edge
                                └→ escalate → answer from the heavy tier, or fall back to the edge's

`ask` admits at once and returns a future: a request that the edge answers costs no task, only one that escalates does.
Whoever cancels the future leaves: the batcher skips the request, an escalation under way is cancelled.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from opentelemetry.trace import SpanKind

from core.clock import Clock
from core.deadline import Deadline
from core.errors import DeadlineExceeded, Forbidden, HeavyUnavailable, InternalError, NanofleetError
from core.keeping import Keep
from core.metrics import Registry
from core.open_inference.messages import InferRequest, InferResponse, ModelIndexEntry, ModelMetadata, ParameterValue
from core.open_inference.service import Call
from core.telemetry import Tracing
from edge_agent.cascade.confidence import Verdict
from edge_agent.cascade.policy import Choice, Decision, Privacy, Reason, Tier, decide, fall_back, privacy_of
from edge_agent.request_metrics import RequestMetrics
from edge_agent.request_trace import Attribute, Origin, RequestTrace, error_type_of
from edge_agent.runtime.batcher import NEVER, Ran
from edge_agent.runtime.pool import LoadedModel, ModelPool
from edge_agent.terms import NO_TERMS, Terms, terms_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """A response and where it came from; `reason` says why that tier answered."""

    response: InferResponse
    tier: Tier
    reason: Reason
    # Of the edge model, also when the heavy tier answered.
    confidence: float | None = None
    # Of the span that served the request, if it is traced.
    traceparent: str | None = None


class Escalation(Protocol):
    """The way to the large models; `cascade.offload.Offload` is the real one."""

    async def ask(
        self, request: InferRequest, *, deadline: Deadline | None = None, traceparent: str | None = None
    ) -> InferResponse: ...


class _LocalCall:
    """A call over the local gRPC face."""

    operation = "infer"
    span_kind = SpanKind.SERVER

    def span_attributes(self) -> Mapping[str, Attribute]:
        return {"rpc.system.name": "grpc", "rpc.method": "inference.GRPCInferenceService/ModelInfer"}


_LOCAL_CALL = _LocalCall()
_NO_CALL = Call()


class EdgeDataPlane:
    """Implements `core.open_inference.service.DataPlane`, and the richer `ask` and `answer`."""

    def __init__(
        self,
        pool: ModelPool,
        offload: Escalation,
        *,
        tracing: Tracing,
        clock: Clock,
        metrics: RequestMetrics | None = None,
    ) -> None:
        """`metrics` None: what is counted is nobody's to see."""
        self.metrics = metrics or RequestMetrics(Registry(), clock=clock)
        self._pool = pool
        self._offload = offload
        self._tracing = tracing
        # Compared with on the hot path: an attribute, nothing to call.
        self.slow_s = tracing.keeper.slow_s
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._escalations: set[asyncio.Task[None]] = set()

    def ask(
        self, request: InferRequest, call: Call = _NO_CALL, terms: Terms = NO_TERMS, *, origin: Origin = _LOCAL_CALL
    ) -> "asyncio.Future[Answer]":
        """Admit a request; the future holds its answer or a NanofleetError.

        Args:
            terms: what travels beside the request; of its privacy class and the request's the stricter counts.

        Raises:
            NanofleetError: not admitted: unknown model, inputs that do not fit, forbidden, overloaded or too late.
        """
        now_s = self._clock.monotonic_s()
        model: LoadedModel | None = None
        try:
            deadline_s = NEVER if call.deadline is None else call.deadline.at_s
            if deadline_s <= now_s:
                raise DeadlineExceeded(
                    f"model {request.model_name[:80]}: the deadline had passed when the request came"
                )
            model = self._pool.find(request.model_name, request.model_version)
            arrays = model.arrays_of(request)
            waiter = _Request(self, model, request, call, _privacy_of(request, terms.privacy), origin, now_s)
        except NanofleetError as error:
            self.metrics.failed("" if model is None else model.manifest.model, error)
            raise
        if self._tracing.is_sampled(call.traceparent):
            waiter.trace = self.start_trace(waiter, Keep.SAMPLED)
        try:
            model.admit(deadline_s)
            model.batcher.submit(arrays, waiter, deadline_s=deadline_s)
        except NanofleetError as error:
            waiter.fail(error)
        return waiter.future

    async def answer(self, request: InferRequest, call: Call = _NO_CALL) -> Answer:
        """Return the answer to `request`; cancelling it withdraws the request."""
        return await self.ask(request, call)

    async def infer(self, request: InferRequest, call: Call) -> InferResponse:
        return tagged(await self.ask(request, call, terms_of(request.parameters)))

    async def is_ready(self) -> bool:
        return bool(self._pool.models())

    async def index(self) -> Sequence[ModelIndexEntry]:
        return [self._pool.residency(model.manifest.model).index_entry() for model in self._pool.models()]

    async def metadata(self, name: str, version: str) -> ModelMetadata:
        return self._pool.find(name, version).metadata()

    async def is_model_ready(self, name: str, version: str) -> bool:
        """Say whether a request would be answered: also by a model that it brings into memory first."""
        self._pool.find(name, version)
        return self._pool.residency(name).would_answer

    async def load(self, name: str) -> None:
        await self._pool.keep_resident(name)

    async def unload(self, name: str) -> None:
        await self._pool.park(name)

    async def close(self) -> None:
        """Cancel the escalations under way; their callers get the edge's answer or a cancellation."""
        escalations = tuple(self._escalations)
        for escalation in escalations:
            escalation.cancel()
        await asyncio.gather(*escalations, return_exceptions=True)

    # What follows is for _Request, the other half of this class.

    def start_trace(self, waiter: "_Request", keep: Keep) -> RequestTrace:
        return RequestTrace(
            self._tracing.tracer,
            self._clock,
            manifest=waiter.model.manifest,
            digest=waiter.model.digest,
            origin=waiter.origin,
            parent=waiter.call.traceparent,
            queued_s=waiter.queued_s,
            keep=keep,
        )

    def keep(self, waiter: "_Request", keep: Keep, *, ran: Ran | None, error_type: str = "") -> RequestTrace | None:
        """Begin the trace of a request that was not sampled, late and with what is known of it; None: too many are."""
        if not self._tracing.keeper.permits(keep, now_s=self._clock.monotonic_s(), error_type=error_type):
            return None
        trace = self.start_trace(waiter, keep)
        if ran is not None:
            trace.ran(started_s=ran.started_s, finished_s=ran.finished_s, batch_rows=ran.batch_rows)
        return trace

    def now_s(self) -> float:
        return self._clock.monotonic_s()

    def create_future(self) -> "asyncio.Future[Answer]":
        return self._loop.create_future()

    def remaining_s(self, call: Call) -> float | None:
        return None if call.deadline is None else call.deadline.remaining_s(self._clock.monotonic_s())

    def escalate(self, waiter: "_Request", ran: Ran, decision: Decision) -> "asyncio.Task[None]":
        task = self._loop.create_task(waiter.escalate(ran, decision), name=f"offload {waiter.model.manifest.model}")
        self._escalations.add(task)
        task.add_done_callback(self._escalations.discard)
        return task

    async def ask_heavy(self, request: InferRequest, call: Call, trace: RequestTrace | None) -> InferResponse:
        if trace is None:
            return await self._offload.ask(request, deadline=call.deadline, traceparent=call.traceparent)
        span = trace.offload(started_s=self._clock.monotonic_s())
        try:
            response = await self._offload.ask(request, deadline=call.deadline, traceparent=span.traceparent)
        except BaseException as error:
            span.end(error)
            raise
        span.end()
        return response


class _Request:
    """One admitted request on its way; the batcher's Waiter."""

    __slots__ = ("_plane", "_privacy", "_request", "call", "future", "model", "origin", "queued_s", "trace")

    def __init__(
        self,
        plane: EdgeDataPlane,
        model: LoadedModel,
        request: InferRequest,
        call: Call,
        privacy: Privacy,
        origin: Origin,
        queued_s: float,
    ) -> None:
        self.future = plane.create_future()
        self.model = model
        self.call = call
        self.origin = origin
        self.queued_s = queued_s
        self.trace: RequestTrace | None = None
        self._plane = plane
        self._request = request
        self._privacy = privacy

    def is_waiting(self) -> bool:
        return not self.future.done()

    def settle(self, ran: Ran) -> None:
        if self.trace is not None:
            self.trace.ran(started_s=ran.started_s, finished_s=ran.finished_s, batch_rows=ran.batch_rows)
        remaining_s = self._plane.remaining_s(self.call)
        decision = decide(ran.verdict, cascade=self.model.cascade, privacy=self._privacy, remaining_s=remaining_s)
        if decision.choice is Choice.ESCALATE:
            # Before the heavy tier is asked, whose spans belong into this trace.
            if self.trace is None:
                self.trace = self._plane.keep(self, Keep.ESCALATED, ran=ran)
            task = self._plane.escalate(self, ran, decision)
            self.future.add_done_callback(lambda _: task.cancel())
        else:
            self._answer_at_edge(ran, decision, finished_s=ran.finished_s)

    def fail(self, error: NanofleetError, ran: Ran | None = None) -> None:
        # Who has left does not make an error of it.
        if self.trace is None and not self.future.done():
            self.trace = self._plane.keep(self, Keep.ERROR, ran=ran, error_type=error_type_of(error))
        if self.trace is not None:
            self.trace.failed(error)
        if not self.future.done():
            self._plane.metrics.failed(self.model.manifest.model, error)
            self.future.set_exception(error)

    async def escalate(self, ran: Ran, decision: Decision) -> None:
        """Ask the heavy tier and settle the future, whatever comes of it."""
        try:
            await self._escalate(ran, decision)
        except asyncio.CancelledError:
            self.fail(HeavyUnavailable("the agent is stopping; try again later"), ran)
            raise
        except Exception as error:
            _log.error("a request failed unexpectedly", extra={"model": self.model.manifest.model}, exc_info=True)
            self.fail(InternalError(f"model {self.model.manifest.model}: no answer: {type(error).__name__}"), ran)

    async def _escalate(self, ran: Ran, decision: Decision) -> None:
        assert self.model.cascade is not None
        assert ran.verdict is not None
        request = InferRequest(
            model_name=self.model.cascade.escalate_to,
            inputs=self._request.inputs,
            id=self._request.id,
            outputs=self._request.outputs,
        )
        asked_s = self._plane.now_s()
        try:
            response = await self._plane.ask_heavy(request, self.call, self.trace)
        except DeadlineExceeded:
            self._fall_back(ran, Reason.DEADLINE)
        except Exception as error:
            if not isinstance(error, NanofleetError):
                _log.error("an escalation failed unexpectedly", extra={"model": request.model_name}, exc_info=True)
            self._note_offload(asked_s)
            self._fall_back(ran, Reason.HEAVY_UNAVAILABLE)
        else:
            self._note_offload(asked_s)
            self._note_slowness(ran, self._plane.now_s())
            answer = Answer(response, Tier.HEAVY, decision.reason, ran.verdict.confidence, self._traceparent)
            self._finish(answer, ran)

    def _note_offload(self, asked_s: float) -> None:
        duration_s = self._plane.now_s() - asked_s
        self._plane.metrics.offloaded(self.model.manifest.model, duration_s, traceparent=self._traceparent)

    @property
    def _traceparent(self) -> str | None:
        return None if self.trace is None else self.trace.traceparent

    def _fall_back(self, ran: Ran, reason: Reason) -> None:
        assert ran.verdict is not None
        self._answer_at_edge(ran, fall_back(ran.verdict, reason), finished_s=self._plane.now_s())

    def _answer_at_edge(self, ran: Ran, decision: Decision, *, finished_s: float) -> None:
        if decision.choice is Choice.REFUSE:
            self.fail(_refusal(self.model, ran.verdict, decision.reason), ran)
            return
        self._note_slowness(ran, finished_s)
        confidence = None if ran.verdict is None else ran.verdict.confidence
        response = self.model.response(self._request, ran.outputs)
        self._finish(Answer(response, Tier.EDGE, decision.reason, confidence, self._traceparent), ran)

    def _note_slowness(self, ran: Ran, finished_s: float) -> None:
        if finished_s - self.queued_s >= self._plane.slow_s and self.trace is None:
            self.trace = self._plane.keep(self, Keep.SLOW, ran=ran)

    def _finish(self, answer: Answer, ran: Ran) -> None:
        if self.trace is not None:
            self.trace.answered(_span_attributes(answer, self._privacy))
        if not self.future.done():
            self._plane.metrics.answered(
                self.model.manifest.model,
                answer.tier,
                answer.reason,
                queued_s=self.queued_s,
                started_s=ran.started_s,
                finished_s=ran.finished_s,
                traceparent=answer.traceparent,
            )
            self.future.set_result(answer)


def tagged(answer: Answer) -> InferResponse:
    """Return the response with what is known of its origin among its parameters, for faces without other room."""
    response = answer.response
    parameters: dict[str, ParameterValue] = {
        **response.parameters,
        "tier": answer.tier.value,
        "reason": answer.reason.value,
    }
    if answer.confidence is not None:
        parameters["confidence"] = round(answer.confidence, 4)
    return InferResponse(response.model_name, response.model_version, response.outputs, response.id, parameters)


def _privacy_of(request: InferRequest, beside: str | None) -> Privacy:
    within = request.parameters.get("privacy")
    if within is None and beside is None:
        return Privacy.ANY
    return privacy_of([word for word in (beside, within) if word is not None])


def _refusal(model: LoadedModel, verdict: Verdict | None, reason: Reason) -> NanofleetError:
    flaw = "unusable" if verdict is None or verdict.flaw is None else verdict.flaw.value
    text = f"model {model.manifest.model}: its answer is {flaw} and"
    if reason is Reason.PRIVACY:
        return Forbidden(f"{text} the request's privacy class keeps it from the heavy tier")
    if reason is Reason.DEADLINE:
        return HeavyUnavailable(f"{text} too little time is left for the heavy tier; allow more")
    return HeavyUnavailable(f"{text} the heavy tier is away; try again later")


def _span_attributes(answer: Answer, privacy: Privacy) -> Mapping[str, Attribute]:
    attributes: dict[str, Attribute] = {
        "nanofleet.tier": answer.tier.value,
        "nanofleet.route.reason": answer.reason.value,
        "nanofleet.escalated": answer.tier is Tier.HEAVY,
        "nanofleet.privacy": privacy.value,
    }
    if answer.confidence is not None:
        attributes["nanofleet.confidence"] = answer.confidence
    return attributes
