"""The dynamic batcher in front of one model: callers that arrive together share a run, and never each other's fate.

    submit → queue ─(end of this loop turn)→ take what fits together → run → settle each waiter

- Nobody waits for a fuller batch, unless `max_wait_s` says so. A batch is what arrived within one turn of the loop (a
  broker connection reads many packets per turn) or, when the model is slow, what gathered while the previous batch ran.
- A quick model runs in the loop: handing 13 us of work to a thread costs more than the work (about 60 us, measured).
  A slow one runs on the model's own thread, one batch at a time; so does, from then on, one that was measured as quick
  and is not.
- Who has left or whose deadline has passed when the batch is taken is not run.
- When a joint run fails, its requests are run again one by one, so that only the faulty ones fail.
- While nothing may run (the model is not in memory, or is about to leave it) requests wait, and their deadlines pass.

Everything except `_compute` runs in the loop's thread.
"""

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from core.clock import Clock
from core.errors import DeadlineExceeded, InternalError, ModelNotReady, NanofleetError, Overloaded
from core.tensors import Array
from edge_agent.cascade.confidence import Verdict, weakest
from edge_agent.runtime.session import RunTime

_log = logging.getLogger(__name__)

# A run in the loop delays every other request by its length; beyond this the hand-over to a thread is the lesser cost.
MAX_INLINE_S = 300e-6
# A full batch takes longer than its run, for its rows are judged too, and a busy core adds to that: what leaves the
# loop is what blocks it for whole milliseconds, several times in a row. On its thread a quick model is 0.2 ms later.
SLOW_S = 10 * MAX_INLINE_S
SLOW_RUNS_TO_LEAVE_LOOP = 3
NEVER = math.inf


class Ran(NamedTuple):
    """What became of one request: its own rows of the outputs, and how the batch went."""

    outputs: Sequence[Array]
    verdict: Verdict | None
    started_s: float
    finished_s: float
    batch_rows: int


class Waiter(Protocol):
    """The one who asked; called at most once, in the loop."""

    def is_waiting(self) -> bool: ...
    def settle(self, ran: Ran) -> None: ...
    def fail(self, error: NanofleetError) -> None: ...


class _Job(NamedTuple):
    inputs: Sequence[Array]
    rows: int
    # What has to be equal to share a run: the shape behind the first dimension, of every input.
    kind: tuple[tuple[int, ...], ...]
    size_bytes: int
    deadline_s: float
    waiter: Waiter


@dataclass(frozen=True, slots=True)
class QueueBounds:
    max_requests: int = 1024
    max_bytes: int = 64 << 20


Run = Callable[[Sequence[Array]], Sequence[Array]]
# Verdicts per row of the outputs; None for a model without a cascade.
JudgeOutputs = Callable[[Sequence[Array]], Sequence[Verdict]]


