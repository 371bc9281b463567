"""The one way of a request through the agent; every face calls it.

    admit → queue → run → judge → answer at the edge
                                └→ escalate → answer from the heavy tier, or fall back to the edge's

`ask` admits at once and returns a future: a request that the edge answers costs no task, only one that escalates does.
Whoever cancels the future leaves: the batcher skips the request, an escalation under way is cancelled. What becomes of
a request that was admitted is in `edge_agent.request`.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence

from opentelemetry.trace import SpanKind

from core.clock import Clock
from core.errors import DeadlineExceeded, NanofleetError
from core.keeping import Keep
from core.metrics import Registry
from core.open_inference.messages import InferRequest, InferResponse, ModelIndexEntry, ModelMetadata
from core.open_inference.service import Call
from core.open_inference.statistics import ModelStatistics
from core.span_log import Attribute
from core.telemetry import Tracing
from edge_agent.answer import Answer, tagged
from edge_agent.cached_answers import CachedAnswers
from edge_agent.cascade.deferral import Deferrals, Mailbox
from edge_agent.cascade.policy import Privacy
from edge_agent.cascade.privacy import PrivacyRules
from edge_agent.hard_examples import HardExamples
from edge_agent.request import Request
from edge_agent.request_metrics import RequestMetrics
from edge_agent.request_services import Escalation, Services
from edge_agent.request_trace import Origin
from edge_agent.runtime.batcher import NEVER
from edge_agent.runtime.pool import LoadedModel, ModelPool
from edge_agent.terms import NO_TERMS, Terms, terms_of


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
        deferrals: Deferrals | None = None,
        examples: HardExamples | None = None,
        is_reachable: Callable[[], bool] | None = None,
        privacy: PrivacyRules | None = None,
        cached: CachedAnswers | None = None,
    ) -> None:
        """Serve the models of `pool`.

        Args:
            metrics: None: what is counted is nobody's to see.
            deferrals: keeps the escalations that a client lets wait; None: they are answered at the edge.
            examples: is offered every request that the edge was not sure enough of.
            is_reachable: what probes know of the heavy tier; None: it is found out by asking.
            privacy: what models and devices say of where data may go; None: only requests say something.
            cached: answers that are given again; None: every request is run.
        """
        self.metrics = metrics or RequestMetrics(Registry(), clock=clock)
        self._pool = pool
        self._privacy = privacy or PrivacyRules()
        self._tracing = tracing
        self._now_s = clock.monotonic_s
        self._services = Services(
            offload,
            tracing=tracing,
            clock=clock,
            metrics=self.metrics,
            deferrals=deferrals,
            examples=examples,
            is_reachable=is_reachable,
        )
        self._cached = cached
        if cached is not None:
            pool.on_change(lambda: cached.follow(pool.running()))

    def ask(
        self,
        request: InferRequest,
        call: Call = _NO_CALL,
        terms: Terms = NO_TERMS,
        *,
        origin: Origin = _LOCAL_CALL,
        mailbox: Mailbox | None = None,
    ) -> "asyncio.Future[Answer]":
        """Admit a request; the future holds its answer or a NanofleetError.

        Args:
            terms: what travels beside the request; its privacy class counts where it is the strictest.
            mailbox: where a second reply can go; without one there is neither a provisional answer nor a deferral.

        Raises:
            NanofleetError: not admitted: unknown model, inputs that do not fit, forbidden, overloaded or too late.
        """
        now_s = self._now_s()
        model: LoadedModel | None = None
        try:
            deadline_s = NEVER if call.deadline is None else call.deadline.at_s
            if deadline_s <= now_s:
                raise DeadlineExceeded(
                    f"model {request.model_name[:80]}: the deadline had passed when the request came"
                )
            model = self._pool.find(request.model_name, request.model_version)
            arrays = model.arrays_of(request)
            privacy = self._privacy.privacy_of(request, model.manifest, beside=terms.privacy, client=terms.client)
            waiter = Request(self._services, model, request, call, terms, privacy, origin, mailbox, now_s)
        except NanofleetError as error:
            self.metrics.failed("" if model is None else model.manifest.model, error)
            raise
        if self._tracing.is_sampled(call.traceparent):
            waiter.start_trace(Keep.SAMPLED)
        if self._cached is not None and self._is_answered_again(self._cached, model, request, privacy, waiter):
            return waiter.future
        # The waiter puts another in its place when it answers provisionally.
        future = waiter.future
        try:
            model.admit(deadline_s)
            model.batcher.submit(arrays, waiter, deadline_s=deadline_s, priority=terms.priority, client=terms.client)
        except NanofleetError as error:
            waiter.fail(error)
        return future

    def _is_answered_again(
        self, cached: CachedAnswers, model: LoadedModel, request: InferRequest, privacy: Privacy, waiter: Request
    ) -> bool:
        """Answer from the cache, or see to it that the cache hears the answer."""
        place = cached.place_of(model, request, privacy)
        if place is None:
            return False
        answer = place.find(request)
        if answer is None:
            waiter.future.add_done_callback(place.keep)
            return False
        waiter.answer_again(answer)
        return True

    async def answer(self, request: InferRequest, call: Call = _NO_CALL) -> Answer:
        """Return the answer to `request`; cancelling it withdraws the request."""
        return await self.ask(request, call)

    async def infer(self, request: InferRequest, call: Call) -> InferResponse:
        return tagged(await self.ask(request, call, terms_of(request.parameters, client=call.client)))

    def note_energy(self, joules_per_answer: float | None) -> None:
        """Say with the answers that follow what one takes; None: nothing measures it."""
        self._services.measured_j = joules_per_answer

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

    async def statistics(self, name: str, version: str) -> Sequence[ModelStatistics]:
        """Return what was counted of a model, or of each; implements `core.open_inference.service.Statistics`."""
        models = [self._pool.find(name, version)] if name else self._pool.models()
        found = [self.metrics.statistics(model.manifest.model, model.version) for model in models]
        return found if self._cached is None else list(map(self._cached.counted, found))

    async def close(self) -> None:
        """Cancel the escalations under way; their callers get the edge's answer."""
        await self._services.close()
