"""The threads on which models run: a few for the whole agent, however many models there are.

As many as the cores that this process may use, so that runs do not take cores from each other. A batch is put together
only when a thread is free for it: whoever wants one and finds none waits for its turn, first come first served, and
until then its queue can still change.
"""

import asyncio
import math
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

_Result = TypeVar("_Result")
# Chosen: many times what a thread takes to wake, and short enough for the loop where all cores are busy.
_HAND_OVER_S = 0.001


class RunThreads:
    def __init__(self, count: int, executor: Executor | None = None) -> None:
        """`executor` runs `count` things at a time; None: threads of its own."""
        self._executor = executor or ThreadPoolExecutor(count, thread_name_prefix="model")
        self._free = count
        self._turns: deque[Callable[[], None]] = deque()

    @property
    def has_free(self) -> bool:
        return self._free > 0

    def start(self, work: Callable[[], _Result], then: Callable[[_Result], None]) -> "Running":
        """Run `work` on a thread, one of which must be free; what it gives is for `then`, in the loop."""
        assert self._free > 0, "expected a free thread"
        self._free -= 1
        running = Running(asyncio.get_running_loop())
        future = self._begin(work)

        def end() -> None:
            self._release()
            then(future.result())

        running.follow(future, end)
        return running

    def call_when_free(self, turn: Callable[[], None]) -> None:
        """Call `turn` once, when a thread is free and those who asked before have had theirs."""
        self._turns.append(turn)

    def close(self) -> None:
        """Take no more work; what is under way ends by itself."""
        self._executor.shutdown(wait=False)

    def _begin(self, work: Callable[[], _Result]) -> "Future[_Result]":
        """Hand `work` over, and let go of the interpreter until the thread has it.

        Else the thread, just woken, would wait for whatever the loop does next: 0.1 to 0.2 ms a run (measured).
        """
        has_begun = threading.Lock()
        has_begun.acquire()

        def begin() -> _Result:
            has_begun.release()
            return work()

        future = self._executor.submit(begin)
        has_begun.acquire(timeout=_HAND_OVER_S)
        return future

    def _release(self) -> None:
        self._free += 1
        # A turn that is not used, because nothing waits there any more, is the next one's.
        for _ in range(len(self._turns)):
            if not self._free:
                return
            self._turns.popleft()()


class Running:
    """Work on a thread, from its start until the loop has taken note of its end.

    The thread tells the loop, but a busy loop hears of it only when it has done what else is due. Whoever works in the
    loop for long may `look` in between, so that the thread does not wait for its next work.
    """

    __slots__ = ("_end", "_future", "_loop", "noted")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.noted: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._future: Future[Any]
        self._end: Callable[[], None]

    def follow(self, future: "Future[Any]", end: Callable[[], None]) -> None:
        self._future = future
        self._end = end
        future.add_done_callback(self._tell)

    def look(self) -> None:
        """Take note of the end of the work, if it has ended."""
        if self.noted.done() or not self._future.done():
            return
        end = self._end
        # Which lead back here, and to the whole batch.
        del self._future, self._end
        self.noted.set_result(None)
        end()

    def _tell(self, _future: "Future[Any]") -> None:
        # On the thread. A process that stops does not wait for runs.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.look)


def available_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use: by its affinity, and by the quotas of its control groups."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, _quota(root))))


def _quota(root: Path) -> float:
    """Return the smallest `cpu.max` above this process in cores (kernel documentation, "Control Group v2")."""
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    top = root / "sys" / "fs" / "cgroup"
    quotas = [math.inf]
    for line in lines:
        if line.startswith("0::"):
            group = top / line[3:].lstrip("/")
            quotas += [
                _cores_of(folder / "cpu.max") for folder in (group, *group.parents) if folder.is_relative_to(top)
            ]
    return min(quotas)


def _cores_of(limit: Path) -> float:
    try:
        quota, period = limit.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        # No such file, or "max": no limit here.
        return math.inf
