"""The threads on which models run: a few for the whole agent, however many models there are.

As many as the cores that this process may use, so that runs do not take cores from each other. A batch is put together
only when a thread is free for it: whoever wants one and finds none waits for its turn, first come first served, and
until then its queue can still change.
"""

import asyncio
import math
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

_Result = TypeVar("_Result")


class RunThreads:
    def __init__(self, count: int, executor: Executor | None = None) -> None:
        """`executor` runs `count` things at a time; None: threads of its own."""
        self._executor = executor or ThreadPoolExecutor(count, thread_name_prefix="model")
        self._free = count
        self._turns: deque[Callable[[], None]] = deque()

    @property
    def has_free(self) -> bool:
        return self._free > 0

    def start(self, work: Callable[[], _Result]) -> "asyncio.Future[_Result]":
        """Run `work` on a thread; one must be free."""
        assert self._free > 0, "expected a free thread"
        self._free -= 1
        running = asyncio.get_running_loop().run_in_executor(self._executor, work)
        running.add_done_callback(self._release)
        return running

    def call_when_free(self, turn: Callable[[], None]) -> None:
        """Call `turn` once, when a thread is free and those who asked before have had theirs."""
        self._turns.append(turn)

    def close(self) -> None:
        """Take no more work; what is under way ends by itself."""
        self._executor.shutdown(wait=False)

    def _release(self, _running: "asyncio.Future[_Result]") -> None:
        self._free += 1
        # A turn that is not used, because nothing waits there any more, is the next one's.
        for _ in range(len(self._turns)):
            if not self._free:
                return
            self._turns.popleft()()


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
