"""One admitted request on its way: run, judged, and answered by the edge, by the heavy tier, or by both in turn.

    run ─→ sure enough ──────────────────────────→ the edge's answer
       └─→ not ─→ escalate ─→ [provisional] ─────→ the heavy tier's answer
              │       └─ it failed or is late ───→ the edge's answer after all
              └─→ away, or no time for it ───────→ the edge's answer at once, [the escalation is deferred]

`future` is what the face waits for. A provisional answer settles it and puts another in its place (`Answer.later`), so
that whatever comes next is told in the same way. A request is counted as answered once, by its last answer here.
"""

import asyncio
import logging
from dataclasses import replace

from core.errors import DeadlineExceeded, HeavyUnavailable, InternalError, NanofleetError
from core.keeping import Keep
from core.logs import withheld
from core.open_inference.messages import InferRequest, InferResponse
from core.open_inference.service import Call
from edge_agent.answer import Answer, refusal, span_attributes
from edge_agent.cascade.confidence import MALFORMED, are_shaped
from edge_agent.cascade.deferral import Mailbox
from edge_agent.cascade.policy import Choice, Decision, Privacy, Reason, Tier, decide, fall_back
from edge_agent.hard_examples import HardExample
from edge_agent.request_services import Services
from edge_agent.request_trace import Origin, RequestTrace, error_type_of
from edge_agent.runtime.batcher import Ran
from edge_agent.runtime.pool import LoadedModel
from edge_agent.terms import Terms

_log = logging.getLogger(__name__)


