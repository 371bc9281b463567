"""The instant until which an answer is of use; it travels with the request through every tier."""

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Deadline:
    """An instant on the monotonic clock of this process, in seconds."""

    at_s: float

    @classmethod
    def after(cls, seconds: float, *, now_s: float) -> Self:
        return cls(now_s + seconds)

    def remaining_s(self, now_s: float) -> float:
        """Return the seconds left; zero or less when it has passed."""
        return self.at_s - now_s
