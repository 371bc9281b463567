"""The dynamic batcher in front of one model, in the loop: who arrives together shares a run, and never another's fate.

    submit → arrived ──(end of this loop turn)──▶ a batch ─▶ run ─▶ settle each waiter
               └─ there is more than can run soon ─▶ queue ─▲

- What arrives within one turn of the loop (a broker connection reads many packets per turn) and fits into one run, or
  a few of a quick model, is run without further ado. Everything else goes through the queue, which says who is next.
- A request that the queue cannot answer in time is refused at once, and told when to come again (`forecast`). One whose
  time has become too short meanwhile is not run, nor one whose caller has left: that one frees its place as it leaves.
- A quick model runs in the loop: handing 13 us of work to a thread costs more than the work (about 60 us, measured).
  A slow one runs on a thread that it shares with the others (`threads`), one batch at a time; so does, from then on,
  one that was measured as quick and is not.
- A slow model may wait for a fuller batch, as long as that makes the average answer sooner (`estimate`).
- When a joint run fails, its requests are run again one by one (`joint_run`).
- While nothing may run (the model is not in memory, or is about to leave it) requests wait, and their deadlines pass.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from functools import partial

from core.clock import Clock
from core.errors import ModelNotReady, NanofleetError
from core.tensors import Array
from edge_agent.runtime.estimate import ArrivalRate, RunTimes
from edge_agent.runtime.forecast import Forecast
from edge_agent.runtime.job import NEVER, Job, Ran, Waiter
from edge_agent.runtime.joint_run import JointRun, JudgeOutputs, Run
from edge_agent.runtime.outcomes import Outcomes, Shed
from edge_agent.runtime.queue import FairQueue, QueueBounds
from edge_agent.runtime.session import RunTime
from edge_agent.runtime.threads import Running, RunThreads
from edge_agent.runtime.waiting_line import WaitingLine

__all__ = ["NEVER", "Batcher", "JudgeOutputs", "QueueBounds", "Ran", "Run", "Shed", "Waiter"]

_log = logging.getLogger(__name__)

# A run in the loop delays every other request by its length; beyond this the hand-over to a thread is the lesser cost.
MAX_INLINE_S = 300e-6
# A full batch takes longer than its run, for its rows are judged too, and a busy core adds to that: what leaves the
# loop is what blocks it for whole milliseconds, several times in a row. On its thread a quick model is 0.2 ms later.
SLOW_S = 10 * MAX_INLINE_S
SLOW_RUNS_TO_LEAVE_LOOP = 3
# What the batcher itself takes for a run, at least (measured).
_OVERHEAD_S = 20e-6


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
        threads: RunThreads | None = None,
        reply_reserve_s: float = 0.0,
    ) -> None:
        """Make a batcher, to be used in this loop alone.

        Args:
            run: runs a batch; None: hold what comes, until `run_with`.
            max_wait_s: longest wait for a fuller batch, where waiting pays.
            may_run_inline: False: the rows of a request do not tell how long it runs, so never run it in the loop.
            threads: what slow models share; None: one of its own.
            reply_reserve_s: part of a deadline that is kept back for the way of the reply.
        """
        self._name = name
        self._now_s = clock.monotonic_s
        self._judge = judge
        self._runs = None if run is None else JointRun(name, run, judge, self._now_s)
        self._is_held = run is None
        self._max_batch = max_batch
        self._max_wait_s = max_wait_s
        self._may_run_inline = may_run_inline
        self._inline_times = RunTimes(run_time, max_batch=max_batch)
        self._slow_runs = 0
        self._forecast = Forecast(run_time, max_batch=max_batch, reserve_s=reply_reserve_s)
        self._outcomes = Outcomes(name, self._forecast)
        self._rate = ArrivalRate()
        bounds = bounds or QueueBounds()
        self._queue = FairQueue(bounds)
        self._line = WaitingLine(
            self._queue,
            forecast=self._forecast,
            outcomes=self._outcomes,
            max_batch=max_batch,
            on_leave=self._tell_if_idle,
        )
        # Just arrived and not in the queue: what has run so soon that no order is needed.
        self._arrived: list[Job] = []
        self._arrived_rows = self._arrived_bytes = self._rows_since_look = 0
        self._bounds = bounds
        self._max_arrived_rows = self._rows_without_order()
        self._loop = asyncio.get_running_loop()
        self._threads = threads or RunThreads(1)
        self._own_threads = self._threads if threads is None else None
        self._is_scheduled = False
        # Rows that a batch waits for, and when it stops waiting.
        self._awaited_rows = 0
        self._wait: asyncio.TimerHandle | None = None
        # Since when a thread is wanted and none is free.
        self._wanted_s: float | None = None
        self._under_way: Running | None = None
        self._is_closed = False
        self._expiry: asyncio.TimerHandle | None = None
        self._idle: asyncio.Future[None] | None = None

    @property
    def queued(self) -> int:
        return len(self._arrived) + len(self._queue)

    @property
    def shed(self) -> Mapping[Shed, int]:
        """Count those that were not run, by why."""
        return self._outcomes.shed

    @property
    def is_idle(self) -> bool:
        """Whether nothing is queued or running."""
        return not self._arrived and not self._queue.rows and self._under_way is None

    def submit(
        self, inputs: Sequence[Array], waiter: Waiter, *, deadline_s: float = NEVER, priority: int = 0, client: str = ""
    ) -> None:
        """Queue one request; `deadline_s` is an instant of the clock.

        Args:
            priority: 1 is the most urgent, 0 the default (`queue.DEFAULT_PRIORITY`).
            client: whose turn the run counts as.

        Raises:
            Overloaded: there is no place for it, or no time; it says when to come again.
            ModelNotReady: the batcher is closed.
        """
        if self._is_closed:
            raise ModelNotReady(f"model {self._name}: is being unloaded; try again later")
        if self._under_way is not None:
            # Under overload the loop refuses for so long that the thread would wait for it.
            self._under_way.look()
        job = Job(
            inputs,
            waiter,
            rows=inputs[0].shape[0] if self._max_batch > 1 else 1,
            kind=tuple([array.shape[1:] for array in inputs]),
            size_bytes=sum([array.nbytes for array in inputs]),
            deadline_s=deadline_s,
            priority=priority,
            client=client,
        )
        if self._under_way is None and not self._queue.rows and not self._is_held and self._fits_now(job):
            self._arrived.append(job)
            self._arrived_rows += job.rows
            self._arrived_bytes += job.size_bytes
        else:
            now_s = self._now_s()
            self._line_up_arrived(now_s)
            self._line.admit(job, now_s=now_s, needs_time=not self._is_held)
        self._rows_since_look += job.rows
        self._schedule()

    def run_with(self, run: Run, run_time: RunTime | None = None) -> None:
        """Run batches with `run` from the next one on, and release what is held.

        `run_time` None: it takes as long as the run before.
        """
        self._runs = JointRun(self._name, run, self._judge, self._now_s)
        if run_time is not None:
            self._inline_times = RunTimes(run_time, max_batch=self._max_batch)
            self._max_arrived_rows = self._rows_without_order()
            self._forecast.restart(run_time)
        self._is_held = False
        self._disarm_expiry()
        if not self.is_idle:
            self._schedule()

    async def hold(self) -> None:
        """Start no further run, and return when the one under way has ended; `run_with` releases what waits."""
        self._is_held = True
        self._line_up_arrived(self._now_s())
        self._arm_expiry()
        if self._under_way is not None:
            await asyncio.wait([self._under_way.noted])

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
        self._line_up_arrived(self._now_s())
        self._outcomes.unload(self._line.take_all(), why, after_s)
        self._tell_if_idle()
        if self._own_threads is not None:
            self._own_threads.close()

    def _fits_now(self, job: Job) -> bool:
        has_rows = not self._arrived or self._arrived_rows + job.rows <= self._max_arrived_rows
        return has_rows and self._arrived_bytes + job.size_bytes <= self._bounds.max_bytes

    def _rows_without_order(self) -> int:
        """Return how many rows have run within SLOW_S, and at least a batch; bounded like the queue."""
        full_s = max(self._inline_times.expected_s(self._max_batch), _OVERHEAD_S)
        batches = int(SLOW_S / full_s) if self._may_run_inline and full_s <= MAX_INLINE_S else 1
        return min(batches * self._max_batch, self._bounds.max_requests)

    def _line_up_arrived(self, now_s: float) -> None:
        """Put what has arrived in this turn in order, because it cannot all run at once."""
        arrived, self._arrived = self._arrived, []
        self._arrived_rows = self._arrived_bytes = 0
        self._line.line_up(arrived, now_s=now_s)

    def _schedule(self) -> None:
        if self._is_held:
            self._arm_expiry()
            return
        if self._under_way is not None or self._wanted_s is not None:
            return
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._flush)
        elif self._wait is not None and self._arrived_rows + self._queue.rows >= self._awaited_rows:
            self._wait.cancel()
            self._stop_waiting()

    def _flush(self) -> None:
        if self._is_held or self._under_way is not None:
            self._is_scheduled = False
            return
        rows = min(self._arrived_rows + self._queue.rows, self._max_batch)
        is_inline = self._may_run_inline and self._inline_times.expected_s(rows) <= MAX_INLINE_S
        if not is_inline and self._max_wait_s > 0 and rows and self._waits_for_more(rows):
            return
        self._is_scheduled = False
        self._run_batch(is_inline=is_inline)

    def _waits_for_more(self, rows: int) -> bool:
        now_s = self._now_s()
        self._rate.look(self._rows_since_look, now_s=now_s)
        self._rows_since_look = 0
        soonest_s = min([job.deadline_s for job in self._arrived], default=NEVER)
        due_s = self._forecast.due_s(min(soonest_s, self._queue.soonest_deadline_s()), now_s=now_s)
        more = self._forecast.times.rows_worth_waiting_for(
            rows, rate_per_s=self._rate.per_s, max_wait_s=self._max_wait_s, slack_s=due_s - now_s
        )
        if more:
            self._awaited_rows = rows + more
            self._wait = self._loop.call_later(more / self._rate.per_s, self._stop_waiting)
        return more > 0

    def _stop_waiting(self) -> None:
        self._wait = None
        self._is_scheduled = False
        if not self._is_held and self._under_way is None:
            self._run_batch(is_inline=False)

    def _run_batch(self, *, is_inline: bool) -> None:
        now_s = self._now_s()
        if not is_inline and not self._threads.has_free:
            self._line_up_arrived(now_s)
            if self._wanted_s is None:
                self._wanted_s = now_s
                self._threads.call_when_free(self._take_turn)
            return
        batch = self._take(now_s)
        if not batch:
            self._tell_if_idle()
        elif is_inline:
            self._run_in_loop(batch)
        else:
            self._run_on_thread(batch, wanted_s=now_s)

    def _take_turn(self) -> None:
        wanted_s, self._wanted_s = self._wanted_s, None
        assert wanted_s is not None
        if self._is_held:
            return
        batch = self._take(self._now_s())
        if batch:
            self._run_on_thread(batch, wanted_s=wanted_s)
        else:
            self._tell_if_idle()

    def _run_in_loop(self, batch: Sequence[Job]) -> None:
        assert self._runs is not None, "held: nothing runs"
        results = self._runs.compute(batch)
        self._watch(results[-1])
        try:
            self._outcomes.settle(batch, results)
        finally:
            self._run_rest()

    def _run_on_thread(self, batch: Sequence[Job], *, wanted_s: float) -> None:
        assert self._runs is not None, "held: nothing runs"
        now_s = self._now_s()
        self._line_up_arrived(now_s)
        rows = sum([job.rows for job in batch])
        self._forecast.started(rows, wanted_s=wanted_s, now_s=now_s)
        work = partial(self._runs.compute, batch)
        self._under_way = self._threads.start(work, partial(self._finish, batch, rows, now_s))

    def _finish(
        self, batch: Sequence[Job], rows: int, started_s: float, results: Sequence[Ran | NanofleetError]
    ) -> None:
        self._under_way = None
        self._forecast.ended(rows, started_s=started_s, now_s=self._now_s())
        try:
            # First: the thread need not wait until the answers are written.
            if self._queue.rows and not self._is_scheduled:
                self._flush()
        finally:
            self._outcomes.settle(batch, results)
            self._run_rest()

    def _run_rest(self) -> None:
        self._tell_if_idle()
        if not self.is_idle:
            self._schedule()

    def _watch(self, result: Ran | NanofleetError) -> None:
        """Move the model to a thread when it keeps the loop for too long, time after time."""
        if not isinstance(result, Ran):
            return
        took_s = result.finished_s - result.started_s
        if self._queue.rows:
            self._forecast.times.observe(result.batch_rows, took_s)
        if took_s <= SLOW_S:
            self._slow_runs = 0
            return
        self._slow_runs += 1
        if self._slow_runs == SLOW_RUNS_TO_LEAVE_LOOP:
            self._may_run_inline = False
            self._max_arrived_rows = self._rows_without_order()
            _log.info("a model runs on its thread from now on: slower than measured", extra={"model": self._name})

    def _take(self, now_s: float) -> Sequence[Job]:
        if self._arrived and not self._queue.rows and (count := self._count_that_can_run(now_s)):
            return self._take_arrived(count)
        self._line_up_arrived(now_s)
        return self._line.take(now_s)

    def _count_that_can_run(self, now_s: float) -> int:
        """Return how many of those first to arrive fill a run that is in time for each; 0: they need an order."""
        kind = self._arrived[0].kind
        count = rows = 0
        soonest_s = NEVER
        for job in self._arrived:
            if count and rows + job.rows > self._max_batch:
                break
            if job.kind != kind or not job.waiter.is_waiting():
                return 0
            count += 1
            rows += job.rows
            if job.deadline_s < soonest_s:
                soonest_s = job.deadline_s
        finish_s = now_s + self._forecast.times.expected_s(rows)
        is_in_time = soonest_s == NEVER or finish_s <= self._forecast.due_s(soonest_s, now_s=now_s)
        return count if is_in_time else 0

    def _take_arrived(self, count: int) -> Sequence[Job]:
        batch, self._arrived = self._arrived[:count], self._arrived[count:]
        self._arrived_rows = sum([job.rows for job in self._arrived])
        self._arrived_bytes = sum([job.size_bytes for job in self._arrived])
        return batch

    def _arm_expiry(self) -> None:
        """Look again when the next deadline passes: nothing else would, while nothing runs."""
        self._disarm_expiry()
        at_s = self._queue.soonest_deadline_s()
        if at_s < NEVER:
            self._expiry = self._loop.call_later(at_s - self._now_s(), self._pass_deadlines)

    def _disarm_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    def _pass_deadlines(self) -> None:
        self._expiry = None
        if self._is_held:
            self._line.drop_expired(self._now_s())
            self._arm_expiry()
            self._tell_if_idle()

    def _tell_if_idle(self) -> None:
        if self._idle is not None and self.is_idle:
            self._idle.set_result(None)
            self._idle = None
