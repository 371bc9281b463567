"""What the gateway counts: requests by model and status, and how long the heavy tier took.

    nanofleet_gateway_requests_total{model, status}       status "ok", or the code of the error
    nanofleet_stage_duration_seconds{model, stage, tier}  stage "heavy": from the request to the tier until its answer

Whoever asks chooses the name that stands in a request, so only names that the registry knows become labels.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from core.clock import Clock
from core.errors import NanofleetError
from core.metrics import OTHER, STAGE_BUCKETS_S, Exemplar, Registry

OK = "ok"
# Chosen: more models than a fleet has in use; what comes beyond is counted together.
MAX_MODELS = 256
# Where trace id and flags stand in a traceparent (W3C Trace Context, section 3.2); the flags' lowest bit is "sampled".
_TRACE_ID, _FLAGS_DIGIT = slice(3, 35), 54


class GatewayMetrics:
    def __init__(self, registry: Registry, *, clock: Clock) -> None:
        self._clock = clock
        self._requests = registry.counter(
            "nanofleet_gateway_requests", "Requests to the large models, by what became of them.", ("model", "status")
        )
        self._stages = registry.histogram(
            "nanofleet_stage_duration_seconds",
            "How long a stage of a request took.",
            ("model", "stage", "tier"),
            bounds=STAGE_BUCKETS_S,
        )
        self._models: set[str] = set()

    def exists(self, model: str) -> None:
        """Take note that the registry knows `model`."""
        if len(self._models) < MAX_MODELS:
            self._models.add(model)

    def answered(self, model: str) -> None:
        self._requests.of(self._named(model), OK).inc()

    def refused(self, model: str, error: NanofleetError) -> None:
        self._requests.of(model if model in self._models else "", error.code.value).inc()

    @contextmanager
    def heavy(self, model: str, traceparent: str | None) -> Iterator[None]:
        """Measure what is done inside, however it ends."""
        started_s = self._clock.monotonic_s()
        try:
            yield
        finally:
            duration_s = self._clock.monotonic_s() - started_s
            stage = self._stages.of(self._named(model), "heavy", "heavy")
            stage.observe(duration_s)
            if traceparent is not None and traceparent[_FLAGS_DIGIT] not in "02468ace":
                at_s = self._clock.now().timestamp()
                stage.remember(Exemplar(traceparent[_TRACE_ID], duration_s, at_s))

    def _named(self, model: str) -> str:
        return model if model in self._models else OTHER
