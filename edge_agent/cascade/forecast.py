"""How long the heavy tier will take: the 90th percentile of the latest round trips to one large model. Pure.

A round trip is all of it, the uplink and the tier. One that ran into its timeout counts as a little longer than that,
which is the least that is known of it. What is old says nothing any more, so an estimate that keeps everybody away
fades by itself; until then one request now and then is let through to look (a probe).

A percentile is that of the nearest rank: with n round trips the ceil(0.9 n)-th in order of length.
"""

import math
from collections import deque
from dataclasses import dataclass

# Chosen: requests of one deadline differ by less in what is left of it when they come to escalate.
_BEYOND_TIMEOUT = 1.1


@dataclass(frozen=True, slots=True)
class ForecastPolicy:
    # Chosen: enough that one slow round trip in twenty does not move the percentile.
    window: int = 128
    # Chosen: a tier that scales up or an uplink that recovers does so within this.
    max_age_s: float = 30.0
    # Chosen: at most one request in two seconds is spent on looking.
    probe_interval_s: float = 2.0
    quantile: float = 0.9


class Forecast:
    """For one large model; the time comes in as an argument and never goes back."""

    def __init__(self, policy: ForecastPolicy) -> None:
        self._policy = policy
        # (when it ended, how long it took), the latest last.
        self._trips: deque[tuple[float, float]] = deque(maxlen=policy.window)
        self._probed_s = -math.inf
        self._known: float | None = None

    def observe(self, took_s: float, *, now_s: float) -> None:
        """Note a round trip."""
        self._trips.append((now_s, took_s))
        self._known = None

    def observe_timeout(self, timeout_s: float, *, now_s: float) -> None:
        """Note a round trip of which only this is known: it was not over after `timeout_s`."""
        self.observe(timeout_s * _BEYOND_TIMEOUT, now_s=now_s)

    def expected_s(self, now_s: float) -> float | None:
        """Return how long it takes in nine of ten cases; None: nothing is known."""
        oldest_s = now_s - self._policy.max_age_s
        while self._trips and self._trips[0][0] <= oldest_s:
            self._trips.popleft()
            self._known = None
        if self._known is None and self._trips:
            durations = sorted(took_s for _, took_s in self._trips)
            self._known = durations[math.ceil(self._policy.quantile * len(durations)) - 1]
        return self._known

    def permits(self, budget_s: float, *, now_s: float) -> bool:
        """Say whether to ask with `budget_s` left: the answer will probably be in time, or somebody has to look."""
        expected_s = self.expected_s(now_s)
        if expected_s is None or expected_s < budget_s:
            return True
        if now_s - max(self._probed_s, self._trips[-1][0]) < self._policy.probe_interval_s:
            return False
        self._probed_s = now_s
        return True
