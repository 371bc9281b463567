"""What the agent counts of its requests: what became of each, and how long each stage of it took.

    nanofleet_requests_total{model, outcome, tier, reason}
        answered  tier and reason as in the reply
        refused, expired, failed  tier "none", the reason is the code of the error
    nanofleet_provisional_answers_total{model, reason}
        answers behind which another one follows, beside the one request that each belongs to: low_confidence while
        the heavy tier is asked, heavy_unavailable where the escalation waits until it is back
    nanofleet_stage_duration_seconds{model, stage, tier}
        queue, compute at the edge; offload: the heavy tier was asked; total: from admission to the answer of `tier`

Only models that run here are named; a request for another has an empty `model`, which is as good as no label. The
instruments of a model are looked up once: an answer at the edge costs 1.2 us (measured, ADR 19).
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from core import metrics
from core.clock import Clock
from core.errors import DeadlineExceeded, ErrorCode, InternalError, NanofleetError
from core.fleet_state import Usage
from core.metrics import OTHER, STAGE_BUCKETS_S, Exemplar, Family, Histogram, Registry
from core.open_inference.statistics import Duration, ModelStatistics
from edge_agent.cascade.policy import Reason, Tier

NO_TIER = "none"
# Chosen: twice what a state may name at one time; whatever comes after them is counted together.
MAX_MODELS = 512
# Where the trace id stands in a traceparent (W3C Trace Context, section 3.2).
_TRACE_ID = slice(3, 35)


class RequestMetrics:
    def __init__(self, registry: Registry, *, clock: Clock) -> None:
        self._clock = clock
        self._requests = registry.counter(
            "nanofleet_requests", "Requests, by what became of them.", ("model", "outcome", "tier", "reason")
        )
        self._provisional = registry.counter(
            "nanofleet_provisional_answers", "Answers behind which another one follows.", ("model", "reason")
        )
        self._stages = registry.histogram(
            "nanofleet_stage_duration_seconds",
            "How long a stage of a request took; `total` is the whole way through the agent.",
            ("model", "stage", "tier"),
            bounds=STAGE_BUCKETS_S,
        )
        self._models: dict[str, _OfModel] = {}
        self._refused = self._failed = 0

    def answered(
        self,
        model: str,
        tier: Tier,
        reason: Reason,
        *,
        queued_s: float,
        started_s: float,
        finished_s: float,
        traceparent: str | None,
    ) -> None:
        """Note an answer of `tier`; the times are those of the edge model's run, which came first in any case."""
        of_model = self._models.get(model) or self._of(model)
        of_model.queue.observe(started_s - queued_s)
        of_model.compute.observe(finished_s - started_s)
        self._answered(model, of_model, tier, reason, queued_s=queued_s, traceparent=traceparent)

    def answered_again(self, model: str, reason: Reason, *, queued_s: float, traceparent: str | None) -> None:
        """Note an answer from the cache: no stage of it is the model's."""
        self._answered(model, self._of(model), Tier.EDGE, reason, queued_s=queued_s, traceparent=traceparent)

    def _answered(
        self,
        model: str,
        of_model: "_OfModel",
        tier: Tier,
        reason: Reason,
        *,
        queued_s: float,
        traceparent: str | None,
    ) -> None:
        total_s = self._clock.monotonic_s() - queued_s
        total, answers = of_model.total_edge, of_model.answers_edge
        if tier is Tier.HEAVY:
            total, answers = of_model.total_heavy, of_model.answers_heavy
        total.observe(total_s)
        # The word, not the member: members of an Enum are hashed in Python.
        counter = answers.get(reason._value_)
        if counter is None:
            counter = answers[reason._value_] = self._requests.of(model, "answered", tier.value, reason.value)
        counter.count += 1
        if traceparent is not None:
            total.remember(self._exemplar(traceparent, total_s))

    def answered_provisionally(self, model: str, reason: Reason) -> None:
        """Note an answer behind which another one follows."""
        self._provisional.of(model, reason.value).inc()

    def offloaded(self, model: str, duration_s: float, *, traceparent: str | None) -> None:
        """Note how long the heavy tier took, whatever came of it."""
        offload = self._of(model).offload
        offload.observe(duration_s)
        if traceparent is not None:
            offload.remember(self._exemplar(traceparent, duration_s))

    def failed(self, model: str, error: NanofleetError) -> None:
        """Note a request without an answer; `model` is empty unless it runs here."""
        outcome = _outcome(error)
        self._requests.of(model, outcome, NO_TIER, error.code.value).inc()
        if outcome == "failed":
            self._failed += 1
        else:
            self._refused += 1

    def usage(self) -> Usage:
        return Usage(
            answered_edge=sum(each.total_edge.count for each in self._models.values()),
            answered_heavy=sum(each.total_heavy.count for each in self._models.values()),
            refused=self._refused,
            failed=self._failed,
        )

    def usage_by_model(self) -> Mapping[str, Usage]:
        """Return the same by model; requests for models that do not run here stand under the empty name."""
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for (model, outcome, tier, _reason), instrument in self._requests.items():
            word = f"answered_{tier}" if outcome == "answered" else "failed" if outcome == "failed" else "refused"
            found[model][word] += int(instrument.count)
        return {
            model: Usage(words["answered_edge"], words["answered_heavy"], words["refused"], words["failed"])
            for model, words in found.items()
        }

    def private(self) -> Mapping[tuple[str, str], int]:
        """Return how many requests of each model stayed at the edge, or were refused, because they are private."""
        found: Counter[tuple[str, str]] = Counter()
        for (model, outcome, _tier, reason), instrument in self._requests.items():
            if outcome == "answered" and reason == Reason.PRIVACY.value:
                found["privacy.kept", model] += int(instrument.count)
            if outcome == "refused" and reason == ErrorCode.FORBIDDEN.value:
                found["privacy.refused", model] += int(instrument.count)
        return found

    def statistics(self, model: str, version: str) -> ModelStatistics:
        """Return what was counted of a model that runs here, for the "statistics" extension of Open Inference.

        A queue and a run count for each request that shared them; how long a failure took is not measured.
        """
        of_model = self._models.get(model)
        if of_model is None:
            return ModelStatistics(model, version, fail=self._failures_of(model))
        edge, heavy = of_model.total_edge, of_model.total_heavy
        return ModelStatistics(
            model,
            version,
            success=Duration.of(edge.count + heavy.count, edge.total + heavy.total),
            fail=self._failures_of(model),
            queue=Duration.of(of_model.queue.count, of_model.queue.total),
            compute_infer=Duration.of(of_model.compute.count, of_model.compute.total),
        )

    def _failures_of(self, model: str) -> Duration:
        outcomes = self._requests.items()
        return Duration.of(
            round(sum(each.count for values, each in outcomes if values[0] == model and values[1] != "answered"))
        )

    def _of(self, model: str) -> "_OfModel":
        if model not in self._models and len(self._models) >= MAX_MODELS:
            model = OTHER
        known = self._models.get(model)
        if known is None:
            known = self._models[model] = _OfModel.of(self._stages, model)
        return known

    def _exemplar(self, traceparent: str, value: float) -> Exemplar:
        return Exemplar(traceparent[_TRACE_ID], value, self._clock.now().timestamp())


@dataclass(frozen=True, slots=True)
class _OfModel:
    queue: Histogram
    compute: Histogram
    offload: Histogram
    total_edge: Histogram
    total_heavy: Histogram
    # By reason.
    answers_edge: dict[str, metrics.Counter]
    answers_heavy: dict[str, metrics.Counter]

    @classmethod
    def of(cls, stages: Family[Histogram], model: str) -> "_OfModel":
        edge, heavy = Tier.EDGE.value, Tier.HEAVY.value
        return cls(
            queue=stages.of(model, "queue", edge),
            compute=stages.of(model, "compute", edge),
            offload=stages.of(model, "offload", heavy),
            total_edge=stages.of(model, "total", edge),
            total_heavy=stages.of(model, "total", heavy),
            answers_edge={},
            answers_heavy={},
        )


def _outcome(error: NanofleetError) -> str:
    if isinstance(error, DeadlineExceeded):
        return "expired"
    return "failed" if isinstance(error, InternalError) else "refused"
