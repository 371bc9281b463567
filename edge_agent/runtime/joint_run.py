"""One run for several requests: their rows joined, the outputs divided among them, errors kept to whom they belong.

Called in the loop or on a thread; touches nothing but its arguments, and never raises.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from core.errors import DeadlineExceeded, InternalError, NanofleetError
from core.logs import withheld
from core.tensors import Array
from edge_agent.cascade.confidence import Verdict, weakest
from edge_agent.runtime.job import Job, Ran

_log = logging.getLogger(__name__)

Run = Callable[[Sequence[Array]], Sequence[Array]]
# Verdicts per row of the outputs; None for a model without a cascade.
JudgeOutputs = Callable[[Sequence[Array]], Sequence[Verdict]]


@dataclass(frozen=True, slots=True)
class JointRun:
    """What runs a batch of one model."""

    name: str
    run: Run
    judge: JudgeOutputs | None
    now_s: Callable[[], float]

    def compute(self, batch: Sequence[Job]) -> Sequence[Ran | NanofleetError]:
        """Run a batch; when that fails, each of its requests alone, so that only the faulty ones fail."""
        try:
            return self._compute(batch)
        except NanofleetError as error:
            if len(batch) == 1:
                return [error]
            return [result for job in batch for result in self._compute_late(job)]
        except Exception as error:
            _log.error("a model run failed unexpectedly", extra={"model": self.name}, exc_info=withheld(error))
            return [InternalError(f"model {self.name}: the run failed: {type(error).__name__}")] * len(batch)

    def _compute_late(self, job: Job) -> Sequence[Ran | NanofleetError]:
        if job.deadline_s <= self.now_s():
            return [DeadlineExceeded(f"model {self.name}: the deadline passed while another request's fault was found")]
        return self.compute([job])

    def _compute(self, batch: Sequence[Job]) -> Sequence[Ran]:
        inputs = batch[0].inputs if len(batch) == 1 else _joined(batch)
        started_s = self.now_s()
        outputs = self.run(inputs)
        verdicts = None if self.judge is None else self.judge(outputs)
        finished_s = self.now_s()
        if len(batch) == 1:
            verdict = None if verdicts is None else weakest(verdicts)
            return [Ran(outputs, verdict, started_s, finished_s, batch[0].rows)]
        return self._split(batch, outputs, verdicts, started_s, finished_s)

    def _split(
        self,
        batch: Sequence[Job],
        outputs: Sequence[Array],
        verdicts: Sequence[Verdict] | None,
        started_s: float,
        finished_s: float,
    ) -> Sequence[Ran]:
        rows = sum([job.rows for job in batch])
        if any(output.ndim == 0 or output.shape[0] != rows for output in outputs):
            shapes = [list(output.shape) for output in outputs]
            raise InternalError(f"model {self.name}: expected {rows} rows in every output, got shapes {shapes}")
        results = []
        first = 0
        for job in batch:
            behind = first + job.rows
            verdict = None if verdicts is None else _verdict_on(verdicts, first, behind, of=rows)
            parts = [output[first:behind] for output in outputs]
            results.append(Ran(parts, verdict, started_s, finished_s, rows))
            first = behind
        return results


def _joined(batch: Sequence[Job]) -> Sequence[Array]:
    return [np.concatenate(arrays) for arrays in zip(*[job.inputs for job in batch], strict=True)]


def _verdict_on(verdicts: Sequence[Verdict], first: int, behind: int, *, of: int) -> Verdict:
    # Scores of more than two dimensions have several verdicts per row.
    per_row = len(verdicts) // of
    return weakest(verdicts[first * per_row : behind * per_row])
