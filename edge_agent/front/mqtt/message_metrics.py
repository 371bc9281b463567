"""How long a device's message takes from its arrival to its reply: `messaging.process.duration` of the conventions."""

from core.errors import NanofleetError
from core.metrics import CALL_BUCKETS_S, Histogram, Registry


class MessageMetrics:
    def __init__(self, registry: Registry) -> None:
        self._durations = registry.histogram(
            "messaging_process_duration_seconds",
            "From the arrival of a device's message to its reply or its refusal.",
            ("messaging_system", "messaging_operation_name", "error_type"),
            bounds=CALL_BUCKETS_S,
        )
        self._answered = self._of("")

    def processed(self, duration_s: float, error: NanofleetError | None = None) -> None:
        (self._answered if error is None else self._of(error.code.value)).observe(duration_s)

    def _of(self, error_type: str) -> Histogram:
        return self._durations.of("mqtt", "process", error_type)
