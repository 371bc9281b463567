"""What is expected of a model's next runs, from those that were: how long they take, and whether to wait for more rows.

`RunTimes` is a line through rows and seconds, held by its two ends (one row, a full batch) and moved towards each run
by normalised least mean squares (Haykin, "Adaptive Filter Theory", chapter 6): no history is kept, and runs of one size
alone do not tilt it without bound.

`rows_worth_waiting_for` weighs one run later against two runs, one of them now. Let n rows wait, k more arrive at a
rate r, and a run of m rows take a + b m. Now: n rows end after a + b n, the k after a second run behind the first. In
one run: all end after k / r + a + b (n + k). The sum over all n + k of what they wait is less in one run by

    k (a - b n - (n + k) / r)      which is largest for      k = (r (a - b n) - n) / 2

Nobody waits, then, unless rows come faster than one per fixed cost of a run; a caller that asks again only when it is
answered never does, and a wait is shorter than half of what a run costs anyway.

Decides only: no clock, no waiting.
"""

from edge_agent.runtime.session import RunTime

# Chosen: a change of the machine's speed is followed within about ten runs.
_STEP = 0.125
# A run that was held up tells little of the next: it counts as no longer than so many times what was expected.
_MAX_SURPRISE = 3.0
# How much an estimate loses each time that it alone kept a request from running, so that in the end one does run.
_DOUBT = 0.95


class RunTimes:
    """The line of one model; starts as it was measured when the model was loaded."""

    def __init__(self, measured: RunTime, *, max_batch: int) -> None:
        self._span = max_batch - 1
        self._max_batch = max_batch
        self.single_s, self.full_s = measured

    @property
    def fixed_s(self) -> float:
        """What a run costs whatever its rows."""
        return max(0.0, self.single_s - self.per_row_s)

    @property
    def per_row_s(self) -> float:
        return max(0.0, self.full_s - self.single_s) / self._span if self._span else 0.0

    def expected_s(self, rows: int) -> float:
        """Return how long one run of `rows` will take."""
        if rows == 1 or not self._span:
            return self.single_s
        return self.single_s + (self.full_s - self.single_s) * (rows - 1) / self._span

    def expected_for_all_s(self, rows: int) -> float:
        """Return how long it will take to run `rows` in as few batches as they fit into."""
        full, rest = divmod(rows, self._max_batch)
        return full * self.expected_s(self._max_batch) + (self.expected_s(rest) if rest else 0.0)

    def observe(self, rows: int, took_s: float) -> None:
        expected_s = self.expected_s(rows)
        if expected_s > 0:
            took_s = min(took_s, _MAX_SURPRISE * expected_s)
        share = (rows - 1) / self._span if self._span else 0.0
        error_s = (took_s - expected_s) / ((1 - share) ** 2 + share**2)
        step = _STEP if expected_s > 0 else 1.0
        self.single_s = max(0.0, self.single_s + step * error_s * (1 - share))
        self.full_s = max(self.single_s, self.full_s + step * error_s * share)

    def doubt(self) -> None:
        """Note that nothing ran because of this estimate: unless it is tried again it can never be corrected."""
        self.single_s *= _DOUBT
        self.full_s *= _DOUBT

    def rows_worth_waiting_for(self, waiting: int, *, rate_per_s: float, max_wait_s: float, slack_s: float) -> int:
        """Return how many more rows a batch should wait for; 0: run now.

        Args:
            waiting: rows that could run now, at least one.
            rate_per_s: at which rows arrive.
            max_wait_s: longest wait, whatever it would gain.
            slack_s: until the run of those who wait must have ended.
        """
        if rate_per_s <= 0:
            return 0
        gained_s = self.fixed_s - self.per_row_s * waiting
        best = int((rate_per_s * gained_s - waiting) / 2)
        more = min(best, self._max_batch - waiting, int(rate_per_s * max_wait_s))
        while more > 0 and more / rate_per_s + self.expected_s(waiting + more) > slack_s:
            more -= 1
        return max(0, more)


class ArrivalRate:
    """Rows per second, an average over the last few looks."""

    def __init__(self) -> None:
        self.per_s = 0.0
        self._looked_s: float | None = None

    def look(self, rows: int, *, now_s: float) -> None:
        """Note that `rows` came since the last look."""
        looked_s, self._looked_s = self._looked_s, now_s
        if looked_s is not None and now_s > looked_s:
            self.per_s += 0.25 * (rows / (now_s - looked_s) - self.per_s)
