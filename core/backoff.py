"""Full-jitter exponential backoff: delay = random(0, min(cap, base * 2^attempt)).

Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015; of the variants there, the one with
the least total work when many clients return at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import random


@dataclass(frozen=True, slots=True)
class BackoffPolicy:
    base_s: float = 1.0
    cap_s: float = 120.0


class Backoff:
    """The delays of one caller; `reset` after a success."""

    def __init__(self, policy: BackoffPolicy, *, uniform: Callable[[], float] = random) -> None:
        self._policy = policy
        self._uniform = uniform
        self._attempt = 0

    def next_delay_s(self) -> float:
        # The exponent is bounded so that a long outage cannot overflow the float.
        ceiling = min(self._policy.cap_s, self._policy.base_s * 2.0 ** min(self._attempt, 62))
        self._attempt += 1
        return ceiling * self._uniform()

    def reset(self) -> None:
        self._attempt = 0
