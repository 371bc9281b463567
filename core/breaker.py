"""Circuit breaker: after repeated failures, refuse at once instead of spending every caller's deadline.

closed --N failures in a row--> open --after open_s--> half-open: one probe --success--> closed, --failure--> open.
Pure: the time comes in as an argument. Source: M. Nygard, "Release It!", 2nd ed., chapter 5.
"""

from dataclasses import dataclass
from enum import Enum


class BreakerState(Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    failures_to_open: int = 3
    open_s: float = 1.0


class Breaker:
    """One breaker per dependency. Every permitted call ends in exactly one of succeeded, failed or abandoned."""

    def __init__(self, policy: BreakerPolicy) -> None:
        self._policy = policy
        self._failures = 0
        self._opened_at_s = 0.0
        self._probing = False
        self.state = BreakerState.CLOSED
        # How often it opened, for whoever looks only now and then.
        self.openings = 0

    def permits(self, now_s: float) -> bool:
        """Say whether a call may be made now; in half-open state the caller that gets True is the probe."""
        if self.state is BreakerState.CLOSED:
            return True
        if self.state is BreakerState.OPEN and now_s - self._opened_at_s >= self._policy.open_s:
            self.state = BreakerState.HALF_OPEN
            self._probing = False
        if self.state is BreakerState.HALF_OPEN and not self._probing:
            self._probing = True
            return True
        return False

    def refuses(self, now_s: float) -> bool:
        """Say whether `permits` would refuse a call now, without asking for one."""
        if self.state is BreakerState.OPEN:
            return now_s - self._opened_at_s < self._policy.open_s
        return self.state is BreakerState.HALF_OPEN and self._probing

    def succeeded(self) -> None:
        self._failures = 0
        self._probing = False
        self.state = BreakerState.CLOSED

    def failed(self, now_s: float) -> None:
        if self.state is BreakerState.OPEN:
            # A call that began before it opened: no news, and no reason to stay open for longer.
            return
        self._failures += 1
        self._probing = False
        if self.state is BreakerState.HALF_OPEN or self._failures >= self._policy.failures_to_open:
            self.state = BreakerState.OPEN
            self._opened_at_s = now_s
            self.openings += 1

    def abandoned(self) -> None:
        """The call ended without telling anything of the dependency, for example because its caller left."""
        self._probing = False
