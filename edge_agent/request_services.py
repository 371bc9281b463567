"""What the requests of one data plane share: the way to the heavy tier, traces, counts, and who else wants to know."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Protocol

from core.clock import Clock
from core.deadline import Deadline
from core.keeping import Keep
from core.logs import withheld
from core.open_inference.messages import InferRequest, InferResponse
from core.open_inference.service import Call
from core.telemetry import Tracing
from edge_agent.answer import Answer
from edge_agent.cascade.deferral import Deferrals, Mailbox
from edge_agent.cascade.policy import Privacy, Reason
from edge_agent.hard_examples import HardExample, HardExamples
from edge_agent.request_metrics import RequestMetrics
from edge_agent.request_trace import Origin, RequestTrace
from edge_agent.runtime.pool import LoadedModel

_log = logging.getLogger(__name__)


class Escalation(Protocol):
    """The way to the large models; `cascade.offload.Offload` is the real one."""

    def obstacle(self, model: str, *, remaining_s: float | None) -> Reason | None: ...

    async def ask(
        self, request: InferRequest, *, deadline: Deadline | None = None, traceparent: str | None = None
    ) -> InferResponse: ...


class Services:
    def __init__(
        self,
        offload: Escalation,
        *,
        tracing: Tracing,
        clock: Clock,
        metrics: RequestMetrics,
        deferrals: Deferrals | None,
        examples: HardExamples | None,
        is_reachable: Callable[[], bool] | None,
    ) -> None:
        """`is_reachable` says what probes know of the heavy tier; None: it is found out by asking."""
        self.metrics = metrics
        # Compared with on the hot path: an attribute, nothing to call.
        self.slow_s = tracing.keeper.slow_s
        self.now_s = clock.monotonic_s
        # Of an answer, on average; whoever measures keeps it up to date.
        self.measured_j: float | None = None
        self._offload = offload
        self._tracing = tracing
        self._clock = clock
        self._deferrals = deferrals
        self._examples = examples
        # As `slow_s`: an attribute.
        self.example_margin = 0.0 if examples is None else examples.margin
        self._is_reachable = is_reachable
        self._loop = asyncio.get_running_loop()
        self._escalations: set[asyncio.Task[None]] = set()

    def create_future(self) -> "asyncio.Future[Answer]":
        return self._loop.create_future()

    def start_trace(
        self, model: LoadedModel, call: Call, origin: Origin, privacy: Privacy, *, queued_s: float, keep: Keep
    ) -> RequestTrace:
        return RequestTrace(
            self._tracing.log,
            self._clock,
            manifest=model.manifest,
            digest=model.digest,
            origin=origin,
            parent=call.traceparent,
            queued_s=queued_s,
            keep=keep,
            is_private=privacy is Privacy.DEVICE,
        )

    def permits(self, keep: Keep, *, error_type: str) -> bool:
        """Say whether a request that was not sampled may be traced all the same."""
        return self._tracing.keeper.permits(keep, now_s=self.now_s(), error_type=error_type)

    def obstacle(self, model: str, *, remaining_s: float | None) -> Reason | None:
        """Return why the large model is not worth asking with so much time left; None: it is."""
        if self._is_reachable is not None and not self._is_reachable():
            return Reason.HEAVY_UNAVAILABLE
        return self._offload.obstacle(model, remaining_s=remaining_s)

    def start(self, escalation: Coroutine[None, None, None], *, model: str) -> "asyncio.Task[None]":
        task = self._loop.create_task(escalation, name=f"offload {model}")
        self._escalations.add(task)
        task.add_done_callback(self._escalations.discard)
        return task

    async def close(self) -> None:
        """Cancel the escalations under way."""
        # One that has not begun would end without a word to its caller.
        await asyncio.sleep(0)
        escalations = tuple(self._escalations)
        for escalation in escalations:
            escalation.cancel()
        await asyncio.gather(*escalations, return_exceptions=True)

    async def ask_heavy(self, request: InferRequest, call: Call, trace: RequestTrace | None) -> InferResponse:
        if trace is None:
            return await self._offload.ask(request, deadline=call.deadline, traceparent=call.traceparent)
        span = trace.offload(started_s=self.now_s())
        try:
            response = await self._offload.ask(request, deadline=call.deadline, traceparent=span.traceparent)
        except BaseException as error:
            span.end(error)
            raise
        span.end()
        return response

    def is_taken(self, request: InferRequest, mailbox: Mailbox, reason: Reason, confidence: float | None) -> bool:
        """Defer `request`, the one for the heavy tier; False: nobody keeps it."""
        if self._deferrals is None:
            return False
        try:
            reply_to = mailbox.reply_to(reason, confidence)
            return reply_to is not None and self._deferrals.take(
                request, dedupe_id=mailbox.dedupe_id(), reply_to=reply_to
            )
        except Exception as error:
            # A defect there must not cost the answer that there is.
            _log.error("an escalation could not be deferred", exc_info=withheld(error))
            return False

    @property
    def wants_examples(self) -> bool:
        return self._examples is not None

    def offer(self, example: HardExample) -> None:
        if self._examples is None:
            return
        try:
            self._examples.offer(example)
        except Exception as error:
            # As above: the request has its answer.
            _log.error("a hard example was not taken", exc_info=withheld(error))
