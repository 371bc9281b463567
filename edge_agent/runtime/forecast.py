"""When a request would have its answer: from what is ahead of it, and from how long runs have taken lately.

The queue asks before it takes a request and again before it runs one, so that no work is done whose answer comes too
late: under overload every run is for somebody who still wants it. A part of every deadline is kept back, for the way to
the agent is not seen here and the way back is still to come.

Decides only: the instant comes as an argument.
"""

from edge_agent.runtime.estimate import RunTimes
from edge_agent.runtime.job import NEVER
from edge_agent.runtime.session import RunTime

# Of what is left of a deadline, so that a short one is not all reserve.
_MAX_RESERVED_SHARE = 0.25
# What is ahead may take longer than it took lately; and who waits to the last moment is late when anything stirs.
_PESSIMISM = 1.25
# Chosen: nobody is sent away for longer on the strength of an estimate.
_MAX_RETRY_AFTER_S = 30.0
_STEP = 0.25


class Forecast:
    def __init__(self, measured: RunTime, *, max_batch: int, reserve_s: float) -> None:
        self.times = RunTimes(measured, max_batch=max_batch)
        self._max_batch = max_batch
        self._reserve_s = reserve_s
        # When the run under way will have ended.
        self._until_s = 0.0
        # How long a batch waits for a thread, while other models take theirs.
        self._turn_s = 0.0

    def restart(self, measured: RunTime) -> None:
        """Forget what was learnt: another variant runs from now on."""
        self.times = RunTimes(measured, max_batch=self._max_batch)

    def due_s(self, deadline_s: float, *, now_s: float) -> float:
        """Return when a run must have ended for its answer to arrive by `deadline_s`."""
        if deadline_s == NEVER:
            return NEVER
        return deadline_s - min(self._reserve_s, _MAX_RESERVED_SHARE * max(0.0, deadline_s - now_s))

    def finish_s(self, rows: int, *, ahead: int, now_s: float) -> float:
        """Return when a request of `rows` behind `ahead` others would have run, even if those take a little longer."""
        own_s = self.times.expected_s(rows)
        turns = -(-(ahead + rows) // self._max_batch)
        wait_s = turns * self._turn_s + self.times.expected_for_all_s(ahead + rows) - own_s
        return max(now_s, self._until_s) + _PESSIMISM * max(0.0, wait_s) + own_s

    def retry_after_s(self, excess_s: float) -> float:
        """Return when to come again: when as much as is too much has run, and at the soonest after one run."""
        return min(max(excess_s, self.times.single_s, 0.001), _MAX_RETRY_AFTER_S)

    def started(self, rows: int, *, wanted_s: float, now_s: float) -> None:
        """Note that a run starts, for which a thread was wanted since `wanted_s`."""
        self._turn_s += _STEP * (now_s - wanted_s - self._turn_s)
        self._until_s = now_s + self.times.expected_s(rows)

    def ended(self, rows: int, *, started_s: float, now_s: float) -> None:
        """Note that a run has ended and its answers are given."""
        self.times.observe(rows, now_s - started_s)
        self._until_s = now_s
