"""How often something may happen: a few at once, then so many a second."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rate:
    per_s: float
    burst: int


class TokenBucket:
    """`burst` calls at once, then `per_s` of them a second; times are seconds of one monotonic clock."""

    def __init__(self, rate: Rate, *, now_s: float) -> None:
        self._rate = rate
        self._level = float(rate.burst)
        self._at_s = now_s

    def take(self, now_s: float) -> bool:
        """Take one call from the bucket; say whether there was one."""
        self._level = min(self._rate.burst, self._level + (now_s - self._at_s) * self._rate.per_s)
        self._at_s = now_s
        if self._level < 1:
            return False
        self._level -= 1
        return True
