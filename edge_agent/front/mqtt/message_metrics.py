"""How long a device's message takes from its arrival to its reply: `messaging.process.duration` of the conventions."""

from dataclasses import dataclass

from core.errors import NanofleetError
from core.metrics import CALL_BUCKETS_S, Histogram, Registry


@dataclass(slots=True)
class FrontCounters:
    """What became of the messages that came in; for the agent's status."""

    received: int = 0
    replied: int = 0
    refused: int = 0
    duplicates: int = 0
    # Answers that a bound made this agent forget before the deadline of their request.
    duplicates_forgotten: int = 0
    # Came too late, or their deadline passed in the queue: never answered.
    expired: int = 0
    # Answered, but not in time to be sent.
    late: int = 0
    malformed_topic: int = 0
    missing_response_topic: int = 0
    foreign_response_topic: int = 0
    unnamed_client: int = 0
    retained: int = 0

    def note_forgotten(self) -> None:
        self.duplicates_forgotten += 1


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