class Batcher:
    def __init__(
        self,
        run: Run | None,
        *,
        name: str,
        clock: Clock,
        max_batch: int = 1,
        max_wait_s: float = 0.0,
        run_time: RunTime = RunTime(0.0, 0.0),  # noqa: B008  (immutable)
        may_run_inline: bool = True,
        judge: JudgeOutputs | None = None,
        bounds: QueueBounds | None = None,
    ) -> None:
        """Make a batcher, to be used in this loop alone.

        Args:
            run: runs a batch; None: hold what comes, until `run_with`.
            may_run_inline: False: the rows of a request do not tell how long it runs, so never run it in the loop.
        """
        self._run = run
        self._name = name
        self._now_s = clock.monotonic_s
        self._max_batch = max_batch
        self._max_wait_s = max_wait_s
        self._run_time = run_time
        self._may_run_inline = may_run_inline
        self._slow_runs = 0
        self._judge = judge
        self._bounds = bounds or QueueBounds()
        self._loop = asyncio.get_running_loop()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"model-{name}")
        self._queue: deque[_Job] = deque()
        self._queued_bytes = 0
        self._is_scheduled = False
        self._is_held = run is None
        self._under_way: asyncio.Future[Sequence[Ran | NanofleetError]] | None = None
        self._is_closed = False
        self._expiry: asyncio.TimerHandle | None = None
        self._idle: asyncio.Future[None] | None = None

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is queued or running."""
        return not self._queue and self._under_way is None

    def run_with(self, run: Run, run_time: RunTime | None = None) -> None:
        """Run batches with `run` from the next one on, and release what is held.

        `run_time` None: it takes as long as the run before.
        """
        self._run = run
        if run_time is not None:
            self._run_time = run_time
        self._is_held = False
        if self._queue:
            self._schedule()

    async def hold(self) -> None:
        """Start no further run, and return when the one under way has ended; `run_with` releases what waits."""
        self._is_held = True
        self._arm_expiry()
        if self._under_way is not None:
            await asyncio.wait([self._under_way])

    def submit(self, inputs: Sequence[Array], waiter: Waiter, *, deadline_s: float = NEVER) -> None:
        """Queue one request; `deadline_s` is an instant of the clock.

        Raises:
            Overloaded: the queue is full.
            ModelNotReady: the batcher is closed.
        """
        size_bytes = sum([array.nbytes for array in inputs])
        if self._is_closed:
            raise ModelNotReady(f"model {self._name}: is being unloaded; try again later")
        if len(self._queue) >= self._bounds.max_requests or self._queued_bytes + size_bytes > self._bounds.max_bytes:
            raise Overloaded(f"model {self._name}: {len(self._queue)} requests are waiting; try again later")
        kind = tuple([array.shape[1:] for array in inputs])
        rows = inputs[0].shape[0] if self._max_batch > 1 else 1
        self._queue.append(_Job(inputs, rows, kind, size_bytes, deadline_s, waiter))
        self._queued_bytes += size_bytes
        self._schedule()

    async def drain(self) -> None:
        """Return when nothing is queued or running any more."""
        while not self.is_idle:
            if self._idle is None:
                self._idle = self._loop.create_future()
            await asyncio.shield(self._idle)

    def close(self, why: str = "was unloaded", *, after_s: float | None = None) -> None:
        """Refuse what comes and what still waits, which is told `why`; a run under way ends by itself."""
        self._is_closed = True
        self._disarm_expiry()
        while self._queue:
            waiter = self._pop().waiter
            if waiter.is_waiting():
                refusal = ModelNotReady(f"model {self._name}: {why}; try again later")
                self._fail(waiter, refusal if after_s is None else refusal.after(after_s))
        if self._under_way is None:
            self._tell_idle()
        self._executor.shutdown(wait=False)

    def _schedule(self) -> None:
        if self._is_held:
            self._arm_expiry()
            return
        if self._is_scheduled or self._under_way is not None:
            return
        self._is_scheduled = True
        if self._max_wait_s > 0:
            self._loop.call_later(self._max_wait_s, self._flush)
        else:
            self._loop.call_soon(self._flush)

    def _arm_expiry(self) -> None:
        """Look again when the next deadline passes: nothing else would, while nothing runs."""
        self._disarm_expiry()
        at_s = min([job.deadline_s for job in self._queue], default=NEVER)
        if at_s < NEVER:
            self._expiry = self._loop.call_later(at_s - self._now_s(), self._expire)

    def _disarm_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    def _expire(self) -> None:
        self._expiry = None
        if not self._is_held:
            return
        now_s = self._now_s()
        jobs, self._queue = self._queue, deque()
        self._queued_bytes = 0
        for job in jobs:
            if job.deadline_s > now_s:
                self._queue.append(job)
                self._queued_bytes += job.size_bytes
            elif job.waiter.is_waiting():
                self._fail(job.waiter, self._too_late())
        self._arm_expiry()
        if self.is_idle:
            self._tell_idle()

    def _too_late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"model {self._name}: the deadline passed in the queue")

    def _flush(self) -> None:
        self._is_scheduled = False
        if self._is_held:
            return
        batch = self._take()
        if not batch:
            self._tell_idle()
        elif self._may_run_inline and self._expected_s(sum([job.rows for job in batch])) <= MAX_INLINE_S:
            results = self._compute(batch)
            self._watch(results[-1])
            try:
                self._settle(batch, results)
            finally:
                self._schedule_rest()
        else:
            self._under_way = self._loop.run_in_executor(self._executor, self._compute, batch)
            self._under_way.add_done_callback(partial(self._finish, batch))

    def _watch(self, result: Ran | NanofleetError) -> None:
        """Move the model to its thread when it keeps the loop for too long, time after time."""
        if not isinstance(result, Ran):
            return
        if result.finished_s - result.started_s <= SLOW_S:
            self._slow_runs = 0
            return
        self._slow_runs += 1
        if self._slow_runs == SLOW_RUNS_TO_LEAVE_LOOP:
            self._may_run_inline = False
            _log.info("a model runs on its thread from now on: slower than measured", extra={"model": self._name})

    def _finish(self, batch: Sequence[_Job], run: "asyncio.Future[Sequence[Ran | NanofleetError]]") -> None:
        self._under_way = None
        try:
            self._settle(batch, run.result())
        finally:
            self._schedule_rest()

    def _schedule_rest(self) -> None:
        if self._queue:
            self._schedule()
        else:
            self._tell_idle()

    def _tell_idle(self) -> None:
        if self._idle is not None:
            self._idle.set_result(None)
            self._idle = None

    def _pop(self) -> _Job:
        job = self._queue.popleft()
        self._queued_bytes -= job.size_bytes
        return job

    def _take(self) -> Sequence[_Job]:
        """Take the oldest request and those behind it that can share its run."""
        now_s = self._now_s()
        batch: list[_Job] = []
        rows = 0
        while self._queue:
            job = self._queue[0]
            if not job.waiter.is_waiting():
                self._pop()
            elif job.deadline_s <= now_s:
                self._fail(self._pop().waiter, self._too_late())
            elif not batch or (job.kind == batch[0].kind and rows + job.rows <= self._max_batch):
                batch.append(self._pop())
                rows += job.rows
            else:
                break
            if rows >= self._max_batch:
                break
        return batch

    def _expected_s(self, rows: int) -> float:
        """Interpolate between the measured run of one row and of a full batch."""
        single_s, full_s = self._run_time
        share = (rows - 1) / (self._max_batch - 1) if self._max_batch > 1 else 0.0
        return single_s + (full_s - single_s) * share

    def _settle(self, batch: Sequence[_Job], results: Sequence[Ran | NanofleetError]) -> None:
        for job, result in zip(batch, results, strict=True):
            if not job.waiter.is_waiting():
                continue
            if isinstance(result, NanofleetError):
                self._fail(job.waiter, result)
                continue
            try:
                job.waiter.settle(result)
            except Exception as error:
                _log.error("a waiter failed on its result", extra={"model": self._name}, exc_info=True)
                if job.waiter.is_waiting():
                    self._fail(job.waiter, InternalError(f"model {self._name}: no answer: {type(error).__name__}"))

    def _fail(self, waiter: Waiter, error: NanofleetError) -> None:
        # A defect of one waiter must not reach those behind it.
        try:
            waiter.fail(error)
        except Exception:
            _log.error("a waiter failed on its error", extra={"model": self._name}, exc_info=True)

    def _compute(self, batch: Sequence[_Job]) -> Sequence[Ran | NanofleetError]:
        """Run a batch; called in the loop or on the model's thread. Never raises."""
        try:
            return self._run_jointly(batch)
        except NanofleetError as error:
            if len(batch) == 1:
                return [error]
            return [result for job in batch for result in self._compute([job])]
        except Exception as error:
            _log.error("a model run failed unexpectedly", extra={"model": self._name}, exc_info=True)
            return [InternalError(f"model {self._name}: the run failed: {type(error).__name__}")] * len(batch)

    def _run_jointly(self, batch: Sequence[_Job]) -> Sequence[Ran]:
        inputs = batch[0].inputs if len(batch) == 1 else _joined(batch)
        started_s = self._now_s()
        assert self._run is not None, "held: nothing runs"
        outputs = self._run(inputs)
        verdicts = None if self._judge is None else self._judge(outputs)
        finished_s = self._now_s()
        if len(batch) == 1:
            verdict = None if verdicts is None else weakest(verdicts)
            return [Ran(outputs, verdict, started_s, finished_s, batch[0].rows)]
        return self._split(batch, outputs, verdicts, started_s, finished_s)

    def _split(
        self,
        batch: Sequence[_Job],
        outputs: Sequence[Array],
        verdicts: Sequence[Verdict] | None,
        started_s: float,
        finished_s: float,
    ) -> Sequence[Ran]:
        rows = sum([job.rows for job in batch])
        if any(output.ndim == 0 or output.shape[0] != rows for output in outputs):
            shapes = [list(output.shape) for output in outputs]
            raise InternalError(f"model {self._name}: expected {rows} rows in every output, got shapes {shapes}")
        results = []
        first = 0
        for job in batch:
            behind = first + job.rows
            verdict = None if verdicts is None else _verdict_on(verdicts, first, behind, of=rows)
            parts = [output[first:behind] for output in outputs]
            results.append(Ran(parts, verdict, started_s, finished_s, rows))
            first = behind
        return results


def _joined(batch: Sequence[_Job]) -> Sequence[Array]:
    return [np.concatenate(arrays) for arrays in zip(*[job.inputs for job in batch], strict=True)]


def _verdict_on(verdicts: Sequence[Verdict], first: int, behind: int, *, of: int) -> Verdict:
    # Scores of more than two dimensions have several verdicts per row.
    per_row = len(verdicts) // of
    return weakest(verdicts[first * per_row : behind * per_row])