class Request:
    """The batcher's Waiter."""

    __slots__ = (
        "_mailbox",
        "_privacy",
        "_request",
        "_services",
        "_terms",
        "call",
        "future",
        "model",
        "origin",
        "queued_s",
        "trace",
    )

    def __init__(
        self,
        services: Services,
        model: LoadedModel,
        request: InferRequest,
        call: Call,
        terms: Terms,
        privacy: Privacy,
        origin: Origin,
        mailbox: Mailbox | None,
        queued_s: float,
    ) -> None:
        self.future = services.create_future()
        self.model = model
        self.call = call
        self.origin = origin
        self.queued_s = queued_s
        self.trace: RequestTrace | None = None
        self._services = services
        self._request = request
        self._terms = terms
        self._privacy = privacy
        self._mailbox = mailbox

    def is_waiting(self) -> bool:
        return not self.future.done()

    def start_trace(self, keep: Keep) -> RequestTrace:
        self.trace = trace = self._services.start_trace(
            self.model, self.call, self.origin, self._privacy, queued_s=self.queued_s, keep=keep
        )
        return trace

    def settle(self, ran: Ran) -> None:
        if self.trace is not None:
            self.trace.ran(started_s=ran.started_s, finished_s=ran.finished_s, batch_rows=ran.batch_rows)
        if ran.verdict is not None and ran.verdict.flaw is None and not self._is_well_shaped(ran):
            ran = ran._replace(verdict=MALFORMED)
        deadline = self.call.deadline
        remaining_s = None if deadline is None else deadline.remaining_s(self._services.now_s())
        cascade = self.model.cascade
        decision = decide(ran.verdict, cascade=cascade, privacy=self._privacy, remaining_s=remaining_s)
        if cascade is None or decision.choice is not Choice.ESCALATE:
            self._answer_at_edge(ran, decision, finished_s=ran.finished_s)
            return
        obstacle = self._services.obstacle(cascade.escalate_to, remaining_s=remaining_s)
        if obstacle is None:
            self._begin_escalation(ran, decision)
        else:
            self._fall_back(ran, decision, obstacle, finished_s=ran.finished_s)

    def answer_again(self, answer: Answer) -> None:
        """Give an answer that was given before, without a run."""
        answer = replace(answer, traceparent=self._traceparent)
        if self.trace is not None:
            self.trace.answered(span_attributes(answer, self._privacy))
        self._services.metrics.answered_again(
            self.model.manifest.model, answer.reason, queued_s=self.queued_s, traceparent=answer.traceparent
        )
        self.future.set_result(answer)

    def fail(self, error: NanofleetError, ran: Ran | None = None) -> None:
        # Who has left does not make an error of it.
        if not self.future.done():
            self._keep(Keep.ERROR, ran, error_type=error_type_of(error))
        if self.trace is not None:
            self.trace.failed(error)
        if not self.future.done():
            self._services.metrics.failed(self.model.manifest.model, error)
            # Its traceback leads to this future again, and under overload the collector would not keep up.
            self.future.set_exception(error.with_traceback(None))

    async def escalate(self, ran: Ran, decision: Decision) -> None:
        """Ask the heavy tier and settle the future, whatever comes of it."""
        try:
            await self._escalate(ran, decision)
        except asyncio.CancelledError:
            if self.future.done():
                self.fail(HeavyUnavailable("the caller has left"), ran)
            else:
                # The agent is stopping.
                self._fall_back(ran, decision, Reason.HEAVY_UNAVAILABLE, finished_s=self._services.now_s())
            raise
        except Exception as error:
            name = self.model.manifest.model
            _log.error("a request failed unexpectedly", extra={"model": name}, exc_info=withheld(error))
            self.fail(InternalError(f"model {name}: no answer: {type(error).__name__}"), ran)

    def _is_well_shaped(self, ran: Ran) -> bool:
        model = self.model
        rows = self._request.inputs[0].array.shape[0] if model.manifest.batching.max_batch > 1 else None
        return are_shaped(ran.outputs, model.outputs, rows=rows)

    def _begin_escalation(self, ran: Ran, decision: Decision) -> None:
        # Before the heavy tier is asked, whose spans belong into this trace.
        self._keep(Keep.ESCALATED, ran)
        if self._terms.accepts_provisional and self._mailbox is not None and decision.reason is Reason.LOW_CONFIDENCE:
            self._answer_provisionally(ran, decision)
        task = self._services.start(self.escalate(ran, decision), model=self.model.manifest.model)
        self.future.add_done_callback(lambda _: task.cancel())

    def _answer_provisionally(self, ran: Ran, decision: Decision) -> None:
        first, self.future = self.future, self._services.create_future()
        self._services.metrics.answered_provisionally(self.model.manifest.model, decision.reason)
        if self.trace is not None:
            self.trace.answered_provisionally(at_s=self._services.now_s())
        first.set_result(self._edge_answer(ran, decision.reason, is_final=False, later=self.future))

    async def _escalate(self, ran: Ran, decision: Decision) -> None:
        asked_s = self._services.now_s()
        request = self._heavy_request()
        try:
            response = await self._services.ask_heavy(request, self.call, self.trace)
        except DeadlineExceeded:
            self._note_offload(asked_s)
            self._fall_back(ran, decision, Reason.DEADLINE, finished_s=self._services.now_s())
        except Exception as error:
            if not isinstance(error, NanofleetError):
                fields = {"model": request.model_name}
                _log.error("an escalation failed unexpectedly", extra=fields, exc_info=withheld(error))
            self._note_offload(asked_s)
            self._fall_back(ran, decision, Reason.HEAVY_UNAVAILABLE, finished_s=self._services.now_s())
        else:
            self._note_offload(asked_s)
            self._answer_from_heavy(ran, decision, response)

    def _heavy_request(self) -> InferRequest:
        assert self.model.cascade is not None
        asked = self._request
        return InferRequest(self.model.cascade.escalate_to, asked.inputs, id=asked.id, outputs=asked.outputs)

    def _note_offload(self, asked_s: float) -> None:
        duration_s = self._services.now_s() - asked_s
        self._services.metrics.offloaded(self.model.manifest.model, duration_s, traceparent=self._traceparent)

    @property
    def _traceparent(self) -> str | None:
        return None if self.trace is None else self.trace.traceparent

    def _answer_from_heavy(self, ran: Ran, decision: Decision, response: InferResponse) -> None:
        assert ran.verdict is not None
        self._note_slowness(ran, self._services.now_s())
        answer = Answer(response, Tier.HEAVY, decision.reason, ran.verdict.confidence, self._traceparent)
        self._finish(answer, ran)
        self._offer(ran, Tier.HEAVY, decision.reason, response)

    def _fall_back(self, ran: Ran, decision: Decision, reason: Reason, *, finished_s: float) -> None:
        """Do without the heavy tier, which `decision` wanted to ask, for `reason`."""
        assert ran.verdict is not None
        instead = fall_back(ran.verdict, reason)
        is_deferred = (
            instead.choice is Choice.ANSWER
            and reason is Reason.HEAVY_UNAVAILABLE
            and self._terms.is_deferrable
            and self._is_deferred(ran, decision)
        )
        self._answer_at_edge(ran, instead, finished_s=finished_s, is_final=not is_deferred)

    def _is_deferred(self, ran: Ran, decision: Decision) -> bool:
        assert ran.verdict is not None
        # Whatever the policy has said before: what is kept must be allowed to leave.
        if self._mailbox is None or self._privacy is not Privacy.ANY:
            return False
        return self._services.is_taken(self._heavy_request(), self._mailbox, decision.reason, ran.verdict.confidence)

    def _answer_at_edge(self, ran: Ran, decision: Decision, *, finished_s: float, is_final: bool = True) -> None:
        reason = decision.reason
        if decision.choice is Choice.REFUSE:
            self.fail(refusal(self.model.manifest.model, ran.verdict, reason), ran)
        else:
            self._note_slowness(ran, finished_s)
            if not is_final:
                self._services.metrics.answered_provisionally(self.model.manifest.model, reason)
            self._finish(self._edge_answer(ran, reason, is_final=is_final), ran)
        is_hard = reason is not Reason.CONFIDENT and reason is not Reason.NO_CASCADE
        if is_hard or (self._services.example_margin > 0 and self._was_nearly_unsure(ran)):
            self._offer(ran, Tier.EDGE, reason, None)

    def _was_nearly_unsure(self, ran: Ran) -> bool:
        if self.model.cascade is None or ran.verdict is None or ran.verdict.confidence is None:
            return False
        return ran.verdict.confidence - self.model.cascade.threshold <= self._services.example_margin

    def _edge_answer(
        self, ran: Ran, reason: Reason, *, is_final: bool, later: "asyncio.Future[Answer] | None" = None
    ) -> Answer:
        confidence = None if ran.verdict is None else ran.verdict.confidence
        response = self.model.response(self._request, ran.outputs)
        measured_j = self._services.measured_j
        return Answer(
            response, Tier.EDGE, reason, confidence, self._traceparent, is_final, later, measured_j=measured_j
        )

    def _keep(self, keep: Keep, ran: Ran | None, *, error_type: str = "") -> None:
        """Begin the trace of a request that was not sampled, late and with what is known of it, if there may be one."""
        if self.trace is not None or not self._services.permits(keep, error_type=error_type):
            return
        trace = self.start_trace(keep)
        if ran is not None:
            trace.ran(started_s=ran.started_s, finished_s=ran.finished_s, batch_rows=ran.batch_rows)

    def _note_slowness(self, ran: Ran, finished_s: float) -> None:
        if finished_s - self.queued_s >= self._services.slow_s:
            self._keep(Keep.SLOW, ran)

    def _finish(self, answer: Answer, ran: Ran) -> None:
        if self.trace is not None:
            self.trace.answered(span_attributes(answer, self._privacy))
        if not self.future.done():
            self._services.metrics.answered(
                self.model.manifest.model,
                answer.tier,
                answer.reason,
                queued_s=self.queued_s,
                started_s=ran.started_s,
                finished_s=ran.finished_s,
                traceparent=answer.traceparent,
            )
            self.future.set_result(answer)

    def _offer(self, ran: Ran, tier: Tier, reason: Reason, heavy: InferResponse | None) -> None:
        if self._privacy is Privacy.DEVICE or ran.verdict is None or not self._services.wants_examples:
            return
        self._services.offer(
            HardExample(
                self.model, self._request, ran.outputs, ran.verdict, tier, reason, heavy=heavy, privacy=self._privacy
            )
        )
