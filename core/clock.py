"""Time as an argument: what needs the time takes a Clock, so that tests can hold it still."""

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    def now(self) -> datetime:
        """Return wall-clock time, in UTC."""
        ...

    def monotonic_s(self) -> float:
        """Return seconds from an arbitrary start that never run backwards; the same clock as an asyncio loop's."""
        ...


class SystemClock:
    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic_s(self) -> float:
        return time.monotonic()
