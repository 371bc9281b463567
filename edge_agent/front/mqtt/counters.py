"""What the MQTT face counts."""

from dataclasses import dataclass


@dataclass(slots=True)
class FrontCounters:
    """What became of the messages that came in; for the agent's status."""

    received: int = 0
    replied: int = 0
    # Of those replied: answers after which another one was to follow (`final` 0).
    provisional: int = 0
    # Of those replied: verdicts of the heavy tier on requests that had waited for it.
    verdicts: int = 0
    refused: int = 0
    duplicates: int = 0
    # Answers that a bound made this agent forget before the deadline of their request.
    duplicates_forgotten: int = 0
    # Devices that measured how near this agent is.
    probes: int = 0
    # Came too late, or their deadline passed in the queue: never answered.
    expired: int = 0
    # Answered, but not in time to be sent.
    late: int = 0
    malformed_topic: int = 0
    missing_response_topic: int = 0
    foreign_response_topic: int = 0
    unnamed_client: int = 0
    retained: int = 0
    # Verdicts that waited under an address which this agent does not serve, or cannot read.
    unreadable_address: int = 0

    def note_forgotten(self) -> None:
        self.duplicates_forgotten += 1
