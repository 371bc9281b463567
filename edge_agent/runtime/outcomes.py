"""What becomes of requests: each waiter hears once, no defect of one reaches another, and what is shed is counted."""

import logging
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum

from core.errors import DeadlineExceeded, InternalError, ModelNotReady, NanofleetError, Overloaded
from core.logs import withheld
from edge_agent.runtime.forecast import Forecast
from edge_agent.runtime.job import Job, Ran, Waiter

_log = logging.getLogger(__name__)


class Shed(StrEnum):
    """Why a request was not run."""

    FULL = "full"
    """Refused: the queue is full of those who deserve their places at least as much."""
    HOPELESS = "hopeless"
    """Refused: what is ahead of it takes longer than it has."""
    DISPLACED = "displaced"
    """Gave up its place to a more urgent request, or to a client with less."""
    OVERTAKEN = "overtaken"
    """When its turn came, too little time was left to run it."""
    EXPIRED = "expired"
    """Its deadline passed in the queue."""
    LEFT = "left"
    """Its caller left."""


class Outcomes:
    def __init__(self, model: str, forecast: Forecast) -> None:
        self.shed: Counter[Shed] = Counter()
        self._model = model
        self._forecast = forecast

    def settle(self, batch: Sequence[Job], results: Sequence[Ran | NanofleetError]) -> None:
        for job, result in zip(batch, results, strict=True):
            if not job.waiter.is_waiting():
                continue
            if isinstance(result, NanofleetError):
                self.fail(job.waiter, result)
                continue
            try:
                job.waiter.settle(result)
            except Exception as error:
                _log.error("a waiter failed on its result", extra={"model": self._model}, exc_info=withheld(error))
                if job.waiter.is_waiting():
                    self.fail(job.waiter, InternalError(f"model {self._model}: no answer: {type(error).__name__}"))

    def fail(self, waiter: Waiter, error: NanofleetError) -> None:
        # A defect of one waiter must not reach those behind it.
        try:
            waiter.fail(error)
        except Exception as defect:
            _log.error("a waiter failed on its error", extra={"model": self._model}, exc_info=withheld(defect))

    def unload(self, jobs: Sequence[Job], why: str, after_s: float | None) -> None:
        """Refuse what waits for a model that does not come; `after_s` None: nobody knows when it will."""
        for job in jobs:
            if job.waiter.is_waiting():
                refusal = ModelNotReady(f"model {self._model}: {why}; try again later")
                self.fail(job.waiter, refusal if after_s is None else refusal.after(after_s))

    def full(self, waiting: int, rows: int) -> Overloaded:
        """Return what refuses a newcomer while `waiting` requests of `rows` are queued."""
        self.shed[Shed.FULL] += 1
        return self._overloaded(f"{waiting} requests are waiting", self._forecast.times.expected_for_all_s(rows))

    def hopeless(self, job: Job, *, finish_s: float, now_s: float) -> Overloaded:
        """Return what refuses a newcomer that would have run by `finish_s` only."""
        self.shed[Shed.HOPELESS] += 1
        return self._too_little_time(job, finish_s, now_s)

    def displace(self, job: Job, rows: int) -> None:
        self.shed[Shed.DISPLACED] += 1
        after_s = self._forecast.times.expected_for_all_s(rows)
        self.fail(job.waiter, self._overloaded("the queue is full and another deserves the place more", after_s))

    def overtake(self, job: Job, *, finish_s: float, now_s: float) -> None:
        self.shed[Shed.OVERTAKEN] += 1
        self.fail(job.waiter, self._too_little_time(job, finish_s, now_s))

    def expire(self, job: Job) -> None:
        self.shed[Shed.EXPIRED] += 1
        self.fail(job.waiter, DeadlineExceeded(f"model {self._model}: the deadline passed in the queue"))

    def _too_little_time(self, job: Job, finish_s: float, now_s: float) -> Overloaded:
        left_ms = max(0.0, job.due_s - now_s) * 1000
        text = f"an answer would take {(finish_s - now_s) * 1000:.0f} ms, and {left_ms:.0f} ms are left for it"
        return self._overloaded(text, finish_s - job.due_s)

    def _overloaded(self, text: str, excess_s: float) -> Overloaded:
        after_s = self._forecast.retry_after_s(excess_s)
        return Overloaded(f"model {self._model}: {text}; try again later").after(after_s)
