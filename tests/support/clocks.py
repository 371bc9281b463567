"""A clock that stands still until it is told otherwise."""

from datetime import UTC, datetime


class HeldClock:
    def __init__(self, *, monotonic_s: float = 0.0) -> None:
        self._monotonic_s = monotonic_s
        self._now = datetime(2026, 1, 1, tzinfo=UTC)

    def now(self) -> datetime:
        return self._now

    def monotonic_s(self) -> float:
        return self._monotonic_s

    def pass_s(self, seconds: float) -> None:
        """Let time go by."""
        self._monotonic_s += seconds

    def set(self, now: datetime) -> None:
        """Let the wall clock jump; no time goes by."""
        self._now = now
