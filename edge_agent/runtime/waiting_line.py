"""The queue of a model at work: who is let in, who frees a place, and who makes up the next batch.

`queue` says who is next and `forecast` when that would be; here both decide, and those who lose hear of it
(`outcomes`). Nothing here waits: the batcher brings the time and says when a batch is wanted.
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from edge_agent.runtime.forecast import Forecast
from edge_agent.runtime.job import NEVER, Job
from edge_agent.runtime.outcomes import Outcomes, Shed
from edge_agent.runtime.queue import FairQueue


class WaitingLine:
    def __init__(
        self,
        queue: FairQueue,
        *,
        forecast: Forecast,
        outcomes: Outcomes,
        max_batch: int,
        on_leave: Callable[[], None],
    ) -> None:
        """`on_leave` is called when somebody has left."""
        self._queue = queue
        self._forecast = forecast
        self._outcomes = outcomes
        self._max_batch = max_batch
        self._on_leave = on_leave

    def admit(self, job: Job, *, now_s: float, needs_time: bool) -> None:
        """Queue `job`, maybe in the place of another.

        Args:
            needs_time: False: nothing is known of when it would run, so only a place is needed.

        Raises:
            Overloaded: there is no place for it, or no time; it says when to come again.
        """
        job.due_s = self._forecast.due_s(job.deadline_s, now_s=now_s)
        if needs_time and job.due_s != NEVER:
            finish_s = self._forecast.finish_s(job.rows, ahead=self._queue.rows_ahead_of(job), now_s=now_s)
            if finish_s > job.due_s:
                raise self._outcomes.hopeless(job, finish_s=finish_s, now_s=now_s)
        victims = self._queue.make_room_for(job)
        if victims is None and self.drop_expired(now_s):
            victims = self._queue.make_room_for(job)
        if victims is None:
            raise self._outcomes.full(len(self._queue), self._queue.rows)
        for victim in victims:
            self._outcomes.displace(victim, self._queue.rows)
        self._put(job)

    def line_up(self, jobs: Sequence[Job], *, now_s: float) -> None:
        """Queue those who have been let in, because they cannot run at once after all."""
        for job in jobs:
            if job.waiter.is_waiting():
                job.due_s = self._forecast.due_s(job.deadline_s, now_s=now_s)
                self._put(job)
            else:
                self._outcomes.shed[Shed.LEFT] += 1

    def take(self, now_s: float) -> Sequence[Job]:
        """Take who is next and those behind it that can share its run without making any of them late."""
        batch: list[Job] = []
        rows, soonest_s, is_doubtful = 0, NEVER, False
        times = self._forecast.times
        while rows < self._max_batch and (job := self._queue.first()) is not None:
            alone_s = now_s + times.expected_s(job.rows)
            if job.deadline_s <= now_s:
                self._outcomes.expire(self._queue.pop())
            elif alone_s > job.due_s:
                is_doubtful = True
                self._outcomes.overtake(self._queue.pop(), finish_s=alone_s, now_s=now_s)
            elif not batch or (
                job.kind == batch[0].kind
                and rows + job.rows <= self._max_batch
                and now_s + times.expected_s(rows + job.rows) <= min(soonest_s, job.due_s)
            ):
                batch.append(self._queue.pop())
                rows += job.rows
                soonest_s = min(soonest_s, job.due_s)
            else:
                break
        if is_doubtful and not batch:
            times.doubt()
        return batch

    def take_all(self) -> Sequence[Job]:
        return [self._queue.pop() for _ in range(len(self._queue))]

    def drop_expired(self, now_s: float) -> int:
        """Fail all whose deadline has passed, and return how many they were."""
        expired = self._queue.expired(now_s)
        for job in expired:
            self._outcomes.expire(job)
        return len(expired)

    def _put(self, job: Job) -> None:
        self._queue.add(job)
        job.waiter.future.add_done_callback(partial(self._leave, job))

    def _leave(self, job: Job, _done: "asyncio.Future[object]") -> None:
        # It may have been answered, or have lost its place already.
        if job.is_queued:
            self._queue.remove(job)
            self._outcomes.shed[Shed.LEFT] += 1
            self._on_leave()
